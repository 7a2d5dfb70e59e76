"""Databases for the tests: built once by the migrations, cloned for each test.

The server is `KESTRA_TEST_DATABASE_URL` (a superuser's URL, on a server that may be thrown away) or an embedded one.
Some tests change what the databases of a server have in common, roles above all: each worker of pytest-xdist has a
server of its own, of as many URLs with a blank between them.
Tests reach a database as the role of an application, which is no superuser: a superuser ignores row level security, and
tests as one prove nothing.
"""

import os
from collections.abc import Iterator
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from kestra.base import Base
from kestra.database import Database
from kestra.models import Client
from kestra.testing import databases
from kestra.testing.databases import Server

_GIVEN: Final = "KESTRA_TEST_DATABASE_URL"


def pytest_configure() -> None:
    """Give this worker its own of the servers that are given."""
    worker, urls = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get(_GIVEN, "").split()
    if worker is not None and urls:
        number = int(worker.removeprefix("gw"))
        if number >= len(urls):
            raise pytest.UsageError(f"{_GIVEN} has fewer servers than there are workers.")
        os.environ[_GIVEN] = urls[number]


@pytest.fixture(scope="session")
def kestra_server() -> Iterator[Server]:
    """The server of this process alone."""
    with databases.server() as server:
        yield server


@pytest.fixture(scope="session")
def server_url(kestra_server: Server) -> str:
    """A superuser's URL of a database for maintenance; tests leave nothing in it."""
    return kestra_server.url


@pytest.fixture(scope="session")
def template_database(kestra_template: str) -> str:
    """The name of a migrated database without rows."""
    return kestra_template


@pytest.fixture
def empty_database(kestra_server: Server) -> Iterator[str]:
    """A superuser's URL of a database with nothing in it."""
    with kestra_server.database("empty") as name:
        yield kestra_server.url_of(name)


@pytest.fixture
def clone(kestra_server: Server, template_database: str) -> Iterator[str]:
    """The name of this test's migrated database."""
    with kestra_server.database("clone", template=template_database) as name:
        yield name


@pytest.fixture
def superuser_url(kestra_server: Server, clone: str) -> str:
    """A superuser's URL of this test's migrated database."""
    return kestra_server.url_of(clone)


@pytest.fixture
def superuser(superuser_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection to this test's migrated database, where each statement is a transaction."""
    with psycopg.connect(superuser_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def database_url(kestra_server: Server, clone: str) -> str:
    """The application's URL of this test's migrated database."""
    return kestra_server.application_url(clone)


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    with Database(database_url) as database:
        yield database


@pytest.fixture(params=["filter and row level security", "filter alone"])
def layers(request: pytest.FixtureRequest, superuser: psycopg.Connection[Any]) -> None:
    """What keeps the clients apart: everything, or the session without the policies of the database."""
    if request.param == "filter alone":
        for table in Base.metadata.tables:
            superuser.execute(sql.SQL("ALTER TABLE {} DISABLE ROW LEVEL SECURITY").format(sql.Identifier(table)))


@pytest.fixture
def clients(db: Database) -> tuple[UUID, UUID]:
    with db.system_session(reason="test data") as session:
        rows = [Client(name="A", token="token-a"), Client(name="B", token="token-b")]  # noqa: S106  # not a password
        session.add_all(rows)
        session.flush()
        return rows[0].id, rows[1].id


@pytest.fixture
def client_id(clients: tuple[UUID, UUID]) -> UUID:
    return clients[0]


@pytest.fixture
def other_client_id(clients: tuple[UUID, UUID]) -> UUID:
    return clients[1]
