"""What counts as now."""

from typing import Final

from sqlalchemy import bindparam, func

from kestra.columns import Timestamptz

NOW: Final = func.coalesce(bindparam("now", type_=Timestamptz), func.statement_timestamp(), type_=Timestamptz)
"""The parameter `now`, or where that is None the database's clock: one moment for the whole statement."""
