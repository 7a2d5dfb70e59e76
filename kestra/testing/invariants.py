"""Whether the rows of a database are such as the data access layer leaves, whoever wrote them.

An invariant is here when `kestra.dao` keeps it whatever is called in whatever order, late messages, `purge` and imports
included. What it does not promise is not here: that there are as many messages of the assistant as follow-ups were sent
(an echo may have been recorded under another chat), that a conversation has a message, that what was read or summarised
is the id of a message of the chat (it is a position), or that ids rise with the time of the messages.

`purge` takes messages away that conversations go on naming, so by default a message that is named may be gone, and the
times of messages that are gone are bounded only: not before what is left. Where nothing was ever purged, nor imported
without its empty messages, `complete` asks for all of it.

A statement is a consistent picture, so the check may run while programs write. It goes through each table once, and
takes no memory here: what has to be sorted, PostgreSQL sorts on its disk.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, get_args
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    FromClause,
    Integer,
    Select,
    Text,
    Uuid,
    and_,
    case,
    cast,
    column,
    false,
    func,
    literal,
    not_,
    null,
    or_,
    select,
    table,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import REGCLASS, array

from kestra.base import Base
from kestra.columns import Timestamptz, json_loads
from kestra.dao.conversations import MAX_CONTEXT
from kestra.dao.followups import MAX_LEASE, STAGES
from kestra.dao.messages import MAX_ID_LENGTH
from kestra.dao.tables import CLIENTS, CONVERSATIONS, FILES, MESSAGES
from kestra.database import Database
from kestra.errors import InvalidValue, InvariantsBroken, MigrationError, VerificationFailed
from kestra.models import Role, Status
from kestra.session import SystemSession, require_system
from kestra.tools_config import MASK, SECRETS, ToolsConfig

EXAMPLES: Final = 5
"""How many rows a violation names at most, each of another chat where there are chats."""

_BATCH: Final = 100
"""How many documents are held at once."""

_SHOWN: Final = 64
"""The most characters of a chat_id that a line shows: what is wrong may be its length."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which row it is; what a row of its kind does not have is None.

    Attributes:
        client_id: Whose row it is.
        chat_id: The chat.
        message_id: The message.
        file_id: The file.
    """

    client_id: UUID
    chat_id: str | None = None
    message_id: int | None = None
    file_id: UUID | None = None

    def __str__(self) -> str:
        """The parts that it has, on one line."""
        chat = self.chat_id
        if chat is not None and len(chat) > _SHOWN:
            chat = f"{chat[:_SHOWN]}…"
        parts = {"client": self.client_id, "chat": chat, "message": self.message_id, "file": self.file_id}
        named = [
            f"{name} {part!r}" if name == "chat" else f"{name} {part}"
            for name, part in parts.items()
            if part is not None
        ]
        return " ".join(named)


@dataclass(frozen=True, slots=True)
class Violation:
    """Rows that break one invariant.

    Attributes:
        invariant: Its name in `INVARIANTS`.
        rows: How many rows.
        examples: Some of them, at most `EXAMPLES`.
        adopted: Whether the adoption of an existing installation explains them: they may have been so before.
    """

    invariant: str
    rows: int
    examples: tuple[Identity, ...]
    adopted: bool

    def __str__(self) -> str:
        """One line, without anything that was said and without secrets."""
        more = ", …" if self.rows > len(self.examples) else ""
        adopted = " (adopted)" if self.adopted else ""
        named = ", ".join(map(str, self.examples))
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{self.invariant}{adopted}: {INVARIANTS[self.invariant]} Not so in {rows}: {named}{more}"


def check(session: SystemSession, *, complete: bool = False) -> list[Violation]:
    """What is not as the data access layer leaves it; nothing when every row is.

    The database is at head. The number of statements depends on nothing.

    Args:
        session: A system session.
        complete: Whether nothing was ever purged. Then what conversations say of messages has to be exact.

    Raises:
        VerificationFailed: Row level security could hide rows, so that nothing would be proven.
        ConfigurationError: This machine has no time zones.
    """
    require_system(session)
    from kestra import rls  # noqa: PLC0415  # Alembic: who imports the list alone does not wait for it

    if findings := rls.hiding(session.connection(), Base.metadata):
        raise VerificationFailed(findings)
    violations = [*_in_tables(session, complete=complete), *_in_documents(session)]
    return sorted(violations, key=lambda violation: (violation.adopted, violation.invariant))


def verify(url: str, *, complete: bool, adopted: bool) -> str:
    """What there is to say about a database whose rows are right; with `adopted`, what its adoption explains.

    Args:
        url: A libpq URL of who may become `kestra_system`.
        complete: As in `check`.
        adopted: Whether this is the database of an adopted installation.

    Raises:
        InvariantsBroken: Rows are not right; `findings` has a line for each invariant.
        MigrationError: The database is not at head.
        KestraError: As `check`, or the database cannot be reached.
    """
    from kestra import migrate  # noqa: PLC0415  # Alembic: who only checks does not wait for it

    with Database(url) as database, database.system_session(reason="invariants") as session:
        revision = session.scalar(select(_REVISION.c.version_num)) if session.scalar(_REVISION_IS_SHOWN) else "none"
        if revision != (head := migrate.head()):
            raise MigrationError(f"The database is at revision {revision}, not at {head}: run `kestra upgrade` first.")
        violations = check(session, complete=complete)
    if not all(violation.adopted and adopted for violation in violations):
        raise InvariantsBroken([*map(str, violations)])
    return "\n".join([*map(str, violations), "The rows are such as the data access layer leaves them."])


_REVISION: Final = table("alembic_version", column("version_num", Text))
# Not `migrate.current`: the application's login may not read it itself. NULL where there is no such table.
_REVISION_IS_SHOWN: Final = select(func.has_table_privilege(func.to_regclass(_REVISION.name), "SELECT"))


def _in_tables(session: SystemSession, *, complete: bool) -> Iterator[Violation]:
    examples: dict[tuple[str, bool], list[Identity]] = {}
    rows: dict[tuple[str, bool], int] = {}
    for invariant, adopted, total, *identity in session.execute(_statement(complete=complete)):
        examples.setdefault((invariant, adopted), []).append(Identity(*identity))
        rows[invariant, adopted] = total
    for (invariant, adopted), named in examples.items():
        yield Violation(invariant, rows[invariant, adopted], tuple(named), adopted)


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rule:
    """An invariant of the rows of one scan.

    Attributes:
        name: What it is called.
        holds: What is so.
        broken: Whether it is not. NULL counts as no.
        adopted: Whether an adopted installation may have such a row. Whatever has a provider's id was recorded later.
    """

    name: str
    holds: str
    broken: ColumnElement[bool]
    adopted: ColumnElement[bool] = false()  # noqa: RUF009  # an immutable expression


_CLOCK: Final = func.clock_timestamp(type_=Timestamptz)
# A message that can be seen had its id drawn before; this is read later. Before the first id it is NULL.
_DRAWN: Final = select(
    func.coalesce(func.pg_sequence_last_value(cast("chat_messages_id_seq", REGCLASS)), 0)
).scalar_subquery()

_IS_USERS: Final = and_(MESSAGES.c.role == "user", CONVERSATIONS.c.chat_id.is_not(None))
_IS_NEWER: Final = tuple_(MESSAGES.c.created_at, MESSAGES.c.id) > tuple_(
    CONVERSATIONS.c.last_message_at, func.coalesce(CONVERSATIONS.c.last_message_id, 0)
)
_NOT_RECORDED: Final = MESSAGES.c.provider_message_id.is_(None)


def _is_no_id(text: ColumnElement[Any]) -> ColumnElement[bool]:
    return not_(func.char_length(text).between(1, MAX_ID_LENGTH))


_OF_MESSAGES: Final = (
    _Rule("message_client", "Every message is of a client that exists.", CLIENTS.c.id.is_(None)),
    _Rule(
        "message_conversation",
        "Every chat with messages has a conversation.",
        CONVERSATIONS.c.chat_id.is_(None),
        _NOT_RECORDED,
    ),
    _Rule(
        "last_message_is_newest",
        "No message is newer, by its time and then by its id, than the last one of the conversation.",
        _IS_NEWER,
        _NOT_RECORDED,
    ),
    _Rule(
        "last_message_is_named",
        "A conversation with messages names its last one.",
        # In a conversation that was adopted without messages, a late message is not the last one either.
        and_(CONVERSATIONS.c.last_message_id.is_(None), ~_IS_NEWER),
        true(),
    ),
    _Rule(
        "last_user_message_at_is_newest",
        "The end customer said nothing later than last_user_message_at.",
        and_(
            _IS_USERS,
            func.coalesce(MESSAGES.c.created_at > CONVERSATIONS.c.last_user_message_at, true()),
        ),
        _NOT_RECORDED,
    ),
    _Rule(
        "last_user_message_id_is_greatest",
        "No message of the end customer has an id above last_user_message_id.",
        and_(_IS_USERS, func.coalesce(MESSAGES.c.id > CONVERSATIONS.c.last_user_message_id, true())),
        _NOT_RECORDED,
    ),
    _Rule(
        "message_role",
        "A message is the user's, the assistant's or the system's.",
        MESSAGES.c.role.not_in(get_args(Role)),
    ),
    _Rule(
        "message_is_not_empty",
        "A message has a content or a medium.",
        and_(func.coalesce(MESSAGES.c.content, "") == "", func.coalesce(MESSAGES.c.media_url, "") == ""),
        _NOT_RECORDED,
    ),
    _Rule(
        "message_chat_id",
        "The chat_id of a message has 1 to 512 characters.",
        _is_no_id(MESSAGES.c.chat_id),
        _NOT_RECORDED,
    ),
    _Rule("provider_message_id", "A provider's id has 1 to 512 characters.", _is_no_id(MESSAGES.c.provider_message_id)),
    _Rule("message_time", "No message is of the future.", MESSAGES.c.created_at > _CLOCK, _NOT_RECORDED),
    _Rule("message_id_is_positive", "The id of a message is above 0.", MESSAGES.c.id <= 0, _NOT_RECORDED),
    _Rule("message_id_is_drawn", "The sequence has drawn every id, and will draw none again.", MESSAGES.c.id > _DRAWN),
)

_LAST: Final = MESSAGES.alias("last_message")
_USERS: Final = MESSAGES.alias("last_user_message")
_SAID: Final = (
    select(MESSAGES.c.client_id, MESSAGES.c.chat_id, func.max(MESSAGES.c.created_at).label("newest_at"))
    .where(MESSAGES.c.role == "user")
    .group_by(MESSAGES.c.client_id, MESSAGES.c.chat_id)
    .subquery("said")
)


def _of_conversations() -> tuple[_Rule, ...]:
    this, last, users = CONVERSATIONS.c, _LAST.c, _USERS.c
    newest_id = func.greatest(this.last_message_id, this.last_user_message_id)
    claimed = or_(this.claim_token.is_not(None), this.claimed_until.is_not(None))
    followed = func.coalesce(this.last_role.in_(["assistant", "system"]), false())
    return (
        _Rule("conversation_client", "Every conversation is of a client that exists.", CLIENTS.c.id.is_(None)),
        _Rule(
            "conversation_chat_id",
            "The chat_id of a conversation has 1 to 512 characters.",
            _is_no_id(this.chat_id),
            true(),
        ),
        _Rule("status", "A conversation is active or finished.", this.status.not_in(get_args(Status))),
        _Rule("followup_stage", "The stage is 0 to 5.", not_(this.followup_stage.between(0, STAGES))),
        _Rule(
            "last_role",
            "The last message is the user's, the assistant's or the system's.",
            this.last_role.not_in(get_args(Role)),
        ),
        _Rule("conversation_time", "No conversation is of the future.", this.last_message_at > _CLOCK, true()),
        _Rule(
            "last_message_is_of_the_chat",
            "The last message, unless it is gone, is one of the chat.",
            last.chat_id != this.chat_id,
        ),
        _Rule(
            "last_message_matches",
            "last_message_at and last_role are those of the last message, unless it is gone.",
            and_(
                last.chat_id == this.chat_id,
                or_(last.created_at != this.last_message_at, last.role.is_distinct_from(this.last_role)),
            ),
            last.provider_message_id.is_(None),
        ),
        _Rule(
            "last_message_is_whole",
            "A conversation has both last_role and last_message_id, or neither.",
            this.last_role.is_(None) != this.last_message_id.is_(None),
            true(),
        ),
        _Rule(
            "last_user_message_is_the_users",
            "The user's last message, unless it is gone, is the user's and one of the chat.",
            or_(users.chat_id != this.chat_id, users.role != "user"),
        ),
        _Rule(
            "last_user_message_is_whole",
            "A conversation has both last_user_message_at and last_user_message_id, or neither.",
            this.last_user_message_at.is_(None) != this.last_user_message_id.is_(None),
        ),
        _Rule(
            "last_user_message_is_not_after_last",
            "The user's last message is not after the last one; where the last one is the user's, it is no other.",
            or_(
                this.last_user_message_at > this.last_message_at,
                and_(
                    this.last_role == "user",
                    this.last_message_id.is_not(None),
                    or_(
                        func.coalesce(this.last_user_message_at < this.last_message_at, true()),
                        this.last_user_message_id < this.last_message_id,
                    ),
                ),
            ),
            true(),
        ),
        _Rule(
            "last_read_message_id",
            "Nothing is read beyond the newest message.",
            this.last_read_message_id > func.coalesce(newest_id, 0),
            true(),
        ),
        _Rule(
            "last_context_message_id",
            "Nothing is summarised beyond the newest message.",
            this.last_context_message_id > func.coalesce(newest_id, 0),
            newest_id.is_(None),  # the 0 of an adopted conversation without messages gets an id when it is imported
        ),
        _Rule(
            "context_length",
            "A summary has at most 8,000 characters.",
            func.char_length(this.last_context) > MAX_CONTEXT,
            this.last_context_message_id.is_(None),
        ),
        _Rule(
            "context_is_whole",
            "A conversation has both a summary and the message up to which it goes, or neither.",
            this.last_context.is_(None) != this.last_context_message_id.is_(None),
            this.last_context_message_id.is_(None),
        ),
        _Rule(
            "claim_is_whole",
            "A claim has both a token and an end.",
            this.claim_token.is_(None) != this.claimed_until.is_(None),
        ),
        _Rule(
            "claim_is_on_an_active_conversation",
            "What is claimed is active, and not past its last stage.",
            and_(claimed, or_(this.status != "active", this.followup_stage >= STAGES)),
        ),
        _Rule(
            "claim_ends_with_an_answer",
            "What is claimed was not answered: its last message is the assistant's, or the system's after it.",
            and_(claimed, ~followed),
            func.coalesce(this.last_role == "user", false()),
        ),
        _Rule(
            "claim_ends_with_a_pause",
            "What is claimed is not paused for as long as the claim.",
            this.paused_until >= this.claimed_until,
        ),
        _Rule("claim_lease", "A claim ends within a day from now.", this.claimed_until > _CLOCK + MAX_LEASE),
        _Rule(
            "stage_ends_with_an_answer",
            "Above stage 0 the last message is the assistant's, or the system's after it.",
            and_(this.followup_stage > 0, ~followed),
            true(),
        ),
    )


_OF_CONVERSATIONS: Final = _of_conversations()

_OF_COMPLETE_CONVERSATIONS: Final = (
    _Rule(
        "last_message_exists",
        "The last message is there.",
        and_(CONVERSATIONS.c.last_message_id.is_not(None), _LAST.c.id.is_(None)),
    ),
    _Rule(
        "last_user_message_exists",
        "The user's last message is there.",
        and_(CONVERSATIONS.c.last_user_message_id.is_not(None), _USERS.c.id.is_(None)),
    ),
    _Rule(
        "last_user_message_at_exists",
        "The user said something at last_user_message_at, and nothing later.",
        func.coalesce(CONVERSATIONS.c.last_user_message_at > _SAID.c.newest_at, _SAID.c.newest_at.is_(None))
        & CONVERSATIONS.c.last_user_message_at.is_not(None),
    ),
)

_OF_FILES: Final = (
    _Rule("file_client", "Every file is of a client that exists.", CLIENTS.c.id.is_(None)),
    _Rule(
        "file_hash",
        "A file has the 64 hexadecimal digits of its SHA-256, in lower case.",
        ~func.coalesce(FILES.c.file_hash.regexp_match("^[0-9a-f]{64}$"), false()),
        func.coalesce(FILES.c.file_hash == func.lower(FILES.c.file_hash), true()),
    ),
    _Rule(
        "file_uri_is_whole",
        "A file has both a URI and its expiry, or neither.",
        or_(
            FILES.c.google_file_uri.is_(None) != FILES.c.google_file_expires_at.is_(None), FILES.c.google_file_uri == ""
        ),
        FILES.c.google_file_expires_at.is_(None),
    ),
    _Rule("file_size", "The size of a file is at least 0.", FILES.c.size_bytes < 0),
)

_OF_CLIENTS: Final = (
    _Rule("token", "A client has a token.", CLIENTS.c.token == ""),
    _Rule("client_time", "No client is of the future.", CLIENTS.c.created_at > _CLOCK, true()),
)

_UNIQUE: Final = {
    "provider_message_id_is_unique": "A provider's id is that of one message of the client.",
    "file_hash_is_unique": "A client has each file once.",
    "token_is_unique": "A token is that of one client.",
}

_OF_DOCUMENTS: Final = {
    "tools_config": "tools_config is a valid ToolsConfig.",
    "tools_config_is_unmasked": "No secret of tools_config is the mask that it is shown as.",
}

INVARIANTS: Final[Mapping[str, str]] = (
    {
        rule.name: rule.holds
        for rules in (_OF_MESSAGES, _OF_CONVERSATIONS, _OF_COMPLETE_CONVERSATIONS, _OF_FILES, _OF_CLIENTS)
        for rule in rules
    }
    | _UNIQUE
    | _OF_DOCUMENTS
)
"""What is so, by its name."""


# --- the statement ----------------------------------------------------------------------------------------------------

_Columns = tuple[ColumnElement[Any], ...]


def _identity(
    client_id: ColumnElement[UUID],
    *,
    chat_id: ColumnElement[Any] = null(),  # noqa: B008  # an immutable expression
    message_id: ColumnElement[Any] = null(),  # noqa: B008  # as above
    file_id: ColumnElement[Any] = null(),  # noqa: B008  # as above
) -> _Columns:
    return (
        client_id.label("client_id"),
        cast(chat_id, Text).label("chat_id"),
        cast(message_id, Integer).label("message_id"),
        cast(file_id, Uuid).label("file_id"),
    )


_MESSAGE: Final = _identity(MESSAGES.c.client_id, chat_id=MESSAGES.c.chat_id, message_id=MESSAGES.c.id)
_CONVERSATION: Final = _identity(CONVERSATIONS.c.client_id, chat_id=CONVERSATIONS.c.chat_id)
_FILE: Final = _identity(FILES.c.client_id, file_id=FILES.c.id)
_CLIENT: Final = _identity(CLIENTS.c.id)


def _scan(source: FromClause, rules: Sequence[_Rule], identity: _Columns) -> Select[*tuple[Any, ...]]:
    """The rows that break a rule, once for each that they break."""
    names = array([case((rule.broken, literal(rule.name, Text))) for rule in rules])
    broken = (
        func.unnest(names, array([rule.adopted for rule in rules]))
        .table_valued(column("invariant", Text), column("adopted", Boolean), name="broken")
        .render_derived()
    )
    return (
        select(broken.c.invariant, broken.c.adopted, *identity)
        .select_from(source.join(broken, broken.c.invariant.is_not(None)))
        # Most rows break none, and are not multiplied by the rules.
        .where(or_(*(rule.broken for rule in rules)))
    )


def _repeated(name: str, keys: Sequence[ColumnElement[Any]], identity: _Columns) -> Select[*tuple[Any, ...]]:
    """The rows whose keys another row has already."""
    number = func.row_number().over(partition_by=keys, order_by=identity).label("number")
    rows = select(*identity, number).where(*(key.is_not(None) for key in keys)).subquery()
    *parts, repeats = rows.c
    return select(literal(name, Text).label("invariant"), false().label("adopted"), *parts).where(repeats > 1)


def _of_client(owned: FromClause) -> ColumnElement[bool]:
    return CLIENTS.c.id == owned.c.client_id


def _conversations(*, complete: bool) -> Select[*tuple[Any, ...]]:
    def named(messages: FromClause, message_id: ColumnElement[Any]) -> ColumnElement[bool]:
        return and_(messages.c.client_id == CONVERSATIONS.c.client_id, messages.c.id == message_id)

    source: FromClause = (
        CONVERSATIONS.outerjoin(CLIENTS, _of_client(CONVERSATIONS))
        .outerjoin(_LAST, named(_LAST, CONVERSATIONS.c.last_message_id))
        .outerjoin(_USERS, named(_USERS, CONVERSATIONS.c.last_user_message_id))
    )
    if not complete:
        return _scan(source, _OF_CONVERSATIONS, _CONVERSATION)
    of_chat = and_(_SAID.c.client_id == CONVERSATIONS.c.client_id, _SAID.c.chat_id == CONVERSATIONS.c.chat_id)
    return _scan(source.outerjoin(_SAID, of_chat), _OF_CONVERSATIONS + _OF_COMPLETE_CONVERSATIONS, _CONVERSATION)


@cache
def _statement(*, complete: bool) -> Select[*tuple[Any, ...]]:
    """Some rows for each invariant that is broken: its name, whether adopted, how many there are, and one's identity.

    A window and no aggregate collects them: however much is broken, the server sorts it on its disk.
    """
    found = union_all(
        _scan(
            MESSAGES.outerjoin(CLIENTS, _of_client(MESSAGES)).outerjoin(
                CONVERSATIONS,
                and_(CONVERSATIONS.c.client_id == MESSAGES.c.client_id, CONVERSATIONS.c.chat_id == MESSAGES.c.chat_id),
            ),
            _OF_MESSAGES,
            _MESSAGE,
        ),
        _conversations(complete=complete),
        _scan(FILES.outerjoin(CLIENTS, _of_client(FILES)), _OF_FILES, _FILE),
        _scan(CLIENTS, _OF_CLIENTS, _CLIENT),
        _repeated("provider_message_id_is_unique", (MESSAGES.c.client_id, MESSAGES.c.provider_message_id), _MESSAGE),
        _repeated("file_hash_is_unique", (FILES.c.client_id, FILES.c.file_hash), _FILE),
        _repeated("token_is_unique", (CLIENTS.c.token,), _CLIENT),
    ).subquery("found")
    kind = (found.c.invariant, found.c.adopted)
    of_chat = (*kind, found.c.client_id, found.c.chat_id, found.c.file_id)
    of_chats = (
        select(*of_chat, func.min(found.c.message_id).label("message_id"), func.count().label("rows"))
        .group_by(*of_chat)
        .subquery("of_chats")
    )
    kind = (of_chats.c.invariant, of_chats.c.adopted)
    identity = (of_chats.c.client_id, of_chats.c.chat_id, of_chats.c.message_id, of_chats.c.file_id)
    numbered = select(
        *kind,
        cast(func.sum(of_chats.c.rows).over(partition_by=kind), BigInteger).label("rows"),
        *identity,
        func.row_number().over(partition_by=kind, order_by=identity).label("number"),
    ).subquery("numbered")
    *columns, number = numbered.c
    return select(*columns).where(number <= EXAMPLES).order_by(numbered.c.invariant, numbered.c.adopted, number)


# --- documents --------------------------------------------------------------------------------------------------------

# As text, which never fails: what it says may be too much for Python.
_DOCUMENTS: Final = select(CLIENTS.c.id, cast(CLIENTS.c.tools_config, Text).label("document"))


def _in_documents(session: SystemSession) -> list[Violation]:
    found: dict[str, list[Identity]] = {name: [] for name in _OF_DOCUMENTS}
    rows: Counter[str] = Counter()
    with session.execute(_DOCUMENTS, execution_options={"yield_per": _BATCH}) as result:
        for client_id, document in result:
            for name in _broken_by(document):
                rows[name] += 1
                if rows[name] <= EXAMPLES:
                    found[name].append(Identity(client_id))
    return [
        Violation(name, rows[name], tuple(named), adopted=name == "tools_config")
        for name, named in found.items()
        if named
    ]


def _broken_by(document: str) -> Iterator[str]:
    try:
        config = json_loads(document)
        ToolsConfig.model_validate(config)
    except (InvalidValue, RecursionError):
        yield "tools_config"
        return
    if any(_at(config, path) == MASK.get_secret_value() for path in SECRETS):
        yield "tools_config_is_unmasked"


def _at(document: Any, path: Sequence[str]) -> Any:  # JSON is any value
    for key in path:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document
