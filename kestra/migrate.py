"""Alembic from Python: the migrations of `alembic upgrade head`, found in the repository or in the installed package.

Every function takes a libpq URL of the owner of the tables, and raises `MigrationError`, without passwords or rows.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, Final

import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from kestra.driver import connection_error
from kestra.errors import MigrationError

_HERE: Final = Path(__file__).parent


def upgrade(url: str, revision: str = "head", *, timezone: str | None = None, lock_timeout: str = "5s") -> str:
    """What the migrations report, after going up to `revision`.

    Args:
        url: The database.
        revision: Where to go; relative ones such as `+1` too.
        timezone: The zone in which the naive timestamps of an existing installation are read; UTC when None.
        lock_timeout: How long a step may wait for a table that is in use.

    Raises:
        MigrationError: A step was refused, or rows need a person's decision. The same call goes on where it stopped.
    """
    options = _options(timezone=timezone, lock_timeout=lock_timeout)
    return _run(url, lambda config: command.upgrade(config, revision), options)


def downgrade(url: str, revision: str, *, timezone: str | None = None, lock_timeout: str = "5s") -> str:
    """What the migrations report, after going down to `revision`.

    Args:
        url: The database.
        revision: Where to go; relative ones such as `-1` too.
        timezone: The zone of the naive timestamps below 0002; the one they were read in when None.
        lock_timeout: How long a step may wait for a table that is in use.

    Raises:
        MigrationError: A step was refused; the revision it belongs to was rolled back.
    """
    options = _options(timezone=timezone, lock_timeout=lock_timeout)
    return _run(url, lambda config: command.downgrade(config, revision), options)


def stamp(url: str, revision: str) -> None:
    """Say that the database is at `revision` without running anything: how an existing installation becomes known.

    Raises:
        MigrationError: There is no such revision, or the database cannot be reached.
    """
    _run(url, lambda config: command.stamp(config, revision), {})


def check(url: str) -> None:
    """Nothing, when the database is at head and the models would add nothing to it.

    Raises:
        MigrationError: The database is behind, or its schema is not that of the models.
    """
    _run(url, command.check, {})


def current(url: str) -> str | None:
    """The revision that the database is at, or None when Alembic does not know it.

    Raises:
        MigrationError: The database cannot be reached.
    """
    try:
        with psycopg.connect(url, application_name="kestra") as connection:
            if connection.execute("SELECT to_regclass('alembic_version') IS NULL").fetchone() == (True,):
                return None
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except psycopg.ProgrammingError:
        raise MigrationError("The database URL is malformed, or alembic_version may not be read.") from None
    except psycopg.OperationalError as error:
        raise MigrationError(str(connection_error(error))) from None
    return None if row is None else str(row[0])


def head() -> str:
    """The newest revision. There is always exactly one."""
    with _translated():
        revision = ScriptDirectory.from_config(_config()).get_current_head()
    if revision is None:
        raise MigrationError(f"There are no migrations in {_scripts()}.")
    return revision


def _scripts() -> Path:
    installed, repository = _HERE / "_migrations", _HERE.parent / "alembic"
    for folder in (installed, repository):
        if (folder / "env.py").is_file():
            return folder
    raise MigrationError(f"The migrations are neither in {installed} nor in {repository}; reinstall the package.")


def _config(**how: Any) -> Config:
    config = Config(**how)
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _options(**options: str | None) -> dict[str, str]:
    return {name: value for name, value in options.items() if value is not None}


def _run(url: str, action: Callable[[Config], object], options: dict[str, str]) -> str:
    said = BytesIO()
    config = _config(stdout=TextIOWrapper(said, "utf-8", write_through=True))
    config.cmd_opts = Namespace(x=None)
    config.attributes.update(options, url=url)
    with _translated():
        action(config)
    return said.getvalue().decode("utf-8")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except CommandError as error:
        raise MigrationError(str(error)) from None
