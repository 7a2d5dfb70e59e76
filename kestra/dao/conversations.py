"""Conversations: where each one stands, the inbox that lists them, and what a person or an assistant does to one.

Each change locks its chat until the transaction ends, as `messages.record` does: a transaction may do both, in any
order, and webhooks of that chat wait for it.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final, NamedTuple, TypeVar, get_args

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    Text,
    bindparam,
    func,
    literal_column,
    null,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from kestra.columns import OneOf, Timestamptz, check_text
from kestra.dao.clock import NOW
from kestra.dao.keyset import Page, check_limit, instant, page_of, position
from kestra.dao.locking import chat_locked
from kestra.dao.tables import CONVERSATIONS, MESSAGES
from kestra.errors import ContextOutdated, ConversationMoved, ConversationNotFound, InvalidValue
from kestra.models import Role, Status
from kestra.session import TenantSession, require_tenant

_T = TypeVar("_T")

WINDOW: Final = timedelta(hours=24)
"""How long after the end customer's last message Meta lets a business write freely."""

MAX_CONTEXT: Final = 8000
"""The most characters of the summary that an assistant keeps of a conversation."""

UNREAD_CAP: Final = 99
"""The most unread messages that the inbox counts in one conversation."""

PREVIEW_LENGTH: Final = 120
"""The most characters of the newest message that the inbox shows."""


class ConversationState(NamedTuple):
    """Where one conversation stands. Times are aware; ids are those of messages. A tuple, as `messages.Message` is.

    Attributes:
        chat_id: The end customer's chat, opaque.
        status: Whether the assistant is still at it.
        followup_stage: How many follow-ups were sent since the end customer last spoke, 0 to 5.
        last_role: Who said the newest message.
        last_message_at: When it was sent.
        last_message_id: Its id; None when the conversation has no message.
        last_user_message_at: When the end customer last said something; None for never.
        last_user_message_id: The id of the end customer's message that arrived last.
        last_read_message_id: Messages up to here were read by a person.
        paused_until: Until then the assistant keeps silent.
    """

    chat_id: str
    status: Status
    followup_stage: int
    last_role: Role | None
    last_message_at: datetime
    last_message_id: int | None
    last_user_message_at: datetime | None
    last_user_message_id: int | None
    last_read_message_id: int | None
    paused_until: datetime | None

    @property
    def last_id(self) -> int | None:
        """The id of the newest message, or of one of the end customer that arrived after it and was sent before it.

        Providers count in seconds, so a quick answer can be "sent" before what it answers.
        """
        return max(
            (seen for seen in (self.last_message_id, self.last_user_message_id) if seen is not None), default=None
        )

    @property
    def awaits_answer(self) -> bool:
        """Whether the end customer has said something that arrived after everything the assistant has said."""
        return self.last_id is not None and self.last_id == self.last_user_message_id

    def window_open(self, now: datetime) -> bool:
        """Whether Meta lets the business write freely: less than 24 hours since the end customer's last message."""
        return _window_open(self.last_user_message_at, now)

    def paused(self, now: datetime) -> bool:
        """Whether a person has paused the assistant."""
        return self.paused_until is not None and now < self.paused_until.astimezone(UTC)


def _window_open(last_user_message_at: datetime | None, now: datetime) -> bool:
    # In UTC: two times of the same zone are compared by their wall clocks, which are an hour off when summer time ends.
    return last_user_message_at is not None and now - last_user_message_at.astimezone(UTC) < WINDOW


STATE: Final = tuple(CONVERSATIONS.c[name] for name in ConversationState._fields)
"""The columns of a `ConversationState`, in the order of its fields."""


@dataclass(frozen=True, slots=True)
class InboxEntry:
    """One conversation as the inbox lists it.

    Attributes:
        state: Where it stands.
        preview: The beginning of the newest message's text, at most 120 characters; None without a text.
        preview_role: Who said the newest message; None when the conversation has no message.
        preview_has_media: Whether the newest message has a medium.
        unread: How many messages of the end customer nobody has read, at most 99.
        unread_capped: Whether there are more than 99.
    """

    state: ConversationState
    preview: str | None = field(repr=False)
    preview_role: Role | None
    preview_has_media: bool
    unread: int
    unread_capped: bool


def inbox(
    session: TenantSession,
    *,
    status: Status | None = None,
    unread_only: bool = False,
    cursor: str | None = None,
    limit: int = 50,
) -> Page[InboxEntry]:
    """The client's conversations, those with the newest message first; of the same time, by descending chat_id.

    A conversation that gets a message between two pages moves to the front and is not on the pages to come.

    Args:
        session: A session of the client.
        status: Only the conversations of this status; None is all of them.
        unread_only: Only those with a message of the end customer that nobody has read.
        cursor: Where the page before ended; None is the first page.
        limit: The most conversations of a page, 1 to 500.

    Raises:
        InvalidCursor: The cursor is not one of this client's inbox.
        InvalidValue: The limit is out of its bounds, or there is no such status.
    """
    client_id = require_tenant(session)
    statuses = get_args(Status) if status is None else (status,)
    given: dict[str, object] = {f"status_{arm}": its_status for arm, its_status in enumerate(statuses)}
    given["rows"] = check_limit(limit) + 1
    scope = ("inbox", client_id)
    if cursor is not None:
        given["after"], given["after_chat"] = position(cursor, scope=scope, kinds=(instant, str))
    statement = _inbox(len(statuses), unread_only=unread_only, goes_on=cursor is not None)
    return page_of(
        [_entry(*row) for row in session.execute(statement, given)],
        limit=limit,
        scope=scope,
        key=lambda entry: [entry.state.last_message_at.astimezone(UTC).isoformat(), entry.state.chat_id],
    )


def _entry(preview: str | None, role: Role | None, has_media: bool | None, unread: int, *state: Any) -> InboxEntry:  # noqa: FBT001  # the columns of a row
    return InboxEntry(
        state=ConversationState(*state),
        preview=preview,
        preview_role=role,
        preview_has_media=has_media is True,
        unread=min(unread, UNREAD_CAP),
        unread_capped=unread > UNREAD_CAP,
    )


# Constants of the predicates of partial indexes: a plan that is kept for every value of a parameter cannot use those.
_NOTHING_READ: Final = literal_column("0", Integer)
_USER: Final = literal_column("'user'", Text)


@cache
def _inbox(statuses: int, *, unread_only: bool, goes_on: bool) -> Select[*tuple[Any, ...]]:
    """One page: an arm for each status walks its index as far as the page may need it, and the arms are merged."""
    rows = bindparam("rows", type_=Integer)
    arms = [_newest(arm, unread_only=unread_only, goes_on=goes_on).limit(rows) for arm in range(statuses)]
    listed = arms[0].subquery("listed")
    if len(arms) > 1:
        merged = union_all(*arms)
        of_arm = merged.selected_columns
        listed = merged.order_by(of_arm.last_message_at.desc(), of_arm.chat_id.desc()).limit(rows).subquery("listed")
    newest = (
        select(
            func.left(MESSAGES.c.content, PREVIEW_LENGTH).label("preview"),
            MESSAGES.c.role,
            (func.coalesce(MESSAGES.c.media_url, "") != "").label("has_media"),
        )
        .where(MESSAGES.c.chat_id == listed.c.chat_id)
        .order_by(MESSAGES.c.created_at.desc(), MESSAGES.c.id.desc())
        .limit(1)
        .lateral("newest")
    )
    unread = (
        select(MESSAGES.c.id)
        .where(
            MESSAGES.c.chat_id == listed.c.chat_id,
            MESSAGES.c.role == _USER,
            MESSAGES.c.id > listed.c.read_up_to,
        )
        .limit(UNREAD_CAP + 1)
        .correlate(listed)
        .subquery("unread")
    )
    count = select(func.count()).select_from(unread).scalar_subquery()
    return (
        select(newest.c.preview, newest.c.role, newest.c.has_media, count, *(listed.c[column.name] for column in STATE))
        .select_from(listed.outerjoin(newest, true()))
        .order_by(listed.c.last_message_at.desc(), listed.c.chat_id.desc())
    )


def _newest(arm: int, *, unread_only: bool, goes_on: bool) -> Select[*tuple[Any, ...]]:
    """The conversations of one status, newest first, with the message up to which each was read."""
    columns = CONVERSATIONS.c
    read_up_to = func.coalesce(columns.last_read_message_id, _NOTHING_READ)
    # Named here, inside of the limit: under row level security an index is not searched by a coalesce() of a column.
    newest = (
        select(*STATE, read_up_to.label("read_up_to"))
        .where(columns.status == bindparam(f"status_{arm}", type_=OneOf(Status)))
        .order_by(columns.last_message_at.desc(), columns.chat_id.desc())
    )
    if unread_only:
        newest = newest.where(columns.last_user_message_id > read_up_to)
    if goes_on:
        newest = newest.where(
            tuple_(columns.last_message_at, columns.chat_id)
            < tuple_(bindparam("after", type_=Timestamptz), bindparam("after_chat", type_=Text))
        )
    return newest


_CHAT: Final = bindparam("chat", type_=Text)
_UP_TO: Final = bindparam("up_to", type_=BigInteger)
_COVERED: Final = func.coalesce(CONVERSATIONS.c.last_context_message_id, 0)

_END_OF_CLAIM: Final = {"claim_token": null(), "claimed_until": null()}
"""What a follow-up worker that has claimed the conversation finds: that it must not send."""


def _advanced(column: ColumnElement[int | None]) -> ColumnElement[int]:
    """`up_to`, but not below what the column has and not beyond the newest message."""
    columns = CONVERSATIONS.c
    # least() ignores NULL: without the 0 everything to come would be covered where there is no message yet.
    newest = func.coalesce(func.greatest(columns.last_message_id, columns.last_user_message_id), 0)
    return func.greatest(column, func.least(_UP_TO, newest))


def _set(**values: Any) -> ReturningUpdate[tuple[Any, ...]]:
    """The change of one conversation, which returns its state. The lock on the chat comes before the row's."""
    one = update(CONVERSATIONS).where(CONVERSATIONS.c.chat_id == _CHAT, chat_locked(_CHAT))
    return one.values(values).returning(*STATE)


_MARK_READ: Final = _set(last_read_message_id=_advanced(CONVERSATIONS.c.last_read_message_id))
_SET_CONTEXT: Final = _set(
    last_context=bindparam("summary", type_=Text),
    last_context_message_id=_advanced(CONVERSATIONS.c.last_context_message_id),
).where(_COVERED <= _UP_TO)
_LAST_ID: Final = func.greatest(CONVERSATIONS.c.last_message_id, CONVERSATIONS.c.last_user_message_id)
_FINISH: Final = _set(status="finished", **_END_OF_CLAIM).where(
    _LAST_ID.is_not_distinct_from(bindparam("expected", type_=BigInteger))
)
_REOPEN: Final = _set(status="active")
_PAUSE: Final = _set(paused_until=bindparam("until", type_=Timestamptz), **_END_OF_CLAIM)
_RESUME: Final = _set(paused_until=null())
_SPOKE: Final = select(CONVERSATIONS.c.last_user_message_at, NOW).where(CONVERSATIONS.c.chat_id == _CHAT)


def _change(
    session: TenantSession, statement: ReturningUpdate[tuple[Any, ...]], chat_id: str, **given: object
) -> ConversationState | None:
    """The conversation after the change; None when the statement found none that it may change."""
    row = session.execute(statement, {"chat": chat_id, **given}).one_or_none()
    return None if row is None else ConversationState(*row)


def _look(session: TenantSession, column: ColumnElement[_T], chat_id: str) -> _T:
    """What the conversation that was not changed has in a column."""
    row = session.execute(select(column).where(CONVERSATIONS.c.chat_id == _CHAT), {"chat": chat_id}).one_or_none()
    return _found(row, chat_id)[0]


def _found(row: _T | None, chat_id: str) -> _T:
    if row is None:
        raise ConversationNotFound(chat_id)
    return row


def _check_id(message_id: int) -> None:
    given: object = message_id  # annotations bind nobody, and PostgreSQL would round
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise InvalidValue("The id of a message is a positive integer, or 0 for none.")


def mark_read(session: TenantSession, *, chat_id: str, up_to: int) -> ConversationState:
    """The conversation, whose messages up to this one a person has read. What was read stays read.

    Args:
        session: A session of the client.
        chat_id: The conversation.
        up_to: The id of a message. One beyond the newest is taken for the newest: no message to come is read already.

    Raises:
        ConversationNotFound: The client has no such conversation.
        InvalidValue: `up_to` is no id.
    """
    require_tenant(session)
    _check_id(up_to)
    return _found(_change(session, _MARK_READ, chat_id, up_to=up_to), chat_id)


def set_context(session: TenantSession, *, chat_id: str, summary: str, up_to: int) -> ConversationState:
    """The conversation, which has this summary instead of the one before.

    Args:
        session: A session of the client.
        chat_id: The conversation.
        summary: At most 8,000 characters.
        up_to: The id of the last message that the summary covers; one beyond the newest is taken for the newest.

    Raises:
        ContextOutdated: The stored summary covers messages beyond `up_to`. One that covers as many is replaced.
        ConversationNotFound: The client has no such conversation.
        InvalidValue: The summary is too long or cannot be stored, or `up_to` is no id.
    """
    require_tenant(session)
    if len(summary) > MAX_CONTEXT:
        raise InvalidValue(f"A context has at most {MAX_CONTEXT} characters, not {len(summary)}: summarise it.")
    check_text(summary)
    _check_id(up_to)
    state = _change(session, _SET_CONTEXT, chat_id, summary=summary, up_to=up_to)
    if state is None:
        raise ContextOutdated(chat_id, up_to=up_to, stored=_look(session, _COVERED, chat_id))
    return state


def finish(session: TenantSession, *, chat_id: str, expected_last_message_id: int | None) -> ConversationState:
    """The conversation, finished on the strength of its newest message. A follow-up worker's claim on it has ended.

    Args:
        session: A session of the client.
        chat_id: The conversation.
        expected_last_message_id: The `last_id` of the state that was decided upon; None for a conversation without
            messages.

    Raises:
        ConversationMoved: Another message is the newest.
        ConversationNotFound: The client has no such conversation.
    """
    require_tenant(session)
    state = _change(session, _FINISH, chat_id, expected=expected_last_message_id)
    if state is None:
        actual = _look(session, _LAST_ID, chat_id)
        raise ConversationMoved(chat_id, expected=expected_last_message_id, actual=actual)
    return state


def reopen(session: TenantSession, *, chat_id: str) -> ConversationState:
    """The conversation, active at the stage where it was.

    Raises:
        ConversationNotFound: The client has no such conversation.
    """
    require_tenant(session)
    return _found(_change(session, _REOPEN, chat_id), chat_id)


def pause(session: TenantSession, *, chat_id: str, until: datetime) -> ConversationState:
    """The conversation, in which the assistant keeps silent until then. A follow-up worker's claim on it has ended.

    Args:
        session: A session of the client.
        chat_id: The conversation.
        until: Aware. It replaces the end of a pause that is under way.

    Raises:
        ConversationNotFound: The client has no such conversation.
        InvalidValue: `until` is no datetime with a time zone.
    """
    require_tenant(session)
    end: object = until  # annotations bind nobody, and without an end it would be no pause
    if not isinstance(end, datetime):
        raise InvalidValue("A pause ends at a datetime with a time zone. To end it now, resume.")
    return _found(_change(session, _PAUSE, chat_id, until=until), chat_id)


def resume(session: TenantSession, *, chat_id: str) -> ConversationState:
    """The conversation, in which the assistant speaks again.

    Raises:
        ConversationNotFound: The client has no such conversation.
    """
    require_tenant(session)
    return _found(_change(session, _RESUME, chat_id), chat_id)


def window_open(session: TenantSession, *, chat_id: str, now: datetime | None = None) -> bool:
    """Whether Meta lets the business write freely: less than 24 hours since the end customer's last message.

    Args:
        session: A session of the client.
        chat_id: The conversation.
        now: What counts as now, aware; None is the database's clock.

    Raises:
        ConversationNotFound: The client has no such conversation.
        InvalidValue: `now` has no time zone.
    """
    require_tenant(session)
    row = session.execute(_SPOKE, {"chat": chat_id, "now": now}).one_or_none()
    return _window_open(*_found(row, chat_id))
