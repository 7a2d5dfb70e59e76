"""Adopting an existing installation of a million messages, from the documented schema (0001) to the newest revision.

The installation of `examples/` with all its defects, as often as it takes. Once while nobody writes, and once while
four threads write as the old programs do: a message by INSERT, its conversation by an upsert. Then a second connection
watches pg_locks: each ACCESS EXCLUSIVE lock on one of the tables that was held for more than a second is named, with
the statement that took longest under it; and so is the longest time that a writer had to wait.
"""

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

import psycopg

from benchmarks.harness import Row, server
from kestra import migrate
from kestra.errors import MigrationError

BOUND: Final = 90.0
MESSAGES: Final = 1_000_000
MESSAGES_QUICK: Final = 10_000
WRITERS: Final = 4
BETWEEN_MESSAGES: Final = 0.005
BETWEEN_LOOKS: Final = 0.01
NAMED_FROM: Final = 1.0
"""Seconds: a lock that was held for less is not named."""

PATIENCE: Final = 20
"""How often a command that PostgreSQL has ended is run again."""

DUMP: Final = (Path(__file__).parent.parent / "examples/existing_installation.sql").read_text("utf-8")
MESSAGES_OF_DUMP: Final = 2829
_COPIES: Final = (
    """
    INSERT INTO clients
    SELECT md5(id::text || n)::uuid, name, token || '.' || n, system_prompt, tools_config, created_at
    FROM clients, generate_series(2, %(copies)s) AS n
    """,
    """
    INSERT INTO active_conversations
    SELECT chat_id || '.' || n, md5(client_id::text || n)::uuid, status, followup_stage, last_role, last_message_at,
           last_context
    FROM active_conversations, generate_series(2, %(copies)s) AS n
    """,
    """
    INSERT INTO chat_messages (client_id, chat_id, role, content, media_url, created_at)
    SELECT md5(client_id::text || n)::uuid, chat_id || '.' || n, role, content, media_url, created_at
    FROM chat_messages, generate_series(2, %(copies)s) AS n
    """,
    """
    INSERT INTO client_files (client_id, filename, file_hash, google_file_uri)
    SELECT md5(client_id::text || n)::uuid, filename,
           CASE file_hash WHEN lower(file_hash) THEN hash ELSE upper(hash) END, google_file_uri
    FROM client_files, generate_series(2, %(copies)s) AS n, LATERAL (SELECT md5(file_hash || n) AS hash) AS hashes
    """,
)


@contextmanager
def installation(messages: int) -> Iterator[str]:
    """A superuser's URL of a database as 0001 documents it, with at least so many messages."""
    with server() as running, running.database("adoption") as name:
        url = running.url_of(name)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(DUMP.encode())
            for statement in _COPIES:
                connection.execute(statement.encode(), {"copies": -(-messages // MESSAGES_OF_DUMP)})
            connection.execute("VACUUM ANALYZE")
        migrate.stamp(url, "0001")
        yield url


# --- the old programs -------------------------------------------------------------------------------------------------

_INSERT: Final = "INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES (%s, %s, 'user', 'Oi')"
_UPSERT: Final = """
INSERT INTO active_conversations (chat_id, client_id, last_role, last_message_at) VALUES (%s, %s, 'user', now())
ON CONFLICT (chat_id, client_id) DO UPDATE
SET last_role = excluded.last_role, last_message_at = excluded.last_message_at, status = 'active', followup_stage = 0
"""


@dataclass
class Writers:
    """What became of the messages that the threads wrote.

    Attributes:
        waited: Seconds that the longest one took.
        ended: How many there were for each SQLSTATE; "" for those that were stored.
    """

    waited: float = 0.0
    ended: Counter[str] = field(default_factory=Counter)

    def write(self, url: str, conversations: list[tuple[UUID, str]], stop: threading.Event, number: int) -> None:
        """Messages, one transaction each, until it is enough."""
        dice = random.Random(number)  # noqa: S311  # not for secrets
        with psycopg.connect(url, autocommit=True) as connection:
            while not stop.wait(BETWEEN_MESSAGES):
                client_id, chat_id = dice.choice(conversations)
                state, start = "", time.perf_counter()
                try:
                    with connection.transaction():
                        connection.execute(_INSERT, [client_id, chat_id])
                        connection.execute(_UPSERT, [chat_id, client_id])
                except psycopg.Error as error:
                    state = error.sqlstate or type(error).__name__
                self.waited = max(self.waited, time.perf_counter() - start)
                self.ended[state] += 1


# --- the locks --------------------------------------------------------------------------------------------------------

_HELD: Final = """
SELECT a.xact_start::text, a.query, array_agg(l.relation::regclass::text ORDER BY l.relation::regclass::text)
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.mode = 'AccessExclusiveLock' AND l.granted AND a.application_name = 'alembic'
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.relation = ANY (ARRAY['clients', 'active_conversations', 'chat_messages', 'client_files']::regclass[])
GROUP BY 1, 2
"""
"""What the migration locks so that nobody can read, and the statement that it is at."""


@dataclass
class Hold:
    """What a transaction held ACCESS EXCLUSIVE.

    Attributes:
        first: When it was first seen.
        last: When it was last seen.
        tables: What was locked.
        statements: Seconds spent in each statement under the lock.
    """

    first: float
    last: float
    tables: set[str] = field(default_factory=set)
    statements: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def seconds(self) -> float:
        """How long it was held."""
        return self.last - self.first

    @property
    def name(self) -> str:
        """The longest statement, on one line, and how many tables were locked with it."""
        statement = max(self.statements, key=self.statements.__getitem__)
        return f"{' '.join(statement.split())[:60]}… ({len(self.tables)} tables)"


class Watch(threading.Thread):
    """Looks at the locks, from when it is started until it is told to stop.

    Attributes:
        holds: By the revision that was left and the beginning of the transaction.
        leaving: The revision that is being left.
    """

    def __init__(self, url: str, stop: threading.Event) -> None:
        """Watch the database of the URL."""
        super().__init__()
        self.holds: dict[tuple[str, str], Hold] = {}
        self.leaving = ""
        self._url, self._enough = url, stop

    def run(self) -> None:
        """Look."""
        before = time.perf_counter()
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self._enough.wait(BETWEEN_LOOKS):
                found = connection.execute(_HELD).fetchone()
                now = time.perf_counter()
                if found is not None:
                    began, statement, tables = found
                    hold = self.holds.setdefault((self.leaving, began), Hold(now, now))
                    hold.last = now
                    hold.tables.update(tables)
                    hold.statements[statement] += now - before
                before = now


# --- the adoption -----------------------------------------------------------------------------------------------------


def adopt(url: str, watch: Watch | None = None) -> tuple[float, int]:
    """Seconds to the newest revision, and how often the command had to be run once more, as its errors say."""
    start, head, again = time.perf_counter(), migrate.head(), 0
    while (at := migrate.current(url)) != head:
        if watch is not None:
            watch.leaving = str(at)
        try:
            migrate.upgrade(url, "+1")
        except MigrationError:
            again += 1
            if again > PATIENCE:
                raise
    return time.perf_counter() - start, again


def count_messages(url: str) -> int:
    """How many there are, those included that belong to nobody."""
    with psycopg.connect(url) as connection:
        counts = ["SELECT count(*) FROM chat_messages"]
        if connection.execute("SELECT to_regclass('orphaned_rows')").fetchone() != (None,):
            counts.append("SELECT count(*) FROM orphaned_rows WHERE table_name = 'chat_messages'")
        return sum(count for statement in counts for (count,) in connection.execute(statement.encode()))


def expect_messages(url: str, expected: int) -> None:
    """Nothing, when none was lost and none was made.

    Raises:
        AssertionError: There is another number of messages.
    """
    found = count_messages(url)
    if found != expected:
        raise AssertionError(f"{found} messages after the adoption, not {expected}")


def conversations_of(url: str) -> list[tuple[UUID, str]]:
    """Some conversations that have a client."""
    query = "SELECT client_id, chat_id FROM active_conversations JOIN clients ON id = client_id LIMIT 1000"
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()


@contextmanager
def while_they_write(url: str) -> Iterator[tuple[Writers, Watch]]:
    """The threads of the old programs, and the one that looks at the locks."""
    writers, stop = Writers(), threading.Event()
    watch, conversations = Watch(url, stop), conversations_of(url)
    given = (url, conversations, stop)
    threads = [threading.Thread(target=writers.write, args=(*given, number)) for number in range(WRITERS)]
    try:
        for thread in (watch, *threads):
            thread.start()
        yield writers, watch
    finally:
        stop.set()
        for thread in (watch, *threads):
            thread.join()


def run(*, quick: bool) -> Iterator[Row]:
    """While nobody writes, then while the old programs do."""
    with installation(MESSAGES_QUICK if quick else MESSAGES) as url:
        messages = count_messages(url)
        what = f"adoption of {messages:,} messages"
        seconds, _ = adopt(url)
        expect_messages(url, messages)
        yield Row(what, "nobody writes", seconds, bound=BOUND)
    with installation(MESSAGES_QUICK if quick else MESSAGES) as url:
        with while_they_write(url) as (writers, watch):
            seconds, again = adopt(url, watch)
        expect_messages(url, messages + writers.ended[""])
        yield Row(what, f"{WRITERS} threads write", seconds)
        what = f"{what}, {WRITERS} threads write"
        for (left, _), hold in watch.holds.items():
            if quick or hold.seconds > NAMED_FROM:
                yield Row(f"{what}: ACCESS EXCLUSIVE held", f"after {left}: {hold.name}", hold.seconds)
        yield Row(what, "longest time of a message", writers.waited)
        yield Row(what, "messages that were refused", sum(writers.ended.values()) - writers.ended[""], unit="")
        yield Row(what, "runs that PostgreSQL ended, and were repeated", again, unit="")
