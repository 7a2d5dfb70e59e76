"""The lock on a chat (ADR 7): who draws ids for it or changes its conversation has it first, and rows afterwards."""

from sqlalchemy import BigInteger, ColumnElement, Text, cast, func, select

from kestra.base import bound_client_id


def lock_key(chat_id: ColumnElement[str]) -> ColumnElement[int]:
    """The key of the advisory lock on a chat of the session's client."""
    return func.hashtextextended(cast(bound_client_id(), Text) + chat_id, 0, type_=BigInteger)


def chat_locked(chat_id: ColumnElement[str]) -> ColumnElement[bool]:
    """A criterion that holds, and for which PostgreSQL has to lock the chat until the transaction ends.

    It depends on no row, so that it is evaluated before any row is locked.
    """
    locked = select(func.pg_advisory_xact_lock(lock_key(chat_id)).label("lock")).cte("locked")
    return select(func.count()).select_from(locked).scalar_subquery() > 0
