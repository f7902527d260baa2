"""What is shown of statements and their values, and what is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import (
    JSON,
    Column,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    func,
    insert,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqlasession_middleware._recording.blocks import recorded
from sqlasession_middleware._recording.masking import (
    MASK,
    is_secret,
    mask_parameters,
    mask_source,
    mask_sql,
    shown_error,
    without_values,
)
from sqlasession_middleware._recording.record import Statement

SECRET = "hunter2-s3cret"
OTHER = "another-s3cret"

metadata = MetaData()
users = Table(
    f"users_{uuid4().hex[:12]}",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(50), unique=True),
    Column("password", String(50)),
    Column("api_key", String(50), key="code"),
    Column("settings", JSON),
    Column("picture", LargeBinary),
)


SECRETS = """
    password user_password passwordHash new_passwd pwd secret client_secret token csrf_token apiKey api_key key
    credentials session_id sessionid otp PIN auth signature cookie
"""


@pytest.mark.parametrize("name", SECRETS.split())
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["id", "name", "author", "keyboard", "monkey", "session", "opinion", "passenger", "hashtag", "salted", "state"],
)
def test_names_of_no_secrets(name: str) -> None:
    assert not is_secret(name)


@pytest.fixture
def run(database_url: str) -> Iterator[Callable[[Any], Statement]]:
    """Executes statements, and returns what was recorded of the last one."""
    engine = create_engine(database_url)
    metadata.create_all(engine)

    def run(*executed: Any) -> Statement:
        with recorded() as record, Session(engine) as session:
            try:
                if callable(executed[0]):
                    executed[0](session)
                else:
                    session.execute(*executed)
            except DBAPIError:
                pass
        return [each for each in record.statements if "SAVEPOINT" not in each.sql][-1]

    yield run
    metadata.drop_all(engine)
    engine.dispose()


#: What is executed, and which values may be shown.
CASES: dict[str, tuple[tuple[Any, ...], set[str]]] = {
    "a condition": ((select(users.c.id).where(users.c.password == SECRET, users.c.name == "Ada"),), {"'Ada'"}),
    "a column with another key": ((select(users.c.id).where(users.c.code == SECRET),), set()),
    "a list": ((select(users.c.id).where(users.c.password.in_([SECRET, OTHER]), users.c.id == 7),), {"7"}),
    "a list of others": ((select(users.c.id).where(users.c.id.in_([5, 6]), users.c.password == SECRET),), {"5", "6"}),
    "a function": ((select(users.c.id).where(users.c.password == func.upper(SECRET), users.c.id == 7),), {"7"}),
    "an insert": ((insert(users).values(name="Ada", password=SECRET, code=OTHER),), {"'Ada'"}),
    "many rows": (
        (insert(users), [{"name": "Ada", "password": SECRET}, {"name": "Lin", "password": OTHER}]),
        {"'Ada'", "'Lin'"},
    ),
    "rows of one insert": (
        (insert(users).values([{"name": "Ada", "password": SECRET}, {"name": "Lin", "password": OTHER}]),),
        {"'Ada'", "'Lin'"},
    ),
    "an update": (
        (update(users).where(users.c.id == 7).values(name="Ada", password=func.upper(SECRET)),),
        {"'Ada'", "7"},
    ),
    "a text": ((text("SELECT :name, :token"), {"name": "Ada", "token": SECRET}), {"'Ada'"}),
    "JSON": ((text("SELECT :data"), {"data": json.dumps({"name": "Ada", "password": SECRET})}), set()),
    "a URL": ((text("SELECT :url"), {"url": f"https://example.org/?page=1&token={SECRET}"}), set()),
}


@pytest.mark.parametrize("case", CASES)
def test_values_of_secrets_are_not_shown(run: Any, case: str) -> None:
    executed, shown = CASES[case]
    statement = run(*executed)
    masked = mask_parameters(statement)
    values = {value for row in masked.sets for _, value in row}
    assert SECRET not in repr(masked.sets)
    assert OTHER not in repr(masked.sets)
    assert MASK in values
    assert shown <= values
    assert values - shown <= {MASK, "NULL", "'null'"}
    assert masked.has_secrets
    assert SECRET in "".join(masked.secrets)


def test_values_are_hidden_when_the_engine_says_so(run: Any) -> None:
    statement = run(select(users.c.id).where(users.c.name == "Ada", users.c.id == 7))
    masked = mask_parameters(statement, is_hidden=True)
    assert {value for row in masked.sets for _, value in row} == {MASK}
    assert masked.secrets == {"Ada", "7"}


def test_values_of_a_text_without_names_are_not_shown_when_it_names_a_secret(run: Any) -> None:
    def with_secret(session: Session) -> None:
        dialect = session.get_bind().dialect
        mark = "?" if dialect.paramstyle == "qmark" else "%s"
        session.connection().exec_driver_sql(f"SELECT 1 AS token, {mark}", (SECRET,))

    def without(session: Session) -> None:
        mark = "?" if session.get_bind().dialect.paramstyle == "qmark" else "%s"
        session.connection().exec_driver_sql(f"SELECT 1 AS id, {mark}", ("shown",))

    assert mask_parameters(run(with_secret)).sets == [[("1", MASK)]]
    assert mask_parameters(run(without)).sets == [[("1", "'shown'")]]


def test_several_lists_hide_all_where_names_are_not_known(run: Any) -> None:
    """In a text with "?", nothing tells where the values of the first list end."""
    statement = run(select(users.c.id).where(users.c.id.in_([5, 6]), users.c.password.in_([SECRET, OTHER])))
    shown = repr(mask_parameters(statement).sets)
    assert SECRET not in shown
    assert OTHER not in shown


def test_texts_in_statements_are_not_shown_when_they_name_a_secret(run: Any) -> None:
    cases = {
        "a text": text(f"SELECT 1 AS password, '{SECRET}'"),
        "an escaped quote": text(f"SELECT 1 AS password, 'it''s {SECRET}'"),
        "a literal": select(users.c.password, literal_column(f"'{SECRET}'")),
        "a literal of a value": select(users.c.id).where(users.c.password == literal_column(f"'{SECRET}'")),
    }
    for case, statement in cases.items():
        sql = mask_sql(run(statement))
        assert SECRET not in sql, case
        assert "password" in sql, case
    assert "'Ada'" in mask_sql(run(text("SELECT 'Ada' AS name")))
    assert mask_sql(run(text("SELECT 1 AS password"))) == "SELECT 1 AS password"


def a_statement(sql: str, parameters: Any = (), is_many: bool = False) -> Statement:
    statement = Statement()
    statement.sql, statement.parameters, statement.is_many, statement.compiled = sql, parameters, is_many, None
    return statement


@pytest.mark.parametrize(
    ("sql", "shown"),
    [
        (f"SET PASSWORD = $$it's {SECRET}$$", "SET PASSWORD = '***'"),
        (f"SET PASSWORD = $a$ {SECRET} $a$", "SET PASSWORD = '***'"),
        (f'SET PASSWORD = "{SECRET}"', "SET PASSWORD = '***'"),
        (rf"SET PASSWORD = 'a\'{SECRET}'", "SET PASSWORD = '***'"),
        ("CREATE TABLE a (b TEXT PRIMARY KEY DEFAULT 'x')", "CREATE TABLE a (b TEXT PRIMARY KEY DEFAULT 'x')"),
    ],
)
def test_texts_of_each_server(sql: str, shown: str) -> None:
    assert mask_sql(a_statement(sql)) == shown


class Odd:
    """A value of the application's own, whose class fails."""

    def __repr__(self) -> str:
        raise RuntimeError


def test_values_are_cut_and_told_apart() -> None:
    values = ("x" * 5000, b"123", None, Decimal("1.50"), date(2026, 1, 2), list(range(100)), Odd(), True)
    (row,) = mask_parameters(a_statement("SELECT ?", values)).sets
    shown = [value for _, value in row]
    assert len(shown[0]) < 1100
    assert shown[0].endswith("(5000 characters)")
    assert shown[1:5] == ["(3 bytes)", "NULL", "1.50", "2026-01-02"]
    assert len(shown[5]) < 200
    assert shown[6].startswith("<Odd instance")
    assert shown[7] == "True"


def test_some_of_many_sets_are_shown() -> None:
    masked = mask_parameters(a_statement("INSERT", [(number,) for number in range(50)], is_many=True))
    assert masked.total == 50
    assert masked.sets == [[("1", "0")], [("1", "1")], [("1", "2")]]
    assert mask_parameters(a_statement("SELECT 1")).total == 0
    assert mask_parameters(a_statement("SELECT 1", None)).sets == []
    assert mask_parameters(a_statement("CALL", object())).sets == []


def test_errors_are_shown_without_secrets(run: Any) -> None:
    def fail(session: Session) -> None:
        session.execute(insert(users).values(id=1, name=SECRET, password="a"))
        session.execute(insert(users).values(id=1, name=SECRET, password=SECRET))

    statement = run(fail)
    assert statement.error is not None
    masked = mask_parameters(statement)
    shown = shown_error(statement.error, masked)
    assert "IntegrityError" in shown or "UniqueViolation" in shown
    assert "[SQL:" not in shown
    assert SECRET not in shown
    assert SECRET not in shown_error(statement.error, mask_parameters(statement, is_hidden=True))
    assert shown_error(RuntimeError("plain"), mask_parameters(a_statement("SELECT 1"))) == "RuntimeError: plain"


def test_values_in_texts_are_replaced() -> None:
    assert without_values("a1b 1 abcdef abcdefg", ["1", "abcdef", "", "abcdefg"]) == "a1b *** *** ***"


def test_lines_of_source_are_shown_without_texts() -> None:
    assert mask_source("    login(password='a', name=\"b\")") == "    login(password='***', name='***')"
    assert mask_source("    login(token='a") == "    login(token='***'"
    assert mask_source("    greet(name='a')") == "    greet(name='a')"
