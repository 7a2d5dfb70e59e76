"""10,000 tenants through one process: what it keeps must not grow with the number of clients that it has served.

Each client has a unit of work: a message is stored, and the ORM reads. What is kept after 1,000
clients is compared with what is kept after all of them: the statements in SQLAlchemy's compiled caches, the Python
objects (tracemalloc), the memory of the process.
"""

import gc
import tracemalloc
from collections.abc import Iterator, Sized
from typing import Final
from uuid import UUID

import psutil
import psycopg
from sqlalchemy import Engine, select

from benchmarks.harness import Row, database
from kestra import ChatMessage, Database
from kestra.dao import messages
from kestra.testing.installation import Installation

BOUND: Final = 1.05
_MEGABYTE: Final = 1e6


def serve(db: Database, client_id: UUID) -> None:
    """A unit of work that writes and reads."""
    with db.tenant_session(client_id) as session:
        messages.record(session, chat_id="1", role="user", content="Bom dia!")
        session.scalars(select(ChatMessage).where(ChatMessage.chat_id == "1").limit(20)).all()


def kept(db: Database) -> dict[tuple[str, str], float]:
    """What the process keeps: by name and unit."""
    gc.collect()
    engines = db._open()  # noqa: SLF001  # its compiled caches
    return {
        ("compiled statements kept", ""): sum(len(_cache(engine)) for engine in (engines.tenant, engines.system)),
        ("Python objects kept", "MB"): tracemalloc.get_traced_memory()[0] / _MEGABYTE,
        ("memory of the process", "MB"): psutil.Process().memory_info().rss / _MEGABYTE,
    }


def _cache(engine: Engine) -> Sized:
    cache = engine._compiled_cache  # noqa: SLF001  # SQLAlchemy has no public way to look into it
    if cache is None:
        raise AssertionError("the engine has no compiled cache")
    return cache


def run(*, quick: bool) -> Iterator[Row]:
    """After the first tenth of the clients, and after all of them."""
    clients = 100 if quick else 10_000
    with database(Installation(clients=clients, chats=1, messages=3)) as made, Database(made.url) as db:
        with psycopg.connect(made.superuser_url) as connection:
            client_ids = [client_id for (client_id,) in connection.execute("SELECT id FROM clients ORDER BY id")]
        early = clients // 10
        tracemalloc.start()
        try:
            for client_id in client_ids[:early]:
                serve(db, client_id)
            before = kept(db)
            for client_id in client_ids[early:]:
                serve(db, client_id)
            after = kept(db)
        finally:
            tracemalloc.stop()
    for (what, unit), value in before.items():
        yield Row(what, f"after {early:,} tenants", value, unit=unit)
        later = after[what, unit]
        yield Row(what, f"after {clients:,} tenants", later, unit=unit, ratio=later / value, bound=BOUND)
