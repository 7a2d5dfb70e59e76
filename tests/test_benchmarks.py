"""The benchmarks measure what they say: their arithmetic, their proxy, and each of them in a tiny form."""

import json
import socket
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from benchmarks import __main__ as program
from benchmarks import harness, latency
from benchmarks.chart import svg
from benchmarks.harness import ROUNDS, Candidate, Row, Timing, compare, compare_in_rounds, rows
from kestra.testing.databases import Server

FOLDER = Path(harness.__file__).parent


@pytest.fixture
def running(kestra_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of the tests is the one of the benchmarks."""
    monkeypatch.setattr(harness, "_running", kestra_server)


def parsed(xml: str) -> ET.Element:
    return ET.fromstring(xml)  # noqa: S314  # our own


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_a_timing_knows_its_median_and_what_95_of_100_runs_do_not_exceed() -> None:
    timing = Timing("", [float(number) for number in range(1, 101)])
    assert (timing.median, timing.p95) == (50.5, 96.0)
    assert (Timing("", [3.0]).median, Timing("", [3.0]).p95) == (3.0, 3.0)


def test_candidates_take_turns_in_the_same_iteration_and_in_no_fixed_order() -> None:
    seen: list[tuple[str, int]] = []
    candidates = {name: lambda iteration, name=name: seen.append((name, iteration)) for name in "ab"}
    timings = compare(candidates, 100)
    assert [iteration for _, iteration in seen] == [number for number in range(100) for _ in "ab"]
    assert {"".join(name for name, _ in seen[start : start + 2]) for start in range(0, 200, 2)} == {"ab", "ba"}
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 90, "b": 90}
    assert all(timing.seconds == sorted(timing.seconds) for timing in timings.values())


def test_rounds_have_candidates_of_their_own_and_their_runs_are_counted_together() -> None:
    made: list[list[int]] = []
    over: list[int] = []

    @contextmanager
    def candidates() -> Iterator[dict[str, Candidate]]:
        made.append([])
        yield {"a": made[-1].append, "b": lambda _: None}
        over.append(len(made))

    timings = compare_in_rounds(candidates, 100)
    assert made == [[*range(20)]] * ROUNDS
    assert over == [1, 2, 3, 4, 5]
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 90, "b": 90}
    assert all(timing.seconds == sorted(timing.seconds) for timing in timings.values())


def test_a_candidate_that_finds_something_else_is_no_candidate() -> None:
    with pytest.raises(AssertionError, match="has found something else than"):
        compare({"a": lambda _: [1, 2], "b": lambda _: [1]}, 1, same=len)
    compare({"a": lambda _: [1, 2], "b": lambda _: [3, 4]}, 1, same=len)


def test_programs_that_keep_the_time_themselves_have_a_turn_in_every_round() -> None:
    turns: list[str] = []

    @contextmanager
    def candidates() -> Iterator[dict[str, Candidate]]:
        yield {"a": lambda _: turns.append("a")}

    def burst(count: int) -> list[float]:
        turns.append("program")
        return [9.0, *(1.0 for _ in range(count - 1))]

    timings = compare_in_rounds(candidates, 50, bursts={"program": burst})
    assert turns == [*["a"] * 10, "program"] * ROUNDS
    assert timings["program"].seconds == [1.0] * 45


def test_ratios_are_those_of_the_medians_and_the_base_comes_first() -> None:
    timings = {"new": Timing("new", [3.0]), "old": Timing("old", [2.0]), "odd": Timing("odd", [1.0])}
    found = list(rows("what", timings, base="old", bounds={"new": 1.5}))
    assert [(row.candidate, row.median, row.ratio, row.bound) for row in found] == [
        ("old", 2.0, None, None),
        ("new", 3.0, 1.5, 1.5),
        ("odd", 1.0, 0.5, None),
    ]


@pytest.mark.parametrize(
    ("row", "held"),
    [
        (Row("", "", 9.0, ratio=1.5, bound=1.5), True),
        (Row("", "", 1.0, ratio=1.6, bound=1.5), False),
        (Row("", "", 1.0, ratio=3.0, bound=3.0, at_least=True), True),
        (Row("", "", 9.0, ratio=2.9, bound=3.0, at_least=True), False),
        (Row("", "", 1.0, bound=1.0), True),
        (Row("", "", 2.0, bound=1.0), False),
        (Row("", "", 2.0, ratio=2.0), None),
    ],
)
def test_a_bound_is_held_or_missed_by_the_ratio_and_without_one_by_the_median(row: Row, held: object) -> None:
    assert row.held is held


# --- the program ------------------------------------------------------------------------------------------------------

ROWS = [
    Row("<reading> & 'writing'", "by hand", 0.001, 0.002),
    Row("<reading> & 'writing'", "kestra", 0.0012, 0.002, ratio=1.2, bound=1.5),
    Row("messages a second", "kestra", 900.0, unit="/s", ratio=9.0, bound=3.0, at_least=True),
    Row("nothing", "kestra", 0.0, unit=""),
]
MISSED = Row("reading", "slow", 0.003, ratio=3.0, bound=1.5)


@pytest.fixture
def scenario(monkeypatch: pytest.MonkeyPatch, running: None) -> list[Row]:  # noqa: ARG001  # the server
    """The rows of the only scenario there is."""
    found = [*ROWS]
    modules = {"benchmarks.made_up": SimpleNamespace(run=lambda **_: iter(found))}
    monkeypatch.setattr(program, "SCENARIOS", ("made_up",))
    monkeypatch.setattr(program, "import_module", modules.__getitem__)
    return found


@pytest.mark.usefixtures("scenario")
def test_results_are_printed_and_written_as_json_and_as_a_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = tmp_path / "new" / "results.json", tmp_path / "chart.svg"
    assert program.main(["--json", str(paths[0]), "--svg", str(paths[1])]) == 0
    assert "1.20 ms" in capsys.readouterr().out
    results = json.loads(paths[0].read_text(encoding="utf-8"))
    assert results["quick"] is False
    assert results["machine"]["postgresql"].startswith("PostgreSQL ")
    assert [(row["candidate"], row["held"]) for row in results["rows"]] == [
        ("by hand", None),
        ("kestra", True),
        ("kestra", True),
        ("kestra", None),
    ]
    chart = parsed(paths[1].read_text(encoding="utf-8"))
    assert chart.tag == "{http://www.w3.org/2000/svg}svg"
    assert "<reading> & 'writing'" in [text.text for text in chart.iter("{http://www.w3.org/2000/svg}text")]


def test_the_mark_of_a_bound_stands_at_the_median_of_the_base_times_the_bound() -> None:
    base, other = Row("w", "base", 0.5), Row("w", "other", 0.4, ratio=0.8, bound=2.0)
    boxes = [box.attrib for box in parsed(svg([base, other], subtitle="")).iter("{http://www.w3.org/2000/svg}rect")]
    bar_of_base, bar_of_other, mark = boxes[-3:]
    assert float(mark["x"]) - float(bar_of_base["x"]) == pytest.approx(2 * float(bar_of_base["width"]), abs=0.2)
    assert float(bar_of_other["width"]) == pytest.approx(0.8 * float(bar_of_base["width"]), abs=0.2)


@pytest.mark.parametrize(("check", "status"), [(["--check"], 1), ([], 0)])
def test_a_missed_bound_fails_the_check_alone(
    scenario: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str], check: list[str], status: int
) -> None:
    scenario.append(MISSED)
    assert program.main([*check, f"--json={tmp_path / 'j'}", f"--svg={tmp_path / 's'}"]) == status
    assert "missed: reading: slow" in capsys.readouterr().out


@pytest.mark.usefixtures("scenario")
def test_a_check_in_which_every_bound_is_held_succeeds(tmp_path: Path) -> None:
    assert program.main(["--check", f"--json={tmp_path / 'j'}", f"--svg={tmp_path / 's'}"]) == 0


@pytest.mark.parametrize("arguments", [["--quick", "--check"], ["no_such_scenario"]])
def test_what_cannot_be_measured_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(arguments)


def test_every_scenario_is_in_the_table() -> None:
    modules = [path.stem for path in FOLDER.glob("*.py") if "\ndef run(*, quick: bool)" in path.read_text("utf-8")]
    assert sorted(modules) == sorted(program.SCENARIOS)


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("name", program.SCENARIOS)
def test_a_scenario_runs_in_its_quick_form(name: str) -> None:
    found = list(import_module(f"benchmarks.{name}").run(quick=True))
    assert found
    assert all(row.median >= 0 for row in found)
    assert any(row.bound is not None for row in found) or name == "latency"
    assert parsed(svg(found, subtitle="")).tag.endswith("svg")


# --- the proxy --------------------------------------------------------------------------------------------------------


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """The address of a server that sends back what it gets, and closes when the other side does."""

    def serve(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                while block := connection.recv(1 << 16):
                    connection.sendall(block)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=serve, args=(server,))
        thread.start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def exchanged(connection: socket.socket, sent: bytes) -> bytes:
    """What comes back for what is sent."""
    received = bytearray()
    sender = Thread(target=connection.sendall, args=(sent,))
    sender.start()
    while len(received) < len(sent):
        received += connection.recv(1 << 16)
    sender.join()
    return bytes(received)


def test_the_proxy_passes_every_byte_on_and_delays_each_way(echo: tuple[str, int]) -> None:
    everything = bytes(range(256)) * 20_000
    with latency.proxy(echo, one_way=0.05) as port, socket.create_connection(("127.0.0.1", port), 30) as connection:
        start = time.monotonic()
        assert exchanged(connection, b"?") == b"?"
        assert time.monotonic() - start >= 0.1
        assert exchanged(connection, everything) == everything
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_what_is_on_its_way_does_not_wait_for_what_was_sent_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 3))
        now[0] += seconds

    monkeypatch.setattr(latency, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    due: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
    for moment, block in ((100.5, b"a"), (100.6, b"b"), (100.6, b"c"), (100.7, b"")):
        due.put((moment, block))
    near, far = socket.socketpair()
    with near, far:
        far.settimeout(30)
        latency._deliver(due, near)  # noqa: SLF001  # half of the proxy
        assert far.recv(10) == b"abc"
        assert far.recv(10) == b""
    assert slept == [0.5, 0.1, 0.0, 0.1]


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("postgresql://a@/b?host=/run/pg&port=5433", "/run/pg/.s.PGSQL.5433"),
        ("postgresql://a@/b?host=/run/pg", "/run/pg/.s.PGSQL.5432"),
        ("postgresql://a:p%40ss@example.org:6000/b", ("example.org", 6000)),
    ],
)
def test_the_proxy_knows_where_the_server_of_a_url_listens(url: str, where: Any) -> None:
    assert latency.address(url) == where


def test_a_url_through_the_proxy_keeps_user_password_and_database() -> None:
    url = latency.through(7000, "postgresql://a%40b:p%2Fw@/d%20b?host=/run/pg")
    assert url == "postgresql://a%40b:p%2Fw@127.0.0.1:7000/d%20b?sslmode=disable"


def test_round_trips_are_counted_where_sending_ends(kestra_server: Server) -> None:
    engine = create_engine(kestra_server.url, pool_size=1, max_overflow=0)

    def twice(_: int) -> None:
        with engine.connect() as connection:  # BEGIN, two statements, ROLLBACK
            connection.execute(text("SELECT 1"))
            connection.execute(text("SELECT 2"))

    def in_a_pipeline(_: int) -> None:
        with engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            driver.autocommit = True
            with driver.pipeline():
                driver.execute("SELECT 1")
                driver.execute("SELECT 2")
            driver.autocommit = False

    assert harness.round_trips(engine, twice) == 4
    assert harness.round_trips(engine, in_a_pipeline) == 1
    engine.dispose()
