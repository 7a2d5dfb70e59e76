"""Generated installations, from the JSON that `kestra.testing.writing` writes into a session: made by the factories."""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Uuid, select

from kestra.base import Base
from kestra.columns import Timestamptz
from kestra.errors import ConfigurationError, InvalidValue
from kestra.models import ActiveConversation, ChatMessage, Client, ClientFile
from kestra.session import SystemSession, require_system
from kestra.testing.factories import ClientFactory, ClientFileFactory, ConversationFactory, using

_NAMES_A_MESSAGE: Final = ("last_read_message_id", "last_context_message_id")
_RECORDED: Final = frozenset(
    {"last_role", "last_message_at", "last_message_id", "last_user_message_at", "last_user_message_id"}
)
"""What recording the messages leaves in a conversation."""


def create_installation(session: SystemSession, path: Path | str) -> list[Client]:
    """The clients of the file with all that is theirs, flushed and not committed.

    The database draws the ids of messages anew; conversations name the new ones. The file is read whole.

    Args:
        session: A system session.
        path: A `.json` of `kestra fixtures generate`. Change what you like in it: it has the arguments of factories.

    Raises:
        ConfigurationError: The file cannot be read.
        InvalidValue: It is no such file, or a value is none of its column.
        KestraError: As the factories.
    """
    require_system(session)
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError:
        raise InvalidValue(f"{path} is no JSON.") from None
    if not isinstance(document, dict) or not isinstance(document.get("clients"), list):
        raise InvalidValue(f"{path} has no list of clients: it is no JSON of `kestra fixtures generate`.")
    clients = []
    with using(session):
        for number, given in enumerate(document["clients"]):
            try:
                clients.append(_create_client(session, given))
            except (AttributeError, KeyError, TypeError) as error:
                # What Python says of a value that is a text where an object is wanted, or of a name that is no column.
                raise InvalidValue(f"clients[{number}] of {path} is not what factories take: {error}.") from error
    return clients


def _create_client(session: SystemSession, given: Mapping[str, Any]) -> Client:
    client = ClientFactory.create(**_values(Client, given, without={"files", "conversations"}))
    for uploaded in given.get("files", ()):
        ClientFileFactory.create(client=client, **_values(ClientFile, uploaded))
    for conversation in given.get("conversations", ()):
        _create_conversation(session, client, conversation)
    return client


def _create_conversation(session: SystemSession, client: Client, given: Mapping[str, Any]) -> None:
    said = given.get("messages", ())
    without = {"messages", *_NAMES_A_MESSAGE, "last_message_id", "last_user_message_id"}
    if said or given.get("last_message_id") is not None:
        without |= _RECORDED  # what recording its messages leaves, also when they were all taken out
    made = ConversationFactory.create(
        client=client,
        messages=[_values(ChatMessage, message, without={"id", "chat_id"}) for message in said],
        **_values(ActiveConversation, given, without=without),
    )
    of_chat = (ChatMessage.client_id == client.id, ChatMessage.chat_id == made.chat_id)
    drawn = session.scalars(select(ChatMessage.id).where(*of_chat).order_by(ChatMessage.id))
    new_ids = {message.get("id"): new_id for message, new_id in zip(said, drawn, strict=True)} | {None: None}
    for name in _NAMES_A_MESSAGE:
        setattr(made, name, new_ids.get(given.get(name)))
    if made.last_context_message_id is None and given.get("last_context_message_id") is not None:
        made.last_context = None  # it was about messages that were taken out
    session.flush()


def _values(model: type[Base], given: Mapping[str, Any], *, without: Iterable[str] = ()) -> dict[str, Any]:
    """What JSON says in text, as the factories take it."""
    return {name: _value(model, name, value) for name, value in given.items() if name not in without}


def _value(model: type[Base], name: str, value: object) -> object:
    column = model.__table__.columns.get(name)
    if column is None or not isinstance(value, str):
        return value
    try:
        match column.type:
            case Timestamptz():
                return datetime.fromisoformat(value)
            case Uuid():
                return UUID(value)
    except ValueError:
        raise InvalidValue(f"The text given for {name} is neither a time of ISO 8601 nor a UUID.") from None
    return value
