"""Messages: what webhooks and assistants store, and what the inbox and the assistants read.

`record` is the hot path: dedupe, append and the conversation's state in one statement (docs/adr/0007).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, get_args

from kestra.columns import check_text
from kestra.dao.conversations import ConversationState
from kestra.dao.recording import GIVEN, RECORD, RECORD_MANY
from kestra.errors import ConversationNotFound, InvalidValue
from kestra.models import Role
from kestra.session import TenantSession, require_tenant

MAX_BATCH: Final = 500
"""The most messages that `record_many` takes: each of their chats is locked until the transaction ends."""

MAX_ID_LENGTH: Final = 512
"""The most characters of a chat_id and of a provider's id. An entry of an index has room for about 2,700 bytes."""


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
    given = {"now": now} | {name: getattr(message, name) for name in GIVEN}
    while True:
        row = session.execute(RECORD, given).one_or_none()
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
        given |= {f"{name}s": [getattr(message, name) for message in waiting.values()] for name in GIVEN}
        for index, message_id, inserted, *state in session.execute(RECORD_MANY, given):
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
