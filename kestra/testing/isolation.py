"""The assertion that a piece of code leaves the rows of all other clients alone.

Writes are found by comparing what the other clients have before and after. Reads are found in the results that the
statements of this process get: whoever works for another client, and ids of other clients among the rows of those who
see all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Engine, event, func, select, text
from sqlalchemy.engine import Connection

from kestra.base import BOUND_CLIENT_ID, Base, parse_client_id, tenant_key
from kestra.database import Database
from kestra.errors import InvalidClientId
from kestra.models import Client

_SHORTEST: Final = 16
"""How many bytes an id has at least, in a result."""


@contextmanager
def assert_touches_only(database: Database, *clients: Client | UUID | str) -> Iterator[None]:
    """Fail when, inside the block, a row of another client is inserted, updated, deleted or read.

    It sees what was flushed (and, in a database whose sessions really commit, what was committed) when the block ends,
    and what was read through SQLAlchemy in this process. It does not see a row that was both made and deleted inside,
    a lock, an aggregate over all clients, or columns of a row without its client, read in a system session.

    Args:
        database: Where the clients are.
        *clients: Those that the block may touch.

    Raises:
        AssertionError: Another client's rows were touched; the text has the client, the table and what was done. Not
            raised where the block raises an error of its own.
    """
    allowed = set(map(_id, clients))
    before = _rows(database, allowed)
    reads = _Reads(allowed=allowed, others=_others(database, allowed))
    event.listen(Engine, "before_cursor_execute", reads.look_whose)
    event.listen(Engine, "after_cursor_execute", reads.look)
    try:
        yield
    finally:
        event.remove(Engine, "after_cursor_execute", reads.look)
        event.remove(Engine, "before_cursor_execute", reads.look_whose)
    touched = [*_changes(before, _rows(database, allowed)), *sorted(reads.found)]
    if touched:
        names = ", ".join(sorted(map(str, allowed))) or "none"
        raise AssertionError("\n".join([f"Rows of other clients than {names} were touched:", *touched]))


def _id(client: Client | UUID | str) -> UUID:
    try:
        return client.id if isinstance(client, Client) else parse_client_id(client)
    except InvalidClientId as error:
        raise InvalidClientId(
            "Give the clients that may be touched one by one, as a Client or by their ids."
        ) from error


# --- writes ---

_Digests = dict[tuple[str, UUID], tuple[int, object]]
"""Of each table and client: how many rows, and a number that another version of any row changes."""


def _rows(database: Database, allowed: set[UUID]) -> _Digests:
    found: _Digests = {}
    with database.system_session(reason="isolation of a test", inside_tenant_session=True) as session:
        prepare = session.get_bind().dialect.identifier_preparer
        for table in Base.metadata.sorted_tables:
            key, name = tenant_key(table), prepare.format_table(table)
            if key is None or session.scalar(select(func.to_regclass(name).is_(None))):
                continue
            # A version of a row: an UPDATE to the same values is a write too. Added up, so that no order counts.
            version = "hashtextextended(concat(kestra_row.xmin, kestra_row.ctid, kestra_row::text), 0)"
            owner = prepare.format_column(key)
            rows = session.execute(
                text(f"SELECT {owner}, count(*), sum({version}::numeric) FROM {name} AS kestra_row GROUP BY 1")  # noqa: S608  # names of our own models
            )
            found.update({(table.name, client): (count, sums) for client, count, sums in rows if client not in allowed})
    return found


def _changes(before: _Digests, after: _Digests) -> list[str]:
    nothing = (0, None)
    changed = sorted(of for of in before.keys() | after.keys() if before.get(of) != after.get(of))
    return [
        f"{table} of client {client}: written ({before.get((table, client), nothing)[0]} rows before, "
        f"{after.get((table, client), nothing)[0]} after)"
        for table, client in changed
    ]


# --- reads ---


@dataclass
class _Reads:
    """What the results of this process show of other clients."""

    allowed: set[UUID]
    others: set[UUID]
    found: set[str] = field(default_factory=set)

    def look(
        self,
        connection: Connection,
        cursor: Any,
        _statement: str,
        _parameters: Any,
        _context: Any,
        _many: bool,  # noqa: FBT001  # SQLAlchemy's
    ) -> None:
        """Look at a result before anybody fetches it; in a session of one client there is nothing to be found."""
        if BOUND_CLIENT_ID not in connection.info:
            self.found.update(f"client {client}: read in a system session" for client in _named(cursor, self.others))

    def look_whose(self, connection: Connection, *_statement: Any) -> None:
        """Look whose session it is, before the server may refuse the statement."""
        bound = connection.info.get(BOUND_CLIENT_ID)
        if bound is not None and bound not in self.allowed:
            self.found.add(f"client {bound}: a session of it ran a statement")


def _others(database: Database, allowed: set[UUID]) -> set[UUID]:
    with database.system_session(reason="isolation of a test", inside_tenant_session=True) as session:
        return {*session.scalars(select(Client.id))} - allowed


def _named(cursor: Any, clients: set[UUID]) -> set[UUID]:
    """Those whose ids are anywhere in a result; none of a cursor on the server, which has not fetched yet."""
    result = getattr(cursor, "_cursor", cursor).pgresult  # of an asynchronous cursor, the one of the driver
    if result is None:
        return set()
    # As the value or a part of it (texts, arrays, documents), in the server's two formats.
    forms = {form: client for client in clients for form in (str(client).encode(), client.bytes)}
    found: set[UUID] = set()
    for row in range(result.ntuples):
        for column in range(result.nfields):
            value = result.get_value(row, column) or b""
            if len(value) >= _SHORTEST:
                found.update(client for form, client in forms.items() if form in value)
    return found
