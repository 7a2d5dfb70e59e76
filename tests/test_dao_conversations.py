"""Conversations: the inbox, what was read, the assistant's summary, the end, the pause, the 24 hours."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import permutations, product
from typing import Any, Final
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import psycopg
import pytest

from kestra import ActiveConversation, ChatMessage, Database, TenantSession
from kestra.dao import conversations
from kestra.dao.conversations import MAX_CONTEXT, ConversationState, InboxEntry
from kestra.dao.keyset import page_of
from kestra.dao.messages import Recorded, record
from kestra.errors import (
    ContextOutdated,
    ConversationMoved,
    ConversationNotFound,
    InvalidCursor,
    InvalidValue,
    TenancyError,
)
from kestra.models import Role, Status
from tests.concurrency import PATIENCE, at_once, outcomes_at_once, until_waiting
from tests.observing import Sent, explain, explain_prepared, nodes, statements_sent

CHAT: Final = "5511999999999@lid"
NOON: Final = datetime(2020, 5, 1, 12, tzinfo=UTC)
LATER: Final = NOON + timedelta(days=30)
SECRET: Final = "segredo do cliente"  # noqa: S105  # a message text, which must not be shown
STATUSES: Final[tuple[Status | None, ...]] = (None, "active", "finished")


def say(
    session: TenantSession, chat_id: str = CHAT, role: Role = "user", *, minute: float = 0, **given: Any
) -> Recorded:
    """Record a message that was sent so many minutes after noon."""
    sent_at = NOON + timedelta(minutes=minute)
    return record(session, chat_id=chat_id, role=role, **{"content": "oi", "sent_at": sent_at, "now": LATER, **given})


def make(db: Database, client_id: UUID, **columns: Any) -> None:
    """A conversation as it is given, with no message."""
    with db.tenant_session(client_id) as session:
        session.add(ActiveConversation(**{"chat_id": CHAT, "last_message_at": NOON, **columns}))


def stored(db: Database, client_id: UUID, chat_id: str = CHAT) -> dict[str, Any]:
    with db.tenant_session(client_id) as session:
        found = session.get_one(ActiveConversation, (chat_id, client_id))
        return {column.name: getattr(found, column.name) for column in ActiveConversation.__table__.columns}


def chats(entries: list[InboxEntry]) -> list[str]:
    return [entry.state.chat_id for entry in entries]


# --- the inbox ---


def test_inbox_lists_the_newest_activity_first_whatever_the_status(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        for minute, chat_id in enumerate(["b", "d", "a", "c"]):
            say(session, chat_id, minute=minute)
        last = say(session, "b", minute=9).message_id
        conversations.finish(session, chat_id="b", expected_last_message_id=last)
        page = conversations.inbox(session)
    assert chats(page.items) == ["b", "c", "a", "d"]
    assert [entry.state.status for entry in page.items] == ["finished", "active", "active", "active"]
    assert page.items[0].state.last_message_at == NOON + timedelta(minutes=9)
    assert page.cursor is None


def test_inbox_of_no_conversation_is_empty(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        assert conversations.inbox(session, unread_only=True).items == []


def twelve(db: Database, client_id: UUID) -> dict[str, tuple[Status, bool, datetime]]:
    """Conversations of either status, read or not, many of the same time or a microsecond apart."""
    kinds: dict[str, tuple[Status, bool, datetime]] = {}
    statuses: tuple[Status, ...] = ("active", "finished")
    with db.tenant_session(client_id) as session:
        for status, unread, microsecond in product(statuses, (True, False), (0, 1, 1)):
            chat_id = f"chat {len(kinds):02} ç"
            at = NOON + timedelta(microseconds=microsecond)
            said = say(session, chat_id, sent_at=at)
            if status == "finished":
                conversations.finish(session, chat_id=chat_id, expected_last_message_id=said.message_id)
            if not unread:
                conversations.mark_read(session, chat_id=chat_id, up_to=said.message_id)
            kinds[chat_id] = (status, unread, at)
    return kinds


@pytest.mark.parametrize("unread_only", [False, True])
@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("limit", [1, 2, 5, 12])
def test_pages_of_the_inbox_are_the_whole_list_in_its_order(
    db: Database, client_id: UUID, status: Status | None, limit: int, *, unread_only: bool
) -> None:
    expected = [
        (at, chat_id)
        for chat_id, (its_status, unread, at) in twelve(db, client_id).items()
        if status in {None, its_status} and (unread or not unread_only)
    ]
    listed: list[str] = []
    cursor = None
    with db.tenant_session(client_id) as session:
        while True:
            page = conversations.inbox(session, status=status, unread_only=unread_only, cursor=cursor, limit=limit)
            assert 0 < len(page.items) <= limit
            listed += chats(page.items)
            assert len(listed) <= len(expected)
            cursor = page.cursor
            if cursor is None:
                break
    assert listed == [chat_id for _, chat_id in sorted(expected, reverse=True)]


def test_conversation_that_moves_to_the_front_shifts_no_page(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        for minute, chat_id in enumerate("abcd"):
            say(session, chat_id, minute=minute)
        first = conversations.inbox(session, limit=2)
        say(session, "a", minute=9)
        second = conversations.inbox(session, limit=2, cursor=first.cursor)
    assert (chats(first.items), chats(second.items)) == (["d", "c"], ["b"])


def test_cursor_of_another_client_or_list_is_refused(db: Database, client_id: UUID, other_client_id: UUID) -> None:
    cursors = {}
    for owner in (client_id, other_client_id):
        with db.tenant_session(owner) as session:
            say(session, "a")
            say(session, "b")
            cursors[owner] = conversations.inbox(session, limit=1).cursor
    values = [NOON.isoformat(), "b"]
    history = page_of([1, 2], limit=1, scope=("history", client_id), key=lambda _: values).cursor
    with db.tenant_session(client_id) as session:
        for cursor in (cursors[other_client_id], history, "", "garbage", "ç"):
            with pytest.raises(InvalidCursor):
                conversations.inbox(session, cursor=cursor)
        assert chats(conversations.inbox(session, cursor=cursors[client_id]).items) == ["a"]


@pytest.mark.parametrize("limit", [0, 501])
def test_limit_of_the_inbox_has_bounds(db: Database, client_id: UUID, limit: int) -> None:
    with db.tenant_session(client_id) as session, pytest.raises(InvalidValue):
        conversations.inbox(session, limit=limit)


def test_inbox_of_an_unknown_status_is_refused(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session, pytest.raises(InvalidValue):
        conversations.inbox(session, status="closed")  # type: ignore[arg-type]  # the point of the test


def entry_of(db: Database, client_id: UUID, chat_id: str = CHAT) -> InboxEntry:
    with db.tenant_session(client_id) as session:
        [entry] = [entry for entry in conversations.inbox(session).items if entry.state.chat_id == chat_id]
        return entry


def test_preview_is_the_beginning_of_the_newest_message(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        say(session, minute=2, role="assistant", content="ç" * 121)
        say(session, minute=1, content="late")
    entry = entry_of(db, client_id)
    assert (entry.preview, entry.preview_role, entry.preview_has_media) == ("ç" * 120, "assistant", False)


def test_of_the_same_time_the_message_with_the_larger_id_is_the_preview(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        for content in ("1", "2", "3"):
            say(session, content=content)
    assert entry_of(db, client_id).preview == "3"


def test_preview_is_right_where_the_conversation_missed_a_message(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        say(session, content="old")
        at = NOON + timedelta(hours=1)
        session.add(ChatMessage(chat_id=CHAT, role="assistant", content="new", created_at=at))
    assert entry_of(db, client_id).preview == "new"


def test_message_without_a_text_shows_its_medium(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        say(session, content=None, media_url="https://media")
        say(session, "both", content="look", media_url="https://media")
    entry, both = entry_of(db, client_id), entry_of(db, client_id, "both")
    assert (entry.preview, entry.preview_role, entry.preview_has_media) == (None, "user", True)
    assert (both.preview, both.preview_has_media) == ("look", True)


def test_conversation_without_messages_is_listed_without_a_preview(db: Database, client_id: UUID) -> None:
    make(db, client_id)
    entry = entry_of(db, client_id)
    assert (entry.preview, entry.preview_role, entry.preview_has_media) == (None, None, False)
    assert (entry.unread, entry.unread_capped) == (0, False)


def test_unread_counts_the_end_customers_messages_after_the_last_read_one(db: Database, client_id: UUID) -> None:
    roles: tuple[Role, ...] = ("user", "user", "assistant", "user", "system", "user")
    with db.tenant_session(client_id) as session:
        ids = [say(session, role=role, minute=minute).message_id for minute, role in enumerate(roles)]
        say(session, "another", minute=99, content="of another chat")
    assert entry_of(db, client_id).preview == "oi"
    assert entry_of(db, client_id).unread == 4
    for up_to, unread in zip(ids, (3, 2, 2, 1, 1, 0), strict=True):
        with db.tenant_session(client_id) as session:
            conversations.mark_read(session, chat_id=CHAT, up_to=up_to)
        assert entry_of(db, client_id).unread == unread


@pytest.mark.parametrize(
    ("messages", "unread", "capped"), [(98, 98, False), (99, 99, False), (100, 99, True), (300, 99, True)]
)
def test_unread_is_capped_and_flagged(
    db: Database, client_id: UUID, messages: int, unread: int, *, capped: bool
) -> None:
    with db.tenant_session(client_id) as session:
        say(session)
        session.add_all(
            ChatMessage(chat_id=CHAT, role="user", content=SECRET, created_at=NOON) for _ in range(messages - 1)
        )
    entry = entry_of(db, client_id)
    assert (entry.unread, entry.unread_capped) == (unread, capped)


def test_entry_shows_no_text_of_a_message(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        say(session, content=SECRET)
    entry = entry_of(db, client_id)
    assert entry.preview == SECRET
    assert SECRET not in repr(entry)


def test_inbox_shows_nothing_of_another_client(db: Database, client_id: UUID, other_client_id: UUID) -> None:
    with db.tenant_session(other_client_id) as session:
        for minute in range(5):
            say(session, minute=60 + minute, content=SECRET)
        say(session, "theirs", content=SECRET)
    with db.tenant_session(client_id) as session:
        say(session, content="ours")
    for unread_only, status in product((False, True), STATUSES[:2]):
        with db.tenant_session(client_id) as session:
            [entry] = conversations.inbox(session, status=status, unread_only=unread_only).items
        assert (entry.state.chat_id, entry.state.last_message_at) == (CHAT, NOON)
        assert (entry.preview, entry.unread) == ("ours", 1)


# --- what the inbox costs ---


def grow(superuser: psycopg.Connection[Any], client_id: UUID, *, first: int, last: int) -> None:
    """Conversations of three messages and either status. One of 50 is unread, of the older half alone."""
    given = {"client": client_id, "first": first, "last": last, "noon": NOON}
    superuser.execute(
        """
        INSERT INTO active_conversations (client_id, chat_id, status, last_role, last_message_at, last_message_id,
                                          last_user_message_at, last_user_message_id, last_read_message_id)
        SELECT %(client)s, 'chat ' || n, CASE n %% 2 WHEN 0 THEN 'active' ELSE 'finished' END, 'user',
               %(noon)s - n * interval '1 s', 3 * n + 2, %(noon)s - n * interval '1 s', 3 * n + 2,
               CASE WHEN n %% 100 < 2 AND n > 300 THEN NULL ELSE 3 * n + 2 END
        FROM generate_series(%(first)s::int, %(last)s::int) AS n
        """,
        given,
    )
    superuser.execute(
        """
        INSERT INTO chat_messages (client_id, id, chat_id, role, content, created_at)
        SELECT %(client)s, 3 * n + part, 'chat ' || n, CASE part WHEN 1 THEN 'assistant' ELSE 'user' END,
               repeat('x', 300), %(noon)s - n * interval '1 s' + part * interval '1 ms'
        FROM generate_series(%(first)s::int, %(last)s::int) AS n, generate_series(0, 2) AS part
        """,
        given,
    )
    superuser.execute("VACUUM ANALYZE active_conversations")
    superuser.execute("VACUUM ANALYZE chat_messages")


def executed(session: TenantSession, **given: Any) -> tuple[list[InboxEntry], dict[str, Any]]:
    """A page of the inbox, and the plan that PostgreSQL executed for its one statement, under row level security."""
    items, sent = asked(session, **given)
    return items, explain(session, sent, "ANALYZE", "BUFFERS")


def asked(session: TenantSession, **given: Any) -> tuple[list[InboxEntry], Sent]:
    """A page of the inbox, and the one statement that it took."""
    with statements_sent() as sent:
        items = conversations.inbox(session, **given).items
    [statement] = sent
    return items, statement


def touched(plan: dict[str, Any]) -> int:
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def cursor_in_the_middle(session: TenantSession, **given: Any) -> str | None:
    return conversations.inbox(session, **given, limit=200).cursor


def test_every_inbox_walks_its_index_and_sorts_no_more_than_its_page(
    db: Database, superuser: psycopg.Connection[Any], client_id: UUID, other_client_id: UUID
) -> None:
    grow(superuser, other_client_id, first=1, last=10_000)
    grow(superuser, client_id, first=1, last=30_000)
    limit = 50
    for status, unread_only, later in product(STATUSES, (False, True), (False, True)):
        which: dict[str, Any] = {"status": status, "unread_only": unread_only}
        with db.tenant_session(client_id) as session:
            cursor = cursor_in_the_middle(session, **which) if later else None
            assert (cursor is not None) is later
            items, plan = executed(session, **which, cursor=cursor, limit=limit)
        assert len(items) == limit, which
        arms = 2 if status is None else 1
        scans = [node for node in nodes(plan) if "Relation Name" in node]
        of_conversations = [node for node in scans if node["Relation Name"] == "active_conversations"]
        index = "ix_active_conversations_unread" if unread_only else "ix_active_conversations_inbox"
        assert [node.get("Index Name") for node in of_conversations] == [index] * arms, which
        assert sum(node["Actual Rows"] for node in of_conversations) <= arms * (limit + 1), which
        assert sorted(str(node.get("Index Name")) for node in scans if node not in of_conversations) == [
            "ix_chat_messages_client_id_chat_id_created_at_id",
            "ix_chat_messages_unread",
        ], which
        for node in scans:
            assert node["Node Type"] in {"Index Scan", "Index Only Scan"}, which
            # Nothing is read and thrown away: what was asked for is what the index was searched by.
            assert node.get("Rows Removed by Filter", 0) == 0, which
        [unread] = [node for node in scans if node["Index Name"] == "ix_chat_messages_unread"]
        assert "id >" in unread["Index Cond"], which
        for node in nodes(plan):
            if "Sort" in node["Node Type"]:
                assert max(part["Actual Rows"] for part in node["Plans"]) <= arms * (limit + 1), which


def test_plan_that_is_kept_for_every_value_walks_the_same_indexes(
    db: Database, superuser: psycopg.Connection[Any], client_id: UUID
) -> None:
    grow(superuser, client_id, first=1, last=5_000)
    superuser.execute("SET plan_cache_mode = force_generic_plan")
    for unread_only in (False, True):
        with db.tenant_session(client_id) as session:
            _, sent = asked(session, unread_only=unread_only)
        plan = explain_prepared(superuser, sent)
        assert [node["Index Name"] for node in nodes(plan) if "Relation Name" in node] == [
            *["ix_active_conversations_unread" if unread_only else "ix_active_conversations_inbox"] * 2,
            "ix_chat_messages_client_id_chat_id_created_at_id",
            "ix_chat_messages_unread",
        ]


def test_page_costs_the_same_in_a_table_fifty_times_as_large(
    db: Database, superuser: psycopg.Connection[Any], client_id: UUID, other_client_id: UUID
) -> None:
    combinations = list(product(STATUSES, (False, True)))

    def measure() -> list[int]:
        found = []
        for status, unread_only in combinations:
            with db.tenant_session(client_id) as session:
                items, plan = executed(session, status=status, unread_only=unread_only, limit=5)
            assert len(items) == 5
            found.append(touched(plan))
        return found

    grow(superuser, client_id, first=1, last=1_000)
    small = measure()
    grow(superuser, client_id, first=1_001, last=50_000)
    grow(superuser, other_client_id, first=1, last=1_000)
    large = measure()
    for which, before, after in zip(combinations, small, large, strict=True):
        assert 0 < after <= 2 * before, (which, before, after)


def test_unread_count_does_not_walk_what_was_read(
    db: Database, superuser: psycopg.Connection[Any], client_id: UUID
) -> None:
    grow(superuser, client_id, first=1, last=1_000)
    superuser.execute(
        "INSERT INTO chat_messages (client_id, id, chat_id, role, content, created_at)"
        " SELECT %s, -n, 'chat 1', 'user', 'x', %s::timestamptz - n * interval '1 d'"
        " FROM generate_series(1, 20000) AS n",
        [client_id, NOON],
    )
    superuser.execute("VACUUM ANALYZE chat_messages")
    with db.tenant_session(client_id) as session:
        [entry], plan = executed(session, limit=1)
    assert (entry.state.chat_id, entry.unread) == ("chat 1", 0)
    assert touched(plan) < 60


def test_unread_count_ends_at_its_cap(db: Database, superuser: psycopg.Connection[Any], client_id: UUID) -> None:
    grow(superuser, client_id, first=1, last=1_000)
    superuser.execute(
        "INSERT INTO chat_messages (client_id, id, chat_id, role, content, created_at)"
        " SELECT %s, 10000 + n, 'chat 1', 'user', 'x', %s::timestamptz - n * interval '1 d'"
        " FROM generate_series(1, 20000) AS n",
        [client_id, NOON],
    )
    superuser.execute("VACUUM ANALYZE chat_messages")
    with db.tenant_session(client_id) as session:
        [entry], plan = executed(session, limit=1)
    assert (entry.state.chat_id, entry.unread, entry.unread_capped) == ("chat 1", 99, True)
    [unread] = [node for node in nodes(plan) if node.get("Index Name") == "ix_chat_messages_unread"]
    assert unread["Actual Rows"] * unread["Actual Loops"] == 100


# --- what a person has read ---


def test_what_was_read_stays_read(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        first, second, third = (say(session, minute=minute).message_id for minute in range(3))
        for up_to, read in ((second, second), (first, second), (0, second), (third, third), (second, third)):
            state = conversations.mark_read(session, chat_id=CHAT, up_to=up_to)
            assert state.last_read_message_id == read
    assert stored(db, client_id)["last_read_message_id"] == third


@pytest.mark.parametrize("beyond", [1, 2**31, 2**62])
def test_no_message_to_come_is_read_already(db: Database, client_id: UUID, beyond: int) -> None:
    with db.tenant_session(client_id) as session:
        newest = say(session).message_id
        state = conversations.mark_read(session, chat_id=CHAT, up_to=newest + beyond)
        assert state.last_read_message_id == newest
        say(session, minute=1)
    assert entry_of(db, client_id).unread == 1


def test_no_message_is_read_where_there_is_none_yet(db: Database, client_id: UUID) -> None:
    make(db, client_id)
    with db.tenant_session(client_id) as session:
        conversations.mark_read(session, chat_id=CHAT, up_to=10**6)
        say(session)
        [entry] = conversations.inbox(session, unread_only=True).items
    assert entry.unread == 1


@pytest.mark.parametrize(("role", "late"), [("user", True), ("assistant", False)])
def test_message_that_came_last_can_be_marked_read(db: Database, client_id: UUID, role: Role, *, late: bool) -> None:
    with db.tenant_session(client_id) as session:
        say(session, minute=1)
        last = say(session, role=role, minute=0 if late else 2).message_id
        assert conversations.mark_read(session, chat_id=CHAT, up_to=last).last_read_message_id == last
        assert conversations.inbox(session, unread_only=True).items == []


def test_concurrent_marks_end_at_the_highest_in_any_order(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        ids = [say(session, minute=minute).message_id for minute in range(3)]
    orders = list(permutations(ids))

    def mark(up_to: int) -> None:
        with db.tenant_session(client_id) as session:
            conversations.mark_read(session, chat_id=CHAT, up_to=up_to)

    for order in orders:
        with db.tenant_session(client_id) as session:
            session.get_one(ActiveConversation, (CHAT, client_id)).last_read_message_id = None
        at_once(*(partial(mark, up_to) for up_to in order))
        assert stored(db, client_id)["last_read_message_id"] == max(ids)


def test_mark_that_waited_for_a_higher_one_leaves_it(
    db: Database, superuser: psycopg.Connection[Any], client_id: UUID
) -> None:
    with db.tenant_session(client_id) as session:
        first, second = (say(session, minute=minute).message_id for minute in range(2))

    def mark() -> ConversationState:
        with db.tenant_session(client_id) as session:
            return conversations.mark_read(session, chat_id=CHAT, up_to=first)

    with ThreadPoolExecutor(1) as pool:
        with db.tenant_session(client_id) as session:
            conversations.mark_read(session, chat_id=CHAT, up_to=second)
            waiting = pool.submit(mark)
            until_waiting(superuser, waiting)
        assert waiting.result(PATIENCE).last_read_message_id == second


# --- the assistant's summary ---


def test_summary_is_stored_with_the_message_that_it_covers(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        first, second = (say(session, minute=minute).message_id for minute in range(2))
        for up_to, summary in ((first, "a"), (second, "b"), (second, "c")):
            state = conversations.set_context(session, chat_id=CHAT, summary=summary, up_to=up_to)
            assert (state.chat_id, state.last_message_id) == (CHAT, second)
            found = stored_in(session)
            assert (found.last_context, found.last_context_message_id) == (summary, up_to)


def stored_in(session: TenantSession) -> ActiveConversation:
    return session.get_one(ActiveConversation, (CHAT, session.client_id), populate_existing=True)


def test_older_summary_is_refused(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        first, second = (say(session, minute=minute).message_id for minute in range(2))
        conversations.set_context(session, chat_id=CHAT, summary="new", up_to=second)
        with pytest.raises(ContextOutdated) as refused:
            conversations.set_context(session, chat_id=CHAT, summary=SECRET, up_to=first)
    assert (refused.value.up_to, refused.value.stored) == (first, second)
    assert SECRET not in str(refused.value)
    after = stored(db, client_id)
    assert (after["last_context"], after["last_context_message_id"]) == ("new", second)


def test_summary_covers_no_message_to_come(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        newest = say(session).message_id
        conversations.set_context(session, chat_id=CHAT, summary="a", up_to=newest + 100)
        assert stored_in(session).last_context_message_id == newest
        following = say(session, minute=1).message_id
        conversations.set_context(session, chat_id=CHAT, summary="b", up_to=following)
    assert stored(db, client_id)["last_context"] == "b"


def test_summary_of_an_adopted_conversation_is_replaced(db: Database, client_id: UUID) -> None:
    make(db, client_id, last_context="appended to for ever")
    with db.tenant_session(client_id) as session:
        conversations.set_context(session, chat_id=CHAT, summary="", up_to=0)
        assert stored_in(session).last_context == ""


def test_summary_has_at_most_8000_characters(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        last = say(session).message_id
        conversations.set_context(session, chat_id=CHAT, summary="ç" * 8000, up_to=last)
        with pytest.raises(InvalidValue, match="8001") as refused:
            conversations.set_context(session, chat_id=CHAT, summary="ç" * 8001, up_to=last)
    assert "çç" not in str(refused.value)
    assert stored(db, client_id)["last_context"] == "ç" * 8000
    assert MAX_CONTEXT == 8000


@pytest.mark.parametrize("unstorable", ["a\0b", "a\ud800b"])
def test_summary_that_cannot_be_stored_is_refused_before_it_is_sent(
    db: Database, client_id: UUID, unstorable: str
) -> None:
    with db.tenant_session(client_id) as session:
        last = say(session).message_id
        with statements_sent() as sent, pytest.raises(InvalidValue):
            conversations.set_context(session, chat_id=CHAT, summary=unstorable, up_to=last)
    assert sent == []


def test_older_summary_that_waited_for_a_newer_one_is_refused(
    db: Database, superuser: psycopg.Connection[Any], client_id: UUID
) -> None:
    with db.tenant_session(client_id) as session:
        first, second = (say(session, minute=minute).message_id for minute in range(2))

    def summarise() -> None:
        with db.tenant_session(client_id) as session:
            conversations.set_context(session, chat_id=CHAT, summary="old", up_to=first)

    with ThreadPoolExecutor(1) as pool:
        with db.tenant_session(client_id) as session:
            conversations.set_context(session, chat_id=CHAT, summary="new", up_to=second)
            waiting = pool.submit(summarise)
            until_waiting(superuser, waiting)
        with pytest.raises(ContextOutdated) as refused:
            waiting.result(PATIENCE)
    assert (refused.value.up_to, refused.value.stored) == (first, second)
    assert stored(db, client_id)["last_context"] == "new"


@pytest.mark.parametrize("act", ["mark_read", "set_context"])
def test_id_that_is_no_integer_is_refused_and_not_rounded(db: Database, client_id: UUID, act: str) -> None:
    with db.tenant_session(client_id) as session:
        say(session)
        for up_to in (1.5, True, "1", None):
            given: dict[str, Any] = {"chat_id": CHAT, "up_to": up_to}
            with pytest.raises(InvalidValue):
                if act == "mark_read":
                    conversations.mark_read(session, **given)
                else:
                    conversations.set_context(session, summary="a", **given)


@pytest.mark.parametrize("act", ["mark_read", "set_context"])
def test_negative_id_is_refused(db: Database, client_id: UUID, act: str) -> None:
    given = {"summary": "a"} if act == "set_context" else {}
    with db.tenant_session(client_id) as session:
        say(session)
        with pytest.raises(InvalidValue):
            getattr(conversations, act)(session, chat_id=CHAT, up_to=-1, **given)


# --- the end, and the beginning again ---

CLAIM: Final = {"claim_token": uuid4(), "claimed_until": LATER}


def test_conversation_is_finished_on_the_strength_of_its_newest_message(db: Database, client_id: UUID) -> None:
    make(db, client_id, followup_stage=2, last_message_id=7, paused_until=LATER, **CLAIM)
    before = stored(db, client_id)
    with db.tenant_session(client_id) as session:
        state = conversations.finish(session, chat_id=CHAT, expected_last_message_id=7)
    assert state.status == "finished"
    assert stored(db, client_id) == before | {"status": "finished", "claim_token": None, "claimed_until": None}


def test_unseen_message_that_was_sent_earlier_keeps_the_conversation_open(db: Database, client_id: UUID) -> None:
    """A quick answer can be sent, in whole seconds, before what it answers."""
    with db.tenant_session(client_id) as session:
        seen = say(session, role="assistant", minute=1).conversation
        unseen = say(session, minute=0).conversation
        assert (unseen.last_message_id, unseen.last_role) == (seen.last_message_id, "assistant")
        assert (seen.awaits_answer, unseen.awaits_answer) == (False, True)
        with pytest.raises(ConversationMoved) as refused:
            conversations.finish(session, chat_id=CHAT, expected_last_message_id=seen.last_id)
        assert refused.value.actual == unseen.last_id == unseen.last_user_message_id
        conversations.finish(session, chat_id=CHAT, expected_last_message_id=unseen.last_id)


def test_conversation_without_messages_awaits_no_answer(db: Database, client_id: UUID) -> None:
    make(db, client_id)
    state = entry_of(db, client_id).state
    assert (state.last_id, state.awaits_answer) == (None, False)


def test_conversation_without_messages_can_be_finished(db: Database, client_id: UUID) -> None:
    make(db, client_id)
    with db.tenant_session(client_id) as session:
        assert conversations.finish(session, chat_id=CHAT, expected_last_message_id=None).status == "finished"


@pytest.mark.parametrize(("actual", "expected"), [(7, 6), (7, 8), (7, None), (None, 7), (7, 2**40)])
def test_conversation_that_has_gone_on_is_not_finished(
    db: Database, client_id: UUID, actual: int | None, expected: int | None
) -> None:
    make(db, client_id, last_message_id=actual, **CLAIM)
    before = stored(db, client_id)
    make(db, client_id, chat_id="another", last_message_id=99)
    with db.tenant_session(client_id) as session, pytest.raises(ConversationMoved) as refused:
        conversations.finish(session, chat_id=CHAT, expected_last_message_id=expected)
    assert (refused.value.expected, refused.value.actual) == (expected, actual)
    assert stored(db, client_id) == before


def test_answer_that_arrives_while_the_conversation_is_being_finished_keeps_it_open(
    db: Database, superuser: psycopg.Connection[Any], client_id: UUID
) -> None:
    with db.tenant_session(client_id) as session:
        question = say(session, role="assistant").message_id

    def finish() -> None:
        with db.tenant_session(client_id) as session:
            conversations.finish(session, chat_id=CHAT, expected_last_message_id=question)

    with ThreadPoolExecutor(1) as pool:
        with db.tenant_session(client_id) as session:
            answer = say(session, minute=1).message_id
            waiting = pool.submit(finish)
            until_waiting(superuser, waiting)
        with pytest.raises(ConversationMoved) as refused:
            waiting.result(PATIENCE)
    assert (refused.value.expected, refused.value.actual) == (question, answer)
    assert stored(db, client_id)["status"] == "active"


def test_of_an_answer_and_an_end_at_once_the_answer_is_never_lost(db: Database, client_id: UUID) -> None:
    def finish(chat_id: str, question: int) -> ConversationState:
        with db.tenant_session(client_id) as session:
            return conversations.finish(session, chat_id=chat_id, expected_last_message_id=question)

    def answer(chat_id: str) -> Recorded:
        with db.tenant_session(client_id) as session:
            return say(session, chat_id, minute=1)

    for number in range(10):
        chat_id = f"chat {number}"
        with db.tenant_session(client_id) as session:
            question = say(session, chat_id, "assistant").message_id
        finished, answered = outcomes_at_once(partial(finish, chat_id, question), partial(answer, chat_id))
        assert isinstance(finished, ConversationState | ConversationMoved)
        assert isinstance(answered, Recorded)
        assert stored(db, client_id, chat_id)["status"] == "active"


def test_reopened_conversation_is_active_at_its_stage(db: Database, client_id: UUID) -> None:
    make(db, client_id, status="finished", followup_stage=3, paused_until=LATER)
    before = stored(db, client_id)
    with db.tenant_session(client_id) as session:
        state = conversations.reopen(session, chat_id=CHAT)
    assert (state.status, state.followup_stage) == ("active", 3)
    assert stored(db, client_id) == before | {"status": "active"}


# --- the pause ---


def test_pause_keeps_the_assistant_silent_and_ends_a_claim(db: Database, client_id: UUID) -> None:
    make(db, client_id, followup_stage=2, **CLAIM)
    before = stored(db, client_id)
    with db.tenant_session(client_id) as session:
        state = conversations.pause(session, chat_id=CHAT, until=LATER)
    assert state.paused(LATER - timedelta(microseconds=1))
    assert not state.paused(LATER)
    changed = {"paused_until": LATER, "claim_token": None, "claimed_until": None}
    assert stored(db, client_id) == before | changed


def test_pause_replaces_the_one_before(db: Database, client_id: UUID) -> None:
    make(db, client_id, paused_until=LATER)
    with db.tenant_session(client_id) as session:
        assert conversations.pause(session, chat_id=CHAT, until=NOON).paused_until == NOON


@pytest.mark.parametrize("until", [NOON.replace(tzinfo=None), None, 30, "2020-05-01T12:00Z"])
def test_pause_without_an_instant_is_refused(db: Database, client_id: UUID, until: Any) -> None:
    make(db, client_id, paused_until=LATER)
    with db.tenant_session(client_id) as session, pytest.raises(InvalidValue):
        conversations.pause(session, chat_id=CHAT, until=until)
    assert stored(db, client_id)["paused_until"] == LATER


def test_resumed_conversation_is_not_paused(db: Database, client_id: UUID) -> None:
    make(db, client_id, paused_until=LATER)
    before = stored(db, client_id)
    with db.tenant_session(client_id) as session:
        state = conversations.resume(session, chat_id=CHAT)
    assert not state.paused(NOON)
    assert stored(db, client_id) == before | {"paused_until": None}


def test_claim_outlives_what_does_not_concern_the_follow_up(db: Database, client_id: UUID) -> None:
    make(db, client_id, last_message_id=7, **CLAIM)
    with db.tenant_session(client_id) as session:
        conversations.mark_read(session, chat_id=CHAT, up_to=7)
        conversations.set_context(session, chat_id=CHAT, summary="a", up_to=7)
        conversations.reopen(session, chat_id=CHAT)
        conversations.resume(session, chat_id=CHAT)
    assert CLAIM.items() <= stored(db, client_id).items()


# --- the 24 hours ---

DAY: Final = timedelta(hours=24)
SECOND: Final = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("after", "is_open"),
    [
        (timedelta(0), True),
        (DAY - SECOND, True),
        (DAY - timedelta(microseconds=1), True),
        (DAY, False),
        (DAY + SECOND, False),
    ],
)
def test_window_is_open_for_less_than_24_hours(
    db: Database, client_id: UUID, after: timedelta, *, is_open: bool
) -> None:
    with db.tenant_session(client_id) as session:
        state = say(session).conversation
        assert conversations.window_open(session, chat_id=CHAT, now=NOON + after) is is_open
    assert state.window_open(NOON + after) is is_open


def test_window_is_not_extended_by_the_assistant_or_the_system(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        say(session)
        for role in ("assistant", "system"):
            state = say(session, role=role, minute=23 * 60).conversation
        assert not conversations.window_open(session, chat_id=CHAT, now=NOON + DAY)
        assert not state.window_open(NOON + DAY)
        say(session, minute=23 * 60)
        assert conversations.window_open(session, chat_id=CHAT, now=NOON + DAY)


def test_window_is_closed_where_the_end_customer_never_spoke(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        state = say(session, role="assistant").conversation
        assert not conversations.window_open(session, chat_id=CHAT, now=NOON)
        assert not conversations.window_open(session, chat_id=CHAT)
    assert not state.window_open(NOON)


def test_window_is_open_or_not_by_the_databases_clock(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        say(session)
        record(session, chat_id="now", role="user", content="oi")
        assert not conversations.window_open(session, chat_id=CHAT)
        assert conversations.window_open(session, chat_id="now")


def test_window_at_a_time_without_a_zone_is_refused(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        say(session)
        with pytest.raises(InvalidValue):
            conversations.window_open(session, chat_id=CHAT, now=NOON.replace(tzinfo=None))


def test_hours_are_those_of_the_instants_when_summer_time_ends(db: Database, client_id: UUID) -> None:
    zone = ZoneInfo("America/New_York")
    with db.tenant_session(client_id) as session:
        state = say(session).conversation
    spoke = datetime(2020, 10, 31, 12, tzinfo=zone)
    state = state._replace(last_user_message_at=spoke, paused_until=datetime(2020, 11, 1, 1, 30, fold=1, tzinfo=zone))
    assert not state.window_open(datetime(2020, 11, 1, 11, tzinfo=zone))
    assert state.window_open(datetime(2020, 11, 1, 10, 59, 59, tzinfo=zone))
    assert state.paused(datetime(2020, 11, 1, 1, 45, tzinfo=zone))
    assert not state.paused(datetime(2020, 11, 1, 1, 30, fold=1, tzinfo=zone))


# --- all of them ---

ACTS: Final[dict[str, Callable[[TenantSession], object]]] = {
    "mark_read": lambda session: conversations.mark_read(session, chat_id=CHAT, up_to=1),
    "set_context": lambda session: conversations.set_context(session, chat_id=CHAT, summary="a", up_to=1),
    "finish": lambda session: conversations.finish(session, chat_id=CHAT, expected_last_message_id=1),
    "reopen": lambda session: conversations.reopen(session, chat_id=CHAT),
    "pause": lambda session: conversations.pause(session, chat_id=CHAT, until=LATER + DAY),
    "resume": lambda session: conversations.resume(session, chat_id=CHAT),
    "window_open": lambda session: conversations.window_open(session, chat_id=CHAT, now=NOON),
}
HALTED: Final = {
    "last_message_id": 1,
    "last_user_message_id": 1,
    "last_user_message_at": NOON,
    "status": "finished",
    "paused_until": LATER,
}
CHANGED_BY: Final = {
    "mark_read": {"last_read_message_id"},
    "set_context": {"last_context", "last_context_message_id"},
    "finish": {"status"},
    "reopen": {"status"},
    "pause": {"paused_until"},
    "resume": {"paused_until"},
    "window_open": set(),
}


@pytest.mark.parametrize("act", sorted(set(ACTS) - {"window_open"}))
def test_a_change_and_then_a_message_do_not_deadlock_with_a_webhook(
    db: Database, superuser: psycopg.Connection[Any], client_id: UUID, act: str
) -> None:
    make(db, client_id, **HALTED)

    def deliver() -> Recorded:
        with db.tenant_session(client_id) as session:
            return say(session, minute=1)

    with ThreadPoolExecutor(1) as pool:
        with db.tenant_session(client_id) as session:
            ACTS[act](session)
            delivering = pool.submit(deliver)
            until_waiting(superuser, delivering)
            said = say(session, minute=2)
        assert delivering.result(PATIENCE).message_id > said.message_id


@pytest.mark.parametrize("act", ACTS)
def test_conversation_of_another_client_is_not_found(
    db: Database, client_id: UUID, other_client_id: UUID, act: str
) -> None:
    make(db, other_client_id, **HALTED)
    before = stored(db, other_client_id)
    with db.tenant_session(client_id) as session, pytest.raises(ConversationNotFound) as missing:
        ACTS[act](session)
    assert missing.value.chat_id == CHAT
    assert stored(db, other_client_id) == before


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("act", ACTS)
def test_one_conversation_of_one_client_is_changed(
    db: Database, client_id: UUID, other_client_id: UUID, act: str
) -> None:
    columns = HALTED | ({"status": "active"} if act == "finish" else {})
    make(db, client_id, **columns)
    bystanders = [(client_id, f"{CHAT}2"), (other_client_id, CHAT)]
    for owner, chat_id in bystanders:
        make(db, owner, chat_id=chat_id, **columns)
    before = stored(db, client_id)
    others = [stored(db, *bystander) for bystander in bystanders]
    with db.tenant_session(client_id) as session:
        ACTS[act](session)
    after = stored(db, client_id)
    assert {name for name in after if after[name] != before[name]} == CHANGED_BY[act]
    assert [stored(db, *bystander) for bystander in bystanders] == others


@pytest.mark.parametrize("act", ACTS)
def test_nothing_is_committed_but_by_the_session(db: Database, client_id: UUID, act: str) -> None:
    make(db, client_id, **HALTED)
    before = stored(db, client_id)
    with db.tenant_session(client_id) as session:
        ACTS[act](session)
        session.rollback()
    assert stored(db, client_id) == before


@pytest.mark.parametrize("act", [*ACTS, "inbox"])
def test_session_of_all_clients_is_refused(db: Database, client_id: UUID, act: str) -> None:
    make(db, client_id, **HALTED)
    before = stored(db, client_id)
    run: Any = ACTS.get(act, conversations.inbox)
    with db.system_session(reason="not meant for it") as session, pytest.raises(TenancyError):
        run(session)
    assert stored(db, client_id) == before


def test_all_of_it_works_in_async_sessions(db: Database, client_id: UUID) -> None:
    async def main() -> list[Any]:
        async with db, db.async_tenant_session(client_id) as session:
            run = session.run_sync
            last = (await run(record, chat_id=CHAT, role="user", content="oi", sent_at=NOON, now=LATER)).message_id
            await run(record, chat_id="other", role="user", content="oi", sent_at=NOON, now=LATER)
            first = await run(conversations.inbox, limit=1)
            page = await run(conversations.inbox, status="active", unread_only=True, cursor=first.cursor)
            await run(conversations.set_context, chat_id=CHAT, summary="a", up_to=last)
            await run(conversations.pause, chat_id=CHAT, until=LATER)
            await run(conversations.finish, chat_id=CHAT, expected_last_message_id=last)
            await run(conversations.reopen, chat_id=CHAT)
            with pytest.raises(ConversationMoved):
                await run(conversations.finish, chat_id=CHAT, expected_last_message_id=None)
            with pytest.raises(ConversationNotFound):
                await run(conversations.resume, chat_id="nobody")
            return [
                chats(first.items) + chats(page.items),
                await run(conversations.window_open, chat_id=CHAT, now=NOON),
                (await run(conversations.mark_read, chat_id=CHAT, up_to=last)).last_read_message_id == last,
                (await run(conversations.resume, chat_id=CHAT)).paused_until,
            ]

    assert asyncio.run(main()) == [["other", CHAT], True, True, None]
