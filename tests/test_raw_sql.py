"""Row level security alone: plain SQL as the role of a tenant transaction, which Python never sees."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import errors, sql

from kestra import ActiveConversation, ChatMessage, ClientFile, Database

TABLES = ["clients", "active_conversations", "chat_messages", "client_files"]


@pytest.fixture(params=["application", "superuser"])
def url(request: pytest.FixtureRequest, database_url: str, superuser_url: str) -> str:
    return database_url if request.param == "application" else superuser_url


@pytest.fixture
def two_clients(db: Database, client_id: UUID, other_client_id: UUID) -> tuple[UUID, UUID]:
    with db.system_session(reason="test data") as session:
        for owner in (client_id, other_client_id):
            session.add_all(
                [
                    ActiveConversation(client_id=owner, chat_id="1"),
                    ChatMessage(client_id=owner, chat_id="1", role="user", content="oi"),
                    ClientFile(client_id=owner, filename="f"),
                ]
            )
    return client_id, other_client_id


@contextmanager
def as_tenant(url: str, client: object = None) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(url) as connection:
        connection.execute("SET LOCAL ROLE kestra_tenant")
        if client is not None:
            connection.execute(sql.SQL("SET LOCAL kestra.client_id = {}").format(sql.Literal(str(client))))
        yield connection


def owners(connection: psycopg.Connection[Any], table: str) -> set[UUID]:
    key = "id" if table == "clients" else "client_id"
    return {row[0] for row in connection.execute(sql.SQL(f"SELECT {key} FROM {table}"))}


@pytest.mark.parametrize("table", TABLES)
def test_tenant_sees_its_own_rows(url: str, two_clients: tuple[UUID, UUID], table: str) -> None:
    ours, theirs = two_clients
    for client in (ours, theirs):
        with as_tenant(url, client) as connection:
            assert owners(connection, table) == {client}


@pytest.mark.usefixtures("two_clients")
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("client", [None, ""], ids=["never set", "empty"])
def test_no_client_is_no_row_and_no_error(url: str, table: str, client: str | None) -> None:
    with as_tenant(url, client) as connection:
        assert owners(connection, table) == set()


@pytest.mark.usefixtures("two_clients")
def test_setting_of_an_earlier_transaction_is_no_client(url: str, client_id: UUID) -> None:
    """A custom setting reads as an empty text afterwards, not as NULL."""
    with psycopg.connect(url, autocommit=True) as connection:
        for client, expected in ((client_id, {client_id}), (None, set())):
            with connection.transaction():
                connection.execute("SET LOCAL ROLE kestra_tenant")
                if client is not None:
                    connection.execute(f"SET LOCAL kestra.client_id = '{client}'")
                assert owners(connection, "chat_messages") == expected


@pytest.mark.usefixtures("two_clients")
def test_garbage_is_an_error(url: str) -> None:
    with as_tenant(url, "garbage") as connection, pytest.raises(errors.InvalidTextRepresentation):
        owners(connection, "chat_messages")


REFUSED = {
    "insert for the other": "INSERT INTO chat_messages (client_id, chat_id, role, content) "
    "VALUES ('{theirs}', '1', 'user', 'x')",
    "insert for nobody": "INSERT INTO chat_messages (chat_id, role, content) VALUES ('1', 'user', 'x')",
    "update to the other": "UPDATE chat_messages SET client_id = '{theirs}'",
    "upsert onto the other": "INSERT INTO active_conversations (client_id, chat_id) VALUES ('{theirs}', '1') "
    "ON CONFLICT (chat_id, client_id) DO UPDATE SET status = 'finished'",
    "new client": "INSERT INTO clients (name, token) VALUES ('x', 'x')",
    "delete of the client": "DELETE FROM clients",
    "truncate": "TRUNCATE chat_messages",
    "copy from": "COPY chat_messages (chat_id, role, content) FROM STDIN",
    "alter": "ALTER TABLE chat_messages DISABLE ROW LEVEL SECURITY",
    "drop": "DROP POLICY kestra_tenant ON chat_messages",
    "trigger": "CREATE TRIGGER t BEFORE INSERT ON chat_messages "
    "FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "rows of nobody": "SELECT * FROM orphaned_rows",
    "sequence": "SELECT setval('chat_messages_id_seq', 1)",
    "policies off": "SET LOCAL row_security = off; SELECT * FROM chat_messages",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_tenant_may_not_do_is_refused(url: str, two_clients: tuple[UUID, UUID], what: str) -> None:
    ours, theirs = two_clients
    with as_tenant(url, ours) as connection, pytest.raises((errors.InsufficientPrivilege, errors.FeatureNotSupported)):
        connection.execute(REFUSED[what].format(theirs=theirs).encode())


@pytest.mark.parametrize(
    "statement",
    ["UPDATE chat_messages SET content = 'x' WHERE client_id = %s", "DELETE FROM chat_messages WHERE client_id = %s"],
)
def test_rows_of_the_other_are_out_of_reach(url: str, two_clients: tuple[UUID, UUID], statement: str) -> None:
    ours, theirs = two_clients
    with as_tenant(url, ours) as connection:
        assert connection.execute(statement.encode(), [theirs]).rowcount == 0


def test_role_of_tenants_may_become_no_other(superuser: psycopg.Connection[Any]) -> None:
    """PostgreSQL asks who logged in, not who one has become: this is a login as the role itself, as Citus makes."""
    superuser.execute("SET SESSION AUTHORIZATION kestra_tenant")
    for role in ("kestra_system", "kestra_app"):
        with pytest.raises(errors.InsufficientPrivilege):
            superuser.execute(f"SET ROLE {role}")


def test_foreign_key_to_no_client_is_impossible_for_a_superuser_too(superuser_url: str) -> None:
    with psycopg.connect(superuser_url) as connection, pytest.raises(errors.ForeignKeyViolation):
        connection.execute(
            "INSERT INTO chat_messages (client_id, chat_id, role, content) VALUES (gen_random_uuid(), '1', 'user', 'x')"
        )
