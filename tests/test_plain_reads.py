"""Which SELECTs run in a transaction of their own: by the text that is sent to the database."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import (
    ARRAY,
    Column,
    Date,
    DateTime,
    Integer,
    MetaData,
    Numeric,
    Sequence,
    String,
    Table,
    case,
    cast,
    column,
    exists,
    func,
    insert,
    lateral,
    literal,
    literal_column,
    select,
    table,
    text,
    union_all,
    values,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction
from sqlalchemy.types import UserDefinedType

from sqlasession_middleware._database.plain_reads import is_plain_read

ITEMS = Table(
    "item",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("name", String(40)),
    Column("price", Numeric(10, 2)),
    Column("Odd", String(10)),
    Column("update", Integer),
)
ID = ITEMS.c.id


class Encrypted(UserDefinedType[str]):
    """A type whose column calls a function that no element of the statement shows."""

    def get_col_spec(self) -> str:
        return "BYTEA"

    def column_expression(self, column: Any) -> Any:
        return func.decrypt_and_log(column, type_=self)


class Stamp(GenericFunction[Any]):
    """A function whose name in SQL is not its own."""

    name = "upper"
    inherit_cache = True


@compiles(Stamp)
def stamp(element: Any, compiler: Any, **options: Any) -> str:
    return "clock_and_log()"


SECRETS = Table("secret", MetaData(), Column("id", Integer), Column("text", Encrypted()))

PLAIN = [
    select(ITEMS),
    select(ID).where(ITEMS.c.name == "a;b", ID.in_([1, 2]), ITEMS.c.name.like("%x")),
    select(func.count(), func.max(ID), func.sum(ID).filter(ID > 1), func.lower(ITEMS.c.name)),
    select(literal_column("version"), literal_column("pg_backend_pid")),
    select(ITEMS.c.name.label("now()"), ITEMS.c.name.label("for"), ITEMS.c.Odd, literal("insert into", String)),
    select(ID).where(ITEMS.c.name == literal_column("'nextval('")),
    select(ID).where(exists().where(ID == 2)),
    select(func.row_number().over(partition_by=ITEMS.c.name, order_by=ID)),
    select(case((ID == 1, "x"), else_="y"), cast(ID, String(10)), cast(ID, Numeric(4, 1))),
    union_all(select(ID).where(ID == 1), select(ID).where(ID == 2).order_by(ID).limit(1)),
    select(select(ID).where(ID == 1).cte("some").c.id),
    select(lateral(select(ID).where(ID == 1)).c.id),
    select(func.array_agg(ID, type_=ARRAY(Integer)), func.coalesce(func.length(ITEMS.c.name), 0)),
    select(ID).order_by(ITEMS.c.name.desc().nulls_last()).limit(3).offset(2).distinct(),
    select(ID).prefix_with("/* IndexScan(item) */"),
    select(ID).where(ITEMS.c["update"] == 1),
    select(func.extract("year", cast(ITEMS.c.name, Date))),
    select(ID).where(ITEMS.c.name == "nowhere", ITEMS.c.price > 1.5, ID.in_([1, 2])),
    select(literal_column("item.for"), literal_column("1.5"), literal_column("'nowhere'")).where(ID % 2 == 1),
    select(ID).select_from(ITEMS.join(select(ID).subquery(), literal_column("true"))).group_by((ID + 1) * 2),
    select(literal_column("größe"), literal_column("/* c */ count -- c\n (id)")),
]

NOT_PLAIN = [
    text("SELECT 1"),
    text("SELECT id FROM item").columns(ID),
    insert(ITEMS).returning(ID),
    select(ID).with_for_update(),
    select(ID).with_for_update(read=True),
    select(select(ID).with_for_update().subquery().c.id),
    select(insert(ITEMS).values(name="x").returning(ID).cte("written").c.id),
    select(func.now()),
    select(func.pg_backend_pid()),
    select(func.current_timestamp()),
    select(cast(literal_column("current_date"), DateTime)),
    select(ID).where(literal_column("localtime") == ID),
    select(Sequence("item_seq").next_value()),
    select(func.nextval("item_seq")),
    select(func.set_config("a.b", "1", True)),
    select(func.pg_advisory_xact_lock(1)),
    select(func.my_function(ID)),
    select(func.shop.lower(ITEMS.c.name)),
    select(literal_column('"Count"(id)')),
    select(literal_column("count(id)").label("n"), literal_column("txid_current()")),
    select(ID).prefix_with("my_function(1),"),
    select(ID).suffix_with("FOR NO KEY UPDATE"),
    select(ID).select_from(ITEMS).with_statement_hint("FOR SHARE"),
    select(literal_column("1; DELETE FROM item")),
    select(literal_column("E'\\' || my_function(1) --'")),
    select(literal_column("$$a$$")),
    select(literal_column("/* /* */ my_function(1) */ 1")),
    select(literal_column("my_function/* c */(1)")),
    select(literal_column("my_function -- c\n(1)")),
    select(literal_column("1 -- c\r, my_function(1)")),
    select(literal_column("shop . -- c\n lower(1)")),
    select(literal_column("\U0001f600count(1)")),
    select(literal_column("count\xa0(1)")),
    select(literal_column("U&\"!0066\" UESCAPE '!' (1)")),
    select(func.filter(ID)),
    select(func.partition(ID)),
    select(literal_column("ran\u212a(1)")),
    select(ID).limit(literal_column("1.")).with_for_update(read=True),
    select(literal_column("'now'::timestamptz")),
    select(literal_column("timestamp ' TODAY 10:00'")),
    select(cast("now", DateTime)),
    select(cast(["epoch", "tomorrow"], ARRAY(DateTime))),
    select(ID).where(text("changed < :then").bindparams(then=f"{' ' * 200}now")),
    select(ID).where(ID.in_(range(2000))),
    select(SECRETS),
    select(Stamp(ID)),
    select(table("t", column("x"))).where(text("my_function(x)")),
    # These only read, but look as if they called a function. In doubt a statement is no plain read.
    select(select(ID).cte("deep", recursive=True)),
    select(values(column("n", Integer), name="v").data([(1,), (2,)])),
]


#: SQLAlchemy's own choice for psycopg, and one that an application can make.
DIALECTS = {style: postgresql.psycopg.dialect(paramstyle=style) for style in ("pyformat", "format")}


class Context:
    """As much of SQLAlchemy's context as is looked at."""

    def __init__(self, clause: Any, paramstyle: str = "pyformat") -> None:
        options = {"render_postcompile": True}
        self.compiled = clause.compile(dialect=DIALECTS[paramstyle], compile_kwargs=options)
        self.parameters: Any = self.compiled.params
        if self.compiled.positional:
            # SQLAlchemy 2.0 finds a placeholder in a text that looks like one.
            self.parameters = tuple(map(self.parameters.get, self.compiled.positiontup))

    @property
    def statement(self) -> str:
        return str(self.compiled)


@pytest.mark.parametrize("paramstyle", DIALECTS)
@pytest.mark.parametrize(
    ("clause", "expected"), [*((each, True) for each in PLAIN), *((each, False) for each in NOT_PLAIN)]
)
def test_plain_read_is_what_needs_no_transaction(clause: Any, expected: bool, paramstyle: str) -> None:
    context = Context(clause, paramstyle)
    for _ in range(2):  # The second time it is remembered.
        found = is_plain_read(context.statement, context.parameters, context)  # type: ignore[arg-type]
        assert found is expected, context.statement


def test_text_that_looks_like_a_placeholder_is_a_text() -> None:
    """With "format", SQLAlchemy 2.0 replaces it."""
    context = Context(select(literal_column("'%(x' || current_timestamp || ')s'")))
    assert is_plain_read(context.statement, {}, context) is False  # type: ignore[arg-type]


def test_moment_is_looked_for_in_each_execution() -> None:
    """What is remembered of a text says nothing of its parameters."""
    context = Context(select(cast("2020-01-01", DateTime)))
    for value, expected in [("2020-01-01", True), ("now", False), (None, True)]:
        parameters = dict.fromkeys(context.parameters, value)
        assert is_plain_read(context.statement, parameters, context) is expected  # type: ignore[arg-type]


def test_statement_without_sqlalchemys_compiler_is_no_plain_read() -> None:
    context = Context(select(ID))
    context.compiled = None
    assert is_plain_read("SELECT 1", {}, context) is False  # type: ignore[arg-type]
