"""Statements of hot paths: compiled once, with the client's filter, then run on the driver (docs/adr/0010)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import CompoundSelect, Dialect, Select
from sqlalchemy.orm import Session

from kestra.errors import UnscopedStatement
from kestra.tenancy import fetch_all, is_watched
from kestra.transaction import Statement


class _Compiled(NamedTuple):
    statement: Statement
    constants: Mapping[str, object]
    processors: Mapping[str, Callable[[object], object]]


class HotStatement:
    """A statement whose execution costs what the driver's does.

    Nothing of its isolation is its own: what is run was compiled for tenant sessions, in the transaction, role and
    client of the session. Its columns are such as the driver returns them. Where somebody listens to what is executed
    (SQLAlchemy's events, for a log or a trace), it is executed as any other.
    """

    def __init__(self, statement: Select[*tuple[Any, ...]] | CompoundSelect[*tuple[Any, ...]]) -> None:
        """Take the statement, which has values in parameters alone."""
        self._statement = statement
        self._compiled: WeakKeyDictionary[Dialect, _Compiled] = WeakKeyDictionary()

    def rows(self, session: Session, given: Mapping[str, object]) -> Sequence[Sequence[Any]]:
        """All rows, in a session of one client.

        Args:
            session: A tenant session.
            given: The parameters.

        Raises:
            KestraError: As `session.execute`.
        """
        connection = session.connection()
        if is_watched(connection):
            return session.execute(self._statement, given).all()
        compiled = self._compiled.get(connection.dialect)
        if compiled is None:
            compiled = self._compiled[connection.dialect] = self._compile(connection.dialect)
        parameters = {**compiled.constants, **given}
        for name, process in compiled.processors.items():
            if name in parameters:  # the driver names what is missing
                parameters[name] = process(parameters[name])
        return fetch_all(connection, compiled.statement, parameters)

    def _compile(self, dialect: Dialect) -> _Compiled:
        compiled: Any = self._statement.compile(dialect=dialect)
        if compiled.kestra_unscoped or compiled.kestra_stamps:
            raise UnscopedStatement("A hot statement has neither text nor values for a client: nothing checks them.")
        constants = {name: compiled.params[name] for bind, name in compiled.bind_names.items() if not bind.required}
        return _Compiled(Statement(compiled.string), constants, compiled._bind_processors)  # noqa: SLF001  # SQLAlchemy's own
