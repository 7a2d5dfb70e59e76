"""Messages: what webhooks and assistants store, and what the inbox and the assistants read.

`record` is the hot path: dedupe, append and the conversation's state in one statement (docs/adr/0007).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, get_args

from sqlalchemy import (
    ARRAY,
    CTE,
    BigInteger,
    ColumnClause,
    ColumnElement,
    CompoundSelect,
    Integer,
    Select,
    Table,
    Text,
    bindparam,
    case,
    cast,
    column,
    exists,
    false,
    func,
    null,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import distinct_on, insert

from kestra.base import bound_client_id
from kestra.columns import Timestamptz, check_text
from kestra.dao.conversations import STATE, ConversationState
from kestra.errors import ConversationNotFound, InvalidValue
from kestra.models import ActiveConversation, ChatMessage, Role
from kestra.session import TenantSession, require_tenant

MAX_BATCH: Final = 500
"""The most messages that `record_many` takes: each of their chats is locked until the transaction ends."""

MAX_ID_LENGTH: Final = 512
"""The most characters of a chat_id and of a provider's id. An entry of an index has room for about 2,700 bytes."""

_MESSAGES: Final[Table] = ChatMessage.__table__  # type: ignore[assignment]  # a FromClause in general
_CONVERSATIONS: Final[Table] = ActiveConversation.__table__  # type: ignore[assignment]  # a FromClause in general


@dataclass(frozen=True, slots=True)
class IncomingMessage:
    """A message to be recorded.

    Attributes:
        chat_id: The end customer's chat, opaque: never parsed or normalised.
        role: Who said it.
        content: The text. May be empty only where there is a `media_url`.
        media_url: Where the medium is.
        provider_message_id: The provider's id (`wamid…`), unique for a client. None is never taken for a duplicate.
        sent_at: When it was sent, aware; a time in the future becomes now, and None is now.
    """

    chat_id: str
    role: Role
    content: str | None = field(default=None, repr=False)
    media_url: str | None = field(default=None, repr=False)
    provider_message_id: str | None = None
    sent_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of a message.

    Attributes:
        message_id: Its id; of a duplicate, the id of the message that was there.
        inserted: Whether it was stored. False for a duplicate, which changes nothing.
        conversation: Where the conversation of the stored message stands.
    """

    message_id: int
    inserted: bool
    conversation: ConversationState


def record(
    session: TenantSession,
    *,
    chat_id: str,
    role: Role,
    content: str | None = None,
    media_url: str | None = None,
    provider_message_id: str | None = None,
    sent_at: datetime | None = None,
    now: datetime | None = None,
) -> Recorded:
    """Store a message and bring its conversation up to date, once, however often it is delivered.

    The newest message, by the time it was sent and then by its id, is the conversation's `last_*`; a late one is stored
    in its place and moves nothing back. The end customer's newest message makes the conversation active at stage 0 and
    ends a follow-up worker's claim. A message of the assistant keeps the status, the stage and the claim.

    The chat is locked until the transaction ends, so that whoever sees a message of a chat sees every message of it
    with a smaller id. Of several messages use `record_many`: two transactions that lock chats in opposite order
    would wait for each other.

    Args:
        session: A session of the client.
        chat_id: As `IncomingMessage`, like the other parts of the message.
        role: Who said it.
        content: The text.
        media_url: Where the medium is.
        provider_message_id: The provider's id.
        sent_at: When it was sent.
        now: What counts as now, aware; None is the database's clock.

    Raises:
        InvalidValue: A part of the message cannot be stored.
        ClientNotFound: There is no such client.
    """
    require_tenant(session)
    message = IncomingMessage(chat_id, role, content, media_url, provider_message_id, sent_at)
    check(message)
    given = {"now": now} | {name: getattr(message, name) for name in _GIVEN}
    while True:
        row = session.execute(_RECORD, given).one_or_none()
        if row is not None:
            message_id, inserted, *state = row
            return Recorded(message_id, inserted, _state(state, chat_id))
        # A duplicate that was committed while this statement waited: it was not to be seen. The next statement sees it.


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """What became of a provider's batch.

    Attributes:
        recorded: What became of each message, by its index in the batch.
        rejected: The messages that cannot be stored, by their index, and why.
    """

    recorded: dict[int, Recorded]
    rejected: dict[int, InvalidValue]


def record_many(
    session: TenantSession, *, messages: Sequence[IncomingMessage], now: datetime | None = None
) -> RecordedBatch:
    """`record` for a provider's batch, in whatever order: what can be stored is stored, what cannot is reported.

    Messages get their ids in the order they were sent; of the same time, in the order of the batch. The states that are
    returned are those after the batch.

    Args:
        session: A session of the client.
        messages: At most 500.
        now: As in `record`.

    Raises:
        InvalidValue: There are more than 500 messages.
        ClientNotFound: There is no such client.
    """
    require_tenant(session)
    if len(messages) > MAX_BATCH:
        raise InvalidValue(f"A batch has at most {MAX_BATCH} messages, not {len(messages)}: divide it.")
    rejected: dict[int, InvalidValue] = {}
    first_with: dict[str, int] = {}
    repeats: dict[int, int] = {}
    waiting: dict[int, IncomingMessage] = {}
    for index, message in enumerate(messages):
        try:
            check(message)
        except InvalidValue as error:
            rejected[index] = error
            continue
        first = first_with.setdefault(message.provider_message_id or f"\0{index}", index)
        if first == index:
            waiting[index] = message
        else:
            repeats[index] = first

    recorded: dict[int, Recorded] = {}
    states: dict[str, ConversationState] = {}
    while waiting:
        given: dict[str, object] = {"now": now, "positions": list(waiting)}
        given |= {f"{name}s": [getattr(message, name) for message in waiting.values()] for name in _GIVEN}
        for index, message_id, inserted, *state in session.execute(_RECORD_MANY, given):
            conversation = _state(state, waiting.pop(index).chat_id)
            if inserted:
                states[conversation.chat_id] = conversation
            recorded[index] = Recorded(message_id, inserted, conversation)
        # What is left was committed by others while this statement waited. The next one sees it.
    recorded |= {index: replace(recorded[first], inserted=False) for index, first in repeats.items()}
    for index, result in recorded.items():
        after = states.get(result.conversation.chat_id)
        if after is not None:
            recorded[index] = replace(result, conversation=after)
    return RecordedBatch(dict(sorted(recorded.items())), rejected)


def check(message: IncomingMessage) -> None:
    """Nothing, when the message can be stored.

    Raises:
        InvalidValue: A part of it cannot. No part is quoted.
    """
    for name in ("chat_id", "content", "media_url", "provider_message_id"):
        text = getattr(message, name)
        if text is None and name != "chat_id":
            continue
        if not isinstance(text, str):
            raise InvalidValue(f"{name} is a text, not {type(text).__name__}.")
        check_text(text)
    for name in ("chat_id", "provider_message_id"):
        identity = getattr(message, name)
        if identity is not None and not 0 < len(identity) <= MAX_ID_LENGTH:
            raise InvalidValue(f"{name} has 1 to {MAX_ID_LENGTH} characters, not {len(identity)}.")
    if message.role not in get_args(Role):
        raise InvalidValue(f"The role of a message is one of {', '.join(get_args(Role))}.")
    if not message.content and not message.media_url:
        raise InvalidValue("A message has a content or a media_url; this one has neither.")
    sent_at: object = message.sent_at  # annotations bind nobody
    if sent_at is not None and not (isinstance(sent_at, datetime) and sent_at.utcoffset() is not None):
        raise InvalidValue("sent_at is a datetime with a time zone.")


def _state(columns: Sequence[Any], chat_id: str) -> ConversationState:
    if columns[0] is None:
        raise ConversationNotFound(chat_id)
    return ConversationState(*columns)


# --- the statements ---------------------------------------------------------------------------------------------------

_STORED: Final = ("chat_id", "role", "content", "media_url", "provider_message_id")
_GIVEN: Final = {name: Text() for name in _STORED} | {"sent_at": Timestamptz()}


def lock_key(chat_id: ColumnElement[str]) -> ColumnElement[int]:
    """The key of the advisory lock on a chat of the client. Whoever draws ids for a chat has it first."""
    return func.hashtextextended(cast(bound_client_id(), Text) + chat_id, 0, type_=BigInteger)


def _sent_at(sent_at: ColumnElement[Any]) -> ColumnElement[Any]:
    now = func.coalesce(bindparam("now", type_=Timestamptz), func.clock_timestamp(), type_=Timestamptz)
    return func.least(func.coalesce(sent_at, now), now, type_=Timestamptz)


def _append(columns: Sequence[str], new: Select[*tuple[Any, ...]]) -> CTE:
    """The messages that were not there yet, with their ids."""
    added = insert(_MESSAGES).from_select([_MESSAGES.c[name] for name in columns], new)
    added = added.on_conflict_do_nothing(
        index_elements=[_MESSAGES.c.client_id, _MESSAGES.c.provider_message_id],
        index_where=_MESSAGES.c.provider_message_id.is_not(None),
    )
    return added.returning(_MESSAGES.c.id, _MESSAGES.c.chat_id, _MESSAGES.c.role, _MESSAGES.c.created_at).cte("added")


def _bring_up_to_date(newest: Select[*tuple[Any, ...]]) -> CTE:
    """The conversations after these messages, one row for each chat: its newest message, the end customer's newest."""
    upsert = insert(_CONVERSATIONS).from_select([_CONVERSATIONS.c[name] for name in _MOVED], newest)
    old, new = _CONVERSATIONS.c, upsert.excluded
    is_newest = tuple_(new.last_message_at, new.last_message_id) > tuple_(
        old.last_message_at, func.coalesce(old.last_message_id, 0)
    )
    user_spoke = func.coalesce(
        new.last_user_message_at >= old.last_user_message_at, new.last_user_message_at.is_not(None)
    )
    upsert = upsert.on_conflict_do_update(
        index_elements=[old.chat_id, old.client_id],
        set_={
            **{name: case((is_newest, new[name]), else_=old[name]) for name in _LAST},
            "last_user_message_at": func.greatest(old.last_user_message_at, new.last_user_message_at),
            "last_user_message_id": func.greatest(old.last_user_message_id, new.last_user_message_id),
            "status": case((user_spoke, "active"), else_=old.status),
            "followup_stage": case((user_spoke, 0), else_=old.followup_stage),
            "claim_token": case((user_spoke, null()), else_=old.claim_token),
            "claimed_until": case((user_spoke, null()), else_=old.claimed_until),
        },
    )
    return upsert.returning(*STATE).cte("state")


_LAST: Final = ("last_message_at", "last_message_id", "last_role")
_MOVED: Final = ("client_id", "chat_id", *_LAST, "last_user_message_at", "last_user_message_id")


def _record() -> CompoundSelect[Any]:
    """One message: its id, whether it was inserted, and the columns of the state.

    No row when another transaction has committed a duplicate since the statement began.
    """
    given = select(*(bindparam(name, type_=kind).label(name) for name, kind in _GIVEN.items())).cte("given")
    known = (
        select(_MESSAGES.c.id, _MESSAGES.c.chat_id)
        .join(given, _MESSAGES.c.provider_message_id == given.c.provider_message_id)
        .cte("known")
    )
    locked = (
        select(func.pg_advisory_xact_lock(lock_key(given.c.chat_id)).label("lock"))
        .where(~exists(select(known.c.id)))
        .cte("locked")
    )
    new = select(bound_client_id(), *(given.c[name] for name in _STORED), _sent_at(given.c.sent_at)).select_from(
        given.join(locked, true())
    )
    added = _append(("client_id", *_STORED, "created_at"), new)
    by_user = added.c.role == "user"
    state = _bring_up_to_date(
        select(
            bound_client_id(),
            added.c.chat_id,
            added.c.created_at,
            added.c.id,
            added.c.role,
            case((by_user, added.c.created_at)),
            case((by_user, added.c.id)),
        )
    )
    return union_all(
        select(added.c.id, true(), *state.c).join(state, true()),
        select(known.c.id, false(), *STATE).select_from(
            known.outerjoin(_CONVERSATIONS, _CONVERSATIONS.c.chat_id == known.c.chat_id)
        ),
    )


def _record_many() -> CompoundSelect[Any]:
    """Many messages: for each its position, its id, whether it was inserted, and the columns of the state.

    Chats are locked in one order, and ids of providers are inserted in one order, so that no two batches wait for each
    other. No row for a message when another transaction has committed a duplicate since the statement began.
    """
    arrays = func.unnest(
        bindparam("positions", type_=ARRAY(Integer)),
        *(bindparam(f"{name}s", type_=ARRAY(kind)) for name, kind in _GIVEN.items()),
    )
    parts: list[ColumnClause[Any]] = [
        column("position", Integer()),
        *(column(name, kind) for name, kind in _GIVEN.items()),
    ]
    given = select(*arrays.table_valued(*parts, name="arrays").render_derived().c).cte("given")
    known = (
        select(given.c.position, _MESSAGES.c.id, _MESSAGES.c.chat_id)
        .join(given, _MESSAGES.c.provider_message_id == given.c.provider_message_id)
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
    newest = (
        select(
            bound_client_id(),
            added.c.chat_id,
            added.c.created_at,
            added.c.id,
            added.c.role,
            func.max(added.c.created_at).filter(by_user).over(partition_by=added.c.chat_id),
            func.max(added.c.id).filter(by_user).over(partition_by=added.c.chat_id),
        )
        .ext(distinct_on(added.c.chat_id))
        .order_by(added.c.chat_id, added.c.created_at.desc(), added.c.id.desc())
    )
    state = _bring_up_to_date(newest)
    return union_all(
        select(fresh.c.position, added.c.id, true(), *state.c)
        .join(fresh, fresh.c.id == added.c.id)
        .join(state, state.c.chat_id == added.c.chat_id),
        select(known.c.position, known.c.id, false(), *STATE).select_from(
            known.outerjoin(_CONVERSATIONS, _CONVERSATIONS.c.chat_id == known.c.chat_id)
        ),
    )


_RECORD: Final = _record()
_RECORD_MANY: Final = _record_many()
