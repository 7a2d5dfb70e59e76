"""The public face, as a type checker sees it: mypy fails where an `assert_type` does not hold."""

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import assert_type
from uuid import UUID

import pytest
from sqlalchemy import select

from kestra import (
    ActiveConversation,
    AsyncTenantSession,
    ChatMessage,
    Client,
    ClientFile,
    Database,
    SystemSession,
    TenantSession,
    ToolsConfig,
)
from kestra.dao import clients, conversations, files, followups, messages
from kestra.dao.clients import ListedClient
from kestra.dao.conversations import ConversationState, InboxEntry
from kestra.dao.followups import Claim
from kestra.dao.keyset import Page
from kestra.dao.messages import Memory, Message, Recorded
from kestra.errors import TenancyError
from kestra.models import Role, Status


def test_sessions_and_rows_are_typed(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        assert_type(session, TenantSession)
        assert_type(session.client_id, UUID)
        assert_type(session.scalars(select(ChatMessage)).all(), Sequence[ChatMessage])
        client = session.scalars(select(Client)).one()
        assert_type(client.tools_config, ToolsConfig)
        assert_type(client.tools_config.ai_active, bool | None)
        assert_type(client.created_at, datetime)
        message = ChatMessage(chat_id="1", role="user", content="oi")
        assert_type(message.role, Role)
        assert_type(message.content, str | None)
        conversation = ActiveConversation(chat_id="1", status="active")
        assert_type(conversation.status, Status)
        assert_type(conversation.last_role, Role | None)
    with db.system_session(reason="types") as system:
        assert_type(system, SystemSession)
    assert_type(db.client_id_for_token("token-a"), UUID)


def test_the_data_access_layer_is_typed(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        recorded = assert_type(messages.record(session, chat_id="1", role="user", content="oi"), Recorded)
        assert_type(recorded.conversation, ConversationState)
        assert_type(messages.history(session, chat_id="1"), Page[Message])
        assert_type(conversations.inbox(session).items, list[InboxEntry])
        assert_type(followups.claim(session, limit=1, lease=timedelta(minutes=1)), list[Claim])
        assert_type(files.register(session, content=b"a").file, ClientFile)
        assert_type(clients.patch_tools_config(session, patch={}), ToolsConfig)
    with db.system_session(reason="types") as system:
        assert_type(clients.page(system), Page[ListedClient])
        assert_type(followups.clients_due(system), list[UUID])


def test_async_sessions_are_typed(db: Database, client_id: UUID) -> None:
    async def main() -> None:
        async with db:
            async with db.async_tenant_session(client_id) as session:
                assert_type(session, AsyncTenantSession)
                assert_type((await session.scalars(select(Client.name))).all(), Sequence[str])
                assert_type(await session.run_sync(messages.memory, chat_id="1"), Memory)
                # A function for all clients is not for a session of one; nor is an argument of another type.
                with pytest.raises(TenancyError):
                    await session.run_sync(clients.page)  # type: ignore[arg-type]  # the point
                with pytest.raises(TypeError):
                    await session.run_sync(messages.memory)  # type: ignore[call-arg]  # the point
            async with db.async_system_session(reason="types") as system:
                assert_type(await system.run_sync(followups.clients_due), list[UUID])

    asyncio.run(main())
