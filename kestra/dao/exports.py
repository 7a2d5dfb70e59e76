"""Exports: one chat, or a whole client, as lines of JSON, and back into a database.

A line is an object with one key, which says what it is:

    {"kestra":1,"scope":"client"}                       or {"kestra":1,"scope":"chat","chat_id":…}
    {"client":{…,"left_out":["whatsapp.key"]}}          of a client alone
    {"file":{…}}                                        of a client alone, by id
    {"conversation":{…}}                                chat by chat, by chat_id; a chat may have none
    {"message":{…}}                                     of that chat, by id
    {"end":{"files":0,"conversations":1,"messages":1}}  without it the export was cut off

Times are UTC with microseconds, numbers have every digit, keys have one order, and chats are in the order of their code
points, whatever the database sorts by: the same data is the same bytes.

What opens a door is no part of it: the token, the URL and the key of WhatsApp, the URIs of files, claims, and every
undeclared key of `tools_config` that is named like a credential. What somebody put under another name, or wrote into a
prompt or a message, is data like any other.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import chain
from json import JSONEncoder
from math import inf
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol, Self, TypeVar, get_args
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    Integer,
    Select,
    Table,
    Text,
    bindparam,
    cast,
    collate,
    column,
    exists,
    func,
    literal,
    null,
    or_,
    select,
    type_coerce,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningInsert

from kestra.base import BOUND_CLIENT_ID, bound_client_id, parse_client_id
from kestra.columns import PydanticJSONB, TrackedModel, check_text, json_dumps, json_loads
from kestra.dao.clients import MAX_TOKEN_LENGTH
from kestra.dao.locking import lock_key
from kestra.dao.messages import MAX_ID_LENGTH
from kestra.errors import ChatExists, ClientExists, ClientNotFound, DuplicateToken, InvalidExport, InvalidValue
from kestra.models import ActiveConversation, ChatMessage, Client, ClientFile, Role, Status
from kestra.session import SystemSession, TenantSession, require_system, require_tenant
from kestra.tools_config import ToolsConfig, WhatsApp, unmask

VERSION: Final = 1
"""Of the format. What reads one version refuses every other."""

_BATCH: Final = 500
"""How many rows are held at once, read or written."""


class TextSink(Protocol):
    """What lines are written to, such as a file opened for text in UTF-8."""

    def write(self, text: str, /) -> object:
        """Take some text."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How much was exported or imported."""

    files: int = 0
    conversations: int = 0
    messages: int = 0


# --- the lines --------------------------------------------------------------------------------------------------------


def _storable(text: str) -> str:
    check_text(text)
    return text


def _instant(text: object) -> object:
    return datetime.fromisoformat(text) if isinstance(text, str) else text


def _in_utc(moment: datetime) -> datetime:
    if moment.utcoffset() != timedelta():
        raise ValueError("not UTC")
    return moment


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


class _Line(BaseModel):
    """What a line says. The fields are the format: their names, their order, and what can be stored."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    kind: ClassVar[str]

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Nothing of the line."""
        return iter(())


class _Header(_Line):
    kestra: Literal[1]
    scope: Literal["client", "chat"]
    chat_id: _ChatId | None = None

    @model_validator(mode="after")
    def _is_of_one_chat(self) -> Self:
        if (self.scope == "chat") != (self.chat_id is not None):
            raise ValueError("the header of one chat names it, and no other does")
        return self


class _Client(_Line):
    kind = "client"

    id: _Id
    name: _Name
    system_prompt: _Text | None
    tools_config: dict[str, Any]
    created_at: _Moment
    left_out: list[str]


class _File(_Line):
    kind = "file"

    id: _Id
    filename: _Name | None
    file_hash: Annotated[_Text, AfterValidator(_lower), Field(max_length=64)] | None
    size_bytes: Annotated[int, Field(ge=0, lt=2**63)] | None
    media_type: _Name | None


class _Conversation(_Line):
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


class _Message(_Line):
    kind = "message"

    id: _MessageId
    chat_id: _ChatId
    role: Role
    content: _Text | None
    media_url: _Text | None
    created_at: _Moment
    provider_message_id: Annotated[_Text, Field(min_length=1, max_length=MAX_ID_LENGTH)] | None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.content and not self.media_url:
            raise ValueError("a message without content and media_url, which no new message may be")
        return self


class _End(_Line):
    kind = "end"

    files: int
    conversations: int
    messages: int


_REFERENCES: Final = ("last_message_id", "last_user_message_id", "last_read_message_id", "last_context_message_id")
"""The columns of a conversation that have the id of a message, which may be gone by now."""

_TABLES: Final[dict[type[_Line], Table]] = {
    _Client: Client.__table__,  # type: ignore[dict-item]  # a FromClause in general
    _File: ClientFile.__table__,  # type: ignore[dict-item]  # as above
    _Conversation: ActiveConversation.__table__,  # type: ignore[dict-item]  # as above
    _Message: ChatMessage.__table__,  # type: ignore[dict-item]  # as above
}

_KINDS: Final[tuple[type[_Line], ...]] = (*_TABLES, _End)
_LINES: Final = {line.kind: line for line in _KINDS}

_COUNTED: Final[dict[str, type[_Line]]] = {"files": _File, "conversations": _Conversation, "messages": _Message}

_LineT = TypeVar("_LineT", bound=_Line)


def _columns(line: type[_Line]) -> list[Column[Any]]:
    table = _TABLES[line]
    return [table.c[name] for name in line.model_fields if name in table.c]


# --- export -----------------------------------------------------------------------------------------------------------


def export_chat(session: TenantSession, *, chat_id: str, to: TextSink) -> Counts:
    """Write everything of one chat, line by line. A chat that is not there is an export with nothing in it.

    As of one moment, that of the call: whatever was committed by then is in it, whole, and nothing that came later.
    The memory that it takes does not grow with the chat.

    Args:
        session: A session of the client.
        chat_id: The chat.
        to: Where the lines go.
    """
    require_tenant(session)
    header = {"kestra": VERSION, "scope": "chat", "chat_id": chat_id}
    return _export(session, header, _CHAT_ROWS, {"chat_id": chat_id}, to)


def export_client(session: TenantSession, *, to: TextSink) -> Counts:
    """Write everything of the session's client, line by line, but for what opens a door.

    As of one moment, as `export_chat`; PostgreSQL sorts the rows first, on its disk. It is what row level security
    shows: `Database.verify` tells whether that is everything.

    Args:
        session: A session of the client.
        to: Where the lines go. Nothing is written when there is no such client.

    Raises:
        ClientNotFound: There is no such client.
    """
    require_tenant(session)
    return _export(session, {"kestra": VERSION, "scope": "client"}, _CLIENT_ROWS, {}, to)


def _export(
    session: TenantSession,
    header: Mapping[str, object],
    statement: Select[*tuple[Any, ...]],
    given: Mapping[str, object],
    to: TextSink,
) -> Counts:
    seen = dict.fromkeys(_LINES, 0)
    with session.execute(statement, given, execution_options={"yield_per": _BATCH}) as result:
        fields: dict[str, list[tuple[int, str]]] = {kind: [] for kind in _LINES}
        for index, (kind, name) in enumerate(label.split(".") for label in [*result.keys()][1:]):
            fields[kind].append((index, name))
        rows = iter(result)
        first = next(rows, None)
        if header["scope"] == "client" and (first is None or first.kind != _Client.kind):
            raise ClientNotFound(session.client_id)
        _write(to, _encode(header))
        for kind, *values in chain(() if first is None else (first,), rows):
            seen[kind] += 1
            line = {name: values[index] for index, name in fields[kind]}
            _write(to, _document(line) if kind == _Client.kind else _encode({kind: line}))
    counts = {name: seen[line.kind] for name, line in _COUNTED.items()}
    _write(to, _encode({_End.kind: counts}))
    return Counts(**counts)


def _document(client: Mapping[str, Any]) -> str:
    """The line of a client, with every digit of the numbers in its document."""
    left_out: list[str] = []
    tools_config = _without_secrets(client["tools_config"], ToolsConfig, "", left_out)
    line = {**client, "tools_config": tools_config, "left_out": left_out}
    return json_dumps({_Client.kind: {name: _as_json(value) for name, value in line.items()}})


def _write(to: TextSink, text: str) -> None:
    to.write((text if text.isascii() else text.translate(_LINE_ENDS)) + "\n")


_LINE_ENDS: Final = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""What some readers of lines take for the end of one, and JSON leaves as it is."""


def _as_json(value: object) -> object:
    match value:
        case datetime():
            return value.astimezone(UTC).isoformat(timespec="microseconds")
        case UUID():
            return str(value)
    return value


_encode: Final = JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_as_json).encode
"""As `json_dumps` and many times as fast, for lines without a document, whose numbers it could round."""


def _rows(*lines: type[_Line], chat_id: ColumnElement[str] | None = None) -> Select[*tuple[Any, ...]]:
    """The rows of these lines in the order of an export, in one statement, and so as of one moment.

    A row has its kind, and after it the columns of every kind, NULL where they are another's.
    """
    arms = []
    for place, line in enumerate(lines):
        columns = [
            (_stored(column) if other is line else cast(null(), _stored(column).type)).label(
                f"{other.kind}.{column.name}"
            )
            for other in lines
            for column in _columns(other)
        ]
        arm = select(literal(place).label("place"), literal(line.kind).label("kind"), *columns)
        arms.append(arm if chat_id is None else arm.where(_TABLES[line].c.chat_id == chat_id))
    rows = union_all(*arms).subquery("rows").c
    return select(*[*rows][1:]).order_by(
        # Files come before all chats, and the conversation before its messages.
        collate(func.coalesce(rows["conversation.chat_id"], rows["message.chat_id"]), "C").nulls_first(),
        rows.place,
        *(rows[f"{line.kind}.id"] for line in lines if "id" in line.model_fields),
    )


def _stored(column: Column[Any]) -> ColumnElement[Any]:
    """A document as it is stored: one that is not valid is exported too."""
    return type_coerce(column, JSONB()) if isinstance(column.type, PydanticJSONB) else column


_CLIENT_ROWS: Final = _rows(_Client, _File, _Conversation, _Message)
_CHAT_ROWS: Final = _rows(_Conversation, _Message, chat_id=bindparam("chat_id", type_=Text))


# --- what is left out of tools_config ---------------------------------------------------------------------------------

_NEVER_SHOWN: Final = {(WhatsApp, "url")}
"""Declared keys that are no `SecretStr` and open a door too: this one names the instance, and may carry its token."""

_CREDENTIALS: Final = re.compile(
    r"(api|access|secret|private)?keys?|(access|auth)?tokens?|(client)?secrets?|passwords?|passwd|passphrase|pass|pwd"
    r"|credentials?|authorization|auth|bearer|jwt|cookies?|senhas?|segredos?|credencia(l|is)|autoriza[cç][aã]o"
)
"""Words that name a credential, in English and in Portuguese."""

_CHAVE: Final = frozenset({"api", "acesso", "secreta", "privada"})
"""What makes a `chave` one; alone it is a key like that of a table."""

_WORD_IN_CAMEL_CASE: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def _without_secrets(
    value: object, section: type[TrackedModel] | None, path: str, left_out: list[str]
) -> Any:  # any JSON
    """The JSON without what opens a door.

    Args:
        value: A document, or a part of it.
        section: What declares its keys; None where nothing does.
        path: Where it is, with a dot at the end.
        left_out: Gets the path of everything that is left out.
    """
    match value:
        case Mapping():
            kept = {}
            for key, item in value.items():
                if _is_secret(section, key, item):
                    left_out.append(path + key)
                else:
                    kept[key] = _without_secrets(item, _section(section, key), f"{path}{key}.", left_out)
            return kept
        case list():
            return [_without_secrets(item, section, f"{path}{index}.", left_out) for index, item in enumerate(value)]
    return value


def _is_secret(section: type[TrackedModel] | None, key: str, value: object) -> bool:
    if section is None or key not in section.model_fields:
        return _names_a_credential(key, value)
    nested = _section(section, key)
    # An invalid document may have anything in the place of a section with secrets.
    misplaced = nested is not None and any(_is_declared(nested, name) for name in nested.model_fields)
    return _is_declared(section, key) or (misplaced and not (value is None or isinstance(value, Mapping)))


def _is_declared(section: type[TrackedModel], key: str) -> bool:
    return (section, key) in _NEVER_SHOWN or SecretStr in _kinds(section.model_fields[key].annotation)


def _section(section: type[TrackedModel] | None, key: str) -> type[TrackedModel] | None:
    field = section.model_fields.get(key) if section is not None else None
    kinds = [] if field is None else _kinds(field.annotation)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, TrackedModel)), None)


def _kinds(annotation: object) -> list[object]:
    """What a value may be, and the items of a list of it."""
    arguments = get_args(annotation)
    return [kind for argument in arguments for kind in _kinds(argument)] if arguments else [annotation]


def _names_a_credential(name: str, value: object) -> bool:
    words = set(re.split(r"[\W\d_]+", _WORD_IN_CAMEL_CASE.sub("_", name).casefold()))
    if isinstance(value, int | float | Decimal):
        words.discard("tokens")  # an amount: max_tokens
    return any(map(_CREDENTIALS.fullmatch, words)) or ("chave" in words and not words.isdisjoint(_CHAVE))


# --- import -----------------------------------------------------------------------------------------------------------


def import_client(
    session: SystemSession, *, source: Iterable[str], token: str, client_id: UUID | None = None
) -> Counts:
    """Make a client of its export.

    Messages get new ids, in the order of the old ones in each chat, and conversations refer to these. What was left out
    of the export is not there: give the client its credentials, and upload its files again. The memory that it takes
    does not grow with the export.

    A message with neither content nor media, as adopted installations have them, is refused like any new one: nothing
    could be said in its place.

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

    def header(self, scope: str) -> _Header:
        """The first line."""
        value = self._object()
        if value is None or value.get("kestra") != VERSION:
            raise self.refused(f"it is not the header of an export of version {VERSION}")
        header = self._validated(_Header, value)
        if header.scope != scope:
            raise self.refused(f"this is the export of a {header.scope}, not of a {scope}")
        return header

    def __iter__(self) -> Iterator[_Line]:
        """The other lines."""
        while (value := self._object()) is not None:
            kind, *more = value
            if more or kind not in _LINES:
                raise self.refused("it is none of " + ", ".join(_LINES))
            yield self._validated(_LINES[kind], value[kind])

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
    _check_token(token)
    line = next(iter(lines), None)
    if not isinstance(line, _Client):
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


def _check_token(token: str) -> None:
    given: object = token  # annotations bind nobody
    if not isinstance(given, str) or not 0 < len(given) <= MAX_TOKEN_LENGTH:
        raise InvalidValue(f"A token is a text of 1 to {MAX_TOKEN_LENGTH} characters.")
    check_text(given)


def _import(session: Session, client_id: UUID, lines: _Lines, header: _Header) -> Counts:
    """Write what comes after the header and the client."""
    writer = _Writer(session, client_id)
    before = _BEFORE_ALL
    for line in lines:
        if isinstance(line, _End):
            counts = writer.finish()
            if dict(line) != asdict(counts):
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


def _position(line: _Line) -> tuple[int, str, int, int]:
    """Where a line belongs. Positions that only grow keep each chat together, and everything unique."""
    match line:
        case _File():
            return (1, "", 0, line.id.int)
        case _Conversation():
            return (_IN_CHATS, line.chat_id, 0, 0)
        case _Message():
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
        self._written = dict.fromkeys(_COUNTED, 0)
        self._files: list[_Row] = []
        self._conversations: list[_Row] = []
        self._ids: list[_OldId] = []
        self._chat: _Chat | None = None

    def add(self, number: int, line: _Line) -> None:
        """Take a line. Lines come in the order of an export."""
        row = _Row(number, dict(line))
        match line:
            case _File():
                self._files.append(row)
            case _Conversation():
                self._open(line.chat_id, row)
            case _Message():
                chat = self._chat
                if chat is None or chat.chat_id != line.chat_id:
                    chat = self._open(line.chat_id, None)
                self._take_waiting(chat, up_to=line.id)
                self._ids.append(_OldId(line.id, chat, row))
        if len(self._files) + len(self._conversations) + len(self._ids) >= _BATCH:
            self._flush()

    def finish(self) -> Counts:
        """How much was written, now that everything is."""
        self._close()
        self._flush()
        return Counts(**self._written)

    def _open(self, chat_id: str, conversation: _Row | None) -> _Chat:
        self._close()
        values = conversation.values if conversation is not None else {}
        references = {name: values[name] for name in _REFERENCES if values.get(name) is not None}
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
        line = _COUNTED[name]
        key = _key(line)
        given: dict[str, object] = {
            f"{column.name}s": [row.values[column.name] for row in rows] for column in _columns(line)
        }
        # A tenant session puts its own client there.
        written = {*self._session.scalars(_INSERTS[line], given | {BOUND_CLIENT_ID: self._client_id})}
        for row in rows:
            if row.values[key] not in written:
                raise InvalidExport(row.number, "the client has another one with the same identity")
        self._written[name] += len(rows)


def _key(line: type[_Line]) -> str:
    return "id" if "id" in line.model_fields else "chat_id"


def _insert(line: type[_Line]) -> ReturningInsert[Any]:
    """Rows given as one array for each column; returns the keys of those that no unique key has kept out."""
    table, columns = _TABLES[line], _columns(line)
    arrays = func.unnest(*(bindparam(f"{one.name}s", type_=ARRAY(one.type)) for one in columns))
    given = arrays.table_valued(*(column(one.name, one.type) for one in columns), name="given").render_derived()
    new = insert(table).from_select([table.c.client_id, *columns], select(bound_client_id(), *given.c))
    return new.on_conflict_do_nothing().returning(table.c[_key(line)])


_INSERTS: Final = {line: _insert(line) for line in _COUNTED.values()}

_NEW_CLIENT: Final = insert(_TABLES[_Client]).on_conflict_do_nothing().returning(_TABLES[_Client].c.id)

_NEW_IDS: Final = select(func.nextval("chat_messages_id_seq", type_=Integer)).select_from(
    func.generate_series(1, bindparam("count", type_=Integer)).table_valued("number")
)

_THE_CHAT: Final = bindparam("chat_id", type_=Text)
_LOCK: Final = select(func.pg_advisory_xact_lock(lock_key(_THE_CHAT)))
_CHAT_EXISTS: Final = select(
    or_(*(exists().where(_TABLES[line].c.chat_id == _THE_CHAT) for line in (_Conversation, _Message)))
)
