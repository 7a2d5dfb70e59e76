"""Connections: one pool for each kind of program, and a clear error for each way in which there is none."""

import asyncio
import os
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.adapt import PyFormat, Transformer
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import ARRAY, Text, bindparam, func, select, text

import kestra.database
from kestra import Client, Database, get_database
from kestra.driver import IDLE_SECONDS
from kestra.embedded import temporary
from kestra.errors import (
    AuthenticationFailed,
    ConfigurationError,
    DatabaseUnavailable,
    DuplicateToken,
    InvalidValue,
    KestraError,
    PoolExhausted,
    StatementFailed,
    UnknownToken,
)
from kestra.settings import Settings
from tests.concurrency import at_once

PASSWORD = "s3cret-pa55"  # noqa: S105  # the one that must not be shown


@pytest.fixture
def process(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process whose environment names the test's database, and that has not asked for its `Database` yet."""
    monkeypatch.setenv("KESTRA_DATABASE_URL", database_url)
    monkeypatch.setattr(kestra.database, "_singleton", None)
    yield
    get_database().close()


# --- one per process ---


@pytest.mark.usefixtures("process")
def test_database_is_one_per_process_also_when_threads_race_for_it() -> None:
    assert {id(answer) for answer in at_once(*[get_database] * 16)} == {id(get_database())}


@pytest.mark.usefixtures("process")
def test_threads_share_one_pool(client_id: UUID) -> None:
    pool = get_database()._open().pool  # noqa: SLF001  # the pool's own count
    before = pool.get_stats()["requests_num"]

    def names() -> list[str]:
        with get_database().tenant_session(client_id) as session:
            return list(session.scalars(select(Client.name)))

    assert at_once(*[names] * 8) == [["A"]] * 8
    assert pool.get_stats()["requests_num"] == before + 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # what the test is about
@pytest.mark.usefixtures("process")
def test_forked_child_has_connections_of_its_own_and_the_parents_live_on(
    client_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "1")

    def backend() -> int:
        with get_database().tenant_session(client_id) as session:
            return int(session.scalars(select(func.pg_backend_pid())).one())

    before = backend()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest may run in here
        status = 1
        try:
            signal.alarm(30)
            os.write(write, str(backend()).encode())
            get_database().close()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert os.waitstatus_to_exitcode(status) == 0
        assert int(pipe.read()) != before
    assert backend() == before


def test_closed_database_opens_again(db: Database, client_id: UUID) -> None:
    db.close()
    with db.tenant_session(client_id) as session:
        assert session.scalars(select(Client.id)).all() == [client_id]


def test_each_event_loop_has_a_pool_of_its_own(db: Database, client_id: UUID) -> None:
    async def names() -> list[str]:
        async with db.async_tenant_session(client_id) as session:
            found = list(await session.scalars(select(Client.name)))
        await db.aclose()
        return found

    assert [asyncio.run(names()) for _ in range(3)] == [["A"]] * 3


def test_nothing_is_opened_before_the_first_session() -> None:
    database = Database("postgresql://nobody@127.0.0.1:1/nowhere")
    assert repr(database) == "Database(open=False)"


# --- connections ---


def test_checkouts_leave_nothing_on_the_connection(
    database_url: str, client_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "1")
    with Database(database_url) as db:
        handlers = []
        for _ in range(20):
            with db.tenant_session(client_id) as session:
                driver: Any = session.connection().connection.driver_connection
                handlers.append(len(driver._notice_handlers))  # noqa: SLF001  # no public count
    assert handlers == [0] * 20


def test_async_checkouts_leave_nothing_on_the_connection(db: Database, client_id: UUID) -> None:
    async def main() -> None:
        async with db:
            for _ in range(20):
                async with db.async_tenant_session(client_id) as session:
                    driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
                    assert driver._notice_handlers == []  # noqa: SLF001  # no public count

    asyncio.run(main())


def _terminate(superuser_url: str, pid: int | None) -> None:
    """End a connection from the server's side, and wait until it is gone."""
    with psycopg.connect(superuser_url, autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])


def _rest(db: Database, seconds: float) -> None:
    """Make the pooled connections believe that they have rested."""
    for connection in db._open().pool._pool:  # noqa: SLF001  # instead of waiting
        connection.idle_since -= seconds


def test_connection_that_died_while_it_rested_is_replaced(
    database_url: str, superuser_url: str, client_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "1")
    with Database(database_url) as db:
        with db.tenant_session(client_id) as session:
            pid = session.scalar(select(func.pg_backend_pid()))
        _terminate(superuser_url, pid)
        _rest(db, IDLE_SECONDS + 1)
        with db.tenant_session(client_id) as session:
            assert session.scalar(select(func.pg_backend_pid())) != pid


def test_connection_that_died_unnoticed_is_one_clear_error_and_replaced(
    database_url: str, superuser_url: str, client_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "1")
    with Database(database_url) as db:
        with db.tenant_session(client_id) as session:
            pid = session.scalar(select(func.pg_backend_pid()))
        _terminate(superuser_url, pid)
        with (
            pytest.raises(DatabaseUnavailable, match="run it again"),
            db.tenant_session(client_id) as session,
        ):
            session.scalars(select(Client)).all()
        with db.tenant_session(client_id) as session:
            assert session.scalars(select(Client.id)).all() == [client_id]


def test_busy_connection_is_not_checked(database_url: str, client_id: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[object] = []
    monkeypatch.setattr("kestra.driver.ConnectionPool.check_connection", checked.append)
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "1")
    with Database(database_url) as db:
        for _ in range(5):
            with db.tenant_session(client_id) as session:
                session.connection()
        assert checked == []
        _rest(db, IDLE_SECONDS + 1)
        with db.tenant_session(client_id) as session:
            session.connection()
        assert len(checked) == 1


@pytest.mark.parametrize("threshold", ["none", "0"])
def test_prepare_threshold_is_the_settings(
    database_url: str, client_id: UUID, monkeypatch: pytest.MonkeyPatch, threshold: str
) -> None:
    monkeypatch.setenv("KESTRA_PREPARE_THRESHOLD", threshold)
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "1")
    with Database(database_url) as db:
        with db.tenant_session(client_id) as session:
            for _ in range(8):
                session.scalars(select(Client)).all()
        with db.system_session(reason="the same connection") as system:
            prepared = system.scalar(
                text("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%clients%'")
            )
    assert bool(prepared) is (threshold == "0")


class Word(str):
    """A text that is not quite one."""

    __slots__ = ()


AWKWARD = [
    "",
    "NULL",
    '"',
    "\\",
    '\\"',
    "{}",
    ",",
    " a ",
    "a\nb\tc",
    "'; --",
    "ã 🌎",
    "\u2003",
    None,
    "$1",
    "%s",
    "null",
]


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(AWKWARD, id="awkward"),
        pytest.param([None, *AWKWARD[::-1]], id="NULL first"),
        pytest.param([a + b for a in AWKWARD if a for b in AWKWARD if b], id="pairs"),
        pytest.param(["a", " ", "", "b,c"], id="nothing to escape"),
        pytest.param(["c\\d", None, "\\"], id="backslashes alone"),
        pytest.param(['a"b', None, '"'], id="quotes alone"),
        pytest.param([Word('a"b'), "c\\d"], id="not quite texts"),
        pytest.param([AWKWARD, AWKWARD[::-1]], id="nested"),
        pytest.param([], id="empty"),
        pytest.param([None, None], id="nothing but NULL"),
    ],
)
def test_list_of_texts_arrives_as_it_was_sent(db: Database, client_id: UUID, texts: list[Any]) -> None:
    sent = bindparam("texts", type_=ARRAY(Text))
    with db.tenant_session(client_id) as session:
        assert session.scalars(select(sent), {"texts": texts}).one() == texts


def test_an_empty_list_is_one_whatever_was_sent_before(db: Database) -> None:
    """psycopg chooses a dumper by the elements of a list; this one was chosen for texts."""
    with db._driver() as connection:  # noqa: SLF001  # for its adapters
        dumper = Transformer(connection).get_dumper(["a"], PyFormat.TEXT)
    assert dumper.dump(["a"]) == b'{"a"}'
    assert dumper.dump([]) == b"{}"


@pytest.mark.parametrize(("text", "reason"), [("a\0b", "NUL"), ("a\ud800b", "surrogate")])
def test_list_with_a_text_that_cannot_be_sent_is_refused_and_not_quoted(
    db: Database, client_id: UUID, text: str, reason: str
) -> None:
    sent, given = bindparam("texts", type_=ARRAY(Text)), {"texts": ["segredo", text]}
    with db.tenant_session(client_id) as session, pytest.raises(InvalidValue, match=reason) as caught:
        session.execute(select(sent), given)
    assert "segredo" not in "".join(traceback.format_exception(caught.value))


# --- when there is no connection ---


def test_exhausted_pool_is_told_from_an_unreachable_server(
    database_url: str, client_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "1")
    monkeypatch.setenv("KESTRA_POOL_TIMEOUT", "0.05")
    with Database(database_url) as db, db.tenant_session(client_id) as holder:
        holder.connection()
        with pytest.raises(PoolExhausted, match="KESTRA_POOL_MAX_SIZE"), db.tenant_session(client_id) as session:
            session.connection()


def test_unreachable_server_is_named_as_such_without_the_password() -> None:
    with Database(f"postgresql://app:{PASSWORD}@127.0.0.1:1/kestra") as db:
        with pytest.raises(DatabaseUnavailable, match="cannot be reached") as caught, db.system_session(reason="x"):
            pytest.fail("a session was opened")
        _assert_hides_password(caught.value)

        async def main() -> None:
            async with db.async_system_session(reason="x"):
                pytest.fail("a session was opened")

        with pytest.raises(DatabaseUnavailable, match="cannot be reached") as caught:
            asyncio.run(main())
        _assert_hides_password(caught.value)


def test_missing_database_is_named_as_such(database_url: str) -> None:
    missing = database_url.replace(str(conninfo_to_dict(database_url)["dbname"]), "no_such_database")
    with (
        Database(missing) as db,
        pytest.raises(DatabaseUnavailable, match="no such database"),
        db.system_session(reason="x"),
    ):
        pytest.fail("a session was opened")


@pytest.fixture(scope="module")
def server_with_passwords() -> Iterator[str]:
    """The URL, without a user, of a server that asks for passwords; its user is `app`."""
    with temporary(database="postgres") as url:
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute(f"CREATE ROLE app LOGIN PASSWORD '{PASSWORD}'")
            [rules] = admin.execute("SHOW hba_file").fetchone() or [""]
            hba = Path(str(rules))
            hba.write_text("local all app scram-sha-256\n" + hba.read_text())
            admin.execute("SELECT pg_reload_conf()")
            # The postmaster reloads when it gets round to it.
            loaded = "SELECT count(*) FROM pg_hba_file_rules WHERE auth_method = 'scram-sha-256'"
            assert admin.execute(loaded).fetchone() == (1,)
        yield url


def test_wrong_password_is_named_as_such_without_the_password(server_with_passwords: str) -> None:
    parts = conninfo_to_dict(server_with_passwords)
    url = f"postgresql://app:{PASSWORD}-wrong@/postgres?host={parts['host']}"
    with Database(url) as db:
        with pytest.raises(AuthenticationFailed, match="password") as caught, db.system_session(reason="x"):
            pytest.fail("a session was opened")
        _assert_hides_password(caught.value)


def test_login_role_that_may_not_become_the_tenant_is_told_what_to_grant(superuser_url: str, client_id: UUID) -> None:
    role = f"stranger_{client_id.hex}"
    with psycopg.connect(superuser_url, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
        try:
            parts = {**conninfo_to_dict(superuser_url), "user": role, "password": PASSWORD}
            host, port, name = parts["host"], parts.get("port", 5432), parts["dbname"]
            with (
                Database(f"postgresql://{role}:{PASSWORD}@/{name}?host={host}&port={port}") as db,
                pytest.raises(ConfigurationError, match="GRANT") as caught,
                db.tenant_session(client_id) as session,
            ):
                session.scalars(select(Client)).all()
            _assert_hides_password(caught.value)
        finally:
            admin.execute(f"DROP ROLE {role}")


def test_server_without_the_roles_is_told_apart(server_with_passwords: str, client_id: UUID) -> None:
    with (
        Database(server_with_passwords) as db,
        pytest.raises(ConfigurationError, match="kestra upgrade"),
        db.tenant_session(client_id) as session,
    ):
        session.scalars(select(Client)).all()


MALFORMED = [
    f"mysql://app:{PASSWORD}@localhost/kestra",
    f"postgresql://app:{PASSWORD}@localhost:port/kestra",
    f"postgresql://app:{PASSWORD}%zz@localhost/kestra",
    f"app:{PASSWORD}@localhost",
    f"postgresql://app:{PASSWORD}@localhost/kestra?unknown=1",
]


@pytest.mark.parametrize("url", MALFORMED)
def test_malformed_url_is_a_configuration_error_without_the_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Database(url)
    _assert_hides_password(caught.value)


def test_url_wins_over_the_settings(database_url: str, client_id: UUID) -> None:
    settings = Settings(database_url=f"postgresql://app:{PASSWORD}@127.0.0.1:1/kestra", pool_max_size=2)
    with Database(database_url, settings=settings) as db, db.tenant_session(client_id) as session:
        assert session.scalars(select(Client.id)).all() == [client_id]


# --- what the server refuses ---


def test_unnamed_refusal_keeps_its_sqlstate_and_quotes_nothing(db: Database, client_id: UUID) -> None:
    with pytest.raises(StatementFailed) as caught, db.tenant_session(client_id) as session:
        session.execute(
            text(f"SELECT * FROM no_table WHERE '{PASSWORD}' = ''"), execution_options={"kestra_raw_sql": True}
        )
    assert caught.value.sqlstate == "42P01"
    assert isinstance(caught.value.__cause__, psycopg.Error)
    _assert_hides_password(caught.value)


def test_what_system_sessions_may_not_do_is_no_tenants_fault(db: Database) -> None:
    with pytest.raises(StatementFailed, match="migrations") as caught, db.system_session(reason="test") as session:
        session.execute(text("CREATE TABLE t ()"))
    assert caught.value.sqlstate == "42501"


def test_broken_connection_is_database_unavailable(db: Database, superuser_url: str, client_id: UUID) -> None:
    with pytest.raises(DatabaseUnavailable), db.tenant_session(client_id) as session:
        pid = session.scalar(select(func.pg_backend_pid()))
        _terminate(superuser_url, pid)
        session.scalars(select(Client)).all()
    with db.tenant_session(client_id) as session:
        assert session.scalars(select(Client.id)).all() == [client_id]


def test_broken_connections_leave_their_places_in_the_pool(
    database_url: str, superuser_url: str, client_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "1")
    monkeypatch.setenv("KESTRA_POOL_TIMEOUT", "20")

    async def break_one(db: Database) -> None:
        async with db.async_tenant_session(client_id) as session:
            await asyncio.to_thread(_terminate, superuser_url, await session.scalar(select(func.pg_backend_pid())))
            await session.scalars(select(Client))

    async def main() -> None:
        async with Database(database_url) as db:
            for _ in range(3):
                with pytest.raises(DatabaseUnavailable):
                    await break_one(db)

    with Database(database_url) as db:
        for _ in range(3):
            with pytest.raises(DatabaseUnavailable), db.tenant_session(client_id) as session:
                _terminate(superuser_url, session.scalar(select(func.pg_backend_pid())))
                session.scalars(select(Client)).all()
    asyncio.run(main())


# --- tokens ---


def test_token_finds_its_client(db: Database, client_id: UUID, other_client_id: UUID) -> None:
    assert db.client_id_for_token("token-a") == client_id
    assert db.client_id_for_token("token-b") == other_client_id


@pytest.mark.usefixtures("clients")
@pytest.mark.parametrize("token", ["", "TOKEN-A", "token-a ", " token-a", "token", None])
def test_token_is_exact_and_stays_out_of_the_error(db: Database, token: Any) -> None:
    with pytest.raises(UnknownToken) as caught:
        db.client_id_for_token(token)
    assert "token-a" not in str(caught.value).lower()


def test_token_that_cannot_be_stored_is_unknown(db: Database) -> None:
    with pytest.raises(UnknownToken):
        db.client_id_for_token("\0")


@pytest.mark.usefixtures("clients")
def test_second_client_with_a_token_is_refused_and_the_first_intact(db: Database) -> None:
    with pytest.raises(DuplicateToken) as caught, db.system_session(reason="test") as session:
        session.add(Client(name="C", token="token-a"))  # noqa: S106  # not a password
    assert "token-a" not in str(caught.value) + str(caught.value.__cause__)
    with db.system_session(reason="look") as session:
        assert session.scalars(select(Client.name).order_by(Client.name)).all() == ["A", "B"]


def _assert_hides_password(error: KestraError) -> None:
    shown: BaseException | None = error
    while shown is not None:
        assert PASSWORD not in str(shown) + repr(shown)
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
