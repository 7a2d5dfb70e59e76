"""What every function of the data access layer has in common."""

import importlib
import inspect
import json
import pkgutil
import re
from base64 import urlsafe_b64encode
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest

import kestra.dao
from kestra import Database, SystemSession, TenantSession
from kestra.dao import keyset
from kestra.errors import InvalidCursor, InvalidValue, TenancyError
from tests.observing import statements_sent

ROOT: Final = Path(__file__).parents[1]
MODULES: Final = {
    module.name: importlib.import_module(f"kestra.dao.{module.name}")
    for module in pkgutil.iter_modules(kestra.dao.__path__)
}
FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    f"{name}.{function.__name__}": function
    for name, module in MODULES.items()
    for function in vars(module).values()
    if inspect.isfunction(function)
    and function.__module__ == module.__name__
    and not function.__name__.startswith("_")
    and "session" in inspect.signature(function).parameters
}
LOOK_UP: Final = "clients.client_id_for_token"
"""The one that works in any session: a tenant session finds its own client's token alone."""


def test_the_layer_is_there() -> None:
    assert len(FUNCTIONS) > 30
    assert {"messages.record", "conversations.inbox", "followups.claim", "files.register"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_session_comes_first_and_everything_else_by_keyword(name: str) -> None:
    first, *others = inspect.signature(FUNCTIONS[name]).parameters.values()
    assert first.name == "session"
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in others)
    assert not inspect.isgeneratorfunction(FUNCTIONS[name]), "it would outlive run_sync"


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {LOOK_UP}))
def test_the_wrong_kind_of_session_is_refused_before_anything_is_sent(db: Database, client_id: UUID, name: str) -> None:
    function = FUNCTIONS[name]
    kind = inspect.signature(function).parameters["session"].annotation
    arguments = dict.fromkeys(list(inspect.signature(function).parameters)[1:])
    assert kind is TenantSession or kind is SystemSession
    wrong = db.system_session(reason="test") if kind is TenantSession else db.tenant_session(client_id)
    with wrong as session, statements_sent() as sent, pytest.raises(TenancyError):
        function(session, **arguments)
    assert sent == []


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_committed(name: str) -> None:
    assert not re.search(r"session\.(commit|rollback|close|begin\()", inspect.getsource(MODULES[name]))


def test_every_function_is_in_the_document() -> None:
    documented = set(re.findall(r"`(\w+\.\w+)", (ROOT / "docs/data-access.md").read_text(encoding="utf-8")))
    assert set(FUNCTIONS) <= documented
    assert {name for name in documented if name.split(".")[0] in MODULES} <= set(FUNCTIONS)


SCOPE: Final = ("list", 1)


def cursor_of(values: list[Any]) -> str:
    made = keyset.page_of([1, 2], limit=1, scope=SCOPE, key=lambda _: values).cursor
    assert made is not None
    return made


def test_a_cursor_has_the_values_that_its_page_ended_with() -> None:
    found = keyset.position(cursor_of(["2026-01-01T00:00:00+00:00", 7]), scope=SCOPE, kinds=(keyset.instant, int))
    assert found == [datetime(2026, 1, 1, tzinfo=UTC), 7]


@pytest.mark.parametrize(
    "values", [[], [1], ["x", 1], ["2026-01-01", 1], ["2026-01-01T00:00:00+00:00", "x"], ["a", "b", "c"], [None, None]]
)
def test_a_cursor_that_somebody_made_is_refused_whatever_is_in_it(values: list[Any]) -> None:
    with pytest.raises(InvalidCursor):
        keyset.position(cursor_of(values), scope=SCOPE, kinds=(keyset.instant, int))


@pytest.mark.parametrize("key", [b"", b"x", b"5", b"null", b"{}", b"[" * 100_000, b"\xff"])
def test_a_cursor_with_garbage_and_the_right_digest_is_refused(key: bytes) -> None:
    digest = blake2b(json.dumps([str(part) for part in SCOPE]).encode() + key, digest_size=12).digest()
    with pytest.raises(InvalidCursor):
        keyset.position(urlsafe_b64encode(digest + key).decode(), scope=SCOPE, kinds=(int,))


@pytest.mark.parametrize("limit", [0, -1, 501, True, 1.0, "1", None])
def test_a_limit_is_an_integer_within_its_bounds(limit: Any) -> None:
    with pytest.raises(InvalidValue, match="from 1 to 500"):
        keyset.check_limit(limit)
