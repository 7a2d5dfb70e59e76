"""A transaction opens with its first statement, whatever that is, and nothing runs before it (docs/adr/0011)."""

import asyncio
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from secrets import token_hex
from socket import SHUT_RD, SHUT_RDWR, SHUT_WR, socket
from types import FrameType
from typing import IO, Any, Final, cast
from urllib.parse import urlencode
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.types.json import Json
from sqlalchemy import NullPool, Table, bindparam, create_engine, func, insert, select, text, update
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.orm import Session

from kestra import (
    ActiveConversation,
    ChatMessage,
    Client,
    Database,
    Settings,
    SystemSession,
    TenantSession,
    transaction,
)
from kestra.dao import messages
from kestra.errors import (
    ClientNotFound,
    ConfigurationError,
    DatabaseUnavailable,
    InvalidValue,
    KestraError,
    StatementFailed,
    TenancyError,
)
from kestra.transaction import AsyncOpeningCursor, Opening, OpeningCursor, Statement

RAW: Final = {"kestra_raw_sql": True}
WHO: Final = "SELECT current_user, coalesce(current_setting('kestra.client_id', true), '')"
WHOAMI: Final = text(WHO).execution_options(**RAW)
WHOAMI_AND: Final = text(f"{WHO}, CAST(:given AS TEXT)").execution_options(**RAW)
QUOTIENT: Final = select(1 / bindparam("number", 1))


@pytest.fixture(params=[5, None], ids=["prepared", "never prepared"])
def one(database_url: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    """With one connection, which PgBouncer may stand before or not."""
    with Database(database_url, settings=Settings(pool_max_size=1, prepare_threshold=request.param)) as db:
        yield db


def session_of(kind: str, db: Database, client_id: UUID) -> Session:
    """A session of the client or of all, not in a block that would commit."""
    engines = db._open()  # noqa: SLF001  # of which sessions are made
    if kind == "tenant":
        return TenantSession(engines.tenant, client_id=client_id)
    return SystemSession(engines.system, reason="test")


def driver_of(session: Session) -> Any:
    return session.connection().connection.driver_connection


# --- what is sent -----------------------------------------------------------------------------------------------------


def with_parameters(session: Session) -> Any:
    return session.execute(WHOAMI_AND, {"given": "x"}).one()[:2]


def without_parameters(session: Session) -> Any:
    return session.execute(WHOAMI).one()


def of_the_orm(session: Session) -> Any:
    statement = select(func.current_user(), func.current_setting("kestra.client_id", True), bindparam("x", 1))  # noqa: FBT003
    return session.execute(statement).one()[:2]


def in_a_savepoint(session: Session) -> Any:
    with session.begin_nested():
        return session.execute(WHOAMI_AND, {"given": "x"}).one()[:2]


def from_a_cursor_of_the_server(session: Session) -> Any:
    return session.execute(WHOAMI_AND, {"given": "x"}, execution_options={"yield_per": 1}).one()[:2]


def after_a_commit(session: Session) -> Any:
    session.execute(WHOAMI)
    session.commit()
    return session.execute(WHOAMI_AND, {"given": "x"}).one()[:2]


def after_a_rollback(session: Session) -> Any:
    session.execute(WHOAMI_AND, {"given": "x"})
    session.rollback()
    return session.execute(WHOAMI_AND, {"given": "x"}).one()[:2]


def after_an_empty_transaction(session: Session) -> Any:
    session.connection()
    session.commit()
    session.connection()
    session.rollback()
    return session.execute(WHOAMI_AND, {"given": "x"}).one()[:2]


def by_a_cursor_of_psycopg(session: Session) -> Any:
    cursor: Any = psycopg.Cursor(driver_of(session))
    return cursor.execute(WHO).fetchone()


def by_a_stream(session: Session) -> Any:
    cursor: Any = psycopg.Cursor(driver_of(session))
    return next(iter(list(cursor.stream(WHO))))


def by_a_copy(session: Session) -> Any:
    with psycopg.Cursor(driver_of(session)).copy(f"COPY ({WHO}) TO STDOUT") as copy:
        return list(copy.rows())[0]  # noqa: RUF015  # to its end


def as_a_script(session: Session) -> Any:
    cursor = OpeningCursor(driver_of(session)).execute(f"SELECT 1; {WHO}")
    assert cursor.nextset()
    return cursor.fetchone()


def in_a_pipeline_of_psycopg(session: Session) -> Any:
    driver = driver_of(session)
    with driver.pipeline():
        cursors: list[Any] = [OpeningCursor(driver).execute(f"{WHO}, %s", [n]) for n in range(2)]
        first, second = (cursor.fetchone()[:2] for cursor in cursors)
    assert first == second
    return first


def by_a_cursor_that_was_used_for_many(session: Session) -> Any:
    cursor: Any = OpeningCursor(driver_of(session))
    cursor.executemany("SELECT %s", [(n,) for n in range(3)])
    session.rollback()
    session.connection()
    return cursor.execute(f"{WHO}, %s", ["x"]).fetchone()[:2]


def of_many_rows(session: Session) -> Any:
    table = cast("Table", ActiveConversation.__table__)
    statement = update(table).where(table.c.chat_id == bindparam("chat")).values(last_context=bindparam("text"))
    session.connection().execute(statement, [{"chat": str(n), "text": "x"} for n in range(3)])
    return session.execute(WHOAMI).one()


FIRST: Final = [
    with_parameters,
    without_parameters,
    of_the_orm,
    in_a_savepoint,
    from_a_cursor_of_the_server,
    after_a_commit,
    after_a_rollback,
    after_an_empty_transaction,
    by_a_cursor_of_psycopg,
    by_a_stream,
    by_a_copy,
    as_a_script,
    in_a_pipeline_of_psycopg,
    by_a_cursor_that_was_used_for_many,
    of_many_rows,
]


@pytest.mark.parametrize("first", FIRST)
def test_whatever_comes_first_runs_as_the_role(one: Database, client_id: UUID, first: Callable[[Session], Any]) -> None:
    for _ in range(8):  # at first nothing is prepared, then everything
        with one.tenant_session(client_id) as session:
            assert tuple(first(session)) == ("kestra_tenant", str(client_id))
        with one.system_session(reason="test") as system:
            assert tuple(first(system)) == ("kestra_system", "")


@pytest.mark.parametrize("first", FIRST)
def test_a_transaction_opens_once(one: Database, client_id: UUID, first: Callable[[Session], Any]) -> None:
    notices: list[str | None] = []
    with one.tenant_session(client_id) as session:
        driver_of(session).add_notice_handler(lambda notice: notices.append(notice.message_primary))
        first(session)
        session.execute(WHOAMI)
        assert driver_of(session).opening is None
        session.execute(WHOAMI_AND, {"given": "x"})
    assert notices == []  # or BEGIN warns that there is a transaction already


def test_many_rows_come_first(one: Database, client_id: UUID, other_client_id: UUID) -> None:
    with one.tenant_session(client_id) as session:
        session.add_all([ActiveConversation(chat_id=str(n)) for n in range(3)])
    with one.tenant_session(other_client_id) as session:
        session.add(ActiveConversation(chat_id="0"))
    for _ in range(8):
        with one.tenant_session(client_id) as session:
            of_many_rows(session)
    with one.system_session(reason="test") as system:
        found = system.execute(select(ActiveConversation.client_id, ActiveConversation.last_context)).all()
    assert sorted(found) == sorted([(client_id, "x")] * 3 + [(other_client_id, None)])


def test_of_asyncio_too(database_url: str, client_id: UUID) -> None:
    async def main(prepare_threshold: int | None) -> None:
        settings = Settings(pool_max_size=1, prepare_threshold=prepare_threshold)
        async with Database(database_url, settings=settings) as db:
            for _ in range(8):
                async with db.async_tenant_session(client_id) as session:
                    assert (await session.execute(WHOAMI_AND, {"given": "x"})).one()[0] == "kestra_tenant"
                async with db.async_tenant_session(client_id) as session:
                    assert (await session.execute(WHOAMI)).one()[0] == "kestra_tenant"
                async with db.async_system_session(reason="test") as system:
                    async for row in await system.stream(WHOAMI_AND, {"given": "x"}):
                        assert row[0] == "kestra_system"

    asyncio.run(main(5))
    asyncio.run(main(None))


def test_of_asyncio_too_it_is_one_round_trip(database_url: str, client_id: UUID) -> None:
    async def main() -> int:
        async with Database(database_url, settings=Settings(pool_max_size=1)) as db:
            with tempfile.TemporaryFile("w+") as trace:
                async with db.async_tenant_session(client_id) as session:
                    pgconn = (await session.run_sync(driver_of)).pgconn
                    pgconn.trace(trace.fileno())
                    await session.execute(WHOAMI_AND, {"given": "x"})
                    pgconn.untrace()
                return ready_for_query(trace)

    assert asyncio.run(main()) == 1


def ready_for_query(trace: IO[str]) -> int:
    """How often the server said that it is ready for more."""
    trace.seek(0)
    return sum("ReadyForQuery" in line for line in trace)


def test_where_nothing_is_prepared_the_client_is_a_literal(database_url: str, client_id: UUID) -> None:
    """A pooler or a proxy that knows no prepared statements may read it."""
    with Database(database_url, settings=Settings(pool_max_size=1, prepare_threshold=None)) as db:
        for _ in range(8):
            with db.tenant_session(client_id) as session, tempfile.TemporaryFile("w+") as trace:
                pgconn = driver_of(session).pgconn
                pgconn.trace(trace.fileno())
                session.execute(WHOAMI_AND, {"given": "x"})
                pgconn.untrace()
                trace.seek(0)
                assert f"SET LOCAL kestra.client_id = '{client_id}'" in trace.read()


def prepared(db: Database) -> list[str]:
    """The statements that are prepared on the server for the only connection."""
    with db._driver() as connection:  # noqa: SLF001  # it is nobody's, so it opens nothing
        rows = connection.execute("SELECT statement FROM pg_prepared_statements ORDER BY 1", prepare=False).fetchall()
        return [statement for (statement,) in rows]


def test_what_opens_transactions_is_prepared_once_for_all_clients(database_url: str) -> None:
    with Database(database_url, settings=Settings(pool_max_size=1)) as db:
        for number in range(30):
            with db.tenant_session(UUID(int=number + 1)) as session:
                session.execute(WHOAMI_AND, {"given": "x"})
        assert len(prepared(db)) == 3  # BEGIN, the role and the client, the statement
        assert len(set(prepared(db))) == 3


def test_of_the_prepared_statements_the_one_that_rests_longest_gives_way(database_url: str) -> None:
    used, resting, other = (Statement(f"SELECT %s::text, '{name}'") for name in ("used", "resting", "other"))
    with Database(database_url, settings=Settings(pool_max_size=1)) as db:
        with db._driver() as connection:  # noqa: SLF001  # a connection that is nobody's
            connection.prepare_threshold, connection.prepared_max = 0, 2
            for statement in (used, resting, used, other):
                connection.fetch(statement, ["x"])
        assert prepared(db) == ["SELECT $1::text, 'other'", "SELECT $1::text, 'used'"]


def test_a_first_statement_of_many_megabytes_is_sent_to_its_end(database_url: str, client_id: UUID) -> None:
    async def main() -> Any:
        async with asyncio.timeout(20), Database(database_url) as db, db.async_tenant_session(client_id) as session:
            return (await session.execute(WHOAMI_AND, {"given": "x" * 10_000_000})).one()

    found = asyncio.run(main())
    assert found[:2] == ("kestra_tenant", str(client_id))
    assert len(found[2]) == 10_000_000


def test_a_unit_of_work_that_executes_nothing_sends_nothing(one: Database, client_id: UUID) -> None:
    with one.tenant_session(client_id) as session, tempfile.TemporaryFile("w+") as trace:
        pgconn = driver_of(session).pgconn
        pgconn.trace(trace.fileno())
        session.commit()
        session.connection()
        session.rollback()
        pgconn.untrace()
        trace.seek(0)
        assert trace.read() == ""


def test_nothing_of_an_opening_stays_on_the_pooled_connection(one: Database, client_id: UUID) -> None:
    with one.tenant_session(client_id) as session:
        session.connection()
    with one._open().pool.connection() as connection:  # noqa: SLF001  # the next user of it is not one of ours
        assert connection.execute(WHO).fetchone() == ("kestra_app", "")
        assert connection.info.transaction_status == TransactionStatus.IDLE


def test_nothing_of_an_opening_stays_when_the_session_is_invalidated(database_url: str, client_id: UUID) -> None:
    async def main() -> None:
        async with Database(database_url, settings=Settings(pool_max_size=1)) as db:
            with db.tenant_session(client_id) as session:
                session.connection()
                session.invalidate()
            with db._driver() as connection:  # noqa: SLF001  # the next user of it, who is nobody
                assert connection.opening is None
                assert connection.execute(WHO).fetchone() == ("kestra_app", "")
            async with db.async_tenant_session(client_id) as async_session:
                await async_session.connection()
                await async_session.invalidate()
            async with db._async_driver() as async_connection:  # noqa: SLF001  # as above
                assert async_connection.opening is None
                assert await (await async_connection.execute(WHO)).fetchone() == ("kestra_app", "")

    asyncio.run(main())


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_first_statement_that_fails_fails_as_any_other(one: Database, client_id: UUID) -> None:
    for _ in range(8):
        with one.tenant_session(client_id) as session:
            with pytest.raises(InvalidValue, match="DivisionByZero") as caught:
                session.execute(QUOTIENT, {"number": 0})
            assert isinstance(caught.value.__cause__, psycopg.errors.DivisionByZero)
            with pytest.raises(StatementFailed, match="InFailedSqlTransaction"):
                session.execute(QUOTIENT, {"number": 1})
            session.rollback()
            assert session.scalar(QUOTIENT, {"number": 1}) == 1
            assert session.execute(WHOAMI).one()[0] == "kestra_tenant"


def test_a_first_statement_that_cannot_be_prepared_fails_once(
    one: Database, superuser: psycopg.Connection[Any], client_id: UUID
) -> None:
    statement = text("SELECT count(*) FROM passing WHERE n = :n").execution_options(**RAW)
    superuser.execute("CREATE TABLE passing (n integer); GRANT SELECT ON passing TO kestra_tenant")
    for _ in range(5):
        with one.tenant_session(client_id) as session:
            session.execute(statement, {"n": 1})
    superuser.execute("ALTER TABLE passing RENAME TO gone")
    with pytest.raises(StatementFailed, match="UndefinedTable"), one.tenant_session(client_id) as session:
        session.execute(statement, {"n": 1})
    superuser.execute("ALTER TABLE gone RENAME TO passing")
    for _ in range(8):
        with one.tenant_session(client_id) as session:
            assert session.scalar(statement, {"n": 1}) == 0


@pytest.mark.parametrize("given", [{"n": 1}, {}], ids=["with parameters", "without"])
@pytest.mark.parametrize("first", [True, False], ids=["opens the transaction", "is a later one"])
def test_a_statement_whose_columns_were_changed_fails_once_also_where_nobody_minds(
    one: Database, superuser: psycopg.Connection[Any], client_id: UUID, given: dict[str, int], *, first: bool
) -> None:
    statement = text(f"SELECT m FROM passing WHERE n = {':n' if given else '1'}").execution_options(**RAW)
    superuser.execute("CREATE TABLE passing (n integer, m integer); GRANT SELECT ON passing TO kestra_tenant")
    superuser.execute("INSERT INTO passing VALUES (1, 2)")

    def read() -> Any:
        with one.tenant_session(client_id) as session:
            if not first:
                session.execute(WHOAMI_AND, {"given": "x"})
            try:
                return session.scalar(statement, given)
            except StatementFailed as error:
                return error.sqlstate

    assert [read() for _ in range(8)] == [2] * 8
    superuser.execute("ALTER TABLE passing ALTER m TYPE text")
    found = [read() for _ in range(8)]
    assert found in (["0A000"] + ["2"] * 7, ["2"] * 8)


def test_what_libpq_does_not_take_leaves_the_session_its_role(one: Database, client_id: UUID) -> None:
    with one.tenant_session(client_id) as session:
        with pytest.raises(KestraError):
            session.execute(select(ChatMessage.id).where(ChatMessage.id.in_(range(70_000))))
        assert session.execute(WHOAMI).one()[0] == "kestra_tenant"
        assert driver_of(session).pgconn.pipeline_status == PipelineStatus.OFF
        session.rollback()
        assert session.execute(WHOAMI_AND, {"given": "x"}).one()[0] == "kestra_tenant"


@pytest.mark.parametrize("first", [with_parameters, without_parameters, of_many_rows])
def test_a_login_that_may_not_take_the_role_is_told(
    superuser: psycopg.Connection[Any], database_url: str, client_id: UUID, first: Callable[[Session], Any]
) -> None:
    login = f"kestra_test_login_{token_hex(6)}"
    superuser.execute(f"CREATE ROLE {login} LOGIN NOINHERIT PASSWORD 'x'")
    try:
        url = make_conninfo(database_url, user=login, password="x")  # noqa: S106  # a user of this test
        with Database(f"postgresql://?{urlencode(conninfo_to_dict(url))}", settings=Settings(pool_max_size=1)) as db:
            for _ in range(8):
                with db.tenant_session(client_id) as session:
                    with pytest.raises(ConfigurationError, match="kestra verify") as caught:
                        first(session)
                    assert isinstance(caught.value.__cause__, ConfigurationError | psycopg.errors.InsufficientPrivilege)
                    with pytest.raises((ConfigurationError, StatementFailed)):  # nothing runs in the failed transaction
                        first(session)
            superuser.execute(f"GRANT kestra_tenant TO {login}")
            with db.tenant_session(client_id) as session:
                assert session.execute(WHOAMI_AND, {"given": "x"}).one()[0] == "kestra_tenant"
    finally:
        superuser.execute(f"DROP ROLE {login}")


@pytest.mark.parametrize("parameters", [{"given": "x"}, None], ids=["in one flush", "as a script"])
def test_a_connection_that_broke_before_the_first_statement_is_replaced(
    one: Database, superuser: psycopg.Connection[Any], client_id: UUID, parameters: dict[str, str] | None
) -> None:
    statement = WHOAMI if parameters is None else WHOAMI_AND
    with one.tenant_session(client_id) as session:
        pid = driver_of(session).info.backend_pid
        superuser.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
        with pytest.raises(DatabaseUnavailable) as caught:
            session.execute(statement, parameters)
        if parameters:
            assert isinstance(caught.value.__cause__, psycopg.errors.AdminShutdown)
        session.rollback()
        assert session.execute(statement, parameters).one()[0] == "kestra_tenant"
    with one.tenant_session(client_id) as session:
        assert session.execute(statement, parameters).one()[0] == "kestra_tenant"


def test_a_connection_that_breaks_at_the_first_statement_is_replaced(
    one: Database, superuser: psycopg.Connection[Any], client_id: UUID
) -> None:
    superuser.execute(
        "CREATE FUNCTION die(x integer) RETURNS void LANGUAGE sql SECURITY DEFINER "
        "AS 'SELECT pg_terminate_backend(pg_backend_pid())'"
    )
    killed = select(func.die(bindparam("x", 1)))
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable), one.system_session(reason="test") as session:
            session.execute(killed)
        with one.tenant_session(client_id) as session:
            assert session.execute(WHOAMI_AND, {"given": "x"}).one()[0] == "kestra_tenant"


@pytest.mark.parametrize(
    "deallocate", ["DEALLOCATE ALL", "DISCARD PLANS", "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"]
)
def test_statements_that_somebody_deallocated_are_prepared_again(
    one: Database, client_id: UUID, deallocate: str
) -> None:
    for times in (8, 2, 8):
        for _ in range(times):
            with one.tenant_session(client_id) as session:
                assert session.execute(WHOAMI_AND, {"given": str(times)}).one()[0] == "kestra_tenant"
        for _ in range(2):
            with one.system_session(reason="test") as system:
                system.execute(text(deallocate))
        with one.tenant_session(client_id) as session:
            assert session.execute(select(func.current_user(), bindparam("x", times))).one()[0] == "kestra_tenant"
            session.rollback()  # after which psycopg prepares everything again


def test_a_statement_whose_tables_were_changed_is_prepared_again(
    one: Database, superuser: psycopg.Connection[Any]
) -> None:
    superuser.execute("CREATE FUNCTION given(n integer) RETURNS TABLE (a integer) LANGUAGE sql AS 'SELECT n'")
    statement = Statement("SELECT * FROM given(%s::integer)")
    with one._driver() as connection:  # noqa: SLF001  # nobody's
        for _ in range(8):
            assert connection.fetch(statement, [1]) == [(1,)]
        superuser.execute("DROP FUNCTION given")
        superuser.execute("CREATE FUNCTION given(n integer) RETURNS TABLE (a text) LANGUAGE sql AS 'SELECT n::text'")
        with suppress(psycopg.errors.FeatureNotSupported):  # where it was prepared
            connection.fetch(statement, [1])
        assert connection.fetch(statement, [1]) == [("1",)]


@pytest.mark.parametrize("threshold", [0, 1, 5])
def test_nothing_that_failed_stays_prepared_on_the_server(database_url: str, client_id: UUID, threshold: int) -> None:
    with Database(database_url, settings=Settings(pool_max_size=1, prepare_threshold=threshold)) as db:
        for _ in range(4):
            for number in [1] * threshold + [0]:
                with suppress(InvalidValue), db.tenant_session(client_id) as session:
                    session.execute(QUOTIENT, {"number": number})
        with db._driver() as connection:  # noqa: SLF001  # nobody's
            on_the_server = connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone()
            assert on_the_server == (len(connection._prepared._names),)  # noqa: SLF001  # psycopg's


def test_copy_with_parameters_that_nobody_uses_is_refused_as_psycopg_does(one: Database) -> None:
    for copy in ("COPY clients TO STDOUT", "COPY clients FROM STDIN"):
        with pytest.raises(KestraError), one.system_session(reason="test") as system:
            system.connection().exec_driver_sql(copy, {"unused": 1})
    with one.system_session(reason="test") as system:
        assert system.execute(WHOAMI).one()[0] == "kestra_system"


class TimeIsUp(Exception):
    pass


@pytest.mark.parametrize("kept", [True, False], ids=["traceback kept", "traceback let go"])
@pytest.mark.parametrize("opened", [True, False], ids=["later statement", "first statement"])
def test_nobody_reads_what_an_interrupted_statement_was_to_read(
    one: Database, superuser: psycopg.Connection[Any], client_id: UUID, *, opened: bool, kept: bool
) -> None:
    tracebacks: list[object] = []  # as a log or a monitor may keep one, with the frames that were left
    with one.tenant_session(client_id) as session:
        messages.record(session, chat_id="1", role="user", content="of chat 1")

    def time_is_up(*_: object) -> None:
        raise TimeIsUp

    def recorded(session: TenantSession) -> list[str | None]:
        return [message.content for message in messages.history(session, chat_id="1", limit=9).items]

    before = signal.signal(signal.SIGALRM, time_is_up)
    try:
        for _ in range(8):
            superuser.execute("BEGIN; LOCK chat_messages IN ACCESS EXCLUSIVE MODE")
            with suppress(KestraError, PendingRollbackError), one.tenant_session(client_id) as session:
                if opened:
                    session.execute(WHOAMI)
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                try:
                    recorded(session)
                except TimeIsUp as time_limit:
                    tracebacks += [time_limit] * kept
                superuser.execute("ROLLBACK")
                assert messages.history(session, chat_id="2", limit=9).items == []
            superuser.execute("ROLLBACK")
            with one.tenant_session(client_id) as session:
                assert recorded(session) == ["of chat 1"]
        assert len(tracebacks) == 8 * kept
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("parameters", [{"given": "x"}, None], ids=["in one flush", "as a script"])
@pytest.mark.parametrize("how", [SHUT_RD, SHUT_WR, SHUT_RDWR])
def test_a_connection_that_was_cut_off_before_the_first_statement_is_replaced(
    one: Database, client_id: UUID, how: int, parameters: dict[str, str] | None
) -> None:
    statement = WHOAMI if parameters is None else WHOAMI_AND
    with one.tenant_session(client_id) as session:
        its_socket = socket(fileno=os.dup(driver_of(session).pgconn.socket))
        its_socket.shutdown(how)
        its_socket.close()
        with pytest.raises(DatabaseUnavailable):
            session.execute(statement, parameters)
        session.rollback()
        assert session.execute(statement, parameters).one()[0] == "kestra_tenant"


@pytest.mark.parametrize("kind", ["tenant", "system"])
def test_nothing_runs_without_the_role_when_its_transaction_did_not_begin(
    database_url: str, client_id: UUID, kind: str
) -> None:
    """As when somebody has deallocated what the connection takes for prepared."""
    with Database(database_url, settings=Settings(pool_max_size=1)) as db:
        for _ in range(2):
            with session_of(kind, db, client_id) as session:
                session.connection()
                driver = driver_of(session)
                driver.pgconn.exec_(b"DEALLOCATE ALL")
                for _ in range(2):
                    try:
                        assert session.execute(WHOAMI_AND, {"given": "x"}).one()[0] == f"kestra_{kind}"
                    except StatementFailed:
                        assert driver.opening is not None
                assert session.execute(WHOAMI).one()[0] == f"kestra_{kind}"
                session.commit()  # a rollback would forget what was prepared


def test_a_name_that_is_taken_on_the_server_is_not_begin(database_url: str, client_id: UUID) -> None:
    with Database(database_url, settings=Settings(pool_max_size=1)) as db:
        with db._driver() as connection:  # noqa: SLF001  # on which somebody has prepared something else
            connection.pgconn.prepare(b"_pg3_0", b"SELECT 1")
        with db.tenant_session(client_id) as session:
            with pytest.raises(StatementFailed, match="DuplicatePreparedStatement"):
                session.execute(WHOAMI_AND, {"given": "x"})
            assert session.execute(WHOAMI_AND, {"given": "x"}).one()[0] == "kestra_tenant"
        with db.tenant_session(client_id) as session:
            assert session.execute(WHOAMI_AND, {"given": "x"}).one()[0] == "kestra_tenant"


class Interrupted(BaseException):
    pass


@pytest.fixture
def _collected_later() -> Iterator[None]:
    """What a struck statement leaves behind is not ended while the next one is traced, which would strike it too."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.mark.parametrize("parameters", [{"given": "x"}, None], ids=["in one flush", "as a script"])
@pytest.mark.parametrize("kind", ["tenant", "system"])
@pytest.mark.usefixtures("_collected_later")
def test_nothing_runs_without_the_role_wherever_a_signal_strikes(
    one: Database, client_id: UUID, kind: str, parameters: dict[str, str] | None
) -> None:
    """It strikes at each line in turn; then the session is used again, first without a rollback, then after one."""
    statement = WHOAMI if parameters is None else WHOAMI_AND
    for line in count():
        with session_of(kind, one, client_id) as session:
            session.connection()
            struck = striking(line, partial(session.execute, statement, parameters))
            try:
                assert session.execute(statement, parameters).one()[0] == f"kestra_{kind}"
            except (KestraError, PendingRollbackError):
                assert struck
            session.rollback()
            assert session.execute(statement, parameters).one()[0] == f"kestra_{kind}"
            if not struck:
                break
    assert line > 10  # or it has traced nothing


@pytest.mark.parametrize("swallowed", [True, False])
@pytest.mark.usefixtures("_collected_later")
def test_what_goes_back_to_the_pool_is_idle_wherever_a_signal_strikes(
    one: Database, client_id: UUID, *, swallowed: bool
) -> None:
    """In a hot statement, after which the block is left as if nothing had been, or not; and in an ingest."""
    for line in count():
        struck = False
        with suppress(Interrupted, KestraError, PendingRollbackError), one.tenant_session(client_id) as session:
            struck = striking(line, partial(messages.history, session, chat_id="1", limit=9))
            if struck and not swallowed:
                raise Interrupted
        struck |= striking(line, partial(one.ingest, "token-a", chat_id="1", role="user", content="x"))
        with one._driver() as connection:  # noqa: SLF001  # the only one
            pgconn = connection.pgconn
            assert pgconn.transaction_status == TransactionStatus.IDLE
            assert pgconn.pipeline_status == PipelineStatus.OFF
            assert connection.opening is None
            assert connection.execute(WHO).fetchone() == ("kestra_app", "")
        if not struck:
            break
    assert line > 10


def striking(line: int, call: Callable[[], object]) -> bool:
    """Whether the call was interrupted."""
    before = sys.gettrace()
    sys.settrace(strike_at(line))
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


def strike_at(line: int) -> Callable[..., Any]:
    """A tracer that interrupts where the module executes this line of all that it executes."""
    lines = count()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        # Who strikes while a connection goes back to its pool takes it from the pool, as in psycopg_pool itself.
        of_closing = frame.f_code.co_name in {"end_interrupted", "_is_left_in_a_pipeline"}
        if frame.f_code.co_filename != transaction.__file__ or of_closing:
            return None
        if event == "line" and next(lines) == line:
            raise Interrupted
        return trace

    return trace


def test_a_cancelled_first_statement_leaves_a_clean_connection(database_url: str, client_id: UUID) -> None:
    sleep = select(func.pg_sleep(bindparam("seconds", 30)))

    async def main() -> None:
        async with Database(database_url, settings=Settings(pool_max_size=1)) as db:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1), db.async_tenant_session(client_id) as session:
                        await session.execute(sleep)
                async with db.async_tenant_session(client_id) as session:
                    assert (await session.execute(WHOAMI_AND, {"given": "x"})).one()[0] == "kestra_tenant"

    asyncio.run(main())


def test_cancelled_tasks_lose_no_connection_of_the_pool(database_url: str, client_id: UUID) -> None:
    async def unit(db: Database) -> None:
        async with db.async_tenant_session(client_id) as session:
            await session.execute(WHOAMI_AND, {"given": "x"})

    async def main() -> None:
        async with Database(database_url, settings=Settings(pool_max_size=2)) as db:
            await unit(db)
            for switches in count():  # cancelled after so many turns of the loop
                tasks = [asyncio.create_task(unit(db)) for _ in range(4)]
                for _ in range(switches):
                    await asyncio.sleep(0)
                cancelled = [task.cancel() for task in tasks]
                await asyncio.gather(*tasks, return_exceptions=True)
                if not any(cancelled):
                    break
            await asyncio.gather(*[unit(db) for _ in range(8)])
            async with db._async_driver() as one, db._async_driver() as other:  # noqa: SLF001  # all there are
                for connection in (one, other):
                    assert connection.pgconn.transaction_status == TransactionStatus.IDLE
                    assert connection.opening is None

    asyncio.run(main())


def test_an_engine_whose_connections_do_not_open_transactions_is_refused(database_url: str, client_id: UUID) -> None:
    for dialect, session in (
        ("kestra_tenant", lambda engine: TenantSession(engine, client_id=client_id)),
        ("kestra_system", lambda engine: SystemSession(engine, reason="test")),
    ):
        engine = create_engine(
            f"postgresql+{dialect}://",
            creator=lambda: psycopg.connect(database_url, autocommit=True),
            poolclass=NullPool,
            use_native_hstore=False,
        )
        with session(engine) as made, pytest.raises(TenancyError, match="do not open transactions"):
            made.execute(WHOAMI)


def test_a_first_insert_of_no_client_is_still_refused(one: Database) -> None:
    with pytest.raises(ClientNotFound), one.tenant_session(UUID(int=1)) as session:
        session.execute(insert(ChatMessage).values(chat_id="1", role="user", content="x"))
    with one.tenant_session(UUID(int=1)) as session:
        assert messages.history(session, chat_id="1", limit=1).items == []
        assert session.scalars(select(Client.name)).all() == []


# --- what psycopg is expected to be -----------------------------------------------------------------------------------


def test_a_cursor_that_is_used_again_opens_and_one_that_is_closed_does_not(one: Database, client_id: UUID) -> None:
    with one.tenant_session(client_id) as session:
        driver = driver_of(session)
        cursor = OpeningCursor(driver)
        cursor.close()
        with pytest.raises(psycopg.InterfaceError, match="closed"):
            cursor.execute("SELECT %s", [1])
        cursor = OpeningCursor(driver)
        assert cursor.execute("SELECT %s, current_user", [1]).fetchone() == (1, "kestra_tenant")
        assert cursor.execute("SELECT %s, current_user", [2]).fetchone() == (2, "kestra_tenant")
        session.rollback()
        session.connection()
        assert cursor.execute("SELECT %s, current_user", [3]).fetchone() == (3, "kestra_tenant")


@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize("asked", [None, False, True])
def test_statements_take_what_psycopgs_execute_takes(one: Database, *, asked: bool | None, is_binary: bool) -> None:
    for _ in range(8):  # at the end it is prepared
        with one.system_session(reason="test") as session:
            for _first_and_later in range(2):
                cursor = OpeningCursor(driver_of(session))
                cursor.format = psycopg.pq.Format(is_binary)
                cursor.execute("SELECT %s::int4, %b::int4, %s::bytea", [1, 2, b"\0\xff"], binary=asked)
                assert cursor.fetchone() == (1, 2, b"\0\xff")
                assert cursor.pgresult is not None
                assert cursor.pgresult.fformat(0) == (is_binary if asked is None else asked)


def test_a_later_statement_is_sent_by_its_name_unless_it_is_told_not_to(database_url: str) -> None:
    used, resting, other = (f"SELECT %s::text, '{name}'" for name in ("used", "resting", "other"))
    with Database(database_url, settings=Settings(pool_max_size=1)) as db:
        with db._driver() as driver:  # noqa: SLF001  # nobody's
            driver.prepare_threshold, driver.prepared_max = 0, 2
            for text_of in (used, resting, used, other):
                assert OpeningCursor(driver).execute(text_of, ["x"]).fetchone() is not None
        assert prepared(db) == ["SELECT $1::text, 'other'", "SELECT $1::text, 'used'"]
        with db._driver() as driver:  # noqa: SLF001  # as above
            driver.pgconn.exec_(b"DEALLOCATE ALL")
            assert OpeningCursor(driver).execute(used, ["x"], prepare=False).fetchone() == ("x", "used")
            with pytest.raises(psycopg.errors.InvalidSqlStatementName):
                OpeningCursor(driver).execute(used, ["x"])
            assert OpeningCursor(driver).execute(used, ["x"]).fetchone() == ("x", "used")


def test_later_statements_are_psycopgs_where_it_has_more_to_say(one: Database) -> None:
    with one.system_session(reason="test") as session:
        driver = driver_of(session)
        session.execute(WHOAMI)
        for _ in range(8):
            with pytest.raises(psycopg.ProgrammingError, match="1 parameters"):
                OpeningCursor(driver).execute("SELECT 1", [1])
            with driver.pipeline():
                cursor = OpeningCursor(driver).execute("SELECT %s, current_user", [1])
                assert cursor.fetchone() == (1, "kestra_system")


class Counted(Json):
    """A parameter that says how often it was dumped."""

    def __init__(self) -> None:
        self.dumped = 0
        super().__init__(None, dumps=self.count)

    def count(self, _: object) -> str:
        self.dumped += 1
        return "1"


def test_a_parameter_is_dumped_once(one: Database) -> None:
    given = [Counted() for _ in range(8)]  # at the end it is prepared
    with one.system_session(reason="test") as session:
        session.execute(WHOAMI)
        for each in given:
            assert OpeningCursor(driver_of(session)).execute("SELECT %s::jsonb", [each]).fetchone() == (1,)
    assert [each.dumped for each in given] == [1] * 8


@pytest.mark.parametrize("before", [[], [[object()]]], ids=["nothing", "nothing that can be sent"])
def test_a_cursor_that_was_used_is_as_good_as_new(one: Database, before: list[Any]) -> None:
    with one.system_session(reason="test") as session:
        driver = driver_of(session)
        for number in range(8):
            cursor = OpeningCursor(driver)
            with suppress(psycopg.ProgrammingError):
                cursor.executemany("SELECT %s::int4", before)
            assert cursor.execute("SELECT %s::int4", [number]).fetchone() == (number,)


@pytest.mark.parametrize("opens", [True, False], ids=["the first of a transaction", "a later one"])
def test_a_cursor_shows_what_failed_and_nothing_of_what_was_before(one: Database, *, opens: bool) -> None:
    quotient: Final = "SELECT 1 / %s::int4"
    with one.system_session(reason="test") as session:
        driver = driver_of(session)
        cursor = OpeningCursor(driver).execute("SELECT 42")
        if opens:
            session.rollback()
            session.connection()
        else:
            OpeningCursor(driver).execute(quotient, [1], prepare=True)
        with pytest.raises(psycopg.errors.DivisionByZero):
            cursor.execute(quotient, [0])
        assert cursor.rowcount == -1
        with pytest.raises(psycopg.ProgrammingError, match="no result"):
            cursor.fetchone()
        assert cursor._query is not None  # noqa: SLF001  # psycopg's way to see what failed
        assert cursor._query.query == b"SELECT 1 / $1::int4"  # noqa: SLF001  # as above
        session.rollback()


def test_nothing_is_sent_by_name_once_nothing_is_to_be_prepared(database_url: str) -> None:
    text_of: Final = "SELECT %s::text, 'kept'"
    with Database(database_url, settings=Settings(pool_max_size=1)) as db, db._driver() as driver:  # noqa: SLF001  # nobody's
        driver.prepare_threshold = 0
        OpeningCursor(driver).execute(text_of, ["x"])
        driver.prepare_threshold = None
        driver.pgconn.exec_(b"DEALLOCATE ALL")
        assert OpeningCursor(driver).execute(text_of, ["x"]).fetchone() == ("x", "kept")


def test_psycopgs_own_transactions_begin_before_what_is_prepared(database_url: str) -> None:
    with Database(database_url, settings=Settings(pool_max_size=1)) as db, db._driver() as driver:  # noqa: SLF001  # as above
        driver.autocommit = False
        for _ in range(8):
            OpeningCursor(driver).execute("SELECT %s::text", ["x"])
            assert driver.info.transaction_status == TransactionStatus.INTRANS
            driver.commit()  # not rolled back: that forgets what is prepared
        driver.autocommit = True


def test_a_first_statement_is_prepared_when_it_is_told(database_url: str) -> None:
    with Database(database_url, settings=Settings(pool_max_size=1)) as db:
        for prepare, text_of in ((True, "SELECT %s::text, 'at once'"), (False, "SELECT %s::text, 'never'")):
            for _ in range(8 if prepare is False else 1):
                with db.system_session(reason="test") as session:
                    OpeningCursor(driver_of(session)).execute(text_of, ["x"], prepare=prepare)
        assert [text for text in prepared(db) if "::text" in text] == ["SELECT $1::text, 'at once'"]


def test_openings() -> None:
    client_id = UUID(int=7)
    tenant = Opening("kestra_tenant", client_id)
    assert tenant.script == (
        "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL ROLE kestra_tenant; "
        "SET LOCAL kestra.client_id = '00000000-0000-0000-0000-000000000007'"
    )
    assert [query.query.decode() for query in tenant.queries(prepare=False)] == tenant.script.split("; ")
    assert str(client_id) not in " ".join(query.query.decode() for query in tenant.queries(prepare=True))
    assert issubclass(AsyncOpeningCursor, psycopg.AsyncCursor)
