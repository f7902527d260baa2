"""Engines: from what, when, with which defaults, and what is said of those that cannot be (G7)."""

from __future__ import annotations

import gc
import sqlite3
import threading
import traceback
import tracemalloc
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, event, insert, make_url, select, text
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._database import engines
from sqlasession_middleware.errors import ConfigurationError
from tests.wsgi import Environ, StartResponse, consume, environ, select_one
from tests.wsgi import start_response as send_nothing

SECRET = "hunter2-s3cret"
LOST_URL = f"postgresql://me:{SECRET}@host/db"  # in the place of something else
numbers = Table("test_engines_number", MetaData(), Column("number", Integer, primary_key=True))


def nothing(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    return [b"x"]


def wrap(bind: Any, **options: Any) -> SQLASessionMiddleware:
    return SQLASessionMiddleware(nothing, bind, **options)


# (arguments, what the message has to say)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({"bind": None}, "bind must be a URL string, a URL or an Engine, got NoneType"),
    "empty": ({"bind": ""}, "bind must be a database URL .* got 0 characters"),
    "no scheme": ({"bind": f"me:{SECRET}@host/db"}, "bind must be a database URL .* without '://'"),
    "unreadable": ({"bind": f"://me:{SECRET}@host/db"}, "bind cannot be parsed as a URL"),
    "port": ({"bind": f"postgresql://me:@host:{SECRET}/db"}, "numeric port"),
    "old name": ({"bind": f"postgres://me:{SECRET}@host/db"}, "the database 'postgres'.* did you mean 'postgresql'"),
    "unknown driver": ({"bind": f"postgresql+psycopgg://me:{SECRET}@h/db"}, "the driver 'psycopgg' for postgresql"),
    "driver not installed": ({"bind": f"oracle+cx_oracle://me:{SECRET}@host/db"}, "needs the driver of 'oracle"),
    "asyncio": ({"bind": f"postgresql+psycopg_async://me:{SECRET}@host/db"}, "'psycopg_async', .* requires asyncio"),
    "asyncio, not installed": ({"bind": f"postgresql+asyncpg://me:{SECRET}@host/db"}, "'asyncpg', .* requires asyncio"),
    "password in SQLite": ({"bind": f"sqlite://me:{SECRET}@host/db"}, r"me:\*\*\*@host"),
    "no folder": ({"bind": "sqlite:////no/such/folder/shop.db"}, "no folder '/no/such/folder'"),
    "bad driver argument": ({"bind": f"sqlite:///x.db?timeout={SECRET}&password={SECRET}"}, "cannot create an engine"),
    "engine option": ({"engine_options": {"pool_sise": 5}}, r"engine_options\['pool_sise'\].*did you mean 'pool_size'"),
    "far from any": ({"engine_options": {"zzz": 5}}, r"engine_options\['zzz'\] is not an option .* for sqlite\.$"),
    "not whole": (
        {"engine_options": {"pool_size": "ten"}},
        r"\['pool_size'\] must be a whole number from 0, got 'ten'",
    ),
    "not really whole": ({"engine_options": {"pool_size": True}}, "must be a whole number from 0, got True"),
    "not seconds": ({"engine_options": {"pool_timeout": "1s"}}, "must be a number of seconds, got '1s'"),
    "not true": ({"engine_options": {"pool_pre_ping": "false"}}, "must be true or false, got 'false'"),
    "no such level": ({"engine_options": {"isolation_level": "SERIAL"}}, "one of .*SERIALIZABLE.* for sqlite, got 'SE"),
    "engine options": ({"engine_options": "pool_size=5"}, "engine_options must be a dict, got str"),
    "session option": (
        {"session_options": {"autoflosh": 1}},
        r"\['autoflosh'\].* of Session; did you mean 'autoflush'",
    ),
    "session bind": ({"session_options": {"bind": 1}}, r"\['bind'\] is set by the middleware"),
    "session class": ({"session_options": {"class_": dict}}, r"\['class_'\] must be a subclass of Session"),
    "session type": ({"session_options": {"autoflush": "no"}}, r"\['autoflush'\] must be true or false, got 'no'"),
    "session options": ({"session_options": ["autoflush"]}, "session_options must be a dict, got list"),
    "@ in the password": ({"bind": f"postgresql+psycopg://me:p@{SECRET}@localhost/shop"}, "percent-encoded"),
    "line break in connect_args": (
        {"bind": "postgresql+psycopg://me@host/db", "engine_options": {"connect_args": {"password": SECRET + "\n"}}},
        r"engine_options\['connect_args'\] has a line break at the beginning or end of 'password'",
    ),
    "line break in connect_args of bytes": (
        {
            "bind": "postgresql+psycopg://me@host/db",
            "engine_options": {"connect_args": {"password": f"{SECRET}\n".encode()}},
        },
        r"engine_options\['connect_args'\] has a line break at the beginning or end of 'password'",
    ),
    "connect_args": ({"engine_options": {"connect_args": f"password={SECRET}"}}, r"must be a dict, got str\."),
    "engine option's name": ({"engine_options": {5: 5}}, "engine_options must have names as keys, got 5"),
    "session option's name": ({"session_options": {5: 5}}, "session_options must have names as keys, got 5"),
    "session value": (
        {"session_options": {"join_transaction_mode": "zzz"}},
        "session_options are not accepted by Session",
    ),
    "plugin": ({"bind": "sqlite://?plugin=nosuch"}, "cannot create an engine for sqlite: .*plugins:"),
    "metadata": ({"metadata": numbers}, "metadata must be a MetaData, .* got Table"),
    "pool of less than nothing": ({"engine_options": {"pool_size": -3}}, "must be a whole number from 0, got -3"),
    "overflow of less than nothing": ({"engine_options": {"max_overflow": -2}}, "a whole number from -1, got -2"),
    "not whole anywhere": ({"engine_options": {"pool_recycle": "ten"}}, "must be a whole number, got 'ten'"),
    "URL for a number": ({"engine_options": {"pool_size": LOST_URL}}, "must be a whole number from 0, got a URL"),
    "URL for a switch": ({"session_options": {"autoflush": LOST_URL}}, "must be true or false, got a URL"),
    "URL for a class": ({"session_options": {"class_": LOST_URL}}, "a subclass of Session, got a URL"),
    "URL for a word": (
        {"session_options": {"join_transaction_mode": LOST_URL}},
        "are not accepted by Session: got a URL",
    ),
    "URL for a name": ({"session_options": {(LOST_URL,): 1}}, "must have names as keys, got a URL"),
    "URL for seconds": ({"replicas": ["sqlite://"], "replica_retry": LOST_URL}, "of seconds from 0, got a URL"),
    "URL for attempts": ({"transaction": {"attempts": LOST_URL}}, "a whole number from 1, got a URL"),
    "URL for bytes": ({"transaction": {"replay_body_memory": LOST_URL}}, "number of bytes from 0, got a URL"),
    "part of a byte": ({"transaction": {"replay_body_max": 1.5}}, "number of bytes from 0, got 1.5"),
    "true for bytes": ({"transaction": {"replay_body_max": True}}, "number of bytes from 0, got True"),
    "URL for a veto": ({"transaction": {"commit_veto": (LOST_URL,)}}, "must be callable, .* got a URL"),
    "URL for an error": ({"transaction": {"retry_on": [LOST_URL]}}, r"\['retry_on'\] must be .*, got a URL"),
    "URL for the 503": ({"unavailable": {"retry_after": LOST_URL}}, "of seconds from 0, got a URL"),
    "URL for streams": ({"streams": LOST_URL}, "must be a list of content types, got a URL"),
    "URL for a stream": ({"streams": [LOST_URL]}, "must hold content types such as 'text/csv', got a URL"),
    "URL for a bind": ({"binds": {LOST_URL: "sqlite://"}}, "binds must have names as keys, got a URL"),
    "app": ({"app": None}, "app must be a WSGI application, a callable, got NoneType"),
}


#: URLs with a password that is not encoded, and where SQLAlchemy finds the rest of it.
NOT_ENCODED = {
    "database": f"postgresql+psycopg://me:p@ss/{SECRET}@host/shop",
    "database, two @": f"mariadb+pymysql://me:p@ss/{SECRET}@x@host/shop",
    "database, no port": f"mariadb+pymysql://me:p@1:2/{SECRET}@host/shop",
    "database, after the user": f"postgresql+psycopg://m/e:{SECRET}@host/shop",
    "database, one / too many": f"postgresql+psycopg:///me:{SECRET}@host/shop",
    "database, with an option": f"postgresql+psycopg://me:p@ss/{SECRET}?x@host/shop",
    "option": f"postgresql+psycopg://me:p@ss?{SECRET}@host/shop",
    "second option": f"postgresql+psycopg://me:p@ss?a=b&{SECRET}@host/shop?c=d",
    "option with a value": f"postgresql+psycopg://me:p@ss?{SECRET}@host/shop?c=d",
    "host": f"postgresql+psycopg://me:p@{SECRET}@host/shop",
}


@pytest.mark.parametrize("place", NOT_ENCODED)
@pytest.mark.parametrize("role", ["bind", "binds", "replicas"])
def test_url_is_refused_when_its_password_ends_in_another_place(place: str, role: str) -> None:
    other = NOT_ENCODED[place]
    arguments = {"bind": other, "binds": {"audit": other}, "replicas": [other]}
    with pytest.raises(ConfigurationError, match="percent-encoded") as caught:
        SQLASessionMiddleware(**{"app": nothing, "bind": "sqlite://", role: arguments[role]})
    assert SECRET not in "".join(traceback.format_exception(caught.value, chain=True))


@pytest.mark.parametrize("place", [place for place in NOT_ENCODED if "option" not in place])
def test_url_object_is_refused_when_its_password_ends_in_another_place(place: str) -> None:
    with pytest.raises(ConfigurationError, match="percent-encoded"):
        wrap(make_url(NOT_ENCODED[place]))


@pytest.mark.parametrize("place", ["host", "database", "database, two @", "database, after the user"])
def test_rest_of_a_password_is_not_shown_when_an_engine_is_given(place: str) -> None:
    app = wrap(create_engine(NOT_ENCODED[place]))
    shown = repr(app) + repr(app._source) + str(app.capacity())
    assert SECRET not in shown + app._source.without_secrets(f'database "{app.engine.url.database}" does not exist')


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///me@work.db",
        "postgresql+psycopg://me%40work:p%40ss%2Fword@host/shop?application_name=me@work",
        "postgresql+psycopg://me@work:secret@host/shop",
        "postgresql+psycopg:///shop?host=/run/me@work",
    ],
)
def test_url_is_accepted_when_its_at_sign_is_part_of_a_name(url: str) -> None:
    assert wrap(url)._source.url.host in (None, "host")


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("user name", {"username": "me\n"}),
        ("password", {"password": SECRET + "\n"}),
        ("host", {"host": "host\n"}),
        ("database", {"database": "shop\n"}),
        ("option 'passwd'", {"query": {"passwd": SECRET + "\n"}}),
        ("option 'user'", {"query": {"user": "me\n"}}),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_url_is_refused_when_a_part_ends_in_the_line_break_of_a_file(part: str, change: Any, line_break: str) -> None:
    """Otherwise a login fails with "password authentication failed", and the password that is written is right."""
    change = {name: _with(value, line_break) for name, value in change.items()}
    url = make_url(f"mariadb+pymysql://me:{SECRET}@host/shop").set(**change)
    with pytest.raises(ConfigurationError, match=f"line break at the beginning or end of its {part}") as caught:
        wrap(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value, chain=True))


def _with(value: Any, line_break: str) -> Any:
    if isinstance(value, dict):
        return {name: _with(each, line_break) for name, each in value.items()}
    return value.replace("\n", line_break)


@pytest.mark.parametrize("url", ["mariadb+pymysql://me:secret@host/shop\n", "sqlite:///shop.db\n"])
def test_url_is_refused_when_it_ends_in_a_line_break(url: str) -> None:
    with pytest.raises(ConfigurationError, match="line break at the beginning or end of its database"):
        wrap(url)


@pytest.mark.parametrize("driver", ["sqlite", "postgresql+psycopg", "postgresql+psycopg2", "mariadb+pymysql"])
def test_isolation_level_may_be_written_in_any_way_that_sqlalchemy_takes(driver: str) -> None:
    for level in ("SERIALIZABLE", "read_uncommitted", "autocommit"):
        SQLASessionMiddleware(nothing, f"{driver}://", engine_options={"isolation_level": level})


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("parsed", [False, True], ids=["text", "URL"])
def test_bad_setting_is_refused_at_construction(case: str, parsed: bool) -> None:
    """The error names the setting, and no password is in it or in anything that its traceback shows."""
    given, message = REFUSED[case]
    arguments = {"app": nothing, "bind": "sqlite://", **given}
    if parsed and isinstance(arguments["bind"], str) and "://" in arguments["bind"][1:]:
        try:
            arguments["bind"] = make_url(arguments["bind"])
        except ValueError:
            return
    with pytest.raises(ConfigurationError, match=message) as caught:
        SQLASessionMiddleware(**arguments)
    assert SECRET not in "".join(traceback.format_exception(caught.value, chain=True))
    assert SECRET not in repr(caught.value)


def test_unknown_option_is_refused_when_an_engine_like_it_was_accepted_before() -> None:
    """Accepted options are remembered; a URL is checked each time."""
    wrap("sqlite:///a.db?timeout=5")
    with pytest.raises(ConfigurationError, match="cannot create an engine"):
        wrap("sqlite:///a.db?timeout=soon")


def test_engine_options_are_refused_for_an_engine() -> None:
    with pytest.raises(ConfigurationError, match="cannot be applied to an existing Engine"):
        wrap(create_engine("sqlite://"), engine_options={"echo": True})


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://me:{SECRET}@localhost/shop?sslpassword={SECRET}",
        f"mysql+pymysql://me:{SECRET}@localhost/shop?password={SECRET}",
    ],
)
def test_password_is_in_no_repr(url: str) -> None:
    app = wrap(url)
    assert "me:***@localhost/shop" in repr(app)
    for thing in (app, app.context()):
        assert SECRET not in repr(thing)


def test_engine_is_made_at_first_use_and_once() -> None:
    app = wrap("sqlite://")
    consume(app(environ(), send_nothing))
    with app.context():
        pass
    assert not [each for each in gc.get_objects() if type(each) is Engine and each.url is app._source.url]
    barrier = threading.Barrier(8)

    def look(_: int) -> object:
        barrier.wait(timeout=30)
        return app.engine

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(look, range(8)))) == 1
    assert app.engine is app.database_engine is app.engines["default"]
    app.dispose()


def test_engine_is_the_one_that_another_thread_made_in_the_meantime(monkeypatch: pytest.MonkeyPatch) -> None:
    app, others = wrap("sqlite://"), create_engine("sqlite://")

    class LockOfALoser:
        def __enter__(self) -> None:
            app._source._engine = others

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(engines, "_creating", LockOfALoser())
    assert app.engine is others


def test_request_that_does_not_touch_the_session_opens_nothing(database_url: str) -> None:
    opened: list[Session] = []

    class Watched(Session):
        def __init__(self, **options: Any) -> None:
            opened.append(self)
            super().__init__(**options)

    app = wrap(database_url, session_options={"class_": Watched})
    connects: list[object] = []
    event.listen(app.engine, "connect", lambda *arguments: connects.append(arguments))
    consume(app(environ(), send_nothing))
    assert (opened, connects) == ([], [])
    with app.context():
        select_one()
    assert (len(opened), len(connects)) == (1, 1)
    app.dispose()


def test_given_engine_is_used_and_not_disposed_of(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    app = wrap(engine)
    with app.context():
        select_one()
    assert app.engine is engine
    assert engine.pool.checkedin() == 1
    app.dispose()
    assert engine.pool.checkedin() == 1
    engine.dispose()


def test_own_engine_is_disposed_of_and_usable_again(sqlite_url: str) -> None:
    app = wrap(sqlite_url)
    app.dispose()  # Nothing was made yet.
    with app.context():
        select_one()
    assert app.engine.pool.checkedin() == 1
    app.dispose()
    assert app.engine.pool.checkedin() == 0
    with app.context():
        select_one()
    app.dispose()


def test_url_object_is_taken(sqlite_url: str) -> None:
    app = wrap(make_url(sqlite_url))
    assert app.engine.url == make_url(sqlite_url)


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        ("postgresql+psycopg://localhost/shop", {}, False),
        ("postgresql+psycopg://localhost/shop", {"ping_after": 0}, True),
        ("mariadb+pymysql://localhost/shop", {"engine_options": {"pool_pre_ping": True}}, True),
        ("mysql+pymysql://localhost/shop", {"engine_options": {"pool_pre_ping": False}, "ping_after": 0}, False),
        ("postgresql+psycopg://localhost/shop", {"engine_options": {"poolclass": NullPool}, "ping_after": 0}, True),
        ("sqlite:///shop.db", {}, False),
        ("sqlite:///shop.db", {"ping_after": 0}, False),
        ("sqlite:///shop.db", {"engine_options": {"pool_pre_ping": True}}, True),
    ],
)
def test_sqlalchemy_pings_at_each_use_when_it_is_asked_to(url: str, options: dict[str, Any], expected: bool) -> None:
    """Otherwise the pool looks at the socket: see ``test_idle_connections.py``."""
    assert wrap(url, **options).engine.pool._pre_ping is expected


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite+pysqlite://"])
@pytest.mark.parametrize("memdb", [True, False], ids=["memdb", "SQLite before memdb"])
def test_memory_database_is_seen_by_every_thread(url: str, memdb: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not memdb:
        monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    app = wrap(url, metadata=numbers.metadata)
    app.init_database()

    def write(number: int) -> None:
        with app.context():
            session.execute(insert(numbers).values(number=number))
            session.commit()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(20)))
    with app.context():
        assert len(session.execute(select(numbers)).all()) == 20
    assert isinstance(app.engine.pool, QueuePool)
    assert app.engine.pool.checkedout() == 0
    assert app.engine.url == make_url(url)
    app.dispose()


def test_memory_database_keeps_transactions_apart() -> None:
    """One connection for all, as others do it, would undo the writes of one request at the end of another."""
    app = wrap("sqlite://", metadata=numbers.metadata)
    app.init_database()
    with app.context():
        session.execute(insert(numbers).values(number=1))
        with app.context():
            session.connection()
        session.commit()
    with app.context():
        assert session.execute(select(numbers.c.number)).scalars().all() == [1]
    app.dispose()


def test_memory_database_lives_when_a_connection_is_lost_and_ends_when_disposed_of() -> None:
    app = wrap("sqlite://", metadata=numbers.metadata)
    app.init_database()
    with app.context():
        session.connection().invalidate()
    with app.context():
        assert session.execute(select(numbers)).all() == []
    app.dispose()
    app.init_database()
    app.drop_database()
    app.dispose()


def test_memory_databases_of_two_applications_are_two() -> None:
    first, second = (wrap("sqlite://", metadata=numbers.metadata) for _ in range(2))
    first.init_database()
    with second.context(), pytest.raises(Exception, match="no such table"):
        session.execute(select(numbers))
    first.dispose()
    second.dispose()


@pytest.mark.parametrize("option", ["poolclass", "creator", "pool"])
def test_pool_of_the_user_stands_for_a_memory_database(option: str) -> None:
    def creator() -> sqlite3.Connection:
        return sqlite3.connect(":memory:", check_same_thread=False)

    values: dict[str, Any] = {"poolclass": StaticPool, "creator": creator, "pool": StaticPool(creator)}
    app = wrap("sqlite://", engine_options={option: values[option]})
    with app.context():
        assert select_one() == 1
    if option != "creator":
        assert isinstance(app.engine.pool, StaticPool)
    app.dispose()


def test_uri_of_sqlite_is_the_users_own(tmp_path) -> None:
    (tmp_path / "shop.db").touch()
    app = wrap(f"sqlite:///file:{tmp_path}/shop.db?mode=ro&uri=true")
    with app.context(), pytest.raises(Exception, match="readonly"):
        session.execute(text("CREATE TABLE t (x)"))
    app.dispose()


def test_dict_of_options_is_nobody_elses(sqlite_url: str) -> None:
    """Two applications built from one dict must not find each other's changes in it."""
    statements: list[object] = []
    options = {"connect_args": {"timeout": 5.0, "uri": False}, "execution_options": {"tags": [1, (2, {3})]}}
    app = wrap(sqlite_url, engine_options=options)
    options["connect_args"]["timeout"] = statements
    options["execution_options"]["tags"].append(4)
    info = {"by": ["one"]}
    sessions = wrap(sqlite_url, session_options={"info": info})
    info["by"].append("two")
    with app.context():
        select_one()
    assert app.engine.get_execution_options()["tags"] == [1, (2, {3})]
    with sessions.context():
        assert session.info == {"by": ["one"]}
    app.dispose()


def test_session_options_reach_the_session(sqlite_url: str) -> None:
    class Mine(Session):
        def __init__(self, *, colour: str, **options: Any) -> None:
            super().__init__(**options)
            self.info["colour"] = colour

    app = wrap(sqlite_url, session_options={"class_": Mine, "colour": "red", "expire_on_commit": False})
    with app.context():
        assert isinstance(session(), Mine)
        assert session.info["colour"] == "red"
        assert session().expire_on_commit is False
    with app.new_session(expire_on_commit=True) as own:
        assert own.expire_on_commit is True
        assert own.info["colour"] == "red"


def test_tables_are_created_and_dropped_with_nothing_bound(database_url: str) -> None:
    app = wrap(database_url, metadata=numbers.metadata)
    app.init_database()
    app.init_database()
    with app.context():
        assert session.execute(select(numbers)).all() == []
    app.drop_database()
    with app.context(), pytest.raises(Exception, match="test_engines_number"):
        session.execute(select(numbers))
    app.dispose()


def test_init_database_warns_when_no_model_was_imported() -> None:
    app = wrap("sqlite://", metadata=MetaData())
    with pytest.warns(UserWarning, match="import the modules that define the models") as caught:
        app.init_database()
    assert caught[0].filename == __file__
    app.dispose()


def test_application_that_was_never_called_is_small() -> None:
    """10,000 of them have to fit into one process: at most 4 KiB each."""
    kept = [wrap(f"sqlite:///{number}.db") for number in range(100)]
    gc.collect()
    tracemalloc.start()
    kept += [wrap(f"sqlite:///{number}.db") for number in range(100, 1100)]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / 1000 < 4096


def test_accepted_options_are_remembered_only_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_accepted", {})
    monkeypatch.setattr(engines, "_ACCEPTED_AT_MOST", 2)
    for size in range(5):
        wrap("sqlite:///x.db", engine_options={"pool_size": size + 1})
    assert len(engines._accepted) == 2


def test_construction_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap("sqlite://")
        wrap("postgresql+psycopg://localhost/shop")


def test_relative_path_is_taken_from_where_the_application_was_made(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon is in another folder by the time of the first request."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    app = wrap("sqlite:///shop.db")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with app.context():
        select_one()
    app.dispose()
    assert (tmp_path / "shop.db").exists()


def test_engine_that_was_used_before_it_was_given(sqlite_engine: Engine) -> None:
    sqlite_engine.connect().close()
    app = SQLASessionMiddleware(nothing, sqlite_engine)
    with app.engine.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar_one() == 1


def test_isolation_level_is_left_to_a_dialect_that_has_to_be_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(dialect: Any, driver_connection: Any) -> list[str]:
        return list(driver_connection.levels)

    monkeypatch.setattr(SQLiteDialect_pysqlite, "get_isolation_level_values", ask)
    wrap("sqlite:///levels.db", engine_options={"isolation_level": "DAYDREAM"})


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///shop.db", "postgresql+psycopg://localhost/shop"])
def test_pool_logs_where_every_pool_does(url: str) -> None:
    """A logger of the configuration, ``sqlalchemy.pool``, is for the pools of this library as well."""
    assert wrap(url).engine.pool.logger.name.startswith("sqlalchemy.pool.")
