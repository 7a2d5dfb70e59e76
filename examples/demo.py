"""Adopt an existing installation, look at two clients side by side, then try to get from one to the other.

Run by `make demo`. Without KESTRA_DATABASE_URL it uses a database of its own on the embedded PostgreSQL; a second run
finds everything done. It exits with 1 when an attempt was not stopped.
"""

import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten

import psycopg
from sqlalchemy import func, select, text

from kestra import ActiveConversation, ChatMessage, Client, Database, KestraError, Settings, migrate
from kestra.embedded import resolve_url, start
from kestra.errors import CrossTenantWrite, UnscopedStatement

INSTALLATION = Path(__file__).with_name("existing_installation.sql")
MARK = "Made by examples/demo.py"


@dataclass(frozen=True)
class Shared:
    """A person who talks to two clients: one chat_id, two conversations."""

    chat_id: str
    mine: Client
    other: Client


def main() -> int:
    """Adopt, show, attempt."""
    settings = Settings()
    url = resolve_url(settings) if settings.database_url else start(settings.data_dir, database="kestra_demo")
    adopt(url)
    with Database(url) as db:
        shared = find_shared(db)
        show_side_by_side(db, shared)
        print(f"\nNow a session of {shared.mine.name} tries to reach {shared.other.name}:")
        all_stopped = True
        for attempt in (read_other_client, write_for_other_client, read_with_raw_sql, read_with_marked_sql):
            how = attempt(db, shared)
            print(f"\n  {attempt.__doc__}\n    {f'stopped: {how}' if how else 'NOT STOPPED'}")
            all_stopped = all_stopped and how is not None
    return 0 if all_stopped else 1


def adopt(url: str) -> None:
    """Load the installation as it was found, say that it is the documented schema, and upgrade it."""
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT to_regclass('clients'), obj_description(to_regclass('clients'))").fetchone()
        if row == (None, None):
            connection.execute(INSTALLATION.read_bytes())
            connection.execute(f"COMMENT ON TABLE clients IS '{MARK}'".encode())
        elif row is None or row[1] != MARK:
            raise KestraError("This database has tables that the demo did not make. Give it an empty one.")
    if migrate.current(url) is None:
        migrate.stamp(url, "0001")
    print(migrate.upgrade(url) or f"The installation was adopted before; it is at revision {migrate.current(url)}.")


def find_shared(db: Database) -> Shared:
    """Somebody who talks to more than one client. Only a system session sees that."""
    with db.system_session(reason="demo: find an end customer of two clients") as session:
        per_chat = select(ActiveConversation.chat_id).group_by(ActiveConversation.chat_id)
        chat_id = session.scalars(per_chat.having(func.count() > 1).order_by(ActiveConversation.chat_id)).first()
        talks_to = select(Client).join(Client.conversations).where(ActiveConversation.chat_id == chat_id)
        mine, other = session.scalars(talks_to.order_by(Client.name).limit(2))
    return Shared(str(chat_id), mine, other)


def show_side_by_side(db: Database, shared: Shared) -> None:
    """The newest messages of one chat_id, in a session of each client."""
    columns = []
    for client in (shared.mine, shared.other):
        with db.tenant_session(client.id) as session:  # no client_id in the query: the session adds it
            of_chat = select(ChatMessage).where(ChatMessage.chat_id == shared.chat_id)
            messages = session.scalars(of_chat.order_by(ChatMessage.created_at)).all()
        lines = [f"{m.created_at:%d %b %H:%M} {m.role}: {m.content or m.media_url}" for m in messages[-4:]]
        columns.append([client.name, f"{len(messages)} messages", "-" * 56, *lines])
    print(f"\nThe same person, chat_id {shared.chat_id}, as each client sees it:\n")
    for row in zip_longest(*columns, fillvalue=""):
        print("  " + " | ".join(f"{shorten(cell, 56, placeholder='…'):56}" for cell in row))


def read_other_client(db: Database, shared: Shared) -> str | None:
    """A cross-tenant read."""
    with db.tenant_session(shared.mine.id) as session:
        rows = session.scalars(select(ChatMessage).where(ChatMessage.client_id == shared.other.id)).all()
        found = session.get(ActiveConversation, (shared.chat_id, shared.other.id))
    return None if rows or found else "0 rows for WHERE client_id = <the other>, None for get()"


def write_for_other_client(db: Database, shared: Shared) -> str | None:
    """A cross-tenant write."""
    try:
        with db.tenant_session(shared.mine.id) as session:
            session.add(ChatMessage(client_id=shared.other.id, chat_id=shared.chat_id, role="user", content="oi"))
    except CrossTenantWrite as error:
        return f"CrossTenantWrite: {error}"
    return None


def read_with_raw_sql(db: Database, shared: Shared) -> str | None:
    """A raw SQL read."""
    try:
        with db.tenant_session(shared.mine.id) as session:
            session.execute(text("SELECT * FROM chat_messages"))
    except UnscopedStatement as error:
        return f"UnscopedStatement: {error}"
    return None


def read_with_marked_sql(db: Database, shared: Shared) -> str | None:
    """The same SQL, marked as meant: the database alone stands in its way."""
    marked = text("SELECT client_id, current_user FROM chat_messages").execution_options(kestra_raw_sql=True)
    with db.tenant_session(shared.mine.id) as session:
        rows = session.execute(marked).all()
    owners = {row[0] for row in rows}
    return f"{len(rows)} rows, all its own: row level security for {rows[0][1]}" if owners == {shared.mine.id} else None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KestraError as error:
        sys.exit(f"demo: {error}")
