"""psycopg as kestra uses it: pooled connections, what a failed connection means, the translation of every error.

The translation is an error listener, so that it costs nothing until something fails. What it raises names constraints,
tables and columns; the driver's own error stays as the cause, cut down to a text that quotes no row.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic
from types import NoneType
from typing import Any, Final, NoReturn

import psycopg
from psycopg import errors as pg
from psycopg.abc import Buffer, Params
from psycopg.adapt import AdaptersMap
from psycopg.pq.abc import PGconn
from psycopg.types.array import ListDumper
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolTimeout
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import InvalidRequestError

from kestra.base import BOUND_CLIENT_ID
from kestra.columns import json_dumps, json_loads
from kestra.errors import (
    AuthenticationFailed,
    ClientNotFound,
    CrossTenantWrite,
    DatabaseUnavailable,
    DuplicateToken,
    InvalidToolsConfig,
    InvalidValue,
    KestraError,
    PoolExhausted,
    StatementFailed,
    UnscopedStatement,
)
from kestra.transaction import AsyncOpeningCursor, OpeningCursor, OpensTransactions, Statement

IDLE_SECONDS: Final = 5.0
"""A connection that has rested longer is checked before it is handed out; a busy one never is."""


class PooledConnection(OpensTransactions, psycopg.Connection[Any]):
    """A connection that knows since when it rests in its pool."""

    def __init__(self, pgconn: PGconn) -> None:
        super().__init__(pgconn)
        self.cursor_factory = OpeningCursor
        self.idle_since = monotonic()
        self.guarded = False

    def close(self) -> None:
        """Go back to the pool (`close_returns`), or close when there is none."""
        self.idle_since = monotonic()
        self.guarded = False
        self.opening = None
        pool = getattr(self, "_pool", None)
        if pool is not None and self.end_interrupted():
            # psycopg does nothing here for a connection that broke, and the pool would miss it for ever.
            pool.putconn(self)
        else:
            super().close()

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """A cursor, except while a client is bound: no filter sees what is sent past SQLAlchemy."""
        if self.guarded:
            refuse_guarded()
        return super().cursor(*args, **kwargs)

    def fetch(self, statement: Statement, parameters: Params) -> list[tuple[Any, ...]]:
        """The rows of a statement, except while a client is bound."""
        if self.guarded:
            refuse_guarded()
        with self.lock:
            return self.wait(self._fetch_gen(statement, parameters))


class AsyncPooledConnection(OpensTransactions, psycopg.AsyncConnection[Any]):
    """`PooledConnection` for asyncio."""

    def __init__(self, pgconn: PGconn) -> None:
        super().__init__(pgconn)
        self.cursor_factory = AsyncOpeningCursor
        self.idle_since = monotonic()
        self.guarded = False

    async def close(self) -> None:
        """As `PooledConnection.close`, to its end also where the task is cancelled: the pool would miss it for ever."""
        closing = asyncio.create_task(self._close())
        _closing.add(closing)  # a loop alone would not keep it
        closing.add_done_callback(_closing.discard)
        await asyncio.shield(closing)

    async def _close(self) -> None:
        self.idle_since = monotonic()
        self.guarded = False
        self.opening = None
        pool = getattr(self, "_pool", None)
        if pool is not None and self.end_interrupted():
            await pool.putconn(self)
        else:
            await super().close()

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """As `PooledConnection.cursor`."""
        if self.guarded:
            refuse_guarded()
        return super().cursor(*args, **kwargs)

    async def fetch(self, statement: Statement, parameters: Params) -> list[tuple[Any, ...]]:
        """As `PooledConnection.fetch`."""
        if self.guarded:
            refuse_guarded()
        async with self.lock:
            return await self.wait(self._fetch_gen(statement, parameters))


_closing: Final[set[asyncio.Task[None]]] = set()


def guarded(getconn: Callable[[], PooledConnection]) -> Callable[[], PooledConnection]:
    """The same connections, whose cursors are refused from the start: nobody has bound them to a client yet."""

    def get() -> PooledConnection:
        connection = getconn()
        connection.guarded = True
        return connection

    return get


def async_guarded(
    getconn: Callable[[], Awaitable[AsyncPooledConnection]],
) -> Callable[[], Awaitable[AsyncPooledConnection]]:
    """As `guarded`."""

    async def get() -> AsyncPooledConnection:
        connection = await getconn()
        connection.guarded = True
        return connection

    return get


def refuse_guarded() -> NoReturn:
    """Raise, because a client is bound to the connection."""
    raise UnscopedStatement(
        "A cursor of the driver is refused in a tenant session: the client filter is put in where SQLAlchemy "
        "compiles. Execute statements on the session."
    )


def check_if_idle(connection: PooledConnection) -> None:
    """Raise when a connection that has rested is dead; the pool then replaces it."""
    if monotonic() - connection.idle_since > IDLE_SECONDS:
        ConnectionPool.check_connection(connection)


async def async_check_if_idle(connection: AsyncPooledConnection) -> None:
    """As `check_if_idle`."""
    if monotonic() - connection.idle_since > IDLE_SECONDS:
        await AsyncConnectionPool.check_connection(connection)


class _ListDumper(ListDumper):
    """psycopg's takes three to six times as long for texts: it looks at each of them with two expressions."""

    def dump(self, obj: list[Any]) -> Buffer | None:
        """The literal of an array: every text in quotes, where nothing but a quote and a backslash has a meaning."""
        kinds = {*map(type, obj)}
        if not kinds or self.sub_dumper is None or not kinds <= {str, NoneType}:
            return super().dump(obj)
        together = "".join(filter(None, obj))
        if '"' in together or "\\" in together:
            obj = [text and _escaped(text) for text in obj]
        if NoneType in kinds:
            texts = ",".join("NULL" if text is None else f'"{text}"' for text in obj)
        else:
            texts = '"' + '","'.join(obj) + '"'
        return self.sub_dumper.dump("{" + texts + "}")


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"")


def connect_options(*, connect_timeout: int, prepare_threshold: int | None) -> dict[str, Any]:
    """What every connection is opened with.

    Autocommit, because a connection opens the transactions of sessions itself: BEGIN, the role and the client travel
    with the first statement.
    """
    adapters = AdaptersMap(psycopg.adapters)
    adapters.register_dumper(list, _ListDumper)
    set_json_loads(json_loads, adapters)
    set_json_dumps(json_dumps, adapters)
    return {
        "autocommit": True,
        "context": adapters,
        "connect_timeout": connect_timeout,
        "prepare_threshold": prepare_threshold,
        "fallback_application_name": "kestra",
    }


def probe(url: str, options: Mapping[str, Any]) -> None:
    """Connect once, so that a wrong address or password is known at once and by its name.

    A pool connects in the background and retries: without this, a wrong password would be a time-out after 30 seconds.

    Raises:
        AuthenticationFailed: The server refused the user or the password.
        DatabaseUnavailable: It could not be reached, or has no such database.
    """
    try:
        psycopg.connect(url, **options).close()
    except psycopg.Error as error:
        raise connection_error(error) from error


def connection_error(error: psycopg.Error) -> DatabaseUnavailable:
    """What a failed attempt to connect means. libpq gives no SQLSTATE for it, only an account of the handshake."""
    text = str(error)
    asked_for_password = error.pgconn is not None and (error.pgconn.used_password or error.pgconn.needs_password)
    if "does not exist" in text and "database" in text.partition("FATAL:")[2]:
        return DatabaseUnavailable("The server has no such database. Create it, or correct KESTRA_DATABASE_URL.")
    if asked_for_password or "authentication" in text or "role" in text.partition("FATAL:")[2]:
        return AuthenticationFailed(
            "The server refused the user or the password. Correct the credentials in KESTRA_DATABASE_URL."
        )
    return DatabaseUnavailable(
        "The server cannot be reached. Check host, port and network of KESTRA_DATABASE_URL, and that the server runs."
    )


def translate(context: ExceptionContext) -> KestraError | None:
    """What SQLAlchemy raises instead of `context.original_exception`: the error of this package that says the same.

    An error of this package that was raised inside a column type arrives here too; SQLAlchemy would wrap it.
    """
    error = context.original_exception
    connection = context.connection
    client_id = connection.info.get(BOUND_CLIENT_ID) if connection is not None and not connection.invalidated else None
    if isinstance(error, KestraError):
        return _again(error)
    if isinstance(error, PoolTimeout):
        return pool_exhausted()
    if isinstance(error, UnicodeEncodeError):
        # The error shows its text, which is not for a traceback: another of the same length keeps the positions right.
        error.object = "?" * len(error.object)
        error.args = (error.encoding, error.object, error.start, error.end, error.reason)
        return InvalidValue(
            "A text has a lone surrogate, which UTF-8 cannot hold. Nothing was written; clean the text first."
        )
    if isinstance(error, InvalidRequestError):
        # SQLAlchemy's wrapper would quote the statement, whose literals may be anything.
        return StatementFailed(f"The statement could not be executed: {error.args[0]}.", sqlstate=None)
    if not isinstance(error, psycopg.Error):
        return None
    return translated(error, client_id, is_disconnect=context.is_disconnect)


def translated(error: psycopg.Error, client_id: Any = None, *, is_disconnect: bool) -> KestraError:
    """The error of this package that says the same; the driver's own loses the values in its text.

    Args:
        error: Of a statement, on a connection that was had.
        client_id: Whose session it was, if it was one's.
        is_disconnect: Whether the connection is broken.
    """
    meant = _translate(error, client_id, is_disconnect=is_disconnect)
    error.args = (_without_values(error),)
    return meant


def pool_exhausted() -> PoolExhausted:
    """What it means that the pool gave no connection."""
    return PoolExhausted(
        "No connection became free in time: every one of the pool is in use. Look for sessions that are held during "
        "slow work (an HTTP call), or raise KESTRA_POOL_MAX_SIZE."
    )


def _again(error: KestraError) -> KestraError:
    """The same error once more: SQLAlchemy raises the result *from* the original, which cannot be its own cause."""
    again = type(error).__new__(type(error), *error.args)
    again.__dict__.update(error.__dict__)
    return again


def _translate(error: psycopg.Error, client_id: Any, *, is_disconnect: bool) -> KestraError:  # noqa: PLR0911  # a table
    diag = error.diag
    where = f"{diag.table_name or '?'}.{diag.column_name or diag.constraint_name or '?'}"
    match error:
        case pg.ForeignKeyViolation() if (diag.constraint_name or "").endswith("_client_id_clients"):
            return ClientNotFound(client_id)
        case pg.UniqueViolation() if diag.constraint_name == "uq_clients_token":
            return DuplicateToken()
        case pg.CheckViolation() if diag.constraint_name == "ck_clients_tools_config_is_object":
            return InvalidToolsConfig("tools_config must be a JSON object. Nothing was written.")
        case pg.CheckViolation() | pg.NotNullViolation():
            return InvalidValue(f"{where} does not allow this value ({type(error).__name__}). Nothing was written.")
        case pg.GroupingError():
            return StatementFailed(
                "Every selected column has to be grouped by or aggregated, also when the primary key is grouped by: "
                "in a tenant session a table is a sub-query, which has none.",
                sqlstate=error.sqlstate,
            )
        case pg.InsufficientPrivilege() if client_id is None:
            return StatementFailed(
                "The role of system sessions may not do this; the schema is changed by migrations.",
                sqlstate=error.sqlstate,
            )
        case pg.InsufficientPrivilege():
            return CrossTenantWrite(
                "PostgreSQL refused this under row level security or the role's grants: it is not the session's to do "
                f"(table {diag.table_name or 'unknown'}). Nothing was written."
            )
        case pg.DataError():
            return InvalidValue(
                f"A value does not fit its column ({type(error).__name__}): a NUL byte, a text that is too long, "
                "a malformed literal. Nothing was written."
            )
    if is_disconnect or error.sqlstate in {"57P01", "57P02", "57P03"}:
        return DatabaseUnavailable(
            "The connection to the server broke. Unless a COMMIT was under way nothing was written; run it again."
        )
    return StatementFailed(
        f"PostgreSQL refused the statement: {type(error).__name__} ({error.sqlstate or 'no SQLSTATE'}, {where}).",
        sqlstate=error.sqlstate,
    )


def _without_values(error: psycopg.Error) -> str:
    """The driver's text without what the server quotes: rows in DETAIL, literals in texts about data and syntax."""
    names_only = error.sqlstate is not None and error.sqlstate[:2] in {"08", "23", "40", "53", "55", "57"}
    message = error.diag.message_primary if names_only else None
    return message or f"{type(error).__name__} ({error.sqlstate or 'raised by the driver'})"
