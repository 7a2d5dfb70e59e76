"""What every benchmark is measured with: candidates that take turns, ratios of medians, and a database to do it on."""

import os
import random
import secrets
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import sql
from sqlalchemy import Engine, make_url

from kestra.testing import databases
from kestra.testing.databases import Server
from kestra.testing.installation import Installation
from kestra.testing.loading import load
from kestra.testing.progress import Progress

Candidate = Callable[[int], Any]
"""One run. It is told which iteration it is, so that all candidates do the same work in the same one."""

Burst = Callable[[int], list[float]]
"""Many runs of a program that keeps the time itself: the seconds of each."""

PREPARED: Final = 10
"""After how many runs every statement is prepared on the server."""

ROUNDS: Final = 5
"""How often connections are made anew in the comparisons that last microseconds."""


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the runs of a candidate took.

    Attributes:
        name: The candidate.
        seconds: Of each run, sorted.
    """

    name: str
    seconds: list[float] = field(repr=False)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """Seconds that 95 of 100 runs do not exceed."""
        return self.seconds[int(len(self.seconds) * 0.95)]


def compare(
    candidates: Mapping[str, Candidate],
    iterations: int,
    *,
    same: Callable[[Any], object] | None = None,
) -> dict[str, Timing]:
    """The timings of candidates that take turns, run by run in a random order, without the first tenth of the runs.

    A slow moment of the machine slows all of them, and each finds the caches as often in its favour as the others.

    Args:
        candidates: By name.
        iterations: How many runs each has.
        same: What of a result has to be equal for all candidates in each iteration; it is not timed. None compares
            nothing.

    Raises:
        AssertionError: A candidate has found something else.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    turns, dice = list(candidates.items()), random.Random(7)  # noqa: S311  # not for secrets
    warm = iterations // 10
    for iteration in range(iterations):
        dice.shuffle(turns)
        found = {}
        for name, run in turns:
            start = time.perf_counter()
            result = run(iteration)
            seconds = time.perf_counter() - start
            if iteration >= warm:
                taken[name].append(seconds)
            if same is not None:
                found[name] = same(result)
        _expect_equal(found, iteration)
    return {name: Timing(name, sorted(seconds)) for name, seconds in taken.items()}


def compare_in_rounds(
    candidates: Callable[[], AbstractContextManager[Mapping[str, Candidate]]],
    iterations: int,
    *,
    same: Callable[[Any], object] | None = None,
    bursts: Mapping[str, Burst] | None = None,
) -> dict[str, Timing]:
    """`compare` in rounds, each with candidates of its own.

    From round to round the ratio of the same candidates differs by a tenth, be it the server processes or the moment of
    the machine. Rounds even out the first; nothing but another run evens out the second.

    Args:
        candidates: Makes them, with new connections.
        iterations: Of all rounds together.
        same: As in `compare`.
        bursts: Programs that keep the time themselves, by name; each has its turn at the end of a round.
    """
    runs, taken = max(iterations // ROUNDS, 1), defaultdict[str, list[float]](list)
    for _ in range(ROUNDS):
        with candidates() as made:
            for name, timing in compare(made, runs, same=same).items():
                taken[name] += timing.seconds
        for name, burst in (bursts or {}).items():
            taken[name] += burst(runs)[runs // 10 :]
    return {name: Timing(name, sorted(seconds)) for name, seconds in taken.items()}


def _expect_equal(found: Mapping[str, object], iteration: int) -> None:
    names = list(found)
    for name in names[1:]:
        if found[name] != found[names[0]]:
            raise AssertionError(f"In iteration {iteration} {name!r} has found something else than {names[0]!r}.")


def round_trips(engine: Engine, run: Candidate) -> int:
    """How often the server is waited for in one run, counted in libpq's trace of the engine's only connection.

    That is how often sending ends and receiving begins. Runs before it have prepared what is to be prepared.
    """
    run(0)
    driver: Any = engine.raw_connection()
    pgconn = driver.driver_connection.pgconn
    driver.close()
    with tempfile.TemporaryFile("w+") as trace:
        for iteration in range(PREPARED):
            run(iteration)
        pgconn.trace(trace.fileno())
        run(PREPARED)
        pgconn.untrace()
        trace.seek(0)
        sides = [line.split("\t")[1] for line in trace]
    return sum(pair == ("F", "B") for pair in pairwise(sides))


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        what: What was measured; candidates of the same are compared with each other.
        candidate: How it was done.
        median: In `unit`; of what was measured only once, the value.
        p95: In `unit`; None where there is no such thing.
        unit: "s"; "/s", "MB", …
        ratio: The median in proportion to that of the candidate it is compared with; None for that one itself.
        bound: What the ratio, or without one the median, must not exceed; None where nothing is promised.
        at_least: Whether the bound is what it must reach instead.
    """

    what: str
    candidate: str
    median: float
    p95: float | None = None
    unit: str = "s"
    ratio: float | None = None
    bound: float | None = None
    at_least: bool = False

    @property
    def held(self) -> bool | None:
        """Whether the bound is kept; None without one."""
        if self.bound is None:
            return None
        value = self.median if self.ratio is None else self.ratio
        return value >= self.bound if self.at_least else value <= self.bound


def rows(
    what: str, timings: Mapping[str, Timing], *, base: str, bounds: Mapping[str, float] | None = None
) -> Iterator[Row]:
    """The timings as lines, `base` first, the others in proportion to it.

    Args:
        what: What was measured.
        timings: By the name of the candidate.
        base: The candidate that the others are compared with.
        bounds: What the ratios of some of the others must not exceed.
    """
    known = timings[base]
    yield Row(what, base, known.median, known.p95)
    for name, timing in timings.items():
        if name != base:
            ratio = timing.median / known.median
            yield Row(what, name, timing.median, timing.p95, ratio=ratio, bound=(bounds or {}).get(name))


# --- databases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BenchmarkDatabase:
    """A migrated database that is dropped at the end.

    Attributes:
        url: The application's: a role that row level security binds.
        plain_url: An ordinary login's with rights on every table, whom no policy binds: what one has by hand. Of a
            superuser, PostgreSQL does not even check the rights.
        superuser_url: A superuser's.
    """

    url: str = field(repr=False)
    plain_url: str = field(repr=False)
    superuser_url: str = field(repr=False)

    def chats(self, *, messages: int, each: int) -> list[tuple[UUID, list[str]]]:
        """Clients that have so many chats (`each`) of so many messages or more, with these chats."""
        with psycopg.connect(self.superuser_url) as connection:
            return connection.execute(_CHATS, {"messages": messages, "each": each}).fetchall()

    def analyze(self) -> None:
        """Give the planner statistics and an index-only scan its visibility map, as autovacuum does sooner or later."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")


_CHATS: Final = """
WITH long AS (SELECT client_id, chat_id FROM chat_messages GROUP BY client_id, chat_id HAVING count(*) >= %(messages)s)
SELECT client_id, (array_agg(chat_id ORDER BY chat_id))[:%(each)s]
FROM long GROUP BY client_id HAVING count(*) >= %(each)s ORDER BY client_id
"""

_running: Server | None = None


@contextmanager
def server() -> Iterator[Server]:
    """The server of KESTRA_TEST_DATABASE_URL (a superuser's), or an embedded one; inside of the block, that one."""
    global _running  # noqa: PLW0603  # all benchmarks of a process share one server
    if _running is not None:
        yield _running
        return
    with databases.server() as started:
        _running = started
        try:
            yield started
        finally:
            _running = None


@contextmanager
def migrated() -> Iterator[str]:
    """The name of a migrated database without rows, to be cloned."""
    with server() as running, running.template(f"benchmarks {os.getpid()}") as template:
        yield template


@contextmanager
def _plain_login(running: Server) -> Iterator[tuple[str, str]]:
    login, password = f"kestra_by_hand_{secrets.token_hex(4)}", secrets.token_hex()
    create = sql.SQL("CREATE ROLE {} LOGIN BYPASSRLS PASSWORD {}").format(sql.Identifier(login), password)
    with psycopg.connect(running.url, autocommit=True) as connection:
        connection.execute(create)
        try:
            yield login, password
        finally:
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(login)))


@contextmanager
def database(installation: Installation | None = None) -> Iterator[BenchmarkDatabase]:
    """A migrated database of its own, with the rows of the installation; without one, without rows."""
    with (
        server() as running,
        migrated() as template,
        _plain_login(running) as (login, password),
        running.database("benchmark", template=template) as name,
    ):
        url = make_url(running.url_of(name)).set(username=login, password=password)
        plain_url = url.render_as_string(hide_password=False)
        made = BenchmarkDatabase(running.application_url(name), plain_url, running.url_of(name))
        with psycopg.connect(made.superuser_url) as connection:
            for kind in ("TABLES", "SEQUENCES"):
                grant = sql.SQL(f"GRANT ALL ON ALL {kind} IN SCHEMA public TO {{}}")
                connection.execute(grant.format(sql.Identifier(login)))
        if installation is not None:
            with Progress(installation.rows(), quiet=True) as progress:
                load(made.superuser_url, installation, progress)
            made.analyze()
        yield made
