"""Errors lead to the cause: each was met by somebody who looked in the wrong place for it."""

from __future__ import annotations

import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from paste.deploy import loadapp
from pyramid.config import Configurator
from sqlalchemy import NullPool, text
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, application, session
from sqlasession_middleware._pyramid.settings import read_options
from sqlasession_middleware.errors import ConfigurationError, ScopeError
from sqlasession_middleware.flask_sqlalchemy import SQLAlchemy

from .test_cli import command
from .wsgi import Environ, StartResponse, select_one

ELSEWHERE = (
    "No SQLASessionMiddleware is around the code that uses 'session' in the request GET '/cart', or its scope is over: "
)


def answer(environ: Environ, start_response: StartResponse) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"%d" % select_one()]


# -- a scope that is missing


def asking_filter(app: Any, global_conf: Any) -> Any:
    """A ``paste.filter_app_factory`` of a middleware that uses the session before and after the application."""

    def ask(environ: Environ, start_response: StartResponse) -> Any:
        if environ["QUERY_STRING"] == "before":
            select_one()
        body = app(environ, start_response)
        try:
            select_one()
        except ScopeError:
            body.close()
            raise
        return body

    return ask


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("pipeline", ["asking db guests", "db asking guests"])
def test_error_says_so_when_the_middleware_stands_elsewhere_in_the_pipeline(
    pipeline: str, when: str, tmp_path: Path
) -> None:
    ini = tmp_path / "shop.ini"
    ini.write_text(
        f"[pipeline:main]\npipeline = {pipeline}\n"
        f"[filter:asking]\npaste.filter_app_factory = {__name__}:asking_filter\n"
        "[filter:db]\nuse = egg:sqlasession_middleware\nsqlalchemy.url = sqlite://\n"
        f"[app:guests]\npaste.app_factory = {__name__}:make_answer\n"
    )
    client = Client(loadapp(f"config:{ini}"))
    if pipeline.startswith("db"):
        assert client.get("/cart", query_string=when, buffered=True).text == "1"
    else:
        with pytest.raises(ScopeError) as caught:
            client.get("/cart", query_string=when)
        assert str(caught.value) == (
            f"{ELSEWHERE}wrap what uses it. In a pipeline, the middleware comes before it: 'pipeline = db shop'."
        )


def make_answer(global_conf: Any) -> Any:
    return answer


def test_error_says_so_when_a_body_is_read_where_no_middleware_is_around_it() -> None:
    def stream(environ: Environ, start_response: StartResponse) -> Any:
        start_response("200 OK", [])
        yield b"%d" % select_one()

    with pytest.raises(ScopeError) as caught:
        Client(stream).get("/cart", buffered=True)
    assert str(caught.value).startswith(ELSEWHERE)


@pytest.mark.parametrize("found", [{"REQUEST_METHOD": "GET"}, ["REQUEST_METHOD", "wsgi.input", "wsgi.url_scheme"]])
def test_error_speaks_of_no_request_when_what_is_on_the_stack_is_none(found: object) -> None:
    with pytest.raises(ScopeError, match=r"^No application is bound here, so 'session' has no scope: run inside"):
        session.execute(text("SELECT 1"))


# -- help(application)


def test_help_and_inspection_work_where_no_application_is_bound() -> None:
    assert "owns the current scope" in pydoc.render_doc(application)
    assert not hasattr(application, "__name__")
    for ask in (lambda: application.engine, lambda: hasattr(application, "engine")):
        with pytest.raises(RuntimeError, match=r"^No application is bound here: "):
            ask()


def test_help_works_where_one_is_bound() -> None:
    app = SQLASessionMiddleware(answer, "sqlite://")
    with app.context():
        assert "owns the current scope" in pydoc.render_doc(application)
        assert application.engine is app.engine
    app.dispose()


# -- settings

#: What was given to from_config(), and the key that was meant.
MEANT: dict[str, tuple[dict[str, str], str, str]] = {
    "a misspelt URL": ({"sqlalchemy.ulr": "sqlite://"}, "sqlalchemy.ulr", "sqlalchemy.url"),
    "in capitals": ({"sqlalchemy.URL": "sqlite://"}, "sqlalchemy.URL", "sqlalchemy.url"),
    "an engine": ({"sqlalchemy.enigne": "shop:engine"}, "sqlalchemy.enigne", "sqlalchemy.engine"),
    "no prefix": ({"url": "sqlite://"}, "url", "sqlalchemy.url"),
    "no prefix of an option": ({"pool_size": "5"}, "pool_size", "sqlalchemy.pool_size"),
    "no prefix of the session's": ({"expire_on_commit": "false"}, "expire_on_commit", "session.expire_on_commit"),
    "no prefix of another": ({"attempts": "3"}, "attempts", "transaction.attempts"),
    "Flask-SQLAlchemy's": ({"SQLALCHEMY_DATABASE_URI": "sqlite://"}, "SQLALCHEMY_DATABASE_URI", "sqlalchemy.url"),
    "Alembic's in capitals": ({"SQLALCHEMY_URL": "sqlite://"}, "SQLALCHEMY_URL", "sqlalchemy.url"),
    "another prefix": ({"db.url": "sqlite://"}, "db.url", "sqlalchemy.url"),
    "a driver's": ({"dsn": "sqlite://"}, "dsn", "sqlalchemy.url"),
    "TurboGears's": ({"sqlalchemy.dburi": "sqlite://"}, "sqlalchemy.dburi", "sqlalchemy.url"),
    "one replica": (
        {"sqlalchemy.url": "sqlite://", "sqlalchemy.replica": "sqlite://"},
        "sqlalchemy.replica",
        "sqlalchemy.replicas",
    ),
    "one bind": (
        {"sqlalchemy.url": "sqlite://", "sqlalchemy.bind.audit.url": "sqlite://"},
        "sqlalchemy.bind.audit.url",
        "sqlalchemy.binds.audit.url",
    ),
    "one of us": ({"sqlachemy.url": "sqlite://"}, "sqlachemy.url", "sqlalchemy.url"),
}


@pytest.mark.parametrize("case", MEANT)
def test_error_names_what_was_written_and_proposes_what_was_meant(case: str) -> None:
    config, written, meant = MEANT[case]
    with pytest.raises(ConfigurationError) as caught:
        SQLASessionMiddleware.from_config(answer, config)
    assert str(caught.value) == f"{written!r} is not a setting of this middleware; did you mean {meant!r}?"


def test_error_proposes_nothing_when_nothing_is_similar() -> None:
    with pytest.raises(ConfigurationError) as caught:
        SQLASessionMiddleware.from_config(answer, {"sqlalchemy.echo": "true"})
    assert str(caught.value) == ("'sqlalchemy.url' is missing: set it to a database URL, 'sqlite:///%(here)s/shop.db'.")


#: Options that belong to a dict of options, and where.
PLACES = {
    "pool_size": "engine_options",
    "echo": "engine_options",
    "connect_args": "engine_options",
    "expire_on_commit": "session_options",
    "attempts": "transaction",
    "retry_after": "unavailable",
    "queries": "slow_requests",
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("make", [SQLASessionMiddleware, SQLASessionMiddleware.without_app])
def test_error_says_where_an_option_belongs(make: Callable[..., Any], name: str) -> None:
    arguments = [answer] if make is SQLASessionMiddleware else []
    with pytest.raises(ConfigurationError) as caught:
        make(*arguments, "sqlite://", **{name: 5})
    place = PLACES[name]
    assert str(caught.value) == f"{name} is one of {place!r}: pass {place}={{{name!r}: …}}."


def test_error_proposes_the_parameter_that_was_meant() -> None:
    make: Any = SQLASessionMiddleware
    with pytest.raises(
        ConfigurationError, match=r"^transactions is not an option of .*; did you mean 'transaction'\?$"
    ):
        make(answer, "sqlite://", transactions=True)
    with pytest.raises(ConfigurationError, match=r"^database is not an option of SQLASessionMiddleware\.$"):
        make(answer, "sqlite://", database="sqlite://")


# -- what others have reported of other libraries: each is rebuilt, and leads to its cause here


@pytest.mark.parametrize(
    "key",
    [
        *("SQLALCHEMY_DATABASE_URL", "SQLALCHEMY_DATBASE_URI", "SQLAlchemy_DATABASE_URI"),
        *("SQLALCHEMY_URL", "DATABASE_URL", "DATABASE_URI", "database_url"),
    ],
)
def test_misspelt_key_of_the_flask_configuration_is_named(key: str) -> None:
    """pallets-eco/flask-sqlalchemy#421, miguelgrinberg/microblog#50, techwithtim/Flask-Web-App-Tutorial#58, #106."""
    app = Flask("shop")
    app.config[key] = "sqlite://me:secret@localhost"
    with pytest.raises(ConfigurationError) as caught:
        SQLAlchemy(app)
    place = "in the Flask configuration is not a setting of Flask-SQLAlchemy"
    assert str(caught.value) == f"{key!r} {place}; did you mean 'SQLALCHEMY_DATABASE_URI'?"


def test_error_is_the_one_of_flask_sqlalchemy_when_no_key_is_similar() -> None:
    app = Flask("shop")
    app.config["SQLALCHEMY_ECHO"] = True
    with pytest.raises(RuntimeError, match=r"^Either 'SQLALCHEMY_DATABASE_URI' or 'SQLALCHEMY_BINDS' must be set\.$"):
        SQLAlchemy(app)
    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    db = SQLAlchemy(app)
    with pytest.raises(RuntimeError, match="has already been registered"):
        db.init_app(app)


@pytest.mark.parametrize(
    ("key", "end"),
    [
        ("sqlasession_middleware.nme", "; did you mean 'sqlasession_middleware.name'?"),
        ("sqlasession_middleware.transaction.attempts", "; did you mean 'transaction.attempts'?"),
        ("sqlasession_middleware.sqlalchemy.pool_size", "; did you mean 'sqlalchemy.pool_size'?"),
    ],
)
def test_setting_of_pyramid_is_not_ignored_when_it_begins_as_our_own(key: str, end: str) -> None:
    config = Configurator(settings={"sqlalchemy.url": "sqlite://", key: "3"})
    with pytest.raises(ConfigurationError) as caught:
        read_options(config.registry.settings)
    assert str(caught.value) == f"{key!r} is not a setting of this middleware{end}"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("sqlite://", "check_same_thread"),
        ("postgresql+psycopg://localhost/shop", "connect_timeout"),
        ("postgresql+psycopg://localhost/shop", "sslmode"),
        ("mysql+pymysql://localhost/shop", "charset"),
    ],
)
def test_argument_of_a_driver_is_no_misspelt_option_of_the_engine(url: str, name: str) -> None:
    """pudo/dataset#372."""
    said = f"is an argument of the driver: set it in 'connect_args', or as 'connect_args.{name}' in an ini."
    with pytest.raises(ConfigurationError) as caught:
        SQLASessionMiddleware(answer, url, engine_options={name: "1"})
    assert str(caught.value) == f"engine_options[{name!r}] {said}"
    with pytest.raises(ConfigurationError) as caught:
        SQLASessionMiddleware.from_config(answer, {"sqlalchemy.url": url, f"sqlalchemy.{name}": "1"})
    assert str(caught.value) == f"'sqlalchemy.{name}' {said}"


@pytest.mark.parametrize("url", ["sqlite:///shop.db", "postgresql+psycopg://localhost/shop"])
def test_error_names_the_option_that_does_not_go_with_the_pool(url: str) -> None:
    """jpsca/sqla-wrapper#23, modrzew/pokeminer#192."""
    options = {"poolclass": NullPool, "pool_size": 5, "max_overflow": 3}
    with pytest.raises(ConfigurationError) as caught:
        SQLASessionMiddleware(answer, url, engine_options=options)
    said = "does not go with the pool, a NullPool: leave it out, or choose another 'poolclass'."
    assert str(caught.value) == f"engine_options['pool_size'] {said}"


PIPELINE = (
    "[pipeline:main]\npipeline = db {}\n[filter:db]\nuse = egg:sqlasession_middleware\nsqlalchemy.url = sqlite://"
)


@pytest.mark.parametrize(
    ("named", "asked", "said"),
    [
        ("Shop", "#shop", "it has no section [app:shop]; did you mean 'Shop'?"),
        ("shop", "", "it has no section [app:shop]; did you mean 'Shop'?"),
        ("Shop", "#db", "it has no section [app:db]. There are: Shop, main."),
    ],
)
def test_command_names_the_sections_that_there_are(named: str, asked: str, said: str, tmp_path: Path) -> None:
    """Pylons/pyramid#107."""
    ini = tmp_path / "shop.ini"
    ini.write_text(f"{PIPELINE.format(named)}\n[app:Shop]\npaste.app_factory = {__name__}:make_answer\n")
    done = command("create", f"{ini}{asked}")
    assert (done.exit_code, done.stderr) == (2, f"error: {ini}{asked} cannot be loaded: {said}\n")


@pytest.mark.parametrize("port", ["80000", "65536", "-1", "http", "", "\N{SUPERSCRIPT TWO}"])
def test_command_serves_on_no_other_port_than_the_one_that_is_written(port: str, tmp_path: Path) -> None:
    ini = tmp_path / "shop.ini"
    shop = f"[app:shop]\npaste.app_factory = {__name__}:make_answer\n"
    ini.write_text(f"{PIPELINE.format('shop')}\n{shop}[server:main]\nport = {port}\n", "utf-8")
    done = command("serve", str(ini))
    said = f"error: port of [server:main] must be a whole number from 0 to 65535, got {port!r}.\n"
    assert (done.exit_code, done.stderr) == (2, said)


def test_command_passes_other_errors_of_an_ini_on(tmp_path: Path) -> None:
    ini = tmp_path / "shop.ini"
    ini.write_text("[app:main]\n")
    done = command("create", str(ini))
    assert done.stderr == f"error: {ini} cannot be loaded: LookupError: No loader given in section 'app:main'\n"
    ini.write_text("[filter:db]\n")
    assert command("create", str(ini)).stderr == f"error: {ini} cannot be loaded: it has no section [app:main].\n"


def test_error_says_so_when_there_is_only_a_context_of_flask() -> None:
    """chuckablack/quokka#21."""
    with Flask("shop").app_context(), pytest.raises(ScopeError) as caught:
        session.execute(text("SELECT 1"))
    assert str(caught.value) == (
        "Flask's application context is no scope of 'session':"
        " use 'with database.context():' of the SQLASessionMiddleware."
    )
