"""Recording messages: once, in any order, one at a time or in batches, from many threads."""

import asyncio
import json
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from itertools import permutations
from threading import Event
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import delete, func, select, update

from kestra import ActiveConversation, ChatMessage, Database, TenantSession
from kestra.dao import messages
from kestra.dao.conversations import ConversationState
from kestra.dao.messages import IncomingMessage, Recorded
from kestra.errors import (
    ClientNotFound,
    ConversationNotFound,
    InvalidValue,
    KestraError,
    StatementFailed,
    TenancyError,
)
from kestra.models import Role
from tests.concurrency import PATIENCE, at_once, until_waiting
from tests.observing import shown, statements_sent

NOON: Final = datetime(2026, 3, 2, 12, tzinfo=UTC)


def at(minutes: float) -> datetime:
    return NOON + timedelta(minutes=minutes)


def said(minutes: float, role: Role = "user", *, chat_id: str = "chat", **parts: Any) -> IncomingMessage:
    return IncomingMessage(chat_id, role, sent_at=at(minutes), **{"content": f"{role} at {minutes}", **parts})


def record(session: TenantSession, message: IncomingMessage, **options: Any) -> Recorded:
    return messages.record(session, **asdict(message), **options)


def record_and_commit(db: Database, client_id: UUID, message: IncomingMessage) -> Recorded:
    with db.tenant_session(client_id) as session:
        return record(session, message)


def rows(db: Database, client_id: UUID) -> list[tuple[Any, ...]]:
    """Everything there is of a client's conversations and messages."""
    found: list[tuple[Any, ...]] = []
    with db.tenant_session(client_id) as session:
        for table in (ActiveConversation.__table__, ChatMessage.__table__):
            found += [tuple(row) for row in session.execute(select(*table.columns).order_by(*table.primary_key))]
    return found


def stored(db: Database, client_id: UUID) -> list[ChatMessage]:
    with db.tenant_session(client_id) as session:
        return list(session.scalars(select(ChatMessage).order_by(ChatMessage.created_at, ChatMessage.id)))


def conversation(db: Database, client_id: UUID, chat_id: str = "chat") -> ActiveConversation:
    with db.tenant_session(client_id) as session:
        return session.scalars(select(ActiveConversation).where(ActiveConversation.chat_id == chat_id)).one()


def set_state(db: Database, client_id: UUID, **values: Any) -> None:
    with db.tenant_session(client_id) as session:
        session.execute(update(ActiveConversation).where(ActiveConversation.chat_id == "chat").values(**values))


# --- one message ------------------------------------------------------------------------------------------------------


def test_a_message_is_stored_and_its_conversation_begins(db: Database, client_id: UUID) -> None:
    result = record_and_commit(db, client_id, said(0, provider_message_id="wamid.1", media_url="https://m/1"))
    (message,) = stored(db, client_id)
    assert (message.id, message.chat_id, message.role, message.content) == (
        result.message_id,
        "chat",
        "user",
        "user at 0",
    )
    assert (message.media_url, message.provider_message_id, message.created_at) == ("https://m/1", "wamid.1", at(0))
    assert result.inserted
    assert result.conversation == ConversationState(
        chat_id="chat",
        status="active",
        followup_stage=0,
        last_role="user",
        last_message_at=at(0),
        last_message_id=message.id,
        last_user_message_at=at(0),
        last_user_message_id=message.id,
        last_read_message_id=None,
        paused_until=None,
    )


@pytest.mark.parametrize("what", ["new", "duplicate"])
def test_a_message_is_one_statement(db: Database, client_id: UUID, what: str) -> None:
    message = said(0, provider_message_id="wamid.1")
    if what == "duplicate":
        record_and_commit(db, client_id, message)
    with db.tenant_session(client_id) as session, statements_sent() as sent:
        assert record(session, message).inserted is (what == "new")
    assert len(sent) == 1


def test_nothing_is_committed_by_recording(db: Database, client_id: UUID) -> None:
    with pytest.raises(ZeroDivisionError), db.tenant_session(client_id) as session:
        record(session, said(0))
        _ = 1 / 0
    assert rows(db, client_id) == []


def test_recording_works_in_async_sessions(db: Database, client_id: UUID) -> None:
    async def main() -> tuple[Recorded, messages.RecordedBatch]:
        async with db, db.async_tenant_session(client_id) as session:
            one = await session.run_sync(messages.record, chat_id="chat", role="user", content="oi")
            many = await session.run_sync(messages.record_many, messages=[said(0)])
            return one, many

    one, many = asyncio.run(main())
    assert one.inserted
    assert many.recorded[0].conversation.last_message_id == one.message_id
    assert len(stored(db, client_id)) == 2


def test_a_system_session_is_refused(db: Database, client_id: UUID) -> None:
    with db.system_session(reason="test") as session:
        for call in (
            lambda: messages.record(session, chat_id="chat", role="user", content="oi"),  # type: ignore[arg-type]  # the point
            lambda: messages.record_many(session, messages=[said(0)]),  # type: ignore[arg-type]  # the point
        ):
            with pytest.raises(TenancyError, match="tenant_session"):
                call()
    assert rows(db, client_id) == []


def test_a_client_that_does_not_exist_is_an_error(db: Database) -> None:
    nobody = uuid4()
    with pytest.raises(ClientNotFound) as caught, db.tenant_session(nobody) as session:
        record(session, said(0))
    assert caught.value.client_id == nobody
    with pytest.raises(ClientNotFound), db.tenant_session(nobody) as session:
        messages.record_many(session, messages=[said(0)])


# --- deduplication ----------------------------------------------------------------------------------------------------


def test_a_duplicate_changes_nothing(db: Database, client_id: UUID) -> None:
    first = record_and_commit(db, client_id, said(0, provider_message_id="wamid.1"))
    record_and_commit(db, client_id, said(1, "assistant"))
    set_state(db, client_id, status="finished", followup_stage=3)
    before = rows(db, client_id)
    again = record_and_commit(db, client_id, said(9, content="changed", provider_message_id="wamid.1"))
    assert (again.message_id, again.inserted) == (first.message_id, False)
    assert (again.conversation.status, again.conversation.last_role) == ("finished", "assistant")
    assert rows(db, client_id) == before


@pytest.mark.parametrize("many", [False, True])
def test_a_redelivery_draws_no_id(db: Database, client_id: UUID, *, many: bool) -> None:
    message = said(0, provider_message_id="wamid.1")
    first = record_and_commit(db, client_id, message)
    for _ in range(3):
        with db.tenant_session(client_id) as session:
            if many:
                messages.record_many(session, messages=[message])
            else:
                record(session, message)
    assert record_and_commit(db, client_id, said(1)).message_id == first.message_id + 1


@pytest.mark.parametrize("chats", [1, 16])
def test_sixteen_threads_with_the_same_message_store_it_once(db: Database, client_id: UUID, chats: int) -> None:
    def deliver(index: int) -> Recorded:
        chat_id = f"chat {index % chats}"
        return record_and_commit(db, client_id, said(0, chat_id=chat_id, provider_message_id="wamid.1"))

    results = at_once(*(partial(deliver, index) for index in range(16)))
    (message,) = stored(db, client_id)
    assert sum(result.inserted for result in results) == 1
    assert {result.message_id for result in results} == {message.id}
    assert {result.conversation.chat_id for result in results} == {message.chat_id}
    with db.tenant_session(client_id) as session:
        assert session.scalars(select(ActiveConversation.chat_id)).all() == [message.chat_id]


def test_a_message_without_a_provider_id_is_never_a_duplicate(db: Database, client_id: UUID) -> None:
    assert all(record_and_commit(db, client_id, said(0)).inserted for _ in range(2))
    with db.tenant_session(client_id) as session:
        batch = messages.record_many(session, messages=[said(0), said(0)])
    assert [result.inserted for result in batch.recorded.values()] == [True, True]
    assert len(stored(db, client_id)) == 4


def test_two_clients_may_have_the_same_provider_id(db: Database, clients: tuple[UUID, UUID]) -> None:
    message = said(0, provider_message_id="wamid.1")
    assert all(record_and_commit(db, client_id, message).inserted for client_id in clients)
    before = rows(db, clients[0])
    assert not record_and_commit(db, clients[1], message).inserted
    record_and_commit(db, clients[1], said(5, "assistant"))
    assert [len(stored(db, client_id)) for client_id in clients] == [1, 2]
    assert rows(db, clients[0]) == before


def test_a_provider_id_under_another_chat_id_is_the_same_message(db: Database, client_id: UUID) -> None:
    first = record_and_commit(db, client_id, said(0, chat_id="5511@c.us", provider_message_id="wamid.1"))
    again = record_and_commit(db, client_id, said(0, chat_id="77@lid", provider_message_id="wamid.1"))
    assert (again.message_id, again.inserted) == (first.message_id, False)
    assert again.conversation.chat_id == "5511@c.us"
    with db.tenant_session(client_id) as session:
        assert session.scalars(select(ActiveConversation.chat_id)).all() == ["5511@c.us"]


@pytest.mark.parametrize("many", [False, True])
def test_a_duplicate_whose_conversation_is_gone_is_an_error(db: Database, client_id: UUID, *, many: bool) -> None:
    message = said(0, provider_message_id="wamid.1")
    record_and_commit(db, client_id, message)
    with db.tenant_session(client_id) as session:
        session.execute(delete(ActiveConversation))
    with db.tenant_session(client_id) as session:
        if many:
            batch = messages.record_many(session, messages=[message, said(1, chat_id="another"), message])
            assert list(batch.recorded) == [1], "the others are stored"
            refused: KestraError = batch.rejected[0]
            assert batch.rejected[2] is refused
        else:
            with pytest.raises(ConversationNotFound) as caught:
                record(session, message)
            refused = caught.value
    assert isinstance(refused, ConversationNotFound)
    assert refused.chat_id == "chat"


def test_provider_ids_are_compared_exactly(db: Database, client_id: UUID) -> None:
    for provider_id in ("wamid.A", "wamid.a", "wamid.A "):
        assert record_and_commit(db, client_id, said(0, provider_message_id=provider_id)).inserted


# --- the state of the conversation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_late_message_does_not_move_state_back(db: Database, client_id: UUID, role: Role) -> None:
    record_and_commit(db, client_id, said(5))
    newest = record_and_commit(db, client_id, said(10, "assistant"))
    set_state(db, client_id, status="finished", followup_stage=2)
    late = record_and_commit(db, client_id, said(4, role))
    assert late.inserted
    state = late.conversation
    assert (state.last_message_at, state.last_message_id, state.last_role) == (at(10), newest.message_id, "assistant")
    assert (state.last_user_message_at, state.status, state.followup_stage) == (at(5), "finished", 2)
    assert [message.created_at for message in stored(db, client_id)] == [at(4), at(5), at(10)]


def test_of_messages_sent_at_the_same_time_the_one_with_the_greater_id_is_newest(db: Database, client_id: UUID) -> None:
    for role in ("user", "assistant", "user", "system"):
        result = record_and_commit(db, client_id, said(0, role))
        assert (result.conversation.last_message_id, result.conversation.last_role) == (result.message_id, role)


def test_the_end_customers_last_message_to_arrive_is_known_however_late_it_is(db: Database, client_id: UUID) -> None:
    for minutes in (5, 9, 1):
        result = record_and_commit(db, client_id, said(minutes))
        assert result.conversation.last_user_message_id == result.message_id
    assert (
        record_and_commit(db, client_id, said(10, "assistant")).conversation.last_user_message_id == result.message_id
    )


@pytest.mark.parametrize("many", [False, True])
def test_a_time_in_the_future_becomes_now(db: Database, client_id: UUID, *, many: bool) -> None:
    with db.tenant_session(client_id) as session:
        if many:
            result = messages.record_many(session, messages=[said(10)], now=at(3)).recorded[0]
        else:
            result = record(session, said(10), now=at(3))
    assert result.conversation.last_message_at == at(3)
    assert [message.created_at for message in stored(db, client_id)] == [at(3)]


@pytest.mark.parametrize("sent_at", [None, datetime(9000, 1, 1, tzinfo=UTC)], ids=["not said", "in the future"])
@pytest.mark.parametrize("many", [False, True])
def test_now_is_the_clock_of_the_database(
    db: Database, client_id: UUID, sent_at: datetime | None, *, many: bool
) -> None:
    message = IncomingMessage("chat", "user", "oi", sent_at=sent_at)
    with db.tenant_session(client_id) as session:
        before = session.scalars(select(func.clock_timestamp())).one()
        if many:
            messages.record_many(session, messages=[message])
        else:
            record(session, message)
        after = session.scalars(select(func.clock_timestamp())).one()
    assert before <= stored(db, client_id)[0].created_at <= after


def test_the_end_customers_newest_message_makes_active_at_stage_0_and_ends_the_claim(
    db: Database, client_id: UUID
) -> None:
    record_and_commit(db, client_id, said(0))
    record_and_commit(db, client_id, said(10, "assistant"))
    claimed = {"claim_token": uuid4(), "claimed_until": at(99)}
    for minutes in (5, 5, 20):  # also when it is late, or of the same time as another
        set_state(db, client_id, status="finished", followup_stage=4, **claimed)
        state = record_and_commit(db, client_id, said(minutes)).conversation
        assert (state.status, state.followup_stage) == ("active", 0)
        row = conversation(db, client_id)
        assert (row.claim_token, row.claimed_until) == (None, None)


@pytest.mark.parametrize("role", ["assistant", "system"])
@pytest.mark.parametrize("many", [False, True])
def test_nobody_elses_message_changes_status_stage_or_claim(
    db: Database, client_id: UUID, role: Role, *, many: bool
) -> None:
    record_and_commit(db, client_id, said(0))
    token = uuid4()
    set_state(db, client_id, status="finished", followup_stage=4, claim_token=token, claimed_until=at(99))
    with db.tenant_session(client_id) as session:
        if many:
            messages.record_many(session, messages=[said(5, role), said(6, role)])
        else:
            record(session, said(5, role))
    row = conversation(db, client_id)
    assert (row.status, row.followup_stage, row.claim_token, row.claimed_until) == ("finished", 4, token, at(99))
    assert (row.last_role, row.last_user_message_at) == (role, at(0))


def test_recording_keeps_what_others_have_set(db: Database, client_id: UUID) -> None:
    record_and_commit(db, client_id, said(0))
    kept = {"paused_until": at(60), "last_read_message_id": 1, "last_context": "resumo", "last_context_message_id": 1}
    set_state(db, client_id, **kept)
    record_and_commit(db, client_id, said(5))
    with db.tenant_session(client_id) as session:
        messages.record_many(session, messages=[said(6)])
    row = conversation(db, client_id)
    assert {name: getattr(row, name) for name in kept} == kept


def test_an_adopted_conversation_without_ids_goes_on(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        session.add(ActiveConversation(chat_id="chat", last_role="assistant", last_message_at=at(5), followup_stage=2))
    late = record_and_commit(db, client_id, said(4, "assistant")).conversation
    assert (late.last_message_at, late.last_message_id, late.last_role) == (at(5), None, "assistant")
    state = record_and_commit(db, client_id, said(5)).conversation
    assert (state.last_message_at, state.last_role, state.followup_stage) == (at(5), "user", 0)


CONVERSATION: Final = (said(1), said(2, "assistant"), said(3), said(3, "assistant"))


def outcome(state: ConversationState) -> tuple[Any, ...]:
    return (state.status, state.followup_stage, state.last_message_at, state.last_user_message_at)


def test_the_state_does_not_depend_on_the_order_of_arrival(db: Database, client_id: UUID) -> None:
    outcomes = set()
    with db.tenant_session(client_id) as session:
        for number, order in enumerate(permutations(CONVERSATION)):
            for message in order:
                last = record(session, IncomingMessage(f"chat {number}", message.role, "x", sent_at=message.sent_at))
            outcomes.add(outcome(last.conversation))
    assert outcomes == {("active", 0, at(3), at(3))}


def test_a_batch_leaves_the_state_that_recording_one_by_one_leaves(db: Database, client_id: UUID) -> None:
    shuffled = random.Random(4)  # noqa: S311 - an order, no secret
    roles: tuple[Role, ...] = ("user", "assistant", "system")
    for number in range(40):
        script = [(shuffled.randrange(6), shuffled.choice(roles)) for _ in range(shuffled.randrange(2, 8))]
        shuffled.shuffle(script)
        stage, status = shuffled.randrange(6), shuffled.choice(["active", "finished"])
        states = []
        for how in ("one by one", "batch"):
            chat_id = f"{how} {number}"
            with db.tenant_session(client_id) as session:
                record(session, said(2, "user", chat_id=chat_id))
                session.execute(
                    update(ActiveConversation)
                    .where(ActiveConversation.chat_id == chat_id)
                    .values(followup_stage=stage, status=status)
                )
                # Ids follow the time in a batch; one by one they follow the arrival.
                script.sort(key=lambda line: line[0])
                given = [said(minutes, role, chat_id=chat_id) for minutes, role in script]
                if how == "batch":
                    last = messages.record_many(session, messages=given).recorded[0]
                else:
                    last = [record(session, message) for message in given][-1]
                state = last.conversation
                ids = session.scalars(
                    select(ChatMessage.id).where(ChatMessage.chat_id == chat_id).order_by(ChatMessage.id)
                ).all()
            newest = [ids.index(one or 0) for one in (state.last_message_id, state.last_user_message_id)]
            states.append((*outcome(state), state.last_role, *newest))
        assert states[0] == states[1], script


# --- what cannot be stored --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "media_url", "storable"),
    [
        ("oi", None, True),
        ("oi", "", True),
        (None, "https://m/1", True),
        ("", "https://m/1", True),
        (None, None, False),
        ("", None, False),
        (None, "", False),
        ("", "", False),
    ],
)
def test_content_may_be_empty_only_where_there_is_a_medium(
    db: Database, client_id: UUID, content: str | None, media_url: str | None, *, storable: bool
) -> None:
    message = IncomingMessage("chat", "user", content, media_url)
    with db.tenant_session(client_id) as session:
        batch = messages.record_many(session, messages=[message])
        assert bool(batch.recorded) is storable
        if storable:
            record(session, message)
        else:
            with pytest.raises(InvalidValue, match="neither"):
                record(session, message)
    assert len(stored(db, client_id)) == (2 if storable else 0)


@pytest.mark.parametrize("contents", [("", ""), ("", None), (None, ""), (None, None)])
def test_a_batch_of_media_keeps_what_is_empty_apart_from_what_is_not_there(
    db: Database, client_id: UUID, contents: tuple[str | None, ...]
) -> None:
    with db.tenant_session(client_id) as session:
        media = [IncomingMessage("chat", "user", content, "https://m/1") for content in contents]
        messages.record_many(session, messages=media)
    assert tuple(message.content for message in stored(db, client_id)) == contents


def test_a_message_shows_nothing_of_what_was_said_not_even_in_a_log_of_json() -> None:
    message = IncomingMessage("chat", "user", "segredo", "https://segredo", "wamid.1", at(0))
    shown = f"{message} {message!r} {[message]} {json.dumps({'message': message}, default=repr)}"
    assert "segredo" not in shown
    assert shown.count("wamid.1") == 4


BAD: Final[dict[str, dict[str, Any]]] = {
    "no chat": {"chat_id": ""},
    "None for a chat": {"chat_id": None},
    "number for a chat": {"chat_id": 5511},
    "long chat": {"chat_id": "c" * 513},
    "NUL in the chat": {"chat_id": "a\0b"},
    "unknown role": {"role": "ai"},
    "None for a role": {"role": None},
    "NUL in the content": {"content": "segredo\0"},
    "lone surrogate": {"content": "segredo\ud800"},
    "bytes": {"content": b"segredo"},
    "NUL in the url": {"media_url": "segredo\0"},
    "empty provider id": {"provider_message_id": ""},
    "long provider id": {"provider_message_id": "w" * 513},
    "NUL in the provider id": {"provider_message_id": "w\0"},
    "naive time": {"sent_at": datetime(2026, 1, 1)},  # noqa: DTZ001  # the point
    "text for a time": {"sent_at": "2026-01-01T00:00:00Z"},
    "time that no zone can show": {"sent_at": datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))},
    "time beyond the calendar": {"sent_at": datetime.max.replace(tzinfo=UTC)},
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_stored_is_refused_before_it_is_sent_and_not_quoted(
    db: Database, client_id: UUID, kind: str
) -> None:
    parts = {"chat_id": "chat", "role": "user", "content": "segredo", **BAD[kind]}
    with db.tenant_session(client_id) as session, statements_sent() as sent:
        with pytest.raises(InvalidValue) as caught:
            messages.record(session, **parts)
        assert "segredo" not in str(caught.value)
        batch = messages.record_many(session, messages=[IncomingMessage(**parts)])
        assert list(batch.rejected) == [0]
        assert str(batch.rejected[0]) == str(caught.value)
        assert sent == []
        assert record(session, said(0)).inserted, "the transaction goes on"


def test_the_longest_ids_fit_their_indexes(db: Database, client_id: UUID) -> None:
    longest = "".join(chr(0x1F300 + n % 500) for n in random.Random(1).sample(range(9999), 512))  # noqa: S311
    assert record_and_commit(db, client_id, said(0, chat_id=longest, provider_message_id=longest)).inserted


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_one_statement_and_says_what_became_of_each_message(db: Database, client_id: UUID) -> None:
    known = record_and_commit(db, client_id, said(0, provider_message_id="known"))
    with db.tenant_session(client_id) as session, statements_sent() as sent:
        batch = messages.record_many(
            session,
            messages=[
                said(5, chat_id="a", provider_message_id="p5"),
                IncomingMessage("a", "user", ""),
                said(1, chat_id="b", provider_message_id="p1"),
                said(3, "assistant", chat_id="a"),
                said(5, chat_id="a@lid", provider_message_id="p5"),
                said(9, chat_id="c", provider_message_id="known"),
            ],
        )
    assert len(sent) == 1
    assert [(index, result.inserted) for index, result in batch.recorded.items()] == [
        (0, True),
        (2, True),
        (3, True),
        (4, False),
        (5, False),
    ]
    assert list(batch.rejected) == [1]
    assert batch.recorded[4].message_id == batch.recorded[0].message_id
    assert batch.recorded[5].message_id == known.message_id
    assert batch.recorded[5].conversation == known.conversation
    assert {result.conversation.chat_id for result in batch.recorded.values()} == {"a", "b", "chat"}
    assert batch.recorded[3].conversation == batch.recorded[0].conversation, "the state after the batch"
    assert len(stored(db, client_id)) == 4


def test_a_duplicate_in_a_batch_reports_the_state_after_the_batch(db: Database, client_id: UUID) -> None:
    record_and_commit(db, client_id, said(0, provider_message_id="known"))
    with db.tenant_session(client_id) as session:
        batch = messages.record_many(session, messages=[said(0, provider_message_id="known"), said(7, "assistant")])
    assert batch.recorded[0].conversation == batch.recorded[1].conversation
    assert batch.recorded[0].conversation.last_message_at == at(7)


def test_ids_in_a_batch_follow_the_time_and_then_the_position(db: Database, client_id: UUID) -> None:
    given = [
        said(9, content="e"),
        said(1, content="a"),
        said(5, content="c"),
        said(5, content="d"),
        said(2, content="b"),
    ]
    with db.tenant_session(client_id) as session:
        messages.record_many(session, messages=[*given[:1], *given[1:]])
    by_id = sorted(stored(db, client_id), key=lambda message: message.id)
    assert [message.content for message in by_id] == ["a", "b", "c", "d", "e"]
    assert conversation(db, client_id).last_user_message_id == by_id[-1].id


def test_a_batch_is_bounded_and_may_be_empty(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        assert messages.record_many(session, messages=[]) == messages.RecordedBatch({}, {})
        with pytest.raises(InvalidValue, match="at most 500 messages, not 501"):
            messages.record_many(session, messages=[said(0)] * 501)
        full = messages.record_many(session, messages=[said(n, chat_id=f"{n}") for n in range(500)])
    assert len(full.recorded) == 500


def test_batches_of_the_same_messages_in_any_order_neither_double_nor_deadlock(db: Database, client_id: UUID) -> None:
    """Each thread delivers the same messages, some under another chat_id, in an order of its own."""
    count = 30

    def deliver(index: int) -> int:
        shuffled = random.Random(index)  # noqa: S311 - an order, no secret
        inserted = 0
        for turn in range(5):
            given = [
                said(n, chat_id=f"{n % 7}{shuffled.choice(['', '@lid'])}", provider_message_id=f"{turn} {n}")
                for n in range(count)
            ]
            shuffled.shuffle(given)
            with db.tenant_session(client_id) as session:
                batch = messages.record_many(session, messages=given)
            assert len(batch.recorded) == count
            inserted += sum(result.inserted for result in batch.recorded.values())
        return inserted

    assert sum(at_once(*(partial(deliver, index) for index in range(8)))) == 5 * count
    assert len(stored(db, client_id)) == 5 * count


def test_batches_of_the_same_messages_under_two_chats_in_opposite_order_do_not_deadlock(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any], superuser_url: str
) -> None:
    """No lock on a chat keeps these apart: only the order in which they meet at the index of the providers' ids."""
    batch = [said(0, provider_message_id=f"{n}") for n in range(100)]

    def deliver(index: int) -> int:
        given = [replace(message, chat_id=f"{index}") for message in batch[:: 1 if index else -1]]
        with db.tenant_session(client_id) as session:
            recorded = messages.record_many(session, messages=given).recorded
        return sum(result.inserted for result in recorded.values())

    with ThreadPoolExecutor() as pool:
        with psycopg.connect(superuser_url) as another:
            # Somebody has the message in the middle, and gives it up when both have come as far as they can.
            another.execute(
                "INSERT INTO chat_messages (client_id, chat_id, role, content, provider_message_id) "
                "VALUES (%s, 'another', 'user', 'oi', '50')",
                [client_id],
            )
            delivering = [pool.submit(deliver, index) for index in range(2)]
            until_waiting(superuser, *delivering)
            another.rollback()
        assert sum(delivered.result(PATIENCE) for delivered in delivering) == 100


def test_a_batch_that_waited_for_a_duplicate_stores_the_rest_once_and_keeps_its_chats_locked(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    """What it had written by then is undone and written anew."""
    batch = [said(n, chat_id=chat, provider_message_id=f"{n}") for n, chat in enumerate("abca")]

    def deliver() -> tuple[messages.RecordedBatch, list[tuple[Any, ...]]]:
        with db.tenant_session(client_id) as session:
            delivered = messages.record_many(session, messages=batch)
            locked = (
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = "
                "(SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            return delivered, superuser.execute(locked).fetchall()

    with ThreadPoolExecutor(1) as pool:
        with db.tenant_session(client_id) as session:
            first = record(session, said(2, chat_id="elsewhere", provider_message_id="2"))
            waiting = pool.submit(deliver)
            until_waiting(superuser, waiting)
        delivered, held = waiting.result(PATIENCE)
    assert held == [(3,)]
    assert [result.inserted for result in delivered.recorded.values()] == [True, True, False, True]
    assert delivered.recorded[2].message_id == first.message_id
    assert {message.id for message in stored(db, client_id)} == {r.message_id for r in delivered.recorded.values()}
    assert delivered.recorded[0].conversation == delivered.recorded[3].conversation
    assert {delivered.recorded[0].conversation.last_message_id} == {delivered.recorded[3].message_id}


def test_a_batch_waits_for_one_duplicate_after_the_other(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any], superuser_url: str
) -> None:
    count = 6
    first = record_and_commit(db, client_id, said(0, chat_id="another"))
    batch = [said(n, provider_message_id=f"{n}") for n in range(count)]
    insert = (
        "INSERT INTO chat_messages (client_id, chat_id, role, content, provider_message_id) "
        "VALUES (%s, 'another', 'user', 'oi', %s)"
    )

    def deliver() -> messages.RecordedBatch:
        with db.tenant_session(client_id) as session:
            return messages.record_many(session, messages=batch)

    with ExitStack() as stack:
        others = [stack.enter_context(psycopg.connect(superuser_url)) for _ in range(count)]
        for n, other in enumerate(others):
            other.execute(insert, [client_id, f"{n}"])
        delivering = stack.enter_context(ThreadPoolExecutor(1)).submit(deliver)
        for other in others:
            until_waiting(superuser, delivering, holder=other)
            other.commit()
        delivered = delivering.result(PATIENCE)
    assert [result.inserted for result in delivered.recorded.values()] == [False] * count
    found = {result.message_id for result in delivered.recorded.values()}
    assert {message.id for message in stored(db, client_id)} == {first.message_id} | found


def test_of_a_batch_that_waited_for_a_duplicate_nothing_is_returned_that_was_undone(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any], superuser_url: str
) -> None:
    call = (
        "SELECT chat_id, ids, known FROM kestra_record_many"
        "(%s, '{c,d}', '{user,user}', '{oi,oi}', '{}', '{w1,w2}', '{}', NULL)"
    )
    with psycopg.connect(superuser_url) as another, ThreadPoolExecutor(1) as pool:
        with db.tenant_session(client_id) as session:
            first = record(session, said(0, chat_id="elsewhere", provider_message_id="w2"))
            waiting = pool.submit(another.execute, call, [client_id])
            until_waiting(superuser, waiting)
        returned = waiting.result(PATIENCE).fetchall()
    (stored_in_c,) = (message.id for message in stored(db, client_id) if message.chat_id == "c")
    assert returned == [("c", [stored_in_c], None), ("elsewhere", [first.message_id], "w2")]


def test_the_error_of_another_key_is_raised_as_it_is(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    superuser.execute("CREATE UNIQUE INDEX one_media_url ON chat_messages (client_id, media_url)")
    batch = [said(0, media_url="https://m/1"), said(1, media_url="https://m/1")]
    with pytest.raises(StatementFailed, match="one_media_url") as raised, db.tenant_session(client_id) as session:
        messages.record_many(session, messages=batch)
    assert raised.value.sqlstate == "23505"
    assert stored(db, client_id) == []


TRIGGER: Final = """
    CREATE FUNCTION changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$;
    CREATE TRIGGER changed BEFORE INSERT ON chat_messages FOR EACH ROW EXECUTE FUNCTION changed();
"""


@pytest.mark.parametrize("many", [False, True])
def test_the_conversation_is_moved_by_what_a_trigger_has_made_of_the_message(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any], *, many: bool
) -> None:
    superuser.execute(TRIGGER.format(body="NEW.created_at := NEW.created_at - interval '1 hour'; RETURN NEW;"))
    with db.tenant_session(client_id) as session:
        result = messages.record_many(session, messages=[said(0)]).recorded[0] if many else record(session, said(0))
    assert result.conversation.last_message_at == result.conversation.last_user_message_at == at(-60)
    assert [message.created_at for message in stored(db, client_id)] == [at(-60)]


def test_a_batch_moves_the_conversation_by_the_role_that_a_trigger_has_left(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    superuser.execute(TRIGGER.format(body="NEW.role := 'system'; RETURN NEW;"))
    with db.tenant_session(client_id) as session:
        state = messages.record_many(session, messages=[said(0)]).recorded[0].conversation
    assert (state.last_role, state.last_user_message_id, state.last_user_message_at) == ("system", None, None)


@pytest.mark.parametrize("many", [False, True])
def test_a_message_that_a_trigger_refuses_is_not_waited_for_for_ever(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any], *, many: bool
) -> None:
    superuser.execute(TRIGGER.format(body="IF NEW.content = 'segredo' THEN RETURN NULL; END IF; RETURN NEW;"))
    refused = said(0, content="segredo")
    with pytest.raises(StatementFailed) as raised, db.tenant_session(client_id) as session:
        if many:
            messages.record_many(session, messages=[said(1), refused])
        else:
            record(session, refused)
    assert "segredo" not in shown(raised.value)
    assert stored(db, client_id) == []


def test_a_batch_that_may_not_see_a_duplicate_says_that_it_has_to_begin_again(
    db: Database, client_id: UUID, superuser_url: str
) -> None:
    call = "SELECT ids FROM kestra_record_many(%s, '{c,d}', '{user,user}', '{oi,oi}', '{}', '{w1,w2}', '{}', NULL)"
    with psycopg.connect(superuser_url) as stricter:
        stricter.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        stricter.execute("SELECT FROM clients")
        record_and_commit(db, client_id, said(0, provider_message_id="w2"))
        with pytest.raises(psycopg.errors.SerializationFailure):
            stricter.execute(call, [client_id])
        stricter.rollback()
        assert len(stricter.execute(call, [client_id]).fetchall()) == 2


def test_batches_and_single_messages_do_not_deadlock(db: Database, client_id: UUID) -> None:
    def deliver(index: int) -> None:
        shuffled = random.Random(index)  # noqa: S311 - an order, no secret
        given = [said(n, chat_id=f"{n % 5}", provider_message_id=f"{n}") for n in range(40)]
        shuffled.shuffle(given)
        if index % 2:
            with db.tenant_session(client_id) as session:
                messages.record_many(session, messages=given)
        else:
            for message in given:
                record_and_commit(db, client_id, message)

    at_once(*(partial(deliver, index) for index in range(8)))
    assert len(stored(db, client_id)) == 40


# --- what a reader sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat_exists", [False, True])
def test_a_chat_is_locked_until_the_transaction_ends_and_other_chats_are_not(
    db: Database, client_id: UUID, other_client_id: UUID, superuser: psycopg.Connection[Any], *, chat_exists: bool
) -> None:
    if chat_exists:
        record_and_commit(db, client_id, said(0))
    with ThreadPoolExecutor() as pool:
        with db.tenant_session(client_id) as session:
            first = record(session, said(1))
            second = pool.submit(record_and_commit, db, client_id, said(2))
            for other, chat_id in ((client_id, "another chat"), (other_client_id, "chat")):
                assert record_and_commit(db, other, said(0, chat_id=chat_id)).inserted
            until_waiting(superuser, second, lock="advisory")
        assert second.result(PATIENCE).message_id > first.message_id


@pytest.mark.parametrize("batches", [False, True])
def test_whoever_sees_an_id_sees_every_smaller_one_of_the_chat(db: Database, client_id: UUID, *, batches: bool) -> None:
    writers, done = 8, Event()

    def read() -> list[frozenset[int]]:
        seen = []
        while not done.is_set():
            with db.tenant_session(client_id) as session:
                seen.append(frozenset(session.scalars(select(ChatMessage.id))))
        return seen

    def write(index: int) -> None:
        for turn in range(20):
            with db.tenant_session(client_id) as session:
                if batches and index % 2:
                    messages.record_many(session, messages=[said(turn), said(turn + 1, "assistant")])
                else:
                    record(session, said(turn))

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        at_once(*(partial(write, index) for index in range(writers)))
        done.set()
        snapshots = reading.result(PATIENCE)
    everything = {message.id for message in stored(db, client_id)}
    assert len(set(snapshots)) > 10, "the reader saw it grow"
    for seen in snapshots:
        assert seen == {message_id for message_id in everything if message_id <= max(seen, default=0)}
