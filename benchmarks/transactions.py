"""Measure the cost of a transaction around one INSERT: by hand, with the middleware, and with other libraries.

Run ``python benchmarks/transactions.py`` on an otherwise idle machine, after ``pip install -r
benchmarks/requirements.txt``. A library that is missing or does not work is reported and left out.

Every contender stores one small row through the ORM and commits it. The contenders take turns in one process. Each
figure is the median over the rounds; differences and ratios are computed within a round, relative to a session by hand
in the same framework (``with Session(engine) as own, own.begin():``). Frameworks are not compared with each other. The
database is SQLite in memory with one connection, emptied before each turn. So only Python is measured, in CPU time,
because nothing waits. Each contender has its own engine, because listeners of an engine slow down all of its users. The
other libraries run with their defaults, except for those that commit only if configured to. Before the measurement,
each contender must have stored its row, and must have stored none if the application raised.

Bars: in bare WSGI, the middleware costs at most 3 % more than the session by hand. In each framework, it adds less than
each other library does there.
"""

from __future__ import annotations

import argparse
import gc
import io
import logging
import platform
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from time import process_time_ns
from typing import Any

from per_request import Application, Base, Item, Table, difference, ratio
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool
from werkzeug.test import create_environ

from sqlasession_middleware import SQLASessionMiddleware, session

PACKAGES = (
    *("SQLAlchemy", "Werkzeug", "Pyramid", "Falcon", "Flask", "Bottle", "transaction", "zope.sqlalchemy"),
    *("repoze.tm2", "pyramid_tm", "falcon-sqla", "Flask-SQLAlchemy", "advanced-alchemy", "bottle-sqlalchemy"),
)
MOST_TIMES = 1.03
ENGINE_OPTIONS: dict[str, Any] = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
ENVIRON = create_environ("/", method="POST", errors_stream=io.StringIO())
HEADERS = [("Content-Type", "text/plain"), ("Content-Length", "4")]

#: Stores the row and commits it; receives the framework's request and the path.
Handler = Callable[[Any, str], None]
Factory = Callable[[], tuple[Application, Engine]]


class FailedOnPurposeError(Exception):
    pass


def work(current: Any, path: str) -> None:
    current.add(Item(name="one"))
    if path == "/fail":
        current.flush()
        raise FailedOnPurposeError


def write(data: bytes) -> None:
    pass


def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
    return write


def serve(app: Application, path: str = "/") -> None:
    """Run one request as a server does."""
    environ = ENVIRON.copy()
    environ["PATH_INFO"] = path
    result = app(environ, start_response)
    try:
        for _ in result:
            pass
    finally:
        close = getattr(result, "close", None)
        if close is not None:
            close()


# -- engines


def prepare(engine: Engine) -> Engine:
    @event.listens_for(engine, "connect")
    def do_not_wait_for_the_disk(connection: Any, record: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    Base.metadata.create_all(engine)
    return engine


def make_engine() -> Engine:
    return prepare(create_engine("sqlite://", **ENGINE_OPTIONS))


def count(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(text("SELECT count(*) FROM item")) or 0)


def empty(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM item"))


# -- the frameworks: an application that calls the handler


def bare(handle: Handler) -> Application:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        handle(environ, environ["PATH_INFO"])
        start_response("200 OK", HEADERS)
        return [b"done"]

    return app


def pyramid(handle: Handler, configure: Callable[[Any], None] | None = None) -> Application:
    from pyramid.config import Configurator
    from pyramid.response import Response

    def view(request: Any) -> Response:
        handle(request, request.path_info)
        return Response(b"done", content_type="text/plain")

    with Configurator() as config:
        if configure is not None:
            configure(config)
        config.add_route("any", "/*path")
        config.add_view(view, route_name="any")
    return config.make_wsgi_app()


def falcon(handle: Handler, **options: Any) -> Application:
    from falcon import App

    class Resource:
        def on_post(self, req: Any, resp: Any) -> None:
            handle(req, req.path)
            resp.data = b"done"

    app = App(**options)
    for path in ("/", "/fail"):
        app.add_route(path, Resource())
    return app


def flask(handle: Handler, configure: Callable[[Any], None] | None = None) -> Application:
    from flask import Flask, request

    app = Flask(__name__)
    if configure is not None:
        configure(app)

    @app.post("/")
    @app.post("/fail")
    def view() -> bytes:
        handle(None, request.path)
        return b"done"

    return app


def bottle(handle: Handler) -> Application:
    from bottle import Bottle, request

    app = Bottle()

    @app.post("/")
    @app.post("/fail")
    def view() -> bytes:
        handle(None, request.path)
        return b"done"

    return app


# -- by hand and with the middleware, in each framework


def by_hand(framework: Callable[[Handler], Application]) -> tuple[Application, Engine]:
    engine = make_engine()

    def handle(_: object, path: str) -> None:
        with Session(engine) as own, own.begin():
            work(own, path)

    return framework(handle), engine


def ours(framework: Callable[[Handler], Application], **options: Any) -> tuple[Application, Engine]:
    engine = make_engine()
    app = framework(lambda _, path: work(session, path))
    return SQLASessionMiddleware(app, engine, **({"transaction": True} | options)), engine


# -- the other libraries, set up as their documentation recommends


def repoze_tm2() -> tuple[Application, Engine]:
    from repoze.tm import TM
    from zope.sqlalchemy import register

    engine = make_engine()
    current = scoped_session(sessionmaker(engine))
    register(current)
    return TM(bare(lambda _, path: work(current, path))), engine


def pyramid_tm_scoped() -> tuple[Application, Engine]:
    """Pyramid's older and cheaper setup."""
    from zope.sqlalchemy import register

    engine = make_engine()
    current = scoped_session(sessionmaker(engine))
    register(current)
    return pyramid(lambda _, path: work(current, path), lambda config: config.include("pyramid_tm")), engine


def pyramid_tm_cookiecutter() -> tuple[Application, Engine]:
    """The setup of pyramid-cookiecutter-starter: a session on the request, and an explicit manager."""
    from zope.sqlalchemy import register

    engine = make_engine()
    factory = sessionmaker(engine)

    def open_session(request: Any) -> Session:
        opened = factory()
        register(opened, transaction_manager=request.tm)
        return opened

    def configure(config: Any) -> None:
        config.add_settings({"tm.manager_hook": "pyramid_tm.explicit_manager"})
        config.include("pyramid_tm")
        config.add_request_method(open_session, "dbsession", reify=True)

    return pyramid(lambda request, path: work(request.dbsession, path), configure), engine


def falcon_sqla() -> tuple[Application, Engine]:
    from falcon_sqla import Manager

    engine = make_engine()
    handle: Handler = lambda req, path: work(req.context.session, path)  # noqa: E731
    return falcon(handle, middleware=[Manager(engine).middleware]), engine


def flask_sqlalchemy() -> tuple[Application, Engine]:
    from flask_sqlalchemy import SQLAlchemy

    db = SQLAlchemy(metadata=Base.metadata, engine_options=dict(ENGINE_OPTIONS))

    def handle(_: object, path: str) -> None:
        work(db.session, path)
        db.session.commit()

    def configure(app: Any) -> None:
        app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
        db.init_app(app)

    app: Any = flask(handle, configure)
    with app.app_context():
        return app, prepare(db.engine)


def advanced_alchemy() -> tuple[Application, Engine]:
    from advanced_alchemy.extensions.flask import AdvancedAlchemy, SQLAlchemySyncConfig

    engine = make_engine()
    alchemy = AdvancedAlchemy(SQLAlchemySyncConfig(engine_instance=engine, commit_mode="autocommit"))
    return flask(lambda _, path: work(alchemy.get_sync_session(), path), alchemy.init_app), engine


def bottle_sqlalchemy() -> tuple[Application, Engine]:
    from bottle import Bottle, request
    from bottle_sqlalchemy import Plugin

    engine = make_engine()
    app = Bottle()
    app.install(Plugin(engine))

    @app.post("/")
    @app.post("/fail")
    def view(db: Session) -> bytes:
        work(db, request.path)
        return b"done"

    return app, engine


BASE = "by hand"
OURS = "ours"
FRAMEWORKS: dict[str, tuple[Callable[..., Application], dict[str, Factory]]] = {
    "WSGI": (
        bare,
        {
            "ours, attempts=3": lambda: ours(bare, transaction={"attempts": 3}),
            "ours, unavailable=True": lambda: ours(bare, unavailable=True),
            "repoze.tm2 + zope.sqlalchemy": repoze_tm2,
        },
    ),
    "Pyramid": (
        pyramid,
        {"pyramid_tm, scoped": pyramid_tm_scoped, "pyramid_tm, cookiecutter": pyramid_tm_cookiecutter},
    ),
    "Falcon": (falcon, {"falcon-sqla": falcon_sqla}),
    "Flask": (flask, {"Flask-SQLAlchemy": flask_sqlalchemy, "advanced-alchemy": advanced_alchemy}),
    "Bottle": (bottle, {"bottle-sqlalchemy": bottle_sqlalchemy}),
}

# -- checking, measuring


@dataclass
class Contender:
    app: Application
    engine: Engine


def check(contender: Contender) -> str | None:
    """Return what is wrong with a contender, if anything."""
    serve(contender.app)
    if (rows := count(contender.engine)) != 1:
        return f"stored {rows} rows instead of one"
    try:
        serve(contender.app, "/fail")
    except FailedOnPurposeError:
        pass  # Some frameworks respond with an error page; others leave that to the server.
    if (rows := count(contender.engine)) != 1:
        return f"stored {rows - 1} rows although the application had raised"
    serve(contender.app)
    return None if count(contender.engine) == 2 else "stored nothing after a request that failed"


def entries(name: str) -> dict[str, Factory]:
    """Return the contenders of a framework that are installed and work; report the others."""
    framework, more = FRAMEWORKS[name]
    found: dict[str, Factory] = {}
    for label, make in {BASE: lambda: by_hand(framework), OURS: lambda: ours(framework), **more}.items():
        try:
            wrong = check(Contender(*make()))
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
            if label.startswith(OURS) or (label == BASE and not isinstance(error, ImportError)):
                raise
        if wrong is None:
            found[label] = make
        elif label.startswith(OURS):
            raise SystemExit(f"{name}: {label} {wrong}")
        else:
            print(f"left out: {name}: {label}: {wrong}")
            if label == BASE:
                return {}
    return found


def measure(factories: dict[str, Factory], calls: int, rounds: int, builds: int) -> dict[str, list[float]]:
    """Return the microseconds per request of each contender, one figure per round; emptying tables is not timed.

    The addresses of a contender's objects, and the contender that used the caches before it, make a difference of more
    than a percent. So all contenders are built several times, and take turns in a different order in each round.
    """
    figures: dict[str, list[float]] = {name: [] for name in factories}
    names = list(factories)
    chance = random.Random(1)
    for _ in range(builds):
        chance.shuffle(names)
        contenders = {name: Contender(*factories[name]()) for name in names}
        for number in range(rounds // builds + 1):
            gc.collect()
            chance.shuffle(names)
            for name in names:
                app, engine = contenders[name].app, contenders[name].engine
                empty(engine)
                begin = process_time_ns()
                for _ in range(calls):
                    serve(app)
                elapsed = (process_time_ns() - begin) / calls / 1000
                if (rows := count(engine)) != calls:
                    raise SystemExit(f"{name}: stored {rows} rows in {calls} requests")
                if number:  # The first round is a warm-up.
                    figures[name].append(elapsed)
        for contender in contenders.values():
            contender.engine.dispose()
    return figures


def framework_rows(table: Table, name: str, figures: dict[str, list[float]]) -> None:
    table.row(f"{name}: session by hand", f"{statistics.median(figures[BASE]):.1f} us")
    more = {label: difference(figures, label, BASE) for label in figures}
    peers = [label for label in figures if label != BASE and not label.startswith(OURS)]
    for label in [*peers, *(label for label in figures if label.startswith(OURS))]:
        times = ratio(figures, label, BASE)
        bars = []
        if label == OURS:
            bars = [(f"{more[peer]:+.1f} us", more[label] < more[peer]) for peer in peers]
            if name == "WSGI":
                bars.append((f"x {MOST_TIMES}", times <= MOST_TIMES))
        for index, (bar, held) in enumerate(bars or [("", True)]):
            table.row(
                f"{name}: {label}" if index == 0 else "",
                f"{statistics.median(figures[label]):.1f} us" if index == 0 else "",
                f"{more[label]:+.1f} us, x {times:.3f}" if index == 0 else "",
                bar,
                held,
            )


def versions() -> Iterator[str]:
    yield f"Python {platform.python_version()}"
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"no {package}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--builds", type=int, default=20, help="how often the contenders are built anew")
    parser.add_argument("--calls", type=int, default=20, help="requests in a contender's turn")
    parser.add_argument("--framework", choices=FRAMEWORKS, action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    print(", ".join(versions()))
    print(f"{arguments.rounds} rounds of {arguments.calls} requests, {arguments.builds} builds\n")
    # Hide the tracebacks of applications that fail on purpose.
    logging.disable(logging.CRITICAL)
    chosen = {name: entries(name) for name in arguments.framework or FRAMEWORKS}
    table = Table()
    for name, factories in chosen.items():
        if factories:
            framework_rows(
                table,
                name,
                measure(factories, arguments.calls, arguments.rounds, min(arguments.builds, arguments.rounds)),
            )
    left_out = sum(len(FRAMEWORKS[name][1]) + 2 - len(factories) for name, factories in chosen.items())
    print(f"\n{table.missed} of the bars missed" if table.missed else "\nall bars held", end="")
    print(f"; {left_out} contenders left out, see above" if left_out else "")
    return min(table.missed, 1)


if __name__ == "__main__":
    sys.exit(main())
