"""What importing costs: whole processes that import kestra, against those that import what it is built on.

`import kestra` alone loads the rest of the package when a name is first asked for. A program asks for some, so there is
a second candidate: every public name, and the functions for messages. Beside it, all libraries that these import.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import kestra
from benchmarks.harness import Row, compare, rows

BUILT_ON: Final = "import sqlalchemy.orm, psycopg, pydantic"
ALONE: Final = "import kestra"
LIBRARIES: Final = "all libraries that kestra imports"
WHOLE: Final = "from kestra import *; from kestra.dao import messages"
CODE: Final = {
    BUILT_ON: BUILT_ON,
    ALONE: ALONE,
    LIBRARIES: f"{BUILT_ON}, psycopg_pool, pydantic_settings, sqlalchemy.ext.asyncio, sqlalchemy.dialects.postgresql",
    WHOLE: WHOLE,
    "pass": "pass",
}


def process(code: str, _iteration: int) -> None:
    """A whole process that imports. All search the same folders; no user's or working folder is among them."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    folder = str(Path(kestra.__file__).parents[1])
    subprocess.run(  # noqa: S603  # our own code
        [sys.executable, "-s", "-P", "-c", code], env={**clean, "PYTHONPATH": folder}, check=True
    )


def run(*, quick: bool) -> Iterator[Row]:
    """Interleaved, in a random order."""
    candidates = {name: partial(process, code) for name, code in CODE.items()}
    timings = compare(candidates, 1 if quick else 30)
    yield from rows("import, as a whole process", timings, base=BUILT_ON, bounds={ALONE: 1.15, WHOLE: 1.15})
