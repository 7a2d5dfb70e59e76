"""Loads of every strategy, from parents in every state: a relationship never brings another client's rows."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import (
    DynamicMapped,
    Mapped,
    Query,
    Session,
    WriteOnlyMapped,
    column_property,
    defer,
    deferred,
    foreign,
    immediateload,
    joinedload,
    lazyload,
    registry,
    relationship,
    selectinload,
    subqueryload,
)

from kestra import ActiveConversation, ChatMessage, Client, Database, TenantSession

CHAT = "1"
messages: Any = ChatMessage.__table__
conversations: Any = ActiveConversation.__table__


class Line:
    """A message, mapped without `client_id` in its relationships: what a careless mapping would do."""

    content: Mapped[str]


class Talk:
    """A conversation whose relationships join on the chat alone; only the session keeps clients apart."""

    chat_id: Mapped[str]
    status: Mapped[str]
    lines: Mapped[list[Line]]
    dynamic: DynamicMapped[Line]
    write_only: WriteOnlyMapped[Line]
    count: Mapped[int]


careless = registry()
careless.map_imperatively(Line, messages, properties={"media_url": deferred(messages.c.media_url)})


def _lines(**options: Any) -> Any:
    return relationship(
        Line,
        primaryjoin=conversations.c.chat_id == foreign(messages.c.chat_id),
        order_by=messages.c.id,
        viewonly=True,
        **options,
    )


careless.map_imperatively(
    Talk,
    conversations,
    properties={
        "lines": _lines(),
        "dynamic": _lines(lazy="dynamic"),
        "write_only": _lines(lazy="write_only"),
        "count": column_property(
            select(func.count(messages.c.id)).where(messages.c.chat_id == conversations.c.chat_id).scalar_subquery()
        ),
    },
)


@pytest.fixture
def two_talks(db: Database, client_id: UUID, other_client_id: UUID) -> UUID:
    with db.system_session(reason="test data") as session:
        for owner, contents in ((client_id, ["a1", "a2"]), (other_client_id, ["b1", "b2", "b3"])):
            session.add(ActiveConversation(client_id=owner, chat_id=CHAT))
            session.add_all(ChatMessage(client_id=owner, chat_id=CHAT, role="user", content=c) for c in contents)
    return client_id


def _contents(talk: Talk) -> list[str]:
    return [line.content for line in talk.lines]


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize(
    "strategy",
    [joinedload, selectinload, subqueryload, immediateload, lazyload],
    ids=lambda strategy: strategy.__name__,
)
def test_eager_and_lazy_loads_stay_inside_the_client(db: Database, two_talks: UUID, strategy: Any) -> None:
    with db.tenant_session(two_talks) as session:
        [talk] = session.scalars(select(Talk).options(strategy(Talk.lines))).unique()
        assert _contents(talk) == ["a1", "a2"]


@pytest.mark.usefixtures("layers")
def test_collections_that_are_queried_stay_inside_the_client(db: Database, two_talks: UUID) -> None:
    with db.tenant_session(two_talks) as session:
        talk = session.scalars(select(Talk)).one()
        assert [line.content for line in talk.dynamic] == ["a1", "a2"]
        assert [line.content for line in session.scalars(talk.write_only.select())] == ["a1", "a2"]


@pytest.mark.usefixtures("layers")
def test_column_properties_and_deferred_columns_stay_inside_the_client(db: Database, two_talks: UUID) -> None:
    with db.tenant_session(two_talks) as session:
        talk = session.scalars(select(Talk).options(defer(Talk.status))).one()
        assert talk.count == 2
        assert talk.status == "active"
        assert [line.media_url for line in session.scalars(select(Line))] == [None, None]  # type: ignore[attr-defined]  # mapped


def _added(session: TenantSession) -> Talk:
    session.execute(conversations.delete())
    talk = Talk()
    talk.chat_id = CHAT
    session.add(talk)
    session.flush()
    return talk


def _merged(session: TenantSession) -> Talk:
    talk = Talk()
    talk.chat_id, talk.client_id = CHAT, session.client_id  # type: ignore[attr-defined]  # mapped
    return session.merge(talk)


def _refreshed(session: TenantSession) -> Talk:
    talk = session.scalars(select(Talk)).one()
    session.refresh(talk)
    return talk


def _expired(session: TenantSession) -> Talk:
    talk = session.scalars(select(Talk)).one()
    session.expire(talk)
    return talk


def _got(session: TenantSession) -> Talk:
    return session.get_one(Talk, (CHAT, session.client_id))


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("parent", [_added, _merged, _refreshed, _expired, _got], ids=lambda parent: parent.__name__)
def test_state_of_the_parent_does_not_matter(
    db: Database, two_talks: UUID, parent: Callable[[TenantSession], Talk]
) -> None:
    with db.tenant_session(two_talks) as session:
        talk = parent(session)
        assert _contents(talk) == ["a1", "a2"]
        assert talk.count == 2


@pytest.mark.usefixtures("layers")
def test_query_api_stays_inside_the_client(db: Database, two_talks: UUID) -> None:
    with db.tenant_session(two_talks) as session:
        query: Query[ChatMessage] = session.query(ChatMessage)
        assert query.count() == 2
        assert [message.content for message in query.order_by(ChatMessage.id)] == ["a1", "a2"]
        assert session.query(query.filter_by(content="b1").exists()).scalar() is False
        assert [name for (name,) in session.query(Client.name)] == ["A"]
        assert query.filter(ChatMessage.content.startswith("b")).update({"content": "x"}) == 0
        assert query.filter(ChatMessage.content.startswith("b")).delete() == 0


@pytest.mark.usefixtures("layers")
def test_connection_of_the_session_stays_inside_the_client(db: Database, two_talks: UUID) -> None:
    with db.tenant_session(two_talks) as session:
        rows = session.connection().execute(select(messages.c.content).order_by(messages.c.id))
        assert rows.scalars().all() == ["a1", "a2"]
    with db.tenant_session(two_talks) as session:
        bound = Session(bind=session.connection())
        assert bound.scalars(select(ChatMessage.content).order_by(ChatMessage.id)).all() == ["a1", "a2"]


@pytest.mark.usefixtures("layers")
def test_conflict_with_another_clients_key_is_none_and_reveals_nothing(
    db: Database, two_talks: UUID, other_client_id: UUID
) -> None:
    with db.system_session(reason="test data") as session:
        session.add(ActiveConversation(client_id=other_client_id, chat_id="theirs"))
    with db.tenant_session(two_talks) as session:
        quiet = insert(ActiveConversation).values(chat_id="theirs").on_conflict_do_nothing()
        assert session.execute(quiet.returning(ActiveConversation.chat_id)).all() == [("theirs",)]


def test_cache_does_not_grow_with_the_clients(db: Database, two_talks: UUID) -> None:
    """10,000 clients, one cached form for each statement."""
    with db.tenant_session(two_talks) as session:
        cache: Any = session.get_bind()._compiled_cache  # type: ignore[union-attr]  # noqa: SLF001  # only counted
        session.scalars(select(ChatMessage).where(ChatMessage.chat_id == CHAT)).all()
    before = len(cache)
    for number in range(10_000):
        with db.tenant_session(UUID(int=number + 1)) as session:
            assert session.scalars(select(ChatMessage).where(ChatMessage.chat_id == CHAT)).all() == []
    assert len(cache) == before
