"""WebOb's request, with the session."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import bottle
import falcon
import flask
import pytest
import webob
from django.core.handlers.wsgi import WSGIHandler, WSGIRequest
from django.http import Http404, HttpResponse
from django.urls import path
from pyramid.config import Configurator
from pyramid.request import Request as PyramidRequest
from pyramid.response import Response as PyramidResponse
from sqlalchemy import BigInteger, Enum, MetaData, SmallInteger, String, Uuid, null, select, text
from sqlalchemy.dialects.mysql import INTEGER
from sqlalchemy.exc import MultipleResultsFound
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from webob import Response
from webob.dec import wsgify
from webob.exc import HTTPNotFound
from webtest import TestApp as WebTestApp
from werkzeug.exceptions import NotFound
from werkzeug.wrappers import Request as WerkzeugRequest
from werkzeug.wrappers import Response as WerkzeugResponse

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.errors import ScopeError
from sqlasession_middleware.request import DatabaseRequest, Request

from .conftest import DATABASES, DATABASES_SEEN
from .framework_apps import FRAMEWORKS

metadata = MetaData()


class Base(DeclarativeBase):
    metadata = metadata


class Guest(Base):
    __tablename__ = "request_guest"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))


class Wide(Base):
    __tablename__ = "request_wide"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    part: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)


class Named(Base):
    __tablename__ = "request_named"
    id: Mapped[UUID] = mapped_column(primary_key=True)


class TextNamed(Base):
    __tablename__ = "request_text_named"
    id: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True)


class Large(Base):
    """Each database has its own number, and none the declared one."""

    __tablename__ = "request_large"
    id: Mapped[int] = mapped_column(
        SmallInteger()
        .with_variant(INTEGER(unsigned=True), "mysql", "mariadb")
        .with_variant(BigInteger(), "postgresql"),
        primary_key=True, autoincrement=False,
    )  # fmt: skip


class Color(enum.Enum):
    red = 1
    blue = 2


class Painted(Base):
    __tablename__ = "request_painted"
    color: Mapped[Color] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(Enum("matt", "shiny", name="request_kind"), primary_key=True)


class Coded(Base):
    __tablename__ = "request_coded"
    id: Mapped[str] = mapped_column(String(20), primary_key=True)


KNOWN, UNKNOWN = UUID("7ea2b0a5-6f3c-4c0e-9d5b-1f2e8c6ad041"), UUID("c41f9e7d-30b8-4a52-8f16-9b7d5e02a6c3")


@pytest.fixture(scope="module", params=DATABASES)
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SQLASessionMiddleware]:
    """One for all tests on a database: none of them commits."""

    @wsgify(RequestClass=Request)
    def serve(request: Request) -> Response:
        assert request.dbsession is session()
        assert request.application is app
        return Response(f"{request.attempt} {request.get_or_404(Guest, request.GET.get('id')).name}")

    url = DATABASES_SEEN.url(request.param, f"sqlite:///{tmp_path_factory.mktemp('request')}/test.db")
    app = SQLASessionMiddleware(serve, url, metadata=metadata, transaction=True)
    app.drop_database()
    app.init_database()
    with app.context():
        # fmt: off
        session.add_all([Guest(id=1, name="Ada"), Wide(id=2**40, part=7), Named(id=KNOWN), Coded(id="x"),
                         TextNamed(id=str(KNOWN)), Large(id=3 * 10**9), Painted(color=Color.red, kind="matt")])
        # fmt: on
        session.commit()
    yield app
    app.drop_database()
    app.dispose()


@pytest.mark.parametrize(("query", "status", "body"), [
    ("id=1", 200, "1 Ada"), ("id=2", 404, "There is no guest with that key."), ("", 404, "There is no guest"),
    ("id=x", 404, "There is no guest"), ("id=99999999999999999999", 404, "There is no guest"),
])  # fmt: skip
def test_request(app, query, status, body):
    response = Request.blank(f"/?{query}").get_response(app)
    assert response.status_int == status
    assert body in response.text


#: Keys of rows that are there, and keys that are none, of which some databases would fail the transaction.
FOUND = [(Guest, 1), (Guest, "1"), (Guest, (1,)), (Wide, (2**40, 7)), (Wide, [str(2**40), "7"]), (Named, KNOWN),
         (Named, str(KNOWN)), (Coded, "x"), (Guest, {"id": "1"}), (Wide, {"part": 7, "id": 2**40}),
         (TextNamed, str(KNOWN)), (TextNamed, KNOWN.hex), (TextNamed, KNOWN), (Large, 3 * 10**9),
         (Painted, (Color.red, "matt")), (Painted, ("red", "matt"))]  # fmt: skip
LOST = [(Guest, None), (Guest, ""), (Guest, "1.5"), (Guest, "one"), (Guest, 2**31), (Guest, -(2**63) - 1),
        (Wide, (2**64, 7)), (Wide, (1, 2**15)), (Wide, (1,)), (Wide, (2**40, None)), (Named, "x"), (Named, UNKNOWN),
        (Coded, "y"), (Coded, None),
        # What comes as JSON may be anything.
        (Guest, 1.5), (Guest, float("inf")), (Guest, [[1]]), (Guest, {}), (Guest, {"id": {}}), (Guest, {"name": "Ada"}),
        (Coded, 0), (Coded, True), (Coded, {"id": []}), (Coded, "\0"), (Coded, "\ud800"),
        (Named, 5), (Named, 1.5), (Named, b"x" * 16), (TextNamed, "x"), (TextNamed, 5),
        (Painted, ("green", "matt")), (Painted, ("red", "none")), (Painted, (1, "matt"))]  # fmt: skip


@pytest.mark.parametrize(("entity", "ident"), FOUND)
def test_get_or_404_finds(app, entity, ident):
    with app.context():
        assert isinstance(Request.blank("/").get_or_404(entity, ident), entity)


@pytest.mark.parametrize(("entity", "ident"), LOST)
def test_get_or_404_does_not_find(app, entity, ident):
    with app.context():
        with pytest.raises(HTTPNotFound):
            Request.blank("/").get_or_404(entity, ident)
        assert session.scalar(text("SELECT 1")) == 1  # The transaction has not failed.


def test_one_or_404(app):
    request = Request.blank("/")
    with app.context():
        assert request.one_or_404(select(Guest).where(Guest.name == "Ada")).id == 1
        with pytest.raises(HTTPNotFound):
            request.one_or_404(select(Guest).where(Guest.name == "Grace"))
        assert request.one_or_404(select(null()).where(Guest.id == 1).select_from(Guest)) is None  # It is there.
        session.add(Guest(id=2, name="Ada"))
        with pytest.raises(MultipleResultsFound):
            request.one_or_404(select(Guest).where(Guest.name == "Ada"))


def test_outside_of_a_scope():
    request = Request.blank("/")
    with pytest.raises(ScopeError):
        _ = request.dbsession
    with pytest.raises(RuntimeError, match="No application is bound"):
        _ = request.application
    assert request.attempt == 1


def test_key_of_another_bind(tmp_path):
    """It is read as that bind's database has it, and the question moves nobody to the primary."""
    stored = MetaData(info={"bind_key": "far"})

    class Far(DeclarativeBase):
        metadata = stored

    class Star(Far):
        __tablename__ = "star"
        id: Mapped[int] = mapped_column(primary_key=True)

    app = SQLASessionMiddleware(
        lambda environ, start: [], "postgresql+psycopg://nowhere/shop", metadata=stored,
        binds={"far": f"sqlite:///{tmp_path}/far.db"}, replicas=["postgresql+psycopg://nowhere/shop"],
    )  # fmt: skip
    app.init_database()
    with app.context():
        session.add(Star(id=2**40))
        session.commit()
        assert Request.blank("/").get_or_404(Star, str(2**40)).id == 2**40
    app.dispose()


def test_mixin_with_another_request(app):
    class Mine(DatabaseRequest):
        def __init__(self, environ: dict[str, object]) -> None:
            self.environ = environ

    with app.context():
        assert Mine({"sqlasession.attempt": 3}).attempt == 3
        assert Mine({}).dbsession is session()


# -- frameworks

PAGE = "The application's own page of what is not there"


def find(request: Any) -> Any:
    """What the views do. The query says what with."""
    if "one" in request.environ["QUERY_STRING"]:
        return request.one_or_404(select(Guest).where(Guest.name == "Grace"))
    return request.get_or_404(Guest, "x")


def of_pyramid() -> Any:
    class Mine(DatabaseRequest, PyramidRequest):
        pass

    config = Configurator()
    config.set_request_factory(Mine)
    config.add_route("any", "/")
    config.add_view(find, route_name="any")
    config.add_notfound_view(lambda request: PyramidResponse(PAGE, status=404))
    return config.make_wsgi_app()


def of_flask() -> Any:
    class Mine(DatabaseRequest, flask.Request):
        pass

    app = flask.Flask("guests")
    app.request_class = Mine
    app.add_url_rule("/", view_func=lambda: find(flask.request))
    app.register_error_handler(404, lambda error: (PAGE, 404))
    return app


def of_werkzeug() -> Any:
    class Mine(DatabaseRequest, WerkzeugRequest):
        pass

    def serve(environ: Any, start_response: Any) -> Any:
        try:
            return find(Mine(environ))
        except NotFound:
            return WerkzeugResponse(PAGE, 404)(environ, start_response)

    return serve


def of_django() -> Any:
    FRAMEWORKS["django"](False)  # It configures Django.

    def view(request: Any) -> Any:
        try:
            return find(request)
        except Http404:
            return HttpResponse(PAGE, status=404)

    class Mine(DatabaseRequest, WSGIRequest):
        urlconf = (path("", view),)

    handler = WSGIHandler()
    handler.request_class = Mine
    return handler


def of_bottle() -> Any:
    class BottleNotFound(bottle.HTTPError):
        def __init__(self, text: str) -> None:
            super().__init__(404, text)

    class Mine(DatabaseRequest, bottle.BaseRequest):
        not_found_exception = BottleNotFound

    app = bottle.Bottle()
    app.get("/", callback=lambda: find(Mine(bottle.request.environ)))
    app.error(404)(lambda error: PAGE)
    return app


def of_falcon() -> Any:
    class FalconNotFound(falcon.HTTPNotFound):
        def __init__(self, text: str) -> None:
            super().__init__(description=text)

    class Mine(DatabaseRequest, falcon.Request):
        not_found_exception = FalconNotFound

        @property
        def environ(self) -> Any:
            return self.env

    class Resource:
        def on_get(self, request: Any, response: Any) -> None:
            find(request)

    def not_found(request: Any, response: Any, error: Exception, parameters: Any) -> None:
        response.status = falcon.HTTP_404
        response.text = PAGE

    app = falcon.App(request_type=Mine)
    app.add_route("/", Resource())
    app.add_error_handler(falcon.HTTPNotFound, not_found)
    return app


def of_webob() -> Any:
    @wsgify(RequestClass=Request)
    def serve(request: Request) -> Response:
        try:
            return find(request)
        except HTTPNotFound:
            return Response(PAGE, status=404)

    return serve


OWN_PAGES: dict[str, Callable[[], Any]] = {
    "pyramid": of_pyramid, "flask": of_flask, "werkzeug": of_werkzeug, "django": of_django, "bottle": of_bottle,
    "falcon": of_falcon, "webob": of_webob,
}  # fmt: skip


@pytest.mark.parametrize("query", ["get", "one"])
@pytest.mark.parametrize("framework", OWN_PAGES)
def test_framework_renders_its_own_404_when_nothing_is_found(framework: str, query: str, tmp_path) -> None:
    app = SQLASessionMiddleware(
        OWN_PAGES[framework](), f"sqlite:///{tmp_path}/test.db", metadata=metadata, transaction=True
    )
    app.init_database()
    response = WebTestApp(app).get(f"/?{query}", expect_errors=True)
    assert (response.status_int, response.text) == (404, PAGE)
    assert app.engine.pool.checkedout() == 0
    app.dispose()


def test_exception_is_the_classs_own_when_it_or_a_base_has_set_one() -> None:
    class MineError(Exception):
        pass

    class Mine(DatabaseRequest):
        not_found_exception = MineError

    class Both(Mine, PyramidRequest):
        pass

    assert Both.not_found_exception is MineError
    assert DatabaseRequest.not_found_exception is HTTPNotFound
    assert Request.not_found_exception is webob.exc.HTTPNotFound
