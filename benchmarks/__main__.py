"""All benchmarks, or some: `python -m benchmarks [SCENARIO …]` prints one table and writes it as JSON and as a chart.

Databases come and go on the server of KESTRA_TEST_DATABASE_URL (a superuser's URL), or on an embedded one.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from benchmarks.chart import bound, svg, value, verdict
from benchmarks.harness import Row, migrated, server

SCENARIOS: Final = (
    "isolation",
    "reading",
    "ingesting",
    "latency",
    "followups",
    "paging",
    "unread",
    "tenants",
    "importing",
    "testing",
    "generate",
    "adoption",
)
"""Modules of this folder with `run(*, quick)`, in the order of the table."""

RESULTS: Final = Path("build/bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 when a bound was to be checked and is missed."""
    given = _arguments(arguments)
    rows: list[Row] = []
    with server() as running, migrated():
        machine = _machine(running.maintenance.info.server_version)
        print(" · ".join(map(str, machine.values())))
        for scenario in given.scenarios or SCENARIOS:
            for row in import_module(f"benchmarks.{scenario}").run(quick=given.quick):
                if not rows or rows[-1].what != row.what:
                    print(f"\n{row.what:66}{'median':>10}{'p95':>10}{'ratio':>9}{'bound':>10}")
                print(_line(row), flush=True)
                rows.append(row)
    _write(given.json, json.dumps({"machine": machine, "quick": given.quick, "rows": [*map(_as_json, rows)]}, indent=1))
    _write(given.svg, svg(rows, subtitle=" · ".join(map(str, machine.values()))))
    missed = [row for row in rows if row.held is False]
    print(f"\n{sum(row.held is True for row in rows)} bounds held, {len(missed)} missed; {given.json}, {given.svg}")
    for row in missed:
        print(f"missed: {row.what}: {row.candidate}")
    return int(given.check and bool(missed))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What kestra costs, measured here.")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; none is all")
    parser.add_argument("--json", type=Path, default=RESULTS / "benchmarks.json", help="where results are written")
    parser.add_argument("--svg", type=Path, default=RESULTS / "benchmarks.svg", help="where the chart is written")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; the numbers say nothing")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bound is missed")
    given = parser.parse_args(arguments)
    if unknown := set(given.scenarios) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    if given.quick and given.check:
        parser.error("--check is for full sizes: what --quick measures says nothing")
    return given


def _machine(server_version: int) -> dict[str, Any]:
    """Where it is measured."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}, {_processor()}",
        "cores": f"{os.cpu_count()} cores",
        "postgresql": f"PostgreSQL {server_version // 10000}.{server_version % 10000}",
        "python": f"Python {platform.python_version()}",
        **{name: f"{name} {version(name)}" for name in ("SQLAlchemy", "psycopg")},
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _line(row: Row) -> str:
    p95 = "" if row.p95 is None else value(row.p95, row.unit)
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    line = f"  {row.candidate:64}{value(row.median, row.unit):>10}{p95:>10}{ratio:>9}{bound(row):>10}  {verdict(row)}"
    return line.rstrip()


def _as_json(row: Row) -> dict[str, Any]:
    return asdict(row) | {"held": row.held}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
