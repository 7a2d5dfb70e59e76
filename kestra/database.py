"""`Database`: pools, engines and sessions, for threads and for asyncio; and the one of each process."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from threading import Lock
from types import TracebackType
from typing import Any, Final, Self
from uuid import UUID
from weakref import WeakKeyDictionary, WeakSet

from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolTimeout
from sqlalchemy import Engine, NullPool, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from kestra.dao import clients
from kestra.dao.messages import IncomingMessage, Recorded
from kestra.driver import (
    AsyncPooledConnection,
    PooledConnection,
    async_check_if_idle,
    async_guarded,
    check_if_idle,
    connect_options,
    guarded,
    pool_exhausted,
    probe,
    translate,
)
from kestra.embedded import resolve_url
from kestra.errors import TenancyError, VerificationFailed
from kestra.ingest import async_ingest, ingest
from kestra.models import Role
from kestra.session import AsyncSystemSession, AsyncTenantSession, SystemSession, TenantSession
from kestra.settings import Settings


@dataclass(frozen=True)
class _Engines:
    """One pool under two engines: their statements compile differently, so they must not share a compiled cache."""

    pool: ConnectionPool[PooledConnection]
    tenant: Engine
    system: Engine


@dataclass(frozen=True)
class _AsyncEngines:
    pool: AsyncConnectionPool[AsyncPooledConnection]
    tenant: AsyncEngine
    system: AsyncEngine


class Database:
    """A PostgreSQL database of kestra: its connections, and sessions for one client or for all of them.

    Opens nothing until the first session. Safe for threads; a forked child opens its own connections and leaves its
    parent's alone; each event loop has its own pool. Use it as a context manager, or call `close` (`aclose` in an event
    loop), where a process outlives it.
    """

    def __init__(self, url: str | None = None, *, settings: Settings | None = None) -> None:
        """Take the URL, or the settings of the environment.

        Args:
            url: A libpq URL (`postgresql://…`, `postgres://…`), which wins over the settings. None: that of the
                settings, or the embedded server.
            settings: None reads the environment now.

        Raises:
            ConfigurationError: A setting is wrong or the URL is malformed. The URL is not in the text: it may have a
                password.
        """
        settings = settings or Settings()
        # Through the constructor, so that the URL is validated as one of the environment is.
        self._settings = Settings(**{**settings.model_dump(), "database_url": url}) if url is not None else settings
        self._reset()
        _databases.add(self)

    def _reset(self) -> None:
        self._lock = Lock()
        self._engines: _Engines | None = None
        self._async_engines: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[_AsyncEngines]] = (
            WeakKeyDictionary()
        )

    def __repr__(self) -> str:
        """Nothing of the URL."""
        return f"Database(open={self._engines is not None or bool(self._async_engines)})"

    # --- sessions ---

    @contextmanager
    def tenant_session(self, client_id: UUID | str) -> Iterator[TenantSession]:
        """A session of one client: one transaction, committed when the block ends, rolled back when it raises.

        Raises:
            InvalidClientId: The client id is missing or malformed.
            ClientNotFound: On an insert, when there is no such client.
            DatabaseUnavailable: No connection could be had (`AuthenticationFailed`, `PoolExhausted` say more).
        """
        session = TenantSession(self._open().tenant, client_id=client_id)
        with _inside(session.client_id):
            try:
                yield session
                session.commit()
            finally:
                session.close()

    @contextmanager
    def system_session(self, *, reason: str, inside_tenant_session: bool = False) -> Iterator[SystemSession]:
        """A session over all clients, for sweeps and administration; committed as `tenant_session` is, and logged.

        Args:
            reason: What somebody needs every client for; it is logged.
            inside_tenant_session: Say so where one is opened in the block of a tenant session on purpose.

        Raises:
            ReasonRequired: The reason is empty.
            TenancyError: It was opened inside a tenant session, by accident.
            DatabaseUnavailable: No connection could be had.
        """
        _refuse_inside(allowed=inside_tenant_session)
        session = SystemSession(self._open().system, reason=reason)
        session.log_opening()
        try:
            yield session
            session.commit()
        finally:
            session.close()

    @asynccontextmanager
    async def async_tenant_session(self, client_id: UUID | str) -> AsyncIterator[AsyncTenantSession]:
        """`tenant_session` for asyncio."""
        session = AsyncTenantSession((await self._async_open()).tenant, client_id=client_id)
        with _inside(session.client_id):
            try:
                yield session
                await session.commit()
            finally:
                await asyncio.shield(session.close())

    @asynccontextmanager
    async def async_system_session(
        self, *, reason: str, inside_tenant_session: bool = False
    ) -> AsyncIterator[AsyncSystemSession]:
        """`system_session` for asyncio."""
        _refuse_inside(allowed=inside_tenant_session)
        session = AsyncSystemSession((await self._async_open()).system, reason=reason)
        session.sync_session.log_opening()
        try:
            yield session
            await session.commit()
        finally:
            await asyncio.shield(session.close())

    def client_id_for_token(self, token: str) -> UUID:
        """The client that a webhook's token belongs to; exact and case-sensitive.

        Not logged: it happens for each webhook and shows nothing but the id. In an event loop:
        `await asyncio.to_thread(db.client_id_for_token, token)`.

        Raises:
            UnknownToken: No client has it.
        """
        with closing(SystemSession(self._open().system, reason="token of a webhook")) as session:
            client_id = clients.client_id_for_token(session, token=token)
            session.commit()
            return client_id

    # --- webhooks ---

    def ingest(  # noqa: PLR0913  # keyword-only, as those of `record`
        self,
        token: str,
        *,
        chat_id: str,
        role: Role,
        content: str | None = None,
        media_url: str | None = None,
        provider_message_id: str | None = None,
        sent_at: datetime | None = None,
    ) -> Recorded:
        """Store what a webhook has delivered, once, and bring its conversation up to date; it is committed.

        The same as `client_id_for_token`, then `dao.messages.record` in a session of that client, in one round trip.

        Args:
            token: The client's token.
            chat_id: As `record`, like the other parts of the message.
            role: Who said it.
            content: The text.
            media_url: Where the medium is.
            provider_message_id: The provider's id. Without one a message that is delivered twice is stored twice.
            sent_at: When it was sent.

        Raises:
            UnknownToken: No client has it.
            InvalidValue: A part of the message cannot be stored.
            ConversationNotFound: It is a duplicate, and somebody has deleted its conversation alone.
            DatabaseUnavailable: No connection could be had, or it broke: then deliver the message again.
        """
        message = IncomingMessage(chat_id, role, content, media_url, provider_message_id, sent_at)
        with self._driver() as connection:
            return ingest(connection, token=token, message=message)

    async def async_ingest(  # noqa: PLR0913  # as above
        self,
        token: str,
        *,
        chat_id: str,
        role: Role,
        content: str | None = None,
        media_url: str | None = None,
        provider_message_id: str | None = None,
        sent_at: datetime | None = None,
    ) -> Recorded:
        """`ingest` for asyncio."""
        message = IncomingMessage(chat_id, role, content, media_url, provider_message_id, sent_at)
        async with self._async_driver() as connection:
            return await async_ingest(connection, token=token, message=message)

    def verify(self) -> None:
        """Nothing, when the database keeps clients apart for the user of this `Database` and is at the newest revision.

        Looks at the roles, the row level security of every table, views and functions over them, and the revision, on
        connections of its own. In an event loop: `await asyncio.to_thread(db.verify)`.

        Raises:
            VerificationFailed: It does not; `findings` has every reason.
            DatabaseUnavailable: No connection could be had.
        """
        url, options = resolve_url(self._settings), self._connect_options()
        probe(url, options)
        _verify(url, options)

    # --- connections ---

    def _open(self) -> _Engines:
        if self._engines is None:
            with self._lock:
                if self._engines is None:
                    self._engines = self._connect()
        return self._engines

    def _connect(self) -> _Engines:
        url, options = resolve_url(self._settings), self._connect_options()
        self._probe(url, options)
        pool = ConnectionPool(
            url, connection_class=PooledConnection, kwargs=options, check=check_if_idle, **self._pool_options()
        )
        pool.open()
        tenant = _listening(create_engine(_TENANT, creator=guarded(pool.getconn), **_ENGINE))
        system = _listening(create_engine(_SYSTEM, creator=pool.getconn, **_ENGINE))
        for engine in (tenant, system):
            engine.connect().close()  # SQLAlchemy gets to know the server now, not in somebody's first session
        return _Engines(pool, tenant, system)

    async def _async_open(self) -> _AsyncEngines:
        loop = asyncio.get_running_loop()
        opening = self._async_engines.get(loop)
        if opening is None or (opening.done() and (opening.cancelled() or opening.exception())):
            opening = self._async_engines[loop] = loop.create_task(self._async_connect())
        # Shielded: the task that came first may be cancelled, the others still wait for the pool.
        return await asyncio.shield(opening)

    async def _async_connect(self) -> _AsyncEngines:
        url, options = await asyncio.to_thread(resolve_url, self._settings), self._connect_options()
        await asyncio.to_thread(self._probe, url, options)
        pool = AsyncConnectionPool(
            url,
            connection_class=AsyncPooledConnection,
            kwargs=options,
            check=async_check_if_idle,
            **self._pool_options(),
        )
        await pool.open()
        tenant = create_async_engine(_TENANT, async_creator=async_guarded(pool.getconn), **_ENGINE)
        system = create_async_engine(_SYSTEM, async_creator=pool.getconn, **_ENGINE)
        for engine in (tenant, system):
            _listening(engine.sync_engine)
            await (await engine.connect()).close()
        return _AsyncEngines(pool, tenant, system)

    def _driver(self) -> AbstractContextManager[PooledConnection]:
        """A connection of the pool that is nobody's."""
        pool = self._open().pool
        try:
            return closing(pool.getconn())
        except PoolTimeout as error:
            raise pool_exhausted() from error

    @asynccontextmanager
    async def _async_driver(self) -> AsyncIterator[AsyncPooledConnection]:
        pool = (await self._async_open()).pool
        try:
            connection = await pool.getconn()
        except PoolTimeout as error:
            raise pool_exhausted() from error
        try:
            yield connection
        finally:
            await asyncio.shield(connection.close())

    def _probe(self, url: str, options: dict[str, Any]) -> None:
        probe(url, options)
        if self._settings.verify_on_open:
            _verify(url, options)

    def _connect_options(self) -> dict[str, Any]:
        return connect_options(
            connect_timeout=self._settings.connect_timeout, prepare_threshold=self._settings.prepare_threshold
        )

    def _pool_options(self) -> dict[str, Any]:
        return {
            "open": False,
            "min_size": self._settings.pool_min_size,
            "max_size": self._settings.pool_max_size,
            "timeout": self._settings.pool_timeout,
            "close_returns": True,  # SQLAlchemy's close() is the pool's putconn()
            "name": "kestra",
        }

    def close(self) -> None:
        """Close the connections of the threads' pool. The next session opens a new one."""
        with self._lock:
            engines, self._engines = self._engines, None
        if engines is not None:
            engines.pool.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop's pool, and those of the threads' pool."""
        opening = self._async_engines.pop(asyncio.get_running_loop(), None)
        if opening is not None:
            await (await opening).pool.close()
        self.close()

    def __enter__(self) -> Self:
        """Nothing is opened yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """As `close`."""
        self.close()

    async def __aenter__(self) -> Self:
        """Nothing is opened yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """As `aclose`."""
        await self.aclose()


_TENANT: Final = "postgresql+kestra_tenant://"
_SYSTEM: Final = "postgresql+kestra_system://"
_ENGINE: Final[dict[str, Any]] = {
    "poolclass": NullPool,
    "hide_parameters": True,
    "use_native_hstore": False,
    "pool_reset_on_return": None,
}


def _verify(url: str, options: dict[str, Any]) -> None:
    from kestra.verify import findings  # noqa: PLC0415 - Alembic: who does not verify does not wait for it

    if found := findings(url, options):
        raise VerificationFailed(found)


def _listening(engine: Engine) -> Engine:
    event.listen(engine, "handle_error", translate, retval=True)
    return engine


# --- system sessions inside tenant sessions ---

_tenant: ContextVar[UUID | None] = ContextVar("kestra_tenant", default=None)
"""The client of the innermost tenant session of this thread or task."""


@contextmanager
def _inside(client_id: UUID) -> Iterator[None]:
    outer = _tenant.get()
    _tenant.set(client_id)
    try:
        yield
    finally:
        # Not by token: a framework may leave the block in another context than it entered it in.
        _tenant.set(outer)


def _refuse_inside(*, allowed: bool) -> None:
    client_id = _tenant.get()
    if client_id is not None and not allowed:
        raise TenancyError(
            f"A system session was opened inside a session of client {client_id}. What it sees belongs to every "
            "client: end the tenant session first, or say inside_tenant_session=True."
        )


# --- one Database per process ---

_databases: WeakSet[Database] = WeakSet()
_inherited: list[object] = []
_singleton: Database | None = None
_singleton_lock = Lock()


def get_database() -> Database:
    """The `Database` of this process, made from the environment on the first call.

    Raises:
        ConfigurationError: A setting is wrong.
    """
    global _singleton  # noqa: PLW0603 - one per process is what the function is for
    if _singleton is None:
        with _singleton_lock:
            if _singleton is None:
                _singleton = Database()
    return _singleton


def _after_fork_in_child() -> None:
    """A child must not use its parent's sockets, nor close them: what was open is kept out of reach, for good."""
    global _singleton_lock  # noqa: PLW0603 - another thread of the parent may have held it
    _singleton_lock = Lock()
    for database in list(_databases):
        _inherited.append((database._engines, database._async_engines))  # noqa: SLF001 - of this module
        database._reset()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
