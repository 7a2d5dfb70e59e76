"""What generating costs: a million messages made and loaded, against a bare COPY of the same rows from ready files.

Each round has two fresh databases of one server, and the two take turns in going first. Into the same tables with the
same indexes, keys and checks.
Run it with `python benchmarks/generate.py [MESSAGES [ROUNDS]]`, on the server of KESTRA_TEST_DATABASE_URL (a
superuser's) or an embedded one; it exits with 1 when the median ratio is above the bound.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from kestra import migrate
from kestra.embedded import temporary
from kestra.testing.copying import COLUMNS, chunks
from kestra.testing.installation import Installation
from kestra.testing.loading import load
from kestra.testing.progress import Progress

BOUND: Final = 2.0
CLIENTS, PER_CHAT = 50, 40
_BLOCK: Final = 1 << 20


@contextmanager
def server() -> Iterator[str]:
    """A superuser's URL."""
    if configured := os.environ.get("KESTRA_TEST_DATABASE_URL"):
        yield configured
    else:
        with temporary(database="postgres") as url:
            yield url


@contextmanager
def migrated(url: str, name: str) -> Iterator[str]:
    """The URL of a database at head without rows."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            its_url = make_conninfo("", **{**conninfo_to_dict(url), "dbname": name})
            migrate.upgrade(its_url)
            connection.execute("CHECKPOINT")
            yield its_url
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


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


def bare_copy(url: str, paths: dict[str, Path]) -> float:
    """Seconds for COPY of the files, in one transaction."""
    start = time.perf_counter()
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        for table, path in paths.items():
            columns = sql.SQL(", ").join(map(sql.Identifier, COLUMNS[table]))
            statement = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(table), columns)
            with path.open("rb") as file, cursor.copy(statement) as copy:
                while block := file.read(_BLOCK):
                    copy.write(block)
    return time.perf_counter() - start


def generate_and_load(url: str, sizes: dict[str, Any]) -> float:
    """Seconds for what `kestra fixtures generate` does."""
    start = time.perf_counter()
    installation = Installation(**sizes)
    with Progress(installation.rows(), quiet=True) as progress:
        load(url, installation, progress)
    return time.perf_counter() - start


def rows(url: str) -> list[int]:
    """How many there are in each table."""
    with psycopg.connect(url) as connection:
        counts = [sql.SQL("(SELECT count(*) FROM {})").format(sql.Identifier(table)) for table in COLUMNS]
        return [*(connection.execute(sql.SQL("SELECT ") + sql.SQL(", ").join(counts)).fetchone() or ())]


def main(messages: int = 1_000_000, rounds: int = 3) -> int:
    """Measure, print, and compare with the bound."""
    sizes: dict[str, Any] = {"clients": CLIENTS, "chats": max(messages // PER_CHAT // CLIENTS, 1), "messages": PER_CHAT}
    ratios = []
    with server() as url, tempfile.TemporaryDirectory() as folder:
        paths = ready_files(Installation(**sizes), Path(folder))
        print(
            f"{Installation(**sizes).count_messages():,} messages{'generate and load':>24}{'bare COPY':>12}{'ratio':>8}"
        )
        for number in range(rounds):
            name = f"kestra_bench_{os.getpid()}"
            with migrated(url, f"{name}_a") as loaded, migrated(url, f"{name}_b") as copied:
                if number % 2:
                    base = bare_copy(copied, paths)
                    candidate = generate_and_load(loaded, sizes)
                else:
                    candidate = generate_and_load(loaded, sizes)
                    base = bare_copy(copied, paths)
                if rows(loaded) != rows(copied):
                    raise AssertionError("not the same rows")
            ratios.append(candidate / base)
            print(f"{'':18}{candidate:22.1f} s{base:10.1f} s{ratios[-1]:8.2f}")
    ratio = statistics.median(ratios)
    print(f"bound (median ratio {BOUND:.2f}): {ratio:.2f}, {'missed' if ratio > BOUND else 'held'}")
    return int(ratio > BOUND)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
