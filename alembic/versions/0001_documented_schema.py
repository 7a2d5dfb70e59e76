"""The documented schema, to the letter.

It is what existing installations have: those are stamped with this revision instead of running it. Hence PostgreSQL's
own constraint names. The foreign key of `active_conversations` is in the document (`client_id PK,FK`), an installation
may lack it, and 0002 copes with both.
"""

from collections.abc import Sequence

from alembic import op
from alembic.util import CommandError

revision: str = "0001"
down_revision: str | Sequence[str] | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TABLES = ("clients", "active_conversations", "chat_messages", "client_files")

SCHEMA = """
CREATE TABLE clients (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    name VARCHAR(255),
    token VARCHAR(255) UNIQUE,
    system_prompt TEXT,
    tools_config JSONB DEFAULT '{}'::jsonb,
    created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE active_conversations (
    chat_id TEXT,
    client_id UUID REFERENCES clients(id),
    status TEXT DEFAULT 'active',
    followup_stage INT DEFAULT 0,
    last_role TEXT,
    last_message_at TIMESTAMP DEFAULT NOW(),
    last_context TEXT,
    PRIMARY KEY (chat_id, client_id)
);
CREATE TABLE chat_messages (
    id SERIAL PRIMARY KEY,
    client_id UUID REFERENCES clients(id),
    chat_id TEXT NOT NULL,
    role TEXT NOT NULL,
    content TEXT,
    media_url TEXT,
    created_at TIMESTAMP WITHOUT TIME ZONE DEFAULT NOW()
);
CREATE INDEX idx_chat_messages_chat_id ON chat_messages(chat_id);
CREATE TABLE client_files (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    client_id UUID REFERENCES clients(id),
    filename VARCHAR(255),
    file_hash VARCHAR(64) UNIQUE,
    google_file_uri VARCHAR(512)
);
"""


def _exists(table: str) -> bool:
    return op.get_bind().exec_driver_sql(f"SELECT to_regclass('{table}') IS NOT NULL").scalar_one() is True


def upgrade() -> None:
    """Create the four tables in an empty database."""
    present = [table for table in TABLES if _exists(table)]
    if present:
        raise CommandError(
            f"This database already has {', '.join(present)}, and Alembic does not know it. An existing installation "
            "is adopted: run `alembic stamp 0001`, then `alembic upgrade head`. Nothing was changed."
        )
    op.get_bind().exec_driver_sql(SCHEMA)


def downgrade() -> None:
    """Drop the four tables, but only when they are empty: no row is ever lost."""
    present = [table for table in (*TABLES, "orphaned_rows") if _exists(table)]
    op.get_bind().exec_driver_sql(f"LOCK TABLE {', '.join(present)} IN ACCESS EXCLUSIVE MODE")
    for table in present:
        if op.get_bind().exec_driver_sql(f"SELECT EXISTS (SELECT FROM {table})").scalar_one():  # noqa: S608 - a constant above
            raise CommandError(
                f"Going below 0001 drops the tables, and {table} still has rows. Nothing was dropped; back up and "
                "empty the tables yourself."
            )
    op.get_bind().exec_driver_sql(f"DROP TABLE {', '.join(reversed(present))}")
