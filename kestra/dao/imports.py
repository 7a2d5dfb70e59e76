"""Imports: a chat, or a whole client, from the lines of `kestra.dao.ndjson`, perhaps into another database."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any, Final, TypeVar
from uuid import UUID

from pydantic import (
    ValidationError,
)
from sqlalchemy import (
    ARRAY,
    Integer,
    Text,
    bindparam,
    column,
    exists,
    func,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningInsert

from kestra.base import BOUND_CLIENT_ID, bound_client_id, parse_client_id
from kestra.columns import json_loads
from kestra.dao.clients import check_token
from kestra.dao.locking import lock_key
from kestra.dao.ndjson import (
    COUNTED,
    LINES,
    REFERENCES,
    TABLES,
    VERSION,
    ClientLine,
    ConversationLine,
    Counts,
    EndLine,
    FileLine,
    Header,
    Line,
    MessageLine,
    columns_of,
)
from kestra.errors import ChatExists, ClientExists, DuplicateToken, InvalidExport, InvalidValue
from kestra.models import Client
from kestra.session import SystemSession, TenantSession, require_system, require_tenant
from kestra.tools_config import unmask

_BATCH: Final = 500
"""How many rows are held at once."""

_LineT = TypeVar("_LineT", bound=Line)


def import_client(
    session: SystemSession, *, source: Iterable[str], token: str, client_id: UUID | None = None
) -> Counts:
    """Make a client of its export.

    Messages get new ids, in the order of the old ones in each chat, and conversations refer to these. What was left out
    of the export is not there: give the client its credentials, and upload its files again. The memory that it takes
    does not grow with the export.

    Messages with neither content nor media, as adopted installations have them, are counted and left out: no database
    takes new ones.

    Args:
        session: A system session.
        source: The lines of the export, such as a file opened for text in UTF-8.
        token: What webhooks name the client with; exports have none.
        client_id: The id of the new client; None is the one it had.

    Raises:
        ClientExists: There is a client with this id.
        DuplicateToken: Another client has the token.
        InvalidExport: A line is not what it should be, or the last one is missing.
        InvalidValue: The token is not a text of 1 to 255 characters.
    """
    require_system(session)
    lines = _Lines(source)
    header = lines.header("client")
    with session.begin_nested():
        new_id = _insert_client(session, lines, token, client_id)
        return _import(session, new_id, lines, header)


def import_chat(session: TenantSession, *, source: Iterable[str]) -> Counts:
    """Make a chat of its export, in a client that has no such chat. As `import_client`, for the session's client.

    The chat is locked until the transaction ends.

    Args:
        session: A session of the client.
        source: The lines of the export.

    Raises:
        ChatExists: The client has messages or a conversation of this chat.
        ClientNotFound: There is no such client.
        InvalidExport: A line is not what it should be, the last one is missing, or a message is known to the provider
            by an id that the client has already.
    """
    client_id = require_tenant(session)
    lines = _Lines(source)
    header = lines.header("chat")
    chat = {"chat_id": header.chat_id}
    with session.begin_nested():
        # A statement of its own: the next one sees whatever was recorded while this one waited.
        session.execute(_LOCK, chat)
        if session.execute(_CHAT_EXISTS, chat).scalar_one():
            raise ChatExists(str(header.chat_id))
        return _import(session, client_id, lines, header)


class _Lines:
    """The lines of an export, each checked for itself.

    Attributes:
        number: Of the line that was read last, from 1.
    """

    def __init__(self, source: Iterable[str]) -> None:
        self._source = iter(source)
        self.number = 0

    def header(self, scope: str) -> Header:
        """The first line."""
        value = self._object()
        if value is None or value.get("kestra") != VERSION:
            raise self.refused(f"it is not the header of an export of version {VERSION}")
        header = self._validated(Header, value)
        if header.scope != scope:
            raise self.refused(f"this is the export of a {header.scope}, not of a {scope}")
        return header

    def __iter__(self) -> Iterator[Line]:
        """The other lines."""
        while (value := self._object()) is not None:
            kind, *more = value
            if more or kind not in LINES:
                raise self.refused("it is none of " + ", ".join(LINES))
            yield self._validated(LINES[kind], value[kind])

    def refused(self, reason: str) -> InvalidExport:
        """The error for the line that was read last."""
        return InvalidExport(self.number, reason)

    def _object(self) -> dict[str, Any] | None:
        """The next line; None when there is no more."""
        self.number += 1
        value: object = None
        try:
            value = json_loads(next(self._source))
        except StopIteration:
            return None
        except (ValueError, TypeError, RecursionError, InvalidValue):
            pass  # the error would show the line
        if not isinstance(value, dict) or not value:
            raise self.refused("it is no JSON object")
        return value

    def _validated(self, line: type[_LineT], value: object) -> _LineT:
        try:
            return line.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            # A key that is not declared is a part of the line, and errors about a value may quote it. What is said of
            # the line as a whole is ours.
            where = first["loc"][0] if first["loc"] else None
            reason = f"{where} is missing or wrong" if where in line.model_fields else "a part of it is wrong"
            reason = reason if first["loc"] or first["type"] != "value_error" else first["msg"]
        except (InvalidValue, RecursionError):
            reason = "a part of it is wrong"
        raise self.refused(reason)


def _insert_client(session: SystemSession, lines: _Lines, token: str, client_id: UUID | None) -> UUID:
    """The id of the client that the second line makes."""
    check_token(token)
    line = next(iter(lines), None)
    if not isinstance(line, ClientLine):
        raise lines.refused("the client is missing")
    new_id = line.id if client_id is None else parse_client_id(client_id)
    values = {name: value for name, value in line if name in Client.__table__.c} | {"id": new_id, "token": token}
    try:
        values["tools_config"] = unmask(line.tools_config, stored={})
        made = session.execute(_NEW_CLIENT, values).first()
    except (InvalidValue, RecursionError):
        raise lines.refused("the client cannot be stored, its tools_config for example") from None
    if made is None:
        if session.execute(select(exists().where(Client.id == new_id))).scalar_one():
            raise ClientExists(new_id)
        raise DuplicateToken
    return new_id


def _import(session: Session, client_id: UUID, lines: _Lines, header: Header) -> Counts:
    """Write what comes after the header and the client."""
    writer = _Writer(session, client_id)
    before = _BEFORE_ALL
    for line in lines:
        if isinstance(line, EndLine):
            counts = writer.finish()
            read = counts.messages + counts.empty
            if line != EndLine(files=counts.files, conversations=counts.conversations, messages=read):
                raise lines.refused("it counts other lines than there are")
            if next(iter(lines), None) is not None:
                raise lines.refused("it comes after the end")
            return counts
        here = _position(line)
        if header.chat_id is not None and here[:2] != (_IN_CHATS, header.chat_id):
            raise lines.refused("it is not of the chat in the header")
        if here <= before:
            raise lines.refused("it is out of order, or there twice")
        before = here
        writer.add(lines.number, line)
    raise lines.refused("the export ends before its end: it was cut off")


_IN_CHATS: Final = 2
_BEFORE_ALL: Final = (0, "", 0, 0)


def _position(line: Line) -> tuple[int, str, int, int]:
    """Where a line belongs. Positions that only grow keep each chat together, and everything unique."""
    match line:
        case FileLine():
            return (1, "", 0, line.id.int)
        case ConversationLine():
            return (_IN_CHATS, line.chat_id, 0, 0)
        case MessageLine():
            return (_IN_CHATS, line.chat_id, 1, line.id)
    return _BEFORE_ALL


@dataclass(slots=True)
class _Row:
    """A row to be written, and the line that it comes from."""

    number: int
    values: dict[str, Any]


@dataclass(slots=True)
class _Chat:
    """The chat whose lines are being read.

    Attributes:
        chat_id: The chat.
        conversation: Its row, which is written when every id in it is a new one.
        references: The old ids in it, by their column.
        waiting: Those that have no new id yet, ascending.
    """

    chat_id: str
    conversation: _Row | None
    references: dict[str, int]
    waiting: deque[int]


@dataclass(slots=True)
class _OldId:
    """An id that gets a new one: that of a message, or of one that is gone and that the conversation still names."""

    old: int
    chat: _Chat
    message: _Row | None


class _Writer:
    """Writes what is added to it, some hundred rows at a time."""

    def __init__(self, session: Session, client_id: UUID) -> None:
        self._session = session
        self._client_id = client_id
        self._written = dict.fromkeys(COUNTED, 0)
        self._empty = 0
        self._files: list[_Row] = []
        self._conversations: list[_Row] = []
        self._ids: list[_OldId] = []
        self._chat: _Chat | None = None

    def add(self, number: int, line: Line) -> None:
        """Take a line. Lines come in the order of an export."""
        row = _Row(number, dict(line))
        match line:
            case FileLine():
                self._files.append(row)
            case ConversationLine():
                self._open(line.chat_id, row)
            case MessageLine():
                chat = self._chat
                if chat is None or chat.chat_id != line.chat_id:
                    chat = self._open(line.chat_id, None)
                self._take_waiting(chat, up_to=line.id)
                says_something = bool(line.content or line.media_url)
                self._empty += not says_something
                self._ids.append(_OldId(line.id, chat, row if says_something else None))
        if len(self._files) + len(self._conversations) + len(self._ids) >= _BATCH:
            self._flush()

    def finish(self) -> Counts:
        """How much was written, now that everything is."""
        self._close()
        self._flush()
        return Counts(**self._written, empty=self._empty)

    def _open(self, chat_id: str, conversation: _Row | None) -> _Chat:
        self._close()
        values = conversation.values if conversation is not None else {}
        references = {name: values[name] for name in REFERENCES if values.get(name) is not None}
        self._chat = _Chat(chat_id, conversation, references, deque(sorted(references.values())))
        return self._chat

    def _close(self) -> None:
        chat, self._chat = self._chat, None
        if chat is not None:
            self._take_waiting(chat, up_to=inf)
            if chat.conversation is not None:
                self._conversations.append(chat.conversation)

    def _take_waiting(self, chat: _Chat, *, up_to: float) -> None:
        """Keep the place of ids that no message has: what was read and what was not stays so."""
        while chat.waiting and chat.waiting[0] <= up_to:
            old = chat.waiting.popleft()
            if old != up_to:
                self._ids.append(_OldId(old, chat, None))

    def _flush(self) -> None:
        self._renumber()
        messages = [old_id.message for old_id in self._ids if old_id.message is not None]
        for name, rows in (("files", self._files), ("messages", messages), ("conversations", self._conversations)):
            self._write(name, rows)
        self._files, self._conversations, self._ids = [], [], []

    def _renumber(self) -> None:
        """Give every old id a new one, ascending as they are."""
        new_ids = sorted(self._session.scalars(_NEW_IDS, {"count": len(self._ids)})) if self._ids else []
        for old_id, new in zip(self._ids, new_ids, strict=True):
            if old_id.message is not None:
                old_id.message.values["id"] = new
            if old_id.chat.conversation is not None:
                named = (name for name, old in old_id.chat.references.items() if old == old_id.old)
                old_id.chat.conversation.values.update(dict.fromkeys(named, new))

    def _write(self, name: str, rows: list[_Row]) -> None:
        if not rows:
            return
        line = COUNTED[name]
        key = _key(line)
        given: dict[str, object] = {
            f"{column.name}s": [row.values[column.name] for row in rows] for column in columns_of(line)
        }
        # A tenant session puts its own client there.
        written = {*self._session.scalars(_INSERTS[line], given | {BOUND_CLIENT_ID: self._client_id})}
        for row in rows:
            if row.values[key] not in written:
                raise InvalidExport(row.number, "the client has another one with the same identity")
        self._written[name] += len(rows)


def _key(line: type[Line]) -> str:
    return "id" if "id" in line.model_fields else "chat_id"


def _insert(line: type[Line]) -> ReturningInsert[Any]:
    """Rows given as one array for each column; returns the keys of those that no unique key has kept out."""
    table, columns = TABLES[line], columns_of(line)
    arrays = func.unnest(*(bindparam(f"{one.name}s", type_=ARRAY(one.type)) for one in columns))
    given = arrays.table_valued(*(column(one.name, one.type) for one in columns), name="given").render_derived()
    rows = select(bound_client_id(), *given.c)
    if line is MessageLine:
        # As `record_many`: in one order, so that no two that meet at the same ids of a provider wait for each other.
        rows = rows.order_by(given.c.provider_message_id)
    new = insert(table).from_select([table.c.client_id, *columns], rows)
    return new.on_conflict_do_nothing().returning(table.c[_key(line)])


_INSERTS: Final = {line: _insert(line) for line in COUNTED.values()}

_NEW_CLIENT: Final = insert(TABLES[ClientLine]).on_conflict_do_nothing().returning(TABLES[ClientLine].c.id)

_NEW_IDS: Final = select(func.nextval("chat_messages_id_seq", type_=Integer)).select_from(
    func.generate_series(1, bindparam("count", type_=Integer)).table_valued("number")
)

_THE_CHAT: Final = bindparam("chat_id", type_=Text)
_LOCK: Final = select(func.pg_advisory_xact_lock(lock_key(_THE_CHAT)))
_CHAT_EXISTS: Final = select(
    or_(*(exists().where(TABLES[line].c.chat_id == _THE_CHAT) for line in (ConversationLine, MessageLine)))
)
