"""What a session promises: one client for its whole life, whatever happens to its transactions."""

import asyncio
import logging
import tempfile
from collections.abc import Callable
from datetime import datetime
from typing import IO, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import joinedload, make_transient, make_transient_to_detached, selectinload

from kestra import ActiveConversation, ChatMessage, Client, ClientFile, Database, SystemSession, TenantSession
from kestra.errors import (
    ClientNotFound,
    CrossTenantWrite,
    InvalidToolsConfig,
    InvalidValue,
    KestraError,
    ReasonRequired,
    TenancyError,
)

SECRET = "segredo do cliente"  # noqa: S105  # a message text, which must not be shown
WHOAMI = text("SELECT current_user, current_setting('kestra.client_id', true)").execution_options(kestra_raw_sql=True)


def message(**values: Any) -> ChatMessage:
    return ChatMessage(**{"chat_id": "1", "role": "user", "content": SECRET, **values})


# --- the context ---


def test_transaction_runs_as_the_tenant_role_with_the_client(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        assert tuple(session.execute(WHOAMI).one()) == ("kestra_tenant", str(client_id))


def test_system_session_runs_as_the_system_role(db: Database) -> None:
    with db.system_session(reason="look") as session:
        assert session.execute(WHOAMI).one()[0] == "kestra_system"


def _after_savepoint_rollback(session: TenantSession) -> None:
    session.add(message())
    with session.begin_nested() as savepoint:
        session.add(message())
        session.flush()
        savepoint.rollback()


def _after_error(session: TenantSession) -> None:
    with pytest.raises(KestraError):
        session.execute(text("SELECT 1/0"), execution_options={"kestra_raw_sql": True})
    session.rollback()


def _commit(session: TenantSession) -> None:
    session.scalars(select(Client)).all()
    session.commit()


def _rollback(session: TenantSession) -> None:
    session.scalars(select(Client)).all()
    session.rollback()


def _flush(session: TenantSession) -> None:
    session.add(message())
    session.flush()


BEFORE: dict[str, Callable[[TenantSession], object]] = {
    "commit": _commit,
    "rollback": _rollback,
    "savepoint": lambda s: s.begin_nested().commit(),
    "savepoint rolled back": _after_savepoint_rollback,
    "error": _after_error,
    "close": lambda s: s.close(),
    "connection": lambda s: s.connection(),
    "flush": _flush,
    "get": lambda s: s.get(ActiveConversation, ("1", s.client_id)),
    "stream": lambda s: list(s.execute(select(Client).execution_options(yield_per=1))),
}


@pytest.mark.parametrize("act", BEFORE)
def test_next_statement_is_still_the_clients(db: Database, client_id: UUID, act: str) -> None:
    with db.tenant_session(client_id) as session:
        BEFORE[act](session)
        assert tuple(session.execute(WHOAMI).one()) == ("kestra_tenant", str(client_id))


def test_connection_that_was_committed_itself_begins_as_the_client_again(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        connection = session.connection()
        connection.commit()
        assert tuple(connection.execute(WHOAMI).one()) == ("kestra_tenant", str(client_id))
        session.close()


def test_pooled_connection_shows_no_trace_of_the_client(
    database_url: str, client_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "1")
    with Database(database_url) as db:
        with db.tenant_session(client_id) as session:
            pid = session.scalar(func.pg_backend_pid())
        pool = db._open().pool  # noqa: SLF001  # the next user of the connection is not one of ours
        with pool.connection() as connection:
            assert connection.info.backend_pid == pid
            row = connection.execute("SELECT current_user, current_setting('kestra.client_id', true)").fetchone()
    assert row == ("kestra_app", "")


def test_isolation_costs_no_round_trip(database_url: str, client_id: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    """BEGIN, role, client and query have one answer, COMMIT has another: without isolation there are three.

    A savepoint comes after BEGIN has been answered.
    """
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "1")
    with Database(database_url) as db, tempfile.TemporaryFile("w+") as trace:
        with db.tenant_session(client_id) as session:
            session.scalars(select(ChatMessage)).all()
            driver: Any = session.connection().connection.driver_connection
        driver.pgconn.trace(trace.fileno())
        with db.tenant_session(client_id) as session:
            session.scalars(select(ChatMessage)).all()
        assert _answers(driver, trace) == 2
        driver.pgconn.trace(trace.fileno())
        with db.tenant_session(client_id) as session, session.begin_nested():
            session.scalars(select(ChatMessage)).all()
        assert _answers(driver, trace) == 5


def _answers(driver: Any, trace: IO[str]) -> int:
    """How often the server said that it is ready for more."""
    driver.pgconn.untrace()
    trace.seek(0)
    answers = sum("ReadyForQuery" in line for line in trace)
    trace.seek(0)
    trace.truncate()
    return answers


def test_session_is_not_bound_to_another_client(db: Database, client_id: UUID, other_client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        with pytest.raises(TenancyError, match="whole life"):
            session.client_id = other_client_id
        assert session.client_id == client_id

    async def main() -> None:
        async with db, db.async_tenant_session(client_id) as session:
            with pytest.raises(TenancyError, match="whole life"):
                session.client_id = other_client_id

    asyncio.run(main())


def test_session_takes_no_connection_of_another_session_and_no_other_engine(
    db: Database, client_id: UUID, other_client_id: UUID
) -> None:
    with db.tenant_session(client_id) as session:
        taken: Any = session.connection()
        for thief in (
            TenantSession(taken, client_id=other_client_id),
            SystemSession(taken, reason="test"),
        ):
            with pytest.raises(TenancyError, match="another session"):
                thief.execute(select(Client.name))
            thief.close()
        assert session.scalars(select(Client.name)).all() == ["A"]
        system = db._open().system  # noqa: SLF001  # nobody should have it
        with pytest.raises(TenancyError, match="another engine"):
            session.execute(select(Client.name).with_only_columns(Client.id), bind_arguments={"bind": system})


def test_statement_outside_of_the_transaction_is_refused(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        session.execute(select(Client.name))
        driver: Any = session.connection().connection.driver_connection
        driver.pgconn.exec_(b"ROLLBACK")
        with pytest.raises(TenancyError, match="over"):
            session.execute(select(Client.name))


def test_async_session_is_the_same(db: Database, client_id: UUID, other_client_id: UUID) -> None:
    async def main() -> None:
        async with db:
            async with db.async_tenant_session(client_id) as session:
                assert session.client_id == client_id
                assert tuple((await session.execute(WHOAMI)).one()) == ("kestra_tenant", str(client_id))
                session.add(message())
                await session.commit()
                assert tuple((await session.execute(WHOAMI)).one()) == ("kestra_tenant", str(client_id))
                assert await session.scalar(select(func.count()).select_from(ChatMessage)) == 1
            with pytest.raises(CrossTenantWrite):
                async with db.async_tenant_session(client_id) as session:
                    session.add(message(client_id=other_client_id))
            async with db.async_system_session(reason="count") as session:
                assert await session.scalar(select(func.count()).select_from(ChatMessage)) == 1

    asyncio.run(main())


def test_tasks_on_few_connections_see_their_own_client(
    database_url: str, client_id: UUID, other_client_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "5")

    async def names(db: Database, client: UUID) -> list[str]:
        async with db.async_tenant_session(client) as session:
            first = list(await session.scalars(select(Client.name)))
            await asyncio.sleep(0)  # let the others in between
            return first + list(await session.scalars(select(Client.name)))

    async def main() -> list[list[str]]:
        async with Database(database_url) as db:
            return await asyncio.gather(*(names(db, (client_id, other_client_id)[n % 2]) for n in range(50)))

    assert asyncio.run(main()) == [["A", "A"], ["B", "B"]] * 25


def test_cancelled_task_leaves_a_clean_connection(
    database_url: str,
    superuser_url: str,
    client_id: UUID,
    other_client_id: UUID,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "1")

    async def wait_for_ever(db: Database) -> None:
        async with db.async_tenant_session(client_id) as session:
            session.add(message())
            await session.flush()
            await session.execute(select(func.pg_sleep(600)))

    async def until_asleep() -> None:
        async with await psycopg.AsyncConnection.connect(superuser_url, autocommit=True) as admin:
            asleep = "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
            while (await admin.execute(asleep)).rowcount == 0:  # noqa: ASYNC110  # the event is in the server
                await asyncio.sleep(0)

    async def main() -> None:
        async with Database(database_url) as db:
            task = asyncio.create_task(wait_for_ever(db))
            await asyncio.wait_for(until_asleep(), 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with db.async_tenant_session(other_client_id) as session:
                assert tuple((await session.execute(WHOAMI)).one()) == ("kestra_tenant", str(other_client_id))
            async with db.async_tenant_session(client_id) as session:
                assert (await session.scalars(select(ChatMessage))).all() == []

    asyncio.run(main())


# --- the unit of work ---


def test_block_commits_at_its_end_and_rolls_back_on_error(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        kept = message()
        session.add(kept)
    assert (kept.client_id, kept.content) == (client_id, SECRET)  # usable after the session
    with pytest.raises(ZeroDivisionError), db.tenant_session(client_id) as session:
        session.add(message())
        session.flush()
        raise ZeroDivisionError
    with db.tenant_session(client_id) as session:
        assert session.scalar(select(func.count()).select_from(ChatMessage)) == 1


def test_rows_that_are_read_after_the_block_bind_nothing_to_its_session(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        session.add(message())
    with db.tenant_session(client_id) as session:
        found = session.scalars(select(ChatMessage))
    with pytest.raises(InvalidRequestError, match="no longer valid"):
        found.all()
    assert not session.in_transaction()


def test_new_object_is_stamped_when_it_is_added(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        new = message()
        session.add(new)
        assert new.client_id == client_id


def _detached(db: Database, owner: UUID) -> ChatMessage:
    with db.system_session(reason="test data") as session:
        foreign = message(client_id=owner)
        session.add(foreign)
    return foreign


def _merge(session: TenantSession, foreign: ChatMessage) -> None:
    session.merge(foreign)


def _merge_without_load(session: TenantSession, foreign: ChatMessage) -> None:
    session.merge(foreign, load=False)


def _pretend_to_be_detached(session: TenantSession, foreign: ChatMessage) -> None:
    made_up = message(id=foreign.id, client_id=foreign.client_id)
    make_transient_to_detached(made_up)
    session.add(made_up)


def _restamp_after_add(session: TenantSession, foreign: ChatMessage) -> None:
    new = message()
    session.add(new)
    new.client_id = foreign.client_id


def _cascade(session: TenantSession, foreign: ChatMessage) -> None:
    client = session.scalars(select(Client)).one()
    foreign.client = client
    session.add(foreign)


def _transient_copy(session: TenantSession, foreign: ChatMessage) -> None:
    make_transient(foreign)
    session.add(foreign)


FOREIGN: dict[str, Callable[[TenantSession, ChatMessage], object]] = {
    "add": lambda s, foreign: s.add(foreign),
    "add new": lambda s, foreign: s.add(message(client_id=foreign.client_id)),
    "delete": lambda s, foreign: s.delete(foreign),
    "merge": _merge,
    "merge without load": _merge_without_load,
    "made up as detached": _pretend_to_be_detached,
    "transient again": _transient_copy,
    "restamped after add": _restamp_after_add,
    "cascade": _cascade,
    "bulk_save_objects": lambda s, foreign: s.bulk_save_objects([message(client_id=foreign.client_id)]),
    "bulk_insert_mappings": lambda s, foreign: s.bulk_insert_mappings(
        ChatMessage.__mapper__, [{"chat_id": "1", "role": "user", "content": "x", "client_id": foreign.client_id}]
    ),
}


@pytest.mark.parametrize("way", FOREIGN)
def test_object_of_another_client_is_refused(db: Database, client_id: UUID, other_client_id: UUID, way: str) -> None:
    foreign = _detached(db, other_client_id)
    with pytest.raises(CrossTenantWrite), db.tenant_session(client_id) as session:
        FOREIGN[way](session, foreign)
    with db.system_session(reason="look") as session:
        assert session.scalars(select(ChatMessage.client_id)).all() == [other_client_id]


def test_row_stays_with_its_client_in_a_system_session_too(
    db: Database, client_id: UUID, other_client_id: UUID
) -> None:
    with db.system_session(reason="test") as session:
        new = message(client_id=client_id)
        session.add(new)
        session.flush()
        with pytest.raises(CrossTenantWrite, match="immutable"):
            new.client_id = other_client_id


def test_relationships_do_not_load_by_accident(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        client = session.scalars(select(Client)).one()
        with pytest.raises(Exception, match="lazy='raise'"):
            _ = client.messages


# --- system sessions ---


@pytest.mark.parametrize("reason", ["", "  ", None])
def test_system_session_needs_a_reason(db: Database, reason: Any) -> None:
    with pytest.raises(ReasonRequired), db.system_session(reason=reason):
        pytest.fail("a session was opened")


def test_system_session_is_not_opened_inside_a_tenant_session_by_accident(
    db: Database, client_id: UUID, other_client_id: UUID
) -> None:
    with db.tenant_session(client_id):
        with pytest.raises(TenancyError, match=str(client_id)), db.system_session(reason="test"):
            pytest.fail("a session was opened")
        with db.tenant_session(other_client_id), db.system_session(reason="test", inside_tenant_session=True):
            pass
        with pytest.raises(TenancyError, match=str(client_id)), db.system_session(reason="test"):
            pytest.fail("a session was opened")
    with db.system_session(reason="test"):
        pass

    async def main() -> None:
        async with db:
            async with db.async_tenant_session(client_id):
                with pytest.raises(TenancyError, match=str(client_id)):
                    async with db.async_system_session(reason="test"):
                        pytest.fail("a session was opened")
            async with db.async_system_session(reason="test"):
                pass

    asyncio.run(main())


def test_system_session_says_why_in_the_log(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kestra"), db.system_session(reason="follow-up sweep"):
        pass
    [record] = caplog.records
    assert record.getMessage() == "system session: follow-up sweep"
    assert record.__dict__["kestra_reason"] == "follow-up sweep"


def test_system_session_sees_every_client_and_stamps_none(db: Database, client_id: UUID, other_client_id: UUID) -> None:
    with db.system_session(reason="look") as session:
        assert set(session.scalars(select(Client.id))) == {client_id, other_client_id}
    with pytest.raises(KestraError, match="client_id"), db.system_session(reason="write") as session:
        session.add(message())


def test_relationships_do_not_cross_clients_in_a_system_session(
    db: Database, client_id: UUID, other_client_id: UUID
) -> None:
    """Both clients talk to the same chat_id."""
    with db.system_session(reason="test") as session:
        for owner in (client_id, other_client_id):
            session.add_all([message(client_id=owner), ActiveConversation(client_id=owner, chat_id="1")])
        session.flush()
        session.expire_all()
        loading = selectinload(ActiveConversation.messages), joinedload(ActiveConversation.client)
        found = session.scalars(select(ActiveConversation).options(*loading)).all()
        assert {conversation.client_id for conversation in found} == {client_id, other_client_id}
        for conversation in found:
            assert [m.client_id for m in conversation.messages] == [conversation.client_id]
            assert conversation.client.id == conversation.client_id


def test_deleting_a_client_takes_its_rows_along_and_no_others(
    db: Database, client_id: UUID, other_client_id: UUID
) -> None:
    with db.system_session(reason="test data") as session:
        for owner in (client_id, other_client_id):
            session.add_all([message(client_id=owner), ActiveConversation(client_id=owner, chat_id="1")])
            session.add(ClientFile(client_id=owner, filename="f"))
    with db.system_session(reason="a client leaves") as session:
        session.delete(session.get_one(Client, client_id))
    with db.system_session(reason="look") as session:
        for model in (ChatMessage, ActiveConversation, ClientFile):
            assert session.scalars(select(model.client_id)).all() == [other_client_id]


# --- bad input ---

BAD: dict[str, tuple[type[KestraError], Callable[[TenantSession], object]]] = {
    "nul byte": (InvalidValue, lambda s: s.add(message(content="a\0" + SECRET))),
    "lone surrogate": (InvalidValue, lambda s: s.add(message(content="a\ud800" + SECRET))),
    "nul byte in a search": (InvalidValue, lambda s: s.scalars(select(ChatMessage).where(ChatMessage.chat_id == "\0"))),
    "naive datetime": (InvalidValue, lambda s: s.add(message(created_at=datetime(2026, 1, 1)))),  # noqa: DTZ001
    "unknown role": (InvalidValue, lambda s: s.add(message(role="bot"))),
    "core unknown role": (
        InvalidValue,
        lambda s: s.execute(insert(ChatMessage).values(chat_id="1", role="bot", content=SECRET)),
    ),
    "unknown status": (InvalidValue, lambda s: s.add(ActiveConversation(chat_id="1", status="paused"))),
    "unknown last role": (InvalidValue, lambda s: s.add(ActiveConversation(chat_id="1", last_role="ai"))),
    "stage too high": (InvalidValue, lambda s: s.add(ActiveConversation(chat_id="1", followup_stage=6))),
    "stage too low": (InvalidValue, lambda s: s.add(ActiveConversation(chat_id="1", followup_stage=-1))),
    "neither content nor media": (InvalidValue, lambda s: s.add(message(content=""))),
    "text too long": (InvalidValue, lambda s: s.add(ClientFile(filename="x" * 256))),
    "hash in capitals": (InvalidValue, lambda s: s.add(ClientFile(file_hash="A" * 64))),
    "missing column": (InvalidValue, lambda s: s.add(ChatMessage(chat_id="1", content=SECRET))),
    "document that is a list": (
        InvalidToolsConfig,
        lambda s: s.execute(update(Client).values(tools_config=[1])),
    ),
    "document that is null": (InvalidValue, lambda s: s.execute(update(Client).values(tools_config=None))),
    "document attribute that is a list": (
        InvalidToolsConfig,
        lambda s: setattr(s.scalars(select(Client)).one(), "tools_config", [1]),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_and_nothing_is_written(db: Database, client_id: UUID, what: str) -> None:
    error, act = BAD[what]
    with pytest.raises(error) as caught, db.tenant_session(client_id) as session:
        session.add(message(content="before"))
        act(session)
    _assert_says_nothing(caught.value)
    with db.tenant_session(client_id) as session:
        assert session.scalar(select(func.count()).select_from(ChatMessage)) == 0


REFUSED_BY_SQL = {
    "role": "INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES (:client, '1', 'bot', 'x')",
    "status": "INSERT INTO active_conversations (client_id, chat_id, status) VALUES (:client, '1', 'paused')",
    "last_role": "INSERT INTO active_conversations (client_id, chat_id, last_role) VALUES (:client, '1', 'ai')",
    "stage": "INSERT INTO active_conversations (client_id, chat_id, followup_stage) VALUES (:client, '1', 6)",
    "document": "UPDATE clients SET tools_config = '[1]'",
    "json null": "UPDATE clients SET tools_config = 'null'",
}


@pytest.mark.parametrize("what", REFUSED_BY_SQL)
def test_bad_value_is_refused_by_sql_too(db: Database, client_id: UUID, what: str) -> None:
    with pytest.raises(InvalidValue), db.tenant_session(client_id) as session:
        raw = text(REFUSED_BY_SQL[what]).execution_options(kestra_raw_sql=True)
        session.execute(raw, {"client": client_id} if ":client" in REFUSED_BY_SQL[what] else {})


WRITES_OF_NOBODY: dict[str, Callable[[TenantSession], object]] = {
    "message": lambda s: s.add(message()),
    "conversation": lambda s: s.add(ActiveConversation(chat_id="1")),
    "file": lambda s: s.execute(insert(ClientFile).values(filename="f")),
}


@pytest.mark.parametrize("what", WRITES_OF_NOBODY)
def test_write_for_a_client_that_does_not_exist_names_it(db: Database, what: str) -> None:
    nobody = uuid4()
    with pytest.raises(ClientNotFound, match=str(nobody)) as caught, db.tenant_session(nobody) as session:
        WRITES_OF_NOBODY[what](session)
    assert caught.value.client_id == nobody
    _assert_says_nothing(caught.value)


def test_write_for_no_client_in_a_system_session_is_told_without_one(db: Database) -> None:
    with (
        pytest.raises(ClientNotFound, match="that a row was written for") as caught,
        db.system_session(reason="t") as s,
    ):
        s.add(message(client_id=uuid4()))
    assert caught.value.client_id is None


def test_client_that_does_not_exist_reads_nothing(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        session.add(message())
    with db.tenant_session(uuid4()) as session:
        assert session.scalars(select(ChatMessage)).all() == []
        assert session.scalars(select(Client)).all() == []
        assert session.execute(delete(ChatMessage)).rowcount == 0  # type: ignore[attr-defined]  # DML gives a CursorResult


def test_reprs_show_no_secret(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        client = session.scalars(select(Client)).one()
        conversation = ActiveConversation(chat_id="1", last_context=SECRET)
        file = ClientFile(filename="f", google_file_uri="https://" + SECRET)
        session.add_all([conversation, file, new := message()])
        session.flush()
        shown = f"{client!r} {conversation!r} {file!r} {new!r} {session!r} {db!r}"
    assert SECRET not in shown
    assert "token-a" not in shown
    assert str(client_id) in shown


def _assert_says_nothing(error: BaseException) -> None:
    """Neither the error nor any cause that a traceback would show quotes the text of a message."""
    shown: BaseException | None = error
    while shown is not None:
        assert SECRET not in str(shown) + repr(shown)
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_the_isolation_level_is_ours_and_not_the_servers_default(
    database_url: str, superuser: psycopg.Connection[Any], client_id: UUID, level: str
) -> None:
    """What waits for a lock relies on seeing what was committed meanwhile."""
    database = superuser.info.dbname
    superuser.execute(f"ALTER DATABASE \"{database}\" SET default_transaction_isolation = '{level}'".encode())
    isolation = select(func.current_setting("transaction_isolation"))
    with Database(database_url) as db:
        with db.tenant_session(client_id) as session:
            assert session.scalar(isolation) == "read committed"
        with db.system_session(reason="test") as system:
            assert system.scalar(isolation) == "read committed"
