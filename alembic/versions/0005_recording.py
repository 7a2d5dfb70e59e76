"""The functions that record a message: `kestra_record` in a tenant session, `kestra_ingest` by a token (docs/adr/0009).

Both run with the rights of whoever calls them. `kestra_ingest` is called outside of any role: it becomes kestra_system
to look the token up, and kestra_tenant of that client, bound by row level security, before it writes. Role and client
end with its transaction.

Locks: none. A program of the revision before goes on working, and does not use them.
"""
# ruff: noqa: S608 - what is put into the SQL are constants of this file

from collections.abc import Sequence

from alembic import op

revision: str = "0005"
down_revision: str | Sequence[str] | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

MESSAGE = """
    _chat_id TEXT, _role TEXT, _content TEXT, _media_url TEXT, _provider_message_id TEXT, _sent_at TIMESTAMPTZ,
    _now TIMESTAMPTZ
"""

RECORDED = """
    message_id INTEGER, inserted BOOLEAN, chat_id TEXT, status TEXT, followup_stage INTEGER, last_role TEXT,
    last_message_at TIMESTAMPTZ, last_message_id INTEGER, last_user_message_at TIMESTAMPTZ,
    last_user_message_id INTEGER, last_read_message_id INTEGER, paused_until TIMESTAMPTZ
"""

STATE = """
    c.chat_id, c.status::TEXT, c.followup_stage, c.last_role::TEXT, c.last_message_at, c.last_message_id,
    c.last_user_message_at, c.last_user_message_id, c.last_read_message_id, c.paused_until
"""

USER_SPOKE = "excluded.last_user_message_at >= coalesce(c.last_user_message_at, excluded.last_user_message_at)"

IS_NEWEST = """
    (excluded.last_message_at, excluded.last_message_id) > (c.last_message_at, coalesce(c.last_message_id, 0))
"""

# A message that is there takes no lock and draws no id: a CASE evaluates no branch but the one it takes. The lock comes
# before the id, which is drawn for the row that it lets through: whoever sees an id of a chat sees every smaller one
# (docs/adr/0007). The time is taken with it, so that of those who waited the last one is not the earliest.
# Message and conversation are one statement, at whose end the foreign keys lock the client: who waits for a
# conversation that is being erased must not hold the client meanwhile (docs/adr/0008). The next statement sees what was
# committed before it, also a duplicate that this one waited for; when that one is erased in between, it begins again.
RECORD = f"""
    FOR _round IN 1..3 LOOP
        RETURN QUERY
            WITH message AS (
                INSERT INTO chat_messages AS m
                    (client_id, chat_id, role, content, media_url, provider_message_id, created_at)
                SELECT _client_id, _chat_id, _role, _content, _media_url, _provider_message_id,
                       least(_sent_at, coalesce(_now, clock_timestamp()))
                WHERE CASE
                    WHEN EXISTS (
                        SELECT FROM chat_messages known
                        WHERE known.client_id = _client_id AND known.provider_message_id = _provider_message_id
                    ) THEN FALSE
                    ELSE pg_advisory_xact_lock(hashtextextended(_client_id::TEXT || _chat_id, 0)) IS NOT NULL
                END
                ON CONFLICT (client_id, provider_message_id) WHERE provider_message_id IS NOT NULL DO NOTHING
                RETURNING m.id, m.created_at
            )
            INSERT INTO active_conversations AS c
                (client_id, chat_id, last_message_at, last_message_id, last_role,
                 last_user_message_at, last_user_message_id)
            SELECT _client_id, _chat_id, m.created_at, m.id, _role,
                   CASE WHEN _role = 'user' THEN m.created_at END, CASE WHEN _role = 'user' THEN m.id END
            FROM message m
            ON CONFLICT (chat_id, client_id) DO UPDATE SET
                status = CASE WHEN {USER_SPOKE} THEN 'active' ELSE c.status END,
                followup_stage = CASE WHEN {USER_SPOKE} THEN 0 ELSE c.followup_stage END,
                claim_token = CASE WHEN {USER_SPOKE} THEN NULL ELSE c.claim_token END,
                claimed_until = CASE WHEN {USER_SPOKE} THEN NULL ELSE c.claimed_until END,
                last_role = CASE WHEN {IS_NEWEST} THEN excluded.last_role ELSE c.last_role END,
                last_message_at = greatest(c.last_message_at, excluded.last_message_at),
                last_message_id = CASE WHEN {IS_NEWEST} THEN excluded.last_message_id ELSE c.last_message_id END,
                last_user_message_at = greatest(c.last_user_message_at, excluded.last_user_message_at),
                last_user_message_id = greatest(c.last_user_message_id, excluded.last_user_message_id)
            RETURNING (SELECT m.id FROM message m), TRUE, {STATE};
        IF FOUND THEN
            RETURN;
        END IF;
        RETURN QUERY
            SELECT m.id, FALSE, {STATE}
            FROM chat_messages m
            LEFT JOIN active_conversations c ON c.client_id = m.client_id AND c.chat_id = m.chat_id
            WHERE m.client_id = _client_id AND m.provider_message_id = _provider_message_id;
        IF FOUND THEN
            RETURN;
        END IF;
    END LOOP;
    RAISE 'the message was there and was not, three times' USING ERRCODE = 'serialization_failure';
"""

FUNCTIONS = (
    f"""
        CREATE FUNCTION kestra_record({MESSAGE}) RETURNS SETOF kestra_recorded ROWS 1
        LANGUAGE plpgsql AS $$
        DECLARE
            _client_id UUID := nullif(current_setting('kestra.client_id', TRUE), '');
        BEGIN
            IF _client_id IS NULL THEN
                RAISE 'kestra_record is for a session of one client' USING ERRCODE = 'object_not_in_prerequisite_state';
            END IF;
            {RECORD}
        END $$
    """,
    f"""
        CREATE FUNCTION kestra_ingest(_token TEXT, {MESSAGE}) RETURNS SETOF kestra_recorded ROWS 1
        LANGUAGE plpgsql AS $$
        DECLARE
            _client_id UUID;
            _set TEXT;
        BEGIN
            -- In somebody's transaction it would leave that one as another client. There is no role ''.
            PERFORM set_config('role', CASE WHEN current_user = session_user THEN 'kestra_system' ELSE '' END, TRUE);
            SELECT id, set_config('role', 'kestra_tenant', TRUE), set_config('kestra.client_id', id::TEXT, TRUE)
            INTO _client_id, _set, _set FROM clients WHERE token = _token;
            IF _client_id IS NULL THEN
                PERFORM set_config('role', 'kestra_tenant', TRUE), set_config('kestra.client_id', '', TRUE);
                RETURN;
            END IF;
            {RECORD}
        END $$
    """,
)


def upgrade() -> None:
    """Make the functions, and the type of what they return."""
    _drop()  # of an interrupted run
    op.execute(f"CREATE TYPE kestra_recorded AS ({RECORDED})")
    for definition in FUNCTIONS:
        op.get_bind().exec_driver_sql(definition)


def downgrade() -> None:
    """Drop them."""
    _drop()


def _drop() -> None:
    op.execute("DROP FUNCTION IF EXISTS kestra_record, kestra_ingest")
    op.execute("DROP TYPE IF EXISTS kestra_recorded")
