"""What erasing a client leaves: nothing of it, everything of the others, whoever writes meanwhile."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from threading import Barrier, Event
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Column, ForeignKey, PrimaryKeyConstraint, Table, Text

from kestra import ClientFile, Database, TenantSession
from kestra.base import Base, ClientId
from kestra.dao import conversations, messages
from kestra.dao.erasure import ErasedClient, erase_client
from kestra.dao.messages import IncomingMessage
from kestra.errors import (
    ClientInUse,
    ClientNotFound,
    ConversationNotFound,
    ErasureIncomplete,
    KestraError,
    RowsHidden,
    StatementFailed,
    TenancyError,
)
from kestra.models import Role
from tests.concurrency import until_waiting

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
TABLES = ("clients", "active_conversations", "chat_messages", "client_files", "orphaned_rows")


def fill(db: Database, client_id: UUID) -> None:
    """Three messages in two chats, a file, and a conversation that a follow-up worker has claimed."""
    with db.tenant_session(client_id) as session:
        said: list[tuple[str, Role]] = [("1", "user"), ("1", "assistant"), ("2", "user")]
        for chat_id, role in said:
            messages.record(session, chat_id=chat_id, role=role, content="oi", sent_at=AT)
        session.add(ClientFile(filename="f.pdf", file_hash="a" * 64))


def erase(db: Database, client_id: UUID, **options: Any) -> ErasedClient:
    with db.system_session(reason="erasure") as session:
        return erase_client(session, client_id=client_id, **options)


def everything(superuser: psycopg.Connection[Any]) -> dict[str, list[tuple[Any, ...]]]:
    """Every row as PostgreSQL has it, with its place on the disk and the transactions that wrote and locked it."""
    return {
        table: superuser.execute(f"SELECT ctid::text, xmin::text, t::text FROM {table} t ORDER BY 1").fetchall()
        for table in TABLES
    }


def of_client(superuser: psycopg.Connection[Any], client_id: UUID) -> dict[str, int]:
    """How many rows name a client, in whatever column."""
    count = "SELECT count(*) FROM {} t WHERE t::text LIKE %s"
    rows = {table: superuser.execute(count.format(table), [f"%{client_id}%"]).fetchone() for table in TABLES}
    return {table: row[0] for table, row in rows.items() if row}


NOTHING = dict.fromkeys(TABLES, 0)


# --- what is erased, and what is not ---


def test_nothing_of_the_client_is_left_and_every_row_is_counted(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    fill(db, client_id)
    assert erase(db, client_id) == ErasedClient(messages=3, conversations=2, files=1, clients=1, orphaned=0, others=0)
    assert of_client(superuser, client_id) == NOTHING


def test_other_clients_rows_are_untouched_byte_for_byte(
    db: Database, client_id: UUID, other_client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    fill(db, other_client_id)
    superuser.execute(
        "INSERT INTO orphaned_rows (table_name, row, reason) VALUES ('chat_messages', %s, 'r'), ('t', '{}', 'r')",
        [f'{{"client_id": "{other_client_id}", "content": "{client_id}"}}'],
    )
    before = everything(superuser)
    own = before["clients"][0 if str(client_id) in before["clients"][0][2] else 1]
    fill(db, client_id)
    erase(db, client_id)
    assert everything(superuser) == before | {"clients": [row for row in before["clients"] if row != own]}


def test_orphaned_rows_that_name_the_client_are_erased_and_counted(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    superuser.execute(
        "INSERT INTO orphaned_rows (table_name, row, reason) VALUES ('client_files', %s, 'the same hash twice')",
        [f'{{"client_id": "{client_id}"}}'],
    )
    assert erase(db, client_id).orphaned == 1
    assert of_client(superuser, client_id) == NOTHING


def test_client_that_is_not_there_is_not_found(db: Database, client_id: UUID) -> None:
    erase(db, client_id)
    with pytest.raises(ClientNotFound, match=str(client_id)):
        erase(db, client_id)


def test_session_of_a_client_erases_nobody(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session, pytest.raises(TenancyError, match="system_session"):
        erase_client(session, client_id=client_id)  # type: ignore[arg-type]  # the mistake


def test_erases_in_an_event_loop(db: Database, client_id: UUID, superuser: psycopg.Connection[Any]) -> None:
    fill(db, client_id)

    async def main() -> ErasedClient:
        async with db, db.async_system_session(reason="erasure") as session:
            return await session.run_sync(erase_client, client_id=client_id)

    assert asyncio.run(main()).messages == 3
    assert of_client(superuser, client_id) == NOTHING


def test_nothing_is_erased_when_the_block_raises(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    fill(db, client_id)
    before = everything(superuser)
    with pytest.raises(ZeroDivisionError), db.system_session(reason="erasure") as session:
        erase_client(session, client_id=client_id)
        raise ZeroDivisionError
    assert everything(superuser) == before


@contextmanager
def later_table(superuser: psycopg.Connection[Any], on_delete: str) -> Iterator[Table]:
    """A table of clients that a later version has: tags of conversations."""
    tags = Table(
        "tags",
        Base.metadata,
        Column("client_id", ClientId, ForeignKey("clients.id", ondelete="CASCADE")),
        Column("name", Text),
        PrimaryKeyConstraint("client_id", "name"),
    )
    try:
        superuser.execute(
            "CREATE TABLE tags (client_id uuid NOT NULL, name text, PRIMARY KEY (client_id, name), "
            f"CONSTRAINT fk_tags_client_id_clients FOREIGN KEY (client_id) REFERENCES clients {on_delete})"
        )
        for statement in (
            "ALTER TABLE tags ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            "CREATE POLICY kestra_system ON tags TO kestra_system USING (true) WITH CHECK (true)",
            "GRANT SELECT, INSERT, UPDATE, DELETE ON tags TO kestra_system",
        ):
            superuser.execute(statement)
        yield tags
    finally:
        Base.metadata.remove(tags)


def test_table_that_is_added_later_is_erased_too(
    db: Database, client_id: UUID, other_client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    with later_table(superuser, ""):
        insert = "INSERT INTO tags VALUES (%s, 'a'), (%s, 'b'), (%s, 'a')"
        superuser.execute(insert, [client_id, client_id, other_client_id])
        assert erase(db, client_id).others == 2
        assert superuser.execute("SELECT client_id, name FROM tags").fetchall() == [(other_client_id, "a")]


def test_table_that_no_model_knows_stops_it_by_name(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    with later_table(superuser, "") as tags:
        Base.metadata.remove(tags)
        superuser.execute("INSERT INTO tags VALUES (%s, 'a')", [client_id])
        with pytest.raises(StatementFailed, match="The table tags") as caught:
            erase(db, client_id)
    assert caught.value.sqlstate == "23503"


# --- what cannot be seen ---

HIDING = {
    "altered": "ALTER POLICY kestra_system ON chat_messages USING (provider_message_id IS DISTINCT FROM 'hidden')",
    "dropped": "DROP POLICY kestra_system ON chat_messages",
    "narrowed": (
        "CREATE POLICY narrow ON chat_messages AS RESTRICTIVE USING (provider_message_id IS DISTINCT FROM 'hidden')"
    ),
}


@pytest.mark.parametrize("way", HIDING)
def test_refuses_by_name_when_a_policy_could_hide_rows(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any], way: str
) -> None:
    fill(db, client_id)
    superuser.execute(
        "INSERT INTO chat_messages (client_id, chat_id, role, content, provider_message_id) "
        "VALUES (%s, '1', 'user', 'x', 'hidden')",
        [client_id],
    )
    superuser.execute(HIDING[way])
    before = everything(superuser)
    with pytest.raises(RowsHidden, match="chat_messages") as caught:
        erase(db, client_id)
    assert all("chat_messages" in finding for finding in caught.value.findings)
    assert everything(superuser) == before


def test_policies_and_grants_that_hide_nothing_do_not_stop_it(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    fill(db, client_id)
    superuser.execute("GRANT SELECT ON chat_messages TO kestra_app")
    superuser.execute("CREATE POLICY more ON chat_messages FOR SELECT TO kestra_app USING (true)")
    superuser.execute("DROP POLICY kestra_tenant ON chat_messages")
    superuser.execute("ALTER TABLE client_files NO FORCE ROW LEVEL SECURITY")
    erase(db, client_id)
    assert of_client(superuser, client_id) == NOTHING


@pytest.mark.parametrize("table", ["client_files", "active_conversations", "clients", "orphaned_rows"])
def test_row_that_a_trigger_keeps_is_reported(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any], table: str
) -> None:
    fill(db, client_id)
    superuser.execute(
        "INSERT INTO orphaned_rows (table_name, row, reason) VALUES ('t', %s, 'r')", [f'{{"client_id": "{client_id}"}}']
    )
    superuser.execute("CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    superuser.execute(f"CREATE TRIGGER keep BEFORE DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION keep()")
    before = everything(superuser)
    with pytest.raises(ErasureIncomplete, match=f"{client_id} in {table}"):
        erase(db, client_id)
    assert everything(superuser) == before


# --- who else is at it ---


def test_gives_up_when_others_keep_a_row_locked(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    fill(db, client_id)
    before = everything(superuser)
    with db.tenant_session(client_id) as session:
        conversations.mark_read(session, chat_id="2", up_to=1)
        with pytest.raises(ClientInUse, match=str(client_id)):
            erase_in_thread(db, client_id, patience=timedelta()).result()
        session.rollback()
    assert everything(superuser) == before
    erase(db, client_id)


def erase_in_thread(db: Database, client_id: UUID, **options: Any) -> Future[ErasedClient]:
    """In a thread, because a system session is not opened inside a tenant session."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(erase, db, client_id, **options)


FIRST: dict[str, Callable[[TenantSession], object]] = {
    "the client": lambda session: session.add(ClientFile()),
    "a conversation": lambda session: conversations.mark_read(session, chat_id="1", up_to=1),
    "both": lambda session: messages.record(session, chat_id="1", role="user", content="oi"),
}


@pytest.mark.parametrize("wanted", ["1", "2"])
@pytest.mark.parametrize("first", FIRST)
def test_lets_a_transaction_end_that_wants_what_it_has(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any], first: str, wanted: str
) -> None:
    """Whatever another transaction has locked of the client, and whatever it wants then."""
    fill(db, client_id)
    with ThreadPoolExecutor(1) as threads:
        with db.tenant_session(client_id) as session:
            FIRST[first](session)
            session.flush()
            erased = threads.submit(erase, db, client_id, patience=timedelta(minutes=1))
            free = "SELECT FROM active_conversations WHERE client_id = %s AND chat_id = '2' FOR UPDATE SKIP LOCKED"
            while superuser.execute(free, [client_id]).fetchone() is not None:
                assert not erased.done()
            messages.record(session, chat_id=wanted, role="user", content="oi")
        assert erased.result().clients == 1
    assert of_client(superuser, client_id) == NOTHING


def _record_in_one_chat(session: TenantSession, _worker: int, _turn: int) -> None:
    messages.record(session, chat_id="shared", role="user", content="oi")


def _record_in_new_chats(session: TenantSession, worker: int, turn: int) -> None:
    messages.record(session, chat_id=f"{worker}-{turn // 2}", role="user", content="oi")


def _record_many(session: TenantSession, _worker: int, turn: int) -> None:
    batch = [IncomingMessage(chat_id, "user", "oi") for chat_id in ("shared", "b", f"c-{turn // 2}")]
    messages.record_many(session, messages=batch)


def _record_twice(session: TenantSession, worker: int, _turn: int) -> None:
    messages.record(session, chat_id=f"{worker}-a", role="user", content="oi")
    messages.record(session, chat_id=f"{worker}-b", role="user", content="oi")


def _read_and_answer(session: TenantSession, worker: int, turn: int) -> None:
    if turn:
        conversations.mark_read(session, chat_id=f"{worker}", up_to=1)
    messages.record(session, chat_id=f"{worker}", role="assistant", content="oi")


WRITERS: list[Callable[[TenantSession, int, int], None]] = [
    _record_in_one_chat,
    _record_in_one_chat,
    _record_in_new_chats,
    _record_in_new_chats,
    _record_many,
    _record_many,
    _record_twice,
    _read_and_answer,
]


def test_nothing_is_left_while_others_write_and_they_find_no_client(
    db: Database, client_id: UUID, other_client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    fill(db, other_client_id)
    under_way, over = Barrier(len(WRITERS) + 1), Event()

    def write(worker: int) -> KestraError | None:
        turn = 0
        while not over.is_set():
            try:
                with db.tenant_session(client_id) as session:
                    WRITERS[worker](session, worker, turn)
            except KestraError as error:
                return error
            turn += 1
            if turn == 5:
                under_way.wait()
        return None

    with ThreadPoolExecutor(len(WRITERS)) as threads:
        writers = [threads.submit(write, worker) for worker in range(len(WRITERS))]
        under_way.wait()
        try:
            erased = erase(db, client_id, patience=timedelta(minutes=1))
        except KestraError:
            over.set()
            raise
        endings = [type(writer.result()) for writer in writers]
    assert set(endings) <= {ClientNotFound, ConversationNotFound}
    assert endings.count(ClientNotFound) >= len(WRITERS) - 1
    assert erased.messages >= 5 * len(WRITERS)
    assert of_client(superuser, client_id) == NOTHING
    assert of_client(superuser, other_client_id)["chat_messages"] == 3


def test_who_comes_second_waits_for_the_first(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    fill(db, client_id)
    with ThreadPoolExecutor(1) as threads:
        with db.system_session(reason="erasure") as session:
            erase_client(session, client_id=client_id)
            second = threads.submit(erase, db, client_id, patience=timedelta())
            until_waiting(superuser, second)
        with pytest.raises(ClientNotFound):
            second.result()
