"""Follow-ups among a million conversations against ten thousand: a claim of 100, and the search for who has any.

As many are due in both. The others are those of a grown installation: finished, answered, past the last stage, not due
yet and, where the channel has a window, too old. What a run has claimed is due again in the next one, because the
clock has gone on by the lease: each run finds the same. Beside them the claim that one writes by hand.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool

from benchmarks.harness import BenchmarkDatabase, Candidate, Row, compare, database, rows
from kestra import Database, Settings
from kestra.dao import followups

BOUND: Final = 1.3
SIZES: Final = (10_000, 1_000_000)
QUICK: Final = (1_000, 5_000)
CLAIM: Final = "followups.claim"
BY_HAND: Final = "psycopg by hand, no RLS"
LIMIT: Final = 100
DUE: Final = 400
"""How many conversations of each client are due."""

NOW: Final = datetime(2026, 1, 15, 15, tzinfo=UTC)
LEASE: Final = timedelta(milliseconds=1)
_clock = (NOW + tick * LEASE for tick in itertools.count())


class Channel(NamedTuple):
    """A client for each kind of channel: Meta's refuses what is sent a day after the end customer's last message."""

    client_id: UUID
    config: dict[str, Any]
    window: bool


_FOLLOWUP: Final = {
    "active": True,
    "stages": [{"delay_minutes": delay, "prompt": "Retome."} for delay in (30, 60, 120)],
}
CHANNELS: Final = {
    "window of a day": Channel(UUID(int=1), {"whatsapp": {"provider": "meta"}, "followup": _FOLLOWUP}, window=True),
    "no window": Channel(UUID(int=2), {"whatsapp": {"provider": "uazapi"}, "followup": _FOLLOWUP}, window=False),
}

_CLIENT: Final = "INSERT INTO clients (id, name, token, tools_config) VALUES (%s, %s, %s, %s)"
_CONVERSATIONS: Final = """
INSERT INTO active_conversations
    (client_id, chat_id, status, last_role, followup_stage, last_message_at, last_user_message_at)
SELECT %(client_id)s, 'chat ' || n, status, last_role, stage + mod(n, 3), at, at - interval '1 minute'
FROM (VALUES
    (0, 'active',   'assistant', 0, interval '3 hours'),  -- due
    (1, 'active',   'assistant', 0, interval '0'),        -- not due yet
    (2, 'active',   'assistant', 3, interval '1 day'),    -- past the last stage
    (3, 'active',   'assistant', CASE WHEN %(window)s THEN 0 ELSE 3 END, interval '1 day'),  -- too old
    (4, 'active',   'user',      0, interval '1 day'),    -- answered
    (5, 'active',   'user',      0, interval '1 hour'),
    (6, 'finished', 'assistant', 0, interval '1 day')
) AS kinds (kind, status, last_role, stage, silence)
JOIN generate_series(1, %(size)s) AS n ON kind = CASE WHEN n <= %(due)s THEN 0 ELSE 1 + mod(n, 6) END,
LATERAL (SELECT %(now)s - silence - mod(n, 1500) * interval '1 second' AS at) AS moments
"""
_CLAIM: Final = """
UPDATE active_conversations SET claim_token = gen_random_uuid(), claimed_until = %(until)s
WHERE client_id = %(client_id)s AND chat_id IN (
    SELECT chat_id FROM active_conversations
    WHERE client_id = %(client_id)s AND status = 'active' AND last_role = 'assistant' AND followup_stage < 3
      AND last_message_at <= %(now)s
          - CASE followup_stage WHEN 0 THEN interval '30 min' WHEN 1 THEN interval '1 h' ELSE interval '2 h' END
      AND (NOT %(window)s OR last_user_message_at > %(now)s - interval '1 day')
      AND (claimed_until IS NULL OR claimed_until <= %(now)s)
    ORDER BY followup_stage DESC, last_message_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
)
RETURNING chat_id, status, followup_stage, last_role, last_message_at, last_message_id, last_user_message_at,
          last_user_message_id, last_read_message_id, paused_until, last_context
"""


def claim(db: Database, channel: Channel) -> Candidate:
    """`followups.claim`, the whole unit of work."""

    def run(_iteration: int) -> list[str]:
        with db.tenant_session(channel.client_id) as session:
            claims = followups.claim(session, limit=LIMIT, lease=LEASE, now=next(_clock))
        return [claimed.chat_id for claimed in claims]

    return run


def claim_by_hand(pool: ConnectionPool[Any], channel: Channel) -> Candidate:
    """One statement in a transaction: the delay of each stage in a CASE."""

    def run(_iteration: int) -> list[str]:
        now = next(_clock)
        given = {"client_id": channel.client_id, "window": channel.window, "limit": LIMIT, "now": now}
        with pool.connection() as connection:
            return [row[0] for row in connection.execute(_CLAIM, {**given, "until": now + LEASE})]

    return run


def clients_due(db: Database) -> Candidate:
    """`followups.clients_due`, the whole unit of work."""

    def run(_iteration: int) -> list[UUID]:
        with db.system_session(reason="benchmark") as session:
            return followups.clients_due(session, now=next(_clock))

    return run


@contextmanager
def installation(size: int) -> Iterator[tuple[BenchmarkDatabase, Database]]:
    """A database with so many conversations, half of each client."""
    with database() as made:
        with psycopg.connect(made.superuser_url) as connection:
            for name, channel in CHANNELS.items():
                connection.execute(_CLIENT, [channel.client_id, name, name, Jsonb(channel.config)])
                given = {"client_id": channel.client_id, "window": channel.window, "size": size // len(CHANNELS)}
                connection.execute(_CONVERSATIONS, {**given, "due": DUE, "now": NOW})
        made.analyze()
        with Database(made.url, settings=Settings(pool_max_size=1)) as db:
            yield made, db


def run(*, quick: bool) -> Iterator[Row]:
    """Claims on each channel, then the search for clients."""
    sizes = QUICK if quick else SIZES
    small, large = (f"{size:,} conversations" for size in sizes)
    with installation(sizes[0]) as (_, little), installation(sizes[1]) as (made, much):
        for name, channel in CHANNELS.items():
            claims = {small: claim(little, channel), large: claim(much, channel)}
            timings = compare(claims, 20 if quick else 1000, same=list)
            yield from rows(f"follow-up claim of {LIMIT}, {name}", timings, base=small, bounds={large: BOUND})
        searches = {small: clients_due(little), large: clients_due(much)}
        yield from rows("followups.clients_due", compare(searches, 20 if quick else 200, same=list), base=small)
        with ConnectionPool[Any](made.plain_url, min_size=1, max_size=1, open=True) as pool:
            for name, channel in CHANNELS.items():
                both = {CLAIM: claim(much, channel), BY_HAND: claim_by_hand(pool, channel)}
                timings = compare(both, 10 if quick else 30, same=set)
                yield from rows(f"follow-up claim of {LIMIT}, {name}, {large}", timings, base=CLAIM)
