"""``config.include("sqlasession_middleware.pyramid")``: what a request stores, answers and repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import transaction
from pyramid import testing
from pyramid.config import Configurator
from pyramid.exceptions import BadCSRFToken, ConfigurationConflictError, ConfigurationExecutionError, URLDecodeError
from pyramid.exceptions import ConfigurationError as PyramidConfigurationError
from pyramid.request import Request
from pyramid.response import Response
from pyramid.scripting import prepare
from pyramid.tweens import EXCVIEW, MAIN
from sqlalchemy import Engine, NullPool, create_engine, insert, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from transaction.interfaces import NoTransaction, TransientError
from webtest import TestApp as Browser  # Pytest would take it for a class of tests.

from sqlasession_middleware import SQLASessionMiddleware, after_commit, doom, session
from sqlasession_middleware._database.observers import note_failure
from sqlasession_middleware._pyramid.settings import read_options
from sqlasession_middleware.errors import ConfigurationError
from sqlasession_middleware.failures import Failure
from sqlasession_middleware.pyramid import (
    BeforeRetry,
    IBeforeRetry,
    RetryableException,
    default_commit_veto,
    is_error_retryable,
    is_last_attempt,
    is_tm_active,
    mark_error_retryable,
)

from .databases import DATABASES_SEEN

INCLUDE = "sqlasession_middleware.pyramid"


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "pyramid_guest"
    name: Mapped[str] = mapped_column(primary_key=True)


class MarkedError(Exception):
    """One that is repeated."""


mark_error_retryable(MarkedError)


class Site:
    """A Pyramid application with one view.

    :param configure: called with the Configurator.
    """

    def __init__(
        self,
        engine: Engine,
        view: Callable[[Any], Any] = lambda request: Response("done"),
        configure: Callable[[Any], None] = lambda config: None,
        **settings: Any,
    ) -> None:
        self.engine = engine
        settings = {key.replace("__", "."): value for key, value in settings.items()}
        with Configurator(settings={"dbengine": engine, "transaction.backoff_base": "0", **settings}) as config:
            config.include(INCLUDE)
            config.add_route("any", "/*path")
            config.add_view(view, route_name="any")
            configure(config)
        self.app = config.make_wsgi_app()
        self.browser = Browser(self.app)

    def get(self, **environ: Any) -> Any:
        """The status, or the name of what it raises."""
        try:
            return self.browser.get("/", expect_errors=True, extra_environ=environ).status_int
        except Exception as error:
            return type(error).__name__

    def names(self) -> list[str]:
        with self.engine.connect() as connection:
            return list(connection.scalars(select(Guest.name).order_by(Guest.name)))


@pytest.fixture
def engine(tmp_path: Any) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path}/guests.db", connect_args={"timeout": 0})
    Base.metadata.create_all(engine)
    yield engine
    transaction.abort()
    engine.dispose()


@pytest.fixture
def site(engine: Engine) -> Callable[..., Site]:
    return lambda *arguments, **settings: Site(engine, *arguments, **settings)


def adds(name: str, answer: Callable[[Any], Any] = lambda request: Response("done")) -> Callable[[Any], Any]:
    """A view that adds a guest, without a flush."""

    def view(request: Any) -> Any:
        request.dbsession.add(Guest(name=name))
        return answer(request)

    return view


def raises(error: BaseException) -> Callable[[Any], Any]:
    def answer(request: Any) -> Any:
        raise error

    return answer


def exception_view(context: type[Exception], status: int = 409) -> Callable[[Any], None]:
    return lambda config: config.add_exception_view(lambda error, request: Response(status=status), context=context)


# -- what is stored


@pytest.mark.parametrize(
    ("view", "settings", "status", "stored"),
    [
        pytest.param(adds("Ada"), {}, 200, ["Ada"], id="a response"),
        pytest.param(adds("Ada", lambda request: Response(status=404)), {}, 404, ["Ada"], id="a 404, without a veto"),
        pytest.param(
            adds("Ada", lambda request: Response(status=404)),
            {"tm__commit_veto": "pyramid_tm.default_commit_veto"},
            404,
            [],
            id="a 404, with theirs",
        ),
        pytest.param(
            adds("Ada", lambda request: Response(status=404)),
            {"transaction__commit_veto": "sqlasession_middleware.transaction:default_commit_veto"},
            404,
            [],
            id="a 404, with ours",
        ),
        pytest.param(
            adds("Ada"), {"tm__commit_veto": lambda request, response: request.path == "/"}, 200, [], id="an own veto"
        ),
        pytest.param(adds("Ada", raises(ValueError())), {}, 409, [], id="an error, with an exception view"),
        pytest.param(
            adds("Ada", raises(ValueError())), {"tm__commit_veto": default_commit_veto}, 409, [], id="both of them"
        ),
        pytest.param(adds("Ada", raises(KeyError())), {}, "KeyError", [], id="an error, without an exception view"),
        pytest.param(adds("Ada", lambda request: request.tm.doom() or Response()), {}, 200, [], id="doomed"),
        pytest.param(adds("Ada", lambda request: doom() or Response()), {}, 200, [], id="doomed, as we say it"),
        pytest.param(
            adds("Ada", lambda request: Response(headers={"X-Tm": "abort"})),
            {"tm__commit_veto": default_commit_veto},
            200,
            [],
            id="a header",
        ),
        pytest.param(adds("Ada"), {"tm__activate_hook": lambda request: False}, 200, [], id="not activated"),
        pytest.param(
            adds("Ada", lambda request: request.dbsession.commit() or Response()),
            {"tm__activate_hook": lambda request: False},
            200,
            ["Ada"],
            id="not activated, and committed by hand",
        ),
        pytest.param(
            adds("Ada", lambda request: request.tm.begin() and (request.tm.commit() or Response())),
            {"tm__activate_hook": lambda request: False, "tm__manager_hook": "pyramid_tm.explicit_manager"},
            200,
            ["Ada"],
            id="not activated, and committed by the manager",
        ),
        pytest.param(
            adds("Ada", lambda request: request.tm.commit() or Response()),
            {"tm__activate_hook": lambda request: False},
            200,
            ["Ada"],
            id="not activated, and committed by a manager that begins by itself",
        ),
        pytest.param(adds("Ada"), {"transaction__activate": lambda environ: False}, 200, [], id="ours not activated"),
        pytest.param(adds("Ada"), {"transaction": "false"}, 200, [], id="no transaction"),
        pytest.param(
            adds("Ada", lambda request: request.dbsession.commit() or Response()),
            {},
            200,
            ["Ada"],
            id="committed by hand",
        ),
    ],
)
def test_stores_what_pyramid_tm_would_store(
    site: Callable[..., Site], view: Any, settings: dict[str, Any], status: Any, stored: list[str]
) -> None:
    made = site(view, exception_view(ValueError), **settings)
    assert made.get() == status
    assert made.names() == stored


@pytest.mark.parametrize("hook", [None, "pyramid_tm.explicit_manager"])
def test_commits_and_begins_in_a_view(site: Callable[..., Site], hook: str | None) -> None:
    def view(request: Any) -> Response:
        request.dbsession.add(Guest(name="Ada"))
        request.tm.commit()
        request.tm.begin()
        request.dbsession.add(Guest(name="Bea"))
        request.tm.abort()
        request.tm.begin()
        request.dbsession.add(Guest(name="Cid"))
        return Response("done")

    made = site(view, tm__manager_hook=hook)
    assert made.get() == 200
    assert made.names() == ["Ada", "Cid"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_view_may_end_an_explicit_transaction_without_beginning_another(
    site: Callable[..., Site], fails: bool
) -> None:
    """pyramid_tm raises NoTransaction at its end."""

    def view(request: Any) -> Response:
        request.dbsession.add(Guest(name="Ada"))
        request.tm.commit()
        if fails:
            raise KeyError
        return Response("done")

    made = site(view, tm__manager_hook="pyramid_tm.explicit_manager")
    assert made.get() == ("KeyError" if fails else 200)
    assert made.names() == ["Ada"]


def test_the_session_needs_a_transaction_of_an_explicit_manager(site: Callable[..., Site]) -> None:
    def view(request: Any) -> Response:
        request.tm.commit()
        request.dbsession.add(Guest(name="Ada"))
        return Response("done")

    assert site(view, tm__manager_hook="pyramid_tm.explicit_manager").get() == "NoTransaction"


def test_commits_the_global_session_with_the_manager(site: Callable[..., Site]) -> None:
    def view(request: Any) -> Response:
        session.add(Guest(name="Ada"))
        request.tm.commit()
        session.add(Guest(name="Bea"))
        request.tm.abort()
        return Response("done")

    made = site(view)
    assert made.get() == 200
    assert made.names() == ["Ada"]


def write_to_the_session(request: Any) -> None:
    request.dbsession.add(Guest(name="of the call"))
    request.dbsession.commit()


def write_by_the_manager(request: Any) -> None:
    with request.tm:
        request.dbsession.add(Guest(name="of the call"))


@pytest.mark.parametrize("write", [write_to_the_session, write_by_the_manager])
@pytest.mark.parametrize("hook", ["", "pyramid_tm.explicit_manager"])
@pytest.mark.parametrize("commits_itself", [False, True])
def test_a_call_after_the_commit_may_use_what_its_request_has(
    site: Callable[..., Site], write: Callable[[Any], None], hook: str, commits_itself: bool
) -> None:
    called: list[str] = []

    def view(request: Any) -> Response:
        def call() -> None:
            called.append("call")
            write(request)

        request.tm.get().addAfterCommitHook(lambda committed: called.append("hook"))
        request.dbsession.add(Guest(name="Ada"))
        after_commit(call)
        if commits_itself:
            request.tm.commit()
            request.tm.begin()
        return Response("done")

    made = site(view, tm__manager_hook=hook)
    assert made.get() == 200
    assert called == ["hook", "call"]
    assert made.names() == ["Ada", "of the call"]


def test_a_call_after_the_commit_of_a_script_may_use_its_session(site: Callable[..., Site]) -> None:
    called: list[Any] = []
    made = site(tm__manager_hook="pyramid_tm.explicit_manager")
    with made.app.registry["sqlasession_middleware"].context(), prepare(registry=made.app.registry) as env:
        request = env["request"]
        with request.tm:
            request.dbsession.add(Guest(name="Ada"))
            after_commit(lambda: called.extend(request.dbsession.scalars(select(Guest.name))))
    assert called == ["Ada"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_view_has_committed_is_followed_by_its_calls(site: Callable[..., Site], fails: bool) -> None:
    called: list[str] = []

    def view(request: Any) -> Response:
        request.dbsession.add(Guest(name="Ada"))
        after_commit(lambda: called.append("of the first"))
        request.tm.commit()
        request.tm.begin()
        request.dbsession.add(Guest(name="Bea"))
        after_commit(lambda: called.append("of the second"))
        if fails:
            raise ZeroDivisionError
        return Response("done")

    assert site(view).get() == ("ZeroDivisionError" if fails else 200)
    assert called == (["of the first"] if fails else ["of the first", "of the second"])


def test_savepoints_of_the_manager(site: Callable[..., Site]) -> None:
    def view(request: Any) -> Response:
        request.dbsession.add(Guest(name="Ada"))
        savepoint = request.tm.savepoint()
        request.dbsession.add(Guest(name="Bea"))
        request.dbsession.flush()
        savepoint.rollback()
        return Response("done")

    made = site(view)
    assert made.get() == 200
    assert made.names() == ["Ada"]


class Mailer:
    """A data manager, as pyramid_mailer has one."""

    transaction_manager = None

    def __init__(self) -> None:
        self.done: list[str] = []

    def sortKey(self) -> str:  # noqa: N802  # the interface's name
        return "mailer"

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        if name not in ("abort", "tpc_begin", "commit", "tpc_vote", "tpc_finish", "tpc_abort"):
            raise AttributeError(name)
        return lambda transaction: self.done.append(name)


@pytest.mark.parametrize("name", ["Bea", "Ada"])
def test_others_join_the_transaction(site: Callable[..., Site], engine: Engine, name: str) -> None:
    """What the database refuses keeps a mail from being sent."""
    mailer = Mailer()
    hooks: list[Any] = []

    def view(request: Any) -> Response:
        current = request.tm.get()
        current.join(mailer)
        current.addBeforeCommitHook(lambda: request.dbsession.add(Guest(name=name)))
        current.addAfterCommitHook(lambda *arguments: hooks.append(arguments), ("sent",))
        return Response("done")

    with engine.begin() as connection:
        connection.execute(insert(Guest.__table__).values(name="Ada"))
    made = site(view, exception_view(IntegrityError))
    assert made.get() == (200 if name == "Bea" else 409)
    assert ("tpc_finish" in mailer.done, "tpc_abort" in mailer.done) == (name == "Bea", name == "Ada")
    assert hooks == [(name == "Bea", "sent")]


# -- after the tween


def test_callbacks_find_what_is_committed_and_may_store_more(site: Callable[..., Site]) -> None:
    """With pyramid_tm, the session raises DetachedInstanceError or NoTransaction there."""
    seen: list[Any] = []

    def view(request: Any) -> Response:
        guest = Guest(name="Ada")
        request.dbsession.add(guest)
        request.add_response_callback(lambda request, response: seen.extend([guest.name, *made.names()]))
        request.add_finished_callback(lambda request: request.dbsession.add(Guest(name="Bea")))
        return Response("done")

    made = site(view, tm__manager_hook="pyramid_tm.explicit_manager")
    assert made.get() == 200
    assert seen == ["Ada", "Ada"]
    assert made.names() == ["Ada", "Bea"]


@pytest.mark.parametrize("raised", [ValueError(), None])
def test_callbacks_store_nothing_after_a_rollback(site: Callable[..., Site], raised: Exception | None) -> None:
    def view(request: Any) -> Response:
        request.add_finished_callback(lambda request: request.dbsession.add(Guest(name="Bea")))
        if raised is not None:
            raise raised
        request.tm.doom()
        return Response("done")

    made = site(view, exception_view(ValueError, 200))
    assert made.get() == 200
    assert made.names() == []


@pytest.mark.parametrize(("fails", "stored"), [(False, ["Ada", "Bea"]), (True, ["Ada"])])
def test_a_stream_is_a_transaction_of_its_own(site: Callable[..., Site], fails: bool, stored: list[str]) -> None:
    seen: list[Any] = []

    def stream(request: Any) -> Iterator[bytes]:
        seen.append(made.names())
        yield b"one"
        request.dbsession.add(Guest(name="Bea"))
        request.dbsession.flush()
        if fails:
            raise KeyError
        yield b"two"

    made = site(adds("Ada", lambda request: Response(app_iter=stream(request))))
    assert made.get() == ("KeyError" if fails else 200)
    assert seen == [["Ada"]]
    assert made.names() == stored


def test_the_commit_of_a_response_with_a_stream_has_its_exception_view(
    site: Callable[..., Site], engine: Engine
) -> None:
    with engine.begin() as connection:
        connection.execute(insert(Guest.__table__).values(name="Ada"))
    made = site(adds("Ada", lambda request: Response(app_iter=iter([b"one"]))), exception_view(IntegrityError))
    assert made.get() == 409


# -- what fails in the commit


@pytest.mark.parametrize(("context", "status"), [(IntegrityError, 409), (KeyError, "IntegrityError")])
def test_exception_views_make_a_page_of_a_commit_that_fails(
    site: Callable[..., Site], engine: Engine, context: type[Exception], status: Any
) -> None:
    with engine.begin() as connection:
        connection.execute(insert(Guest.__table__).values(name="Ada"))
    made = site(adds("Ada"), exception_view(context))
    assert made.get() == status
    assert made.names() == ["Ada"]


def test_commit_failed_is_asked_if_there_is_no_exception_view(site: Callable[..., Site], engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(insert(Guest.__table__).values(name="Ada"))
    made = site(adds("Ada"), transaction__commit_failed=lambda environ, error: Response(status=418))
    assert made.get() == 418


class Rival:
    """Somebody else who has locked the database."""

    def __init__(self, engine: Engine) -> None:
        self.connection = create_engine(engine.url).connect()
        self.connection.execute(insert(Guest.__table__).values(name="Rival"))

    def leave(self) -> None:
        self.connection.rollback()
        self.connection.close()
        self.connection.engine.dispose()


@pytest.mark.parametrize("flushes", [False, True])
def test_repetitions_go_around_exception_views(site: Callable[..., Site], engine: Engine, flushes: bool) -> None:
    """pyramid_retry repeats after the page of an exception view; here none is made of what fails in the commit."""
    pages: list[Any] = []
    attempts: list[bool] = []
    rival = Rival(engine)

    def view(request: Any) -> Response:
        attempts.append(is_last_attempt(request))
        if len(attempts) == 2:
            rival.leave()
        request.dbsession.add(Guest(name="Ada"))
        if flushes:
            request.dbsession.flush()
        return Response("done")

    def page(error: Exception, request: Any) -> Response:
        pages.append(error)
        return Response(status=409)

    made = site(view, lambda config: config.add_exception_view(page, context=Exception))
    assert made.get() == 200
    assert attempts == [False, False]
    assert made.names() == ["Ada"]
    assert len(pages) == (1 if flushes else 0)


@pytest.fixture
def postgresql() -> Iterator[Engine]:
    engine = create_engine(DATABASES_SEEN.url("postgresql", ""), isolation_level="SERIALIZABLE")
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS pyramid_guest"))
        named = "name VARCHAR PRIMARY KEY DEFERRABLE INITIALLY DEFERRED"
        connection.execute(text(f"CREATE TABLE pyramid_guest ({named})"))
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


def test_a_constraint_that_only_the_commit_checks_has_its_page(postgresql: Engine) -> None:
    made = Site(postgresql, adds("Ada"), exception_view(IntegrityError))
    assert made.get() == 200
    assert made.get() == 409
    assert made.names() == ["Ada"]
    assert postgresql.pool.checkedout() == 0  # type: ignore[attr-defined]  # of its QueuePool


def test_a_serialization_failure_in_the_commit_is_repeated_without_a_page(postgresql: Engine) -> None:
    pages: list[Any] = []
    counts: list[int] = []

    def view(request: Any) -> Response:
        counts.append(len(request.dbsession.scalars(select(Guest.name)).all()))
        request.dbsession.add(Guest(name=f"guest {counts[-1]}"))
        request.dbsession.flush()
        if len(counts) == 1:
            others = create_engine(postgresql.url, isolation_level="SERIALIZABLE", poolclass=NullPool)
            with others.begin() as rival:
                seen = len(rival.scalars(select(Guest.name)).all())
                rival.execute(insert(Guest.__table__).values(name=f"rival {seen}"))
        return Response("done")

    def page(error: Exception, request: Any) -> Response:
        pages.append(error)
        return Response(status=409)

    made = Site(postgresql, view, lambda config: config.add_exception_view(page, context=Exception))
    assert made.get() == 200
    assert (counts, pages) == ([0, 1], [])
    assert made.names() == ["guest 1", "rival 0"]


@pytest.mark.parametrize(
    ("settings", "status"), [({}, 409), ({"unavailable": "true"}, 503), ({"retry__attempts": 1}, 409)]
)
def test_the_last_attempt_has_its_page(
    site: Callable[..., Site], engine: Engine, settings: dict[str, Any], status: int
) -> None:
    rival = Rival(engine)
    attempts: list[bool] = []

    def view(request: Any) -> Response:
        attempts.append(is_last_attempt(request))
        request.dbsession.add(Guest(name="Ada"))
        return Response("done")

    made = site(view, exception_view(OperationalError), **settings)
    try:
        assert made.get() == status
    finally:
        rival.leave()
    assert attempts == ([True] if "retry__attempts" in settings else [False, False, True])


@pytest.mark.parametrize(
    "make_error",
    [MarkedError, RetryableException, TransientError, lambda: marked(KeyError())],
    ids=["marked class", "retryable", "transient", "marked error"],
)
@pytest.mark.parametrize("has_page", [False, True])
def test_repeats_after_marked_errors(
    site: Callable[..., Site], make_error: Callable[[], Exception], has_page: bool
) -> None:
    events: list[BeforeRetry] = []
    attempts: list[Any] = []

    def view(request: Any) -> Response:
        attempts.append(request.environ.get("test.left"))
        request.environ["test.left"] = "left there"
        request.dbsession.add(Guest(name=f"Ada {len(attempts)}"))
        if not is_last_attempt(request):
            error = make_error()
            assert is_error_retryable(request, error)
            raise error
        return Response("done")

    def configure(config: Any) -> None:
        config.add_subscriber(events.append, IBeforeRetry)
        if has_page:
            config.add_exception_view(lambda error, request: Response(status=200), context=Exception)

    made = site(view, configure, retry__attempts="2")
    assert made.get() == 200
    assert made.names() == ["Ada 2"]
    assert attempts == [None, None]
    assert [(event.environ is event.request.environ, event.response is None) for event in events] == [
        (True, not has_page)
    ]


def marked(error: Exception) -> Exception:
    mark_error_retryable(error)
    return error


def test_an_error_outside_of_the_tween_is_repeated_as_well_unless_there_was_a_commit(
    site: Callable[..., Site],
) -> None:
    events: list[Any] = []
    attempts: list[Any] = []

    def configure(config: Any) -> None:
        config.add_subscriber(lambda event: raise_(MarkedError()), "pyramid.events.NewResponse")
        config.add_subscriber(events.append, IBeforeRetry)

    def view(request: Any) -> Response:
        attempts.append(request)
        if len(attempts) == 2:
            request.dbsession.add(Guest(name="Ada"))
        return Response("done")

    made = site(view, configure)
    assert made.get() == "MarkedError"
    assert (len(attempts), len(events)) == (2, 1)
    assert made.names() == ["Ada"]


def raise_(error: BaseException) -> Any:
    raise error


def test_a_body_that_cannot_be_read_again_leaves_one_attempt(site: Callable[..., Site]) -> None:
    attempts: list[Any] = []

    def view(request: Any) -> Response:
        attempts.append(is_last_attempt(request))
        raise MarkedError

    made = site(view, transaction__replay_body_max=1)
    with pytest.raises(MarkedError):
        made.browser.post("/", "a long body")
    assert attempts == [True]


@pytest.mark.parametrize(("limit", "attempts"), [(None, 3), (2, 2), (1, 1)])
def test_retry_activate_hook_limits_the_attempts(site: Callable[..., Site], limit: int | None, attempts: int) -> None:
    seen: list[bool] = []

    def view(request: Any) -> Response:
        seen.append(is_last_attempt(request))
        raise MarkedError

    assert site(view, retry__activate_hook=lambda request: limit).get() == "MarkedError"
    assert seen == [False] * (attempts - 1) + [True]


def test_retry_on_is_repeated_after_an_exception_view(site: Callable[..., Site]) -> None:
    attempts: list[Any] = []

    def view(request: Any) -> Response:
        attempts.append(request)
        raise KeyError

    made = site(view, exception_view(KeyError), transaction__retry_on="builtins:KeyError")
    assert made.get() == 409
    assert len(attempts) == 3


def test_rolls_back_whatever_ends_the_view(site: Callable[..., Site]) -> None:
    made = site(adds("Ada", raises(SystemExit())))
    with pytest.raises(SystemExit):
        made.get()
    assert made.names() == []
    mailer = Mailer()
    transaction.begin().join(mailer)  # Of the thread: nothing is left of the request that was ended.
    transaction.abort()
    assert mailer.done == ["abort"]


@pytest.mark.parametrize("is_observed", [True, False])
def test_an_outcome_that_is_unknown_has_its_page(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, is_observed: bool
) -> None:
    """No exception view claims that nothing was stored."""

    class LostError(Exception):
        pass

    def do_commit(self: Any, connection: Any) -> None:
        error = LostError()
        if is_observed:  # As the engine's events do.
            note_failure(Failure.UNKNOWN, error)
        raise error

    made = site(adds("Ada"), exception_view(Exception))
    monkeypatch.setattr(type(made.engine.dialect), "do_commit", do_commit)
    response = made.browser.get("/", status=500)
    monkeypatch.undo()
    assert "known" in response.text
    assert made.names() == []


# -- what others have reported of pyramid_tm, pyramid_retry and zope.sqlalchemy


def report(name: str) -> Any:
    """Gives the test the name of the thread that it rebuilds, and the engine."""
    return pytest.mark.parametrize("engine", [name], ids=[name], indirect=True)


@report("Pylons/pyramid#3600")
def test_the_user_of_the_request_is_changed_in_a_finished_callback(site: Callable[..., Site], engine: Engine) -> None:
    def view(request: Any) -> Response:
        guest = Guest(name="Ada")
        request.dbsession.add(guest)
        request.add_finished_callback(lambda request: setattr(guest, "name", "Bea"))
        return Response("done")

    made = site(view)
    assert made.get() == 200
    assert made.names() == ["Bea"]


@report("hypothesis/h#3683")
def test_exception_views_that_query_leave_nothing_open(site: Callable[..., Site], engine: Engine) -> None:
    """Raised before the view, so outside of a transaction of the application's."""

    def view(request: Any) -> Response:
        raise BadCSRFToken

    def page(error: Exception, request: Any) -> Response:
        return Response(str(request.dbsession.scalars(select(Guest.name)).all()), status=403)

    made = site(view, lambda config: config.add_exception_view(page, context=BadCSRFToken))
    for _ in range(30):
        assert made.get() == 403
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # of its QueuePool


@report("hypothesis/h#4704")
def test_requests_are_committed_after_others_that_have_used_the_session_late(
    site: Callable[..., Site], engine: Engine
) -> None:
    """A session that is at the place in memory of an earlier one was taken for that one."""

    def view(request: Any) -> Response:
        request.add_finished_callback(lambda request: request.dbsession.scalars(select(Guest.name)).all())
        request.dbsession.add(Guest(name=request.params["name"]))
        return Response("done")

    made = site(view)
    for number in range(30):
        made.browser.get(f"/?name={number}")
    assert len(made.names()) == 30


@report("zopefoundation/zope.sqlalchemy#67")
def test_updates_that_the_orm_makes_of_a_statement_are_committed(site: Callable[..., Site], engine: Engine) -> None:
    def view(request: Any) -> Response:
        request.dbsession.execute(update(Guest).where(Guest.name == "Ada").values(name="Bea"))
        return Response("done")

    with engine.begin() as connection:
        connection.execute(insert(Guest.__table__).values(name="Ada"))
    made = site(view)
    assert made.get() == 200
    assert made.names() == ["Bea"]


@report("Pylons/pyramid_tm#74")
def test_the_user_that_a_tween_has_loaded_can_be_used_in_the_view(site: Callable[..., Site], engine: Engine) -> None:
    def configure(config: Any) -> None:
        config.add_request_method(lambda request: request.dbsession.scalars(select(Guest)).one(), "user", reify=True)
        config.add_tween(f"{__name__}.loading_tween", over="pyramid_tm.tm_tween_factory")

    with engine.begin() as connection:
        connection.execute(insert(Guest.__table__).values(name="Ada"))
    made = site(lambda request: Response(request.user.name), configure, tm__annotate_user="true")
    assert made.browser.get("/").text == "Ada"


def loading_tween(handler: Any, registry: Any) -> Any:
    def tween(request: Any) -> Any:
        assert request.user is not None
        return handler(request)

    return tween


@report("websauna/websauna#222")
def test_an_exception_view_for_all_errors_does_not_keep_a_request_from_being_repeated(
    site: Callable[..., Site], engine: Engine
) -> None:
    attempts: list[Any] = []
    rival = Rival(engine)

    def view(request: Any) -> Response:
        attempts.append(request)
        if len(attempts) == 3:
            rival.leave()
        request.dbsession.add(Guest(name="Ada"))
        request.dbsession.flush()
        return Response("done")

    def page(error: Exception, request: Any) -> Response:
        request.tm.abort()
        return Response(status=500)

    made = site(view, lambda config: config.add_exception_view(page, context=Exception))
    assert made.get() == 200
    assert made.names() == ["Ada"]


# -- tweens and requests


def test_tweens_find_their_place(site: Callable[..., Site]) -> None:
    order: list[str] = []

    def configure(config: Any) -> None:
        config.add_tween(f"{__name__}.outer_tween", over="pyramid_tm.tm_tween_factory")
        config.add_tween(f"{__name__}.inner_tween", under="pyramid_tm.tm_tween_factory", over=EXCVIEW)
        config.registry["order"] = order

    def view(request: Any) -> Response:
        order.append("view")
        return Response("done")

    assert site(view, configure).get() == 200
    assert order == ["outer", "inner active", "view"]


def outer_tween(handler: Any, registry: Any) -> Any:
    def tween(request: Any) -> Any:
        registry["order"].append("outer" + " active" * is_tm_active(request))
        return handler(request)

    return tween


def inner_tween(handler: Any, registry: Any) -> Any:
    def tween(request: Any) -> Any:
        registry["order"].append("inner" + " active" * is_tm_active(request))
        return handler(request)

    return tween


def test_what_an_outer_tween_has_begun_is_committed_with_the_view(site: Callable[..., Site], engine: Engine) -> None:
    """pyramid_tm rolls it back with a manager that is not explicit, and refuses it otherwise."""

    def configure(config: Any) -> None:
        config.add_tween(f"{__name__}.adding_tween", over="pyramid_tm.tm_tween_factory")
        exception_view(IntegrityError)(config)

    made = site(lambda request: Response("done"), configure)
    assert made.get() == 200
    assert made.names() == ["Ada"]
    assert made.get() == 409


def adding_tween(handler: Any, registry: Any) -> Any:
    def tween(request: Any) -> Any:
        request.dbsession.add(Guest(name="Ada"))
        return handler(request)

    return tween


CHAIN = [f"{__name__}.outer_tween", "pyramid_tm.tm_tween_factory", EXCVIEW]


@pytest.mark.parametrize("own", ["pyramid_tm.tm_tween_factory", "sqlasession_middleware.pyramid.tm_tween_factory"])
def test_an_explicit_chain_of_tweens(site: Callable[..., Site], engine: Engine, own: str) -> None:
    def configure(config: Any) -> None:
        config.registry["order"] = []

    with engine.begin() as connection:
        connection.execute(insert(Guest.__table__).values(name="Ada"))
    chain = [own if name == "pyramid_tm.tm_tween_factory" else name for name in CHAIN]
    made = site(
        adds("Ada"), lambda config: (configure(config), exception_view(IntegrityError)(config)), pyramid__tweens=chain
    )
    assert made.get() == 409


def test_an_explicit_chain_without_the_tween_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(ConfigurationExecutionError, match=r"'pyramid\.tweens' lists the tweens"):
        site(pyramid__tweens=[EXCVIEW])
    assert site(pyramid__tweens=[EXCVIEW], transaction=False).get() == 200
    assert MAIN not in CHAIN


@pytest.mark.parametrize("others", [["pyramid_tm"], ["pyramid_retry"]])
@pytest.mark.parametrize("is_first", [True, False])
def test_the_packages_that_are_replaced_are_refused(engine: Engine, others: list[str], is_first: bool) -> None:
    config = Configurator(settings={"dbengine": engine})
    for name in [INCLUDE, *others] if is_first else [*others, INCLUDE]:
        config.include(name)
    with pytest.raises(ConfigurationConflictError, match=rf"takes the place of {others[0]}: remove config\.include"):
        config.make_wsgi_app()


def test_another_dbsession_is_refused_unless_the_application_itself_adds_it(engine: Engine) -> None:
    def add_another(config: Any) -> None:
        config.add_request_method(lambda request: "another", "dbsession", reify=True)

    config = Configurator(settings={"dbengine": engine})
    config.include(INCLUDE)
    config.include(add_another)
    with pytest.raises(ConfigurationConflictError, match=r"adds request\.dbsession: remove the application's own"):
        config.make_wsgi_app()
    config = Configurator(settings={"dbengine": engine})
    config.include(INCLUDE)
    add_another(config)
    config.add_view(lambda request: Response(request.dbsession))
    assert Browser(config.make_wsgi_app()).get("/").text == "another"


def test_a_subrequest_is_part_of_the_request(site: Callable[..., Site]) -> None:
    """With pyramid_tm, its commit ends the transaction of the thread, and an explicit one is another one."""
    managers: list[Any] = []

    def view(request: Any) -> Response:
        managers.append(request.tm)
        request.dbsession.add(Guest(name=request.path_info))
        if request.path_info == "/":
            request.invoke_subrequest(Request.blank("/inner"), use_tweens=True)
            request.tm.doom()
        return Response("done")

    made = site(view, tm__manager_hook="pyramid_tm.explicit_manager")
    assert made.get() == 200
    assert managers[0] is managers[1]
    assert made.names() == []


def test_a_request_that_is_invoked_outside_of_any_is_committed(site: Callable[..., Site], engine: Engine) -> None:
    made = site(adds("Ada"), exception_view(IntegrityError))
    for status in (200, 409):
        assert made.app.invoke_subrequest(Request.blank("/"), use_tweens=True).status_int == status
        assert made.names() == ["Ada"]
    failing = site(adds("Bea", raises(MarkedError())))
    with pytest.raises(MarkedError):
        failing.app.invoke_subrequest(Request.blank("/"), use_tweens=True)
    failing = site(adds("Bea", raises(SystemExit())))
    with pytest.raises(SystemExit):
        failing.app.invoke_subrequest(Request.blank("/"), use_tweens=True)
    assert made.names() == ["Ada"]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # of its QueuePool


def test_tells_the_manager_user_and_path(site: Callable[..., Site]) -> None:
    told: list[Any] = []

    def view(request: Any) -> Response:
        told.append((request.tm.get().user, request.tm.get().description))
        return Response("done")

    def configure(config: Any) -> None:
        config.testing_securitypolicy(userid="Ada")

    made = site(view, configure, tm__annotate_user="true")
    made.browser.get("/door")
    with pytest.raises(URLDecodeError):
        made.browser.get("/%ff")
    site(view, configure).get()
    assert told == [("Ada", "/door"), ("", "/")]


def test_the_session_knows_its_request(site: Callable[..., Site]) -> None:
    def view(request: Any) -> Response:
        return Response(str(request.dbsession.info["request"] is request and request.dbsession is session()))

    assert site(view).browser.get("/").text == "True"


# -- tests and scripts


def test_a_test_gives_its_session_and_its_manager(site: Callable[..., Site], engine: Engine) -> None:
    """As the cookiecutter's conftest.py does: what requests store is seen by the next one, and undone at the end."""
    import zope.sqlalchemy

    def view(request: Any) -> Response:
        request.dbsession.add(Guest(name="Ada"))
        request.dbsession.flush()
        assert is_tm_active(request)
        assert request.tm is manager
        return Response(" ".join(request.dbsession.scalars(select(Guest.name))))

    made = site(view)
    manager = transaction.TransactionManager(explicit=True)
    manager.begin().doom()
    own = made.app.registry["dbsession_factory"]()
    zope.sqlalchemy.register(own, transaction_manager=manager)
    given = {"tm.active": True, "tm.manager": manager, "app.dbsession": own}
    assert made.browser.get("/", extra_environ=given).text == "Ada"
    assert own.scalars(select(Guest.name)).all() == ["Ada"]
    manager.abort()
    assert made.names() == []


def test_a_test_may_invoke_a_request_with_its_manager(site: Callable[..., Site]) -> None:
    made = site(adds("Ada"))
    request = Request.blank("/", environ={"tm.active": True, "tm.manager": transaction.TransactionManager()})
    assert made.app.invoke_subrequest(request, use_tweens=True).status_int == 200
    assert made.names() == []


def test_a_rollback_of_another_data_manager_that_fails_has_its_page(site: Callable[..., Site]) -> None:
    class StuckMailer(Mailer):
        def abort(self, transaction: Any) -> None:
            raise ValueError

    def view(request: Any) -> Response:
        request.tm.get().join(StuckMailer())
        raise KeyError

    assert site(view, exception_view(ValueError)).get() == 409
    assert site(view).get() == "ValueError"


def test_includes_into_a_configuration_without_tweens(engine: Engine) -> None:
    config = testing.setUp(autocommit=False, settings={"dbengine": engine})
    try:
        config.include(INCLUDE)
        config.add_view(adds("Ada"))
        assert Browser(config.make_wsgi_app()).get("/").status_int == 200
    finally:
        testing.tearDown()


def test_a_test_may_give_its_manager_alone(site: Callable[..., Site]) -> None:
    made = site(adds("Ada"))
    manager = transaction.TransactionManager(explicit=True)
    manager.begin()
    assert made.get(**{"tm.active": True, "tm.manager": manager}) == 200
    manager.abort()
    assert made.names() == []


@pytest.mark.parametrize("hook", [None, "pyramid_tm:explicit_manager"])
def test_a_script_commits_by_its_manager(site: Callable[..., Site], engine: Engine, hook: str | None) -> None:
    """As the cookiecutter's initialize_db.py does."""
    made = site(tm__manager_hook=hook)
    with prepare(registry=made.app.registry) as env:
        request = env["request"]
        with request.tm:
            request.dbsession.add(Guest(name="Ada"))
        with suppress(KeyError), request.tm:
            request.dbsession.add(Guest(name="Bea"))
            request.dbsession.flush()
            raise KeyError
        assert request.dbsession is request.dbsession
        assert request.tm.get is not None
        request.tm.begin()
        assert request.dbsession.scalars(select(Guest.name)).all() == ["Ada"]
        assert engine.pool.checkedout() == 1  # type: ignore[attr-defined]  # of its QueuePool
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    transaction.abort()


def test_a_script_has_to_begin_with_an_explicit_manager(site: Callable[..., Site]) -> None:
    """Nothing is lost silently, and the session joins as soon as there is a transaction."""
    made = site(tm__manager_hook="pyramid_tm.explicit_manager")
    with prepare(registry=made.app.registry) as env:
        request = env["request"]
        with pytest.raises(NoTransaction):
            request.dbsession.add(Guest(name="Ada"))
        with request.tm:
            request.dbsession.add(Guest(name="Ada"))
            request.dbsession.flush()
            savepoint = request.tm.savepoint()
            request.dbsession.add(Guest(name="Zoe"))
            request.dbsession.flush()
            savepoint.rollback()
        request.tm.begin()  # The session is not used in it.
        request.tm.abort()
        with request.tm:
            request.dbsession.add(Guest(name="Bea"))
            assert not request.tm.get().isRetryableError(OperationalError("", {}, Exception()))
    assert made.names() == ["Ada", "Bea"]


def test_a_context_is_committed_by_the_manager_or_by_hand(site: Callable[..., Site]) -> None:
    made = site()
    middleware = made.app.registry["sqlasession_middleware"]
    assert isinstance(middleware, SQLASessionMiddleware)
    with middleware.context(), prepare(registry=made.app.registry) as env:
        assert env["request"].dbsession is session()
        session.add(Guest(name="Ada"))
        env["request"].tm.commit()
        env["request"].tm.commit()
        session.add(Guest(name="Bea"))
        session.commit()
        session.add(Guest(name="Cid"))
    with middleware.context(), prepare(registry=made.app.registry) as env:
        session.add(Guest(name="Dan"))
        env["request"].dbsession.flush()
        env["request"].tm.commit()
    assert made.names() == ["Ada", "Bea", "Dan"]


def test_the_registry_is_reachable_where_the_application_is_wrapped_by_hand(engine: Engine) -> None:
    router = Configurator().make_wsgi_app()
    assert SQLASessionMiddleware(router, engine).registry is router.registry
    assert not hasattr(SQLASessionMiddleware(lambda environ, start: [], engine), "registry")


# -- settings


class OwnSession(Session):
    pass


def test_settings_are_strings_or_objects(sqlite_url: str) -> None:
    settings = {
        "sqlalchemy.url": sqlite_url,
        "sqlalchemy.pool_size": 3,
        "sqlalchemy.echo": "false",
        "sqlalchemy.replicas": [sqlite_url],
        "session.class_": OwnSession,
        "session.expire_on_commit": "false",
        "deadline": "5",
        "unavailable": True,
        # Others'.
        "session.type": "file",
        "session.auto": "true",
        "pyramid.reload_templates": "true",
        "mako.directories": "guests:templates",
        "tm.own": "1",
    }

    def tell(current: Session) -> str:
        return f"{isinstance(current, OwnSession)} {current.expire_on_commit}"

    with Configurator(settings=settings) as config:
        config.include(INCLUDE)
        config.add_view(lambda request: Response(tell(request.dbsession)))
    app = config.make_wsgi_app()
    middleware = app.registry["sqlasession_middleware"]
    assert Browser(app).get("/").text == "True False"
    assert middleware.engine.pool.size() == 3
    assert list(middleware.engines) == ["default", "replicas[0]"]
    middleware.dispose()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"session.expire_on_comit": "1"}, r"'session.expire_on_comit' is not a setting .*'session.expire_on_commit'"),
        ({"tm.activate": "a:b"}, r"'tm.activate' is not a setting .*; did you mean 'tm.activate_hook'"),
        ({"retry.attempts": "0"}, r"'retry.attempts' must be a whole number from 1, got 0"),
        ({"retry.attempts": "three"}, r"'retry.attempts' must be a whole number, got 'three'"),
        ({"retry.attempts": "3", "transaction.attempts": "3"}, r"'retry.attempts' says the same as"),
        ({"tm.attempts": "3", "transaction.attempts": "3"}, r"'tm.attempts' says the same as"),
        ({"tm.commit_veto": "a:b", "transaction.commit_veto": "none"}, r"'tm.commit_veto' says the same as"),
        ({"tm.activate_hook": "a:b", "transaction.activate": "none"}, r"'tm.activate_hook' says the same as"),
        ({"tm.commit_veto": "nowhere.to_be:found"}, r"'tm.commit_veto' must be a callable .*ModuleNotFoundError"),
        ({"tm.manager_hook": 5}, r"'tm.manager_hook' must be a callable or its dotted name, got 5"),
        ({"transaction.attempts": 0}, r"'transaction.attempts' must be a whole number from 1, got 0"),
        ({"sqlalchemy.pool_sise": "5"}, r"'sqlalchemy.pool_sise' .*did you mean 'pool_size'"),
        ({"session.class_": 5}, r"'session.class_' must be a subclass of Session"),
        ({"unavailable.retry_after": -1}, r"'unavailable.retry_after' must be"),
    ],
)
def test_wrong_settings_are_refused(sqlite_url: str, settings: dict[str, Any], message: str) -> None:
    config = Configurator(settings={"sqlalchemy.url": sqlite_url, **settings})
    config.include(INCLUDE)
    with pytest.raises(PyramidConfigurationError, match=message):
        config.make_wsgi_app()


def test_the_url_is_needed() -> None:
    with pytest.raises(ConfigurationError, match=r"'sqlalchemy.url' is missing"):
        read_options({})


def test_tm_attempts_of_old_files_are_read() -> None:
    assert read_options({"sqlalchemy.url": "sqlite://", "tm.attempts": "5"}).transaction["attempts"] == 5


@pytest.mark.parametrize("limit", [0, 4, "2"])
def test_retry_activate_hook_may_not_ask_for_more(site: Callable[..., Site], limit: Any) -> None:
    made = site(retry__activate_hook=lambda request: limit)
    with pytest.raises(ConfigurationError, match=r"'retry\.activate_hook' must return None, or a whole"):
        made.browser.get("/")


def test_predicates(site: Callable[..., Site]) -> None:
    def configure(config: Any) -> None:
        for name in ("tm_active", "last_retry_attempt", "retryable_error"):
            config.add_route(name, f"/is/{name}")
            for wanted in (False, True):
                answer = f"{name} is {wanted}"
                config.add_view(lambda request, answer=answer: Response(answer), route_name=name, **{name: wanted})

    config = Configurator(settings={"dbengine": site().engine})
    config.include(INCLUDE)
    configure(config)
    browser = Browser(config.make_wsgi_app())
    assert browser.get("/is/tm_active").text == "tm_active is True"
    assert browser.get("/is/last_retry_attempt").text == "last_retry_attempt is False"
    assert browser.get("/is/retryable_error").text == "retryable_error is False"
    config = Configurator(settings={"dbengine": site().engine})
    config.include(INCLUDE)
    config.add_view(lambda request: Response(), tm_active="yes")
    with pytest.raises(PyramidConfigurationError, match="'tm_active' must be True or False, got 'yes'"):
        config.make_wsgi_app()


def test_configures_at_once_with_autocommit(engine: Engine) -> None:
    config = Configurator(settings={"dbengine": engine}, autocommit=True)
    config.include(INCLUDE)
    config.add_view(adds("Ada"))
    assert Browser(config.make_wsgi_app()).get("/").status_int == 200


def test_only_errors_can_be_marked() -> None:
    with pytest.raises(ValueError, match="Only exceptions"):
        mark_error_retryable("busy")  # type: ignore[arg-type]  # what is tested
