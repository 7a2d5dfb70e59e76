"""Pages by keyset: a cursor says where a page ended, so a page costs the same wherever it is, and nothing shifts it."""

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final, Generic, TypeVar

from kestra.errors import InvalidCursor, InvalidValue

T = TypeVar("T")

MAX_LIMIT: Final = 500
"""The most rows that one page or batch may ask for."""

_DIGEST_SIZE: Final = 12


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some rows of a longer list.

    Attributes:
        items: The rows, in the order of the list.
        cursor: What the next page is asked for with; None when this is the last.
    """

    items: list[T]
    cursor: str | None


def check_limit(limit: int, *, most: int = MAX_LIMIT) -> int:
    """The limit.

    Raises:
        InvalidValue: It is below 1 or above `most`.
    """
    given: object = limit  # annotations bind nobody
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= most:
        raise InvalidValue(f"A limit is an integer from 1 to {most}.")
    return limit


def page_of(rows: Sequence[T], *, limit: int, scope: tuple[object, ...], key: Callable[[T], list[Any]]) -> Page[T]:
    """A page from up to `limit` + 1 rows: the one too many tells that there is a next page.

    Args:
        rows: What the statement returned, in the order of the list.
        limit: How many rows the page has at most.
        scope: What the cursor is good for; `position` is given the same.
        key: The values that a row is ordered by, as JSON can hold them.
    """
    items = list(rows[:limit])
    return Page(items, _cursor(scope, key(items[-1])) if len(rows) > limit else None)


def position(cursor: str, *, scope: tuple[object, ...], kinds: Sequence[Callable[[Any], Any]]) -> list[Any]:
    """The values that the last row of the page before was ordered by.

    Args:
        cursor: That of the page before.
        scope: As `page_of` was given it.
        kinds: What makes each value of what JSON holds.

    Raises:
        InvalidCursor: The cursor was not made here, or for another scope (list, client, chat).
    """
    # Whoever knows a scope can make a cursor for it, so what is in one is not trusted either.
    with suppress(AttributeError, LookupError, TypeError, ValueError, RecursionError):
        made = urlsafe_b64decode(cursor.encode("ascii"))
        digest, key = made[:_DIGEST_SIZE], made[_DIGEST_SIZE:]
        if digest == _digest(scope, key):
            return [kind(value) for kind, value in zip(kinds, json.loads(key), strict=True)]
    raise InvalidCursor("The cursor was not made for this list, chat and client. Start again without one.")


def instant(text: str) -> datetime:
    """An instant in a cursor.

    Raises:
        ValueError: It is none.
    """
    moment = datetime.fromisoformat(text)
    if moment.utcoffset() is None:
        raise ValueError("a naive datetime")
    return moment


_encode: Final = json.JSONEncoder(separators=(",", ":")).encode


def _cursor(scope: tuple[object, ...], values: list[Any]) -> str:
    key = _encode(values).encode()
    return urlsafe_b64encode(_digest(scope, key) + key).decode()


def _digest(scope: tuple[object, ...], key: bytes) -> bytes:
    # No secret: row level security keeps the clients apart. It tells a wrong cursor from a right one.
    return blake2b(_encode([str(part) for part in scope]).encode() + key, digest_size=_DIGEST_SIZE).digest()
