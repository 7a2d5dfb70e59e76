import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg

ROOT = Path(__file__).parents[1]


def demo(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples/demo.py"],
        env={**os.environ, "KESTRA_DATABASE_URL": url, "PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
        capture_output=True,
        check=False,
        timeout=60,
    )


def test_the_demo_adopts_once_shows_two_clients_and_stops_every_attempt(empty_database: str) -> None:
    first = demo(empty_database)
    assert (first.returncode, first.stderr) == (0, "")
    assert "rows now: clients 4" in first.stdout
    with psycopg.connect(empty_database) as connection:
        before = rows(connection)
    second = demo(empty_database)
    assert (second.returncode, second.stderr) == (0, "")
    assert "adopted before" in second.stdout
    with psycopg.connect(empty_database) as connection:
        assert rows(connection) == before
    for run in (first, second):
        assert len(re.findall("^    stopped: ", run.stdout, re.MULTILINE)) == 4
        assert "NOT STOPPED" not in run.stdout
        assert_side_by_side(run.stdout)


def test_an_attempt_that_is_not_stopped_fails_the_demo(empty_database: str) -> None:
    assert demo(empty_database).returncode == 0
    with psycopg.connect(empty_database) as connection:
        connection.execute("ALTER TABLE chat_messages DISABLE ROW LEVEL SECURITY")
    broken = demo(empty_database)
    assert broken.returncode == 1
    assert broken.stdout.count("NOT STOPPED") == 1


def test_the_demo_leaves_a_database_alone_that_it_did_not_make(superuser_url: str) -> None:
    refused = demo(superuser_url)
    assert refused.returncode == 1
    assert refused.stderr == "demo: This database has tables that the demo did not make. Give it an empty one.\n"


def assert_side_by_side(output: str) -> None:
    """One chat_id, two clients, and no line of one conversation in the other's column."""
    assert "chat_id 5511988887777" in output
    pairs = [line.split(" | ") for line in output.splitlines() if " | " in line]
    left, right = ({cell.strip() for cell in column} for column in zip(*pairs[3:], strict=True))
    assert left
    assert right
    assert not left & right


def rows(connection: psycopg.Connection[tuple[object, ...]]) -> list[object]:
    tables = ("clients", "active_conversations", "chat_messages", "client_files", "orphaned_rows")
    counts = [connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() for table in tables]
    assert all(counts)
    return list(counts)
