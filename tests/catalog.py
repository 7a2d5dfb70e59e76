"""The schema of a database as data, so that two schemas can be compared and the difference read."""

from typing import Final

import psycopg
from psycopg.rows import tuple_row

_OURS: Final = "n.nspname = 'public' AND c.relname <> 'alembic_version' AND c.relname NOT LIKE 'alembic\\_version\\_%'"

_QUERIES: Final = {
    "relation": f"""
        SELECT c.relname, c.relkind, c.relpersistence, c.relrowsecurity, c.relforcerowsecurity, c.relreplident,
               obj_description(c.oid, 'pg_class')
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {_OURS}
    """,
    "column": f"""
        SELECT c.relname, a.attname, a.attnum, format_type(a.atttypid, a.atttypmod), a.attnotnull,
               pg_get_expr(d.adbin, d.adrelid), a.attidentity, a.attgenerated, col_description(c.oid, a.attnum)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relkind = 'r' AND {_OURS}
    """,
    "constraint": f"""
        SELECT c.relname, k.conname, pg_get_constraintdef(k.oid), k.convalidated, k.condeferrable
        FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE {_OURS}
    """,
    "index": f"""
        SELECT c.relname, pg_get_indexdef(i.indexrelid), i.indisvalid, i.indisprimary, i.indisreplident
        FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND {_OURS}
    """,
    "sequence": """
        SELECT s.sequencename, s.data_type::text, s.start_value, s.increment_by, s.cycle, o.relname,
               a.attname, d.deptype
        FROM pg_sequences s
        JOIN pg_depend d ON d.objid = format('%I.%I', s.schemaname, s.sequencename)::regclass
            AND d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0
        JOIN pg_class o ON o.oid = d.refobjid
        JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
        WHERE s.schemaname = 'public'
    """,
    "policy": """
        SELECT tablename, policyname, permissive, roles::text, cmd, qual, with_check FROM pg_policies
        WHERE schemaname = 'public'
    """,
    "grant": f"""
        SELECT c.relname, g.grantee::regrole::text, g.privilege_type, g.is_grantable
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        CROSS JOIN LATERAL aclexplode(
            coalesce(c.relacl, acldefault((CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END)::"char", c.relowner))
        ) g
        WHERE c.relkind IN ('r', 'S') AND {_OURS}
    """,
    "column grant": f"""
        SELECT c.relname, a.attname, g.grantee::regrole::text, g.privilege_type, g.is_grantable
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
        CROSS JOIN LATERAL aclexplode(a.attacl) g WHERE {_OURS}
    """,
    "schema grant": """
        SELECT n.nspname, g.grantee::regrole::text, g.privilege_type, g.is_grantable
        FROM pg_namespace n CROSS JOIN LATERAL aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) g
        WHERE n.nspname = 'public'
    """,
    "trigger": f"""
        SELECT c.relname, t.tgname, pg_get_triggerdef(t.oid)
        FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE NOT t.tgisinternal AND {_OURS}
    """,
    "function": """
        SELECT p.proname, pg_get_functiondef(p.oid) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname = 'public'
    """,
}

Catalog = frozenset[tuple[object, ...]]
"""One tuple for each thing in the schema: its kind, its name or its table's, and everything that defines it."""


def snapshot(url: str) -> Catalog:
    """What is in the schema `public`, apart from Alembic's own table."""
    with psycopg.connect(url, row_factory=tuple_row) as connection:
        return frozenset((kind, *row) for kind, query in _QUERIES.items() for row in connection.execute(query))


def without(catalog: Catalog, table: str) -> Catalog:
    """The same schema without one table and what belongs to it."""
    return frozenset(thing for thing in catalog if table not in str(thing[1]))


def kind(catalog: Catalog, *kinds: str) -> Catalog:
    """The things of some kinds."""
    return frozenset(thing for thing in catalog if thing[0] in kinds)
