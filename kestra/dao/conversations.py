"""Conversations: where each one stands."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Table

from kestra.models import ActiveConversation, Role, Status

WINDOW: Final = timedelta(hours=24)
"""How long after the end customer's last message Meta lets a business write freely."""

_CONVERSATIONS: Final[Table] = ActiveConversation.__table__  # type: ignore[assignment]  # a FromClause in general


@dataclass(frozen=True, slots=True)
class ConversationState:
    """Where one conversation stands. Times are aware; ids are those of messages.

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

    def window_open(self, now: datetime) -> bool:
        """Whether Meta lets the business write freely: less than 24 hours since the end customer's last message."""
        return self.last_user_message_at is not None and now - self.last_user_message_at < WINDOW

    def paused(self, now: datetime) -> bool:
        """Whether a person has paused the assistant."""
        return self.paused_until is not None and now < self.paused_until


STATE: Final = tuple(_CONVERSATIONS.c[name] for name in ConversationState.__slots__)
"""The columns of a `ConversationState`, in the order of its fields."""
