"""Requests in any order never see each other (G1, G2, G3): a model, threads, greenlets, contexts."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gevent
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqlasession_middleware import SQLASessionMiddleware, application, local, local_manager, session
from sqlasession_middleware._lifecycle.context import ScopeContext
from sqlasession_middleware._scope.scope import Scope, current
from sqlasession_middleware.errors import ScopeError
from tests.wsgi import Environ, StartResponse, consume, environ, select_one, start_response


class Application:
    """One class, several instances: each request's code is what its environ tells it to do."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, environ: Environ, start: StartResponse) -> Iterable[bytes]:
        start("200 OK", [])
        request: Request = environ["test.request"]
        request.run()
        if request.body == "list":
            return [b"x"]
        return request.chunks()


class Owner:
    """What the model knows of a scope: a request or a context."""

    def __init__(self, app: SQLASessionMiddleware, uses_session: bool) -> None:
        self.app = app
        self.uses_session = uses_session
        self.session: Session | None = None
        self.mark: object = None
        self.open = True
        self.before: Owner | None = None

    def check(self) -> None:
        """What the code of this owner must see, whenever it runs."""
        assert application._get_current_object() is self.app
        assert getattr(local, "mark", None) is self.mark
        self.mark = local.mark = object()
        if self.uses_session:
            if self.session is None:
                self.session = session()
            assert session() is self.session
            assert self.session.bind is self.app.engine
            select_one()
        else:
            assert not session.registry.has()

    def holds(self) -> bool:
        """Whether it has a connection."""
        return self.open and self.session is not None


class Request(Owner):
    def __init__(self, app: SQLASessionMiddleware, body: str, uses_session: bool) -> None:
        super().__init__(app, uses_session)
        self.body = body
        self.action: Callable[[], None] | None = None
        self.result: Any = None
        self.steps: Any = None
        self.running = False

    def holds(self) -> bool:
        # A list is complete when it is returned, and has only read.
        return super().holds() and (self.body != "list" or self.running)

    def run(self) -> None:
        action, self.action = self.action, None
        self.running = True
        try:
            self.check()
            if action is not None:
                action()
                self.check()
        finally:
            self.running = False

    def chunks(self) -> Iterator[bytes]:
        try:
            while True:
                self.run()
                yield b"x"
        except GeneratorExit:
            self.run()
            raise


class ApplicationError(Exception):
    """The application's own."""


class Requests(RuleBasedStateMachine):
    """Opens, steps, closes, nests and abandons requests of two instances of one class and of another application.

    ``seen`` models what is on the Local where no application's code runs: the context that was entered there.
    """

    def __init__(self) -> None:
        super().__init__()
        current.set({})  # Whatever an example that failed has left.
        options = {"pool_size": 100}
        red, blue = Application("red"), Application("blue")
        self.apps = [SQLASessionMiddleware(app, "sqlite://", engine_options=options) for app in (red, red, blue)]
        self.owners: list[Owner] = []
        self.contexts: list[tuple[ScopeContext, Owner]] = []
        self.seen: Owner | None = None
        self.running: list[Request] = []

    def teardown(self) -> None:
        for request in list(self.requests()):
            self.close(request)
        while self.contexts:
            self.exit_context(-1)
        assert dict(current.get()) == {}
        for app in self.apps:
            assert app.engine.pool.checkedout() == 0
            app.dispose()

    def requests(self) -> list[Request]:
        return [owner for owner in self.owners if isinstance(owner, Request) and owner.open and not owner.running]

    def ended(self, owner: Owner) -> None:
        owner.open = False
        if self.seen is owner and not self.running:
            before = owner.before
            while before is not None and not before.open:
                before = before.before
            self.seen = before

    def inside(self, place: int, action: Callable[[], None]) -> None:
        """Do something where the server's code runs, or in a step of some request's body."""
        streams = [request for request in self.requests() if request.body == "generator"]
        if place < 0 or not streams:
            action()
            return
        request = streams[place % len(streams)]
        request.action = action
        self.running.append(request)
        try:
            assert next(request.steps) == b"x"
        finally:
            self.running.pop()

    def look(self) -> None:
        """Whoever runs has its own scope, not one that it called."""
        if self.running:
            self.running[-1].check()
        else:
            values = dict(current.get({}))
            seen = self.seen if self.seen is not None and self.seen.open else None
            assert values.get("application") is (seen and seen.app)
            assert values.get("mark") is (seen and seen.mark)

    def call(self, app: SQLASessionMiddleware, body: str, uses_session: bool, by_iter: bool) -> None:
        request = Request(app, body, uses_session)
        request.result = app(environ(**{"test.request": request}), start_response)
        request.steps = iter(request.result) if by_iter else request.result
        self.owners.append(request)
        self.look()

    def step(self, request: Request) -> None:
        next(request.steps, None)
        self.look()

    def close(self, request: Request) -> None:
        if request.open:
            request.result.close()
            self.ended(request)
            request.result.close()
            self.look()

    def abandon(self, request: Request) -> None:
        leaks = request.session is not None
        if leaks:
            with pytest.warns(ResourceWarning):
                request.result = request.steps = None
        else:
            request.result = request.steps = None
        request.open = False
        self.look()

    def fail(self, request: Request) -> None:
        def action() -> None:
            raise ApplicationError

        request.action = action
        with pytest.raises(ApplicationError):
            next(request.steps)
        self.ended(request)
        self.look()

    def fail_in_call(self, app: SQLASessionMiddleware) -> None:
        def action() -> None:
            raise ApplicationError

        request = Request(app, "list", True)
        request.action = action
        with pytest.raises(ApplicationError):
            app(environ(**{"test.request": request}), start_response)
        request.open = False
        self.owners.append(request)
        self.look()

    places = st.integers(-2, 5)
    picks = st.integers(0, 20)

    @rule(
        place=places,
        app=st.integers(0, 2),
        body=st.sampled_from(["list", "generator"]),
        uses=st.booleans(),
        by_iter=st.booleans(),
    )
    def calls(self, place: int, app: int, body: str, uses: bool, by_iter: bool) -> None:
        """Servers ask for the iterator or call ``next()`` on the response."""
        self.inside(place, lambda: self.call(self.apps[app], body, uses, by_iter))

    def one_of(self, place: int, pick: int, act: Callable[[Request], None], only: str | None = None) -> None:
        def action() -> None:
            choices = [each for each in self.requests() if only in (None, each.body)]
            if choices:
                act(choices[pick % len(choices)])

        self.inside(place, action)

    @precondition(lambda self: self.requests())
    @rule(place=places, pick=picks)
    def steps(self, place: int, pick: int) -> None:
        self.one_of(place, pick, self.step)

    @precondition(lambda self: self.requests())
    @rule(place=places, pick=picks)
    def closes(self, place: int, pick: int) -> None:
        self.one_of(place, pick, self.close)

    @precondition(lambda self: self.requests())
    @rule(place=places, pick=picks)
    def abandons(self, place: int, pick: int) -> None:
        self.one_of(place, pick, self.abandon)

    @precondition(lambda self: self.requests())
    @rule(place=places, pick=picks)
    def fails(self, place: int, pick: int) -> None:
        self.one_of(place, pick, self.fail, only="generator")

    @rule(place=places, app=st.integers(0, 2))
    def fails_in_the_call(self, place: int, app: int) -> None:
        self.inside(place, lambda: self.fail_in_call(self.apps[app]))

    @rule(app=st.integers(0, 2), uses=st.booleans())
    def enter_context(self, app: int, uses: bool) -> None:
        owner = Owner(self.apps[app], uses)
        owner.before = self.seen
        context = self.apps[app].context()
        context.__enter__()
        self.seen = owner
        owner.check()
        self.contexts.append((context, owner))

    @precondition(lambda self: self.contexts)
    @rule(pick=picks)
    def exit_context(self, pick: int) -> None:
        context, owner = self.contexts.pop(pick % len(self.contexts))
        if self.seen is owner:
            owner.check()
        context.__exit__(None, None, None)
        self.ended(owner)
        self.look()

    @rule(place=places, app=st.integers(0, 2))
    def context_block(self, place: int, app: int) -> None:
        def action() -> None:
            owner = Owner(self.apps[app], True)
            with self.apps[app].context():
                owner.check()
            self.look()

        self.inside(place, action)

    @invariant()
    def connections_are_those_of_open_scopes(self) -> None:
        for app in self.apps:
            holding = [owner for owner in self.all_owners() if owner.app is app and owner.holds()]
            assert app.engine.pool.checkedout() == len(holding)

    def all_owners(self) -> list[Owner]:
        return [*self.owners, *(owner for _, owner in self.contexts)]


Requests.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRequests = Requests.TestCase


def streaming(steps: int, between: Callable[[], object]) -> Callable[[Environ, StartResponse], Iterator[bytes]]:
    """An application that compares its scope with its request's name in the call and in each step."""

    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        name = environ["test.name"]
        local.name = name
        session.info["name"] = name
        start("200 OK", [])

        def check() -> bytes:
            select_one()
            assert local.name == session.info["name"] == name
            assert application.app is environ["test.app"]
            return name.encode()

        def chunks() -> Iterator[bytes]:
            for _ in range(steps):
                between()
                yield check()

        check()
        return chunks()

    return app


def run_one(app: SQLASessionMiddleware, name: str) -> None:
    answer = consume(app(environ(**{"test.name": name, "test.app": app.app}), start_response))
    assert answer == name.encode() * 5
    assert dict(local) == {}


def test_32_threads_see_only_their_own_requests(database_url: str) -> None:
    # All threads are in a request, with a session, at once.
    barrier = threading.Barrier(32)
    first_wait = threading.local()

    def between() -> None:
        if not hasattr(first_wait, "done"):
            first_wait.done = True
            barrier.wait(timeout=60)

    options = {"pool_size": 16}
    apps = [SQLASessionMiddleware(streaming(5, between), database_url, engine_options=options) for _ in range(2)]

    def work(number: int) -> None:
        for again in range(20):
            run_one(apps[number % 2], f"{number}.{again};")

    with ThreadPoolExecutor(32) as pool:
        for done in [pool.submit(work, number) for number in range(32)]:
            done.result()
    for app in apps:
        assert app.engine.pool.checkedout() == 0
        app.dispose()


def test_200_greenlets_see_only_their_own_requests(sqlite_url: str) -> None:
    apps = [
        SQLASessionMiddleware(streaming(5, gevent.idle), sqlite_url, engine_options={"pool_size": 100})
        for _ in range(2)
    ]
    greenlets = [gevent.spawn(run_one, apps[number % 2], f"{number};") for number in range(200)]
    gevent.joinall(greenlets, raise_error=True, timeout=60)
    assert all(each.successful() for each in greenlets)
    for app in apps:
        assert app.engine.pool.checkedout() == 0
        app.dispose()


def test_killed_greenlet_gives_everything_back(sqlite_url: str) -> None:
    reached = gevent.event.Event()

    def wait_for_the_kill() -> None:
        reached.set()
        gevent.sleep(60)

    app = SQLASessionMiddleware(streaming(5, wait_for_the_kill), sqlite_url)
    greenlet = gevent.spawn(run_one, app, "killed")
    reached.wait(timeout=60)
    assert app.engine.pool.checkedout() == 1
    greenlet.kill()
    assert isinstance(greenlet.value, gevent.GreenletExit)
    assert app.engine.pool.checkedout() == 0
    app.dispose()


def in_new_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def in_new_context(function: Callable[[], Any]) -> Any:
    return contextvars.Context().run(function)


def in_copied_context(function: Callable[[], Any]) -> Any:
    return contextvars.copy_context().run(function)


ELSEWHERE = [in_new_thread, in_new_context, in_copied_context]


@pytest.mark.parametrize("step_in", ELSEWHERE)
@pytest.mark.parametrize("close_in", ELSEWHERE)
@pytest.mark.parametrize("call_in", ["here", "a context of its own"])
def test_scope_is_right_when_the_body_is_stepped_elsewhere(
    sqlite_url: str, step_in: Any, close_in: Any, call_in: str
) -> None:
    """Some servers step the body, and close it, in other threads or contexts than the call."""
    app = SQLASessionMiddleware(streaming(3, lambda: None), sqlite_url)
    request = environ(**{"test.name": "x", "test.app": app.app})
    caller = contextvars.copy_context() if call_in == "here" else contextvars.Context()
    result = caller.run(app, request, start_response)
    left: list[dict[str, Any]] = []

    def step() -> bytes | None:
        chunk = next(result, None)
        left.append(dict(local))
        return chunk

    def close() -> None:
        result.close()
        left.append(dict(local))

    assert [step_in(step) for _ in range(4)] == [b"x", b"x", b"x", None]
    close_in(close)
    left.append(caller.run(dict, local))
    assert left == [{}] * 6
    assert app.engine.pool.checkedout() == 0
    app.dispose()


def test_body_is_not_resumed_when_it_was_closed_elsewhere(sqlite_engine: Engine) -> None:
    """The context of the call must not bring the ended scope back to life."""
    app = SQLASessionMiddleware(streaming(5, lambda: None), sqlite_engine)
    caller = contextvars.Context()
    result = caller.run(app, environ(**{"test.name": "x", "test.app": app.app}), start_response)
    steps = iter(result)
    assert caller.run(next, steps) == b"x"
    in_new_context(result.close)
    assert caller.run(next, steps, None) is None
    assert caller.run(next, result, None) is None
    assert caller.run(dict, local) == {}
    with pytest.raises(ScopeError, match="No application is bound"):
        caller.run(session)
    consume(caller.run(app, environ(**{"test.name": "y", "test.app": app.app}), start_response))


@pytest.mark.parametrize("found", ["nothing", "an empty Local"])
def test_scope_ends_when_it_is_closed_in_a_copy_of_its_context(sqlite_engine: Engine, found: str) -> None:
    """asyncio copies the context for each task, with the scope in it."""
    copies: list[contextvars.Context] = []
    app = SQLASessionMiddleware(streaming(5, lambda: copies.append(contextvars.copy_context())), sqlite_engine)
    caller = contextvars.Context()
    if found == "an empty Local":
        caller.run(local_manager.cleanup)
    result = caller.run(app, environ(**{"test.name": "x", "test.app": app.app}), start_response)
    assert caller.run(next, result) == b"x"
    (copy,) = copies
    assert isinstance(copy.run(current.get), Scope)
    copy.run(result.close)
    with pytest.raises(ScopeError, match="The request is over"):
        copy.run(session)
    assert caller.run(dict, local) == {}
    assert caller.run(next, result, None) is None
    assert sqlite_engine.pool.checkedout() == 0


def test_other_context_variables_are_left_alone(sqlite_url: str) -> None:
    """What the application sets in them is seen outside, exactly as without the middleware."""
    variable = contextvars.ContextVar("variable", default=0)

    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        variable.set(1)

        def chunks() -> Iterator[bytes]:
            variable.set(variable.get() + 1)
            yield b"x"

        return chunks()

    result = SQLASessionMiddleware(app, sqlite_url)(environ(), start_response)
    assert variable.get() == 1
    next(result)
    assert variable.get() == 2
    result.close()


def test_caller_finds_its_context_as_it_was(sqlite_url: str) -> None:
    """Not even an empty value is left in a context that had none."""
    app = SQLASessionMiddleware(streaming(5, lambda: None), sqlite_url)
    caller = contextvars.Context()
    caller.run(run_one, app, "x")
    assert len(caller) == 0
    app.dispose()


class Layers:
    """Applications that call each other with one environ, each noting what it sees."""

    def __init__(self, sqlite_url: str) -> None:
        self.notes: list[tuple[str, object]] = []
        self.inner = SQLASessionMiddleware(self.bottom, sqlite_url)
        self.outer = SQLASessionMiddleware(self.middle, sqlite_url)

    def note(self, place: str) -> None:
        self.notes.append((place, session()))

    def middle(self, environ: Environ, start: StartResponse) -> Iterator[bytes]:
        self.note("middle")
        if environ.pop("test.deep", None):
            body = self.inner(environ, start)
        else:
            body = self.outer(environ, start) if environ.pop("test.again", None) else [b"end"]
        self.note("middle")
        return self.stepped("middle", body)

    def bottom(self, environ: Environ, start: StartResponse) -> Iterator[bytes]:
        self.note("bottom")
        body = self.outer(environ, start)
        self.note("bottom")
        return self.stepped("bottom", body)

    def stepped(self, place: str, body: Any) -> Iterator[bytes]:
        self.note(place)
        for chunk in body:
            self.note(place)
            yield chunk
        if hasattr(body, "close"):
            body.close()
        self.note(place)


@pytest.mark.parametrize("way", ["test.again", "test.deep"])
def test_same_instance_joins_its_scope_when_met_again_with_the_same_environ(sqlite_url: str, way: str) -> None:
    layers = Layers(sqlite_url)
    assert consume(layers.outer(environ(**{way: True}), start_response)) == b"end"
    of_middle = {seen for place, seen in layers.notes if place == "middle"}
    of_bottom = {seen for place, seen in layers.notes if place == "bottom"}
    assert len(of_middle) == 1
    assert len(of_bottom) == (way == "test.deep")
    assert not of_middle & of_bottom
    assert layers.outer.engine.pool.checkedout() == layers.inner.engine.pool.checkedout() == 0


def test_joined_response_keeps_length_and_closes_its_body(sqlite_url: str) -> None:
    class Sized(list):
        closed = 0

        def close(self) -> None:
            assert application._get_current_object() is outer
            self.closed += 1

    body = Sized([b"a", b"b"])
    seen: list[Any] = []

    def top(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        return inner(environ, start) if "again" not in environ else body

    def bottom(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        environ["again"] = True
        result = outer(environ, start)
        seen.append(len(result))
        return result

    outer, inner = SQLASessionMiddleware(top, sqlite_url), SQLASessionMiddleware(bottom, sqlite_url)
    assert consume(outer(environ(), start_response)) == b"ab"
    assert seen == [2]
    assert body.closed == 1


def test_joined_response_hands_on_the_error_of_a_step(sqlite_url: str) -> None:
    def fails() -> Iterator[bytes]:
        assert application._get_current_object() is outer
        yield b"x"
        raise ApplicationError

    class WithoutClose:
        def __iter__(self) -> Iterator[bytes]:
            return fails()

    def top(environ: Environ, start: StartResponse) -> Any:
        return inner(environ, start) if "again" not in environ else WithoutClose()

    def bottom(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        environ["again"] = True
        result = outer(environ, start)
        steps = [iter(result), result]
        assert next(steps[0]) == b"x"
        with pytest.raises(ApplicationError):
            next(steps[1])
        assert application._get_current_object() is inner
        assert next(iter(result), None) is None
        result.close()
        return [b"end"]

    outer, inner = SQLASessionMiddleware(top, sqlite_url), SQLASessionMiddleware(bottom, sqlite_url)
    assert consume(outer(environ(), start_response)) == b"end"


def test_same_instance_opens_another_scope_when_the_environ_is_another(sqlite_url: str) -> None:
    sessions: list[Session] = []

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        sessions.append(session())
        if environ["PATH_INFO"] == "/":
            consume(wrapped({**environ, "PATH_INFO": "/inner"}, start))
            assert session() is sessions[0]
        return [b"x"]

    wrapped = SQLASessionMiddleware(app, sqlite_url)
    consume(wrapped(environ(), start_response))
    assert len(set(sessions)) == 2


def test_locals_of_the_user_are_cleaned_up_when_they_are_managed(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is released, even where another one fails, and after the session has gone."""
    released: list[str] = []

    class Managed:
        def __init__(self, name: str) -> None:
            self.name = name

        def __release_local__(self) -> None:
            released.append(self.name)
            assert not session.registry.has()
            if self.name == "first":
                raise ValueError("first")

    monkeypatch.setattr(local_manager, "locals", [Managed("first"), local, Managed("second")])
    app = SQLASessionMiddleware(streaming(5, lambda: None), sqlite_url)
    run_one(app, "x")
    assert released == ["first", "second"]
    assert [record.finisher for record in caplog.records] == ["local_manager.cleanup"]
    assert isinstance(current.get({}), dict)
    assert not isinstance(current.get({}), Scope)
    app.dispose()


def test_context_may_be_left_in_a_copy_of_the_context_that_entered_it(sqlite_url: str) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], sqlite_url)

    def leave() -> bool:
        entered.__exit__(None, None, None)
        return session.registry.has()

    def enter() -> bool:
        entered.__enter__()
        session()
        return contextvars.copy_context().run(leave)

    entered = app.context()
    assert contextvars.copy_context().run(enter) is False
