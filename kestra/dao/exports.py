"""Exports: one chat, or a whole client, as the lines of `kestra.dao.ndjson`.

What opens a door is no part of it: the token, the URL and the key of WhatsApp, the URIs of files, claims, and every
undeclared key of `tools_config` that is named like a credential. What somebody put under another name, or wrote into a
prompt or a message, is data like any other.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from itertools import chain
from json import JSONEncoder
from typing import Any, Final, Protocol, get_args
from uuid import UUID

from pydantic import (
    SecretStr,
)
from sqlalchemy import (
    Column,
    ColumnElement,
    Select,
    Text,
    bindparam,
    cast,
    collate,
    func,
    literal,
    null,
    select,
    type_coerce,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB

from kestra.columns import PydanticJSONB, TrackedModel, json_dumps
from kestra.dao.ndjson import (
    COUNTED,
    LINES,
    TABLES,
    VERSION,
    ClientLine,
    ConversationLine,
    Counts,
    EndLine,
    FileLine,
    Line,
    MessageLine,
    columns_of,
)
from kestra.errors import ClientNotFound
from kestra.session import TenantSession, require_tenant
from kestra.tools_config import ToolsConfig, WhatsApp

_BATCH: Final = 500
"""How many rows are held at once."""


class TextSink(Protocol):
    """What lines are written to, such as a file opened for text in UTF-8."""

    def write(self, text: str, /) -> object:
        """Take some text."""


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
    seen = dict.fromkeys(LINES, 0)
    with session.execute(statement, given, execution_options={"yield_per": _BATCH}) as result:
        fields: dict[str, list[tuple[int, str]]] = {kind: [] for kind in LINES}
        for index, (kind, name) in enumerate(label.split(".") for label in [*result.keys()][1:]):
            fields[kind].append((index, name))
        rows = iter(result)
        first = next(rows, None)
        if header["scope"] == "client" and (first is None or first.kind != ClientLine.kind):
            raise ClientNotFound(session.client_id)
        _write(to, _encode(header))
        for kind, *values in chain(() if first is None else (first,), rows):
            seen[kind] += 1
            line = {name: values[index] for index, name in fields[kind]}
            _write(to, _document(line) if kind == ClientLine.kind else _encode({kind: line}))
    counts = {name: seen[line.kind] for name, line in COUNTED.items()}
    _write(to, _encode({EndLine.kind: counts}))
    return Counts(**counts)


def _document(client: Mapping[str, Any]) -> str:
    """The line of a client, with every digit of the numbers in its document."""
    left_out: list[str] = []
    tools_config = _without_secrets(client["tools_config"], ToolsConfig, "", left_out)
    line = {**client, "tools_config": tools_config, "left_out": left_out}
    return json_dumps({ClientLine.kind: {name: _as_json(value) for name, value in line.items()}})


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


def _rows(*lines: type[Line], chat_id: ColumnElement[str] | None = None) -> Select[*tuple[Any, ...]]:
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
            for column in columns_of(other)
        ]
        arm = select(literal(place).label("place"), literal(line.kind).label("kind"), *columns)
        arms.append(arm if chat_id is None else arm.where(TABLES[line].c.chat_id == chat_id))
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


_CLIENT_ROWS: Final = _rows(ClientLine, FileLine, ConversationLine, MessageLine)
_CHAT_ROWS: Final = _rows(ConversationLine, MessageLine, chat_id=bindparam("chat_id", type_=Text))


# --- what is left out of tools_config ---------------------------------------------------------------------------------

_NEVER_SHOWN: Final = {(WhatsApp, "url")}
"""Declared keys that are no `SecretStr` and open a door too: this one names the instance, and may carry its token."""

_CREDENTIALS: Final = re.compile(
    r"(api|access|secret|private)?keys?|(access|auth)?tokens?|(client)?secrets?|passwords?|passwd|passphrase|pass|pwd"
    r"|oauth|hmac|signatures?|assinaturas?|dsn|credentials?|authorization|auth|bearer|jwt|cookies?|senhas?|segredos?|credencia(l|is)|autoriza[cç][aã]o"
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
