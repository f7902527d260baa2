"""No ROLLBACK is sent that has nothing to undo, and what there is to undo is undone (G17)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial, wraps
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from sqlalchemy import URL, Connection, Engine, NullPool, QueuePool, create_engine, event, text
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import DBAPIError

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._database.network import CONNECT_TIMEOUT
from sqlasession_middleware._dependencies import known_records
from sqlasession_middleware._drivers.registry import driver_of

from .drivers import Row, rows_on
from .wsgi import Environ, StartResponse, consume, environ, start_response

#: A table with transactions, and one without.
TABLE = f"rollbacks_{uuid4().hex[:12]}"
PLAIN = f"{TABLE}_plain"
PROCEDURE = f"{TABLE}_call"
LOCK = f"{TABLE}_lock"

CREATE = (
    f"CREATE TABLE {TABLE} (id INT PRIMARY KEY) ENGINE=InnoDB",
    f"CREATE TABLE {PLAIN} (id INT PRIMARY KEY) ENGINE=MyISAM",
    f"INSERT INTO {TABLE} VALUES (1)",
    f"CREATE PROCEDURE {PROCEDURE}() BEGIN START TRANSACTION; INSERT INTO {TABLE} VALUES (2); END",
)
DROP = (f"DROP PROCEDURE {PROCEDURE}", f"DROP TABLE {TABLE}", f"DROP TABLE {PLAIN}")
INSERT = f"INSERT INTO {TABLE} VALUES (2)"

#: CLIENT.MULTI_STATEMENTS; mysqlclient has it set.
SEVERAL_STATEMENTS = {"client_flag": 65536}


@pytest.fixture(params=rows_on("mariadb"))
def row(request: pytest.FixtureRequest) -> Row:
    found: Row = request.param
    return found


@pytest.fixture
def url(row: Row) -> URL:
    return row.url()


@pytest.fixture
def administrator(url: URL) -> Iterator[Connection]:
    """Another connection, and the tables."""
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in CREATE:
            connection.exec_driver_sql(statement)
        try:
            yield connection
        finally:
            # What a test has left open must not be waited for.
            connection.exec_driver_sql("SET lock_wait_timeout = 5")
            for statement in DROP:
                connection.exec_driver_sql(statement)


def execute(driver_connection: Any, statement: str) -> None:
    with closing(driver_connection.cursor()) as cursor:
        cursor.execute(statement)
        if cursor.description:
            cursor.fetchall()


# What is left open on a connection that is returned. Each begins after a COMMIT or a ROLLBACK of SQLAlchemy's own.


def statement(sql: str) -> Callable[[Connection], None]:
    def leave(connection: Connection) -> None:
        execute(connection.connection.dbapi_connection, sql)

    return leave


def failed_statement(connection: Connection) -> None:
    """No transaction was begun before it, but its lock stays."""
    with pytest.raises(Exception, match="Duplicate"):
        execute(connection.connection.dbapi_connection, f"INSERT INTO {TABLE} VALUES (1)")


def old_cursor(connection: Connection) -> None:
    with closing(connection.connection.cursor()) as cursor:
        cursor.execute("SELECT 1")
        cursor.fetchall()
        connection.rollback()
        cursor.execute(INSERT)


def many(connection: Connection) -> None:
    with closing(connection.connection.cursor()) as cursor:
        mark = "?" if connection.dialect.paramstyle == "qmark" else "%s"
        cursor.executemany(f"INSERT INTO {TABLE} VALUES ({mark})", [(2,), (3,)])


def procedure(connection: Connection) -> None:
    with closing(connection.connection.cursor()) as cursor:
        cursor.callproc(PROCEDURE)


def several_statements(connection: Connection) -> None:
    with closing(connection.connection.cursor()) as cursor:
        cursor.execute(f"SELECT 1; {INSERT}")
        with suppress(Exception):
            while cursor.nextset():
                pass


def unread_rows(connection: Connection) -> None:
    """They are sent while they are read."""
    driver = connection.dialect.driver
    driver_connection: Any = connection.connection.dbapi_connection
    if driver == "mariadbconnector":
        cursor = driver_connection.cursor(buffered=False)
    else:
        cursors = __import__(f"{driver_of(connection).module}.cursors", fromlist=["SSCursor"])
        cursor = driver_connection.cursor(cursors.SSCursor)
    cursor.execute(f"SELECT * FROM {TABLE} FOR UPDATE")
    assert cursor.fetchone() == (1,)
    cursor.close()


def begin_of_the_driver(connection: Connection) -> None:
    connection.connection.dbapi_connection.begin()  # type: ignore[union-attr]
    execute(connection.connection.dbapi_connection, INSERT)


def text_of_sqlalchemy(connection: Connection) -> None:
    """Its transaction ends with it: nothing was there for the session."""
    connection.exec_driver_sql("BEGIN")
    connection.exec_driver_sql(INSERT)


class Case(NamedTuple):
    """What is done with a connection.

    :param leave: is called after a COMMIT or a ROLLBACK, with the connection at rest.
    :param options: of the engine.
    """

    leave: Callable[[Connection], None]
    options: dict[str, Any] = {}  # noqa: RUF012


CASES = {
    "nothing": Case(lambda connection: None),
    "INSERT": Case(statement(INSERT)),
    "BEGIN": Case(statement("BEGIN")),
    "SELECT FOR UPDATE": Case(statement(f"SELECT * FROM {TABLE} FOR UPDATE")),
    "a snapshot": Case(statement(f"SELECT * FROM {TABLE}")),
    "the metadata lock of a table without transactions": Case(statement(f"SELECT * FROM {PLAIN}")),
    "a statement that failed": Case(failed_statement),
    "a cursor from before the ROLLBACK": Case(old_cursor),
    "executemany()": Case(many),
    "a procedure": Case(procedure),
    "several statements": Case(several_statements, {"connect_args": SEVERAL_STATEMENTS}),
    "rows that were not read": Case(unread_rows),
    "begin() of the driver": Case(begin_of_the_driver),
    "BEGIN in autocommit": Case(text_of_sqlalchemy, {"isolation_level": "AUTOCOMMIT"}),
    "INSERT after BEGIN of a raw connection in autocommit": Case(
        statement(f"BEGIN NOT ATOMIC START TRANSACTION; {INSERT}; END"), {"isolation_level": "AUTOCOMMIT"}
    ),
    # These do not end with a transaction.
    "LOCK TABLES": Case(statement(f"LOCK TABLES {PLAIN} WRITE")),
    "GET_LOCK()": Case(statement(f"SELECT GET_LOCK('{LOCK}', 0)")),
    "a temporary table": Case(statement("CREATE TEMPORARY TABLE rollbacks_temporary (id INT)")),
    "SET autocommit": Case(statement("SET autocommit = 1")),
}


def state(engine: Engine, administrator: Connection) -> dict[str, Any]:
    """What is open on the only connection of a pool, which is idle."""
    found: dict[str, Any] = {}
    # InnoDB itself, which purges what was undone, has locks for a moment.
    administrator.exec_driver_sql("SET lock_wait_timeout = 1, innodb_lock_wait_timeout = 1")
    for name in (TABLE, PLAIN):
        try:
            administrator.exec_driver_sql(f"ALTER TABLE {name} COMMENT 'altered'")
        except DBAPIError as error:
            found[name] = type(error.orig).__name__
    found["named lock"] = administrator.exec_driver_sql(f"SELECT IS_USED_LOCK('{LOCK}') IS NOT NULL").scalar_one()
    found["rows"] = administrator.exec_driver_sql(f"SELECT COUNT(*) FROM {TABLE}").scalar_one()
    driver_connection: Any = known_records(engine.pool)[0].dbapi_connection
    with closing(driver_connection.cursor()) as cursor:
        cursor.execute("SELECT @@in_transaction, @@autocommit, CONNECTION_ID()")
        *found["in transaction, autocommit"], found["number"] = cursor.fetchone()
        try:
            cursor.execute("SELECT * FROM rollbacks_temporary")
            found["temporary"] = len(cursor.fetchall())
        except Exception as error:
            found["temporary"] = type(error).__name__
    return found


def left_open(engine: Engine, case: Case, administrator: Connection, ending: str) -> dict[str, Any]:
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        getattr(connection, ending)()
        case.leave(connection)
    assert engine.pool.checkedin() == 1  # type: ignore[attr-defined]
    found = state(engine, administrator)
    engine.dispose()
    # The server closes a connection, and gives back what it has, some time after it was told to.
    number = found.pop("number")
    while administrator.exec_driver_sql(f"SELECT 1 FROM information_schema.processlist WHERE id = {number}").all():
        pass
    administrator.exec_driver_sql(f"DELETE FROM {TABLE} WHERE id <> 1")
    return found


@pytest.mark.parametrize("ending", ["commit", "rollback"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_connection_is_returned_as_sqlalchemy_alone_would_leave_it(
    case: Case, ending: str, url: URL, administrator: Connection
) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], url, engine_options=case.options)
    ours = left_open(app.engine, case, administrator, ending)
    theirs = left_open(create_engine(url, **case.options), case, administrator, ending)
    assert ours == theirs
    assert ours["in transaction, autocommit"][0] == 0
    assert ours["rows"] == 1


def test_raw_connection_is_rolled_back(url: URL, administrator: Connection) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], url)
    app.engine.connect().close()
    raw = app.engine.raw_connection()
    execute(raw, INSERT)
    raw.close()
    assert state(app.engine, administrator)["in transaction, autocommit"][0] == 0
    app.dispose()


def test_dropped_connection_is_rolled_back(url: URL, administrator: Connection) -> None:
    """The garbage collector returns it."""
    app = SQLASessionMiddleware(lambda environ, start: [], url)
    app.engine.connect().close()
    raw = app.engine.raw_connection()
    execute(raw, INSERT)
    del raw
    assert app.engine.pool.checkedin() == 1  # type: ignore[attr-defined]
    assert state(app.engine, administrator)["in transaction, autocommit"][0] == 0
    app.dispose()


class Instrumented:
    """A proxy such as those that measure what a driver does. It says that it has the class of what it stands for."""

    def __init__(self, connection: Any) -> None:
        vars(self)["connection"] = connection

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.connection)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["connection"], name)


def derived(connection: Any) -> Any:
    """A connection of a class of the application's own."""
    connection.__class__ = type("Derived", (type(connection),), {"__slots__": (), "__module__": __name__})
    return connection


def final(connection: Any) -> Any:
    """A connection of a class that no class can be derived from."""

    def refuse(cls: type, **options: Any) -> None:
        raise TypeError("is final")

    own = derived(connection)
    type(own).__init_subclass__ = classmethod(refuse)
    return own


@pytest.mark.parametrize("make", [Instrumented, derived, final])
def test_connection_of_a_class_that_is_not_the_drivers_is_rolled_back(
    make: Callable[[Any], Any], url: URL, administrator: Connection
) -> None:
    arguments, options = url.get_dialect()(dbapi=url.get_dialect().import_dbapi()).create_connect_args(url)
    connect = url.get_dialect().import_dbapi().connect
    app = SQLASessionMiddleware(
        lambda environ, start: [], url, engine_options={"creator": lambda: make(connect(*arguments, **options))}
    )
    for _ in range(2):
        with app.engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
            connection.rollback()
            execute(connection.connection.dbapi_connection, INSERT)
        assert state(app.engine, administrator)["in transaction, autocommit"][0] == 0
    app.dispose()


# What is sent


def commands(engine: Engine) -> tuple[int, int]:
    """How often the only connection of a pool has sent COMMIT and ROLLBACK."""
    driver_connection: Any = known_records(engine.pool)[0].dbapi_connection
    with closing(driver_connection.cursor()) as cursor:
        cursor.execute("SHOW SESSION STATUS WHERE Variable_name IN ('Com_commit', 'Com_rollback')")
        counts = {name.lower(): int(value) for name, value in cursor.fetchall()}
    return counts["com_commit"], counts["com_rollback"]


def reads(environ: Environ, start: StartResponse) -> list[bytes]:
    session.execute(text(f"SELECT * FROM {TABLE}")).all()
    start("200 OK", [])
    return []


def commits(environ: Environ, start: StartResponse) -> list[bytes]:
    session.execute(text(f"DELETE FROM {TABLE}"))
    session.commit()
    return reads_nothing(environ, start)


def reads_nothing(environ: Environ, start: StartResponse) -> list[bytes]:
    session.connection()
    start("200 OK", [])
    return []


SENT: dict[str, tuple[Any, dict[str, Any], tuple[int, int]]] = {
    "reading": (reads, {}, (0, 1)),
    "reading with a transaction": (reads, {"transaction": True}, (1, 0)),
    "committing": (commits, {}, (1, 0)),
    "a rollback that is asked for": (reads, {"engine_options": {"pool_reset_on_return": "rollback"}}, (0, 2)),
    **(
        {"no rollback in autocommit": (reads, {"engine_options": {"skip_autocommit_rollback": True}}, (0, 2))}
        if "skip_autocommit_rollback" in signature(DefaultDialect).parameters  # since SQLAlchemy 2.0.43
        else {}
    ),
    "no reset": (commits, {"engine_options": {"pool_reset_on_return": None}}, (1, 1)),
}


@pytest.mark.parametrize(("app", "options", "expected"), SENT.values(), ids=SENT)
@pytest.mark.usefixtures("administrator")
def test_requests_end_with_one_answer(app: Any, options: Any, expected: tuple[int, int], url: URL) -> None:
    wrapped = SQLASessionMiddleware(app, url, **options)
    consume(wrapped(environ("POST"), start_response))
    before = commands(wrapped.engine)
    consume(wrapped(environ("POST"), start_response))
    after = commands(wrapped.engine)
    assert (after[0] - before[0], after[1] - before[1]) == expected
    wrapped.dispose()


@pytest.mark.usefixtures("administrator")
def test_engine_that_was_given_is_left_as_it_is(url: URL) -> None:
    engine = create_engine(url)
    wrapped = SQLASessionMiddleware(reads, engine)
    consume(wrapped(environ(), start_response))
    before = commands(engine)
    consume(wrapped(environ(), start_response))
    assert commands(engine) == (before[0], before[1] + 2)
    engine.dispose()


@pytest.mark.usefixtures("administrator")
def test_connection_is_one_of_the_drivers(row: Row) -> None:
    """Applications and other libraries look at its class."""
    plain = create_engine(row.url())
    app = SQLASessionMiddleware(reads, row.url())
    with app.engine.connect() as ours, plain.connect() as theirs:
        expected = type(theirs.connection.dbapi_connection)
        for _ in range(2):
            ours.exec_driver_sql("SELECT 1")
            ours.rollback()
            assert isinstance(ours.connection.dbapi_connection, expected)
            kind = type(ours.connection.dbapi_connection)
            assert (kind.__module__, kind.__qualname__) == (expected.__module__, expected.__qualname__)
    app.dispose()
    plain.dispose()


# How the connections are made


class Connected(NamedTuple):
    """A connection after a request that reads.

    :param rollbacks: how often the request has rolled it back.
    :param kind: its class.
    """

    rollbacks: int
    kind: type


def connected(url: URL, **options: Any) -> Connected:
    app = SQLASessionMiddleware(reads, url, engine_options=options)
    consume(app(environ(), start_response))
    before = commands(app.engine)
    consume(app(environ(), start_response))
    kind = type(known_records(app.engine.pool)[0].dbapi_connection)
    rollbacks = commands(app.engine)[1] - before[1]
    app.dispose()
    return Connected(rollbacks, kind)


@pytest.mark.usefixtures("administrator")
def test_connect_that_was_replaced_is_called(url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may return a proxy, whose class says nothing of what is sent. It was replaced after the engine was created."""
    module = url.get_dialect().import_dbapi()
    connect, calls = module.connect, []
    app = SQLASessionMiddleware(reads, url)
    assert app.engine.dialect.loaded_dbapi.paramstyle == module.paramstyle

    @wraps(connect)
    def measured(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return Instrumented(connect(*arguments, **options))

    monkeypatch.setattr(module, "connect", measured)
    for _ in range(2):
        consume(app(environ(), start_response))
    assert len(calls) == 1
    assert commands(app.engine) == (0, 5)  # also the one of SQLAlchemy's first connection
    app.dispose()


@pytest.mark.usefixtures("administrator")
def test_class_of_connections_that_was_replaced_is_used(url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another class than the driver's may send by other methods."""
    module = url.get_dialect().import_dbapi()
    connections = import_module(f"{module.__name__}.connections")
    own = type("Own", (connections.Connection,), {"__module__": __name__})
    if module.__name__ == "mariadb":
        assert connected(url, connect_args={"connectionclass": own}) == (2, own)
        return
    monkeypatch.setattr(connections, "Connection", own)
    if isinstance(module.connect, type):
        monkeypatch.setattr(module, "connect", own)
    assert connected(url) == (2, own)


@pytest.mark.usefixtures("administrator")
def test_method_of_the_drivers_class_that_was_replaced_is_called(url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests, and libraries that measure, do so at any time."""
    app = SQLASessionMiddleware(reads, url)
    consume(app(environ(), start_response))
    kind = import_module(f"{app.engine.dialect.loaded_dbapi.__name__}.connections").Connection
    rollback, calls = kind.rollback, []
    monkeypatch.setattr(kind, "rollback", lambda self: (calls.append(self), rollback(self))[1])
    consume(app(environ(), start_response))
    assert calls == [known_records(app.engine.pool)[0].dbapi_connection]
    app.dispose()


@pytest.mark.usefixtures("administrator")
@pytest.mark.parametrize("option", ["module", "creator", "pool", "pool_reset_on_return", "plugins"])
def test_connections_of_an_application_that_makes_them_are_left_as_they_are(option: str, url: URL) -> None:
    dialect = url.get_dialect()
    module = dialect.import_dbapi()
    arguments, options = dialect(dbapi=module).create_connect_args(url)
    created = partial(module.connect, *arguments, **options)
    given = {
        "module": module,
        "creator": created,
        "pool": QueuePool(created),
        "pool_reset_on_return": "rollback",
        "plugins": [],
    }
    found = connected(url, **{option: given[option]})
    with closing(created()) as plain:
        assert found == (2, type(plain))


@pytest.mark.usefixtures("administrator")
def test_all_listeners_of_do_connect_are_called(url: URL) -> None:
    """One that returns a connection makes it; SQLAlchemy calls none after it."""
    calls: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for engine, found in ((SQLASessionMiddleware(reads, url).engine, calls), (create_engine(url), theirs)):
        for _ in range(2):
            event.listen(
                engine, "do_connect", lambda dialect, record, arguments, options, found=found: found.append({**options})
            )
        engine.connect().close()
        engine.dispose()
    assert calls == [{**each, "connect_timeout": CONNECT_TIMEOUT} for each in theirs]
    assert len(calls) == 2


def test_rollback_of_a_connection_that_was_closed_fails_as_ever(url: URL) -> None:
    app = SQLASessionMiddleware(reads, url)
    with app.engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        connection.rollback()
        driver_connection: Any = connection.connection.dbapi_connection
        driver_connection.close()
        with pytest.raises(app.engine.dialect.loaded_dbapi.Error):
            driver_connection.rollback()
        connection.invalidate()
    app.dispose()


def test_module_of_the_dialect_has_what_the_drivers_has(url: URL) -> None:
    app = SQLASessionMiddleware(reads, url)
    ours: Any = app.engine.dialect.loaded_dbapi
    theirs: Any = url.get_dialect().import_dbapi()
    assert dir(ours) == dir(theirs)
    assert isinstance(ours, type(theirs))
    for name in ("__name__", "__doc__", "__file__", "paramstyle", "Error", "Warning", "apilevel", "threadsafety"):
        assert getattr(ours, name) == getattr(theirs, name)
    with pytest.raises(AttributeError, match="missing"):
        ours.missing  # noqa: B018
    assert app.engine.dialect.dbapi_exception_translation_map == url.get_dialect()().dbapi_exception_translation_map
