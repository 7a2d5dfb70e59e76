"""An inbox page with a chat of 100,000 unread messages against one with 100: what is counted ends at 99.

The whole unit of work, for two clients that have no other difference. Beside them count(*) of every chat of the page,
as one writes it by hand: it counts on.
"""

from collections.abc import Iterator
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg_pool import ConnectionPool

from benchmarks.harness import BenchmarkDatabase, Candidate, Row, compare, database, rows
from kestra import Database, Settings
from kestra.dao import conversations
from kestra.dao.conversations import InboxEntry
from kestra.testing.installation import NOW

BOUND: Final = 2.0
FEW: Final = 100
MANY: Final = 100_000
MANY_QUICK: Final = 2_000
CHATS: Final = 50
UNREAD: Final = 3
"""How many messages nobody has read in each of the other chats."""

INBOX: Final = "conversations.inbox"
BY_HAND: Final = "psycopg by hand, count(*), no RLS"

_CLIENT: Final = "INSERT INTO clients (id, name, token) VALUES (%s, %s, %s)"
_MESSAGES: Final = """
INSERT INTO chat_messages (client_id, chat_id, role, content, created_at)
SELECT %(client_id)s, 'chat ' || chat, 'user', 'Oi, tudo bem?', %(now)s - chat * interval '1 hour' - n * interval '1 ms'
FROM generate_series(1, %(chats)s) AS chat,
     generate_series(1, CASE chat WHEN 1 THEN %(most)s ELSE %(unread)s END) AS n
"""
_CONVERSATIONS: Final = """
INSERT INTO active_conversations
    (client_id, chat_id, last_role, last_message_at, last_message_id, last_user_message_at, last_user_message_id)
SELECT DISTINCT ON (client_id, chat_id) client_id, chat_id, role, created_at, id, created_at,
       max(id) OVER (PARTITION BY client_id, chat_id)
FROM chat_messages ORDER BY client_id, chat_id, created_at DESC, id DESC
"""
_INBOX: Final = """
SELECT v.chat_id, newest.content,
       (SELECT count(*) FROM chat_messages m
        WHERE m.client_id = v.client_id AND m.chat_id = v.chat_id AND m.role = 'user'
          AND m.id > coalesce(v.last_read_message_id, 0))
FROM active_conversations v
CROSS JOIN LATERAL (
    SELECT content FROM chat_messages m WHERE m.client_id = v.client_id AND m.chat_id = v.chat_id
    ORDER BY m.created_at DESC, m.id DESC LIMIT 1
) AS newest
WHERE v.client_id = %s ORDER BY v.last_message_at DESC LIMIT %s
"""


def inbox(db: Database, client_id: UUID, *, limit: int) -> Candidate:
    """The first page of the inbox."""

    def read(_iteration: int) -> list[InboxEntry]:
        with db.tenant_session(client_id) as session:
            return conversations.inbox(session, limit=limit).items

    return read


def inbox_by_hand(pool: ConnectionPool[Any], client_id: UUID, *, limit: int) -> Candidate:
    """Chat, preview and number of unread messages, as tuples."""

    def read(_iteration: int) -> list[tuple[Any, ...]]:
        with pool.connection() as connection:
            return list(connection.execute(_INBOX, [client_id, limit]))

    return read


def counted(entries: list[InboxEntry]) -> list[tuple[str, int, bool]]:
    """What the inbox says of each chat."""
    return [(entry.state.chat_id, entry.unread, entry.unread_capped) for entry in entries]


def fill(made: BenchmarkDatabase, unread: dict[UUID, int]) -> None:
    """The chats of each client, of whose newest so many messages are unread."""
    with psycopg.connect(made.superuser_url) as connection:
        for client_id, most in unread.items():
            connection.execute(_CLIENT, [client_id, str(client_id), str(client_id)])
            given = {"client_id": client_id, "chats": CHATS, "most": most, "unread": UNREAD, "now": NOW}
            connection.execute(_MESSAGES, given)
        connection.execute(_CONVERSATIONS)
    made.analyze()


def run(*, quick: bool) -> Iterator[Row]:
    """A page of 50 chats, then that chat alone."""
    most, iterations = (MANY_QUICK, 20) if quick else (MANY, 1000)
    calm, busy = UUID(int=1), UUID(int=2)
    small, large = f"{FEW} unread", f"{most:,} unread"
    with database() as made:
        fill(made, {calm: FEW, busy: most})
        with (
            Database(made.url, settings=Settings(pool_max_size=1)) as db,
            ConnectionPool[Any](made.plain_url, min_size=1, max_size=1, open=True) as pool,
        ):
            for what, limit in ((f"inbox page of {CHATS} chats", CHATS), ("inbox page of that chat alone", 1)):
                pages = {small: inbox(db, calm, limit=limit), large: inbox(db, busy, limit=limit)}
                yield from rows(what, compare(pages, iterations, same=counted), base=small, bounds={large: BOUND})
                both = {INBOX: inbox(db, busy, limit=limit), BY_HAND: inbox_by_hand(pool, busy, limit=limit)}
                timings = compare(both, max(iterations // 10, 10), same=len)
                yield from rows(f"{what}, {large}", timings, base=INBOX)
