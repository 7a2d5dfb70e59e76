"""Factories: rows of the four models for tests, each valid without an argument, and what hangs together of one client.

    with db.system_session(reason="test data") as session, using(session):
        client = ClientFactory(meta=True, with_followup=True)
        waiting = ConversationFactory(client=client, awaiting_followup=True)
        MessageFactory(conversation=waiting, content="Ainda tem vaga?")

`build` needs no session and no database. `create` writes in the session of `using`, flushes and never commits. In
asyncio: `await session.run_sync(create, ConversationFactory, messages=12)`. In a session of one client everything is of
that client; in a system session a row gets a client of its own, unless it is told whose it is.

Messages are recorded as `kestra.dao.messages.record` records them, so conversations stand where they would stand.

Values come from one stream, which `seed` starts again: the same seed and the same calls give the same values, but for
the ids of messages, which the database draws. Random numbers of other libraries, of `random` itself and of factory_boy
play no part. What happened, happened before `MOMENT`; what is to last (a pause, a claim, a URI) lasts until `FOREVER`:
both hold whatever the clock says.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Self, TypeVar, cast, get_args
from uuid import UUID

from factory.alchemy import SQLAlchemyModelFactory
from factory.declarations import LazyAttribute, LazyFunction, SubFactory, Trait
from factory.enums import CREATE_STRATEGY
from sqlalchemy import inspect, select
from sqlalchemy.orm import InstanceState
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.util import identity_key

import kestra.testing
from kestra.base import BOUND_CLIENT_ID, Base, parse_client_id
from kestra.columns import check_instant
from kestra.dao import messages as dao
from kestra.dao.followups import STAGES
from kestra.dao.messages import MAX_BATCH, IncomingMessage
from kestra.dao.recording import RECORD_MANY
from kestra.errors import (
    ChatExists,
    ClientNotFound,
    CrossTenantWrite,
    InvalidClientId,
    InvalidValue,
    TenancyError,
)
from kestra.models import ActiveConversation, ChatMessage, Client, ClientFile, Role
from kestra.session import SystemSession, TenantSession
from kestra.testing import content as texts
from kestra.tools_config import ToolsConfig

_ModelT = TypeVar("_ModelT", bound=Base)

MOMENT: Final = datetime(2025, 3, 10, 15, tzinfo=UTC)
"""Before when everything has happened, unless `seed` says otherwise: a Monday at noon in São Paulo."""

FOREVER: Final = datetime(2100, 1, 1, tzinfo=UTC)
"""Until when what is to last does."""

FOLLOWUP_DELAYS: Final = (30, 60, 120, 240, 480)
"""The minutes of silence before each of the follow-ups of a client `with_followup`."""

_MEDIA_SHARE: Final = 0.1
"""How many of an end customer's messages are a medium."""

_SILENCE: Final = timedelta(hours=12)
"""How long nobody has said anything where a follow-up is awaited: longer than every delay, shorter than the window."""


# --- where the values come from ---------------------------------------------------------------------------------------


class _Stream:
    """What every value is drawn from."""

    def __init__(self) -> None:
        self.start(kestra.testing.seed_of_the_test, MOMENT)

    def start(self, number: int, now: datetime) -> None:
        self.random = Random(number)  # noqa: S311  # test data
        self.now = now
        self._line = texts.below(self.random, texts.LINES)

    def seconds(self, least: int, most: int) -> timedelta:
        return timedelta(seconds=least + texts.below(self.random, most - least))

    def uuid(self) -> UUID:
        return UUID(texts.hexadecimal(self.random, 32), version=4)

    def phone_number(self) -> str:
        """One that was not drawn before: the step and the number of lines have no divisor in common."""
        self._line = (self._line + 6_180_339) % texts.LINES
        return texts.mobile(texts.pick(self.random, texts.AREA_CODES), self._line)


_STREAM: Final = _Stream()


def seed(number: int, *, now: datetime = MOMENT) -> None:
    """Start the values again: from here on, the same calls give the same values.

    A database that has the clients of a seed takes them once: their ids and tokens are the same again.

    Args:
        number: The seed, at least 0. Until this is called it is 0; in pytest, one of the test's own.
        now: Before when everything has happened, aware. Give the time of day to tests of what lasts for hours, such as
            the window in which Meta lets a business write.

    Raises:
        InvalidValue: The number is none, or `now` has no time zone.
    """
    given: tuple[object, object] = number, now  # annotations bind nobody
    if not isinstance(given[0], int) or number < 0:
        raise InvalidValue("A seed is an integer from 0.")
    if not isinstance(given[1], datetime) or now.utcoffset() is None:
        raise InvalidValue("now is a datetime with a time zone.")
    _STREAM.start(number, now.astimezone(UTC))


# --- where the rows go ------------------------------------------------------------------------------------------------

_SESSION: Final[ContextVar[TenantSession | SystemSession | None]] = ContextVar("kestra_factories", default=None)


@contextmanager
def using(session: TenantSession | SystemSession) -> Iterator[None]:
    """What is created inside of the block is created in this session; of two blocks the inner one counts.

    It counts for the thread or task that it is in.

    Raises:
        TenancyError: It is another kind of session.
    """
    given: object = session  # annotations bind nobody
    if not isinstance(given, TenantSession | SystemSession):
        raise TenancyError(
            f"Factories write in a session of a Database, not in a {type(given).__name__}. In asyncio: "
            "`await session.run_sync(create, ConversationFactory)`."
        )
    before = _SESSION.set(session)
    try:
        yield
    finally:
        _SESSION.reset(before)


def create(session: TenantSession | SystemSession, factory: "type[KestraFactory[_ModelT]]", **values: Any) -> _ModelT:
    """A row of the factory, created in this session: `await session.run_sync(create, ClientFileFactory)`.

    Args:
        session: A session of a client, or a system session.
        factory: What makes it.
        values: As in `factory.create`.
    """
    with using(session):
        return factory.create(**values)


def create_batch(
    session: TenantSession | SystemSession, factory: "type[KestraFactory[_ModelT]]", size: int, **values: Any
) -> list[_ModelT]:
    """Rows of the factory, as `create`."""
    with using(session):
        return factory.create_batch(size, **values)


def _session() -> TenantSession | SystemSession:
    session = _SESSION.get()
    if session is None:
        raise TenancyError(
            "There is no session to create rows in. Write `with using(session): …` around it, or "
            "`create(session, ConversationFactory)`; in asyncio `await session.run_sync(create, ConversationFactory)`. "
            "Without a database use `build`."
        )
    return session


# --- declarations, with types: factory_boy's have none ----------------------------------------------------------------


def _drawn(draw: Callable[[], object]) -> Any:
    """A value that is drawn when none is given."""
    return LazyFunction(draw)  # type: ignore[no-untyped-call]  # factory_boy has no types here


def _derived(derive: Callable[[Any], object]) -> Any:
    """A value that follows from the others when none is given."""
    return LazyAttribute(derive)  # type: ignore[no-untyped-call]  # as above


def _trait(**values: object) -> Any:
    """Values that are meant together, by one name."""
    return Trait(**values)  # type: ignore[no-untyped-call]  # as above


class KestraFactory(SQLAlchemyModelFactory, Generic[_ModelT]):
    """The base of the factories: creates in the session of `using`, and flushes."""

    class Meta:
        """For factory_boy."""

        abstract = True
        sqlalchemy_session_persistence = "flush"

    if TYPE_CHECKING:

        def __new__(cls, **values: Any) -> _ModelT:  # type: ignore[misc]  # factory_boy's metaclass calls `create`
            """As `create`."""

    @classmethod
    def build(cls, **values: Any) -> _ModelT:
        """A new object that no session knows of."""
        row: _ModelT = super().build(**values)
        return row

    @classmethod
    def create(cls, **values: Any) -> _ModelT:
        """A row in the session of `using`, flushed and not committed."""
        row: _ModelT = super().create(**values)
        return row

    @classmethod
    def build_batch(cls, size: int, **values: Any) -> list[_ModelT]:
        """So many objects, as `build`."""
        return [cls.build(**values) for _ in range(size)]

    @classmethod
    def create_batch(cls, size: int, **values: Any) -> list[_ModelT]:
        """So many rows, as `create`."""
        return [cls.create(**values) for _ in range(size)]

    @classmethod
    def _create(cls, model_class: type[_ModelT], *_args: Any, **values: Any) -> _ModelT:
        # factory_boy's own keeps the session of one call in the class, where another thread finds it.
        row: _ModelT = cls._save(model_class, _session(), (), values)  # type: ignore[no-untyped-call]  # as above
        return row


def _refuse_together(values: Mapping[str, object], *names: str) -> None:
    given = [name for name in names if values.get(name)]
    if len(given) > 1:
        raise InvalidValue(f"{' and '.join(given)} contradict each other: give one of them.")


def _new_client(session: TenantSession) -> CrossTenantWrite:
    return CrossTenantWrite(
        f"A client cannot be created in a session of the client {session.client_id}. Create it in a system session: "
        '`db.system_session(reason="test data")`. What is created here is of the session\'s client.'
    )


# --- clients ----------------------------------------------------------------------------------------------------------


def _meta(token: str) -> dict[str, object]:
    url = f"https://graph.facebook.com/v23.0/{token}"
    return {"provider": "meta", "url": url, "key": f"chave-{texts.hexadecimal(_STREAM.random, 32)}"}


def _uazapi() -> dict[str, object]:
    key = f"chave-{texts.hexadecimal(_STREAM.random, 32)}"
    return {"provider": "uazapi", "url": "https://atendimento.uazapi.example", "key": key}


def _followup() -> dict[str, object]:
    stages = [
        {"delay_minutes": delay, "prompt": "Retome a conversa com gentileza e uma pergunta.", "type": "text"}
        for delay in FOLLOWUP_DELAYS
    ]
    return {"active": True, "stages": stages}


def _document(**sections: object) -> ToolsConfig:
    return ToolsConfig.model_validate({name: given for name, given in sections.items() if given is not None})


class ClientFactory(KestraFactory[Client]):
    """Clients. They are created in a system session.

    `ai_active`, `whatsapp` and `followup` are sections of `tools_config`; without a document of your own it is made of
    them. Traits, in any combination: `meta` or `uazapi` is how messages are sent, `with_followup` has five stages at
    any time of day, `ai_off` has the assistant switched off.
    """

    class Meta:
        """For factory_boy."""

        model = Client

    class Params:
        """What a document is made of, and the traits."""

        ai_active = True
        whatsapp = None
        followup = None
        meta = _trait(
            token=_drawn(lambda: texts.phone_number_id(_STREAM.random)),
            whatsapp=_derived(lambda client: _meta(client.token)),
        )
        uazapi = _trait(whatsapp=_drawn(_uazapi))
        with_followup = _trait(followup=_drawn(_followup))
        ai_off = _trait(ai_active=False)

    id = _drawn(_STREAM.uuid)
    name = _drawn(lambda: texts.company(_STREAM.random))
    token = _drawn(lambda: texts.instance_token(_STREAM.random))
    system_prompt = _derived(lambda client: texts.system_prompt(_STREAM.random, client.name))
    tools_config = _derived(
        lambda client: _document(ai_active=client.ai_active, whatsapp=client.whatsapp, followup=client.followup)
    )
    created_at = _drawn(lambda: _STREAM.now - timedelta(days=90) - _STREAM.seconds(0, 300 * 86_400))

    @classmethod
    def _adjust_kwargs(cls, **values: Any) -> dict[str, Any]:
        _refuse_together(values, "meta", "uazapi")
        return values

    @classmethod
    def _create(cls, model_class: type[Client], *args: Any, **values: Any) -> Client:
        session = _session()
        if isinstance(session, TenantSession):
            raise _new_client(session)
        return super()._create(model_class, *args, **values)


# --- whose a row is ---------------------------------------------------------------------------------------------------


def _named(client: Client | None, client_id: object, conversation: ActiveConversation | None) -> set[UUID]:
    """The clients that a row is said to belong to."""
    given: tuple[tuple[object, type], ...] = (client, Client), (conversation, ActiveConversation)
    for value, kind in given:  # annotations bind nobody
        if value is not None and not isinstance(value, kind):
            raise InvalidValue(
                f"A {kind.__name__} is wanted, not a {type(value).__name__}: give ids as client_id and chat_id."
            )
    owners = (client and client.id, client_id, conversation and conversation.client_id)
    return {parse_client_id(owner) for owner in owners if owner is not None}


def _one(owners: set[UUID]) -> UUID | None:
    if len(owners) > 1:
        listed = ", ".join(sorted(map(str, owners)))
        raise CrossTenantWrite(
            f"A row belongs to one client, and this one was given to {listed}: by client, client_id, conversation or "
            "the session. Nothing was written."
        )
    return next(iter(owners), None)


class _Owner(SubFactory):
    """The client of a row: made for it where nothing says whose the row is."""

    def evaluate(self, instance: Any, step: Any, extra: Mapping[str, object]) -> Client | None:
        known = _named(None, instance.client_id, getattr(instance, "conversation", None))
        of_session = step.builder.strategy == CREATE_STRATEGY and isinstance(_session(), TenantSession)
        if not extra and (known or of_session):
            return None
        made: Client = super().evaluate(instance, step, extra)  # type: ignore[no-untyped-call]  # as above
        return made


def _owner(
    session: TenantSession | SystemSession,
    client: Client | None,
    client_id: object,
    conversation: ActiveConversation | None = None,
) -> Client:
    """The client that a row is created for, as an object of the session; everything that waited is flushed."""
    owners = _named(client, client_id, conversation)
    new: list[Base | None] = [conversation]
    if isinstance(session, TenantSession):
        if client is not None and client.id is None:
            raise _new_client(session)
        owners.add(session.client_id)
    else:
        new.append(client)
    owner_id = _one(owners)
    if conversation is not None and _state(conversation).transient and conversation.messages:
        raise InvalidValue("The conversation was only built: its messages would be lost. Create it first.")
    session.add_all(row for row in new if row is not None and _state(row).transient)
    session.flush()
    if client is not None and _state(client).session is session:
        return client
    if owner_id is None:
        raise InvalidClientId("This row is nobody's. Leave client out, or give it a client or a client_id.")
    stored = session.get(Client, owner_id)
    if stored is None:
        raise ClientNotFound(owner_id)
    return stored


def _state(row: object) -> InstanceState[Any]:
    state: InstanceState[Any] = inspect(row)
    return state


def _shown_client(conversation: ActiveConversation | None) -> Client | None:
    """The client that a conversation shows without asking the database."""
    return None if conversation is None else _state(conversation).dict.get("client")


def _relate(row: object, client: Client) -> None:
    """Let the row show its client. As if loaded: the client's own collections are not touched."""
    set_committed_value(row, "client", client)


class _OwnedFactory(KestraFactory[_ModelT]):
    """Rows of a client: the session, `client`, `client_id` or `conversation` says whose; they have to agree."""

    class Meta:
        """For factory_boy."""

        abstract = True

    client: Any = _Owner(ClientFactory)  # type: ignore[no-untyped-call]  # as above
    client_id: Any = None

    @classmethod
    def _build(
        cls,
        model_class: type[_ModelT],
        *_args: Any,
        client: Client | None,
        client_id: object,
        conversation: ActiveConversation | None = None,
        **values: Any,
    ) -> _ModelT:
        owner_id = _one(_named(client, client_id, conversation))
        row = model_class(client_id=owner_id, **values)
        if client is None:
            client = _shown_client(conversation)
        if client is not None:
            _relate(row, client)
        return row

    @classmethod
    def _create(
        cls, model_class: type[_ModelT], *_args: Any, client: Client | None, client_id: object, **values: Any
    ) -> _ModelT:
        owner = _owner(_session(), client, client_id)
        row = super()._create(model_class, client_id=owner.id, **values)
        _relate(row, owner)
        return row


# --- conversations ----------------------------------------------------------------------------------------------------

_Turn = Literal["user", "assistant", "system", "followup"]


@dataclass(frozen=True, slots=True)
class _Script:
    """How a conversation is to have gone.

    Attributes:
        chat_id: The chat.
        messages: How many messages, or what they are; None is as many as it takes.
        stage: How many follow-ups come last.
        unread: How many of the end customer's messages nobody has read.
        read: Whether a person has read everything.
        last_role: Who says the newest message; None is whoever's turn it is.
        last_message_at: When; None is some hours before now.
    """

    chat_id: str
    messages: int | list[Mapping[str, Any]] | None
    stage: int
    unread: int
    read: bool
    last_role: Role | None
    last_message_at: datetime | None

    @classmethod
    def taken_from(cls, values: dict[str, Any]) -> Self:
        """The script, whose parts are no longer among the values; the chat stays there."""
        parts = {name: values.pop(name) for name in cls.__slots__ if name != "chat_id"}
        return cls(values["chat_id"], **parts)

    def __post_init__(self) -> None:
        self._refuse_wrong_values()
        if self.stage and self.last_role == "user":
            raise InvalidValue("After a message of the end customer the stage is 0.")
        if (self.stage or self.unread or self.read) and not self.turns():
            raise InvalidValue("A conversation without messages has no follow-ups, and nothing to be read.")
        if self.messages is not None and self.unread > len(self.turns()):
            raise InvalidValue("There are fewer messages than those that nobody has read.")

    def _refuse_wrong_values(self) -> None:
        if not isinstance(self.messages, list):
            _refuse_number("messages", 0 if self.messages is None else self.messages, also=", or a list of mappings")
        elif not all(isinstance(parts, Mapping) for parts in self.messages):
            raise InvalidValue("Each of the messages is a mapping of its parts, such as {'content': 'oi'}.")
        elif self.messages and (self.stage or self.last_role is not None):
            raise InvalidValue(
                "The messages are given: they say who speaks last. The column of a stage is followup_stage."
            )
        _refuse_number("stage", self.stage, most=STAGES)
        _refuse_number("unread", self.unread)
        if self.last_role not in {None, *get_args(Role)}:
            raise InvalidValue(f"last_role is one of {', '.join(get_args(Role))}.")
        if self.last_message_at is not None:
            check_instant(self.last_message_at)

    def turns(self) -> list[_Turn]:
        """Who speaks, in order: what has to come last, and question and answer before that."""
        if isinstance(self.messages, list):
            return [message.get("role", "user") for message in self.messages]
        last: list[_Turn] = ["user"] * self.unread
        if self.stage:
            last += ["assistant", *["followup"] * self.stage]  # type: ignore[list-item]  # a list of literals is one of str
        if self.last_role is not None and (not last or _role(last[-1]) != self.last_role):
            last.append(self.last_role)
        wanted = self.messages
        if wanted is None:
            wanted = len(last) + (1 if last and last[0] == "assistant" else 2)
        before: list[_Turn] = ["user" if turn % 2 == 0 else "assistant" for turn in range(wanted - len(last))]
        return before + last[max(0, len(last) - wanted) :]

    def incoming(self) -> list[IncomingMessage]:
        """The messages, oldest first."""
        at = self.last_message_at or _STREAM.now - _STREAM.seconds(60, 6 * 3600)
        followups = self.stage
        told: list[IncomingMessage] = []
        if isinstance(self.messages, list):
            for parts in reversed(self.messages):
                told.append(_as_given(self.chat_id, {"created_at": at, **parts}))
                at = _sent_at(told[-1]) - _STREAM.seconds(20, 600)
            return told[::-1]
        for turn in reversed(self.turns()):
            told.append(_said(self.chat_id, turn, at))
            if turn == "followup":
                followups -= 1
                at -= timedelta(minutes=FOLLOWUP_DELAYS[followups]) + _STREAM.seconds(0, 300)
            else:
                at -= _STREAM.seconds(20, 600)
        return told[::-1]

    def columns(self) -> dict[str, Any]:
        """What no message says."""
        columns: dict[str, Any] = {"followup_stage": self.stage} if self.stage else {}
        if self.messages is not None and not self.turns():
            columns |= {"last_role": self.last_role, "last_message_at": self.last_message_at or _STREAM.now}
        return columns

    def read_up_to(self, ids: Sequence[int]) -> int | None:
        """The id of the last message that a person has read; None for nobody has read any."""
        if self.read:
            return ids[-1]
        users = [index for index, turn in enumerate(self.turns()) if turn == "user"]
        if not self.unread or not users:
            return None
        first = users[-min(self.unread, len(users))]
        return ids[first - 1] if first else None


def _refuse_number(name: str, number: object, *, most: int | None = None, also: str = "") -> None:
    if not isinstance(number, int) or number < 0 or (most is not None and number > most):
        raise InvalidValue(f"{name} is an integer from 0{'' if most is None else f' to {most}'}{also}.")


def _role(turn: _Turn) -> Role:
    return "assistant" if turn == "followup" else turn


def _said(chat_id: str, turn: _Turn, at: datetime) -> IncomingMessage:
    text, medium = None, None
    if turn == "followup":
        text = texts.followup_text(_STREAM.random)
    elif turn == "user" and _STREAM.random.random() < _MEDIA_SHARE:
        medium = texts.media_url(_STREAM.random)
    else:
        text = texts.text(_STREAM.random, turn)
    return IncomingMessage(chat_id, _role(turn), text, medium, texts.provider_message_id(_STREAM.random), at)


_PARTS: Final = {*dao.PARTS} - {"chat_id", "sent_at"} | {"created_at"}
"""What may be given of a message of a conversation."""


def _as_given(chat_id: str, parts: Mapping[str, Any]) -> IncomingMessage:
    """A message of which some parts are given, and the others drawn."""
    if unknown := ", ".join(sorted(parts.keys() - _PARTS)):
        raise InvalidValue(
            f"A message of a conversation is given without {unknown}. Its parts are {', '.join(sorted(_PARTS))}."
        )
    said = MessageFactory.build(client=None, chat_id=chat_id, **parts)
    return IncomingMessage(chat_id, said.role, said.content, said.media_url, said.provider_message_id, said.created_at)


def _silent_since() -> datetime:
    return _STREAM.now - _SILENCE - _STREAM.seconds(0, 3600)


class ConversationFactory(_OwnedFactory[ActiveConversation]):
    """Conversations with their messages, which are recorded: everything stands where recording them leaves it.

    `messages` is how many; without it a question and its answer, or as many as the rest needs. With 0 there is only the
    conversation. Or it is a list of what `MessageFactory` is given for each, in the order in which they arrived:
    `messages=[{"content": "Ainda tem vaga?"}, {"role": "assistant"}]`. It takes columns and no traits.

    `last_role` and `last_message_at` are about the newest one. `stage` is how many follow-ups were sent since the end
    customer spoke, 0 to 5. `unread` is how many of the end customer's messages nobody has read, and `read=True` is
    none; without either, nobody has read anything. Any other column is set as it is given.

    Traits: `finished`; `paused`; `awaiting_followup`, whose next follow-up is due where the client sends any;
    `claimed`, by a worker that is about to send it.

    What is built has its messages in `messages`, and no ids of messages: the database draws them.
    """

    class Meta:
        """For factory_boy."""

        model = ActiveConversation

    class Params:
        """The traits."""

        finished = _trait(status="finished")
        paused = _trait(paused_until=FOREVER)
        awaiting_followup = _trait(last_role="assistant", last_message_at=_drawn(_silent_since))
        claimed = _trait(
            last_role="assistant",
            last_message_at=_drawn(_silent_since),
            claim_token=_drawn(_STREAM.uuid),
            claimed_until=FOREVER,
        )

    chat_id: Any = _drawn(_STREAM.phone_number)
    messages: Any = None
    stage: Any = 0
    unread: Any = 0
    read: Any = False
    last_role: Any = None
    last_message_at: Any = None

    @classmethod
    def _adjust_kwargs(cls, **values: Any) -> dict[str, Any]:
        for due in ("awaiting_followup", "claimed"):
            for other in ("finished", "paused"):
                _refuse_together(values, due, other)
            if values.get(due) and values["stage"] == STAGES:
                raise InvalidValue(f"At stage {STAGES} every follow-up was sent: none is awaited.")
            if values.get(due) and (
                values["last_role"] != "assistant" or values["messages"] == 0 or values.get("status") == "finished"
            ):
                raise InvalidValue(f"{due} is an active conversation whose last message is the assistant's.")
        _refuse_together(values, "awaiting_followup", "claimed")
        _refuse_together(values, "read", "unread")
        return values

    @classmethod
    def _build(cls, model_class: type[ActiveConversation], *args: Any, **values: Any) -> ActiveConversation:
        script = _Script.taken_from(values)
        incoming = script.incoming()
        columns: dict[str, Any] = {"status": "active", "followup_stage": 0}
        columns |= _state_after(incoming) | script.columns() | values
        row = super()._build(model_class, *args, **columns)
        owner: dict[str, Any] = {"client": _shown_client(row), "client_id": row.client_id}
        said = [MessageFactory.build(**owner, **_columns(message)) for message in incoming]
        set_committed_value(row, "messages", said)
        return row

    @classmethod
    def _create(
        cls,
        model_class: type[ActiveConversation],
        *args: Any,
        client: Client | None,
        client_id: object,
        **values: Any,
    ) -> ActiveConversation:
        session = _session()
        script = _Script.taken_from(values)
        columns = script.columns() | values
        incoming = script.incoming()
        if not incoming:
            return super()._create(model_class, *args, client=client, client_id=client_id, **columns)
        model_class(**columns)  # refuses what is no column, before anything is written
        owner = _owner(session, client, client_id)
        key = (script.chat_id, owner.id)
        if session.get(ActiveConversation, key) is not None:
            raise ChatExists(script.chat_id)
        ids = _record(session, owner.id, incoming)
        row = session.get_one(ActiveConversation, key)
        for name, value in ({"last_read_message_id": script.read_up_to(ids)} | columns).items():
            setattr(row, name, value)
        session.flush()
        _relate(row, owner)
        return row


# --- messages ---------------------------------------------------------------------------------------------------------


class MessageFactory(_OwnedFactory[ChatMessage]):
    """Messages, which are recorded: their conversation is made or brought up to date, as recording them does.

    A message is one of `conversation`, or of the chat `chat_id`, or of a new one, and the newest there unless
    `created_at` says otherwise; a time in the future becomes now. Its `id` is drawn by the database.

    Traits: `from_user`, which is the default, or `from_assistant`; `with_media`, without a text unless it is given.
    """

    class Meta:
        """For factory_boy."""

        model = ChatMessage

    class Params:
        """The traits."""

        from_user = _trait(role="user")
        from_assistant = _trait(role="assistant")
        with_media = _trait(media_url=_drawn(lambda: texts.media_url(_STREAM.random)), content=None)

    conversation: Any = None
    chat_id: Any = _derived(lambda message: getattr(message.conversation, "chat_id", None) or _STREAM.phone_number())
    role: Any = "user"
    content: Any = _derived(lambda message: _text(message.role))
    media_url: Any = None
    provider_message_id: Any = _drawn(lambda: texts.provider_message_id(_STREAM.random))
    created_at: Any = None

    @classmethod
    def _adjust_kwargs(cls, **values: Any) -> dict[str, Any]:
        _refuse_together(values, "from_user", "from_assistant")
        conversation = values["conversation"]
        if isinstance(conversation, ActiveConversation) and conversation.chat_id != values["chat_id"]:
            raise InvalidValue("The message is given a conversation, and another chat_id. Leave one of them out.")
        return values

    @classmethod
    def _build(
        cls,
        model_class: type[ChatMessage],
        *args: Any,
        conversation: ActiveConversation | None = None,
        created_at: datetime | None = None,
        **values: Any,
    ) -> ChatMessage:
        created_at = created_at or _moment_after(None if conversation is None else conversation.last_message_at)
        return super()._build(model_class, *args, conversation=conversation, created_at=created_at, **values)

    @classmethod
    def _create(
        cls,
        model_class: type[ChatMessage],
        *_args: Any,
        client: Client | None,
        client_id: object,
        conversation: ActiveConversation | None = None,
        created_at: datetime | None = None,
        **values: Any,
    ) -> ChatMessage:
        if unknown := ", ".join(sorted(values.keys() - {*dao.PARTS})):
            raise InvalidValue(f"A message is recorded without {unknown}: build it, and add it to the session.")
        session = _session()
        owner = _owner(session, client, client_id, conversation)
        if created_at is None:
            its_conversation = (
                ActiveConversation.client_id == owner.id,
                ActiveConversation.chat_id == values["chat_id"],
            )
            created_at = _moment_after(
                session.scalar(select(ActiveConversation.last_message_at).where(*its_conversation))
            )
        (message_id,) = _record(session, owner.id, [IncomingMessage(sent_at=created_at, **values)])
        row = session.get_one(model_class, (owner.id, message_id))
        _relate(row, owner)
        return row


def _text(role: Role) -> str:
    if role not in get_args(Role):
        raise InvalidValue(f"The role of a message is one of {', '.join(get_args(Role))}.")
    return texts.text(_STREAM.random, role)


def _moment_after(last_message_at: datetime | None) -> datetime:
    """When somebody says something next."""
    if last_message_at is None:
        return _STREAM.now - _STREAM.seconds(60, 6 * 3600)
    return last_message_at + _STREAM.seconds(20, 600)


def _columns(message: IncomingMessage) -> dict[str, Any]:
    columns = asdict(message)
    return columns | {"created_at": columns.pop("sent_at")}


def _sent_at(message: IncomingMessage) -> datetime:
    return cast("datetime", message.sent_at)  # every message that is made here has one


def _state_after(incoming: Sequence[IncomingMessage]) -> dict[str, Any]:
    """Where a conversation stands after these messages, as they arrived; without ids, which nobody has drawn."""
    if not incoming:
        return {}
    *_, newest = sorted(incoming, key=_sent_at)
    return {
        "last_role": newest.role,
        "last_message_at": newest.sent_at,
        "last_user_message_at": max(
            (_sent_at(message) for message in incoming if message.role == "user"), default=None
        ),
    }


def _record(session: TenantSession | SystemSession, client_id: UUID, incoming: Sequence[IncomingMessage]) -> list[int]:
    """The ids of the messages of one chat, recorded by the statement of the data access layer."""
    for message in incoming:
        dao.check(message)
    known_as = [message.provider_message_id for message in incoming if message.provider_message_id is not None]
    if len(known_as) > len({*known_as}):
        raise InvalidValue("Two of the messages have the same provider_message_id: the second would not be recorded.")
    stored = select(ChatMessage.id).where(
        ChatMessage.client_id == client_id, ChatMessage.provider_message_id.in_(known_as)
    )
    if session.scalars(stored.limit(1)).one_or_none() is not None:
        raise InvalidValue(
            "The client has a message with this provider_message_id already, and recording it again would change "
            "nothing. After `seed` the ids of the same calls are the same: seed once for each database."
        )
    ids: list[int] = []
    for batch in _batches(incoming):
        if isinstance(session, TenantSession):
            recorded = dao.record_many(session, messages=batch).recorded
            ids += [recorded[index].message_id for index in range(len(batch))]
        else:
            ids += _record_as_system(session, client_id, batch)
    held = session.identity_map.get(identity_key(ActiveConversation, (incoming[0].chat_id, client_id)))
    if held is not None:
        session.refresh(held, [column.key for column in inspect(ActiveConversation).column_attrs])
    return ids


def _batches(incoming: Sequence[IncomingMessage]) -> Iterator[Sequence[IncomingMessage]]:
    """The messages, to be recorded as they arrived: in a batch, ids follow the times."""
    start = 0
    for end in range(1, len(incoming) + 1):
        is_last = end == len(incoming)
        if is_last or end - start == MAX_BATCH or _sent_at(incoming[end]) < _sent_at(incoming[end - 1]):
            yield incoming[start:end]
            start = end


def _record_as_system(session: SystemSession, client_id: UUID, batch: Sequence[IncomingMessage]) -> list[int]:
    """As `record_many`, by its statement."""
    rows = session.execute(RECORD_MANY, dao.batch_parameters(batch) | {BOUND_CLIENT_ID: client_id})
    inserted = ((positions, ids) for positions, ids, known, *_ in rows if known is None)
    ids = dict(pair for chat in inserted for pair in zip(*chat, strict=True))
    if len(ids) < len(batch):
        raise InvalidValue("Somebody else has just recorded a message with the same provider_message_id.")
    return [ids[position] for position in sorted(ids)]


# --- files ------------------------------------------------------------------------------------------------------------


class ClientFileFactory(_OwnedFactory[ClientFile]):
    """Files, not uploaded to Google unless a trait says so: `with_google_uri`, or `expired_google_uri`."""

    class Meta:
        """For factory_boy."""

        model = ClientFile

    class Params:
        """What a file is, and the traits."""

        document = _drawn(lambda: texts.pick(_STREAM.random, texts.DOCUMENTS))
        with_google_uri = _trait(
            google_file_uri=_drawn(lambda: texts.google_file_uri(_STREAM.random)), google_file_expires_at=FOREVER
        )
        expired_google_uri = _trait(
            google_file_uri=_drawn(lambda: texts.google_file_uri(_STREAM.random)),
            google_file_expires_at=_drawn(lambda: _STREAM.now - _STREAM.seconds(3600, 48 * 3600)),
        )

    id = _drawn(_STREAM.uuid)
    filename = _derived(lambda file: file.document[0])
    media_type = _derived(lambda file: file.document[1])
    file_hash = _drawn(lambda: texts.hexadecimal(_STREAM.random, 64))
    size_bytes = _drawn(lambda: 1_000 + texts.below(_STREAM.random, 20_000_000))

    @classmethod
    def _adjust_kwargs(cls, **values: Any) -> dict[str, Any]:
        _refuse_together(values, "with_google_uri", "expired_google_uri")
        return values
