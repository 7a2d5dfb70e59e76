"""Row level security: every fault is found, repaired and brought back by Alembic, and stops a program that asks."""

import asyncio
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode
from uuid import UUID

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    event,
    func,
)
from sqlalchemy.dialects.postgresql import ExcludeConstraint
from sqlalchemy.engine import Connection
from sqlalchemy.orm import DeclarativeBase, Mapped, SessionTransaction, mapped_column

from kestra import Database, Settings, TenantSession, base, cli, migrate, rls, verify
from kestra.base import GLOBAL, SYSTEM_ONLY, Base, ClientId, TenantOwned, tenancy_of
from kestra.errors import MigrationError, VerificationFailed
from kestra.transaction import Opening
from tests import catalog

ROOT: Final = Path(__file__).parent.parent
A, B = UUID(int=0xA), UUID(int=0xB)
MINE: Final = "client_id = (SELECT nullif(current_setting('kestra.client_id', true), '')::uuid)"


def run(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


def findings(url: str) -> tuple[str, ...]:
    """What verifying finds, nothing when it passes."""
    with Database(url) as database:
        try:
            database.verify()
        except VerificationFailed as failed:
            return failed.findings
    return ()


# --- faults -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A statement that weakens a database, what is said about it, and whether rows of others are reached through it."""

    name: str
    sql: str
    finding: str
    opens: bool = False


def changed(kind: str, *, table: str = "chat_messages") -> str:
    return f"DROP POLICY kestra_tenant ON {table}; CREATE POLICY kestra_tenant ON {table} {kind}"


FAULTS: Final = [
    Fault("policy dropped", "DROP POLICY kestra_tenant ON client_files", "client_files lacks POLICY kestra_tenant FOR"),
    Fault(
        "system policy dropped",
        "DROP POLICY kestra_system ON clients",
        "clients lacks POLICY kestra_system FOR ALL TO kestra_system USING (true) WITH CHECK (true)",
    ),
    Fault(
        "USING loosened",
        f"ALTER POLICY kestra_tenant ON chat_messages USING ({MINE} OR true)",
        "OR true)) WITH CHECK (client_id =",
        opens=True,
    ),
    Fault(
        "WITH CHECK loosened",
        f"ALTER POLICY kestra_tenant ON chat_messages WITH CHECK ({MINE} OR true)",
        "OR true)), which is not declared",
        opens=True,
    ),
    Fault(
        "USING without the client",
        "ALTER POLICY kestra_tenant ON active_conversations USING (true)",
        "active_conversations has POLICY kestra_tenant FOR ALL TO kestra_tenant USING (true) WITH CHECK",
        opens=True,
    ),
    Fault(
        "no WITH CHECK",
        changed(f"TO kestra_tenant USING ({MINE})"),
        "chat_messages has POLICY kestra_tenant FOR ALL TO kestra_tenant USING (client_id =",
    ),
    Fault(
        "command changed",
        changed(f"FOR SELECT TO kestra_tenant USING ({MINE})"),
        "chat_messages has POLICY kestra_tenant FOR SELECT TO kestra_tenant",
    ),
    Fault(
        "command changed to INSERT",
        changed(f"FOR INSERT TO kestra_tenant WITH CHECK ({MINE})"),
        "chat_messages has POLICY kestra_tenant FOR INSERT TO kestra_tenant WITH CHECK",
    ),
    Fault(
        "role added",
        "ALTER POLICY kestra_system ON chat_messages TO kestra_system, kestra_tenant",
        "chat_messages has POLICY kestra_system FOR ALL TO kestra_system, kestra_tenant USING (true)",
        opens=True,
    ),
    Fault(
        "role changed to everybody",
        "ALTER POLICY kestra_system ON chat_messages TO PUBLIC",
        "chat_messages has POLICY kestra_system FOR ALL TO PUBLIC USING (true)",
        opens=True,
    ),
    Fault(
        "made restrictive",
        changed(f"AS RESTRICTIVE TO kestra_tenant USING ({MINE}) WITH CHECK ({MINE})"),
        "chat_messages has POLICY kestra_tenant AS RESTRICTIVE FOR ALL TO kestra_tenant",
    ),
    Fault(
        "extra permissive policy",
        'CREATE POLICY "one more: here" ON chat_messages FOR SELECT TO PUBLIC USING (chat_id <> \'a :b "c"\')',
        'chat_messages has POLICY "one more: here" FOR SELECT TO PUBLIC',
        opens=True,
    ),
    Fault(
        "extra policy for INSERT",
        "CREATE POLICY more ON client_files FOR INSERT TO kestra_tenant WITH CHECK (true)",
        "client_files has POLICY more FOR INSERT TO kestra_tenant WITH CHECK (true)",
        opens=True,
    ),
    Fault(
        "RLS off",
        "ALTER TABLE clients DISABLE ROW LEVEL SECURITY",
        "clients lacks ENABLE ROW LEVEL SECURITY",
        opens=True,
    ),
    Fault(
        "FORCE off",
        "ALTER TABLE chat_messages NO FORCE ROW LEVEL SECURITY",
        "chat_messages lacks FORCE ROW LEVEL SECURITY",
        opens=True,
    ),
    Fault(
        "TRUNCATE granted",
        "GRANT TRUNCATE ON client_files TO kestra_tenant",
        "client_files has GRANT TRUNCATE ON client_files TO kestra_tenant, which is not declared",
        opens=True,
    ),
    Fault(
        "TRIGGER and REFERENCES granted",
        "GRANT TRIGGER, REFERENCES ON clients TO kestra_system",
        "clients has GRANT TRIGGER ON clients TO kestra_system",
    ),
    Fault(
        "everybody may read",
        "GRANT SELECT ON chat_messages TO PUBLIC",
        "chat_messages has GRANT SELECT ON chat_messages TO PUBLIC",
    ),
    Fault(
        "everybody may and can read",
        "GRANT SELECT ON orphaned_rows TO PUBLIC; ALTER POLICY kestra_system ON orphaned_rows TO PUBLIC",
        "orphaned_rows has GRANT SELECT ON orphaned_rows TO PUBLIC",
        opens=True,
    ),
    Fault(
        "column granted",
        "GRANT SELECT (reason), UPDATE (reason) ON orphaned_rows TO kestra_tenant",
        "orphaned_rows has GRANT SELECT (reason) ON orphaned_rows TO kestra_tenant",
    ),
    Fault(
        "grant may be passed on",
        "GRANT SELECT ON chat_messages TO kestra_tenant WITH GRANT OPTION",
        "chat_messages has GRANT SELECT ON chat_messages TO kestra_tenant WITH GRANT OPTION",
    ),
    Fault(
        "clients may be removed",
        "GRANT INSERT, DELETE ON clients TO kestra_tenant",
        "clients has GRANT DELETE ON clients TO kestra_tenant",
    ),
    Fault(
        "grant lost",
        "REVOKE DELETE ON chat_messages FROM kestra_system",
        "chat_messages lacks GRANT DELETE ON chat_messages TO kestra_system",
    ),
    Fault(
        "every grant lost",
        "REVOKE ALL ON chat_messages FROM kestra_tenant, kestra_system",
        "chat_messages lacks GRANT SELECT ON chat_messages TO kestra_tenant",
    ),
    Fault(
        "sequence grant lost",
        "REVOKE USAGE ON SEQUENCE chat_messages_id_seq FROM kestra_tenant",
        "chat_messages lacks GRANT USAGE ON SEQUENCE chat_messages_id_seq TO kestra_tenant",
    ),
    Fault(
        "sequence grant added",
        "GRANT UPDATE ON SEQUENCE chat_messages_id_seq TO PUBLIC",
        "chat_messages has GRANT UPDATE ON SEQUENCE chat_messages_id_seq TO PUBLIC",
    ),
]


def each(faults: list[Fault]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults, ids=lambda fault: fault.name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the migrations, to which revisions may be added."""
    copy = tmp_path / "alembic"
    shutil.copytree(ROOT / "alembic", copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(migrate, "_scripts", lambda: copy)
    return copy


def generate(folder: Path, url: str, message: str) -> str:
    """The source of the revision that autogenerate writes."""
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = url
    before = set(folder.glob("versions/*.py"))
    command.revision(config, message, autogenerate=True)
    (script,) = set(folder.glob("versions/*.py")) - before
    return script.read_text("utf-8")


def directions(source: str) -> tuple[str, str]:
    """What a revision says for the way up, and for the way down."""
    _, _, body = source.partition("def upgrade()")
    up, _, down = body.partition("def downgrade()")
    return up, down


@each(FAULTS)
def test_check_and_verify_fail_on_a_fault_and_say_which(fault: Fault, superuser_url: str, database_url: str) -> None:
    run(superuser_url, fault.sql)
    with pytest.raises(MigrationError) as caught:
        migrate.check(superuser_url)
    assert fault.finding in str(caught.value).replace("\\'", "'")
    found = findings(database_url)
    assert any(fault.finding in line for line in found)
    assert len({line.split()[0] for line in found}) == 1, "one table is concerned"


@each(FAULTS)
def test_autogenerate_repairs_a_fault_and_its_downgrade_brings_it_back(
    fault: Fault, superuser_url: str, database_url: str, folder: Path
) -> None:
    right = catalog.snapshot(superuser_url)
    run(superuser_url, fault.sql)
    wrong = catalog.snapshot(superuser_url)
    source = generate(folder, superuser_url, "repair")
    assert not re.search(r"^\s*(import|from) kestra", source, re.MULTILINE)
    migrate.upgrade(superuser_url)
    assert catalog.snapshot(superuser_url) == right
    migrate.check(superuser_url)
    assert findings(database_url) == ()
    migrate.downgrade(superuser_url, "-1")
    assert catalog.snapshot(superuser_url) == wrong


def test_a_right_database_passes_both(superuser_url: str, database_url: str) -> None:
    migrate.check(superuser_url)
    assert findings(database_url) == ()
    assert findings(superuser_url) == (), "a superuser whose transactions switch is as good as any"


def test_tables_that_are_not_mapped_and_other_schemas_are_nobodys_business(
    superuser_url: str, database_url: str
) -> None:
    run(
        superuser_url,
        "CREATE SCHEMA other; CREATE TABLE other.clients (id uuid); GRANT ALL ON other.clients TO PUBLIC;"
        "CREATE POLICY p ON other.clients USING (true)",
    )
    migrate.check(superuser_url)
    assert findings(database_url) == ()


def test_several_faults_are_all_found_at_once(superuser_url: str, database_url: str) -> None:
    chosen = [FAULTS[0], FAULTS[4], FAULTS[13], FAULTS[15], FAULTS[18]]
    for fault in chosen:
        run(superuser_url, fault.sql)
    found = "\n".join(findings(database_url))
    assert [fault.name for fault in chosen if fault.finding not in found] == []


# --- the faults matter: rows of others are reached through them -------------------------------------------------------


@pytest.fixture
def two_clients(superuser_url: str) -> str:
    for client in (A, B):
        run(
            superuser_url,
            f"INSERT INTO clients (id, name, token) VALUES ('{client}', 'n', '{client}');"
            f"INSERT INTO active_conversations (chat_id, client_id) VALUES ('c', '{client}');"
            "INSERT INTO chat_messages (client_id, chat_id, role, content) "
            f"VALUES ('{client}', 'c', 'user', 'x');"
            f"INSERT INTO client_files (client_id, filename) VALUES ('{client}', 'f')",
        )
    run(superuser_url, """INSERT INTO orphaned_rows (table_name, "row", reason) VALUES ('t', '{}', 'r')""")
    return superuser_url


FOREIGN: Final = {
    "clients": f"id <> '{A}'",
    "active_conversations": f"client_id <> '{A}'",
    "chat_messages": f"client_id <> '{A}'",
    "client_files": f"client_id <> '{A}'",
    "orphaned_rows": "true",
}
WRITES: Final = {
    "insert": f"INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES ('{B}', 'c', 'user', 'x')",
    "insert file": f"INSERT INTO client_files (client_id, filename) VALUES ('{B}', 'x')",
    "give away": f"UPDATE chat_messages SET client_id = '{B}' WHERE client_id = '{A}'",
    "update": f"UPDATE chat_messages SET content = 'y' WHERE client_id <> '{A}'",
    "delete": f"DELETE FROM chat_messages WHERE client_id <> '{A}'",
    "truncate": "TRUNCATE client_files",
}


def crossings(url: str) -> set[str]:
    """What plain SQL reaches that it must not, under row level security alone: as client A, as nobody, as the owner."""
    reached: set[str] = set()

    def attempt(name: str, *statements: str) -> None:
        with connection.transaction(force_rollback=True):
            try:
                for statement in statements[:-1]:
                    connection.execute(statement.encode())
                last = connection.execute(statements[-1].encode())
            except psycopg.errors.InsufficientPrivilege:
                return
            if last.rowcount > 0 or last.statusmessage == "TRUNCATE TABLE":
                reached.add(name)

    tenant, stranger = "SET LOCAL ROLE kestra_tenant", f"kestra_test_{secrets.token_hex(6)}"
    as_a = (tenant, f"SET LOCAL kestra.client_id = '{A}'")
    with psycopg.connect(url) as connection:
        for table, foreign in FOREIGN.items():
            attempt(f"A reads {table}", *as_a, f"SELECT FROM {table} WHERE {foreign}")
            attempt(f"no client reads {table}", tenant, f"SELECT FROM {table}")
            attempt(
                f"the owner reads {table}",
                f"CREATE ROLE {stranger}",
                f"GRANT {stranger} TO CURRENT_USER",
                f"ALTER TABLE {table} OWNER TO {stranger}",
                f"SET LOCAL ROLE {stranger}",
                f"SELECT FROM {table}",
            )
            attempt(
                f"anybody reads {table}",
                f"CREATE ROLE {stranger}",
                f"SET LOCAL ROLE {stranger}",
                f"SELECT FROM {table}",
            )
        for name, statement in WRITES.items():
            attempt(f"A: {name}", *as_a, statement)
        connection.rollback()
    return reached


def test_plain_sql_crosses_nothing_in_a_right_database(two_clients: str) -> None:
    assert crossings(two_clients) == set()


@each(FAULTS)
def test_plain_sql_shows_which_faults_open_rows_of_others(fault: Fault, two_clients: str) -> None:
    run(two_clients, fault.sql)
    assert bool(crossings(two_clients)) is fault.opens


ROLE_FAULTS: Final = [
    Fault(
        "tenants bypass",
        "ALTER ROLE kestra_tenant BYPASSRLS",
        "kestra_tenant may bypass row level security: ALTER ROLE kestra_tenant NOBYPASSRLS.",
        opens=True,
    ),
    Fault("system bypasses", "ALTER ROLE kestra_system BYPASSRLS", "kestra_system may bypass row level security"),
    Fault("tenants are superusers", "ALTER ROLE kestra_tenant SUPERUSER", "kestra_tenant is a superuser", opens=True),
    Fault(
        "tenants are in the system",
        "GRANT kestra_system TO kestra_tenant",
        "kestra_tenant is a member of kestra_system, whose rights it has: REVOKE kestra_system FROM kestra_tenant.",
        opens=True,
    ),
]
RIGHT_ROLES: Final = """
    ALTER ROLE kestra_tenant NOSUPERUSER NOBYPASSRLS; ALTER ROLE kestra_system NOSUPERUSER NOBYPASSRLS;
    REVOKE kestra_system FROM kestra_tenant
"""


@each(ROLE_FAULTS)
def test_a_role_that_may_too_much_is_found_by_verify_and_by_plain_sql(
    fault: Fault, two_clients: str, database_url: str
) -> None:
    run(two_clients, fault.sql)
    try:
        found, reached = findings(database_url), crossings(two_clients)
    finally:
        with psycopg.connect(two_clients, autocommit=True) as connection:
            connection.execute(RIGHT_ROLES.encode())
    assert any(fault.finding in line for line in found)
    assert bool(reached) is fault.opens
    assert findings(database_url) == ()


# --- new tables -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> type[DeclarativeBase]:
    """A base with the tables of the product, to which models may be added; Alembic and verify take it for the base."""
    copy = MetaData(naming_convention=Base.metadata.naming_convention)
    for table in Base.metadata.sorted_tables:
        table.to_metadata(copy).info.update(table.info)

    class ScratchBase(DeclarativeBase):
        metadata = copy

    for module in (base, verify):
        monkeypatch.setattr(module, "Base", ScratchBase)
    return ScratchBase


def add_models(scratch: type[DeclarativeBase]) -> None:
    class Tag(TenantOwned, scratch):  # type: ignore[misc, valid-type]  # the base is a fixture's
        __tablename__ = "tags"
        __table_args__ = (
            PrimaryKeyConstraint("client_id", "id"),
            UniqueConstraint("client_id", "name"),
        )
        id: Mapped[int] = mapped_column(Integer, autoincrement=True)
        name: Mapped[str] = mapped_column(Text)

    class Order(TenantOwned, scratch):  # type: ignore[misc, valid-type]  # as above
        __tablename__ = "order"
        __table_args__ = (
            PrimaryKeyConstraint("client_id", "a_column_with_a_name_that_is_much_longer_than_the_name"),
            ForeignKeyConstraint(["client_id", "tag"], ["tags.client_id", "tags.id"]),
        )
        a_column_with_a_name_that_is_much_longer_than_the_name: Mapped[int] = mapped_column(BigInteger, Identity())
        tag: Mapped[int]

    class Profile(TenantOwned, scratch):  # type: ignore[misc, valid-type]  # as above
        __tablename__ = "profiles"
        __table_args__ = (PrimaryKeyConstraint("client_id"),)
        name: Mapped[str] = mapped_column(Text)

    class Plan(scratch):  # type: ignore[misc, valid-type]  # as above
        __tablename__ = "plans_that_every_client_of_this_product_reads"
        __table_args__ = GLOBAL
        a_column_of_numbers: Mapped[int] = mapped_column(primary_key=True)

    class Job(scratch):  # type: ignore[misc, valid-type]  # as above
        __tablename__ = "jobs"
        __table_args__ = SYSTEM_ONLY
        id: Mapped[int] = mapped_column(primary_key=True)


def test_a_new_model_gets_its_table_with_keys_policies_and_grants_once_and_loses_them_exactly(
    superuser_url: str, database_url: str, folder: Path, scratch: type[DeclarativeBase]
) -> None:
    migrate.check(superuser_url)
    before = catalog.snapshot(superuser_url)
    add_models(scratch)
    with pytest.raises(MigrationError, match="tags lacks FORCE ROW LEVEL SECURITY"):
        migrate.check(superuser_url)

    up, down = directions(generate(folder, superuser_url, "add tables"))
    assert "ALTER TABLE tags ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY" in up
    assert "GRANT SELECT, INSERT, UPDATE, DELETE ON tags TO kestra_system, kestra_tenant" in up
    assert "GRANT USAGE ON SEQUENCE tags_id_seq TO kestra_system, kestra_tenant" in up
    assert up.index("op.create_table('tags'") < up.index("CREATE POLICY kestra_tenant ON tags ")
    assert "execute" not in down, "policies and grants go with the table"

    migrate.upgrade(superuser_url)
    after = catalog.snapshot(superuser_url)
    migrate.check(superuser_url)
    assert findings(database_url) == ()
    up, down = directions(generate(folder, superuser_url, "nothing to do"))
    assert not re.search(r"op\.", up + down)

    migrate.downgrade(superuser_url, "-1")
    assert catalog.snapshot(superuser_url) == before
    migrate.upgrade(superuser_url)
    assert catalog.snapshot(superuser_url) == after


def test_a_new_table_is_as_isolated_as_the_others(
    two_clients: str, folder: Path, scratch: type[DeclarativeBase]
) -> None:
    add_models(scratch)
    generate(folder, two_clients, "add tables")
    migrate.upgrade(two_clients)
    plans = "plans_that_every_client_of_this_product_reads"
    run(two_clients, f"INSERT INTO tags (client_id, name) VALUES ('{B}', 'b'); INSERT INTO {plans} DEFAULT VALUES")
    with psycopg.connect(two_clients) as connection:
        connection.execute("SET LOCAL ROLE kestra_tenant")
        connection.execute(f"SET LOCAL kestra.client_id = '{A}'")
        connection.execute("INSERT INTO tags (client_id, name) VALUES (%s, 'a')", [A])
        connection.execute("INSERT INTO profiles (client_id, name) VALUES (%s, 'a')", [A])
        assert connection.execute("SELECT client_id, name FROM tags").fetchall() == [(A, "a")]
        assert len(connection.execute(f"SELECT FROM {plans}".encode()).fetchall()) == 1
        for refused in (
            f"INSERT INTO tags (client_id, name) VALUES ('{B}', 'b')",
            f"INSERT INTO {plans} DEFAULT VALUES",
            f"DELETE FROM {plans}",
            "SELECT FROM jobs",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
                connection.execute(refused.encode())


GUARD: Final = ("policy", "grant", "column grant", "relation", "sequence")


def test_a_table_whose_model_is_gone_comes_back_protected(
    superuser_url: str, folder: Path, scratch: type[DeclarativeBase]
) -> None:
    before = catalog.snapshot(superuser_url)
    notes = Table("notes", scratch.metadata, client_key(), integer("id", primary_key=True, autoincrement=True))
    generate(folder, superuser_url, "add notes")
    migrate.upgrade(superuser_url)
    after = catalog.snapshot(superuser_url)
    scratch.metadata.remove(notes)
    up, down = directions(generate(folder, superuser_url, "drop them"))
    assert "execute" not in up, "policies and grants go with the table"
    assert down.index("op.create_table('notes'") < down.index("CREATE POLICY kestra_tenant ON notes ")
    migrate.upgrade(superuser_url)
    migrate.check(superuser_url)
    assert catalog.snapshot(superuser_url) == before
    migrate.downgrade(superuser_url, "-1")
    assert catalog.kind(catalog.snapshot(superuser_url), *GUARD) == catalog.kind(after, *GUARD)


def test_a_column_that_goes_takes_its_policy_along_and_brings_it_back(
    superuser_url: str, folder: Path, scratch: type[DeclarativeBase]
) -> None:
    notes = Table("notes", scratch.metadata, client_key(), Column("id", Text, primary_key=True))
    generate(folder, superuser_url, "of clients")
    migrate.upgrade(superuser_url)
    ours = catalog.snapshot(superuser_url)
    scratch.metadata.remove(notes)
    Table("notes", scratch.metadata, Column("id", Text, primary_key=True), **SYSTEM_ONLY)
    up, _ = directions(generate(folder, superuser_url, "of nobody"))
    assert up.index("DROP POLICY kestra_tenant ON notes") < up.index("drop_column('notes', 'client_id')")
    migrate.upgrade(superuser_url)
    migrate.check(superuser_url)
    migrate.downgrade(superuser_url, "-1")
    # Alembic compares no primary keys, so this one is not made again.
    assert catalog.kind(catalog.snapshot(superuser_url), *GUARD) == catalog.without(
        catalog.kind(ours, *GUARD), "pk_notes"
    )


def test_a_generated_revision_is_plain_sql_that_passes_the_formatter_and_the_linter(
    superuser_url: str, tmp_path: Path
) -> None:
    run(superuser_url, "; ".join(fault.sql for fault in FAULTS if fault.name in {"policy dropped", "RLS off"}))
    run(superuser_url, FAULTS[11].sql)
    for name in ("alembic.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "alembic", tmp_path / "alembic", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"KESTRA_DATABASE_URL": superuser_url, "PYTHONPATH": str(ROOT)}
    for arguments in (
        ["alembic", "revision", "--autogenerate", "-m", "Repair"],
        ["ruff", "check", "alembic/versions"],
        ["ruff", "format", "--check", "alembic/versions"],
    ):
        ran = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
    (script,) = (tmp_path / "alembic/versions").glob("*_repair.py")
    up, down = directions(script.read_text("utf-8"))
    assert (
        up.rstrip()
        .removesuffix("# ### end Alembic commands ###")
        .rstrip()
        .endswith("""
    op.execute(
        "CREATE POLICY kestra_tenant ON client_files FOR ALL TO kestra_tenant "
        "USING (client_id = (SELECT nullif(current_setting('kestra.client_id', true), '')::uuid)) "
        "WITH CHECK (client_id = (SELECT nullif(current_setting('kestra.client_id', true), '')::uuid))"
    )
    op.execute("ALTER TABLE clients ENABLE ROW LEVEL SECURITY")""")
    )
    assert 'op.execute("ALTER TABLE clients DISABLE ROW LEVEL SECURITY")' in down


# --- models that are wrong themselves ---------------------------------------------------------------------------------


def client_key(**options: Any) -> Column[UUID]:
    return Column("client_id", ClientId, ForeignKey("clients.id"), **{"primary_key": True, **options})


def integer(name: str, **options: Any) -> Column[int]:
    return Column(name, Integer, **options)


def tables(*things: Any, **options: Any) -> MetaData:
    """A metadata with the clients, a table of theirs, one of everybody, and one that is to be looked at."""
    metadata = MetaData(naming_convention=Base.metadata.naming_convention)
    Base.metadata.tables["clients"].to_metadata(metadata)
    Table("parents", metadata, client_key(), integer("id", primary_key=True))
    Table("plans", metadata, integer("id", primary_key=True), **GLOBAL)
    Table("t", metadata, *things, **options)
    return metadata


@pytest.mark.parametrize(
    ("metadata", "mistake"),
    [
        (tables(integer("id", primary_key=True)), "t is neither tenant-owned nor declared: derive its model from Ten"),
        (
            tables(integer("id", primary_key=True), info={"tenancy": "sytem"}),
            "t is neither tenant-owned nor declared: derive its model from TenantOwned, or put SYSTEM_ONLY",
        ),
        (tables(client_key(), schema="other"), "other.t names a schema"),
        (
            tables(client_key(primary_key=False, nullable=False), integer("id", primary_key=True)),
            "t: the primary key pk_t does not include client_id",
        ),
        (
            tables(client_key(primary_key=False, nullable=True), integer("id")),
            "t.client_id may be NULL: a row of a tenant table always has a client.",
        ),
        (
            tables(client_key(), Column("name", Text, unique=True)),
            "t: the unique constraint uq_t_name does not include client_id. Keys are checked across row level security",
        ),
        (
            tables(client_key(), Column("name", Text), Index("one", "name", unique=True)),
            "t: the unique index one does not include client_id",
        ),
        (
            tables(client_key(), Index("one", func.md5(Column("client_id", Text)), unique=True)),
            "t: the unique index one does not include client_id",
        ),
        (
            tables(client_key(), integer("n"), ExcludeConstraint(("client_id", "<>"), ("n", "="), name="one")),
            "t: the exclusion constraint one does not include client_id",
        ),
        (
            tables(client_key(), integer("p"), ForeignKeyConstraint(["p"], ["parents.id"])),
            "t: the foreign key (p) to parents does not include client_id",
        ),
        (
            tables(client_key(), Column("token", Text, ForeignKey("clients.token"))),
            "t: the foreign key (token) to clients does not include client_id",
        ),
    ],
)
def test_a_model_that_is_wrong_is_named_with_what_to_write(metadata: MetaData, mistake: str) -> None:
    (line,) = rls.mistakes(metadata)
    assert line.startswith(mistake)


@pytest.mark.parametrize(
    "metadata",
    [
        Base.metadata,
        tables(integer("id", primary_key=True), **SYSTEM_ONLY),
        tables(integer("id", primary_key=True), **GLOBAL),
        tables(
            client_key(),
            integer("id", primary_key=True),
            integer("p"),
            integer("plan"),
            UniqueConstraint("p", "client_id"),
            Index("one", "client_id", "plan", unique=True),
            Index("two", "plan"),
            ExcludeConstraint(("client_id", "="), ("p", "="), name="three"),
            ForeignKeyConstraint(["client_id", "p"], ["parents.client_id", "parents.id"]),
            ForeignKeyConstraint(["plan"], ["plans.id"]),
        ),
    ],
)
def test_a_model_that_is_right_is_not_complained_about(metadata: MetaData) -> None:
    assert rls.mistakes(metadata) == []


def test_every_table_of_the_product_says_whose_its_rows_are() -> None:
    assert {table.name: tenancy_of(table) for table in Base.metadata.tables.values()} == {
        "clients": "tenant",
        "active_conversations": "tenant",
        "chat_messages": "tenant",
        "client_files": "tenant",
        "orphaned_rows": "system",
    }


def test_check_autogenerate_and_verify_refuse_a_table_that_says_nothing(
    superuser_url: str, database_url: str, folder: Path, scratch: type[DeclarativeBase]
) -> None:
    Table("notes", scratch.metadata, Column("id", Integer, primary_key=True))
    said = "notes is neither tenant-owned nor declared"
    with pytest.raises(MigrationError, match=said):
        migrate.check(superuser_url)
    with pytest.raises(Exception, match=said):
        generate(folder, superuser_url, "add notes")
    assert any(said in line for line in findings(database_url))


def test_a_table_with_two_owners_is_refused_without_a_traceback(
    superuser_url: str, scratch: type[DeclarativeBase]
) -> None:
    Table("notes", scratch.metadata, client_key(), Column("other_id", ClientId, primary_key=True))
    with pytest.raises(MigrationError, match="notes has 2 tenant keys"):
        migrate.check(superuser_url)


# --- what only a running program can see ------------------------------------------------------------------------------


@contextmanager
def login(superuser_url: str, grants: str, *attributes: str) -> Iterator[str]:
    """The URL for a new user who got the two roles in some way."""
    name, password = f"kestra_test_login_{secrets.token_hex(6)}", secrets.token_hex(8)
    run(superuser_url, f"CREATE ROLE {name} LOGIN PASSWORD '{password}' {' '.join(attributes)}")
    run(superuser_url, grants.format(name))
    parts = {**conninfo_to_dict(superuser_url), "user": name, "password": password}
    try:
        yield f"postgresql:///{quote(str(parts.pop('dbname')), safe='')}?{urlencode(parts)}"
    finally:
        run(superuser_url, f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_a_user_who_may_not_become_a_role_is_told_for_each_and_how(superuser_url: str) -> None:
    with login(superuser_url, "SELECT", "NOINHERIT") as url:
        found = findings(url)
    assert [line.partition(":")[0].split()[-1] for line in found] == ["kestra_tenant", "kestra_system", "read"]
    assert all("may not become" in line and "GRANT kestra_" in line for line in found[:2])


def test_a_user_who_inherits_a_role_is_found(superuser_url: str) -> None:
    with login(superuser_url, "GRANT kestra_tenant, kestra_system TO {}", "INHERIT") as url:
        found = findings(url)
    assert len(found) == 2
    assert all("inherits the rights of kestra_" in line for line in found)


def test_the_remedy_for_a_user_is_enough(superuser_url: str) -> None:
    with login(superuser_url, "GRANT kestra_system TO {}", "INHERIT") as url:
        found = findings(url)
        assert len(found) == 2
        for line in found:
            run(superuser_url, line.partition(": ")[2].rstrip("."))
        assert findings(url) == ()


def test_a_user_who_is_no_superuser_but_may_bypass_is_fine_when_its_transactions_switch(superuser_url: str) -> None:
    with login(superuser_url, "GRANT kestra_tenant, kestra_system TO {}", "NOINHERIT", "BYPASSRLS") as url:
        assert findings(url) == ()


def test_transactions_that_do_not_switch_are_found(superuser_url: str) -> None:
    def stay(_session: TenantSession, _transaction: SessionTransaction, connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        driver.opening = Opening("none")

    event.listen(TenantSession, "after_begin", stay)
    try:
        found = findings(superuser_url)
    finally:
        event.remove(TenantSession, "after_begin", stay)
    assert len(found) == 3
    assert "instead of kestra_tenant: its transactions do not switch" in found[0]
    assert "is a superuser, whom row level security does not bind" in found[1]
    assert "may bypass row level security" in found[2]


def test_a_table_that_belongs_to_a_role_of_tenants_is_found(superuser_url: str, database_url: str) -> None:
    run(superuser_url, "ALTER TABLE client_files OWNER TO kestra_tenant")
    assert any(line.startswith("kestra_tenant owns client_files") for line in findings(database_url))


@pytest.mark.parametrize(
    ("key", "finding"),
    [
        (
            "ALTER TABLE client_files DROP CONSTRAINT pk_client_files, ADD PRIMARY KEY (id)",
            "client_files: the unique key client_files_pkey does not include client_id. Keys are checked across",
        ),
        (
            "CREATE UNIQUE INDEX one ON chat_messages (id) INCLUDE (client_id)",
            "chat_messages: the unique key one does not include client_id",
        ),
        (
            "CREATE UNIQUE INDEX one ON chat_messages ((client_id::text))",
            "chat_messages: the unique key one does not include client_id",
        ),
        (
            "ALTER TABLE chat_messages ADD CONSTRAINT fk FOREIGN KEY (content) REFERENCES clients (token)",
            "chat_messages: the foreign key fk does not include client_id",
        ),
    ],
)
def test_a_key_that_crosses_clients_is_found(key: str, finding: str, superuser_url: str, database_url: str) -> None:
    run(superuser_url, key)
    (line,) = findings(database_url)
    assert line.startswith(finding)


@pytest.fixture
def roles_hidden(superuser_url: str) -> Iterator[None]:
    names = ("kestra_tenant", "kestra_system")
    for name in names:
        run(superuser_url, f"ALTER ROLE {name} RENAME TO {name}_away")
    yield
    for name in names:
        run(superuser_url, f"ALTER ROLE {name}_away RENAME TO {name}")


@pytest.mark.usefixtures("roles_hidden")
def test_missing_roles_are_found(superuser_url: str) -> None:
    found = findings(superuser_url)
    assert "The role kestra_tenant does not exist: run `kestra upgrade`." in found
    assert "The role kestra_system does not exist: run `kestra upgrade`." in found


VIEWS: Final = {
    "a view": "CREATE VIEW v AS SELECT * FROM chat_messages; GRANT SELECT ON v TO kestra_tenant",
    "a view of the system's table": "CREATE VIEW v AS SELECT 1 FROM orphaned_rows; GRANT SELECT ON v TO PUBLIC",
    "a view with the option off": (
        "CREATE VIEW v WITH (security_invoker = off) AS SELECT * FROM clients; GRANT SELECT ON v TO kestra_tenant"
    ),
    "a column of a view": "CREATE VIEW v AS SELECT id, token FROM clients; GRANT SELECT (token) ON v TO kestra_tenant",
    "a view on a view": (
        "CREATE VIEW inner_view WITH (security_invoker = true) AS SELECT * FROM clients;"
        "CREATE VIEW v AS SELECT * FROM inner_view; GRANT SELECT ON v TO kestra_tenant"
    ),
    "a materialized view": "CREATE MATERIALIZED VIEW v AS SELECT * FROM clients; GRANT SELECT ON v TO kestra_tenant",
    "a view to write through": "CREATE VIEW v AS SELECT * FROM clients; GRANT UPDATE ON v TO kestra_tenant",
    "a view in another schema": (
        "CREATE SCHEMA other; CREATE VIEW other.v AS SELECT * FROM clients; GRANT SELECT ON other.v TO kestra_tenant"
    ),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_that_runs_as_its_owner_is_found(kind: str, superuser_url: str, database_url: str) -> None:
    run(superuser_url, VIEWS[kind])
    (line,) = findings(database_url)
    assert re.match(r"The (materialized )?view (other\.)?v ", line)


def test_a_view_that_runs_as_its_owner_does_show_other_clients(two_clients: str) -> None:
    run(two_clients, VIEWS["a view"])
    with psycopg.connect(two_clients) as connection:
        connection.execute("SET LOCAL ROLE kestra_tenant")
        connection.execute(f"SET LOCAL kestra.client_id = '{A}'")
        assert connection.execute("SELECT count(*) FROM v").fetchone() == (2,)


@pytest.mark.parametrize(
    "view",
    [
        "CREATE VIEW v WITH (security_invoker = true) AS SELECT * FROM clients; GRANT SELECT ON v TO kestra_tenant",
        "CREATE VIEW v AS SELECT * FROM clients",
        "CREATE VIEW v AS SELECT 1; GRANT SELECT ON v TO kestra_tenant",
    ],
)
def test_a_view_that_shows_nobody_elses_rows_is_fine(view: str, superuser_url: str, database_url: str) -> None:
    run(superuser_url, view)
    assert findings(database_url) == ()


def definer(body: str, more: str = "") -> str:
    return f"CREATE FUNCTION f() RETURNS bigint LANGUAGE sql SECURITY DEFINER {body}; {more}"


COUNT: Final = "AS 'SELECT count(*) FROM public.\"clients\"'"


@pytest.mark.parametrize("body", [COUNT, "BEGIN ATOMIC SELECT count(*) FROM chat_messages; END"])
def test_a_function_with_the_rights_of_its_owner_is_found(body: str, superuser_url: str, database_url: str) -> None:
    run(superuser_url, definer(body))
    (line,) = findings(database_url)
    assert line.startswith("The function f() works on tables of clients with the rights of its owner")


@pytest.mark.parametrize(
    "function",
    [
        definer("AS 'SELECT count(*) FROM pg_class -- of my_clients'"),
        definer(COUNT, "REVOKE EXECUTE ON FUNCTION f FROM PUBLIC"),
        definer(COUNT, "ALTER FUNCTION f SECURITY INVOKER"),
    ],
)
def test_a_function_that_reaches_nobody_elses_rows_is_fine(
    function: str, superuser_url: str, database_url: str
) -> None:
    run(superuser_url, function)
    assert findings(database_url) == ()


def test_a_schema_that_is_not_at_head_is_found(superuser_url: str, database_url: str) -> None:
    run(superuser_url, "UPDATE alembic_version SET version_num = '0002'")
    head = migrate.head()
    assert findings(database_url) == (
        f"The schema is at 0002, the code needs {head}: run `kestra upgrade`, or the code of that revision.",
    )


def test_a_revision_that_cannot_be_read_is_a_finding_with_the_remedy(superuser_url: str, database_url: str) -> None:
    run(superuser_url, "REVOKE SELECT ON alembic_version FROM kestra_system")
    (line,) = findings(database_url)
    run(superuser_url, line.partition(": ")[2].rstrip("."))
    assert findings(database_url) == ()


@pytest.mark.usefixtures("superuser_url")
def test_an_empty_database_has_no_tables_and_no_revision(empty_database: str) -> None:
    found = findings(empty_database)
    assert f"The schema is at no revision, the code needs {migrate.head()}: run `kestra upgrade`." in found
    assert {line.split()[2] for line in found if "does not exist" in line} == set(Base.metadata.tables)
    assert len(found) == len(Base.metadata.tables) + 1


# --- when it is asked -------------------------------------------------------------------------------------------------


def test_the_error_shows_every_finding_on_a_line_and_keeps_them(superuser_url: str, db: Database) -> None:
    run(superuser_url, "ALTER TABLE clients DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY")
    with pytest.raises(VerificationFailed) as failed:
        db.verify()
    assert failed.value.findings == (
        "clients lacks ENABLE ROW LEVEL SECURITY",
        "clients lacks FORCE ROW LEVEL SECURITY",
    )
    assert str(failed.value).splitlines()[1:] == [f"- {finding}" for finding in failed.value.findings]


def test_verify_uses_no_connection_of_the_pool(db: Database) -> None:
    db.verify()
    assert repr(db) == "Database(open=False)"


def test_a_database_that_is_to_be_verified_hands_out_no_session_until_it_passes(
    superuser_url: str, database_url: str
) -> None:
    settings = Settings(database_url=database_url, verify_on_open=True)
    run(superuser_url, "ALTER TABLE clients NO FORCE ROW LEVEL SECURITY")
    with Database(settings=settings) as database:
        with pytest.raises(VerificationFailed), database.tenant_session(A):
            pytest.fail("there must be no session")
        run(superuser_url, "ALTER TABLE clients FORCE ROW LEVEL SECURITY")
        with database.tenant_session(A):
            pass


def test_it_is_the_same_for_asyncio(superuser_url: str, database_url: str) -> None:
    async def main() -> None:
        async with Database(settings=Settings(database_url=database_url, verify_on_open=True)) as database:
            with pytest.raises(VerificationFailed):
                async with database.async_tenant_session(A):
                    pytest.fail("there must be no session")
            with pytest.raises(VerificationFailed):
                await asyncio.to_thread(database.verify)
            run(superuser_url, "ALTER TABLE clients FORCE ROW LEVEL SECURITY")
            async with database.async_tenant_session(A):
                pass

    run(superuser_url, "ALTER TABLE clients NO FORCE ROW LEVEL SECURITY")
    asyncio.run(main())


def test_nothing_is_verified_unless_asked_for(superuser_url: str, db: Database) -> None:
    run(superuser_url, "ALTER TABLE clients NO FORCE ROW LEVEL SECURITY")
    assert not Settings().verify_on_open
    with db.tenant_session(A):
        pass


def test_the_command_says_what_is_wrong_and_fails(
    superuser_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KESTRA_DATABASE_URL", database_url)
    assert cli.main(["verify"]) == 0
    assert capsys.readouterr().out == "The database keeps clients apart.\n"
    run(superuser_url, "ALTER TABLE clients NO FORCE ROW LEVEL SECURITY")
    assert cli.main(["verify"]) == 1
    assert "- clients lacks FORCE ROW LEVEL SECURITY\n" in capsys.readouterr().err
