"""Row level security.

Two roles that cannot log in: a transaction switches to one of them. `kestra_tenant` sees the rows of
the client in the setting `kestra.client_id`, `kestra_system` sees all, nobody else anything. ENABLE + FORCE, so that it
holds for the tables' owner too. The roles belong to the cluster, so the downgrade leaves them; other databases may
use them.

Locks: ACCESS EXCLUSIVE on each table for a moment; nothing is scanned.
"""

from collections.abc import Sequence

import psycopg
from alembic import op
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

revision: str = "0003"
down_revision: str | Sequence[str] | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TENANT = "kestra_tenant"
SYSTEM = "kestra_system"
ROLES = (TENANT, SYSTEM)

TENANT_KEYS = {
    "clients": "id",
    "active_conversations": "client_id",
    "chat_messages": "client_id",
    "client_files": "client_id",
}
TABLES = (*TENANT_KEYS, "orphaned_rows")
SEQUENCES = {"chat_messages_id_seq": ROLES, "orphaned_rows_id_seq": (SYSTEM,)}

MY_CLIENT = "(SELECT nullif(current_setting('kestra.client_id', true), '')::uuid)"
"""Evaluated once per query. A setting that was SET LOCAL earlier on the connection reads '' later, hence nullif."""

INHERITABLE_MEMBERSHIP = 160_000
"""The server version from which a membership says by itself whether it is inherited."""

ATTEMPTS = 5


def _scalar(statement: str, **parameters: object) -> object:
    return op.get_bind().execute(text(statement), parameters).scalar()


def _is_true(expression: str, **parameters: object) -> bool:
    return _scalar(f"SELECT {expression}", **parameters) is True


def _run(statement: str) -> None:
    op.get_bind().exec_driver_sql(statement)


def _tell(line: str) -> None:
    config = op.get_context().config
    if config is not None:
        config.print_stdout(line)


def _me() -> str:
    return str(_scalar("SELECT quote_ident(current_user)"))


def _server_version() -> int:
    return int(str(_scalar("SELECT current_setting('server_version_num')")))


def _schema() -> str:
    return str(_scalar("SELECT quote_ident(current_schema())"))


def _is_superuser() -> bool:
    return _is_true("rolsuper FROM pg_roles WHERE rolname = current_user")


def _knows_inherit_option() -> bool:
    return _server_version() >= INHERITABLE_MEMBERSHIP


# --- what an administrator may have to do -----------------------------------------------------------------------------


def _create_role(role: str) -> str:
    return f"CREATE ROLE {role} NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE NOREPLICATION"


def _grant_membership(role: str) -> str:
    option = " WITH INHERIT FALSE, SET TRUE" if _knows_inherit_option() else ""
    return f"GRANT {role} TO {_me()}{option}"


def _stop_inheriting() -> list[str]:
    if _knows_inherit_option():
        return [_grant_membership(role) for role in ROLES]
    # A database's owner has its rights on the schema `public` by inheritance too, so it gets them for itself first.
    return [f"GRANT USAGE, CREATE ON SCHEMA {_schema()} TO {_me()}", f"ALTER ROLE {_me()} NOINHERIT"]


def _ask_administrator(statements: list[str], why: str) -> CommandError:
    script = "".join(f"\n    {statement};" for statement in statements)
    return CommandError(
        f"Revision 0003 stopped, nothing was changed: {why} An administrator has to run this once, on this server:\n"
        f"{script}\n\nThen run the same command again."
    )


# --- roles ------------------------------------------------------------------------------------------------------------


def _role_exists(role: str) -> bool:
    return _is_true("EXISTS (SELECT FROM pg_roles WHERE rolname = :role)", role=role)


def _can_switch_to(role: str) -> bool:
    privilege = "SET" if _knows_inherit_option() else "MEMBER"
    return _is_true("pg_has_role(current_user, :role, :privilege)", role=role, privilege=privilege)


def _inherits(role: str) -> bool:
    return _is_true("pg_has_role(current_user, :role, 'USAGE')", role=role)


def _inherits_at_all() -> bool:
    return _is_true("rolinherit FROM pg_roles WHERE rolname = current_user")


def _may_still_migrate() -> bool:
    return _is_true(
        "has_schema_privilege(current_user, current_schema(), 'CREATE') "
        "AND bool_and(pg_has_role(current_user, relowner, 'USAGE')) FROM pg_class WHERE relname = ANY(:tables) "
        "AND relnamespace = quote_ident(current_schema())::regnamespace",
        tables=list(TABLES),
    )


def _attempt(statement: str) -> psycopg.Error | None:
    """Run in a savepoint; what the server refused, or None."""
    try:
        with op.get_bind().begin_nested():
            _run(statement)
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.Error):
            return error.orig
        raise
    return None


def _missing_statements() -> list[str]:
    statements = [_create_role(role) for role in ROLES if not _role_exists(role)]
    if _is_superuser():
        return statements
    statements += [_grant_membership(role) for role in ROLES if not _role_exists(role) or not _can_switch_to(role)]
    return statements


def _prepare_roles() -> None:
    """Make the roles and the membership that are missing. Another database of the cluster may be doing the same."""
    for _ in range(ATTEMPTS):
        missing = _missing_statements()
        if not missing:
            return
        for statement in missing:
            refused = _attempt(statement)
            if isinstance(refused, psycopg.errors.InsufficientPrivilege):
                why = f"the roles of row level security are missing, and {_me()} may not make or grant them."
                if not _knows_inherit_option() and _inherits_at_all():
                    missing += _stop_inheriting()
                raise _ask_administrator(missing, why)
            if refused is not None:
                break  # somebody else was faster (42710, 23505, XX000): look again
    raise CommandError("Revision 0003 stopped, nothing was changed: the roles keep changing. Try again in a minute.")


def _refuse_powerful_roles() -> None:
    for role in ROLES:
        if _is_true("rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = :role", role=role):
            raise _ask_administrator(
                [f"ALTER ROLE {role} NOSUPERUSER NOBYPASSRLS"], f"the role {role} could bypass row level security."
            )
    groups = (
        op.get_bind()
        .execute(
            text(
                "SELECT quote_ident(r.rolname) FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid "
                "JOIN pg_roles t ON t.oid = m.member WHERE t.rolname = :role"
            ),
            {"role": TENANT},
        )
        .scalars()
    )
    revokes = [f"REVOKE {group} FROM {TENANT}" for group in groups]
    if revokes:
        raise _ask_administrator(
            revokes, f"{TENANT} is a member of another role, whose rights every client would have."
        )


def _stop_inheritance() -> None:
    """A policy also applies to members that inherit the role: they would see every row before they switch."""
    if _is_superuser() or not any(map(_inherits, ROLES)):
        return
    remedy = _stop_inheriting()
    savepoint = op.get_bind().begin_nested()
    try:
        for statement in remedy:
            _run(statement)
        stopped = not any(map(_inherits, ROLES)) and _may_still_migrate()
    except DBAPIError:
        stopped = False
    if stopped:
        savepoint.commit()
    else:
        savepoint.rollback()
        script = "; ".join(remedy)
        _tell(
            f"WARNING: {_me()} inherits the rights of {' and '.join(ROLES)}, so what it does without switching its "
            f"role is not limited to one client. An administrator can end that with: {script};"
        )


# --- policies and grants ----------------------------------------------------------------------------------------------


def _protect(table: str) -> None:
    _run(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    _run(f"REVOKE ALL ON {table} FROM PUBLIC, {TENANT}, {SYSTEM}")
    for role in ROLES:
        _run(f"DROP POLICY IF EXISTS {role} ON {table}")
    _run(f"CREATE POLICY {SYSTEM} ON {table} FOR ALL TO {SYSTEM} USING (true) WITH CHECK (true)")
    _run(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {SYSTEM}")
    key = TENANT_KEYS.get(table)
    if key is not None:
        mine = f"{key} = {MY_CLIENT}"
        _run(f"CREATE POLICY {TENANT} ON {table} FOR ALL TO {TENANT} USING ({mine}) WITH CHECK ({mine})")
        rights = "SELECT, UPDATE" if table == "clients" else "SELECT, INSERT, UPDATE, DELETE"
        _run(f"GRANT {rights} ON {table} TO {TENANT}")


def _open_schema() -> None:
    grant = f"GRANT USAGE ON SCHEMA {_schema()} TO {TENANT}, {SYSTEM}"
    _attempt(grant)  # on a server the schema may belong to somebody else, and be open to all anyway
    if not all(_is_true("has_schema_privilege(:role, current_schema(), 'USAGE')", role=role) for role in ROLES):
        raise _ask_administrator([grant], f"the roles may not use the schema, and {_me()} may not let them.")


def upgrade() -> None:
    """Make the roles where they are missing, then protect every table."""
    _prepare_roles()
    _refuse_powerful_roles()
    _stop_inheritance()
    _open_schema()
    for table in TABLES:
        _protect(table)
        with op.get_context().autocommit_block():
            pass  # never hold one table's lock while waiting for another's
    for sequence, roles in SEQUENCES.items():
        _run(f"REVOKE ALL ON SEQUENCE {sequence} FROM PUBLIC, {TENANT}, {SYSTEM}")
        _run(f"GRANT USAGE ON SEQUENCE {sequence} TO {', '.join(roles)}")
    _run(f"GRANT SELECT ON alembic_version TO {SYSTEM}")  # a program compares the revision with its own


def downgrade() -> None:
    """Take policies and grants away. The roles stay: they belong to the cluster, not to this database."""
    for table in TABLES:
        for role in ROLES:
            _run(f"DROP POLICY IF EXISTS {role} ON {table}")
        _run(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY")
        _run(f"REVOKE ALL ON {table} FROM {TENANT}, {SYSTEM}")
    for sequence in SEQUENCES:
        _run(f"REVOKE ALL ON SEQUENCE {sequence} FROM {TENANT}, {SYSTEM}")
    _run(f"REVOKE ALL ON alembic_version FROM {SYSTEM}")
    _run(f"REVOKE ALL ON SCHEMA {_schema()} FROM {TENANT}, {SYSTEM}")
