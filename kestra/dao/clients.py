"""Clients: who a webhook is for, and what each client has set up for its assistant."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from types import EllipsisType
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Select, select, tuple_, type_coerce, update
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.orm import Session, aliased

from kestra.columns import check_text
from kestra.dao.keyset import Page, check_limit, instant, page_of, position
from kestra.errors import ClientNotFound, DuplicateToken, InvalidValue, UnknownToken
from kestra.models import Client
from kestra.session import SystemSession, TenantSession, require_system, require_tenant
from kestra.tools_config import ToolsConfig, merge_patch, unmask

MAX_TOKEN_LENGTH: Final = 255
"""The most characters of a token. PostgreSQL would cut blanks off a longer one, and it would be another token."""


def client_id_for_token(session: Session, *, token: str) -> UUID:
    """The client that has this token, compared exactly: case, blanks and all.

    Raises:
        UnknownToken: No client has it, or it is empty. The token is not in the text.
    """
    client_id: UUID | None = None
    with suppress(InvalidValue):  # what cannot be a token is nobody's
        check_token(token)
        client_id = session.scalar(select(Client.id).where(Client.token == token))
    if client_id is None:
        raise UnknownToken
    return client_id


def create(
    session: SystemSession,
    *,
    name: str,
    token: str,
    system_prompt: str | None = None,
    tools_config: ToolsConfig | Mapping[str, object] | None = None,
) -> Client:
    """A new client. A duplicate token leaves the transaction as it was, and usable.

    Args:
        session: A system session.
        name: At most 255 characters.
        token: What webhooks name the client with: 1 to 255 characters, kept exactly.
        system_prompt: What the assistant is told first.
        tools_config: The whole document; None is an empty one.

    Raises:
        DuplicateToken: Another client has the token.
        InvalidToolsConfig: The document is not valid, or has the mask of a secret in place of it.
        InvalidValue: A text cannot be stored.
    """
    require_system(session)
    check_token(token)
    config = unmask({} if tools_config is None else tools_config, stored={})
    new = insert(Client).values(name=name, token=token, system_prompt=system_prompt, tools_config=config)
    new = new.on_conflict_do_nothing(index_elements=[Client.token])
    client = session.scalars(new.returning(Client)).one_or_none()
    if client is None:
        raise DuplicateToken
    return client


@dataclass(frozen=True, slots=True)
class ListedClient:
    """A client as a list shows it: without its document, which somebody may have to repair first.

    Attributes:
        id: The client's id.
        name: What it is called.
        created_at: When it was made, aware.
    """

    id: UUID
    name: str
    created_at: datetime


def page(session: SystemSession, *, cursor: str | None = None, limit: int = 50) -> Page[ListedClient]:
    """Clients, oldest first.

    Args:
        session: A system session.
        cursor: That of the page before; None is the first page.
        limit: The most clients, 1 to 500.

    Raises:
        InvalidCursor: The cursor is that of another list.
        InvalidValue: The limit is out of bounds.
    """
    require_system(session)
    after = None if cursor is None else position(cursor, scope=_PAGES, kinds=(instant, UUID))
    clients = [ListedClient(*row) for row in session.execute(_page(after, check_limit(limit)))]
    return page_of(clients, limit=limit, scope=_PAGES, key=lambda last: [last.created_at.isoformat(), str(last.id)])


def get(session: TenantSession) -> Client:
    """The client of the session.

    Raises:
        ClientNotFound: There is no such client.
    """
    client_id = require_tenant(session)
    client = session.scalars(select(Client)).one_or_none()
    if client is None:
        raise ClientNotFound(client_id)
    return client


def edit(
    session: TenantSession, *, name: str | EllipsisType = ..., system_prompt: str | EllipsisType | None = ...
) -> Client:
    """The client of the session, after a change of what is given; what is not stays.

    Args:
        session: A session of the client.
        name: At most 255 characters.
        system_prompt: What the assistant is told first; None clears it.

    Raises:
        ClientNotFound: There is no such client.
        InvalidValue: A text cannot be stored.
    """
    client_id = require_tenant(session)
    given = {"name": name, "system_prompt": system_prompt}
    changes = {column: value for column, value in given.items() if value is not ...}
    if not changes:
        return get(session)
    client = session.scalars(
        update(Client).values(changes).returning(Client),
        execution_options={"synchronize_session": False, "populate_existing": True},
    ).one_or_none()
    if client is None:
        raise ClientNotFound(client_id)
    return client


def set_token(session: SystemSession, *, client_id: UUID, token: str) -> None:
    """Give a client another token; from the commit on, the old one is unknown.

    A token that another client has leaves the transaction usable, unless it was taken at the same moment. Messages of
    the client wait for the end of the transaction, as the token is a key of its row.

    Args:
        session: A system session.
        client_id: Whose token it becomes.
        token: 1 to 255 characters, kept exactly.

    Raises:
        ClientNotFound: There is no such client.
        DuplicateToken: Another client has the token.
        InvalidValue: The text cannot be stored.
    """
    require_system(session)
    check_token(token)
    other = aliased(Client)
    taken = select(other.id).where(other.token == token, other.id != client_id).exists()
    changed = update(Client).where(Client.id == client_id, ~taken).values(token=token).returning(Client.id)
    if session.scalar(changed, execution_options={"synchronize_session": "fetch"}) is not None:
        return
    if session.scalar(select(Client.id).where(Client.id == client_id)) is None:
        raise ClientNotFound(client_id)
    raise DuplicateToken


def patch_tools_config(session: TenantSession, *, patch: Mapping[str, object]) -> ToolsConfig:
    """A copy of the client's document after a JSON merge patch (RFC 7396), with its secrets masked when shown.

    Keys are merged at every level, null takes one away, a list is replaced as a whole. The mask of a secret that comes
    back keeps the stored secret. A stored document that is not valid can be patched into one that is.

    The row is locked until the transaction ends, so that patches come one after the other; messages of the client do
    not wait for it.

    Args:
        session: A session of the client.
        patch: What changes, as JSON.

    Raises:
        ClientNotFound: There is no such client.
        InvalidToolsConfig: The whole result would not be valid, or a mask is in the place of a secret that is not
            stored. Nothing was written.
        InvalidValue: A value is none that JSONB can hold. Nothing was written.
    """
    client_id = require_tenant(session)
    ToolsConfig.check_depth(patch)
    stored = session.scalar(_LOCKED_DOCUMENT)
    if stored is None:
        raise ClientNotFound(client_id)
    config = unmask(merge_patch(stored, patch), stored=stored)
    # "evaluate": a Client that the session has loaded gets this very document, without another statement.
    session.execute(update(Client).values(tools_config=config), execution_options={"synchronize_session": "evaluate"})
    return config.model_copy()


_PAGES: Final = ("clients",)

_LOCKED_DOCUMENT: Final = select(type_coerce(Client.tools_config, JSONB())).with_for_update(key_share=True)
"""The document as it is stored, valid or not. FOR NO KEY UPDATE: the foreign keys of new rows do not wait for it."""


def _page(after: list[Any] | None, limit: int) -> Select[UUID, str, datetime]:
    """One client more than the page has."""
    clients = select(Client.id, Client.name, Client.created_at).order_by(Client.created_at, Client.id).limit(limit + 1)
    if after is None:
        return clients
    return clients.where(tuple_(Client.created_at, Client.id) > tuple_(*after))


def check_token(token: str) -> None:
    """Nothing, when the text can be a token.

    Raises:
        InvalidValue: It is empty, too long, cannot be stored, or no text. It is not quoted.
    """
    given: object = token  # annotations bind nobody
    if not isinstance(given, str) or not 0 < len(given) <= MAX_TOKEN_LENGTH:
        raise InvalidValue(f"A token is a text of 1 to {MAX_TOKEN_LENGTH} characters.")
    check_text(given)
