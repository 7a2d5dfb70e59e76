"""A strong schema, and the adoption of existing data.

Every phase of the upgrade is committed before the next one starts, and can be run again: after an interruption
(lock_timeout, a killed process) the same command goes on where it stopped. docs/migrations.md has the table of locks.

1. Look for rows that only a person can decide about; stop before anything is changed when there are any.
2. Clean while the application writes: row locks only.
3. Build the unique index of file_hash per client, CONCURRENTLY. The old global key still holds meanwhile.
4. Lock the four tables, clean what came in since, convert the timestamps, add every constraint NOT VALID. From here
   on nobody can write a dirty row. Only a time zone other than UTC rewrites tables here.
5. Validate the constraints and set NOT NULL: scans that block nobody, then a moment's lock.
6. Build the other indexes CONCURRENTLY, then make two of them the primary keys in a moment's lock.

No row is ever lost. A row that no client owns moves to `orphaned_rows`, as it was before anything was converted.
The time zone is kept in the comment of a constraint (`alembic check` does not compare those), for the downgrade.
"""
# ruff: noqa: S608 - names and conditions in the SQL are constants of this file

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from alembic import op
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

revision: str = "0002"
down_revision: str | Sequence[str] | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TABLES = ("clients", "active_conversations", "chat_messages", "client_files")
TENANT_TABLES = TABLES[1:]

TIMESTAMPS = (("clients", "created_at"), ("active_conversations", "last_message_at"), ("chat_messages", "created_at"))

NOT_NULL = (
    ("clients", "name"),
    ("clients", "token"),
    ("clients", "tools_config"),
    ("clients", "created_at"),
    ("active_conversations", "status"),
    ("active_conversations", "followup_stage"),
    ("active_conversations", "last_message_at"),
    ("chat_messages", "client_id"),
    ("chat_messages", "created_at"),
    ("client_files", "client_id"),
)

CHECKS = (
    ("clients", "token_not_blank", "token <> ''"),
    ("clients", "tools_config_is_object", "jsonb_typeof(tools_config) = 'object'"),
    ("active_conversations", "status", "status IN ('active', 'finished')"),
    ("active_conversations", "followup_stage", "followup_stage BETWEEN 0 AND 5"),
    ("active_conversations", "last_role", "last_role IN ('user', 'assistant', 'system')"),
    ("chat_messages", "role", "role IN ('user', 'assistant', 'system')"),
    ("chat_messages", "content_or_media", "coalesce(content, '') <> '' OR coalesce(media_url, '') <> ''"),
    ("client_files", "file_hash_lower", "file_hash = lower(file_hash)"),
)
NEVER_VALIDATED = "ck_chat_messages_content_or_media"
"""It binds new messages; old ones with neither content nor media stay."""

RENAMED = (
    ("clients", "clients_pkey", "pk_clients"),
    ("clients", "clients_token_key", "uq_clients_token"),
    ("active_conversations", "active_conversations_pkey", "pk_active_conversations"),
)

FILE_HASH_INDEX = ("uq_client_files_client_id_file_hash", "UNIQUE", "client_files (client_id, file_hash)")
INDEXES = (
    ("pk_chat_messages", "UNIQUE", "chat_messages (client_id, id)"),
    ("pk_client_files", "UNIQUE", "client_files (client_id, id)"),
    (
        "ix_active_conversations_client_id_last_message_at_chat_id",
        "",
        "active_conversations (client_id, last_message_at, chat_id)",
    ),
    (
        "ix_active_conversations_followup_due",
        "",
        (
            "active_conversations (client_id, last_message_at) "
            "WHERE status = 'active' AND last_role = 'assistant' AND followup_stage < 5"
        ),
    ),
    ("ix_chat_messages_client_id_chat_id_created_at_id", "", "chat_messages (client_id, chat_id, created_at, id)"),
)

LOCK_NOT_AVAILABLE = "55P03"

# --- reasons in orphaned_rows -----------------------------------------------------------------------------------------

UNKNOWN_CLIENT = "client_id is not the id of any client"
NO_CLIENT = "client_id is NULL"
AMBIGUOUS_CLIENT = "client_id is NULL, and not exactly one client has a conversation with this chat_id"
SAME_HASH = "the same client has another file with this file_hash, in upper or lower case"
SHARED_HASH = "downgrade to 0001: another client has a file with this file_hash"
SHARED_ID = "downgrade to 0001: another client has a row with this id"

# --- who owns a row ---------------------------------------------------------------------------------------------------


def _owned(alias: str) -> str:
    return f"EXISTS (SELECT FROM clients k WHERE k.id = {alias}.client_id)"


CONVERSATIONS_OF_CHAT = (
    "(SELECT count(*) FROM active_conversations c JOIN clients k ON k.id = c.client_id WHERE c.chat_id = m.chat_id)"
)
MESSAGE_HAS_OWNER = f"({_owned('m')} OR m.client_id IS NULL AND {CONVERSATIONS_OF_CHAT} = 1)"


# --- the catalog ------------------------------------------------------------------------------------------------------


def _run(statement: str, **parameters: object) -> int:
    return op.get_bind().execute(text(statement), parameters).rowcount


def _scalar(statement: str, **parameters: object) -> object:
    return op.get_bind().execute(text(statement), parameters).scalar()


def _constraint_exists(table: str, name: str) -> bool:
    found = "SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass(:table) AND conname = :name)"
    return _scalar(found, table=table, name=name) is True


def _is_converted() -> bool:
    """Whether phase 4 has been committed."""
    column = (
        "SELECT atttypid = 'timestamptz'::regtype FROM pg_attribute "
        "WHERE attrelid = to_regclass('chat_messages') AND attname = 'created_at'"
    )
    return _scalar(column) is True


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


@contextmanager
def _concurrently() -> Iterator[None]:
    with op.get_context().autocommit_block():
        yield


def _commit() -> None:
    with op.get_context().autocommit_block():
        pass


def _lock(*tables: str) -> None:
    """Lock all of them, or none: a writer that has one may wait for another, and PostgreSQL would end one of the two.

    So a wait ends before PostgreSQL looks for such circles (`deadlock_timeout`), and begins again with another table:
    programs write the tables in different orders.
    """
    patience = _scalar("SELECT extract(epoch FROM current_setting('lock_timeout')::interval)::float")
    deadline = time.monotonic() + (float(str(patience)) or math.inf)
    for turn in itertools.count():
        first = turn % len(tables)
        try:
            with op.get_bind().begin_nested():
                _run("SET LOCAL lock_timeout = '300ms'")
                _run(f"LOCK TABLE {', '.join((*tables[first:], *tables[:first]))} IN ACCESS EXCLUSIVE MODE")
                _run("SELECT set_config('lock_timeout', :patience, true)", patience=f"{patience}s")
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE or time.monotonic() > deadline:
                raise
        else:
            return


# --- time zones -------------------------------------------------------------------------------------------------------


def _known_zone(name: str) -> str:
    known = _scalar("SELECT name FROM pg_timezone_names WHERE lower(name) = lower(:name)", name=name)
    if not isinstance(known, str):
        raise CommandError(
            f"{name!r} is not a time zone that PostgreSQL knows. Use a name from pg_timezone_names, such as "
            "-x timezone=America/Sao_Paulo. Nothing was changed."
        )
    return known


def _requested_zone() -> str | None:
    name = op.get_context().opts.get("timezone")
    return None if name is None else _known_zone(str(name))


def _remembered_zone() -> str:
    comment = _scalar(
        "SELECT obj_description(oid, 'pg_constraint') FROM pg_constraint "
        "WHERE conrelid = to_regclass('orphaned_rows') AND conname = 'pk_orphaned_rows'"
    )
    return comment.removeprefix("timezone=") if isinstance(comment, str) else "UTC"


def _convert_timestamps(to: str, zone: str) -> None:
    """Without USING: PostgreSQL then converts in the session's zone, and rewrites nothing when that is UTC."""
    _run("SELECT set_config('timezone', :zone, true)", zone=zone)
    for table, column in TIMESTAMPS:
        _run(f"ALTER TABLE {table} ALTER {column} TYPE {to}")


# --- rows that only a person can decide about -------------------------------------------------------------------------


def _undecidable(zone: str) -> Iterator[tuple[str, str]]:
    """What it is, and the query that shows the rows. Rows that will move to orphaned_rows are not asked about."""
    yield "clients without a name", "SELECT id FROM clients WHERE name IS NULL"
    yield "clients without a token", "SELECT id FROM clients WHERE token IS NULL OR token = ''"
    yield "clients without created_at", "SELECT id FROM clients WHERE created_at IS NULL"
    yield (
        "conversations with an unknown status",
        (
            "SELECT c.chat_id, c.client_id, c.status FROM active_conversations c "
            f"WHERE c.status NOT IN ('active', 'finished') AND {_owned('c')}"
        ),
    )
    yield (
        "conversations with an unknown last_role",
        (
            "SELECT c.chat_id, c.client_id, c.last_role FROM active_conversations c "
            f"WHERE c.last_role NOT IN ('user', 'assistant', 'system', 'ai') AND {_owned('c')}"
        ),
    )
    yield (
        "conversations without last_message_at and without a message",
        (
            "SELECT v.chat_id, v.client_id FROM active_conversations v "
            f"WHERE v.last_message_at IS NULL AND {_owned('v')} AND NOT EXISTS ("
            "SELECT FROM chat_messages m WHERE m.chat_id = v.chat_id AND m.created_at IS NOT NULL "
            f"AND (m.client_id = v.client_id OR m.client_id IS NULL AND {CONVERSATIONS_OF_CHAT} = 1))"
        ),
    )
    yield (
        "messages with an unknown role",
        (
            "SELECT m.id, m.client_id, m.chat_id, m.role FROM chat_messages m "
            f"WHERE m.role NOT IN ('user', 'assistant', 'system', 'ai') AND {MESSAGE_HAS_OWNER}"
        ),
    )
    yield (
        "messages without created_at",
        f"SELECT m.id, m.client_id, m.chat_id FROM chat_messages m WHERE m.created_at IS NULL AND {MESSAGE_HAS_OWNER}",
    )
    if zone == "UTC":
        return
    for table, column in TIMESTAMPS:
        # Set forward over it, the clock never showed this time: the row was not written in this zone.
        there_and_back = f"{column} AT TIME ZONE {_quoted(zone)} AT TIME ZONE {_quoted(zone)}"
        keys = "chat_id, client_id" if table == "active_conversations" else "id"
        yield (
            f"{table} whose {column} does not exist in {zone} (the clock was set forward over it)",
            f"SELECT {keys}, {column} FROM {table} WHERE {there_and_back} <> {column}",
        )


def _stop_at_undecidable_rows(zone: str, changed: str) -> None:
    found = []
    for kind, query in _undecidable(zone):
        count = _scalar(f"SELECT count(*) FROM ({query}) AS rows")
        if count:
            found.append(f"{count} {kind}:\n    {query};")
    if found:
        raise CommandError(
            f"Revision 0002 stopped: a person has to decide about these rows. {changed}\n\n"
            + "\n\n".join(found)
            + "\n\nCorrect them, then run the same command again."
        )


# --- cleaning ---------------------------------------------------------------------------------------------------------


def _create_orphaned_rows() -> None:
    if _scalar("SELECT to_regclass('orphaned_rows') IS NULL"):
        _run("""
            CREATE TABLE orphaned_rows (
                id BIGINT GENERATED ALWAYS AS IDENTITY,
                table_name TEXT NOT NULL,
                "row" JSONB NOT NULL,
                reason TEXT NOT NULL,
                moved_at TIMESTAMPTZ NOT NULL DEFAULT now(),
                CONSTRAINT pk_orphaned_rows PRIMARY KEY (id)
            )
        """)


def _move(table: str, condition: str, reason: str) -> int:
    """Move rows, whole, to orphaned_rows. The alias of the table is `r`."""
    return _run(
        f"""
        WITH moved AS (DELETE FROM {table} r WHERE {condition} RETURNING to_jsonb(r) AS whole)
        INSERT INTO orphaned_rows (table_name, "row", reason) SELECT '{table}', whole, :reason FROM moved
        """,
        reason=reason,
    )


def _clean(done: Counter[str]) -> None:
    """Give rows to their clients, move the rest, correct the values. Finding nothing to do, it changes nothing."""
    unknown = f"r.client_id IS NOT NULL AND NOT {_owned('r')}"
    done["conversations of an unknown client → orphaned_rows"] += _move("active_conversations", unknown, UNKNOWN_CLIENT)
    done["messages without client_id → the one client with a conversation of that chat_id"] += _run("""
        UPDATE chat_messages m SET client_id = owner.client_id
        FROM (
            SELECT c.chat_id, (array_agg(c.client_id))[1] AS client_id
            FROM active_conversations c JOIN clients k ON k.id = c.client_id
            WHERE c.chat_id IN (SELECT chat_id FROM chat_messages WHERE client_id IS NULL)
            GROUP BY c.chat_id HAVING count(*) = 1
        ) AS owner
        WHERE m.client_id IS NULL AND m.chat_id = owner.chat_id
    """)
    done["messages without an owner → orphaned_rows"] += _move("chat_messages", "r.client_id IS NULL", AMBIGUOUS_CLIENT)
    done["messages of an unknown client → orphaned_rows"] += _move("chat_messages", unknown, UNKNOWN_CLIENT)
    done["files without client_id → orphaned_rows"] += _move("client_files", "r.client_id IS NULL", NO_CLIENT)
    done["files of an unknown client → orphaned_rows"] += _move("client_files", unknown, UNKNOWN_CLIENT)
    # Of the files of one client with one hash, the one with a URI stays, then the one with the smallest id.
    done["files whose client has the same hash twice → orphaned_rows"] += _move(
        "client_files",
        "EXISTS (SELECT FROM client_files o WHERE o.client_id = r.client_id "
        "AND lower(o.file_hash) = lower(r.file_hash) "
        "AND (o.google_file_uri IS NULL, o.id) < (r.google_file_uri IS NULL, r.id))",
        SAME_HASH,
    )
    corrections = (
        ("messages: role 'ai' → 'assistant'", "chat_messages", "role = 'assistant'", "role = 'ai'"),
        (
            "conversations: last_role 'ai' → 'assistant'",
            "active_conversations",
            "last_role = 'assistant'",
            "last_role = 'ai'",
        ),
        (
            "conversations: followup_stage NULL → 0",
            "active_conversations",
            "followup_stage = 0",
            "followup_stage IS NULL",
        ),
        (
            "conversations: followup_stage below 0 → 0",
            "active_conversations",
            "followup_stage = 0",
            "followup_stage < 0",
        ),
        (
            "conversations: followup_stage above 5 → 5",
            "active_conversations",
            "followup_stage = 5",
            "followup_stage > 5",
        ),
        ("conversations: status NULL → 'active'", "active_conversations", "status = 'active'", "status IS NULL"),
        (
            'clients: tools_config not an object → {"_legacy": value}',
            "clients",
            "tools_config = jsonb_build_object('_legacy', tools_config)",
            "jsonb_typeof(tools_config) <> 'object'",
        ),
        ("clients: tools_config NULL → {}", "clients", "tools_config = '{}'", "tools_config IS NULL"),
    )
    for kind, table, assignment, condition in corrections:
        done[kind] += _run(f"UPDATE {table} SET {assignment} WHERE {condition}")
    done["conversations: last_message_at NULL → time of the newest message"] += _run("""
        UPDATE active_conversations c SET last_message_at = newest.created_at
        FROM (
            SELECT client_id, chat_id, max(created_at) AS created_at
            FROM chat_messages WHERE created_at IS NOT NULL GROUP BY client_id, chat_id
        ) AS newest
        WHERE c.last_message_at IS NULL AND newest.client_id = c.client_id AND newest.chat_id = c.chat_id
    """)


# --- phases of the upgrade --------------------------------------------------------------------------------------------


def _build(name: str, unique: str, columns: str) -> None:
    """Build an index without blocking writers; what an interrupted run left behind is invalid and goes first."""
    valid = _scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)", name=name)
    if valid is False:
        _run(f"DROP INDEX CONCURRENTLY {name}")
    if valid is not True:
        _run(f"CREATE {unique} INDEX CONCURRENTLY {name} ON {columns}")


def _drop_foreign_keys() -> None:
    found = op.get_bind().execute(
        text("""
            SELECT conrelid::regclass::text, conname FROM pg_constraint
            WHERE contype = 'f' AND confrelid = to_regclass('clients')
              AND conrelid IN ('active_conversations'::regclass, 'chat_messages'::regclass, 'client_files'::regclass)
        """)
    )
    for table, name in found.all():
        _run(f'ALTER TABLE {table} DROP CONSTRAINT "{name}"')


def _not_null_check(table: str, column: str) -> str:
    return f"{table}_{column}_not_null_check"


def _guard(done: Counter[str], zone: str) -> None:
    """Phase 4, under lock: after it every row is clean or was there before as an empty message, and stays so."""
    _lock(*TABLES)
    _stop_at_undecidable_rows(zone, "They came in while the migration ran; what it had cleaned before stays clean.")
    _clean(done)
    _drop_foreign_keys()
    _run("ALTER TABLE client_files DROP CONSTRAINT client_files_file_hash_key")
    name = FILE_HASH_INDEX[0]
    _run(f"ALTER TABLE client_files ADD CONSTRAINT {name} UNIQUE USING INDEX {name}")
    done["files: file_hash → lower case"] += _run(
        "UPDATE client_files SET file_hash = lower(file_hash) WHERE file_hash <> lower(file_hash)"
    )
    _run("""
        SELECT setval('chat_messages_id_seq', newest.id)
        FROM (SELECT max(id) AS id FROM chat_messages) AS newest, chat_messages_id_seq AS s
        WHERE newest.id > s.last_value OR newest.id = s.last_value AND NOT s.is_called
    """)
    _convert_timestamps("timestamptz", zone)
    _run(f"COMMENT ON CONSTRAINT pk_orphaned_rows ON orphaned_rows IS {_quoted('timezone=' + zone)}")
    for table, column in TIMESTAMPS:
        _run(f"ALTER TABLE {table} ALTER {column} SET DEFAULT now()")
    for table, old, new in RENAMED:
        _run(f"ALTER TABLE {table} RENAME CONSTRAINT {old} TO {new}")
    for table, column in NOT_NULL:
        name = _not_null_check(table, column)
        _run(f"ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({column} IS NOT NULL) NOT VALID")
    for table, name, condition in CHECKS:
        _run(f"ALTER TABLE {table} ADD CONSTRAINT ck_{table}_{name} CHECK ({condition}) NOT VALID")
    for table in TENANT_TABLES:
        _run(
            f"ALTER TABLE {table} ADD CONSTRAINT fk_{table}_client_id_clients "
            "FOREIGN KEY (client_id) REFERENCES clients (id) ON DELETE CASCADE NOT VALID"
        )


def _validate() -> None:
    """Phase 5: scan each table under a lock that lets everybody read and write, then set NOT NULL without a scan."""
    names = (
        *((table, _not_null_check(table, column)) for table, column in NOT_NULL),
        *((table, f"ck_{table}_{name}") for table, name, _ in CHECKS),
        *((table, f"fk_{table}_client_id_clients") for table in TENANT_TABLES),
    )
    with _concurrently():
        for table, name in names:
            if name != NEVER_VALIDATED and _constraint_exists(table, name):
                _run(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")
    for table, column in NOT_NULL:
        # Two statements: in one, the check would be dropped before it could prove that there is no NULL.
        _run(f"ALTER TABLE {table} ALTER {column} SET NOT NULL")
        _run(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {_not_null_check(table, column)}")
        _commit()  # never hold one table's lock while waiting for another's


def _swap_primary_keys() -> None:
    """Phase 6: from (id) to (client_id, id). The columns are NOT NULL and the indexes built, so nothing is scanned."""
    for table in ("chat_messages", "client_files"):
        if _constraint_exists(table, f"{table}_pkey"):
            _run(
                f"ALTER TABLE {table} DROP CONSTRAINT {table}_pkey, "
                f"ADD CONSTRAINT pk_{table} PRIMARY KEY USING INDEX pk_{table}"
            )
            _commit()


def _take_back(tables: Sequence[str], reasons: Sequence[str] | None) -> int:
    """Put rows of orphaned_rows back where they came from, each one that the table's constraints accept.

    Args:
        tables: Where to put rows back.
        reasons: Only rows that moved for one of these reasons; all rows when None.
    """
    before = _scalar("SELECT count(*) FROM orphaned_rows")
    chosen = "" if reasons is None else f"AND reason IN ({', '.join(map(_quoted, reasons))})"
    for table in tables:
        _run(f"""
            DO $$
            DECLARE orphan orphaned_rows;
            BEGIN
                FOR orphan IN SELECT * FROM orphaned_rows WHERE table_name = '{table}' {chosen} ORDER BY id LOOP
                    BEGIN
                        INSERT INTO {table} SELECT (jsonb_populate_record(NULL::{table}, orphan."row")).*;
                        DELETE FROM orphaned_rows WHERE id = orphan.id;
                    EXCEPTION WHEN integrity_constraint_violation THEN
                        NULL; -- it does not fit, so it stays
                    END;
                END LOOP;
            END $$
        """)
    after = _scalar("SELECT count(*) FROM orphaned_rows")
    return int(str(before)) - int(str(after))


def _report(title: str, done: Counter[str]) -> None:
    totals = {table: _scalar(f"SELECT count(*) FROM {table}") for table in (*TABLES, "orphaned_rows") if _exists(table)}
    if not any(totals.values()):
        return
    lines = [title]
    lines += [f"  {count:>8}  {kind}" for kind, count in done.items() if count]
    lines += ["  rows now: " + ", ".join(f"{table} {count}" for table, count in totals.items())]
    config = op.get_context().config
    if config is not None:
        config.print_stdout("\n".join(lines))


def _exists(table: str) -> bool:
    return _scalar("SELECT to_regclass(:table) IS NOT NULL", table=table) is True


def upgrade() -> None:
    """Adopt the data of an installation and make the schema strong, phase by phase."""
    zone = _requested_zone() or "UTC"
    done: Counter[str] = Counter()
    if not _is_converted():
        _stop_at_undecidable_rows(zone, "Nothing was changed.")
        _create_orphaned_rows()
        _clean(done)
        with _concurrently():
            _build(*FILE_HASH_INDEX)
        _guard(done, zone)
        _commit()
    _validate()
    with _concurrently():
        for index in INDEXES:
            _build(*index)
    _swap_primary_keys()
    with _concurrently():
        _run("DROP INDEX CONCURRENTLY IF EXISTS idx_chat_messages_chat_id")
    # Timestamps of rows that a downgrade moved are naive, and read like all the others.
    _run("SELECT set_config('timezone', :zone, true)", zone=_remembered_zone())
    done["rows that a downgrade had moved → back in their tables"] += _take_back(
        ("chat_messages", "client_files"), (SHARED_HASH, SHARED_ID)
    )
    _report(f"Revision 0002: timestamps were read in {_remembered_zone()}.", done)


# --- the way back -----------------------------------------------------------------------------------------------------


def downgrade() -> None:
    """Go back to exactly the schema of 0001, in one transaction under lock.

    Values that were corrected stay corrected. What the schema of 0001 cannot hold stays in or goes to orphaned_rows.
    """
    zone = _requested_zone() or _remembered_zone()
    done: Counter[str] = Counter()
    _lock(*TABLES, "orphaned_rows")
    _drop_foreign_keys()
    for table, name, _ in CHECKS:
        _run(f"ALTER TABLE {table} DROP CONSTRAINT ck_{table}_{name}")
    for table in ("chat_messages", "client_files"):
        _run(f"ALTER TABLE {table} DROP CONSTRAINT pk_{table}")
    _run(f"ALTER TABLE client_files DROP CONSTRAINT {FILE_HASH_INDEX[0]}")
    for name, unique, _ in INDEXES:
        if not unique:
            _run(f"DROP INDEX {name}")
    for table, column in NOT_NULL:
        _run(f"ALTER TABLE {table} ALTER {column} DROP NOT NULL")
    _convert_timestamps("timestamp", zone)
    _run("ALTER TABLE clients ALTER created_at SET DEFAULT CURRENT_TIMESTAMP")
    _run("ALTER TABLE active_conversations ALTER last_message_at SET DEFAULT now()")
    _run("ALTER TABLE chat_messages ALTER created_at SET DEFAULT now()")
    for table, old, new in RENAMED:
        _run(f"ALTER TABLE {table} RENAME CONSTRAINT {new} TO {old}")

    for table in ("chat_messages", "client_files"):
        same_id = f"EXISTS (SELECT FROM {table} o WHERE o.id = r.id AND o.client_id < r.client_id)"
        done[f"{table} whose id another client uses → orphaned_rows"] += _move(table, same_id, SHARED_ID)
        _run(f"ALTER TABLE {table} ADD CONSTRAINT {table}_pkey PRIMARY KEY (id)")
    same_hash = "EXISTS (SELECT FROM client_files o WHERE o.file_hash = r.file_hash AND o.client_id < r.client_id)"
    done["files whose hash another client has → orphaned_rows"] += _move("client_files", same_hash, SHARED_HASH)
    _run("ALTER TABLE client_files ADD CONSTRAINT client_files_file_hash_key UNIQUE (file_hash)")
    for table in TENANT_TABLES:
        _run(
            f"ALTER TABLE {table} ADD CONSTRAINT {table}_client_id_fkey FOREIGN KEY (client_id) REFERENCES clients (id)"
        )
    _run("CREATE INDEX idx_chat_messages_chat_id ON chat_messages (chat_id)")

    done["rows of orphaned_rows → back in their tables"] += _take_back(TENANT_TABLES, None)
    _run(f"COMMENT ON CONSTRAINT pk_orphaned_rows ON orphaned_rows IS {_quoted('timezone=' + zone)}")
    if not _scalar("SELECT EXISTS (SELECT FROM orphaned_rows)"):
        _run("DROP TABLE orphaned_rows")
    _report(f"Revision 0002 undone: timestamps are naive again, in {zone}.", done)
