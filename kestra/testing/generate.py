"""Generated installations from the command line: `python -m kestra.testing.generate`, or `kestra fixtures generate`.

The same seed and sizes are the same rows, byte for byte, on any machine; `--now` is a part of them, and no clock is.

What a run needs is imported when it runs, so that `--help` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from kestra.errors import KestraError

INTERRUPTED: Final = "kestra: interrupted. Nothing was written."
SUMMARY: Final = "Fill a database, or files, with a made-up installation."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("--clients", type=int, default=50, help="how many clients (default: %(default)s)")
    parser.add_argument("--chats", type=int, default=200, help="chats of a client, on average (default: %(default)s)")
    parser.add_argument(
        "--messages", type=int, default=40, help="messages of a chat, on average (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=7, help="the same seed is the same data (default: %(default)s)")
    parser.add_argument(
        "--now",
        type=_instant,
        default="2026-01-15T15:00+00:00",  # a constant: no clock is asked
        help="when the installation ends (default: %(default)s)",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--to", type=Path, help="a file instead of the database: NAME.sql, NAME.ndjson, NAME.json")
    target.add_argument("--append", action="store_true", help="also into a database that has clients already")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _instant(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("no time of ISO 8601, such as 2026-01-15T15:00+00:00") from None


def run(options: argparse.Namespace) -> str:
    """Generate what the options ask for; returns what to say about it.

    Raises:
        KestraError: It cannot be done; what `load` and `write` raise.
    """
    from kestra.testing.installation import Installation  # noqa: PLC0415  # SQLAlchemy
    from kestra.testing.progress import Progress  # noqa: PLC0415  # as above
    from kestra.testing.writing import write  # noqa: PLC0415  # as above

    installation = Installation(
        clients=options.clients,
        chats=options.chats,
        messages=options.messages,
        seed=options.seed,
        now=options.now,
    )
    rows = installation.rows()
    with Progress(rows, quiet=options.quiet) as progress:
        if options.to is not None:
            write(options.to, installation, progress)
        else:
            from kestra.embedded import resolve_url  # noqa: PLC0415  # the driver
            from kestra.settings import Settings  # noqa: PLC0415  # pydantic
            from kestra.testing.loading import load  # noqa: PLC0415  # Alembic

            load(resolve_url(Settings()), installation, progress, append=options.append)
    return f"{rows:,} rows are in {options.to or 'the database'}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a `KestraError` is one message on stderr and exit code 1, as of `kestra`."""
    parser = argparse.ArgumentParser(prog="python -m kestra.testing.generate", description=SUMMARY)
    add_arguments(parser)
    try:
        output = run(parser.parse_args(arguments))
    except KestraError as error:
        sys.stderr.write(f"kestra: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{INTERRUPTED}\n")
        return 130
    sys.stdout.write(f"{output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
