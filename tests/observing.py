"""What a test sees from outside: the statements that are sent, their plans, and what is printed of an error."""

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session


class Sent(NamedTuple):
    """A statement with psycopg's placeholders, and its parameters."""

    statement: str
    parameters: Mapping[str, Any]


@contextmanager
def statements_sent() -> Iterator[list[Sent]]:
    """What any engine sends in the block, whoever's session it is."""
    sent: list[Sent] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: Mapping[str, Any], *_: object) -> None:
        sent.append(Sent(statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def explain(session: Session, sent: Sent, *options: str) -> dict[str, Any]:
    """The plan that PostgreSQL has for a statement in this session, under row level security."""
    statement = f"EXPLAIN ({', '.join([*options, 'FORMAT JSON'])}) {sent.statement}"
    rows = session.connection().exec_driver_sql(statement, sent.parameters, execution_options={"kestra_raw_sql": True})
    plan: dict[str, Any] = rows.scalar_one()[0]["Plan"]
    return plan


def explain_prepared(connection: psycopg.Connection[Any], sent: Sent, *options: str) -> dict[str, Any]:
    """The plan of a prepared statement, which is one for every value where `plan_cache_mode` says so."""
    # psycopg's names to the server's numbers; every parameter has its cast behind it.
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", sent.statement)))
    numbered = re.sub(r"%\((\w+)\)s", lambda found: f"${names.index(found[1]) + 1}", sent.statement)
    values = sql.SQL(", ").join(sql.Literal(sent.parameters[name]) for name in names)
    explanation = sql.SQL("EXPLAIN ({}) EXECUTE sent({})").format(
        sql.SQL(", ").join(map(sql.SQL, [*options, "FORMAT JSON"])), values
    )
    connection.execute(f"PREPARE sent AS {numbered}")
    [[[top]]] = connection.execute(explanation).fetchall()
    connection.execute("DEALLOCATE sent")
    plan: dict[str, Any] = top["Plan"]
    return plan


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The nodes of a plan, each before those below it."""
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


def shown(error: BaseException | None) -> str:
    """What is printed of an error and of what led to it, told or not, but for the lines of source."""
    if error is None:
        return ""
    lines = traceback.format_exception_only(error)
    return "".join(lines) + repr(error) + shown(error.__cause__) + shown(error.__context__)
