"""Factories: valid rows without an argument, of one client, as recording leaves them, the same for the same seed."""

import asyncio
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from random import Random
from typing import Any, Final, assert_type
from uuid import UUID, uuid4

import factory.random
import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import func, inspect, select
from sqlalchemy.exc import InvalidRequestError

from kestra import ActiveConversation, ChatMessage, Client, ClientFile, Database, SystemSession, TenantSession
from kestra.base import Base
from kestra.dao import conversations, files, followups, messages
from kestra.errors import (
    ChatExists,
    ClientNotFound,
    CrossTenantWrite,
    DuplicateToken,
    InvalidClientId,
    InvalidToolsConfig,
    InvalidValue,
    TenancyError,
)
from kestra.testing import content
from kestra.testing.factories import (
    FOREVER,
    MOMENT,
    ClientFactory,
    ClientFileFactory,
    ConversationFactory,
    KestraFactory,
    MessageFactory,
    create,
    create_batch,
    seed,
    using,
)
from kestra.testing.invariants import check
from kestra.tools_config import FollowUpStage, ToolsConfig

NOW: Final = datetime(2026, 3, 2, 12, tzinfo=UTC)
OWNED: Final[list[type[KestraFactory[Any]]]] = [ConversationFactory, MessageFactory, ClientFileFactory]
FACTORIES: Final[list[type[KestraFactory[Any]]]] = [ClientFactory, *OWNED]
DRAWN_BY_THE_DATABASE: Final = {
    "last_message_id",
    "last_user_message_id",
    "last_read_message_id",
    "last_context_message_id",
}

Session = TenantSession | SystemSession


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    seed(0)
    yield
    seed(0)


@contextmanager
def in_one_of(db: Database, kind: str, client_id: UUID) -> Iterator[dict[str, Any]]:
    """A session of a client, or over all of them; and what a row has to be told to be that client's."""
    if kind == "tenant":
        with in_tenant(db, client_id):
            yield {}
    else:
        with in_system(db):
            yield {"client_id": client_id}


@pytest.fixture(params=["tenant", "system"])
def owned(request: pytest.FixtureRequest, db: Database, client_id: UUID) -> Iterator[dict[str, Any]]:
    """A session that is in use for the whole test, and what a row has to be told to be of the first client."""
    with in_one_of(db, request.param, client_id) as owner:
        yield owner


@contextmanager
def in_system(db: Database) -> Iterator[SystemSession]:
    with db.system_session(reason="test data") as session, using(session):
        yield session


@contextmanager
def in_tenant(db: Database, client_id: UUID) -> Iterator[TenantSession]:
    with db.tenant_session(client_id) as session, using(session):
        yield session


def columns(row: Base) -> dict[str, Any]:
    return {column.key: getattr(row, column.key) for column in inspect(type(row)).column_attrs}


def values(row: Base) -> dict[str, Any]:
    """The columns of a row without the ids of messages, and with what a document says."""
    left_out = DRAWN_BY_THE_DATABASE | ({"id"} if isinstance(row, ChatMessage) else set())
    found = {name: value for name, value in columns(row).items() if name not in left_out}
    if isinstance(row, Client):
        found["tools_config"] = row.tools_config.document()
    return found


def stored(db: Database, model: type[Base]) -> list[dict[str, Any]]:
    table = model.__table__
    with db.system_session(reason="look") as session:
        rows = session.execute(select(*table.columns).order_by(*table.primary_key)).mappings()
        return [dict(row) for row in rows]


def count(db: Database, model: type[Base]) -> int:
    with db.system_session(reason="count") as session:
        return session.scalar(select(func.count()).select_from(model)) or 0


# --- valid without an argument ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", FACTORIES)
def test_every_factory_creates_a_row_without_an_argument(db: Database, made: type[KestraFactory[Any]]) -> None:
    with in_system(db):
        row = made()
        assert not inspect(row).pending
    with in_system(db) as session:
        again = session.get_one(type(row), inspect(row).identity)
        assert values(again) == values(row)


@pytest.mark.parametrize("made", OWNED)
def test_every_factory_but_that_of_clients_creates_rows_of_the_session_s_client(
    db: Database, client_id: UUID, made: type[KestraFactory[Any]]
) -> None:
    clients_before = count(db, Client)
    with in_tenant(db, client_id) as session:
        row = made.create()
        assert row.client_id == client_id
        assert row.client is session.scalars(select(Client)).one()
    assert count(db, Client) == clients_before


@pytest.mark.parametrize("made", FACTORIES)
def test_every_factory_builds_without_a_session(made: type[KestraFactory[Any]]) -> None:
    row = made.build()
    assert inspect(row).transient
    if not isinstance(row, Client):
        assert row.client_id == row.client.id
        assert inspect(row.client).transient


@pytest.mark.parametrize("made", FACTORIES)
def test_what_is_built_can_be_added_to_a_session(db: Database, made: type[KestraFactory[Any]]) -> None:
    row = made.build()
    with db.system_session(reason="test data") as session:
        session.add(row)
    assert inspect(row).persistent or inspect(row).detached
    assert count(db, type(row)) == 1


@pytest.mark.parametrize("made", FACTORIES)
def test_batches_are_as_many_rows_as_they_say(db: Database, made: type[KestraFactory[Any]]) -> None:
    assert len(made.build_batch(3)) == 3
    with in_system(db):
        rows = made.create_batch(3)
    assert len(rows) == count(db, type(rows[0])) == 3


def test_conversations_of_a_new_client_each_have_their_own(db: Database) -> None:
    with in_system(db):
        first, second = ConversationFactory.create_batch(2)
    assert first.client_id != second.client_id
    assert first.client.id == first.client_id


def test_creating_flushes_and_never_commits(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session, using(session):
        for made in OWNED:
            made.create()
        assert session.scalar(select(func.count()).select_from(ClientFile)) == 1
        session.rollback()
    assert count(db, ClientFile) == count(db, ChatMessage) == count(db, ActiveConversation) == 0


def test_traits_of_sub_factories_reach_the_client(db: Database) -> None:
    with in_system(db):
        made = ConversationFactory.create(client__meta=True, client__name="Padaria do Zé")
    assert made.client.name == "Padaria do Zé"
    assert made.client.tools_config.whatsapp is not None
    assert made.client.tools_config.whatsapp.enforces_window
    assert ConversationFactory.build(client__name="Ótica").client.name == "Ótica"


@pytest.mark.parametrize("made", FACTORIES)
def test_a_value_that_is_no_column_is_refused(db: Database, client_id: UUID, made: type[KestraFactory[Any]]) -> None:
    with pytest.raises(TypeError):
        made.build(colour="blue")
    if made is not ClientFactory:
        with in_tenant(db, client_id), pytest.raises((TypeError, InvalidValue)):
            made.create(colour="blue")
    assert count(db, ChatMessage) == 0


def test_what_is_made_of_a_factory_of_one_s_own_is_the_same(db: Database) -> None:
    class Bot(ConversationFactory):
        messages = 4
        status = "finished"

    with in_system(db) as session:
        made = Bot.create()
        assert made.status == "finished"
        assert session.scalar(select(func.count()).select_from(ChatMessage)) == 4


# --- sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", FACTORIES)
def test_without_a_session_creating_says_what_to_write(made: type[KestraFactory[Any]]) -> None:
    with pytest.raises(TenancyError, match=r"with using\(session\)"):
        made.create()


def test_after_the_block_there_is_no_session(db: Database) -> None:
    with in_system(db):
        pass
    with pytest.raises(TenancyError):
        ClientFactory.create()


def test_the_inner_one_of_two_blocks_counts(db: Database, client_id: UUID) -> None:
    with in_system(db):
        with in_tenant(db, client_id):
            assert ClientFileFactory.create().client_id == client_id
        assert ClientFileFactory.create().client_id != client_id


def test_an_error_inside_of_the_block_ends_it(db: Database) -> None:
    with pytest.raises(ZeroDivisionError), in_system(db):
        raise ZeroDivisionError
    with pytest.raises(TenancyError):
        ClientFactory.create()


def test_a_thread_does_not_write_in_the_session_of_another(db: Database) -> None:
    with in_system(db), ThreadPoolExecutor(1) as pool, pytest.raises(TenancyError):
        pool.submit(ClientFactory.create).result()


def test_another_kind_of_session_is_refused(db: Database, client_id: UUID) -> None:
    async def asynchronous() -> None:
        async with db, db.async_tenant_session(client_id) as session:
            with pytest.raises(TenancyError, match="run_sync"), using(session):  # type: ignore[arg-type]  # that is the test
                pass

    asyncio.run(asynchronous())


def test_the_function_form_writes_in_the_session_it_is_given(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        assert create(session, ConversationFactory, stage=2).client_id == client_id
        assert len(create_batch(session, ClientFileFactory, 3)) == 3
        with pytest.raises(TenancyError):
            ConversationFactory.create()


def test_an_async_tenant_session_runs_the_function_form(db: Database, client_id: UUID) -> None:
    async def asynchronous() -> ActiveConversation:
        async with db, db.async_tenant_session(client_id) as session:
            made = assert_type(await session.run_sync(create, ConversationFactory, messages=12), ActiveConversation)
            await session.run_sync(create, MessageFactory, conversation=made, from_assistant=True)
            rows = assert_type(await session.run_sync(create_batch, ClientFileFactory, 2), list[ClientFile])
            assert len(rows) == 2
            return made

    made = asyncio.run(asynchronous())
    assert made.client_id == client_id
    assert count(db, ChatMessage) == 13


def test_an_async_system_session_runs_the_function_form(db: Database) -> None:
    async def asynchronous() -> None:
        async with db, db.async_system_session(reason="test data") as session:
            client = await session.run_sync(create, ClientFactory, meta=True)
            made = await session.run_sync(create, ConversationFactory, client=client, messages=12)
            assert made.client is client

    asyncio.run(asynchronous())
    assert count(db, ChatMessage) == 12


def test_tasks_that_create_at_once_write_in_their_own_sessions(db: Database, clients: tuple[UUID, UUID]) -> None:
    async def one(client_id: UUID) -> None:
        async with db.async_tenant_session(client_id) as session:
            for _ in range(3):
                made = await session.run_sync(create, ConversationFactory)
                assert made.client_id == client_id

    async def both() -> None:
        async with db:
            await asyncio.gather(*map(one, clients))

    asyncio.run(both())
    assert count(db, ActiveConversation) == 6


# --- one client -------------------------------------------------------------------------------------------------------


def test_what_is_made_under_one_client_shares_its_id(db: Database) -> None:
    with in_system(db):
        client = ClientFactory.create()
        made = ConversationFactory.create(client=client, messages=5)
        message = MessageFactory.create(conversation=made)
        file = ClientFileFactory.create(client_id=client.id)
        assert made.client is message.client is file.client is client
    for model in (ActiveConversation, ChatMessage, ClientFile):
        assert {row["client_id"] for row in stored(db, model)} == {client.id}
    assert count(db, Client) == 1


def test_built_rows_share_the_client_of_their_conversation() -> None:
    made = ConversationFactory.build(messages=3)
    message = MessageFactory.build(conversation=made)
    assert message.client is made.client
    assert {said.client_id for said in (message, *made.messages)} == {made.client_id}
    assert all(said.client is made.client for said in made.messages)


def test_clients_are_created_in_system_sessions_alone(db: Database, client_id: UUID) -> None:
    with in_tenant(db, client_id):
        for refused in (
            ClientFactory.create,
            lambda: ConversationFactory.create(client__meta=True),
            lambda: ConversationFactory.create(client=Client(name="A", token="t")),  # noqa: S106  # not a password
        ):
            with pytest.raises(CrossTenantWrite, match="system_session"):
                refused()
    assert count(db, Client) == 2


def test_the_client_of_another_session_is_found_by_its_id(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as other:
        elsewhere = other.scalars(select(Client)).one()
        with in_tenant(db, client_id) as session:
            made = ConversationFactory.create(client=elsewhere)
            assert made.client is not elsewhere
            assert inspect(made.client).session is session
    with in_system(db):
        assert ClientFileFactory.create(client=elsewhere).client_id == client_id


def test_a_client_that_was_only_built_is_created_with_its_rows(db: Database) -> None:
    by_hand = Client(name="A", token="t")  # noqa: S106  # not a password
    with in_system(db):
        for client in (ClientFactory.build(), by_hand):
            assert ConversationFactory.create(client=client).client is client
    assert count(db, Client) == 2


@pytest.mark.parametrize("made", OWNED)
def test_another_client_s_row_is_refused_in_a_tenant_session(
    db: Database, clients: tuple[UUID, UUID], made: type[KestraFactory[Any]]
) -> None:
    mine, other = clients
    with in_system(db) as system:
        others_client = system.get_one(Client, other)
    with in_tenant(db, mine):
        for owner in ({"client": others_client}, {"client_id": other}, {"client_id": str(other)}):
            with pytest.raises(CrossTenantWrite):
                made.create(**owner)
        row = made.create(client_id=str(mine))
    assert {row["client_id"] for row in stored(db, type(row))} == {mine}


@pytest.mark.parametrize("made", OWNED)
@pytest.mark.parametrize("strategy", ["build", "create"])
def test_contradictory_owners_are_refused(db: Database, made: type[KestraFactory[Any]], strategy: str) -> None:
    with in_system(db):
        one, other = ClientFactory.create_batch(2)
        with pytest.raises(CrossTenantWrite, match=str(one.id)):
            getattr(made, strategy)(client=one, client_id=other.id)
        with pytest.raises(CrossTenantWrite):
            getattr(made, strategy)(client_id=one.id, client__name="Nova")


@pytest.mark.parametrize("strategy", ["build", "create"])
def test_a_message_of_one_client_is_refused_in_the_conversation_of_another(db: Database, strategy: str) -> None:
    with in_system(db):
        made = ConversationFactory.create()
        other = ClientFactory.create()
        for owner in ({"client": other}, {"client_id": other.id}):
            with pytest.raises(CrossTenantWrite):
                getattr(MessageFactory, strategy)(conversation=made, **owner)
    assert count(db, ChatMessage) == 2


def test_the_conversation_of_another_client_is_refused_in_a_tenant_session(
    db: Database, clients: tuple[UUID, UUID]
) -> None:
    mine, other = clients
    with in_tenant(db, other):
        of_other = ConversationFactory.create()
    with in_tenant(db, mine):
        for conversation in (of_other, ConversationFactory.build()):
            with pytest.raises(CrossTenantWrite):
                MessageFactory.create(conversation=conversation)
    assert count(db, ChatMessage) == 2


def test_the_same_chat_of_another_client_is_left_alone(db: Database, clients: tuple[UUID, UUID]) -> None:
    mine, other = clients
    with in_tenant(db, other):
        ConversationFactory.create(chat_id="1", messages=3)
        message = MessageFactory.create(chat_id="1", provider_message_id="wamid.1")
    before = [row for row in stored(db, ActiveConversation) if row["client_id"] == other and row["chat_id"] == "1"]
    with in_tenant(db, mine):
        ConversationFactory.create(chat_id="1")
        MessageFactory.create(chat_id="1", provider_message_id="wamid.1")
    with in_system(db):
        third = ConversationFactory.create(chat_id="1")
        again = MessageFactory.create(conversation=third, provider_message_id="wamid.1")
        assert again.id != message.id
        assert again.provider_message_id == "wamid.1"
        ConversationFactory.create(client_id=other, chat_id="2", last_message_at=NOW)
        assert MessageFactory.create(client_id=mine, chat_id="2").created_at < MOMENT
    after = [row for row in stored(db, ActiveConversation) if row["client_id"] == other and row["chat_id"] == "1"]
    assert after == before


def test_a_client_that_is_not_there_is_an_error(db: Database) -> None:
    nobody = uuid4()
    for made in OWNED:
        with in_system(db), pytest.raises(ClientNotFound):
            made.create(client_id=nobody)
        with in_tenant(db, nobody), pytest.raises(ClientNotFound):
            made.create()
        with in_system(db), pytest.raises(InvalidClientId):
            made.create(client=None)


# --- conversations stand where recording leaves them ------------------------------------------------------------------


def as_recorded(db: Database, client_id: UUID, incoming: list[messages.IncomingMessage]) -> None:
    with db.tenant_session(client_id) as session:
        for message in incoming:
            messages.record(session, **asdict(message))


def shifted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one client whose ids of messages count from 1, and whose client is nobody."""
    ids = [row[name] for row in rows for name in ("id", *DRAWN_BY_THE_DATABASE) if row.get(name) is not None]
    first = min(ids, default=0)
    return [
        {
            name: value - first if name in {"id", *DRAWN_BY_THE_DATABASE} and value is not None else value
            for name, value in row.items()
            if name != "client_id"
        }
        for row in rows
    ]


def of(db: Database, model: type[Base], client_id: UUID) -> list[dict[str, Any]]:
    return shifted([row for row in stored(db, model) if row["client_id"] == client_id])


PARTS: Final = ("chat_id", "role", "content", "media_url", "provider_message_id")


@pytest.mark.parametrize("kind", ["tenant", "system"])
@pytest.mark.parametrize("number", [1, 2, 12, 501])
def test_a_conversation_is_as_if_its_messages_had_been_recorded_one_by_one(
    db: Database, clients: tuple[UUID, UUID], kind: str, number: int
) -> None:
    mine, other = clients
    with in_one_of(db, kind, mine) as owner:
        made = ConversationFactory.create(messages=number, **owner)
    said = [row for row in stored(db, ChatMessage) if row["client_id"] == mine]
    assert len(said) == number
    incoming = [
        messages.IncomingMessage(sent_at=row["created_at"], **{name: row[name] for name in PARTS})
        for row in sorted(said, key=lambda row: row["id"])
    ]
    as_recorded(db, other, incoming)
    for model in (ActiveConversation, ChatMessage):
        assert of(db, model, mine) == of(db, model, other)
    assert [columns(made)] == [row for row in stored(db, ActiveConversation) if row["client_id"] == mine]


@pytest.mark.parametrize("kind", ["tenant", "system"])
@pytest.mark.parametrize("shuffle", range(6))
def test_messages_leave_the_state_that_recording_them_leaves_whatever_their_order(
    db: Database, clients: tuple[UUID, UUID], kind: str, shuffle: int
) -> None:
    mine, other = clients
    order = Random(shuffle)  # noqa: S311  # test data
    incoming = [
        messages.IncomingMessage(
            order.choice(["1", "2"]),
            order.choice(["user", "assistant", "system"]),
            f"text {index}",
            order.choice([None, "https://midia.example/1.jpg"]),
            order.choice([None, f"wamid.{index}"]),
            NOW + timedelta(minutes=order.randrange(6)),
        )
        for index in range(30)
    ]
    with in_one_of(db, kind, mine) as owner:
        for message in incoming:
            parts = {name: getattr(message, name) for name in PARTS}
            made = MessageFactory.create(created_at=message.sent_at, **parts, **owner)
            assert {name: getattr(made, name) for name in PARTS} == parts
            assert made.created_at == message.sent_at
    as_recorded(db, other, incoming)
    for model in (ActiveConversation, ChatMessage):
        assert of(db, model, mine) == of(db, model, other)


def test_what_is_created_is_what_the_same_seed_builds(owned: dict[str, Any], client_id: UUID) -> None:
    seed(3)
    built = ConversationFactory.build(client_id=client_id, messages=12, unread=2)
    seed(3)
    made = ConversationFactory.create(**owned, messages=12, unread=2)
    session = inspect(made).session
    assert session is not None
    said = session.scalars(select(ChatMessage).order_by(ChatMessage.created_at)).all()
    assert [values(message) for message in said] == [values(message) for message in built.messages]
    assert values(made) == values(built)
    assert made.last_read_message_id == said[-3].id


def test_a_conversation_is_made_of_the_messages_it_is_given(owned: dict[str, Any]) -> None:
    late = MOMENT - timedelta(days=2)
    given: list[dict[str, Any]] = [
        {"content": "Ainda tem vaga?", "provider_message_id": "wamid.1"},
        {"role": "assistant", "created_at": late + timedelta(hours=1)},
        {"content": None, "media_url": "https://midia.example/1.jpg", "created_at": late},
    ]
    for make in (ConversationFactory.build, ConversationFactory.create):
        seed(3)
        made = make(**owned, messages=given, followup_stage=2, unread=1)
        assert (made.last_role, made.followup_stage) == ("assistant", 2)
    session = inspect(made).session
    assert session is not None
    first, second, third = session.scalars(select(ChatMessage).order_by(ChatMessage.id))
    assert (first.content, first.provider_message_id, first.role) == ("Ainda tem vaga?", "wamid.1", "user")
    assert first.created_at < second.created_at == late + timedelta(hours=1)
    assert third.created_at == late
    assert second.content
    assert second.role == "assistant"
    assert (third.content, third.media_url) == (None, "https://midia.example/1.jpg")
    assert (made.last_message_id, made.last_user_message_id, made.last_read_message_id) == (
        second.id,
        third.id,
        second.id,
    )


def test_given_messages_without_a_time_end_when_the_conversation_does(owned: dict[str, Any]) -> None:
    ended = MOMENT - timedelta(days=3)
    made = ConversationFactory.create(**owned, messages=[{}, {"role": "assistant"}], last_message_at=ended)
    assert made.last_message_at == ended
    assert made.last_user_message_at is not None
    assert ended - timedelta(minutes=10) <= made.last_user_message_at < ended


def test_a_message_moves_a_conversation_with_a_state_as_recording_does(owned: dict[str, Any], client_id: UUID) -> None:
    claimed = ConversationFactory.create(claimed=True, stage=2, **owned)
    MessageFactory.create(conversation=claimed, from_assistant=True)
    assert claimed.followup_stage == 2
    assert claimed.claim_token is not None
    late = MessageFactory.create(conversation=claimed, created_at=MOMENT - timedelta(days=30))
    assert claimed.claim_token is not None
    assert claimed.last_user_message_id == late.id
    newest = MessageFactory.create(conversation=claimed)
    assert claimed.followup_stage == 0
    assert [columns(claimed)[name] for name in ("claim_token", "claimed_until")] == [None, None]
    assert claimed.last_message_id == newest.id
    assert claimed.client_id == client_id
    finished = ConversationFactory.create(finished=True, **owned)
    MessageFactory.create(conversation=finished, role="system")
    assert (finished.status, finished.last_role) == ("finished", "system")
    MessageFactory.create(conversation=finished)
    assert finished.status == "active"


def test_a_conversation_that_is_held_is_brought_up_to_date_and_keeps_its_client(owned: dict[str, Any]) -> None:
    made = ConversationFactory.create(**owned)
    client = made.client
    message = MessageFactory.create(chat_id=made.chat_id, content="Oi?", **owned)
    assert (made.last_message_id, made.last_message_at, made.last_role) == (message.id, message.created_at, "user")
    assert made.client is client


def test_changes_that_were_not_flushed_are_kept(owned: dict[str, Any]) -> None:
    made = ConversationFactory.create(**owned)
    made.paused_until = FOREVER
    MessageFactory.create(conversation=made)
    assert made.paused_until == FOREVER


def test_a_message_without_a_conversation_makes_one(owned: dict[str, Any]) -> None:
    message = MessageFactory.create(**owned)
    session = inspect(message).session
    assert session is not None
    made = session.scalars(select(ActiveConversation)).one()
    assert (made.chat_id, made.client_id) == (message.chat_id, message.client_id)
    assert (made.last_message_id, made.last_user_message_id) == (message.id, message.id)


def test_a_message_goes_to_a_conversation_that_was_only_built(db: Database) -> None:
    built = ConversationFactory.build(chat_id="1", messages=0, paused_until=FOREVER)
    with in_system(db):
        message = MessageFactory.create(conversation=built)
        assert message.client_id == built.client_id
    (row,) = stored(db, ActiveConversation)
    assert row["paused_until"] == FOREVER
    assert row["last_message_id"] == message.id


def test_a_message_is_the_newest_unless_its_time_is_given(owned: dict[str, Any]) -> None:
    made = ConversationFactory.create(messages=3, **owned)
    before = made.last_message_at
    said = MessageFactory.create_batch(3, conversation=made)
    assert all(earlier.created_at < later.created_at for earlier, later in pairwise(said))
    assert before < said[0].created_at
    assert made.last_message_id == said[-1].id
    by_chat = MessageFactory.create(chat_id=made.chat_id, **owned)
    assert made.last_message_id == by_chat.id
    MessageFactory.create(conversation=made, created_at=MOMENT - timedelta(days=30))
    assert made.last_message_id == by_chat.id


def test_a_time_in_the_future_becomes_now(owned: dict[str, Any]) -> None:
    assert MessageFactory.create(created_at=FOREVER, **owned).created_at < FOREVER


def test_a_chat_that_is_there_gets_no_second_conversation(owned: dict[str, Any]) -> None:
    made = ConversationFactory.create(**owned)
    before = columns(made)
    with pytest.raises(ChatExists):
        ConversationFactory.create(chat_id=made.chat_id, **owned)
    assert columns(made) == before


def test_a_message_that_somebody_else_has_just_recorded_is_refused(
    db: Database, client_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    """Here it is hidden from whoever looks first."""
    db.ingest("token-a", chat_id="1", role="user", content="oi", provider_message_id="wamid.1")
    superuser.execute("CREATE POLICY h ON chat_messages AS RESTRICTIVE TO kestra_system USING (content <> 'oi')")
    with in_system(db), pytest.raises(InvalidValue, match="just recorded"):
        MessageFactory.create(provider_message_id="wamid.1", content="olá", client_id=client_id)


def test_a_message_that_the_client_has_already_is_refused(owned: dict[str, Any]) -> None:
    MessageFactory.create(provider_message_id="wamid.1", **owned)
    with pytest.raises(InvalidValue, match="provider_message_id"):
        MessageFactory.create(provider_message_id="wamid.1", **owned)
    assert MessageFactory.create(provider_message_id=None, **owned).provider_message_id is None


def test_what_recording_refuses_is_refused(owned: dict[str, Any]) -> None:
    refused: list[dict[str, Any]] = [
        {"role": "ai"},
        {"role": "ai", "content": "Oi"},
        {"content": "\0"},
        {"content": None},
        {"chat_id": ""},
        {"created_at": datetime(2025, 1, 1)},  # noqa: DTZ001  # naive on purpose
        {"id": 7},
    ]
    for wrong in refused:
        with pytest.raises(InvalidValue):
            MessageFactory.create(**wrong, **owned)
    made = ConversationFactory.create(**owned)
    with pytest.raises(InvalidValue, match="chat_id"):
        MessageFactory.create(conversation=made, chat_id="another")


WISHES: Final[list[dict[str, Any]]] = [
    {},
    {"messages": 0},
    {"messages": 40},
    {"unread": 2},
    {"read": True},
    {"finished": True},
    {"paused": True},
    {"awaiting_followup": True, "stage": 4},
    {"stage": 5},
    {"last_role": "system"},
]


def test_what_is_made_obeys_every_invariant_of_the_data_access_layer(db: Database) -> None:
    with in_system(db) as session:
        for traits in ({}, {"meta": True, "with_followup": True}, {"uazapi": True, "ai_off": True}):
            client = ClientFactory.create(**traits)
            for wishes in WISHES:
                ConversationFactory.create(client=client, **wishes)
                made = ConversationFactory.create(client=client, **wishes)
                MessageFactory.create(conversation=made, created_at=MOMENT - timedelta(days=9))
                MessageFactory.create(conversation=made, from_assistant=True, with_media=True)
            for wishes in ({}, {"with_google_uri": True}, {"expired_google_uri": True}):
                ClientFileFactory.create(client=client, **wishes)
        assert check(session) == []
        # It is live whatever the clock says, and so for longer than a worker may have it.
        ConversationFactory.create(claimed=True)
        assert [violation.invariant for violation in check(session)] == ["claim_lease"]


# --- traits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("channel", ["meta", "uazapi", None])
def test_a_conversation_that_awaits_a_follow_up_is_claimed(db: Database, stage: int, channel: str | None) -> None:
    for number in range(5):
        seed(number, now=NOW)
        with in_system(db):
            client = ClientFactory.create(with_followup=True, **({channel: True} if channel else {}))
            made = ConversationFactory.create(client=client, awaiting_followup=True, stage=stage)
            ConversationFactory.create(client=client, finished=True)
            ConversationFactory.create(client=client, paused=True)
            ConversationFactory.create(client=client, claimed=True, stage=stage)
            ConversationFactory.create(client=client, unread=1)
        with db.tenant_session(client.id) as session:
            claims = followups.claim(session, limit=10, lease=timedelta(minutes=5), now=NOW)
        assert [(claimed.chat_id, claimed.stage) for claimed in claims] == [(made.chat_id, stage)]


def test_a_follow_up_is_awaited_by_the_clock_too_where_no_window_closes(db: Database) -> None:
    with in_system(db) as session:
        client = ClientFactory.create(with_followup=True, uazapi=True)
        ConversationFactory.create(client=client, awaiting_followup=True)
        assert followups.clients_due(session) == [client.id]


def test_a_claim_can_be_completed(db: Database) -> None:
    with in_system(db):
        client = ClientFactory.create(with_followup=True)
        made = ConversationFactory.create(client=client, claimed=True, stage=1)
    assert made.claim_token is not None
    with db.tenant_session(client.id) as session:
        state = conversations.reopen(session, chat_id=made.chat_id)
        claim = followups.Claim(made.chat_id, made.claim_token, 1, FOREVER, FollowUpStage(), state, None)
        assert followups.complete(session, claim=claim, content="Oi?").conversation.followup_stage == 2


@pytest.mark.parametrize("stage", range(1, 6))
def test_a_stage_has_as_many_follow_ups_after_the_end_customer_s_last_message(
    owned: dict[str, Any], stage: int
) -> None:
    made = ConversationFactory.create(stage=stage, **owned)
    session = inspect(made).session
    assert session is not None
    said = session.scalars(select(ChatMessage).order_by(ChatMessage.id)).all()
    assert made.followup_stage == stage
    assert [message.role for message in said] == ["user", "assistant", *["assistant"] * stage]
    assert made.status == "active"


@pytest.mark.parametrize("messages_", [1, 2, 5, 6])
def test_there_are_as_many_messages_as_asked_for_whatever_else_is(owned: dict[str, Any], messages_: int) -> None:
    made = ConversationFactory.create(messages=messages_, stage=3, **owned)
    session = inspect(made).session
    assert session is not None
    roles = session.scalars(select(ChatMessage.role).order_by(ChatMessage.id)).all()
    assert len(roles) == messages_
    assert set(roles[-4:]) == {"assistant"}  # the answer that nobody reacted to, and three follow-ups
    assert (made.last_role, made.followup_stage) == ("assistant", 3)


@pytest.mark.parametrize(
    ("wishes", "roles"),
    [
        ({}, "ua"),
        ({"messages": 5}, "uauau"),
        ({"unread": 2}, "uauu"),
        ({"last_role": "user", "unread": 1}, "uau"),
        ({"awaiting_followup": True}, "ua"),
        ({"awaiting_followup": True, "stage": 2}, "uaaa"),
        ({"unread": 1, "stage": 1}, "uauaa"),
        ({"unread": 1, "last_role": "assistant", "messages": 1}, "a"),
        ({"stage": 1, "last_role": "system"}, "uaas"),
    ],
)
def test_who_speaks_is_what_the_wishes_ask_for_and_no_more(wishes: dict[str, Any], roles: str) -> None:
    made = ConversationFactory.build(**wishes)
    assert "".join(message.role[0] for message in made.messages) == roles


def test_finished_is_finished(owned: dict[str, Any]) -> None:
    assert ConversationFactory.create(finished=True, **owned).status == "finished"
    assert ConversationFactory.create(finished=False, **owned).status == "active"


def test_paused_is_paused_at_any_time(db: Database, client_id: UUID) -> None:
    with in_tenant(db, client_id) as session:
        made = ConversationFactory.create(paused=True)
        assert conversations.reopen(session, chat_id=made.chat_id).paused(datetime.now(UTC))


@pytest.mark.parametrize("unread", [1, 3, True])
def test_unread_is_how_many_messages_nobody_has_read(db: Database, client_id: UUID, unread: int) -> None:
    with in_tenant(db, client_id) as session:
        ConversationFactory.create(unread=unread)
        (entry,) = conversations.inbox(session).items
        assert (entry.unread, entry.state.last_role) == (int(unread), "user")
        ConversationFactory.create(unread=2, awaiting_followup=True)
        assert sorted(entry.unread for entry in conversations.inbox(session).items) == sorted([int(unread), 2])


def test_read_has_nothing_unread_and_without_either_nobody_has_read(db: Database, client_id: UUID) -> None:
    with in_tenant(db, client_id) as session:
        ConversationFactory.create(read=True, messages=5)
        (entry,) = conversations.inbox(session).items
        assert entry.unread == 0
        assert entry.state.last_read_message_id == entry.state.last_message_id
        assert ConversationFactory.create(messages=5).last_read_message_id is None
        assert conversations.inbox(session, unread_only=True).items[0].unread == 3


def test_every_message_of_the_end_customer_may_be_unread(owned: dict[str, Any]) -> None:
    assert ConversationFactory.create(messages=2, unread=2, **owned).last_read_message_id is None


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_the_newest_message_is_said_by_whom_and_when_it_is_asked_for(owned: dict[str, Any], role: str) -> None:
    for more in ({}, {"messages": 1}, {"messages": 4}, {"messages": 5}, {"messages": 0}):
        made = ConversationFactory.create(last_role=role, last_message_at=NOW, **more, **owned)
        assert (made.last_role, made.last_message_at) == (role, NOW)


def test_a_conversation_without_messages_has_none(owned: dict[str, Any]) -> None:
    made = ConversationFactory.create(messages=0, **owned)
    assert made.last_message_at == MOMENT
    assert (made.last_message_id, made.last_role, made.status, made.followup_stage) == (None, None, "active", 0)


def test_other_columns_are_set_as_they_are_given(owned: dict[str, Any]) -> None:
    made = ConversationFactory.create(
        last_context="Quer um bolo.", last_user_message_id=7, last_read_message_id=3, followup_stage=4, **owned
    )
    assert (made.last_context, made.last_user_message_id) == ("Quer um bolo.", 7)
    assert (made.last_read_message_id, made.followup_stage) == (3, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"awaiting_followup": True, "finished": True},
        {"awaiting_followup": True, "paused": True},
        {"awaiting_followup": True, "claimed": True},
        {"claimed": True, "finished": True},
        {"claimed": True, "paused": True},
        {"awaiting_followup": True, "stage": 5},
        {"claimed": True, "stage": 5},
        {"stage": 1, "last_role": "user"},
        {"stage": 6},
        {"stage": -1},
        {"messages": -1},
        {"messages": "12"},
        {"messages": [{}], "stage": 1},
        {"messages": [{}], "last_role": "user"},
        {"messages": [{"sent_at": MOMENT}]},
        {"messages": [{"id": 1}]},
        {"messages": [{"chat_id": "1"}]},
        {"messages": [{"role": "nobody"}]},
        {"messages": ["oi"]},
        {"messages": ({},)},
        {"messages": 0, "stage": 3},
        {"messages": 0, "unread": 1},
        {"messages": 0, "read": True},
        {"messages": 3, "unread": 4},
        {"messages": 0, "awaiting_followup": True},
        {"messages": 0, "claimed": True},
        {"claimed": True, "last_role": "user"},
        {"claimed": True, "status": "finished"},
        {"awaiting_followup": True, "last_role": "user"},
        {"last_role": "x"},
        {"last_message_at": "2025-01-01"},
        {"last_message_at": datetime(2025, 1, 1)},  # noqa: DTZ001  # the point
        {"client": "5511"},
        {"client": UUID(int=1)},
        {"unread": -1},
        {"unread": 1, "read": True},
    ],
)
def test_contradictory_wishes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        ConversationFactory.build(**wrong)


def test_a_message_of_what_is_no_conversation_is_refused() -> None:
    with pytest.raises(InvalidValue, match="ActiveConversation is wanted"):
        MessageFactory.build(conversation="5511")


def test_two_messages_of_one_provider_id_are_refused(owned: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="same provider_message_id"):
        ConversationFactory.create(**owned, messages=[{"provider_message_id": "1"}, {"provider_message_id": "1"}])


def test_a_conversation_that_was_built_with_messages_takes_no_other(db: Database) -> None:
    with in_system(db), pytest.raises(InvalidValue, match="only built"):
        MessageFactory.create(conversation=ConversationFactory.build())
    assert count(db, ChatMessage) == 0


def test_contradictory_traits_of_the_others_are_refused() -> None:
    for refused in (
        lambda: ClientFactory.build(meta=True, uazapi=True),
        lambda: MessageFactory.build(from_user=True, from_assistant=True),
        lambda: ClientFileFactory.build(with_google_uri=True, expired_google_uri=True),
    ):
        with pytest.raises(InvalidValue):
            refused()


def test_the_traits_of_clients_combine(db: Database) -> None:
    with in_system(db):
        client = ClientFactory.create(meta=True, with_followup=True, ai_off=True)
    config = client.tools_config
    assert config.whatsapp is not None
    assert config.whatsapp.provider == "meta"
    assert config.whatsapp.enforces_window
    assert isinstance(config.whatsapp.key, SecretStr)
    assert re.fullmatch(r"\d{15}", client.token)
    assert config.ai_active is False
    assert config.followup is not None
    assert config.followup.active
    assert len(config.followup.stages or []) == followups.STAGES
    uazapi = ClientFactory.build(uazapi=True).tools_config
    assert uazapi.whatsapp is not None
    assert (uazapi.whatsapp.provider, uazapi.whatsapp.enforces_window) == ("uazapi", False)
    plain = ClientFactory.build().tools_config
    assert (plain.ai_active, plain.whatsapp, plain.followup) == (True, None, None)


def test_sections_and_whole_documents_are_taken_as_they_are_given() -> None:
    client = ClientFactory.build(ai_active=False, followup={"active": False})
    assert client.tools_config.document() == {"ai_active": False, "followup": {"active": False}}
    assert ClientFactory.build(meta=True, tools_config=ToolsConfig()).tools_config.document() == {}
    with pytest.raises(InvalidToolsConfig):
        ClientFactory.build(followup={"stages": 7})


def test_messages_have_the_role_and_the_medium_of_their_traits(owned: dict[str, Any]) -> None:
    plain = MessageFactory.create(**owned)
    assert (plain.role, plain.media_url) == ("user", None)
    assert plain.content
    assert MessageFactory.create(from_assistant=True, **owned).content
    assert MessageFactory.create(from_assistant=True, **owned).role == "assistant"
    assert MessageFactory.create(from_user=True, **owned).role == "user"
    medium = MessageFactory.create(with_media=True, **owned)
    assert medium.media_url is not None
    assert medium.content is None
    assert MessageFactory.create(with_media=True, content="a foto", **owned).content == "a foto"


def test_google_s_uri_is_usable_or_expired_by_any_clock(db: Database, client_id: UUID) -> None:
    with in_tenant(db, client_id) as session:
        plain = ClientFileFactory.create()
        assert (plain.google_file_uri, plain.google_file_expires_at) == (None, None)
        good = ClientFileFactory.create(with_google_uri=True)
        expired = ClientFileFactory.create(expired_google_uri=True)
        assert expired.google_file_uri is not None
        for now in (None, MOMENT):
            assert [file.id for file in files.usable(session, now=now)] == [good.id]
            assert {file.id for file in files.needing_upload(session, now=now)} == {plain.id, expired.id}


def test_what_is_built_stands_where_its_messages_leave_it() -> None:
    made = ConversationFactory.build(messages=12)
    assert (made.status, made.followup_stage, made.last_role) == ("active", 0, "assistant")
    assert made.last_message_at == made.messages[-1].created_at == max(said.created_at for said in made.messages)
    assert made.last_user_message_at == made.messages[-2].created_at
    assert made.last_message_id is None
    assert len(made.messages) == 12
    assert ConversationFactory.build(stage=3, finished=True).followup_stage == 3
    assert ConversationFactory.build(finished=True).status == "finished"
    assert ConversationFactory.build(messages=1, last_role="assistant").last_user_message_at is None
    assert ConversationFactory.build(messages=0).last_message_at == MOMENT
    assert MessageFactory.build(conversation=made).created_at > made.last_message_at


# --- the seed ---------------------------------------------------------------------------------------------------------


def everything() -> list[dict[str, Any]]:
    client = ClientFactory.create(meta=True, with_followup=True)
    made = ConversationFactory.create(client=client, messages=30, unread=2)
    rows: list[Base] = [
        client,
        made,
        ConversationFactory.create(client=client, claimed=True, stage=2),
        MessageFactory.create(conversation=made, with_media=True),
        *MessageFactory.create_batch(3, client=client, from_assistant=True),
        ClientFileFactory.create(client=client, with_google_uri=True),
        ClientFileFactory.create(client=client, expired_google_uri=True),
        ConversationFactory.create(),
    ]
    return [values(row) for row in rows]


def everything_once(db: Database, number: int, disturb: Callable[[], object] = lambda: None) -> list[dict[str, Any]]:
    seed(number)
    disturb()
    with db.system_session(reason="test data") as session:
        with using(session):
            found = everything()
        session.rollback()
    return found


def test_the_same_seed_gives_the_same_values(db: Database) -> None:
    first = everything_once(db, 7)
    assert everything_once(db, 8) != first
    assert everything_once(db, 7) == first


def test_other_random_numbers_play_no_part(db: Database) -> None:
    def disturb() -> None:
        random.seed(3)
        factory.random.reseed_random(3)  # type: ignore[no-untyped-call]  # factory_boy has no types here
        ClientFactory.reset_sequence(5)  # type: ignore[no-untyped-call]  # as above

    first = everything_once(db, 7)
    before = random.getstate()
    assert everything_once(db, 7) == first
    assert random.getstate() == before
    assert everything_once(db, 7, disturb) == first


def test_building_is_the_same_for_the_same_seed() -> None:
    def built() -> list[dict[str, Any]]:
        seed(7)
        made = ConversationFactory.build(messages=20)
        return [values(row) for row in (made, made.client, *made.messages, ClientFileFactory.build())]

    assert built() == built()


def test_the_values_of_a_seed_are_the_same_on_every_machine() -> None:
    seed(7)
    client = ClientFactory.build()
    said = ConversationFactory.build(client=client, messages=2).messages
    found = [client.name, str(client.id), said[0].chat_id, said[0].content, said[1].created_at.isoformat()]
    assert found == [
        "Floricultura Boa Vista",
        "269e0d2c-a6a3-4441-928b-2f3a892f9023",
        "5565909418666",
        "oii",
        "2025-03-10T09:18:47+00:00",
    ]


def test_what_is_made_of_one_seed_does_not_collide() -> None:
    owner = uuid4()
    numbers = {ConversationFactory.build(client_id=owner, messages=0).chat_id for _ in range(8_000)}
    assert len({number[4:] for number in numbers}) == 8_000
    assert all(re.fullmatch(r"55\d{2}90\d{7}", number) for number in numbers)
    clients = ClientFactory.build_batch(2_000)
    assert len({client.token for client in clients}) == len({client.id for client in clients}) == 2_000


def test_a_seed_in_a_database_that_has_its_clients_says_so(db: Database) -> None:
    with in_system(db):
        seed(7)
        ClientFactory.create(id=uuid4())
    with in_system(db) as session:
        seed(7)
        with pytest.raises(DuplicateToken):
            ClientFactory.create(id=uuid4())
        session.rollback()


def test_everything_has_happened_before_the_moment(db: Database) -> None:
    for now in (MOMENT, NOW, NOW.astimezone()):
        seed(7, now=now)
        with in_system(db) as session:
            client = ClientFactory.create(id=uuid4(), token=str(uuid4()))
            for wishes in ({}, {"messages": 40}, {"awaiting_followup": True, "stage": 4}, {"unread": 3}):
                made = ConversationFactory.create(client=client, **wishes)
                its_own = (ChatMessage.client_id == client.id, ChatMessage.chat_id == made.chat_id)
                times = session.scalars(select(ChatMessage.created_at).where(*its_own)).all()
                assert client.created_at < min(times) <= max(times) == made.last_message_at < now


def test_a_client_is_older_than_what_its_conversations_take() -> None:
    for client in ClientFactory.build_batch(50):
        assert client.created_at <= MOMENT - timedelta(days=90)


def test_the_moment_is_the_one_that_was_given() -> None:
    for now in (NOW, NOW.replace(second=7, microsecond=5)):
        seed(7, now=now)
        assert ConversationFactory.build(messages=0).last_message_at == now


@pytest.mark.parametrize("wrong", [{"number": -1}, {"number": "7"}, {"number": 7, "now": datetime(2025, 1, 1)}])  # noqa: DTZ001  # naive
def test_a_seed_is_an_integer_and_its_moment_aware(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        seed(**wrong)


# --- the texts --------------------------------------------------------------------------------------------------------


def test_every_text_is_filled_and_can_be_stored() -> None:
    source = Random(1)  # noqa: S311  # test data
    templates = (
        *content.USER_TEXTS,
        *content.ASSISTANT_TEXTS,
        *content.FOLLOWUP_TEXTS,
        *content.SYSTEM_TEXTS,
        *content.SUMMARIES,
    )
    for template in templates:
        text = content.filled(source, template)
        assert text.strip() == text
        assert "{" not in text
        assert 0 < len(text) <= conversations.MAX_CONTEXT


def test_texts_are_portuguese_and_varied() -> None:
    source = Random(1)  # noqa: S311  # test data
    said = [content.text(source, role) for role in ("user", "assistant", "system") for _ in range(200)]
    assert len(set(said)) > 150
    assert any("ç" in text or "ã" in text for text in said)
    assert any("\n" in text for text in said)
    names = {content.company(source) for _ in range(200)} | {content.person(source) for _ in range(200)}
    assert len(names) > 200
    assert all(len(name) < 100 for name in names)


def test_ids_have_the_forms_of_their_providers() -> None:
    source = Random(1)  # noqa: S311  # test data
    forms: list[tuple[Callable[[Random], str], str]] = [
        (content.phone_number, r"55[1-9][1-9]90\d{7}"),
        (content.linked_id, r"[1-9]\d{14}@lid"),
        (content.group_id, r"120363\d{12}@g\.us"),
        (content.provider_message_id, r"wamid\.[0-9A-F]{32}"),
        (content.instance_token, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        (content.phone_number_id, r"[1-9]\d{14}"),
        (content.media_url, r"https://midia\.example/[0-9a-f]{32}\.\w+"),
        (content.google_file_uri, r"https://\w+\.example/v1beta/files/[0-9a-f]{16}"),
    ]
    for draw, form in forms:
        for _ in range(100):
            assert re.fullmatch(form, draw(source))


# --- types ------------------------------------------------------------------------------------------------------------


def test_factories_are_typed(db: Database) -> None:
    assert_type(ClientFactory.build(), Client)
    assert_type(ConversationFactory.build(messages=2), ActiveConversation)
    assert_type(MessageFactory.build(), ChatMessage)
    assert_type(ClientFileFactory.build(), ClientFile)
    assert_type(ConversationFactory.build_batch(1), list[ActiveConversation])
    with db.system_session(reason="types") as session, using(session):
        assert_type(ClientFactory.create(), Client)
        assert_type(ConversationFactory.create(), ActiveConversation)
        assert_type(ConversationFactory(messages=12), ActiveConversation)
        assert_type(MessageFactory.create_batch(1), list[ChatMessage])
        assert_type(create(session, ConversationFactory, messages=12), ActiveConversation)
        assert_type(create_batch(session, ClientFileFactory, 1), list[ClientFile])


def test_what_was_not_loaded_is_not_loaded_by_accident(db: Database) -> None:
    with in_system(db):
        made = ConversationFactory.create()
        with pytest.raises(InvalidRequestError):
            _ = made.messages
