import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import psycopg
import pytest

from kestra import cli
from kestra.errors import MigrationError

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(empty_database: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command on an empty database: its exit code, stdout and stderr."""
    monkeypatch.setenv("KESTRA_DATABASE_URL", empty_database)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        return code, *capfd.readouterr()

    return run


def commands() -> list[str]:
    actions = cli.parser()._actions  # noqa: SLF001  # argparse has no other way to list its commands
    return [name for action in actions if isinstance(action, argparse._SubParsersAction) for name in action.choices]  # noqa: SLF001  # as above


def test_a_database_goes_up_is_checked_and_goes_down(run: Run) -> None:
    assert run("current") == (0, "(no revision)\n", "")
    assert run("upgrade")[0] == 0
    code, head, _ = run("current")
    assert (code, head) != (0, "(no revision)\n")
    assert run("check")[0] == 0
    assert run("downgrade", "0001")[0] == 0
    assert run("current")[1] == "0001\n"
    assert run("upgrade", "head")[0] == 0
    assert run("current")[1] == head


def test_an_existing_installation_is_adopted_in_its_own_zone(run: Run, empty_database: str) -> None:
    with psycopg.connect(empty_database) as connection:
        connection.execute((ROOT / "examples/existing_installation.sql").read_bytes())
    assert run("stamp", "0001")[0] == 0
    code, report, _ = run("upgrade", "--timezone", "America/Sao_Paulo")
    assert code == 0
    assert "America/Sao_Paulo" in report
    with psycopg.connect(empty_database) as connection:
        query = "SELECT created_at AT TIME ZONE 'UTC' FROM clients WHERE name = 'Pizzaria do Zé'"
        row = connection.execute(query).fetchone()
    assert str(row) == "(datetime.datetime(2026, 1, 30, 11, 0),)"


@pytest.mark.parametrize(
    "arguments",
    [
        ["upgrade", "9999"],
        ["downgrade", "9999"],
        ["stamp", "9999"],
        ["check"],
        ["upgrade", "--timezone", "Nowhere/Land"],
    ],
)
def test_a_failure_is_a_message_and_exit_code_1_without_a_traceback(arguments: list[str], run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("kestra: ")
    assert "Traceback" not in err


def test_a_wrong_setting_is_a_message_and_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTRA_DATABASE_URL", "mysql://u:hunter2@host/db")
    code, out, err = run("current")
    assert (code, out) == (1, "")
    assert err.startswith("kestra: Wrong setting: KESTRA_DATABASE_URL ")
    assert "hunter2" not in err


def test_a_defect_is_not_dressed_up_as_a_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_url: str) -> str:
        raise LookupError

    monkeypatch.setattr("kestra.migrate.current", fail)
    with pytest.raises(LookupError):
        run("current")


def test_the_error_of_a_migration_is_shown_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_url: str) -> str:
        raise MigrationError("Ask the administrator to run:\nCREATE ROLE kestra_tenant;")

    monkeypatch.setattr("kestra.migrate.current", fail)
    assert run("current") == (1, "", "kestra: Ask the administrator to run:\nCREATE ROLE kestra_tenant;\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"kestra {version('kestra')}\n"


@pytest.mark.parametrize("command", commands())
def test_every_command_is_in_the_documentation(command: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    assert any(re.search(rf"\bkestra {command}\b", text) for text in texts)


def test_help_loads_nothing_that_a_command_needs() -> None:
    code = """
import sys
from kestra.cli import main
try:
    main(["--help"])
except SystemExit:
    needed = {"alembic", "sqlalchemy", "psycopg", "pydantic"}
    sys.exit(f"loaded: {loaded}" if (loaded := needed & set(sys.modules)) else 0)
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ, "KESTRA_POOL_MAX_SIZE": "x"}
    )
