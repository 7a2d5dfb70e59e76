"""What a webhook costs from the token to the commit: find the client, drop duplicates, append, move the state on.

`db.ingest`, isolation included, is compared with what one would write by hand on psycopg_pool: all of that in one
statement in autocommit, and in three statements in a transaction; also with 8 threads, and `messages.record_many` with
storing one by one. All return the id and where the conversation stands. By hand no policy binds the connection, late
messages are not put in their place, and no chat is locked. Beside them pgbench.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg_pool import ConnectionPool

from benchmarks.harness import (
    BenchmarkDatabase,
    Candidate,
    Row,
    Timing,
    compare_in_rounds,
    database,
    round_trips,
    rows,
)
from benchmarks.pgbench import bursts
from kestra import Database, Settings
from kestra.dao import messages
from kestra.dao.messages import IncomingMessage, Recorded
from kestra.testing.installation import Installation

THREADS: Final = 8
BATCH: Final = 100
CHATS: Final = 50
TEXT: Final = "Bom dia! Vocês ainda têm vaga para visita amanhã às 14h?"

BATCHES: Final = "messages a second, one at a time and in batches"
WITH_THREADS: Final = f"messages a second, {THREADS} threads"
INGEST: Final = "db.ingest"
ONE: Final = "one statement by hand, no RLS"
THREE: Final = "three statements by hand, no RLS"
LIMIT: Final = "pgbench, no RLS (the limit)"

Clients = Sequence[tuple[UUID, str]]
"""Clients with their tokens. Each message is for the next one."""

_numbers: Final = itertools.count()
"""Ids of providers are unique, so that none is a duplicate."""

ONE_STATEMENT: Final = """
WITH client AS (SELECT id FROM clients WHERE token = %(token)s),
added AS (
    INSERT INTO chat_messages (client_id, chat_id, role, content, provider_message_id)
    SELECT client.id, %(chat_id)s, 'user', %(content)s, %(provider_id)s FROM client
    ON CONFLICT (client_id, provider_message_id) WHERE provider_message_id IS NOT NULL DO NOTHING
    RETURNING client_id, chat_id, id, role, created_at
)
INSERT INTO active_conversations AS conversation
    (client_id, chat_id, last_message_at, last_message_id, last_role, last_user_message_at, last_user_message_id)
SELECT client_id, chat_id, created_at, id, role, created_at, id FROM added
ON CONFLICT (chat_id, client_id) DO UPDATE SET
    status = 'active', followup_stage = 0, claim_token = NULL, claimed_until = NULL,
    last_message_at = excluded.last_message_at, last_message_id = excluded.last_message_id,
    last_role = excluded.last_role, last_user_message_at = excluded.last_user_message_at,
    last_user_message_id = excluded.last_user_message_id
RETURNING last_message_id, true, chat_id, status, followup_stage, last_role, last_message_at, last_message_id,
    last_user_message_at, last_user_message_id, last_read_message_id, paused_until
"""

MANY_STATEMENT: Final = """
WITH added AS (
    INSERT INTO chat_messages (client_id, chat_id, role, content, provider_message_id)
    SELECT %(client_id)s, chat_id, 'user', content, provider_id
    FROM unnest(%(chat_ids)s::text[], %(contents)s::text[], %(provider_ids)s::text[])
        AS given (chat_id, content, provider_id)
    ON CONFLICT (client_id, provider_message_id) WHERE provider_message_id IS NOT NULL DO NOTHING
    RETURNING client_id, chat_id, id, created_at
), moved AS (
    INSERT INTO active_conversations AS conversation
        (client_id, chat_id, last_message_at, last_message_id, last_role, last_user_message_at, last_user_message_id)
    SELECT client_id, chat_id, max(created_at), max(id), 'user', max(created_at), max(id)
    FROM added GROUP BY client_id, chat_id
    ON CONFLICT (chat_id, client_id) DO UPDATE SET
        status = 'active', followup_stage = 0, claim_token = NULL, claimed_until = NULL,
        last_message_at = excluded.last_message_at, last_message_id = excluded.last_message_id,
        last_role = excluded.last_role, last_user_message_at = excluded.last_user_message_at,
        last_user_message_id = excluded.last_user_message_id
    RETURNING chat_id, status, followup_stage, last_role, last_message_at, last_message_id,
        last_user_message_at, last_user_message_id, last_read_message_id, paused_until
)
SELECT added.id, true, moved.* FROM added JOIN moved USING (chat_id)
"""

_CLIENT: Final = "SELECT id FROM clients WHERE token = %s"
_APPEND: Final = """
INSERT INTO chat_messages (client_id, chat_id, role, content, provider_message_id) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT DO NOTHING RETURNING id, created_at
"""
_MOVE_ON: Final = """
INSERT INTO active_conversations AS conversation
    (client_id, chat_id, last_message_at, last_message_id, last_role, last_user_message_at, last_user_message_id)
VALUES (%(client_id)s, %(chat_id)s, %(at)s, %(id)s, 'user', %(at)s, %(id)s)
ON CONFLICT (chat_id, client_id) DO UPDATE SET
    status = 'active', followup_stage = 0, claim_token = NULL, claimed_until = NULL,
    last_message_at = excluded.last_message_at, last_message_id = excluded.last_message_id,
    last_role = excluded.last_role, last_user_message_at = excluded.last_user_message_at,
    last_user_message_id = excluded.last_user_message_id
RETURNING last_message_id, true, chat_id, status, followup_stage, last_role, last_message_at, last_message_id,
    last_user_message_at, last_user_message_id, last_read_message_id, paused_until
"""


def by_ingest(db: Database, clients: Clients) -> Candidate:
    """One call of kestra's."""

    def ingest(iteration: int) -> Recorded:
        _, token = clients[iteration % len(clients)]
        number = next(_numbers)
        return db.ingest(
            token, chat_id=f"kestra {number % CHATS}", role="user", content=TEXT, provider_message_id=f"wamid.{number}"
        )

    return ingest


def by_one_statement(pool: ConnectionPool, clients: Clients) -> Candidate:
    """All in one statement, in autocommit. Of a duplicate nothing is known but that it is one."""

    def ingest(iteration: int) -> tuple[Any, ...] | None:
        _, token = clients[iteration % len(clients)]
        number = next(_numbers)
        given = {"token": token, "chat_id": f"one {number % CHATS}", "content": TEXT, "provider_id": f"wamid.{number}"}
        with pool.connection() as connection:
            return connection.execute(ONE_STATEMENT, given).fetchone()

    return ingest


def by_three_statements(pool: ConnectionPool, clients: Clients) -> Candidate:
    """Client, message, conversation, in a transaction."""

    def ingest(iteration: int) -> tuple[Any, ...] | None:
        _, token = clients[iteration % len(clients)]
        number = next(_numbers)
        chat_id = f"three {number % CHATS}"
        with pool.connection() as connection:
            client = connection.execute(_CLIENT, [token]).fetchone()
            if client is None:
                return None
            given = [client[0], chat_id, "user", TEXT, f"wamid.{number}"]
            message = connection.execute(_APPEND, given).fetchone()
            if message is None:
                return None
            state = {"client_id": client[0], "chat_id": chat_id, "id": message[0], "at": message[1]}
            return connection.execute(_MOVE_ON, state).fetchone()

    return ingest


def by_batch(db: Database, clients: Clients) -> Candidate:
    """A provider's batch of kestra's, in several chats."""

    def ingest(iteration: int) -> list[Recorded]:
        client_id, _ = clients[iteration % len(clients)]
        numbers = [next(_numbers) for _ in range(BATCH)]
        batch = [
            IncomingMessage(f"batch {number % CHATS}", "user", TEXT, provider_message_id=f"wamid.{number}")
            for number in numbers
        ]
        with db.tenant_session(client_id) as session:
            return [*messages.record_many(session, messages=batch).recorded.values()]

    return ingest


def by_one_statement_for_many(pool: ConnectionPool, clients: Clients) -> Candidate:
    """The same batch in one statement, in autocommit. Its order of locks and of ids is that of chance."""

    def ingest(iteration: int) -> list[tuple[Any, ...]]:
        client_id, _ = clients[iteration % len(clients)]
        numbers = [next(_numbers) for _ in range(BATCH)]
        given = {
            "client_id": client_id,
            "chat_ids": [f"many {number % CHATS}" for number in numbers],
            "contents": [TEXT] * BATCH,
            "provider_ids": [f"wamid.{number}" for number in numbers],
        }
        with pool.connection() as connection:
            return connection.execute(MANY_STATEMENT, given).fetchall()

    return ingest


def as_scripts(clients: Clients) -> list[str]:
    """The one statement for pgbench, each client's a script."""
    number = "(:number)::bigint"
    drawn = {
        "chat_id": f"'limit ' || {number} % {CHATS}",
        "content": f"'{TEXT}'",
        "provider_id": f"'limit.' || {number}",
    }
    scripts = []
    for _, token in clients:
        statement = ONE_STATEMENT % {**drawn, "token": f"'{token}'"}
        scripts.append(f"\\set number random(1, 9000000000000000000)\n{statement};\n")
    return scripts


def is_stored(found: Any) -> bool:
    """Whether a new message is the newest of its conversation, which is active.

    Raises:
        AssertionError: It is not.
    """
    for one in found if isinstance(found, list) else [found]:
        match one:
            case Recorded(inserted=True, conversation=state):
                stored = (state.status, state.followup_stage) == ("active", 0)
            case (int(), True, str(), "active", 0, *_):
                stored = True
            case _:
                stored = False
        if not stored:
            raise AssertionError("a message was not stored")
    return True


@contextmanager
def by_hand(made: BenchmarkDatabase, *, connections: int, autocommit: bool) -> Iterator[ConnectionPool]:
    """A pool as one would have it by hand."""
    options = {"autocommit": autocommit}
    with ConnectionPool(made.plain_url, kwargs=options, min_size=connections, max_size=connections, open=True) as pool:
        yield pool


def run(*, quick: bool) -> Iterator[Row]:
    """One at a time, with threads, and in batches, also by hand; and the round trips of one."""
    with database(Installation(clients=20, chats=5 if quick else 50, messages=40)) as made:
        with psycopg.connect(made.superuser_url) as connection:
            clients = connection.execute("SELECT id, token FROM clients ORDER BY id").fetchall()
        yield from _one_at_a_time(made, clients, 20 if quick else 3000)
        yield from with_threads(made, clients, WITH_THREADS, quick=quick, bound=3.0)
        yield from in_batches(made, clients, BATCHES, 20 if quick else 2000, bound=10.0)
        yield from in_batches_by_hand(made, clients, 20 if quick else 1000)


def _one_at_a_time(made: BenchmarkDatabase, clients: Clients, iterations: int) -> Iterator[Row]:
    limit = bursts(LIMIT, made.plain_url, as_scripts(clients))
    ingests = partial(candidates, made, clients)
    timings = compare_in_rounds(ingests, iterations, same=is_stored, bursts=limit)
    yield from rows("ingest of a message", timings, base=ONE, bounds={INGEST: 1.3})
    with Database(made.url, settings=Settings(pool_max_size=1)) as db:
        trips = round_trips(db._open().tenant, by_ingest(db, clients))  # noqa: SLF001  # its only connection
        yield Row("round trips of an ingest", INGEST, trips, unit="", bound=1.0)


@contextmanager
def candidates(made: BenchmarkDatabase, clients: Clients, *, connections: int = 1) -> Iterator[dict[str, Candidate]]:
    """With as many connections each."""
    settings = Settings(pool_min_size=connections, pool_max_size=connections)
    with (
        Database(made.url, settings=settings) as db,
        by_hand(made, connections=connections, autocommit=True) as autocommit,
        by_hand(made, connections=connections, autocommit=False) as transactions,
    ):
        yield {
            ONE: by_one_statement(autocommit, clients),
            INGEST: by_ingest(db, clients),
            THREE: by_three_statements(transactions, clients),
        }


def with_threads(
    made: BenchmarkDatabase, clients: Clients, what: str, *, quick: bool, bound: float | None = None
) -> Iterator[Row]:
    """Messages a second, the candidates in turns; the first round warms up."""
    rounds, each = (2, 4) if quick else (9, 100)
    rates: dict[str, list[float]] = {}
    with candidates(made, clients, connections=THREADS) as ingests, ThreadPoolExecutor(THREADS) as threads:

        def burst(ingest: Candidate) -> float:
            def work(thread: int) -> None:
                for iteration in range(each):
                    is_stored(ingest(thread + iteration))

            start = time.perf_counter()
            list(threads.map(work, range(THREADS)))
            return THREADS * each / (time.perf_counter() - start)

        for turn in range(rounds):
            for name in sorted(ingests, reverse=turn % 2 == 1):
                rates.setdefault(name, []).append(burst(ingests[name]))
    medians = {name: median(found[1:]) for name, found in rates.items()}
    unit = "/s"
    yield Row(what, THREE, medians[THREE], unit=unit)
    yield Row(
        what, INGEST, medians[INGEST], unit=unit, ratio=medians[INGEST] / medians[THREE], bound=bound, at_least=True
    )
    yield Row(what, ONE, medians[ONE], unit=unit, ratio=medians[ONE] / medians[THREE])


def in_batches(
    made: BenchmarkDatabase, clients: Clients, what: str, iterations: int, *, bound: float | None = None
) -> Iterator[Row]:
    """Messages a second of the median batch."""
    name = f"messages.record_many of {BATCH}"

    @contextmanager
    def both() -> Iterator[dict[str, Candidate]]:
        with Database(made.url, settings=Settings(pool_max_size=1)) as db:
            yield {INGEST: by_ingest(db, clients), name: by_batch(db, clients)}

    yield from _rates(what, compare_in_rounds(both, iterations, same=is_stored), bound=bound)


def in_batches_by_hand(made: BenchmarkDatabase, clients: Clients, iterations: int) -> Iterator[Row]:
    """What a batch gains without kestra: with neither isolation, locks on chats, nor an order of anything."""

    @contextmanager
    def both() -> Iterator[dict[str, Candidate]]:
        with by_hand(made, connections=1, autocommit=True) as pool:
            yield {
                "one statement each": by_one_statement(pool, clients),
                f"one statement for {BATCH}": by_one_statement_for_many(pool, clients),
            }

    yield from _rates(f"{BATCHES}, by hand", compare_in_rounds(both, iterations, same=is_stored))


def _rates(what: str, timings: Mapping[str, Timing], *, bound: float | None = None) -> Iterator[Row]:
    """Messages a second, one at a time and of a batch, in this order."""
    (one, single), (many, batch) = timings.items()
    unit, ratio = "/s", single.median / (batch.median / BATCH)
    yield Row(what, one, 1 / single.median, unit=unit)
    yield Row(what, many, BATCH / batch.median, unit=unit, ratio=ratio, bound=bound, at_least=True)
