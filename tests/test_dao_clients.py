"""Clients: tokens are exact, the configuration is patched as a whole and by several people at once."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import Event
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb
from sqlalchemy import select

from kestra import Client, Database, SystemSession, TenantSession, ToolsConfig
from kestra.dao import clients as dao
from kestra.dao import messages
from kestra.errors import (
    ClientNotFound,
    DuplicateToken,
    InvalidCursor,
    InvalidToolsConfig,
    InvalidValue,
    TenancyError,
    UnknownToken,
)
from kestra.tools_config import MASK, FollowUp, WhatsApp
from tests.concurrency import PATIENCE, outcomes_at_once, until_waiting
from tests.observing import shown, statements_sent

OURS, THEIRS, NEW, OTHER = "token-a", "token-b", "token-c", "token-d"
"""Tokens: those of the fixture's clients, and two that nobody has."""

SECRET: Final = "segredo"  # noqa: S105  # what must not be shown
CONFIG: Final[dict[str, Any]] = {
    "ai_active": True,
    "agenda": {"active": True, "calendar": {"id": "c1", "color": None}},
    "whatsapp": {"url": "https://api/1", "key": SECRET, "x": 1},
    "followup": {"active": True, "stages": [{"delay_minutes": 30}, {"delay_minutes": 120, "x": [1]}]},
}
"""A document with typed keys, keys that nobody declared, and a secret."""

SHOWN: Final = MASK.get_secret_value()


@contextmanager
def system(db: Database) -> Iterator[SystemSession]:
    with db.system_session(reason="test") as session:
        yield session


def create(db: Database, **parts: Any) -> UUID:
    with system(db) as session:
        return dao.create(session, **{"name": "C", "token": NEW, **parts}).id


def everything(db: Database) -> list[tuple[Any, ...]]:
    """Every row of the table, as it is stored."""
    table = Client.__table__
    with system(db) as session:
        rows = session.execute(select(*(column for column in table.columns)).order_by(table.c.id))
        return [tuple(row) for row in rows]


def stored(superuser_url: str, client_id: UUID) -> Any:
    """The document as it is stored, valid or not."""
    with psycopg.connect(superuser_url) as connection:
        row = connection.execute("SELECT tools_config FROM clients WHERE id = %s", [client_id]).fetchone()
    assert row is not None
    return row[0]


def store(superuser_url: str, client_id: UUID, document: object) -> None:
    """Store a document as others than this package do: unchecked."""
    with psycopg.connect(superuser_url) as connection:
        connection.execute("UPDATE clients SET tools_config = %s WHERE id = %s", [Jsonb(document), client_id])


def patch(db: Database, client_id: UUID, change: Mapping[str, object]) -> ToolsConfig:
    with db.tenant_session(client_id) as session:
        return dao.patch_tools_config(session, patch=change)


@pytest.fixture
def impatient(database_url: str) -> Iterator[Database]:
    """A database whose statements fail when they have to wait for a lock."""
    with Database(f"{database_url}&options=-c%20lock_timeout%3D3s") as database:
        yield database


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_token_finds_its_client(db: Database, clients: tuple[UUID, UUID]) -> None:
    with system(db) as session:
        assert [dao.client_id_for_token(session, token=f"token-{which}") for which in "ab"] == list(clients)


@pytest.mark.usefixtures("clients")
@pytest.mark.parametrize(
    "token",
    [
        "",
        "TOKEN-A",
        "Token-a",
        "token-a ",
        " token-a",
        "token-",
        "token-%",
        "unknown",
        "token-a\0",
        "a\ud800",
        "t" * 999,
    ],
)
def test_a_token_is_exact_and_not_in_the_error(db: Database, token: str) -> None:
    with system(db) as session, pytest.raises(UnknownToken) as caught:
        dao.client_id_for_token(session, token=token)
    assert not token.strip() or token.strip() not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize("token", [None, 5, b"token-a"])
def test_what_is_no_text_is_nobodys_token(db: Database, client_id: UUID, token: Any) -> None:
    with system(db) as session:
        with pytest.raises(UnknownToken):
            dao.client_id_for_token(session, token=token)
        assert dao.client_id_for_token(session, token=OURS) == client_id, "the transaction goes on"


def test_tokens_that_differ_in_case_or_blanks_belong_to_different_clients(db: Database, client_id: UUID) -> None:
    for token in ("TOKEN-A", "token-a ", " token-a"):
        other = create(db, token=token)
        assert other != client_id
        assert db.client_id_for_token(token) == other
    assert db.client_id_for_token(OURS) == client_id


# --- create -----------------------------------------------------------------------------------------------------------


def test_a_client_is_created_with_what_is_given(db: Database) -> None:
    with system(db) as session, statements_sent() as sent:
        client = dao.create(session, name="C", token=NEW, system_prompt="Seja breve", tools_config=CONFIG)
    assert len(sent) == 1
    assert (client.name, client.token, client.system_prompt) == ("C", NEW, "Seja breve")
    assert client.tools_config.document() == CONFIG
    assert client.created_at.utcoffset() is not None
    assert db.client_id_for_token(NEW) == client.id
    with db.tenant_session(client.id) as tenant:
        assert dao.get(tenant).tools_config.document() == CONFIG


def test_a_client_is_created_without_prompt_and_configuration(db: Database) -> None:
    with system(db) as session:
        client = dao.create(session, name="C", token=NEW)
        assert client.system_prompt is None
        assert client.tools_config.document() == {}


@pytest.mark.usefixtures("clients")
def test_a_duplicate_token_is_refused_the_first_intact_and_the_transaction_goes_on(db: Database) -> None:
    before = everything(db)
    with system(db) as session:
        with pytest.raises(DuplicateToken) as caught:
            dao.create(session, name="Other", token=OURS, system_prompt="x", tools_config=CONFIG)
        created = dao.create(session, name="C", token=NEW).id
    assert OURS not in shown(caught.value)
    assert [row for row in everything(db) if row[0] != created] == before
    assert db.client_id_for_token(NEW) == created


def test_of_clients_created_at_once_with_one_token_there_is_one(db: Database) -> None:
    results = outcomes_at_once(*(partial(create, db, name=f"C{index}") for index in range(10)))
    created = [result for result in results if isinstance(result, UUID)]
    assert len(created) == 1
    assert [type(result) for result in results].count(DuplicateToken) == 9
    assert db.client_id_for_token(NEW) == created[0]


@pytest.mark.parametrize(
    "parts",
    [
        {"token": ""},
        {"token": "x" * 256},
        {"token": "x" * 255 + " "},
        {"token": SECRET + "\0"},
        {"token": SECRET + "\ud800"},
        {"token": None},
        {"token": 7},
        {"name": None},
        {"name": SECRET * 40},
        {"name": SECRET + "\0"},
        {"system_prompt": SECRET + "\0"},
        {"tools_config": {"ai_active": SECRET}},
        {"tools_config": [SECRET]},
        {"tools_config": {"whatsapp": {"key": SHOWN}}},
    ],
)
def test_what_cannot_be_stored_is_refused_and_not_quoted(db: Database, parts: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue) as caught:
        create(db, **parts)
    assert SECRET not in shown(caught.value)
    assert everything(db) == []


@pytest.mark.parametrize("token", ["", "x" * 256])
def test_a_token_that_is_refused_leaves_the_transaction_usable(db: Database, token: str) -> None:
    with system(db) as session:
        with pytest.raises(InvalidValue):
            dao.create(session, name="C", token=token)
        created = dao.create(session, name="C", token=NEW).id
    assert db.client_id_for_token(NEW) == created


def test_the_longest_token_is_kept_exactly(db: Database) -> None:
    token = "x" * 254 + " "
    assert create(db, token=token) == db.client_id_for_token(token)


def test_the_configuration_that_a_client_is_created_with_stays_the_callers(db: Database) -> None:
    given = ToolsConfig.model_validate(CONFIG)
    client_id = create(db, tools_config=given)
    given.ai_active = False
    with db.tenant_session(client_id) as session:
        assert dao.get(session).tools_config.ai_active is True


# --- list and page ----------------------------------------------------------------------------------------------------


def pages(db: Database, limit: int) -> list[list[UUID]]:
    found: list[list[UUID]] = []
    cursor: str | None = None
    while not found or cursor is not None:
        assert len(found) < 20, "the pages do not end"
        with system(db) as session:
            page = dao.page(session, cursor=cursor, limit=limit)
        found.append([client.id for client in page.items])
        cursor = page.cursor
    return found


@pytest.fixture
def twelve(db: Database) -> list[UUID]:
    """Clients in the order of the list: some were created at the same instant, some a microsecond apart."""
    start = datetime(2026, 3, 2, 12, tzinfo=UTC)
    rows = [Client(name=f"{n}", token=f"t{n}", created_at=start + timedelta(microseconds=n // 3)) for n in range(12)]
    with system(db) as session:
        session.add_all(reversed(rows))
        session.flush()
        return [row.id for row in sorted(rows, key=lambda row: (row.created_at, row.id))]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 11, 12, 13, 500])
def test_pages_have_every_client_once_oldest_first(db: Database, twelve: list[UUID], limit: int) -> None:
    found = pages(db, limit)
    assert [client_id for page in found for client_id in page] == twelve
    assert [len(page) for page in found[:-1]] == [limit] * (len(found) - 1)
    assert found[-1]


def test_a_page_is_one_statement_and_one_of_no_clients_is_empty(db: Database) -> None:
    with system(db) as session, statements_sent() as sent:
        page = dao.page(session)
    assert (page.items, page.cursor) == ([], None)
    assert len(sent) == 1


def test_a_client_that_is_deleted_or_added_meanwhile_shifts_no_page(db: Database, twelve: list[UUID]) -> None:
    with system(db) as session:
        first = dao.page(session, limit=4)
        for client_id in twelve[2:4]:
            session.delete(session.get_one(Client, client_id))
        session.flush()
        added = dao.create(session, name="new", token=NEW).id
        second = dao.page(session, cursor=first.cursor, limit=500)
    assert [client.id for client in second.items] == [*twelve[4:], added]


def test_a_client_whose_document_is_invalid_is_listed_with_the_others(db: Database, superuser_url: str) -> None:
    with db.system_session(reason="test data") as session:
        created = [dao.create(session, name=name, token=name) for name in "ab"]
    with psycopg.connect(superuser_url) as connection:
        connection.execute("UPDATE clients SET tools_config = '{\"ai_active\": \"maybe\"}' WHERE name = 'a'")
    with db.system_session(reason="test") as session:
        listed = dao.page(session).items
    assert {(client.id, client.name, client.created_at) for client in listed} == {
        (client.id, client.name, client.created_at) for client in created
    }


@pytest.mark.usefixtures("twelve")
def test_a_limit_and_a_cursor_are_checked(db: Database) -> None:
    with system(db) as session:
        for limit in (0, -1, 501):
            with pytest.raises(InvalidValue):
                dao.page(session, limit=limit)
        cursor = dao.page(session, limit=1).cursor
        assert cursor is not None
        for wrong in ("", "x", cursor[:-4], "A" * len(cursor)):
            with pytest.raises(InvalidCursor):
                dao.page(session, cursor=wrong)


# --- get and edit -----------------------------------------------------------------------------------------------------


def test_a_client_gets_itself(db: Database, clients: tuple[UUID, UUID]) -> None:
    for client_id, name in zip(clients, "AB", strict=True):
        with db.tenant_session(client_id) as session:
            client = dao.get(session)
            assert (client.id, client.name) == (client_id, name)


def test_an_edit_changes_what_is_given_and_nothing_else(db: Database, clients: tuple[UUID, UUID]) -> None:
    ours, theirs = clients
    before = {row[0]: row for row in everything(db)}
    with db.tenant_session(ours) as session, statements_sent() as sent:
        assert dao.edit(session, system_prompt="Seja breve").system_prompt == "Seja breve"
        assert len(sent) == 1
        client = dao.edit(session, name="Nova")
        assert (client.name, client.system_prompt) == ("Nova", "Seja breve")
        assert dao.edit(session).name == "Nova"
    with db.tenant_session(ours) as session:
        assert dao.edit(session, system_prompt=None).system_prompt is None
    after = {row[0]: row for row in everything(db)}
    assert after[theirs] == before[theirs]
    assert after[ours] == (ours, "Nova", *before[ours][2:])


def test_a_loaded_client_shows_an_edit(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        loaded = dao.get(session)
        assert dao.edit(session, name="Nova", system_prompt="x") is loaded
        assert (loaded.name, loaded.system_prompt) == ("Nova", "x")


def test_a_change_that_was_not_flushed_survives_an_edit(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        dao.get(session).tools_config.ai_active = True
        assert dao.edit(session, name="Nova").tools_config.ai_active is True
    with db.tenant_session(client_id) as session:
        assert dao.get(session).tools_config.ai_active is True


@pytest.mark.parametrize("parts", [{"name": None}, {"name": SECRET * 40}, {"system_prompt": SECRET + "\0"}])
def test_an_edit_that_cannot_be_stored_is_refused_and_not_quoted(
    db: Database, client_id: UUID, parts: dict[str, Any]
) -> None:
    before = everything(db)
    with pytest.raises(InvalidValue) as caught, db.tenant_session(client_id) as session:
        dao.edit(session, **parts)
    assert SECRET not in shown(caught.value)
    assert everything(db) == before


def test_an_edit_takes_no_token_and_no_configuration(db: Database, client_id: UUID) -> None:
    edit: Any = dao.edit
    for column in ("token", "tools_config", "id", "created_at"):
        with db.tenant_session(client_id) as session, pytest.raises(TypeError):
            edit(session, **{column: "x"})


# --- a new token ------------------------------------------------------------------------------------------------------


def test_a_token_is_replaced(db: Database, clients: tuple[UUID, UUID]) -> None:
    ours, theirs = clients
    with system(db) as session:
        loaded = session.get_one(Client, ours)
        with statements_sent() as sent:
            dao.set_token(session, client_id=ours, token=NEW)
        assert len(sent) == 1
        assert loaded.token == NEW
    assert db.client_id_for_token(NEW) == ours
    assert db.client_id_for_token(THEIRS) == theirs
    with pytest.raises(UnknownToken):
        db.client_id_for_token(OURS)


def test_a_token_may_be_replaced_by_itself(db: Database, client_id: UUID) -> None:
    with system(db) as session:
        dao.set_token(session, client_id=client_id, token=OURS)
    assert db.client_id_for_token(OURS) == client_id


def test_a_token_of_another_client_is_refused_and_the_transaction_goes_on(
    db: Database, clients: tuple[UUID, UUID]
) -> None:
    before = everything(db)
    with system(db) as session:
        with pytest.raises(DuplicateToken) as caught:
            dao.set_token(session, client_id=clients[0], token=THEIRS)
        assert dao.client_id_for_token(session, token=THEIRS) == clients[1]
    assert THEIRS not in shown(caught.value)
    assert everything(db) == before


@pytest.mark.usefixtures("clients")
@pytest.mark.parametrize("token", [NEW, OURS])
def test_a_token_for_no_client_is_refused(db: Database, token: str) -> None:
    nobody = uuid4()
    before = everything(db)
    with system(db) as session, pytest.raises(ClientNotFound, match=str(nobody)):
        dao.set_token(session, client_id=nobody, token=token)
    assert everything(db) == before


@pytest.mark.parametrize("token", ["", "x" * 256, "x" * 255 + " ", SECRET + "\0", None])
def test_a_token_that_cannot_be_stored_is_refused(db: Database, client_id: UUID, token: Any) -> None:
    with system(db) as session:
        with pytest.raises(InvalidValue) as caught:
            dao.set_token(session, client_id=client_id, token=token)
        assert dao.client_id_for_token(session, token=OURS) == client_id
    assert SECRET not in shown(caught.value)
    assert db.client_id_for_token(OURS) == client_id


def test_of_clients_that_want_one_token_at_once_one_gets_it(db: Database, clients: tuple[UUID, UUID]) -> None:
    def want(client_id: UUID) -> UUID:
        with system(db) as session:
            dao.set_token(session, client_id=client_id, token=NEW)
        return client_id

    results = outcomes_at_once(*(partial(want, client_id) for client_id in clients))
    (winner,) = [result for result in results if isinstance(result, UUID)]
    (error,) = [result for result in results if not isinstance(result, UUID)]
    assert isinstance(error, DuplicateToken)
    assert NEW not in shown(error)
    assert db.client_id_for_token(NEW) == winner


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.fixture
def configured(db: Database, clients: tuple[UUID, UUID]) -> UUID:
    for client_id in clients:
        patch(db, client_id, CONFIG)
    return clients[0]


def without_nulls(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: without_nulls(value) for key, value in document.items() if value is not None}
    return document


def test_a_patch_merges_nested_keys_deletes_by_null_replaces_lists_and_keeps_unknown_keys(
    db: Database, superuser_url: str, configured: UUID
) -> None:
    result = patch(
        db,
        configured,
        {
            "agenda": {"calendar": {"id": "c2"}, "active": None},
            "followup": {"stages": [{"delay_minutes": 15}]},
            "ai_active": None,
            "missing": None,
            "new": {"a": {"b": None, "c": [None, 1]}},
        },
    )
    expected = {
        "agenda": {"calendar": {"id": "c2"}},
        "whatsapp": CONFIG["whatsapp"],
        "followup": {"active": True, "stages": [{"delay_minutes": 15}]},
        "new": {"a": {"c": [None, 1]}},
    }
    assert result.document() == expected
    assert stored(superuser_url, configured) == expected


def test_a_null_that_is_stored_in_an_unknown_key_survives(db: Database, superuser_url: str, client_id: UUID) -> None:
    store(superuser_url, client_id, {"x": None, "y": {"z": None}})
    patch(db, client_id, {"y": {"w": 1}})
    assert stored(superuser_url, client_id) == {"x": None, "y": {"z": None, "w": 1}}


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"ai_active": SECRET}, "ai_active"),
        ({"start_upper": True, "followup": {"stages": [{"delay_minutes": SECRET}]}}, "followup.stages.0.delay_minutes"),
        ({"start_upper": True, "whatsapp": {"key": [SECRET]}}, "whatsapp.key"),
        ({"whatsapp": SECRET}, "whatsapp"),
        ([SECRET], "ToolsConfig"),
        (None, "ToolsConfig"),
        (SECRET, "ToolsConfig"),
    ],
)
def test_an_invalid_result_is_refused_as_a_whole_and_nothing_is_written(
    db: Database, superuser_url: str, configured: UUID, change: Any, path: str
) -> None:
    before = stored(superuser_url, configured)
    with db.tenant_session(configured) as session:
        with statements_sent() as sent, pytest.raises(InvalidToolsConfig, match=path) as caught:
            dao.patch_tools_config(session, patch=change)
        assert not [statement for statement, _ in sent if statement.startswith("UPDATE")]
        assert dao.get(session).tools_config.document() == before
    assert SECRET not in shown(caught.value)
    assert stored(superuser_url, configured) == before


@pytest.mark.parametrize("levels", [60, 5000])
def test_a_patch_that_is_nested_too_deeply_is_refused(db: Database, client_id: UUID, levels: int) -> None:
    deep: dict[str, Any] = {}
    for _ in range(levels):
        deep = {"a": deep}
    with pytest.raises(InvalidToolsConfig, match="more than 50 levels"):
        patch(db, client_id, deep)


@pytest.mark.parametrize(
    "change", [{"x": "\0"}, {"x": {"\ud800": 1}}, {"x": float("nan")}, {"x": object()}, {"x": {1: 2}}]
)
def test_a_patch_that_is_no_json_is_refused_and_nothing_is_written(
    db: Database, superuser_url: str, configured: UUID, change: dict[str, Any]
) -> None:
    before = stored(superuser_url, configured)
    with db.tenant_session(configured) as session, pytest.raises(InvalidValue):
        dao.patch_tools_config(session, patch=change)
    assert stored(superuser_url, configured) == before


def test_a_masked_secret_that_comes_back_keeps_the_stored_one(
    db: Database, superuser_url: str, configured: UUID
) -> None:
    with db.tenant_session(configured) as session:
        form = json.loads(dao.get(session).tools_config.model_dump_json(exclude_unset=True))
    assert form["whatsapp"]["key"] == SHOWN
    form["whatsapp"]["url"] = "https://api/2"
    result = patch(db, configured, form)
    assert result.whatsapp is not None
    assert (result.whatsapp.key, result.whatsapp.url) == (WhatsApp(key=SECRET).key, "https://api/2")
    assert SECRET not in repr(result) + str(result)
    assert stored(superuser_url, configured)["whatsapp"] == {"url": "https://api/2", "key": SECRET, "x": 1}


def test_a_mask_where_no_secret_is_stored_is_refused(db: Database, superuser_url: str, client_id: UUID) -> None:
    for document in ({}, {"whatsapp": {"key": None}}, {"whatsapp": {"key": ""}}, {"whatsapp": {"url": "u"}}):
        store(superuser_url, client_id, document)
        with pytest.raises(InvalidToolsConfig, match=r"whatsapp\.key"):
            patch(db, client_id, {"whatsapp": {"key": SHOWN}})
        assert stored(superuser_url, client_id) == document


def test_a_secret_is_replaced_and_deleted(db: Database, superuser_url: str, configured: UUID) -> None:
    patch(db, configured, {"whatsapp": {"key": "other"}})
    assert stored(superuser_url, configured)["whatsapp"]["key"] == "other"
    patch(db, configured, {"whatsapp": {"key": None}})
    assert "key" not in stored(superuser_url, configured)["whatsapp"]


def test_a_stored_document_that_is_invalid_can_be_repaired_and_only_as_a_whole(
    db: Database, superuser_url: str, client_id: UUID
) -> None:
    broken = {"ai_active": "yes", "whatsapp": {"key": SECRET}, "x": 1}
    store(superuser_url, client_id, broken)
    with pytest.raises(InvalidToolsConfig, match="ai_active"):
        patch(db, client_id, {"start_upper": True})
    assert stored(superuser_url, client_id) == broken
    repaired = patch(db, client_id, {"ai_active": True, "whatsapp": {"key": SHOWN}})
    assert repaired.document() == {**broken, "ai_active": True}
    assert stored(superuser_url, client_id) == {**broken, "ai_active": True}


def test_a_number_that_no_float_holds_survives_a_patch(db: Database, superuser_url: str, client_id: UUID) -> None:
    with psycopg.connect(superuser_url) as connection:
        connection.execute("UPDATE clients SET tools_config = '{\"x\": 0.1000000000000000000001}'")
    patch(db, client_id, {"y": 1})
    with psycopg.connect(superuser_url) as connection:
        query = "SELECT tools_config ->> 'x' FROM clients WHERE id = %s"
        assert connection.execute(query, [client_id]).fetchone() == ("0.1000000000000000000001",)


def test_a_loaded_client_shows_the_patched_document_and_saves_changes_of_it(
    db: Database, superuser_url: str, configured: UUID
) -> None:
    with db.tenant_session(configured) as session:
        loaded = dao.get(session)
        old = loaded.tools_config
        with statements_sent() as sent:
            result = dao.patch_tools_config(session, patch={"start_upper": True, "whatsapp": {"url": "u"}})
            assert len(sent) == 2
            assert loaded.tools_config.document() == result.document()
            assert len(sent) == 2
        assert loaded.tools_config.start_upper is True
        with pytest.raises(InvalidValue, match="expired or refreshed"):
            old.ai_active = False
        loaded.tools_config["later"] = {"a": 1}
    assert stored(superuser_url, configured)["later"] == {"a": 1}
    assert stored(superuser_url, configured)["start_upper"] is True


def test_a_change_that_was_not_flushed_is_part_of_what_is_patched(
    db: Database, superuser_url: str, configured: UUID
) -> None:
    with db.tenant_session(configured) as session:
        dao.get(session).tools_config["before"] = 1
        dao.patch_tools_config(session, patch={"after": 2})
    document = stored(superuser_url, configured)
    assert (document["before"], document["after"]) == (1, 2)


@pytest.mark.parametrize("loaded", [False, True])
def test_what_a_patch_returns_is_a_copy(db: Database, superuser_url: str, configured: UUID, *, loaded: bool) -> None:
    with db.tenant_session(configured) as session:
        client = dao.get(session) if loaded else None
        result = dao.patch_tools_config(session, patch={"start_upper": True})
        result.whatsapp = None
        assert client is None or client.tools_config.whatsapp is not None
    assert stored(superuser_url, configured)["whatsapp"] == CONFIG["whatsapp"]


def test_a_patch_may_have_sections_and_does_not_share_them(db: Database, superuser_url: str, configured: UUID) -> None:
    section, extra = FollowUp(active=False), {"a": [1]}
    with db.tenant_session(configured) as session:
        client = dao.get(session)
        dao.patch_tools_config(session, patch={"followup": section, "extra": extra})
        section.active = None
        extra["a"].append(2)
        client.tools_config["extra"]["b"] = 1
    assert extra == {"a": [1, 2]}
    assert stored(superuser_url, configured)["followup"] == {**CONFIG["followup"], "active": False}
    assert stored(superuser_url, configured)["extra"] == {"a": [1], "b": 1}


def test_twenty_patches_at_once_all_land(db: Database, superuser_url: str, configured: UUID) -> None:
    changes = [{f"k{index}": index, "shared": {f"n{index}": index}} for index in range(20)]
    results = outcomes_at_once(*(partial(patch, db, configured, change) for change in changes))
    assert [result for result in results if not isinstance(result, ToolsConfig)] == []
    document = stored(superuser_url, configured)
    assert {key: document[key] for key in CONFIG} == without_nulls(CONFIG)
    assert document["shared"] == {f"n{index}": index for index in range(20)}
    assert [document[f"k{index}"] for index in range(20)] == list(range(20))


def test_messages_are_recorded_while_a_patch_is_under_way(impatient: Database, configured: UUID) -> None:
    patched, recorded = Event(), Event()

    def patch_slowly() -> None:
        with impatient.tenant_session(configured) as session:
            dao.patch_tools_config(session, patch={"start_upper": True})
            patched.set()
            assert recorded.wait(PATIENCE)

    with ThreadPoolExecutor(1) as pool:
        patching = pool.submit(patch_slowly)
        try:
            assert patched.wait(PATIENCE)
            with impatient.tenant_session(configured) as session:
                assert messages.record(session, chat_id="1", role="user", content="oi").inserted
        finally:
            recorded.set()
        patching.result(PATIENCE)


def test_a_patch_waits_for_the_one_before(
    impatient: Database, superuser: psycopg.Connection[Any], superuser_url: str, configured: UUID
) -> None:
    with impatient.tenant_session(configured) as session:
        dao.patch_tools_config(session, patch={"first": 1})

        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(patch, impatient, configured, {"second": 2})
            until_waiting(superuser, second)
            session.commit()
            second.result(PATIENCE)
    document = stored(superuser_url, configured)
    assert (document["first"], document["second"]) == (1, 2)


# --- tenancy ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("layers")
def test_no_other_client_is_read_or_changed(db: Database, configured: UUID, other_client_id: UUID) -> None:
    before = [row for row in everything(db) if row[0] == other_client_id]
    with db.tenant_session(configured) as session:
        dao.edit(session, name="Nova", system_prompt="x")
        dao.patch_tools_config(session, patch={"ai_active": False, "agenda": None})
        assert dao.get(session).id == configured
        assert [client.id for client in session.scalars(select(Client))] == [configured]
    assert [row for row in everything(db) if row[0] == other_client_id] == before


def test_a_mask_never_brings_the_secret_of_another_client(
    db: Database, superuser_url: str, configured: UUID, other_client_id: UUID
) -> None:
    store(superuser_url, other_client_id, {})
    with pytest.raises(InvalidToolsConfig):
        patch(db, other_client_id, {"whatsapp": {"key": SHOWN}})
    assert stored(superuser_url, other_client_id) == {}
    assert stored(superuser_url, configured)["whatsapp"]["key"] == SECRET


@pytest.mark.parametrize(
    "act",
    [
        dao.get,
        dao.edit,
        lambda session: dao.edit(session, name="x"),
        lambda session: dao.patch_tools_config(session, patch={"ai_active": True}),
    ],
    ids=["get", "edit nothing", "edit", "patch"],
)
def test_a_client_that_does_not_exist_is_an_error(db: Database, act: Callable[[TenantSession], object]) -> None:
    nobody = uuid4()
    with db.tenant_session(nobody) as session, pytest.raises(ClientNotFound, match=str(nobody)):
        act(session)


FOR_ONE_CLIENT: Final[dict[str, Callable[[Any], object]]] = {
    "get": dao.get,
    "edit": lambda session: dao.edit(session, name="x"),
    "patch": lambda session: dao.patch_tools_config(session, patch={"ai_active": True}),
}
FOR_ALL_CLIENTS: Final[dict[str, Callable[[Any], object]]] = {
    "create": lambda session: dao.create(session, name="C", token=NEW),
    "page": dao.page,
    "set token": lambda session: dao.set_token(session, client_id=session.client_id, token=NEW),
}


@pytest.mark.usefixtures("clients")
@pytest.mark.parametrize("act", FOR_ONE_CLIENT)
def test_what_is_for_one_client_refuses_a_session_over_all(db: Database, act: str) -> None:
    before = everything(db)
    with system(db) as session, pytest.raises(TenancyError, match="session of one client"):
        FOR_ONE_CLIENT[act](session)
    assert everything(db) == before


@pytest.mark.parametrize("act", FOR_ALL_CLIENTS)
def test_what_is_for_all_clients_refuses_a_session_of_one(db: Database, client_id: UUID, act: str) -> None:
    before = everything(db)
    with db.tenant_session(client_id) as session, pytest.raises(TenancyError, match="session over all clients"):
        FOR_ALL_CLIENTS[act](session)
    assert everything(db) == before


def test_nothing_is_committed_by_any_of_these(db: Database, configured: UUID) -> None:
    before = everything(db)
    with db.tenant_session(configured) as tenant:
        dao.edit(tenant, name="Nova")
        dao.patch_tools_config(tenant, patch={"x": 1})
        tenant.rollback()
    with system(db) as session:
        dao.create(session, name="C", token=NEW)
        dao.set_token(session, client_id=configured, token=OTHER)
        session.rollback()
    assert everything(db) == before


def test_everything_works_in_async_sessions(database_url: str, superuser_url: str) -> None:
    async def main() -> UUID:
        async with Database(database_url) as db:
            async with db.async_system_session(reason="test") as session:
                created = await session.run_sync(dao.create, name="C", token=NEW, tools_config=CONFIG)
                assert [client.id for client in (await session.run_sync(dao.page)).items] == [created.id]
                await session.run_sync(dao.set_token, client_id=created.id, token=OTHER)
                assert await session.run_sync(dao.client_id_for_token, token=OTHER) == created.id
                assert created.token == OTHER
            async with db.async_tenant_session(created.id) as tenant:
                client = await tenant.run_sync(dao.get)
                await tenant.run_sync(dao.edit, name="Nova")
                await tenant.run_sync(dao.patch_tools_config, patch={"whatsapp": {"key": SHOWN, "url": "u"}})
                assert (client.name, client.tools_config.document()["whatsapp"]["url"]) == ("Nova", "u")
            return created.id

    client_id = asyncio.run(main())
    assert stored(superuser_url, client_id)["whatsapp"] == {"url": "u", "key": SECRET, "x": 1}


def test_no_repr_and_no_log_line_shows_a_token_a_key_or_a_prompt(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token, prompt = "token-secreto", "instrucoes"
    client_id = create(db, token=token, system_prompt=prompt, tools_config=CONFIG)
    with system(db) as session:
        page = dao.page(session)
        dao.set_token(session, client_id=client_id, token=token)
    with db.tenant_session(client_id) as tenant:
        seen = [page, dao.get(tenant), dao.edit(tenant, system_prompt=prompt), dao.patch_tools_config(tenant, patch={})]
    text = "".join(map(repr, seen)) + "".join(map(str, seen)) + caplog.text
    for hidden in (token, prompt, SECRET, "https://api/1"):
        assert hidden not in text
