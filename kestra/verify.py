"""What is wrong with a database for the user who is about to work with it: the findings of `Database.verify`.

Alembic's check compares tables with models, whoever runs it. This adds what depends on the connection: who logs in,
what that user has and may become, and what leads around the policies.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, Engine, NullPool, bindparam, create_engine, event, func, select, text
from sqlalchemy.orm import Session

import kestra.models  # noqa: F401 - fills the metadata
from kestra import migrate, rls
from kestra.base import SYSTEM_ROLE, TENANT_ROLE, Base, tenancy_of
from kestra.driver import PooledConnection, translate
from kestra.session import SystemSession, TenantSession

_INHERIT_OPTION: Final = 160_000
"""The server version from which a membership says by itself whether it is inherited, and whether one may switch."""

_NO_CLIENT: Final = UUID(int=0)


def findings(url: str, options: Mapping[str, Any]) -> list[str]:
    """Every reason why this database does not keep clients apart for the user of the URL, a line for each.

    Args:
        url: A libpq URL.
        options: What connections of the application are opened with.
    """
    options = {**options, "autocommit": False}
    with _engine("psycopg", url, options).connect() as connection:
        roles = [*connection.scalars(_ROLES, {"roles": (TENANT_ROLE, SYSTEM_ROLE)})]
        usable = [role for role in roles if _may_become(connection, role)]
        return [
            *(f"The role {role} does not exist: run `kestra upgrade`." for role in _lacking(roles)),
            *(finding for role in roles for finding in _of_the_login(connection, role)),
            *(finding for role in usable for finding in _of_a_session(connection, role, url, options)),
            *(finding for role in roles for finding in _of_a_role(connection, role)),
            *rls.mistakes(Base.metadata),
            *_of_the_tables(connection),
            *(_ways_around(connection) if TENANT_ROLE in roles else ()),
            *_of_the_revision(connection, can_switch=SYSTEM_ROLE in usable),
        ]


def _engine(driver: str, url: str, options: Mapping[str, Any]) -> Engine:
    engine = create_engine(
        f"postgresql+{driver}://",
        creator=lambda: PooledConnection.connect(url, **options),
        poolclass=NullPool,
        hide_parameters=True,
        use_native_hstore=False,
    )
    event.listen(engine, "handle_error", translate, retval=True)
    return engine


# --- roles ------------------------------------------------------------------------------------------------------------

_ROLES: Final = text("SELECT rolname FROM pg_roles WHERE rolname IN :roles ORDER BY rolname DESC").bindparams(
    bindparam("roles", expanding=True)
)


def _lacking(roles: list[str]) -> list[str]:
    return [role for role in (TENANT_ROLE, SYSTEM_ROLE) if role not in roles]


def _knows_inherit_option(connection: Connection) -> bool:
    version: str = connection.scalars(text("SELECT current_setting('server_version_num')")).one()
    return int(version) >= _INHERIT_OPTION


def _may_become(connection: Connection, role: str) -> bool:
    privilege = "SET" if _knows_inherit_option(connection) else "MEMBER"
    question = text("SELECT pg_has_role(session_user, :role, :privilege)")
    return connection.scalars(question, {"role": role, "privilege": privilege}).one() is True


def _of_the_login(connection: Connection, role: str) -> Iterator[str]:
    """A superuser may do everything and gives it up when it switches, which is looked at in a session."""
    login, inherits = connection.execute(
        text(
            "SELECT quote_ident(session_user), pg_has_role(session_user, :role, 'USAGE') AND NOT rolsuper "
            "FROM pg_roles WHERE rolname = session_user"
        ),
        {"role": role},
    ).one()
    if _knows_inherit_option(connection):
        remedy = f"GRANT {role} TO {login} WITH INHERIT FALSE, SET TRUE"
    else:
        remedy = f"ALTER ROLE {login} NOINHERIT; GRANT {role} TO {login}"
    if not _may_become(connection, role):
        yield f"The user {login} may not become {role}: {remedy}."
    if inherits:
        yield f"The user {login} inherits the rights of {role}, so it has them before it switches: {remedy}."


def _of_a_session(connection: Connection, role: str, url: str, options: Mapping[str, Any]) -> Iterator[str]:
    engine = _engine(role, url, {**options, "autocommit": True})
    session: Session
    if role == TENANT_ROLE:
        session, kind = TenantSession(engine, client_id=_NO_CLIENT), "tenant"
    else:
        session, kind = SystemSession(engine, reason="verify"), "system"
    with session:
        effective = session.scalars(select(func.current_user())).one()
    if effective != role:
        yield f"A {kind} session runs as {effective} instead of {role}: its transactions do not switch."
        yield from _power(connection, effective)


def _power(connection: Connection, role: str) -> Iterator[str]:
    question = text("SELECT rolsuper, rolbypassrls FROM pg_roles WHERE rolname = :role")
    is_superuser, bypasses = connection.execute(question, {"role": role}).one()
    if is_superuser:
        yield f"{role} is a superuser, whom row level security does not bind: ALTER ROLE {role} NOSUPERUSER."
    if bypasses:
        yield f"{role} may bypass row level security: ALTER ROLE {role} NOBYPASSRLS."


_GROUPS: Final = text(
    "SELECT quote_ident(g.rolname) FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid "
    "JOIN pg_roles r ON r.oid = m.member WHERE r.rolname = :role GROUP BY 1 ORDER BY 1"
)

_OWNED: Final = text(
    "SELECT quote_ident(relname) FROM pg_class JOIN pg_roles r ON r.oid = relowner WHERE rolname = :role "
    "AND relnamespace = quote_ident(current_schema())::regnamespace AND relkind IN ('r', 'p', 'v', 'm') ORDER BY 1"
)


def _of_a_role(connection: Connection, role: str) -> Iterator[str]:
    yield from _power(connection, role)
    for group in connection.scalars(_GROUPS, {"role": role}):
        yield f"{role} is a member of {group}, whose rights it has: REVOKE {group} FROM {role}."
    for relation in connection.scalars(_OWNED, {"role": role}):
        yield f"{role} owns {relation}, so it may change what protects it: make the user of the migrations its owner."


# --- tables, and what leads around them -------------------------------------------------------------------------------


def _of_the_tables(connection: Connection) -> Iterator[str]:
    wanted, found = rls.declared(Base.metadata), rls.actual(connection, Base.metadata)
    for table in sorted(wanted.tables - found.tables):
        yield f"The table {table} does not exist: run `kestra upgrade`."
    for drift in rls.drift(wanted, found):
        if drift.table in found.tables:
            yield from drift.findings
    yield from rls.crossing_keys(connection, Base.metadata)


_READING: Final = """
    WITH RECURSIVE reading AS (
        SELECT oid, relname FROM pg_class
        WHERE relnamespace = quote_ident(current_schema())::regnamespace AND relname IN :tables
        UNION
        SELECT v.oid, v.relname FROM reading JOIN pg_depend d ON d.refobjid = reading.oid
            AND d.refclassid = 'pg_class'::regclass AND d.classid = 'pg_rewrite'::regclass
        JOIN pg_rewrite w ON w.oid = d.objid JOIN pg_class v ON v.oid = w.ev_class AND v.relkind IN ('v', 'm')
    )
"""
"""The tables that are not for everybody, and the views on them, and the views on those."""

_VIEWS: Final = text(
    f"""
    {_READING}
    SELECT v.oid::regclass::text, v.relkind = 'm' FROM reading JOIN pg_class v USING (oid)
    WHERE (v.relkind = 'm' OR v.relkind = 'v' AND NOT EXISTS (
        SELECT FROM pg_options_to_table(v.reloptions) WHERE option_name = 'security_invoker' AND option_value::boolean
    )) AND (
        has_table_privilege(:tenant, v.oid, 'SELECT, INSERT, UPDATE, DELETE')
        OR has_any_column_privilege(:tenant, v.oid, 'SELECT, INSERT, UPDATE')
    ) ORDER BY 1
    """  # noqa: S608 - of constants
).bindparams(bindparam("tables", expanding=True))

_FUNCTIONS: Final = text(
    f"""
    {_READING}
    SELECT p.oid::regprocedure::text FROM pg_proc p
    WHERE p.prosecdef AND p.prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)
    AND p.proowner <> (SELECT oid FROM pg_roles WHERE rolname = :tenant)
    AND p.pronamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
    AND has_function_privilege(:tenant, p.oid, 'EXECUTE')
    AND EXISTS (
        SELECT FROM reading WHERE p.prosrc ~* ('\\m' || regexp_replace(relname, '(\\W)', '\\\\\\1', 'g') || '\\M')
        OR EXISTS (
            SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid
            AND d.refclassid = 'pg_class'::regclass AND d.refobjid = reading.oid
        )
    ) ORDER BY 1
    """  # noqa: S608 - of constants
).bindparams(bindparam("tables", expanding=True))


def _ways_around(connection: Connection) -> Iterator[str]:
    """What tenants may use and what works with the rights of its owner."""
    protected = [table.name for table in Base.metadata.tables.values() if tenancy_of(table) != "global"]
    parameters = {"tables": protected, "tenant": TENANT_ROLE}
    for view, is_materialized in connection.execute(_VIEWS, parameters):
        if is_materialized:
            yield f"The materialized view {view} keeps rows of every client: REVOKE ALL ON {view} FROM {TENANT_ROLE}."
        else:
            yield (
                f"The view {view} shows what its owner sees, whoever reads it: "
                f"ALTER VIEW {view} SET (security_invoker = true)."
            )
    for function in connection.scalars(_FUNCTIONS, parameters):
        yield (
            f"The function {function} works on tables of clients with the rights of its owner: "
            f"ALTER FUNCTION {function} SECURITY INVOKER, or REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC, "
            f"{TENANT_ROLE}."
        )


# --- the revision -----------------------------------------------------------------------------------------------------


def _of_the_revision(connection: Connection, *, can_switch: bool) -> Iterator[str]:
    head = migrate.head()
    if connection.scalars(text("SELECT to_regclass('alembic_version') IS NULL")).one():
        yield f"The schema is at no revision, the code needs {head}: run `kestra upgrade`."
        return
    readers = text(
        "SELECT has_table_privilege(session_user, 'alembic_version', 'SELECT'), "
        "coalesce((SELECT has_table_privilege(oid, 'alembic_version', 'SELECT') "
        "FROM pg_roles WHERE rolname = :role), false)"
    )
    by_login, by_system = connection.execute(readers, {"role": SYSTEM_ROLE}).one()
    if not by_login:
        if not (by_system and can_switch):
            yield f"The revision of the schema cannot be read: GRANT SELECT ON alembic_version TO {SYSTEM_ROLE}."
            return
        connection.execute(text(f"SET LOCAL ROLE {SYSTEM_ROLE}"))
    revisions = [*connection.scalars(text("SELECT version_num FROM alembic_version ORDER BY 1"))]
    if revisions != [head]:
        at = " and ".join(revisions) or "no revision"
        yield f"The schema is at {at}, the code needs {head}: run `kestra upgrade`, or the code of that revision."
