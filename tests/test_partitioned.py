"""The statements on tables partitioned by `client_id`: PostgreSQL then refuses the keys that Citus refuses.

What Citus refuses beyond that is looked for in the text of every statement that is sent.
"""

import io
import re
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from kestra import Database
from kestra.base import Base, tenant_key
from kestra.dao import clients, conversations, exports, files, followups, imports, messages
from kestra.dao.messages import IncomingMessage
from tests.observing import statements_sent

NOON: Final = datetime(2026, 3, 2, 12, tzinfo=UTC)
HOUR: Final = timedelta(hours=1)
POLICY: Final = {"followup": {"active": True, "stages": [{"delay_minutes": 30, "prompt": "e aí?"}]}}


@pytest.fixture
def partitioned(superuser: psycopg.Connection[Any], db: Database) -> Database:
    """The database with each table of tenants, but for `clients`, partitioned by the hash of the client."""
    for table in Base.metadata.sorted_tables:
        if tenant_key(table) is None or table.name == "clients":
            continue
        name, plain = sql.Identifier(table.name), sql.Identifier(f"{table.name}_plain")
        for statement in (
            "ALTER TABLE {name} RENAME TO {plain}",
            "CREATE TABLE {name} (LIKE {plain} INCLUDING ALL) PARTITION BY HASH (client_id)",
            "CREATE TABLE {part} PARTITION OF {name} FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
            "CREATE TABLE {other} PARTITION OF {name} FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
            "GRANT SELECT, INSERT, UPDATE, DELETE ON {name} TO kestra_tenant, kestra_system",
        ):
            parts = {"part": sql.Identifier(f"{table.name}_0"), "other": sql.Identifier(f"{table.name}_1")}
            superuser.execute(sql.SQL(statement).format(name=name, plain=plain, **parts))
    return db


def everything_a_client_does(db: Database, client_id: UUID) -> None:
    """Each function of the data access layer that works for one client, once."""
    with db.tenant_session(client_id) as session:
        clients.patch_tools_config(session, patch=POLICY)
        clients.edit(session, name="Padaria")
        assert clients.get(session).name == "Padaria"
        first = messages.record(session, chat_id="a", role="user", content="oi", provider_message_id="w1", sent_at=NOON)
        again = messages.record(session, chat_id="a", role="user", content="oi", provider_message_id="w1", sent_at=NOON)
        assert (again.inserted, again.message_id) == (False, first.message_id)
        batch = [IncomingMessage(chat, "assistant", "olá", sent_at=NOON + HOUR) for chat in "abc"]
        assert len(messages.record_many(session, messages=batch).recorded) == 3
        page = messages.history(session, chat_id="a", limit=1)
        assert [m.content for m in messages.history(session, chat_id="a", before=page.cursor).items] == ["oi"]
        conversations.set_context(session, chat_id="a", summary="resumo", up_to=first.message_id)
        assert messages.memory(session, chat_id="a").summary == "resumo"
        inbox = conversations.inbox(session, limit=2)
        assert len(conversations.inbox(session, cursor=inbox.cursor).items) == 1
        assert len(conversations.inbox(session, status="active", unread_only=True).items) == 1
        conversations.mark_read(session, chat_id="a", up_to=first.message_id)
        conversations.pause(session, chat_id="b", until=NOON + 9 * HOUR)
        conversations.resume(session, chat_id="b")
        state = conversations.reopen(session, chat_id="c")
        conversations.finish(session, chat_id="c", expected_last_message_id=state.last_message_id)
        assert conversations.window_open(session, chat_id="a", now=NOON + HOUR)
    with db.tenant_session(client_id) as session:
        now = NOON + 2 * HOUR
        one, other = followups.claim(session, limit=9, lease=HOUR, now=now)
        assert followups.release(session, claim=followups.renew(session, claim=other, lease=HOUR, now=now))
        assert followups.complete(session, claim=one, content="e aí?", now=now).inserted
    with db.tenant_session(client_id) as session:
        file = files.register(session, content=b"manual", filename="manual.pdf").file
        assert not files.register(session, content=b"manual", filename="manual.pdf").created
        files.set_google_uri(session, file_id=file.id, uri="https://g/1", replaces=None, now=NOON)
        assert files.usable(session, now=NOON)
        assert files.needing_upload(session, now=NOON + 100 * HOUR)
        exported = io.StringIO()
        exports.export_chat(session, chat_id="a", to=exported)
        assert messages.erase_chat(session, chat_id="a").conversations == 1
        imports.import_chat(session, source=exported.getvalue().splitlines())
        assert messages.purge(session, before=NOON + 99 * HOUR).messages > 0
        exports.export_client(session, to=exported)


def sent_for(db: Database, client_id: UUID) -> list[str]:
    """Every statement that this takes, on one line each."""
    with statements_sent() as sent:
        everything_a_client_does(db, client_id)
    return [" ".join(statement.split()) for statement, _ in sent]


@pytest.mark.parametrize("client", [0, 1])
def test_everything_runs_on_tables_partitioned_by_client(
    partitioned: Database, clients: tuple[UUID, UUID], client: int
) -> None:
    everything_a_client_does(partitioned, clients[client])
    with partitioned.system_session(reason="test") as session:
        assert followups.clients_due(session, now=NOON + 9 * HOUR) == []


SET_ON_CONFLICT: Final = re.compile(r"DO UPDATE SET (.*?)(?: WHERE | RETURNING |$)")
SET_IN_UPDATE: Final = re.compile(r"(?<!DO )\bUPDATE \w+ (?:AS \w+ )?SET (.*?)(?: FROM | WHERE | RETURNING |$)")
ROW_LOCK: Final = re.compile(r"\bFOR (?:NO KEY )?(?:UPDATE|SHARE)\b")


def test_no_statement_holds_what_citus_refuses(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    functions = superuser.execute("SELECT prosrc FROM pg_proc WHERE proname LIKE 'kestra\\_record%'").fetchall()
    sent = sent_for(db, client_id) + [" ".join(source.split()) for (source,) in functions]
    on_conflict = [found for statement in sent for found in SET_ON_CONFLICT.findall(statement)]
    updates = [found for statement in sent for found in SET_IN_UPDATE.findall(statement)]
    locking = [statement for statement in sent if ROW_LOCK.search(statement)]
    assert len(on_conflict) >= 3
    assert len(updates) >= 8
    assert len(locking) >= 2
    for assigned in on_conflict:
        assert not re.search(r"now\(|_timestamp\(|random|nextval\(|current_", assigned, re.IGNORECASE), assigned
    for assigned in updates:
        assert not re.search(r"clock_timestamp\(|random|nextval\(", assigned, re.IGNORECASE), assigned
    for statement in locking:
        assert "client_id = %(kestra_client_id)s" in statement or "clients.id = %(kestra_client_id)s" in statement
    assert not any(re.search(r"\bMERGE\b", statement) for statement in sent)


def test_every_statement_on_rows_of_a_client_names_the_client(db: Database, client_id: UUID) -> None:
    sent = sent_for(db, client_id)
    tables = "|".join(table.name for table in Base.metadata.sorted_tables if tenant_key(table) is not None)
    reading = [statement for statement in sent if re.search(rf"\b({tables})\b", statement)]
    assert len(reading) > 20
    assert all("kestra_client_id" in statement for statement in reading)
