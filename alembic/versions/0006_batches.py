"""A provider's batch by a function, `kestra_record_many`, and less to make ready for one message (docs/adr/0013).

The functions of revision 0005 stay what they are to whoever calls them; their bodies are replaced. All run with the
rights of whoever calls them.

Locks: none. A program of the revision before goes on working, and does not use the new function.
"""
# ruff: noqa: S608 - what is put into the SQL are constants of this file

from collections.abc import Sequence

from alembic import context, op

revision: str = "0006"
down_revision: str | Sequence[str] | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

MESSAGE = """
    _chat_id TEXT, _role TEXT, _content TEXT, _media_url TEXT, _provider_message_id TEXT, _sent_at TIMESTAMPTZ,
    _now TIMESTAMPTZ
"""

BATCH = """
    _client_id UUID, _chat_ids TEXT[], _roles TEXT[], _contents TEXT[], _media_urls TEXT[],
    _provider_message_ids TEXT[], _sent_ats TIMESTAMPTZ[], _now TIMESTAMPTZ
"""

# Of a chat the positions in the batch, from 1, and the ids of the messages that were inserted; or of a message that was
# there the id, with its provider's id instead of a position. Then where the conversation stands.
RECORDED_MANY = """
    positions BIGINT[], ids INTEGER[], known TEXT, chat_id TEXT, status TEXT, followup_stage INTEGER, last_role TEXT,
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

ONCE = "ON CONFLICT (client_id, provider_message_id) WHERE provider_message_id IS NOT NULL DO NOTHING"

MOVE_ON = f"""
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
"""

# A message that is there takes no lock and draws no id: a CASE evaluates no branch but the one it takes. The lock comes
# before the id: whoever sees an id of a chat sees every smaller one (docs/adr/0007).
DRAWN = """
    CASE
        WHEN EXISTS (
            SELECT FROM chat_messages known
            WHERE known.client_id = {client} AND known.provider_message_id = _provider_message_id
        ) THEN NULL
        WHEN pg_advisory_xact_lock(hashtextextended({client}::TEXT || _chat_id, 0)) IS NOT NULL
        THEN nextval('chat_messages_id_seq')
    END
"""
DRAW = f"SELECT {DRAWN.format(client='_client_id')} INTO _id;"

# The time is taken after the lock too, so that of those who waited the last one is not the earliest.
# Message and conversation are one statement, at whose end the foreign keys lock the client: who waits for a
# conversation that is being erased must not hold the client meanwhile (docs/adr/0008). The next statement sees what was
# committed before it, also a duplicate that this one waited for; when that one is erased in between, it begins again.
RECORD = f"""
    FOR _round IN 1..3 LOOP
        IF _id IS NOT NULL THEN
            _at := least(_sent_at, coalesce(_now, clock_timestamp()));
            RETURN QUERY
                WITH message AS (
                    INSERT INTO chat_messages AS m
                        (id, client_id, chat_id, role, content, media_url, provider_message_id, created_at)
                    VALUES (_id, _client_id, _chat_id, _role, _content, _media_url, _provider_message_id, _at)
                    {ONCE}
                    RETURNING m.created_at
                )
                INSERT INTO active_conversations AS c
                    (client_id, chat_id, last_message_at, last_message_id, last_role,
                     last_user_message_at, last_user_message_id)
                SELECT _client_id, _chat_id, m.created_at, _id, _role,
                       CASE WHEN _role = 'user' THEN m.created_at END, CASE WHEN _role = 'user' THEN _id END
                FROM message m
                {MOVE_ON}
                RETURNING _id, TRUE, {STATE};
            IF FOUND THEN
                RETURN;
            END IF;
        END IF;
        RETURN QUERY
            SELECT m.id, FALSE, {STATE}
            FROM chat_messages m
            LEFT JOIN active_conversations c ON c.client_id = m.client_id AND c.chat_id = m.chat_id
            WHERE m.client_id = _client_id AND m.provider_message_id = _provider_message_id;
        IF FOUND THEN
            RETURN;
        END IF;
        {DRAW}
    END LOOP;
    RAISE 'the message was there and was not, three times' USING ERRCODE = 'serialization_failure';
"""


def batch_query(once: str) -> str:
    """The query that records a batch.

    An ordered sub-query stays one, so the ids are drawn in its order, that of the times; ids of providers and
    conversations are written in one order, so that no two batches wait for each other. All ids of providers are looked
    up by one scan of the index, and what is new is told by a hash of what was found, so that however much of a batch is
    delivered again, it is not compared pair by pair. '' is no provider's id. OFFSET 0 keeps the conversations a look-up
    by the key for each, however many the planner expects.

    Args:
        once: What becomes of a message that was stored since the query began, by the unique key: `ONCE`, or an error.
    """
    return f"""
            WITH known AS (
                SELECT m.id, m.chat_id, m.provider_message_id FROM chat_messages m
                WHERE m.client_id = _client_id AND m.provider_message_id = ANY (_provider_message_ids)
            ), fresh AS (
                SELECT nextval('chat_messages_id_seq')::INTEGER AS id, in_order.* FROM (
                    SELECT given.*, least(given.sent_at, coalesce(_now, clock_timestamp())) AS created_at
                    FROM unnest(_chat_ids, _roles, _contents, _media_urls, _provider_message_ids, _sent_ats)
                        WITH ORDINALITY
                        AS given (chat_id, role, content, media_url, provider_message_id, sent_at, position)
                    WHERE coalesce(given.provider_message_id, '') NOT IN (SELECT provider_message_id FROM known)
                    ORDER BY created_at, position
                ) in_order
            ), added AS (
                INSERT INTO chat_messages AS m
                    (client_id, id, chat_id, role, content, media_url, provider_message_id, created_at)
                SELECT _client_id, id, chat_id, role, content, media_url, provider_message_id, created_at
                FROM fresh ORDER BY provider_message_id
                {once}
                RETURNING m.id, m.chat_id, m.role, m.created_at
            ), chats AS (
                SELECT added.chat_id, array_agg(fresh.position) AS positions, array_agg(added.id) AS ids,
                       max(added.created_at) AS last_message_at, max(added.id) AS last_message_id,
                       (array_agg(added.role ORDER BY added.id DESC))[1] AS last_role,
                       max(added.created_at) FILTER (WHERE added.role = 'user') AS last_user_message_at,
                       max(added.id) FILTER (WHERE added.role = 'user') AS last_user_message_id
                FROM added JOIN fresh USING (id) GROUP BY added.chat_id ORDER BY added.chat_id
            ), state AS (
                INSERT INTO active_conversations AS c
                    (client_id, chat_id, last_message_at, last_message_id, last_role,
                     last_user_message_at, last_user_message_id)
                SELECT _client_id, chat_id, last_message_at, last_message_id, last_role,
                       last_user_message_at, last_user_message_id
                FROM chats
                {MOVE_ON}
                RETURNING {STATE}
            )
            SELECT chats.positions, chats.ids, NULL, state.* FROM chats JOIN state USING (chat_id)
            UNION ALL
            SELECT NULL, ARRAY[known.id], known.provider_message_id, {STATE}
            FROM known LEFT JOIN LATERAL (
                SELECT * FROM active_conversations c
                WHERE c.client_id = _client_id AND c.chat_id = known.chat_id OFFSET 0
            ) c ON TRUE;
    """


# Chats are locked in one order too, and first: what a block has undone lets go of the locks that it took.
# A duplicate that was stored since the query began is seldom, and ON CONFLICT looks for each message once more. So it
# is an error first, which comes before any row, and then ON CONFLICT leaves it out. Any other key's error is raised by
# the second query.
RECORD_MANY = f"""
    PERFORM pg_advisory_xact_lock(keys.key) FROM (
        SELECT DISTINCT hashtextextended(_client_id::TEXT || chat_id, 0) AS key
        FROM unnest(_chat_ids) chat_id ORDER BY key
    ) keys;
    BEGIN
        RETURN QUERY {batch_query("")}
    EXCEPTION WHEN unique_violation THEN
        RETURN QUERY {batch_query(ONCE)}
    END;
"""

FUNCTIONS = (
    f"""
        CREATE OR REPLACE FUNCTION kestra_record({MESSAGE}) RETURNS SETOF kestra_recorded ROWS 1
        LANGUAGE plpgsql AS $$
        DECLARE
            _client_id UUID := nullif(current_setting('kestra.client_id', TRUE), '');
            _id INTEGER;
            _at TIMESTAMPTZ;
        BEGIN
            IF _client_id IS NULL THEN
                RAISE 'kestra_record is for a session of one client' USING ERRCODE = 'object_not_in_prerequisite_state';
            END IF;
            {DRAW}
            {RECORD}
        END $$
    """,
    f"""
        CREATE OR REPLACE FUNCTION kestra_ingest(_token TEXT, {MESSAGE}) RETURNS SETOF kestra_recorded ROWS 1
        LANGUAGE plpgsql AS $$
        DECLARE
            _client_id UUID;
            _set TEXT;
            _id INTEGER;
            _at TIMESTAMPTZ;
        BEGIN
            -- In somebody's transaction it would leave that one as another client. There is no role ''.
            PERFORM set_config('role', CASE WHEN current_user = session_user THEN 'kestra_system' ELSE '' END, TRUE);
            SELECT id, set_config('role', 'kestra_tenant', TRUE), set_config('kestra.client_id', id::TEXT, TRUE),
                {DRAWN.format(client="clients.id")}
            INTO _client_id, _set, _set, _id FROM clients WHERE token = _token;
            IF _client_id IS NULL THEN
                PERFORM set_config('role', 'kestra_tenant', TRUE), set_config('kestra.client_id', '', TRUE);
                RETURN;
            END IF;
            {RECORD}
        END $$
    """,
    f"""
        CREATE FUNCTION kestra_record_many({BATCH}) RETURNS SETOF kestra_recorded_many ROWS 50
        LANGUAGE plpgsql AS $$
        DECLARE
            _mine UUID := nullif(current_setting('kestra.client_id', TRUE), '');
        BEGIN
            IF _mine <> _client_id OR _client_id IS NULL THEN
                RAISE 'kestra_record_many is for the client of the session' USING ERRCODE = 'insufficient_privilege';
            END IF;
            {RECORD_MANY}
        END $$
    """,
)


def upgrade() -> None:
    """Make the function of batches with its type, and replace the others."""
    _drop()  # of an interrupted run
    op.execute(f"CREATE TYPE kestra_recorded_many AS ({RECORDED_MANY})")
    for definition in FUNCTIONS:
        op.get_bind().exec_driver_sql(definition)


def downgrade() -> None:
    """Drop it, and bring back the others as they were."""
    _drop()
    before = context.script.get_revision("0005").module
    for definition in before.FUNCTIONS:
        op.get_bind().exec_driver_sql(definition.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION"))


def _drop() -> None:
    op.execute("DROP FUNCTION IF EXISTS kestra_record_many")
    op.execute("DROP TYPE IF EXISTS kestra_recorded_many")
