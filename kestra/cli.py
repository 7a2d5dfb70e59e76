"""The `kestra` command: migrations from anywhere, with the settings of the application and no `alembic.ini`.

What a command needs is imported when it runs, so that `kestra --help` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

from kestra.errors import KestraError

_EPILOG: Final = "The database is that of KESTRA_DATABASE_URL (or DATABASE_URL); without one, the embedded PostgreSQL."


def parser() -> argparse.ArgumentParser:
    """The command line. Public because a test compares it with the documentation."""
    result = argparse.ArgumentParser(
        prog="kestra", description="Migrate and verify the database of Kestra.", epilog=_EPILOG
    )
    result.add_argument("--version", action="version", version=f"%(prog)s {version('kestra')}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=summary, epilog=_EPILOG)

    upgrade = command("upgrade", "Upgrade the database to a revision.")
    upgrade.add_argument("revision", nargs="?", default="head", help="default: head")
    upgrade.add_argument("--timezone", help="the zone of the timestamps without one that are adopted (default: UTC)")
    downgrade = command("downgrade", "Downgrade the database to a revision.")
    downgrade.add_argument("revision", help="a revision, or -1 for one step back")
    downgrade.add_argument("--timezone", help="the zone of the timestamps below 0002 (default: that of the adoption)")
    stamp = command("stamp", "Record a revision without running a migration: adopt an existing installation.")
    stamp.add_argument("revision", help="0001 for the documented schema")
    command("check", "Fail when the database differs from the models.")
    command("current", "Print the revision of the database.")
    command("verify", "Fail when the database, as this user, does not keep clients apart.")
    _add_fixtures(command("fixtures", "Make up data for tests, and verify rows."))
    return result


def _add_fixtures(fixtures: argparse.ArgumentParser) -> None:
    from kestra.testing import generate  # noqa: PLC0415  # for these commands alone

    commands = fixtures.add_subparsers(dest="fixtures", required=True, metavar="COMMAND")
    generate.add_arguments(
        commands.add_parser("generate", help=generate.SUMMARY, description=generate.SUMMARY, epilog=_EPILOG)
    )
    summary = "Fail when rows are not such as the data access layer leaves them."
    verify = commands.add_parser("verify", help=summary, description=summary, epilog=_EPILOG)
    verify.add_argument(
        "--complete", action="store_true", help="nothing was ever purged: every message has to be there"
    )
    verify.add_argument("--adopted", action="store_true", help="do not fail for what an adopted installation may have")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a `KestraError` is one message on stderr and exit code 1, not a traceback."""
    options = parser().parse_args(arguments)
    try:
        output = _run_fixtures(options) if options.command == "fixtures" else _run(options)
    except KestraError as error:
        sys.stderr.write(f"kestra: {error}\n")
        return 1
    if output:
        sys.stdout.write(f"{output.rstrip()}\n")
    return 0


def _run(options: argparse.Namespace) -> str:
    from kestra import migrate  # noqa: PLC0415  # Alembic

    url = _url()
    match options.command:
        case "upgrade":
            return migrate.upgrade(url, options.revision, timezone=options.timezone)
        case "downgrade":
            return migrate.downgrade(url, options.revision, timezone=options.timezone)
        case "stamp":
            migrate.stamp(url, options.revision)
            return f"The database is recorded as being at {options.revision}."
        case "check":
            migrate.check(url)
            return "The database is what the models say."
        case "verify":
            from kestra.database import Database  # noqa: PLC0415  # the driver

            Database(url).verify()
            return "The database keeps clients apart."
        case _:
            return migrate.current(url) or "(no revision)"


def _run_fixtures(options: argparse.Namespace) -> str:
    if options.fixtures == "verify":
        from kestra.testing import invariants  # noqa: PLC0415  # Alembic

        return invariants.verify(_url(), complete=options.complete, adopted=options.adopted)
    from kestra.testing import generate  # noqa: PLC0415  # for these commands alone

    try:
        return generate.run(options)
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{generate.INTERRUPTED}\n")
        sys.exit(130)


def _url() -> str:
    from kestra.embedded import resolve_url  # noqa: PLC0415  # the driver
    from kestra.settings import Settings  # noqa: PLC0415  # pydantic

    return resolve_url(Settings())
