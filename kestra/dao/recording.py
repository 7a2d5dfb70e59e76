"""The statements that record messages: dedupe, append, and the state of the conversation, by functions of the database.

The functions are made by revision 0006 (docs/adr/0009, docs/adr/0013), and what moves a conversation is said there.
"""

from typing import Any, Final

from sqlalchemy import ARRAY, ColumnClause, Integer, Select, Text, bindparam, column, func, select
from sqlalchemy.sql.functions import Function
from sqlalchemy.types import TypeEngine

from kestra.base import bound_client_id
from kestra.columns import Timestamptz
from kestra.dao.conversations import STATE

_TEXTS: Final = ("chat_id", "role", "content", "media_url", "provider_message_id")
_GIVEN: Final[dict[str, TypeEngine[Any]]] = {name: Text() for name in _TEXTS} | {"sent_at": Timestamptz()}
_NOW: Final = bindparam("now", type_=Timestamptz)


def _rows(function: Function[Any], *columns: ColumnClause[Any]) -> Select[*tuple[Any, ...]]:
    """What the function returns: these columns, and those of the state."""
    return select(*function.table_valued(*columns, *(column(each.name, each.type) for each in STATE)).c)


RECORD: Final = _rows(
    func.kestra_record(*(bindparam(name, type_=kind) for name, kind in _GIVEN.items()), _NOW),
    column("message_id", Integer),
    column("inserted"),
)
"""One message: its id, whether it was inserted, and the state."""

RECORD_MANY: Final = _rows(
    func.kestra_record_many(
        bound_client_id(), *(bindparam(f"{name}s", type_=ARRAY(kind)) for name, kind in _GIVEN.items()), _NOW
    ),
    column("positions"),
    column("ids"),
    column("known"),
)
"""Many messages: for each chat the positions, from 1, and the ids of those that were inserted, and the state.

Each message that was stored before has a row of its own, with its provider's id instead of a position and the state
before, or NULLs where the conversation is not there. One whose duplicate another transaction has committed since the
statement began is in no row.
"""
