"""What hand-written SQL and functions may not do in a tenant session, even when a statement is marked.

A marked statement runs under row level security alone, which stands on the transaction's role and setting: SQL that
could change one of them, or end the transaction that they belong to, is refused. So is what runs SQL of its own, which
no filter sees.
"""

import re
from typing import Final

from kestra.errors import UnscopedStatement

_STATEMENT: Final = re.compile(
    r"[\s(]*(explain\s*(\([\w\s,]*\)\s*)?((analyze|verbose)\s+)*)?(select|with|insert|update|delete|values|merge)\b",
    re.IGNORECASE,
)
"""What hand-written SQL may begin with. Everything else is DDL, or touches role, settings or transaction."""

_FUNCTION: Final = re.compile(
    r"\b(set_config|query_to_xml\w*|(?:table|schema|database|cursor)_to_xml\w*|ts_stat|ts_rewrite|dblink\w*|crosstab\w*"
    r"|connectby|xpath_table|lo_\w+|loread|lowrite|setval|currval|lastval|pg_read_\w+|pg_ls_\w+|pg_stat_\w+"
    r"|pg_(?:cancel|terminate)_backend|pg_show_all_settings|pg_prepared_statement|pg_cursor|pg_notify"
    r"|pg_sequence_last_value|pg_(?:try_)?advisory_(?:un)?lock(?:_shared|_all)?)\"?\s*\(",
    re.IGNORECASE,
)
"""Functions that change settings, run SQL given as text, read relations given by name, or outlive the transaction."""

_BEYOND: Final = re.compile(r"""[;'"]|/\*|\*/|\bpg_|(?<!insert )(?<!merge )\binto\b""", re.IGNORECASE)
"""What makes it more than one plain statement: another one, an open literal, a catalog, a table made by SELECT INTO."""

_LEXEMES: Final = re.compile(
    r"""--[^\r\n]* | /\*(?:(?!/\*|\*/).)*\*/ | '(?:[^']|'')*' | "(?P<identifier>(?:[^"]|"")*)" """,
    re.VERBOSE | re.DOTALL,
)
"""Comments and literals, which say nothing, and quoted identifiers, which may name something."""


def check_functions(sql: str) -> None:
    """Return when no function is called that a tenant session must not call.

    Raises:
        UnscopedStatement: One is called that changes settings, or reads what no filter sees.
    """
    found = _FUNCTION.search(sql)
    if found is not None:
        raise UnscopedStatement(
            f"The function {found.group(1)} is refused in a tenant session: it changes settings, reads what no filter "
            "sees, or outlives the transaction. Use a system session."
        )


def check_raw_sql(sql: str) -> None:
    """Return when hand-written SQL is one plain statement that leaves role, settings and transaction alone.

    It fails closed: what it cannot read it refuses. Values, which need none of what it refuses, are parameters.

    Raises:
        UnscopedStatement: It is more than that. The SQL is not in the text: it may quote values.
    """
    plain = " ".join(_LEXEMES.sub(lambda found: f" {found['identifier'] or ''} ", sql).split()).rstrip("; ")
    check_functions(sql)
    check_functions(plain)  # without the comments that may stand before a parenthesis
    unreadable = "\\" in sql or "$" in sql or re.search(r"u&|uescape", sql, re.IGNORECASE)
    if unreadable or _STATEMENT.match(plain) is None or _BEYOND.search(plain):
        raise UnscopedStatement(
            "Hand-written SQL in a tenant session has to be one SELECT, INSERT, UPDATE, DELETE, MERGE or VALUES "
            "statement (or its EXPLAIN) on tables of the client, without backslash, dollar or Unicode quoting: "
            "anything else could touch the role, the settings or the transaction that row level security stands on. "
            "Pass values as parameters, or use a system session."
        )
