"""How far a long piece of work is: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TextIO

_WIDTH: Final = 24
_ON_A_TERMINAL: Final = 0.2
_ELSEWHERE: Final = 5.0
"""Seconds between two reports."""


class Progress:
    """Rows done, rows a second and the time that is left, on a stream. Use it as a context manager."""

    def __init__(
        self,
        total: int,
        *,
        stream: TextIO | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        Args:
            total: How many rows there will be, at least 1.
            stream: Where reports go; None is stderr.
            quiet: Report nothing.
            clock: Seconds.
        """
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._done = 0
        self._started = self._reported = clock()

    def advance(self, rows: int) -> None:
        """So many rows more are done."""
        self._done += rows
        now = self._clock()
        if now - self._reported >= (_ON_A_TERMINAL if self._terminal else _ELSEWHERE):
            self._reported = now
            self._report(now)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Report the end, unless nothing was done."""
        self._report(self._clock())
        if self._terminal and self._done and not self._quiet:
            self._stream.write("\n")

    def _report(self, now: float) -> None:
        if self._quiet or not self._done:
            return
        rate = self._done / max(now - self._started, 1e-9)
        left = _duration((self._total - self._done) / rate)
        text = f"{self._done:,} of {self._total:,} rows, {rate:,.0f} rows/s, {left} left"
        if self._terminal:
            filled = _WIDTH * self._done // self._total
            # To the end of the line: a shorter report leaves nothing of the one before.
            self._stream.write(f"\r[{'#' * filled}{'.' * (_WIDTH - filled)}] {text}\x1b[K")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
