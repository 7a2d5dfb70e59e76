"""Everything at once: webhooks in threes and in any order, follow-up workers, a reader of the inbox, two clients."""

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import Any, Final
from uuid import UUID

from sqlalchemy import func, select

from kestra import ActiveConversation, ChatMessage, Client, Database
from kestra.dao import conversations, followups, messages
from kestra.dao.messages import IncomingMessage
from kestra.errors import ClaimLost
from kestra.testing import invariants

WEBHOOKS: Final = 500
DELIVERIES: Final = 3
THREADS: Final = 20
CHATS: Final = 30
START: Final = datetime(2026, 3, 2, 12, tzinfo=UTC)
LEASE: Final = timedelta(minutes=5)
PATIENCE: Final = 120.0
POLICY: Final = {"followup": {"active": True, "stages": [{"delay_minutes": 0, "prompt": "e aí?"}] * 5}}

Webhook = tuple[UUID, IncomingMessage]


def webhooks(clients: tuple[UUID, UUID], dice: random.Random) -> list[Webhook]:
    """Of both clients, with the same chats and, for many, the same ids and times."""
    return [
        (
            clients[number % 2],
            IncomingMessage(
                chat_id=f"chat {dice.randrange(CHATS)}",
                role=dice.choice(["user", "user", "assistant"]),
                content=f"message {number}",
                provider_message_id=f"wamid.{number // 2}",
                sent_at=START + timedelta(seconds=dice.randrange(60)),
            ),
        )
        for number in range(WEBHOOKS)
    ]


def deliver(db: Database, share: list[Webhook], dice: random.Random) -> int:
    """Deliver, one by one or in batches; how many were new."""
    inserted = 0
    while share:
        size = dice.choice([1, 1, 1, 8])
        batch, share = share[:size], share[size:]
        for client_id in {client_id for client_id, _ in batch}:
            given = [message for owner, message in batch if owner == client_id]
            with db.tenant_session(client_id) as session:
                if len(given) == 1:
                    inserted += messages.record(session, **asdict(given[0])).inserted
                else:
                    results = messages.record_many(session, messages=given)
                    assert not results.rejected
                    inserted += sum(result.inserted for result in results.recorded.values())
    return inserted


def follow_up(db: Database, done: Event, dice: random.Random) -> list[tuple[UUID, str, int]]:
    """Claim and complete until the webhooks are in: the client, the chat and the message of each completion."""
    completed = []
    while not done.is_set():
        with db.system_session(reason="storm") as session:
            due = followups.clients_due(session)
        for client_id in due:
            with db.tenant_session(client_id) as session:
                claims = followups.claim(session, limit=5, lease=LEASE)
            for claim in claims:
                try:
                    with db.tenant_session(client_id) as session:
                        if dice.random() < 0.2:
                            followups.release(session, claim=claim)
                            continue
                        result = followups.complete(session, claim=claim, content="follow-up")
                    completed.append((client_id, claim.chat_id, result.message_id))
                except ClaimLost:
                    continue
    return completed


def read(db: Database, done: Event, clients: tuple[UUID, UUID]) -> int:
    """Page through the inboxes until the webhooks are in: how many times."""
    rounds = 0
    while not done.is_set() or not rounds:
        for client_id in clients:
            seen = [entry for page in pages(db, client_id) for entry in page]
            chats = [entry.state.chat_id for entry in seen]
            assert len(chats) == len(set(chats)), "a conversation is on one page only"
            times = [(entry.state.last_message_at, entry.state.chat_id) for entry in seen]
            assert times == sorted(times, reverse=True)
        rounds += 1
    return rounds


def pages(db: Database, client_id: UUID) -> Iterator[list[conversations.InboxEntry]]:
    cursor = None
    while True:
        with db.tenant_session(client_id) as session:
            page = conversations.inbox(session, cursor=cursor, limit=7)
        yield page.items
        cursor = page.cursor
        if cursor is None:
            return


def test_nothing_is_lost_doubled_or_deadlocked_in_a_storm(db: Database, clients: tuple[UUID, UUID]) -> None:
    dice = random.Random(500)  # noqa: S311 - an order, no secret
    with db.system_session(reason="test data") as session:
        for client in session.scalars(select(Client)):
            client.tools_config = POLICY  # type: ignore[assignment]  # validated into a ToolsConfig
    sent = webhooks(clients, dice)
    deliveries = sent * DELIVERIES
    dice.shuffle(deliveries)

    done = Event()
    with ThreadPoolExecutor(THREADS + 4) as pool:
        around: list[Future[Any]] = [
            *(pool.submit(follow_up, db, done, random.Random(n)) for n in range(3)),  # noqa: S311
            pool.submit(read, db, done, clients),
        ]
        try:
            delivering = [
                pool.submit(deliver, db, deliveries[n::THREADS], random.Random(n))  # noqa: S311
                for n in range(THREADS)
            ]
            inserted = sum(future.result(PATIENCE) for future in delivering)
        finally:
            done.set()
        *workers, reader = around
        completed = [completion for worker in workers for completion in worker.result(PATIENCE)]
        assert reader.result(PATIENCE) > 0

    assert inserted == WEBHOOKS
    assert completed, "the workers had something to do"
    for client_id in clients:
        ours = [message for owner, message in sent if owner == client_id]
        check_messages(
            db, client_id, ours, Counter(completion[1:] for completion in completed if completion[0] == client_id)
        )
        check_states(db, client_id)
    with db.system_session(reason="storm") as session:
        assert invariants.check(session, complete=True) == []


def check_messages(
    db: Database, client_id: UUID, sent: list[IncomingMessage], completed: Counter[tuple[str, int]]
) -> None:
    with db.tenant_session(client_id) as session:
        stored = session.scalars(select(ChatMessage)).all()
    webhooks = Counter(
        (m.chat_id, m.role, m.content, m.provider_message_id, m.created_at) for m in stored if m.provider_message_id
    )
    assert webhooks == Counter((m.chat_id, m.role, m.content, m.provider_message_id, m.sent_at) for m in sent)
    followed_up = Counter((m.chat_id, m.id) for m in stored if m.provider_message_id is None)
    assert followed_up == completed, "one message for each completion"


def check_states(db: Database, client_id: UUID) -> None:
    """Each conversation is what its messages say, and every chat with messages has one."""
    with db.tenant_session(client_id) as session:
        states = session.scalars(select(ActiveConversation)).all()
        chats = session.scalars(select(func.count(ChatMessage.chat_id.distinct()))).one()
        assert len(states) == chats
        for state in states:
            of_chat = session.scalars(
                select(ChatMessage)
                .where(ChatMessage.chat_id == state.chat_id)
                .order_by(ChatMessage.created_at, ChatMessage.id)
            ).all()
            by_user = [message for message in of_chat if message.role == "user"]
            newest = of_chat[-1]
            assert (state.last_message_id, state.last_message_at, state.last_role) == (
                newest.id,
                newest.created_at,
                newest.role,
            )
            assert state.last_user_message_at == max((message.created_at for message in by_user), default=None)
            assert state.last_user_message_id == max((message.id for message in by_user), default=None)
