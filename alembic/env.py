"""How Alembic reaches the database: one connection, one run at a time, every wait bounded.

Understands `-x timezone=…` (see revision 0002), `-x lock_timeout=…` (default 5s: how long a step may wait for a table
that somebody uses), `-x wait=…` (default 600 seconds: how long to wait for another run of Alembic) and `-x url=…`. The
same names may be given in `Config.attributes`, and `connection` there hands in an open connection.
"""

import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging import getLogger
from logging.config import fileConfig
from typing import Any, Final, Literal

import psycopg
from alembic import context
from alembic.autogenerate.api import AutogenContext
from alembic.operations.ops import MigrationScript
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, NullPool, TypeDecorator, Uuid, create_engine, text
from sqlalchemy.exc import DBAPIError, SAWarning

import kestra.models  # noqa: F401 - fills the metadata
from kestra.base import Base
from kestra.driver import connection_error
from kestra.embedded import resolve_url
from kestra.errors import KestraError
from kestra.rls import PLUGIN
from kestra.settings import Settings

log = getLogger("alembic.env")

ONE_AT_A_TIME: Final = 5_201_314_202_607
"""The key of the advisory lock that a run of Alembic holds: one run per database, to which such locks belong."""

CLASSES_WITHOUT_VALUES: Final = ("08", "23", "25", "40", "42", "53", "55", "57")
"""Classes of SQLSTATE whose primary message names tables and constraints. Those of other classes may quote values."""


def _options() -> dict[str, Any]:
    return {**context.config.attributes, **context.get_x_argument(as_dictionary=True)}


# --- autogenerate -----------------------------------------------------------------------------------------------------


def _render_item(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
    """The source of an application's column type, as the plain type it is stored as: migrations never import kestra."""
    if kind != "type" or not type(item).__module__.startswith("kestra."):
        return False
    plain = Uuid() if isinstance(item, Uuid) else item.impl_instance if isinstance(item, TypeDecorator) else item
    if type(plain).__module__.startswith("sqlalchemy.dialects.postgresql"):
        autogen.imports.add("from sqlalchemy.dialects import postgresql")
        return f"postgresql.{type(plain).__name__}()"
    return f"sa.{plain!r}"


def _number(migration: MigrationContext, _revision: Any, scripts: list[MigrationScript]) -> None:
    """Count the revisions: 0004 comes after 0003."""
    del migration
    present = [script.revision for script in ScriptDirectory.from_config(context.config).walk_revisions()]
    for script in scripts:
        script.rev_id = f"{max(map(int, present), default=0) + 1:04d}"


# --- one run at a time ------------------------------------------------------------------------------------------------


def _seconds(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        raise CommandError(f"-x wait={value} is not a number of seconds.") from None


@contextmanager
def _alone(connection: Connection, wait: float) -> Iterator[None]:
    """Hold the database's migration lock. Alembic reads the current revision inside, after any run before this one.

    The lock is polled. A blocking pg_advisory_lock would wait inside a statement, with a snapshot, and CREATE INDEX
    CONCURRENTLY waits for all snapshots: the two runs would wait for each other.

    Raises:
        CommandError: Another run still had the lock after `wait` seconds.
    """
    deadline = time.monotonic() + wait
    told = False
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": ONE_AT_A_TIME}):
        connection.commit()
        if time.monotonic() > deadline:
            raise CommandError(
                f"Another run of Alembic has held this database for {wait:g} s. Try again when it is done."
            )
        if not told:
            log.info("Waiting for another run of Alembic on this database")
            told = True
        time.sleep(0.2)
    connection.commit()
    try:
        yield
    finally:
        # A connection that broke has released the lock already.
        with suppress(DBAPIError):
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": ONE_AT_A_TIME})
            connection.execute(text("RESET lock_timeout"))
            connection.execute(text("RESET statement_timeout"))
            connection.commit()


# --- errors -----------------------------------------------------------------------------------------------------------


def _explain(error: DBAPIError, lock_timeout: str) -> str:
    """What went wrong, without the server's DETAIL, which quotes rows."""
    cause = error.orig
    if not isinstance(cause, psycopg.Error) or cause.sqlstate is None:
        return "The connection to the database broke. Run the same command again: it goes on where it stopped."
    state, said = cause.sqlstate, cause.diag.message_primary
    if not state.startswith(CLASSES_WITHOUT_VALUES):
        said = "the message may quote a row, so it is not shown; see the server's log"
    match state:
        case "55P03":
            advice = (
                f"A table was in use for longer than lock_timeout ({lock_timeout}). Run the same command again: it "
                "goes on where it stopped. Give it longer with -x lock_timeout=30s, or look for long transactions in "
                "pg_stat_activity."
            )
        case "40P01" | "57014" | "57P01" | "57P02" | "57P03":
            advice = "Run the same command again: it goes on where it stopped."
        case "42501":
            advice = "Migrations run as the owner of the tables."
        case _:
            advice = "The step that failed was rolled back."
    return f"PostgreSQL refused a step ({state}: {said}). {advice}"


# --- the run ----------------------------------------------------------------------------------------------------------


def _connect(url: str) -> psycopg.Connection:
    try:
        return psycopg.connect(url, application_name="alembic")
    except psycopg.ProgrammingError:
        raise CommandError("The database URL is malformed.") from None
    except psycopg.OperationalError as error:
        raise CommandError(str(connection_error(error))) from None


def _run(connection: Connection, options: dict[str, Any]) -> None:
    lock_timeout = str(options.get("lock_timeout", "5s"))
    try:
        if not re.fullmatch(r"\d+ ?(ms|s|min)?", lock_timeout):
            raise CommandError(f"-x lock_timeout={lock_timeout} is not a duration like 500ms, 5s or 1min.")
        connection.execute(text("SELECT set_config('lock_timeout', :value, false)"), {"value": lock_timeout})
        # A role's own statement_timeout is meant for the application; building an index may take longer.
        connection.execute(text("SELECT set_config('statement_timeout', '0', false)"))
        connection.commit()
        with _alone(connection, _seconds(options.get("wait", 600))), warnings.catch_warnings():
            # alembic.ext.checkconstraint_byname stumbles over what SQLAlchemy reflects of a NOT VALID constraint.
            warnings.filterwarnings("ignore", message="Can't validate argument", category=SAWarning)
            context.configure(
                connection=connection,
                target_metadata=Base.metadata,
                transaction_per_migration=True,
                compare_type=True,
                compare_server_default=True,
                autogenerate_plugins=["alembic.autogenerate.*", "alembic.ext.checkconstraint_byname", PLUGIN],
                render_item=_render_item,
                process_revision_directives=_number,
                timezone=options.get("timezone"),  # for revision 0002: op.get_context().opts
            )
            context.run_migrations()
    except DBAPIError as error:
        raise CommandError(_explain(error, lock_timeout)) from None


def main() -> None:
    """Run what Alembic was asked for."""
    if context.is_offline_mode():
        raise CommandError(
            "--sql is not supported: revision 0002 decides by looking at the rows, so its SQL depends on the database."
        )
    options = _options()
    handed_in = options.get("connection")
    if isinstance(handed_in, Connection):
        _run(handed_in, options)
        return
    try:
        url = str(options.get("url") or resolve_url(Settings()))
    except KestraError as error:
        raise CommandError(str(error)) from None
    engine = create_engine("postgresql+psycopg://", creator=lambda: _connect(url), poolclass=NullPool)
    with engine.connect() as connection:
        _run(connection, options)


if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name, disable_existing_loggers=False)
main()
