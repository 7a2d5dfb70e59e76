"""What a statement of a tenant session may touch: the injected filter, the stamp, the guard.

The filter is injected where SQLAlchemy compiles a statement, so that it is part of the compiled form and cached with
it: every tenant table in a FROM is rendered as `(SELECT * FROM t WHERE t.client_id = :kestra_client_id) AS t`, every
UPDATE and DELETE gets the same criterion. Whatever the ORM adds while compiling (eager loads, column properties)
passes through the same door. The value of the bind comes from the connection when the statement runs, so one compiled
form serves every client.

What the filter cannot reach is noted while compiling and refused when the execution begins, before anything is sent.

The hooks are SQLAlchemy's compiler and execution context, which it calls semi-private. They are all in this file, the
version is pinned, and the matrix of statement shapes in the tests holds them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import chain
from typing import Any, Final, NoReturn, TypeVar
from uuid import UUID

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import (
    CTE,
    Alias,
    BindParameter,
    ClauseElement,
    ColumnClause,
    ColumnElement,
    Delete,
    Extract,
    FromClause,
    Insert,
    Select,
    Table,
    TableSample,
    TextClause,
    Update,
    and_,
)
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.dml import OnConflictDoUpdate
from sqlalchemy.dialects.postgresql.psycopg import (
    PGCompiler_psycopg,
    PGDialect_psycopg,
    PGDialectAsync_psycopg,
    PGExecutionContext_psycopg,
    PGIdentifierPreparer_psycopg,
)
from sqlalchemy.engine import URL, Connection, Dialect, ExecutionContext
from sqlalchemy.engine.cursor import CursorFetchStrategy
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.sql.elements import Grouping
from sqlalchemy.types import UserDefinedType
from sqlalchemy.util import immutabledict

from kestra.base import BOUND_CLIENT_ID, ClientId, bound_client_id, parse_client_id, tenancy_of, tenant_key
from kestra.errors import CrossTenantWrite, TenancyError, UnscopedStatement
from kestra.guard import check_functions, check_raw_sql
from kestra.transaction import Opening, OpensTransactions, Statement

_Dml = TypeVar("_Dml", Update, Delete)

RAW_SQL: Final = "kestra_raw_sql"
"""The execution option that lets hand-written SQL through. It then runs under row level security alone."""

OPENING: Final = "kestra_opening"
"""The key, in `Connection.info`, of how the session's transactions open."""


_CONSTANT: Final = re.compile(r"\*|-?\d+(\.\d+)?|'[^']*'|null|true|false|(not )?materialized", re.IGNORECASE)
"""Text that names nothing; SQLAlchemy itself writes `count(*)` and the wildcards of `startswith` with such."""

_OPERATOR: Final = re.compile(
    r"(?!.*(--|/\*))[-+*/<>=~!@#%^&|`?:]+|and|or|(not )?(i?like|in|similar to)|is( not)?( distinct from)?"
    r"|overlaps|at time zone",
    re.IGNORECASE,
)
"""An operator. More than that could be any SQL."""


_ROWS_OF_NO_OTHER_CLIENT: Final = re.compile(
    r"generate_(series|subscripts)|unnest|jsonb?_(array_elements(_text)?|each(_text)?|object_keys|to_recordset"
    r"|populate_recordset|path_query)|regexp_(matches|split_to_table)|string_to_table|kestra_record(_many)?",
    re.IGNORECASE,
)
"""Functions that may stand in a FROM: they read no table or, as ours do, the client's rows alone. Any other could
read those of every client."""


class TenantCompiler(PGCompiler_psycopg):
    """Renders statements so that they see the rows of one client.

    Attributes:
        kestra_unscoped: What the filter cannot reach in this statement, or None. Kept with the cached form.
        kestra_stamps: The binds that carry a tenant key into an INSERT; each execution compares them with its client.
    """

    kestra_unscoped: str | None
    kestra_stamps: list[BindParameter[UUID]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The parent's constructor compiles, so the state has to be there before it.
        self.kestra_unscoped = None
        self.kestra_stamps = []
        super().__init__(*args, **kwargs)
        check_functions(self.string)

    # --- reads: every tenant table in a FROM becomes the client's part of it ---

    def visit_table(
        self, table: Any, asfrom: bool = False, iscrud: bool = False, ashint: bool = False, **kw: Any
    ) -> str:
        rendered: str = super().visit_table(table, asfrom=asfrom, iscrud=iscrud, ashint=ashint, **kw)
        if not asfrom or iscrud or ashint:
            return rendered
        if table in (kw.get("fromhints") or ()):
            self._unscoped("a hint on a table")
        if isinstance(table, Table) and table.schema is None and tenancy_of(table) == "global":
            return rendered
        name = self.preparer.format_table(table)
        key = self.preparer.format_column(self._tenant_key(table))
        client_rows = f"(SELECT * FROM {name} WHERE {name}.{key} = {self.process(bound_client_id())})"  # noqa: S608  # a compiler
        alias = kw.get("enclosing_alias")
        if alias is not None and alias.element is table:
            return client_rows  # visit_alias names it
        return f"{client_rows} AS {name}"

    # --- writes ---

    def visit_update(self, update_stmt: Update, visiting_cte: CTE | None = None, **kw: Any) -> str:
        key = self._tenant_key(update_stmt.table)
        self._refuse_change_of(key, update_stmt._values or ())
        kw.pop("asfrom", None)  # of a CTE in a FROM; what is inside it is not
        return super().visit_update(_scoped(update_stmt, key), visiting_cte=visiting_cte, **kw)

    def visit_delete(self, delete_stmt: Delete, visiting_cte: CTE | None = None, **kw: Any) -> str:
        key = self._tenant_key(delete_stmt.table)
        self._refuse_clients(key)
        kw.pop("asfrom", None)
        rendered: str = super().visit_delete(_scoped(delete_stmt, key), visiting_cte=visiting_cte, **kw)
        return rendered

    def visit_insert(
        self, insert_stmt: Insert, visited_bindparam: Any = None, visiting_cte: CTE | None = None, **kw: Any
    ) -> str:
        key = self._tenant_key(insert_stmt.table)
        self._refuse_clients(key)
        if not all(map(_can_be_checked, _values_for(key, insert_stmt))):
            raise CrossTenantWrite(f"{key} cannot be an expression: leave it out, the session stamps new rows.")
        kw.pop("asfrom", None)
        rendered: str = super().visit_insert(
            insert_stmt, visited_bindparam=visited_bindparam, visiting_cte=visiting_cte, **kw
        )
        return rendered

    def visit_on_conflict_do_update(self, on_conflict: OnConflictDoUpdate, **kw: Any) -> str:
        key = self._tenant_key(self._current_dml().table)
        self._refuse_change_of(key, dict(on_conflict.update_values_to_set))
        scoped = copy(on_conflict)  # the statement, and so its clause, may be compiled again elsewhere
        existing = () if on_conflict.update_whereclause is None else (on_conflict.update_whereclause,)
        scoped.update_whereclause = and_(*_criteria(key, existing))
        rendered: str = super().visit_on_conflict_do_update(scoped, **kw)
        return rendered

    def visit_bindparam(self, bindparam: BindParameter[Any], *args: Any, **kw: Any) -> str:
        if bindparam._is_crud and isinstance(bindparam.type, ClientId):
            statement = self._current_dml()
            if isinstance(statement, Update):
                self._refuse_change_of(self._tenant_key(statement.table), [bindparam])
            self.kestra_stamps.append(bindparam)
        return super().visit_bindparam(bindparam, *args, **kw)

    # --- what the filter cannot reach ---

    def visit_textclause(self, textclause: TextClause, *args: Any, **kw: Any) -> str:
        if not _CONSTANT.fullmatch(textclause.text):
            self._unscoped("text()")
        rendered: str = super().visit_textclause(textclause, *args, **kw)
        return rendered

    def visit_tstring(self, tstring: Any, *args: Any, **kw: Any) -> str:
        self._unscoped("tstring()")
        rendered: str = super().visit_tstring(tstring, *args, **kw)
        return rendered

    def visit_column(self, column: ColumnClause[Any], *args: Any, **kw: Any) -> str:
        if column.is_literal and not _CONSTANT.fullmatch(column.name):
            self._unscoped("literal_column()")
        return super().visit_column(column, *args, **kw)

    def visit_function(self, func: Any, *args: Any, **kw: Any) -> str:
        # Taken out, so that the arguments are not seen as standing in the FROM too.
        if kw.pop("asfrom", False) and (func.packagenames or not _ROWS_OF_NO_OTHER_CLIENT.fullmatch(func.name)):
            self._unscoped(f"the function {func.name} in a FROM")
        return super().visit_function(func, *args, **kw)

    def visit_custom_op_binary(self, element: Any, operator: Any, **kw: Any) -> str:
        self._check_operator(operator)
        rendered: str = super().visit_custom_op_binary(element, operator, **kw)
        return rendered

    def visit_custom_op_unary_operator(self, element: Any, operator: Any, **kw: Any) -> str:
        self._check_operator(operator)
        rendered: str = super().visit_custom_op_unary_operator(element, operator, **kw)
        return rendered

    def visit_custom_op_unary_modifier(self, element: Any, operator: Any, **kw: Any) -> str:
        self._check_operator(operator)
        rendered: str = super().visit_custom_op_unary_modifier(element, operator, **kw)
        return rendered

    def visit_extract(self, extract: Extract, **kw: Any) -> str:
        if not extract.field.isidentifier():
            self._unscoped("the field of extract()")
        rendered: str = super().visit_extract(extract, **kw)
        return rendered

    def visit_typeclause(self, typeclause: Any, **kw: Any) -> str:
        if isinstance(typeclause.type, UserDefinedType):
            self._unscoped("a user-defined type")
        rendered: str = super().visit_typeclause(typeclause, **kw)
        return rendered

    def visit_tablesample(self, tablesample: TableSample, **kw: Any) -> NoReturn:
        raise UnscopedStatement(
            "TABLESAMPLE is refused in a tenant session: it samples the rows of all clients before the filter. "
            "Order by random() with a limit instead."
        )

    def get_statement_hint_text(self, hint_texts: Sequence[str]) -> str:
        self._unscoped("a statement hint")
        rendered: str = super().get_statement_hint_text(hint_texts)
        return rendered

    def _check_operator(self, operator: Any) -> None:
        if not _OPERATOR.fullmatch(operator.opstring):
            self._unscoped("op()")

    def _refuse_clients(self, key: ColumnElement[UUID]) -> None:
        if not key.foreign_keys:
            raise CrossTenantWrite("No client is made or deleted in a session of a client: use a system session.")

    def _current_dml(self) -> Any:
        return self.stack[-1]["selectable"]

    def _unscoped(self, what: str) -> None:
        self.kestra_unscoped = self.kestra_unscoped or what

    def _tenant_key(self, table: FromClause) -> ColumnElement[UUID]:
        key = tenant_key(table) if isinstance(table, Table) else None
        if key is None or (isinstance(table, Table) and table.schema is not None):
            raise UnscopedStatement(
                f"{table.description!r} is not a table of the client: it has no tenant key, or a schema of its own, or "
                "it is an alias that is written to. Use the mapped classes, give the table the TenantOwned mixin, or "
                "use a system session."
            )
        return key

    def _refuse_change_of(self, key: ColumnElement[UUID], assigned: Iterable[Any]) -> None:
        """Refuse an assignment to the tenant key, given the columns (or their names) that a statement assigns to."""
        if any(getattr(target, "key", target) == key.key for target in assigned):
            raise CrossTenantWrite(
                f"{key} is immutable: a row stays with its client. "
                "Leave it out of the values; the session stamps new rows."
            )


def _values_for(key: ColumnElement[UUID], insert_stmt: Insert) -> Iterator[object]:
    """Whatever an INSERT gives the tenant key, in each of the forms it may be written."""
    rows: list[Any] = [insert_stmt._values or {}, *chain.from_iterable(insert_stmt._multi_values)]
    if key.key in (insert_stmt._select_names or ()) and not isinstance(insert_stmt.select, Select):
        yield insert_stmt.select  # the arms of a union are not looked at one by one
    elif insert_stmt._select_names:
        source: Any = insert_stmt.select
        rows.append(dict(zip(insert_stmt._select_names, source.selected_columns, strict=False)))
    for row in rows:
        named = row if isinstance(row, Mapping) else dict(zip(insert_stmt.table.columns.keys(), row, strict=False))
        yield from (value for target, value in named.items() if getattr(target, "key", target) == key.key)


def _can_be_checked(value: object) -> bool:
    """Whether each execution compares this value for a tenant key, or the filter has narrowed it to the client."""
    if not isinstance(value, ClauseElement):
        return True
    if isinstance(value, BindParameter):
        return value._is_crud or value.key == BOUND_CLIENT_ID
    table = getattr(value, "table", None)
    table = table.element if isinstance(table, Alias) else table
    return isinstance(table, Table) and isinstance(value, ColumnClause) and tenant_key(table) is table.c.get(value.key)


def _criteria(key: ColumnElement[UUID], existing: Iterable[ColumnElement[Any]]) -> list[ColumnElement[bool]]:
    """The client's criterion and those of the statement, in parentheses: an OR in a text must not reach over them."""
    return [key == bound_client_id(), *(Grouping(criterion) for criterion in existing)]


def _scoped(statement: _Dml, key: ColumnElement[UUID]) -> _Dml:
    scoped = statement._generate()
    scoped._where_criteria = tuple(_criteria(key, statement._where_criteria))
    return scoped


class _ColumnsAreKnown(CursorFetchStrategy):
    """Of a statement that was executed before: SQLAlchemy, which keeps its columns, only asks whether there are any.

    psycopg would make an object of each, at 3 % of the client's instructions for five queries (docs/adr/0012).
    """

    __slots__ = ()
    alternate_cursor_description = (("not to be read", None, None, None, None, None, None),)


_COLUMNS_ARE_KNOWN: Final = _ColumnsAreKnown()


class TenantExecutionContext(PGExecutionContext_psycopg):
    """Runs what `TenantCompiler` made: refuses what is unscoped, checks the stamps, and gives the filter its client."""

    def pre_exec(self) -> None:
        _refuse_idle(self._dbapi_connection.driver_connection)
        super().pre_exec()

    def post_exec(self) -> None:
        super().post_exec()
        known = getattr(self.compiled, "_cached_metadata", None) is not None
        read = self._is_server_side or self.execution_options.get("driver_column_names")
        if known and not read and not is_watched(self.root_connection):
            self.cursor_fetch_strategy = _COLUMNS_ARE_KNOWN

    def create_cursor(self) -> Any:
        driver: Any = self._dbapi_connection.driver_connection
        driver.guarded = False
        try:
            return super().create_cursor()
        finally:
            driver.guarded = True

    @classmethod
    def _init_compiled(
        cls,
        dialect: Dialect,
        connection: Connection,
        dbapi_connection: PoolProxiedConnection,
        execution_options: immutabledict[str, Any],
        compiled: Any,
        parameters: Any,
        *args: Any,
        **kwargs: Any,
    ) -> ExecutionContext:
        client_id = _client_of(dbapi_connection)
        if compiled.kestra_unscoped:
            _check_hand_written(compiled.kestra_unscoped, compiled.string, execution_options)
        context: Any = super()._init_compiled(
            dialect, connection, dbapi_connection, execution_options, compiled, parameters, *args, **kwargs
        )
        for stamp in compiled.kestra_stamps:
            context._check_stamp(compiled.bind_names[stamp], client_id)
        if compiled.isinsert:
            # Of a list, the first row alone says which columns there are; what the others say of the client counts too.
            for row in parameters or ():
                _check_row(row.get("client_id"), client_id)
        if BOUND_CLIENT_ID in compiled.binds:
            for sent in context.parameters:
                sent[BOUND_CLIENT_ID] = client_id
        return context

    @classmethod
    def _init_statement(
        cls,
        dialect: Dialect,
        connection: Connection,
        dbapi_connection: PoolProxiedConnection,
        execution_options: immutabledict[str, Any],
        statement: str,
        *args: Any,
        **kwargs: Any,
    ) -> ExecutionContext:
        _client_of(dbapi_connection)
        _check_hand_written("exec_driver_sql()", statement, execution_options)
        return super()._init_statement(
            dialect, connection, dbapi_connection, execution_options, statement, *args, **kwargs
        )

    @classmethod
    def _init_ddl(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnscopedStatement(
            "DDL is refused in a tenant session. The schema is changed by migrations: `alembic revision`."
        )

    def _check_stamp(self, name: str, client_id: UUID) -> None:
        sent: Any
        for bound, sent in zip(self.compiled_parameters, self.parameters, strict=True):
            if bound[name] is None:
                sent[name] = client_id
            else:
                _check_row(bound[name], client_id)


def is_watched(connection: Connection) -> bool:
    """Whether somebody listens to what is executed, or logs it: they see what SQLAlchemy sends, and may change it."""
    if connection._has_events or connection.engine._has_events:  # once somebody listened, to whatever
        listeners = connection.dispatch
        if listeners.before_cursor_execute or listeners.after_cursor_execute:
            return True
    return connection._echo or bool(connection.dialect.dispatch.do_execute)


def fetch_all(connection: Connection, compiled: Statement, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of what `TenantCompiler` made, run on the driver as `TenantExecutionContext` runs it.

    Args:
        connection: Of a tenant session.
        compiled: Of its text nothing is unscoped.
        parameters: All but the client, which is the connection's.

    Raises:
        TenancyError: The connection has no client, or its transaction is over.
        KestraError: The translation of what the driver raised.
    """
    pooled = connection.connection
    parameters[BOUND_CLIENT_ID] = _client_of(pooled)
    driver: Any = pooled.driver_connection
    _refuse_idle(driver)
    dialect: Any = connection.dialect
    try:
        driver.guarded = False
        try:
            rows: list[tuple[Any, ...]] = dialect.fetch(pooled, compiled, parameters)
        finally:
            driver.guarded = True
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, _TRANSLATED):
            raise  # somebody's time limit, say, which is raised by a signal
        connection._handle_dbapi_exception(error, compiled.text, parameters, None, None)
    return rows


_TRANSLATED: Final = (psycopg.Error, UnicodeEncodeError, InvalidRequestError)


def _refuse_idle(driver: Any) -> None:
    if driver.opening is None and driver.pgconn.transaction_status == TransactionStatus.IDLE:
        raise TenancyError("The transaction of this session is over, and with it its role. Roll back, or open another.")


def _check_row(given: object, client_id: UUID) -> None:
    if isinstance(given, ClauseElement):
        raise CrossTenantWrite("client_id cannot be an expression: leave it out, the session stamps new rows.")
    if given is not None and parse_client_id(given) != client_id:
        raise CrossTenantWrite(
            f"A row of client {given} cannot be inserted in a session of client {client_id}. "
            "Leave client_id out; the session stamps it."
        )


def _client_of(dbapi_connection: PoolProxiedConnection) -> UUID:
    client_id: UUID | None = dbapi_connection.info.get(BOUND_CLIENT_ID)
    if client_id is None:
        raise TenancyError("This connection is not bound to a client. Connections are had from a tenant session.")
    return client_id


def _check_hand_written(what: str, sql: str, execution_options: Mapping[str, Any]) -> None:
    if not execution_options.get(RAW_SQL):
        raise UnscopedStatement(
            f"{what} is refused in a tenant session: the client filter cannot be put into hand-written SQL. Write it "
            f"with the mapped classes, or mark the statement with execution_options({RAW_SQL}=True): it then runs "
            "under row level security alone."
        )
    check_raw_sql(sql)


class _Preparer(PGIdentifierPreparer_psycopg):
    """Renders names, and never a text as one: `quoted_name(…, quote=False)` would."""

    def quote(self, ident: str) -> str:
        if getattr(ident, "quote", None) is False and not ident.isidentifier():
            raise UnscopedStatement("A name that is not to be quoted has to be a plain identifier.")
        return super().quote(ident)


class _Pooled(PGDialect_psycopg):
    """PostgreSQL on connections of psycopg's own pool, whose transactions the session opens."""

    def on_connect(self) -> Any:
        # The pool configures its connections. SQLAlchemy's handler of notices would be added at every checkout, to the
        # same driver connection, and never be removed.
        return None

    def do_begin(self, dbapi_connection: Any) -> None:
        """Have the next statement open a transaction as the role of the session.

        SQLAlchemy calls this at every begin. The first call comes before the session has bound the connection, so the
        session calls once more.
        """
        opening = dbapi_connection.info.get(OPENING)
        if opening is not None:
            self._open(dbapi_connection, opening)
            dbapi_connection.driver_connection.guarded = opening.client_id is not None

    def do_rollback(self, dbapi_connection: Any) -> None:
        """Undo the transaction; end the connection where a statement was interrupted and still runs."""
        end_interrupted = getattr(dbapi_connection.driver_connection, "end_interrupted", None)  # `_open` refuses others
        if end_interrupted is None or not end_interrupted():
            super().do_rollback(dbapi_connection)

    def _open(self, dbapi_connection: PoolProxiedConnection, opening: Opening) -> None:
        driver = dbapi_connection.driver_connection
        if not isinstance(driver, OpensTransactions):
            raise TenancyError("A session cannot use this engine: its connections do not open transactions as a role.")
        driver.opening = opening

    def set_isolation_level(self, dbapi_connection: Any, level: str) -> None:
        raise TenancyError(
            f"The isolation level {level} is refused: the session opens its transactions itself, and outside of one "
            "it has neither role nor client."
        )


class _Tenant(_Pooled):
    statement_compiler = TenantCompiler
    preparer = _Preparer

    def initialize(self, connection: Connection) -> None:
        # SQLAlchemy's own questions about the server come first, on a connection that has no client yet.
        driver: Any = connection.connection.driver_connection
        driver.guarded = False
        super().initialize(connection)
        driver.guarded = True
        self.execution_ctx_cls = TenantExecutionContext

    def fetch(
        self, dbapi_connection: PoolProxiedConnection, statement: Statement, parameters: Mapping[str, Any]
    ) -> list[tuple[Any, ...]]:
        """The rows of what is run on the driver."""
        driver: Any = dbapi_connection.driver_connection
        rows: list[tuple[Any, ...]] = driver.fetch(statement, parameters)
        return rows


class SystemDialectAsync(_Pooled, PGDialectAsync_psycopg):
    """`SystemDialect` for asyncio."""

    supports_statement_cache = True


class SystemDialect(_Pooled):
    """For sessions that see every client. An engine of its own, and so a compiled cache of its own."""

    supports_statement_cache = True  # SQLAlchemy wants each class to say so itself

    @classmethod
    def get_async_dialect_cls(cls, url: URL) -> type[SystemDialectAsync]:
        return SystemDialectAsync


class TenantDialectAsync(_Tenant, PGDialectAsync_psycopg):
    """`TenantDialect` for asyncio."""

    supports_statement_cache = True

    def fetch(
        self, dbapi_connection: PoolProxiedConnection, statement: Statement, parameters: Mapping[str, Any]
    ) -> list[tuple[Any, ...]]:
        """As `TenantDialect`."""
        adapted: Any = dbapi_connection.dbapi_connection
        rows: list[tuple[Any, ...]] = adapted.run_async(lambda driver: driver.fetch(statement, parameters))
        return rows


class TenantDialect(_Tenant):
    """For sessions of one client."""

    supports_statement_cache = True

    @classmethod
    def get_async_dialect_cls(cls, url: URL) -> type[TenantDialectAsync]:
        return TenantDialectAsync


registry.register("postgresql.kestra_tenant", __name__, TenantDialect.__name__)
registry.register("postgresql.kestra_system", __name__, SystemDialect.__name__)
