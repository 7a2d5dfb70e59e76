"""A project that is built on kestra: it installs the wheel, writes a function and tests, and runs them in parallel."""

import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psycopg
import pytest

ROOT: Final = Path(__file__).parents[1]
CLEAN: Final = {
    name: value
    for name, value in os.environ.items()
    if name not in {"PYTHONPATH", "VIRTUAL_ENV"} and not name.startswith(("PYTEST_", "KESTRA_"))
}
"""The environment, without what this run of tests has in it."""

CODE: Final = '''
"""What the project adds to kestra."""

from sqlalchemy import func, select

from kestra import ChatMessage, SystemSession, TenantSession, get_database
from kestra.dao import messages


def greet(session: TenantSession, chat_id: str) -> int:
    """Greet a customer once; how many messages the chat has."""
    messages.record(session, chat_id=chat_id, role="assistant", content="Olá!", provider_message_id=f"hi {chat_id}")
    session.commit()
    return session.scalars(select(func.count()).where(ChatMessage.chat_id == chat_id)).one()


def webhook(token: str, chat_id: str, text: str) -> None:
    db = get_database()
    with db.tenant_session(db.client_id_for_token(token)) as session:
        messages.record(session, chat_id=chat_id, role="user", content=text)


def newest(session: SystemSession, chat_id: str) -> ChatMessage:
    """Wrong: a chat_id is not unique among clients."""
    return session.scalars(select(ChatMessage).where(ChatMessage.chat_id == chat_id).limit(1)).one()
'''

TESTS: Final = """
import asyncio
import subprocess
import sys

import pytest
from sqlalchemy import func, select

from bakery import greet, newest, webhook
from kestra import ChatMessage
from kestra.testing.factories import ConversationFactory, using

TOTAL = select(func.count()).select_from(ChatMessage)


@pytest.mark.parametrize("run", range(4))
def test_a_greeting_is_stored_once(run, kestra_session, kestra_system_session):
    assert [greet(kestra_session, "1"), greet(kestra_session, "1")] == [1, 1]
    assert kestra_system_session.scalar(TOTAL) == 1


@pytest.mark.parametrize("run", range(4))
def test_a_greeting_in_asyncio(run, kestra_async_session, kestra_system_session):
    async def main():
        return await kestra_async_session.run_sync(greet, "1")

    assert asyncio.run(main()) == 1
    assert kestra_system_session.scalar(TOTAL) == 1


@pytest.mark.parametrize("run", range(4))
def test_a_webhook_goes_to_its_client(run, kestra_client, kestra_other_client, kestra_session, kestra_isolation):
    with kestra_isolation(kestra_client):
        webhook(kestra_client.token, "1", "oi")
    assert kestra_session.scalar(TOTAL) == 1


@pytest.mark.parametrize("run", range(2))
def test_another_process_sees_what_was_committed(run, kestra_committing_database, kestra_client):
    webhook(kestra_client.token, "1", "oi")
    code = (
        "from kestra import *; from sqlalchemy import func, select\\n"
        "with get_database().system_session(reason='look') as session:\\n"
        "    print(session.scalar(select(func.count()).select_from(ChatMessage)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\\n"


@pytest.mark.parametrize("run", range(2))
def test_made_up_names_depend_on_the_test_alone(run, kestra_session):
    with using(kestra_session):
        assert ConversationFactory().chat_id == ["5562909953191", "5583905468891"][run]


def test_that_crosses_a_client(kestra_database, kestra_client, kestra_other_client, kestra_isolation):
    webhook(kestra_other_client.token, "1", "deles")
    with kestra_isolation(kestra_client), kestra_database.system_session(reason="newest message") as session:
        newest(session, "1")
"""

SETTINGS: Final = """
[pytest]
filterwarnings = error
"""


@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    """The project's folder, with an environment in which nothing of the repository is found."""
    # Not in pytest's own folder: that one is closed to others again by each run, and the server runs as another user.
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder))
        yield Path(folder)


def _make(folder: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", str(ROOT)]
    subprocess.run(build, env=CLEAN, check=True)
    (wheel,) = folder.glob("kestra-*.whl")
    venv.create(folder / "environment", with_pip=True)
    python = str(folder / "environment/bin/python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"{wheel}[testing]", "pytest-xdist", "pytest-randomly"], env=CLEAN, check=True)
    for name, content in {"bakery.py": CODE, "test_bakery.py": TESTS, "pytest.ini": SETTINGS}.items():
        (folder / name).write_text(content, encoding="utf-8")


def run(project: Path, *arguments: str, url: str = "") -> tuple[int, str]:
    ran = subprocess.run(
        [project / "environment/bin/python", "-m", "pytest", *arguments],
        cwd=project,
        env={**CLEAN, "KESTRA_TEST_DATABASE_URL": url, "KESTRA_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"},
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_project_of_others_runs_in_parallel_and_in_any_order(project: Path, seed: str) -> None:
    code, said = run(project, "-n", "2", "-p", "randomly", f"--randomly-seed={seed}", "-k", "not crosses")
    assert code == 0, said
    assert re.search(r"\b16 passed\b", said), said
    assert f"--randomly-seed={seed}" in said


@pytest.mark.slow
def test_a_project_of_others_is_told_that_its_code_crosses_a_client(project: Path) -> None:
    code, said = run(project, "-n", "2", "-p", "randomly", "-k", "crosses")
    assert code == 1, said
    assert "1 failed" in said
    assert "client 00000000-0000-4000-8000-000000000002: read in a system session" in said


@pytest.mark.slow
def test_a_project_of_others_leaves_nothing_on_the_server_it_is_given(project: Path, server_url: str) -> None:
    def databases() -> set[str]:
        with psycopg.connect(server_url) as connection:
            return {name for (name,) in connection.execute("SELECT datname FROM pg_database")}

    before = databases()
    code, said = run(project, "-n", "2", "-k", "not crosses", url=server_url)
    assert code == 0, said
    assert databases() == before
