"""Throwaway databases: a server, a template that the migrations built, its clones, and the role of an application.

The server is that of KESTRA_TEST_DATABASE_URL, a superuser's URL of a server that may be thrown away, or an embedded
one. Processes that share a server (the workers of pytest-xdist) share its template too: whoever comes first makes it,
the last one to leave drops it.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

import kestra.database
from kestra import migrate
from kestra.base import SYSTEM_ROLE, TENANT_ROLE, Base
from kestra.database import Database
from kestra.driver import connection_error
from kestra.embedded import resolve_url, temporary
from kestra.errors import ConfigurationError
from kestra.settings import Settings

APPLICATION_ROLE: Final = "kestra_app"
"""What tests log in as: no superuser. A superuser ignores row level security, and tests as one prove nothing."""

_ROLES_LOCK: Final = 0x6B657374726102
"""The advisory lock of whoever makes roles, which belong to the server: two test runs must not make them at once."""

_INHERIT_OPTION: Final = 160000
"""The server version from which a membership says itself whether it inherits."""


@dataclass(frozen=True, slots=True)
class Server:
    """A PostgreSQL server on which databases come and go.

    Attributes:
        url: A superuser's URL of a database for maintenance, in which nothing is left.
        maintenance: A connection to it, on which databases are made and dropped.
        password: That of `APPLICATION_ROLE`: the same for whoever is a superuser of this server.
    """

    url: str = field(repr=False)
    maintenance: psycopg.Connection[Any] = field(repr=False)
    password: str = field(repr=False)

    def url_of(self, database: str) -> str:
        """A superuser's URL of a database."""
        return _url(self.url, dbname=database)

    def application_url(self, database: str) -> str:
        """The application's URL of a database: that of `APPLICATION_ROLE`, which `template` makes."""
        return _url(self.url, dbname=database, user=APPLICATION_ROLE, password=self.password)

    def empty(self, database: str) -> None:
        """Delete every row of a migrated database."""
        tables = sql.SQL(", ").join(sql.Identifier(table.name) for table in Base.metadata.sorted_tables)
        with psycopg.connect(self.url_of(database), autocommit=True) as connection:
            connection.execute(sql.SQL("TRUNCATE {} RESTART IDENTITY").format(tables))

    @contextmanager
    def database(self, purpose: str, *, template: str | None = None) -> Iterator[str]:
        """The name of a database of its own, empty or a clone of `template`, dropped at the end."""
        name = f"kestra_test_{purpose}_{secrets.token_hex(6)}"
        _create(self.maintenance, name, template=template)
        try:
            yield name
        finally:
            _drop(self.maintenance, name)

    @contextmanager
    def template(self, run: str) -> Iterator[str]:
        """The name of a migrated database without rows, to be cloned; nobody may stay connected to it.

        Args:
            run: Processes that give the same have the same template, which is made once.
        """
        name = f"kestra_test_template_{hashlib.sha256(run.encode()).hexdigest()[:12]}"
        changing, using = _lock_key(name, "changing"), _lock_key(name, "using")
        # Its shared lock is how the others know that the template is in use; it ends with the process, however that
        # ends.
        with psycopg.connect(self.url, autocommit=True) as connection:
            with _locked(connection, changing):
                if not _exists(connection, name):
                    self._build(connection, name)
                connection.execute("SELECT pg_advisory_lock_shared(%s)", [using])
            try:
                yield name
            finally:
                with _locked(connection, changing):
                    connection.execute("SELECT pg_advisory_unlock_shared(%s)", [using])
                    if connection.execute("SELECT pg_try_advisory_lock(%s)", [using]).fetchone() == (True,):
                        _drop(connection, name)

    def _build(self, connection: psycopg.Connection[Any], name: str) -> None:
        # Under another name until it is whole: a process that is killed leaves no half of a template.
        unfinished = f"{name}_{secrets.token_hex(4)}"
        _create(connection, unfinished)
        try:
            with _locked(connection, _ROLES_LOCK):
                migrate.upgrade(self.url_of(unfinished), "head")
                self._ensure_application_role(connection)
        except BaseException:
            _drop(connection, unfinished)
            raise
        connection.execute(
            sql.SQL("ALTER DATABASE {} RENAME TO {}").format(sql.Identifier(unfinished), sql.Identifier(name))
        )

    def _ensure_application_role(self, connection: psycopg.Connection[Any]) -> None:
        """A login role that may become the roles of kestra and has none of their rights before it does."""
        role = sql.Identifier(APPLICATION_ROLE)
        if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [APPLICATION_ROLE]).fetchone() is None:
            connection.execute(sql.SQL("CREATE ROLE {}").format(role))
        connection.execute(
            sql.SQL("ALTER ROLE {} LOGIN NOINHERIT NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE PASSWORD {}").format(
                role, sql.Literal(self.password)
            )
        )
        option = " WITH INHERIT FALSE, SET TRUE" if connection.info.server_version >= _INHERIT_OPTION else ""
        connection.execute(
            sql.SQL("GRANT {}, {} TO {}" + option).format(
                sql.Identifier(TENANT_ROLE), sql.Identifier(SYSTEM_ROLE), role
            )
        )


@contextmanager
def server(*, shared: Path | None = None) -> Iterator[Server]:
    """The server of KESTRA_TEST_DATABASE_URL; without one, an embedded server that is deleted at the end.

    Args:
        shared: Processes that give the same folder have the same embedded server.

    Raises:
        ConfigurationError: What KESTRA_TEST_DATABASE_URL says is no URL, cannot be reached, or is no superuser's.
    """
    with _superuser_url(shared) as url, _connected(url) as connection:
        row = connection.execute(
            "SELECT system_identifier, (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) "
            "FROM pg_control_system()"
        ).fetchone()
        if row is None or not row[1]:
            raise ConfigurationError(
                "The user of KESTRA_TEST_DATABASE_URL is no superuser. Tests make roles and databases: give one of a "
                "server that may be thrown away, or leave the variable out for an embedded one."
            )
        # Not of the URL's spelling: another run, on the same server, gives the role the same password.
        secret = f"{row[0]} {connection.info.password}"
        yield Server(url.get_secret_value(), connection, hashlib.sha256(secret.encode()).hexdigest())


@contextmanager
def _superuser_url(shared: Path | None) -> Iterator[SecretStr]:
    given = os.environ.get("KESTRA_TEST_DATABASE_URL")
    if given:
        try:
            settings = Settings(database_url=SecretStr(given))
        except ConfigurationError:
            raise ConfigurationError(
                "KESTRA_TEST_DATABASE_URL is no URL of libpq: postgresql://user:password@host:port/database."
            ) from None
        yield SecretStr(resolve_url(settings))
    else:
        with temporary(database="postgres", shared=shared) as url:
            yield SecretStr(url)


def _connected(url: SecretStr) -> psycopg.Connection[Any]:
    try:
        return psycopg.connect(url.get_secret_value(), autocommit=True)
    except psycopg.Error as error:
        said = str(connection_error(error)).replace("KESTRA_DATABASE_URL", "KESTRA_TEST_DATABASE_URL")
    # Without its cause: pytest shows the arguments of every function that an error went through.
    raise ConfigurationError(said)


@contextmanager
def as_process_database(database: Database) -> Iterator[None]:
    """`kestra.get_database` returns this one inside the block: the code under test asks for no other by accident.

    Sessions of the one that it returned before any test, which a module may have kept, are sessions of this one.
    """
    before = kestra.database._singleton  # noqa: SLF001  # of this package
    kept = {} if before is None or before in _IN_PLACE else vars(before)
    lent = {name: partial(_of_process, name) for name in ("_open", "_async_open")}
    kept |= lent
    kestra.database._singleton = database  # noqa: SLF001  # of this package
    _IN_PLACE.append(database)
    try:
        yield
    finally:
        _IN_PLACE.pop()
        kestra.database._singleton = before  # noqa: SLF001  # of this package
        for name in lent.keys() & kept.keys():
            del kept[name]


_IN_PLACE: Final[list[Database]] = []
"""The databases of the test, of which the last one is the process's."""


def _of_process(opening: str) -> Any:
    """What the database of the process opens now."""
    return getattr(_IN_PLACE[-1], opening)()


def _create(connection: psycopg.Connection[Any], name: str, *, template: str | None = None) -> None:
    # file_copy: 20 ms a clone, a third of the default's time.
    options = sql.SQL(" TEMPLATE {} STRATEGY file_copy").format(sql.Identifier(template)) if template else sql.SQL("")
    connection.execute(sql.SQL("CREATE DATABASE {}{}").format(sql.Identifier(name), options))


def _drop(connection: psycopg.Connection[Any], name: str) -> None:
    connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _exists(connection: psycopg.Connection[Any], name: str) -> bool:
    return connection.execute("SELECT FROM pg_database WHERE datname = %s", [name]).fetchone() is not None


@contextmanager
def _locked(connection: psycopg.Connection[Any], key: int) -> Iterator[None]:
    connection.execute("SELECT pg_advisory_lock(%s)", [key])
    try:
        yield
    finally:
        connection.execute("SELECT pg_advisory_unlock(%s)", [key])


def _lock_key(name: str, what: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{name} {what}".encode()).digest()[:8], signed=True)


def _url(base: str, **changes: str) -> str:
    parts = {**conninfo_to_dict(base), **changes}
    user, password = (quote(str(parts.pop(part, "") or ""), safe="") for part in ("user", "password"))
    login = f"{user}:{password}@" if password else f"{user}@" if user else ""
    return f"postgresql://{login}/{quote(str(parts.pop('dbname', 'postgres')), safe='')}?{urlencode(parts, safe='/')}"
