"""Clients: who a webhook is for."""

from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from kestra.errors import UnknownToken
from kestra.models import Client


def client_id_for_token(session: Session, *, token: str) -> UUID:
    """The client that has this token, compared exactly: case, blanks and all.

    Raises:
        UnknownToken: No client has it, or it is empty. The token is not in the text.
    """
    client_id = session.scalar(select(Client.id).where(Client.token == token)) if token else None
    if client_id is None:
        raise UnknownToken("No client has this token. Check the instance of the webhook; tokens are compared exactly.")
    return client_id
