"""Which statements may go to a replica (G15), and which are known to have written (G13)."""

from __future__ import annotations

import pytest
from sqlalchemy import (
    Column,
    ForeignKey,
    Integer,
    MetaData,
    Sequence,
    String,
    Table,
    case,
    delete,
    exists,
    func,
    insert,
    literal_column,
    select,
    text,
    update,
)  # fmt: skip
from sqlalchemy.orm import aliased, registry
from sqlalchemy.schema import CreateTable

from sqlasession_middleware._sessions.statements import is_read, is_read_throughout

metadata = MetaData()
shop = Table("shop", metadata, Column("id", Integer, primary_key=True), Column("name", String(20)))
item = Table("item", metadata, Column("id", Integer, primary_key=True), Column("shop_id", ForeignKey("shop.id")))
numbers = Sequence("numbers", metadata=metadata)
stored = insert(shop).values(name="x").returning(shop.c.id).cte()


class Shop:
    pass


registry(metadata=metadata).map_imperatively(Shop, shop)

READS = {
    "entity": select(Shop),
    "columns": select(shop.c.name).where(shop.c.id == 1),
    "join": select(Shop, item).join(item, item.c.shop_id == shop.c.id).order_by(shop.c.name).limit(5),
    "alias": select(aliased(Shop)),
    "count": select(func.count()).select_from(Shop),
    "window": select(shop.c.id, func.row_number().over(order_by=shop.c.name)),
    "case": select(case((shop.c.id == 1, "one"), else_="more")),
    "exists": exists().where(shop.c.id == 1).select(),
    "union": select(Shop).union(select(Shop)),
    "subquery": select(select(shop).subquery()),
    "cte": select(select(shop).cte()),
    "hint": select(Shop).prefix_with("/*+ NoIndexScan(shop) */"),
    "from text": select(Shop).from_statement(text("SELECT * FROM shop")),
    "text": text("  select 1"),
    "text with a semicolon at the end": text("SELECT 1 ; "),
    "text with a column like a word that writes": text("SELECT shop.delete, 'update' FROM shop"),
    "text WITH": text("WITH a AS (SELECT 1) SELECT * FROM a"),
    "text SHOW": text("SHOW server_version"),
    "text EXPLAIN": text("EXPLAIN SELECT 1"),
    "text VALUES": text("VALUES (1)"),
}  # fmt: skip

WRITES = {
    "insert": insert(shop),
    "update": update(shop),
    "delete": delete(shop),
    "insert with RETURNING": select(Shop).from_statement(insert(Shop).returning(Shop)),
    "FOR UPDATE": select(Shop).with_for_update(),
    "FOR SHARE": select(Shop).with_for_update(read=True),
    "DDL": CreateTable(shop),
    "sequence": numbers,
    "function": func.now(),
    "text INSERT": text("INSERT INTO shop VALUES (1)"),
    "text CALL": text("CALL tidy_up()"),
    "text FOR UPDATE": text("SELECT * FROM shop FOR UPDATE"),
    "text FOR NO KEY UPDATE": text("SELECT * FROM shop FOR NO KEY UPDATE SKIP LOCKED"),
    "text LOCK IN SHARE MODE": text("SELECT * FROM shop LOCK IN SHARE MODE"),
    "DML as a text": select(Shop).from_statement(text("DELETE FROM shop RETURNING *").columns(shop.c.id)),
    "text SELECT INTO": text("SELECT * INTO more FROM shop"),
    "text WITH that writes": text("WITH gone AS (DELETE FROM shop RETURNING id) SELECT * FROM gone"),
    "text EXPLAIN ANALYZE": text("EXPLAIN ANALYZE DELETE FROM shop"),
    "two statements": text("SELECT 1; DELETE FROM shop"),
    "comment first": text("/* nobody knows */ SELECT 1"),
}  # fmt: skip

#: What looks like a read, unless one looks into it.
HIDDEN_WRITES = {
    "FOR UPDATE as a text": select(Shop).suffix_with("FOR UPDATE"),
    "CTE that writes by a text": select(text("DELETE FROM shop RETURNING id").columns(shop.c.id).cte()),
    "CTE that writes": select(stored),
    "CTE that writes in a join": select(Shop).join(stored, stored.c.id == shop.c.id),
    "CTE that writes and is not used": select(Shop).add_cte(stored),
    "CTE that writes in a union": select(shop.c.id).union(select(stored.c.id)),
    "FOR UPDATE in a subquery": select(Shop).where(shop.c.id.in_(select(item.c.shop_id).with_for_update())),
    "sequence's next value": select(numbers.next_value()),
    "nextval()": select(func.nextval("numbers")),
    "nextval() as a text": select(literal_column("nextval('numbers')")),
    "advisory lock": select(func.pg_advisory_xact_lock(1)),
    "advisory lock in WHERE": select(Shop).where(text("pg_try_advisory_lock(1)")),
    "MariaDB's sequence": text("SELECT NEXT VALUE FOR numbers"),
    "text nextval()": text("SELECT nextval('numbers')"),
    "text setval()": text("SELECT setval ('numbers', 1)"),
    "text NOTIFY": text("SELECT pg_notify('topic', 'news')"),
    "text GET_LOCK": text("SELECT GET_LOCK('name', 1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_read(name: str) -> None:
    assert is_read(READS[name])
    assert is_read_throughout(READS[name])


@pytest.mark.parametrize("name", WRITES)
def test_write(name: str) -> None:
    assert not is_read(WRITES[name])
    assert not is_read_throughout(WRITES[name])


@pytest.mark.parametrize("name", HIDDEN_WRITES)
def test_hidden_write(name: str) -> None:
    assert not is_read_throughout(HIDDEN_WRITES[name])
