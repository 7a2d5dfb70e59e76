"""Messages: what webhooks and assistants store, and what the inbox and the assistants read.

`record` is the hot path: dedupe, append and the conversation's state in one statement (docs/adr/0007).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from operator import attrgetter
from typing import Any, Final, NamedTuple, Self, get_args

from sqlalchemy import (
    ARRAY,
    CompoundSelect,
    FromClause,
    Integer,
    Select,
    Text,
    any_,
    bindparam,
    delete,
    exists,
    func,
    null,
    select,
    tuple_,
    union_all,
)

from kestra.columns import Timestamptz, check_instant, check_text
from kestra.dao.conversations import ConversationState
from kestra.dao.keyset import Page, check_limit, instant, page_of, position
from kestra.dao.locking import lock_key
from kestra.dao.recording import RECORD, RECORD_MANY
from kestra.dao.tables import CONVERSATIONS, MESSAGES
from kestra.errors import ConversationNotFound, ErasureIncomplete, InvalidValue, KestraError, StatementFailed
from kestra.hot import HotStatement
from kestra.models import Role
from kestra.session import TenantSession, require_tenant

MAX_BATCH: Final = 500
"""The most messages that `record_many` takes: each of their chats is locked until the transaction ends."""

MAX_ID_LENGTH: Final = 512
"""The most characters of a chat_id and of a provider's id. An entry of an index has room for about 2,700 bytes."""

CHARACTERS_PER_TOKEN: Final = 4
"""How `estimate_tokens` converts: about what language models make of English; other languages take more tokens."""

_PATIENCE: Final = 3
"""Rounds of a batch that record nothing, before it gives up; as in the functions of the database."""

_RECORD: Final = HotStatement(RECORD)
_RECORD_MANY: Final = HotStatement(RECORD_MANY)

_CHAT_ID: Final = bindparam("chat_id", type_=Text)
_LIMIT: Final = bindparam("limit", type_=Integer)


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


PARTS: Final = tuple(part.name for part in fields(IncomingMessage))
"""Of a message, by name, in the order of the function of the database."""


class Recorded(NamedTuple):
    """What became of a message. A tuple, as `Message` is: every webhook makes one.

    Attributes:
        message_id: Its id; of a duplicate, the id of the message that was there.
        inserted: Whether it was stored. False for a duplicate, which changes nothing.
        conversation: Where the conversation of the stored message stands.
    """

    message_id: int
    inserted: bool
    conversation: ConversationState

    @classmethod
    def of(cls, row: Sequence[Any], *, chat_id: str) -> Self:
        """What a row of the database's function says.

        Raises:
            ConversationNotFound: It is a duplicate, and somebody has deleted its conversation alone.
        """
        message_id, inserted, *state = row
        if state[0] is None:
            raise ConversationNotFound(chat_id)
        return cls(message_id, inserted, ConversationState(*state))


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
        ConversationNotFound: It is a duplicate, and somebody has deleted its conversation alone.
    """
    require_tenant(session)
    message = IncomingMessage(chat_id, role, content, media_url, provider_message_id, sent_at)
    check(message)
    given = {"now": now} | {name: getattr(message, name) for name in PARTS}
    (row,) = _RECORD.rows(session, given)
    return Recorded.of(row, chat_id=chat_id)


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """What became of a provider's batch.

    Attributes:
        recorded: What became of each message, by its index in the batch.
        rejected: The messages that cannot be stored, by their index, and why: `InvalidValue`, or
            `ConversationNotFound` for a duplicate whose conversation somebody has deleted.
    """

    recorded: dict[int, Recorded]
    rejected: dict[int, KestraError]


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
        StatementFailed: The database stores a message neither now nor before, three times: a policy hides it, or a
            trigger refuses it.
    """
    require_tenant(session)
    if len(messages) > MAX_BATCH:
        raise InvalidValue(f"A batch has at most {MAX_BATCH} messages, not {len(messages)}: divide it.")
    batch, patience = _Batch(messages), _PATIENCE
    while batch.waiting:
        rows = _RECORD_MANY.rows(session, batch_parameters(batch.waiting.values(), now))
        batch.take(rows)
        # What is left was committed by others since the statement began. The next one sees it.
        patience -= not rows
        if not patience:
            raise StatementFailed(
                f"{len(batch.waiting)} messages of the batch were there and were not, {_PATIENCE} times: a policy "
                "hides them, a trigger refuses them, or somebody erases them. Deliver the batch again.",
                sqlstate=None,
            )
    return batch.result()


def batch_parameters(messages: Collection[IncomingMessage], now: datetime | None = None) -> dict[str, object]:
    """The parameters of `RECORD_MANY`: a list for each part of the messages.

    Of a part that none of them has it is empty: unnest() makes NULLs of what is missing at the end of a list.
    """
    given: dict[str, object] = {"now": now}
    for name in PARTS:
        parts = [*map(attrgetter(name), messages)]
        given[f"{name}s"] = [] if parts.count(None) == len(parts) else parts
    return given


class _Batch:
    """A provider's batch on its way into the database. Messages are known by their index.

    Attributes:
        waiting: The messages that are to be recorded.
    """

    def __init__(self, messages: Sequence[IncomingMessage]) -> None:
        """Reject what cannot be stored, and put aside what repeats another message of the batch."""
        self.waiting: dict[int, IncomingMessage] = {}
        self._rejected: dict[int, KestraError] = {}
        self._first_with: dict[str, int] = {}  # of the provider's ids
        self._repeats: dict[int, int] = {}
        self._recorded: dict[int, Recorded] = {}
        self._stored_before: list[tuple[int, int, ConversationState]] = []
        self._states: dict[str, ConversationState] = {}
        for index, message in enumerate(messages):
            try:
                check(message)
            except InvalidValue as error:
                self._rejected[index] = error
                continue
            provider_id = message.provider_message_id
            first = index if provider_id is None else self._first_with.setdefault(provider_id, index)
            if first == index:
                self.waiting[index] = message
            else:
                self._repeats[index] = first

    def take(self, rows: Sequence[Sequence[Any]]) -> None:
        """What `RECORD_MANY` has returned for the messages that wait."""
        indexes = [*self.waiting]
        for row in rows:
            positions, ids, known = row[:3]
            state = ConversationState._make(row[3:])
            if known is None:
                self._states[state.chat_id] = state
                for position, message_id in zip(positions, ids, strict=True):
                    index = indexes[position - 1]
                    self._recorded[index] = Recorded._make((message_id, True, state))
                    del self.waiting[index]
            else:
                index = self._first_with[known]
                message = self.waiting.pop(index)
                if row[3] is None:
                    self._rejected[index] = ConversationNotFound(message.chat_id)
                else:
                    self._stored_before.append((index, ids[0], state))

    def result(self) -> RecordedBatch:
        """What became of each message; the states are those after the batch."""
        recorded, rejected = self._recorded, self._rejected
        for index, message_id, before in self._stored_before:
            recorded[index] = Recorded._make((message_id, False, self._states.get(before.chat_id, before)))
        for index, first in self._repeats.items():
            if first in rejected:
                rejected[index] = rejected[first]
            else:
                recorded[index] = recorded[first]._replace(inserted=False)
        return RecordedBatch(dict(sorted(recorded.items())), dict(sorted(rejected.items())))


_ROLES: Final = get_args(Role)


def check(message: IncomingMessage) -> None:
    """Nothing, when the message can be stored.

    Raises:
        InvalidValue: A part of it cannot. No part is quoted.
    """
    _check_text("chat_id", message.chat_id, most=MAX_ID_LENGTH)
    if message.role not in _ROLES:
        raise InvalidValue(f"The role of a message is one of {', '.join(_ROLES)}.")
    if message.content is not None:
        _check_text("content", message.content)
    if message.media_url is not None:
        _check_text("media_url", message.media_url)
    if not message.content and not message.media_url:
        raise InvalidValue("A message has a content or a media_url; this one has neither.")
    if message.provider_message_id is not None:
        _check_text("provider_message_id", message.provider_message_id, most=MAX_ID_LENGTH)
    if message.sent_at is not None:
        check_instant(message.sent_at)


def _check_text(name: str, text: str, *, most: int | None = None) -> None:
    if not isinstance(text, str):
        raise InvalidValue(f"{name} is a text, not {type(text).__name__}.")
    if most is not None and not 0 < len(text) <= most:
        raise InvalidValue(f"{name} has 1 to {most} characters, not {len(text)}.")
    check_text(text)


# --- reading ----------------------------------------------------------------------------------------------------------


class Message(NamedTuple):
    """A stored message. A tuple, because a page of them has to be made in no time.

    Attributes:
        id: Unique for the client.
        chat_id: The end customer's chat, opaque.
        role: Who said it.
        content: The text.
        media_url: Where the medium is.
        provider_message_id: The provider's id.
        created_at: When it was sent, aware.
    """

    id: int
    chat_id: str
    role: Role
    content: str | None
    media_url: str | None
    provider_message_id: str | None
    created_at: datetime

    def __repr__(self) -> str:
        """Nothing of what was said."""
        return f"Message(id={self.id}, chat_id={self.chat_id!r}, role={self.role!r}, created_at={self.created_at!r})"


# Newest first: a walk back on the index of client, chat, time and id.
_NEWEST: Final = (
    select(*(MESSAGES.c[name] for name in Message._fields))
    .where(MESSAGES.c.chat_id == _CHAT_ID)
    .order_by(MESSAGES.c.created_at.desc(), MESSAGES.c.id.desc())
    .limit(_LIMIT)
)
_OLDER: Final = _NEWEST.where(
    tuple_(MESSAGES.c.created_at, MESSAGES.c.id)
    < tuple_(bindparam("created_at", type_=Timestamptz), bindparam("id", type_=Integer))
)


_NEWEST_PAGE: Final = HotStatement(_NEWEST)
_OLDER_PAGE: Final = HotStatement(_OLDER)


def history(session: TenantSession, *, chat_id: str, before: str | None = None, limit: int = 50) -> Page[Message]:
    """The messages of a chat, newest first, page by page; the page's cursor asks for the older ones.

    The pages together are the whole history, each message once, whatever arrives meanwhile. A late message appears
    where it was sent, if that part was not read yet.

    Args:
        session: A session of the client.
        chat_id: The chat. One that is not known has no messages.
        before: The cursor of the page before; None starts at the newest message.
        limit: How many messages a page has at most, 1 to 500.

    Raises:
        InvalidCursor: The cursor was not made here, or for another chat or client.
        InvalidValue: The limit is out of bounds.
    """
    scope = ("history", require_tenant(session), chat_id)
    given: dict[str, object] = {"chat_id": chat_id, "limit": check_limit(limit) + 1}
    statement = _NEWEST_PAGE
    if before is not None:
        given["created_at"], given["id"] = position(before, scope=scope, kinds=(instant, int))
        statement = _OLDER_PAGE
    found = [*map(Message._make, statement.rows(session, given))]
    return page_of(found, limit=limit, scope=scope, key=lambda last: [last.created_at.isoformat(), last.id])


@dataclass(frozen=True, slots=True)
class Memory:
    """What an assistant knows of a conversation.

    Attributes:
        summary: What was said before, in short; None when nobody has summarised it.
        summary_up_to: The id of the last message that the summary covers. `messages` may start earlier.
        messages: The newest messages, oldest first.
    """

    summary: str | None = field(repr=False)
    summary_up_to: int | None
    messages: list[Message]


def _memory() -> CompoundSelect[Any]:
    """The chat's newest messages, oldest first, then the summary: in a row of its own, so that it is sent once."""
    newest = _NEWEST.subquery("newest")
    return union_all(
        select(*newest.c, null().label("last_context"), null().label("last_context_message_id")),
        select(
            *(null() for _ in newest.c), CONVERSATIONS.c.last_context, CONVERSATIONS.c.last_context_message_id
        ).where(CONVERSATIONS.c.chat_id == _CHAT_ID),
    ).order_by("created_at", "id")


_MEMORY: Final = HotStatement(_memory())


def estimate_tokens(text: str) -> int:
    """A rough number of tokens: one for every four characters, rounded up. Where it matters, ask the model's own."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def memory(
    session: TenantSession,
    *,
    chat_id: str,
    max_messages: int = 20,
    max_chars: int | None = None,
    max_tokens: int | None = None,
    count_tokens: Callable[[str], int] = estimate_tokens,
    start_with_user: bool = False,
) -> Memory:
    """The newest messages of a chat that fit, oldest first, and the summary of what was said before.

    Messages are taken from the newest back to the first that does not fit: there are no gaps. The newest one is there
    however long it is. Lengths are those of the contents, system messages included; a medium and the summary count
    nothing.

    Args:
        session: A session of the client.
        chat_id: The chat. One that is not known has neither messages nor a summary.
        max_messages: How many messages at most, 1 to 500.
        max_chars: How many characters their contents have together at most.
        max_tokens: How many tokens their contents have together at most. Both may be given, and then both hold.
        count_tokens: The number of tokens of a content.
        start_with_user: Leave out the messages before the end customer's first one, but never the newest.

    Raises:
        InvalidValue: A bound is below 1, or `max_messages` above 500.
    """
    require_tenant(session)
    check_limit(max_messages)
    for name, most in (("max_chars", max_chars), ("max_tokens", max_tokens)):
        if most is not None and most < 1:
            raise InvalidValue(f"{name} is at least 1, not {most}.")
    summary, up_to, messages = None, None, []
    for *columns, context, context_message_id in _MEMORY.rows(session, {"chat_id": chat_id, "limit": max_messages}):
        if columns[0] is None:
            summary, up_to = context, context_message_id
        else:
            messages.append(Message._make(columns))
    for most, size in ((max_chars, len), (max_tokens, count_tokens)):
        if most is not None:
            messages = _newest_that_fit(messages, most, size)
    if start_with_user:
        while len(messages) > 1 and messages[0].role != "user":
            del messages[0]
    return Memory(summary, up_to, messages)


def _newest_that_fit(messages: list[Message], most: int, size: Callable[[str], int]) -> list[Message]:
    used = 0
    for index in reversed(range(len(messages))):
        used += size(messages[index].content or "")
        if used > most:
            return messages[index + 1 :] or messages[-1:]
    return messages


# --- erasing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Erased:
    """What was erased.

    Attributes:
        messages: How many messages.
        conversations: How many conversations, 0 or 1.
    """

    messages: int
    conversations: int


def _counts(messages: FromClause, conversations: FromClause) -> Select[int, int]:
    return select(
        select(func.count()).select_from(messages).scalar_subquery(),
        select(func.count()).select_from(conversations).scalar_subquery(),
    )


_LOCK_CHAT: Final = select(func.pg_advisory_xact_lock(lock_key(_CHAT_ID)))
_ERASE_CHAT: Final = _counts(
    delete(MESSAGES).where(MESSAGES.c.chat_id == _CHAT_ID).returning(MESSAGES.c.id).cte("messages"),
    delete(CONVERSATIONS)
    .where(CONVERSATIONS.c.chat_id == _CHAT_ID)
    .returning(CONVERSATIONS.c.chat_id)
    .cte("conversations"),
)
_LEFT: Final = _counts(
    select(MESSAGES.c.id).where(MESSAGES.c.chat_id == _CHAT_ID).subquery("messages"),
    select(CONVERSATIONS.c.chat_id).where(CONVERSATIONS.c.chat_id == _CHAT_ID).subquery("conversations"),
)


def erase_chat(session: TenantSession, *, chat_id: str) -> Erased:
    """Erase everything of one chat: its messages and its conversation, with the summary. None of it is no error.

    The chat is locked until the transaction ends: nothing is recorded meanwhile, and what is recorded afterwards starts
    a new conversation.

    Raises:
        ErasureIncomplete: Something of the chat is still there.
    """
    require_tenant(session)
    given = {"chat_id": chat_id}
    # A statement of its own: the next one sees whatever was recorded while this one waited.
    session.execute(_LOCK_CHAT, given)
    erased = Erased(*session.execute(_ERASE_CHAT, given).one())
    left = sum(session.execute(_LEFT, given).one())
    if left:
        raise ErasureIncomplete(f"the chat {chat_id!r}", left=left)
    return erased


@dataclass(frozen=True, slots=True)
class Purged:
    """What a batch of `purge` has deleted.

    Attributes:
        messages: How many messages.
        conversations: How many conversations that had no message left.
        more: Whether there may be more: commit, and purge again.
    """

    messages: int
    conversations: int
    more: bool


_BEFORE: Final = bindparam("before", type_=Timestamptz)
_HAS_NO_MESSAGE: Final = ~exists(select(MESSAGES.c.id).where(MESSAGES.c.chat_id == CONVERSATIONS.c.chat_id))


def _purge_messages() -> Select[int]:
    """The number of messages that were deleted: the oldest by id, which is a walk on the primary key."""
    oldest = (
        select(MESSAGES.c.id)
        .where(MESSAGES.c.created_at < _BEFORE)
        .order_by(MESSAGES.c.id)
        .limit(_LIMIT)
        .with_for_update(of=MESSAGES, skip_locked=True)
        .scalar_subquery()
    )
    # An array is made once, and its elements are looked up; joined to a sub-query with a LIMIT, all rows may be read.
    ids = func.array(oldest, type_=ARRAY(Integer))
    purged = delete(MESSAGES).where(MESSAGES.c.id == any_(ids)).returning(MESSAGES.c.id).cte("purged")
    return select(func.count()).select_from(purged)


_PURGE_MESSAGES: Final = _purge_messages()
_LOCK_EMPTY: Final = (
    select(CONVERSATIONS.c.chat_id)
    .where(CONVERSATIONS.c.last_message_at < _BEFORE, _HAS_NO_MESSAGE)
    .order_by(CONVERSATIONS.c.chat_id)
    .limit(_LIMIT)
    .with_for_update(of=CONVERSATIONS, skip_locked=True)
)
_DELETE_EMPTY: Final = (
    delete(CONVERSATIONS)
    .where(CONVERSATIONS.c.chat_id == any_(bindparam("chat_ids", type_=ARRAY(Text))), _HAS_NO_MESSAGE)
    .returning(CONVERSATIONS.c.chat_id)
)


def purge(session: TenantSession, *, before: datetime, limit: int = 500) -> Purged:
    """Delete a batch of the messages that were sent before a moment; call it while there is more, committing each time.

    When no message is left to delete, conversations without activity since then that have no message left follow: their
    summaries quote what was deleted. A conversation that goes on keeps its summary.

    It waits for nobody: what another transaction is writing stays, for the next purge. Messages are taken in the order
    of their ids, so that storing them costs no further index; the last batch reads all that the client keeps, once.

    Args:
        session: A session of the client.
        before: The moment, aware. What was sent exactly then stays.
        limit: How many messages, or conversations, a batch deletes at most, 1 to 500.

    Raises:
        InvalidValue: The limit is out of bounds, or the moment has no time zone.
    """
    require_tenant(session)
    given = {"before": check_instant(before), "limit": check_limit(limit)}
    messages = session.execute(_PURGE_MESSAGES, given).scalar_one()
    if messages == limit:
        return Purged(messages, 0, more=True)
    empty = session.scalars(_LOCK_EMPTY, given).all()
    # Late messages may have been recorded before the lock was had. This statement sees them, and no more can come.
    deleted = session.scalars(_DELETE_EMPTY, {"chat_ids": empty}).all() if empty else []
    return Purged(messages, len(deleted), more=len(empty) == limit)
