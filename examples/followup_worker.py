"""Follow-up worker: writes to the silent end customers of every client. Run as many at once as you like.

A crash between sending and `complete` is the one moment in which a message could be sent twice, after the lease.
"""

import sys
from datetime import timedelta
from uuid import UUID

from kestra import KestraError, get_database
from kestra.dao import followups
from kestra.dao.followups import Claim
from kestra.errors import ClaimLost

LEASE = timedelta(minutes=2)


def send(claim: Claim, text: str) -> None:
    """Where the provider's API is called. No session is open meanwhile."""
    print(f"to {claim.chat_id}, stage {claim.stage}: {text}")


def follow_up(client_id: UUID, claim: Claim) -> None:
    """Write to one end customer, unless somebody was faster."""
    db = get_database()
    text = claim.step.prompt or "Ainda está por aí?"
    try:
        with db.tenant_session(client_id) as session:
            claim = followups.renew(session, claim=claim, lease=LEASE)  # it may have taken long to get here
        send(claim, text)
        with db.tenant_session(client_id) as session:
            followups.complete(session, claim=claim, content=text)
    except ClaimLost as lost:
        print(f"not to {lost.chat_id}: the conversation has gone on")


def main() -> None:
    """One round: a small batch from each client in turn, so that a big one does not keep the others waiting."""
    db = get_database()
    with db.system_session(reason="follow-ups that are due") as session:
        due = followups.clients_due(session)
    for client_id in due:
        with db.tenant_session(client_id) as session:
            claims = followups.claim(session, limit=20, lease=LEASE)
        for claim in claims:
            follow_up(client_id, claim)


if __name__ == "__main__":
    try:
        main()
    except KestraError as error:
        sys.exit(f"followup_worker: {error}")
