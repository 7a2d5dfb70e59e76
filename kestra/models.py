"""The tables: the ER diagram of the product on one screen.

Defaults are the server's, because raw SQL writers exist too. Relationships never load by accident (`lazy="raise"`): say
what a query needs with `selectinload` and friends. Each one joins on the client, so none can cross to another.
"""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Identity,
    Index,
    Integer,
    PrimaryKeyConstraint,
    String,
    Text,
    UniqueConstraint,
    and_,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, foreign, mapped_column, relationship

from kestra.base import SYSTEM_ONLY, Base, ClientId, TenantOwned
from kestra.columns import IntBetween, OneOf, PydanticJSONB, Timestamptz
from kestra.tools_config import ToolsConfig

Role = Literal["user", "assistant", "system"]
Status = Literal["active", "finished"]

Moment = Annotated[datetime, mapped_column(Timestamptz)]
"""Aware; the instant is what counts, the zone is the connection's."""

CreatedAt = Annotated[datetime, mapped_column(Timestamptz, server_default=func.now())]
"""A `Moment` that is now unless it is said: when the row was made."""


class Client(Base):
    """A company that answers its customers with Kestra: the tenant. A tenant session sees one row of this table."""

    __tablename__ = "clients"
    __table_args__ = (
        CheckConstraint("token <> ''", name="token_not_blank"),
        CheckConstraint("jsonb_typeof(tools_config) = 'object'", name="tools_config_is_object"),
    )

    id: Mapped[UUID] = mapped_column(ClientId, primary_key=True, server_default=text("gen_random_uuid()"))
    name: Mapped[str] = mapped_column(String(255))
    token: Mapped[str] = mapped_column(String(255), unique=True)
    system_prompt: Mapped[str | None] = mapped_column(Text)
    tools_config: Mapped[ToolsConfig] = mapped_column(PydanticJSONB(ToolsConfig), server_default=text("'{}'::jsonb"))
    created_at: Mapped[CreatedAt]

    conversations: Mapped[list["ActiveConversation"]] = relationship(
        back_populates="client", lazy="raise", passive_deletes="all"
    )
    messages: Mapped[list["ChatMessage"]] = relationship(back_populates="client", lazy="raise", passive_deletes="all")
    files: Mapped[list["ClientFile"]] = relationship(back_populates="client", lazy="raise", passive_deletes="all")

    def __repr__(self) -> str:
        """The identity alone: the token and the configuration hold secrets."""
        return f"Client(id={self.id})"


class ActiveConversation(TenantOwned, Base):
    """Where one conversation stands, one row for each end customer of a client. The follow-up workers live on it."""

    __tablename__ = "active_conversations"
    __table_args__ = (
        PrimaryKeyConstraint("chat_id", "client_id"),
        CheckConstraint("status IN ('active', 'finished')", name="status"),
        CheckConstraint("followup_stage BETWEEN 0 AND 5", name="followup_stage"),
        CheckConstraint("last_role IN ('user', 'assistant', 'system')", name="last_role"),
        CheckConstraint("(claim_token IS NULL) = (claimed_until IS NULL)", name="claim"),
        # The inbox: newest activity first, of one status.
        Index("ix_active_conversations_inbox", "client_id", "status", "last_message_at", "chat_id"),
        Index(
            "ix_active_conversations_unread",
            "client_id",
            "status",
            "last_message_at",
            "chat_id",
            postgresql_where=text("last_user_message_id > coalesce(last_read_message_id, 0)"),
        ),
        # The follow-up workers: who has been silent since the assistant spoke, for each stage's own delay.
        Index(
            "ix_active_conversations_due",
            "client_id",
            "followup_stage",
            "last_message_at",
            postgresql_where=text("status = 'active' AND last_role = 'assistant' AND followup_stage < 5"),
        ),
    )

    chat_id: Mapped[str] = mapped_column(Text)
    status: Mapped[Status] = mapped_column(OneOf(Status), server_default="active")
    followup_stage: Mapped[int] = mapped_column(IntBetween(0, 5), server_default=text("0"))
    last_role: Mapped[Role | None] = mapped_column(OneOf(Role))
    last_message_at: Mapped[CreatedAt]
    last_context: Mapped[str | None] = mapped_column(Text)
    last_message_id: Mapped[int | None]
    last_user_message_at: Mapped[Moment | None]
    last_user_message_id: Mapped[int | None]
    last_read_message_id: Mapped[int | None]
    last_context_message_id: Mapped[int | None]
    paused_until: Mapped[Moment | None]
    claim_token: Mapped[UUID | None]
    claimed_until: Mapped[Moment | None]

    client: Mapped[Client] = relationship(back_populates="conversations", lazy="raise")
    messages: Mapped[list["ChatMessage"]] = relationship(
        primaryjoin=lambda: and_(
            ActiveConversation.client_id == foreign(ChatMessage.client_id),
            ActiveConversation.chat_id == foreign(ChatMessage.chat_id),
        ),
        order_by=lambda: (ChatMessage.created_at, ChatMessage.id),
        lazy="raise",
        viewonly=True,
    )

    def __repr__(self) -> str:
        """The identity and the state; never the context, which quotes messages."""
        return f"ActiveConversation(chat_id={self.chat_id!r}, client_id={self.client_id}, status={self.status!r})"


class ChatMessage(TenantOwned, Base):
    """One message of a conversation, said by the end customer, the assistant or the system."""

    __tablename__ = "chat_messages"
    __table_args__ = (
        PrimaryKeyConstraint("client_id", "id"),
        CheckConstraint("role IN ('user', 'assistant', 'system')", name="role"),
        # NOT VALID in the database: it binds new messages, the empty ones of adopted installations stay.
        CheckConstraint("coalesce(content, '') <> '' OR coalesce(media_url, '') <> ''", name="content_or_media"),
        CheckConstraint("provider_message_id <> ''", name="provider_message_id"),
        # History and memory, by keyset.
        Index(None, "client_id", "chat_id", "created_at", "id"),
        # A provider delivers at least once. Its ids are unique for a client, under whatever chat_id a message arrives.
        Index(
            "uq_chat_messages_provider_message_id",
            "client_id",
            "provider_message_id",
            unique=True,
            postgresql_where=text("provider_message_id IS NOT NULL"),
        ),
        Index("ix_chat_messages_unread", "client_id", "chat_id", "id", postgresql_where=text("role = 'user'")),
    )

    id: Mapped[int] = mapped_column(Integer, autoincrement=True)
    chat_id: Mapped[str] = mapped_column(Text)
    role: Mapped[Role] = mapped_column(OneOf(Role))
    content: Mapped[str | None] = mapped_column(Text)
    media_url: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[CreatedAt]
    provider_message_id: Mapped[str | None] = mapped_column(Text)

    client: Mapped[Client] = relationship(back_populates="messages", lazy="raise")

    def __repr__(self) -> str:
        """The identity; never the content."""
        return f"ChatMessage(id={self.id}, client_id={self.client_id}, chat_id={self.chat_id!r}, role={self.role!r})"


class ClientFile(TenantOwned, Base):
    """A file a client gave its assistant. `google_file_uri` is a cache: the Gemini File API forgets after 48 hours."""

    __tablename__ = "client_files"
    __table_args__ = (
        PrimaryKeyConstraint("client_id", "id"),
        # Unique for each client: a global key would tell one company what another has uploaded.
        UniqueConstraint("client_id", "file_hash"),
        CheckConstraint("file_hash = lower(file_hash)", name="file_hash_lower"),
        CheckConstraint("size_bytes >= 0", name="size_bytes"),
    )

    id: Mapped[UUID] = mapped_column(server_default=text("gen_random_uuid()"))
    filename: Mapped[str | None] = mapped_column(String(255))
    file_hash: Mapped[str | None] = mapped_column(String(64))
    google_file_uri: Mapped[str | None] = mapped_column(String(512))
    google_file_expires_at: Mapped[Moment | None]
    size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    media_type: Mapped[str | None] = mapped_column(String(255))

    client: Mapped[Client] = relationship(back_populates="files", lazy="raise")

    def __repr__(self) -> str:
        """The identity; the URI is a capability."""
        return f"ClientFile(id={self.id}, client_id={self.client_id}, filename={self.filename!r})"


class OrphanedRow(Base):
    """A row that the adoption of an existing installation could give to no client, kept whole, out of reach."""

    __tablename__ = "orphaned_rows"
    __table_args__ = SYSTEM_ONLY

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    table_name: Mapped[str] = mapped_column(Text)
    row: Mapped[dict[str, Any]] = mapped_column(JSONB)
    reason: Mapped[str] = mapped_column(Text)
    moved_at: Mapped[CreatedAt]

    def __repr__(self) -> str:
        """Where it came from; never the row itself."""
        return f"OrphanedRow(id={self.id}, table_name={self.table_name!r}, reason={self.reason!r})"
