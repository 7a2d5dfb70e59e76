"""What a test database of one's own costs: a clone of the migrated template, made and dropped.

Beside it the transaction that is rolled back, in which tests run that need no database of their own.
"""

from collections.abc import Iterator
from functools import partial
from typing import Final

from benchmarks.harness import Row, compare, migrated, server
from kestra.testing.rollback import RolledBackDatabase

BOUND: Final = 0.030
"""Seconds."""


def run(*, quick: bool) -> Iterator[Row]:
    """A clone, and a transaction."""
    with server() as running, migrated() as template, running.database("benchmark", template=template) as shared:
        database = RolledBackDatabase(running.application_url(shared), empty=partial(running.empty, shared))

        def clone(_iteration: int) -> None:
            with running.database("benchmark", template=template):
                pass

        def transaction(_iteration: int) -> None:
            with database.rolled_back(), database.system_session(reason="benchmark") as session:
                session.connection()

        cloned, rolled_back = compare(
            {"clone, made and dropped": clone, "transaction, rolled back": transaction}, 10 if quick else 100
        ).values()
    what = "a test's database"
    yield Row(what, cloned.name, cloned.median, cloned.p95, bound=BOUND)
    yield Row(what, rolled_back.name, rolled_back.median, rolled_back.p95)
