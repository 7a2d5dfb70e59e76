"""What isolation costs: the last 20 messages of a chat, as a whole unit of work, with it and without.

Two candidates at a time take turns on one server, so that a slow moment of the machine slows both.
Run it with `python benchmarks/isolation.py [ITERATIONS]`; it exits with 1 when the ratio of the medians is above the
bound.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Final
from uuid import UUID

import psycopg
from sqlalchemy import Engine, create_engine, insert, select
from sqlalchemy.orm import Session, with_loader_criteria

from kestra import ChatMessage, Client, Database, Settings, migrate
from kestra.base import TenantOwned
from kestra.embedded import temporary

BOUND: Final = 1.10
CLIENTS, CHATS, MESSAGES, NEWEST = 20, 10, 60, 20
CHAT: Final = "3"

Read = Callable[[UUID], int]


def of_session(db: Database) -> Read:
    """A tenant session: filter, row level security, role and client."""

    def read(client_id: UUID) -> int:
        with db.tenant_session(client_id) as session:
            newest = select(ChatMessage).where(ChatMessage.chat_id == CHAT)
            return len(session.scalars(_newest_first(newest)).all())

    return read


def of_hand_written_where(engine: Engine) -> Read:
    """A plain session, `WHERE client_id = …` by hand, no row level security: what isolation is compared with."""

    def read(client_id: UUID) -> int:
        with Session(engine) as session:
            newest = select(ChatMessage).where(ChatMessage.client_id == client_id, ChatMessage.chat_id == CHAT)
            found = len(session.scalars(_newest_first(newest)).all())
            session.commit()
            return found

    return read


def of_loader_criteria(engine: Engine) -> Read:
    """A plain session with the recipe of SQLAlchemy's documentation, no row level security."""

    def read(client_id: UUID) -> int:
        with Session(engine) as session:
            newest = select(ChatMessage).where(ChatMessage.chat_id == CHAT)
            criteria = with_loader_criteria(TenantOwned, lambda cls: cls.client_id == client_id, include_aliases=True)
            found = len(session.scalars(_newest_first(newest).options(criteria)).all())
            session.commit()
            return found

    return read


def _newest_first(statement: Any) -> Any:
    return statement.order_by(ChatMessage.created_at.desc(), ChatMessage.id.desc()).limit(NEWEST)


def round_trips(engine: Engine, read: Read, client_id: UUID) -> int:
    """How often the server is waited for in one unit of work, counted in libpq's trace of the only connection."""
    with tempfile.TemporaryFile("w+") as trace:
        read(client_id)
        driver: Any = engine.raw_connection()
        pgconn = driver.driver_connection.pgconn
        driver.close()
        pgconn.trace(trace.fileno())
        read(client_id)
        pgconn.untrace()
        return _answers(trace)


def _answers(trace: IO[str]) -> int:
    trace.seek(0)
    return sum("ReadyForQuery" in line for line in trace)


@contextmanager
def database() -> Iterator[tuple[str, list[UUID]]]:
    """A superuser's URL of a migrated database with messages, and its clients."""
    with temporary() as url:
        migrate.upgrade(url)
        with Database(url) as db, db.system_session(reason="benchmark data") as session:
            clients = [Client(name=str(number), token=str(number)) for number in range(CLIENTS)]
            session.add_all(clients)
            session.flush()
            row = {"role": "user", "content": "Tudo bem?"}
            rows = [
                {"client_id": client.id, "chat_id": str(chat), **row}
                for client in clients
                for chat in range(CHATS)
                for _ in range(MESSAGES)
            ]
            session.execute(insert(ChatMessage), rows)
            ids = [client.id for client in clients]
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")
        yield url, ids


def compare(candidate: Read, base: Read, clients: list[UUID], iterations: int) -> tuple[list[float], list[float]]:
    """Seconds of each unit of work, sorted, without the first tenth.

    Two at a time, in a random order: each finds the machine's caches as often in its favour as the other.
    """
    taken: dict[Read, list[float]] = {candidate: [], base: []}
    turns, dice = [candidate, base], random.Random(7)  # noqa: S311  # not for secrets
    for iteration in range(iterations):
        dice.shuffle(turns)
        for read in turns:
            start = time.perf_counter()
            found = read(clients[iteration % len(clients)])
            taken[read].append(time.perf_counter() - start)
            if found != NEWEST:
                raise AssertionError(f"{found} messages were read")
    warm = iterations // 10
    return sorted(taken[candidate][warm:]), sorted(taken[base][warm:])


def main(iterations: int = 3000) -> int:
    """Measure, print, and compare with the bound."""
    # One connection each, so that every server process is as warm.
    with database() as (url, clients), Database(url, settings=Settings(pool_max_size=1)) as db:
        # A superuser ignores policies: for the plain sessions there is no row level security.
        plain, recipe = (create_engine(url, pool_size=1, max_overflow=0) for _ in range(2))
        by_hand, session = of_hand_written_where(plain), of_session(db)
        print(f"{'':24}{'median':>8}{'p95':>10}{'ratio':>8}")
        ratio = report("tenant session", *compare(session, by_hand, clients, iterations))
        report("with_loader_criteria", *compare(of_loader_criteria(recipe), by_hand, clients, iterations))
        trips = round_trips(db._open().tenant, session, clients[0]), round_trips(plain, by_hand, clients[0])  # noqa: SLF001
        plain.dispose()
        recipe.dispose()
    missed = ratio > BOUND or trips[0] != trips[1]
    print(f"\nround trips: {trips[0]} in a tenant session, {trips[1]} with the WHERE by hand")
    print(f"bound (ratio {BOUND:.2f}, round trips equal): {'missed' if missed else 'held'}")
    return int(missed)


def report(name: str, candidate: list[float], base: list[float]) -> float:
    """Print a candidate and what it was compared with; return the ratio of the medians."""
    ratio = statistics.median(candidate) / statistics.median(base)
    for label, times, relative in ((name, candidate, f"{ratio:8.3f}"), ("  hand-written WHERE", base, "")):
        median, p95 = statistics.median(times), times[int(len(times) * 0.95)]
        print(f"{label:24}{median * 1e6:6.0f}µs{p95 * 1e6:8.0f}µs{relative}")
    return ratio


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
