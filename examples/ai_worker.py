"""AI worker: answers every active conversation of one client in which the end customer's message arrived last.

python examples/ai_worker.py TOKEN
"""

import sys
from datetime import UTC, datetime

from sqlalchemy import select

from kestra import ActiveConversation, Client, KestraError, get_database
from kestra.dao import messages
from kestra.dao.messages import Memory


def answer(prompt: str | None, memory: Memory) -> str:
    """What the model would say. It is called without a session: connections are not held while a model thinks."""
    newest = memory.messages[-1]
    return f"[{prompt or 'no prompt'}] I read {len(memory.messages)} messages; you said: {newest.content or 'a medium'}"


def main(token: str) -> None:
    """Answer once, whoever waits."""
    db = get_database()
    client_id = db.client_id_for_token(token)
    with db.tenant_session(client_id) as session:
        client = session.scalars(select(Client)).one()
        waiting = session.scalars(
            select(ActiveConversation).where(
                ActiveConversation.status == "active",
                ActiveConversation.last_user_message_id >= ActiveConversation.last_message_id,
            )
        ).all()
    if client.tools_config.ai_active is False:
        sys.exit("The assistant of this client is switched off.")
    for conversation in waiting:
        if conversation.paused_until is not None and conversation.paused_until > datetime.now(UTC):
            continue
        with db.tenant_session(client_id) as session:
            memory = messages.memory(session, chat_id=conversation.chat_id, max_messages=20, max_chars=8_000)
        text = answer(client.system_prompt, memory)
        with db.tenant_session(client_id) as session:
            messages.record(session, chat_id=conversation.chat_id, role="assistant", content=text)
        print(f"answered {conversation.chat_id}")


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004 - the token
        sys.exit(__doc__)
    try:
        main(sys.argv[1])
    except KestraError as error:
        sys.exit(f"ai_worker: {error}")
