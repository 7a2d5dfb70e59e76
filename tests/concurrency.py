"""Threads that start together, and those that wait for a lock."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Barrier
from time import monotonic
from typing import Any, Final, TypeVar

import psycopg

PATIENCE: Final = 60.0
"""Seconds after which a test that waits for ever fails."""

T = TypeVar("T")


def at_once(*work: Callable[[], T]) -> list[T]:
    """What each returns, in threads that start together; what one of them raises is raised."""
    barrier = Barrier(len(work))

    def started(one: Callable[[], T]) -> T:
        barrier.wait(PATIENCE)
        return one()

    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(started, one) for one in work]]


def outcomes_at_once(*work: Callable[[], T]) -> list[T | Exception]:
    """What each returns or raises, in threads that start together."""
    return at_once(*(partial(_outcome, one) for one in work))


def _outcome(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except Exception as error:  # noqa: BLE001  # it is the result
        return error


def until_waiting(
    superuser: psycopg.Connection[Any],
    *work: Future[Any],
    lock: str | None = None,
    holder: psycopg.Connection[Any] | None = None,
) -> None:
    """Return when all of the work waits for a lock; fail if some of it ends before.

    Args:
        superuser: Who looks.
        work: What is to wait.
        lock: The kind of the lock; None is any.
        holder: Who has the lock; None is anybody.
    """
    waiting = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend' "
        "AND wait_event_type = 'Lock' AND wait_event = coalesce(%s, wait_event) "
        "AND (%s::int IS NULL OR %s = ANY (pg_blocking_pids(pid)))"
    )
    pid = None if holder is None else holder.info.backend_pid
    deadline = monotonic() + PATIENCE
    while superuser.execute(waiting, [lock, pid, pid]).fetchone() != (len(work),):
        assert not any(future.done() for future in work), "it did not wait"
        assert monotonic() < deadline, "nobody waits for a lock"
