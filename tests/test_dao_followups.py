"""Follow-ups: what is due, who sends it, and what becomes of the conversation."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import bindparam, func, insert, select, update

from kestra import ActiveConversation, ChatMessage, Client, Database
from kestra.dao import conversations, followups, messages
from kestra.dao.followups import Claim, Policy
from kestra.dao.locking import lock_key
from kestra.errors import ClaimLost, InvalidToolsConfig, InvalidValue, TenancyError
from kestra.tools_config import FollowUpStage, ToolsConfig
from tests.concurrency import PATIENCE, at_once, outcomes_at_once, until_waiting
from tests.observing import Sent, explain_prepared, nodes, statements_sent

NOW = datetime(2024, 3, 12, 15, 0, tzinfo=UTC)  # noon in America/Sao_Paulo
MINUTE = timedelta(minutes=1)
TICK = timedelta(microseconds=1)
LEASE = timedelta(minutes=5)
DELAYS = [30, 60, 120, 240, 480]
WORKERS = 12


def document(**followup: Any) -> dict[str, Any]:
    stages = [{"delay_minutes": delay, "prompt": f"Retome {n}", "type": "text"} for n, delay in enumerate(DELAYS)]
    return {"followup": {"active": True, "stages": stages, **followup}}


def policy(config: Mapping[str, Any]) -> Policy:
    return Policy.of(ToolsConfig.model_validate(config))


def configure(db: Database, client_id: UUID, config: Mapping[str, Any]) -> None:
    with db.system_session(reason="test data") as session:
        session.execute(update(Client).where(Client.id == client_id).values(tools_config=config))


def converse(db: Database, client_id: UUID, *chats: Mapping[str, Any]) -> None:
    """Conversations in which the assistant spoke last, 30 minutes ago, if nothing else is said."""
    usual = {
        "client_id": client_id,
        "chat_id": "1",
        "status": "active",
        "followup_stage": 0,
        "last_role": "assistant",
        "last_message_at": NOW - 30 * MINUTE,
        "last_user_message_at": NOW - 31 * MINUTE,
        "paused_until": None,
        "claim_token": None,
        "claimed_until": None,
        "last_context": None,
        "last_message_id": None,
        "last_user_message_id": None,
    }
    with db.system_session(reason="test data") as session:
        session.execute(insert(ActiveConversation), [{**usual, **chat} for chat in chats or ({},)])


@pytest.fixture
def sender(db: Database, client_id: UUID) -> UUID:
    """A client whose first stage is due after 30 minutes, whatever the time of day."""
    configure(db, client_id, document())
    return client_id


def claim(db: Database, client_id: UUID, *, limit: int = 10, now: datetime | None = NOW, **options: Any) -> list[Claim]:
    with db.tenant_session(client_id) as session:
        return followups.claim(session, limit=limit, now=now, **{"lease": LEASE, **options})


def claim_one(db: Database, client_id: UUID, **options: Any) -> Claim:
    (claimed,) = claim(db, client_id, **options)
    return claimed


def complete(db: Database, client_id: UUID, claimed: Claim, **options: Any) -> messages.Recorded:
    with db.tenant_session(client_id) as session:
        return followups.complete(session, claim=claimed, **{"content": "oi?", "now": NOW, **options})


def record(db: Database, client_id: UUID, **options: Any) -> messages.Recorded:
    with db.tenant_session(client_id) as session:
        return messages.record(session, **{"chat_id": "1", "content": "oi", "now": NOW, **options})


def due_clients(db: Database, *, now: datetime | None = NOW, **options: Any) -> list[UUID]:
    with db.system_session(reason="follow-up sweep") as session:
        return followups.clients_due(session, now=now, **options)


def stored(db: Database, client_id: UUID, chat_id: str = "1") -> ActiveConversation:
    with db.tenant_session(client_id) as session:
        return session.get_one(ActiveConversation, (chat_id, client_id))


def said(db: Database, client_id: UUID, chat_id: str = "1") -> list[tuple[str, str | None]]:
    with db.tenant_session(client_id) as session:
        of_chat = select(ChatMessage.role, ChatMessage.content).where(ChatMessage.chat_id == chat_id)
        return [(role, content) for role, content in session.execute(of_chat.order_by(ChatMessage.id))]


# --- the policy ---


def test_policy_has_the_stages_that_have_a_delay() -> None:
    stages = [{"delay_minutes": 30}, {"prompt": "sem prazo"}, {"delay_minutes": None}, {"delay_minutes": 0}]
    assert policy(document(stages=stages)).silent_since(NOW) == {3: NOW, 0: NOW - 30 * MINUTE}


def test_policy_begins_with_the_last_stage() -> None:
    assert list(policy(document()).silent_since(NOW)) == [4, 3, 2, 1, 0]


def test_policy_ignores_a_sixth_stage() -> None:
    assert set(policy(document(stages=[{"delay_minutes": n} for n in range(7)])).steps) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("minutes", [10**10, 10**12, 10**30])
def test_delay_beyond_the_calendar_is_never_over(minutes: int) -> None:
    stages = [{"delay_minutes": minutes}, {"delay_minutes": 1}]
    assert policy(document(stages=stages)).silent_since(NOW) == {1: NOW - MINUTE}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"followup": None},
        {"followup": {}},
        {"followup": {"active": True}},
        {"followup": {"active": True, "stages": None}},
        {"followup": {"active": True, "stages": []}},
        document(active=False),
        document(active=None),
        document() | {"ai_active": False},
    ],
)
def test_policy_without_active_follow_ups_sends_nothing(config: dict[str, Any]) -> None:
    assert policy(config).silent_since(NOW) == {}


@pytest.mark.parametrize("more", [{}, {"ai_active": True}, {"ai_active": None}])
def test_assistant_that_is_not_switched_off_is_on(more: dict[str, Any]) -> None:
    assert policy(document() | more).silent_since(NOW)


def at(time: str, zone: str = "-03:00") -> datetime:
    return datetime.fromisoformat(f"2024-03-12T{time}{zone}")


@pytest.mark.parametrize(
    ("hours", "allowed", "refused"),
    [
        ({"start": "08:00", "end": "20:00"}, ["08:00", "19:59:59.999999"], ["07:59:59.999999", "20:00", "00:00"]),
        ({"start": "8:00", "end": "8:00:30"}, ["08:00:29.999999"], ["08:00:30", "08:01"]),
        (
            {"start": "22:00", "end": "06:00"},
            ["22:00", "23:59:59", "00:00", "05:59:59"],
            ["06:00", "12:00", "21:59:59"],
        ),
        ({"start": "08:00", "end": "08:00"}, [], ["00:00", "07:59:59", "08:00", "20:00"]),
        ({"start": "18:00", "end": "24:00"}, ["18:00", "23:59:59.999999"], ["00:00", "17:59:59"]),
        ({"start": "", "end": "08:00"}, ["00:00", "07:59:59"], ["08:00", "23:59:59"]),
        ({"start": "18:00", "end": ""}, ["18:00", "23:59:59.999999"], ["17:59:59", "00:00"]),
        ({"start": None, "end": None}, ["00:00", "12:00", "23:59:59.999999"], []),
        ({}, ["00:00", "12:00", "23:59:59.999999"], []),
        ({"start": "", "end": "00:00"}, [], ["00:00", "12:00"]),
    ],
)
def test_hours_hold_from_the_start_until_before_the_end(
    hours: dict[str, Any], allowed: list[str], refused: list[str]
) -> None:
    subject = policy(document(allowed_hours={"enabled": True, **hours}))
    assert [time for time in allowed + refused if subject.allows(at(time))] == allowed


@pytest.mark.parametrize("enabled", [{}, {"enabled": None}, {"enabled": False}])
def test_hours_that_are_not_enabled_allow_everything(enabled: dict[str, Any]) -> None:
    subject = policy(document(allowed_hours={**enabled, "start": "08:00", "end": "08:00"}))
    assert subject.allows(at("03:00"))
    assert policy(document(allowed_hours=None)).allows(at("03:00"))


def test_hours_are_those_of_the_clients_zone() -> None:
    hours = document(allowed_hours={"enabled": True, "start": "08:00", "end": "20:00"})
    assert policy(hours).allows(at("08:00", "-03:00"))
    assert not policy(hours).allows(at("08:00", "+00:00"))
    manaus = policy(hours | {"timezone": "America/Manaus"})
    assert manaus.allows(at("08:00", "-04:00"))
    assert not manaus.allows(at("08:00", "-03:00"))


def test_nothing_may_be_sent_outside_the_hours() -> None:
    subject = policy(document(allowed_hours={"enabled": True, "start": "08:00", "end": "20:00"}))
    assert subject.silent_since(at("19:59"))
    assert subject.silent_since(at("20:00")) == {}


# --- what is due ---

META = {"whatsapp": {"provider": "meta"}}
OPEN = NOW - timedelta(hours=24) + TICK

DUE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exactly the delay": ({}, {}),
    "the assistant's message arrived last": ({}, {"last_message_id": 8, "last_user_message_id": 7}),
    "long ago": ({}, {"last_message_at": NOW - timedelta(days=400)}),
    "exactly the delay of a later stage": ({}, {"followup_stage": 4, "last_message_at": NOW - 480 * MINUTE}),
    "lease that has just ended": ({}, {"claim_token": uuid4(), "claimed_until": NOW}),
    "pause that has just ended": ({}, {"paused_until": NOW}),
    "window closed where nobody minds": ({}, {"last_user_message_at": NOW - timedelta(hours=24)}),
    "never heard where nobody minds": ({}, {"last_user_message_at": None}),
    "window still open": (META, {"last_user_message_at": OPEN}),
}

NOT_DUE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "finished": ({}, {"status": "finished"}),
    "end customer spoke last": ({}, {"last_role": "user"}),
    "an answer arrived that was sent before": ({}, {"last_message_id": 7, "last_user_message_id": 8}),
    "system spoke last": ({}, {"last_role": "system"}),
    "nobody has spoken": ({}, {"last_role": None}),
    "stage 5": ({}, {"followup_stage": 5, "last_message_at": NOW - timedelta(days=9)}),
    "past the last stage": (
        document(stages=[{"delay_minutes": 1}]),
        {"followup_stage": 1, "last_message_at": NOW - timedelta(days=9)},
    ),
    "stage without a delay": (document(stages=[{"prompt": "sem prazo"}]), {}),
    "too recent": ({}, {"last_message_at": NOW - 30 * MINUTE + TICK}),
    "too recent for its stage": ({}, {"followup_stage": 4, "last_message_at": NOW - 480 * MINUTE + TICK}),
    "live lease": ({}, {"claim_token": uuid4(), "claimed_until": NOW + TICK}),
    "paused": ({}, {"paused_until": NOW + TICK}),
    "assistant switched off": ({"ai_active": False}, {}),
    "follow-ups switched off": (document(active=False), {}),
    "outside the hours": (document(allowed_hours={"enabled": True, "start": "13:00", "end": "20:00"}), {}),
    "window closed": (META, {"last_user_message_at": NOW - timedelta(hours=24)}),
    "window never open": (META, {"last_user_message_at": None}),
    "window closed for all": (META, {"last_message_at": OPEN - TICK, "last_user_message_at": OPEN}),
}


@pytest.mark.parametrize(("config", "chat"), DUE.values(), ids=DUE)
def test_due(db: Database, client_id: UUID, config: dict[str, Any], chat: dict[str, Any]) -> None:
    configure(db, client_id, document() | config)
    converse(db, client_id, chat)
    assert due_clients(db) == [client_id]
    claimed = claim_one(db, client_id)
    assert (claimed.chat_id, claimed.until) == ("1", NOW + LEASE)
    assert due_clients(db) == claim(db, client_id) == []


@pytest.mark.parametrize(("config", "chat"), NOT_DUE.values(), ids=NOT_DUE)
def test_not_due(db: Database, client_id: UUID, config: dict[str, Any], chat: dict[str, Any]) -> None:
    configure(db, client_id, document() | config)
    converse(db, client_id, chat)
    before = stored(db, client_id)
    assert due_clients(db) == claim(db, client_id) == []
    assert stored(db, client_id).claim_token == before.claim_token


def test_clocks_are_the_databases(db: Database, sender: UUID) -> None:
    with db.system_session(reason="test data") as session:
        now = session.scalars(select(func.now())).one()
    converse(
        db,
        sender,
        {"last_message_at": now - 30 * MINUTE},
        {"chat_id": "2", "last_message_at": now - 29 * MINUTE},
    )
    assert due_clients(db, now=None) == [sender]
    claimed = claim_one(db, sender, now=None)
    assert claimed.chat_id == "1"
    with db.tenant_session(sender) as session:
        renewed = followups.renew(session, claim=claimed, lease=2 * LEASE)
        assert renewed.until >= claimed.until + LEASE
    recorded = complete(db, sender, renewed, now=None)
    assert now <= recorded.conversation.last_message_at <= renewed.until - 2 * LEASE + timedelta(hours=1)


# --- which clients ---


@pytest.fixture
def many_clients(db: Database) -> list[UUID]:
    with db.system_session(reason="test data") as session:
        rows = [Client(name="C", token=f"token-{n}", tools_config=document()) for n in range(5)]
        session.add_all(rows)
        session.flush()
        return [row.id for row in rows]


def test_client_that_has_waited_longest_comes_first_and_each_once(db: Database, many_clients: list[UUID]) -> None:
    # By when it became due, not by when somebody spoke: a later stage has a longer delay.
    overdue = [(3, 0), (9, 1), (1, 0), (7, 4), (5, 2)]
    for owner, (minutes, stage) in zip(many_clients, overdue, strict=True):
        since = NOW - (DELAYS[stage] + minutes) * MINUTE
        converse(
            db,
            owner,
            *({"chat_id": str(n), "followup_stage": stage, "last_message_at": since + n * TICK} for n in range(3)),
        )
    expected = [many_clients[n] for n in (1, 3, 4, 0, 2)]
    assert due_clients(db) == expected
    assert due_clients(db, limit=2) == expected[:2]


def test_one_clients_backlog_hides_no_other(db: Database, many_clients: list[UUID]) -> None:
    old = NOW - timedelta(days=1)
    converse(db, many_clients[0], *({"chat_id": str(n), "last_message_at": old} for n in range(500)))
    converse(db, many_clients[1])
    assert due_clients(db, limit=2) == many_clients[:2]


def test_invalid_document_is_skipped_and_logged_without_its_text(
    db: Database, superuser_url: str, many_clients: list[UUID], caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = many_clients[:2]
    for owner in (broken, sound):
        converse(db, owner)
    with psycopg.connect(superuser_url) as connection:
        for owner, wrong in (
            (broken, '{"followup": {"active": true, "stages": "SECRET"}}'),
            (many_clients[2], '{"followup": {"active": false, "stages": "SECRET"}}'),
        ):
            connection.execute("UPDATE clients SET tools_config = %s WHERE id = %s", [wrong, owner])
    with caplog.at_level(logging.WARNING, "kestra.dao.followups"):
        assert due_clients(db) == [sound]
    (line,) = caplog.messages
    assert str(broken) in line
    assert "InvalidToolsConfig" in line
    assert "SECRET" not in caplog.text
    with pytest.raises(InvalidToolsConfig):
        claim(db, broken)


def test_hours_and_delays_are_of_one_instant(db: Database, many_clients: list[UUID]) -> None:
    early, late = many_clients[:2]
    configure(db, early, document(allowed_hours={"enabled": True, "start": "12:00", "end": "12:01"}))
    configure(db, late, document(allowed_hours={"enabled": True, "start": "12:01", "end": "12:02"}))
    for owner in (early, late):
        converse(db, owner)
    assert [due_clients(db, now=NOW + offset) for offset in (-TICK, 0 * TICK, MINUTE, 2 * MINUTE)] == [
        [],
        [early],
        [late],
        [],
    ]


def test_no_client_is_no_error(db: Database, sender: UUID) -> None:
    assert due_clients(db) == []
    assert claim(db, uuid4()) == []
    assert claim(db, sender) == []


# --- claims ---


def test_claim_says_what_to_send_and_where_the_conversation_stands(db: Database, sender: UUID) -> None:
    converse(db, sender, {"followup_stage": 1, "last_message_at": NOW - 60 * MINUTE, "last_context": "Quer trocar."})
    claimed = claim_one(db, sender)
    assert claimed.stage == 1
    assert claimed.step == FollowUpStage(delay_minutes=60, prompt="Retome 1", type="text")
    assert claimed.context == "Quer trocar."
    assert claimed.state == conversations.ConversationState(
        "1", "active", 1, "assistant", NOW - 60 * MINUTE, None, NOW - 31 * MINUTE, None, None, None
    )
    row = stored(db, sender)
    assert (row.claim_token, row.claimed_until) == (claimed.token, claimed.until)


def test_claim_shows_neither_text_nor_token(db: Database, sender: UUID) -> None:
    converse(db, sender, {"last_context": "Quer trocar."})
    claimed = claim_one(db, sender)
    for hidden in ("trocar", "Retome", str(claimed.token)):
        assert hidden not in repr(claimed)


def test_each_stage_gives_those_that_are_silent_for_longest_the_last_stage_first(db: Database, sender: UUID) -> None:
    chats = [
        {"chat_id": f"{stage}-{n}", "followup_stage": stage, "last_message_at": NOW - timedelta(days=2) - n * MINUTE}
        for stage in (0, 3, 1)
        for n in (1, 3, 2)
    ]
    converse(db, sender, *chats)
    assert [claimed.chat_id for claimed in claim(db, sender, limit=5)] == ["3-3", "3-2", "3-1", "1-3", "1-2"]
    assert [claimed.chat_id for claimed in claim(db, sender, limit=5)] == ["1-1", "0-3", "0-2", "0-1"]


def test_every_call_has_a_token_of_its_own(db: Database, sender: UUID) -> None:
    converse(db, sender, *({"chat_id": str(n)} for n in range(4)))
    assert len({claimed.token for _ in range(2) for claimed in claim(db, sender, limit=2)}) == 2


@pytest.mark.parametrize("limit", [0, -1, 501])
def test_limit_is_bounded(db: Database, sender: UUID, limit: int) -> None:
    with pytest.raises(InvalidValue, match="limit"):
        claim(db, sender, limit=limit)
    with pytest.raises(InvalidValue, match="limit"):
        due_clients(db, limit=limit)


@pytest.mark.parametrize("lease", [timedelta(), -TICK, timedelta(days=1) + TICK])
def test_lease_is_bounded(db: Database, sender: UUID, lease: timedelta) -> None:
    converse(db, sender)
    with pytest.raises(InvalidValue, match="lease"):
        claim(db, sender, lease=lease)
    claimed = claim_one(db, sender)
    with db.tenant_session(sender) as session, pytest.raises(InvalidValue, match="lease"):
        followups.renew(session, claim=claimed, lease=lease, now=NOW)


def test_lease_may_last_from_a_moment_to_a_day(db: Database, sender: UUID) -> None:
    converse(db, sender, {}, {"chat_id": "2"})
    assert claim_one(db, sender, limit=1, lease=TICK).until == NOW + TICK
    assert claim_one(db, sender, limit=1, lease=timedelta(days=1)).until == NOW + timedelta(days=1)


NAIVE = datetime(2024, 3, 12, 15, 0)  # noqa: DTZ001  # what is refused


def test_naive_now_is_refused(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    with pytest.raises(InvalidValue, match="naive"):
        due_clients(db, now=NAIVE)
    with pytest.raises(InvalidValue, match="naive"):
        claim(db, sender, now=NAIVE)
    with db.tenant_session(sender) as session, pytest.raises(InvalidValue, match="naive"):
        followups.renew(session, claim=claimed, lease=LEASE, now=NAIVE)
    with pytest.raises(InvalidValue, match="naive"):
        complete(db, sender, claimed, now=NAIVE)
    assert said(db, sender) == []


def test_each_function_takes_its_kind_of_session_only(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    wrong: Any
    with db.system_session(reason="the wrong kind") as wrong:
        for call in (
            lambda: followups.claim(wrong, limit=1, lease=LEASE),
            lambda: followups.renew(wrong, claim=claimed, lease=LEASE),
            lambda: followups.release(wrong, claim=claimed),
            lambda: followups.complete(wrong, claim=claimed, content="oi?"),
        ):
            with pytest.raises(TenancyError):
                call()
    with db.tenant_session(sender) as wrong, pytest.raises(TenancyError):
        followups.clients_due(wrong)


# --- many workers ---


def test_twelve_workers_claim_each_of_2000_conversations_once(
    db: Database, sender: UUID, other_client_id: UUID
) -> None:
    configure(db, other_client_id, document())
    for owner in (sender, other_client_id):
        converse(
            db,
            owner,
            *(
                {"chat_id": str(n), "followup_stage": n % 5, "last_message_at": NOW - (480 + n % 97) * MINUTE}
                for n in range(2000)
            ),
        )
    limit = 23

    def worker() -> list[list[Claim]]:
        batches = []
        while batch := claim(db, sender, limit=limit):
            batches.append(batch)
        return batches

    rounds = at_once(*[worker] * WORKERS)
    batches: list[list[Claim]] = [batch for batches in rounds for batch in batches]
    claims = [claimed for batch in batches for claimed in batch]
    assert len(claims) == len({claimed.chat_id for claimed in claims}) == 2000
    assert max(map(len, batches)) <= limit
    assert len({claimed.token for claimed in claims}) == len(batches)
    with db.tenant_session(sender) as session:
        kept = session.execute(select(ActiveConversation.chat_id, ActiveConversation.claim_token)).all()
    assert {chat_id: token for chat_id, token in kept} == {claimed.chat_id: claimed.token for claimed in claims}  # noqa: C416  # rows
    with db.tenant_session(other_client_id) as session:
        assert session.scalars(select(func.count(ActiveConversation.claim_token))).one() == 0


def test_claim_passes_locked_conversations_by_without_waiting(db: Database, sender: UUID) -> None:
    converse(db, sender, *({"chat_id": str(n)} for n in range(10)))
    with ThreadPoolExecutor(1) as pool, db.tenant_session(sender) as session:
        locked = set(session.scalars(select(ActiveConversation.chat_id).limit(6).with_for_update()))
        claims = pool.submit(claim, db, sender).result(PATIENCE)
    assert {claimed.chat_id for claimed in claims} == {str(n) for n in range(10)} - locked
    assert {claimed.chat_id for claimed in claim(db, sender)} == locked


def test_claim_passes_a_conversation_by_that_a_webhook_is_writing(db: Database, sender: UUID) -> None:
    converse(db, sender)
    with ThreadPoolExecutor(1) as pool, db.tenant_session(sender) as session:
        messages.record(session, chat_id="1", role="user", content="oi", now=NOW)
        assert pool.submit(claim, db, sender).result(PATIENCE) == []


def test_claim_locks_no_more_than_it_takes(db: Database, sender: UUID) -> None:
    converse(
        db,
        sender,
        *(
            {"chat_id": str(n), "followup_stage": n % 5, "last_message_at": NOW - (480 + n) * MINUTE}
            for n in range(100)
        ),
    )
    with db.tenant_session(sender) as one, db.tenant_session(sender) as another:
        claims = followups.claim(one, limit=7, lease=LEASE, now=NOW)
        free = another.scalars(select(ActiveConversation.chat_id).with_for_update(skip_locked=True)).all()
    assert len(claims) == 7
    assert {claimed.chat_id for claimed in claims} | set(free) == {str(n) for n in range(100)}
    assert len(free) == 93


def test_conversation_that_changes_while_it_is_claimed_is_looked_at_again(db: Database, sender: UUID) -> None:
    """Each worker sees what was committed when it began; who got there first is seen in the row itself."""
    converse(db, sender)
    for _ in range(30):
        with db.tenant_session(sender) as session:
            session.execute(update(ActiveConversation).values(claim_token=None, claimed_until=None))
        results = at_once(*[partial(claim, db, sender)] * 4)
        assert sum(map(len, results)) == 1


# --- renew and release ---


def renew(db: Database, client_id: UUID, claimed: Claim, **options: Any) -> Claim:
    with db.tenant_session(client_id) as session:
        return followups.renew(session, claim=claimed, **{"lease": LEASE, "now": NOW, **options})


def test_renewed_claim_lasts_from_now_on_and_says_what_is_new(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    with db.tenant_session(sender) as session:
        session.execute(update(ActiveConversation).values(last_context="Quer trocar.", last_read_message_id=7))
    renewed = renew(db, sender, claimed, lease=2 * LEASE, now=NOW + MINUTE)
    assert renewed.until == stored(db, sender).claimed_until == NOW + MINUTE + 2 * LEASE
    assert (renewed.context, renewed.state.last_read_message_id) == ("Quer trocar.", 7)
    assert (renewed.chat_id, renewed.token, renewed.stage, renewed.step) == ("1", claimed.token, 0, claimed.step)
    assert claim(db, sender, now=claimed.until) == []
    assert complete(db, sender, claimed, now=renewed.until - TICK).inserted


LOST: dict[str, dict[str, Any]] = {
    "ended": {"claimed_until": NOW},
    "somebody else's": {"claim_token": uuid4()},
    "released": {"claim_token": None, "claimed_until": None},
    "finished": {"status": "finished"},
    "answered": {"last_role": "user"},
    "answered in the same second": {"last_message_id": 7, "last_user_message_id": 8},
}


@pytest.mark.parametrize("change", [*LOST.values(), {"paused_until": NOW + TICK}], ids=[*LOST, "paused"])
def test_renewing_a_claim_that_is_over_is_refused(db: Database, sender: UUID, change: dict[str, Any]) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    with db.tenant_session(sender) as session:
        session.execute(update(ActiveConversation).values(**change))
    before = stored(db, sender)
    with pytest.raises(ClaimLost) as lost:
        renew(db, sender, claimed)
    assert lost.value.chat_id == "1"
    assert stored(db, sender).claimed_until == before.claimed_until


CHANGED: dict[str, dict[str, Any]] = {
    "follow-ups switched off": document(active=False),
    "assistant switched off": {**document(), "ai_active": False},
    "stage gone": document(stages=[]),
    "hours over": document(allowed_hours={"enabled": True, "start": "00:00", "end": "00:00"}),
    "window closed": {**document(), "whatsapp": {"provider": "meta"}},
}


@pytest.mark.parametrize("config", CHANGED.values(), ids=CHANGED)
def test_renewing_what_the_policy_forbids_by_now_is_refused(db: Database, sender: UUID, config: dict[str, Any]) -> None:
    converse(db, sender, {"last_user_message_at": NOW - timedelta(hours=24)})
    claimed = claim_one(db, sender)
    configure(db, sender, config)
    with db.tenant_session(sender) as session, pytest.raises(ClaimLost):  # the session commits
        followups.renew(session, claim=claimed, lease=2 * LEASE, now=NOW)
    assert stored(db, sender).claimed_until == NOW + LEASE, "nothing was written"
    assert complete(db, sender, claimed).inserted, "what was sent is completed"


def test_renewed_claim_has_the_stage_as_it_is_configured_by_now(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    configure(db, sender, document(stages=[{"delay_minutes": 5, "prompt": "outro"}]))
    assert renew(db, sender, claimed).step.prompt == "outro"


def test_renewed_lease_counts_from_after_the_wait_for_the_chat(
    db: Database, sender: UUID, superuser: psycopg.Connection[Any]
) -> None:
    """A lease that began before the wait could be over when it is had."""
    converse(db, sender)
    now = datetime.now(UTC)
    with db.tenant_session(sender) as session:
        session.execute(update(ActiveConversation).values(last_message_at=now - 60 * MINUTE))
    claimed = claim_one(db, sender, now=None)
    with ThreadPoolExecutor(1) as pool:
        with db.tenant_session(sender) as session:
            messages.record(session, chat_id="1", role="system", content="x", sent_at=now - 99 * MINUTE)
            renewing = pool.submit(renew, db, sender, claimed, now=None)
            until_waiting(superuser, renewing)
            released = session.scalars(select(func.clock_timestamp())).one()
        assert renewing.result(timeout=30).until >= released + LEASE


def test_answer_of_the_same_second_is_an_answer(db: Database, sender: UUID) -> None:
    """Providers count in seconds: what answers a message can be sent before it, by its time."""
    record(db, sender, role="user", sent_at=NOW - 31 * MINUTE)
    record(db, sender, role="assistant", sent_at=NOW - 30 * MINUTE + timedelta(milliseconds=300))
    answered = record(db, sender, role="user", sent_at=NOW - 30 * MINUTE)
    assert answered.conversation.last_role == "assistant"
    assert answered.conversation.awaits_answer
    later = NOW + 10 * MINUTE
    assert claim(db, sender, now=later) == []
    assert due_clients(db, now=later) == []


def test_client_whose_document_is_too_deep_hides_no_other(
    db: Database, sender: UUID, other_client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    superuser.execute(
        "UPDATE clients SET tools_config = (%s)::jsonb WHERE id = %s",
        ['{"followup": {"active": true}, "x": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "}", other_client_id],
    )
    converse(db, sender)
    assert due_clients(db) == [sender]


def test_pause_that_has_just_ended_is_none(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    with db.tenant_session(sender) as session:
        session.execute(update(ActiveConversation).values(paused_until=NOW))
    assert renew(db, sender, claimed).until == NOW + LEASE


def test_released_conversation_is_free_at_once(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    with db.tenant_session(sender) as session:
        assert followups.release(session, claim=claimed)
    with db.tenant_session(sender) as session:
        assert not followups.release(session, claim=claimed)
    assert claim_one(db, sender).token != claimed.token


def test_releasing_what_somebody_else_has_changes_nothing(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    again = claim_one(db, sender, now=claimed.until)
    with db.tenant_session(sender) as session:
        assert not followups.release(session, claim=claimed)
    assert stored(db, sender).claim_token == again.token


def test_claim_is_of_one_conversation(db: Database, sender: UUID) -> None:
    """Conversations that were claimed together have one token."""
    converse(db, sender, *({"chat_id": str(n)} for n in range(3)))
    first, second, _third = claim(db, sender)
    renew(db, sender, first, lease=2 * LEASE)
    with db.tenant_session(sender) as session:
        assert followups.release(session, claim=first)
    complete(db, sender, second)
    with db.tenant_session(sender) as session:
        rows = session.scalars(select(ActiveConversation).order_by(ActiveConversation.chat_id)).all()
    mine = {row.chat_id: (row.followup_stage, row.claimed_until) for row in rows}
    left = ({"0", "1", "2"} - {first.chat_id, second.chat_id}).pop()
    assert mine == {first.chat_id: (0, None), second.chat_id: (1, None), left: (0, NOW + LEASE)}


# --- complete ---


def test_completing_advances_the_stage_and_records_one_message(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    sent = complete(
        db, sender, claimed, content=None, media_url="https://cdn/a.ogg", provider_message_id="w1", now=NOW + MINUTE
    )
    row = stored(db, sender)
    assert sent.inserted
    assert sent.conversation.followup_stage == row.followup_stage == 1
    assert (row.claim_token, row.claimed_until, row.status, row.last_role) == (None, None, "active", "assistant")
    assert (row.last_message_id, row.last_message_at) == (sent.message_id, NOW + MINUTE)
    with db.tenant_session(sender) as session:
        message = session.get_one(ChatMessage, (sender, sent.message_id))
    assert (message.role, message.content, message.media_url) == ("assistant", None, "https://cdn/a.ogg")
    assert (message.chat_id, message.provider_message_id, message.created_at) == ("1", "w1", NOW + MINUTE)


def test_reply_between_sending_and_completing_is_newer_than_what_was_sent(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    complete(db, sender, claimed, sent_at=NOW + MINUTE, now=NOW + 3 * MINUTE)
    record(db, sender, role="user", content="Oi!", sent_at=NOW + 2 * MINUTE, now=NOW + 4 * MINUTE)
    row = stored(db, sender)
    assert (row.last_role, row.last_message_at, row.followup_stage) == ("user", NOW + 2 * MINUTE, 0)


def test_completing_is_undone_with_its_transaction(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    with db.tenant_session(sender) as session:
        followups.complete(session, claim=claimed, content="oi?", now=NOW)
        session.rollback()
    assert said(db, sender) == []
    assert (stored(db, sender).followup_stage, stored(db, sender).claim_token) == (0, claimed.token)
    assert complete(db, sender, claimed).inserted


@pytest.mark.parametrize("change", LOST.values(), ids=LOST)
def test_completing_a_claim_that_is_over_writes_nothing(db: Database, sender: UUID, change: dict[str, Any]) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    with db.tenant_session(sender) as session:
        session.execute(update(ActiveConversation).values(**change))
    before = stored(db, sender)
    with db.tenant_session(sender) as session, pytest.raises(ClaimLost) as lost:  # the session commits
        followups.complete(session, claim=claimed, content="oi?", now=NOW)
    after = stored(db, sender)
    assert lost.value.chat_id == "1"
    assert "oi?" not in str(lost.value)
    assert said(db, sender) == []
    for name in ("followup_stage", "claim_token", "claimed_until", "last_role", "last_message_at", "status"):
        assert getattr(after, name) == getattr(before, name)


def test_reply_in_between_ends_the_claim(db: Database, sender: UUID) -> None:
    converse(db, sender, {"followup_stage": 2, "last_message_at": NOW - 120 * MINUTE})
    claimed = claim_one(db, sender)
    record(db, sender, role="user", content="Desculpe a demora")
    with pytest.raises(ClaimLost):
        renew(db, sender, claimed)
    with pytest.raises(ClaimLost):
        complete(db, sender, claimed)
    assert said(db, sender) == [("user", "Desculpe a demora")]
    assert (stored(db, sender).followup_stage, stored(db, sender).last_role) == (0, "user")


def test_worker_whose_lease_ran_out_cannot_complete_what_another_has(db: Database, sender: UUID) -> None:
    converse(db, sender)
    slow = claim_one(db, sender)
    quick = claim_one(db, sender, now=slow.until)
    with pytest.raises(ClaimLost):
        complete(db, sender, slow, content="devagar", now=slow.until + MINUTE)
    assert complete(db, sender, quick, content="depressa", now=slow.until + MINUTE).inserted
    with pytest.raises(ClaimLost):
        complete(db, sender, slow, content="devagar", now=slow.until + MINUTE)
    assert said(db, sender) == [("assistant", "depressa")]
    assert stored(db, sender).followup_stage == 1


def test_lease_that_ran_out_cannot_complete_though_nobody_has_it(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    with pytest.raises(ClaimLost):
        complete(db, sender, claimed, now=claimed.until)
    assert complete(db, sender, claimed, now=claimed.until - TICK).inserted


def test_second_completion_is_refused(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    complete(db, sender, claimed)
    with pytest.raises(ClaimLost):
        complete(db, sender, claimed)
    assert said(db, sender) == [("assistant", "oi?")]
    assert stored(db, sender).followup_stage == 1


@pytest.mark.parametrize("content", ["", None, "a\0b"])
def test_message_that_cannot_be_stored_leaves_the_claim_alone(db: Database, sender: UUID, content: str | None) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    with db.tenant_session(sender) as session, pytest.raises(InvalidValue):  # the session commits
        followups.complete(session, claim=claimed, content=content, now=NOW)
    assert stored(db, sender).followup_stage == 0
    assert complete(db, sender, claimed).inserted


def test_echo_before_the_completion_stays_the_only_message(db: Database, sender: UUID) -> None:
    converse(db, sender)
    claimed = claim_one(db, sender)
    echo = record(db, sender, role="assistant", content="oi?", provider_message_id="w1")
    sent = complete(db, sender, claimed, provider_message_id="w1")
    assert (sent.message_id, sent.inserted, sent.conversation.followup_stage) == (echo.message_id, False, 1)
    assert said(db, sender) == [("assistant", "oi?")]
    assert (stored(db, sender).followup_stage, stored(db, sender).claim_token) == (1, None)


def test_echo_after_the_completion_stays_out(db: Database, sender: UUID) -> None:
    converse(db, sender)
    sent = complete(db, sender, claim_one(db, sender), provider_message_id="w1")
    echo = record(db, sender, role="assistant", content="oi?", provider_message_id="w1", now=NOW + MINUTE)
    assert (echo.message_id, echo.inserted) == (sent.message_id, False)
    assert stored(db, sender).followup_stage == 1


def test_chained_stage_follows_at_once(db: Database, client_id: UUID) -> None:
    stages = [{"delay_minutes": 30, "prompt": "texto"}, {"delay_minutes": 0, "prompt": "áudio"}]
    configure(db, client_id, document(stages=stages))
    converse(db, client_id, *({"chat_id": str(n)} for n in range(3)))
    first = claim_one(db, client_id, limit=1)
    complete(db, client_id, first)
    chained = claim_one(db, client_id, limit=1)
    assert (chained.chat_id, chained.stage, chained.step.prompt) == (first.chat_id, 1, "áudio")
    complete(db, client_id, chained)
    assert {claimed.chat_id for claimed in claim(db, client_id)} == {"0", "1", "2"} - {first.chat_id}


def test_next_stage_waits_for_its_own_delay(db: Database, sender: UUID) -> None:
    converse(db, sender)
    complete(db, sender, claim_one(db, sender))
    assert claim(db, sender, now=NOW + 60 * MINUTE - TICK) == []
    assert claim_one(db, sender, now=NOW + 60 * MINUTE).stage == 1


def test_conversation_gets_each_follow_up_once_and_then_no_more(db: Database, sender: UUID) -> None:
    converse(db, sender)
    now, stages = NOW, []
    for _ in range(8):
        for owner in due_clients(db, now=now):
            claimed = claim_one(db, owner, now=now)
            stages.append(claimed.stage)
            complete(db, owner, renew(db, owner, claimed, now=now), content=claimed.step.prompt, now=now)
        now += timedelta(days=1)
    assert stages == [0, 1, 2, 3, 4]
    assert [content for _, content in said(db, sender)] == [f"Retome {n}" for n in range(5)]
    assert stored(db, sender).followup_stage == 5


# --- at once ---


def test_of_two_workers_that_complete_at_once_one_does(db: Database, sender: UUID) -> None:
    converse(db, sender, *({"chat_id": str(n)} for n in range(20)))
    for claimed in claim(db, sender, limit=20):
        results = outcomes_at_once(*[partial(complete, db, sender, claimed)] * 2)
        assert sorted(type(result).__name__ for result in results) == ["ClaimLost", "Recorded"]
        assert said(db, sender, claimed.chat_id) == [("assistant", "oi?")]
        assert stored(db, sender, claimed.chat_id).followup_stage == 1


def test_reply_and_completion_at_once_end_in_one_of_two_ways(db: Database, sender: UUID) -> None:
    converse(db, sender, *({"chat_id": str(n), "last_message_at": NOW - 40 * MINUTE} for n in range(60)))
    claims = claim(db, sender, limit=60, now=None, lease=timedelta(hours=1))
    assert len(claims) == 60
    for claimed in claims:
        chat_id = claimed.chat_id
        completed, replied = outcomes_at_once(
            partial(complete, db, sender, claimed, now=None),
            partial(record, db, sender, chat_id=chat_id, role="user", now=None),
        )
        assert isinstance(replied, messages.Recorded)
        if isinstance(completed, ClaimLost):
            assert said(db, sender, chat_id) == [("user", "oi")]
        else:
            assert isinstance(completed, messages.Recorded)
            assert said(db, sender, chat_id) == [("assistant", "oi?"), ("user", "oi")]
        row = stored(db, sender, chat_id)
        assert (row.followup_stage, row.last_role, row.claim_token) == (0, "user", None)


def release(db: Database, client_id: UUID, claimed: Claim) -> bool:
    with db.tenant_session(client_id) as session:
        return followups.release(session, claim=claimed)


@pytest.mark.parametrize("step", [complete, renew, release])
def test_whoever_waits_for_the_chat_does_not_hold_its_row(
    db: Database, superuser: psycopg.Connection[Any], sender: UUID, step: Callable[[Database, UUID, Claim], object]
) -> None:
    """Whoever records into the chat has its lock and wants its row: the other way round they would wait for ever."""
    converse(db, sender)
    claimed = claim_one(db, sender)
    lock = select(func.pg_advisory_xact_lock(lock_key(bindparam("chat", claimed.chat_id))))
    with ThreadPoolExecutor(1) as pool:
        with db.tenant_session(sender) as session:
            session.execute(lock)
            waiting = pool.submit(step, db, sender, claimed)
            until_waiting(superuser, waiting, lock="advisory")
            assert session.scalars(select(ActiveConversation.chat_id).with_for_update(nowait=True)).all() == ["1"]
        assert waiting.result(PATIENCE)


# --- clients apart, and asyncio ---


def test_another_clients_conversation_is_neither_claimed_nor_changed(
    db: Database, sender: UUID, other_client_id: UUID
) -> None:
    configure(db, other_client_id, document(stages=[{"delay_minutes": 30, "prompt": "outra"}]))
    for owner in (sender, other_client_id):
        converse(db, owner)
    mine = claim_one(db, sender)
    assert stored(db, other_client_id).claim_token is None
    assert due_clients(db) == [other_client_id]
    theirs = claim_one(db, other_client_id)
    assert theirs.step.prompt == "outra"
    with pytest.raises(ClaimLost):
        renew(db, other_client_id, mine)
    with db.tenant_session(other_client_id) as session:
        assert not followups.release(session, claim=mine)
    with pytest.raises(ClaimLost):
        complete(db, other_client_id, mine)
    # Even with one token: a claim is the session's client's.
    with db.system_session(reason="test data") as system:
        system.execute(update(ActiveConversation).values(claim_token=mine.token))
    renew(db, sender, mine, lease=2 * LEASE)
    assert stored(db, other_client_id).claimed_until == theirs.until
    complete(db, sender, mine)
    with db.tenant_session(sender) as session:
        assert not followups.release(session, claim=mine)
    assert (stored(db, other_client_id).followup_stage, stored(db, other_client_id).claim_token) == (0, mine.token)
    assert said(db, other_client_id) == []


def test_async_sessions(database_url: str, db: Database, sender: UUID) -> None:
    converse(db, sender, {}, {"chat_id": "2"})

    async def worker() -> messages.Recorded:
        async with Database(database_url) as database:
            async with database.async_system_session(reason="follow-up sweep") as system:
                assert await system.run_sync(followups.clients_due, now=NOW) == [sender]
            async with database.async_tenant_session(sender) as session:
                first, second = await session.run_sync(followups.claim, limit=2, lease=LEASE, now=NOW)
            async with database.async_tenant_session(sender) as session:
                assert await session.run_sync(followups.release, claim=second)
                renewed = await session.run_sync(followups.renew, claim=first, lease=LEASE, now=NOW)
            async with database.async_tenant_session(sender) as session:
                return await session.run_sync(followups.complete, claim=renewed, content="oi?", now=NOW)

    assert asyncio.run(worker()).conversation.followup_stage == 1


# --- plans ---


@pytest.fixture
def crowd(db: Database, superuser: psycopg.Connection[Any], many_clients: list[UUID]) -> list[UUID]:
    """Five clients with 30,000 conversations each; of those the assistant waits in, half are too old for the window."""
    superuser.execute(
        """
        INSERT INTO active_conversations
            (client_id, chat_id, status, followup_stage, last_role, last_message_at, last_user_message_at)
        SELECT id, 'chat-' || n, CASE WHEN mod(n, 7) < 2 THEN 'active' ELSE 'finished' END, mod(n, 6),
               CASE mod(n, 5) WHEN 0 THEN 'user' ELSE 'assistant' END,
               %(now)s::timestamptz - age, %(now)s::timestamptz - age - interval '5 hours'
        FROM clients, generate_series(1, 30000) n,
             LATERAL (SELECT n * CASE WHEN n <= 15000 THEN interval '3 s' ELSE interval '1 minute' END AS age) ages
        """,
        {"now": NOW},
    )
    superuser.execute("VACUUM ANALYZE active_conversations")
    configure(db, many_clients[0], document() | META)
    return many_clients


def plan_of(superuser_url: str, role: str, client_id: UUID, sent: Sent, mode: str) -> list[dict[str, Any]]:
    """The nodes of the plan, after the statement was run and undone. A generic plan knows no parameter."""
    with psycopg.connect(superuser_url) as connection:
        for setting in (f"role = {role}", f"kestra.client_id = '{client_id}'", f"plan_cache_mode = force_{mode}_plan"):
            connection.execute(f"SET LOCAL {setting}")
        plan = explain_prepared(connection, sent, "ANALYZE", "TIMING OFF")
        connection.rollback()
    return list(nodes(plan))


def conversations_read(plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        node for node in plan if node.get("Relation Name") == "active_conversations" and "Scan" in node["Node Type"]
    ]


@pytest.mark.parametrize("mode", ["custom", "generic"])
@pytest.mark.parametrize("whose", [0, 1], ids=["window enforced", "window not enforced"])
def test_claim_walks_the_partial_index_and_reads_what_it_takes(
    db: Database, superuser_url: str, crowd: list[UUID], mode: str, whose: int
) -> None:
    with db.tenant_session(crowd[whose]) as session, statements_sent() as sent:
        claims = followups.claim(session, limit=10, lease=LEASE, now=NOW)
        session.rollback()
    assert len(claims) == 10
    _policy, statement = sent
    plan = plan_of(superuser_url, "kestra_tenant", crowd[whose], statement, mode)
    updated, picked = sorted(conversations_read(plan), key=lambda scan: scan["Index Name"], reverse=True)
    assert updated["Index Name"] == "pk_active_conversations"
    assert (picked["Node Type"], picked["Index Name"]) == ("Index Scan", "ix_active_conversations_due")
    for part in ("client_id =", "followup_stage =", "last_message_at <=", "ROW(followup_stage, last_message_at) >"):
        assert part in picked["Index Cond"]
    assert not {node["Node Type"] for node in plan} & {"Sort", "Incremental Sort"}
    (locking,) = [node for node in plan if node["Node Type"] == "LockRows"]
    assert locking["Actual Loops"] == 1
    assert locking["Actual Rows"] == 10
    # Those whose window has closed, the oldest, are not even read.
    assert picked.get("Rows Removed by Filter", 0) == 0


@pytest.mark.parametrize("mode", ["custom", "generic"])
def test_sweep_reads_the_partial_index_alone(db: Database, superuser_url: str, crowd: list[UUID], mode: str) -> None:
    with db.system_session(reason="follow-up sweep") as session, statements_sent() as sent:
        assert set(followups.clients_due(session, now=NOW)) == set(crowd)
    _documents, statement = sent
    plan = plan_of(superuser_url, "kestra_system", crowd[0], statement, mode)
    assert {node["Index Name"] for node in plan if "Index Name" in node} == {"ix_active_conversations_due"}
    assert "Seq Scan" not in {node["Node Type"] for node in plan}


def test_lease_and_completion_go_by_the_primary_key(db: Database, superuser_url: str, crowd: list[UUID]) -> None:
    claimed = claim(db, crowd[1], limit=1)[0]
    with db.tenant_session(crowd[1]) as session, statements_sent() as sent:
        followups.renew(session, claim=claimed, lease=LEASE, now=NOW)
        followups.complete(session, claim=claimed, content="oi?", now=NOW)
        session.rollback()
        followups_sent = [statement for statement in sent if statement.statement.startswith("WITH")][1:3]
    with db.tenant_session(crowd[1]) as session, statements_sent() as sent:
        followups.release(session, claim=claimed)
        session.rollback()
        followups_sent.append(sent[0])
    for statement in followups_sent:
        (scan,) = conversations_read(plan_of(superuser_url, "kestra_tenant", crowd[1], statement, "generic"))
        assert scan["Index Name"] == "pk_active_conversations"


def test_inactive_policy_costs_one_statement(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session, statements_sent() as sent:
        assert followups.claim(session, limit=1, lease=LEASE, now=NOW) == []
    assert len(sent) == 1
