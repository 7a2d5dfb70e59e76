"""What a test database of one's own costs: a clone of the migrated template, made and dropped.

Run it with `python benchmarks/testing.py [ITERATIONS]`; it exits with 1 when the median is above the bound. The server
is that of KESTRA_TEST_DATABASE_URL, or an embedded one.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import psycopg

from kestra.testing import databases
from kestra.testing.rollback import RolledBackDatabase

BOUND: Final = 0.030


def main(iterations: int = 100) -> int:
    """Measure, print, and compare with the bound."""
    taken: dict[str, list[float]] = {"made": [], "dropped": [], "both": [], "transaction": []}

    @contextmanager
    def measured(*names: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        for name in names:
            taken[name].append(time.perf_counter() - start)

    with databases.server() as server, server.template("benchmark") as name:
        for _ in range(iterations):
            clone = server.database("benchmark", template=name)
            with measured("both"):
                with measured("made"):
                    clone.__enter__()
                with measured("dropped"):
                    clone.__exit__(None, None, None)
        with server.database("benchmark", template=name) as shared:
            database = RolledBackDatabase(server.application_url(shared), empty=partial(server.empty, shared))
            for _ in range(iterations):
                with measured("transaction"), database.rolled_back(), database.system_session(reason="b") as session:
                    session.connection()
        with psycopg.connect(server.url) as connection:
            version = connection.info.server_version // 10000
    print(f"PostgreSQL {version}, {iterations} times{'':10}{'median':>8}{'p95':>10}")
    for label, times in taken.items():
        print(f"{label:33}{statistics.median(times) * 1e3:6.1f}ms{sorted(times)[int(len(times) * 0.95)] * 1e3:8.1f}ms")
    missed = statistics.median(taken["both"]) > BOUND
    print(f"\nbound ({BOUND * 1e3:.0f} ms for a clone, made and dropped): {'missed' if missed else 'held'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
