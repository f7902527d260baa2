"""The inspector under applications, requests and databases that it was not made for."""

from __future__ import annotations

import datetime
import decimal
import sqlite3
import sys
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, insert, literal_column, select, text
from sqlalchemy.exc import DBAPIError
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._inspector.memory import Memory
from sqlasession_middleware._recording.masking import Masked, mask_parameters, mask_sql, shown_error
from sqlasession_middleware.inspector import InspectorMiddleware

from .test_inspector import COOKIE, LOOPBACK, PATH, TOKEN, Author, Site, make, read, shop
from .test_inspector_kept import server
from .test_masking import a_statement
from .wsgi import Environ, StartResponse, consume, environ, start_response

__all__ = ["make", "server"]

pytestmark = pytest.mark.usefixtures("disposes")

SECRET = "hunter2-s3cret"


def everything(site: Site) -> dict[str, str]:
    """All pages of the last request, with its plans."""
    number = site.requests()[0]["id"]
    pages = {page: site.page(page) for page in ("/", "/requests.json", f"/r/{number}", f"/r/{number}.json", "/pools")}
    for each in range(len(site.last()["statements"])):
        pages[f"plan {each}"] = site.explain(each, accept="text/html")
        pages[f"plan {each} run"] = repr(site.explain(each, analyze=True))
    return pages


# -- the application's answers stay what they are


class UnshowableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Money(decimal.Decimal):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class Moment(datetime.datetime):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_error_that_has_no_text_is_shown_by_its_name() -> None:
    assert shown_error(UnshowableError(), Masked([], 0, frozenset())) == "UnshowableError"


def test_error_of_very_many_secrets_is_shown_by_its_kind() -> None:
    masked = mask_parameters(a_statement("UPDATE a SET token = ?", [(f"t{n}",) for n in range(2000)], is_many=True))
    assert (masked.total, masked.has_secrets, masked.is_whole) == (2000, True, False)
    assert shown_error(ValueError("t1999 is taken"), masked) == "ValueError"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("DETAIL:  Key (token)=(abc) exists.", "Key (token)=(***) exists."),
        ("DETAIL:  Key (name)=(abc) exists.", "Key (name)=(abc) exists."),
        ("Duplicate entry 'abc' for key 'token'", "Duplicate entry '***' for key 'token'"),
    ],
)
def test_values_of_the_database_in_errors(said: str, shown: str) -> None:
    assert shown_error(ValueError(said), Masked([], 0, frozenset())).endswith(shown)


def test_long_values_are_searched_in_a_time_that_grows_with_them() -> None:
    """With the square of it, this would take hours."""
    assert mask_parameters(a_statement("SELECT ?", (["x" * 1000] * 20,) * 2000)).has_secrets is False


def test_names_between_quotes_stay() -> None:
    column = literal_column("'hunter2'").label("o'brien")
    statement = select(column, literal_column("password"))
    sent = a_statement(str(statement))
    sent.compiled = statement.compile()
    assert mask_sql(sent) == "SELECT '***' AS \"o'brien\", password"


@pytest.mark.parametrize("end", ["; SELECT 2", ";" + "1," * 9000], ids=["two", "long"])
def test_several_statements_have_no_plan(make: Any, end: str) -> None:
    site = make()

    def work() -> None:
        with suppress(Exception):
            session.connection().exec_driver_sql(f"SELECT 1{end}")

    site.work(work)
    assert "one at a time" in site.explain(0)["problem"]


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize(
    "value", [Name("Ada"), Money(1), 10**5000, Moment(2026, 1, 1)], ids=["str", "Decimal", "int", "datetime"]
)
def test_value_that_cannot_be_shown_is_no_trouble(make: Any, tmp_path: Path, value: Any, is_stored: bool) -> None:
    site = make(**({"store": str(tmp_path / "store")} if is_stored else {}))

    def work() -> None:
        with suppress(Exception):  # The driver may refuse it.
            session.connection().exec_driver_sql("SELECT ?, nothing", (value,))

    assert site.work(work).data == b"done"
    site.page("/")
    site.page(f"/r/{site.requests()[0]['id']}")
    assert site.last()["queries"] == 1


def test_status_that_is_no_text_is_the_application_s(make: Any, tmp_path: Path) -> None:
    site = make(store=str(tmp_path / "store"))
    inspector = site.inspector
    inspector.app = lambda environ, start: (start(b"200 OK", []), [b"a"])[1]
    assert consume(inspector(environ(), start_response)) == b"a"
    site.page("/")


def test_start_response_may_be_called_by_names(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> Any:
        start("200 OK", [])
        try:
            raise RuntimeError
        except RuntimeError:
            start("500 Oops", [], exc_info=sys.exc_info())
        return [b"a"]

    inspector = InspectorMiddleware(app, token=TOKEN)
    seen: list[Any] = []

    def start(status: str, headers: Any, exc_info: Any = None) -> Any:
        seen.append((status, exc_info is not None))

    assert consume(inspector(environ(), start)) == b"a"
    assert seen == [("200 OK", False), ("500 Oops", True)]


def test_keeper_that_fails_does_not_replace_the_application_s_error(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make()

    def fail(*given: Any) -> None:
        raise LookupError("keeping fails")

    monkeypatch.setattr("sqlasession_middleware._inspector.watch.keep", fail)

    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume(site.app(environ(work=work), start_response))
    assert consume(site.app(environ(work=read), start_response)) == b"done"


# -- texts


def test_text_with_half_a_character_is_shown(make: Any) -> None:
    site = make()

    def work() -> None:
        with pytest.raises(UnicodeEncodeError):
            session.connection().exec_driver_sql("SELECT '\udc80'")

    site.work(work)
    assert "SELECT" in site.page(f"/r/{site.requests()[0]['id']}")


@pytest.mark.parametrize(
    "sql",
    ["SELECT " + "(" * 900 + "1" + ")" * 900, "SELECT " + "1," * 9000 + "1", "SELECT " + "case when " * 900],
    ids=["parens", "tokens", "cases"],
)
def test_statement_that_cannot_be_parsed_has_a_page(make: Any, sql: str) -> None:
    site = make()

    def work() -> None:
        with suppress(DBAPIError):
            session.connection().exec_driver_sql(sql)

    site.work(work)
    site.page(f"/r/{site.requests()[0]['id']}")
    site.explain(0)


def test_path_is_shown_as_it_was_sent(make: Any) -> None:
    site = make()
    site.work(read, path="/größe/%E2%82%AC")
    assert site.requests()[0]["path"] == "/größe/€"
    assert "/größe/€" in site.page("/")


def test_numbers_of_statements_may_be_long(make: Any) -> None:
    site = make()
    site.work(read)
    token = site.form_token()
    path = f"{PATH}/r/{site.requests()[0]['id']}/q/{'9' * 5000}/explain"
    response = site.browser.post(
        path, data={"token": token}, headers={"Origin": "http://localhost"}, environ_overrides=site.sent
    )
    assert response.status_code == 404


# -- secrets


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE {t} SET password = '{s}'",
        "SELECT * FROM {t} WHERE name = 'abc\\' AND password = '{s}'",
        "/* don't */ SELECT * FROM {t} WHERE password = '{s}'",
        "SELECT * FROM {t} -- it's\n WHERE password = '{s}'",
        "SELECT * FROM {t} WHERE password = '{s}' WHER",
        "SELECT * FROM {t} WHERE password = '{s}",
        "SELECT * FROM {t} WHERE password IN ('a', '{s}')",
        "SELECT * FROM {t} WHERE password LIKE '%{s}%'",
        "SELECT * FROM {t} WHERE password = 'a' || '{s}'",
        "SELECT * FROM {t} WHERE password '{s}'",
        "SELECT * FROM {t} WHERE password = 7531902468",
        "SELECT * FROM {t} WHERE name = 'password={s}'",
        "INSERT INTO {t} (id, name, password) VALUES (77, NULL, '{s}')",
        "SELECT * FROM {t} AS \"o'brien\" WHERE password = '{s}'",
    ],
)
def test_secret_in_a_text_of_sql_is_nowhere(server: Site, sql: str) -> None:
    sql = sql.format(t=Author.__tablename__, s=SECRET)

    def work() -> None:
        is_sqlite = session.connection().dialect.name == "sqlite"
        with suppress(DBAPIError):
            session.connection().exec_driver_sql(sql if is_sqlite else sql.replace("%", "%%"))
        session.rollback()

    server.work(work)
    assert server.last()["queries"] == 1
    for name, page in everything(server).items():
        for part in (SECRET, "hunter2", "s3cret", "7531902468"):
            assert part not in page, (name, page[page.index(part) - 200 : page.index(part) + 50])


def test_row_that_fails_shows_no_secret_of_other_columns(server: Site) -> None:
    table = Author.__tablename__

    def plant() -> None:
        session.execute(insert(Author).values(id=99, name="Ada", password=SECRET))

    server.work(plant)

    def work() -> None:
        with pytest.raises(DBAPIError):
            session.execute(text(f"UPDATE {table} SET name = NULL WHERE id = 99"))
        session.rollback()

    server.work(work)
    for name, page in everything(server).items():
        assert SECRET not in page, name


def test_many_rows_with_secrets_are_hidden(server: Site) -> None:
    def work() -> None:
        rows = [{"id": 100 + each, "name": "Ada", "password": f"{SECRET}-{each}"} for each in range(30)]
        session.execute(insert(Author).returning(Author.id), rows)
        with pytest.raises(DBAPIError):
            session.execute(insert(Author), rows)
        session.rollback()

    server.work(work)
    for name, page in everything(server).items():
        assert SECRET not in page, name


def test_password_of_an_engine_in_a_line_of_source_is_hidden(make: Any) -> None:
    site = make()
    other = SQLASessionMiddleware(shop, "postgresql+psycopg://ada:tigerlily99@127.0.0.1/nothing")
    site.inspector._applications.add([other])
    site.work(
        lambda: session.execute(text("SELECT 1"), {"a": "postgresql+psycopg://ada:tigerlily99@127.0.0.1/nothing"})
    )
    for name, page in everything(site).items():
        assert "tigerlily99" not in page, name


def test_password_of_an_engine_in_a_status_is_hidden(make: Any) -> None:
    site = make()
    other = SQLASessionMiddleware(shop, "postgresql+psycopg://ada:tigerlily99@127.0.0.1/nothing")
    site.inspector._applications.add([other])
    site.work(read, status="500 tigerlily99 is wrong")
    for name, page in everything(site).items():
        assert "tigerlily99" not in page, name


# -- plans


def consume_rows(result: Any) -> None:
    result.close()


def test_percent_signs(server: Site) -> None:
    table = Author.__tablename__

    def work() -> None:
        session.execute(text(f"SELECT name FROM {table} WHERE name LIKE '%d%' AND id % 2 = 1 AND id = :id"), {"id": 1})
        session.execute(text(f"SELECT name FROM {table} WHERE name LIKE '%d%' AND id % 2 = 1"))

    server.work(work)
    assert [server.explain(each)["problem"] for each in (0, 1)] == ["", ""]


def test_function_in_the_plan_of_a_write_writes_nothing(make: Any, database_url: str) -> None:
    if "mariadb" not in database_url:
        pytest.skip("MariaDB evaluates functions for a plan")
    engine = create_engine(database_url, isolation_level="AUTOCOMMIT", connect_args={"autocommit": True})
    site = make(engine)
    table = Author.__tablename__
    function = f"f_{table}"
    with engine.connect() as connection:
        connection.exec_driver_sql(f"INSERT INTO {table} (id, name, password) VALUES (1, 'Ada', 'old')")
        connection.exec_driver_sql(f"CREATE TABLE log_{table} (a INT)")
        connection.exec_driver_sql(
            f"CREATE FUNCTION {function}() RETURNS INT DETERMINISTIC MODIFIES SQL DATA"
            f" BEGIN INSERT INTO log_{table} VALUES (1); RETURN 1; END"
        )
    try:
        sql = f"UPDATE {table} SET name = 'Lin' WHERE id = {function}()"
        site.work(lambda: consume_rows(session.connection().exec_driver_sql(sql)))

        def count() -> Any:
            with engine.connect() as connection:
                return connection.exec_driver_sql(f"SELECT count(*) FROM log_{table}").scalar()

        before = count()
        assert site.explain(0)["problem"] == ""
        assert count() == before
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP FUNCTION {function}")
            connection.exec_driver_sql(f"DROP TABLE log_{table}")


def test_sequence_is_left_alone(server: Site) -> None:
    name = server.database.engine.dialect.name  # type: ignore[union-attr]
    if name == "sqlite":
        pytest.skip("no sequences")
    sequence = f"s_{Author.__tablename__}"
    engine = server.database.engine  # type: ignore[union-attr]
    ask = f"SELECT nextval('{sequence}')" if name == "postgresql" else f"SELECT NEXTVAL({sequence})"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE SEQUENCE {sequence} CACHE 1" if name == "postgresql" else f"CREATE SEQUENCE {sequence} NOCACHE"
        )
    try:
        server.work(lambda: consume_rows(session.connection().exec_driver_sql(ask)))
        server.explain(0)
        assert "read" in server.explain(0, analyze=True)["problem"].lower().replace("-", " ")
        with engine.begin() as connection:
            assert connection.exec_driver_sql(ask).scalar() == 2
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP SEQUENCE {sequence}")


# -- memory


def test_one_request_takes_no_more_than_the_memory(make: Any) -> None:
    site = make(memory=300_000)

    def work() -> None:
        for _ in range(100):
            session.connection().exec_driver_sql("SELECT " + ", ".join("?" * 90), tuple("x" * 1000 for _ in range(90)))

    site.work(work)
    memory = site.inspector._watch._keeper
    assert isinstance(memory, Memory)
    assert memory._size < 600_000
    site.page(f"/r/{site.requests()[0]['id']}")


def test_secrets_of_many_rows_count(make: Any) -> None:
    site = make()

    def work() -> None:
        session.execute(insert(Author), [{"password": "x" * 50 + str(n)} for n in range(20_000)])

    site.work(work)
    kept = site.inspector._watch.find(site.requests()[0]["id"])
    assert kept is not None
    held = sum(len(secret) for each in kept.originals.values() for secret in each.secrets)
    assert held < 100_000


# -- stores


def test_row_that_is_damaged(make: Any, tmp_path: Path) -> None:
    site = make(store=str(tmp_path / "store"))
    site.work(read)
    number = site.requests()[0]["id"]
    with sqlite3.connect(tmp_path / "store" / "requests.sqlite3") as connection:
        connection.execute("UPDATE requests SET summary = '{', data = '[', originals = ''")
    connection.close()
    assert site.requests() == []
    assert site.ask(f"{PATH}/r/{number}").status_code == 404


# -- browsers


def test_inspectors_of_one_machine_do_not_take_each_other_s_cookies() -> None:
    sites = [InspectorMiddleware(shop, token=f"a-token-of-number-{number}") for number in (1, 2)]
    jar: dict[str, str] = {}
    for site, number in zip(sites, (1, 2), strict=True):
        answer = Client(site, use_cookies=False).get(
            f"{PATH}/?token=a-token-of-number-{number}", environ_overrides=LOOPBACK
        )
        name, _, value = answer.headers["Set-Cookie"].partition(";")[0].partition("=")
        jar[name] = value
    cookie = "; ".join(f"{name}={value}" for name, value in jar.items())
    for site in sites:
        answer = Client(site, use_cookies=False).get(f"{PATH}/", headers={"Cookie": cookie}, environ_overrides=LOOPBACK)
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "changes",
    [
        {"HTTP_HOST": "localhost."},
        {"HTTP_HOST": "localhost:8000,evil.example"},
        {"HTTP_HOST": "evil.example#@localhost"},
        {"HTTP_HOST": "user@localhost"},
        {"HTTP_HOST": "[::1]evil.example"},
        {"HTTP_HOST": "localhost:8000:80"},
        {"HTTP_HOST": "ｌocalhost"},
        {"HTTP_HOST": "localhost\n"},
        {"HTTP_HOST": "2130706433"},
        {"HTTP_HOST": "0.0.0.0"},
        {"HTTP_X_FORWARDED": "for=1"},
        {"HTTP_X_ORIGINAL_HOST": "a"},
        {"HTTP_CF_CONNECTING_IP": "1.2.3.4"},
        {"HTTP_TRUE_CLIENT_IP": "1.2.3.4"},
        {"HTTP_X_CLUSTER_CLIENT_IP": "1.2.3.4"},
        {"HTTP_COOKIE": f"{COOKIE}=\xff\xfe"},
        {"HTTP_COOKIE": f'{COOKIE}="\\377"'},
        {"QUERY_STRING": "token=%ff%00", "HTTP_COOKIE": ""},
        {"QUERY_STRING": "token=\xff&" * 3, "HTTP_COOKIE": ""},
        {"PATH_INFO": "//_sqlasession/"},
        {"PATH_INFO": "/_SQLASESSION/"},
        {"PATH_INFO": "/_sqlasessionx/"},
        {"PATH_INFO": "/./_sqlasession/"},
        {"REMOTE_ADDR": "127.0.0.1, 1.2.3.4"},
        {"REMOTE_ADDR": "127.0.0.1\n"},
        {"REMOTE_ADDR": "0.0.0.0"},
        {"REMOTE_ADDR": "::ffff:10.0.0.1"},
        {"REMOTE_ADDR": None},
        {"REQUEST_METHOD": "OPTIONS"},
        {"REQUEST_METHOD": "PUT"},
        {"REQUEST_METHOD": "get"},
    ],
    ids=repr,
)
def test_tricks_are_the_application_s(make: Any, changes: dict[str, Any]) -> None:
    site = make()
    inside = []

    def app(environ: Environ, start: StartResponse) -> Any:
        inside.append(1)
        start("404 Not Found", [])
        return [b""]

    site.inspector.app = app
    sent = {
        **environ(PATH_INFO=f"{PATH}/"),
        "HTTP_HOST": "localhost",
        "wsgi.url_scheme": "http",
        **site.sent,
        **changes,
    }
    sent["wsgi.input"] = BytesIO()
    if sent["REMOTE_ADDR"] is None:
        del sent["REMOTE_ADDR"]
    consume(site.app(sent, start_response))
    assert inside == [1]
