"""What the data access layer costs an assistant and an inbox: `messages.memory` and `messages.history`, 20 messages.

The whole unit of work, `with db.tenant_session(…)` and its COMMIT included, is compared with psycopg by hand on a pool:
BEGIN, the same query with `WHERE client_id = %s`, COMMIT, on a connection that no policy binds. By hand there are
tuples, and no cursor for the next page. Beside them pgbench.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final
from uuid import UUID

from psycopg_pool import ConnectionPool

from benchmarks.harness import BenchmarkDatabase, Candidate, Row, compare_in_rounds, database, rows
from benchmarks.pgbench import bursts
from kestra import Database, Settings
from kestra.dao import messages
from kestra.testing.installation import Installation

NEWEST: Final = 20
BOUND: Final = 1.5
MEMORY: Final = "messages.memory"
HISTORY: Final = "messages.history"
BY_HAND: Final = "psycopg by hand, no RLS"
LIMIT: Final = "pgbench, no RLS (the limit)"

Work = Sequence[tuple[UUID, str]]
"""Which chat of which client each unit of work reads, in turns."""

_COLUMNS: Final = "id, chat_id, role, content, media_url, provider_message_id, created_at"
_NEWEST: Final = f"""
SELECT {_COLUMNS} FROM chat_messages
WHERE client_id = %(client_id)s AND chat_id = %(chat_id)s ORDER BY created_at DESC, id DESC LIMIT %(limit)s
"""  # noqa: S608  # of constants
_MEMORY: Final = f"""
SELECT newest.*, NULL AS last_context FROM ({_NEWEST}) AS newest
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, last_context FROM active_conversations
WHERE client_id = %(client_id)s AND chat_id = %(chat_id)s
ORDER BY created_at, id
"""  # noqa: S608  # of constants


def memory_of_kestra(db: Database, work: Work) -> Candidate:
    """`messages.memory`: the summary and the newest messages."""

    def read(iteration: int) -> messages.Memory:
        client_id, chat_id = work[iteration % len(work)]
        with db.tenant_session(client_id) as session:
            return messages.memory(session, chat_id=chat_id, max_messages=NEWEST)

    return read


def memory_by_hand(pool: ConnectionPool, work: Work) -> Candidate:
    """The summary and the newest messages, as tuples."""

    def read(iteration: int) -> tuple[str | None, list[tuple[Any, ...]]]:
        client_id, chat_id = work[iteration % len(work)]
        with pool.connection() as connection:
            given = {"client_id": client_id, "chat_id": chat_id, "limit": NEWEST}
            *found, last = connection.execute(_MEMORY, given).fetchall()
            return last[-1], found

    return read


def history_of_kestra(db: Database, work: Work) -> Candidate:
    """`messages.history`: the first page."""

    def read(iteration: int) -> list[messages.Message]:
        client_id, chat_id = work[iteration % len(work)]
        with db.tenant_session(client_id) as session:
            return messages.history(session, chat_id=chat_id, limit=NEWEST).items

    return read


def history_by_hand(pool: ConnectionPool, work: Work) -> Candidate:
    """A page of the newest messages, as tuples; one more is read, which says whether there is another page."""

    def read(iteration: int) -> list[tuple[Any, ...]]:
        client_id, chat_id = work[iteration % len(work)]
        with pool.connection() as connection:
            given = {"client_id": client_id, "chat_id": chat_id, "limit": NEWEST + 1}
            found = connection.execute(_NEWEST, given).fetchall()
            return found[:NEWEST]

    return read


def as_scripts(sql: str, work: Work, *, limit: int) -> list[str]:
    """The same for pgbench, each chat's a script."""
    scripts = []
    for client_id, chat_id in work:
        query = sql % {"client_id": f"'{client_id}'", "chat_id": f"'{chat_id}'", "limit": limit}
        scripts.append(f"BEGIN;{query};COMMIT;\n")
    return scripts


def content_of(found: Any) -> object:
    """What was read, whatever it is an object of."""
    match found:
        case messages.Memory():
            return found.summary, content_of(found.messages)
        case messages.Message():
            return found.id, found.content, found.created_at
        case int(message_id), _, _, content, _, _, created_at, *_:
            return message_id, content, created_at
        case (summary, list(newest)):
            return summary, content_of(newest)
        case _:
            return [content_of(one) for one in found]


@contextmanager
def candidates(made: BenchmarkDatabase, work: Work) -> Iterator[dict[str, dict[str, Candidate]]]:
    """By function: by hand and by kestra, with one connection each."""
    with (
        Database(made.url, settings=Settings(pool_max_size=1)) as db,
        ConnectionPool(made.plain_url, min_size=1, max_size=1, open=True) as pool,
    ):
        yield {
            MEMORY: {BY_HAND: memory_by_hand(pool, work), MEMORY: memory_of_kestra(db, work)},
            HISTORY: {BY_HAND: history_by_hand(pool, work), HISTORY: history_of_kestra(db, work)},
        }


@contextmanager
def _candidates_of(made: BenchmarkDatabase, work: Work, name: str) -> Iterator[dict[str, Candidate]]:
    with candidates(made, work) as functions:
        yield functions[name]


def run(*, quick: bool) -> Iterator[Row]:
    """Memory, then history."""
    sizes = Installation(clients=5, chats=20, messages=40) if quick else Installation(clients=20, chats=50, messages=40)
    with database(sizes) as made:
        work = [(client_id, chat_id) for client_id, [chat_id] in made.chats(messages=NEWEST, each=1)]
        scripts = {
            MEMORY: as_scripts(_MEMORY, work, limit=NEWEST),
            HISTORY: as_scripts(_NEWEST, work, limit=NEWEST + 1),
        }
        for name, script in scripts.items():
            limit = bursts(LIMIT, made.plain_url, script)
            reads = partial(_candidates_of, made, work, name)
            timings = compare_in_rounds(reads, 20 if quick else 3000, same=content_of, bursts=limit)
            yield from rows(f"{name}, {NEWEST} messages", timings, base=BY_HAND, bounds={name: BOUND})
