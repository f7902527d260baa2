"""Health checks around tenants: what is asked, and when the site is ready, on real servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, application
from sqlasession_middleware.errors import ConfigurationError
from sqlasession_middleware.health import HealthMiddleware
from sqlasession_middleware.tenants import TenantsMiddleware

from .databases import DATABASES_SEEN
from .ports import free_port
from .test_health import SECRET
from .test_tenants import NAMES, call, select_1

pytestmark = pytest.mark.usefixtures("disposes")

JSON = {"Accept": "application/json"}


@pytest.fixture
def make() -> Iterator[Callable[..., TenantsMiddleware]]:
    with ExitStack() as stack:

        def make(bind: Any, app: Any = select_1, **options: Any) -> TenantsMiddleware:
            made = TenantsMiddleware(app, bind, **{"tenant": "header:X-Tenant", "known": NAMES, **options})
            stack.callback(made.dispose)
            return made

        yield make


def probe(app: Any, **health: Any) -> tuple[int, dict[str, Any]]:
    """The status, and the states by the names of the engines."""
    answer = Client(HealthMiddleware(app, timeout=10, **health)).get("/readyz", headers=JSON)
    assert answer.json is not None
    assert answer.json["ready"] is (answer.status_code == 200)
    return answer.status_code, {name: words["state"] for name, words in answer.json["engines"].items()}


def directory(folder: Path, names: tuple[str, ...] = NAMES) -> dict[str, str]:
    url = f"sqlite:///{folder}/directory.db"
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE tenant (name TEXT)"))
        for name in names:
            connection.execute(text("INSERT INTO tenant VALUES (:name)"), {"name": name})
    engine.dispose()
    return {"bind": url, "query": "SELECT name FROM tenant"}


def test_shared_pool_is_asked(make: Any, tmp_path: Path) -> None:
    url = DATABASES_SEEN.url("postgresql", "")
    known = directory(tmp_path)
    app = make(url, schema="t_{tenant}", known=known, binds={"audit": "sqlite://"}, name="shop")
    assert probe(app) == (200, {"tenants.known": "ok", "default": "ok", "audit": "ok"})
    assert Client(HealthMiddleware(app)).get("/readyz", headers=JSON).json["application"] == "shop"
    away = make(f"postgresql+psycopg://127.0.0.1:{free_port()}/x", set_local={"app.tenant": "{tenant}"})
    assert probe(away) == (503, {"default": "out of reach"})


def test_directory_is_needed_until_the_names_are_known(make: Any, tmp_path: Path) -> None:
    app = make(f"sqlite:///{tmp_path}/{{tenant}}.db", known=directory(tmp_path))
    assert probe(app) == (200, {"tenants.known": "ok"})
    (tmp_path / "directory.db").rename(tmp_path / "away.db")
    assert probe(app) == (503, {"tenants.known": "out of reach"})
    (tmp_path / "away.db").rename(tmp_path / "directory.db")
    assert call(app, HTTP_X_TENANT="acme")[0] == "200 OK"
    (tmp_path / "directory.db").unlink()
    # The process goes on with those that it knows, and a SQLite file has no server to ask.
    assert probe(app) == (200, {"tenants.known": "out of reach"})


def test_one_engine_of_each_server_is_asked(make: Any) -> None:
    url = make_url(DATABASES_SEEN.url("postgresql", ""))
    dead = f"postgresql+psycopg://shop:{SECRET}@127.0.0.1:{free_port()}/"
    binds = {"acme": url, "globex": url.set(database="not_there"), "initech": dead + "initech"}
    app = make(binds.get, unavailable=True)
    assert probe(app) == (200, {})
    assert call(app, HTTP_X_TENANT="acme")[0] == "200 OK"
    assert probe(app) == (200, {"servers[0]": "ok"})
    # It is used later, but its database is missing: that is no outage of the server.
    with pytest.raises(Exception, match="not_there"):
        call(app, HTTP_X_TENANT="globex")
    assert probe(app) == (200, {"servers[0]": "ok"})
    assert call(app, HTTP_X_TENANT="initech")[0] == "503 Service Unavailable"
    assert probe(app) == (200, {"servers[0]": "ok", "servers[1]": "out of reach"})


def test_site_is_not_ready_without_any_server(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    app = make(f"postgresql+psycopg://shop:{SECRET}@127.0.0.1:{free_port()}/{{tenant}}", unavailable=True, name="shop")
    for name in NAMES[:2]:
        assert call(app, HTTP_X_TENANT=name)[0] == "503 Service Unavailable"
    assert probe(app) == (503, {"servers[0]": "out of reach"})
    said = [each.getMessage() for each in caplog.records if each.name == "sqlasession_middleware.health"]
    assert len(said) == 1
    assert said[0].startswith("The health check finds the engine 'servers[0]' of 'shop' out of reach:")
    assert SECRET not in caplog.text


def test_which_one_is_asked(make: Any, tmp_path: Path) -> None:
    app = make(f"sqlite:///{tmp_path}/{{tenant}}.db", known=directory(tmp_path))
    around = SQLASessionMiddleware(app, "sqlite://")
    assert probe(around) == (200, {"default": "ok"})
    assert probe(around, application=app) == (200, {"tenants.known": "ok"})
    around.dispose()
    # A middleware inside is not the outermost one.
    inner = SQLASessionMiddleware(select_1, "sqlite://")
    assert probe(make(f"sqlite:///{tmp_path}/{{tenant}}.db", inner)) == (200, {})
    inner.dispose()
    # Inside, it asks the database of the request's tenant.
    inside = make(f"sqlite:///{tmp_path}/{{tenant}}.db", HealthMiddleware(select_1, application=application))
    assert call(inside, HTTP_X_TENANT="acme")[0] == "200 OK"
    status, body = call(inside, HTTP_X_TENANT="acme", PATH_INFO="/readyz")
    assert (status, body) == ("200 OK", b"ready\ndefault: ok\n")
    with pytest.raises(ConfigurationError, match="leads to 2 of them"):
        HealthMiddleware(_Both(app, around))


class _Both:
    def __init__(self, *apps: Any) -> None:
        self.apps = apps

    def __call__(self, *arguments: Any) -> Any:
        raise NotImplementedError
