"""What generating costs: an installation made and loaded, against a bare COPY of the same rows from ready files.

Each round has two fresh databases of one server, and the two take turns in going first. Into the same tables with the
same indexes, keys and checks.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import sql

from benchmarks.harness import Row, Timing, database, rows
from kestra.testing.copying import COLUMNS, chunks
from kestra.testing.installation import Installation
from kestra.testing.loading import load
from kestra.testing.progress import Progress

BOUND: Final = 2.0
BARE: Final = "bare COPY of ready files"
GENERATED: Final = "generate and load"
_BLOCK: Final = 1 << 20


def ready_files(installation: Installation, folder: Path) -> dict[str, Path]:
    """The rows of each table in a file, as COPY reads them."""
    paths = {table: folder / table for table in COLUMNS}
    files = {table: path.open("w", encoding="utf-8") for table, path in paths.items()}
    for chunk in chunks(installation, first_id=1):
        for table, lines in chunk.lines.items():
            files[table].writelines(lines)
    for file in files.values():
        file.close()
    return paths


def bare_copy(url: str, paths: dict[str, Path]) -> None:
    """The files, in one transaction."""
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        for table, path in paths.items():
            columns = sql.SQL(", ").join(map(sql.Identifier, COLUMNS[table]))
            statement = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(table), columns)
            with path.open("rb") as file, cursor.copy(statement) as copy:
                while block := file.read(_BLOCK):
                    copy.write(block)


def generate_and_load(url: str, sizes: dict[str, Any]) -> None:
    """What `kestra fixtures generate` does."""
    installation = Installation(**sizes)
    with Progress(installation.rows(), quiet=True) as progress:
        load(url, installation, progress)


def counts(url: str) -> list[int]:
    """How many rows there are in each table."""
    with psycopg.connect(url) as connection:
        tables = [sql.SQL("(SELECT count(*) FROM {})").format(sql.Identifier(table)) for table in COLUMNS]
        return [*(connection.execute(sql.SQL("SELECT ") + sql.SQL(", ").join(tables)).fetchone() or ())]


def run(*, quick: bool) -> Iterator[Row]:
    """Three rounds."""
    sizes: dict[str, Any] = {"clients": 50, "chats": 2 if quick else 150, "messages": 40}
    taken: dict[str, list[float]] = {BARE: [], GENERATED: []}
    with tempfile.TemporaryDirectory() as folder:
        paths = ready_files(Installation(**sizes), Path(folder))
        ways: dict[str, Callable[[str], None]] = {
            BARE: lambda url: bare_copy(url, paths),
            GENERATED: lambda url: generate_and_load(url, sizes),
        }
        for turn in range(1 if quick else 3):
            with ExitStack() as stack:
                urls = {name: stack.enter_context(database()).superuser_url for name in ways}
                for name in sorted(ways, reverse=turn % 2 == 1):
                    start = time.perf_counter()
                    ways[name](urls[name])
                    taken[name].append(time.perf_counter() - start)
                if counts(urls[BARE]) != counts(urls[GENERATED]):
                    raise AssertionError("not the same rows")
    timings = {name: Timing(name, sorted(seconds)) for name, seconds in taken.items()}
    what = f"{Installation(**sizes).count_messages():,} messages into a database"
    yield from rows(what, timings, base=BARE, bounds={GENERATED: BOUND})
