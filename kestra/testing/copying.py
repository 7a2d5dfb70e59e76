"""Generated installations in the text format of COPY, some thousand rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final
from uuid import UUID

from kestra.columns import json_dumps
from kestra.testing.installation import (
    Chat,
    ClientRow,
    ConversationRow,
    FileRow,
    Installation,
    MessageRow,
    Row,
    Tenant,
    instant,
)

COLUMNS: Final = {
    "clients": ClientRow._fields,
    "client_files": ("client_id", *FileRow._fields),
    "chat_messages": ("client_id", *MessageRow._fields),
    "active_conversations": ("client_id", *ConversationRow._fields),
}
"""The columns of each table in the order of its lines; tables in the order in which they have to be written."""

ROWS: Final = 20_000
"""About how many rows a chunk has. The checks of foreign keys wait for the end of each COPY."""

_NULL: Final = "\\N"
TIMES: Final = frozenset(
    {
        "created_at",
        "google_file_expires_at",
        "last_message_at",
        "last_user_message_at",
        "paused_until",
        "claimed_until",
    }
)
"""The columns with a moment."""

_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


@dataclass(slots=True)
class Chunk:
    """Lines of each table; none of a row whose client is in a later chunk.

    Attributes:
        lines: By table.
        rows: How many lines there are.
    """

    lines: dict[str, list[str]] = field(default_factory=lambda: {table: [] for table in COLUMNS})
    rows: int = 0

    def add_tenant(self, tenant: Tenant) -> None:
        """Take a client and its files."""
        self.lines["clients"].append(_line(tenant.row))
        self.lines["client_files"] += (f"{tenant.row.id}\t{_line(file)}" for file in tenant.files)
        self.rows += 1 + len(tenant.files)

    def add_chat(self, client_id: UUID, chat: Chat) -> None:
        """Take a chat of a client."""
        client = f"{client_id}\t"
        self.lines["active_conversations"].append(client + _line(chat.conversation))
        self.lines["chat_messages"] += [
            # In the other columns there is nothing to escape.
            f"{client}{message_id}\t{chat_id}\t{role}\t{_NULL if content is None else _content(content)}"
            f"\t{media_url or _NULL}\t{instant(created_at)}\t{provider_id or _NULL}\n"
            for message_id, chat_id, role, content, media_url, created_at, provider_id in chat.messages
        ]
        self.rows += 1 + len(chat.messages)


def chunks(installation: Installation, *, first_id: int) -> Iterator[Chunk]:
    """All the rows; messages are numbered from `first_id`."""
    chunk = Chunk()
    for tenant in installation.tenants():
        chunk.add_tenant(tenant)
        for chat in installation.chats_of(tenant, first_id=first_id):
            first_id += len(chat.messages)
            chunk.add_chat(tenant.row.id, chat)
            if chunk.rows >= ROWS:
                yield chunk
                chunk = Chunk()
    yield chunk


def _line(row: Row) -> str:
    return "\t".join(_field(name, value) for name, value in zip(row._fields, row, strict=True)) + "\n"


def _field(name: str, value: object) -> str:
    match value:
        case None:
            return _NULL
        case str():
            return _escaped(value)
        case dict():
            return _escaped(json_dumps(value))
        case int() if name in TIMES:
            return instant(value)
    return str(value)


def _escaped(text: str) -> str:
    return text.translate(_ESCAPES)


_content: Final = lru_cache(maxsize=8192)(_escaped)
"""Messages say the same few thousand things."""
