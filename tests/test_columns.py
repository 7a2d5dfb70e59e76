import copy
import gc
import pickle
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from typing import Any, Literal
from uuid import UUID

import psycopg
import pytest
from pydantic import Field, SecretStr, StrictBool, StrictStr
from sqlalchemy import (
    ColumnElement,
    Dialect,
    Integer,
    Text,
    bindparam,
    cast,
    column,
    func,
    insert,
    inspect,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from kestra import ActiveConversation, Database
from kestra.columns import (
    EARLIEST,
    LATEST,
    IntBetween,
    OneOf,
    PydanticJSONB,
    Timestamptz,
    TrackedDict,
    TrackedList,
    TrackedModel,
    check_instant,
    json_dumps,
    json_loads,
)
from kestra.errors import InvalidToolsConfig, InvalidValue
from kestra.models import Client
from kestra.tools_config import ToolsConfig

DIALECT: Dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # untyped in SQLAlchemy
Colour = Literal["red", "green"]


class Item(TrackedModel):
    name: StrictStr | None = None
    done: StrictBool | None = None


class Document(TrackedModel):
    title: StrictStr | None = None
    secret: SecretStr | None = None
    main: Item | None = None
    items: list[Item] | None = None
    named: dict[str, Item] | None = None
    tags: list[StrictStr] = Field(default_factory=list)
    ready: Item = Field(default_factory=Item)


class Base(DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "shelf"

    id: Mapped[int] = mapped_column(primary_key=True)
    document: Mapped[Document] = mapped_column(PydanticJSONB(Document))


# --- scalars ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    [
        datetime.min.replace(tzinfo=UTC),
        datetime.max.replace(tzinfo=UTC),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),
        EARLIEST - timedelta(microseconds=1),
        LATEST + timedelta(microseconds=1),
    ],
)
def test_an_instant_that_some_time_zone_cannot_show_is_refused(moment: datetime) -> None:
    with pytest.raises(InvalidValue, match="years 2 to 9998"):
        check_instant(moment)


@pytest.mark.parametrize("moment", [EARLIEST, LATEST])
@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Pacific/Niue"])
def test_the_first_and_the_last_instant_can_be_read_in_every_time_zone(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any], moment: datetime, zone: str
) -> None:
    with db.tenant_session(client_id) as session:
        session.add(ActiveConversation(chat_id="1", last_message_at=moment))
    superuser.execute(f"SET timezone = '{zone}'".encode())
    assert superuser.execute("SELECT last_message_at FROM active_conversations").fetchone() == (moment,)


def test_naive_datetime_is_refused() -> None:
    with pytest.raises(InvalidValue, match="naive datetime; attach a time zone"):
        Timestamptz().process_bind_param(datetime(2026, 1, 1), DIALECT)  # noqa: DTZ001  # the point of the test


@pytest.mark.parametrize("value", [None, datetime(2026, 1, 1, tzinfo=UTC)])
def test_aware_datetime_passes_unchanged(value: datetime | None) -> None:
    assert Timestamptz().process_bind_param(value, DIALECT) is value


@pytest.mark.parametrize("value", ["2026-01-01", 0, date(2026, 1, 1)])
def test_what_is_no_datetime_is_refused(value: object) -> None:
    with pytest.raises(InvalidValue, match=type(value).__name__):
        Timestamptz().process_bind_param(value, DIALECT)


def test_compared_datetime_is_checked_and_other_operands_keep_their_type() -> None:
    stamp = column("stamp", Timestamptz)
    assert isinstance((stamp > datetime(2026, 1, 1, tzinfo=UTC)).right.type, Timestamptz)
    assert (stamp - timedelta(days=1)).right.type.python_type is timedelta
    assert (stamp > date(2026, 1, 1)).right.type.python_type is date


@pytest.mark.parametrize("value", ["red", "green", None])
def test_allowed_value_passes(value: str | None) -> None:
    assert OneOf(Colour).process_bind_param(value, DIALECT) == value


@pytest.mark.parametrize("value", ["Red", "", " red", b"red", 1, ["red"]])
def test_other_value_is_refused_naming_the_allowed_ones_only(value: object) -> None:
    with pytest.raises(InvalidValue) as refused:
        OneOf(Colour).process_bind_param(value, DIALECT)
    assert str(refused.value) == "The value is not one of 'red', 'green'."


def test_equality_is_checked_and_other_operators_take_any_text() -> None:
    colour = column("colour", OneOf(Colour))
    for expression in (colour == "blue", colour != "blue", colour.is_distinct_from("blue"), colour.in_(["blue"])):
        assert isinstance(expression.right.type, OneOf)
    for operand in (colour.like("bl%"), colour + "blue", colour < "blue"):
        assert isinstance(operand.right.type, Text)


@pytest.mark.parametrize("value", [0, 3, 5, None])
def test_integer_within_the_bounds_passes(value: int | None) -> None:
    assert IntBetween(0, 5).process_bind_param(value, DIALECT) == value


@pytest.mark.parametrize("value", [-1, 6, True, False, 1.0, "1", Decimal(1)])
def test_other_than_an_integer_within_the_bounds_is_refused(value: object) -> None:
    with pytest.raises(InvalidValue, match="from 0 to 5"):
        IntBetween(0, 5).process_bind_param(value, DIALECT)


def test_comparing_and_computing_are_not_bounded() -> None:
    stage = column("stage", IntBetween(0, 5))
    for expression in (stage < 7, stage + 10):
        assert type(expression.right.type) is Integer


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (OneOf(Colour), OneOf(Literal["red"])),
        (IntBetween(0, 5), IntBetween(0, 6)),
        (PydanticJSONB(Document), PydanticJSONB(Item)),
    ],
)
def test_types_that_differ_share_no_compiled_statement(left: OneOf, right: OneOf) -> None:
    def key(column_type: OneOf) -> object:
        return bindparam("value", None, column_type)._generate_cache_key()  # noqa: SLF001  # nothing public tells it

    assert key(left) is not None
    assert key(left) != key(right)
    assert key(left) == key(left.copy())


def test_time_arithmetic_runs_in_the_database(db: Database, client_id: UUID) -> None:
    with db.system_session(reason="test") as session:
        row = session.execute(
            select(
                Client.created_at - timedelta(days=1) < Client.created_at,
                Client.created_at > func.now() - timedelta(hours=1),
                Client.created_at - Client.created_at,
                Client.created_at <= datetime.now(UTC) + timedelta(days=1),
            ).where(Client.id == client_id)
        ).one()
    assert tuple(row) == (True, True, timedelta(0), True)


def test_naive_datetime_in_a_filter_is_refused(db: Database) -> None:
    naive = datetime(2026, 1, 1)  # noqa: DTZ001  # the point of the test
    with db.system_session(reason="test") as session:
        _refused(InvalidValue, lambda: session.scalars(select(Client.id).where(Client.created_at > naive)).all())


# --- JSON text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number",
    ["12345678901234567890.123456789", "1E+400", "1E-400", "0.1", "1.5", "123456789012345678901234567890", "9" * 5000],
)
def test_number_round_trips_without_losing_a_digit(number: str) -> None:
    written = json_dumps(json_loads(f'{{"n": [{number}]}}'))
    assert Decimal(written.removeprefix('{"n":[').removesuffix("]}")) == Decimal(number)


@pytest.mark.parametrize(("number", "expected"), [("0.1", float), ("1E+400", Decimal), ("12", int), ("9" * 5000, int)])
def test_number_is_a_decimal_only_where_a_float_is_not_exact(number: str, expected: type) -> None:
    assert type(json_loads(number)) is expected


@pytest.mark.parametrize("value", [None, True, 1, 1.5, 'ã\u2028"\\\n', [], {}, {"a": [{"b": None}]}])
def test_json_round_trips(value: object) -> None:
    assert json_loads(json_dumps(value)) == value
    assert json_loads(json_dumps(value).encode()) == value


UNSTORABLE = [
    "a\0",
    "\ud800",
    {"\0": 1},
    {"\udfff": 1},
    {"a": ["\0"]},
    float("nan"),
    float("-inf"),
    Decimal("Infinity"),
    Decimal("sNaN"),
    {1: "a"},
    {None: "a"},
    {1, 2},
    b"bytes",
    datetime(2026, 1, 1, tzinfo=UTC),
    ...,
]


def test_json_that_python_cannot_follow_is_refused_and_not_shown() -> None:
    with pytest.raises(InvalidValue, match="nested too deeply") as refused:
        json_loads("[" * 100_000 + '"segredo"' + "]" * 100_000)
    assert refused.value.__context__ is None


def test_an_integer_of_more_digits_than_jsonb_holds_is_refused() -> None:
    assert json_loads("9" * 131_072) == 10**131_072 - 1
    with pytest.raises(InvalidValue, match="131072 digits"):
        json_loads("1" + "0" * 131_072)


@pytest.mark.parametrize("value", UNSTORABLE, ids=ascii)
def test_what_jsonb_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(InvalidValue):
        json_dumps({"deep": [value]})


@pytest.mark.parametrize("value", UNSTORABLE, ids=ascii)
def test_what_jsonb_cannot_hold_never_enters_a_document(value: object) -> None:
    with pytest.raises(InvalidValue):
        Document.model_validate({"unknown": [value]})
    document = Document(unknown=[])
    with pytest.raises(InvalidValue):
        document["unknown"].append(value)
    with pytest.raises(InvalidValue):
        document["other"] = value
    assert document.document() == {"unknown": []}


@pytest.mark.parametrize("key", ["a\0", "\ud800"])
def test_unstorable_text_in_declared_keys_is_refused(key: str) -> None:
    documents: list[dict[str, Any]] = [
        {"title": key},
        {"secret": key},
        {"items": [{"name": key}]},
        {key: 1},
        {"named": {key: {}}},
    ]
    for document in documents:
        with pytest.raises(InvalidValue):
            Document.model_validate(document)


def test_constants_that_are_no_json_are_not_read() -> None:
    with pytest.raises(InvalidValue, match="NaN"):
        json_loads('{"a": NaN}')


# --- the document -----------------------------------------------------------------------------------------------------


def _document() -> Document:
    return Document.model_validate(
        {
            "title": "t",
            "secret": "s",
            "main": {"name": "m", "extra": {"deep": [1, 2, {"x": 1}]}},
            "items": [{"name": "b"}, {"name": "a"}],
            "named": {"one": {"name": "1"}},
            "unknown": {"list": [3, 1, 2], "dict": {"a": {"b": 1}}},
        }
    )


Change = Callable[[Document], object]


def _setattr(get: Callable[[Document], object], name: str, value: object) -> Change:
    return lambda document: setattr(get(document), name, value)


def _typed(value: Any) -> Any:
    """A section that the test's document is known to have."""
    return value


def _iadd(target: Any, values: list[Any]) -> None:
    target += values


def _ior(target: Any, values: dict[str, Any]) -> None:
    target |= values


def _imul(target: Any, times: int) -> None:
    target *= times


def _setitem(target: Any, key: object, value: object) -> None:
    target[key] = value


def _delitem(target: Any, key: object) -> None:
    del target[key]


def _move(document: Document) -> None:
    document["moved"] = document["unknown"].pop("dict")
    document["moved"]["a"]["b"] = "moved"


def _replace(document: Document) -> None:
    document.main = Item(name="new")
    document.main["deep"] = {"l": []}
    document.main["deep"]["l"].append(1)


def _sort_items(document: Document) -> None:
    assert document.items is not None
    document.items.sort(key=lambda item: item.name or "")


CHANGES: dict[str, Change] = {
    "attribute": _setattr(lambda document: document, "title", "new"),
    "nested attribute": _setattr(lambda document: document.main, "name", "new"),
    "attribute in a list": _setattr(lambda document: _typed(document.items)[1], "done", True),  # noqa: FBT003  # a value
    "attribute in a dict": _setattr(lambda document: _typed(document.named)["one"], "done", True),  # noqa: FBT003  # a value
    "attribute deleted": lambda document: delattr(document, "title"),
    "nested attribute deleted": lambda document: delattr(document.main, "name"),
    "known key set": lambda document: _setitem(document, "title", "new"),
    "known key deleted": lambda document: _delitem(document, "items"),
    "unknown key set": lambda document: _setitem(document, "new", [1]),
    "unknown attribute set": _setattr(lambda document: document, "anything", 1),
    "unknown key deleted": lambda document: _delitem(document, "unknown"),
    "unknown key of a section": lambda document: _setitem(document.main, "extra", None),
    "append": lambda document: document["unknown"]["list"].append({"a": 1}),
    "append, typed": lambda document: _typed(document.items).append(Item(name="c")),
    "append, default": lambda document: document.tags.append("first"),
    "attribute of a default": _setattr(lambda document: document.ready, "name", "new"),
    "insert": lambda document: document["unknown"]["list"].insert(0, 9),
    "extend": lambda document: document["unknown"]["list"].extend([4, 5]),
    "+=": lambda document: _iadd(document["unknown"]["list"], [4]),
    "*=": lambda document: _imul(document["unknown"]["list"], 2),
    "sort": lambda document: document["unknown"]["list"].sort(),
    "sort, typed": _sort_items,
    "reverse": lambda document: document["unknown"]["list"].reverse(),
    "list pop": lambda document: document["unknown"]["list"].pop(),
    "remove": lambda document: document["unknown"]["list"].remove(1),
    "list clear": lambda document: document["unknown"]["list"].clear(),
    "item": lambda document: _setitem(document["unknown"]["list"], 0, "x"),
    "slice": lambda document: _setitem(document["unknown"]["list"], slice(0, 2), [{"a": 1}]),
    "slice deleted": lambda document: _delitem(document["unknown"]["list"], slice(0, 2)),
    "deep": lambda document: _setitem(_typed(document.main)["extra"]["deep"][2], "x", 2),
    "dict set": lambda document: _setitem(document["unknown"]["dict"]["a"], "b", 2),
    "dict delete": lambda document: _delitem(document["unknown"]["dict"]["a"], "b"),
    "update": lambda document: document["unknown"].update(list=1),
    "|=": lambda document: _ior(document["unknown"], {"new": 1}),
    "dict pop": lambda document: document["unknown"].pop("list"),
    "popitem": lambda document: document["unknown"].popitem(),
    "dict clear": lambda document: document["unknown"].clear(),
    "setdefault": lambda document: document["unknown"].setdefault("new", 1),
    "setdefault, changed": lambda document: document["unknown"].setdefault("new", []).append(1),
    "moved": _move,
    "replaced": _replace,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_at_any_depth_flags_the_row(change: Change) -> None:
    shelf = _saved(_document())
    before = shelf.document.model_copy()
    change(shelf.document)
    assert inspect(shelf).attrs.document.history.has_changes()
    assert shelf.document.document() != before.document()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, Document.model_copy, lambda document: pickle.loads(pickle.dumps(document))],  # noqa: S301  # our own bytes
    ids=["copy", "deepcopy", "model_copy", "pickle"],
)
def test_changing_a_copy_leaves_the_original_alone(duplicate: Callable[[Document], Document], change: Change) -> None:
    shelf = _saved(_document())
    duplicated = duplicate(shelf.document)
    assert duplicated == shelf.document
    change(duplicated)
    assert not inspect(shelf).modified
    assert shelf.document == _document()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_copy_is_tracked_by_its_own_row(change: Change) -> None:
    shelf = _saved(copy.deepcopy(_saved(_document()).document))
    change(shelf.document)
    assert inspect(shelf).modified


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_unpickled_row_is_tracked(change: Change) -> None:
    shelf: Shelf = pickle.loads(pickle.dumps(_saved(_document())))  # noqa: S301  # our own bytes
    assert not inspect(shelf).modified
    change(shelf.document)
    assert inspect(shelf).modified


def test_assigned_mapping_becomes_a_tracked_model() -> None:
    shelf = Shelf(document={"main": {"name": "m"}})
    assert isinstance(shelf.document.main, Item)
    shelf = _saved({"items": []})
    assert shelf.document.items is not None
    shelf.document.items.append(Item())
    assert inspect(shelf).modified


def test_mapping_appended_to_a_typed_list_becomes_a_section() -> None:
    document = _document()
    items: Any = document.items
    items.append({"name": "c"})
    assert isinstance(items[2], Item)
    assert items is document.items


def test_invalid_change_of_a_typed_list_is_undone() -> None:
    shelf = _saved(_document())
    items: Any = shelf.document.items
    with pytest.raises(InvalidValue, match=r"items\.2\.done"):
        items.append({"done": "yes"})
    assert shelf.document == _document()
    assert not inspect(shelf).modified


def test_list_keeps_its_identity_through_augmented_assignment() -> None:
    document = _document()
    held = document.items
    assert held is not None
    assert document.items is not None
    document.items += [Item(name="c")]
    assert document.items is held


def test_setdefault_returns_the_tracked_container() -> None:
    shelf = _saved(_document())
    added = shelf.document["unknown"].setdefault("new", [])
    _commit(shelf)
    added.append(1)
    assert inspect(shelf).modified
    assert shelf.document["unknown"]["new"] == [1]


def test_detached_list_changes_freely_and_flags_nothing() -> None:
    shelf = _saved(_document())
    held = shelf.document["unknown"]["list"]
    del shelf.document["unknown"]["list"]
    _commit(shelf)
    held.append(1)
    assert held == [3, 1, 2, 1]
    assert not inspect(shelf).modified


def test_replaced_document_changes_freely_and_flags_nothing() -> None:
    shelf = _saved(_document())
    old = shelf.document
    shelf.document = Document()
    _commit(shelf)
    old.title = "old"
    assert not inspect(shelf).modified


def test_section_moved_to_another_document_flags_its_new_row_alone() -> None:
    one, other = _saved(_document()), _saved(Document())
    other.document.main = one.document.main
    del one.document.main
    _commit(one)
    _commit(other)
    assert other.document.main is not None
    other.document.main.name = "new"
    assert inspect(other).modified
    assert not inspect(one).modified


def test_document_cannot_contain_itself() -> None:
    document = _document()
    with pytest.raises(InvalidValue, match="contain itself"):
        document["unknown"]["dict"]["a"]["b"] = document["unknown"]
    assert document == _document()


def test_plain_container_is_copied_in() -> None:
    mine: dict[str, Any] = {"list": []}
    document = Document(unknown=mine)
    mine["list"].append("\0")
    assert document.document() == {"unknown": {"list": []}}


def test_tracked_containers_equal_plain_ones() -> None:
    unknown = _document()["unknown"]
    assert unknown == {"list": [3, 1, 2], "dict": {"a": {"b": 1}}}
    assert isinstance(unknown, TrackedDict)
    assert isinstance(unknown["list"], TrackedList)


def test_keys_that_are_methods_are_reached_by_key() -> None:
    document = Document.model_validate({"get": 1, "_links": 2})
    document["get"] = 3
    assert document.get("get") == 3
    with pytest.raises(AttributeError, match="document\\['get'\\]"):
        document.get = 4  # type: ignore[assignment, method-assign]  # the point of the test
    assert document.document() == {"get": 3, "_links": 2}


def test_absent_key_is_not_contained() -> None:
    document = Document(unknown=1)
    assert "unknown" in document
    assert "title" not in document
    assert document.get("title", "default") == "default"
    with pytest.raises(KeyError):
        document["title"]
    with pytest.raises(KeyError):
        del document["absent"]
    with pytest.raises(AttributeError):
        del document.title


def test_explicit_null_is_kept() -> None:
    assert Document.model_validate({"title": None}).document() == {"title": None}


def test_json_text_keeps_every_digit() -> None:
    assert Document.model_validate_json(b'{"n": 1e400}')["n"] == Decimal("1e400")
    with pytest.raises(InvalidValue, match="not JSON") as refused:
        Document.model_validate_json("{value")
    assert refused.value.__context__ is None


def test_update_of_a_copy_is_validated() -> None:
    assert _document().model_copy(update={"main": {"name": "n"}}).main == Item(name="n")
    with pytest.raises(InvalidValue, match="title"):
        _document().model_copy(update={"title": 1})


# --- the column -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, [], "text", 1, True, JSONB.NULL], ids=str)
def test_what_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(InvalidToolsConfig):
        PydanticJSONB(ToolsConfig).process_bind_param(value, DIALECT)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(InvalidToolsConfig):
        Client(tools_config=value)


@pytest.mark.parametrize("value", [ToolsConfig(ai_active=True), {"ai_active": True}])
def test_instance_and_mapping_are_stored_alike(value: ToolsConfig | Mapping[str, Any]) -> None:
    assert PydanticJSONB(ToolsConfig).process_bind_param(value, DIALECT) == {"ai_active": True}


def test_every_mapped_class_is_tracked_without_code_of_its_own() -> None:
    client = Client(tools_config={})
    _commit(client)
    client.tools_config.ai_active = True
    assert inspect(client).modified


def test_change_is_saved_though_nobody_holds_the_row(db: Database, client_id: UUID) -> None:
    _store(db, client_id, {"unknown": {"list": []}})
    with db.system_session(reason="test") as session:
        found = session.get_one(Client, client_id).tools_config["unknown"]["list"]
        gc.collect()
        found.append(1)
        gc.collect()
    assert _stored(db, client_id) == {"unknown": {"list": [1]}}


def test_nested_list_append_is_saved_after_flush_and_refresh(db: Database, client_id: UUID) -> None:
    with db.system_session(reason="test") as session:
        client = session.get_one(Client, client_id)
        client.tools_config = ToolsConfig(unknown={"list": []})
        session.flush()
        client.tools_config["unknown"]["list"].append(1)
        session.flush()
        session.refresh(client)
        client.tools_config["unknown"]["list"].append(2)
        session.flush()
        session.expire(client)
        client.tools_config["unknown"]["list"].append(3)
    assert _stored(db, client_id) == {"unknown": {"list": [1, 2, 3]}}


def test_change_of_a_document_that_was_refreshed_is_refused_instead_of_lost(db: Database, client_id: UUID) -> None:
    with db.system_session(reason="test") as session:
        client = session.get_one(Client, client_id)
        stale = client.tools_config
        session.refresh(client)
        with pytest.raises(InvalidValue, match="expired or refreshed"):
            stale.ai_active = True
        assert stale.ai_active is None
        stale.model_copy().ai_active = True
    assert _stored(db, client_id) == {}


def test_merged_document_is_saved_and_tracked(db: Database, client_id: UUID) -> None:
    with db.system_session(reason="test") as session:
        client = session.get_one(Client, client_id)
        session.expunge(client)
        client.tools_config["detached"] = [1]
        merged = session.merge(client)
        session.flush()
        merged.tools_config["detached"].append(2)
    assert _stored(db, client_id) == {"detached": [1, 2]}


def test_changed_row_survives_pickling_and_merging(db: Database, client_id: UUID) -> None:
    with db.system_session(reason="test") as session:
        client = session.get_one(Client, client_id)
        session.expunge(client)
    travelled: Client = pickle.loads(pickle.dumps(client))  # noqa: S301  # our own bytes
    travelled.tools_config["unknown"] = {"a": 1}
    with db.system_session(reason="test") as session:
        session.merge(travelled)
    assert _stored(db, client_id) == {"unknown": {"a": 1}}


def test_value_that_equals_in_python_but_not_in_json_is_saved(db: Database, client_id: UUID) -> None:
    _store(db, client_id, {"unknown": 1})
    with db.system_session(reason="test") as session:
        session.get_one(Client, client_id).tools_config = ToolsConfig(unknown=True)
    assert _stored(db, client_id)["unknown"] is True


def test_bulk_update_validates_and_keeps_loaded_rows_tracked(db: Database, client_id: UUID) -> None:
    with db.system_session(reason="test") as session:
        client = session.get_one(Client, client_id)
        where = update(Client).where(Client.id == client_id)
        session.execute(where.values(tools_config={"ai_active": True}))
        assert client.tools_config.ai_active is True
        client.tools_config.start_upper = True
    assert _stored(db, client_id) == {"ai_active": True, "start_upper": True}
    refused: list[Any] = [{"ai_active": "yes"}, [], None]
    for value in refused:
        with db.system_session(reason="test") as session:
            _refused(InvalidToolsConfig, partial(session.execute, where.values(tools_config=value)))


def test_none_in_a_bulk_insert_is_not_taken_for_the_default(db: Database) -> None:
    with db.system_session(reason="test") as session:
        rows = [{"name": "n", "token": "t", "tools_config": None}]
        _refused(InvalidToolsConfig, lambda: session.execute(insert(Client), rows))


def test_absent_document_takes_the_default(db: Database) -> None:
    with db.system_session(reason="test") as session:
        client = Client(name="n", token="t")  # noqa: S106  # not a password
        session.add(client)
        session.flush()
        client.tools_config["unknown"] = 1
        session.flush()
        session.expire(client)
        assert client.tools_config.document() == {"unknown": 1}


def test_numbers_survive_an_unrelated_change(db: Database, client_id: UUID) -> None:
    numbers = '{"n": [12345678901234567890.123456789, 1e400, 123456789012345678901234567890, 0.1]}'
    with db.system_session(reason="test") as session:
        # As the writer of raw SQL does; what is compared is the server's own number.
        literal = cast(literal_column(f"'{numbers}'"), JSONB)
        session.execute(update(Client).where(Client.id == client_id).values(tools_config=literal))
    with db.system_session(reason="test") as session:
        session.get_one(Client, client_id).tools_config.ai_active = True
    with db.system_session(reason="test") as session:
        same = Client.tools_config["n"] == cast(literal_column(f"'{numbers}'"), JSONB)["n"]
        assert session.scalar(select(same).where(Client.id == client_id)) is True


def test_document_that_breaks_the_types_is_refused_on_load(db: Database, client_id: UUID) -> None:
    with db.system_session(reason="test") as session:
        broken = cast(literal_column('\'{"ai_active": "secret"}\''), JSONB)
        session.execute(
            update(Client).where(Client.id == client_id).values(tools_config=broken),
            execution_options={"synchronize_session": False},
        )
    with db.system_session(reason="test") as session, pytest.raises(InvalidToolsConfig) as refused:
        session.get_one(Client, client_id)
    assert "ai_active" in str(refused.value)
    assert "secret" not in str(refused.value)


CONFIG = Client.tools_config


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (CONFIG["whatsapp"]["url"].as_string(), "https://x"),
        (CONFIG["ai_active"].as_boolean(), True),
        (CONFIG["followup"]["stages"][0]["delay_minutes"].as_integer(), 30),
        (CONFIG["followup"]["stages"][0], {"delay_minutes": 30}),
        (CONFIG["followup"], {"stages": [{"delay_minutes": 30}]}),
        (CONFIG[("whatsapp", "url")].as_string(), "https://x"),
        (CONFIG.contains({"ai_active": True}), True),
        (CONFIG.contains({"ai_active": "not a bool"}), False),
        (CONFIG.has_key("followup"), True),
        (CONFIG == {"whatsapp": []}, False),
        (CONFIG["followup"].contains({"stages": []}), True),
        (CONFIG["absent"], None),
    ],
    ids=str,
)
def test_expression_into_the_document_is_plain_jsonb(
    db: Database, client_id: UUID, expression: ColumnElement[Any], expected: object
) -> None:
    _store(
        db,
        client_id,
        {"ai_active": True, "whatsapp": {"url": "https://x"}, "followup": {"stages": [{"delay_minutes": 30}]}},
    )
    with db.system_session(reason="test") as session:
        assert session.scalar(select(expression).where(Client.id == client_id)) == expected


def test_missing_row_of_an_outer_join_has_no_document() -> None:
    assert PydanticJSONB(Document).process_result_value(None, DIALECT) is None


# --- what the tests share ---------------------------------------------------------------------------------------------


def _commit(row: object) -> None:
    """As after a flush: nothing left to save."""
    inspect(row)._commit_all(inspect(row).dict)  # noqa: SLF001  # what a flush does


def _saved(document: Document | dict[str, Any]) -> Shelf:
    shelf = Shelf(id=1, document=document)
    _commit(shelf)
    return shelf


def _store(db: Database, client_id: UUID, document: dict[str, Any]) -> None:
    with db.system_session(reason="test") as session:
        session.get_one(Client, client_id).tools_config = ToolsConfig.model_validate(document)


def _stored(db: Database, client_id: UUID) -> dict[str, Any]:
    with db.system_session(reason="test") as session:
        return _read(session, client_id).document()


def _read(session: Session, client_id: UUID) -> ToolsConfig:
    return session.scalars(select(Client.tools_config).where(Client.id == client_id)).one()


def _refused(expected: type[InvalidValue], action: Callable[[], object]) -> None:
    """SQLAlchemy wraps what a bind processor raises, unless the engine unwraps it again."""
    with pytest.raises((expected, StatementError)) as refused:
        action()
    assert isinstance(getattr(refused.value, "orig", refused.value), expected)
