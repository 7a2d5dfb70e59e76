"""Sessions: one client for a whole life (`TenantSession`), or every client for a stated reason (`SystemSession`).

A session opens its transactions with its role and its client, together with the first statement; both end with the
transaction, so nothing of a client stays on a pooled connection. Objects keep their values after the commit and the end
of the session.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar, cast
from uuid import UUID

from sqlalchemy import Engine, Table, event, inspect
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import InstanceState, Mapper, Session, SessionTransaction, UOWTransaction

from kestra.base import (
    BOUND_CLIENT_ID,
    SYSTEM_ROLE,
    TENANT_ROLE,
    ClientId,
    parse_client_id,
    tenant_key,
)
from kestra.errors import CrossTenantWrite, ReasonRequired, TenancyError
from kestra.tenancy import OPENING, TenantCompiler
from kestra.transaction import Opening

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")


class TenantSession(Session):
    """A session that sees and writes the rows of one client, and no others, whatever is executed through it.

    Made by `Database.tenant_session`, which also commits. `client_id` is stamped on what is added; objects and rows of
    another client are refused.
    """

    def __init__(self, bind: Engine, *, client_id: UUID | str, **session_options: Any) -> None:
        """Bind the session to a client for its whole life.

        Raises:
            InvalidClientId: The client id is missing or malformed. A UUID of no client is no error here: such a session
                reads nothing, and its inserts raise `ClientNotFound`.
        """
        self._client_id = parse_client_id(client_id)
        self._opening = Opening(TENANT_ROLE, self._client_id)
        super().__init__(bind, expire_on_commit=False, **session_options)

    @property
    def client_id(self) -> UUID:
        """The client of this session. It cannot be changed: what was loaded for one would be shown to another."""
        return self._client_id

    @client_id.setter
    def client_id(self, _client_id: object) -> NoReturn:
        raise TenancyError(
            f"A session belongs to one client ({self._client_id}) for its whole life. Open another one for another."
        )

    def __repr__(self) -> str:
        """The client; the default shows an address."""
        return f"{type(self).__name__}(client_id={self._client_id})"


class SystemSession(Session):
    """A session that sees every client. Made by `Database.system_session`; it says why it exists."""

    _opening = Opening(SYSTEM_ROLE)

    def __init__(self, bind: Engine, *, reason: str, **session_options: Any) -> None:
        """Open a session over all clients.

        Raises:
            ReasonRequired: The reason is empty.
        """
        if not reason or not reason.strip():
            raise ReasonRequired(
                "A system session sees every client, so it needs a reason: system_session(reason='…')."
            )
        self.reason = reason
        super().__init__(bind, expire_on_commit=False, **session_options)

    def log_opening(self) -> None:
        """Say in the log that somebody sees every client, and why."""
        logger.info("system session: %s", self.reason, extra={"kestra_reason": self.reason})

    def __repr__(self) -> str:
        """The reason; the default shows an address."""
        return f"{type(self).__name__}(reason={self.reason!r})"


def require_tenant(session: Session) -> UUID:
    """The client of a session of one client.

    Raises:
        TenancyError: It is another session. What was written for one client would read and write the rows of all.
    """
    if not isinstance(session, TenantSession):
        raise TenancyError(
            f"This is for a session of one client, not for a {type(session).__name__}: open `db.tenant_session`."
        )
    return session.client_id


def require_system(session: Session) -> None:
    """Nothing, when the session sees every client.

    Raises:
        TenancyError: It is another session. It would see one client at most.
    """
    if not isinstance(session, SystemSession):
        raise TenancyError(
            f"This is for a session over all clients, not for a {type(session).__name__}: open `db.system_session`."
        )


class AsyncTenantSession(AsyncSession):
    """`TenantSession` for asyncio: the same implementation, run by `AsyncSession`."""

    sync_session_class = TenantSession
    sync_session: TenantSession

    def __init__(self, bind: AsyncEngine, *, client_id: UUID | str) -> None:
        """As `TenantSession`."""
        super().__init__(bind, client_id=client_id)

    @property
    def client_id(self) -> UUID:
        """The client of this session."""
        return self.sync_session.client_id

    @client_id.setter
    def client_id(self, client_id: object) -> None:
        self.sync_session.client_id = client_id

    async def run_sync(self, fn: Callable[Concatenate[TenantSession, _P], _T], *arg: _P.args, **kw: _P.kwargs) -> _T:
        """What a function of a `TenantSession` returns: `await session.run_sync(messages.record, chat_id=…, …)`."""
        return await super().run_sync(cast("Callable[Concatenate[Session, _P], _T]", fn), *arg, **kw)


class AsyncSystemSession(AsyncSession):
    """`SystemSession` for asyncio: the same implementation, run by `AsyncSession`."""

    sync_session_class = SystemSession
    sync_session: SystemSession

    def __init__(self, bind: AsyncEngine, *, reason: str) -> None:
        """As `SystemSession`."""
        super().__init__(bind, reason=reason)

    async def run_sync(self, fn: Callable[Concatenate[SystemSession, _P], _T], *arg: _P.args, **kw: _P.kwargs) -> _T:
        """What a function of a `SystemSession` returns: `await session.run_sync(clients.create, name=…, …)`."""
        return await super().run_sync(cast("Callable[Concatenate[Session, _P], _T]", fn), *arg, **kw)


@event.listens_for(TenantSession, "after_begin")
@event.listens_for(SystemSession, "after_begin")
def _open(session: TenantSession | SystemSession, transaction: SessionTransaction, connection: Connection) -> None:
    """Bind the connection that the session was just given: from now on it begins as the session's."""
    if transaction.nested:
        return
    info = connection.info
    if OPENING in info:
        raise TenancyError("This connection belongs to another session already; sessions are made by a Database.")
    if isinstance(session, TenantSession):
        if connection.dialect.statement_compiler is not TenantCompiler:
            raise TenancyError("A tenant session cannot use another engine: what it compiles carries no filter.")
        info[BOUND_CLIENT_ID] = session.client_id
    info[OPENING] = session._opening  # noqa: SLF001 - sessions of this module
    connection.dialect.do_begin(connection.connection)


@event.listens_for(TenantSession, "before_attach")
def _stamp_or_refuse(session: TenantSession, instance: object) -> None:
    """Stamp a new object; refuse one of another client, whichever way it comes: add, merge, delete, a cascade."""
    state: InstanceState[Any] = inspect(instance)
    attribute = _owner_attribute(state.mapper)
    owners = {state.dict.get(attribute), *_owner_in_identity(state)} - {None}
    if state.key is None and not owners:
        setattr(instance, attribute, session.client_id)
    elif owners != {session.client_id}:
        raise _foreign(session, instance)


@event.listens_for(TenantSession, "before_flush")
def _refuse_restamped(session: TenantSession, _context: UOWTransaction, _instances: object) -> None:
    """A new object may have been given another client after it was attached."""
    for instance in session.new:
        state: InstanceState[Any] = inspect(instance)
        if state.dict.get(_owner_attribute(state.mapper)) != session.client_id:
            raise _foreign(session, instance)


@cache
def _owner_attribute(mapper: Mapper[Any]) -> str:
    table = mapper.local_table
    key = tenant_key(table) if isinstance(table, Table) else None
    if key is None:
        raise CrossTenantWrite(f"{mapper.class_.__name__} belongs to no client: write it in a system session.")
    return mapper.get_property_by_column(key).key


def _owner_in_identity(state: InstanceState[Any]) -> set[UUID]:
    """The client in the identity of a persistent or detached object, which no change of the attribute reaches."""
    if state.key is None:
        return set()
    return {
        value
        for column, value in zip(state.mapper.primary_key, state.key[1], strict=True)
        if isinstance(column.type, ClientId)
    }


def _foreign(session: TenantSession, instance: object) -> CrossTenantWrite:
    return CrossTenantWrite(
        f"This {type(instance).__name__} belongs to another client than the session ({session.client_id}). "
        "Open a session of its own client for it."
    )
