"""Behind PgBouncer in transaction mode, where each transaction may be another connection's of the server."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from socket import create_server
from typing import Final
from uuid import UUID

import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import bindparam, func, select

from kestra import ChatMessage, Database, Settings
from kestra.dao import messages
from tests.concurrency import at_once

PROGRAM: Final = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="PgBouncer is not installed")

CONFIGURATION: Final = """
[databases]
{dbname} = host={host} port={port} dbname={dbname} user={user} password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 2
"""


@pytest.fixture
def behind_pgbouncer(database_url: str) -> Iterator[str]:
    """The same database by way of PgBouncer, which has two connections to it."""
    parts = {"port": "5432", **conninfo_to_dict(database_url)}
    with create_server(("127.0.0.1", 0)) as free:
        listen_port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder, "pgbouncer.ini")
        configuration.write_text(CONFIGURATION.format(**parts, listen_port=listen_port), encoding="utf-8")
        user = None
        if os.geteuid() == 0:  # as whom it refuses to run; the server's user may open the server's socket
            host = Path(str(parts["host"]))
            user = pwd.getpwuid(host.stat().st_uid if host.is_absolute() else pwd.getpwnam("nobody").pw_uid)
            for path in (Path(folder), configuration):
                os.chown(path, user.pw_uid, user.pw_gid)
        with subprocess.Popen(
            [str(PROGRAM), str(configuration)],
            stderr=subprocess.PIPE,
            text=True,
            user=user and user.pw_uid,
            group=user and user.pw_gid,
            extra_groups=user and [],
        ) as process:
            assert process.stderr is not None
            said = [next(line for line in process.stderr if "process up" in line)]
            assert said
            yield f"postgresql://{parts['user']}:x@127.0.0.1:{listen_port}/{parts['dbname']}?sslmode=disable"
            process.terminate()
            process.stderr.read()


def test_every_transaction_has_its_own_client(behind_pgbouncer: str, clients: tuple[UUID, UUID]) -> None:
    who = select(func.current_user(), func.current_setting("kestra.client_id", bindparam("missing_ok", value=True)))

    def work(db: Database, number: int) -> int:
        client_id, chat_id = clients[number % 2], str(number)
        for turn in range(20):
            with db.tenant_session(client_id) as session:
                assert session.execute(who).one() == ("kestra_tenant", str(client_id))
                messages.record(
                    session, chat_id=chat_id, role="user", content="x", provider_message_id=f"{number} {turn}"
                )
                session.commit()
                with session.begin_nested():
                    assert len(messages.history(session, chat_id=chat_id, limit=50).items) == 2 * turn + 1
                session.rollback()
                assert session.scalar(select(ChatMessage.client_id).distinct()) == client_id
            assert db.ingest(f"token-{'ab'[number % 2]}", chat_id=chat_id, role="user", content="y").inserted
        with db.system_session(reason="count") as system:
            return system.scalar(select(func.count()).where(ChatMessage.chat_id == chat_id)) or 0

    with Database(behind_pgbouncer, settings=Settings(prepare_threshold=None, pool_max_size=6)) as db:
        assert at_once(*(partial(work, db, number) for number in range(6))) == [40] * 6
