"""Inbox and backoffice: clients, their configuration, their conversations.

python examples/inbox.py create NAME TOKEN
python examples/inbox.py configure TOKEN '{"followup": {"active": true}}'
python examples/inbox.py list TOKEN
python examples/inbox.py read TOKEN CHAT
"""

import json
import sys
from uuid import UUID

from kestra import Database, KestraError, get_database
from kestra.dao import clients, conversations, messages


def list_conversations(db: Database, client_id: UUID) -> None:
    """Every conversation, the newest activity first, page by page."""
    cursor = None
    while True:
        with db.tenant_session(client_id) as session:
            page = conversations.inbox(session, cursor=cursor)
        for entry in page.items:
            unread = "99+" if entry.unread_capped else entry.unread
            print(f"{entry.state.chat_id:20} {entry.state.status:9} {unread:>4} {entry.preview or ''}")
        if (cursor := page.cursor) is None:
            break


def main(arguments: list[str]) -> None:
    """One command of a person in front of a screen."""
    db = get_database()
    match arguments:
        case ["create", name, token]:
            with db.system_session(reason="a new client") as system:
                print(f"client {clients.create(system, name=name, token=token).id}")
        case ["configure", token, patch]:
            with db.tenant_session(db.client_id_for_token(token)) as session:
                print(clients.patch_tools_config(session, patch=json.loads(patch)))
        case ["list", token]:
            list_conversations(db, db.client_id_for_token(token))
        case ["read", token, chat]:
            with db.tenant_session(db.client_id_for_token(token)) as session:
                page = messages.history(session, chat_id=chat)
                for message in reversed(page.items):
                    print(f"{message.created_at:%d %b %H:%M} {message.role}: {message.content or message.media_url}")
                conversations.mark_read(session, chat_id=chat, up_to=max((m.id for m in page.items), default=0))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (KestraError, ValueError) as error:
        sys.exit(f"inbox: {error}")
