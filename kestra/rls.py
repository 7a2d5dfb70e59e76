"""Row level security as data: what the tables of a metadata must have, what a database has, and Alembic's comparison.

Two roles. A tenant transaction runs as `kestra_tenant` with the client in the setting `kestra.client_id`; a system
transaction runs as `kestra_system`. Each table has one policy for each role that may see it, named like the role.

Everything here is a set of facts, and each fact is a piece of SQL: what is declared and missing is made, what is there
and not declared is taken away. Alembic's revisions and `Database.verify` read the same two sets.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from alembic.autogenerate import renderers
from alembic.autogenerate.api import AutogenContext
from alembic.operations.ops import CreateTableOp, DropTableOp, MigrateOperation, UpgradeOps
from alembic.runtime.plugins import Plugin
from alembic.util import CommandError, DispatchPriority, PriorityDispatchResult
from sqlalchemy import (
    Column,
    Connection,
    ForeignKeyConstraint,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    UniqueConstraint,
    bindparam,
    text,
)
from sqlalchemy.dialects.postgresql import ExcludeConstraint
from sqlalchemy.dialects.postgresql.base import PGDialect

from kestra.base import SETTING, SYSTEM_ROLE, TENANT_ROLE, tenancy_of, tenant_key
from kestra.errors import KestraError

ROWS: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")
"""All that is ever granted. TRUNCATE, REFERENCES and TRIGGER reach rows past the policies."""

MINE: Final = f"(SELECT nullif(current_setting('{SETTING}', true), '')::uuid)"
"""The client of the transaction, or NULL; a sub-select, so that it is evaluated once per query."""

_MINE_PRINTED: Final = f"( SELECT (NULLIF(current_setting('{SETTING}'::text, true), ''::text))::uuid AS \"nullif\")"
"""`MINE` as PostgreSQL prints it back, the same from 15 to 18. Nothing else is printed so."""

_MY_ROWS: Final = re.compile(rf'\(((?:\w+|"(?:[^"]|"")+") = {re.escape(MINE)})\)')

_quote: Final = PGDialect().identifier_preparer.quote  # type: ignore[no-untyped-call]  # SQLAlchemy's

Statement = tuple[str, ...]
"""One statement of SQL, in the parts that a revision writes on lines of their own."""


# --- facts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Protection:
    """Row level security is on for a table (ENABLE), and for the owner of the table too (FORCE)."""

    table: str
    mode: Literal["ENABLE", "FORCE"]

    def __str__(self) -> str:
        """As ALTER TABLE says it."""
        return f"{self.mode} ROW LEVEL SECURITY"


@dataclass(frozen=True, slots=True, order=True)
class Policy:
    """Which rows some roles may see (`using`) and write (`with_check`) in a table; "" where there is no such part."""

    table: str
    name: str
    roles: tuple[str, ...]
    using: str
    with_check: str
    command: str = "ALL"
    permissive: bool = True

    @property
    def parts(self) -> Statement:
        """What comes after the name of the table in CREATE POLICY."""
        kind = "" if self.permissive else "AS RESTRICTIVE "
        using = (f"USING ({self.using})",) if self.using else ()
        with_check = (f"WITH CHECK ({self.with_check})",) if self.with_check else ()
        return (f"{kind}FOR {self.command} TO {', '.join(map(_role, self.roles))}", *using, *with_check)

    def __str__(self) -> str:
        """The whole policy, on one line."""
        return f"POLICY {_quote(self.name)} {' '.join(self.parts)}"


@dataclass(frozen=True, slots=True, order=True)
class Grant:
    """One right of one role on a table, a column or a sequence of it.

    `privilege` and `target` are written as in GRANT: `SELECT`, `SELECT (reason)`; `clients`, `SEQUENCE clients_id_seq`.
    """

    table: str
    target: str
    role: str
    privilege: str
    grantable: bool = False

    def __str__(self) -> str:
        """The GRANT that makes it."""
        return " ".join(_grants([self])[0])


Fact = Protection | Policy | Grant


@dataclass(frozen=True, slots=True)
class Security:
    """Which tables there are, and their row level security."""

    tables: frozenset[str]
    facts: frozenset[Fact]


@dataclass(frozen=True, slots=True)
class Drift:
    """What a table lacks, and what it has that is not declared. A change of a policy is both."""

    table: str
    missing: frozenset[Fact]
    extra: frozenset[Fact]

    @property
    def findings(self) -> list[str]:
        """A line for each fact."""
        return [*_what_is_extra(self.table, self.extra), *_what_is_missing(self.table, self.missing)]


def declared(metadata: MetaData) -> Security:
    """What the tables must have, derived from where their tenant key is.

    A table whose tenant key is its primary key and refers to nothing is the table of the clients itself: tenants read
    and change their own row, and neither add nor remove it. A table without a tenant key is open to system transactions
    alone, unless it is declared `GLOBAL`: then tenants read it.
    """
    facts = {fact for table in metadata.tables.values() for fact in _facts(table)}
    return Security(tables=frozenset(table.name for table in metadata.tables.values()), facts=frozenset(facts))


def _facts(table: Table) -> Iterator[Fact]:
    name, key = table.name, tenant_key(table)
    tenant: tuple[str, ...] = ()
    yield Protection(name, "ENABLE")
    yield Protection(name, "FORCE")
    yield Policy(name, SYSTEM_ROLE, (SYSTEM_ROLE,), "true", "true")
    if key is not None:
        mine = f"{_quote(key.name)} = {MINE}"
        yield Policy(name, TENANT_ROLE, (TENANT_ROLE,), mine, mine)
        tenant = ("SELECT", "UPDATE") if _is_clients(table, key) else ROWS
    elif tenancy_of(table) == "global":
        yield Policy(name, TENANT_ROLE, (TENANT_ROLE,), "true", "", "SELECT")
        tenant = ("SELECT",)
    for role, privileges in ((SYSTEM_ROLE, ROWS), (TENANT_ROLE, tenant)):
        yield from (Grant(name, _quote(name), role, privilege) for privilege in privileges)
        if "INSERT" in privileges:
            yield from (Grant(name, f"SEQUENCE {_quote(s)}", role, "USAGE") for s in _sequences(table))


def _is_clients(table: Table, key: Column[Any]) -> bool:
    return [*table.primary_key.columns] == [key] and not key.foreign_keys


def _sequences(table: Table) -> list[str]:
    """The names that PostgreSQL gives to the sequences of a table: shortened, so that they fit."""
    counted = (column for column in table.columns if column is table.autoincrement_column or column.identity)
    return [_sequence(table.name, column.name) for column in counted]


def _sequence(table: str, column: str) -> str:
    longest = 63 - len("__seq")
    while len((table + column).encode()) > longest:
        if len(table.encode()) > len(column.encode()):
            table = table[:-1]
        else:
            column = column[:-1]
    return f"{table}_{column}_seq"


def actual(connection: Connection, metadata: MetaData) -> Security:
    """What the tables of this metadata have in the database. Grants are those of everybody but the tables' owners."""
    return _read(connection, [table.name for table in metadata.tables.values()])


def drift(wanted: Security, found: Security) -> list[Drift]:
    """The tables whose row level security is not what is declared; all of it is missing where there is no table."""
    missing, extra = _by_table(wanted.facts - found.facts), _by_table(found.facts - wanted.facts)
    return [
        Drift(table, missing[table], extra[table])
        for table in sorted(wanted.tables | found.tables)
        if missing[table] or extra[table]
    ]


def hiding(connection: Connection, metadata: MetaData) -> list[str]:
    """What could hide rows from system sessions: policies that are missing or narrow it, a line for each."""
    findings: list[str] = []
    for table in drift(declared(metadata), actual(connection, metadata)):
        missing = {fact for fact in table.missing if isinstance(fact, Policy) and SYSTEM_ROLE in fact.roles}
        narrowing = {fact for fact in table.extra if isinstance(fact, Policy) and not fact.permissive}
        findings += Drift(table.table, frozenset(missing), frozenset(narrowing)).findings
    return findings


def _by_table(facts: Iterable[Fact]) -> defaultdict[str, frozenset[Fact]]:
    result: defaultdict[str, frozenset[Fact]] = defaultdict(frozenset)
    for fact in facts:
        result[fact.table] |= {fact}
    return result


def _what_is_missing(table: str, facts: Iterable[Fact]) -> list[str]:
    return [f"{table} lacks {fact}" for fact in sorted(map(str, facts))]


def _what_is_extra(table: str, facts: Iterable[Fact]) -> list[str]:
    return [f"{table} has {fact}, which is not declared" for fact in sorted(map(str, facts))]


# --- what a model can get wrong ---------------------------------------------------------------------------------------


def mistakes(metadata: MetaData) -> list[str]:
    """What is wrong with the tables themselves, whatever a database has: a line for each, saying what to write."""
    return [mistake for table in metadata.tables.values() for mistake in _mistakes(table)]


def _mistakes(table: Table) -> Iterator[str]:
    if table.schema is not None:
        yield f"{table.fullname} names a schema, where nothing protects it: leave the schema to the search path."
    key = tenant_key(table)
    if key is None:
        if tenancy_of(table) is None:
            yield (
                f"{table.name} is neither tenant-owned nor declared: derive its model from TenantOwned, or put "
                "SYSTEM_ONLY (no client sees it) or GLOBAL (every client reads it) of kestra.base into its "
                "__table_args__."
            )
        return
    if key.nullable:
        yield f"{table.name}.{key.name} may be NULL: a row of a tenant table always has a client."
    if not _is_clients(table, key):
        for name in _keys_without(table, key):
            yield _crosses(table.name, name, key.name)
    for constraint in table.foreign_key_constraints:
        if not _stays_with_the_client(constraint, key):
            name = f"the foreign key ({', '.join(constraint.column_keys)}) to {constraint.referred_table.name}"
            yield _crosses(table.name, name, key.name)


def _crosses(table: str, name: str, key: str) -> str:
    return (
        f"{table}: {name} does not include {key}. Keys are checked across row level security, so one client would meet "
        f"what another has: put {key} into it."
    )


def _keys_without(table: Table, key: Column[Any]) -> Iterator[str]:
    for constraint in sorted(table.constraints, key=lambda one: str(one.name)):
        if isinstance(constraint, PrimaryKeyConstraint):
            scoped, kind = key in [*constraint.columns] or not constraint.columns, "the primary key"
        elif isinstance(constraint, UniqueConstraint):
            scoped, kind = key in [*constraint.columns], "the unique constraint"
        elif isinstance(constraint, ExcludeConstraint):
            scoped, kind = constraint.operators.get(key.name) == "=", "the exclusion constraint"
        else:
            continue
        if not scoped:
            yield f"{kind} {constraint.name}"
    for index in sorted(table.indexes, key=lambda one: str(one.name)):
        if index.unique and not any(expression is key for expression in index.expressions):
            yield f"the unique index {index.name}"


def _stays_with_the_client(constraint: ForeignKeyConstraint, key: Column[Any]) -> bool:
    theirs = tenant_key(constraint.referred_table)
    return theirs is None or any(one.parent is key and one.column is theirs for one in constraint.elements)


def crossing_keys(connection: Connection, metadata: MetaData) -> list[str]:
    """The keys in the database that cross clients, whatever the models say; Alembic compares no primary keys."""
    keys = {table: key for table in metadata.tables.values() if (key := tenant_key(table)) is not None}
    parameters = {
        "tables": [table.name for table in keys],
        "columns": [key.name for key in keys.values()],
        "roots": [_is_clients(table, key) for table, key in keys.items()],
    }
    return [
        _crosses(table, f"the {'foreign key' if is_foreign else 'unique key'} {name}", key)
        for table, name, key, is_foreign in connection.execute(_CROSSING, parameters)
    ]


# --- SQL --------------------------------------------------------------------------------------------------------------


def _role(name: str) -> str:
    return name if name == "PUBLIC" else _quote(name)


def _make(facts: Iterable[Fact]) -> list[Statement]:
    """The statements that make the facts true."""
    facts = sorted(facts, key=str)
    statements = _switch(facts, {"ENABLE": "ENABLE", "FORCE": "FORCE"})
    for fact in facts:
        if isinstance(fact, Policy):
            head, *parts = fact.parts
            statements.append((f"CREATE POLICY {_quote(fact.name)} ON {_quote(fact.table)} {head}", *parts))
    return statements + _grants(facts)


def _unmake(facts: Iterable[Fact]) -> list[Statement]:
    """The statements that make the facts false."""
    facts = sorted(facts, key=str)
    statements = _grants(facts, "REVOKE", "FROM")
    statements += [
        (f"DROP POLICY {_quote(fact.name)} ON {_quote(fact.table)}",) for fact in facts if isinstance(fact, Policy)
    ]
    return statements + _switch(facts, {"ENABLE": "DISABLE", "FORCE": "NO FORCE"})


def _switch(facts: Iterable[Fact], words: dict[str, str]) -> list[Statement]:
    modes: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        if isinstance(fact, Protection):
            modes[fact.table].append(f"{words[fact.mode]} ROW LEVEL SECURITY")
    return [(f"ALTER TABLE {_quote(table)} {', '.join(actions)}",) for table, actions in modes.items()]


def _grants(facts: Iterable[Fact], verb: str = "GRANT", preposition: str = "TO") -> list[Statement]:
    """As few statements as say it: the privileges of a role together, then the roles that have the same."""
    privileges: dict[tuple[str, str, bool], list[str]] = defaultdict(list)
    for fact in facts:
        if isinstance(fact, Grant):
            privileges[fact.target, fact.role, fact.grantable].append(fact.privilege)
    roles: dict[tuple[str, tuple[str, ...], bool], list[str]] = defaultdict(list)
    for (target, role, grantable), granted in privileges.items():
        roles[target, tuple(sorted(granted, key=_order)), grantable].append(_role(role))
    return [
        (
            f"{verb} {', '.join(granted)} ON {target} {preposition} {', '.join(to)}"
            + (" WITH GRANT OPTION" if grantable and verb == "GRANT" else ""),
        )
        for (target, granted, grantable), to in roles.items()
    ]


def _order(privilege: str) -> tuple[int, str]:
    return (ROWS.index(privilege) if privilege in ROWS else len(ROWS), privilege)


# --- the catalog ------------------------------------------------------------------------------------------------------


def _read(connection: Connection, names: Iterable[str]) -> Security:
    tables = {"tables": sorted(names)}
    facts: set[Fact] = set()
    present: set[str] = set()
    if not tables["tables"]:
        return Security(frozenset(), frozenset())
    for table, enabled, forced in connection.execute(_PROTECTIONS, tables):
        present.add(table)
        facts |= {Protection(table, "ENABLE")} if enabled else set()
        facts |= {Protection(table, "FORCE")} if forced else set()
    for table, name, roles, using, check, command, permissive in connection.execute(_POLICIES, tables):
        to = tuple(sorted("PUBLIC" if role == "public" else role for role in roles))
        facts.add(Policy(table, name, to, _as_written(using), _as_written(check), command, permissive))
    for table, kind, target, role, privilege, column, grantable in connection.execute(_GRANTS, tables):
        on = f"SEQUENCE {_quote(target)}" if kind == "S" else _quote(target)
        what = privilege if column is None else f"{privilege} ({_quote(column)})"
        facts.add(Grant(table, on, role, what, grantable))
    return Security(tables=frozenset(present), facts=frozenset(facts))


def _as_written(printed: str | None) -> str:
    """An expression that PostgreSQL printed, with what we declare in the form in which we write it."""
    expression = (printed or "").replace(_MINE_PRINTED, MINE)
    mine = _MY_ROWS.fullmatch(expression)
    return mine.group(1) if mine else expression


_PROTECTIONS: Final = text(
    "SELECT relname, relrowsecurity, relforcerowsecurity FROM pg_class "
    "WHERE relnamespace = quote_ident(current_schema())::regnamespace AND relkind IN ('r', 'p') AND relname IN :tables"
).bindparams(bindparam("tables", expanding=True))

_POLICIES: Final = text(
    "SELECT tablename, policyname, roles, qual, with_check, cmd, permissive = 'PERMISSIVE' FROM pg_policies "
    "WHERE schemaname = current_schema() AND tablename IN :tables"
).bindparams(bindparam("tables", expanding=True))

_GRANTS: Final = text(
    # The tables, and the sequences that belong to their columns …
    "WITH relations AS ("
    "SELECT oid, relname AS owning, relname, relkind, relowner, relacl FROM pg_class "
    "WHERE relnamespace = quote_ident(current_schema())::regnamespace AND relkind IN ('r', 'p') AND relname IN :tables "
    "UNION ALL SELECT s.oid, t.relname, s.relname, s.relkind, s.relowner, s.relacl FROM pg_class t "
    "JOIN pg_depend d ON d.refobjid = t.oid AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') "
    "JOIN pg_class s ON s.oid = d.objid AND d.classid = 'pg_class'::regclass AND s.relkind = 'S' "
    "WHERE t.relnamespace = quote_ident(current_schema())::regnamespace AND t.relkind IN ('r', 'p') "
    "AND t.relname IN :tables), "
    # … with their access lists, and those of single columns.
    "lists AS (SELECT owning, relname, relkind, relowner, relacl AS list, NULL AS attname FROM relations "
    "UNION ALL SELECT owning, relname, relkind, relowner, attacl, attname FROM relations "
    "JOIN pg_attribute ON attrelid = oid WHERE NOT attisdropped) "
    "SELECT owning, relkind, relname, coalesce(rolname, 'PUBLIC'), privilege_type, attname, is_grantable "
    "FROM lists CROSS JOIN LATERAL aclexplode(list) LEFT JOIN pg_roles r ON r.oid = grantee WHERE grantee <> relowner"
).bindparams(bindparam("tables", expanding=True))

_CROSSING: Final = text(
    "WITH keys AS (SELECT t.oid, t.relname, a.attname, a.attnum, is_root "
    "FROM unnest(CAST(:tables AS text[]), CAST(:columns AS text[]), CAST(:roots AS boolean[])) k(name, key, is_root) "
    "JOIN pg_class t ON t.relname = name AND t.relnamespace = quote_ident(current_schema())::regnamespace "
    "JOIN pg_attribute a ON a.attrelid = t.oid AND a.attname = key) "
    "SELECT relname, indexrelid::regclass::text, attname, false FROM keys JOIN pg_index ON indrelid = oid "
    "WHERE indisunique AND NOT is_root AND attnum <> ALL ((indkey::smallint[])[0:indnkeyatts - 1]) "
    "UNION ALL SELECT mine.relname, conname, mine.attname, true FROM keys mine "
    "JOIN pg_constraint ON conrelid = mine.oid AND contype = 'f' JOIN keys theirs ON theirs.oid = confrelid "
    "WHERE NOT EXISTS (SELECT FROM unnest(conkey, confkey) pair(here, there) "
    "WHERE here = mine.attnum AND there = theirs.attnum) ORDER BY 1, 2"
)


# --- Alembic ----------------------------------------------------------------------------------------------------------


class SecurityOp(MigrateOperation):
    """A step of a revision that changes the row level security of one table; it keeps the SQL of both directions."""

    def __init__(
        self, table: str, findings: Iterable[str], upgrade: Iterable[Statement], downgrade: Iterable[Statement]
    ) -> None:
        self.table = table
        self.findings = tuple(findings)
        self.statements = tuple(upgrade)
        self.undo = tuple(downgrade)

    def reverse(self) -> "SecurityOp":
        """The step of the downgrade."""
        return SecurityOp(self.table, self.findings, self.undo, self.statements)

    def to_diff_tuple(self) -> tuple[str, str, tuple[str, ...]]:
        """What `alembic check` shows."""
        return ("row_level_security", self.table, self.findings)


@renderers.dispatch_for(SecurityOp)
def _render(context: AutogenContext, operation: SecurityOp) -> list[str]:
    """Plain SQL: a revision imports nothing of this package."""
    prefix = context.opts["alembic_module_prefix"]
    return [f"{prefix}execute({_literal(statement)})" for statement in operation.statements]


def _literal(statement: Statement) -> str:
    # Alembic reads a colon before a name as a parameter.
    escaped = [re.sub(r"(?<![:\w\\]):(?=\w)", r"\\:", part) for part in statement]
    spaced = [f"{part} " for part in escaped[:-1]] + escaped[-1:]
    return "\n".join(json.dumps(part, ensure_ascii=False) for part in spaced)


def _compare(context: AutogenContext, upgrade_ops: UpgradeOps) -> PriorityDispatchResult:
    """Add to the tables that were compared what their row level security needs.

    What is not declared goes first and comes back last in a downgrade, so that a column may go whose policy goes with
    it. A table that is made takes its policies and grants along when it is dropped, whichever direction that is.

    Raises:
        CommandError: A table is neither tenant-owned nor declared, has two owners, or one of its keys crosses clients.
    """
    connection, metadata = context.connection, context.metadata
    if connection is None or not isinstance(metadata, MetaData):
        raise CommandError("Row level security is compared on one connection and for one MetaData.")
    try:
        wrong = mistakes(metadata)
    except KestraError as error:
        wrong = [str(error)]
    if wrong:
        raise CommandError("\n".join(wrong))
    made = {operation.table_name for operation in upgrade_ops.ops if isinstance(operation, CreateTableOp)}
    dropped = {operation.table_name for operation in upgrade_ops.ops if isinstance(operation, DropTableOp)}
    before: list[MigrateOperation] = [
        SecurityOp(table, ["goes with the table"], (), _make(facts))
        for table, facts in sorted(_by_table(_read(connection, dropped).facts).items())
    ]
    after: list[MigrateOperation] = []
    for table in drift(declared(metadata), actual(connection, metadata)):
        if table.extra:
            before.append(
                SecurityOp(
                    table.table, _what_is_extra(table.table, table.extra), _unmake(table.extra), _make(table.extra)
                )
            )
        if table.missing:
            undo = [] if table.table in made else _unmake(table.missing)
            after.append(
                SecurityOp(table.table, _what_is_missing(table.table, table.missing), _make(table.missing), undo)
            )
    upgrade_ops.ops[:] = [*before, *upgrade_ops.ops, *after]
    return PriorityDispatchResult.CONTINUE


PLUGIN: Final = "kestra.rls"
"""The name for `autogenerate_plugins`. Importing this module registers it."""

Plugin(PLUGIN).add_autogenerate_comparator(_compare, "autogenerate", priority=DispatchPriority.LAST)
