"""What the data access layer needs: deduplication, unread messages, pauses, claims, expiring files.

Every column is added empty. What the existing messages say about their conversations (the newest message, the end
customer's last one) is filled in afterwards; whatever was there counts as read. Every step can be run again: after an
interruption the same command goes on where it stopped.

Locks: ACCESS EXCLUSIVE on one table at a time for a moment, nothing is scanned; a scan of `active_conversations` and of
`client_files` to validate a check, an index build CONCURRENTLY, then row locks on 1,000 conversations at a time:
everybody reads and writes meanwhile.
"""
# ruff: noqa: S608 - names in the SQL are constants of this file

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from alembic import op
from sqlalchemy import text

revision: str = "0004"
down_revision: str | Sequence[str] | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

COLUMNS = {
    "active_conversations": (
        ("last_message_id", "INTEGER"),
        ("last_user_message_at", "TIMESTAMPTZ"),
        ("last_user_message_id", "INTEGER"),
        ("last_read_message_id", "INTEGER"),
        ("last_context_message_id", "INTEGER"),
        ("paused_until", "TIMESTAMPTZ"),
        ("claim_token", "UUID"),
        ("claimed_until", "TIMESTAMPTZ"),
    ),
    "chat_messages": (("provider_message_id", "TEXT"),),
    "client_files": (
        ("google_file_expires_at", "TIMESTAMPTZ"),
        ("size_bytes", "BIGINT"),
        ("media_type", "VARCHAR(255)"),
    ),
}

CHECKS = (
    ("active_conversations", "claim", "(claim_token IS NULL) = (claimed_until IS NULL)"),
    ("chat_messages", "provider_message_id", "provider_message_id <> ''"),
    ("client_files", "size_bytes", "size_bytes >= 0"),
)

INDEXES = (
    ("ix_active_conversations_inbox", "", "active_conversations (client_id, status, last_message_at, chat_id)"),
    (
        "ix_active_conversations_unread",
        "",
        (
            "active_conversations (client_id, status, last_message_at, chat_id) "
            "WHERE last_user_message_id > coalesce(last_read_message_id, 0)"
        ),
    ),
    (
        "ix_active_conversations_due",
        "",
        (
            "active_conversations (client_id, followup_stage, last_message_at) "
            "WHERE status = 'active' AND last_role = 'assistant' AND followup_stage < 5"
        ),
    ),
    (
        "uq_chat_messages_provider_message_id",
        "UNIQUE",
        "chat_messages (client_id, provider_message_id) WHERE provider_message_id IS NOT NULL",
    ),
    ("ix_chat_messages_unread", "", "chat_messages (client_id, chat_id, id) WHERE role = 'user'"),
)

REPLACED = (
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
)

CHATS_AT_ONCE = 1000


def _run(statement: str, **parameters: object) -> None:
    op.get_bind().execute(text(statement), parameters)


def _scalar(statement: str, **parameters: object) -> object:
    return op.get_bind().execute(text(statement), parameters).scalar()


@contextmanager
def _concurrently() -> Iterator[None]:
    with op.get_context().autocommit_block():
        yield


def _commit() -> None:
    with op.get_context().autocommit_block():
        pass


def _build(name: str, unique: str, columns: str) -> None:
    """Build an index without blocking writers; what an interrupted run left behind is invalid and goes first."""
    valid = _scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)", name=name)
    if valid is False:
        _run(f"DROP INDEX CONCURRENTLY {name}")
    if valid is not True:
        _run(f"CREATE {unique} INDEX CONCURRENTLY {name} ON {columns}")


def _constraint_exists(table: str, name: str) -> bool:
    found = "SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass(:table) AND conname = :name)"
    return _scalar(found, table=table, name=name) is True


def _add_columns() -> None:
    for table, columns in COLUMNS.items():
        added = [f"ADD COLUMN IF NOT EXISTS {name} {kind}" for name, kind in columns]
        checks = [
            f"ADD CONSTRAINT ck_{table}_{name} CHECK ({condition}) NOT VALID"
            for checked, name, condition in CHECKS
            if checked == table and not _constraint_exists(table, f"ck_{table}_{name}")
        ]
        _run(f"ALTER TABLE {table} {', '.join([*added, *checks])}")
        _commit()  # never hold one table's lock while waiting for another's


def _fill_in() -> None:
    """What the messages say about their conversation, for the chats of one client in the order of their chat_id."""
    last: tuple[object, object] | None = None
    while True:
        # Row level security is forced, so the owner of the tables sees no rows.
        _run("SET LOCAL ROLE kestra_system")
        chats = (
            op.get_bind()
            .execute(
                text(f"""
                    WITH chats AS (
                        SELECT client_id, chat_id FROM active_conversations
                        {"" if last is None else "WHERE (client_id, chat_id) > (:client_id, :chat_id)"}
                        ORDER BY client_id, chat_id LIMIT {CHATS_AT_ONCE}
                    ), said AS (
                        SELECT chats.client_id, chats.chat_id, max(m.id) AS id,
                               max(m.created_at) FILTER (WHERE m.role = 'user') AS user_at,
                               max(m.id) FILTER (WHERE m.role = 'user') AS user_id,
                               (array_agg(m.id ORDER BY m.created_at DESC, m.id DESC))[1] AS newest_id
                        FROM chats JOIN chat_messages m USING (client_id, chat_id) GROUP BY 1, 2
                    ), filled AS (
                        UPDATE active_conversations c
                        SET last_message_id = said.newest_id, last_user_message_at = said.user_at,
                            last_user_message_id = said.user_id, last_read_message_id = said.id
                        FROM said
                        WHERE c.client_id = said.client_id AND c.chat_id = said.chat_id AND c.last_message_id IS NULL
                    )
                    SELECT client_id, chat_id FROM chats ORDER BY client_id, chat_id
                """),
                {} if last is None else {"client_id": last[0], "chat_id": last[1]},
            )
            .all()
        )
        _commit()  # and with it the role ends
        if not chats:
            return
        last = (chats[-1][0], chats[-1][1])


def upgrade() -> None:
    """Add the columns, build the indexes, fill in what the messages say, then drop the indexes that were replaced."""
    _add_columns()
    with _concurrently():
        for table, name, _ in CHECKS:
            _run(f"ALTER TABLE {table} VALIDATE CONSTRAINT ck_{table}_{name}")
        for index in INDEXES:
            _build(*index)
    _fill_in()
    with _concurrently():
        for name, _, _ in REPLACED:
            _run(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")


def downgrade() -> None:
    """Take the columns and indexes away, and with them claims, pauses, what was read and the ids of providers."""
    with _concurrently():
        for index in REPLACED:
            _build(*index)
        for name, _, _ in INDEXES:
            _run(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
    for table, name, _ in CHECKS:
        _run(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS ck_{table}_{name}")
    for table, columns in COLUMNS.items():
        _run(f"ALTER TABLE {table} {', '.join(f'DROP COLUMN IF EXISTS {name}' for name, _ in columns)}")
