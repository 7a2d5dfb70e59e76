"""Files: one for each content of a client, and a URI that expires and that nobody overwrites unseen."""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import select

from kestra import ClientFile, Database
from kestra.dao import files
from kestra.dao.files import LIFETIME, MARGIN, Registered
from kestra.errors import ClientNotFound, FileNotRegistered, FileUriChanged, InvalidValue, TenancyError
from tests.concurrency import at_once, outcomes_at_once
from tests.observing import shown, statements_sent

NOON: Final = datetime(2026, 3, 2, 12, tzinfo=UTC)
SECOND: Final = timedelta(seconds=1)
URI: Final = "https://google/files/secreta"
CONTENT: Final = b"%PDF"
HASH: Final = hashlib.sha256(CONTENT).hexdigest()


def register(db: Database, client_id: UUID, **parts: Any) -> Registered:
    with db.tenant_session(client_id) as session:
        return files.register(session, **parts)


def set_uri(db: Database, client_id: UUID, file_id: UUID, uri: str = URI, **parts: Any) -> ClientFile:
    with db.tenant_session(client_id) as session:
        return files.set_google_uri(session, file_id=file_id, uri=uri, **{"replaces": None, "now": NOON, **parts})


def everything(db: Database) -> list[tuple[Any, ...]]:
    """Every row of the table, whose it is first."""
    table = ClientFile.__table__
    with db.system_session(reason="look") as session:
        rows = session.execute(select(table.c.client_id, *table.c).order_by(table.c.client_id, table.c.id))
        return [tuple(row) for row in rows]


def add(db: Database, client_id: UUID, name: str, uri: str | None, expires_at: datetime | None) -> UUID:
    """A file in any state, such as an adopted one."""
    file = ClientFile(filename=name, google_file_uri=uri, google_file_expires_at=expires_at)
    with db.tenant_session(client_id) as session:
        session.add(file)
        session.flush()
        return file.id


# --- register ---------------------------------------------------------------------------------------------------------


def test_a_file_is_registered_by_its_content(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session, statements_sent() as sent:
        result = files.register(session, content=CONTENT, filename="a.pdf", media_type="application/pdf")
    assert len(sent) == 1
    assert result.created
    file = result.file
    assert (file.client_id, file.file_hash, file.size_bytes) == (client_id, HASH, len(CONTENT))
    assert (file.filename, file.media_type) == ("a.pdf", "application/pdf")
    assert (file.google_file_uri, file.google_file_expires_at) == (None, None)
    assert [row[0] for row in everything(db)] == [client_id]


@pytest.mark.parametrize("size", [None, 0, 2**40])
def test_a_file_is_registered_by_its_hash(db: Database, client_id: UUID, size: int | None) -> None:
    result = register(db, client_id, sha256=HASH, size_bytes=size)
    assert (result.created, result.file.file_hash, result.file.size_bytes) == (True, HASH, size)
    assert (result.file.filename, result.file.media_type) == (None, None)


def test_an_empty_content_is_a_content(db: Database, client_id: UUID) -> None:
    result = register(db, client_id, content=b"")
    assert (result.file.file_hash, result.file.size_bytes) == (hashlib.sha256(b"").hexdigest(), 0)


def test_the_same_content_is_the_same_file_with_all_that_it_had(db: Database, client_id: UUID) -> None:
    first = register(db, client_id, content=CONTENT, filename="a.pdf", media_type="application/pdf")
    set_uri(db, client_id, first.file.id)
    before = everything(db)
    for parts in (
        {"content": CONTENT, "filename": "b.pdf", "media_type": "text/plain"},
        {"sha256": HASH, "filename": "b.pdf", "size_bytes": 7},
        {"sha256": HASH.upper()},
    ):
        again = register(db, client_id, **parts)
        assert not again.created
        assert (again.file.id, again.file.filename, again.file.size_bytes) == (first.file.id, "a.pdf", len(CONTENT))
        assert again.file.google_file_uri == URI
    assert everything(db) == before


def test_other_content_is_another_file(db: Database, client_id: UUID) -> None:
    results = [register(db, client_id, content=content) for content in (b"a", b"b", b"A")]
    assert [result.created for result in results] == [True] * 3
    assert len({result.file.id for result in results}) == 3


def test_files_without_a_hash_are_nobodys_duplicates(db: Database, client_id: UUID) -> None:
    add(db, client_id, "adopted", None, None)
    assert register(db, client_id, content=CONTENT).created


def test_ten_threads_with_the_same_content_get_one_file(db: Database, client_id: UUID) -> None:
    parts = [{"content": CONTENT, "filename": f"{index}.pdf"} for index in range(10)]
    results = at_once(*(partial(register, db, client_id, **given) for given in parts))
    assert len({result.file.id for result in results}) == 1
    (created,) = [index for index, result in enumerate(results) if result.created]
    assert {result.file.filename for result in results} == {f"{created}.pdf"}
    assert len(everything(db)) == 1


def test_a_file_that_is_loaded_shows_what_others_have_stored(db: Database, client_id: UUID) -> None:
    file_id = register(db, client_id, content=CONTENT).file.id
    with db.tenant_session(client_id) as session:
        loaded = session.scalars(select(ClientFile)).one()
        set_uri(db, client_id, file_id)
        assert files.register(session, content=CONTENT).file is loaded
        assert loaded.google_file_uri == URI


WRONG_HASHES: Final = {
    "empty": "",
    "short": HASH[:-1],
    "long": HASH + "0",
    "no hex": "g" + HASH[1:],
    "blank": " " + HASH[1:],
    "line end": HASH[:-1] + "\n",
    "line end after": HASH + "\n",
    "prefix": "0x" + HASH[2:],
    "other digits": "\N{ARABIC-INDIC DIGIT ONE}" + HASH[1:],
    "md5": hashlib.md5(CONTENT, usedforsecurity=False).hexdigest(),
    "bytes": HASH.encode(),
    "number": 7,
}


@pytest.mark.parametrize("which", WRONG_HASHES)
def test_a_bad_hash_is_refused(db: Database, client_id: UUID, which: str) -> None:
    with pytest.raises(InvalidValue, match="64 hexadecimal digits"):
        register(db, client_id, sha256=WRONG_HASHES[which])
    assert everything(db) == []


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"filename": "a.pdf", "size_bytes": 1},
        {"content": CONTENT, "sha256": HASH},
        {"content": b"", "sha256": HASH},
        {"content": "text"},
        {"content": CONTENT, "size_bytes": len(CONTENT)},
        {"sha256": HASH, "size_bytes": -1},
        {"sha256": HASH, "size_bytes": 2**63},
        {"sha256": HASH, "filename": "segredo" * 40},
        {"sha256": HASH, "filename": "segredo\0"},
        {"sha256": HASH, "filename": "segredo\ud800"},
        {"sha256": HASH, "media_type": "segredo" * 40},
    ],
)
def test_what_cannot_be_registered_is_refused_and_not_quoted(
    db: Database, client_id: UUID, parts: dict[str, Any]
) -> None:
    with pytest.raises(InvalidValue) as caught:
        register(db, client_id, **parts)
    assert "segredo" not in shown(caught.value)
    assert everything(db) == []


# --- the URI ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file_id(db: Database, client_id: UUID) -> UUID:
    return register(db, client_id, content=CONTENT, filename="a.pdf").file.id


def test_a_uri_is_set_in_one_statement_and_expires_after_48_hours(db: Database, client_id: UUID, file_id: UUID) -> None:
    other = register(db, client_id, content=b"other").file
    with db.tenant_session(client_id) as session:
        loaded = session.scalars(select(ClientFile).where(ClientFile.id == file_id)).one()
        with statements_sent() as sent:
            file = files.set_google_uri(session, file_id=file_id, uri=URI, replaces=None, now=NOON)
        assert len(sent) == 1
        assert file is loaded
        assert (file.google_file_uri, file.google_file_expires_at) == (URI, NOON + timedelta(hours=48))
    assert (file.filename, file.file_hash) == ("a.pdf", HASH)
    with db.tenant_session(client_id) as session:
        uris = {file.id: file.google_file_uri for file in session.scalars(select(ClientFile))}
    assert uris == {file_id: URI, other.id: None}


def test_an_expiry_may_be_given(db: Database, client_id: UUID, file_id: UUID) -> None:
    until = datetime(2026, 3, 3, 8, tzinfo=timezone(timedelta(hours=-3)))
    assert set_uri(db, client_id, file_id, expires_at=until).google_file_expires_at == until


def test_now_is_the_clock_of_the_database(
    db: Database, client_id: UUID, file_id: UUID, superuser: psycopg.Connection[Any]
) -> None:
    def now() -> datetime:
        row = superuser.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        moment: datetime = row[0]
        return moment

    with db.tenant_session(client_id) as session:
        session.scalars(select(ClientFile)).all()
        before = now()
        file = files.set_google_uri(session, file_id=file_id, uri=URI, replaces=None)
        after = now()
        assert file.google_file_expires_at is not None
        assert before + LIFETIME <= file.google_file_expires_at <= after + LIFETIME
        left = file.google_file_expires_at - now()
        for margin, good in ((left - timedelta(hours=1), [file]), (left + timedelta(hours=1), [])):
            assert files.usable(session, margin=margin) == good
            assert (files.needing_upload(session, margin=margin) == []) is bool(good)


def test_a_uri_replaces_the_one_that_was_seen(db: Database, client_id: UUID, file_id: UUID) -> None:
    set_uri(db, client_id, file_id, "first")
    file = set_uri(db, client_id, file_id, "second", replaces="first", now=NOON + LIFETIME)
    assert (file.google_file_uri, file.google_file_expires_at) == ("second", NOON + 2 * LIFETIME)


@pytest.mark.parametrize("replaces", [None, "", "FIRST", "first ", "second"])
def test_a_newer_uri_is_not_overwritten_and_none_is_in_the_error(
    db: Database, client_id: UUID, file_id: UUID, replaces: str | None
) -> None:
    set_uri(db, client_id, file_id, "first")
    before = everything(db)
    with pytest.raises(FileUriChanged, match=str(file_id)) as caught:
        set_uri(db, client_id, file_id, "second", replaces=replaces, now=NOON + LIFETIME)
    assert caught.value.file_id == file_id
    assert "first" not in shown(caught.value)
    assert "second" not in shown(caught.value)
    assert everything(db) == before


def test_a_uri_that_is_gone_is_not_replaced(db: Database, client_id: UUID, file_id: UUID) -> None:
    with pytest.raises(FileUriChanged):
        set_uri(db, client_id, file_id, replaces="gone")


def test_of_uploads_at_once_one_is_stored_and_the_others_are_told(db: Database, client_id: UUID, file_id: UUID) -> None:
    set_uri(db, client_id, file_id, "old")
    uris = [f"new {index}" for index in range(10)]
    results = outcomes_at_once(*(partial(set_uri, db, client_id, file_id, uri, replaces="old") for uri in uris))
    (winner,) = [index for index, result in enumerate(results) if isinstance(result, ClientFile)]
    assert [type(result) for result in results].count(FileUriChanged) == 9
    with db.tenant_session(client_id) as session:
        assert session.scalars(select(ClientFile.google_file_uri)).one() == f"new {winner}"


def test_a_file_that_is_not_registered_is_an_error(db: Database, client_id: UUID) -> None:
    nobody = uuid4()
    with pytest.raises(FileNotRegistered, match=str(nobody)) as caught:
        set_uri(db, client_id, nobody)
    assert caught.value.file_id == nobody
    assert URI not in str(caught.value)


@pytest.mark.parametrize(
    "parts",
    [
        {"uri": ""},
        {"uri": None},
        {"uri": "segredo" * 80},
        {"uri": "segredo\0"},
        {"uri": "segredo\ud800"},
        {"expires_at": datetime(2026, 3, 2)},  # noqa: DTZ001  # naive on purpose
        {"now": datetime(2026, 3, 2)},  # noqa: DTZ001  # naive on purpose
        {"now": "2026-03-02"},
    ],
)
def test_a_uri_or_a_time_that_cannot_be_stored_is_refused_and_not_quoted(
    db: Database, client_id: UUID, file_id: UUID, parts: dict[str, Any]
) -> None:
    before = everything(db)
    with pytest.raises(InvalidValue) as caught:
        set_uri(db, client_id, file_id, **parts)
    assert "segredo" not in shown(caught.value)
    assert everything(db) == before


# --- usable, and needing an upload ------------------------------------------------------------------------------------


def names(found: list[ClientFile]) -> list[str | None]:
    return [file.filename for file in found]


@pytest.fixture
def states(db: Database, client_id: UUID) -> None:
    """Files that expire around an hour after noon, and some about which less is known."""
    hour = NOON + timedelta(hours=1)
    add(db, client_id, "c no uri", None, None)
    add(db, client_id, "d no uri, expiry", None, hour + SECOND)
    add(db, client_id, "b no expiry", URI, None)
    add(db, client_id, "e expired", URI, NOON - SECOND)
    add(db, client_id, "f a second short", URI, hour - SECOND)
    add(db, client_id, "g an hour", URI, hour)
    add(db, client_id, "a two hours", URI, hour + timedelta(hours=1))


@pytest.mark.usefixtures("states")
def test_usable_and_needing_an_upload_divide_the_files(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session, statements_sent() as sent:
        good = files.usable(session, margin=timedelta(hours=1), now=NOON)
        others = files.needing_upload(session, margin=timedelta(hours=1), limit=500, now=NOON)
    assert len(sent) == 2
    assert names(good) == ["a two hours", "g an hour"]
    unknown, known = names(others[:2]), names(others[2:])
    assert sorted(map(str, unknown)) == ["b no expiry", "c no uri"]
    assert known == ["e expired", "f a second short", "d no uri, expiry"]


@pytest.mark.usefixtures("states")
@pytest.mark.parametrize(
    ("margin", "good"),
    [
        (timedelta(0), ["a two hours", "f a second short", "g an hour"]),
        (timedelta(hours=1, microseconds=1), ["a two hours"]),
        (timedelta(hours=2), ["a two hours"]),
        (timedelta(hours=2, microseconds=1), []),
        (timedelta(days=400), []),
    ],
)
def test_a_margin_is_reached_to_the_microsecond(
    db: Database, client_id: UUID, margin: timedelta, good: list[str]
) -> None:
    with db.tenant_session(client_id) as session:
        assert names(files.usable(session, margin=margin, now=NOON)) == good
        assert len(files.needing_upload(session, margin=margin, now=NOON)) == 7 - len(good)


@pytest.mark.usefixtures("states")
def test_the_margin_is_an_hour_unless_it_is_said(db: Database, client_id: UUID) -> None:
    assert timedelta(hours=1) == MARGIN
    with db.tenant_session(client_id) as session:
        assert names(files.usable(session, now=NOON)) == ["a two hours", "g an hour"]
        assert len(files.needing_upload(session, now=NOON)) == 5


@pytest.mark.usefixtures("states")
def test_the_most_pressing_uploads_come_first(db: Database, client_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        every = files.needing_upload(session, now=NOON)
        for limit in (1, 3, 5, 6):
            assert files.needing_upload(session, now=NOON, limit=limit) == every[:limit]


def test_files_that_are_alike_keep_one_order_whatever_the_plan(database_url: str, client_id: UUID) -> None:
    # Without an index, rows come as they were inserted.
    with Database(f"{database_url}&options=-c%20enable_indexscan%3Doff%20-c%20enable_bitmapscan%3Doff") as db:
        for uri, look in ((None, files.needing_upload), (URI, files.usable)):
            ids = sorted(add(db, client_id, "same", uri, NOON + LIFETIME if uri else None) for _ in range(10))
            with db.tenant_session(client_id) as session:
                assert [file.id for file in look(session, now=NOON)] == ids


def test_an_upload_ends_the_need_for_one_until_it_expires(db: Database, client_id: UUID, file_id: UUID) -> None:
    with db.tenant_session(client_id) as session:
        (waiting,) = files.needing_upload(session, now=NOON)
        files.set_google_uri(session, file_id=file_id, uri=URI, replaces=waiting.google_file_uri, now=NOON)
        last = NOON + LIFETIME - MARGIN
        for now, good in ((NOON, True), (last, True), (last + SECOND, False), (NOON + LIFETIME, False)):
            assert (files.usable(session, now=now) == [waiting]) is good
            assert (files.needing_upload(session, now=now) == []) is good


@pytest.mark.parametrize("look", [files.usable, files.needing_upload])
def test_files_that_are_loaded_show_what_others_have_stored(
    db: Database, client_id: UUID, file_id: UUID, look: Callable[..., list[ClientFile]]
) -> None:
    now = NOON if look is files.usable else NOON + LIFETIME
    with db.tenant_session(client_id) as session:
        loaded = session.scalars(select(ClientFile)).one()
        set_uri(db, client_id, file_id)
        assert look(session, now=now) == [loaded]
        assert loaded.google_file_uri == URI


@pytest.mark.parametrize(
    "call",
    [
        lambda session, file_id: files.set_google_uri(session, file_id=file_id, uri="new", replaces=URI, now=NOON),
        lambda session, _: files.register(session, content=CONTENT),
        lambda session, _: files.usable(session, now=NOON),
        lambda session, _: files.needing_upload(session, now=NOON + LIFETIME),
    ],
    ids=["set_google_uri", "register", "usable", "needing_upload"],
)
def test_a_change_that_was_not_flushed_survives(
    db: Database, client_id: UUID, file_id: UUID, call: Callable[[Any, UUID], object]
) -> None:
    set_uri(db, client_id, file_id)
    with db.tenant_session(client_id) as session:
        file = session.scalars(select(ClientFile)).one()
        file.filename = "renamed.pdf"
        call(session, file_id)
        assert file.filename == "renamed.pdf"
    assert register(db, client_id, content=CONTENT).file.filename == "renamed.pdf"


@pytest.mark.parametrize(
    "parts",
    [
        {"margin": -timedelta(microseconds=1)},
        {"now": datetime(2026, 3, 2)},  # noqa: DTZ001  # naive on purpose
    ],
)
def test_a_negative_margin_and_a_naive_time_are_refused(db: Database, client_id: UUID, parts: dict[str, Any]) -> None:
    with db.tenant_session(client_id) as session:
        for look in (files.usable, files.needing_upload):
            with pytest.raises(InvalidValue):
                look(session, **parts)


@pytest.mark.parametrize("limit", [0, -1, 501])
def test_a_limit_is_checked(db: Database, client_id: UUID, limit: int) -> None:
    with db.tenant_session(client_id) as session, pytest.raises(InvalidValue, match="limit"):
        files.needing_upload(session, limit=limit)


@pytest.mark.parametrize("look", [files.usable, files.needing_upload])
def test_looking_reads_the_clients_part_of_the_table(
    db: Database, client_id: UUID, superuser_url: str, look: Callable[..., list[ClientFile]]
) -> None:
    with psycopg.connect(superuser_url) as connection:
        connection.execute(
            "WITH owners AS (INSERT INTO clients (name, token) SELECT 'x', 't' || n FROM generate_series(1, 200) n "
            "RETURNING id) INSERT INTO client_files (client_id, filename) SELECT id, n FROM owners, "
            "generate_series(1, 100) n"
        )
        connection.execute("ANALYZE client_files")
    with db.tenant_session(client_id) as session, statements_sent() as sent:
        look(session, now=NOON)
    ((statement, parameters),) = sent
    with psycopg.connect(superuser_url) as connection:
        plan = connection.execute(b"EXPLAIN " + statement.encode(), parameters).fetchall()
    text = "\n".join(line for (line,) in plan)
    assert "client_files_client_id" in text or "pk_client_files" in text, text
    assert "Seq Scan on client_files" not in text, text


# --- tenancy ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("layers")
def test_another_client_has_its_own_row_and_is_neither_seen_nor_changed(
    db: Database, clients: tuple[UUID, UUID]
) -> None:
    ours, theirs = clients
    first = register(db, theirs, content=CONTENT, filename="theirs.pdf").file
    set_uri(db, theirs, first.id)
    register(db, theirs, content=b"expired")
    before = [row for row in everything(db) if row[0] == theirs]

    second = register(db, ours, content=CONTENT, filename="ours.pdf")
    assert second.created
    assert (second.file.client_id, second.file.filename, second.file.google_file_uri) == (ours, "ours.pdf", None)
    assert second.file.id != first.id
    for replaces in (URI, None):
        with pytest.raises(FileNotRegistered):
            set_uri(db, ours, first.id, "stolen", replaces=replaces)
    with db.tenant_session(ours) as session:
        assert files.usable(session, now=NOON) == []
        assert names(files.needing_upload(session, now=NOON)) == ["ours.pdf"]
        files.set_google_uri(session, file_id=second.file.id, uri="ours", replaces=None, now=NOON)
        assert names(files.usable(session, now=NOON)) == ["ours.pdf"]
    assert [row for row in everything(db) if row[0] == theirs] == before


def test_a_file_of_a_client_that_does_not_exist_is_an_error(db: Database) -> None:
    nobody = uuid4()
    with pytest.raises(ClientNotFound, match=str(nobody)):
        register(db, nobody, content=CONTENT)
    with db.tenant_session(nobody) as session:
        assert files.usable(session) == []
        assert files.needing_upload(session) == []


CALLS: Final[dict[str, Callable[[Any], object]]] = {
    "register": lambda session: files.register(session, content=CONTENT),
    "set_google_uri": lambda session: files.set_google_uri(session, file_id=uuid4(), uri=URI, replaces=None),
    "usable": files.usable,
    "needing_upload": files.needing_upload,
}


@pytest.mark.usefixtures("clients")
@pytest.mark.parametrize("call", CALLS)
def test_a_system_session_is_refused(db: Database, call: str) -> None:
    with db.system_session(reason="test") as session, pytest.raises(TenancyError, match="session of one client"):
        CALLS[call](session)


def test_nothing_is_committed_by_any_of_these(db: Database, client_id: UUID, file_id: UUID) -> None:
    before = everything(db)
    with db.tenant_session(client_id) as session:
        files.register(session, content=b"new")
        files.set_google_uri(session, file_id=file_id, uri=URI, replaces=None)
        session.rollback()
    assert everything(db) == before


def test_everything_works_in_async_sessions(database_url: str, client_id: UUID) -> None:
    async def main() -> None:
        async with Database(database_url) as db, db.async_tenant_session(client_id) as session:
            result = await session.run_sync(files.register, content=CONTENT, filename="a.pdf")
            assert result.created
            assert not (await session.run_sync(files.register, sha256=HASH)).created
            assert await session.run_sync(files.needing_upload, now=NOON) == [result.file]
            file = await session.run_sync(
                files.set_google_uri, file_id=result.file.id, uri=URI, replaces=None, now=NOON
            )
            assert file is result.file
            assert file.google_file_uri == URI
            assert await session.run_sync(files.usable, now=NOON) == [file]

    asyncio.run(main())


def test_no_repr_and_no_log_line_shows_a_uri(
    db: Database, client_id: UUID, file_id: UUID, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with db.tenant_session(client_id) as session:
        seen = [
            files.set_google_uri(session, file_id=file_id, uri=URI, replaces=None, now=NOON),
            files.register(session, content=CONTENT),
            files.usable(session, now=NOON),
            files.needing_upload(session, now=NOON + LIFETIME),
        ]
    text = "".join(map(repr, seen)) + "".join(map(str, seen)) + caplog.text
    assert str(file_id) in text
    assert URI not in text
    assert "secreta" not in text
