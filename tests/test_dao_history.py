"""What is read of a chat, and what is erased of it: history, memory, erase_chat, purge."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import Barrier, Event
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg.sql import SQL, Identifier, Literal
from sqlalchemy import delete, func, insert, select, update

from kestra import ActiveConversation, ChatMessage, Database, TenantSession
from kestra.dao import messages
from kestra.dao.keyset import Page, page_of
from kestra.dao.messages import Erased, IncomingMessage, Memory, Message, Purged, Recorded
from kestra.errors import ErasureIncomplete, InvalidCursor, InvalidValue, TenancyError
from kestra.models import Role
from tests.concurrency import at_once, until_waiting
from tests.observing import explain, nodes, statements_sent

CHAT: Final = "5511999999999"
OTHER_CHAT: Final = "5511888888888@lid"
NOON: Final = datetime(2025, 3, 10, 12, 0, tzinfo=UTC)
SECRET: Final = "segredo do cliente"  # noqa: S105  # a message text, which must not be shown
WAIT: Final = 30
"""Seconds after which a test that waits for ever fails."""


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def say(session: TenantSession, content: str, seconds: float, *, chat_id: str = CHAT, role: Role = "user") -> Recorded:
    return messages.record(session, chat_id=chat_id, role=role, content=content, sent_at=at(seconds))


def say_all(db: Database, client_id: UUID, said: dict[str, float], *, chat_id: str = CHAT) -> None:
    with db.tenant_session(client_id) as session:
        for content, seconds in said.items():
            say(session, content, seconds, chat_id=chat_id)


def contents(found: list[Message]) -> list[str | None]:
    return [message.content for message in found]


def page(db: Database, client_id: UUID, **arguments: Any) -> Page[Message]:
    with db.tenant_session(client_id) as session:
        return messages.history(session, **{"chat_id": CHAT, **arguments})


def pages(db: Database, client_id: UUID, *, limit: int) -> Iterator[list[Message]]:
    """Each page in a transaction of its own, as an inbox asks for them."""
    cursor = None
    while True:
        answer = page(db, client_id, before=cursor, limit=limit)
        yield answer.items
        cursor = answer.cursor
        if cursor is None:
            return


def remembered(db: Database, client_id: UUID, **arguments: Any) -> Memory:
    with db.tenant_session(client_id) as session:
        return messages.memory(session, **{"chat_id": CHAT, **arguments})


def purged(db: Database, client_id: UUID, **arguments: Any) -> Purged:
    with db.tenant_session(client_id) as session:
        return messages.purge(session, **{"before": NOON, **arguments})


def stored(db: Database, client_id: UUID) -> set[tuple[str, str | None]]:
    """The messages of the client, by chat and content."""
    with db.tenant_session(client_id) as session:
        return {(row.chat_id, row.content) for row in session.scalars(select(ChatMessage))}


def conversations(db: Database, client_id: UUID) -> dict[str, ActiveConversation]:
    with db.tenant_session(client_id) as session:
        return {row.chat_id: row for row in session.scalars(select(ActiveConversation))}


def set_conversation(db: Database, client_id: UUID, chat_id: str = CHAT, **values: object) -> None:
    with db.tenant_session(client_id) as session:
        session.execute(update(ActiveConversation).where(ActiveConversation.chat_id == chat_id).values(values))


def add_conversation(db: Database, client_id: UUID, chat_id: str, **values: object) -> None:
    with db.tenant_session(client_id) as session:
        session.execute(insert(ActiveConversation).values(chat_id=chat_id, **values))


@pytest.fixture(autouse=True)
def nobody_waits_for_ever(superuser: psycopg.Connection[Any], superuser_url: str) -> None:
    database = Identifier(str(conninfo_to_dict(superuser_url)["dbname"]))
    superuser.execute(SQL("ALTER DATABASE {} SET lock_timeout = {}").format(database, Literal(f"{WAIT}s")))


def plan(session: TenantSession, call: Callable[[], object]) -> list[dict[str, Any]]:
    """The nodes of the plan of the first statement of a call."""
    with statements_sent() as sent:
        call()
    return list(nodes(explain(session, sent[0])))


@pytest.fixture
def many(superuser: psycopg.Connection[Any], client_id: UUID, other_client_id: UUID) -> None:
    """40 chats of two clients with 500 messages each: for every plan there is a reason."""
    for client in (client_id, other_client_id):
        superuser.execute(
            "INSERT INTO chat_messages (client_id, chat_id, role, content, created_at) "
            "SELECT %s, CASE n %% 20 WHEN 0 THEN %s ELSE 'chat-' || n %% 20 END, 'user', repeat('x', 100), "
            "%s + n * interval '1 second' FROM generate_series(1, 10000) n",
            [client, CHAT, NOON],
        )
    superuser.execute("VACUUM ANALYZE chat_messages")


# --- every function ---


CALLS: Final[dict[str, Callable[[TenantSession], object]]] = {
    "history": lambda session: messages.history(session, chat_id=CHAT),
    "memory": lambda session: messages.memory(session, chat_id=CHAT),
    "erase_chat": lambda session: messages.erase_chat(session, chat_id=CHAT),
    "purge": lambda session: messages.purge(session, before=at(10)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_session_over_all_clients_is_refused(db: Database, call: Callable[[Any], object]) -> None:
    with db.system_session(reason="test") as session, pytest.raises(TenancyError, match="SystemSession"):
        call(session)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.usefixtures("layers")
def test_another_clients_rows_of_the_same_chat_are_neither_seen_nor_changed(
    db: Database, client_id: UUID, other_client_id: UUID, call: Callable[[TenantSession], object]
) -> None:
    say_all(db, other_client_id, {SECRET: 1})
    set_conversation(db, other_client_id, last_context=SECRET)
    add_conversation(db, other_client_id, "empty", last_message_at=at(1))
    before = stored(db, other_client_id), {c: row.last_context for c, row in conversations(db, other_client_id).items()}

    with db.tenant_session(client_id) as session:
        nothing = {
            "history": Page([], None),
            "memory": Memory(None, None, []),
            "erase_chat": Erased(0, 0),
            "purge": Purged(0, 0, more=False),
        }
        assert call(session) == next(nothing[name] for name, known in CALLS.items() if known is call)

    after = stored(db, other_client_id), {c: row.last_context for c, row in conversations(db, other_client_id).items()}
    assert after == before


def test_asyncio_gets_the_same_answers(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"a": 1, "b": 2, "c": 3})
    set_conversation(db, client_id, last_context="resumo")

    async def main() -> None:
        async with db:
            async with db.async_tenant_session(client_id) as session:
                first = await session.run_sync(messages.history, chat_id=CHAT, limit=2)
                second = await session.run_sync(messages.history, chat_id=CHAT, before=first.cursor, limit=2)
                assert contents(first.items + second.items) == ["c", "b", "a"]
                memory = await session.run_sync(messages.memory, chat_id=CHAT, max_messages=2)
                assert (memory.summary, contents(memory.messages)) == ("resumo", ["b", "c"])
            async with db.async_tenant_session(client_id) as session:
                assert await session.run_sync(messages.purge, before=at(2)) == Purged(1, 0, more=False)
            async with db.async_tenant_session(client_id) as session:
                assert await session.run_sync(messages.erase_chat, chat_id=CHAT) == Erased(2, 1)

    asyncio.run(main())
    assert not stored(db, client_id)


# --- history ---


TIED: Final = {f"m{n}": float(n // 4) for n in range(14)}
"""Messages in the order they were stored: four at each moment."""


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7, 13, 14, 15, 500])
def test_pages_together_are_the_whole_history_with_tied_timestamps(db: Database, client_id: UUID, limit: int) -> None:
    say_all(db, client_id, TIED)
    say_all(db, client_id, {"elsewhere": 1}, chat_id=OTHER_CHAT)

    read = list(pages(db, client_id, limit=limit))

    assert [content for items in read for content in contents(items)] == list(reversed(TIED))
    full, rest = divmod(len(TIED), limit)
    assert [len(items) for items in read] == [limit] * full + [rest] * (rest > 0)


def test_cursor_is_exact_to_the_microsecond(db: Database, client_id: UUID) -> None:
    said = {f"m{n}": n / 1_000_000 for n in range(4)}
    say_all(db, client_id, said)
    assert [contents(items) for items in pages(db, client_id, limit=1)] == [["m3"], ["m2"], ["m1"], ["m0"]]


def test_messages_that_arrive_between_pages_neither_hide_nor_repeat_one(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, TIED)
    read = []
    for number, items in enumerate(pages(db, client_id, limit=3)):
        read += contents(items)
        # New ones, and late ones into the part that was read: at the moment of the newest message there was.
        say_all(db, client_id, {f"new {number}": 100 + number, f"late {number}": TIED["m13"]})
    assert read == list(reversed(TIED))


def test_late_message_appears_in_the_part_that_was_not_read_yet(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, TIED)
    read = pages(db, client_id, limit=3)
    seen = contents(next(read))
    say_all(db, client_id, {"late": 1})
    seen += [content for items in read for content in contents(items)]
    assert [content for content in seen if content != "late"] == list(reversed(TIED))
    # Its id is the largest of its moment.
    assert seen.index("late") == seen.index("m7") - 1


def test_message_is_returned_whole_and_shows_no_text(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        recorded = messages.record(
            session,
            chat_id=CHAT,
            role="assistant",
            content=SECRET,
            media_url="https://cdn/" + SECRET,
            provider_message_id="wamid.1",
            sent_at=NOON,
        )
    found = page(db, client_id)
    expected = (recorded.message_id, CHAT, "assistant", SECRET, "https://cdn/" + SECRET, "wamid.1", NOON)
    assert [tuple(message) for message in found.items] == [expected]
    assert found.items[0].created_at.utcoffset() is not None
    assert SECRET not in repr(found)


def test_history_is_one_statement(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, TIED)
    with db.tenant_session(client_id) as session, statements_sent() as sent:
        cursor = messages.history(session, chat_id=CHAT, limit=3).cursor
        messages.history(session, chat_id=CHAT, before=cursor, limit=3)
    assert len(sent) == 2


def test_unknown_chat_has_no_history(db: Database, client_id: UUID) -> None:
    assert page(db, client_id) == Page([], None)


def test_cursor_of_another_chat_is_an_error(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, TIED)
    say_all(db, client_id, TIED, chat_id=OTHER_CHAT)
    cursor = page(db, client_id, limit=3).cursor
    with pytest.raises(InvalidCursor):
        page(db, client_id, chat_id=OTHER_CHAT, before=cursor)


def test_cursor_of_another_client_is_an_error(db: Database, client_id: UUID, other_client_id: UUID) -> None:
    say_all(db, client_id, TIED)
    say_all(db, other_client_id, TIED)
    cursor = page(db, client_id, limit=3).cursor
    with pytest.raises(InvalidCursor):
        page(db, other_client_id, before=cursor)


def test_cursor_of_another_list_is_an_error(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, TIED)
    for scope in (("inbox", client_id), ("inbox", client_id, CHAT)):
        cursor = page_of([1, 2], limit=1, scope=scope, key=lambda _: [NOON.isoformat(), 1]).cursor
        with pytest.raises(InvalidCursor):
            page(db, client_id, before=cursor)


@pytest.mark.parametrize("garbage", ["", "x", "ação", "AAAA", "A" * 40, "null", "\0", "2025-03-10T12:00:00+00:00"])
def test_garbage_is_no_cursor(db: Database, client_id: UUID, garbage: str) -> None:
    say_all(db, client_id, TIED)
    with pytest.raises(InvalidCursor):
        page(db, client_id, before=garbage)


def test_cursor_that_was_changed_is_an_error(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, TIED)
    cursor = page(db, client_id, limit=3).cursor
    assert cursor is not None
    for index, character in enumerate(cursor.rstrip("=")[:-1]):
        changed = cursor[:index] + ("B" if character == "A" else "A") + cursor[index + 1 :]
        with pytest.raises(InvalidCursor):
            page(db, client_id, before=changed)


@pytest.mark.parametrize("limit", [-1, 0, 501])
def test_limit_of_a_page_is_bounded(db: Database, client_id: UUID, limit: int) -> None:
    with pytest.raises(InvalidValue, match="from 1 to 500"):
        page(db, client_id, limit=limit)


@pytest.mark.usefixtures("many")
def test_history_walks_back_on_its_index(db: Database, client_id: UUID) -> None:
    newest_first = select(ChatMessage).order_by(ChatMessage.created_at.desc(), ChatMessage.id.desc()).limit(20)
    with db.tenant_session(client_id) as session:
        of_the_orm = plan(session, lambda: session.scalars(newest_first.where(ChatMessage.chat_id == CHAT)).all())
        cursor = messages.history(session, chat_id=CHAT, limit=100).cursor
        first = plan(session, lambda: messages.history(session, chat_id=CHAT))
        later = plan(session, lambda: messages.history(session, chat_id=CHAT, before=cursor))
    for found in (of_the_orm, first, later):
        assert [node["Node Type"] for node in found if node["Node Type"] != "Result"] == ["Limit", "Index Scan"]
        assert found[-1]["Index Name"] == "ix_chat_messages_client_id_chat_id_created_at_id"
        assert found[-1]["Scan Direction"] == "Backward"
        assert "client_id" in found[-1]["Index Cond"]
        assert "chat_id" in found[-1]["Index Cond"]
    assert "ROW(created_at, id) < ROW(" in later[-1]["Index Cond"]
    assert "created_at" not in later[-1].get("Filter", "")


# --- memory ---


SAID: Final[list[tuple[Role, str]]] = [
    ("assistant", "a" * 3),
    ("user", "b" * 5),
    ("system", "c" * 2),
    ("assistant", "d" * 9),
    ("user", "e" * 1),
    ("user", "f" * 4),
    ("assistant", "g" * 6),
]
"""In the order of time."""


@pytest.fixture
def said(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        for number, (role, content) in enumerate(SAID):
            say(session, content, number, role=role)


@pytest.mark.usefixtures("said")
def test_memory_is_the_longest_run_up_to_the_newest_message_that_fits(db: Database, client_id: UUID) -> None:
    def fits(run: list[tuple[Role, str]], most: tuple[int, int | None, int | None]) -> bool:
        max_messages, max_chars, max_tokens = most
        return (
            len(run) <= max_messages
            and (max_chars is None or sum(len(content) for _, content in run) <= max_chars)
            and (max_tokens is None or sum(len(content) + 1 for _, content in run) <= max_tokens)
        )

    with db.tenant_session(client_id) as session:
        for most in itertools.product(range(1, 9), [None, *range(1, 32, 2)], [None, *range(1, 40, 3)]):
            max_messages, max_chars, max_tokens = most
            memory = messages.memory(
                session,
                chat_id=CHAT,
                max_messages=max_messages,
                max_chars=max_chars,
                max_tokens=max_tokens,
                count_tokens=lambda text: len(text) + 1,
            )
            runs = (SAID[start:] for start in range(len(SAID)))
            expected = next((run for run in runs if fits(run, most)), SAID[-1:])
            assert [(message.role, message.content) for message in memory.messages] == expected, most


@pytest.mark.usefixtures("said")
def test_memory_has_the_newest_of_a_moment_by_id(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"x": 6, "y": 6})
    assert contents(remembered(db, client_id, max_messages=4).messages) == ["f" * 4, "g" * 6, "x", "y"]
    assert contents(remembered(db, client_id, max_messages=2).messages) == ["x", "y"]


def test_newest_message_is_kept_however_long(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"old": 1, "x" * 100: 2})
    for most in ({"max_chars": 1}, {"max_tokens": 1}, {"max_chars": 1, "max_tokens": 1}):
        assert contents(remembered(db, client_id, **most).messages) == ["x" * 100]


def test_memory_has_no_gap_where_a_message_does_not_fit(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"short": 1, "x" * 100: 2, "newest": 3})
    assert contents(remembered(db, client_id, max_chars=50).messages) == ["newest"]


def test_token_is_four_characters_unless_somebody_counts_better(db: Database, client_id: UUID) -> None:
    assert [messages.estimate_tokens("x" * length) for length in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    say_all(db, client_id, {"12345": 1, "1234": 2})
    assert contents(remembered(db, client_id, max_tokens=2).messages) == ["1234"]
    assert contents(remembered(db, client_id, max_tokens=3).messages) == ["12345", "1234"]
    assert contents(remembered(db, client_id, max_tokens=3, count_tokens=len).messages) == ["1234"]


def test_medium_without_a_text_takes_no_room(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        messages.record(session, chat_id=CHAT, role="user", media_url="https://cdn/a.ogg", sent_at=NOON)
        say(session, "newest", 1)
    assert contents(remembered(db, client_id, max_chars=6, max_tokens=2).messages) == [None, "newest"]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({}, [content for _, content in SAID[1:]]),
        ({"max_messages": 5}, [content for _, content in SAID[4:]]),
        ({"max_chars": 20}, [content for _, content in SAID[4:]]),
        ({"max_messages": 2}, [content for _, content in SAID[5:]]),
        ({"max_messages": 1}, [SAID[-1][1]]),
        ({"max_chars": 1}, [SAID[-1][1]]),
    ],
)
@pytest.mark.usefixtures("said")
def test_memory_starts_with_the_end_customer_where_that_is_asked_for(
    db: Database, client_id: UUID, bounds: dict[str, int], expected: list[str]
) -> None:
    assert contents(remembered(db, client_id, start_with_user=True, **bounds).messages) == expected


def test_newest_message_stays_where_the_end_customer_said_nothing(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        say(session, "a", 1, role="assistant")
        say(session, "b", 2, role="system")
    assert contents(remembered(db, client_id, start_with_user=True).messages) == ["b"]


def test_summary_comes_with_the_messages_it_does_not_replace(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        first = say(session, "a", 1)
        say(session, "b", 2)
        say(session, "elsewhere", 3, chat_id=OTHER_CHAT)
    set_conversation(db, client_id, last_context=SECRET, last_context_message_id=first.message_id)
    set_conversation(db, client_id, OTHER_CHAT, last_context="another chat's")
    memory = remembered(db, client_id)
    assert (memory.summary, memory.summary_up_to) == (SECRET, first.message_id)
    assert contents(memory.messages) == ["a", "b"]
    assert SECRET not in repr(memory)


def test_summary_comes_back_without_messages(db: Database, client_id: UUID) -> None:
    add_conversation(db, client_id, CHAT, last_context="resumo", last_context_message_id=7)
    assert remembered(db, client_id) == Memory("resumo", 7, [])
    assert remembered(db, client_id, start_with_user=True, max_chars=1) == Memory("resumo", 7, [])


def test_messages_come_back_without_a_conversation(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"a": 1, "b": 2})
    with db.tenant_session(client_id) as session:
        session.execute(delete(ActiveConversation))
    memory = remembered(db, client_id)
    assert (memory.summary, memory.summary_up_to, contents(memory.messages)) == (None, None, ["a", "b"])


def test_unknown_chat_has_no_memory(db: Database, client_id: UUID) -> None:
    assert remembered(db, client_id) == Memory(None, None, [])


def test_memory_is_one_statement(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, TIED)
    with db.tenant_session(client_id) as session, statements_sent() as sent:
        messages.memory(session, chat_id=CHAT, max_chars=10, start_with_user=True)
    assert len(sent) == 1


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_messages": 0},
        {"max_messages": 501},
        {"max_chars": 0},
        {"max_chars": -1},
        {"max_tokens": 0},
        {"max_tokens": -1, "max_chars": 1},
    ],
)
def test_bounds_of_memory_are_bounded(db: Database, client_id: UUID, bounds: dict[str, int]) -> None:
    with pytest.raises(InvalidValue):
        remembered(db, client_id, **bounds)


@pytest.mark.usefixtures("many")
def test_memory_walks_back_on_the_index_of_the_history(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        found = plan(session, lambda: messages.memory(session, chat_id=CHAT, max_messages=20))
    (scan,) = (node for node in found if node.get("Relation Name") == "chat_messages")
    assert (scan["Node Type"], scan["Scan Direction"]) == ("Index Scan", "Backward")
    assert scan["Index Name"] == "ix_chat_messages_client_id_chat_id_created_at_id"
    # What is sorted is the answer, not the chat.
    assert [node["Plan Rows"] for node in found if node["Node Type"] == "Sort"] == [21]
    assert "Seq Scan" not in {node["Node Type"] for node in found}


# --- erase_chat ---


def test_chat_is_erased_with_its_conversation_and_nothing_else(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, TIED)
    say_all(db, client_id, {"stays": 1}, chat_id=OTHER_CHAT)
    with db.tenant_session(client_id) as session:
        assert messages.erase_chat(session, chat_id=CHAT) == Erased(len(TIED), 1)
    assert stored(db, client_id) == {(OTHER_CHAT, "stays")}
    assert set(conversations(db, client_id)) == {OTHER_CHAT}
    with db.tenant_session(client_id) as session:
        assert messages.erase_chat(session, chat_id=CHAT) == Erased(0, 0)


def test_message_after_an_erasure_starts_a_new_conversation(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"old": 100})
    set_conversation(
        db,
        client_id,
        status="finished",
        followup_stage=3,
        last_context=SECRET,
        paused_until=at(1),
        last_read_message_id=1,
    )
    with db.tenant_session(client_id) as session:
        messages.erase_chat(session, chat_id=CHAT)
    with db.tenant_session(client_id) as session:
        new = say(session, "new", 50, role="assistant")
    conversation = conversations(db, client_id)[CHAT]
    assert (conversation.last_message_id, conversation.last_message_at) == (new.message_id, at(50))
    assert (conversation.status, conversation.followup_stage, conversation.last_role) == ("active", 0, "assistant")
    assert (conversation.last_context, conversation.paused_until, conversation.last_read_message_id) == (None,) * 3


@pytest.mark.parametrize("table", ["chat_messages", "active_conversations"])
def test_erasure_that_leaves_something_is_an_error_and_erases_nothing(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any], table: str
) -> None:
    say_all(db, client_id, {"a": 1, "b": 2})
    superuser.execute("CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    superuser.execute(
        SQL("CREATE TRIGGER keep BEFORE DELETE ON {} FOR EACH ROW EXECUTE FUNCTION keep()").format(Identifier(table))
    )
    with pytest.raises(ErasureIncomplete, match=CHAT) as raised, db.tenant_session(client_id) as session:
        messages.erase_chat(session, chat_id=CHAT)
    assert raised.value.left == {"chat_messages": 2, "active_conversations": 1}[table]
    assert len(stored(db, client_id)) == 2
    assert set(conversations(db, client_id)) == {CHAT}


def test_erasure_waits_for_a_message_that_is_being_recorded_and_erases_it_too(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    def erase() -> Erased:
        with db.tenant_session(client_id) as session:
            return messages.erase_chat(session, chat_id=CHAT)

    with ThreadPoolExecutor(1) as threads:
        with db.tenant_session(client_id) as session:
            say(session, "meanwhile", 1)
            erasing = threads.submit(erase)
            until_waiting(superuser, erasing)
        assert erasing.result(WAIT) == Erased(1, 1)
    assert not stored(db, client_id)
    assert not conversations(db, client_id)


def test_message_that_waits_for_an_erasure_starts_a_new_conversation(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    say_all(db, client_id, {"old": 100})

    def record() -> Recorded:
        with db.tenant_session(client_id) as session:
            return say(session, "new", 1)

    with ThreadPoolExecutor(1) as threads:
        with db.tenant_session(client_id) as session:
            assert messages.erase_chat(session, chat_id=CHAT) == Erased(1, 1)
            recording = threads.submit(record)
            until_waiting(superuser, recording)
        recorded = recording.result(WAIT)
    assert recorded.inserted
    assert stored(db, client_id) == {(CHAT, "new")}
    assert conversations(db, client_id)[CHAT].last_message_id == recorded.message_id


def check_consistency(db: Database, client_id: UUID) -> None:
    """Each chat with messages has a conversation, and its `last_message_id` is one of them."""
    with db.tenant_session(client_id) as session:
        rows = session.execute(select(ChatMessage.chat_id, ChatMessage.id)).all()
    ids: dict[str, set[int]] = {}
    for chat_id, message_id in rows:
        ids.setdefault(chat_id, set()).add(message_id)
    found = conversations(db, client_id)
    assert set(found) == set(ids)
    assert all(row.last_message_id in ids[chat_id] for chat_id, row in found.items())


def test_erasing_while_others_record_leaves_chats_consistent(db: Database, client_id: UUID) -> None:
    def record(worker: int) -> None:
        for number in range(30):
            batch = [
                IncomingMessage(chat_id, "user", f"{worker}/{number}", sent_at=at(number))
                for chat_id in (CHAT, OTHER_CHAT)
            ]
            with db.tenant_session(client_id) as session:
                messages.record_many(session, messages=batch)

    def erase() -> int:
        erased = 0
        for _ in range(60):
            with db.tenant_session(client_id) as session:
                erased += messages.erase_chat(session, chat_id=CHAT).messages
        return erased

    *_, erased = at_once(*(partial(record, worker) for worker in range(8)), erase)
    assert erased is not None
    check_consistency(db, client_id)
    left = [chat_id for chat_id, _ in stored(db, client_id)]
    assert left.count(OTHER_CHAT) == 240
    assert left.count(CHAT) + erased == 240


# --- purge ---


def test_what_was_sent_exactly_at_the_moment_stays(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"before": -0.000001, "then": 0, "after": 1})
    assert purged(db, client_id) == Purged(1, 0, more=False)
    assert stored(db, client_id) == {(CHAT, "then"), (CHAT, "after")}
    assert purged(db, client_id) == Purged(0, 0, more=False)


def test_conversation_that_goes_on_keeps_its_state_and_its_summary(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"old": -1, "new": 1})
    set_conversation(db, client_id, last_context="resumo", status="finished")
    purged(db, client_id)
    conversation = conversations(db, client_id)[CHAT]
    assert (conversation.last_context, conversation.status) == ("resumo", "finished")


def test_messages_are_purged_in_batches_in_the_order_of_their_ids(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"a": -1, "b": -3, "c": -2}, chat_id="1")
    say_all(db, client_id, {"d": -5, "stays": 5, "e": -4}, chat_id="2")
    left = []
    for expected in (Purged(2, 0, more=True), Purged(2, 0, more=True), Purged(1, 1, more=False)):
        assert purged(db, client_id, limit=2) == expected
        left.append({content for _, content in stored(db, client_id)})
    assert left == [{"c", "d", "stays", "e"}, {"stays", "e"}, {"stays"}]
    assert set(conversations(db, client_id)) == {"2"}


def test_whole_batch_of_messages_leaves_the_conversations_to_the_next(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"a": -2, "b": -1})
    assert purged(db, client_id, limit=2) == Purged(2, 0, more=True)
    assert set(conversations(db, client_id)) == {CHAT}
    assert purged(db, client_id, limit=2) == Purged(0, 1, more=False)
    assert not conversations(db, client_id)


def test_conversations_are_purged_without_messages_and_without_activity_since(db: Database, client_id: UUID) -> None:
    add_conversation(db, client_id, "long ago", last_message_at=at(-0.000001), last_context=SECRET)
    add_conversation(db, client_id, "exactly then", last_message_at=NOON)
    add_conversation(db, client_id, "since", last_message_at=at(1))
    say_all(db, client_id, {"stays": 1}, chat_id="with a message")
    set_conversation(db, client_id, "with a message", last_message_at=at(-1))
    assert purged(db, client_id) == Purged(0, 1, more=False)
    assert set(conversations(db, client_id)) == {"exactly then", "since", "with a message"}


def test_conversation_that_keeps_a_message_does_not_hold_up_the_others(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"stays": 1}, chat_id="1")
    set_conversation(db, client_id, "1", last_message_at=at(-1))
    add_conversation(db, client_id, "2", last_message_at=at(-1))
    assert purged(db, client_id, limit=1) == Purged(0, 1, more=True)
    assert purged(db, client_id, limit=1) == Purged(0, 0, more=False)
    assert set(conversations(db, client_id)) == {"1"}


def test_conversations_are_purged_in_batches_in_the_order_of_their_chats(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    for chat_id in ("4", "2", "5", "1", "3"):
        add_conversation(db, client_id, chat_id, last_message_at=at(-int(chat_id)))
    # Its index would give the order to a statement that does not ask for one.
    superuser.execute("ALTER TABLE active_conversations DROP CONSTRAINT pk_active_conversations")
    assert purged(db, client_id, limit=2) == Purged(0, 2, more=True)
    assert set(conversations(db, client_id)) == {"3", "4", "5"}
    assert purged(db, client_id, limit=2) == Purged(0, 2, more=True)
    assert purged(db, client_id, limit=2) == Purged(0, 1, more=False)


def test_empty_client_has_nothing_to_purge(db: Database, client_id: UUID) -> None:
    assert purged(db, client_id) == Purged(0, 0, more=False)


@pytest.mark.parametrize("limit", [-1, 0, 501])
def test_limit_of_a_purge_is_bounded(db: Database, client_id: UUID, limit: int) -> None:
    with pytest.raises(InvalidValue, match="from 1 to 500"):
        purged(db, client_id, limit=limit)


def test_purge_before_a_moment_without_a_time_zone_is_refused(db: Database, client_id: UUID) -> None:
    with pytest.raises(InvalidValue, match="time zone"):
        purged(db, client_id, before=NOON.replace(tzinfo=None))
    with pytest.raises(InvalidValue):
        purged(db, client_id, before=None)  # nothing would be older than that


def test_purge_does_not_wait_for_a_message_that_is_being_recorded(db: Database, client_id: UUID) -> None:
    add_conversation(db, client_id, "empty", last_message_at=at(-1))
    add_conversation(db, client_id, CHAT, last_message_at=at(-1))
    with db.tenant_session(client_id) as session:
        say(session, "late", -2)
        assert purged(db, client_id) == Purged(0, 1, more=False)
    assert stored(db, client_id) == {(CHAT, "late")}
    assert set(conversations(db, client_id)) == {CHAT}
    assert purged(db, client_id) == Purged(1, 1, more=False)


def test_message_that_waits_for_a_purge_starts_a_new_conversation(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    add_conversation(db, client_id, CHAT, last_message_at=at(-1), last_context=SECRET)

    def record() -> Recorded:
        with db.tenant_session(client_id) as session:
            return say(session, "new", 1)

    with ThreadPoolExecutor(1) as threads:
        with db.tenant_session(client_id) as session:
            assert messages.purge(session, before=NOON) == Purged(0, 1, more=False)
            recording = threads.submit(record)
            until_waiting(superuser, recording)
        recorded = recording.result(WAIT)
    conversation = conversations(db, client_id)[CHAT]
    assert (conversation.last_message_id, conversation.last_context) == (recorded.message_id, None)


@pytest.mark.parametrize("seconds", [1, 0, -2], ids=["newer", "at the moment", "late"])
def test_conversation_that_is_written_while_a_purge_looks_at_it_stays(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any], seconds: float
) -> None:
    # Who locks or updates a conversation waits here, with its snapshot taken, for whoever has the lock 42.
    superuser.execute(
        "CREATE FUNCTION stop() RETURNS boolean LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_advisory_xact_lock(42); RETURN true; END'"
    )
    superuser.execute(
        "CREATE POLICY stop ON active_conversations AS RESTRICTIVE FOR UPDATE TO kestra_tenant USING (stop())"
    )
    add_conversation(db, client_id, CHAT, last_message_at=at(-1), last_context="resumo")

    with ThreadPoolExecutor(1) as threads:
        with db.tenant_session(client_id) as session:
            session.execute(select(func.pg_advisory_xact_lock(42)))
            purging = threads.submit(purged, db, client_id)
            until_waiting(superuser, purging)
            recorded = say(session, "meanwhile", seconds)
        assert purging.result(WAIT) == Purged(0, 0, more=False)

    assert stored(db, client_id) == {(CHAT, "meanwhile")}
    conversation = conversations(db, client_id)[CHAT]
    assert conversation.last_context == "resumo"
    assert conversation.last_message_at == max(at(seconds), at(-1))
    assert (conversation.last_message_id == recorded.message_id) is (seconds >= -1)


def test_purges_at_once_take_different_rows_and_do_not_wait(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"a": -5, "b": -4, "c": -3, "d": -2, "new": 1})
    for chat_id in ("1", "2", "3"):
        add_conversation(db, client_id, chat_id, last_message_at=at(-1))
    with db.tenant_session(client_id) as session:
        assert messages.purge(session, before=NOON, limit=2) == Purged(2, 0, more=True)
        assert purged(db, client_id, limit=3) == Purged(2, 3, more=True)
    assert {content for _, content in stored(db, client_id)} == {"new"}
    assert set(conversations(db, client_id)) == {CHAT}


def test_erasure_during_a_purge_waits_and_erases_the_rest(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    say_all(db, client_id, {"a": -2, "b": -1, "c": 1})

    def erase() -> Erased:
        with db.tenant_session(client_id) as session:
            return messages.erase_chat(session, chat_id=CHAT)

    with ThreadPoolExecutor(1) as threads:
        with db.tenant_session(client_id) as session:
            assert messages.purge(session, before=NOON) == Purged(2, 0, more=False)
            erasing = threads.submit(erase)
            until_waiting(superuser, erasing)
        assert erasing.result(WAIT) == Erased(1, 1)
    assert not stored(db, client_id)


def test_purge_during_an_erasure_leaves_it_its_rows(db: Database, client_id: UUID) -> None:
    say_all(db, client_id, {"a": -2, "b": -1})
    with db.tenant_session(client_id) as session:
        assert messages.erase_chat(session, chat_id=CHAT) == Erased(2, 1)
        assert purged(db, client_id) == Purged(0, 0, more=False)
    assert not stored(db, client_id)


def test_purging_while_batches_are_recorded_is_no_deadlock_and_leaves_chats_consistent(
    db: Database, client_id: UUID
) -> None:
    chats = [f"chat-{number}" for number in range(12)]
    barrier = Barrier(7)
    done = Event()

    def record(worker: int) -> None:
        barrier.wait()
        for number in range(40):
            chosen = [chats[(worker * 5 + number * 7 + step * 11) % len(chats)] for step in range(5)]
            with db.tenant_session(client_id) as session:
                messages.record_many(
                    session,
                    messages=[IncomingMessage(chat_id, "user", "x", sent_at=at(-1 - number)) for chat_id in chosen],
                )

    def purge() -> int:
        barrier.wait()
        count = 0
        while not done.is_set():
            count += purged(db, client_id, limit=20).messages
        return count

    with ThreadPoolExecutor(7) as threads:
        recording = [threads.submit(record, worker) for worker in range(5)]
        purging = [threads.submit(purge) for _ in range(2)]
        try:
            for worker in recording:
                worker.result(WAIT)
        finally:
            done.set()
        count = sum(answer.result(WAIT) for answer in purging)

    with_messages = {chat_id for chat_id, _ in stored(db, client_id)}
    assert with_messages <= set(conversations(db, client_id))
    while (batch := purged(db, client_id)).more:
        count += batch.messages
    assert count + batch.messages == 1000
    assert not stored(db, client_id)
    assert not conversations(db, client_id)


@pytest.mark.usefixtures("many")
def test_purge_walks_the_primary_key(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        found = plan(session, lambda: messages.purge(session, before=at(9000)))
        session.rollback()
    assert {node["Node Type"] for node in found}.isdisjoint({"Sort", "Seq Scan"})
    assert {node["Index Name"] for node in found if "Index Name" in node} == {"pk_chat_messages"}
