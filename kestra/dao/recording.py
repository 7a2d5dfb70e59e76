"""The statements that record messages: dedupe, append, and the state of the conversation, in one (docs/adr/0007).

One message is recorded by a function of the database (revision 0005, docs/adr/0009), many by a statement. Its order of
what happens is by the data that flows between the parts: the lock on the chat comes before the id is drawn, the message
before the conversation. `known` reads what was committed when the statement began; whatever is committed later is met
by the two unique keys.
"""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    CTE,
    Boolean,
    ColumnClause,
    ColumnElement,
    CompoundSelect,
    Integer,
    Select,
    Text,
    bindparam,
    case,
    column,
    false,
    func,
    null,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by, array, insert

from kestra.base import bound_client_id
from kestra.columns import Timestamptz
from kestra.dao.conversations import STATE
from kestra.dao.locking import lock_key
from kestra.dao.tables import CONVERSATIONS, MESSAGES

_STORED: Final = ("chat_id", "role", "content", "media_url", "provider_message_id")
_GIVEN: Final = {name: Text() for name in _STORED} | {"sent_at": Timestamptz()}


def _sent_at(sent_at: ColumnElement[Any]) -> ColumnElement[Any]:
    now = func.coalesce(bindparam("now", type_=Timestamptz), func.clock_timestamp(), type_=Timestamptz)
    return func.least(sent_at, now, type_=Timestamptz)


def _append(columns: Sequence[str], new: Select[*tuple[Any, ...]]) -> CTE:
    """The messages that were not there yet, with their ids."""
    added = insert(MESSAGES).from_select([MESSAGES.c[name] for name in columns], new)
    added = added.on_conflict_do_nothing(
        index_elements=[MESSAGES.c.client_id, MESSAGES.c.provider_message_id],
        index_where=MESSAGES.c.provider_message_id.is_not(None),
    )
    return added.returning(MESSAGES.c.id, MESSAGES.c.chat_id, MESSAGES.c.role, MESSAGES.c.created_at).cte("added")


def _bring_up_to_date(newest: Select[*tuple[Any, ...]]) -> CTE:
    """The conversations after these messages, one row for each chat: its newest message, the end customer's newest."""
    upsert = insert(CONVERSATIONS).from_select([CONVERSATIONS.c[name] for name in _MOVED], newest)
    old, new = CONVERSATIONS.c, upsert.excluded
    is_newest = tuple_(new.last_message_at, new.last_message_id) > tuple_(
        old.last_message_at, func.coalesce(old.last_message_id, 0)
    )
    user_spoke = new.last_user_message_at >= func.coalesce(old.last_user_message_at, new.last_user_message_at)
    upsert = upsert.on_conflict_do_update(
        index_elements=[old.chat_id, old.client_id],
        set_={
            "last_role": case((is_newest, new.last_role), else_=old.last_role),
            "last_message_id": case((is_newest, new.last_message_id), else_=old.last_message_id),
            **{name: func.greatest(old[name], new[name]) for name in ("last_message_at", *_LAST_OF_USER)},
            "status": case((user_spoke, "active"), else_=old.status),
            "followup_stage": case((user_spoke, 0), else_=old.followup_stage),
            "claim_token": case((user_spoke, null()), else_=old.claim_token),
            "claimed_until": case((user_spoke, null()), else_=old.claimed_until),
        },
    )
    return upsert.returning(*STATE).cte("state")


_LAST_OF_USER: Final = ("last_user_message_at", "last_user_message_id")
_MOVED: Final = ("client_id", "chat_id", "last_message_at", "last_message_id", "last_role", *_LAST_OF_USER)


def _record() -> Select[*tuple[Any, ...]]:
    """One message: its id, whether it was inserted, and the columns of the state."""
    given = (bindparam(name, type_=kind) for name, kind in (_GIVEN | {"now": Timestamptz()}).items())
    recorded = func.kestra_record(*given).table_valued(
        column("message_id", Integer), column("inserted", Boolean), *(column(each.name, each.type) for each in STATE)
    )
    return select(*recorded.c)


def _record_many() -> CompoundSelect[Any]:
    """Many messages: for each chat their positions, from 1, their ids, whether they were inserted, and the state.

    Each message that was stored before has a row of its own, with the state before, or NULLs where the conversation is
    not there. One whose duplicate another transaction has committed since the statement began is in no row.

    Chats are locked in one order, ids of providers and conversations are written in one order, so that no two batches
    wait for each other.
    """
    arrays = func.unnest(*(bindparam(f"{name}s", type_=ARRAY(kind)) for name, kind in _GIVEN.items()))
    parts: list[ColumnClause[Any]] = [column(name, kind) for name, kind in _GIVEN.items()]
    messages = arrays.table_valued(*parts, with_ordinality="position", name="messages").render_derived()
    given = select(*messages.c).cte("given")
    known = (
        select(given.c.position, MESSAGES.c.id, MESSAGES.c.chat_id)
        .join(given, MESSAGES.c.provider_message_id == given.c.provider_message_id)
        .cte("known")
    )
    keys = select(lock_key(given.c.chat_id).label("key")).distinct().order_by("key").subquery("keys")
    locked = select(func.pg_advisory_xact_lock(keys.c.key).label("lock")).cte("locked")
    # An ordered sub-query stays one, so the ids are drawn in its order, when every chat is locked.
    in_order = (
        select(given.c.position, *(given.c[name] for name in _STORED), _sent_at(given.c.sent_at).label("created_at"))
        .where(
            select(func.count()).select_from(locked).scalar_subquery() > 0,
            given.c.position.not_in(select(known.c.position)),
        )
        .order_by("created_at", given.c.position)
        .subquery("in_order")
    )
    fresh = select(func.nextval("chat_messages_id_seq", type_=Integer).label("id"), *in_order.c).cte("fresh")
    added = _append(
        ("client_id", "id", *_STORED, "created_at"),
        select(bound_client_id(), fresh.c.id, *(fresh.c[name] for name in _STORED), fresh.c.created_at).order_by(
            fresh.c.provider_message_id
        ),
    )
    by_user = added.c.role == "user"
    chats = (  # ids follow the times, so the newest message of a chat has its greatest id
        select(
            added.c.chat_id,
            func.array_agg(fresh.c.position).label("positions"),
            func.array_agg(added.c.id).label("ids"),
            func.max(added.c.created_at).label("last_message_at"),
            func.max(added.c.id).label("last_message_id"),
            func.array_agg(aggregate_order_by(added.c.role, added.c.id.desc()), type_=ARRAY(Text))[1].label(
                "last_role"
            ),
            func.max(added.c.created_at).filter(by_user).label("last_user_message_at"),
            func.max(added.c.id).filter(by_user).label("last_user_message_id"),
        )
        .join(fresh, fresh.c.id == added.c.id)
        .group_by(added.c.chat_id)
        .order_by(added.c.chat_id)
        .cte("chats")
    )
    state = _bring_up_to_date(select(bound_client_id(), *(chats.c[name] for name in _MOVED if name != "client_id")))
    return union_all(
        select(chats.c.positions, chats.c.ids, true(), *state.c).join(state, state.c.chat_id == chats.c.chat_id),
        select(array([known.c.position]), array([known.c.id]), false(), *STATE).select_from(
            known.outerjoin(CONVERSATIONS, CONVERSATIONS.c.chat_id == known.c.chat_id)
        ),
    )


RECORD: Final = _record()
RECORD_MANY: Final = _record_many()
