"""What users feel: units of work over a network on which each round trip takes 1 ms, 0.5 ms each way.

The same candidates as without a network (isolation, reading, ingesting), through a proxy that delays what it passes on.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Final
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict

from benchmarks import ingesting, isolation, reading
from benchmarks.harness import BenchmarkDatabase, Row, Timing, compare, database, rows
from kestra.testing.installation import Installation

ONE_WAY: Final = 0.0005
"""Seconds."""

AWAY: Final = "1 ms away"
_DEFAULT_PORT: Final = "5432"
_BLOCK: Final = 1 << 16

Address = str | tuple[str, int]
"""Of a socket: the path of one of Unix, or host and port."""


# --- the proxy --------------------------------------------------------------------------------------------------------


@contextmanager
def proxy(target: Address, *, one_way: float) -> Iterator[int]:
    """The port of 127.0.0.1 on which a process of its own passes bytes on to and fro, each after so many seconds.

    Only the delay is added: what is on its way does not wait for what was sent before it.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(target, one_way, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve(target: Address, one_way: float, told: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        told.send(server.getsockname()[1])
        while True:
            near, _ = server.accept()
            far = _connected(target)
            for connection in (near, far):
                if connection.family != getattr(socket, "AF_UNIX", None):
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink in ((near, far), (far, near)):
                Thread(target=_take, args=(source, sink, one_way), daemon=True).start()


def _connected(target: Address) -> socket.socket:
    if isinstance(target, tuple):
        return socket.create_connection(target)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(target)
    return connection


def _take(source: socket.socket, sink: socket.socket, one_way: float) -> None:
    due: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
    Thread(target=_deliver, args=(due, sink), daemon=True).start()
    block = b"?"
    while block:
        block = b""
        with suppress(OSError):
            block = source.recv(_BLOCK)
        due.put((time.monotonic() + one_way, block))


def _deliver(due: SimpleQueue[tuple[float, bytes]], sink: socket.socket) -> None:
    with suppress(OSError):
        while True:
            moment, block = due.get()
            time.sleep(max(moment - time.monotonic(), 0))
            if not block:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(block)


def address(url: str) -> Address:
    """Where the server of a URL listens."""
    parts = conninfo_to_dict(url)
    host, port = str(parts.get("host", "localhost")), str(parts.get("port", _DEFAULT_PORT))
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, int(port))


def through(port: int, url: str) -> str:
    """The same URL by way of a port of this machine."""
    parts = {name: quote(str(value), safe="") for name, value in conninfo_to_dict(url).items()}
    login = f"{parts.get('user', '')}:{parts.get('password', '')}"
    return f"postgresql://{login}@127.0.0.1:{port}/{parts['dbname']}?sslmode=disable"


# --- what is measured through it --------------------------------------------------------------------------------------


def run(*, quick: bool) -> Iterator[Row]:
    """A round trip, the ORM, `messages.memory`, and `db.ingest`: also with threads, and against batches."""
    iterations = 10 if quick else 1000
    sizes = Installation(clients=5, chats=20, messages=40) if quick else Installation(clients=20, chats=50, messages=40)
    with database(sizes) as made, proxy(address(made.superuser_url), one_way=ONE_WAY) as port:
        far = BenchmarkDatabase(*(through(port, url) for url in (made.url, made.plain_url, made.superuser_url)))
        chats = made.chats(messages=isolation.NEWEST, each=1)
        with psycopg.connect(far.superuser_url, autocommit=True) as connection:
            timing: Timing = compare({"": lambda _: connection.execute("SELECT 1")}, iterations)[""]
            yield Row(f"a round trip, {AWAY}", "SELECT 1", timing.median, timing.p95)
            clients = connection.execute("SELECT id, token FROM clients ORDER BY id").fetchall()
        with isolation.candidates(far, chats) as units:
            del units[isolation.RECIPE]
            timings = compare(units, iterations, same=isolation.messages_of)
            yield from rows(f"last 20 messages, ORM, {AWAY}", timings, base=isolation.BY_HAND)
        with reading.candidates(far, [(client_id, chat_id) for client_id, [chat_id] in chats]) as functions:
            timings = compare(functions[reading.MEMORY], iterations, same=reading.content_of)
            yield from rows(f"messages.memory, 20 messages, {AWAY}", timings, base=reading.BY_HAND)
        with ingesting.candidates(far, clients) as ingests:
            timings = compare(ingests, iterations, same=ingesting.is_stored)
            yield from rows(f"ingest of a message, {AWAY}", timings, base=ingesting.ONE)
        yield from ingesting.with_threads(far, clients, f"{ingesting.WITH_THREADS}, {AWAY}", quick=quick)
        yield from ingesting.in_batches(far, clients, f"{ingesting.BATCHES}, {AWAY}", iterations)
