"""The filter, the stamp and the guard: what a statement of a tenant session may touch.

Two clients talk to the same end customer, `CHAT`. Every shape below is executed for A and has to give A's rows alone.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    Table,
    UnaryExpression,
    bindparam,
    cast,
    column,
    delete,
    event,
    exists,
    extract,
    func,
    insert,
    literal,
    literal_column,
    quoted_name,
    select,
    table,
    tablesample,
    text,
    union_all,
    update,
    values,
)
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.engine.cursor import BufferedRowCursorFetchStrategy, FullyBufferedCursorFetchStrategy
from sqlalchemy.orm import Bundle, aliased, joinedload, selectinload
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.schema import CreateTable
from sqlalchemy.sql.operators import custom_op
from sqlalchemy.types import UserDefinedType

from kestra import ActiveConversation, ChatMessage, Client, ClientFile, Database, TenantSession
from kestra.base import GLOBAL, ClientId, bound_client_id, tenant_key
from kestra.errors import CrossTenantWrite, InvalidClientId, StatementFailed, TenancyError, UnscopedStatement
from kestra.models import OrphanedRow
from kestra.tenancy import TenantDialect
from kestra.transaction import OpeningCursor

CHAT = "5511988887777"

Message = aliased(ChatMessage)
messages: Any = ChatMessage.__table__
conversations: Any = ActiveConversation.__table__


@pytest.fixture
def two_clients(db: Database, client_id: UUID, other_client_id: UUID) -> tuple[UUID, UUID]:
    """A has messages a1, a2 and one file; B has b1 to b3; both talk to CHAT."""
    with db.system_session(reason="test data") as session:
        for owner, contents in ((client_id, ["a1", "a2"]), (other_client_id, ["b1", "b2", "b3"])):
            session.add(ActiveConversation(client_id=owner, chat_id=CHAT, last_role="assistant"))
            session.add_all(
                ChatMessage(client_id=owner, chat_id=CHAT, role="user", content=content) for content in contents
            )
        session.add(ClientFile(client_id=client_id, filename="a.pdf", file_hash="a" * 64))
        session.add(ClientFile(client_id=other_client_id, filename="b.pdf", file_hash="b" * 64))
    return client_id, other_client_id


def _ladder() -> Any:
    start = select(ChatMessage.id, ChatMessage.content).where(ChatMessage.content == "a1").cte("ladder", recursive=True)
    return select(start.union_all(select(Message.id, Message.content).where(Message.id == start.c.id + 1)).c.content)


READS: dict[str, tuple[Callable[[], Any], list[tuple[Any, ...]]]] = {
    "columns": (lambda: select(ChatMessage.content), [("a1",), ("a2",)]),
    "core table": (lambda: select(messages.c.content), [("a1",), ("a2",)]),
    "core alias": (lambda: select(messages.alias("m").c.content), [("a1",), ("a2",)]),
    "core table beside an entity": (
        lambda: select(messages.c.content, Client.name).join(Client, Client.id == messages.c.client_id),
        [("a1", "A"), ("a2", "A")],
    ),
    "count": (lambda: select(func.count()).select_from(ChatMessage), [(2,)]),
    "where would match all": (lambda: select(ChatMessage.content).where(literal(value=True)), [("a1",), ("a2",)]),
    "or in where": (
        lambda: select(ChatMessage.content).where((ChatMessage.content == "b1") | (ChatMessage.chat_id == CHAT)),
        [("a1",), ("a2",)],
    ),
    "only in where": (
        lambda: select(literal(1)).where(ChatMessage.content.startswith("b")),
        [],
    ),
    "self join": (
        lambda: select(ChatMessage.content, Message.content).join(Message, Message.id == ChatMessage.id + 1),
        [("a1", "a2")],
    ),
    "inner join": (
        lambda: select(Client.name, ChatMessage.content).join(ChatMessage.client),
        [("A", "a1"), ("A", "a2")],
    ),
    "join without the client": (
        lambda: select(ChatMessage.content).join(ActiveConversation, ActiveConversation.chat_id == ChatMessage.chat_id),
        [("a1",), ("a2",)],
    ),
    "outer join keeps the unmatched side": (
        lambda: select(ChatMessage.content, ClientFile.filename).outerjoin(
            ClientFile, ClientFile.filename == ChatMessage.content
        ),
        [("a1", None), ("a2", None)],
    ),
    "full join": (
        lambda: select(ClientFile.filename, ChatMessage.content).join_from(
            ClientFile, ChatMessage, ClientFile.filename == ChatMessage.content, full=True
        ),
        [(None, "a1"), (None, "a2"), ("a.pdf", None)],
    ),
    "sub-query": (lambda: select(select(ChatMessage.content).subquery().c.content), [("a1",), ("a2",)]),
    "scalar sub-query": (lambda: select(select(func.count(ChatMessage.id)).scalar_subquery()), [(2,)]),
    "correlated sub-query": (
        lambda: select(
            ActiveConversation.chat_id,
            select(func.count(ChatMessage.id))
            .where(ChatMessage.chat_id == ActiveConversation.chat_id)
            .scalar_subquery(),
        ),
        [(CHAT, 2)],
    ),
    "exists": (
        lambda: select(Client.name).where(exists().where(ChatMessage.content.startswith("b"))),
        [],
    ),
    "in": (
        lambda: select(ClientFile.filename).where(ClientFile.filename.in_(select(func.concat("b", ".pdf")))),
        [],
    ),
    "any": (lambda: select(Client.name).where(Client.messages.any(ChatMessage.content == "a2")), [("A",)]),
    "any of the other": (lambda: select(Client.name).where(Client.messages.any(ChatMessage.content == "b2")), []),
    "cte": (lambda: select(select(ChatMessage.content).cte("c").c.content), [("a1",), ("a2",)]),
    "recursive cte": (_ladder, [("a1",), ("a2",)]),
    "every arm of a union": (
        lambda: union_all(select(ChatMessage.content), select(ClientFile.filename), select(Client.name)),
        [("A",), ("a.pdf",), ("a1",), ("a2",)],
    ),
    "lateral": (
        lambda: select(
            ActiveConversation.chat_id,
            select(ChatMessage.content)
            .where(ChatMessage.chat_id == ActiveConversation.chat_id)
            .order_by(ChatMessage.id.desc())
            .limit(1)
            .lateral("newest")
            .c.content,
        ),
        [(CHAT, "a2")],
    ),
    "window": (
        lambda: select(ChatMessage.content, func.row_number().over(order_by=ChatMessage.id)),
        [("a1", 1), ("a2", 2)],
    ),
    "distinct on": (
        lambda: (
            select(ChatMessage.content)
            .ext(distinct_on(ChatMessage.chat_id))
            .order_by(ChatMessage.chat_id, ChatMessage.id)
        ),
        [("a1",)],
    ),
    "for update of": (
        lambda: select(ChatMessage.content).with_for_update(of=ChatMessage, skip_locked=True),
        [("a1",), ("a2",)],
    ),
    "harmless set-returning function": (
        lambda: select(func.generate_series(1, 2).column_valued("n")),
        [(1,), (2,)],
    ),
    "function of a function in the from": (
        lambda: select(func.unnest(func.string_to_array("x.y", ".")).column_valued("v")),
        [("x",), ("y",)],
    ),
    "one client": (lambda: select(Client.name), [("A",)]),
    "operators": (
        lambda: select(ChatMessage.content.op("||")("!")).where(ChatMessage.content.op("not like")("b%")),
        [("a1!",), ("a2!",)],
    ),
    "constants": (
        lambda: select(ChatMessage.content, literal_column("NULL")).where(literal_column("true")),
        [("a1", None), ("a2", None)],
    ),
    "materialized cte": (
        lambda: select(select(ChatMessage.content).cte("c").prefix_with("MATERIALIZED").c.content),
        [("a1",), ("a2",)],
    ),
    "bundle": (
        lambda: select(Bundle("b", ChatMessage.content, ChatMessage.role)),
        [(("a1", "user"),), (("a2", "user"),)],
    ),
    "order by another entity": (
        lambda: select(ChatMessage.content).join(ChatMessage.client).order_by(Client.name, ChatMessage.id.desc()),
        [("a1",), ("a2",)],
    ),
    "two entities": (
        lambda: select(ClientFile.filename, Client.name).where(ClientFile.filename != Client.name),
        [("a.pdf", "A")],
    ),
    "two entities the other way round": (
        lambda: select(Client.name, ClientFile.filename).where(ClientFile.filename != Client.name),
        [("A", "a.pdf")],
    ),
    "right side only": (
        lambda: select(ChatMessage.content).select_from(ActiveConversation).join(ActiveConversation.messages),
        [("a1",), ("a2",)],
    ),
    "nested joins": (
        lambda: (
            select(Client.name, ChatMessage.content, ClientFile.filename)
            .select_from(Client)
            .join(Client.conversations)
            .join(ActiveConversation.messages)
            .outerjoin(ClientFile, ClientFile.filename == ChatMessage.content)
        ),
        [("A", "a1", None), ("A", "a2", None)],
    ),
    "in a sub-query": (
        lambda: select(Client.name).where(Client.id.in_(select(ChatMessage.client_id))),
        [("A",)],
    ),
    "has": (
        lambda: select(ChatMessage.content).where(ChatMessage.client.has(Client.name == "A")),
        [("a1",), ("a2",)],
    ),
    "data-modifying cte": (
        lambda: select(update(ChatMessage).values(content="new").returning(ChatMessage.content).cte("u").c.content),
        [("new",), ("new",)],
    ),
    "update returning": (
        lambda: update(ChatMessage).values(content="x").returning(ChatMessage.content),
        [("x",), ("x",)],
    ),
    "update from": (
        lambda: (
            update(ActiveConversation)
            .where(ClientFile.filename != ActiveConversation.chat_id)
            .values(last_context=ClientFile.filename)
            .returning(ActiveConversation.last_context)
        ),
        [("a.pdf",)],
    ),
    "update with a sub-query": (
        lambda: (
            update(ActiveConversation)
            .values(last_context=select(func.max(ChatMessage.content)).scalar_subquery())
            .returning(ActiveConversation.last_context)
        ),
        [("a2",)],
    ),
    "delete": (lambda: delete(messages).returning(messages.c.content), [("a1",), ("a2",)]),
    "delete using": (
        lambda: delete(messages).where(messages.c.chat_id == conversations.c.chat_id).returning(messages.c.content),
        [("a1",), ("a2",)],
    ),
}


Act = Callable[[TenantSession], Any]
Run = Callable[[UUID, Act], Any]


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest, db: Database) -> Run:
    """Do something in a session of a client, of either kind, and commit."""

    def in_session(client_id: UUID, act: Act) -> Any:
        with db.tenant_session(client_id) as session:
            return act(session)

    def in_async_session(client_id: UUID, act: Act) -> Any:
        async def main() -> Any:
            async with db, db.async_tenant_session(client_id) as session:
                return await session.run_sync(lambda _: act(session.sync_session))

        return asyncio.run(main())

    return in_session if request.param == "sync" else in_async_session


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("shape", READS)
def test_statement_sees_the_rows_of_its_client_alone(run: Run, two_clients: tuple[UUID, UUID], shape: str) -> None:
    statement, expected = READS[shape]
    rows = run(two_clients[0], lambda session: [tuple(row) for row in session.execute(statement())])
    assert sorted(rows, key=repr) == sorted(expected, key=repr)


def test_row_level_security_alone_is_enough(db: Database, two_clients: tuple[UUID, UUID]) -> None:
    with db.tenant_session(two_clients[0]) as session:
        raw = text("SELECT content FROM chat_messages ORDER BY id").execution_options(kestra_raw_sql=True)
        assert session.scalars(raw).all() == ["a1", "a2"]


@pytest.mark.usefixtures("layers")
def test_entities_and_relationships_stay_inside_the_client(db: Database, two_clients: tuple[UUID, UUID]) -> None:
    with db.tenant_session(two_clients[0]) as session:
        loading = select(ActiveConversation).options(
            selectinload(ActiveConversation.messages), joinedload(ActiveConversation.client).selectinload(Client.files)
        )
        [conversation] = session.scalars(loading)
        assert [message.content for message in conversation.messages] == ["a1", "a2"]
        assert [file.filename for file in conversation.client.files] == ["a.pdf"]


@pytest.mark.usefixtures("layers")
def test_stream_sees_the_rows_of_its_client_alone(db: Database, two_clients: tuple[UUID, UUID]) -> None:
    in_pieces = select(ChatMessage.content).order_by(ChatMessage.id).execution_options(yield_per=1)

    async def streamed() -> list[str | None]:
        async with db, db.async_tenant_session(two_clients[0]) as session:
            return [content async for content in await session.stream_scalars(in_pieces)]

    assert asyncio.run(streamed()) == ["a1", "a2"]
    with db.tenant_session(two_clients[0]) as session:
        assert list(session.scalars(in_pieces)) == ["a1", "a2"]


@pytest.mark.usefixtures("layers")
def test_get_of_another_clients_key_is_none(db: Database, two_clients: tuple[UUID, UUID]) -> None:
    ours, theirs = two_clients
    with db.tenant_session(ours) as session:
        assert session.get(ActiveConversation, (CHAT, theirs)) is None
        assert session.get(Client, theirs) is None
        assert session.get(ActiveConversation, (CHAT, ours)) is not None


def test_compiled_statement_serves_every_client(db: Database, two_clients: tuple[UUID, UUID]) -> None:
    """The same statement for A, B, A, B: no stale cache, and one cached form for both."""
    seen = []
    for owner in two_clients * 2:
        with db.tenant_session(owner) as session:
            seen.append(session.scalars(select(ChatMessage.content).order_by(ChatMessage.id)).all())
            cache: Any = session.get_bind()._compiled_cache  # type: ignore[union-attr]  # noqa: SLF001  # only counted
            forms = len(cache)
    assert seen == [["a1", "a2"], ["b1", "b2", "b3"]] * 2
    with db.system_session(reason="the same statement, unfiltered") as session:
        everyone = session.scalars(select(ChatMessage.content).order_by(ChatMessage.id)).all()
    assert set(everyone) == {"a1", "a2", "b1", "b2", "b3"}
    with db.tenant_session(two_clients[0]) as session:
        session.scalars(select(ChatMessage.content).order_by(ChatMessage.id)).all()
        assert len(cache) == forms


def test_columns_are_asked_of_the_driver_once(
    db: Database, two_clients: tuple[UUID, UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    description: Any = OpeningCursor.description

    def counted(cursor: OpeningCursor) -> Any:
        asked.append(cursor)
        return description.fget(cursor)

    monkeypatch.setattr(OpeningCursor, "description", property(counted))
    for owner, expected in [*zip(two_clients, ("a1", "b1"), strict=True)] * 2:
        with db.tenant_session(owner) as session:
            found = session.execute(select(ChatMessage.content.label("text")).order_by(ChatMessage.id))
            assert [*found.keys()] == ["text"]
            assert found.scalars().first() == expected
    assert len(asked) == 1


def test_columns_that_are_known_leave_the_options_of_a_result_alone(
    db: Database, two_clients: tuple[UUID, UUID]
) -> None:
    labelled = select(ChatMessage.content.label("text"), ChatMessage.id).order_by(ChatMessage.id)
    for _ in range(3):
        with db.tenant_session(two_clients[0]) as session:
            execute = session.connection().execute
            assert [row.text for row in execute(labelled)] == ["a1", "a2"]
            named = execute(labelled, execution_options={"driver_column_names": True})
            assert [*named.keys()] == ["text", "id"]
            streamed = execute(labelled, execution_options={"stream_results": True})
            assert isinstance(streamed.cursor_strategy, BufferedRowCursorFetchStrategy)
            assert [row.text for row in streamed] == ["a1", "a2"]
            inserted = execute(
                insert(messages).values(chat_id=CHAT, role="user", content="a3").returning(messages.c.content)
            )
            assert [*inserted.keys()] == ["content"]
            session.rollback()


def test_rows_that_somebody_puts_in_place_of_a_result_stay(db: Database, two_clients: tuple[UUID, UUID]) -> None:
    def replace(_: object, cursor: Any, *others: Any) -> None:
        _, _, context, _ = others
        context.cursor_fetch_strategy = FullyBufferedCursorFetchStrategy(cursor, initial_buffer=[("other",)])

    for _ in range(3):
        with db.tenant_session(two_clients[0]) as session:
            connection = session.connection()
            event.listen(connection.engine, "after_cursor_execute", replace)
            try:
                assert connection.scalars(select(ChatMessage.content)).all() == ["other"]
            finally:
                event.remove(connection.engine, "after_cursor_execute", replace)


@pytest.mark.parametrize(
    ("way", "of"),
    [("before_cursor_execute", "engine"), ("before_cursor_execute", "connection"), ("do_execute", "engine")],
)
def test_columns_are_asked_for_where_somebody_may_change_the_statement(
    db: Database, two_clients: tuple[UUID, UUID], way: str, of: str
) -> None:
    other = "UPDATE chat_messages SET role = role WHERE client_id = %(kestra_client_id)s::uuid"

    def change(_: object, __: object, ___: str, parameters: Any, *____: object) -> tuple[str, Any]:
        return other, parameters

    def execute(cursor: Any, _: str, parameters: Any, __: object) -> bool:
        cursor.execute(other, parameters)
        return True

    listener: Callable[..., Any] = execute if way == "do_execute" else change
    options = {} if way == "do_execute" else {"retval": True}
    for _ in range(3):
        with db.tenant_session(two_clients[0]) as session:
            connection = session.connection()
            assert connection.execute(select(ChatMessage.content)).returns_rows
            target = connection.engine if of == "engine" else connection
            event.listen(target, way, listener, **options)
            try:
                changed = connection.execute(select(ChatMessage.content))
                assert (changed.returns_rows, changed.rowcount) == (False, 2)
            finally:
                event.remove(target, way, listener)
            assert connection.execute(select(ChatMessage.content)).returns_rows


def test_columns_are_asked_for_where_they_are_logged(
    db: Database, two_clients: tuple[UUID, UUID], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "sqlalchemy.engine.Engine")
    for _ in range(3):
        caplog.clear()
        with db.tenant_session(two_clients[0]) as session:
            session.execute(select(ChatMessage.content.label("text"))).all()
        assert "Col ('text',)" in caplog.messages


# --- writes ---

ROW: dict[str, Any] = {"chat_id": CHAT, "role": "user", "content": "new"}

INSERTS: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    "values": lambda row: (insert(ChatMessage).values(row), None),
    "core table": lambda row: (insert(messages).values(row), None),
    "multi-values": lambda row: (
        insert(ChatMessage).values([ROW, row] if row.keys() == ROW.keys() else [row, row]),
        None,
    ),
    "list of dicts": lambda row: (insert(ChatMessage), [row, row]),
    "core list of dicts": lambda row: (insert(messages), [row, row]),
    "on conflict": lambda row: (pg_insert(ChatMessage).values(row).on_conflict_do_nothing(), None),
    "in a cte": lambda row: (
        select(insert(ChatMessage).values(row).returning(ChatMessage.client_id).cte("i").c.client_id),
        None,
    ),
}


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("form", INSERTS)
@pytest.mark.parametrize("client", ["absent", "none", "own"])
def test_insert_is_stamped(run: Run, db: Database, two_clients: tuple[UUID, UUID], form: str, client: str) -> None:
    ours, theirs = two_clients
    row = ROW if client == "absent" else {**ROW, "client_id": None if client == "none" else ours}
    run(ours, lambda session: session.execute(*INSERTS[form](row)))
    with db.system_session(reason="look") as session:
        owners = set(session.scalars(select(ChatMessage.client_id).where(ChatMessage.content == "new")))
    assert owners == {ours}
    assert theirs not in owners


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("form", INSERTS)
def test_insert_for_another_client_is_refused(
    run: Run, db: Database, two_clients: tuple[UUID, UUID], form: str
) -> None:
    ours, theirs = two_clients
    before = _everything(db)
    with pytest.raises(CrossTenantWrite, match=str(theirs)):
        run(ours, lambda session: session.execute(*INSERTS[form]({**ROW, "client_id": theirs})))
    assert _everything(db) == before


@pytest.mark.parametrize(
    "statement",
    [
        lambda _other: insert(ChatMessage).values({**ROW, "client_id": func.gen_random_uuid()}),
        lambda other: insert(ChatMessage).values({**ROW, "client_id": select(literal(other)).scalar_subquery()}),
        lambda other: insert(ChatMessage).values({**ROW, "client_id": bindparam("c", other)}),
        lambda _other: insert(ChatMessage).values([{**ROW, "client_id": func.gen_random_uuid()}]),
        lambda other: insert(ChatMessage).from_select(
            ["client_id", *ROW],
            select(values(column("k", ClientId), name="v").data([(other,)]).c.k, *map(literal, ROW.values())),
        ),
        lambda other: insert(ChatMessage).from_select(
            ["client_id", *ROW],
            select(select(literal(other, ClientId).label("k")).subquery().c.k, *map(literal, ROW.values())),
        ),
        lambda other: insert(ChatMessage).from_select(
            ["client_id", *ROW],
            union_all(
                select(ChatMessage.client_id, *map(literal, ROW.values())),
                select(literal(other, ClientId), *map(literal, ROW.values())),
            ),
        ),
        lambda other: insert(ChatMessage).from_select(
            ["client_id", *ROW], select(literal(other), literal("1"), literal("user"), literal("x"))
        ),
    ],
    ids=["function", "sub-query", "bind", "multi-values", "values", "select of a literal", "union", "select"],
)
def test_client_id_as_an_expression_is_refused(
    db: Database, two_clients: tuple[UUID, UUID], statement: Callable[[UUID], Any]
) -> None:
    ours, theirs = two_clients
    with pytest.raises(CrossTenantWrite, match="expression"), db.tenant_session(ours) as session:
        session.execute(statement(theirs))


@pytest.mark.parametrize("rows", [[ROW, "other"], ["other", ROW]], ids=["last", "first"])
def test_other_client_anywhere_in_a_list_is_refused(
    db: Database, two_clients: tuple[UUID, UUID], rows: list[Any]
) -> None:
    """Of a list, SQLAlchemy looks at the first row to know the columns."""
    ours, theirs = two_clients
    before = _everything(db)
    given = [{**ROW, "client_id": theirs} if row == "other" else row for row in rows]
    with pytest.raises((CrossTenantWrite, StatementFailed)), db.tenant_session(ours) as session:
        session.execute(insert(messages), given)
    assert _everything(db) == before


@pytest.mark.usefixtures("layers")
def test_own_client_id_may_be_written_out(db: Database, two_clients: tuple[UUID, UUID]) -> None:
    ours, _ = two_clients
    with db.tenant_session(ours) as session:
        session.add(ChatMessage(client_id=str(ours), **ROW))
        session.execute(insert(ChatMessage).values(client_id=str(ours), **ROW))
        copied = select(ChatMessage.client_id, ChatMessage.chat_id, ChatMessage.role, ChatMessage.content)
        session.execute(insert(ChatMessage).from_select(["client_id", "chat_id", "role", "content"], copied))
        own = aliased(ChatMessage)
        copied = select(own.client_id, own.chat_id, own.role, own.content).where(own.content == "a1").limit(1)
        session.execute(insert(ChatMessage).from_select(["client_id", "chat_id", "role", "content"], copied))
        assert session.scalar(select(func.count()).select_from(ChatMessage)) == 9


@pytest.mark.usefixtures("layers")
def test_insert_from_select_copies_own_rows_only(db: Database, two_clients: tuple[UUID, UUID]) -> None:
    with db.tenant_session(two_clients[0]) as session:
        copied = insert(ChatMessage).from_select(
            ["chat_id", "role", "content"], select(ChatMessage.chat_id, ChatMessage.role, ChatMessage.content)
        )
        session.execute(copied)
    with db.system_session(reason="look") as session:
        contents: Any = session.scalars(select(func.array_agg(ChatMessage.content)).group_by(ChatMessage.client_id))
        assert sorted(map(sorted, contents)) == [["a1", "a1", "a2", "a2"], ["b1", "b2", "b3"]]


@pytest.mark.usefixtures("layers")
def test_upsert_stays_inside_the_client(db: Database, two_clients: tuple[UUID, UUID]) -> None:
    ours, theirs = two_clients
    upsert = pg_insert(ActiveConversation).values(chat_id=CHAT)
    with db.tenant_session(ours) as session:
        session.execute(
            upsert.on_conflict_do_update(
                index_elements=["chat_id", "client_id"], set_={"last_context": "new"}, where=literal(value=True)
            )
        )
    with db.system_session(reason="look") as session:
        rows = session.execute(select(ActiveConversation.client_id, ActiveConversation.last_context))
        contexts = {row.client_id: row.last_context for row in rows}
    assert contexts == {ours: "new", theirs: None}


def test_upsert_carries_the_filter_whatever_key_conflicts() -> None:
    """No key of the schema lacks the client; one that did would conflict with another client's row."""
    upsert = pg_insert(ActiveConversation).values(chat_id=CHAT)
    upsert = upsert.on_conflict_do_update(constraint="some_key", set_={"status": "active"}, where=literal(value=True))
    compiled = upsert.compile(dialect=TenantDialect())  # type: ignore[no-untyped-call]  # SQLAlchemy's constructor
    assert "active_conversations.client_id = " in str(compiled).partition(" DO UPDATE ")[2]


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize(
    "write",
    [
        lambda s: s.execute(update(ChatMessage).values(content="x").where(ChatMessage.content.startswith("b"))),
        lambda s: s.execute(update(messages).values(content="x").where(messages.c.content.startswith("b"))),
        lambda s: s.execute(delete(ChatMessage).where(ChatMessage.content.startswith("b"))),
        lambda s: s.execute(delete(ChatMessage).where(ChatMessage.content == bindparam("c")), {"c": "b1"}),
        lambda s: s.execute(update(Client).values(name="x").where(Client.name == "B")),
        lambda s: s.execute(
            update(messages).values(content="x").where(messages.c.content.op("= 'b1' or content like")("b%")),
            execution_options={"kestra_raw_sql": True},
        ),
        lambda s: s.execute(
            update(messages)
            .values(content="x")
            .where((messages.c.id == -1).op("or", precedence=15)(messages.c.id > 2)),
        ),
        lambda s: s.execute(
            delete(messages).where(text("content = 'b1' or content = 'b2'")),
            execution_options={"kestra_raw_sql": True},
        ),
    ],
    ids=[
        "update",
        "core update",
        "delete",
        "delete with parameters",
        "update of the other client",
        "or in an operator",
        "or as an operator",
        "or in a text",
    ],
)
def test_write_does_not_reach_another_client(
    run: Run, db: Database, two_clients: tuple[UUID, UUID], write: Act
) -> None:
    before = _everything(db)
    assert run(two_clients[0], lambda session: write(session).rowcount) == 0
    assert _everything(db) == before


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("core", [False, True], ids=["entities", "core"])
def test_update_by_primary_keys_does_not_reach_another_client(
    run: Run, db: Database, two_clients: tuple[UUID, UUID], *, core: bool
) -> None:
    ours, theirs = two_clients
    before = _everything(db)
    of_key = messages.c.id == bindparam("key"), messages.c.client_id == bindparam("owner")
    with db.system_session(reason="a key to guess") as session:
        key = session.scalars(select(ChatMessage.id).where(ChatMessage.client_id == theirs).limit(1)).one()

    def guess(session: TenantSession) -> None:
        if core:
            session.execute(update(messages).where(*of_key).values(content="x"), [{"key": key, "owner": theirs}])
        else:
            with pytest.raises(StaleDataError):  # SQLAlchemy: a row that should be there was not
                session.execute(update(ChatMessage), [{"id": key, "client_id": theirs, "content": "x"}])

    run(ours, guess)
    assert _everything(db) == before


REASSIGNMENTS: dict[str, Callable[[TenantSession, UUID], object]] = {
    "update": lambda s, other: s.execute(update(ChatMessage).values(client_id=other)),
    "core update": lambda s, other: s.execute(update(messages).values(client_id=other)),
    "core update by parameters": lambda s, other: s.execute(
        update(messages).where(messages.c.chat_id == CHAT), [{"client_id": other}]
    ),
    "update to an expression": lambda s, _other: s.execute(
        update(ChatMessage).values(client_id=func.gen_random_uuid())
    ),
    "on conflict": lambda s, other: s.execute(
        pg_insert(ActiveConversation)
        .values(chat_id=CHAT)
        .on_conflict_do_update(index_elements=["chat_id", "client_id"], set_={"client_id": other})
    ),
    "attribute": lambda s, other: setattr(s.scalars(select(ChatMessage)).first(), "client_id", other),
    "the client's own id": lambda s, other: setattr(s.scalars(select(Client)).one(), "id", other),
    "core update of the client's id": lambda s, other: s.execute(update(Client).values(id=other)),
}


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("way", REASSIGNMENTS)
def test_row_stays_with_its_client(run: Run, db: Database, two_clients: tuple[UUID, UUID], way: str) -> None:
    ours, theirs = two_clients
    before = _everything(db)
    with pytest.raises(CrossTenantWrite, match="immutable"):
        run(ours, lambda session: REASSIGNMENTS[way](session, theirs))
    assert _everything(db) == before


# --- the guard ---

elsewhere = Table("elsewhere", MetaData(), Column("id", Integer))


class Anything(UserDefinedType[str]):
    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "text) || (select 'x'"


def _driver(session: TenantSession) -> Any:
    return session.connection().connection.driver_connection


REFUSED: dict[str, Callable[[TenantSession], object]] = {
    "text": lambda s: s.execute(text("SELECT 1")),
    "text in where": lambda s: s.execute(select(ChatMessage).where(text("true or true"))),
    "text as columns": lambda s: s.execute(text("SELECT content FROM chat_messages").columns(messages.c.content)),
    "from_statement": lambda s: s.execute(select(ChatMessage).from_statement(text("SELECT * FROM chat_messages"))),
    "literal_column": lambda s: s.execute(select(literal_column("(SELECT count(*) FROM chat_messages)"))),
    "statement hint": lambda s: s.execute(select(ChatMessage).with_statement_hint("OFFSET 0 UNION SELECT 1")),
    "table hint": lambda s: s.execute(select(ChatMessage.id).with_hint(ChatMessage, "ONLY")),
    "driver sql": lambda s: s.connection().exec_driver_sql("SELECT 1"),
    "driver cursor": lambda s: s.connection().connection.cursor(),
    "driver connection": lambda s: _driver(s).cursor(),
    "operator": lambda s: s.execute(select(literal("").op("|| (select 'x') ||")(""))),
    "operator with a statement": lambda s: s.execute(
        select(ChatMessage.content.op("union select content from chat_messages where content like")("%"))
    ),
    "operator with a comment": lambda s: s.execute(select(literal("").op("||/*")(""))),
    "unary operator": lambda s: s.execute(select(UnaryExpression(literal(1), operator=custom_op("1 or")))),
    "field of extract": lambda s: s.execute(select(extract("epoch from now()) + extract(epoch", func.now()))),
    "name that is not quoted": lambda s: s.execute(select(column(quoted_name("1; select 2", quote=False)))),
    "user-defined type": lambda s: s.execute(select(cast(literal("1"), Anything()))),
    "set-returning function": lambda s: s.execute(select(func.all_messages().table_valued("content"))),
    "column of a set-returning function": lambda s: s.execute(select(func.all_messages().column_valued("content"))),
    "function in the from": lambda s: s.execute(select(func.count()).select_from(func.all_messages())),
    "tablesample": lambda s: s.execute(select(tablesample(messages, 10))),
    "table of another schema": lambda s: s.execute(select(messages.to_metadata(MetaData(), schema="other"))),
    "alias that is written to": lambda s: s.execute(update(messages.alias()).values(content="x")),
    "lightweight table": lambda s: s.execute(select(table("chat_messages", column("content")))),
    "global table of another schema": lambda s: s.execute(
        select(Table("shared", MetaData(), Column("id", Integer), schema="other", **GLOBAL))
    ),
    "unknown table": lambda s: s.execute(select(elsewhere)),
    "insert into an unknown table": lambda s: s.execute(insert(elsewhere).values(id=1)),
    "update of an unknown table": lambda s: s.execute(update(elsewhere).values(id=1)),
    "delete from an unknown table": lambda s: s.execute(delete(elsewhere)),
    "rows of nobody": lambda s: s.execute(select(OrphanedRow)),
    "ddl": lambda s: s.connection().execute(CreateTable(elsewhere)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_statement_out_of_the_filters_reach_is_refused(run: Run, client_id: UUID, what: str) -> None:
    with pytest.raises(UnscopedStatement):
        run(client_id, REFUSED[what])


def test_connection_that_nobody_bound_is_refused(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        engine: Any = session.get_bind()
        raw = engine.raw_connection()
        with pytest.raises(UnscopedStatement, match="cursor"):
            raw.cursor()
        raw.close()
        with engine.connect() as unbound, pytest.raises(TenancyError, match="not bound"):
            unbound.execute(select(ChatMessage))


def test_marked_and_unmarked_text_do_not_share_a_fate(db: Database, client_id: UUID) -> None:
    """Both have the same cached form; the mark is looked at on each execution."""
    with db.tenant_session(client_id) as session:
        for _ in range(2):
            assert session.scalar(text("SELECT 1"), execution_options={"kestra_raw_sql": True}) == 1
            with pytest.raises(UnscopedStatement):
                session.scalar(text("SELECT 1"))


def test_second_tenant_key_in_a_table_is_refused() -> None:
    confused = Table("confused", MetaData(), Column("about", ClientId), Column("client_id", ClientId))
    with pytest.raises(TenancyError, match="two owners"):
        tenant_key(confused)


def test_shared_table_is_read_unfiltered() -> None:
    shared = Table("shared", MetaData(), Column("id", Integer), **GLOBAL)
    compiled = select(shared).compile(dialect=TenantDialect())  # type: ignore[no-untyped-call]  # as above
    assert "client_id" not in str(compiled)


def test_deleting_the_client_is_refused_in_a_tenant_session(db: Database, client_id: UUID) -> None:
    with pytest.raises(CrossTenantWrite, match="system session"), db.tenant_session(client_id) as session:
        session.execute(delete(Client))
    with pytest.raises(CrossTenantWrite, match="system session"), db.tenant_session(client_id) as session:
        session.delete(session.scalars(select(Client)).one())


def test_grouping_by_the_key_alone_says_what_to_write(db: Database, two_clients: tuple[UUID, UUID]) -> None:
    counted = select(Client.name, func.count()).join(Client.messages).group_by(Client.id)
    with pytest.raises(StatementFailed, match="grouped by or aggregated"), db.tenant_session(two_clients[0]) as session:
        session.execute(counted)
    with db.tenant_session(two_clients[0]) as session:
        assert session.execute(counted.group_by(Client.name)).all() == [("A", 2)]


def test_missing_parameter_does_not_show_the_statement(db: Database, client_id: UUID) -> None:
    raw = text("SELECT 'segredo', :a, :b").execution_options(kestra_raw_sql=True)
    with pytest.raises(StatementFailed, match="'b'") as caught, db.tenant_session(client_id) as session:
        session.execute(raw, {"a": "1"})
    assert "segredo" not in str(caught.value) + str(caught.value.__cause__)


def test_new_client_is_refused_in_a_tenant_session(db: Database, client_id: UUID) -> None:
    with pytest.raises(CrossTenantWrite, match="system session"), db.tenant_session(client_id) as session:
        session.add(Client(name="C", token="token-c"))  # noqa: S106  # not a password
    with pytest.raises(CrossTenantWrite, match="system session"), db.tenant_session(client_id) as session:
        session.execute(insert(Client).values(name="C", token="token-c"))  # noqa: S106  # not a password


def test_isolation_level_is_the_sessions(db: Database, client_id: UUID) -> None:
    with pytest.raises(TenancyError), db.tenant_session(client_id) as session:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    with db.tenant_session(client_id) as session:
        assert session.scalars(select(Client.id)).all() == [client_id]


@pytest.mark.parametrize("bad", [None, "", " ", "not-a-uuid", 7, b"\0" * 16, "00000000-0000-0000-0000-00000000000g"])
def test_no_client_no_session(db: Database, bad: Any) -> None:
    with pytest.raises(InvalidClientId), db.tenant_session(bad):
        pytest.fail("a session was opened")


def test_client_id_may_be_text(db: Database, client_id: UUID) -> None:
    with db.tenant_session(str(client_id).upper()) as session:
        assert session.client_id == client_id


def _everything(db: Database) -> list[tuple[Any, ...]]:
    with db.system_session(reason="compare") as session:
        return [
            tuple(row)
            for table in (Client.__table__, conversations, messages, ClientFile.__table__)
            for row in session.execute(select(table).order_by(*table.primary_key))
        ]


# --- what the data access layer builds on -----------------------------------------------------------------------------


@pytest.mark.usefixtures("layers")
def test_the_bound_client_is_the_sessions_whatever_is_given_for_it(
    run: Run, db: Database, two_clients: tuple[UUID, UUID]
) -> None:
    ours, theirs = two_clients
    names = ["client_id", "chat_id", "role", "content"]
    row = select(bound_client_id(), literal("bound"), literal("user"), literal("oi"))
    statements: list[tuple[Any, Any]] = [
        (insert(messages).from_select(names, row), {"kestra_client_id": theirs}),
        (insert(messages).from_select(names, row.union_all(row)), None),
    ]
    run(ours, lambda session: session.execute(*statements[0]))
    with pytest.raises(CrossTenantWrite):
        run(ours, lambda session: session.execute(*statements[1]))
    with db.system_session(reason="look") as session:
        assert session.scalars(select(ChatMessage.client_id).where(ChatMessage.chat_id == "bound")).all() == [ours]


@pytest.mark.parametrize(
    "write",
    [
        pg_insert(conversations)
        .values(chat_id="new", last_context="a")
        .on_conflict_do_update(
            index_elements=[conversations.c.chat_id, conversations.c.client_id],
            set_={"last_context": func.upper("a")},
        ),
        update(conversations).values(last_context=func.upper("a")),
        delete(conversations).where(conversations.c.chat_id == func.lower("NEW")),
    ],
    ids=["upsert", "update", "delete"],
)
def test_functions_in_what_a_cte_writes_are_not_in_its_from(
    run: Run, two_clients: tuple[UUID, UUID], write: Any
) -> None:
    written = write.returning(conversations.c.chat_id).cte("written")
    run(two_clients[0], lambda session: session.execute(select(written.c.chat_id)))
