"""Hot statements: run on the driver, and isolated, watched and refused as every other."""

import asyncio
import signal
from functools import partial
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import bindparam, func, literal, select, text
from sqlalchemy.dialects.postgresql import insert

from kestra import ChatMessage, Database, Settings, TenantSession
from kestra.columns import Timestamptz
from kestra.dao import messages
from kestra.driver import PooledConnection
from kestra.errors import (
    CrossTenantWrite,
    DatabaseUnavailable,
    InvalidValue,
    StatementFailed,
    TenancyError,
    UnscopedStatement,
)
from kestra.hot import HotStatement
from kestra.tenancy import fetch_all
from kestra.transaction import Statement
from tests.observing import statements_sent

MESSAGES: Final = ChatMessage.__table__
CONTENTS: Final = HotStatement(
    select(MESSAGES.c.content).where(MESSAGES.c.chat_id == bindparam("chat_id")).order_by(MESSAGES.c.id)
)
NUMBER: Final = HotStatement(select(1 / bindparam("number", 1)))
MOMENT: Final = HotStatement(select(bindparam("moment", type_=Timestamptz)))


@pytest.fixture(autouse=True)
def _both_have_the_chat(db: Database, clients: tuple[UUID, UUID]) -> None:
    for client_id, content in zip(clients, ("mine", "theirs"), strict=True):
        with db.tenant_session(client_id) as session:
            messages.record(session, chat_id="1", role="user", content=content, provider_message_id="1")


def contents(session: TenantSession) -> list[str]:
    return [row[0] for row in CONTENTS.rows(session, {"chat_id": "1"})]


@pytest.mark.usefixtures("layers")
def test_each_session_gets_the_rows_of_its_client(db: Database, clients: tuple[UUID, UUID]) -> None:
    for _ in range(2):  # compiled, and then as it was compiled
        for client_id, expected in zip(clients, ("mine", "theirs"), strict=True):
            with db.tenant_session(client_id) as session:
                assert contents(session) == [expected]
                assert messages.history(session, chat_id="1").items[0].content == expected
                assert messages.memory(session, chat_id="1").messages[0].content == expected


def test_row_level_security_stands_behind_the_filter(db: Database, clients: tuple[UUID, UUID]) -> None:
    with db.tenant_session(clients[0]) as session:
        contents(session)
        text = next(iter(CONTENTS._compiled.values())).statement.text  # noqa: SLF001  # what is broken on purpose
        everybodys = text.replace("WHERE chat_messages.client_id = %(kestra_client_id)s::UUID", "")
        assert everybodys != text
        assert fetch_all(session.connection(), Statement(everybodys), {"chat_id": "1"}) == [("mine",)]


def test_whoever_listens_sees_the_statement_and_the_same_rows(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        with statements_sent() as sent:
            watched = contents(session)
            with db.tenant_session(client_id) as later:
                assert contents(later) == watched
        assert watched == contents(session)
        assert len(sent) == 2
        [row] = CONTENTS.rows(session, {"chat_id": "1"})
        assert type(row) is tuple  # the driver's again: nobody listens any more
        assert sent[0].parameters["chat_id"] == "1"


def test_it_is_compiled_once_for_an_engine(db: Database, clients: tuple[UUID, UUID]) -> None:
    before = len(CONTENTS._compiled)  # noqa: SLF001  # what is counted
    for client_id in clients * 3:
        with db.tenant_session(client_id) as session:
            contents(session)
    assert len(CONTENTS._compiled) == before + 1  # noqa: SLF001  # as above


def test_asyncio_gets_the_same(database_url: str, clients: tuple[UUID, UUID]) -> None:
    async def main() -> list[list[str]]:
        async with Database(database_url) as db:
            found = []
            for client_id in clients:
                async with db.async_tenant_session(client_id) as session:
                    found.append(await session.run_sync(contents))
            return found

    assert asyncio.run(main()) == [["mine"], ["theirs"]]


def test_a_system_session_is_refused(db: Database) -> None:
    with pytest.raises((TenancyError, AttributeError)), db.system_session(reason="all") as session:
        HotStatement(select(MESSAGES.c.content)).rows(session, {})


def test_the_cursor_stays_guarded(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        for statement, given in ((CONTENTS, {"chat_id": "1"}), (MOMENT, {"moment": None})):
            statement.rows(session, given)
            driver: Any = session.connection().connection.driver_connection
            with pytest.raises(UnscopedStatement):
                driver.cursor()


def test_the_cursor_stays_guarded_after_an_error(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        driver = session.connection().connection.driver_connection
        assert isinstance(driver, PooledConnection)
        with pytest.raises(InvalidValue):
            NUMBER.rows(session, {"number": 0})
        with pytest.raises(UnscopedStatement):
            driver.cursor()
        session.rollback()


def test_outside_of_run_sync_it_is_an_error_of_ours(database_url: str, client_id: UUID) -> None:
    async def main() -> None:
        async with Database(database_url) as db, db.async_tenant_session(client_id) as session:
            await session.connection()
            with pytest.raises(StatementFailed, match="greenlet"):
                contents(session.sync_session)
            await session.rollback()
            assert await session.run_sync(contents) == ["mine"]

    asyncio.run(main())


def test_the_driver_runs_nothing_else_while_a_client_is_bound(database_url: str, client_id: UUID) -> None:
    statement = Statement("SELECT current_user")

    async def main() -> None:
        async with Database(database_url) as db:
            with db.tenant_session(client_id) as session:
                driver: Any = session.connection().connection.driver_connection
                for refused in (driver.cursor, partial(driver.fetch, statement, []), partial(driver.execute, "SELECT")):
                    with pytest.raises(UnscopedStatement):
                        refused()
            async with db.async_tenant_session(client_id) as async_session:
                driver = (await (await async_session.connection()).get_raw_connection()).driver_connection
                with pytest.raises(UnscopedStatement):
                    driver.cursor()
                for refused in (partial(driver.fetch, statement, []), partial(driver.execute, "SELECT")):
                    with pytest.raises(UnscopedStatement):
                        await refused()

    asyncio.run(main())


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("opened", [True, False])
def test_after_the_end_of_the_transaction_it_is_refused(
    db: Database, client_id: UUID, end: str, *, opened: bool
) -> None:
    with db.tenant_session(client_id) as session:
        driver: Any = session.connection().connection.driver_connection
        if opened:
            contents(session)
        getattr(driver, end)()
        with pytest.raises(TenancyError, match="is over"):
            contents(session)
        session.rollback()


def test_its_errors_are_translated_and_the_session_goes_on_after_a_rollback(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        with pytest.raises(InvalidValue):
            NUMBER.rows(session, {"number": 0})
        with pytest.raises(StatementFailed):
            contents(session)
        session.rollback()
        assert contents(session) == ["mine"]


def test_it_fails_alike_when_it_is_prepared(db: Database, client_id: UUID) -> None:
    for _ in range(3):
        with db.tenant_session(client_id) as session:
            for _ in range(8):
                assert [tuple(row) for row in NUMBER.rows(session, {"number": 1})] == [(1,)]
            with pytest.raises(InvalidValue, match="DivisionByZero"):
                NUMBER.rows(session, {"number": 0})
            with pytest.raises(StatementFailed, match="InFailedSqlTransaction"):
                NUMBER.rows(session, {"number": 1})
            session.rollback()


def test_the_first_of_a_session_fails_alike_when_it_is_prepared(db: Database, client_id: UUID) -> None:
    for _ in range(3):
        for _ in range(8):
            with db.tenant_session(client_id) as session:
                assert [tuple(row) for row in NUMBER.rows(session, {"number": 1})] == [(1,)]
        with db.tenant_session(client_id) as session:
            with pytest.raises(InvalidValue, match="DivisionByZero"):
                NUMBER.rows(session, {"number": 0})
            with pytest.raises(StatementFailed, match="InFailedSqlTransaction"):
                NUMBER.rows(session, {"number": 1})
            session.rollback()


@pytest.mark.parametrize("wrong", ["\ud800", "a\0b"])
def test_a_text_that_cannot_be_sent_is_an_invalid_value(db: Database, client_id: UUID, wrong: str) -> None:
    with pytest.raises(InvalidValue), db.tenant_session(client_id) as session:
        CONTENTS.rows(session, {"chat_id": wrong})


def test_parameters_are_checked_by_their_types(db: Database, client_id: UUID) -> None:
    with pytest.raises(InvalidValue, match="datetime"), db.tenant_session(client_id) as session:
        MOMENT.rows(session, {"moment": "2026-01-01"})


def test_a_connection_that_broke_is_unavailable_and_replaced(
    database_url: str, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    with Database(database_url, settings=Settings(pool_max_size=1)) as db:
        with pytest.raises(DatabaseUnavailable), db.tenant_session(client_id) as session:
            contents(session)
            superuser.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
            contents(session)
        with db.tenant_session(client_id) as session:
            assert contents(session) == ["mine"]


def test_a_missing_parameter_is_an_error(db: Database, client_id: UUID) -> None:
    with pytest.raises(StatementFailed), db.tenant_session(client_id) as session:
        CONTENTS.rows(session, {})


class TimeIsUp(Exception):
    pass


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("hot", [True, False])
def test_a_time_limit_that_a_signal_raises_comes_through_and_frees_the_connection(
    database_url: str, client_id: UUID, *, hot: bool, opened: bool
) -> None:
    def time_is_up(*_: object) -> None:
        raise TimeIsUp

    sleep = select(func.pg_sleep(30))
    before = signal.signal(signal.SIGALRM, time_is_up)
    try:
        with Database(database_url, settings=Settings(pool_max_size=1, pool_timeout=5)) as db:
            with pytest.raises(TimeIsUp), db.tenant_session(client_id) as session:
                session.connection()
                if opened:
                    contents(session)
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                if hot:
                    HotStatement(sleep).rows(session, {})
                else:
                    session.execute(sleep)
            with db.tenant_session(client_id) as session:
                assert contents(session) == ["mine"]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_function_of_the_same_name_elsewhere_is_refused(db: Database, client_id: UUID) -> None:
    with pytest.raises(UnscopedStatement), db.tenant_session(client_id) as session:
        session.execute(select(func.elsewhere.kestra_record().table_valued("x")))


@pytest.mark.parametrize(
    "statement",
    [
        select(text("content")).select_from(MESSAGES),
        select(MESSAGES.c.content).where(text("content <> ''")),
        select(
            insert(ChatMessage)
            .values(client_id=bindparam("client_id"), chat_id="1", role="user", content="x")
            .returning(MESSAGES.c.id)
            .cte("added")
            .c.id
        ),
        select(
            insert(ChatMessage).values(chat_id="1", role="user", content="x").returning(MESSAGES.c.id).cte("new").c.id
        ),
        select(func.set_config("kestra.client_id", literal("x"), literal(True))),  # noqa: FBT003  # SQL's
    ],
)
def test_what_the_filter_does_not_reach_is_refused(db: Database, client_id: UUID, statement: Any) -> None:
    with pytest.raises((UnscopedStatement, CrossTenantWrite)), db.tenant_session(client_id) as session:
        HotStatement(statement).rows(session, {"client_id": client_id})
