"""PasteDeploy's ini files: how they stack the middleware, and how their strings become settings."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paste.deploy import appconfig, loadapp, loadfilter
from sqlalchemy import create_engine, engine_from_config
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, QueuePool
from werkzeug.test import Client
from werkzeug.wrappers import Response

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.errors import ConfigurationError

from . import paste_apps
from .paste_apps import SpecialSession

SECRET = "hunter2-s3cret"
Load = Callable[..., Any]

URL_HERE = "sqlite:///%(here)s/test.db"
EGG = "use = egg:sqlasession_middleware"
SETTINGS = f"""
    sqlalchemy.url = {URL_HERE}
    metadata = tests.paste_apps:metadata
"""
APP = """
    [app:guests]
    use = call:tests.paste_apps:guest_book
"""
DB = f"""
    [filter:db]
    {EGG}
    {SETTINGS}
"""


def piped(db: str = DB) -> str:
    """The usual ini, with another ``[filter:db]``."""
    return f"[pipeline:main]\npipeline = db guests\n{APP}{db}"


def piped_to(url: str) -> str:
    """The usual ini, with another URL."""
    return piped(DB.replace(URL_HERE, url))


@pytest.fixture
def write_ini(tmp_path: Path) -> Callable[[str], str]:
    """Writes an ini file, and says what PasteDeploy calls it."""

    def write(ini: str) -> str:
        path = tmp_path / "shop.ini"
        # Lines that are indented would continue the one before.
        path.write_text("\n".join(line.strip() for line in ini.splitlines()))
        return f"config:{path}"

    return write


@pytest.fixture
def load(write_ini: Callable[[str], str]) -> Iterator[Load]:
    """Loads an application from an ini file and creates its tables."""
    made: list[SQLASessionMiddleware] = []

    def load(ini: str, *, tables: bool = True) -> Any:
        app = loadapp(write_ini(ini))
        if isinstance(app, SQLASessionMiddleware):
            made.append(app)
            if tables:
                app.init_database()
        return app

    yield load
    for app in made:
        app.dispose()


@pytest.fixture
def configured() -> Iterator[Callable[..., SQLASessionMiddleware]]:
    """Builds the middleware from a mapping; the URL is an in-memory SQLite database where nothing else is said."""
    made: list[SQLASessionMiddleware] = []

    def configured(settings: dict[str, str], **options: Any) -> SQLASessionMiddleware:
        app = Response("unused")
        made.append(SQLASessionMiddleware.from_config(app, {"sqlalchemy.url": "sqlite://", **settings}, **options))
        return made[-1]

    yield configured
    for app in made:
        app.dispose()


def get(app: Any, path: str) -> str:
    response = Client(app, Response).get(path, buffered=True)
    assert response.status_code == 200
    return response.get_data(as_text=True)


STACKS = {
    "pipeline": piped(),
    "filter-app": f"[filter-app:main]\n{EGG}\nnext = guests\n{SETTINGS}{APP}",
    "filter-with": f"[app:main]\nuse = call:tests.paste_apps:guest_book\nfilter-with = db\n{DB}",
    "entry point by its name": piped(DB.replace(EGG, f"{EGG}#main")),
    "factory without an entry point": piped(
        DB.replace(EGG, "paste.filter_app_factory = sqlasession_middleware.paste:main")
    ),
    "section that another one completes": f"""
        [pipeline:main]
        pipeline = special guests
        [filter:special]
        use = db
        sqlalchemy.url = {URL_HERE}
        {APP}{DB.replace(URL_HERE, "sqlite:///overridden.db")}
    """,
    "URL from the defaults": f"[DEFAULT]\ndatabase = {URL_HERE}\ndebug = true\n" + piped_to("%(database)s"),
    "setting from the defaults": f"[DEFAULT]\nsqlalchemy.url = {URL_HERE}\n"
    + piped(f"[filter:db]\n{EGG}\nget sqlalchemy.url = sqlalchemy.url\nmetadata = tests.paste_apps:metadata"),
}


@pytest.mark.parametrize("ini", STACKS.values(), ids=STACKS)
def test_requests_are_served_when_an_ini_stacks_the_middleware_by(ini: str, load: Load, tmp_path: Path) -> None:
    app = load(ini)
    assert isinstance(app, SQLASessionMiddleware)
    assert app.metadata is paste_apps.metadata
    assert get(app, "/Ada") == "Ada"
    assert get(app, "/") == "Ada"
    assert app.engine.url.database == str(tmp_path / "test.db")
    assert app.engine.pool.checkedout() == 0


@pytest.mark.parametrize("composite", ["egg:Paste#urlmap", "call:tests.paste_apps:mount"])
def test_each_mount_has_its_own_database_when_a_composite_holds_two(composite: str, load: Load, tmp_path) -> None:
    app = load(f"""
        [composite:main]
        use = {composite}
        /one = one
        /two = two
        [pipeline:one]
        pipeline = db guests
        [pipeline:two]
        pipeline = other guests
        [filter:other]
        use = db
        sqlalchemy.url = sqlite:///other.db
        {APP}{DB}
    """)
    mounts = app.mounts if hasattr(app, "mounts") else {path: mounted for (_, path), mounted in app.applications}
    for mounted in mounts.values():
        mounted.init_database()
    assert get(app, "/one/Ada") == "Ada"
    assert get(app, "/two/Bob") == "Bob"
    assert get(app, "/one/Eve") == "Ada Eve"
    assert get(app, "/two/") == "Bob"
    assert [mounts[path].engine.url.database for path in ("/one", "/two")] == [
        str(tmp_path / "test.db"),
        str(tmp_path / "other.db"),
    ]
    for mounted in mounts.values():
        assert mounted.engine.pool.checkedout() == 0
        mounted.dispose()


@pytest.mark.parametrize(
    ("url", "database"),
    [
        ("sqlite:///shop.db", "{here}/shop.db"),
        ("sqlite:///data/../shop.db", "{here}/data/../shop.db"),
        ("sqlite+pysqlite:///shop.db", "{here}/shop.db"),
        ("sqlite:///%(here)s/shop.db", "{here}/shop.db"),
        ("sqlite:///{here}/data/shop.db", "{here}/data/shop.db"),
        ("sqlite://", None),
        ("sqlite:///:memory:", ":memory:"),
        ("sqlite:///file:shop.db?uri=true", "file:shop.db"),
        ("postgresql+psycopg://localhost/shop.db", "shop.db"),
    ],
)
def test_sqlite_path_is_taken_from_the_inis_folder_when_relative(
    url: str, database: str | None, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the process's own folder is."""
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    app = load(piped_to(url.replace("{here}", str(tmp_path))), tables=False)
    assert app.engine.url.database == (database and database.format(here=tmp_path))


def test_relative_path_is_the_processs_when_there_is_no_ini(configured, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = configured({"sqlalchemy.url": "sqlite:///shop.db"})
    with app.engine.connect():
        assert (tmp_path / "shop.db").is_file()


@pytest.mark.parametrize("url", ["sqlite:///shop.db", "sqlite:///{here}/shop.db"])
def test_file_is_where_the_ini_says_when_it_is_used(url: str, load: Load, tmp_path, monkeypatch) -> None:
    """The engine is made at its first use: a folder that the process has changed to since plays no part."""
    app = load(piped_to(url.replace("{here}", str(tmp_path))), tables=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    app.init_database()
    assert (tmp_path / "shop.db").is_file()
    assert os.listdir() == []


def described(engine: Any) -> dict[str, Any]:
    """What the options of an engine have set, as far as it can be asked."""
    pool = vars(engine.pool)
    return {
        # Ours is theirs, but for the timeouts that it notes.
        "class": QueuePool if isinstance(engine.pool, QueuePool) else type(engine.pool),
        "pool": {name: pool.get(name) for name in ("_pre_ping", "_recycle", "_timeout", "_max_overflow", "echo")},
        "size": engine.pool.size() if hasattr(engine.pool, "size") else None,
        "reset": engine.pool._reset_on_return,
        "echo": engine.echo,
        "isolation": engine.dialect._on_connect_isolation_level,
        "paramstyle": engine.dialect.paramstyle,
        "label_length": engine.dialect.label_length,
        "hidden": engine.hide_parameters,
        "name": engine.logging_name,
    }


@pytest.fixture
def quiet() -> Iterator[None]:
    """``echo`` gives SQLAlchemy's logger a handler for good, on the stdout of the one test."""
    handlers = logging.getLogger("sqlalchemy").handlers
    before = list(handlers)
    yield
    handlers[:] = before


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool_size", "7"),
        ("pool_size", " 7 "),
        ("max_overflow", "-1"),
        ("pool_timeout", "3"),
        ("pool_recycle", "1800"),
        ("echo", "true"),
        ("echo", "on"),
        ("echo", "false"),
        ("echo", "0"),
        ("echo", "debug"),
        ("echo_pool", "debug"),
        ("echo_pool", "no"),
        ("isolation_level", "SERIALIZABLE"),
        ("paramstyle", "named"),
        ("logging_name", "shop"),
        ("pool_reset_on_return", "commit"),
        ("pool_reset_on_return", "none"),
        ("future", "true"),
    ],
)
def test_option_is_what_sqlalchemy_makes_of_it_when_sqlalchemy_types_it(
    name: str, value: str, configured, sqlite_url: str
) -> None:
    settings = {"sqlalchemy.url": sqlite_url, f"sqlalchemy.{name}": value}
    theirs = engine_from_config(settings)
    assert described(configured(settings).engine) == described(theirs)
    theirs.dispose()


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [
        ("pool_pre_ping", "false", "pool._pre_ping", False),
        ("pool_pre_ping", "true", "pool._pre_ping", True),
        ("pool_timeout", "2.5", "pool._timeout", 2.5),
        ("poolclass", "sqlalchemy.pool:NullPool", "pool.__class__", NullPool),
        ("poolclass", "sqlalchemy.pool.NullPool", "pool.__class__", NullPool),
        ("hide_parameters", "false", "hide_parameters", False),
        ("hide_parameters", "yes", "hide_parameters", True),
        ("pool_use_lifo", "false", "pool._pool.use_lifo", False),
        ("label_length", "20", "dialect.label_length", 20),
        ("query_cache_size", "9", "_compiled_cache.capacity", 9),
        ("json_serializer", "json:dumps", "dialect._json_serializer.__name__", "dumps"),
    ],
)
def test_option_has_its_type_when_sqlalchemy_would_take_the_string(
    name: str, value: str, path: str, expected: object, configured, sqlite_url: str
) -> None:
    found = configured({"sqlalchemy.url": sqlite_url, f"sqlalchemy.{name}": value}).engine
    for part in path.split("."):
        found = getattr(found, part)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"sqlalchemy.pool_pre_ping": "true"}, True),
        ({"ping_after": "0"}, True),
        ({"ping_after": "0", "sqlalchemy.pool_pre_ping": "false"}, False),
        ({"ping_after": "2.5"}, False),
        ({"ping_after": "none"}, False),
    ],
    ids=str,
)
def test_ping_is_what_an_ini_says_for_a_server(settings: dict[str, str], expected: bool, configured) -> None:
    app = configured({"sqlalchemy.url": "postgresql+psycopg://localhost/shop", **settings})
    assert app.engine.pool._pre_ping is expected


def test_isolation_level_holds_when_connected(configured, database_url: str) -> None:
    """The last word on an option is the database's."""
    app = configured({"sqlalchemy.url": database_url, "sqlalchemy.isolation_level": "SERIALIZABLE"})
    with app.engine.connect() as connection:
        assert connection.get_isolation_level() == "SERIALIZABLE"


@pytest.mark.parametrize(
    ("name", "value", "attribute", "expected"),
    [
        ("expire_on_commit", "false", "expire_on_commit", False),
        ("expire_on_commit", "true", "expire_on_commit", True),
        ("autoflush", "off", "autoflush", False),
        ("autobegin", "0", "autobegin", False),
        ("twophase", "no", "twophase", False),
        ("join_transaction_mode", "create_savepoint", "join_transaction_mode", "create_savepoint"),
        ("class_", "tests.paste_apps:SpecialSession", "__class__", SpecialSession),
        ("class_", "tests.paste_apps.SpecialSession", "__class__", SpecialSession),
    ],
)
def test_session_has_the_option_when_an_ini_sets_it(
    name: str, value: str, attribute: str, expected: object, configured
) -> None:
    app = configured({f"session.{name}": value})
    with app.context():
        assert isinstance(session(), Session)
        found = getattr(session(), attribute)
        assert found is expected or found == expected or (attribute == "__class__" and issubclass(found, expected))


def test_metadata_is_imported_when_an_ini_names_it(configured) -> None:
    assert configured({"metadata": "tests.paste_apps:metadata"}).metadata is paste_apps.metadata


def test_password_is_unescaped_when_an_ini_escapes_its_percent_signs(load: Load) -> None:
    url = "postgresql+psycopg://shop:p%%40ss%%2Fw%%25rd@localhost/shop"
    app = load(piped_to(url), tables=False)
    assert app.engine.url.password == "p@ss/w%rd"
    assert "shop:***@" in repr(app)


MISTAKES = {
    # setting: value, what the message says of it
    "sqlalchmey.url": ("x", "is not a setting of this middleware; did you mean 'sqlalchemy.url'?"),
    "sqlalchemy.pool_sise": ("5", "is not an option of create_engine() for sqlite; did you mean 'pool_size'?"),
    "sqlalchemy.nosuchthing": ("5", "is not an option of create_engine() for sqlite."),
    "session.autoflosh": ("true", "is not a setting of this middleware; did you mean 'session.autoflush'?"),
    "sesion.autoflush": ("true", "is not a setting of this middleware; did you mean 'session.autoflush'?"),
    "pool_size": ("5", "is not a setting of this middleware; did you mean 'sqlalchemy.pool_size'?"),
    "metadat": ("x:y", "is not a setting of this middleware; did you mean 'metadata'?"),
    "zzz": ("5", "is not a setting of this middleware."),
    "sqlalchemy.pool_size": ("ten", "must be a whole number from 0, got 'ten'."),
    "sqlalchemy.max_overflow": ("1.5", "must be a whole number from -1, got '1.5'."),
    "sqlalchemy.pool_recycle": ("", "must be a whole number, got ''."),
    "sqlalchemy.pool_timeout": ("soon", "must be a number of seconds, got 'soon'."),
    "sqlalchemy.pool_pre_ping": ("maybe", "must be true or false, got 'maybe'."),
    "ping_after": ("60s", "must be a number of seconds from 0, or none, got '60s'."),
    "sqlalchemy.echo": ("loud", "must be true, false or 'debug', got 'loud'."),
    "sqlalchemy.poolclass": (
        "NullPool",
        (
            "must be the dotted name of an importable object, 'package.module:name', got 'NullPool'"
            " (ModuleNotFoundError: No module named 'NullPool')."
        ),
    ),
    "sqlalchemy.connect_args": (
        "{'password': 'hunter2-s3cret'}",
        "must be a dict, which an ini file cannot contain: set it in Python.",
    ),
    "session.autoflush": ("maybe", "must be true or false, got 'maybe'."),
    "session.class_": ("tests.paste_apps:metadata", "must be a subclass of Session, got MetaData()."),
    "session.info": ("{}", "must be a dict, which an ini file cannot contain: set it in Python."),
    "metadata": (
        "tests.paste_apps:guests",
        "must be a MetaData, such as a declarative Base.metadata, or several, got Table.",
    ),
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_error_names_setting_and_file_when_it_is_wrong(setting: str, load: Load, tmp_path: Path) -> None:
    value, problem = MISTAKES[setting]
    with pytest.raises(ConfigurationError) as caught:
        load(piped(f"[filter:db]\n{EGG}\nsqlalchemy.url = {URL_HERE}\n{setting} = {value}"))
    assert str(caught.value) == f"{setting!r} in {tmp_path}/shop.ini {problem}"
    assert SECRET not in printed(caught.value)


@pytest.mark.parametrize("setting", MISTAKES)
def test_error_names_the_setting_alone_when_it_is_from_no_file(setting: str, configured) -> None:
    value, problem = MISTAKES[setting]
    with pytest.raises(ConfigurationError) as caught:
        configured({setting: value})
    assert str(caught.value) == f"{setting!r} {problem}"


def test_error_names_the_settings_by_their_prefix_when_all_together_are_wrong(configured) -> None:
    with pytest.raises(ConfigurationError, match=r"^'session\.\*' are not accepted by Session: "):
        configured({"sqlalchemy.url": "sqlite:///shop.db", "session.join_transaction_mode": "nosuch"})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("sqlalchemy.pool_reset_on_return", "nosuch"),
        ("sqlalchemy.poolclass", "tests.paste_apps:metadata"),
        ("sqlalchemy.plugins", "nosuch"),
    ],
)
def test_error_names_the_option_when_it_is_sqlalchemy_that_refuses(setting: str, value: str, configured) -> None:
    with pytest.raises(ConfigurationError) as caught:
        configured({"sqlalchemy.url": "sqlite:///shop.db", setting: value})
    assert str(caught.value).startswith(f"{setting!r} ")


def test_error_does_not_propose_the_very_name_when_an_option_does_not_go_with_another(configured) -> None:
    with pytest.raises(ConfigurationError, match=r"'sqlalchemy\.pool_size'") as caught:
        configured({"sqlalchemy.poolclass": "sqlalchemy.pool:NullPool", "sqlalchemy.pool_size": "5"})
    assert "did you mean 'pool_size'" not in str(caught.value)


@pytest.mark.parametrize("ini", ["", "sqlalchemy.ulr = postgresql://shop:hunter2-s3cret@localhost/shop"])
def test_error_says_so_when_the_url_is_missing(ini: str, load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(piped(f"[filter:db]\n{EGG}\n{ini}"))
    meant = " is not a setting of this middleware; did you mean 'sqlalchemy.url'?"
    said = f"'sqlalchemy.ulr' in {tmp_path}/shop.ini{meant}" if ini else f"'sqlalchemy.url' in {tmp_path}/shop.ini is m"
    assert str(caught.value).startswith(said)
    assert SECRET not in printed(caught.value)


def test_value_is_refused_when_it_is_no_string(configured) -> None:
    with pytest.raises(ConfigurationError, match=r"^'sqlalchemy.pool_size' must be a string, .* got int\.$"):
        configured({"sqlalchemy.pool_size": 5})


def printed(error: BaseException) -> str:
    """What a server's log shows of an error, and what a reporter finds in it and whatever it came from."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    return "".join(traceback.format_exception(error)) + "".join(f"{each!s} {each!r} {each.args!r}" for each in seen)


MALFORMED = [
    "{}",
    "shop:{}@localhost/shop",
    "://shop:{}@localhost/shop",
    "postgresql//shop:{}@localhost/shop",
    "postgresql:/shop:{}@localhost/shop",
    "postgresql:shop:{}@localhost/shop",
    "'postgresql://shop:{}@localhost/shop'",
    '"postgresql://shop:{}@localhost/shop"',
    "url = postgresql://shop:{}@localhost/shop",
    "post gresql://shop:{}@localhost/shop",
    "postgresql+psycopg ://shop:{}@localhost/shop",
    "postgresql://shop:{}@localhost:port/shop",
    "postgresql://shop:{}@localhost:54 32/shop",
    "postgresql://shop:pass@word{}@localhost:x/shop",
    "postgresql://shop:{}@[::1/shop",
    "postgresql://shop:pass@wo/{}@localhost/shop",
    "postgresql://shop:pass@wo?{}@localhost/shop",
    "postgresql://sh/op:{}@localhost/shop",
    "postgresql://shop:x@{}:5432:/shop",
    "postgresql://shop:{}:5432/shop",
    "postgresql://shop@localhost:{}/shop",
    "postgres://shop:{}@localhost/shop",
    "nosuch://shop:{}@localhost/shop",
    "nosuch://localhost/shop?password={}",
    "nosuch+driver://shop:{}@localhost/shop",
    "postgresql+nosuch://shop:{}@localhost/shop",
    "postgresql+asyncpg://shop:{}@localhost/shop",
    "sqlite+aiosqlite:///shop.db?password={}",
    "sqlite://shop:{}@localhost/shop",
    "sqlite:///shop:{}@localhost/shop.db",
    "sqlite:///nowhere/shop.db?password={}",
    "sqlite:///shop.db?timeout={}",
    "sqlite:///shop.db?timeout=soon&password={}",
    "sqlite:///shop.db?uri={}",
    "oracle://shop:{}@localhost/shop",
    "mssql+pyodbc:///?odbc_connect=UID%3Dshop%3BPWD%3D{}",
    "mysql+pymysql://shop@localhost/shop?connect_timeout={}",
    "mysql+pymysql://shop@localhost/shop?connect_timeout=soon&password={}",
    "mysql+pymysql://shop@localhost/shop?connect_timeout=soon&ssl_key_password={}",
    "mysql+pymysql://shop@localhost/shop?read_timeout=soon&passwd={}",
    "mysql+pymysql://shop:{}@localhost/shop?write_timeout={}",
    "postgresql+psycopg://shop@localhost/shop?host=one:{}&host=two:x",
    "postgresql+psycopg://localhost/shop?host=one:x&host=two:y&sslpassword={}",
    "postgresql+psycopg://shop:{}@/shop?host=one:x&host=two:y",
]


@pytest.mark.parametrize("way", ["ini", "settings", "constructor"])
@pytest.mark.parametrize("password", [SECRET, "hunter2%2Ds3cret"], ids=["plain", "escaped"])
@pytest.mark.parametrize("url", MALFORMED)
def test_password_is_in_no_message_when_the_url_is_wrong(
    url: str, password: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = url.replace("{}", password)
    place = {"here": str(tmp_path), "__file__": str(tmp_path / "shop.ini")} if way == "ini" else {}
    make: Callable[..., Any] = SQLASessionMiddleware if way == "constructor" else SQLASessionMiddleware.from_config
    with pytest.raises(ConfigurationError) as caught:
        make(Response("unused"), url if way == "constructor" else {"sqlalchemy.url": url, **place})
    assert str(caught.value).startswith("bind " if way == "constructor" else "'sqlalchemy.url' ")
    assert ("shop.ini" in str(caught.value)) is (way == "ini")
    assert SECRET not in printed(caught.value)
    assert password not in printed(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://shop:hunter2-s3cret@localhost/shop",
        "postgresql+psycopg://localhost/shop?password=hunter2-s3cret",
        "postgresql+psycopg://localhost/shop?sslpassword=hunter2-s3cret",
        "mysql+pymysql://shop@localhost/shop?passwd=hunter2-s3cret",
    ],
)
def test_password_is_not_in_the_repr_when_the_url_is_right(url: str, configured) -> None:
    app = configured({"sqlalchemy.url": url})
    assert SECRET not in repr(app) + str(app)
    with pytest.raises(ConfigurationError, match="pool_sise") as caught:
        configured({"sqlalchemy.url": url, "sqlalchemy.pool_sise": "5"})
    assert SECRET not in printed(caught.value)


def test_keys_are_another_prefixs_when_one_is_given(tmp_path: Path) -> None:
    settings = {"db.url": "sqlite:///shop.db", "db.pool_size": "3", "here": str(tmp_path)}
    app = SQLASessionMiddleware.from_config(Response("unused"), settings, prefix="db.")
    assert app.engine.url == make_url(f"sqlite:///{tmp_path}/shop.db")
    assert app.engine.pool.size() == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "'db.url' is missing: "),
        ({"sqlalchemy.url": "sqlite://"}, "'sqlalchemy.url' is not a setting of this middleware"),
        ({"db.url": "nosuch://"}, "'db.url' names the database 'nosuch'"),
        ({"db.url": "sqlite://", "db.pool_sise": "5"}, "'db.pool_sise' is not an option of create_engine()"),
        ({"db.url": "sqlite://", "db.pool_size": "ten"}, "'db.pool_size' must be a whole number"),
    ],
)
def test_error_has_the_prefix_when_another_one_is_given(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SQLASessionMiddleware.from_config(Response("unused"), settings, prefix="db.")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("attribute", ["local_conf", None], ids=["local_conf", "the whole configuration"])
def test_section_is_what_from_config_takes_when_it_is_read_by_appconfig(
    attribute: str | None, configured, write_ini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = appconfig(
        write_ini("""
        [app:main]
        use = call:tests.paste_apps:guest_book
        sqlalchemy.url = sqlite:///shop.db
        sqlalchemy.pool_size = 3
        session.expire_on_commit = false
        """)
    )
    app = configured(getattr(config, attribute) if attribute else config)
    assert app.engine.pool.size() == 3
    # The place of the file is in the whole configuration only.
    assert app.engine.url == make_url(f"sqlite:///{Path.cwd() if attribute else tmp_path}/shop.db")
    with app.context():
        assert session().expire_on_commit is False


def test_filter_wraps_any_application_when_loaded_by_itself(write_ini) -> None:
    app = loadfilter(write_ini(DB), "db")(Response("fine"))
    assert isinstance(app, SQLASessionMiddleware)
    assert get(app, "/") == "fine"


WITHOUT_PASTE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "paste":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import sqlasession_middleware
import sqlasession_middleware.paste
settings = {"sqlalchemy.url": "sqlite://", "sqlalchemy.pool_size": "3"}
for app in (
    sqlasession_middleware.SQLASessionMiddleware.from_config(lambda environ, start_response: [], settings),
    sqlasession_middleware.paste.main(lambda environ, start_response: [], {"here": "/"}, **settings),
):
    with app.context() as session:
        print(session.connection().exec_driver_sql("SELECT 42").scalar())
    app.dispose()
try:
    import paste.deploy
except ImportError:
    print("no paste")
"""


def test_settings_are_read_when_pastedeploy_is_not_installed(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_PASTE],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.stdout.split("\n"), ran.stderr) == (["42", "42", "no paste", ""], "")


# -- transactions and 503

UNCOMMITTED = """
    [app:guests]
    use = call:tests.paste_apps:uncommitted_book
"""
BY_KEYS = f"""
    [pipeline:main]
    pipeline = db guests
    {UNCOMMITTED}
    {DB}
    transaction = true
    transaction.attempts = 2
    transaction.backoff_base = 0
    transaction.backoff_cap = 0.5
    transaction.commit_veto = tests.paste_apps:veto_guests
    transaction.retry_on = builtins:LookupError, builtins:KeyError
    unavailable.retry_after = 5
    streams = application/x-ndjson, text/csv
"""
BY_FILTERS = f"""
    [pipeline:main]
    pipeline = db unavailable transaction guests
    {UNCOMMITTED}
    {DB}
    streams = application/x-ndjson, text/csv

    [filter:unavailable]
    use = egg:sqlasession_middleware#unavailable
    retry_after = 5

    [filter:transaction]
    use = egg:sqlasession_middleware#transaction
    attempts = 2
    backoff_base = 0
    backoff_cap = 0.5
    commit_veto = tests.paste_apps:veto_guests
    retry_on = builtins:LookupError, builtins:KeyError
"""


@pytest.mark.parametrize("ini", [BY_KEYS, BY_FILTERS], ids=["keys", "filters"])
def test_transaction_and_503_are_configured_by_an_ini(load: Load, ini: str) -> None:
    app = load(ini)
    assert get(app, "/ada") == "ada"
    assert get(app, "/vetoed") == "ada vetoed"
    assert get(app, "/twice") == "ada twice"
    lost = Client(app, Response).get("/lost", buffered=True)
    assert (lost.status_code, lost.headers["Retry-After"]) == (503, "5")
    assert get(app, "/") == "ada twice"
    assert app.streams == {"application/x-ndjson", "text/csv"}


@pytest.mark.parametrize(
    ("keys", "committed"),
    [
        ("transaction = true", True),
        ("transaction = false", False),
        ("transaction.attempts = 1", True),
        ("transaction = no\ntransaction.attempts = 2", False),
        ("transaction = yes\ntransaction.commit_veto = none", True),
        ("", False),
    ],
)
def test_transaction_is_on_when_an_ini_says_so(load: Load, keys: str, committed: bool) -> None:
    app = load(f"[pipeline:main]\npipeline = db guests\n{UNCOMMITTED}\n{DB}\n{keys}")
    get(app, "/ada")
    assert get(app, "/") == ("ada" if committed else "")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("transaction", "perhaps", "must be true or false, got 'perhaps'."),
        ("transaction.attempts", "many", "must be a whole number, got 'many'."),
        ("transaction.attempts", "0", "must be a whole number from 1, got 0."),
        ("transaction.replay_body_max", "1 MiB", "must be a whole number of bytes, got '1 MiB'."),
        ("transaction.replay_body_memory", "-1", "must be a whole number of bytes from 0, got -1."),
        ("transaction.atempts", "3", "is not a setting of this middleware; did you mean 'transaction.attempts'?"),
        ("transaction.commit_veto", "no.such:veto", "must be none, or the dotted name of an importable object"),
        ("transaction.retry_on", "builtins:len", "must be exception classes or their dotted names"),
        ("unavailable.retry_after", "soon", "must be a whole number, got 'soon'."),
        ("unavailable.retry_after", "-1", "must be a whole number of seconds from 0, got -1."),
        ("unavailabel", "true", "is not a setting of this middleware; did you mean 'unavailable'?"),
        ("streams", "csv", "must hold content types such as 'text/csv', got 'csv'."),
    ],
)
def test_error_names_key_and_file_of_a_transaction_when_it_is_wrong(
    write_ini: Any, key: str, value: str, problem: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        loadapp(write_ini(f"[pipeline:main]\npipeline = db guests\n{UNCOMMITTED}\n{DB}\n{key} = {value}"))
    assert str(caught.value).startswith(f"{key!r} in ")
    assert "shop.ini" in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value", "problem"),
    [
        ("transaction", "atempts", "3", "is not a setting of this middleware; did you mean 'attempts'?"),
        ("transaction", "attempts", "0", "must be a whole number from 1, got 0."),
        ("transaction", "backoff_cap", "long", "must be a number of seconds, got 'long'."),
        ("unavailable", "retry_after", "soon", "must be a whole number, got 'soon'."),
    ],
)
def test_error_names_key_and_file_when_it_is_in_a_filter_of_its_own(
    write_ini: Any, name: str, key: str, value: str, problem: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"^'{key}' in .*shop.ini {re.escape(problem)}"):
        loadapp(
            write_ini(
                f"[pipeline:main]\npipeline = {name} guests\n{UNCOMMITTED}\n[filter:{name}]\n{EGG}#{name}\n"
                f"{key} = {value}"
            )
        )


ENGINE = create_engine("sqlite://")


def make_engine():
    return ENGINE


@pytest.mark.parametrize("name", ["ENGINE", "make_engine"])
def test_engine_comes_from_elsewhere(name):
    config = {"sqlalchemy.engine": f"{__name__}:{name}", "sqlalchemy.binds.audit.engine": f"{__name__}:{name}"}
    app = SQLASessionMiddleware.from_config(print, config)
    assert app.engines == {"default": ENGINE, "audit": ENGINE}


@pytest.mark.parametrize("keys", [("url", "engine"), ("engine", "url")])
@pytest.mark.parametrize("prefix", ["sqlalchemy.", "sqlalchemy.binds.audit."])
def test_engine_and_url_exclude_each_other(prefix, keys):
    values = {"url": "sqlite://", "engine": f"{__name__}:ENGINE"}
    config = {} if prefix == "sqlalchemy." else {"sqlalchemy.url": "sqlite://"}
    config.update({f"{prefix}{key}": values[key] for key in keys})
    with pytest.raises(ConfigurationError, match=f"'{prefix}{keys[1]}' and '{prefix}{keys[0]}' are both set"):
        SQLASessionMiddleware.from_config(print, config)
