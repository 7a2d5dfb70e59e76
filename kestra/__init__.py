"""Kestra: the multi-tenant data layer of conversational SaaS.

A session belongs to one client for its whole life, and nothing that goes through it can read or write another client's
rows.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kestra.database import Database, get_database
    from kestra.errors import KestraError
    from kestra.models import ActiveConversation, ChatMessage, Client, ClientFile
    from kestra.session import AsyncSystemSession, AsyncTenantSession, SystemSession, TenantSession
    from kestra.settings import Settings
    from kestra.tools_config import ToolsConfig
else:
    # Where each public name lives; imported when it is first asked for. pytest imports this package in each of its
    # runs, and must not wait for SQLAlchemy where nothing of kestra is tested.
    _HOMES = {
        "database": ("Database", "get_database"),
        "errors": ("KestraError",),
        "models": ("ActiveConversation", "ChatMessage", "Client", "ClientFile"),
        "session": ("AsyncSystemSession", "AsyncTenantSession", "SystemSession", "TenantSession"),
        "settings": ("Settings",),
        "tools_config": ("ToolsConfig",),
    }

    def __getattr__(name: str) -> Any:
        for module, names in _HOMES.items():
            if name in names:
                globals()[name] = value = getattr(import_module(f"kestra.{module}"), name)
                return value
        raise AttributeError(f"module 'kestra' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return __all__


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
