"""Transactions that are opened in the flush of their first statement: isolation saves a round trip (docs/adr/0011).

BEGIN, the role and the client wait on the connection until something is executed, and are sent with it in libpq's
pipeline mode. Nothing can be executed before them: psycopg asks the connection first (`_start_query`) whatever it is
that a cursor sends. A unit of work that executes nothing sends nothing.

psycopg's own pipeline costs more processor time than the round trip it saves on a local socket, and its cursor much of
what a short statement takes (docs/adr/0012), so this overrides methods of psycopg that are private. They are all in
this file, the version is pinned, and the tests hold them.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple, NoReturn
from uuid import UUID

import psycopg
from psycopg import abc
from psycopg import errors as pg
from psycopg._connection_base import BaseConnection
from psycopg._cursor_base import BaseCursor
from psycopg._pipeline_base import BasePipeline
from psycopg._preparing import Key, Prepare
from psycopg._queries import PostgresQuery, _query2pg_nocache
from psycopg.adapt import Transformer
from psycopg.errors import error_from_result
from psycopg.generators import execute, fetch_many, send
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus, Format, PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

from kestra.base import SETTING
from kestra.errors import ConfigurationError, KestraError


class Statement:
    """A statement with psycopg's placeholders, which is converted to the server's once."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._converted = _query2pg_nocache(text.encode(), "utf-8")

    def bind(self, transformer: abc.Transformer, parameters: abc.Params) -> PostgresQuery:
        """What `PostgresQuery.convert` makes of it."""
        bound = PostgresQuery(transformer)
        bound.query, bound._want_formats, bound._order, bound._parts = self._converted
        bound.dump(parameters)
        return bound


def _constant(text: str, parameter: str | None = None) -> PostgresQuery:
    query = PostgresQuery(_TRANSFORMER)
    query.query = text.encode()
    query.params = None if parameter is None else [parameter.encode()]
    return query


_TRANSFORMER: Final = Transformer()

# Whatever the server's default is: what waits for a lock relies on seeing what was committed meanwhile.
_BEGIN_TEXT: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"
_BEGIN: Final = _constant(_BEGIN_TEXT)


class Opening(NamedTuple):
    """How a transaction begins.

    Attributes:
        role: As whom it runs.
        client_id: Whose rows it sees, or None.
    """

    role: str
    client_id: UUID | None = None

    @property
    def identity(self) -> list[str]:
        """What becomes the role and the client. It is a literal, which is all that Citus hands on to its workers."""
        statements = [f"SET LOCAL ROLE {self.role}"]
        if self.client_id is not None:
            statements.append(f"SET LOCAL {SETTING} = '{self.client_id}'")
        return statements

    @property
    def script(self) -> str:
        """All of it as one message of the simple protocol."""
        return "; ".join([_BEGIN_TEXT, *self.identity])

    def queries(self, *, prepare: bool) -> list[PostgresQuery]:
        """One by one, for the extended protocol: constant texts where they are prepared."""
        if not prepare:
            return [_BEGIN, *map(_constant, self.identity)]
        role = f"SELECT pg_catalog.set_config('role', '{self.role}', true)"
        if self.client_id is None:
            return [_BEGIN, _constant(role)]
        return [_BEGIN, _constant(f"{role}, pg_catalog.set_config('{SETTING}', $1, true)", str(self.client_id))]


def role_error(error: psycopg.Error) -> KestraError | None:
    """What it means that a transaction could not take its role, if it is that."""
    match error:
        case pg.InsufficientPrivilege():
            return ConfigurationError(
                "The login role may not become a role of kestra. Run `kestra verify` as this user: it prints the GRANT "
                "that is missing."
            )
        case pg.InvalidParameterValue():
            return ConfigurationError("The roles of kestra are missing. Run `kestra upgrade` on this database.")
    return None


class OpensTransactions(BaseConnection[Any]):
    """A connection whose transaction opens with the first statement; a base beside either of psycopg's classes.

    Attributes:
        opening: What is still to be sent, or None. It stays until the server has answered, so that whatever goes wrong
            in between, nothing is executed without its role.
    """

    opening: Opening | None = None

    def end_interrupted(self) -> bool:
        """End the connection, and say so, when a statement was left before its answer was read, or it is broken."""
        pgconn = self.pgconn
        interrupted = pgconn.transaction_status in {TransactionStatus.ACTIVE, TransactionStatus.UNKNOWN}
        if interrupted or self._is_left_in_a_pipeline():
            pgconn.finish()
            return True
        return False

    def _refuse_interrupted(self) -> None:
        """Raise as libpq does outside of a pipeline; in one it would hand on the answer to somebody else."""
        if self._is_left_in_a_pipeline():
            raise psycopg.OperationalError("another command is already in progress")

    def _is_left_in_a_pipeline(self) -> bool:
        return self._pipeline is None and self.pgconn.pipeline_status != PipelineStatus.OFF

    def _fetch_gen(self, statement: Statement, parameters: abc.Params) -> abc.PQGen[list[tuple[Any, ...]]]:
        """The rows of a statement, without a cursor, which would take a third of the processor time."""
        transformer = Transformer(self)
        bound = statement.bind(transformer, parameters)
        if self.opening is None and (name := _known(self, bound)):
            result = yield from _execute_known(self, name, bound)
        else:
            result = yield from _execute(self, bound)
        transformer.set_pgresult(result)
        return transformer.load_rows(0, result.ntuples, tuple)

    def _start_query(self) -> abc.PQGen[None]:
        """Open the transaction before what is no plain statement: COPY, a stream, a cursor of the server, a script."""
        self._refuse_interrupted()
        yield from _deallocate_forgotten(self)
        if self.opening is not None:
            if self._pipeline is None:
                self.pgconn.send_query(self.opening.script.encode())
                _check_opened((yield from execute(self.pgconn)))
            else:  # psycopg's, as `executemany` has one
                yield from self._open_in(self._pipeline, self.opening)
            self.opening = None
        yield from super()._start_query()

    def _open_in(self, pipeline: BasePipeline, opening: Opening) -> abc.PQGen[None]:
        try:
            for query in opening.queries(prepare=False):
                yield from self._exec_command(query.query)
            yield from pipeline._sync_gen()
        except psycopg.Error as error:
            _raise(error)

    def _commit_gen(self) -> abc.PQGen[None]:
        self.opening = None
        if self.pgconn.transaction_status == TransactionStatus.INERROR:  # it rolls back, where psycopg forgets too
            self._prepared.clear()
        yield from super()._commit_gen()

    def _rollback_gen(self) -> abc.PQGen[None]:
        self.opening = None
        yield from super()._rollback_gen()


class _Opens(BaseCursor[OpensTransactions, Any]):
    """A cursor whose first statement takes along what opens the transaction. What is prepared it sends by name."""

    def _execute_gen(self, query: abc.Query, params: abc.Params | None = None, **options: Any) -> abc.PQGen[None]:
        # Without parameters it may be a script, or COPY, which a pipeline does not take.
        if params and not self._closed and self._conn._pipeline is None:
            return self._execute_plain(query, params, **options)
        return super()._execute_gen(query, params, **options)

    def _execute_plain(
        self, query: abc.Query, params: abc.Params, *, prepare: bool | None = None, binary: bool | None = None
    ) -> abc.PQGen[None]:
        """What psycopg's `_execute_gen` does."""
        connection = self._conn
        self._reset()
        self._tx = Transformer(self)
        bound = self._query = self._convert_query(query, params)
        is_binary = self.format == Format.BINARY if binary is None else binary
        if connection.opening is None and (name := _known(connection, bound, prepare=prepare)):
            self._set_results([(yield from _execute_known(connection, name, bound, binary=is_binary))])
        elif connection.opening is not None and 0 < len(bound.params or ()) <= _MOST_PARAMETERS:
            self._set_results([(yield from _execute(connection, bound, prepare=prepare, binary=is_binary))])
        else:
            yield from connection._start_query()
            yield from self._maybe_prepare_gen(bound, prepare=prepare, binary=binary)


_MOST_PARAMETERS: Final = 65535
"""That libpq takes. In a pipeline it would refuse more in the middle."""


class OpeningCursor(_Opens, psycopg.Cursor[Any]):
    """The cursor of a connection for threads."""


class AsyncOpeningCursor(_Opens, psycopg.AsyncCursor[Any]):
    """The cursor of a connection for asyncio."""


def _known(connection: OpensTransactions, statement: PostgresQuery, *, prepare: bool | None = None) -> bytes | None:
    """The name of a statement that is prepared, which from now on is the last to give way to others."""
    prepared = connection._prepared
    if prepare is False or prepared.prepare_threshold is None:
        return None
    key = prepared.key(statement)
    name = prepared._names.get(key)
    if name is not None:
        prepared._names.move_to_end(key)
    return name


def _execute_known(
    connection: OpensTransactions, name: bytes, statement: PostgresQuery, *, binary: bool = False
) -> abc.PQGen[PGresult]:
    """The result of one statement that is prepared, in a transaction that is open."""
    yield from connection._start_query()
    connection.pgconn.send_query_prepared(
        name, statement.params, statement.formats, Format.BINARY if binary else Format.TEXT
    )
    result: PGresult
    [result] = yield from execute(connection.pgconn)
    if _is_lost(result):
        connection._prepared.clear()
    _check(result)
    return result


def _execute(
    connection: OpensTransactions,
    statement: PostgresQuery,
    *,
    prepare: bool | None = None,
    binary: bool = False,
    again: bool = True,
) -> abc.PQGen[PGresult]:
    """The result of one statement, which opens the transaction in the same flush where it is to be opened."""
    pgconn, prepared = connection.pgconn, connection._prepared
    connection._refuse_interrupted()
    yield from _deallocate_forgotten(connection)
    opening = _queries(connection)
    try:
        pgconn.enter_pipeline_mode()
        sent = [_send(connection, query, prepare=True) for query in opening]
        sent.append(_send(connection, statement, prepare=prepare, binary=binary))
        pgconn.pipeline_sync()
        answers = yield from _answers(pgconn)
    except BaseException:
        # Something struck in the middle: whoever came next would read what this one was to read.
        pgconn.finish()
        raise
    if len(answers) == sent.count(_SENT) == len(sent) and {answer.status for answer in answers} <= _SUCCESS:
        connection.opening = None  # the usual end: everything was prepared, and went well
        return answers[-1]
    ends = [0, *accumulate(each.answers for each in sent)]
    opened, executed = answers[: ends[len(opening)]], answers[ends[len(opening)] :]
    failed = next((answer for answer in answers if answer.status not in _SUCCESS), None)
    if failed is None and len(answers) < ends[-1]:
        raise psycopg.OperationalError("the connection was lost before everything was answered")
    if failed is not None and (_is_lost(failed) or any(each.prepare is Prepare.SHOULD for each in sent)):
        prepared.clear()  # who knows what the server has: it forgets everything too, before something is prepared
        if again and opening and _is_lost(failed) and pgconn.transaction_status == TransactionStatus.IDLE:
            # Somebody has deallocated BEGIN, and so nothing was executed.
            return (yield from _execute(connection, statement, prepare=prepare, binary=binary, again=False))
    _check_opened(opened)
    connection.opening = None
    for answer in executed:
        _check(answer)
    for each, end in zip(sent, ends[1:], strict=True):
        if each.key is not None:
            prepared.validate(each.key, each.prepare, each.name, answers[end - 1 : end])
    yield from _deallocate_forgotten(connection)
    return answers[-1]


def _queries(connection: OpensTransactions) -> list[PostgresQuery]:
    if connection.opening is None:
        return []
    return connection.opening.queries(prepare=connection.prepare_threshold is not None)


class _Sent(NamedTuple):
    """A query that was sent, as `PrepareManager` wants to be told when it is answered.

    Attributes:
        key: None when there is nothing to tell.
    """

    key: Key | None = None
    prepare: Prepare = Prepare.YES
    name: bytes = b""

    @property
    def answers(self) -> int:
        return 2 if self.prepare is Prepare.SHOULD else 1


_SENT: Final = _Sent()


def _send(connection: OpensTransactions, query: PostgresQuery, *, prepare: bool | None, binary: bool = False) -> _Sent:
    pgconn, prepared = connection.pgconn, connection._prepared
    result_format = Format.BINARY if binary else Format.TEXT
    if name := _known(connection, query, prepare=prepare):
        pgconn.send_query_prepared(name, query.params, query.formats, result_format)
        return _SENT
    decided, name = prepared.get(query, prepare)
    if decided is Prepare.NO:
        pgconn.send_query_params(query.query, query.params, query.types, query.formats, result_format)
    else:
        if decided is Prepare.SHOULD:
            pgconn.send_prepare(name, query.query, query.types)
        pgconn.send_query_prepared(name, query.params, query.formats, result_format)
    return _Sent(prepared.maybe_add_to_cache(query, decided, name), decided, name)


def _answers(pgconn: PGconn) -> abc.PQGen[list[PGresult]]:
    """Send what waits, read until the server is ready for more, and leave the pipeline."""
    yield from send(pgconn)
    answers: list[PGresult] = []
    try:
        while (answer := (yield from fetch_many(pgconn))) and answer[0].status != ExecStatus.PIPELINE_SYNC:
            answers += answer
    except psycopg.Error:
        if all(answer.status in _SUCCESS for answer in answers):
            raise  # else an answer says why the connection ended
    if pgconn.status == ConnStatus.OK:
        pgconn.exit_pipeline_mode()
    return answers


def _deallocate_forgotten(connection: OpensTransactions) -> abc.PQGen[None]:
    """What psycopg does after a statement; before one too, as what is prepared next would be deallocated with it."""
    if connection._prepared._to_flush and connection.pgconn.transaction_status != TransactionStatus.INERROR:
        yield from connection._prepared.maintain_gen(connection)


def _is_lost(answer: PGresult) -> bool:
    """Whether a prepared statement is gone, or of no use since its tables were changed."""
    return answer.status not in _SUCCESS and answer.error_field(DiagnosticField.SQLSTATE) in {b"26000", b"0A000"}


def _check(answer: PGresult) -> None:
    if answer.status not in _SUCCESS:
        raise error_from_result(answer)


def _check_opened(answers: Sequence[PGresult]) -> None:
    for answer in answers:
        try:
            _check(answer)
        except psycopg.Error as error:
            _raise(error)


def _raise(error: psycopg.Error) -> NoReturn:
    meant = role_error(error)
    if meant is None:
        raise error
    raise meant from error


_SUCCESS: Final = frozenset({ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK})
