"""What an export has and what it has not, and that an import makes the same of it."""

import asyncio
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import event

from kestra import ActiveConversation, ChatMessage, Client, ClientFile, Database
from kestra.base import Base
from kestra.columns import json_loads
from kestra.dao import conversations, messages, ndjson
from kestra.dao.exports import export_chat, export_client
from kestra.dao.imports import import_chat, import_client
from kestra.dao.messages import IncomingMessage
from kestra.dao.ndjson import Counts
from kestra.errors import (
    ChatExists,
    ClientExists,
    ClientNotFound,
    DuplicateToken,
    InvalidClientId,
    InvalidExport,
    InvalidValue,
    TenancyError,
)
from tests.concurrency import outcomes_at_once, until_waiting

AT: Final = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
NEW: Final = UUID(int=7)
OTHER_ZONE: Final = datetime.fromisoformat("2026-03-01T09:30:15.123456-03:00")

CONFIG: Final = """{
    "ai_active": true, "chave_desconhecida": {"versao": 7, "lista": [1, 2, {"x": null}]},
    "exact": 12345678901234567890.123456789, "small": 1e-400, "big": 123456789012345678901234567890,
    "whatsapp": {"url": "https://api.example/SECRET-1", "key": "SECRET-2", "provider": "uazapi", "apiKey": "SECRET-3"},
    "followup": {"stages": [{"delay_minutes": 5, "prompt": "oi"}, {"delay_minutes": 6, "token": "SECRET-4"}]},
    "crm": {"senha": "SECRET-5", "monkey": "banana", "deep": [[{"client_secret": {"a": "SECRET-6"}, "max_tokens": 5}]]}
}"""
LEFT_OUT: Final = [
    "crm.deep.0.0.client_secret",
    "crm.senha",
    "followup.stages.1.token",
    "whatsapp.apiKey",
    "whatsapp.key",
    "whatsapp.url",
]


@pytest.fixture
def elsewhere(server_url: str, template_database: str, superuser_url: str, database_url: str) -> Iterator[Database]:
    """Another database, whose messages have other ids."""
    name = str(conninfo_to_dict(superuser_url)["dbname"])
    other = f"{name}_elsewhere"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
    with psycopg.connect(server_url, autocommit=True) as server:
        server.execute(create.format(sql.Identifier(other), sql.Identifier(template_database)))
        try:
            with psycopg.connect(superuser_url.replace(name, other), autocommit=True) as connection:
                connection.execute("ALTER SEQUENCE chat_messages_id_seq RESTART 70001")
            with Database(database_url.replace(name, other)) as database:
                yield database
        finally:
            server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(other)))


def exported(db: Database, client_id: UUID, chat_id: str | None = None) -> str:
    to = io.StringIO()
    with db.tenant_session(client_id) as session:
        if chat_id is None:
            export_client(session, to=to)
        else:
            export_chat(session, chat_id=chat_id, to=to)
    return to.getvalue()


def imported(db: Database, text: str, *, token: str = "new", client_id: UUID | None = None) -> Counts:  # noqa: S107  # no password
    with db.system_session(reason="import") as session:
        return import_client(session, source=io.StringIO(text), token=token, client_id=client_id)


def lines(text: str, kind: str | None = None) -> list[dict[str, Any]]:
    parsed = [json_loads(line) for line in text.splitlines()]
    return parsed if kind is None else [line[kind] for line in parsed if kind in line]


def fill(db: Database, client_id: UUID) -> None:
    """Whatever a client can have: see the assertions of the round trip."""
    with db.tenant_session(client_id) as session:
        for minute, (chat_id, role, content, provider_id) in enumerate(
            (
                ("b@lid", "user", 'olá,\n"tudo" bem? 🙂\u2028\x85', "wamid.1"),
                ("a", "user", "primeira", None),
                ("b@lid", "assistant", "sim", None),
                ("b@lid", "user", "tardia", "wamid.2"),
                ("B", "system", "nota", "wamid.3"),
                ("b@lid", "user", "nova", "wamid.4"),
            )
        ):
            late = timedelta(hours=content == "tardia")
            messages.record(
                session,
                chat_id=chat_id,
                role=role,  # type: ignore[arg-type]  # a role
                content=content,
                provider_message_id=provider_id,
                sent_at=AT + timedelta(minutes=minute) - late,
            )
        messages.record(session, chat_id="a", role="user", media_url="https://media.example/1", sent_at=AT)
        first, *_ = messages.history(session, chat_id="b@lid").items[::-1]
        conversations.mark_read(session, chat_id="b@lid", up_to=first.id + 2)
        conversations.set_context(session, chat_id="b@lid", summary="resumo", up_to=first.id)
        conversations.pause(session, chat_id="a", until=datetime(2027, 1, 1, tzinfo=UTC))
        session.add(ChatMessage(chat_id="no conversation", role="user", content="só", created_at=OTHER_ZONE))
        session.add(ActiveConversation(chat_id="no message", status="finished", last_message_at=AT, followup_stage=5))
        session.add(
            ClientFile(
                filename="ação.pdf",
                file_hash="a" * 64,
                size_bytes=2**40,
                media_type="application/pdf",
                google_file_uri="https://files.example/SECRET-7",
                google_file_expires_at=AT,
            )
        )
        session.add(ClientFile(id=UUID(int=1)))


@pytest.fixture
def full(db: Database, client_id: UUID, superuser: psycopg.Connection[Any]) -> UUID:
    fill(db, client_id)
    superuser.execute(
        "UPDATE clients SET tools_config = %s, system_prompt = 'seja breve', token = 'SECRET-8' WHERE id = %s",
        [CONFIG, client_id],
    )
    superuser.execute(
        "UPDATE active_conversations SET claim_token = '5ec2e700-0000-4000-8000-000000000000', claimed_until = now()"
    )
    return client_id


# --- what is in an export ---


def test_export_of_a_chat_is_these_lines(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        messages.record(
            session, chat_id="5511", role="user", content="oi\n", provider_message_id="w", sent_at=OTHER_ZONE
        )
    assert exported(db, client_id, "5511").splitlines() == [
        '{"kestra":1,"scope":"chat","chat_id":"5511"}',
        (
            '{"conversation":{"chat_id":"5511","status":"active","followup_stage":0,"last_role":"user",'
            '"last_message_at":"2026-03-01T12:30:15.123456+00:00","last_context":null,"last_message_id":1,'
            '"last_user_message_at":"2026-03-01T12:30:15.123456+00:00","last_user_message_id":1,'
            '"last_read_message_id":null,"last_context_message_id":null,"paused_until":null}}'
        ),
        (
            '{"message":{"id":1,"chat_id":"5511","role":"user","content":"oi\\n","media_url":null,'
            '"created_at":"2026-03-01T12:30:15.123456+00:00","provider_message_id":"w"}}'
        ),
        '{"end":{"files":0,"conversations":1,"messages":1}}',
    ]


def test_every_column_is_exported_or_left_out_on_purpose() -> None:
    left_out = {
        "clients": {"token"},
        "active_conversations": {"client_id", "claim_token", "claimed_until"},
        "chat_messages": {"client_id"},
        "client_files": {"client_id", "google_file_uri", "google_file_expires_at"},
    }
    for line, table in ndjson.TABLES.items():
        assert set(line.model_fields) - {"left_out"} == set(table.c.keys()) - left_out.pop(table.name)
    assert not left_out
    assert set(Base.metadata.tables) - {table.name for table in ndjson.TABLES.values()} == {"orphaned_rows"}


def test_export_is_complete_and_ordered(db: Database, full: UUID) -> None:
    text = exported(db, full)
    kinds = [next(iter(line)) for line in lines(text)]
    assert kinds == [
        *("kestra", "client", "file", "file"),
        *("conversation", "message"),
        *("conversation", "message", "message"),
        *("conversation", "message", "message", "message", "message"),
        *("message", "conversation"),
        "end",
    ]
    chats = [line["chat_id"] for line in lines(text, "conversation")]
    assert chats == ["B", "a", "b@lid", "no message"]
    assert lines(text, "file")[0] == {"id": str(UUID(int=1))} | dict.fromkeys(
        ("filename", "file_hash", "size_bytes", "media_type")
    )
    ids = [line["id"] for line in lines(text, "message") if line["chat_id"] == "b@lid"]
    assert ids == sorted(ids)
    assert lines(text, "end") == [{"files": 2, "conversations": 4, "messages": 8}]


def test_each_line_is_one_for_every_reader_of_lines(db: Database, full: UUID) -> None:
    text = exported(db, full)
    assert text.splitlines() == text.split("\n")[:-1]
    assert lines(text, "message")[3]["content"] == 'olá,\n"tudo" bem? 🙂\u2028\x85'


def test_same_data_is_the_same_bytes(db: Database, full: UUID, superuser: psycopg.Connection[Any]) -> None:
    before = exported(db, full)
    superuser.execute("UPDATE clients SET name = name")
    superuser.execute("UPDATE chat_messages SET content = content WHERE chat_id = 'a'")
    name = str(conninfo_to_dict(superuser.info.dsn)["dbname"])
    superuser.execute(sql.SQL("ALTER DATABASE {} SET timezone = 'America/Sao_Paulo'").format(sql.Identifier(name)))
    db.close()
    assert exported(db, full) == before


def test_export_of_a_chat_is_that_part_of_the_clients(db: Database, full: UUID) -> None:
    whole = exported(db, full).splitlines()
    part = exported(db, full, "b@lid").splitlines()
    assert len(part) == 7
    assert part[1:-1] == [line for line in whole if '"chat_id":"b@lid"' in line]


def test_chat_that_is_not_there_is_an_empty_export(db: Database, client_id: UUID) -> None:
    assert [next(iter(line)) for line in lines(exported(db, client_id, "none"))] == ["kestra", "end"]


def test_no_client_is_no_export(db: Database) -> None:
    to = io.StringIO()
    with db.tenant_session(NEW) as session, pytest.raises(ClientNotFound, match=str(NEW)):
        export_client(session, to=to)
    assert not to.getvalue()


def test_client_that_cannot_be_seen_is_no_export(db: Database, full: UUID, superuser: psycopg.Connection[Any]) -> None:
    superuser.execute("DROP POLICY kestra_tenant ON clients")
    with pytest.raises(ClientNotFound):
        exported(db, full)


def test_nothing_of_another_client_is_exported(db: Database, full: UUID, other_client_id: UUID) -> None:
    before = exported(db, full), exported(db, full, "b@lid")
    fill(db, other_client_id)
    assert (exported(db, full), exported(db, full, "b@lid")) == before


@pytest.mark.parametrize("chat_id", [None, "b@lid"])
def test_export_is_as_of_its_beginning(db: Database, full: UUID, chat_id: str | None) -> None:
    """What is committed while the lines are written is not in it, in no part of it."""
    with db.tenant_session(full) as session:
        batch = [IncomingMessage("b@lid", "user", f"{n}", sent_at=AT) for n in range(500)]
        for _ in range(3):
            messages.record_many(session, messages=batch)
    before = exported(db, full, chat_id)
    written: list[str] = []

    class Sink:
        def write(self, text: str) -> None:
            if not written:
                with db.tenant_session(full) as session:
                    messages.record(session, chat_id="b@lid", role="user", content="depois")
                    messages.record(session, chat_id="zzz", role="user", content="depois")
                    messages.erase_chat(session, chat_id="a")
            written.append(text)

    with db.tenant_session(full) as session:
        if chat_id is None:
            export_client(session, to=Sink())
        else:
            export_chat(session, chat_id=chat_id, to=Sink())
    assert "".join(written) == before
    assert exported(db, full, chat_id) != before


def test_message_that_says_nothing_is_exported_and_counted_and_left_out_by_an_import(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    """Adopted installations have such; the check binds new messages."""
    superuser.execute("ALTER TABLE chat_messages DROP CONSTRAINT ck_chat_messages_content_or_media")
    superuser.execute(
        "INSERT INTO chat_messages (client_id, chat_id, role, content) "
        "VALUES (%(client)s, '1', 'user', NULL), (%(client)s, '1', 'user', ''), (%(client)s, '1', 'user', 'oi')",
        {"client": client_id},
    )
    superuser.execute(
        "INSERT INTO active_conversations (client_id, chat_id, last_message_id, last_read_message_id) "
        "SELECT client_id, chat_id, max(id), min(id) FROM chat_messages GROUP BY 1, 2"
    )
    text = exported(db, client_id)
    assert [message["content"] for message in lines(text, "message")] == [None, "", "oi"]
    assert imported(db, text, client_id=NEW) == Counts(conversations=1, messages=1, empty=2)
    (message,) = lines(exported(db, NEW), "message")
    (conversation,) = lines(exported(db, NEW), "conversation")
    assert conversation["last_message_id"] == message["id"]
    assert conversation["last_read_message_id"] < message["id"]


# --- what is not ---


def test_nothing_that_opens_a_door_is_exported(db: Database, full: UUID) -> None:
    text = exported(db, full)
    assert "SECRET" not in text
    assert "5ec2e700" not in text
    (client,) = lines(text, "client")
    assert sorted(client["left_out"]) == LEFT_OUT
    assert client["tools_config"]["whatsapp"] == {"provider": "uazapi"}
    assert client["tools_config"]["crm"] == {"monkey": "banana", "deep": [[{"max_tokens": 5}]]}
    assert client["tools_config"]["followup"]["stages"][1] == {"delay_minutes": 6}


CREDENTIALS: Final = [
    "key",
    "KEY",
    "Key",
    "api_key",
    "apikey",
    "apiKey",
    "APIKey",
    "API-KEY",
    "x-api-key",
    "api.key",
    "secret_key2",
    "token",
    "accessToken",
    "tokens",
    "refresh_token",
    "client_secret",
    "secret",
    "clientSecret",
    "CRMToken",
    "password",
    "dbPassword",
    "passwd",
    "pass",
    "senha",
    "SENHA",
    "senhas",
    "credential",
    "credentials",
    "Authorization",
    "auth",
    "bearer",
    "chave_api",
    "chaveSecreta",
    "OAuth2Token",
    "segredo",
    "access_token1",
]
HARMLESS: Final = [
    "monkey",
    "Monkey",
    "keyboard",
    "chave",
    "chave_desconhecida",
    "chave_pix",
    "tokenizer",
    "secretary",
    "passage",
    "author",
    "authored",
    "compass",
    "max_length",
    "name",
    "url",
    "hockey",
    "senhal",
]


@pytest.mark.parametrize("name", CREDENTIALS)
def test_undeclared_key_that_is_named_like_a_credential_is_left_out(db: Database, client_id: UUID, name: str) -> None:
    config = {name: "x", "a": [{"b": {name: {"c": 1}}}]}
    with db.tenant_session(client_id) as session:
        session.get_one(Client, client_id).tools_config = config  # type: ignore[assignment]  # is validated
    (client,) = lines(exported(db, client_id), "client")
    assert client["tools_config"] == {"a": [{"b": {}}]}
    assert sorted(client["left_out"]) == sorted([name, f"a.0.b.{name}"])


def test_other_undeclared_keys_survive(db: Database, client_id: UUID) -> None:
    config = {name: {name: [name]} for name in HARMLESS} | {"max_tokens": 500, "followup": {"stages": []}}
    with db.tenant_session(client_id) as session:
        session.get_one(Client, client_id).tools_config = config  # type: ignore[assignment]  # is validated
    (client,) = lines(exported(db, client_id), "client")
    assert client["tools_config"] == config
    assert client["left_out"] == []


@pytest.mark.parametrize(
    "stored", ['"https://SECRET"', '["SECRET"]', '[{"url": "SECRET"}]', '{"url": {"a": "SECRET"}, "key": ["SECRET"]}']
)
def test_invalid_document_is_exported_without_its_secrets(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any], stored: str
) -> None:
    config = f'{{"whatsapp": {stored}, "ai_active": "talvez"}}'
    superuser.execute("UPDATE clients SET tools_config = %s WHERE id = %s", [config, client_id])
    text = exported(db, client_id)
    assert "SECRET" not in text
    (client,) = lines(text, "client")
    assert client["tools_config"]["ai_active"] == "talvez"
    assert client["left_out"]
    with pytest.raises(InvalidExport, match=r"Line 2 .*tools_config"):
        imported(db, text, client_id=NEW)


# --- round trips ---


def renumbered(text: str) -> list[dict[str, Any]]:
    """The lines, with the ids of each chat's messages replaced by their places."""
    result = lines(text)
    for chat_id in {line["chat_id"] for kind in ("conversation", "message") for line in lines(text, kind)}:
        parts = [part for line in result for part in line.values() if isinstance(part, dict)]
        parts = [part for part in parts if part.get("chat_id") == chat_id]
        names = {name for part in parts for name in part if name == "id" or name.endswith("message_id")}
        names -= {"provider_message_id"}
        places = sorted({part[name] for part in parts for name in names if part.get(name) is not None})
        for part in parts:
            for name in names & part.keys():
                part[name] = None if part[name] is None else places.index(part[name])
    return result


def test_import_into_another_database_is_the_same_client(db: Database, full: UUID, elsewhere: Database) -> None:
    text = exported(db, full)
    assert imported(elsewhere, text) == Counts(files=2, conversations=4, messages=8)
    again = exported(elsewhere, full)
    assert again != text
    there, here = renumbered(again), renumbered(text)
    assert there[1]["client"].pop("left_out") == []
    assert sorted(here[1]["client"].pop("left_out")) == LEFT_OUT
    assert there == here
    assert all(line["id"] > 70000 for line in lines(again, "message"))
    (client,) = lines(again, "client")
    assert '"exact":12345678901234567890.123456789' in again
    assert client["tools_config"]["big"] == 123456789012345678901234567890
    with elsewhere.tenant_session(full) as session:
        conversation = session.get_one(ActiveConversation, ("b@lid", full))
        newest = messages.history(session, chat_id="b@lid").items[0]
        assert (conversation.last_message_id, conversation.claim_token) == (newest.id, None)
        assert messages.memory(session, chat_id="b@lid").summary == "resumo"
    with elsewhere.system_session(reason="token") as session:
        assert session.get_one(Client, full).token == "new"  # noqa: S105  # no password


def test_what_was_unread_is_unread_and_what_was_read_is_read(db: Database, full: UUID, elsewhere: Database) -> None:
    def unread(database: Database) -> dict[str, int]:
        with database.tenant_session(full) as session:
            return {entry.state.chat_id: entry.unread for entry in conversations.inbox(session, status=None).items}

    before = unread(db)
    imported(elsewhere, exported(db, full))
    assert unread(elsewhere) == before
    assert {0, 2} <= set(before.values())


def test_ids_that_no_message_has_any_more_keep_their_order(db: Database, client_id: UUID, elsewhere: Database) -> None:
    """A conversation may name messages that were purged: before, between and after those that are there."""
    with db.tenant_session(client_id) as session:
        session.add_all(
            ChatMessage(id=number, chat_id="1", role="user", content=f"{number}", created_at=AT) for number in (20, 40)
        )
        session.add(
            ActiveConversation(
                chat_id="1",
                last_message_at=AT,
                last_context_message_id=10,
                last_read_message_id=30,
                last_message_id=40,
                last_user_message_id=50,
            )
        )
        session.add(ActiveConversation(chat_id="2", last_message_at=AT, last_message_id=5, last_read_message_id=5))
    imported(elsewhere, exported(db, client_id))
    again = exported(elsewhere, client_id)
    assert renumbered(again) == renumbered(exported(db, client_id))
    first, second = lines(again, "conversation")
    names = ("last_context_message_id", "last_read_message_id", "last_message_id", "last_user_message_id")
    assert [first[name] - first["last_context_message_id"] for name in names] == [0, 2, 3, 4]
    assert second["last_message_id"] == second["last_read_message_id"] > first["last_user_message_id"]


def test_many_chats_round_trip(db: Database, client_id: UUID, elsewhere: Database) -> None:
    """More than is read and written at once, in chats that begin and end anywhere."""
    with db.tenant_session(client_id) as session:
        for length in (1, 499, 500, 501, 3, 2, 700):
            for part in range(0, length, 500):
                size = min(500, length - part)
                batch = [IncomingMessage(f"{length}", "user", f"{n}", sent_at=AT) for n in range(size)]
                messages.record_many(session, messages=batch)
        for number in range(600):
            session.add(ActiveConversation(chat_id=f"x{number}", last_message_at=AT, last_message_id=1))
            session.add(ClientFile(filename=f"{number}"))
    text = exported(db, client_id)
    assert imported(elsewhere, text) == Counts(files=600, conversations=607, messages=2206)
    assert renumbered(exported(elsewhere, client_id)) == renumbered(text)


def test_chat_round_trips_into_another_client(db: Database, full: UUID, other_client_id: UUID) -> None:
    text = exported(db, full, "b@lid")
    with db.tenant_session(other_client_id) as session:
        assert import_chat(session, source=text.splitlines()) == Counts(conversations=1, messages=4)
        assert (
            messages.record(
                session, chat_id="b@lid", role="user", content="nova", provider_message_id="wamid.4"
            ).inserted
            is False
        )
    assert renumbered(exported(db, other_client_id, "b@lid")) == renumbered(text)
    assert exported(db, full, "b@lid") == text


def test_round_trips_in_an_event_loop(db: Database, full: UUID, other_client_id: UUID) -> None:
    async def main() -> tuple[Counts, Counts, Counts, Counts]:
        whole, chat = io.StringIO(), io.StringIO()
        async with db:
            async with db.async_tenant_session(full) as session:
                first = await session.run_sync(export_client, to=whole)
                second = await session.run_sync(export_chat, chat_id="b@lid", to=chat)
            whole.seek(0), chat.seek(0)
            async with db.async_system_session(reason="import") as system:
                third = await system.run_sync(import_client, source=whole, token="new", client_id=NEW)  # noqa: S106  # no password
            async with db.async_tenant_session(other_client_id) as session:
                fourth = await session.run_sync(import_chat, source=chat)
        return first, second, third, fourth

    of_client, of_chat = Counts(files=2, conversations=4, messages=8), Counts(conversations=1, messages=4)
    assert asyncio.run(main()) == (of_client, of_chat, of_client, of_chat)


# --- memory ---


class Nowhere:
    def write(self, text: str) -> None:
        pass


def peak(work: Callable[[], object]) -> int:
    """The most memory that it took, in bytes."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_export_takes_no_more_memory_for_more_messages(
    db: Database, clients: tuple[UUID, UUID], superuser: psycopg.Connection[Any]
) -> None:
    insert = (
        "INSERT INTO chat_messages (client_id, chat_id, role, content) "
        "SELECT %s, (n %% 7)::text, 'user', repeat('x', 100) FROM generate_series(1, %s) n"
    )
    few, many = clients
    superuser.execute(insert, [few, 5_000])
    superuser.execute(insert, [many, 50_000])

    def export(client_id: UUID) -> None:
        with db.tenant_session(client_id) as session:
            counts.append(export_client(session, to=Nowhere()).messages)

    counts: list[int] = []
    export(few)
    assert peak(lambda: export(many)) < 1.5 * peak(lambda: export(few))
    assert counts == [5_000, 50_000, 5_000]


def test_rows_wait_on_the_server_until_they_are_written(db: Database, full: UUID) -> None:
    """What libpq has received is no memory of Python, so `tracemalloc` does not see it."""
    cursors: list[object] = []
    exported(db, full)
    engine = db._open().tenant  # noqa: SLF001  # to look at its cursors

    def see(_connection: object, cursor: object, *_more: object) -> None:
        cursors.append(cursor)

    event.listen(engine, "after_cursor_execute", see)
    exported(db, full)
    exported(db, full, "b@lid")
    assert [type(cursor) for cursor in cursors] == [psycopg.ServerCursor] * 2


def _many_lines(number: int) -> Iterator[str]:
    yield json.dumps({"kestra": 1, "scope": "client"})
    client: dict[str, Any] = {"id": str(NEW), "name": "C", "system_prompt": None, "tools_config": {}, "left_out": []}
    yield json.dumps({"client": client | {"created_at": AT.isoformat()}})
    message = {"chat_id": "1", "role": "user", "content": "x" * 100, "media_url": None, "provider_message_id": None}
    for n in range(number):
        yield json.dumps({"message": message | {"id": n, "created_at": AT.isoformat()}})
    yield json.dumps({"end": {"files": 0, "conversations": 0, "messages": number}})


@pytest.mark.slow
def test_import_takes_no_more_memory_for_more_messages(db: Database) -> None:
    def run(number: int) -> None:
        with db.system_session(reason="import") as session:
            import_client(session, source=_many_lines(number), token="new")  # noqa: S106  # no password
            session.rollback()

    run(1_000)
    assert peak(lambda: run(12_000)) < 1.5 * peak(lambda: run(2_000))


# --- what an import refuses ---

HEADER: Final = '{"kestra":1,"scope":"client"}'
CLIENT: Final = json.loads([*_many_lines(0)][1])["client"]
FILE: Final = {"id": str(UUID(int=1)), "filename": "SECRET", "file_hash": "a", "size_bytes": 1, "media_type": None}
CONVERSATION: Final = {
    "chat_id": "1",
    "status": "active",
    "followup_stage": 0,
    "last_role": None,
    "last_message_at": AT.isoformat(),
    "last_context": "SECRET",
    "last_message_id": None,
    "last_user_message_at": None,
    "last_user_message_id": None,
    "last_read_message_id": None,
    "last_context_message_id": None,
    "paused_until": None,
}
MESSAGE: Final = {
    "id": 1,
    "chat_id": "1",
    "role": "user",
    "content": "SECRET",
    "media_url": None,
    "created_at": AT.isoformat(),
    "provider_message_id": None,
}


def whole(*middle: str | dict[str, Any], end: dict[str, int] | None = None) -> list[str]:
    """An export of a client with these lines in it."""
    rest = [line if isinstance(line, str) else json.dumps(line) for line in middle]
    kinds = [next(iter(line)) for line in middle if isinstance(line, dict)]
    counts = {f"{kind}s": kinds.count(kind) for kind in ("file", "conversation", "message")}
    return [HEADER, json.dumps({"client": CLIENT}), *rest, json.dumps({"end": end or counts})]


def file(**changes: Any) -> dict[str, Any]:
    return {"file": FILE | changes}


def conversation(**changes: Any) -> dict[str, Any]:
    return {"conversation": CONVERSATION | changes}


def message(**changes: Any) -> dict[str, Any]:
    return {"message": MESSAGE | changes}


def client_line(**changes: Any) -> list[str]:
    return [HEADER, json.dumps({"client": CLIENT | changes}), json.dumps({"end": {"files": 0}})]


REFUSED: Final[dict[str, tuple[int, list[str]]]] = {
    "nothing": (1, []),
    "garbage": (1, ["SECRET"]),
    "an empty line": (1, ["\n"]),
    "a list": (1, ["[]"]),
    "an empty object": (1, ["{}"]),
    "too deep": (1, ["[" * 100_000]),
    "another version": (1, ['{"kestra":2,"scope":"client"}']),
    "no version": (1, ['{"scope":"client"}']),
    "another scope": (1, ['{"kestra":1,"scope":"chat","chat_id":"SECRET"}']),
    "unknown scope": (1, ['{"kestra":1,"scope":"SECRET"}']),
    "client of a chat": (1, ['{"kestra":1,"scope":"client","chat_id":"SECRET"}']),
    "more in the header": (1, ['{"kestra":1,"scope":"client","SECRET":1}']),
    "no client": (2, [HEADER]),
    "a message before the client": (2, [HEADER, json.dumps(message())]),
    "the client twice": (3, [*whole()[:2], *whole()[1:]]),
    "cut off": (4, whole(file())[:-1]),
    "cut off in a line": (4, [*whole(file())[:-1], '{"end":{"files"']),
    "more after the end": (4, [*whole(), json.dumps(file())]),
    "two ends": (4, [*whole(), whole()[-1]]),
    "an empty line after the end": (4, [*whole(), "\n"]),
    "other counts": (4, whole(file(), end={"files": 2, "conversations": 0, "messages": 0})),
    "garbage in the middle": (3, whole("SECRET")),
    "an empty object in the middle": (3, whole("{}")),
    "a line of two kinds": (3, whole(json.dumps(file() | message()))),
    "an unknown kind": (3, whole('{"SECRET":{}}')),
    "no object in a line": (3, whole('{"file":"SECRET"}')),
    "an unknown key": (3, whole(file(SECRET=1))),
    "a key is missing": (3, whole('{"message":{"id":1}}')),
    "a NUL": (3, whole(message(content="SECRET\0"))),
    "a lone surrogate": (3, whole(message(content="SECRET\ud800"))),
    "NaN": (3, whole('{"file":{"size_bytes":NaN}}')),
    "an unknown role": (3, whole(message(role="SECRET"))),
    "an id that is a text": (3, whole(message(id="1"))),
    "an id that is true": (3, whole(message(id=True))),
    "an id that is too large": (3, whole(message(id=2**31))),
    "an id of another client's file": (3, whole(file(id="SECRET"))),
    "a naive time": (3, whole(message(created_at="2026-03-01T12:00:00"))),
    "a time that is not UTC": (3, whole(message(created_at="2026-03-01T12:00:00-03:00"))),
    "a time that is none": (3, whole(message(created_at="SECRET"))),
    "a time that is a number": (3, whole(message(created_at=1))),
    "an empty provider_message_id": (3, whole(message(provider_message_id=""))),
    "a long provider_message_id": (3, whole(message(provider_message_id="S" * 513))),
    "a long chat_id": (3, whole(conversation(chat_id="S" * 513))),
    "an unknown status": (3, whole(conversation(status="SECRET"))),
    "a stage of 6": (3, whole(conversation(followup_stage=6))),
    "a hash in upper case": (3, whole(file(file_hash="SECRET"))),
    "a hash that is too long": (3, whole(file(file_hash="a" * 65))),
    "a negative size": (3, whole(file(size_bytes=-1))),
    "a long filename": (3, whole(file(filename="S" * 256))),
    "a hash twice": (4, whole(file(), file(id=str(UUID(int=2))))),
    "a file twice": (4, whole(file(), file(file_hash=None))),
    "files out of order": (4, whole(file(id=str(UUID(int=2))), file())),
    "a file after a chat": (4, whole(conversation(), file())),
    "a conversation twice": (4, whole(conversation(), conversation())),
    "a conversation after its message": (4, whole(message(), conversation())),
    "a message twice": (4, whole(message(), message())),
    "messages out of order": (4, whole(message(id=2), message())),
    "chats out of order": (4, whole(message(chat_id="2"), message(id=3))),
    "a chat in two places": (5, whole(message(), message(chat_id="2"), message(id=2))),
    "a provider_message_id twice": (
        4,
        whole(message(provider_message_id="w"), message(chat_id="2", provider_message_id="w")),
    ),
    "an invalid document": (2, client_line(tools_config={"ai_active": "SECRET"})),
    "the mask of a secret": (2, client_line(tools_config={"whatsapp": {"key": "**********"}})),
    "a document that is none": (2, client_line(tools_config=["SECRET"])),
    "a number that PostgreSQL has not": (2, [HEADER, client_line(name="C")[1].replace("{}", '{"SECRET":1e999999999}')]),
    "a long name": (2, client_line(name="S" * 256)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_by_line_and_keeps_nothing(
    db: Database, clients: tuple[UUID, UUID], superuser: psycopg.Connection[Any], what: str
) -> None:
    number, source = REFUSED[what]
    with db.system_session(reason="import") as session, pytest.raises(InvalidExport) as caught:
        import_client(session, source=source, token="new")  # noqa: S106  # no password
        # Somebody who goes on and commits keeps nothing of it either.
    assert caught.value.line == number
    assert f"Line {number} " in str(caught.value)
    told: BaseException | None = caught.value
    while told is not None:
        assert "SECRET" not in str(told)
        told = told.__cause__ or (None if told.__suppress_context__ else told.__context__)
    assert {row[0] for row in superuser.execute("SELECT id FROM clients").fetchall()} == set(clients)
    for table in ("chat_messages", "active_conversations", "client_files"):
        assert superuser.execute(sql.SQL("SELECT FROM {}").format(sql.Identifier(table))).fetchone() is None


def test_the_lines_that_the_refusals_begin_with_are_right(db: Database) -> None:
    assert imported(db, "\n".join(whole(file(), conversation(), message()))) == Counts(1, 1, 1)


def test_another_version_is_called_that(db: Database) -> None:
    with pytest.raises(InvalidExport, match="not the header of an export of version 1"):
        imported(db, '{"kestra":2,"scope":"client","more":[]}')


def test_bytes_that_are_no_utf8_are_refused_by_line(db: Database) -> None:
    source = io.TextIOWrapper(io.BytesIO(b"\x1f\x8b\x08 SECRET \xff"), encoding="utf-8")
    with db.system_session(reason="import") as session, pytest.raises(InvalidExport, match="Line 1"):
        import_client(session, source=source, token="new")  # noqa: S106  # no password


def test_client_that_is_there_is_left_alone(db: Database, full: UUID, other_client_id: UUID) -> None:
    text, other = exported(db, full), exported(db, other_client_id)
    with db.system_session(reason="import") as session:
        with pytest.raises(ClientExists) as exists:
            import_client(session, source=io.StringIO(text), token="new")  # noqa: S106  # no password
        with pytest.raises(ClientExists):
            import_client(session, source=io.StringIO(text), token="new", client_id=other_client_id)  # noqa: S106  # no password
        with pytest.raises(DuplicateToken, match="Another client") as duplicate:
            import_client(session, source=io.StringIO(text), token="SECRET-8", client_id=NEW)  # noqa: S106  # no password
    assert exists.value.client_id == full
    assert "SECRET" not in str(duplicate.value)
    assert (exported(db, full), exported(db, other_client_id)) == (text, other)
    with db.system_session(reason="look") as session:
        assert session.get(Client, NEW) is None


@pytest.mark.parametrize("token", ["", "t" * 256, "a\0", None])
def test_token_that_cannot_be_stored_is_refused(db: Database, full: UUID, token: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        imported(db, exported(db, full), token=token, client_id=NEW)
    assert not isinstance(caught.value, InvalidExport)


def test_client_id_that_is_none_is_refused(db: Database, full: UUID) -> None:
    bad: Any = "no uuid"
    with pytest.raises(InvalidClientId):
        imported(db, exported(db, full), client_id=bad)


def test_chat_that_is_there_is_left_alone(db: Database, full: UUID) -> None:
    for chat_id in ("b@lid", "no conversation", "no message"):
        text = exported(db, full, chat_id)
        with db.tenant_session(full) as session:
            with pytest.raises(ChatExists) as caught:
                import_chat(session, source=text.splitlines())
            assert caught.value.chat_id == chat_id
        assert exported(db, full, chat_id) == text


def test_chat_whose_messages_the_client_has_elsewhere_is_refused_by_line(db: Database, full: UUID) -> None:
    text = exported(db, full, "b@lid").replace('"b@lid"', '"b@c.us"')
    with db.tenant_session(full) as session, pytest.raises(InvalidExport, match="Line 3"):
        import_chat(session, source=text.splitlines())
    assert lines(exported(db, full, "b@c.us"), "message") == []


@pytest.mark.parametrize("stray", [conversation(chat_id="2"), message(chat_id="2"), file(), {"client": CLIENT}])
def test_chat_takes_only_its_own_lines(db: Database, client_id: UUID, stray: dict[str, Any]) -> None:
    source = ['{"kestra":1,"scope":"chat","chat_id":"1"}', json.dumps(message()), json.dumps(stray)]
    with db.tenant_session(client_id) as session, pytest.raises(InvalidExport, match="Line 3"):
        import_chat(session, source=source)


@pytest.mark.parametrize("header", [HEADER, '{"kestra":1,"scope":"chat"}'])
def test_chat_needs_a_header_that_names_it(db: Database, client_id: UUID, header: str) -> None:
    with db.tenant_session(client_id) as session, pytest.raises(InvalidExport, match="Line 1"):
        import_chat(session, source=[header])


def test_chat_without_a_client_is_refused(db: Database, full: UUID) -> None:
    text = exported(db, full, "b@lid")
    with pytest.raises(ClientNotFound, match=str(NEW)), db.tenant_session(NEW) as session:
        import_chat(session, source=text.splitlines())


def test_chat_that_is_being_recorded_is_waited_for(
    db: Database, full: UUID, other_client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    text = exported(db, full, "b@lid")

    def run() -> None:
        with db.tenant_session(other_client_id) as session:
            import_chat(session, source=text.splitlines())

    with ThreadPoolExecutor(1) as threads:
        with db.tenant_session(other_client_id) as session:
            messages.record(session, chat_id="b@lid", role="user", content="antes")
            waiting = threads.submit(run)
            until_waiting(superuser, waiting)
        with pytest.raises(ChatExists):
            waiting.result()


def test_each_takes_its_own_kind_of_session(db: Database, client_id: UUID) -> None:
    wrong: Any
    with db.tenant_session(client_id) as wrong, pytest.raises(TenancyError):
        import_client(wrong, source=[], token="new")  # noqa: S106  # no password
    with db.system_session(reason="test") as wrong:
        with pytest.raises(TenancyError):
            export_client(wrong, to=Nowhere())
        with pytest.raises(TenancyError):
            export_chat(wrong, chat_id="1", to=Nowhere())
        with pytest.raises(TenancyError):
            import_chat(wrong, source=[])


def test_imports_of_messages_with_the_same_ids_of_a_provider_do_not_deadlock(db: Database, client_id: UUID) -> None:
    """Each has the messages of a chat of its own, in an order of its own; one of them is told that it is too late."""

    def chat(chat_id: str, provider_ids: range) -> list[str]:
        given = [
            message(id=number, chat_id=chat_id, provider_message_id=f"w{provider_id}")
            for number, provider_id in enumerate(provider_ids, start=1)
        ]
        header, end = {"kestra": 1, "scope": "chat", "chat_id": chat_id}, {"files": 0, "conversations": 0}
        return [json.dumps(line) for line in (header, *given, {"end": {**end, "messages": len(given)}})]

    def importing(turn: int, order: int) -> Callable[[], Counts]:
        provider_ids = range(turn * 300, turn * 300 + 300)

        def run() -> Counts:
            with db.tenant_session(client_id) as session:
                source = chat(f"{turn} {order}", provider_ids[::order])
                return import_chat(session, source=source)

        return run

    for turn in range(5):
        outcomes = outcomes_at_once(importing(turn, 1), importing(turn, -1))
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Counts", "InvalidExport"]
