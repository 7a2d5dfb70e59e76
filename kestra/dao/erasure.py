"""Erasure of a whole client: nothing of it is left, and nothing of anybody else is touched.

Programs go on writing for the client meanwhile. They take their locks in either order: whoever records a message has
the conversation first and then, for the foreign key, the client; in the next statement of the same transaction it is
the other way round. No order of ours could be right for both, so nothing is waited for while anything is locked: what
somebody else holds is passed over, and what was locked is given back when it is not enough.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import Final
from uuid import UUID

import psycopg
from sqlalchemy import ColumnElement, Select, Table, Text, bindparam, cast, delete, exists, func, select

from kestra.base import Base, ClientId, parse_client_id, tenant_key
from kestra.dao.tables import CLIENTS, CONVERSATIONS, FILES, MESSAGES, ORPHANED_ROWS
from kestra.errors import ClientInUse, ClientNotFound, ErasureIncomplete, RowsHidden, StatementFailed
from kestra.models import OrphanedRow
from kestra.session import SystemSession, require_system

PATIENCE: Final = timedelta(seconds=10)
"""How long others may go on with what they do for a client that is to be erased."""

_ROUNDS: Final = 50
"""How often an attempt looks for what has become free, before it gives back what it has."""


_COUNTED: Final = {
    "messages": MESSAGES,
    "conversations": CONVERSATIONS,
    "files": FILES,
    "clients": CLIENTS,
    "orphaned": ORPHANED_ROWS,
}


@dataclass(frozen=True, slots=True)
class ErasedClient:
    """How many rows were deleted.

    Attributes:
        messages: Of `chat_messages`.
        conversations: Of `active_conversations`.
        files: Of `client_files`.
        clients: Of `clients`: one.
        orphaned: Of `orphaned_rows`: rows that named this client when an installation was adopted.
        others: Of every other table of clients.
    """

    messages: int
    conversations: int
    files: int
    clients: int
    orphaned: int
    others: int


def erase_client(session: SystemSession, *, client_id: UUID, patience: timedelta = PATIENCE) -> ErasedClient:
    """Erase a client and everything that is its own, in every table that has a tenant key.

    All or nothing, so one transaction: of a client with millions of messages it takes minutes, and its rows are cleared
    away by VACUUM only afterwards. `messages.purge` first makes it short. Whoever writes for the client meanwhile waits
    for the end of the transaction, and then finds no client: `ClientNotFound`.

    Args:
        session: A system session.
        client_id: The client.
        patience: How long to try again while other transactions keep rows of the client locked.

    Raises:
        ClientNotFound: There is no such client.
        ClientInUse: Others kept rows locked for all that time.
        RowsHidden: Row level security is not what it should be, so rows could be there that are not seen.
        ErasureIncomplete: Something is left, such as a trigger keeps. Roll back.
    """
    require_system(session)
    client_id = parse_client_id(client_id)
    _refuse_hidden(session)
    erased = _erase_rows(session, client_id, until=monotonic() + patience.total_seconds())
    given = {"client_id": client_id}
    erased[CLIENTS.name] = _erase_client(session, given)
    _, erased[ORPHANED_ROWS.name] = session.execute(_ERASE_ORPHANED, given).one()
    _refuse_left(session, client_id)
    counts = {name: erased.pop(table.name) for name, table in _COUNTED.items()}
    return ErasedClient(**counts, others=erased.total())


def _erase_rows(session: SystemSession, client_id: UUID, *, until: float) -> Counter[str]:
    """How many rows were deleted of each table of clients, now that nobody can add one: the client is locked.

    Args:
        session: A system session.
        client_id: The client.
        until: When to give up, as `monotonic` counts.
    """
    while True:
        with session.begin_nested() as attempt:
            erased = _attempt(session, client_id)
            if erased is not None:
                return erased
            attempt.rollback()
        if monotonic() > until:
            raise ClientInUse(client_id)
        session.execute(_PAUSE)


def _attempt(session: SystemSession, client_id: UUID) -> Counter[str] | None:
    """As `_erase_rows`; None when others hold too much."""
    given = {"client_id": client_id}
    # Keeps out others who erase the client. New rows, whose foreign key looks for the client, do not wait for this.
    if session.execute(_LOCK, given).first() is None:
        raise ClientNotFound(client_id)
    erased: Counter[str] = Counter()
    for _ in range(_ROUNDS):
        # Messages are never changed, so whoever waits for the client holds none that is to be seen. They come last,
        # when all who write for the client are waiting already, because there are many.
        if _sweep(session, client_id, erased, but=MESSAGES) and session.execute(_LOCK_IF_FREE, given).first():
            return erased if _sweep(session, client_id, erased) else None
        session.execute(_PAUSE)
    return None


def _sweep(session: SystemSession, client_id: UUID, erased: Counter[str], *, but: Table | None = None) -> bool:
    """Delete what nobody holds, those who refer to others first; whether no row is left to be seen.

    Args:
        session: A system session.
        client_id: The client.
        erased: Gets the number of rows by table.
        but: A table to be left alone.
    """
    given = {"client_id": client_id}
    for table, criterion in _owned().items():
        if table is but:
            continue
        free, gone = session.execute(_erase(table, criterion), given).one()
        if gone < free:
            raise ErasureIncomplete(f"the client {client_id} in {table.name}", left=free - gone)
        erased[table.name] += gone
        # What is held stops it here: the rows that it refers to could not be deleted without waiting.
        if session.execute(select(exists().where(criterion)), given).scalar_one():
            return False
    return True


def _erase_client(session: SystemSession, given: Mapping[str, UUID]) -> int:
    try:
        _, gone = session.execute(_erase(CLIENTS, _IS_CLIENT), given).one()
    except ClientNotFound as error:
        # What a foreign key without its client is called. Here the key is of a table that the models do not have.
        cause = error.__cause__
        table = cause.diag.table_name if isinstance(cause, psycopg.Error) else None
        raise StatementFailed(
            f"The table {table}, which is not one of the models, refers to the client. Nothing was erased.",
            sqlstate="23503",
        ) from cause
    return gone


def _refuse_hidden(session: SystemSession) -> None:
    """Raise when a policy could hide rows from a system session."""
    from kestra import rls  # noqa: PLC0415 - Alembic: who does not need it does not wait for it

    if findings := rls.hiding(session.connection(), Base.metadata):
        raise RowsHidden(findings)


def _refuse_left(session: SystemSession, client_id: UUID) -> None:
    """Raise when a row of the client is still there."""
    for table, criterion in (_owned() | {CLIENTS: _IS_CLIENT, ORPHANED_ROWS: _NAMES_CLIENT}).items():
        left = session.execute(
            select(func.count()).select_from(table).where(criterion), {"client_id": client_id}
        ).scalar_one()
        if left:
            raise ErasureIncomplete(f"the client {client_id} in {table.name}", left=left)


_CLIENT_ID: Final = bindparam("client_id", type_=ClientId())
_IS_CLIENT: Final = CLIENTS.c.id == _CLIENT_ID
_NAMES_CLIENT: Final = OrphanedRow.row["client_id"].astext == cast(_CLIENT_ID, Text)


def _owned() -> dict[Table, ColumnElement[bool]]:
    """Every table of clients and which of its rows are the client's, those who refer to others first."""
    tables = ((table, tenant_key(table)) for table in reversed(Base.metadata.sorted_tables) if table is not CLIENTS)
    return {table: key == _CLIENT_ID for table, key in tables if key is not None}


def _erase(table: Table, criterion: ColumnElement[bool]) -> Select[int, int]:
    """Delete the rows that nobody holds: how many these are, and how many are gone."""
    keys = [*table.primary_key.columns]
    free = select(*keys).where(criterion).with_for_update(skip_locked=True).cte("free")
    gone = delete(table).where(criterion, *(key == free.c[key.name] for key in keys)).returning(*keys).cte("gone")
    return select(
        select(func.count()).select_from(free).scalar_subquery().label("free"),
        select(func.count()).select_from(gone).scalar_subquery().label("gone"),
    )


_ERASE_ORPHANED: Final = _erase(ORPHANED_ROWS, _NAMES_CLIENT)

_LOCK: Final = select(CLIENTS.c.id).where(_IS_CLIENT).with_for_update(key_share=True)
_LOCK_IF_FREE: Final = select(CLIENTS.c.id).where(_IS_CLIENT).with_for_update(skip_locked=True)
_PAUSE: Final = select(func.pg_sleep(0.005))
