"""Generated installations straight into a database, by COPY, in one transaction: all of it, or nothing.

The user of the URL is a superuser, or owns the tables and their sequence. COPY refuses whom row level security binds,
and it is forced on owners: for one of them it is not forced while the transaction lasts, when nobody else reads.
"""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Final

import psycopg
from psycopg import errors as pg
from psycopg import sql

from kestra import migrate
from kestra.driver import connection_error
from kestra.errors import InvalidValue, KestraError, MigrationError, StatementFailed
from kestra.testing.copying import COLUMNS, Chunk, chunks
from kestra.testing.installation import Installation
from kestra.testing.progress import Progress

_LOCK: Final = 0x6B657374726103
"""The advisory lock of whoever loads: two at once would move the sequence back."""

_COPY: Final = {
    table: sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    for table, columns in COLUMNS.items()
}


def load(url: str, installation: Installation, progress: Progress, *, append: bool = False) -> None:
    """Write the rows of the installation into the database.

    The sequence of the message ids is moved past them at once, so that whoever writes meanwhile draws others.

    Args:
        url: The database, as a superuser or the owner of the tables.
        installation: What is written.
        progress: Is told of every row.
        append: Also into a database that has clients already, if none of these is among them.

    Raises:
        InvalidValue: The installation ends in the future.
        MigrationError: The database is not at head.
        DatabaseUnavailable: It cannot be reached.
        KestraError: It has clients already, or the user lacks the rights. Nothing was written.
    """
    if installation.now > datetime.now(UTC):
        raise InvalidValue("now is in the future, where nothing can have been recorded.")
    found, head = migrate.current(url), migrate.head()
    if found != head:
        raise MigrationError(f"The database is at revision {found}, not at {head}: run `kestra upgrade` first.")
    try:
        connection = psycopg.connect(url, application_name="kestra")
    except psycopg.OperationalError as error:
        raise connection_error(error) from None
    try:
        with connection:
            _load(connection, installation, progress, append=append)
    except pg.InsufficientPrivilege:
        raise KestraError(
            "The user may not load rows by COPY: give the URL of a superuser, or of the owner of the tables. "
            "Nothing was written."
        ) from None
    except pg.UniqueViolation:
        raise KestraError(
            "The database has rows of this installation already: give another seed. Nothing was written."
        ) from None
    except psycopg.Error as error:
        raise StatementFailed(
            f"PostgreSQL refused the rows: {type(error).__name__} ({error.sqlstate or 'no SQLSTATE'}). "
            "Nothing was written.",
            sqlstate=error.sqlstate,
        ) from None


def _load(connection: psycopg.Connection[Any], installation: Installation, progress: Progress, *, append: bool) -> None:
    connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
    forced = [table for table in COLUMNS if _is_bound(connection, table)]
    for table in forced:
        connection.execute(sql.SQL("ALTER TABLE {} NO FORCE ROW LEVEL SECURITY").format(sql.Identifier(table)))
    if not append and connection.execute("SELECT FROM clients LIMIT 1").fetchone() is not None:
        raise KestraError("The database has clients already. Say --append to add to them.")
    with ThreadPoolExecutor(max_workers=1) as ahead:
        source = chunks(installation, first_id=_reserve(connection, installation.count_messages()))
        # While PostgreSQL works on one chunk, the next one is made.
        following = ahead.submit(next, source, None)
        while (chunk := following.result()) is not None:
            following = ahead.submit(next, source, None)
            _copy(connection, chunk)
            progress.advance(chunk.rows)
    for table in forced:
        connection.execute(sql.SQL("ALTER TABLE {} FORCE ROW LEVEL SECURITY").format(sql.Identifier(table)))


def _is_bound(connection: psycopg.Connection[Any], table: str) -> bool:
    """Whether row level security binds the user."""
    return connection.execute("SELECT row_security_active(%s::regclass)", [table]).fetchone() == (True,)


def _reserve(connection: psycopg.Connection[Any], count: int) -> int:
    """The first of so many ids in a row.

    Another session may draw some of them between the two steps: ids are unique for a client, and these are new.
    """
    last = "SELECT setval('chat_messages_id_seq', nextval('chat_messages_id_seq') + %s)"
    row = connection.execute(last, [count - 1]).fetchone()
    return int(row[0]) - count + 1 if row is not None else 1


def _copy(connection: psycopg.Connection[Any], chunk: Chunk) -> None:
    with connection.cursor() as cursor:
        for table, lines in chunk.lines.items():
            if lines:
                with cursor.copy(_COPY[table]) as copy:
                    copy.write("".join(lines))
