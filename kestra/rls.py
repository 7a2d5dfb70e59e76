"""Row level security as data: what every table of a metadata must have, and what a database has.

Two roles. A tenant transaction runs as `kestra_tenant` with the client in the setting `kestra.client_id`; a system
transaction runs as `kestra_system`. Each table has one policy for each role that may see it, named like the role.
"""

import re
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, MetaData, Table, bindparam, text

from kestra.base import tenant_key

TENANT_ROLE: Final = "kestra_tenant"
SYSTEM_ROLE: Final = "kestra_system"
SETTING: Final = "kestra.client_id"

ROWS: Final = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE"})
"""All that is ever granted. TRUNCATE, REFERENCES and TRIGGER reach rows past the policies."""

MINE: Final = f"(SELECT nullif(current_setting('{SETTING}', true), '')::uuid)"
"""The client of the transaction, or NULL; a sub-select, so that it is evaluated once per query."""


@dataclass(frozen=True, slots=True, order=True)
class Policy:
    """Which rows a role may see (`using`) and write (`with_check`) in a table."""

    table: str
    name: str
    role: str
    using: str
    with_check: str
    command: str = "ALL"
    permissive: bool = True


@dataclass(frozen=True, slots=True, order=True)
class Grant:
    """One right of one role on a table, a column (`table.column`) or a sequence. PUBLIC is a role here."""

    relation: str
    role: str
    privilege: str


@dataclass(frozen=True, slots=True)
class Security:
    """The row level security of some tables: which are protected, the policies and the grants."""

    enabled: frozenset[str]
    forced: frozenset[str]
    policies: frozenset[Policy]
    grants: frozenset[Grant]


def declared(metadata: MetaData) -> Security:
    """What the tables must have, derived from where their tenant key is.

    A table whose tenant key is its primary key is the table of the clients itself: tenants read and change their own
    row, and neither add nor remove it. A table without a tenant key is open to system transactions alone.
    """
    names = frozenset(metadata.tables)
    policies: set[Policy] = set()
    grants: set[Grant] = set()
    for table in metadata.tables.values():
        policies.add(Policy(table.name, SYSTEM_ROLE, SYSTEM_ROLE, "true", "true"))
        grants.update(Grant(table.name, SYSTEM_ROLE, privilege) for privilege in ROWS)
        sequence = _sequence(table)
        if sequence is not None:
            grants.add(Grant(sequence, SYSTEM_ROLE, "USAGE"))
        key = tenant_key(table)
        if key is None:
            continue
        mine = _normal(f"{key.name} = {MINE}")
        policies.add(Policy(table.name, TENANT_ROLE, TENANT_ROLE, mine, mine))
        rights = {"SELECT", "UPDATE"} if _is_clients(table) else ROWS
        grants.update(Grant(table.name, TENANT_ROLE, privilege) for privilege in rights)
        if sequence is not None:
            grants.add(Grant(sequence, TENANT_ROLE, "USAGE"))
    return Security(enabled=names, forced=names, policies=frozenset(policies), grants=frozenset(grants))


def actual(connection: Connection, metadata: MetaData) -> Security:
    """What the tables of this metadata have in the database. Grants are those of everybody but the tables' owners."""
    tables = {"tables": sorted(metadata.tables)}
    flags = connection.execute(_FLAGS, tables).all()
    policies = connection.execute(_POLICIES, tables).all()
    grants = connection.execute(_GRANTS, tables).all()
    return Security(
        enabled=frozenset(name for name, enabled, _ in flags if enabled),
        forced=frozenset(name for name, _, forced in flags if forced),
        policies=frozenset(
            Policy(table, name, role, _normal(using), _normal(check), command, permissive)
            for table, name, role, using, check, command, permissive in policies
        ),
        grants=frozenset(Grant(relation, role, privilege) for relation, role, privilege in grants),
    )


def _is_clients(table: Table) -> bool:
    key = tenant_key(table)
    return key is not None and [column.name for column in table.primary_key] == [key.name]


def _sequence(table: Table) -> str | None:
    column = table.autoincrement_column
    return None if column is None else f"{table.name}_{column.name}_seq"


def _normal(expression: str | None) -> str:
    """An expression as the server prints it back, and as we write it, in one form.

    Parentheses and casts that the server adds say nothing here: no declared expression needs them to be understood.
    """
    bare = re.sub(r'::text|\bAS "?\w+"?|[()\s]', "", expression or "")
    return bare.lower()


_FLAGS = text(
    "SELECT c.relname, c.relrowsecurity, c.relforcerowsecurity FROM pg_class c "
    "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = current_schema() AND c.relname IN :tables"
).bindparams(bindparam("tables", expanding=True))

_POLICIES = text(
    "SELECT p.tablename, p.policyname, role, p.qual, p.with_check, p.cmd, p.permissive = 'PERMISSIVE' "
    "FROM pg_policies p, unnest(p.roles) AS role WHERE p.schemaname = current_schema() AND p.tablename IN :tables"
).bindparams(bindparam("tables", expanding=True))

_GRANTS = text(
    # On tables, and on the sequences that belong to them …
    "SELECT c.relname, coalesce(r.rolname, 'PUBLIC'), a.privilege_type FROM pg_class c "
    "JOIN pg_namespace n ON n.oid = c.relnamespace "
    "CROSS JOIN LATERAL aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee "
    "LEFT JOIN pg_depend d ON d.objid = c.oid AND d.classid = 'pg_class'::regclass "
    "AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') "
    "LEFT JOIN pg_class o ON o.oid = d.refobjid "
    "WHERE n.nspname = current_schema() AND a.grantee <> c.relowner "
    "AND (c.relkind IN ('r', 'p') AND c.relname IN :tables OR c.relkind = 'S' AND o.relname IN :tables) "
    # … and on single columns.
    "UNION SELECT c.relname || '.' || t.attname, coalesce(r.rolname, 'PUBLIC'), a.privilege_type FROM pg_class c "
    "JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute t ON t.attrelid = c.oid "
    "CROSS JOIN LATERAL aclexplode(t.attacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee "
    "WHERE n.nspname = current_schema() AND a.grantee <> c.relowner AND c.relname IN :tables"
).bindparams(bindparam("tables", expanding=True))
