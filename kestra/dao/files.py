"""Files: what a client gave its assistant, once for each content, and where Google keeps the copy that expires."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256 as sha256_of
from typing import Final
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, String, bindparam, func, not_, select, update
from sqlalchemy.dialects.postgresql import insert

from kestra.columns import Timestamptz
from kestra.dao.clock import NOW
from kestra.dao.keyset import check_limit
from kestra.errors import FileNotRegistered, FileUriChanged, InvalidValue
from kestra.models import ClientFile
from kestra.session import TenantSession, require_tenant

LIFETIME: Final = timedelta(hours=48)
"""How long the Gemini File API keeps an uploaded file."""

MARGIN: Final = timedelta(hours=1)
"""How long a URI that is handed out is good for, unless the caller says otherwise."""

_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")
_FRESH: Final = {"populate_existing": True}


@dataclass(frozen=True, slots=True)
class Registered:
    """What became of a file.

    Attributes:
        file: The one file of the client with this content.
        created: Whether it is new. One that was there keeps its filename and everything else.
    """

    file: ClientFile
    created: bool


def register(
    session: TenantSession,
    *,
    content: bytes | None = None,
    sha256: str | None = None,
    filename: str | None = None,
    media_type: str | None = None,
    size_bytes: int | None = None,
) -> Registered:
    """The client's file with this content, made when there is none yet; safe against others who do the same.

    The file is locked until the transaction ends: register several in the order of their hashes, or each in a
    transaction of its own, as two transactions in opposite order would wait for each other.

    Args:
        session: A session of the client.
        content: The file itself; it is not stored, only its SHA-256 and its size are.
        sha256: Its SHA-256 instead, 64 hexadecimal digits.
        filename: What the client calls it, at most 255 characters.
        media_type: Such as `application/pdf`, at most 255 characters.
        size_bytes: Its size in bytes, where only the hash is given.

    Raises:
        InvalidValue: Not exactly one of `content` and `sha256` is given, the hash is none, or a value cannot be stored.
        ClientNotFound: There is no such client.
    """
    require_tenant(session)
    file_hash, size_bytes = _identity(content, sha256, size_bytes)
    new = insert(ClientFile).values(
        id=(new_id := uuid4()), file_hash=file_hash, filename=filename, media_type=media_type, size_bytes=size_bytes
    )
    # DO UPDATE with what is there already, because DO NOTHING returns no row.
    upsert = new.on_conflict_do_update(
        index_elements=[ClientFile.client_id, ClientFile.file_hash], set_={"file_hash": new.excluded.file_hash}
    )
    file = session.scalars(upsert.returning(ClientFile), execution_options=_FRESH).one()
    return Registered(file, created=file.id == new_id)


def set_google_uri(
    session: TenantSession,
    *,
    file_id: UUID,
    uri: str,
    replaces: str | None,
    expires_at: datetime | None = None,
    now: datetime | None = None,
) -> ClientFile:
    """The file with the URI of its new upload, unless somebody else has stored another one meanwhile.

    Args:
        session: A session of the client.
        file_id: The file that was uploaded.
        uri: Where Google keeps it, at most 512 characters.
        replaces: The URI that the file had when the upload was decided on; None when it had none.
        expires_at: Until when the URI is good, aware; None is 48 hours from now.
        now: What counts as now, aware; None is the database's clock.

    Raises:
        FileUriChanged: The file has another URI than `replaces`. Nothing was written; neither is in the text.
        FileNotRegistered: The client has no such file.
        InvalidValue: The URI is empty or too long, or a time is naive.
    """
    require_tenant(session)
    if not uri:
        raise InvalidValue("The URI is empty.")
    uploaded = (
        update(ClientFile)
        .where(
            ClientFile.id == file_id,
            ClientFile.google_file_uri.is_not_distinct_from(bindparam("replaces", type_=String())),
        )
        .values(
            google_file_uri=uri,
            google_file_expires_at=func.coalesce(
                bindparam("expires_at", type_=Timestamptz), NOW + LIFETIME, type_=Timestamptz
            ),
        )
        .returning(ClientFile)
    )
    given = {"replaces": replaces, "expires_at": expires_at, "now": now}
    file = session.scalars(uploaded, given, execution_options={**_FRESH, "synchronize_session": False}).one_or_none()
    if file is not None:
        return file
    if session.scalar(select(ClientFile.id).where(ClientFile.id == file_id)) is None:
        raise FileNotRegistered(file_id)
    raise FileUriChanged(file_id)


def usable(session: TenantSession, *, margin: timedelta = MARGIN, now: datetime | None = None) -> list[ClientFile]:
    """The client's files whose URI is good for at least `margin` from now, by name.

    Args:
        session: A session of the client.
        margin: How long the URIs will be used, at least 0.
        now: What counts as now, aware; None is the database's clock.

    Raises:
        InvalidValue: The margin is negative, or the time naive.
    """
    require_tenant(session)
    good = select(ClientFile).where(_good(margin)).order_by(ClientFile.filename, ClientFile.id)
    return list(session.scalars(good, {"now": now}, execution_options=_FRESH))


def needing_upload(
    session: TenantSession, *, margin: timedelta = MARGIN, limit: int = 100, now: datetime | None = None
) -> list[ClientFile]:
    """The client's other files: those without a URI, or whose URI is not known to be good for `margin` from now.

    Those without an expiry come first, then those that expired first. A URI without an expiry counts as expired: nobody
    knows when it was uploaded.

    Args:
        session: A session of the client.
        margin: As in `usable`.
        limit: The most files, 1 to 500.
        now: As in `usable`.

    Raises:
        InvalidValue: The margin is negative, the limit out of bounds, or the time naive.
    """
    require_tenant(session)
    others = (
        select(ClientFile)
        .where(not_(func.coalesce(_good(margin), False)))
        .order_by(ClientFile.google_file_expires_at.asc().nulls_first(), ClientFile.id)
        .limit(check_limit(limit))
    )
    return list(session.scalars(others, {"now": now}, execution_options=_FRESH))


def _identity(content: bytes | None, sha256: str | None, size_bytes: int | None) -> tuple[str, int | None]:
    """The hash and the size of a file."""
    given: object = content if sha256 is None else sha256  # annotations bind nobody
    if (content is None) == (sha256 is None):
        raise InvalidValue("A file is registered by exactly one of content and sha256.")
    if sha256 is not None:
        if not isinstance(given, str) or not _SHA256.fullmatch(given):
            raise InvalidValue("A SHA-256 is a text of 64 hexadecimal digits.")
        return given.lower(), size_bytes
    if not isinstance(given, bytes):
        raise InvalidValue(f"The content of a file is bytes, not {type(given).__name__}.")
    if size_bytes is not None:
        raise InvalidValue("The size of a file is that of its content: give it with sha256 only.")
    return sha256_of(given).hexdigest(), len(given)


def _good(margin: timedelta) -> ColumnElement[bool]:
    """Whether the URI of a file is good for that long. NULL where its expiry is not known."""
    if margin < timedelta(0):
        raise InvalidValue("The margin is negative: what has expired is not usable.")
    return ClientFile.google_file_uri.is_not(None) & (ClientFile.google_file_expires_at >= NOW + margin)
