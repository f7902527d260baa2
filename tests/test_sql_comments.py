"""``sql_comments``: each statement tells what has sent it, and does what it does without."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import bottle
import flask
import pytest
from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
from sqlalchemy import Engine, String, create_engine, event, insert, select, text
from sqlalchemy.dialects.mysql import insert as mysql_insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._database import comments as module
from sqlasession_middleware._database import plain_reads
from sqlasession_middleware._database.comment_text import add_comment, make_comment, without_comment
from sqlasession_middleware._database.plain_reads import Reading, judge
from sqlasession_middleware.errors import ConfigurationError

from .drivers import ROWS, Row, rows_of
from .wsgi import Environ, StartResponse

#: A value that ends whatever is not encoded, and that each kind of placeholder is in.
NASTY = "*/ ' -- ; ? :x %s %(x)s %d $1 \\ é \ud800 \x00 /*! */"
#: What is left of it.
NASTY_ENCODED = (
    "%2A/%20%27%20--%20%3B%20%3F%20%3Ax%20%25s%20%25%28x%29s%20%25d%20%241%20%5C%20%C3%A9%20%3F%20%00%20/%2A%21%20%2A/"
)
COMMENT = f" /*application='shop',method='GET',route='/o/%3Cid%3E',x='{NASTY_ENCODED}'*/"


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "commented_item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(40))


def answer(environ: Environ, start_response: StartResponse) -> list[bytes]:
    environ["work"]()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done"]


def nasty(environ: Environ) -> dict[str, object]:
    return {"x": NASTY, "nothing": None}


OPTIONS: dict[str, Any] = {"application": "shop", "values": nasty}


def ask(app: Any, work: Callable[[], object] = lambda: None, **overrides: Any) -> Any:
    overrides = {"sqlasession.route": "/o/<id>", "work": work, **overrides}
    return Client(app).get("/", buffered=True, environ_overrides=overrides)


@pytest.fixture
def make() -> Iterator[Callable[..., SQLASessionMiddleware]]:
    made: list[SQLASessionMiddleware] = []

    def make(bind: Any = "sqlite://", app: Any = answer, **options: Any) -> SQLASessionMiddleware:
        options = {"sql_comments": OPTIONS, "metadata": Base.metadata, "transaction": True, **options}
        wrapped = SQLASessionMiddleware(app, bind, **options)
        wrapped.drop_database()
        wrapped.init_database()
        made.append(wrapped)
        return wrapped

    yield make
    for app in made:
        app.drop_database()
        app.dispose()


@pytest.fixture
def sent() -> Iterator[list[str]]:
    """The statements that drivers have got."""
    found: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, is_many: bool) -> None:
        # Older versions of SQLAlchemy, such as 2.0.25, tell what was divided instead of its parts.
        is_divided = getattr(context.execute_style, "name", "") == "INSERTMANYVALUES"
        if not (is_divided and statement == context.statement):
            found.append(statement)

    event.listen(Engine, "after_cursor_execute", note)
    yield found
    event.remove(Engine, "after_cursor_execute", note)


# -- the text


@pytest.mark.parametrize(
    ("statement", "commented"),
    [
        ("SELECT 1", "SELECT 1 /*c*/"),
        ("SELECT 1;", "SELECT 1 /*c*/;"),
        ("SELECT 1 ;\n", "SELECT 1  /*c*/;"),
        ("SELECT 1 /* mine */", None),
        ("SELECT 1 -- mine", None),
        ("SELECT /*+ hint */ 1", None),
        ("SELECT '--'", None),
        ("SAVEPOINT a", "SAVEPOINT a /*c*/"),
    ],
)
def test_comment_is_appended_unless_there_is_one(statement: str, commented: str | None) -> None:
    assert add_comment(statement, " /*c*/") == (statement if commented is None else commented)


def test_comment_has_sorted_keys_and_encoded_values() -> None:
    assert make_comment({"b c": "it's", "a": "/x"}) == " /*a='/x',b%20c='it%27s'*/"
    assert make_comment({}) == ""
    assert make_comment({"x": NASTY}) == f" /*x='{NASTY_ENCODED}'*/"
    assert make_comment({"*/!": ""}) == " /*%2A/%21=''*/"


@pytest.mark.parametrize(
    ("statement", "bare"),
    [
        ("SELECT 1" + COMMENT, "SELECT 1"),
        ("SELECT 1" + COMMENT.replace("%", "%%"), "SELECT 1"),
        ("SELECT 1 /* a='b'*/", None),
        ("SELECT 1/*a='b'*/", None),
        ("'*/", None),
        ("SELECT ' /*a=', write() --'*/", None),
        ("SELECT ' /*a='||write() --'*/", None),
        ("SELECT ' /*a='\n--'*/", None),
        ("SELECT 1" + COMMENT + ";", None),
    ],
)
def test_comment_is_taken_away_from_a_text(statement: str, bare: str | None) -> None:
    assert without_comment(statement) == (statement if bare is None else bare)


def test_texts_that_differ_in_their_comments_are_judged_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_reads, "_known", {})
    for number in range(10):
        comment = make_comment({"traceparent": str(number), "x": "write()"})
        assert judge("SELECT a FROM t" + comment) is Reading.PLAIN
        assert judge("SELECT write()" + comment) is Reading.DOUBTFUL
    assert sorted(plain_reads._known) == ["SELECT a FROM t", "SELECT write()"]
    plain_reads.remember_as_writing("SELECT a FROM t" + comment)
    assert judge("SELECT a FROM t") is Reading.DOUBTFUL


# -- with each driver


@pytest.fixture(params=ROWS, ids=str)
def row(request: pytest.FixtureRequest) -> Row:
    found: Row = request.param
    return found


#: An expression for the text that the server has got, and what follows it.
SEEN = {
    "postgresql": ("current_query()", ""),
    "mariadb": ("info", " FROM information_schema.processlist WHERE id = connection_id()"),
    "sqlite": ("'-'", ""),
}
EXECUTIONS: dict[str, Callable[[str, str, str], Any]] = {
    "text": lambda seen, rest, percent: session.execute(text(f"SELECT {seen}, '5%', :x{rest}"), {"x": "5%"}),
    "driver's": lambda seen, rest, percent: session.connection().exec_driver_sql(
        f"SELECT {seen}, '5{percent}', '5{percent}'{rest}"
    ),
    "without parameters": lambda seen, rest, percent: (
        session.connection().execution_options(no_parameters=True).exec_driver_sql(f"SELECT {seen}, '5%', '5%'{rest}")
    ),
    "stream": lambda seen, rest, percent: session.execute(
        text(f"SELECT {seen}, '5%', :x{rest}"), {"x": "5%"}, execution_options={"stream_results": True}
    ),
    "semicolon": lambda seen, rest, percent: session.execute(text(f"SELECT {seen}, '5%', '5%'{rest};")),
}


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_server_gets_the_comment_and_the_values(make: Any, row: Row, sqlite_url: str, execution: str) -> None:
    app = make(row.url(sqlite_url))
    seen: list[str] = []
    values: list[str] = []

    def work() -> None:
        percent = "%%" if app.engine.dialect.paramstyle in ("format", "pyformat") else "%"
        if row.server == "sqlite":
            driver_connection: Any = session.connection().connection.dbapi_connection
            driver_connection.set_trace_callback(seen.append)
        expression, rest = SEEN[row.server]
        if execution == "stream" and row.server == "postgresql":
            expression = "(SELECT max(statement) FROM pg_cursors)"
        found = EXECUTIONS[execution](expression, rest, percent).one()
        if row.server == "sqlite":
            driver_connection.set_trace_callback(None)
        else:
            seen.append(found[0])
        values.extend(found[1:])

    ask(app, work)
    assert values == ["5%", "5%"]
    assert seen[-1].rstrip(";").endswith(COMMENT)


def test_everything_that_a_request_sends_is_done_as_without(
    make: Any, row: Row, sqlite_url: str, sent: list[str]
) -> None:
    # By default PostgreSQL does not prepare transactions.
    app = make(row.url(sqlite_url), session_options={"twophase": row.server == "mariadb"})
    sent.clear()

    def work() -> None:
        session.add(Item(id=50, name="5%"))
        session.flush()
        with session.begin_nested():
            # Where there is RETURNING, by insertmanyvalues.
            session.add_all([Item(name=str(number)) for number in range(5)])
        session.execute(insert(Item), [{"id": 100 + number, "name": "5%"} for number in range(3)])
        session.execute(text("UPDATE commented_item SET name = '6%' WHERE name = :name"), {"name": "5%"})

    assert ask(app, work).status_code == 200
    with app.engine.connect() as connection:
        assert sorted(connection.scalars(select(Item.name))) == sorted([*"01234", *["6%"] * 4])
    commented = [each for each in sent if "/*application='shop',method='GET'" in each]
    assert sorted(set(sent) - set(commented)) == [each for each in sorted(set(sent)) if "FROM commented_item" in each]
    assert [each for each in commented if each.startswith("SAVEPOINT")]


@pytest.mark.parametrize("row", rows_of("pymysql", "MySQLdb"))
@pytest.mark.parametrize("on_duplicate", [False, True])
def test_rows_of_executemany_are_sent_together_in_mysql(make: Any, row: Row, on_duplicate: bool) -> None:
    app = make(row.url())
    counts: list[int] = []

    def count() -> None:
        status = session.execute(text("SHOW SESSION STATUS LIKE 'Com_insert'"))
        counts.append(int(status.one()[1]))

    def work() -> None:
        count()
        statement = mysql_insert(Item)
        if on_duplicate:
            statement = statement.on_duplicate_key_update(name=statement.inserted.name)
        session.execute(statement, [{"id": number, "name": "5%"} for number in range(1, 4)])
        count()
        assert session.scalars(select(Item.name)).all() == ["5%"] * 3

    ask(app, work)
    assert counts[1] - counts[0] == 1


@pytest.mark.parametrize("row", rows_of("psycopg"))
def test_reads_of_lazy_begin_stay_alone(make: Any, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlasession_middleware._drivers.psycopg_pipeline import Pipeline

    alone: list[bool] = []
    read = Pipeline.read

    def note(pipeline: Any, begin: Any, cursor: Any, execute: Any, is_known: bool, first: Any) -> Any:
        alone.append(is_known)
        return read(pipeline, begin, cursor, execute, is_known, first)

    monkeypatch.setattr(Pipeline, "read", note)
    numbers = itertools.count()
    app = make(row.url(), sql_comments={"values": lambda environ: {"n": next(numbers)}})
    for _ in range(3):
        ask(app, lambda: session.scalars(select(Item.id)).all())
    assert alone == [False, True, True]
    translated = app.engine.execution_options(schema_translate_map={None: "public"})
    alone.clear()
    for _ in range(3):
        ask(app, lambda: session.scalars(select(Item.id), bind_arguments={"bind": translated}).all())
    assert alone == [False, True, True]


def test_statement_that_is_no_text_is_left_alone(make: Any) -> None:
    from psycopg import sql

    (row,) = (each for each in ROWS if each.module == "psycopg")
    app = make(row.url())
    found: list[str] = []
    statement: Any = sql.SQL("SELECT current_query()")
    ask(app, lambda: found.append(session.connection().exec_driver_sql(statement).scalar_one()))
    assert found == ["SELECT current_query()"]


# -- what it tells


def told(sent: list[str]) -> list[dict[str, str]]:
    """The comments of the statements, taken apart."""
    pairs = [re.findall(r"([\w%]+)='([^']*)'", each.partition("/*")[2]) for each in sent]
    return [{unquote(key): unquote(value) for key, value in each} for each in pairs]


def read() -> None:
    session.execute(text("SELECT 1"))


@pytest.mark.parametrize(
    ("options", "environ", "expected"),
    [
        ({}, {}, {"method": "GET", "route": "/o/<id>"}),
        ({"application": "shop"}, {}, {"application": "shop", "method": "GET", "route": "/o/<id>"}),
        ({"method": False, "route": False}, {}, {}),
        ({"method": False, "route": None}, {}, {}),
        ({}, {"REQUEST_METHOD": "FOO", "sqlasession.route": None}, {}),
        ({"route": lambda environ: environ["PATH_INFO"]}, {}, {"method": "GET", "route": "/"}),
        ({"route": lambda environ: None}, {}, {"method": "GET"}),
        ({"route": f"{__name__}:find_route"}, {}, {"method": "GET", "route": "of environ"}),
        ({"values": lambda environ: None}, {}, {"method": "GET", "route": "/o/<id>"}),
        ({"values": lambda environ: {"route": 3, "a": None}}, {}, {"method": "GET", "route": "3"}),
        ({"values": lambda environ: {"a": "é" * 300}, "route": False}, {}, {"method": "GET", "a": "é" * 200}),
        ({"values": lambda environ: {"a": "x" * 300}, "route": False}, {}, {"method": "GET", "a": "x" * 200}),
    ],
)
def test_comment_tells(make: Any, sent: list[str], options: Any, environ: Any, expected: Any) -> None:
    app = make(sql_comments=options)
    sent.clear()
    ask(app, read, **environ)
    assert told(sent) == [expected]


def find_route(environ: Environ) -> str:
    return "of environ"


def test_only_the_name_is_told_outside_of_a_request(make: Any, sent: list[str]) -> None:
    app = make()
    sent.clear()
    with app.context():
        read()
    app.run(read)
    with app.engine.connect() as connection:
        connection.execute(text("SELECT 2"))
    assert sent == ["SELECT 1 /*application='shop'*/"] * 2 + ["SELECT 2"]


def test_each_application_tells_its_own_on_an_engine_of_both(make: Any, sent: list[str], sqlite_engine: Any) -> None:
    apps = [make(sqlite_engine, sql_comments={"application": name}) for name in ("one", "two")]
    silent = make(sqlite_engine, sql_comments=None)
    sent.clear()
    for app in (*apps, silent):
        with app.context():
            read()
    assert [each.get("application") for each in told(sent)] == ["one", "two", None]


def test_comments_that_are_kept_are_limited(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_AT_MOST", 3)
    numbers = itertools.count()
    app = make(sql_comments={"values": lambda environ: {"n": next(numbers)}})
    for _ in range(10):
        ask(app, read)
        assert 1 <= len(app.sql_comments._made) <= 3


def test_error_of_a_callable_is_the_applications_own(make: Any) -> None:
    app = make(sql_comments={"values": lambda environ: environ["nothing"]})
    with pytest.raises(KeyError, match="nothing"):
        ask(app, read)
    assert app.engine.pool.checkedout() == 0


def test_engines_of_binds_and_replicas_have_comments(make: Any, sent: list[str], sqlite_url: str) -> None:
    app = make(binds={"audit": sqlite_url}, replicas=[f"{sqlite_url}2"])
    sent.clear()

    def work() -> None:
        read()
        session.execute(text("SELECT 2"), bind_arguments={"bind_key": "audit"})

    ask(app, work)
    assert [each.get("application") for each in told(sent)] == ["shop", "shop"]


# -- routes of frameworks


def of_flask() -> Any:
    app = flask.Flask(__name__)

    @app.get("/o/<int:number>")
    def order(number: int) -> str:
        read()
        return "done"

    @app.errorhandler(404)
    def page(error: Exception) -> str:
        read()
        return "nothing"

    return app


def of_bottle() -> Any:
    app = bottle.Bottle()

    @app.get("/o/<number:int>")
    def order(number: int) -> str:
        read()
        return "done"

    return app


@pytest.mark.parametrize(("framework", "route"), [(of_flask, "/o/<int:number>"), (of_bottle, "/o/<number:int>")])
def test_route_of_the_framework_is_told(make: Any, sent: list[str], framework: Any, route: str) -> None:
    app = make(app=framework(), sql_comments={})
    sent.clear()
    for path in ("/o/1", "/o/2"):
        assert Client(app).get(path, buffered=True).status_code == 200
    assert told(sent) == [{"method": "GET", "route": route}] * 2


def test_request_without_a_route_tells_none(make: Any, sent: list[str]) -> None:
    app = make(app=of_flask(), sql_comments={})
    sent.clear()
    Client(app).get("/nowhere", buffered=True)
    assert told(sent) == [{"method": "GET"}]


# -- traces

SENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (SENT, SENT),
        (None, None),
        (SENT + "*/ DROP TABLE x", None),
        (SENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32), None),
        ("ff" + SENT[2:], None),
    ],
)
@pytest.mark.parametrize("has_library", [True, False])
def test_trace_of_the_client_is_told_when_asked_for(
    make: Any,
    sent: list[str],
    monkeypatch: pytest.MonkeyPatch,
    header: str | None,
    found: str | None,
    has_library: bool,
) -> None:
    if not has_library:
        monkeypatch.setitem(sys.modules, "opentelemetry.trace.propagation.tracecontext", None)
    app, other = make(sql_comments={"traceparent": True}), make(sql_comments={})
    headers = {} if header is None else {"HTTP_TRACEPARENT": header}
    sent.clear()
    ask(app, read, **headers)
    ask(other, read, **headers)
    assert [each.get("traceparent") for each in told(sent)] == [found, None]


def test_trace_is_that_of_the_current_span(make: Any, sent: list[str]) -> None:
    span = NonRecordingSpan(SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(1)))
    app = make(sql_comments={"traceparent": True})
    sent.clear()

    def work() -> None:
        token = context.attach(set_span_in_context(span))
        read()
        context.detach(token)

    ask(app, work, HTTP_TRACEPARENT=SENT)
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert told(sent)[0]["traceparent"] == f"00-{1:032x}-{2:016x}-01"


@pytest.mark.parametrize(
    ("driver", "traceparent", "arguments", "warns"),
    [
        ("psycopg", True, {}, True),
        ("psycopg", True, {"prepare_threshold": 0}, True),
        ("psycopg", True, {"prepare_threshold": None}, False),
        ("psycopg", False, {}, False),
        ("psycopg2", True, {}, False),
    ],
)
def test_trace_is_warned_of_once_where_statements_are_prepared(
    caplog: pytest.LogCaptureFixture, driver: str, traceparent: bool, arguments: Any, warns: bool
) -> None:
    (row,) = (each for each in ROWS if each.module == driver)
    engine = create_engine(row.url(), connect_args=arguments)
    for _ in range(2):
        app = SQLASessionMiddleware(answer, engine, sql_comments={"traceparent": traceparent})
        ask(app, read)
        engine.dispose()
    warned = [each.getMessage() for each in caplog.records if each.name == "sqlasession_middleware.sql_comments"]
    assert len(warned) == warns
    for each in warned:
        assert "prepare_threshold" in each


# -- settings


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"application": 3}, r"sql_comments\['application'\] must be a text, or none, got 3"),
        ({"route": 3}, r"sql_comments\['route'\] must be callable"),
        ({"method": "yes"}, r"sql_comments\['method'\] must be true or false"),
        ({"traceparent": "yes"}, r"sql_comments\['traceparent'\] must be true or false"),
        ({"values": {"a": 1}}, r"sql_comments\['values'\] must be callable"),
        ({"rout": "x"}, r"sql_comments\['rout'\] is not an option; did you mean 'route'"),
        (True, "sql_comments must be a dict of options, got True"),
    ],
)
def test_error_names_the_option(options: Any, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        SQLASessionMiddleware(answer, "sqlite://", sql_comments=options)


def test_ini_switches_them_on(sent: list[str]) -> None:
    config = {
        "sqlalchemy.url": "sqlite://",
        "sql_comments.application": "shop",
        "sql_comments.route": f"{__name__}:find_route",
        "sql_comments.method": "false",
        "sql_comments.values": f"{__name__}:nasty",
    }
    app = SQLASessionMiddleware.from_config(answer, config)
    ask(app, read)
    app.dispose()
    assert told(sent) == [{"application": "shop", "route": "of environ", "x": NASTY.replace("\ud800", "?")}]


def test_engines_have_no_listener_without_them() -> None:
    engine = create_engine("sqlite://")
    app = SQLASessionMiddleware(answer, engine)
    ask(app, read)
    assert len(engine.dispatch.before_cursor_execute) == 0
    app.dispose()
    engine.dispose()
