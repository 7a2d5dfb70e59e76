"""A webhook's message by its token: in one round trip, as a session records it, and of that token's client alone."""

import asyncio
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import count
from socket import SHUT_RDWR, socket
from threading import Event
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import func, select, text

from kestra import ActiveConversation, ChatMessage, Database, Settings
from kestra.dao import messages
from kestra.dao.conversations import ConversationState
from kestra.dao.messages import Recorded
from kestra.errors import (
    AuthenticationFailed,
    ConfigurationError,
    ConversationNotFound,
    DatabaseUnavailable,
    InvalidValue,
    KestraError,
    PoolExhausted,
    StatementFailed,
    UnknownToken,
    UnscopedStatement,
)
from kestra.transaction import Statement
from tests.concurrency import PATIENCE, at_once, until_waiting
from tests.observing import shown
from tests.test_dao_messages import said

A, B = "token-a", "token-b"
WEBHOOK: Final[dict[str, Any]] = {"chat_id": "chat", "role": "user", "content": "oi", "provider_message_id": "wamid.1"}
CALL: Final = "SELECT * FROM kestra_ingest(%s, 'chat', 'user', 'oi', NULL, NULL, NULL, NULL)"
WHOAMI: Final = "SELECT current_user, session_user, current_setting('kestra.client_id', true)"

pytestmark = pytest.mark.usefixtures("clients")


def stored(db: Database, client_id: UUID) -> list[dict[str, Any]]:
    """Every row of a client, with ids of messages counted from its first one."""
    with db.tenant_session(client_id) as session:
        first = session.scalar(select(func.min(ChatMessage.id))) or 0
        return [
            {
                name: value - first
                if name == "id" or (name.endswith("_message_id") and isinstance(value, int))
                else value
                for name, value in row.items()
                if name != "client_id"
            }
            for table in (ActiveConversation.__table__, ChatMessage.__table__)
            for row in session.execute(select(*table.columns).order_by(*table.primary_key)).mappings()
        ]


def nothing_is_stored(db: Database) -> bool:
    with db.system_session(reason="look") as session:
        return not session.scalar(select(func.count()).select_from(ChatMessage))


# --- what it does -----------------------------------------------------------------------------------------------------


def test_it_does_what_a_session_does(db: Database, clients: tuple[UUID, UUID]) -> None:
    told = [
        said(0, provider_message_id="1"),
        said(1, "assistant", provider_message_id="2"),
        said(0.5, provider_message_id="3", content=None, media_url="https://m/1"),
        said(2, chat_id="other"),
        said(0, provider_message_id="1"),
    ]
    given = [asdict(message) for message in told]
    ingested = [db.ingest(A, **parts) for parts in given]
    with db.tenant_session(clients[1]) as session:
        recorded = [messages.record(session, **parts) for parts in given]
    assert [result.inserted for result in ingested] == [result.inserted for result in recorded] == [True] * 4 + [False]
    assert stored(db, clients[0]) == stored(db, clients[1])
    with db.tenant_session(clients[0]) as session:
        state = session.get_one(ActiveConversation, ("chat", clients[0]))
        assert all(
            getattr(state, name) == getattr(ingested[2].conversation, name) for name in ConversationState._fields
        )


def test_asyncio_does_the_same(database_url: str, db: Database, clients: tuple[UUID, UUID]) -> None:
    async def webhooks() -> list[Recorded]:
        async with Database(database_url) as database:
            return [await database.async_ingest(token, **WEBHOOK) for token in (A, A, B)]

    first, again, other = asyncio.run(webhooks())
    assert [first.inserted, again.inserted, other.inserted] == [True, False, True]
    assert first.message_id == again.message_id
    for client_id in clients:
        with db.tenant_session(client_id) as session:
            assert session.scalars(select(ChatMessage.content)).all() == ["oi"]


def test_sixteen_threads_with_the_same_message_store_it_once(db: Database, client_id: UUID) -> None:
    results = at_once(*[partial(db.ingest, A, **WEBHOOK)] * 16)
    assert sorted(result.inserted for result in results) == [False] * 15 + [True]
    assert len({result.message_id for result in results}) == 1
    with db.tenant_session(client_id) as session:
        assert session.scalar(select(func.count()).select_from(ChatMessage)) == 1


def test_a_duplicate_whose_first_is_not_committed_yet_waits_and_finds_it(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with db.tenant_session(client_id) as session:
            first = messages.record(session, **WEBHOOK)
            waiting = pool.submit(db.ingest, A, **{**WEBHOOK, "chat_id": "another"})
            until_waiting(superuser, waiting)
        second = waiting.result(PATIENCE)
    assert (second.message_id, second.inserted, second.conversation.chat_id) == (first.message_id, False, "chat")


def test_redeliveries_while_the_chat_is_erased_are_stored_or_known(db: Database, client_id: UUID) -> None:
    """Between two looks at the message it may come and go."""
    over = Event()

    def redeliver() -> int:
        count = 0
        while not over.is_set():
            db.ingest(A, **WEBHOOK)
            with db.tenant_session(client_id) as session:
                messages.record(session, **WEBHOOK)
            count += 1
        return count

    def erase() -> int:
        try:
            for _ in range(300):
                with db.tenant_session(client_id) as session:
                    messages.erase_chat(session, chat_id="chat")
        finally:
            over.set()
        return 1

    assert all(at_once(redeliver, redeliver, redeliver, erase))


def test_a_redelivery_draws_no_id_and_does_not_wait_for_the_chat(db: Database, client_id: UUID) -> None:
    first = db.ingest(A, **WEBHOOK)
    with ThreadPoolExecutor(1) as thread, db.tenant_session(client_id) as session:
        messages.record(session, chat_id="chat", role="assistant", content="olá")
        assert not thread.submit(db.ingest, A, **WEBHOOK).result(PATIENCE).inserted
    assert db.ingest(A, **{**WEBHOOK, "provider_message_id": "wamid.2"}).message_id == first.message_id + 2


def test_it_is_one_round_trip(database_url: str) -> None:
    with Database(database_url, settings=Settings(pool_max_size=1)) as db, tempfile.TemporaryFile("w+") as trace:
        for number in range(10):
            db.ingest(A, **{**WEBHOOK, "provider_message_id": f"warm {number}"})
        with db._driver() as connection:  # noqa: SLF001  # its trace is what is looked at
            pgconn = connection.pgconn
        pgconn.trace(trace.fileno())
        db.ingest(A, **WEBHOOK)
        pgconn.untrace()
        trace.seek(0)
        assert sum("ReadyForQuery" in line for line in trace) == 1


# --- isolation --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("layers")
def test_the_same_chat_and_ids_of_another_client_are_left_alone(db: Database, clients: tuple[UUID, UUID]) -> None:
    db.ingest(B, **{**WEBHOOK, "content": "deles"})
    before = stored(db, clients[1])
    assert db.ingest(A, **WEBHOOK).inserted
    again = db.ingest(A, **WEBHOOK)
    assert not again.inserted
    assert stored(db, clients[1]) == before
    with db.tenant_session(clients[0]) as session:
        assert messages.record(session, **WEBHOOK) == again
    assert stored(db, clients[1]) == before
    with db.tenant_session(clients[0]) as session:
        assert session.scalars(select(ChatMessage.content)).all() == ["oi"]


@pytest.mark.parametrize("token", ["token-c", "TOKEN-A", "token-a ", "", "x" * 300, "a\0b", "\ud800", None, 5])
def test_a_token_of_nobody_is_unknown_and_nothing_is_written(db: Database, token: Any) -> None:
    with pytest.raises(UnknownToken) as raised:
        db.ingest(token, **WEBHOOK)
    assert not token or str(token) not in str(raised.value)
    assert nothing_is_stored(db)


def test_the_connection_is_nobodys_afterwards(database_url: str) -> None:
    with Database(database_url, settings=Settings(pool_max_size=1)) as db:
        for webhook in (WEBHOOK, WEBHOOK, {**WEBHOOK, "chat_id": "another", "provider_message_id": None}):
            db.ingest(A, **webhook)
            with db._driver() as connection:  # noqa: SLF001  # the one that the next session is given
                found = connection.execute(WHOAMI).fetchone()
                assert found is not None
                assert found[0] == found[1]
                assert not found[2]
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute("SELECT * FROM clients")


@pytest.mark.parametrize("token", [A, "nobody's"])
def test_a_transaction_that_calls_the_function_goes_on_as_that_client_or_as_nobody(
    database_url: str, clients: tuple[UUID, UUID], token: str
) -> None:
    client = str(clients[0]) if token == A else ""
    with psycopg.connect(database_url) as connection:
        connection.execute("SELECT set_config('kestra.client_id', %s, true)", [str(clients[1])])
        connection.execute(CALL, [token])
        found = connection.execute("SELECT current_user, current_setting('kestra.client_id')").fetchone()
        assert found == ("kestra_tenant", client)
        assert connection.execute("SELECT id::text FROM clients").fetchall() == ([(client,)] if client else [])
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            connection.execute(CALL, [B])


def test_row_level_security_binds_the_function(db: Database, superuser: psycopg.Connection[Any]) -> None:
    superuser.execute(
        "CREATE POLICY refuse ON chat_messages AS RESTRICTIVE FOR INSERT TO kestra_tenant WITH CHECK (content <> 'oi')"
    )
    with pytest.raises(KestraError):
        db.ingest(A, **WEBHOOK)
    assert db.ingest(A, **{**WEBHOOK, "content": "olá"}).inserted


def test_no_session_may_call_it(db: Database, clients: tuple[UUID, UUID]) -> None:
    call = select(func.kestra_ingest(B, "chat", "user", "oi", None, None, None, None))
    raw = text(f"SELECT kestra_ingest('{B}', 'chat', 'user', 'oi', NULL, NULL, NULL, NULL)").execution_options(
        kestra_raw_sql=True
    )
    for statement in (call, raw, select(text("*")).select_from(func.kestra_ingest(B).table_valued("message_id"))):
        with pytest.raises((InvalidValue, UnscopedStatement)), db.tenant_session(clients[0]) as session:
            session.execute(statement)
    with pytest.raises(InvalidValue), db.system_session(reason="webhook") as session:
        session.execute(call)
    assert nothing_is_stored(db)


def test_recording_in_a_session_of_no_client_is_refused_by_the_server(db: Database) -> None:
    with pytest.raises(StatementFailed), db.system_session(reason="webhook") as session:
        session.execute(select(func.kestra_record("chat", "user", "oi", None, None, None, None)))
    assert nothing_is_stored(db)


@pytest.mark.parametrize("named", [1, None], ids=["another", "none"])
def test_a_batch_is_for_the_client_of_the_session_alone(
    clients: tuple[UUID, UUID], superuser: psycopg.Connection[Any], db: Database, named: int | None
) -> None:
    superuser.execute("SET ROLE kestra_tenant")
    superuser.execute("SELECT set_config('kestra.client_id', %s, FALSE)", [str(clients[0])])
    call = "SELECT ids FROM kestra_record_many(%s, '{c}', '{user}', '{oi}', '{}', '{w1}', '{}', NULL)"
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="for the client of the session"):
        superuser.execute(call, [None if named is None else clients[named]])
    assert nothing_is_stored(db)
    assert superuser.execute(call, [clients[0]]).fetchone()


def test_a_batch_in_a_system_session_names_its_client_and_reads_no_other(
    db: Database, clients: tuple[UUID, UUID], superuser: psycopg.Connection[Any]
) -> None:
    """Nothing but the function's own conditions keeps it to one client there."""
    call = (
        "SELECT chat_id, known, cardinality(ids) FROM kestra_record_many"
        "(%s, '{c,d}', '{user,user}', '{oi,oi}', '{}', '{w1,w2}', '{}', NULL) ORDER BY chat_id"
    )
    db.ingest(B, **{**WEBHOOK, "provider_message_id": "w1"})
    superuser.execute("SET ROLE kestra_system")
    assert superuser.execute(call, [clients[0]]).fetchall() == [("c", None, 1), ("d", None, 1)]
    assert superuser.execute(call, [clients[0]]).fetchall() == [("c", "w1", 1), ("d", "w2", 1)]
    assert len(stored(db, clients[1])) == 2
    superuser.execute("DELETE FROM active_conversations WHERE client_id = %s", [clients[0]])
    db.ingest(B, **{**WEBHOOK, "chat_id": "c", "provider_message_id": "w3"})
    assert superuser.execute(call, [clients[0]]).fetchall() == [(None, "w1", 1), (None, "w2", 1)]


def test_the_functions_run_with_the_rights_of_who_calls_them(superuser: psycopg.Connection[Any]) -> None:
    found = superuser.execute(
        "SELECT proname, prosecdef, proconfig FROM pg_proc WHERE proname LIKE 'kestra\\_%' ORDER BY 1"
    ).fetchall()
    assert found == [(name, False, None) for name in ("kestra_ingest", "kestra_record", "kestra_record_many")]


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"role": "nobody"}, {"content": None}, {"chat_id": ""}, {"content": "a\0b"}, {"sent_at": "2026-01-01"}]
)
def test_what_recording_refuses_is_refused(db: Database, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        db.ingest(A, **{**WEBHOOK, **wrong})
    assert nothing_is_stored(db)


def test_a_duplicate_without_its_conversation_says_so(db: Database, client_id: UUID) -> None:
    db.ingest(A, **WEBHOOK)
    with db.tenant_session(client_id) as session:
        session.delete(session.get_one(ActiveConversation, ("chat", client_id)))
    with pytest.raises(ConversationNotFound):
        db.ingest(A, **WEBHOOK)


def test_a_connection_that_broke_is_replaced(database_url: str, superuser: psycopg.Connection[Any]) -> None:
    with Database(database_url, settings=Settings(pool_max_size=1)) as db:
        db.ingest(A, **WEBHOOK)
        superuser.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        with pytest.raises(DatabaseUnavailable):
            db.ingest(A, **WEBHOOK)
        assert not db.ingest(A, **WEBHOOK).inserted


def test_a_connection_that_was_cut_off_is_unavailable(database_url: str) -> None:
    with Database(database_url, settings=Settings(pool_max_size=1)) as db:
        db.ingest(A, **WEBHOOK)
        with db._driver() as connection:  # noqa: SLF001  # whose socket is cut off
            its_socket = socket(fileno=os.dup(connection.pgconn.socket))
        its_socket.shutdown(SHUT_RDWR)
        its_socket.close()
        with pytest.raises(DatabaseUnavailable):
            db.ingest(A, **WEBHOOK)
        assert not db.ingest(A, **WEBHOOK).inserted


def test_a_client_that_is_erased_meanwhile_is_unknown(
    db: Database, superuser: psycopg.Connection[Any], superuser_url: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with psycopg.connect(superuser_url) as erasing:
            erasing.execute("DELETE FROM clients WHERE token = %s", [A])
            waiting = pool.submit(db.ingest, A, **WEBHOOK)
            until_waiting(superuser, waiting)
        with pytest.raises(UnknownToken):
            waiting.result(60)


def test_a_full_pool_is_named_as_such(database_url: str, client_id: UUID) -> None:
    with Database(database_url, settings=Settings(pool_max_size=1, pool_timeout=0.05)) as db:
        with db.tenant_session(client_id) as session:
            session.connection()
            with pytest.raises(PoolExhausted):
                db.ingest(A, **WEBHOOK)

        async def waiting() -> None:
            async with db, db.async_tenant_session(client_id) as session:
                await session.connection()
                with pytest.raises(PoolExhausted):
                    await db.async_ingest(A, **WEBHOOK)

        asyncio.run(waiting())


def test_a_server_that_cannot_be_reached_is_unavailable() -> None:
    with Database("postgresql://nobody@127.0.0.1:1/none") as db:
        with pytest.raises((DatabaseUnavailable, AuthenticationFailed)):
            db.ingest(A, **WEBHOOK)
        with pytest.raises((DatabaseUnavailable, AuthenticationFailed)):
            asyncio.run(db.async_ingest(A, **WEBHOOK))


def test_a_login_that_begins_as_another_role_is_told(database_url: str, superuser: psycopg.Connection[Any]) -> None:
    name = sql.Identifier(superuser.info.dbname)
    superuser.execute(sql.SQL("ALTER ROLE kestra_app IN DATABASE {} SET role = 'kestra_tenant'").format(name))
    with Database(database_url) as db, pytest.raises(ConfigurationError, match="RESET role"):
        db.ingest(A, **WEBHOOK)


def test_a_database_of_before_is_told_to_be_upgraded(db: Database, superuser: psycopg.Connection[Any]) -> None:
    superuser.execute("DROP FUNCTION kestra_ingest")
    with pytest.raises(ConfigurationError, match="kestra upgrade"):
        db.ingest(A, **WEBHOOK)


def test_a_webhook_whose_statement_could_not_be_prepared_is_stored_later(
    database_url: str, superuser: psycopg.Connection[Any]
) -> None:
    for threshold in (0, 1, 5):
        webhooks = ({**WEBHOOK, "provider_message_id": f"wamid.{threshold}.{n}"} for n in count())
        with Database(database_url, settings=Settings(pool_max_size=1, prepare_threshold=threshold)) as db:
            for _ in range(threshold):
                assert db.ingest(A, **next(webhooks)).inserted
            superuser.execute("ALTER FUNCTION kestra_ingest RENAME TO gone")
            with pytest.raises(ConfigurationError, match="kestra upgrade"):
                db.ingest(A, **next(webhooks))
            superuser.execute("ALTER FUNCTION gone RENAME TO kestra_ingest")
            for _ in range(8):
                assert db.ingest(A, **next(webhooks)).inserted


def test_one_statement_at_a_time_is_run_on_a_connection(database_url: str) -> None:
    class Parameters(dict[str, int]):
        """They are asked for while the statement is run."""

        def __getitem__(self, name: str) -> int:
            assert connection.lock.locked()
            return super().__getitem__(name)

    with Database(database_url) as db, db._driver() as connection:  # noqa: SLF001  # nobody's
        assert connection.fetch(Statement("SELECT %(number)s::int4"), Parameters(number=1)) == [(1,)]

    async def main() -> Any:
        statement = Statement("SELECT %s::int4")
        async with Database(database_url) as db, db._async_driver() as connection:  # noqa: SLF001  # as above
            return await asyncio.gather(*(connection.fetch(statement, [number]) for number in range(20)))

    assert asyncio.run(main()) == [[(number,)] for number in range(20)]


def test_a_login_that_may_not_become_the_roles_is_told_what_to_grant(
    database_url: str, superuser: psycopg.Connection[Any], client_id: UUID
) -> None:
    role = f"stranger_{client_id.hex}"
    superuser.execute(f"CREATE ROLE {role} LOGIN")
    try:
        url = re.sub(r"//.*?@", f"//{role}@", database_url)
        with Database(url) as db, pytest.raises(ConfigurationError, match="GRANT"):
            db.ingest(A, **WEBHOOK)
    finally:
        superuser.execute(f"DROP ROLE {role}")


def test_no_error_tells_what_was_said(db: Database, superuser: psycopg.Connection[Any]) -> None:
    superuser.execute("ALTER TABLE chat_messages ADD CHECK (content <> 'segredo')")
    with pytest.raises(InvalidValue) as raised:
        db.ingest(A, **{**WEBHOOK, "content": "segredo"})
    assert "segredo" not in repr(raised.value) + repr(raised.value.__cause__)
    assert A not in repr(raised.value) + repr(raised.value.__cause__)


@pytest.mark.parametrize("code", ["22023", "23503", "42501", "42883"])
def test_an_error_of_somebody_elses_trigger_keeps_its_name_and_no_text(
    db: Database, superuser: psycopg.Connection[Any], code: str
) -> None:
    superuser.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE 'no %', new.content USING ERRCODE = '{code}', DETAIL = new.content; END $$"
    )
    superuser.execute("CREATE TRIGGER refuse BEFORE INSERT ON chat_messages FOR EACH ROW EXECUTE FUNCTION refuse()")
    with pytest.raises(KestraError) as raised:
        db.ingest(A, **{**WEBHOOK, "content": "segredo"})
    assert not isinstance(raised.value, ConfigurationError | UnknownToken)
    assert code == "23503" or "segredo" not in shown(raised.value)
    assert "DETAIL" not in shown(raised.value)


# --- one rule ---------------------------------------------------------------------------------------------------------


def test_all_functions_bring_conversations_up_to_date_by_one_rule(superuser: psycopg.Connection[Any]) -> None:
    found = superuser.execute("SELECT prosrc FROM pg_proc WHERE proname LIKE 'kestra\\_%' ORDER BY proname").fetchall()
    rules = [re.findall(r"DO UPDATE SET (.*?) RETURNING", " ".join(source.split())) for (source,) in found]
    assert [len(found) for found in rules] == [1, 1, 2]
    assert {rule for found in rules for rule in found} == {rules[0][0]}


# --- how it is found --------------------------------------------------------------------------------------------------


@pytest.fixture
def crowded(superuser: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    superuser.execute("INSERT INTO clients (name, token) SELECT n::text, 'many-' || n FROM generate_series(1, 5000) n")
    superuser.execute(
        "INSERT INTO chat_messages (client_id, chat_id, role, content, provider_message_id) "
        "SELECT id, mod(n, 50), 'user', 'oi', 'w' || n FROM clients, generate_series(1, 20000) n WHERE token = %s",
        [A],
    )
    superuser.execute(
        "INSERT INTO active_conversations (client_id, chat_id, last_message_at) "
        "SELECT id, 'c' || n, now() FROM clients, generate_series(1, 5000) n WHERE token = %s",
        [A],
    )
    superuser.execute("ANALYZE")
    return superuser


SCANS: Final = "SELECT relname, seq_scan FROM pg_stat_user_tables ORDER BY 1"


@pytest.mark.parametrize("mode", ["custom", "generic"])
def test_no_statement_of_it_scans_a_table(crowded: psycopg.Connection[Any], mode: str) -> None:
    crowded.execute("SELECT pg_stat_force_next_flush()")
    before = crowded.execute(SCANS).fetchall()
    crowded.execute(f"SET plan_cache_mode = force_{mode}_plan")
    for message_id in ("w7", "new", None):
        call = "SELECT inserted FROM kestra_ingest(%s, 'c7', 'user', 'oi', NULL, %s, NULL, NULL)"
        assert crowded.execute(call, [A, message_id]).fetchone() == (message_id != "w7",)
    crowded.execute("SELECT pg_stat_force_next_flush()")
    assert crowded.execute(SCANS).fetchall() == before


@pytest.mark.parametrize("mode", ["custom", "generic"])
@pytest.mark.parametrize("count", [1, 100])
def test_no_statement_of_a_batch_scans_a_table(crowded: psycopg.Connection[Any], mode: str, count: int) -> None:
    """Half of it is known."""
    (client_id,) = crowded.execute("SELECT id FROM clients WHERE token = %s", [A]).fetchone() or (None,)
    crowded.execute("SELECT pg_stat_force_next_flush()")
    before = crowded.execute(SCANS).fetchall()
    crowded.execute(f"SET plan_cache_mode = force_{mode}_plan")
    call = "SELECT cardinality(ids), known IS NULL FROM kestra_record_many(%s, %s, %s, %s, '{}', %s, '{}', NULL)"
    for new in range(0, 1000, count):
        ids = [f"w{n}" if n % 2 else f"new {new} {n}" for n in range(1, count + 1)]
        chats, roles, texts = ([f"c{n}" for n in range(count)], ["user"] * count, ["oi"] * count)
        found = crowded.execute(call, [client_id, chats, roles, texts, ids]).fetchall()
        assert sum(inserted for _, inserted in found) == count // 2
        if new >= 5 * count:
            break
    crowded.execute("SELECT pg_stat_force_next_flush()")
    assert crowded.execute(SCANS).fetchall() == before


@pytest.mark.parametrize(
    ("function", "queries"), [("kestra_record", 2), ("kestra_ingest", 2), ("kestra_record_many", 2)]
)
def test_duplicates_are_looked_up_by_the_index_of_provider_ids(
    crowded: psycopg.Connection[Any], function: str, queries: int
) -> None:
    """The queries that a function returns, with its variables as parameters, under row level security."""
    source, arguments = crowded.execute(
        "SELECT prosrc, pg_get_function_arguments(oid) FROM pg_proc WHERE proname = %s", [function]
    ).fetchone() or ("", "")
    kinds = {"_client_id": "uuid", "_id": "integer", "_at": "timestamp with time zone"}
    kinds |= dict(argument.split(" ", 1) for argument in arguments.split(", "))
    returned = re.findall(r"RETURN QUERY(.*?);", source, re.DOTALL)
    assert len(returned) == queries
    crowded.execute("SET plan_cache_mode = force_generic_plan")
    crowded.execute("SELECT set_config('kestra.client_id', id::text, FALSE) FROM clients WHERE token = %s", [A])
    crowded.execute("SET ROLE kestra_tenant")
    known = [query for query in returned if "FROM known" in query or "m.provider_message_id =" in query]
    assert known
    for query in known:
        numbered = re.sub(r"(?<![\w.])_\w+", lambda name: f"${[*kinds].index(name[0]) + 1}", query)
        crowded.execute(f"PREPARE looked_up({', '.join(kinds.values())}) AS {numbered}".encode())
        plan = crowded.execute(f"EXPLAIN EXECUTE looked_up({', '.join(['NULL'] * len(kinds))})".encode()).fetchall()
        crowded.execute("DEALLOCATE looked_up")
        text = "\n".join(line for (line,) in plan)
        (looked_up,) = (line for line in text.splitlines() if "provider_message_id =" in line)
        assert looked_up.strip().startswith("Index Cond: "), text
        assert "using uq_chat_messages_provider_message_id on chat_messages" in text, text
        assert "Seq Scan" not in text, text
