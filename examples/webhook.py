"""Webhook ingest: messages of a provider, one JSON object a line on standard input, each stored once.

    {"token": "…", "id": "wamid.1", "chat": "5511999999999", "text": "oi", "from_me": false, "sent_at": 1772452800}

Deliver the same lines again, in any order: nothing changes.
"""

import json
import sys
from datetime import UTC, datetime
from typing import Any

from kestra import KestraError, get_database
from kestra.errors import UnknownToken


def ingest(webhook: dict[str, Any]) -> str:
    """What became of one webhook."""
    result = get_database().ingest(
        webhook["token"],
        chat_id=webhook["chat"],
        role="assistant" if webhook.get("from_me") else "user",
        content=webhook.get("text"),
        media_url=webhook.get("media_url"),
        provider_message_id=webhook["id"],
        sent_at=datetime.fromtimestamp(webhook["sent_at"], UTC),
    )
    return "stored" if result.inserted else "known already"


def main() -> int:
    """Ingest every line; a bad one is reported by its number and does not hold up the others."""
    failed = 0
    for number, line in enumerate(sys.stdin, start=1):
        try:
            print(f"{number}: {ingest(json.loads(line))}")
        except UnknownToken:
            print(f"{number}: no client has this token")  # answer 404, so that the provider stops
            failed += 1
        except (KestraError, KeyError, ValueError) as error:
            print(f"{number}: {type(error).__name__}")  # answer 500: the provider delivers again
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
