"""The fixtures of kestra, for every project that has it installed; docs/testing.md has them one by one.

pytest imports this file in each of its runs, also where nothing of kestra is tested: it imports pytest and the standard
library, and whatever else when a fixture is asked for. For the same reason annotations are not evaluated.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final
from uuid import UUID

import pytest

import kestra.testing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from kestra import AsyncTenantSession, Client, Database, SystemSession, TenantSession
    from kestra.testing.databases import Server
    from kestra.testing.rollback import RolledBackDatabase

_CLIENT: Final = "00000000-0000-4000-8000-000000000001"
_OTHER_CLIENT: Final = "00000000-0000-4000-8000-000000000002"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the values of the factories again, with a seed of the test's own: its order among the others is no part."""
    kestra.testing.seed_of_the_test = int.from_bytes(hashlib.sha256(item.nodeid.encode()).digest()[:8])
    if (factories := sys.modules.get("kestra.testing.factories")) is not None:
        factories.seed(kestra.testing.seed_of_the_test)


@pytest.fixture(scope="session")
def kestra_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The PostgreSQL server of this run: that of KESTRA_TEST_DATABASE_URL, a superuser's URL, or an embedded one."""
    from kestra.testing import databases  # noqa: PLC0415  # see the head of the file

    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    # The folder above a worker's own is that of its run.
    shared = tmp_path_factory.getbasetemp().parent / f"kestra-{run}" if run else None
    with databases.server(shared=shared) as server:
        yield server


@pytest.fixture(scope="session")
def kestra_template(kestra_server: Server) -> Iterator[str]:
    """The name of a migrated database without rows, made once in a run, to be cloned."""
    with kestra_server.template(os.environ.get("PYTEST_XDIST_TESTRUNUID") or secrets.token_hex()) as name:
        yield name


@pytest.fixture(scope="session")
def _kestra_clone(kestra_server: Server, kestra_template: str) -> Iterator[RolledBackDatabase]:
    """The clone of this worker, in which nothing is ever committed."""
    from kestra.testing.rollback import RolledBackDatabase  # noqa: PLC0415  # see the head of the file

    with kestra_server.database("worker", template=kestra_template) as name:
        yield RolledBackDatabase(kestra_server.application_url(name), empty=partial(kestra_server.empty, name))


@pytest.fixture
def kestra_database(_kestra_clone: RolledBackDatabase) -> Iterator[RolledBackDatabase]:
    """A database, and the one of `get_database`: whatever the sessions of a test commit is rolled back at its end."""
    from kestra.testing.databases import as_process_database  # noqa: PLC0415  # see the head of the file

    with _kestra_clone.rolled_back(), as_process_database(_kestra_clone):
        yield _kestra_clone


@pytest.fixture
def kestra_committing_database(kestra_server: Server, kestra_template: str) -> Iterator[Database]:
    """A database of this test alone, and the one of `get_database`, for code that needs real commits.

    Programs that the test starts have it too: KESTRA_DATABASE_URL is its URL.
    """
    from kestra import Database  # noqa: PLC0415  # see the head of the file
    from kestra.testing.databases import as_process_database  # noqa: PLC0415  # see the head of the file

    with (
        kestra_server.database("test", template=kestra_template) as name,
        Database(url := kestra_server.application_url(name)) as database,
        as_process_database(database),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("KESTRA_DATABASE_URL", url)
        yield database


@pytest.fixture
def kestra_client(request: pytest.FixtureRequest) -> Client:
    """A client, in each of the two databases that the test uses."""
    return _client(request, _CLIENT, "Padaria do Bairro")


@pytest.fixture
def kestra_other_client(request: pytest.FixtureRequest) -> Client:
    """Another client beside `kestra_client`, of which nothing may be seen."""
    return _client(request, _OTHER_CLIENT, "Oficina da Esquina")


@pytest.fixture
def kestra_session(kestra_database: RolledBackDatabase, kestra_client: Client) -> TenantSession:
    """A session of `kestra_client` until the end of the test, rolled back also where it is committed."""
    return kestra_database.tenant(kestra_client.id)


@pytest.fixture
def kestra_async_session(kestra_database: RolledBackDatabase, kestra_client: Client) -> AsyncTenantSession:
    """`kestra_session` for asyncio, under whatever runs the test's event loop."""
    return kestra_database.async_tenant(kestra_client.id)


@pytest.fixture
def kestra_system_session(kestra_database: RolledBackDatabase) -> SystemSession:
    """A session over all clients until the end of the test; it sees what the other sessions wrote, and they see it."""
    return kestra_database.system(reason="a test")


@pytest.fixture
def kestra_isolation(request: pytest.FixtureRequest) -> Callable[..., AbstractContextManager[None]]:
    """The assertion that a block touches no rows but those of the clients it is given."""
    from kestra.testing.isolation import assert_touches_only  # noqa: PLC0415  # see the head of the file

    @contextmanager
    def touches_only(*clients: Client | UUID | str) -> Iterator[None]:
        with ExitStack() as stack:
            for database in _databases(request):
                stack.enter_context(assert_touches_only(database, *clients))
            yield

    return touches_only


def _client(request: pytest.FixtureRequest, number: str, name: str) -> Client:
    from kestra import Client  # noqa: PLC0415  # see the head of the file

    for database in _databases(request):
        with database.system_session(reason="client of a test", inside_tenant_session=True) as session:
            client = Client(id=UUID(number), name=name, token=f"token-{number}")
            session.add(client)
            session.flush()
            session.refresh(client)
    return client


def _databases(request: pytest.FixtureRequest) -> list[Database]:
    """Those of the two that the test uses, directly or not; the one that is rolled back where it names none."""
    names = [name for name in ("kestra_database", "kestra_committing_database") if name in request.fixturenames]
    return [request.getfixturevalue(name) for name in names or ["kestra_database"]]
