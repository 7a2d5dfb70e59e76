"""The declarative base, and the mixin that makes a table belong to a client.

The column type `ClientId` is the whole declaration of tenancy: the column that has it is the tenant key of its table.
The filter, the stamp and row level security read it from there, so a tenant table is a model with `TenantOwned`. A
table without such a column has to say whose it is: `SYSTEM_ONLY` or `GLOBAL`.
"""

from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy import BindParameter, Column, ForeignKey, MetaData, Table, Uuid, bindparam, inspect
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.orm import DeclarativeBase, InstanceState, Mapped, declared_attr, mapped_column, validates

from kestra.errors import CrossTenantWrite, InvalidClientId, TenancyError

TENANT_ROLE: Final = "kestra_tenant"
"""What a tenant transaction runs as: sees the rows of the client in `SETTING`."""

SYSTEM_ROLE: Final = "kestra_system"
"""What a system transaction runs as: sees every row."""

SETTING: Final = "kestra.client_id"
"""The setting of the server with the client of the transaction."""

BOUND_CLIENT_ID: Final = "kestra_client_id"
"""The key of the client in `Connection.info` while a tenant session has the connection; it ends with the checkout."""


class ClientId(Uuid[UUID]):
    """The type of a tenant key: the `client_id` of a tenant table, the `id` of `clients`."""

    cache_ok = True


Tenancy = Literal["tenant", "system", "global"]
"""Who reaches the rows of a table: their client; system transactions alone; everybody, who may read them."""

SYSTEM_ONLY: Final[dict[str, Any]] = {"info": {"tenancy": "system"}}
"""In `__table_args__`: the rows belong to no client, and no client sees them."""

GLOBAL: Final[dict[str, Any]] = {"info": {"tenancy": "global"}}
"""In `__table_args__`: the rows belong to no client; every client reads them, and system transactions write them."""


def tenancy_of(table: Table) -> Tenancy | None:
    """Who reaches the rows of a table; None when its model does not say, which Alembic and `Database.verify` refuse."""
    if tenant_key(table) is not None:
        return "tenant"
    declaration = table.info.get("tenancy")
    return declaration if declaration in {"system", "global"} else None


def tenant_key(table: Table) -> Column[UUID] | None:
    """The column that says whose row it is, or None when the rows of the table belong to no client."""
    keys = [column for column in table.columns if isinstance(column.type, ClientId)]
    if len(keys) > 1:
        raise TenancyError(
            f"The table {table.name} has {len(keys)} tenant keys, and its rows cannot have two owners. "
            "Give columns that mention another client the type Uuid."
        )
    return keys[0] if keys else None


def parse_client_id(client_id: object) -> UUID:
    """A client id as the application has it, as a UUID.

    Raises:
        InvalidClientId: It is None, empty, not a UUID or not text. There is no value that means "all clients".
    """
    if isinstance(client_id, UUID):
        return client_id
    if isinstance(client_id, str) and client_id:
        try:
            return UUID(client_id)
        except ValueError:
            pass
    what = "missing" if client_id is None or client_id == "" else f"no UUID but a malformed {type(client_id).__name__}"
    raise InvalidClientId(
        f"The client id is {what}. A tenant session belongs to exactly one client; "
        "to see all of them open a system session."
    )


def bound_client_id() -> BindParameter[UUID]:
    """The client of the tenant session that executes the statement; what is given for it is overwritten.

    For Core statements that have to name it, such as two INSERTs in one statement: SQLAlchemy stamps only one of them.
    In a system session it is NULL.
    """
    return bindparam(BOUND_CLIENT_ID, None, type_=ClientId())


def _stamp(context: DefaultExecutionContext) -> UUID:
    """The session's client, for an INSERT that names none."""
    client_id: UUID | None = context.root_connection.info.get(BOUND_CLIENT_ID)
    if client_id is None:
        raise InvalidClientId("A row of a tenant table needs a client_id when it is written in a system session.")
    return client_id


class Base(DeclarativeBase):
    """Every model. Constraint names follow one convention, which migrations and the translation of errors rely on."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        }
    )


class TenantOwned:
    """A table whose every row belongs to one client.

    Put `client_id` into the primary key and into every unique and foreign key of such a table: keys are checked across
    row level security, so one without it would tell a client what another has.
    """

    @declared_attr
    def client_id(cls) -> Mapped[UUID]:  # noqa: N805 - SQLAlchemy calls it with the class
        """Whose row it is. Stamped by the session, never changed afterwards."""
        return mapped_column(ClientId, ForeignKey("clients.id", ondelete="CASCADE"), default=_stamp)

    @validates("client_id")
    def _keep_client(self, _attribute: str, given: UUID | str | None) -> UUID | None:
        client_id = None if given is None else parse_client_id(given)
        state: InstanceState[Any] = inspect(self)
        if state.key is not None and client_id != self.client_id:
            raise CrossTenantWrite(
                f"client_id of {type(self).__name__} is immutable: a row stays with its client. "
                "Copy the data into a new object instead."
            )
        return client_id
