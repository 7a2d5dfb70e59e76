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


class UnknownToken(KestraError):
    """No client has this token. The token is not in the message: it may be a secret."""


class DuplicateToken(KestraError):
    """Another client already has this token; it was not changed."""


class InvalidValue(KestraError):
    """A value does not fit its column: a naive datetime, an unknown role, a NUL byte, a text that is too long."""


class InvalidToolsConfig(InvalidValue):
    """`tools_config` is not a JSON object, or one of its known keys has the wrong type."""


class StatementFailed(KestraError):
    """PostgreSQL refused a statement for a reason that has no class of its own here; `sqlstate` says which.

    Attributes:
        sqlstate: The five characters of the SQLSTATE, or None when the driver refused before the server did.
    """

    def __init__(self, message: str, *, sqlstate: str | None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
