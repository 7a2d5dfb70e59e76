"""Everything that kestra raises, in one small tree under `KestraError`.

A message says what happened, with which identifiers, and what to do. No message, and no cause that is shown with it,
carries a token, a password or the text of a message: the driver's own texts quote rows, so they are cut down before
they are chained (see `kestra.driver`).
"""

from collections.abc import Sequence
from uuid import UUID


class KestraError(Exception):
    """The base of every error raised on purpose by this package."""


# --- configuration and connection -------------------------------------------------------------------------------------


class ConfigurationError(KestraError):
    """A setting is missing or wrong: a malformed database URL, no embedded server installed, a pool size of zero."""


class DatabaseUnavailable(KestraError):
    """The server cannot be reached, or the connection broke. Nothing was committed unless a COMMIT was under way."""


class AuthenticationFailed(DatabaseUnavailable):
    """The server was reached and refused the user or the password."""


class PoolExhausted(DatabaseUnavailable):
    """No connection became free within the pool's timeout, although the server answers."""


class MigrationError(KestraError):
    """A migration could not run, or stopped because of data that only a person can decide about."""


class VerificationFailed(KestraError):
    """The database does not keep clients apart as it must, or is not at the revision of the code.

    Attributes:
        findings: Every reason there is, a line for each.
    """

    def __init__(self, findings: Sequence[str]) -> None:
        lines = "".join(f"\n- {finding}" for finding in findings)
        super().__init__(f"The database must not be used as it is. Correct every one of these:{lines}")
        self.findings = tuple(findings)


class InvariantsBroken(KestraError):
    """Rows are not such as the data access layer leaves: see `kestra.testing.invariants`.

    Attributes:
        findings: What is wrong, a line for each invariant.
    """

    def __init__(self, findings: Sequence[str]) -> None:
        lines = "".join(f"\n- {finding}" for finding in findings)
        super().__init__(f"Rows are not such as the data access layer leaves them:{lines}")
        self.findings = tuple(findings)


# --- tenancy ----------------------------------------------------------------------------------------------------------


class TenancyError(KestraError):
    """Something would have left the session's client. It was refused, before it was sent or by PostgreSQL."""


class InvalidClientId(TenancyError):
    """No tenant, no session: the client id is missing, empty or not a UUID."""


class CrossTenantWrite(TenancyError):
    """A row of another client would have been inserted, moved, attached, changed or deleted."""


class UnscopedStatement(TenancyError):
    """A statement that the tenant filter cannot reach (text, raw SQL, DDL, an unknown table) was refused."""


class ReasonRequired(TenancyError):
    """A system session sees every client, so it must say why it was opened."""


# --- data -------------------------------------------------------------------------------------------------------------


class ClientNotFound(KestraError):
    """There is no client with this id: nothing can be written for it.

    Attributes:
        client_id: The client of the session; None in a system session.
    """

    def __init__(self, client_id: UUID | None) -> None:
        who = f"no client {client_id}" if client_id else "no client with the id that a row was written for"
        super().__init__(f"There is {who}. Nothing was written; create the client in a system session first.")
        self.client_id = client_id


class ConversationNotFound(KestraError):
    """The client has no conversation with this chat.

    Attributes:
        chat_id: The chat that was asked for.
    """

    def __init__(self, chat_id: str) -> None:
        super().__init__(f"The client has no conversation with the chat {chat_id!r}. Nothing was written.")
        self.chat_id = chat_id


class FileNotRegistered(KestraError):
    """The client has no file with this id.

    Attributes:
        file_id: The file that was asked for.
    """

    def __init__(self, file_id: UUID) -> None:
        super().__init__(f"The client has no file {file_id}. Nothing was written; register it first.")
        self.file_id = file_id


class ErasureIncomplete(KestraError):
    """Something that had to be erased is still there: a trigger, a rule or a policy of the database keeps it.

    Attributes:
        left: How many rows.
    """

    def __init__(self, what: str, *, left: int) -> None:
        super().__init__(
            f"{left} rows of {what} could not be erased. Roll back, and look for triggers, rules and policies of the "
            "database that keep rows from being deleted."
        )
        self.left = left


class RowsHidden(KestraError):
    """Rows may be there that cannot be seen: row level security is not what the models declare. Nothing was erased.

    Attributes:
        findings: What differs, a line for each; each names a table.
    """

    def __init__(self, findings: Sequence[str]) -> None:
        lines = "".join(f"\n- {finding}" for finding in findings)
        super().__init__(
            f"Rows may be hidden, so nothing was erased. Correct every one of these, as `alembic check` says:{lines}"
        )
        self.findings = tuple(findings)


class UnknownToken(KestraError):
    """No client has this token. The token is not in the message: it may be a secret."""

    def __init__(self) -> None:
        super().__init__("No client has this token. Check the instance of the webhook; tokens are compared exactly.")


class DuplicateToken(KestraError):
    """Another client already has this token; it was not changed."""

    def __init__(self) -> None:
        super().__init__(
            "Another client already has this token. Nothing was written; each token belongs to one client."
        )


class InvalidValue(KestraError):
    """A value does not fit its column: a naive datetime, an unknown role, a NUL byte, a text that is too long."""


class InvalidCursor(InvalidValue):
    """A cursor was not made by this package, or for another list, chat or client."""


class InvalidExport(InvalidValue):
    """A line of an export cannot be imported: garbage, another version, cut off, out of order, refused by a rule.

    Attributes:
        line: The number of the line, from 1; the line itself is not in the text.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"Line {line} of the export cannot be imported: {reason}. Nothing of the export was written.")
        self.line = line


class InvalidToolsConfig(InvalidValue):
    """`tools_config` is not a JSON object, or one of its known keys has the wrong type."""


# --- somebody else was faster -----------------------------------------------------------------------------------------


class Conflict(KestraError):
    """What the call was based on has changed meanwhile. Nothing was written; look again, and decide again."""


class ClaimLost(Conflict):
    """A follow-up must not be sent: the claim has ended, or somebody else has the conversation.

    The end customer answered, the lease ran out, a person paused or finished the conversation, or it was completed.

    Attributes:
        chat_id: The conversation.
    """

    def __init__(self, chat_id: str) -> None:
        super().__init__(
            f"The claim on the chat {chat_id!r} is over: answered, expired, paused, finished or completed. Nothing was "
            "written, and nothing must be sent; claim again."
        )
        self.chat_id = chat_id


class ConversationMoved(Conflict):
    """The conversation has gone on: another message than the expected one is its newest.

    Attributes:
        chat_id: The conversation.
        expected: The id of the message that the caller took for the newest.
        actual: The id of the newest message.
    """

    def __init__(self, chat_id: str, *, expected: int | None, actual: int | None) -> None:
        super().__init__(
            f"The conversation with the chat {chat_id!r} has gone on: its newest message is {actual}, not {expected}. "
            "Nothing was written; read it again."
        )
        self.chat_id = chat_id
        self.expected = expected
        self.actual = actual


class ContextOutdated(Conflict):
    """A newer summary is stored already.

    Attributes:
        chat_id: The conversation.
        up_to: The id of the last message that the refused summary covers.
        stored: The id of the last message that the stored one covers.
    """

    def __init__(self, chat_id: str, *, up_to: int, stored: int) -> None:
        super().__init__(
            f"The context of the chat {chat_id!r} covers messages up to {stored} already, more than up to {up_to}. "
            "Nothing was written; summarise again from what is stored."
        )
        self.chat_id = chat_id
        self.up_to = up_to
        self.stored = stored


class FileUriChanged(Conflict):
    """Somebody else has uploaded the file meanwhile. Use the stored URI; neither is in the text.

    Attributes:
        file_id: The file.
    """

    def __init__(self, file_id: UUID) -> None:
        super().__init__(
            f"The file {file_id} has another URI than the one to be replaced. Nothing was written; read it again."
        )
        self.file_id = file_id


class ClientExists(Conflict):
    """An export cannot be imported: there is a client with this id.

    Attributes:
        client_id: The client that is there.
    """

    def __init__(self, client_id: UUID) -> None:
        super().__init__(
            f"There is a client {client_id} already. Nothing was written; give the imported one another client_id, or "
            "erase the one that is there."
        )
        self.client_id = client_id


class ChatExists(Conflict):
    """An export cannot be imported: the client has messages or a conversation of this chat.

    Attributes:
        chat_id: The chat.
    """

    def __init__(self, chat_id: str) -> None:
        super().__init__(f"The client has the chat {chat_id!r} already. Nothing was written; erase it there first.")
        self.chat_id = chat_id


class ClientInUse(Conflict):
    """The client cannot be erased now: other transactions keep it, or rows of it, locked.

    Attributes:
        client_id: The client that was to be erased.
    """

    def __init__(self, client_id: UUID) -> None:
        super().__init__(
            f"Other transactions keep rows of the client {client_id} locked. Nothing was erased; end the programs that "
            "work for it, and erase it again."
        )
        self.client_id = client_id


class StatementFailed(KestraError):
    """PostgreSQL refused a statement for a reason that has no class of its own here; `sqlstate` says which.

    Attributes:
        sqlstate: The five characters of the SQLSTATE, or None when the driver refused before the server did.
    """

    def __init__(self, message: str, *, sqlstate: str | None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
