"""Rules about the repository that no other tool holds."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import psycopg
import pytest

import kestra

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "kestra").rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_folder_alembic_does_not_shadow_the_library() -> None:
    assert not list((ROOT / "alembic").rglob("__init__.py"))
    found = subprocess.run(
        [sys.executable, "-c", "import alembic; print(alembic.__file__)"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert not Path(found.strip()).is_relative_to(ROOT / "alembic")


def test_the_public_names_are_sorted_and_all_there_is() -> None:
    assert kestra.__all__ == sorted(kestra.__all__)
    assert dir(kestra) == kestra.__all__
    defined = {name: getattr(kestra, name) for name in kestra.__all__}
    assert {name: value.__name__ for name, value in defined.items()} == {name: name for name in kestra.__all__}
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = kestra.Nothing  # type: ignore[attr-defined]  # what is tested


def test_every_module_has_a_layer_and_may_not_import_test_tools() -> None:
    layers, tools = PYPROJECT["tool"]["importlinter"]["contracts"]
    modules = {path.relative_to(ROOT / "kestra").parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert {name for layer in layers["layers"] for name in re.split(r"[ |:]+", layer)} == modules
    assert set(tools["source_modules"]) == {f"kestra.{name}" for name in modules - {"testing"}}


def test_the_import_rules_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [linter, "--no-logo", "--no-cache"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "alembic/versions").glob("*.py")), ids=lambda path: str(path.stem))
def test_a_migration_imports_no_code_of_the_application(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported
    assert not {name for name in imported if name.split(".")[0] == "kestra"}


@pytest.mark.parametrize("name", [f"KESTRA_{name.upper()}" for name in kestra.Settings.model_fields])
def test_every_setting_is_in_the_documentation(name: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    assert any(re.search(rf"\b{name}\b", text) for text in texts)


def test_tests_reach_the_database_as_a_role_that_row_level_security_binds(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        row = connection.execute(
            """
            SELECT rolsuper OR rolbypassrls,
                   pg_has_role('kestra_tenant', 'USAGE') OR pg_has_role('kestra_system', 'USAGE'),
                   pg_has_role('kestra_tenant', 'MEMBER') AND pg_has_role('kestra_system', 'MEMBER')
            FROM pg_roles WHERE rolname = current_user
            """
        ).fetchone()
    assert row == (False, False, True)
