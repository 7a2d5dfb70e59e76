"""The documents say what is true: their examples run."""

import ast
import asyncio
import re
from pathlib import Path
from types import CoroutineType

import pytest
from sqlalchemy import func, select

import kestra.database
from kestra import ChatMessage, Client, Database
from tests import test_tenancy

ROOT = Path(__file__).parent.parent


def test_readme_example_runs(db: Database, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    with db.system_session(reason="test data") as session:
        session.add(Client(name="Readme", token="5511…"))  # noqa: S106  # the example's
    monkeypatch.setenv("KESTRA_DATABASE_URL", database_url)
    monkeypatch.setattr(kestra.database, "_singleton", None)

    names: dict[str, object] = {}
    running = eval(  # noqa: S307  # our own document
        compile(example, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names
    )
    assert isinstance(running, CoroutineType)

    async def main() -> None:
        await running
        await kestra.get_database().aclose()

    asyncio.run(main())
    with db.system_session(reason="look") as session:
        assert session.scalar(select(func.count()).select_from(ChatMessage)) == 1


def test_every_proven_shape_is_in_the_document() -> None:
    _, _, proven = (ROOT / "docs/tenancy.md").read_text(encoding="utf-8").partition("| kind | shapes |\n|---|---|\n")
    rows = [row.split("|")[2] for row in proven.partition("\n\n")[0].splitlines()]
    tables = (test_tenancy.READS, test_tenancy.REFUSED, test_tenancy.REASSIGNMENTS, test_tenancy.INSERTS)
    assert [sorted(shape.strip() for shape in row.split(",")) for row in rows] == [sorted(table) for table in tables]
