"""A webhook's message from its token to the commit, in one round trip (docs/adr/0009).

The statement is run on the driver: it is the same for everybody, and what SQLAlchemy does for each execution would be
most of its cost. Isolation is in the database's function, which becomes the client's role before it writes.
"""

from operator import attrgetter
from typing import Any, Final

import psycopg
from psycopg import errors as pg

from kestra.dao.clients import check_token
from kestra.dao.messages import PARTS, IncomingMessage, Recorded, check
from kestra.driver import AsyncPooledConnection, PooledConnection, translated
from kestra.errors import ClientNotFound, ConfigurationError, InvalidValue, KestraError, UnknownToken
from kestra.transaction import Statement, role_error

_STATEMENT: Final = Statement(
    "SELECT * FROM kestra_ingest(%s::text, %s::text, %s::text, %s::text, %s::text, %s::text, %s::timestamptz, NULL)"
)


_parts: Final = attrgetter(*PARTS)

_OF_THE_ROLE: Final = "set_config('role'"
"""What the function does to become the client's role, in the context of an error."""


def ingest(connection: PooledConnection, *, token: str, message: IncomingMessage) -> Recorded:
    """What became of the message, which is committed.

    Args:
        connection: In autocommit, and nobody's role.
        token: The client's.
        message: What the webhook has delivered.

    Raises:
        UnknownToken: No client has the token.
        InvalidValue: A part of the message cannot be stored.
        ConversationNotFound: It is a duplicate, and somebody has deleted its conversation alone.
        DatabaseUnavailable: The connection broke. Whether it was committed is not known; deliver it again.
    """
    given = _given(token, message)
    try:
        rows = connection.fetch(_STATEMENT, given)
    except psycopg.Error as error:
        raise _meant(error, is_disconnect=connection.closed) from error
    return _recorded(rows, message)


async def async_ingest(connection: AsyncPooledConnection, *, token: str, message: IncomingMessage) -> Recorded:
    """`ingest` for asyncio."""
    given = _given(token, message)
    try:
        rows = await connection.fetch(_STATEMENT, given)
    except psycopg.Error as error:
        raise _meant(error, is_disconnect=connection.closed) from error
    return _recorded(rows, message)


def _given(token: str, message: IncomingMessage) -> list[object]:
    try:
        check_token(token)
    except InvalidValue:  # what cannot be a token is nobody's
        raise UnknownToken from None
    check(message)
    return [token, *_parts(message)]


def _recorded(rows: list[tuple[Any, ...]], message: IncomingMessage) -> Recorded:
    if not rows:
        raise UnknownToken
    return Recorded.of(rows[0], chat_id=message.chat_id)


def _meant(error: psycopg.Error, *, is_disconnect: bool) -> KestraError:
    context = error.diag.context or ""
    meant = translated(error, is_disconnect=is_disconnect)  # and the error has no values any more
    match error:
        case pg.UndefinedFunction() if not context:
            return ConfigurationError("The database has no kestra_ingest. Run `kestra upgrade` on it.")
        case pg.InsufficientPrivilege() if _OF_THE_ROLE in context:
            return role_error(error) or meant
        case pg.InvalidParameterValue() if _OF_THE_ROLE in context:
            return ConfigurationError("The login begins as another role: ALTER ROLE … RESET role, or use a session.")
    return UnknownToken() if isinstance(meant, ClientNotFound) else meant  # it was erased at this moment
