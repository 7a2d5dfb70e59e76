"""The public face, as a type checker sees it: mypy fails where an `assert_type` does not hold."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import assert_type
from uuid import UUID

from sqlalchemy import select

from kestra import (
    ActiveConversation,
    AsyncTenantSession,
    ChatMessage,
    Client,
    Database,
    SystemSession,
    TenantSession,
    ToolsConfig,
)
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


def test_async_sessions_are_typed(db: Database, client_id: UUID) -> None:
    async def main() -> None:
        async with db, db.async_tenant_session(client_id) as session:
            assert_type(session, AsyncTenantSession)
            assert_type((await session.scalars(select(Client.name))).all(), Sequence[str])

    asyncio.run(main())
