"""What an application is called: its ``name`` in the log, in errors, in health checks, in metrics and in comments."""

from __future__ import annotations

import logging
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from paste.deploy import loadapp
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationExecutionError
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, metrics, repeat, session
from sqlasession_middleware._settings.section import section_name
from sqlasession_middleware.errors import ConfigurationError
from sqlasession_middleware.flask_sqlalchemy import SQLAlchemy
from sqlasession_middleware.health import HealthMiddleware
from sqlasession_middleware.paste import collected

from .ports import free_port
from .wsgi import Environ, StartResponse

EGG = "use = egg:sqlasession_middleware"
URL = "sqlalchemy.url = sqlite://"
APP = "[app:shop]\nuse = call:tests.paste_apps:guest_book\n"


def answer(environ: Environ, start_response: StartResponse) -> list[bytes]:
    session.execute(text("SELECT 1"))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done"]


class Shop:
    """An application whose repr() has its address."""

    def __call__(self, environ: Environ, start_response: StartResponse) -> list[bytes]:
        return answer(environ, start_response)


@pytest.fixture
def make() -> Iterator[Callable[..., SQLASessionMiddleware]]:
    made: list[SQLASessionMiddleware] = []

    def make(app: Any = answer, **options: Any) -> SQLASessionMiddleware:
        made.append(SQLASessionMiddleware(app, "sqlite://", **options))
        return made[-1]

    yield make
    for each in made:
        each.dispose()


def test_repr_has_the_name_and_never_an_address(make: Any) -> None:
    assert repr(make(name="red")) == "<SQLASessionMiddleware 'red' on sqlite://>"
    assert repr(make(Shop())) == "<SQLASessionMiddleware of <tests.test_names.Shop object> on sqlite://>"
    assert make().name is None


@pytest.mark.parametrize("name", ["", " ", "a\nb", 5, "sqlite://a:secret@b"])
def test_name_is_refused_when_a_log_cannot_show_it(make: Any, name: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^name must be a printable text, or none, got ") as caught:
        make(name=name)
    assert "secret" not in str(caught.value)


# -- where it comes from

RED = f"[filter-app:red]\nnext = shop\n{EGG}\nsqlalchemy.url = sqlite:///%(here)s/red.db\n"
VARIABLES = f"""[filter:db]
{EGG}
set one = 1
get streams = %(kind)s_types
sqlalchemy.url = %(kind)s:///%(here)s/%%20.db
"""
#: The sections of an ini, and the names of the applications that are made of it, in any order.
SECTIONS = {
    "filter": (f"[pipeline:main]\npipeline = db shop\n[filter:db]\n{EGG}\n{URL}", ["db"]),
    "its own key": (f"[pipeline:main]\npipeline = db shop\n[filter:db]\n{EGG}\n{URL}\nname = red", ["red"]),
    "filter-app": (f"[filter-app:main]\nnext = shop\n{EGG}\n{URL}", ["main"]),
    "explicit factory": (
        f"[filter-app:main]\nnext = shop\npaste.filter_app_factory = sqlasession_middleware.paste:main\n{URL}",
        ["main"],
    ),
    "several": (
        "[composite:main]\nuse = egg:Paste#urlmap\n/red = red\n/blue = blue\n" + RED + RED.replace("red", "blue"),
        ["blue", "red"],
    ),
    "over another one": (
        f"[pipeline:main]\npipeline = red shop\n[filter:db]\n{EGG}\n{URL}\n[filter:red]\nuse = db\nstreams = text/csv",
        ["red"],
    ),
    "under another one": (
        f"[pipeline:main]\npipeline = db shop\n[filter:db]\n{EGG}\n{URL}\n[filter:red]\nuse = db\nstreams = text/csv",
        ["db"],
    ),
    "variables": (
        f"[DEFAULT]\nkind = sqlite\n[pipeline:main]\npipeline = db shop\n{VARIABLES}",
        ["db"],
    ),
    "the same twice": (
        f"[pipeline:main]\npipeline = db shop\n[filter:db]\n{EGG}\n{URL}\n[filter:again]\n{EGG}\n{URL}",
        [None],
    ),
    "a broken one beside it": (
        f"[pipeline:main]\npipeline = db shop\n[filter:db]\n{EGG}\n{URL}\n[filter:broken]\n{EGG}\nx = %(no)s",
        [None],
    ),
    "an endless one beside it": (
        f"[pipeline:main]\npipeline = db shop\n[filter:db]\n{EGG}\n{URL}\n[filter:endless]\nuse = endless",
        [None],
    ),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_name_is_that_of_the_section(case: str, tmp_path: Path) -> None:
    sections, names = SECTIONS[case]
    ini = tmp_path / "shop.ini"
    ini.write_text(f"{sections}\n\n{APP}")
    with collected() as applications:
        loadapp(f"config:{ini}", global_conf={"sqlite_types": "text/csv", "percent": "%%"})
    assert sorted(str(each.name) for each in applications) == [str(name) for name in names]
    for each in applications:
        each.dispose()


def test_there_is_no_name_when_there_is_no_file() -> None:
    assert section_name({}, {"sqlalchemy.url": "sqlite://"}) is None


def test_name_is_that_of_the_flask_application() -> None:
    for given, configured, expected in ((None, None, "shop"), ("red", None, "red"), ("red", "blue", "blue")):
        app = Flask("shop")
        app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
        if configured is not None:
            app.config["SQLASESSION_NAME"] = configured
        db = SQLAlchemy(app, name=given)
        with app.app_context():
            assert db.middleware.name == expected
            assert repr(db.middleware) == f"<FlaskMiddleware {expected!r} on sqlite://>"
            db.middleware.dispose()


def test_name_is_that_of_the_package_with_pyramid() -> None:
    # "name" is a setting of the application's own.
    own: dict[str, Any] = {"sqlalchemy.url": "sqlite://", "name": 5}
    for package, settings, expected in (
        ("tests", own, "tests"),
        ("__main__", own, None),
        ("tests", {**own, "sqlasession_middleware.name": "red"}, "red"),
    ):
        with Configurator(settings=settings, package=sys.modules[package]) as config:
            config.include("sqlasession_middleware.pyramid")
        database = config.registry["sqlasession_middleware"]
        assert database.name == expected
        database.dispose()
    config = Configurator(settings={**own, "sqlasession_middleware.name": ""})
    config.include("sqlasession_middleware.pyramid")
    with pytest.raises(ConfigurationExecutionError, match=r"'sqlasession_middleware\.name' must be a printable text"):
        config.commit()


# -- where it goes


def refuse(*arguments: Any) -> Any:
    raise OperationalError("SELECT 1", {}, ConnectionRefusedError("no server"))


def test_log_names_the_application_of_a_request(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("on purpose")

    app = make(name="red", slow_requests={"seconds": 0, "queries": 1000}, transaction=True, background={"threads": 1})
    with caplog.at_level(logging.WARNING):
        Client(app).get("/cart", buffered=True)
        app.background(fail)
        app.dispose()
    slow, failed = caplog.messages
    assert slow.startswith("Slow: GET '/cart' of 'red': 200 OK after ")
    assert failed.startswith("A call in the background failed: ")
    assert failed.endswith(".fail of 'red'")


def test_log_names_the_application_of_a_repeated_request(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        if environ["sqlasession.attempt"] == 1:
            repeat(ValueError("once more"))
        return answer(environ, start_response)

    failures = [OperationalError("SELECT 1", {}, sqlite3.OperationalError("database is locked"))]

    def work() -> None:
        if failures:
            error: Any = failures.pop()
            error.orig.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise error

    made = make(app, name="100 %d", transaction={"attempts": 2, "backoff_base": 0})
    with caplog.at_level(logging.WARNING):
        Client(made).get("/cart", buffered=True)
        made.run(work)
    repeated, again = caplog.messages
    assert repeated.startswith("Attempt 1 of 2 at GET '/cart' of '100 %d' failed and will be repeated in ")
    assert ".work of '100 %d' failed and will be repeated in " in again


def test_log_names_the_application_whose_database_is_away(caplog: pytest.LogCaptureFixture) -> None:
    url = f"postgresql+psycopg://127.0.0.1:{free_port()}/shop"
    app = SQLASessionMiddleware(answer, url, name="red", unavailable={"breaker_failures": 0})
    with caplog.at_level(logging.WARNING):
        assert Client(app).get("/cart", buffered=True).status_code == 503
    assert caplog.messages[0].startswith("The database is out of reach: GET '/cart' of 'red' is answered with 503: ")
    app.dispose()


def test_health_check_names_the_application(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    for options, expected in (({"name": "red"}, {"application": "red"}), ({}, {})):
        app = make(**options)
        client = Client(HealthMiddleware(app))
        said = client.get("/readyz", headers={"Accept": "application/json"}).json
        assert said == {"ready": True, **expected, "engines": {"default": {"state": "ok"}}}
        with caplog.at_level(logging.WARNING):
            event.listen(app.engine, "do_connect", refuse)
            app.engine.dispose()
            assert client.get("/readyz").status_code == 503
    named, unnamed = caplog.messages
    assert named.startswith("The health check finds the engine 'default' of 'red' out of reach: ")
    assert unnamed.startswith("The health check finds the engine 'default' out of reach: ")


def test_metrics_tell_applications_of_one_provider_apart(make: Any) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    for name in ("red", "blue", None):
        app = make(name=name)
        metrics.observe(app, provider)
        Client(app).get("/", buffered=True)
    read: Any = reader.get_metrics_data()
    points = {
        metric.name: [dict(point.attributes) for point in metric.data.data_points]
        for metric in read.resource_metrics[0].scope_metrics[0].metrics
    }
    pools = [each["db.client.connection.pool.name"] for each in points["db.client.connection.max"]]
    assert sorted(pools) == ["blue.default", "default", "red.default"]
    told = [each.get("application") for each in points["sqlasession.request.attempts"]]
    assert sorted(map(str, told)) == ["None", "blue", "red"]
    provider.shutdown()


def test_comments_tell_the_name_unless_they_have_one_of_their_own(make: Any) -> None:
    for options, expected in (
        ({"name": "red", "sql_comments": {}}, "SELECT 1 /*application='red',method='GET'*/"),
        ({"name": "red", "sql_comments": {"application": "blue"}}, "SELECT 1 /*application='blue',method='GET'*/"),
        ({"sql_comments": {}}, "SELECT 1 /*method='GET'*/"),
        ({"name": "red"}, "SELECT 1"),
    ):
        app = make(**options)
        sent: list[str] = []
        event.listen(app.engine, "before_cursor_execute", lambda *arguments, sent=sent: sent.append(arguments[2]))
        Client(app).get("/", buffered=True)
        assert sent == [expected]
    with pytest.raises(ConfigurationError, match=r"^sql_comments must be a dict of options"):
        make(name="red", sql_comments=5)
