"""What isolation costs: the last 20 messages of a chat with SQLAlchemy's ORM, as a whole unit of work.

A tenant session (filter, row level security, role and client) is compared with a plain session whose `WHERE client_id`
is written by hand, on a connection that no policy binds. Beside them: the recipe of SQLAlchemy's documentation,
psycopg by hand without an ORM, and pgbench.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final
from uuid import UUID

from psycopg_pool import ConnectionPool
from sqlalchemy import Engine, Select, create_engine, select
from sqlalchemy.orm import Session, with_loader_criteria

from benchmarks.harness import BenchmarkDatabase, Candidate, Row, compare_in_rounds, database, round_trips, rows
from benchmarks.pgbench import bursts
from kestra import ChatMessage, Database, Settings
from kestra.base import TenantOwned
from kestra.testing.installation import Installation

NEWEST: Final = 20
QUERIES: Final = 5
COMPARED: Final = {
    1: ("last 20 messages, ORM", 1.10, 3000),
    QUERIES: ("the same, 5 queries in one unit", 1.03, 1500),
}
"""By the number of queries in a unit of work: what it is called, the bound, and iterations."""

BY_HAND: Final = "ORM, WHERE by hand, no RLS"
SESSION: Final = "tenant session"
RECIPE: Final = "ORM, with_loader_criteria, no RLS"
PSYCOPG: Final = "psycopg by hand, no RLS"
LIMIT: Final = "pgbench, no RLS (the limit)"

Work = Sequence[tuple[UUID, Sequence[str]]]
"""Which chats of which client each unit of work reads, in turns."""


def of_session(db: Database, work: Work) -> Candidate:
    """A tenant session: filter, row level security, role and client."""

    def read(iteration: int) -> list[Sequence[ChatMessage]]:
        client_id, chats = work[iteration % len(work)]
        with db.tenant_session(client_id) as session:
            return [
                session.scalars(_newest_first(select(ChatMessage).where(ChatMessage.chat_id == chat))).all()
                for chat in chats
            ]

    return read


def of_hand_written_where(engine: Engine, work: Work) -> Candidate:
    """A plain session, `WHERE client_id = …` by hand."""

    def read(iteration: int) -> list[Sequence[ChatMessage]]:
        client_id, chats = work[iteration % len(work)]
        with Session(engine, expire_on_commit=False) as session:
            found = [
                session.scalars(
                    _newest_first(
                        select(ChatMessage).where(ChatMessage.client_id == client_id, ChatMessage.chat_id == chat)
                    )
                ).all()
                for chat in chats
            ]
            session.commit()
            return found

    return read


def of_loader_criteria(engine: Engine, work: Work) -> Candidate:
    """A plain session with the recipe of SQLAlchemy's documentation."""

    def read(iteration: int) -> list[Sequence[ChatMessage]]:
        client_id, chats = work[iteration % len(work)]
        with Session(engine, expire_on_commit=False) as session:
            criteria = with_loader_criteria(TenantOwned, lambda cls: cls.client_id == client_id, include_aliases=True)
            found = [
                session.scalars(
                    _newest_first(select(ChatMessage).where(ChatMessage.chat_id == chat)).options(criteria)
                ).all()
                for chat in chats
            ]
            session.commit()
            return found

    return read


def _newest_first(statement: Select[ChatMessage]) -> Select[ChatMessage]:
    return statement.order_by(ChatMessage.created_at.desc(), ChatMessage.id.desc()).limit(NEWEST)


_SQL: Final = """
SELECT id, client_id, chat_id, role, content, media_url, created_at, provider_message_id FROM chat_messages
WHERE client_id = %s AND chat_id = %s ORDER BY created_at DESC, id DESC LIMIT 20
"""


def of_psycopg(pool: ConnectionPool, work: Work) -> Candidate:
    """The same by hand, without an ORM: tuples."""

    def read(iteration: int) -> list[list[tuple[Any, ...]]]:
        client_id, chats = work[iteration % len(work)]
        with pool.connection() as connection:
            return [connection.execute(_SQL, [client_id, chat]).fetchall() for chat in chats]

    return read


def as_scripts(work: Work) -> list[str]:
    """The same for pgbench, each client's a script."""
    scripts = []
    for client_id, chats in work:
        reads = "".join(_SQL % (f"'{client_id}'", f"'{chat}'") + ";" for chat in chats)
        scripts.append(f"BEGIN;{reads}COMMIT;\n")
    return scripts


def messages_of(found: Sequence[Sequence[Any]]) -> list[list[tuple[int, str | None]]]:
    """Which messages were read, whatever they are objects of."""
    return [
        [(row[0], row[4]) if isinstance(row, tuple) else (row.id, row.content) for row in messages]
        for messages in found
    ]


@contextmanager
def candidates(made: BenchmarkDatabase, work: Work) -> Iterator[dict[str, Candidate]]:
    """With one connection each, so that every server process is as warm."""
    with ExitStack() as stack:
        db = stack.enter_context(Database(made.url, settings=Settings(pool_max_size=1)))
        plain, recipe = (create_engine(made.plain_url, pool_size=1, max_overflow=0) for _ in range(2))
        stack.callback(plain.dispose)
        stack.callback(recipe.dispose)
        pool = stack.enter_context(ConnectionPool(made.plain_url, min_size=1, max_size=1, open=True))
        yield {
            BY_HAND: of_hand_written_where(plain, work),
            SESSION: of_session(db, work),
            RECIPE: of_loader_criteria(recipe, work),
            PSYCOPG: of_psycopg(pool, work),
        }


@contextmanager
def _only(made: BenchmarkDatabase, work: Work, names: Sequence[str]) -> Iterator[dict[str, Candidate]]:
    with candidates(made, work) as reads:
        yield {name: reads[name] for name in names}


def run(*, quick: bool) -> Iterator[Row]:
    """One query in a unit of work, then five; and the round trips of one."""
    sizes = Installation(clients=5, chats=20, messages=40) if quick else Installation(clients=20, chats=50, messages=40)
    with database(sizes) as made:
        chats = made.chats(messages=NEWEST, each=QUERIES)
        for queries, (what, bound, iterations) in COMPARED.items():
            work = [(client_id, those[:queries]) for client_id, those in chats]
            limit = bursts(LIMIT, made.plain_url, as_scripts(work))
            # A program is written in one of these ways: the code of all together would not fit the caches.
            pair = partial(_only, made, work, (BY_HAND, SESSION))
            others = partial(_only, made, work, (BY_HAND, RECIPE, PSYCOPG))
            runs = 20 if quick else iterations
            timings = compare_in_rounds(pair, runs, same=messages_of)
            yield from rows(what, timings, base=BY_HAND, bounds={SESSION: bound})
            timings = compare_in_rounds(others, runs, same=messages_of, bursts=limit)
            _, *rest = rows(what, timings, base=BY_HAND)
            yield from rest
        yield from _round_trips(made, [(client_id, those[:1]) for client_id, those in chats])


def _round_trips(made: BenchmarkDatabase, work: Work) -> Iterator[Row]:
    what = "round trips of the last 20 messages"
    with Database(made.url, settings=Settings(pool_max_size=1)) as db:
        plain = create_engine(made.plain_url, pool_size=1, max_overflow=0)
        by_hand = round_trips(plain, of_hand_written_where(plain, work))
        session = round_trips(db._open().tenant, of_session(db, work))  # noqa: SLF001  # its only connection
        plain.dispose()
    yield Row(what, BY_HAND, by_hand, unit="")
    yield Row(what, SESSION, session, unit="", ratio=session / by_hand, bound=1.0)
