"""Pages among five million messages against fifty thousand: of the inbox, of a history, and page 1,000 of a history.

Both installations are generated, with as many clients, and the pages are those of the client with the most chats. Each
is a whole unit of work, and was read before. Beside page 1,000 the same page by OFFSET, as one writes it by hand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg_pool import ConnectionPool

from benchmarks.harness import BenchmarkDatabase, Candidate, Row, compare, database, rows
from kestra import Database, Settings
from kestra.dao import conversations, messages
from kestra.dao.conversations import InboxEntry
from kestra.dao.keyset import Page
from kestra.dao.messages import Message
from kestra.testing.installation import NOW, Installation

BOUND: Final = 1.3
PAGE: Final = 50
HISTORY: Final = "messages.history"
BY_HAND: Final = "psycopg by hand, OFFSET, no RLS"

LONG_CHAT: Final = "a long one"
_LONG_CHAT: Final = """
INSERT INTO chat_messages (client_id, chat_id, role, content, created_at)
SELECT %(client_id)s, %(chat_id)s, CASE mod(n, 2) WHEN 0 THEN 'user' ELSE 'assistant' END,
       'Atendemos de segunda a sexta, das 8h às 18h.', %(now)s - n * interval '1 minute'
FROM generate_series(1, %(messages)s) AS n
"""
_CHATS: Final = """
SELECT chat_id FROM chat_messages WHERE client_id = %s GROUP BY chat_id HAVING count(*) > %s ORDER BY chat_id LIMIT 50
"""
_OFFSET: Final = """
SELECT id, chat_id, role, content, media_url, provider_message_id, created_at FROM chat_messages
WHERE client_id = %(client_id)s AND chat_id = %(chat_id)s ORDER BY created_at DESC, id DESC
LIMIT %(limit)s OFFSET %(offset)s
"""


def inbox(db: Database, client_id: UUID) -> Candidate:
    """The first page of the inbox."""

    def read(_iteration: int) -> Page[InboxEntry]:
        with db.tenant_session(client_id) as session:
            return conversations.inbox(session, limit=PAGE)

    return read


def history(db: Database, client_id: UUID, chats: list[str], *, before: str | None = None) -> Candidate:
    """A page of the history of one chat after the other."""

    def read(iteration: int) -> Page[Message]:
        with db.tenant_session(client_id) as session:
            return messages.history(session, chat_id=chats[iteration % len(chats)], before=before, limit=PAGE)

    return read


def history_by_hand(pool: ConnectionPool[Any], client_id: UUID, *, page: int) -> Candidate:
    """A page of the long chat, as messages."""
    given = {"client_id": client_id, "chat_id": LONG_CHAT, "limit": PAGE, "offset": (page - 1) * PAGE}

    def read(_iteration: int) -> Page[Message]:
        with pool.connection() as connection:
            return Page([Message(*row) for row in connection.execute(_OFFSET, given)], None)

    return read


def cursor_of(db: Database, client_id: UUID, *, page: int) -> str | None:
    """What a page of the long chat is asked for with."""
    cursor = None
    with db.tenant_session(client_id) as session:
        for _ in range(page - 1):
            cursor = messages.history(session, chat_id=LONG_CHAT, before=cursor, limit=PAGE).cursor
    return cursor


def long_chats(made: BenchmarkDatabase, client_id: UUID) -> list[str]:
    """Chats with more messages than a page has."""
    with psycopg.connect(made.superuser_url) as connection:
        return [chat_id for (chat_id,) in connection.execute(_CHATS, [client_id, PAGE])]


def write_long_chat(made: BenchmarkDatabase, client_id: UUID, *, pages: int) -> None:
    """One chat of so many pages, and one message more."""
    with psycopg.connect(made.superuser_url) as connection:
        given = {"client_id": client_id, "chat_id": LONG_CHAT, "messages": pages * PAGE + 1, "now": NOW}
        connection.execute(_LONG_CHAT, given)
    made.analyze()


@contextmanager
def generated(installation: Installation) -> Iterator[tuple[BenchmarkDatabase, Database]]:
    """The installation in a database, and one connection to it."""
    with database(installation) as made, Database(made.url, settings=Settings(pool_max_size=1)) as db:
        yield made, db


def length(page: Page[Any]) -> int:
    """How many items a page has."""
    return len(page.items)


def run(*, quick: bool) -> Iterator[Row]:
    """The inbox and histories of both installations, then the long chat of the large one."""
    sizes = [
        Installation(clients=5 if quick else 50, chats=chats, messages=40)
        for chats in ((100, 200) if quick else (25, 2500))
    ]
    pages, iterations = (5, 20) if quick else (1000, 1000)
    client_id = sizes[0].tenant(0).row.id
    small, large = (f"{round(size.count_messages(), -3):,} messages" for size in sizes)
    with generated(sizes[0]) as (few, little), generated(sizes[1]) as (many, much):
        inboxes = {small: inbox(little, client_id), large: inbox(much, client_id)}
        timings = compare(inboxes, iterations, same=length)
        yield from rows(f"inbox page of {PAGE}", timings, base=small, bounds={large: BOUND})

        histories = {
            name: history(db, client_id, long_chats(made, client_id))
            for name, made, db in ((small, few, little), (large, many, much))
        }
        timings = compare(histories, iterations, same=length)
        yield from rows(f"history page of {PAGE}", timings, base=small, bounds={large: BOUND})

        write_long_chat(many, client_id, pages=pages)
        first, last = "page 1", f"page {pages:,}"
        here = history(much, client_id, [LONG_CHAT])
        far = history(much, client_id, [LONG_CHAT], before=cursor_of(much, client_id, page=pages))
        what = f"history page of {PAGE}, {large}"
        timings = compare({first: here, last: far}, iterations, same=length)
        yield from rows(what, timings, base=first, bounds={last: BOUND})
        with ConnectionPool[Any](many.plain_url, min_size=1, max_size=1, open=True) as pool:
            both = {HISTORY: far, BY_HAND: history_by_hand(pool, client_id, page=pages)}
            timings = compare(both, max(iterations // 10, 10), same=lambda page: page.items)
            yield from rows(f"{what}, {last}", timings, base=HISTORY)
