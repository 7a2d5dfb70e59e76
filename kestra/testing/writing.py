"""Generated installations to files: SQL for psql, exports for `kestra.dao.imports`, or JSON for factories.

Messages are numbered from 1, as in an empty database. Times are UTC.

- `name.sql`: COPY, for `psql -f name.sql` as a superuser, into a database at head and without clients.
- `name.ndjson`: a folder with the export of each client, as `exports.export_client` writes it: without tokens, keys,
  claims and Google's URIs. `imports.import_client` reads each.
- `name.json`: `{"clients":[{…,"files":[…],"conversations":[{…,"messages":[…]}]}]}`, where the keys of each object are
  the attributes of its model. `kestra.testing.reading.create_installation` makes its rows by the factories.
"""

from collections.abc import Callable, Iterator
from json import JSONEncoder
from pathlib import Path
from shutil import rmtree
from typing import Any, Final, TextIO

from kestra.dao.ndjson import VERSION, ClientLine, ConversationLine, EndLine, FileLine, Line, MessageLine
from kestra.errors import ConfigurationError, InvalidValue
from kestra.testing.copying import COLUMNS, TIMES, chunks
from kestra.testing.installation import Installation, Row, Tenant, instant
from kestra.testing.progress import Progress


def write(path: Path, installation: Installation, progress: Progress) -> None:
    """Write the rows of the installation to a file, which is replaced, or to a folder of files, which has to be empty.

    It has the name when it is whole; until then it is `NAME.unfinished`, which is deleted when it fails.

    Args:
        path: Its suffix says how: `.sql`, `.ndjson` or `.json`.
        installation: What is written.
        progress: Is told of every row.

    Raises:
        InvalidValue: There is no such format, or the folder is not empty.
        ConfigurationError: The file cannot be written.
    """
    write_as = _FORMATS.get(path.suffix)
    if write_as is None:
        raise InvalidValue(f"The name of the file ends with one of {', '.join(_FORMATS)}, which says the format.")
    if path.is_dir() and any(path.iterdir()):
        raise InvalidValue(f"The folder {path} is not empty: exports of other clients would be taken for these.")
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        write_as(unfinished, installation, progress)
        unfinished.replace(path)
    except OSError as error:
        raise ConfigurationError(f"{error.filename or path} cannot be written: {error.strerror}.") from error
    finally:
        rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)


def _open(path: Path) -> TextIO:
    # The same bytes on any machine.
    return path.open("w", encoding="utf-8", newline="\n")


def _sql(path: Path, installation: Installation, progress: Progress) -> None:
    with _open(path) as file:
        file.write("\\set ON_ERROR_STOP on\nBEGIN;\nSET LOCAL client_encoding = 'UTF8';\n")
        for chunk in chunks(installation, first_id=1):
            for table, lines in chunk.lines.items():
                if lines:
                    file.write(f"COPY {table} ({', '.join(COLUMNS[table])}) FROM stdin;\n")
                    file.writelines(lines)
                    file.write("\\.\n")
            progress.advance(chunk.rows)
        file.write(f"SELECT setval('chat_messages_id_seq', {installation.count_messages()});\nCOMMIT;\n")


def _ndjson(folder: Path, installation: Installation, progress: Progress) -> None:
    folder.mkdir()
    first_id = 1
    for tenant in installation.tenants():
        with _open(folder / f"{tenant.row.id}.ndjson") as file:
            first_id = _export(file, tenant, installation, progress, first_id)


def _export(file: TextIO, tenant: Tenant, installation: Installation, progress: Progress, first_id: int) -> int:
    """Write the export of a client; returns the id of the next message."""

    def write(line: object) -> None:
        file.write(_encode(line) + "\n")

    write({"kestra": VERSION, "scope": "client"})
    document = {**tenant.row.tools_config, "whatsapp": {**tenant.row.tools_config["whatsapp"]}}
    left_out = [f"whatsapp.{name}" for name in ("key", "url") if document["whatsapp"].pop(name)]
    write({ClientLine.kind: _fields(ClientLine, tenant.row, tools_config=document, left_out=left_out)})
    for uploaded in tenant.files:
        write({FileLine.kind: _fields(FileLine, uploaded)})
    progress.advance(1 + len(tenant.files))
    messages = 0
    for chat in installation.chats_of(tenant, first_id=first_id):
        write({ConversationLine.kind: _fields(ConversationLine, chat.conversation)})
        for message in chat.messages:
            write({MessageLine.kind: _fields(MessageLine, message)})
        messages += len(chat.messages)
        progress.advance(1 + len(chat.messages))
    write({EndLine.kind: {"files": len(tenant.files), "conversations": tenant.chats, "messages": messages}})
    return first_id + messages


def _json(path: Path, installation: Installation, progress: Progress) -> None:
    with _open(path) as file:
        file.write('{"clients":[')
        first_id = 1
        for tenant in installation.tenants():
            client = {**_attributes(tenant.row), "files": [*map(_attributes, tenant.files)]}
            file.write(f'{"," if tenant.number else ""}\n{_encode(client)[:-1]},"conversations":[')
            progress.advance(1 + len(tenant.files))
            for number, chat in enumerate(installation.chats_of(tenant, first_id=first_id)):
                first_id += len(chat.messages)
                conversation = {**_attributes(chat.conversation), "messages": [*map(_attributes, chat.messages)]}
                file.write(f"{',' if number else ''}\n{_encode(conversation)}")
                progress.advance(1 + len(chat.messages))
            file.write("]}")
        file.write("\n]}\n")


def _attributes(row: Row) -> dict[str, Any]:
    return {name: instant(value) if name in TIMES and value is not None else value for name, value in _named(row)}


def _named(row: Row) -> Iterator[tuple[str, Any]]:
    return zip(row._fields, row, strict=True)


def _fields(line: type[Line], row: Row, **others: Any) -> dict[str, Any]:
    """What a line of an export says of a row."""
    values = _attributes(row) | others
    return {name: values[name] for name in line.model_fields}


_encode: Final = JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode

_FORMATS: Final[dict[str, Callable[[Path, Installation, Progress], None]]] = {
    ".sql": _sql,
    ".ndjson": _ndjson,
    ".json": _json,
}
