"""The lines of an export: one chat, or a whole client, as JSON.

A line is an object with one key, which says what it is:

    {"kestra":1,"scope":"client"}                       or {"kestra":1,"scope":"chat","chat_id":…}
    {"client":{…,"left_out":["whatsapp.key"]}}          of a client alone
    {"file":{…}}                                        of a client alone, by id
    {"conversation":{…}}                                chat by chat, by chat_id; a chat may have none
    {"message":{…}}                                     of that chat, by id
    {"end":{"files":0,"conversations":1,"messages":1}}  without it the export was cut off

Times are UTC with microseconds, numbers have every digit, keys have one order, and chats are in the order of their code
points, whatever the database sorts by: the same data is the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar, Final, Literal, Self
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from sqlalchemy import (
    Column,
    Table,
)

from kestra.columns import check_instant, check_text
from kestra.dao.messages import MAX_ID_LENGTH
from kestra.dao.tables import CLIENTS, CONVERSATIONS, FILES, MESSAGES
from kestra.models import Role, Status

VERSION: Final = 1
"""Of the format. What reads one version refuses every other."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How much was exported or imported.

    Attributes:
        files: How many files.
        conversations: How many conversations.
        messages: How many messages.
        empty: How many messages an import has left out, because they have neither content nor media. Adopted
            installations have such messages, and no database takes new ones.
    """

    files: int = 0
    conversations: int = 0
    messages: int = 0
    empty: int = 0


def _storable(text: str) -> str:
    check_text(text)
    return text


def _instant(text: object) -> object:
    return datetime.fromisoformat(text) if isinstance(text, str) else text


def _in_utc(moment: datetime) -> datetime:
    if moment.utcoffset() != timedelta():
        raise ValueError("not UTC")
    return check_instant(moment)


def _lower(text: str) -> str:
    if text != text.lower():
        raise ValueError("not in lower case")
    return text


def _uuid(text: object) -> object:
    return UUID(text) if isinstance(text, str) else text


_Text = Annotated[str, AfterValidator(_storable)]
_Moment = Annotated[datetime, BeforeValidator(_instant), AfterValidator(_in_utc)]
_Id = Annotated[UUID, BeforeValidator(_uuid)]
_ChatId = Annotated[_Text, Field(max_length=MAX_ID_LENGTH)]
_MessageId = Annotated[int, Field(ge=-(2**31), lt=2**31)]
_Name = Annotated[_Text, Field(max_length=255)]


class Line(BaseModel):
    """What a line says. The fields are the format: their names, their order, and what can be stored."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    kind: ClassVar[str]

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Nothing of the line."""
        return iter(())


class Header(Line):
    """What is in the export."""

    kestra: Literal[1]
    scope: Literal["client", "chat"]
    chat_id: _ChatId | None = None

    @model_validator(mode="after")
    def _is_of_one_chat(self) -> Self:
        if (self.scope == "chat") != (self.chat_id is not None):
            raise ValueError("the header of one chat names it, and no other does")
        return self


class ClientLine(Line):
    """The client, without its token; `left_out` has the paths in `tools_config` that are not here."""

    kind = "client"

    id: _Id
    name: _Name
    system_prompt: _Text | None
    tools_config: dict[str, Any]
    created_at: _Moment
    left_out: list[str]


class FileLine(Line):
    """A file, without Google's URI."""

    kind = "file"

    id: _Id
    filename: _Name | None
    file_hash: Annotated[_Text, AfterValidator(_lower), Field(max_length=64)] | None
    size_bytes: Annotated[int, Field(ge=0, lt=2**63)] | None
    media_type: _Name | None


class ConversationLine(Line):
    """Where a conversation stands, without a claim. It may name messages that are gone."""

    kind = "conversation"

    chat_id: _ChatId
    status: Status
    followup_stage: Annotated[int, Field(ge=0, le=5)]
    last_role: Role | None
    last_message_at: _Moment
    last_context: _Text | None
    last_message_id: _MessageId | None
    last_user_message_at: _Moment | None
    last_user_message_id: _MessageId | None
    last_read_message_id: _MessageId | None
    last_context_message_id: _MessageId | None
    paused_until: _Moment | None


class MessageLine(Line):
    """A message. Adopted ones may have neither content nor media."""

    kind = "message"

    id: _MessageId
    chat_id: _ChatId
    role: Role
    content: _Text | None
    media_url: _Text | None
    created_at: _Moment
    provider_message_id: Annotated[_Text, Field(min_length=1, max_length=MAX_ID_LENGTH)] | None


class EndLine(Line):
    """How many lines of each kind there were."""

    kind = "end"

    files: int
    conversations: int
    messages: int


REFERENCES: Final = ("last_message_id", "last_user_message_id", "last_read_message_id", "last_context_message_id")
"""The columns of a conversation that have the id of a message, which may be gone by now."""

TABLES: Final[dict[type[Line], Table]] = {
    ClientLine: CLIENTS,
    FileLine: FILES,
    ConversationLine: CONVERSATIONS,
    MessageLine: MESSAGES,
}

_KINDS: Final[tuple[type[Line], ...]] = (*TABLES, EndLine)
LINES: Final = {line.kind: line for line in _KINDS}

COUNTED: Final[dict[str, type[Line]]] = {"files": FileLine, "conversations": ConversationLine, "messages": MessageLine}


def columns_of(line: type[Line]) -> list[Column[Any]]:
    """The columns of the table that a line of this kind has."""
    table = TABLES[line]
    return [table.c[name] for name in line.model_fields if name in table.c]
