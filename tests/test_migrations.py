"""The migrations on a real PostgreSQL: what they do to schemas, to dirty rows, and when they are interrupted."""

import ast
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode
from uuid import UUID

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import NullPool, create_engine, text

import kestra.models
from kestra import migrate, rls
from kestra.base import Base
from kestra.errors import MigrationError
from tests import catalog

ROOT: Final = Path(__file__).parent.parent
DUMP: Final = (ROOT / "examples/existing_installation.sql").read_text("utf-8")
DOCUMENTED_DDL: Final = DUMP.partition("INSERT INTO")[0]
MANIFEST: Final[dict[str, int]] = json.loads((ROOT / "examples/existing_installation.manifest.json").read_text("utf-8"))
REVISIONS: Final = ("0001", "0002", "0003", "0004", "0005", "0006")
ROWS: Final = ("clients", "active_conversations", "chat_messages", "client_files")
DEADLINE: Final = 30.0

ANA, BEA, NOBODY = UUID(int=1), UUID(int=2), UUID(int=9)


# --- a database -------------------------------------------------------------------------------------------------------


def run(url: str, statement: str, *parameters: object) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode(), parameters or None)


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query.encode()).fetchall()


def one(url: str, query: str) -> Any:
    ((value,),) = rows(url, query)
    return value


def contents(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, as text."""
    tables = [table for (table,) in rows(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
    return {table: sorted(rows(url, f"SELECT to_jsonb(t)::text FROM {table} t")) for table in tables}


def with_login(url: str, user: str, password: str) -> str:
    parts = {**conninfo_to_dict(url), "user": user, "password": password}
    database = quote(str(parts.pop("dbname")), safe="")
    return f"postgresql:///{database}?{urlencode(parts)}"


@pytest.fixture
def installation(empty_database: str) -> str:
    """The existing installation as its dump has it, stamped."""
    run(empty_database, DUMP)
    migrate.stamp(empty_database, "0001")
    return empty_database


@pytest.fixture
def documented(empty_database: str) -> str:
    """The documented schema with two clients, without the keys that would refuse some of the dirt; stamped."""
    run(empty_database, DOCUMENTED_DDL)
    run(
        empty_database,
        f"ALTER TABLE chat_messages DROP CONSTRAINT chat_messages_client_id_fkey;"
        f"ALTER TABLE client_files DROP CONSTRAINT client_files_client_id_fkey;"
        f"INSERT INTO clients (id, name, token) VALUES ('{ANA}', 'Ana', 'a'), ('{BEA}', 'Bea', 'b')",
    )
    migrate.stamp(empty_database, "0001")
    return empty_database


def alembic(url: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env={**os.environ, "KESTRA_DATABASE_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def waits_for_lock(url: str) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(one(url, waiting))


# --- the scripts ------------------------------------------------------------------------------------------------------


def test_revisions_are_numbered_one_after_the_other_and_have_one_head() -> None:
    config = Config(ROOT / "alembic.ini")
    scripts = list(ScriptDirectory.from_config(config).walk_revisions())[::-1]
    assert [script.revision for script in scripts] == [f"{n:04d}" for n in range(1, len(scripts) + 1)]
    assert all(Path(script.path).name.startswith(f"{script.revision}_") for script in scripts)
    assert migrate.head() == scripts[-1].revision == REVISIONS[-1]


@pytest.mark.parametrize("script", sorted((ROOT / "alembic/versions").glob("*.py")), ids=lambda path: path.stem)
def test_a_revision_never_imports_the_application(script: Path) -> None:
    nodes = list(ast.walk(ast.parse(script.read_text("utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.split(".")[0] == "kestra"}


def test_alembic_is_not_a_package_of_ours() -> None:
    assert not list((ROOT / "alembic").rglob("__init__.py"))


def test_a_generated_revision_gets_the_next_number_plain_types_and_passes_the_linter(
    empty_database: str, tmp_path: Path
) -> None:
    migrate.upgrade(empty_database)
    run(
        empty_database, "ALTER TABLE clients DROP COLUMN tools_config; ALTER TABLE chat_messages DROP COLUMN created_at"
    )
    project = tmp_path / "project"
    project.mkdir()
    for name in ("alembic.ini", "pyproject.toml"):
        (project / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    subprocess.run(["cp", "-r", ROOT / "alembic", project / "alembic"], check=True)  # noqa: S607
    generated = subprocess.run(
        [sys.executable, "-m", "alembic", "revision", "--autogenerate", "-m", "Put the columns back"],
        cwd=project,
        env={**os.environ, "KESTRA_DATABASE_URL": empty_database, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert generated.returncode == 0, generated.stdout + generated.stderr
    script = project / f"alembic/versions/{int(REVISIONS[-1]) + 1:04d}_put_the_columns_back.py"
    source = script.read_text("utf-8")
    assert "kestra" not in source
    assert "postgresql.JSONB()" in source
    assert "sa.DateTime(timezone=True)" in source
    linted = subprocess.run(
        [sys.executable, "-m", "ruff", "check", script],
        cwd=project,
        check=False,
        capture_output=True,
        text=True,
    )
    assert linted.returncode == 0, linted.stdout


# --- schemas ----------------------------------------------------------------------------------------------------------


def test_0001_is_the_schema_of_existing_installations_plus_one_documented_foreign_key(
    empty_database: str,
) -> None:
    run(empty_database, DOCUMENTED_DDL)
    existing = catalog.snapshot(empty_database)
    run(empty_database, f"DROP TABLE {', '.join(ROWS)}")
    migrate.upgrade(empty_database, "0001")
    assert catalog.snapshot(empty_database) ^ existing == {
        (
            "constraint",
            "active_conversations",
            "active_conversations_client_id_fkey",
            "FOREIGN KEY (client_id) REFERENCES clients(id)",
            True,
            False,
        )
    }


def test_adopted_and_new_databases_have_the_same_schema(installation: str) -> None:
    migrate.upgrade(installation)
    adopted = catalog.snapshot(installation)
    run(installation, "DROP SCHEMA public CASCADE; CREATE SCHEMA public AUTHORIZATION pg_database_owner;")
    run(installation, "GRANT USAGE ON SCHEMA public TO PUBLIC")
    migrate.upgrade(installation)
    assert adopted == catalog.snapshot(installation)


def test_migrations_and_models_make_the_same_tables(empty_database: str) -> None:
    def tables() -> set[tuple[object, ...]]:
        things = catalog.kind(catalog.snapshot(empty_database), "column", "constraint", "index", "sequence")
        # Columns may come in another order, and one constraint is never validated.
        return {
            tuple(
                str(part).removesuffix(" NOT VALID")
                for place, part in enumerate(thing)
                if (thing[0], place) not in {("column", 3), ("constraint", 4)}
            )
            for thing in things
        }

    migrate.upgrade(empty_database)
    migrated = tables()
    run(empty_database, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(empty_database), poolclass=NullPool)
    Base.metadata.create_all(engine)
    assert migrated == tables()


def test_only_the_rule_for_new_messages_is_not_validated(installation: str) -> None:
    migrate.upgrade(installation)
    unvalidated = "SELECT conname FROM pg_constraint WHERE NOT convalidated"
    assert rows(installation, unvalidated) == [("ck_chat_messages_content_or_media",)]
    assert rows(installation, "SELECT FROM pg_index WHERE NOT indisvalid") == []


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_revision_downgrades_to_exactly_the_schema_before(empty_database: str, revision: str) -> None:
    before = None if revision == REVISIONS[0] else f"{int(revision) - 1:04d}"
    if before:
        migrate.upgrade(empty_database, before)
    schema = catalog.snapshot(empty_database)
    for _ in range(2):
        migrate.upgrade(empty_database, revision)
        assert catalog.snapshot(empty_database) != schema
        migrate.downgrade(empty_database, before or "base")
        assert catalog.snapshot(empty_database) == schema


def test_an_adopted_installation_downgrades_to_the_documented_schema(installation: str) -> None:
    migrate.upgrade(installation)
    migrate.downgrade(installation, "0001")
    downgraded = catalog.without(catalog.snapshot(installation), "orphaned_rows")
    run(installation, f"DROP TABLE {', '.join(ROWS)}, orphaned_rows, alembic_version")
    migrate.upgrade(installation, "0001")
    assert downgraded == catalog.snapshot(installation)


def test_going_below_0001_refuses_to_drop_rows(installation: str) -> None:
    migrate.upgrade(installation)
    migrate.downgrade(installation, "0001")
    before = contents(installation)
    with pytest.raises(MigrationError, match="clients still has rows"):
        migrate.downgrade(installation, "base")
    assert contents(installation) == before


def test_an_installation_that_was_not_stamped_is_told_how_to_be_adopted(empty_database: str) -> None:
    run(empty_database, DUMP)
    before = contents(empty_database)
    with pytest.raises(MigrationError, match=r"alembic stamp 0001.*alembic upgrade head"):
        migrate.upgrade(empty_database)
    assert before.items() <= contents(empty_database).items()
    assert migrate.current(empty_database) is None


# --- alembic check ----------------------------------------------------------------------------------------------------


def test_check_is_clean_at_head_and_stays_so_after_a_round_trip(installation: str) -> None:
    migrate.upgrade(installation)
    migrate.check(installation)
    migrate.downgrade(installation, "0001")
    migrate.upgrade(installation)
    migrate.check(installation)


@pytest.mark.parametrize(
    "drift",
    [
        "DROP INDEX ix_chat_messages_client_id_chat_id_created_at_id",
        "ALTER TABLE chat_messages DROP CONSTRAINT ck_chat_messages_role",
        "ALTER TABLE client_files DROP CONSTRAINT uq_client_files_client_id_file_hash",
        "ALTER TABLE client_files DROP CONSTRAINT fk_client_files_client_id_clients",
        "ALTER TABLE clients ALTER name DROP NOT NULL",
        "ALTER TABLE clients ALTER created_at TYPE timestamp",
        "ALTER TABLE active_conversations ALTER status SET DEFAULT 'finished'",
        "ALTER TABLE clients ADD COLUMN plan text",
    ],
)
def test_check_fails_when_the_schema_is_not_that_of_the_models(superuser_url: str, drift: str) -> None:
    run(superuser_url, drift)
    with pytest.raises(MigrationError, match="New upgrade operations detected"):
        migrate.check(superuser_url)


def test_check_fails_when_the_database_is_behind(empty_database: str) -> None:
    migrate.upgrade(empty_database, "0002")
    with pytest.raises(MigrationError, match="not up to date"):
        migrate.check(empty_database)


# --- adoption ---------------------------------------------------------------------------------------------------------


def test_adoption_does_what_the_manifest_counts(installation: str) -> None:
    before = {table: one(installation, f"SELECT count(*) FROM {table}") for table in ROWS}
    assert before["clients"] == MANIFEST["clients"]
    assert before["chat_messages"] == MANIFEST["messages"]
    empty = "SELECT count(*) FROM chat_messages WHERE coalesce(content, '') = '' AND coalesce(media_url, '') = ''"
    empty_before = one(installation, empty)
    said = migrate.upgrade(installation)
    expected = {
        "conversations of an unknown client → orphaned_rows": "conv_unknown_client",
        "messages without client_id → the one client": "msg_null_client_assignable",
        "messages without an owner → orphaned_rows": "msg_null_client_orphan",
        "conversations: last_role 'ai' → 'assistant'": "conv_last_role_ai",
        "conversations: followup_stage NULL → 0": "conv_null_stage",
        "conversations: followup_stage above 5 → 5": "conv_stage_over_5",
        "conversations: status NULL → 'active'": "conv_null_status",
        'clients: tools_config not an object → {"_legacy": value}': "cfg_not_object",
        "clients: tools_config NULL → {}": "cfg_null",
        "files: file_hash → lower case": "hash_upper",
    }
    for kind, count in expected.items():
        assert re.search(rf"^ +{MANIFEST[count]}  {re.escape(kind)}", said, re.MULTILINE), said
    assert said.count("\n") == len(expected) + 2, "nothing else was changed"

    orphans = dict(rows(installation, "SELECT table_name, count(*) FROM orphaned_rows GROUP BY 1"))
    assert orphans == {
        "active_conversations": MANIFEST["conv_unknown_client"],
        "chat_messages": MANIFEST["msg_null_client_orphan"],
    }
    for table in ROWS:
        assert one(installation, f"SELECT count(*) FROM {table}") + orphans.get(table, 0) == before[table]
    assert one(installation, empty) == empty_before == MANIFEST["msg_empty"]
    system = "SELECT count(*) FROM chat_messages WHERE role = 'system'"
    assert one(installation, system) == MANIFEST["msg_role_system"]
    assert one(installation, 'SELECT count(*) FROM clients WHERE tools_config = \'{"_legacy": ["legado"]}\'') == 1


def test_a_new_database_has_nothing_to_report(empty_database: str) -> None:
    assert migrate.upgrade(empty_database) == ""


DIRT: Final[dict[str, tuple[str, str, list[Any]]]] = {
    "message role ai": (
        f"INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES ('{ANA}', 'c', 'ai', 'oi')",
        "SELECT role FROM chat_messages",
        ["assistant"],
    ),
    "last_role ai": (
        f"INSERT INTO active_conversations (chat_id, client_id, last_role) VALUES ('c', '{ANA}', 'ai')",
        "SELECT last_role FROM active_conversations",
        ["assistant"],
    ),
    "last_role unknown to us but NULL": (
        f"INSERT INTO active_conversations (chat_id, client_id) VALUES ('c', '{ANA}')",
        "SELECT last_role FROM active_conversations",
        [None],
    ),
    "stages": (
        (
            "INSERT INTO active_conversations (chat_id, client_id, followup_stage) "
            f"VALUES ('a', '{ANA}', NULL), ('b', '{ANA}', -3), ('c', '{ANA}', 3), ('d', '{ANA}', 99)"
        ),
        "SELECT followup_stage FROM active_conversations ORDER BY chat_id",
        [0, 0, 3, 5],
    ),
    "status NULL": (
        f"INSERT INTO active_conversations (chat_id, client_id, status) VALUES ('c', '{ANA}', NULL)",
        "SELECT status FROM active_conversations",
        ["active"],
    ),
    "tools_config that is no object": (
        (
            "INSERT INTO clients (id, name, token, tools_config) "
            "SELECT gen_random_uuid(), n, n, c::jsonb FROM (VALUES ('c', NULL), ('d', 'null'), ('e', '[1]'), "
            "('f', '\"x\"'), ('g', '7'), ('h', 'true'), ('i', '{\"a\": null}')) AS v (n, c)"
        ),
        "SELECT tools_config FROM clients WHERE token >= 'c' ORDER BY token",
        [{}, {"_legacy": None}, {"_legacy": [1]}, {"_legacy": "x"}, {"_legacy": 7}, {"_legacy": True}, {"a": None}],
    ),
    "last_message_at NULL": (
        (
            f"INSERT INTO active_conversations (chat_id, client_id, last_message_at) VALUES ('c', '{ANA}', NULL);"
            "INSERT INTO chat_messages (client_id, chat_id, role, content, created_at) VALUES "
            f"('{ANA}', 'c', 'user', '1', '2026-01-01 10:00'), (NULL, 'c', 'user', '2', '2026-01-02 10:00'), "
            f"('{BEA}', 'c', 'user', '3', '2026-01-03 10:00')"
        ),
        "SELECT (last_message_at AT TIME ZONE 'UTC')::text FROM active_conversations",
        ["2026-01-02 10:00:00"],
    ),
    "message of the one client with such a conversation": (
        (
            f"INSERT INTO active_conversations (chat_id, client_id) VALUES ('c', '{BEA}'), ('c', '{NOBODY}');"
            "INSERT INTO chat_messages (chat_id, role, content) VALUES ('c', 'user', 'oi')"
        ),
        "SELECT client_id FROM chat_messages",
        [BEA],
    ),
    "message that two clients could have": (
        (
            f"INSERT INTO active_conversations (chat_id, client_id) VALUES ('c', '{ANA}'), ('c', '{BEA}');"
            "INSERT INTO chat_messages (chat_id, role, created_at) VALUES ('c', 'ai', '2026-01-01 10:00:00.1')"
        ),
        "SELECT concat_ws(' ', table_name, \"row\" ->> 'role', \"row\" ->> 'created_at') FROM orphaned_rows",
        ["chat_messages ai 2026-01-01T10:00:00.1"],
    ),
    "rows of an unknown client": (
        (
            f"INSERT INTO active_conversations (chat_id, client_id) VALUES ('c', '{NOBODY}');"
            f"INSERT INTO chat_messages (client_id, chat_id, role) VALUES ('{NOBODY}', 'c', 'whoever');"
            f"INSERT INTO client_files (client_id, file_hash) VALUES ('{NOBODY}', 'AB'), (NULL, 'CD')"
        ),
        "SELECT table_name || ': ' || reason FROM orphaned_rows ORDER BY 1",
        [
            "active_conversations: client_id is not the id of any client",
            "chat_messages: client_id is not the id of any client",
            "client_files: client_id is NULL",
            "client_files: client_id is not the id of any client",
        ],
    ),
    "file_hash in upper case": (
        f"INSERT INTO client_files (client_id, file_hash) VALUES ('{ANA}', 'AB'), ('{BEA}', 'ab'), ('{ANA}', NULL)",
        "SELECT file_hash FROM client_files ORDER BY client_id, file_hash",
        ["ab", None, "ab"],
    ),
    "file twice: the one with a URI stays": (
        (
            "INSERT INTO client_files (id, client_id, file_hash, google_file_uri) VALUES "
            f"('{UUID(int=21)}', '{ANA}', 'AB', NULL), ('{UUID(int=22)}', '{ANA}', 'Ab', 'u'), "
            f"('{UUID(int=23)}', '{ANA}', 'ab', 'v')"
        ),
        "SELECT id FROM client_files UNION ALL SELECT (\"row\" ->> 'id')::uuid FROM orphaned_rows",
        [UUID(int=22), UUID(int=21), UUID(int=23)],
    ),
    "message without content": (
        f"INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES ('{ANA}', 'c', 'user', '')",
        "SELECT content FROM chat_messages",
        [""],
    ),
}


@pytest.mark.parametrize("kind", DIRT)
def test_a_dirty_row_is_adopted(documented: str, kind: str) -> None:
    setup, query, expected = DIRT[kind]
    run(documented, setup)
    migrate.upgrade(documented)
    found = [value for (value,) in rows(documented, query)]
    assert found[:1] == expected[:1]
    assert sorted(map(repr, found)) == sorted(map(repr, expected))


UNDECIDABLE: Final = {
    "clients without a name": "INSERT INTO clients (token) VALUES ('c')",
    "clients without a token": "INSERT INTO clients (name, token) VALUES ('C', NULL), ('D', '')",
    "clients without created_at": "INSERT INTO clients (name, token, created_at) VALUES ('C', 'c', NULL)",
    "conversations with an unknown status": (
        f"INSERT INTO active_conversations (chat_id, client_id, status) VALUES ('c', '{ANA}', 'paused')"
    ),
    "conversations with an unknown last_role": (
        f"INSERT INTO active_conversations (chat_id, client_id, last_role) VALUES ('c', '{ANA}', 'bot')"
    ),
    "conversations without last_message_at and without a message": (
        f"INSERT INTO active_conversations (chat_id, client_id, last_message_at) VALUES ('c', '{ANA}', NULL);"
        f"INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES ('{BEA}', 'c', 'user', 'x')"
    ),
    "messages with an unknown role": (
        f"INSERT INTO active_conversations (chat_id, client_id) VALUES ('c', '{ANA}');"
        f"INSERT INTO chat_messages (client_id, chat_id, role) VALUES ('{ANA}', 'c', 'bot'), (NULL, 'c', 'tool')"
    ),
    "messages without created_at": (
        f"INSERT INTO chat_messages (client_id, chat_id, role, created_at) VALUES ('{ANA}', 'c', 'user', NULL)"
    ),
}


@pytest.mark.parametrize("kind", UNDECIDABLE)
def test_what_only_a_person_can_decide_stops_before_anything_is_changed(documented: str, kind: str) -> None:
    run(documented, UNDECIDABLE[kind])
    run(
        documented,
        f"INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES ('{ANA}', 'x', 'ai', 'secret')",
    )
    before, schema = contents(documented), catalog.snapshot(documented)
    with pytest.raises(MigrationError, match="Nothing was changed") as stopped:
        migrate.upgrade(documented)
    assert contents(documented) == before
    assert catalog.snapshot(documented) == schema
    message = str(stopped.value)
    assert "secret" not in message
    ((count, said, query),) = re.findall(r"^(\d+) (.+):\n    (SELECT .+);$", message, re.MULTILINE)
    assert said == kind
    assert len(rows(documented, query)) == int(count) >= 1


def test_every_kind_of_undecidable_row_is_listed_at_once(documented: str) -> None:
    for number, setup in enumerate(UNDECIDABLE.values()):
        run(documented, setup.replace("'c'", f"'c{number}'"))
    with pytest.raises(MigrationError) as stopped:
        migrate.upgrade(documented)
    assert set(re.findall(r"^\d+ (.+):$", str(stopped.value), re.MULTILINE)) == set(UNDECIDABLE)


def test_the_sequence_is_moved_past_messages_that_were_inserted_with_their_id(documented: str) -> None:
    run(
        documented,
        f"INSERT INTO chat_messages (id, client_id, chat_id, role, content) VALUES (41, '{ANA}', 'c', 'user', 'x')",
    )
    migrate.upgrade(documented)
    new = (
        f"INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES ('{ANA}', 'c', 'user', 'y') RETURNING id"
    )
    assert one(documented, new) == 42


@pytest.mark.parametrize("present", [True, False])
def test_the_foreign_key_of_conversations_may_be_there_or_not_under_any_name(documented: str, *, present: bool) -> None:
    if present:
        run(
            documented,
            "ALTER TABLE active_conversations ADD CONSTRAINT mine FOREIGN KEY (client_id) REFERENCES clients",
        )
    migrate.upgrade(documented)
    foreign_keys = (
        "SELECT conname FROM pg_constraint WHERE contype = 'f' AND conrelid = 'active_conversations'::regclass"
    )
    assert rows(documented, foreign_keys) == [("fk_active_conversations_client_id_clients",)]
    migrate.check(documented)


def test_new_dirt_is_refused_after_adoption(installation: str) -> None:
    migrate.upgrade(installation)
    client = one(installation, "SELECT id FROM clients LIMIT 1")
    for statement, constraint in (
        (f"INSERT INTO chat_messages (client_id, chat_id, role) VALUES ('{client}', 'c', 'user')", "content_or_media"),
        (f"INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES ('{client}', 'c', 'ai', 'x')", "role"),
        (
            f"INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES ('{NOBODY}', 'c', 'user', 'x')",
            "fk_chat",
        ),
        ("INSERT INTO chat_messages (chat_id, role, content) VALUES ('c', 'user', 'x')", "client_id"),
        ("UPDATE active_conversations SET followup_stage = 6", "followup_stage"),
        ("UPDATE active_conversations SET status = 'paused'", "status"),
        ("UPDATE clients SET tools_config = '[]'", "tools_config_is_object"),
        ("UPDATE clients SET token = ''", "token"),
        ("UPDATE client_files SET file_hash = upper(file_hash)", "file_hash_lower"),
        ("UPDATE client_files SET size_bytes = -1", "size_bytes"),
        ("UPDATE active_conversations SET claim_token = gen_random_uuid()", "claim"),
        ("UPDATE active_conversations SET claimed_until = now()", "claim"),
        ("UPDATE chat_messages SET content = 'x', provider_message_id = ''", "provider_message_id"),
        ("UPDATE chat_messages SET content = 'x', provider_message_id = 'w'", "uq_chat_messages_provider_message_id"),
    ):
        with pytest.raises(psycopg.errors.IntegrityError, match=constraint):
            run(installation, statement)


# --- no row is ever lost ----------------------------------------------------------------------------------------------


def multiset(url: str, table: str, columns: str) -> list[tuple[Any, ...]]:
    """The rows of a table together with those of it in orphaned_rows."""
    orphans = one(url, "SELECT to_regclass('orphaned_rows') IS NOT NULL")
    query = f"SELECT {columns} FROM {table} t"
    if orphans:
        query += (
            f' UNION ALL SELECT {columns} FROM orphaned_rows o, jsonb_populate_record(NULL::{table}, o."row") AS t'
            f" WHERE o.table_name = '{table}'"
        )
    return sorted(rows(url, query), key=repr)


def every_row(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """What no step of a migration may change: every row by key, text and hash."""
    return {
        "active_conversations": multiset(url, "active_conversations", "t.chat_id, t.client_id, t.last_context"),
        "chat_messages": multiset(url, "chat_messages", "t.id, t.chat_id, t.content, t.media_url"),
        "client_files": multiset(url, "client_files", "t.id, t.client_id, lower(t.file_hash), t.filename"),
        "clients": sorted(rows(url, "SELECT id, name, token FROM clients"), key=repr),
    }


def test_no_row_is_lost_on_repeated_round_trips(installation: str) -> None:
    run(
        installation,
        "INSERT INTO client_files (client_id, file_hash) SELECT client_id, upper(file_hash) FROM client_files "
        "WHERE file_hash = lower(file_hash) LIMIT 3;"
        "INSERT INTO client_files (file_hash, filename) VALUES ('f00', 'nobody''s')",
    )
    before = every_row(installation)
    first = None
    for _ in range(2):
        migrate.upgrade(installation)
        assert every_row(installation) == before
        first = first or {table: kept for table, kept in contents(installation).items() if table != "orphaned_rows"}
        assert first.items() <= contents(installation).items(), "the second adoption ends where the first did"
        migrate.downgrade(installation, "0001")
        assert every_row(installation) == before


def test_files_that_two_clients_share_come_back_after_a_downgrade(documented: str) -> None:
    migrate.upgrade(documented)
    shared = ", ".join(f"('{client}', 'aa', 'f')" for client in (ANA, BEA))
    run(documented, f"INSERT INTO client_files (client_id, file_hash, filename) VALUES {shared}, ('{ANA}', 'bb', 'g')")
    before = contents(documented)
    for _ in range(2):
        migrate.downgrade(documented, "0001")
        moved = rows(documented, "SELECT table_name, reason FROM orphaned_rows")
        assert moved == [("client_files", "downgrade to 0001: another client has a file with this file_hash")]
        assert one(documented, "SELECT count(*) FROM client_files") == 2
        migrate.upgrade(documented)
        assert contents(documented) == before


def test_rows_whose_id_two_clients_use_come_back_after_a_downgrade(documented: str) -> None:
    migrate.upgrade(documented, timezone="America/Sao_Paulo")
    for client in (ANA, BEA):
        run(
            documented,
            "INSERT INTO chat_messages (id, client_id, chat_id, role, content, created_at) "
            f"VALUES (7, '{client}', 'c', 'user', 'x', '2026-03-04 18:11:33.168131+00');"
            f"INSERT INTO client_files (id, client_id) VALUES ('{UUID(int=7)}', '{client}')",
        )
    before = contents(documented)
    for _ in range(2):
        migrate.downgrade(documented, "0001")
        assert one(documented, "SELECT count(*) FROM orphaned_rows") == 2
        migrate.upgrade(documented, timezone="America/Sao_Paulo")
        assert contents(documented) == before


def test_an_orphan_goes_back_when_its_client_has_appeared(documented: str) -> None:
    run(documented, f"INSERT INTO active_conversations (chat_id, client_id) VALUES ('c', '{NOBODY}')")
    conversation = contents(documented)["active_conversations"]
    migrate.upgrade(documented)
    assert contents(documented)["active_conversations"] == []
    run(documented, f"INSERT INTO clients (id, name, token) VALUES ('{NOBODY}', 'N', 'n')")
    migrate.downgrade(documented, "0001")
    after = contents(documented)
    assert after["active_conversations"] == conversation
    assert "orphaned_rows" not in after


# --- time zones -------------------------------------------------------------------------------------------------------

TIMES: Final = (
    "SELECT 'm' || id, created_at::text FROM chat_messages "
    "UNION ALL SELECT chat_id || client_id, last_message_at::text FROM active_conversations "
    "UNION ALL SELECT id::text, created_at::text FROM clients ORDER BY 1"
)


@pytest.mark.parametrize("zone", ["UTC", "America/Sao_Paulo", "Asia/Kathmandu"])
def test_naive_timestamps_are_read_in_the_zone_and_a_downgrade_restores_them_exactly(
    installation: str, zone: str
) -> None:
    orphans = "SELECT count(*) FROM active_conversations WHERE client_id NOT IN (SELECT id FROM clients)"
    assert one(installation, orphans) == MANIFEST["conv_unknown_client"]
    run(installation, "DELETE FROM active_conversations WHERE client_id NOT IN (SELECT id FROM clients)")
    before = rows(installation, TIMES)
    migrate.upgrade(installation, timezone=zone.lower())
    with psycopg.connect(installation, options=f"-c timezone={zone}") as connection:
        offset = connection.execute("SELECT created_at - created_at AT TIME ZONE 'UTC' FROM clients").fetchone()
        local = connection.execute("SELECT id::text, created_at::timestamp::text FROM clients").fetchall()
    assert set(local) <= set(before)
    assert offset is not None
    migrate.downgrade(installation, "0001")
    assert rows(installation, TIMES) == before


def test_the_zone_given_to_a_downgrade_wins_over_the_remembered_one(documented: str) -> None:
    run(documented, "UPDATE clients SET created_at = '2026-01-01 12:00'")
    migrate.upgrade(documented, timezone="America/Sao_Paulo")
    migrate.downgrade(documented, "0001", timezone="UTC")
    assert rows(documented, "SELECT DISTINCT created_at::text FROM clients") == [("2026-01-01 15:00:00",)]


def test_an_unknown_zone_stops_before_anything_is_changed(installation: str) -> None:
    before = contents(installation)
    with pytest.raises(MigrationError, match="'Brasilia' is not a time zone"):
        migrate.upgrade(installation, timezone="Brasilia")
    assert contents(installation) == before


def test_a_time_that_the_zone_never_had_stops_before_anything_is_changed(documented: str) -> None:
    run(documented, "UPDATE clients SET created_at = '2018-11-04 00:30' WHERE token = 'a'")  # clocks went to 01:00
    before = contents(documented)
    with pytest.raises(MigrationError, match="1 clients whose created_at does not exist in America/Sao_Paulo"):
        migrate.upgrade(documented, timezone="America/Sao_Paulo")
    assert contents(documented) == before
    migrate.upgrade(documented, timezone="UTC")


def test_utc_rewrites_no_table_and_another_zone_does(installation: str) -> None:
    file = "SELECT pg_relation_filenode('chat_messages')"
    before = one(installation, file)
    migrate.upgrade(installation)
    assert one(installation, file) == before
    migrate.downgrade(installation, "0001")
    assert one(installation, file) == before
    migrate.upgrade(installation, timezone="America/Sao_Paulo")
    assert one(installation, file) != before


# --- interruptions and concurrency ------------------------------------------------------------------------------------


@contextmanager
def failing_at(url: str, fragment: str) -> Iterator[None]:
    """A database in which every DDL statement with this fragment fails."""
    run(
        url,
        f"""
        CREATE SCHEMA fault;
        CREATE FUNCTION fault.strike() RETURNS event_trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF position({sql.Literal(fragment).as_string()} IN current_query()) > 0 THEN
                RAISE EXCEPTION 'struck' USING ERRCODE = '57014';
            END IF;
        END $$;
        CREATE EVENT TRIGGER strike ON ddl_command_start EXECUTE FUNCTION fault.strike();
        """,
    )
    try:
        yield
    finally:
        run(url, "DROP EVENT TRIGGER strike; DROP SCHEMA fault CASCADE")


@pytest.mark.parametrize(
    "fragment",
    [
        "CREATE TABLE orphaned_rows",
        "CONCURRENTLY uq_client_files_client_id_file_hash",
        "ADD CONSTRAINT fk_client_files_client_id_clients",
        "VALIDATE CONSTRAINT clients_created_at_not_null_check",
        "VALIDATE CONSTRAINT fk_client_files_client_id_clients",
        "ALTER TABLE active_conversations ALTER status SET NOT NULL",
        "ALTER TABLE chat_messages ALTER client_id SET NOT NULL",
        "DROP CONSTRAINT IF EXISTS chat_messages_created_at_not_null_check",
        "CONCURRENTLY pk_client_files",
        "CONCURRENTLY ix_chat_messages_client_id_chat_id_created_at_id",
        "ADD CONSTRAINT pk_client_files",
        "DROP INDEX CONCURRENTLY",
        "CREATE POLICY kestra_tenant ON client_files",
        "ADD COLUMN IF NOT EXISTS provider_message_id",
        "VALIDATE CONSTRAINT ck_client_files_size_bytes",
        "CONCURRENTLY ix_chat_messages_unread",
        "DROP INDEX CONCURRENTLY IF EXISTS ix_active_conversations_followup_due",
    ],
)
def test_an_interrupted_upgrade_is_simply_run_again(installation: str, fragment: str) -> None:
    before = every_row(installation)
    with failing_at(installation, fragment), pytest.raises(MigrationError, match="Run the same command again"):
        migrate.upgrade(installation)
    assert every_row(installation) == before
    migrate.upgrade(installation)
    assert every_row(installation) == before
    interrupted = catalog.snapshot(installation)
    run(installation, f"DROP TABLE {', '.join(ROWS)}, orphaned_rows, alembic_version CASCADE")
    migrate.upgrade(installation)
    assert interrupted == catalog.snapshot(installation)


def test_a_table_in_use_stops_the_upgrade_after_lock_timeout(installation: str) -> None:
    run(installation, f"ALTER DATABASE {one(installation, 'SELECT current_database()')} SET lock_timeout = '15s'")
    with psycopg.connect(installation) as reader:
        reader.execute("SELECT FROM chat_messages LIMIT 1")
        started = time.monotonic()
        with pytest.raises(MigrationError, match=r"lock_timeout \(250ms\)"):
            migrate.upgrade(installation, lock_timeout="250ms")
        assert time.monotonic() - started < 10
        assert one(installation, "SELECT count(*) FROM orphaned_rows") == 5, "cleaning was committed before"
    migrate.upgrade(installation)
    migrate.check(installation)


def test_an_index_that_an_interrupted_run_left_invalid_is_built_again(installation: str) -> None:
    with psycopg.connect(installation) as other:
        other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT 1")
        with pytest.raises(MigrationError, match="55P03"):
            migrate.upgrade(installation, lock_timeout="250ms")
    invalid = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"
    assert rows(installation, invalid) == [("uq_client_files_client_id_file_hash",)]
    migrate.upgrade(installation)
    assert rows(installation, invalid) == []
    migrate.check(installation)


def test_rows_that_are_written_while_the_upgrade_runs_are_adopted_too(installation: str) -> None:
    failures: list[BaseException] = []

    def upgrade() -> None:
        try:
            migrate.upgrade(installation, lock_timeout="30s")
        except MigrationError as error:
            failures.append(error)

    with psycopg.connect(installation) as snapshot:
        snapshot.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        snapshot.execute("SELECT 1")
        running = threading.Thread(target=upgrade)
        running.start()
        until(lambda: waits_for_lock(installation))  # the index build waits for the snapshot
        run(
            installation,
            "INSERT INTO chat_messages (chat_id, role, content) VALUES ('late', 'ai', 'x');"
            f"INSERT INTO active_conversations (chat_id, client_id, last_role) VALUES ('late', '{NOBODY}', 'ai')",
        )
    running.join(DEADLINE)
    assert failures == []
    late = "SELECT table_name FROM orphaned_rows WHERE \"row\" ->> 'chat_id' = 'late' ORDER BY 1"
    assert rows(installation, late) == [("active_conversations",), ("chat_messages",)]
    migrate.check(installation)


@pytest.mark.parametrize("revision", REVISIONS[:-3])  # 0005 and 0006 lock no table
def test_an_upgrade_and_a_program_that_writes_two_tables_do_not_end_each_other(documented: str, revision: str) -> None:
    migrate.upgrade(documented, revision)
    run(documented, f"INSERT INTO active_conversations (chat_id, client_id) VALUES ('1', '{ANA}')")
    failures: list[BaseException] = []

    def upgrade() -> None:
        try:
            migrate.upgrade(documented)
        except MigrationError as error:
            failures.append(error)

    with psycopg.connect(documented) as program:
        program.execute("UPDATE active_conversations SET last_role = 'user'")
        running = threading.Thread(target=upgrade)
        running.start()
        until(lambda: waits_for_lock(documented))
        # Its foreign key asks for the table that the migration comes to first.
        program.execute(
            f"INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES ('{ANA}', '1', 'user', 'x')"
        )
    running.join(DEADLINE)
    assert failures == []
    assert one(documented, "SELECT count(*) FROM chat_messages") == 1
    migrate.check(documented)


def test_two_upgrades_at_once_both_succeed(installation: str) -> None:
    before = every_row(installation)
    # Both wait inside the migration until both have started.
    with psycopg.connect(installation) as gate:
        gate.execute("LOCK TABLE clients")
        runs = [alembic(installation, "-x", "lock_timeout=30s", "upgrade", "head") for _ in range(2)]
        connected = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'alembic' AND datname = current_database()"
        )
        until(lambda: one(installation, connected) == 2)
    said = [process.communicate(timeout=DEADLINE)[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], said
    assert sorted(output.count("Running upgrade") for output in said) == [0, len(REVISIONS) - 1]
    assert sum("Waiting for another run" in output for output in said) == 1
    assert every_row(installation) == before
    migrate.check(installation)


def test_waiting_for_another_run_ends(empty_database: str) -> None:
    with psycopg.connect(empty_database, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(5201314202607)")
        process = alembic(empty_database, "-x", "wait=0.1", "upgrade", "head")
        said, _ = process.communicate(timeout=DEADLINE)
        assert process.returncode != 0
        assert "Another run of Alembic has held this database" in said


def test_a_connection_that_is_handed_in_is_used_and_given_back_as_it_was(empty_database: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "alembic"))
    config.set_main_option("path_separator", "os")
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(empty_database), poolclass=NullPool)
    with engine.connect() as connection:
        settings = text("SELECT current_setting('lock_timeout'), current_setting('statement_timeout')")
        before = connection.execute(settings).one()
        connection.commit()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        assert connection.execute(settings).one() == before
        held = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
        assert connection.scalar(held) == 0
    assert migrate.current(empty_database) == migrate.head()


def test_lock_timeout_is_five_seconds_unless_told_otherwise(empty_database: str) -> None:
    run(
        empty_database,
        """
        CREATE SCHEMA seen; CREATE TABLE seen.settings (lock_timeout text, statement_timeout text);
        CREATE FUNCTION seen.note() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO seen.settings VALUES (current_setting('lock_timeout'), current_setting('statement_timeout'));
        END $$;
        CREATE EVENT TRIGGER note ON ddl_command_end WHEN TAG IN ('CREATE TABLE', 'ALTER TABLE', 'CREATE POLICY')
            EXECUTE FUNCTION seen.note();
        """,
    )
    migrate.upgrade(empty_database)
    assert rows(empty_database, "SELECT DISTINCT lock_timeout, statement_timeout FROM seen.settings") == [("5s", "0")]


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("upgrade", "head", "--sql"), "--sql is not supported"),
        (("-x", "lock_timeout=soon", "upgrade", "head"), "lock_timeout=soon is not a duration"),
        (("-x", "wait=soon", "upgrade", "head"), "wait=soon is not a number"),
        (("upgrade", "0099"), "Can't locate revision"),
    ],
)
def test_a_wrong_command_ends_with_one_clear_line(empty_database: str, arguments: tuple[str, ...], said: str) -> None:
    process = alembic(empty_database, *arguments)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    assert "FAILED" in output
    assert said in output
    assert "Traceback" not in output


def test_a_wrong_password_or_no_server_is_one_clear_line_without_the_password() -> None:
    url = "postgresql://kestra:hunter2@127.0.0.1:1/kestra"
    for call in (migrate.upgrade, migrate.current, migrate.check):
        with pytest.raises(MigrationError, match="cannot be reached") as refused:
            call(url)
        assert "hunter2" not in str(refused.value)


def test_the_summary_and_the_errors_quote_no_row(installation: str) -> None:
    run(installation, "INSERT INTO chat_messages (chat_id, role, content) VALUES ('5511', 'user', 'segredo')")
    said = migrate.upgrade(installation)
    tokens = [token for (token,) in rows(installation, "SELECT token FROM clients")]
    assert not [secret for secret in ("segredo", "5511", *tokens) if secret in said]


def test_an_error_of_the_database_is_shown_without_its_detail(empty_database: str) -> None:
    run(empty_database, DOCUMENTED_DDL)
    run(empty_database, "ALTER TABLE active_conversations DROP CONSTRAINT active_conversations_pkey")
    migrate.stamp(empty_database, "0001")
    with pytest.raises(MigrationError, match="active_conversations_pkey") as refused:
        migrate.upgrade(empty_database)
    assert "DETAIL" not in str(refused.value)
    assert refused.value.__cause__ is None


# --- what the messages say about their conversations ------------------------------------------------------------------


SAID: Final = """
    SELECT client_id, chat_id, last_message_id, last_user_message_at, last_user_message_id, last_read_message_id
    FROM active_conversations ORDER BY client_id, chat_id COLLATE "C"
"""


def test_the_state_of_conversations_is_filled_in_from_their_messages(documented: str) -> None:
    run(
        documented,
        f"""
        INSERT INTO active_conversations (chat_id, client_id)
        SELECT c, k::uuid FROM unnest(ARRAY['both', 'silent', 'system']) c, unnest(ARRAY['{ANA}', '{BEA}']) k;
        INSERT INTO chat_messages (id, client_id, chat_id, role, content, created_at) VALUES
            (1, '{ANA}', 'both', 'user', 'a', '2026-01-01 10:00'),
            (2, '{ANA}', 'both', 'assistant', 'b', '2026-01-01 12:00'),
            (3, '{ANA}', 'both', 'assistant', 'as late, but a greater id', '2026-01-01 12:00'),
            (4, '{ANA}', 'both', 'user', 'arrived last, sent first', '2026-01-01 09:00'),
            (5, '{BEA}', 'both', 'user', 'another client', '2026-01-01 13:00'),
            (6, '{ANA}', 'system', 'system', 'nobody spoke', '2026-01-01 11:00'),
            (7, '{ANA}', 'no conversation', 'user', 'x', '2026-01-01 11:00')
        """,
    )
    migrate.upgrade(documented)
    ten, one_pm = (datetime(2026, 1, 1, hour, tzinfo=UTC) for hour in (10, 13))
    assert rows(documented, SAID) == [
        (ANA, "both", 3, ten, 4, 4),
        (ANA, "silent", None, None, None, None),
        (ANA, "system", 6, None, None, 6),
        (BEA, "both", 5, one_pm, 5, 5),
        (BEA, "silent", None, None, None, None),
        (BEA, "system", None, None, None, None),
    ]


def test_more_conversations_than_one_batch_are_filled_in(documented: str) -> None:
    run(
        documented,
        f"""
        INSERT INTO active_conversations (chat_id, client_id)
        SELECT n::text, k::uuid FROM generate_series(1, 1100) n, unnest(ARRAY['{ANA}', '{BEA}']) k;
        INSERT INTO chat_messages (client_id, chat_id, role, content)
        SELECT client_id, chat_id, 'user', 'oi' FROM active_conversations;
        """,
    )
    migrate.upgrade(documented)
    unsaid = """
        SELECT count(*) FROM active_conversations c JOIN chat_messages m USING (client_id, chat_id)
        WHERE (c.last_message_id, c.last_user_message_id, c.last_read_message_id, c.last_user_message_at)
            IS DISTINCT FROM (m.id, m.id, m.id, m.created_at)
    """
    assert one(documented, unsaid) == 0
    assert one(documented, "SELECT count(*) FROM active_conversations WHERE last_message_id IS NOT NULL") == 2200


def test_the_state_of_conversations_comes_back_after_a_round_trip(installation: str) -> None:
    migrate.upgrade(installation)
    before = rows(installation, SAID)
    assert any(row[2] for row in before)
    migrate.downgrade(installation, "0003")
    migrate.upgrade(installation)
    assert rows(installation, SAID) == before


# --- row level security -----------------------------------------------------------------------------------------------


def security(url: str) -> rls.Security:
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=NullPool)
    with engine.connect() as connection:
        return rls.actual(connection, Base.metadata)


def test_row_level_security_is_as_declared_at_head(superuser_url: str) -> None:
    assert kestra.models.Client.__tablename__ in Base.metadata.tables
    assert security(superuser_url) == rls.declared(Base.metadata)


def test_a_tenant_sees_and_writes_its_own_rows_alone(documented: str) -> None:
    for client in (ANA, BEA):
        run(
            documented,
            f"INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES ('{client}', 'c', 'user', 'x')",
        )
    migrate.upgrade(documented)
    with psycopg.connect(documented) as connection:
        connection.execute("SET LOCAL ROLE kestra_tenant")
        assert connection.execute("SELECT count(*) FROM chat_messages").fetchone() == (0,)
        connection.execute(f"SET LOCAL kestra.client_id = '{ANA}'")
        assert connection.execute("SELECT client_id FROM chat_messages").fetchall() == [(ANA,)]
        assert connection.execute("SELECT id FROM clients").fetchall() == [(ANA,)]
        assert connection.execute("UPDATE chat_messages SET content = 'y'").rowcount == 1
        insert = "INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES (%s, 'c', 'user', 'z')"
        connection.execute(insert, [ANA])
        for refused, parameters in (
            (insert, [BEA]),
            ("TRUNCATE chat_messages", []),
            ("SELECT FROM orphaned_rows", []),
            ("DELETE FROM clients", []),
            ("INSERT INTO clients (name, token) VALUES ('N', 'n')", []),
            (
                "CREATE TRIGGER t AFTER INSERT ON chat_messages EXECUTE FUNCTION suppress_redundant_updates_trigger()",
                [],
            ),
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
                connection.execute(refused, parameters)


def test_a_role_that_could_bypass_row_level_security_is_refused(empty_database: str) -> None:
    migrate.upgrade(empty_database)
    migrate.downgrade(empty_database, "0002")
    run(empty_database, "ALTER ROLE kestra_system BYPASSRLS")
    try:
        with pytest.raises(MigrationError, match="ALTER ROLE kestra_system NOSUPERUSER NOBYPASSRLS;"):
            migrate.upgrade(empty_database)
    finally:
        run(empty_database, "ALTER ROLE kestra_system NOBYPASSRLS")
    migrate.upgrade(empty_database)


# --- migrations by a role that is no superuser ------------------------------------------------------------------------


@contextmanager
def owner(url: str, *attributes: str) -> Iterator[str]:
    """The URL of the database for a new role that owns it and everything in it, and is no superuser."""
    name, password = f"kestra_test_owner_{secrets.token_hex(6)}", secrets.token_hex(8)
    run(url, f"CREATE ROLE {name} LOGIN PASSWORD '{password}' {' '.join(attributes)}")
    database = one(url, "SELECT current_database()")
    run(url, f"ALTER DATABASE {database} OWNER TO {name}")
    for (table,) in rows(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        run(url, f"ALTER TABLE {table} OWNER TO {name}")
    try:
        yield with_login(url, name, password)
    finally:
        run(url, f"ALTER DATABASE {database} OWNER TO CURRENT_USER; DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


@pytest.fixture
def roles(empty_database: str) -> None:
    """The two roles exist on this server, as after any upgrade."""
    migrate.upgrade(empty_database)
    run(empty_database, "DROP SCHEMA public CASCADE; CREATE SCHEMA public AUTHORIZATION pg_database_owner")
    run(empty_database, "GRANT USAGE ON SCHEMA public TO PUBLIC")


@contextmanager
def roles_hidden(url: str) -> Iterator[None]:
    """A server without the two roles: they have other names meanwhile."""
    names = ("kestra_tenant", "kestra_system")
    for name in names:
        run(url, f"ALTER ROLE {name} RENAME TO {name}_away")
    try:
        yield
    finally:
        for name in names:
            run(url, f"DROP ROLE IF EXISTS {name}")
            run(url, f"ALTER ROLE {name}_away RENAME TO {name}")


def version(url: str) -> int:
    return int(one(url, "SELECT current_setting('server_version_num')"))


def switching(url: str) -> str:
    return " WITH INHERIT FALSE, SET TRUE" if version(url) >= 160_000 else ""


@pytest.mark.usefixtures("roles")
def test_an_owner_who_may_not_make_roles_is_given_the_exact_sql_and_it_is_enough(empty_database: str) -> None:
    run(empty_database, DUMP)
    with roles_hidden(empty_database), owner(empty_database) as url:
        migrate.stamp(url, "0001")
        before = every_row(url)
        with pytest.raises(MigrationError, match="CREATE ROLE kestra_tenant NOLOGIN") as stopped:
            migrate.upgrade(url)
        assert migrate.current(url) == "0002"
        script = re.findall(r"^    (.+;)$", str(stopped.value), re.MULTILINE)
        me = one(url, "SELECT current_user")
        assert script[2:4] == [f"GRANT {role} TO {me}{switching(url)};" for role in ("kestra_tenant", "kestra_system")]
        assert script[-1] == (script[3] if switching(url) else f"ALTER ROLE {me} NOINHERIT;")
        run(empty_database, "".join(script))
        migrate.upgrade(url)
        migrate.check(url)
        assert security(url) == rls.declared(Base.metadata)
        assert one(url, "SELECT count(*) FROM chat_messages") == 0, "FORCE holds for the owner"
        migrate.downgrade(url, "0001")
        assert every_row(url) == before
        migrate.upgrade(url)
        run(empty_database, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")


@pytest.mark.usefixtures("roles")
def test_an_owner_who_may_make_roles_makes_them_and_does_not_inherit_them(empty_database: str) -> None:
    run(empty_database, DUMP)
    with roles_hidden(empty_database), owner(empty_database, "CREATEROLE") as url:
        migrate.stamp(url, "0001")
        said = migrate.upgrade(url)
        assert "WARNING" not in said
        made = "SELECT rolcanlogin, rolsuper, rolbypassrls FROM pg_roles WHERE rolname ~ '^kestra_(tenant|system)$'"
        assert rows(url, made) == [(False, False, False)] * 2
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT count(*) FROM chat_messages").fetchone() == (0,)
            connection.execute("SET LOCAL ROLE kestra_system")
            assert connection.execute("SELECT count(*) FROM chat_messages").fetchone() != (0,)
        migrate.downgrade(url, "0001")
        migrate.upgrade(url)
        run(empty_database, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")


@pytest.mark.usefixtures("roles")
def test_an_owner_who_inherits_the_roles_and_cannot_change_that_is_warned(empty_database: str) -> None:
    with owner(empty_database) as url:
        me = one(url, "SELECT current_user")
        run(empty_database, f"GRANT kestra_tenant, kestra_system TO {me}")
        said = migrate.upgrade(url)
        assert f"WARNING: {me} inherits the rights of kestra_tenant and kestra_system" in said
        remedy = said.partition("can end that with: ")[2]
        run(empty_database, remedy)
        with psycopg.connect(url) as connection:
            inherits = "SELECT pg_has_role('kestra_system', 'USAGE')"
            assert connection.execute(inherits).fetchone() == (False,)
        run(empty_database, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
