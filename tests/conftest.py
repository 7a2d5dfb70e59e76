"""Databases for the tests: built once by the migrations, cloned for each test.

The server is `KESTRA_TEST_DATABASE_URL` (a superuser's URL, on a server that may be thrown away) or an embedded one.
Tests reach a database as the role of an application, which is no superuser: a superuser ignores row level security, and
tests as one prove nothing.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import quote, urlencode
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from kestra import migrate
from kestra.base import Base
from kestra.database import Database
from kestra.embedded import temporary
from kestra.models import Client

APPLICATION_ROLE: Final = "kestra_app"
_LOCK: Final = 0x6B657374726102
_INHERIT_OPTION: Final = 160000
"""The server version from which a membership says itself whether it inherits."""


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """A superuser's URL of a database for maintenance; tests leave nothing in it."""
    if configured := os.environ.get("KESTRA_TEST_DATABASE_URL"):
        yield configured
        return
    with temporary(database="postgres") as url:
        yield url


@pytest.fixture(scope="session")
def template_database(server_url: str) -> Iterator[str]:
    """The name of a migrated database without rows."""
    with _database(server_url, "template") as name:
        # Roles belong to the server: two test runs at once must not create them at once.
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute("SELECT pg_advisory_lock(%s)", [_LOCK])
            migrate.upgrade(_url(server_url, dbname=name), "head")
            _ensure_application_role(connection, _password(server_url))
        yield name


@pytest.fixture
def empty_database(server_url: str) -> Iterator[str]:
    """A superuser's URL of a database with nothing in it."""
    with _database(server_url, "empty") as name:
        yield _url(server_url, dbname=name)


@pytest.fixture
def superuser_url(server_url: str, template_database: str) -> Iterator[str]:
    """A superuser's URL of this test's migrated database."""
    with _database(server_url, "clone", template=template_database) as name:
        yield _url(server_url, dbname=name)


@pytest.fixture
def superuser(superuser_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection to this test's migrated database, where each statement is a transaction."""
    with psycopg.connect(superuser_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def database_url(server_url: str, superuser_url: str) -> str:
    """The application's URL of this test's migrated database."""
    return _url(superuser_url, user=APPLICATION_ROLE, password=_password(server_url))


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


@contextmanager
def _database(server_url: str, purpose: str, *, template: str | None = None) -> Iterator[str]:
    name = f"kestra_test_{purpose}_{secrets.token_hex(6)}"
    identifier = sql.Identifier(name)
    # file_copy: 20 ms a clone, a third of the default's time.
    options = sql.SQL(" TEMPLATE {} STRATEGY file_copy").format(sql.Identifier(template)) if template else sql.SQL("")
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}{}").format(identifier, options))
    try:
        yield name
    finally:
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(identifier))


def _ensure_application_role(connection: psycopg.Connection[Any], password: str) -> None:
    """A login role that may become `kestra_tenant` and `kestra_system` and has none of their rights before it does."""
    role = sql.Identifier(APPLICATION_ROLE)
    if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [APPLICATION_ROLE]).fetchone() is None:
        connection.execute(sql.SQL("CREATE ROLE {}").format(role))
    connection.execute(
        sql.SQL("ALTER ROLE {} LOGIN NOINHERIT NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE PASSWORD {}").format(
            role, sql.Literal(password)
        )
    )
    option = " WITH INHERIT FALSE, SET TRUE" if connection.info.server_version >= _INHERIT_OPTION else ""
    connection.execute(sql.SQL("GRANT kestra_tenant, kestra_system TO {}" + option).format(role))


def _password(server_url: str) -> str:
    """The same for every worker of one server, and different from server to server."""
    return hashlib.sha256(server_url.encode()).hexdigest()


def _url(base: str, **changes: str) -> str:
    parts = {**conninfo_to_dict(base), **changes}
    user, password = (quote(str(parts.pop(part, "") or ""), safe="") for part in ("user", "password"))
    login = f"{user}:{password}@" if password else f"{user}@" if user else ""
    return f"postgresql://{login}/{quote(str(parts.pop('dbname', 'postgres')), safe='')}?{urlencode(parts, safe='/')}"
