"""Kestra: the multi-tenant data layer of conversational SaaS.

A session belongs to one client for its whole life, and nothing that goes through it can read or write another client's
rows.
"""

from kestra.database import Database, get_database
from kestra.errors import KestraError
from kestra.models import ActiveConversation, ChatMessage, Client, ClientFile
from kestra.session import AsyncSystemSession, AsyncTenantSession, SystemSession, TenantSession
from kestra.settings import Settings
from kestra.tools_config import ToolsConfig

__all__ = [
    "ActiveConversation",
    "AsyncSystemSession",
    "AsyncTenantSession",
    "ChatMessage",
    "Client",
    "ClientFile",
    "Database",
    "KestraError",
    "Settings",
    "SystemSession",
    "TenantSession",
    "ToolsConfig",
    "get_database",
]
