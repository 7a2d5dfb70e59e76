"""A `Database` whose sessions, of every client and of none, share one transaction that is rolled back in the end.

All is that of production (sessions, filter, row level security, errors) but for one thing: BEGIN, COMMIT and ROLLBACK
of a session are a savepoint of the one transaction. So a test leaves nothing behind, whatever its code commits, and
each of its sessions sees what the others did. Role and client belong to a transaction, and there is but one: they are
set anew whenever another session takes its turn.
"""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from threading import RLock
from typing import Any, Final, NamedTuple, Self
from uuid import UUID

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.dialects import registry
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from kestra.base import SETTING
from kestra.database import _ENGINE, Database, _listening
from kestra.driver import PooledConnection, refuse_guarded
from kestra.embedded import resolve_url
from kestra.errors import TenancyError
from kestra.session import AsyncTenantSession, SystemSession, TenantSession
from kestra.tenancy import SystemDialect, TenantDialect
from kestra.transaction import Opening, Statement

_TENANT: Final = "kestra_rolled_back_tenant"
_SYSTEM: Final = "kestra_rolled_back_system"
_ASYNC_TENANT: Final = "kestra_rolled_back_async_tenant"
_ASYNC_SYSTEM: Final = "kestra_rolled_back_async_system"

_WHOLE: Final = "kestra_test"
"""The savepoint at the beginning, which is gone when somebody has ended the transaction."""


class SessionsOverlap(TenancyError):
    """Two sessions of one test did what connections of their own can do and savepoints of one transaction cannot."""


class TestCommitted(TenancyError):
    """A statement of a test ended the transaction that was to be rolled back: COMMIT, or ROLLBACK, as SQL."""

    __test__ = False


class _Engines(NamedTuple):
    tenant: Engine
    system: Engine


class _AsyncEngines(NamedTuple):
    tenant: AsyncEngine
    system: AsyncEngine


class RolledBackDatabase(Database):
    """A database that is used inside `rolled_back`, as any `Database` is, and left as it was.

    In every event loop too: its asynchronous sessions block instead of waiting. Code that runs at the same time, in
    threads or tasks, needs a plain `Database`, on a clone of its own.
    """

    def __init__(self, url: str, *, empty: Callable[[], None]) -> None:
        """Take the URL.

        Args:
            url: As `Database`.
            empty: Deletes every row of it, for what a test could not be kept from committing.
        """
        super().__init__(url)
        self._empty = empty
        self._transaction: _Transaction | None = None
        self._sessions: list[Session] = []
        lease, async_lease = partial(self._lease, _Cursor), partial(self._lease, _AsyncCursor)
        self._joined = _Engines(_engine(_TENANT, lease), _engine(_SYSTEM, lease))
        self._async_joined = _AsyncEngines(
            AsyncEngine(_engine(_ASYNC_TENANT, async_lease)), AsyncEngine(_engine(_ASYNC_SYSTEM, async_lease))
        )

    @contextmanager
    def rolled_back(self) -> Iterator[Self]:
        """The same database, whose sessions may be opened now; whatever they do is undone at the end.

        Raises:
            TestCommitted: They ended its transaction by a statement. The rows that are left were deleted.
        """
        with PooledConnection.connect(resolve_url(self._settings), **self._connect_options()) as connection:
            connection.execute(f"BEGIN; SAVEPOINT {_WHOLE}", prepare=False)
            self._transaction = transaction = _Transaction(connection)
            try:
                yield self
            finally:
                self._transaction, transaction.over = None, True
                while self._sessions:
                    self._sessions.pop().close()
                with suppress(psycopg.OperationalError):  # the test may have broken the connection
                    try:
                        connection.execute(f"ROLLBACK TO {_WHOLE}")
                    except (psycopg.errors.NoActiveSqlTransaction, psycopg.errors.InvalidSavepointSpecification):
                        transaction.ended = True
                    connection.rollback()
        if transaction.ended:
            self._empty()
            raise TestCommitted(
                "A statement of this test was a COMMIT or ROLLBACK, past its session. What it committed is deleted. "
                "Use session.commit() and session.rollback(), or take `kestra_committing_database`."
            )

    def tenant(self, client_id: UUID | str) -> TenantSession:
        """A session of one client until the end of the test, inside of which system sessions may be opened."""
        session = TenantSession(self._joined.tenant, client_id=client_id)
        self._sessions.append(session)
        return session

    def async_tenant(self, client_id: UUID | str) -> AsyncTenantSession:
        """`tenant` for asyncio, in whatever event loop."""
        session = AsyncTenantSession(self._async_joined.tenant, client_id=client_id)
        self._sessions.append(session.sync_session)
        return session

    def system(self, *, reason: str) -> SystemSession:
        """A session over all clients until the end of the test."""
        session = SystemSession(self._joined.system, reason=reason)
        self._sessions.append(session)
        return session

    def _open(self) -> Any:
        return self._joined

    async def _async_open(self) -> Any:
        return self._async_joined

    @contextmanager
    def _driver(self) -> Iterator[Any]:
        lease = self._lease(_Cursor)
        lease.begin(["SET LOCAL ROLE NONE"])
        try:
            yield lease
        except BaseException:
            lease.rollback()
            raise
        else:
            lease.commit()
        finally:
            lease.leave_role()

    @asynccontextmanager
    async def _async_driver(self) -> AsyncIterator[Any]:
        with self._driver() as lease:
            yield _AsyncDriver(lease)

    def _lease(self, cursor: "type[_Cursor]") -> "_Lease":
        if self._transaction is None:
            raise TenancyError("Sessions of this database live inside of a test, which has not begun or is over.")
        if self._transaction.process != os.getpid():
            raise SessionsOverlap(
                "This is another process than that of the test, and would write into the middle of its connection. "
                "Take `kestra_committing_database`, whose connections are each process's own."
            )
        return _Lease(self._transaction, cursor)


def _engine(dialect: str, lease: Callable[[], "_Lease"]) -> Engine:
    return _listening(create_engine(f"postgresql+{dialect}://", creator=lease, **_ENGINE))


@dataclass(eq=False)
class _Savepoint:
    """A transaction of a session, or a nested one.

    Attributes:
        name: On the server.
        lease: Whose it is.
        label: What the session calls it; "" is the transaction itself.
        over: It was committed, and stays below savepoints that are not.
        holds: Another session committed inside of it; to roll it back would undo that too.
    """

    name: str
    lease: "_Lease"
    label: str
    over: bool = False
    holds: bool = False


class _Transaction:
    """The one transaction: its connection, the open savepoints in their order, and whose role it has now."""

    def __init__(self, connection: PooledConnection) -> None:
        self.connection = connection
        self.process = os.getpid()
        self.over = False
        self.ended = False
        self.turn = RLock()
        self._savepoints: list[_Savepoint] = []
        self._role: str | None = None
        self._numbers = count(1)

    @property
    def failed(self) -> bool:
        """A statement failed, and the server refuses all others until a savepoint is rolled back."""
        return self.connection.info.transaction_status == TransactionStatus.INERROR

    def take_role(self, role: str | None) -> None:
        """Become what the session is whose turn it is."""
        if role is not None and role != self._role:
            self.send(role)
            self._role = role

    def forget_role(self) -> None:
        """Have the next one take its role in any case."""
        self._role = None

    def send(self, message: str) -> None:
        self.connection.execute(message, prepare=False)  # several statements in one message cannot be prepared

    def open(self, lease: "_Lease", label: str) -> _Savepoint:
        if self.failed:
            raise SessionsOverlap(
                "A statement of a session of this test failed. In the one transaction of a test nothing goes on until "
                "that session is rolled back; take `kestra_committing_database` where it should."
            )
        savepoint = _Savepoint(f"kestra_{next(self._numbers)}", lease, label)
        self.send(f"SAVEPOINT {savepoint.name}")
        self._savepoints.append(savepoint)
        return savepoint

    def release(self, savepoint: _Savepoint) -> None:
        savepoint.over = True
        while self._savepoints and self._savepoints[-1].over:
            released = self._savepoints.pop()
            self.send(f"RELEASE {released.name}")
            for below in self._savepoints:
                below.holds = below.holds or below.lease is not released.lease

    def roll_back(self, savepoint: _Savepoint) -> None:
        inside = self._savepoints[self._savepoints.index(savepoint) :]
        if savepoint.holds or any(other.lease is not savepoint.lease for other in inside):
            raise SessionsOverlap(
                "A session of this test is rolled back, and another one has worked since it began. In the one "
                "transaction of a test that would undo the work of both; take `kestra_committing_database`."
            )
        del self._savepoints[-len(inside) :]
        self.send(f"ROLLBACK TO {savepoint.name}; RELEASE {savepoint.name}")
        self._role = None  # that of the savepoint's beginning


class _Lease:
    """What a session has for a connection of its own: the shared one, and a transaction that is a savepoint."""

    def __init__(self, transaction: _Transaction, cursor: "type[_Cursor]") -> None:
        self.guarded = False
        self._transaction = transaction
        self._cursor = cursor
        self._savepoints: list[_Savepoint] = []
        self._role: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transaction.connection, name)

    def begin(self, identity: list[str]) -> None:
        """Open a transaction whose role and client are those of production."""
        # SET LOCAL lasts as long as the one transaction: the client of another session has to be taken back.
        self._role = "; ".join([f"SET LOCAL {SETTING} = ''", *identity])
        with self._transaction.turn:
            self.open_nested("")
            self.take_turn()

    def commit(self) -> None:
        """Keep the work for the sessions that follow; roll it back, as the server would, if a statement failed."""
        if self._transaction.failed:
            self.rollback()
        else:
            self.release_nested("")

    def rollback(self) -> None:
        """Undo the work; nothing when there is none."""
        self.roll_back_nested("")

    def close(self) -> None:
        """As `rollback`: the connection is the test's."""
        self.rollback()

    def open_nested(self, label: str) -> None:
        """What `Session.begin_nested` sends."""
        with self._transaction.turn:
            self._savepoints.append(self._transaction.open(self, label))

    def release_nested(self, label: str) -> None:
        """What the commit of a nested transaction sends."""
        with self._transaction.turn:
            for savepoint in reversed(self._from(label)):
                self._transaction.release(savepoint)

    def roll_back_nested(self, label: str) -> None:
        """What the rollback of a nested transaction sends."""
        with self._transaction.turn:
            if undone := self._from(label):
                self._transaction.roll_back(undone[0])

    def _from(self, label: str) -> list[_Savepoint]:
        """The savepoints that end with this one, which are forgotten; none when it has ended, as the whole test has."""
        labels = [savepoint.label for savepoint in self._savepoints]
        if self._transaction.over or label not in labels:
            return []
        first = labels.index(label)
        ending = self._savepoints[first:]
        del self._savepoints[first:]
        if label == "":
            self._role = None
        return ending

    def leave_role(self) -> None:
        """Say that a statement has taken another role than this session's."""
        self._transaction.forget_role()

    def fetch(self, statement: Statement, parameters: Any) -> list[tuple[Any, ...]]:
        """As `PooledConnection.fetch`."""
        if self.guarded:
            refuse_guarded()
        with self._transaction.turn:
            self.take_turn()
            return self._transaction.connection.fetch(statement, parameters)

    def take_turn(self) -> None:
        """Run what comes next as the role and the client of this session."""
        self._transaction.take_role(self._role)

    def cursor(self, name: str = "", **options: Any) -> Any:
        """A cursor whose statements run as this session."""
        if self.guarded:
            refuse_guarded()
        if name:
            self.take_turn()
            return self._transaction.connection.cursor(name, **options)
        return self._cursor(self, self._transaction, **options)


class _Cursor(psycopg.Cursor[Any]):
    """A cursor that takes its session's turn with each statement, also where threads take theirs."""

    def __init__(self, lease: _Lease, transaction: _Transaction, **options: Any) -> None:
        super().__init__(transaction.connection, **options)
        self._lease = lease
        self._turn = transaction.turn

    def execute(self, *args: Any, **options: Any) -> Self:
        with self._turn:
            self._lease.take_turn()
            return super().execute(*args, **options)

    def executemany(self, *args: Any, **options: Any) -> None:
        with self._turn:
            self._lease.take_turn()
            super().executemany(*args, **options)

    @contextmanager
    def copy(self, *args: Any, **options: Any) -> Iterator[psycopg.Copy]:
        with self._turn:
            self._lease.take_turn()
            with super().copy(*args, **options) as copy:
                yield copy


class _AsyncCursor(_Cursor):
    """A cursor that is only used where SQLAlchemy may await, as the driver's own is."""

    def execute(self, *args: Any, **options: Any) -> Self:
        await_only(_nothing())
        return super().execute(*args, **options)

    def executemany(self, *args: Any, **options: Any) -> None:
        await_only(_nothing())
        super().executemany(*args, **options)

    async def _async_soft_close(self) -> None:
        """What SQLAlchemy calls before it hands a result out; there is nothing to wait for."""


class _AsyncDriver:
    """A lease as the asynchronous driver is used."""

    def __init__(self, lease: _Lease) -> None:
        self._lease = lease
        self.closed = lease.closed

    async def fetch(self, statement: Statement, parameters: Any) -> list[tuple[Any, ...]]:
        return self._lease.fetch(statement, parameters)


async def _nothing() -> None:
    pass


class _RolledBack:
    """A dialect whose transactions are those of a `_Lease`."""

    def _open(self, dbapi_connection: PoolProxiedConnection, opening: Opening) -> None:
        _lease_of(dbapi_connection).begin(opening.identity)

    def do_savepoint(self, connection: Connection, name: str) -> None:
        _lease_of(connection.connection).open_nested(name)

    def do_release_savepoint(self, connection: Connection, name: str) -> None:
        _lease_of(connection.connection).release_nested(name)

    def do_rollback_to_savepoint(self, connection: Connection, name: str) -> None:
        _lease_of(connection.connection).roll_back_nested(name)


def _lease_of(dbapi_connection: PoolProxiedConnection) -> _Lease:
    lease: Any = dbapi_connection.driver_connection
    if not isinstance(lease, _Lease):
        raise TypeError(f"{type(lease).__name__} is no connection of a RolledBackDatabase")
    return lease


class _Tenant(_RolledBack, TenantDialect):
    supports_statement_cache = True  # SQLAlchemy wants each class to say so itself


class _System(_RolledBack, SystemDialect):
    supports_statement_cache = True


class _AsyncTenant(_Tenant):
    """For an `AsyncEngine`."""

    supports_statement_cache = True
    is_async = True

    def fetch(self, *args: Any) -> list[tuple[Any, ...]]:
        await_only(_nothing())
        return super().fetch(*args)


class _AsyncSystem(_System):
    supports_statement_cache = True
    is_async = True


for _name, _dialect in (
    (_TENANT, _Tenant),
    (_SYSTEM, _System),
    (_ASYNC_TENANT, _AsyncTenant),
    (_ASYNC_SYSTEM, _AsyncSystem),
):
    registry.register(f"postgresql.{_name}", __name__, _dialect.__name__)
