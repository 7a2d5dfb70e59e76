"""The tables, for statements that return plain rows: hot paths do without the ORM's identity map."""

from typing import Final

from sqlalchemy import Table

from kestra.models import ActiveConversation, ChatMessage, Client, ClientFile, OrphanedRow

# SQLAlchemy calls them FromClause, because a class may also be mapped to a join.
CLIENTS: Final[Table] = Client.__table__  # type: ignore[assignment]  # as above
CONVERSATIONS: Final[Table] = ActiveConversation.__table__  # type: ignore[assignment]  # as above
MESSAGES: Final[Table] = ChatMessage.__table__  # type: ignore[assignment]  # as above
FILES: Final[Table] = ClientFile.__table__  # type: ignore[assignment]  # as above
ORPHANED_ROWS: Final[Table] = OrphanedRow.__table__  # type: ignore[assignment]  # as above
