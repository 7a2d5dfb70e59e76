"""${message[:1].upper()}${message[1:].rstrip(".")}.

Revision ${up_revision}, after ${down_revision | comma,n}, ${create_date.date()}.

Say here which lock each step takes and for how long: `lock_timeout` bounds the wait for a lock, not the time it is
held. A constraint on a big table is added NOT VALID and validated afterwards, an index on a big table is built
CONCURRENTLY in an autocommit block.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision: str = ${repr(up_revision)}
down_revision: str | Sequence[str] | None = ${repr(down_revision)}
branch_labels: str | Sequence[str] | None = ${repr(branch_labels)}
depends_on: str | Sequence[str] | None = ${repr(depends_on)}


def upgrade() -> None:
    """Go from ${down_revision | comma,n} to ${up_revision}."""
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    """Go back to exactly the schema of ${down_revision | comma,n}."""
    ${downgrades if downgrades else "pass"}
