"""The checker finds nothing in what the data access layer leaves, and each thing that is broken, by its identity."""

import asyncio
import io
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from kestra import Database, cli, migrate
from kestra.dao import clients as clients_dao
from kestra.dao import conversations, exports, files, followups, imports, messages
from kestra.dao.followups import Claim
from kestra.dao.messages import IncomingMessage
from kestra.errors import ClaimLost, KestraError, TenancyError, VerificationFailed
from kestra.testing.invariants import EXAMPLES, INVARIANTS, Identity, Violation, check

ROOT: Final = Path(__file__).parents[1]
NOON: Final = datetime(2026, 3, 2, 12, tzinfo=UTC)
SECOND: Final = timedelta(seconds=1)
LEASE: Final = timedelta(minutes=10)
POLICY: Final = {"followup": {"active": True, "stages": [{"delay_minutes": 0, "prompt": "e aí?"}] * 5}}
SECRET: Final = "SECRET"  # noqa: S105  # what must not be shown


@pytest.fixture
def superuser(superuser_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(superuser_url, autocommit=True) as connection:
        yield connection


def found(db: Database, *, complete: bool = False) -> list[Violation]:
    with db.system_session(reason="test") as session:
        return check(session, complete=complete)


# --- what the data access layer leaves is clean ---


def fill(db: Database, client_id: UUID, *, purged: bool = False) -> None:
    """A bit of everything. With `purged`, a conversation `gone` that names a message that is no more."""
    with db.tenant_session(client_id) as session:
        clients_dao.patch_tools_config(session, patch=POLICY)
        messages.record(session, chat_id="gone", role="assistant", content=SECRET, sent_at=NOON - timedelta(days=9))
        if purged:
            assert messages.purge(session, before=NOON - timedelta(days=8), limit=1).more
        else:
            messages.erase_chat(session, chat_id="gone")
    said = [
        ("plain", "user", 0, "p1"),
        ("plain", "user", 2, "p2"),
        ("plain", "assistant", 4, "p3"),
        ("late", "assistant", 9, "l2"),
        ("answered", "assistant", 0, None),
        ("answered", "user", 1, "a1"),
        ("claimed", "user", 0, None),
        ("claimed", "assistant", 1, None),
        ("claimed", "system", 1, None),
        ("followed", "user", 0, None),
        ("followed", "assistant", 1, None),
        ("finished", "assistant", 1, None),
        ("paused", "assistant", 1, None),
        ("erased", "user", 1, None),
    ]
    with db.tenant_session(client_id) as session:
        batch = [
            IncomingMessage(chat, role, SECRET, SECRET, provider_id, NOON + second * SECOND)  # type: ignore[arg-type]  # roles
            for chat, role, second, provider_id in reversed(said)
            if role != "system"
        ]
        assert not messages.record_many(session, messages=batch).rejected
        late = messages.record(session, chat_id="late", role="user", content=SECRET, sent_at=NOON)
        conversations.mark_read(session, chat_id="late", up_to=late.message_id)
        conversations.set_context(session, chat_id="late", summary=SECRET + "é" * 7994, up_to=late.message_id)
        conversations.finish(
            session,
            chat_id="finished",
            expected_last_message_id=messages.history(session, chat_id="finished").items[0].id,
        )
        conversations.pause(session, chat_id="paused", until=NOON + timedelta(days=1))
        messages.erase_chat(session, chat_id="erased")
        file = files.register(session, content=b"file", filename="f.pdf").file
        files.set_google_uri(session, file_id=file.id, uri=f"https://{SECRET}", replaces=None, now=NOON)
    with db.tenant_session(client_id) as session:
        claims = followups.claim(session, limit=100, lease=LEASE, now=NOON + timedelta(hours=1))
    for claim in claims:
        with db.tenant_session(client_id) as session:
            if claim.chat_id == "followed":
                followups.complete(session, claim=claim, content=SECRET, now=claim.until - SECOND)
            elif claim.chat_id == "claimed":
                messages.record(session, chat_id="claimed", role="system", content=SECRET, sent_at=NOON + 2 * SECOND)
            else:
                followups.release(session, claim=claim)


def test_what_the_data_access_layer_leaves_is_clean(db: Database, clients: tuple[UUID, UUID]) -> None:
    for client_id in clients:
        fill(db, client_id)
    assert found(db) == []
    assert found(db, complete=True) == []


def test_purged_database_is_clean_but_not_complete(db: Database, clients: tuple[UUID, UUID]) -> None:
    fill(db, clients[0], purged=True)
    fill(db, clients[1])
    assert found(db) == []
    (violation,) = found(db, complete=True)
    assert (violation.invariant, violation.examples) == ("last_message_exists", (Identity(clients[0], "gone"),))


class Life:
    """Random calls for one client, in any order."""

    def __init__(self, db: Database, client_id: UUID, seed: int) -> None:
        self.db = db
        self.client_id = client_id
        self.dice = random.Random(seed)  # noqa: S311  # an order, no secret
        self.claims: list[Claim] = []
        self.clock = 0

    def live(self, steps: int) -> None:
        calls = [self.say] * 6 + [self.say_much] * 2
        calls += [
            self.claim,
            self.send,
            self.send,
            self.read,
            self.summarise,
            self.finish,
            self.change,
            self.erase,
            self.purge,
        ]
        for _ in range(steps):
            self.clock += self.dice.randrange(20)
            try:
                self.dice.choice(calls)()
            except ClaimLost:
                pass
            except KestraError as error:
                if "no conversation" not in str(error) and "covers" not in str(error) and "newest" not in str(error):
                    raise

    @property
    def now(self) -> datetime:
        return NOON + self.clock * SECOND

    @property
    def chat(self) -> str:
        return self.dice.choice(["a", "b", "c@lid"])

    def message(self) -> IncomingMessage:
        role = self.dice.choice(["user", "user", "assistant", "assistant", "system"])
        provider_id = self.dice.choice([None, f"w{self.dice.randrange(500)}"])
        sent_at = self.now - self.dice.choice([0, 0, 1, 5, 30, 90]) * SECOND
        return IncomingMessage(self.chat, role, "oi", None, provider_id, sent_at)  # type: ignore[arg-type]  # a role

    def say(self) -> None:
        with self.db.tenant_session(self.client_id) as session:
            messages.record(session, **asdict(self.message()), now=self.now)

    def say_much(self) -> None:
        with self.db.tenant_session(self.client_id) as session:
            batch = [self.message() for _ in range(self.dice.randrange(1, 9))]
            messages.record_many(session, messages=batch, now=self.now)

    def claim(self) -> None:
        with self.db.tenant_session(self.client_id) as session:
            lease = self.dice.choice([1, 30, 300]) * SECOND
            self.claims += followups.claim(session, limit=self.dice.randrange(1, 4), lease=lease, now=self.now)

    def send(self) -> None:
        if not self.claims:
            return
        claim = self.claims.pop(self.dice.randrange(len(self.claims)))
        with self.db.tenant_session(self.client_id) as session:
            if self.dice.random() < 0.2:
                followups.release(session, claim=claim)
            elif self.dice.random() < 0.3:
                self.claims.append(followups.renew(session, claim=claim, lease=60 * SECOND, now=self.now))
            else:
                message = self.message()
                followups.complete(
                    session,
                    claim=claim,
                    content="e aí?",
                    provider_message_id=message.provider_message_id,
                    sent_at=message.sent_at,
                    now=self.now,
                )

    def up_to(self) -> int:
        """An id near those that there are."""
        with self.db.tenant_session(self.client_id) as session:
            newest = [message.id for message in messages.history(session, chat_id=self.chat, limit=9).items]
        return max(0, self.dice.choice([0, *newest]) + self.dice.choice([-3, 0, 0, 3]))

    def read(self) -> None:
        up_to = self.up_to()
        with self.db.tenant_session(self.client_id) as session:
            conversations.mark_read(session, chat_id=self.chat, up_to=up_to)

    def summarise(self) -> None:
        up_to = self.up_to()
        with self.db.tenant_session(self.client_id) as session:
            conversations.set_context(session, chat_id=self.chat, summary="x" * 8000, up_to=up_to)

    def finish(self) -> None:
        with self.db.tenant_session(self.client_id) as session:
            chat = self.chat
            newest = messages.history(session, chat_id=chat, limit=1).items
            conversations.finish(session, chat_id=chat, expected_last_message_id=newest[0].id if newest else None)

    def change(self) -> None:
        with self.db.tenant_session(self.client_id) as session:
            kind = self.dice.randrange(3)
            if kind == 0:
                conversations.reopen(session, chat_id=self.chat)
            elif kind == 1:
                conversations.pause(session, chat_id=self.chat, until=self.now + self.dice.randrange(60) * SECOND)
            else:
                conversations.resume(session, chat_id=self.chat)

    def erase(self) -> None:
        if self.dice.random() < 0.2:
            with self.db.tenant_session(self.client_id) as session:
                messages.erase_chat(session, chat_id=self.chat)

    def purge(self) -> None:
        before = self.now - self.dice.choice([20, 60, 200]) * SECOND
        with self.db.tenant_session(self.client_id) as session:
            messages.purge(session, before=before, limit=self.dice.randrange(1, 6))


def move(db: Database, client_id: UUID, *, token: str) -> None:
    """Export a client and import it as another one."""
    to = io.StringIO()
    with db.tenant_session(client_id) as session:
        exports.export_client(session, to=to)
    with db.system_session(reason="import") as session:
        other = UUID(int=client_id.int ^ 1)
        imports.import_client(session, source=io.StringIO(to.getvalue()), token=token, client_id=other)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_called_in_whatever_order_leaves_it_clean(
    seed: int, db: Database, clients: tuple[UUID, UUID]
) -> None:
    lives = [Life(db, client_id, seed * 2 + number) for number, client_id in enumerate(clients)]
    for life in lives:
        with db.tenant_session(life.client_id) as session:
            clients_dao.patch_tools_config(session, patch=POLICY)
    for _ in range(6):
        for life in lives:
            life.live(20)
        assert found(db) == []
    for number, client_id in enumerate(clients):
        move(db, client_id, token=f"other {number}")
    assert found(db) == []


@pytest.mark.parametrize("seed", range(6))
def test_where_nothing_was_purged_it_is_complete(seed: int, db: Database, client_id: UUID) -> None:
    life = Life(db, client_id, seed)
    life.purge = life.say  # type: ignore[method-assign]  # the one that is not called
    with db.tenant_session(client_id) as session:
        clients_dao.patch_tools_config(session, patch=POLICY)
    life.live(120)
    move(db, client_id, token="other")  # noqa: S106  # no password
    assert found(db, complete=True) == []


@pytest.fixture
def adopted(superuser: psycopg.Connection[Any], empty_database: str) -> Iterator[Database]:  # noqa: ARG001  # the roles
    """An existing installation, adopted, with more dirt than the example has."""
    with psycopg.connect(empty_database) as connection:
        connection.execute((ROOT / "examples/existing_installation.sql").read_bytes())
        connection.execute(
            """
            INSERT INTO active_conversations (chat_id, client_id, last_role, last_message_at, last_context)
            SELECT chat, id, 'ai', '2026-03-02 11:59:30', repeat('x', 9000)
            FROM clients, unnest('{a,b,none}'::text[]) AS chat;
            INSERT INTO chat_messages (client_id, chat_id, role, content, created_at)
            SELECT id, chat, role, content, '2026-03-02 11:59:00'::timestamp + n * interval '20 seconds'
            FROM clients,
                   (VALUES (1, 'user', 'oi'), (2, 'user', ''), (3, 'ai', NULL), (4, 'user', 'ok')) m (n, role, content),
                   unnest('{a,b,c@lid}'::text[]) AS chat
            """
        )
    migrate.stamp(empty_database, "0001")
    migrate.upgrade(empty_database)
    with Database(empty_database) as database:
        yield database


@pytest.mark.parametrize("seed", range(4))
def test_what_an_adopted_installation_has_is_called_adopted_whatever_is_called(seed: int, adopted: Database) -> None:
    with adopted.system_session(reason="test") as session:
        ids = [client.id for client in clients_dao.page(session).items]
    before = found(adopted)
    assert {"message_is_not_empty", "message_conversation", "last_message_matches"} <= {one.invariant for one in before}
    assert all(violation.adopted for violation in before), [*map(str, before)]
    lives = [Life(adopted, client_id, seed * 9 + number) for number, client_id in enumerate(ids)]
    for life in lives:
        with adopted.tenant_session(life.client_id) as session:
            clients_dao.patch_tools_config(session, patch=POLICY)
    for _ in range(4):
        for life in lives:
            life.live(15)
        assert [str(violation) for violation in found(adopted) if not violation.adopted] == []
    for number, client_id in enumerate(ids):
        move(adopted, client_id, token=f"other {number}")
    assert [str(violation) for violation in found(adopted) if not violation.adopted] == []


def test_it_is_clean_at_every_moment_while_programs_write(db: Database, clients: tuple[UUID, UUID]) -> None:
    for client_id in clients:
        with db.tenant_session(client_id) as session:
            clients_dao.patch_tools_config(session, patch=POLICY)
    done = Event()

    def write(seed: int) -> None:
        life = Life(db, clients[seed % 2], seed)
        while not done.is_set():
            life.live(1)

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, seed) for seed in range(4)]
        try:
            checks = [found(db) for _ in range(40)]
        finally:
            done.set()
        for writer in writers:
            writer.result(60)
    assert checks == [[]] * 40


# --- what is broken is found ---


@dataclass(frozen=True)
class Case:
    """What breaks invariants, and what is found then.

    Attributes:
        steps: SQL, and the invariant that is found broken in the rows that it returns (client, chat, message, file).
            None: the SQL prepares what comes after it.
        adopted: What the violations say.
        purged: Whether the conversation `gone` is there.
        complete: Whether it is found only in a complete database.
    """

    steps: Sequence[tuple[str | None, str]]
    adopted: bool = False
    purged: bool = False
    complete: bool = False

    @property
    def invariants(self) -> str:
        return " ".join(invariant for invariant, _ in self.steps if invariant)


def conversation(invariant: str, chat: str, change: str, **options: Any) -> Case:
    purged = chat == "gone"
    update = f"UPDATE active_conversations SET {change} WHERE client_id = %(client)s AND chat_id = '{chat}'"
    return Case(
        [(invariant, f"{update} RETURNING client_id, chat_id, NULL::int, NULL::uuid")], purged=purged, **options
    )


MESSAGE: Final = "RETURNING client_id, chat_id, id, NULL::uuid"
COLUMNS: Final = "chat_messages (client_id, chat_id, role, content, created_at, provider_message_id"
CHECK: Final = "ALTER TABLE {table} DROP CONSTRAINT ck_{table}_{name}"
FILE: Final = "WHERE client_id = %(client)s RETURNING client_id, NULL::text, NULL::int, id"
CLIENT: Final = "WHERE id = %(client)s RETURNING id, NULL::text, NULL::int, NULL::uuid"


def new(
    invariant: str | None,
    chat: str,
    role: str,
    second: int,
    provider_id: str = "'x'",
) -> tuple[str | None, str]:
    """A message. The chat and the provider's id are SQL."""
    values = f"%(client)s, {chat}, '{role}', '{SECRET}', %(noon)s::timestamptz + interval '{second} s', {provider_id}"
    return invariant, f"INSERT INTO {COLUMNS}) VALUES ({values}) {MESSAGE}"


def without(table: str, name: str) -> tuple[None, str]:
    return None, CHECK.format(table=table, name=name)


def changed(invariant: str, provider_id: str, change: str) -> tuple[str, str]:
    where = f"client_id = %(client)s AND provider_message_id = '{provider_id}'"
    return invariant, f"UPDATE chat_messages SET {change} WHERE {where} {MESSAGE}"


def drawn(column: str) -> str:
    return f"{column} = nextval('chat_messages_id_seq')"


ANSWER: Final = (
    "SELECT client_id, chat_id, id, NULL::uuid FROM chat_messages "
    "WHERE client_id = %(client)s AND chat_id = 'followed' AND role = 'user'"
)
LONG: Final = "repeat('9', 513)"
NEW_CONVERSATION: Final = (
    "INSERT INTO active_conversations (client_id, chat_id, last_message_at, last_message_id, last_role) "
    "VALUES (%(client)s, {}, {}, {}, {}) RETURNING client_id, chat_id, NULL::int, NULL::uuid"
)
AT_NOON: Final = "%(noon)s"

CASES: Final = [
    # messages
    Case([new("message_conversation", "'new'", "user", 0)]),
    Case([new("message_conversation", "'new'", "user", 0, "NULL")], adopted=True),
    Case([new("last_message_is_newest", "'plain'", "assistant", 5)]),
    Case([new("last_message_is_newest", "'plain'", "assistant", 4)]),
    Case([new("last_message_is_newest", "'plain'", "assistant", 5, "NULL")], adopted=True),
    Case(
        [
            (None, NEW_CONVERSATION.format("'new'", AT_NOON, "NULL", "NULL")),
            new("last_message_is_named", "'new'", "assistant", -1),
        ],
        adopted=True,
    ),
    Case(
        [
            (None, NEW_CONVERSATION.format("'new'", AT_NOON, "NULL", "NULL")),
            new("last_message_is_newest", "'new'", "assistant", 0),
        ]
    ),
    Case([changed("last_user_message_at_is_newest", "p1", "created_at = created_at + interval '3 s'")]),
    Case([new("last_user_message_id_is_greatest", "'plain'", "user", 1)]),
    Case([new("last_user_message_id_is_greatest", "'plain'", "user", 1, "NULL")], adopted=True),
    Case(
        [
            (
                None,
                conversation("", "followed", "last_user_message_at = NULL, last_user_message_id = NULL").steps[0][1],
            ),
            ("last_user_message_at_is_newest", ANSWER),
            ("last_user_message_id_is_greatest", ANSWER),
        ],
        adopted=True,
    ),
    Case([without("chat_messages", "role"), new("message_role", "'plain'", "robot", 1)]),
    Case(
        [
            without("chat_messages", "content_or_media"),
            changed("message_is_not_empty", "p1", "content = '', media_url = NULL"),
        ]
    ),
    Case(
        [
            without("chat_messages", "content_or_media"),
            changed("message_is_not_empty", "p1", "content = NULL, media_url = '', provider_message_id = NULL"),
        ],
        adopted=True,
    ),
    Case(
        [
            without("chat_messages", "provider_message_id"),
            changed("provider_message_id", "p1", "provider_message_id = ''"),
        ]
    ),
    Case([changed("provider_message_id", "p1", f"provider_message_id = {LONG}")]),
    Case([changed("message_id_is_positive", "p1", "id = 0")]),
    Case([changed("message_id_is_positive", "p1", "id = 0, provider_message_id = NULL")], adopted=True),
    Case([new(None, "'plain'", "assistant", 1), changed("message_id_is_drawn", "x", "id = id + 1")]),
    Case(
        [
            ("conversation_time", NEW_CONVERSATION.format("'new'", "now() + interval '1 h'", "NULL", "NULL")),
        ],
        adopted=True,
    ),
    Case([("conversation_chat_id", NEW_CONVERSATION.format("''", AT_NOON, "NULL", "NULL"))], adopted=True),
    Case([("conversation_chat_id", NEW_CONVERSATION.format(LONG, AT_NOON, "NULL", "NULL"))], adopted=True),
    # conversations
    Case([without("active_conversations", "status"), *conversation("status", "plain", "status = 'open'").steps]),
    Case(
        [
            without("active_conversations", "followup_stage"),
            *conversation("followup_stage", "plain", "followup_stage = 6").steps,
        ]
    ),
    Case(
        [
            without("active_conversations", "followup_stage"),
            *conversation("followup_stage", "plain", "followup_stage = -1").steps,
        ]
    ),
    Case(
        [without("active_conversations", "last_role"), *conversation("last_role", "gone", "last_role = 'ai'").steps],
        purged=True,
    ),
    conversation(
        "last_message_is_of_the_chat",
        "gone",
        "last_message_id = (SELECT id FROM chat_messages WHERE client_id = %(client)s AND provider_message_id = 'p3')",
    ),
    conversation("last_message_matches", "plain", "last_message_at = last_message_at + interval '1 s'"),
    conversation("last_message_matches", "plain", "last_role = 'system'"),
    conversation(
        "last_message_matches", "followed", "last_message_at = last_message_at + interval '1 s'", adopted=True
    ),
    conversation("last_message_is_whole", "gone", "last_role = NULL", adopted=True),
    conversation("last_message_is_whole", "gone", "last_role = 'user', last_message_id = NULL", adopted=True),
    conversation("last_user_message_is_the_users", "plain", "last_user_message_id = last_message_id"),
    conversation(
        "last_user_message_is_the_users",
        "plain",
        "last_user_message_id = "
        "(SELECT max(id) FROM chat_messages WHERE client_id = %(client)s AND chat_id = 'late' AND role = 'user')",
    ),
    conversation("last_user_message_is_whole", "gone", "last_user_message_id = last_message_id"),
    conversation("last_user_message_is_whole", "gone", "last_user_message_at = last_message_at"),
    conversation(
        "last_user_message_is_not_after_last",
        "plain",
        "last_user_message_at = last_message_at + interval '1 s'",
        adopted=True,
    ),
    conversation("last_user_message_is_not_after_last", "gone", "last_role = 'user'", adopted=True),
    conversation(
        "last_user_message_is_not_after_last",
        "gone",
        "last_role = 'user', last_user_message_id = last_message_id, "
        "last_user_message_at = last_message_at - interval '1 s'",
        adopted=True,
    ),
    conversation(
        "last_user_message_is_not_after_last",
        "gone",
        "last_role = 'user', last_user_message_at = last_message_at, last_user_message_id = last_message_id - 1",
        adopted=True,
    ),
    conversation("last_read_message_id", "plain", "last_read_message_id = last_message_id + 1", adopted=True),
    conversation("last_context_message_id", "late", "last_context_message_id = last_user_message_id + 1"),
    Case(
        [
            (None, NEW_CONVERSATION.format("'new'", AT_NOON, "NULL", "NULL")),
            *conversation("last_context_message_id", "new", "last_context = 'x', last_context_message_id = 1").steps,
        ],
        adopted=True,
    ),
    conversation("context_length", "late", "last_context = repeat('é', 8001)"),
    conversation("context_is_whole", "late", "last_context = NULL"),
    conversation("context_is_whole", "plain", "last_context = ''", adopted=True),
    Case(
        [
            without("active_conversations", "claim"),
            *conversation("claim_is_whole", "plain", "claim_token = gen_random_uuid()").steps,
        ]
    ),
    conversation("claim_is_on_an_active_conversation", "claimed", "status = 'finished'"),
    conversation("claim_is_on_an_active_conversation", "claimed", "followup_stage = 5"),
    conversation(
        "claim_ends_with_an_answer",
        "gone",
        "last_role = 'user', last_user_message_at = last_message_at, last_user_message_id = last_message_id, "
        "claim_token = gen_random_uuid(), claimed_until = last_message_at",
        adopted=True,
    ),
    conversation(
        "claim_ends_with_an_answer",
        "gone",
        "last_role = NULL, last_message_id = NULL, claim_token = gen_random_uuid(), claimed_until = last_message_at",
    ),
    conversation("claim_ends_with_a_pause", "claimed", "paused_until = claimed_until"),
    conversation("claim_lease", "claimed", "claimed_until = now() + interval '1 day 1 hour'"),
    conversation("stage_ends_with_an_answer", "answered", "followup_stage = 1", adopted=True),
    conversation(
        "stage_ends_with_an_answer",
        "gone",
        "followup_stage = 1, last_role = NULL, last_message_id = NULL",
        adopted=True,
    ),
    conversation("last_message_exists", "plain", drawn("last_message_id"), complete=True),
    conversation("last_user_message_exists", "plain", drawn("last_user_message_id"), complete=True),
    conversation(
        "last_user_message_at_exists",
        "plain",
        "last_user_message_at = last_user_message_at + interval '1 s'",
        complete=True,
    ),
    Case(
        [
            *conversation("last_user_message_exists", "paused", drawn("last_user_message_id")).steps,
            *conversation("last_user_message_at_exists", "paused", "last_user_message_at = last_message_at").steps,
        ],
        complete=True,
    ),
    # files
    Case(
        [
            without("client_files", "file_hash_lower"),
            ("file_hash", f"UPDATE client_files SET file_hash = upper(file_hash) {FILE}"),
        ]
    ),
    Case([("file_hash", f"UPDATE client_files SET file_hash = left(file_hash, 63) {FILE}")], adopted=True),
    Case([("file_hash", f"UPDATE client_files SET file_hash = left(file_hash, 63) || 'g' {FILE}")], adopted=True),
    Case([("file_hash", f"UPDATE client_files SET file_hash = NULL {FILE}")], adopted=True),
    Case([("file_uri_is_whole", f"UPDATE client_files SET google_file_uri = NULL {FILE}")]),
    Case([("file_uri_is_whole", f"UPDATE client_files SET google_file_uri = '' {FILE}")]),
    Case([("file_uri_is_whole", f"UPDATE client_files SET google_file_expires_at = NULL {FILE}")], adopted=True),
    Case([without("client_files", "size_bytes"), ("file_size", f"UPDATE client_files SET size_bytes = -1 {FILE}")]),
    # clients
    Case([without("clients", "token_not_blank"), ("token", f"UPDATE clients SET token = '' {CLIENT}")]),
    Case([("client_time", f"UPDATE clients SET created_at = now() + interval '1 h' {CLIENT}")], adopted=True),
    Case(
        [
            (
                "tools_config",
                f"""UPDATE clients SET tools_config = '{{"followup": {{"active": "{SECRET}"}}}}' {CLIENT}""",
            )
        ],
        adopted=True,
    ),
    Case(
        [
            (
                "tools_config",
                (
                    "UPDATE clients "
                    f"SET tools_config = ('{{\"a\":' || repeat('[', 5000) || repeat(']', 5000) || '}}')::jsonb {CLIENT}"
                ),
            )
        ],
        adopted=True,
    ),
    Case(
        [
            without("clients", "tools_config_is_object"),
            ("tools_config", f"UPDATE clients SET tools_config = '[]' {CLIENT}"),
        ],
        adopted=True,
    ),
    Case(
        [
            (
                "tools_config_is_unmasked",
                f"""UPDATE clients SET tools_config = '{{"whatsapp": {{"key": "**********"}}}}' {CLIENT}""",
            )
        ]
    ),
    # what is unique
    Case(
        [
            (None, "DROP INDEX uq_chat_messages_provider_message_id"),
            new("provider_message_id_is_unique", "'plain'", "assistant", 1, "'p1'"),
        ]
    ),
    Case(
        [
            (None, "ALTER TABLE client_files DROP CONSTRAINT uq_client_files_client_id_file_hash"),
            (
                "file_hash_is_unique",
                (
                    "INSERT INTO client_files (client_id, id, file_hash) "
                    "SELECT client_id, 'ffffffff-ffff-ffff-ffff-ffffffffffff', file_hash FROM client_files "
                    "WHERE client_id = %(client)s RETURNING client_id, NULL::text, NULL::int, id"
                ),
            ),
        ]
    ),
    Case(
        [
            (None, "ALTER TABLE clients DROP CONSTRAINT uq_clients_token"),
            (
                "token_is_unique",
                (
                    "INSERT INTO clients (id, name, token) SELECT 'ffffffff-ffff-ffff-ffff-ffffffffffff', 'C', token "
                    "FROM clients WHERE id = %(client)s RETURNING id, NULL::text, NULL::int, NULL::uuid"
                ),
            ),
        ]
    ),
    # what breaks together
    Case(
        [
            ("conversation_chat_id", NEW_CONVERSATION.format(LONG, AT_NOON, "1", "'assistant'")),
            new("message_chat_id", LONG, "assistant", -1, "NULL"),
        ],
        adopted=True,
    ),
    Case(
        [
            (
                "conversation_time",
                NEW_CONVERSATION.format(
                    "'new'",
                    "now() + interval '2 h'",
                    drawn("nextval('chat_messages_id_seq')").split(" = ")[1],
                    "'assistant'",
                ),
            ),
            (
                "message_time",
                (
                    f"INSERT INTO {COLUMNS}) VALUES "
                    f"(%(client)s, 'new', 'assistant', 'x', now() + interval '1 h', NULL) {MESSAGE}"
                ),
            ),
        ],
        adopted=True,
    ),
    Case(
        [
            (None, "ALTER TABLE chat_messages DROP CONSTRAINT fk_chat_messages_client_id_clients"),
            (None, "ALTER TABLE active_conversations DROP CONSTRAINT fk_active_conversations_client_id_clients"),
            (None, "ALTER TABLE client_files DROP CONSTRAINT fk_client_files_client_id_clients"),
            (
                "conversation_client",
                NEW_CONVERSATION.replace("%(client)s", "%(nobody)s").format("'new'", AT_NOON, "1", "'assistant'"),
            ),
            (
                "message_client",
                (
                    f"INSERT INTO {COLUMNS}) VALUES "
                    f"(%(nobody)s, 'new', 'assistant', 'x', %(noon)s::timestamptz - interval '1 s', NULL) {MESSAGE}"
                ),
            ),
            (
                "file_client",
                (
                    "INSERT INTO client_files (client_id, file_hash) VALUES (%(nobody)s, repeat('0', 64)) "
                    "RETURNING client_id, NULL::text, NULL::int, id"
                ),
            ),
        ]
    ),
]


def break_(superuser: psycopg.Connection[Any], case: Case, client_id: UUID) -> dict[str, list[Identity]]:
    """Run the steps; which rows are broken by then."""
    given = {"client": client_id, "noon": NOON, "nobody": UUID(int=5)}
    broken: dict[str, list[Identity]] = {}
    for invariant, statement in case.steps:
        cursor = superuser.execute(statement, given) if "%(" in statement else superuser.execute(statement)
        if invariant:
            broken.setdefault(invariant, []).extend(Identity(*row) for row in cursor.fetchall())
            assert broken[invariant], "there is something to break"
    return broken


@pytest.mark.parametrize("case", CASES, ids=[f"{case.invariants} {n}" for n, case in enumerate(CASES)])
def test_exactly_what_is_broken_is_found_by_its_identity(
    case: Case, db: Database, clients: tuple[UUID, UUID], superuser: psycopg.Connection[Any]
) -> None:
    for client_id in clients:
        fill(db, client_id, purged=case.purged)
    broken = break_(superuser, case, clients[0])
    expected = [
        Violation(invariant, len(rows), tuple(rows), adopted=case.adopted) for invariant, rows in sorted(broken.items())
    ]
    if case.complete:
        assert found(db) == []
    assert found(db, complete=case.complete) == expected
    lines = "".join(map(str, expected))
    assert lines.count("\n") == 0
    assert SECRET not in lines
    assert SECRET not in "".join(map(repr, expected))


def test_every_invariant_is_broken_by_some_case() -> None:
    assert {name for case in CASES for name in case.invariants.split()} == set(INVARIANTS)


def test_what_is_at_its_bound_or_another_clients_is_not_broken(
    db: Database, clients: tuple[UUID, UUID], superuser: psycopg.Connection[Any]
) -> None:
    fill(db, clients[0])
    at_the_bound = "followup_stage = 4, paused_until = claimed_until - interval '1 s'"
    assert break_(superuser, conversation("claimed", "claimed", at_the_bound), clients[0])
    # Ids are unique for a client, so another one may have the same.
    same_id = """
        WITH copied AS (
            INSERT INTO chat_messages (client_id, id, chat_id, role, content, created_at)
            SELECT %s, id, 'other', 'user', 'oi', created_at - interval '1 h' FROM chat_messages RETURNING *
        )
        INSERT INTO active_conversations (client_id, chat_id, last_message_id, last_message_at, last_role,
                                          last_user_message_id, last_user_message_at)
        SELECT client_id, chat_id, (array_agg(id ORDER BY created_at DESC, id DESC))[1], max(created_at), 'user',
               max(id), max(created_at)
        FROM copied GROUP BY client_id, chat_id
    """
    superuser.execute(same_id, [clients[1]])
    assert found(db, complete=True) == []


def test_every_row_is_counted_and_few_are_named_each_of_another_chat(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    superuser.execute(
        "INSERT INTO chat_messages (client_id, chat_id, role, content, created_at) "
        "SELECT %s, 'chat ' || n %% 20, 'user', 'oi', %s FROM generate_series(1, 1000) AS n",
        [client_id, NOON],
    )
    (violation,) = found(db)
    assert (violation.invariant, violation.rows, len(violation.examples)) == ("message_conversation", 1000, EXAMPLES)
    assert len({identity.chat_id for identity in violation.examples}) == EXAMPLES


def test_of_one_invariant_what_adoption_explains_is_told_from_what_it_does_not(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    fill(db, client_id)
    cases = [
        Case([new("message_conversation", f"'{n}'", "user", 0, provider_id)])
        for n, provider_id in enumerate(["'x'", "NULL"])
    ]
    rows = [break_(superuser, case, client_id)["message_conversation"] for case in cases]
    assert found(db) == [
        Violation("message_conversation", 1, tuple(rows[0]), adopted=False),
        Violation("message_conversation", 1, tuple(rows[1]), adopted=True),
    ]


def test_long_and_strange_chat_id_stays_on_one_short_line() -> None:
    identity = Identity(UUID(int=1), "a\n\u2028" + "b" * 600)
    assert str(identity) == f"client {UUID(int=1)} chat {'a' + chr(10) + chr(0x2028) + 'b' * 61 + '…'!r}"
    assert len(str(identity).splitlines()) == 1


def statements(db: Database) -> list[str]:
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        found(db, complete=True)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    return sent


def test_number_of_statements_does_not_grow_with_the_rows(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    few = statements(db)
    fill(db, client_id)
    superuser.execute("INSERT INTO clients (name, token) SELECT 'C', 'c' || n FROM generate_series(1, 300) AS n")
    superuser.execute(
        "INSERT INTO chat_messages (client_id, chat_id, role, content, created_at) "
        "SELECT %s, 'chat ' || n, 'user', 'oi', %s FROM generate_series(1, 300) AS n",
        [client_id, NOON],
    )
    assert statements(db) == few


def test_memory_does_not_grow_with_the_rows(db: Database, superuser: psycopg.Connection[Any]) -> None:
    def peak() -> int:
        tracemalloc.start()
        try:
            violations = found(db)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert [violation.invariant for violation in violations] == ["message_conversation", "tools_config"]
        assert [len(violation.examples) for violation in violations] == [EXAMPLES, EXAMPLES]
        return peak

    more = """
        WITH made AS (
            INSERT INTO clients (name, token, tools_config)
            SELECT 'C', gen_random_uuid(), jsonb_build_object('timezone', repeat('x', 2000))
            FROM generate_series(1, %s) AS n RETURNING id
        )
        INSERT INTO chat_messages (client_id, chat_id, role, content)
        SELECT id, 'c', 'user', 'oi' FROM made, generate_series(1, 9)
    """

    def least() -> int:
        """Whatever else of the process allocates meanwhile, it does not do so each time."""
        return min(peak() for _ in range(3))

    superuser.execute(more, [500])
    peak()
    small = least()
    superuser.execute(more, [4500])
    assert least() < small * 1.3


# --- who may ask ---


def test_session_of_one_client_proves_nothing(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session, pytest.raises(TenancyError, match="over all clients"):
        check(session)  # type: ignore[arg-type]  # the mistake


def test_async_session_finds_the_same(db: Database, client_id: UUID, superuser: psycopg.Connection[Any]) -> None:
    fill(db, client_id)
    break_(superuser, CASES[0], client_id)

    async def in_loop() -> list[Violation]:
        async with db.async_system_session(reason="test") as session:
            violations = await session.run_sync(check)
        await db.aclose()
        return violations

    violations = asyncio.run(in_loop())
    assert [violation.invariant for violation in violations] == ["message_conversation"]
    assert violations == found(db)


def test_rows_that_could_be_hidden_are_not_taken_for_right(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    fill(db, client_id)
    superuser.execute("DROP POLICY kestra_system ON chat_messages")
    with pytest.raises(VerificationFailed, match="chat_messages"):
        found(db)


# --- the command ---


@pytest.fixture
def verify(database_url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("KESTRA_DATABASE_URL", database_url)

    def verify(*options: str) -> tuple[int, str, str]:
        code = cli.main(["fixtures", "verify", *options])
        return code, *capfd.readouterr()

    return verify


def test_command_finds_nothing_in_a_clean_database(verify: Any, db: Database, client_id: UUID) -> None:
    fill(db, client_id)
    assert verify("--complete") == (0, "The rows are such as the data access layer leaves them.\n", "")


def test_command_fails_with_a_line_for_each_invariant(
    verify: Any, db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    fill(db, client_id)
    rows = break_(superuser, Case([new("message_conversation", "'x\ny'", "user", 0)]), client_id)
    break_(
        superuser,
        conversation("last_read_message_id", "plain", "last_read_message_id = last_message_id + 1"),
        client_id,
    )
    for options in ((), ("--adopted",)):
        code, out, err = verify(*options)
        head, *lines = err.splitlines()
        assert (code, out, head) == (1, "", "kestra: Rows are not such as the data access layer leaves them:")
        message_id = rows["message_conversation"][0].message_id
        assert lines == [
            (
                "- message_conversation: Every chat with messages has a conversation. "
                f"Not so in 1 row: client {client_id} chat 'x\\ny' message {message_id}"
            ),
            (
                "- last_read_message_id (adopted): Nothing is read beyond the newest message. "
                f"Not so in 1 row: client {client_id} chat 'plain'"
            ),
        ]


def test_command_lets_pass_what_is_said_to_be_adopted_and_shows_it(
    verify: Any, db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    fill(db, client_id)
    break_(
        superuser,
        conversation("last_read_message_id", "plain", "last_read_message_id = last_message_id + 1"),
        client_id,
    )
    assert verify()[0] == 1
    code, out, err = verify("--adopted")
    assert (code, err) == (0, "")
    assert out.startswith("last_read_message_id (adopted): ")


def test_command_takes_messages_that_are_gone_for_purged_unless_the_database_is_complete(
    verify: Any, db: Database, client_id: UUID
) -> None:
    fill(db, client_id, purged=True)
    assert verify()[0] == 0
    assert verify("--complete")[0] == 1


def test_command_wants_the_database_at_head(
    empty_database: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    migrate.upgrade(empty_database, "0003")
    monkeypatch.setenv("KESTRA_DATABASE_URL", empty_database)
    assert cli.main(["fixtures", "verify"]) == 1
    assert "is at revision 0003" in capfd.readouterr().err
