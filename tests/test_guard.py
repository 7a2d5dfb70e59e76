"""What hand-written SQL may not do in a tenant session, even when it is marked."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import extract, func, literal, quoted_name, select, text
from sqlalchemy.sql.functions import Function

from kestra import ChatMessage, Database, TenantSession
from kestra.errors import UnscopedStatement
from kestra.guard import check_raw_sql

REFUSED = [
    "SET ROLE kestra_system",
    "set local role kestra_system",
    "RESET ROLE",
    "reset all",
    "SET SESSION AUTHORIZATION DEFAULT",
    "SET LOCAL kestra.client_id = ''",
    "SELECT set_config('kestra.client_id', '', true)",
    "SELECT pg_catalog.set_config('role', 'none', true)",
    "SELECT pg_catalog . set_config ('role', 'none', true)",
    "SELECT \"set_config\"('role', 'none', true)",
    "SELECT SET_CONFIG('role', 'none', true)",
    "SELECT U&\"\\0073et_config\"('role', 'none', true)",
    "SELECT /* harmless */ set_config('role', 'none', true)",
    "WITH c AS (SELECT set_config('role', 'none', true)) SELECT * FROM c",
    "SELECT 1; RESET ROLE",
    "SELECT 1;RESET ROLE;",
    "SELECT ''; RESET ROLE",
    "SELECT $$a$$; RESET ROLE",
    "SELECT 'it''s'; RESET ROLE; SELECT ''",
    r"SELECT E'\''; RESET ROLE; --'",
    "SELECT '\\'; RESET ROLE; --'",
    "/* a */ RESET ROLE",
    "-- a\nRESET ROLE",
    "/* /* */ RESET ROLE; */ SELECT 1",
    "SELECT /*/* */ 1 */; RESET ROLE",
    "COMMIT",
    "commit and chain",
    "ROLLBACK",
    "BEGIN",
    "START TRANSACTION",
    "END",
    "ABORT",
    "SAVEPOINT a",
    "RELEASE a",
    "PREPARE TRANSACTION 'a'",
    "DISCARD ALL",
    "DO $$ BEGIN RESET ROLE; END $$",
    "CALL something()",
    "PREPARE a AS RESET ROLE",
    "EXECUTE a",
    "COPY chat_messages TO STDOUT",
    "TRUNCATE chat_messages",
    "ALTER TABLE chat_messages DISABLE ROW LEVEL SECURITY",
    "CREATE TEMPORARY TABLE t AS SELECT 1",
    "GRANT ALL ON chat_messages TO PUBLIC",
    "LOCK TABLE chat_messages",
    "SELECT query_to_xml('SELECT * FROM chat_messages', true, true, '')",
    "SELECT table_to_xml('chat_messages', true, true, '')",
    "SELECT * FROM dblink('', 'SELECT 1') AS t(a int)",
    "SELECT * FROM ts_stat('SELECT content::tsvector FROM chat_messages')",
    "SELECT pg_terminate_backend(1)",
    "SELECT 'unbalanced",
    "select u&\"set!005fconfig\" uescape '!' ('kestra.client_id', 'b', true)",
    "select name'\\', set_config('role', 'kestra_system', true), name'z' -- '",
    "select 1 as x$a$, set_config('role', 'kestra_system', true) as y$a$",
    "SELECT * INTO TEMP report FROM chat_messages",
    "SELECT * INTO report FROM chat_messages",
    "EXPLAIN ANALYZE CREATE TEMP TABLE t AS SELECT 1",
    "UPDATE pg_settings SET setting = 'nowhere' WHERE name = 'search_path'",
    'UPDATE "pg_settings" SET setting = 1',
    "SELECT query FROM pg_stat_activity",
    "SELECT lastval()",
    "SELECT currval('chat_messages_id_seq')",
    "SELECT pg_advisory_lock(1)",
    "SHOW ALL",
    "SELECT set_config/**/('role', 'none', true)",
    "SELECT set_config--\n('role', 'none', true)",
    "SELECT set_config--x\r('role', 'none', true)",
    "SELECT \"set_config\"/**/('role', 'none', true)",
    "SELECT query_to_xml /**/ ('SELECT 1', true, true, '')",
    "SELECT 1 -- x\r; RESET ROLE",
    "",
]

ALLOWED = [
    "SELECT content FROM chat_messages WHERE content = 'RESET ROLE; COMMIT'",
    "  ( SELECT 1 ) ;",
    "WITH m AS (SELECT 1) SELECT * FROM m",
    "-- what for; and why: set_config\nSELECT 1 /* ; COMMIT */",
    "UPDATE chat_messages SET content = 'it''s; RESET ROLE'",
    "insert  into chat_messages (chat_id) VALUES ('1')",
    "EXPLAIN (ANALYZE, COSTS OFF) SELECT 1",
    "EXPLAIN ANALYZE VERBOSE SELECT 1",
    "SELECT lo_fi FROM t",
    "INSERT INTO chat_messages (chat_id, role, content) VALUES ('1', 'user', 'x;y')",
    "DELETE FROM chat_messages",
    "VALUES (1)",
    "EXPLAIN SELECT 1",
    'SELECT "content" AS "a;b" FROM chat_messages'.replace(";", " "),
    "SELECT current_setting('kestra.client_id'), offset_config FROM t",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_sql_that_reaches_past_row_level_security_is_refused(sql: str) -> None:
    with pytest.raises(UnscopedStatement):
        check_raw_sql(sql)


@pytest.mark.parametrize("sql", ALLOWED)
def test_plain_statement_is_allowed(sql: str) -> None:
    check_raw_sql(sql)


def test_refusal_does_not_quote_the_sql() -> None:
    with pytest.raises(UnscopedStatement) as caught:
        check_raw_sql("COPY secrets FROM 'segredo'")
    assert "segredo" not in str(caught.value)


WAYS: dict[str, Callable[[TenantSession, str], Any]] = {
    "text": lambda s, sql: s.execute(text(sql), execution_options={"kestra_raw_sql": True}),
    "driver sql": lambda s, sql: s.connection().exec_driver_sql(sql, execution_options={"kestra_raw_sql": True}),
    "from_statement": lambda s, sql: s.execute(
        select(ChatMessage).from_statement(text(sql)), execution_options={"kestra_raw_sql": True}
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sql", ["RESET ROLE", "SELECT set_config('role', 'none', true)", "COMMIT"])
def test_marked_statement_is_looked_at_whichever_way_it_comes(
    db: Database, client_id: UUID, way: str, sql: str
) -> None:
    with db.tenant_session(client_id) as session:
        with pytest.raises(UnscopedStatement):
            WAYS[way](session, sql)
        role = text("SELECT current_user").execution_options(kestra_raw_sql=True)
        assert session.scalar(role) == "kestra_tenant"


@pytest.mark.parametrize(
    "call",
    [
        func.set_config("kestra.client_id", "", True),  # noqa: FBT003  # the function's arguments are positional
        func.pg_catalog.set_config("role", "none", True),  # noqa: FBT003  # as above
        func.SET_CONFIG("role", "none", True),  # noqa: FBT003  # as above
        func.query_to_xml("SELECT * FROM chat_messages", True, True, ""),  # noqa: FBT003  # as above
        func.ts_stat("SELECT 1"),
        func.lastval(),
        func.pg_advisory_lock(1),
        literal("").op("|| set_config('role', 'none', true) ||")(""),
        extract("epoch from now()) + length(set_config('role', 'none', true)) + extract(epoch", func.now()),
        Function(quoted_name("pg_catalog.set_config", quote=False), "role", "none", True),  # noqa: FBT003  # as above
    ],
    ids=str,
)
def test_function_that_reaches_past_the_filter_is_refused(db: Database, client_id: UUID, call: Any) -> None:
    with db.tenant_session(client_id) as session:
        with pytest.raises(UnscopedStatement):
            session.scalar(select(call))
        with pytest.raises(UnscopedStatement):
            session.scalar(select(ChatMessage.id).where(call == "x"))
