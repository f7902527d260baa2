"""A process that was forked leaves its parent's connections alone: scripts that fork, on every driver."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from textwrap import dedent
from uuid import uuid4

import pytest
from sqlalchemy import NullPool, create_engine, text

from .drivers import rows_of, rows_on

#: Seconds after which a process of a script tells where it is, and ends: who waits for a lock that was copied does so
#: for good.
PATIENCE = 60

#: What every script begins with. Scripts say nothing: whatever they write is an error, and so is a warning.
PRELUDE = f"""
import faulthandler
import gc
import os
import signal
import sys
import threading
from contextlib import ExitStack, closing, contextmanager, suppress
from ctypes import PyDLL
from multiprocessing import get_context

from sqlalchemy import Column, String, Table, create_engine, event, text
from sqlasession_middleware import SQLASessionMiddleware, local, local_manager, session
from sqlasession_middleware._database import engines, forks, schema
from sqlasession_middleware._sessions import registry as sessions

URL, TABLE = sys.argv[1:]
faulthandler.register(signal.SIGALRM, chain=True)
signal.alarm({PATIENCE})


def write(name, session=session):
    session.execute(text(f"INSERT INTO {{TABLE}} VALUES (:name)"), {{"name": name}})


def server_pid(session=session):
    return session.scalar(text("SELECT pg_backend_pid()" if "postgresql" in URL else "SELECT connection_id()"))


def written():
    "What others see of the table, on a connection of its own."
    engine = create_engine(URL)
    with engine.connect() as connection:
        names = set(connection.scalars(text(f"SELECT name FROM {{TABLE}}")))
    engine.dispose()
    return names


def fork(child, how="sys.exit"):
    "Have a child process call a function and end; return when it has."

    def live():
        signal.alarm({PATIENCE})
        child()
        gc.collect()
        app.dispose()

    if how == "multiprocessing":
        process = get_context("fork").Process(target=live)
        process.start()
        process.join()
        assert process.exitcode == 0
        return
    # uWSGI forks in C and does not tell Python: no hook is called.
    pid = PyDLL(None).fork() if how == "uWSGI" else os.fork()
    if not pid:
        live()
        if how == "os._exit":
            os._exit(0)
        sys.exit()
    assert (how, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) == (how, 0)


@contextmanager
def thread_in(block):
    "Another thread is inside of a ``with`` block as long as this one is."
    inside, leave = threading.Event(), threading.Event()

    def enter():
        with block:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=enter)
    thread.start()
    inside.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()


app = SQLASessionMiddleware(lambda environ, start: [], URL)
"""

#: What a script begins with to look as if it ran in uWSGI, the only place where there is this module.
IN_UWSGI = """
import sys
import types

sys.modules["uwsgi"] = types.ModuleType("uwsgi")
"""

#: Runs a script, which has to leave these names in its table.
Run = Callable[..., None]


def run_script(url: str, table: str, script: str, in_uwsgi: bool = False) -> tuple[int, str, str]:
    """How a script ends, and what it says."""
    begin = IN_UWSGI + PRELUDE if in_uwsgi else PRELUDE
    # Python 3.12 warns of threads at a fork: some of these tests are about them.
    options = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, *options, "-c", f"{begin}\n{dedent(script)}\napp.dispose()", url, table],
        capture_output=True,
        text=True,
        check=False,
        timeout=3 * PATIENCE,
    )
    print(done.stderr)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(params=rows_on("postgresql", "mariadb"))
def url(request: pytest.FixtureRequest) -> str:
    """The URL of each driver's server in turn."""
    return request.param.url().render_as_string(hide_password=False)


@pytest.fixture
def run(url: str) -> Iterator[Run]:
    """Runs a script, on a table of the test's own, and checks which names it has left there."""
    table = f"forks_{uuid4().hex[:12]}"
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE {table} (name VARCHAR(40) PRIMARY KEY)"))

    def run_and_look(script: str, expected: set[str], in_uwsgi: bool = False) -> None:
        ended = run_script(url, table, script, in_uwsgi)
        with engine.connect() as connection:
            found = set(connection.scalars(text(f"SELECT name FROM {table}")))
        assert (found, ended) == (expected, (0, "", ""))

    yield run_and_look
    with engine.begin() as connection:
        connection.execute(text(f"DROP TABLE {table}"))


ONE_EACH = pytest.mark.parametrize("url", rows_of("psycopg", "pymysql"), indirect=True)
POSTGRESQL = pytest.mark.parametrize("url", rows_of("psycopg"), indirect=True)


def test_parent_goes_on_when_children_were_forked_in_its_transaction(run: Run) -> None:
    script = """
        def do_nothing():
            "What it has inherited is finalized as it ends, if at all."

        def work():
            global inherited, connection, driver_connection, apart
            del inherited, connection, driver_connection, apart
            gc.collect()
            assert server_pid() != mine
            write(f"child, {how}")
            session.commit()

        for how in ("sys.exit", "os._exit", "multiprocessing"):
            with app.context():
                write(f"parent, {how}")
                mine = server_pid()
                inherited, connection = session(), session.connection()
                driver_connection = connection.connection.dbapi_connection
                # Nothing but this variable refers to it.
                apart = app.engine.connect()
                write(f"apart, {how}", apart)
                for child in (do_nothing, work):
                    fork(child, how)
                    assert server_pid() == mine
                    assert session() is inherited
                    assert f"parent, {how}" not in written()
                assert f"child, {how}" in written()
                session.commit()
                apart.commit()
                apart.close()
    """
    ways = ("sys.exit", "os._exit", "multiprocessing")
    run(script, {f"{who}, {how}" for who in ("parent", "apart", "child") for how in ways})


def test_parent_goes_on_when_children_end_what_they_have_inherited(run: Run) -> None:
    script = """
        def child():
            for end in (inherited.commit, inherited.rollback, inherited.close):
                with suppress(Exception):
                    end()
            gc.collect()
            write(f"child, {kind}")
            session.commit()

        for kind in ("session", "connection", "driver connection"):
            with app.context():
                write(f"parent, {kind}")
                mine = server_pid()
                inherited = session()
                if kind != "session":
                    inherited = inherited.connection()
                if kind == "driver connection":
                    inherited = inherited.connection.dbapi_connection
                fork(child)
                assert server_pid() == mine, kind
                assert f"parent, {kind}" not in written()
                session.commit()
    """
    kinds = ("session", "connection", "driver connection")
    run(script, {f"{who}, {kind}" for who in ("parent", "child") for kind in kinds})


@ONE_EACH
def test_children_have_connections_of_their_own_when_the_parents_are_idle(run: Run) -> None:
    script = """
        def pids():
            with ExitStack() as stack:
                connections = [stack.enter_context(app.engine.connect()) for _ in range(3)]
                return {server_pid(connection) for connection in connections}

        def child():
            assert not pids() & mine

        mine = pids()
        for how in ("sys.exit", "os._exit", "multiprocessing"):
            fork(child, how)
        assert pids() == mine
    """
    run(script, set())


@ONE_EACH
def test_thread_goes_on_when_another_one_forks(run: Run) -> None:
    script = """
        @contextmanager
        def transaction():
            with app.context():
                write("thread")
                pids.add(server_pid())
                yield
                assert server_pid() in pids
                session.commit()

        def work():
            with app.context():
                assert server_pid() not in pids
                write("child")
                session.commit()

        pids = set()
        with thread_in(transaction()):
            fork(gc.collect)
            fork(work)
        assert len(pids) == 1
    """
    run(script, {"thread", "child"})


@POSTGRESQL
def test_thread_goes_on_in_its_shell_when_another_one_forks(run: Run) -> None:
    """Nothing but that thread's context refers to the scope, and in a child it is as good as ended."""
    script = """
        @contextmanager
        def shell():
            local.application = app
            write("thread")
            yield
            session.commit()
            local_manager.cleanup()

        with thread_in(shell()):
            fork(gc.collect)
    """
    run(script, {"thread"})


# mysqlclient's says goodbye as it is finalized; the others do so only where they were made, or never.
@pytest.mark.parametrize("url", rows_of("psycopg", "pymysql", "MySQLdb"), indirect=True)
def test_parent_goes_on_when_its_engine_was_connected_before_it_was_given(run: Run) -> None:
    script = """
        engine = create_engine(URL)

        def all_pids():
            with engine.connect() as first, engine.connect() as second:
                return {server_pid(first), server_pid(second)}

        pids = all_pids()
        app = SQLASessionMiddleware(lambda environ, start: [], engine)

        def child():
            global inherited
            if what == "end":
                inherited.rollback()
                inherited.close()
            del inherited
            gc.collect()
            assert server_pid() not in pids
            write(f"child, {what}")
            session.commit()
            engine.dispose()

        fork(gc.collect)
        assert all_pids() == pids
        for what in ("let go", "end"):
            with app.context():
                write(f"parent, {what}")
                mine = server_pid()
                assert mine in pids
                inherited = session()
                fork(child)
                assert server_pid() == mine
                assert f"parent, {what}" not in written()
                session.commit()
        assert all_pids() == pids
        engine.dispose()
    """
    run(script, {f"{who}, {what}" for who in ("parent", "child") for what in ("let go", "end")})


def test_parent_goes_on_with_a_connection_that_was_detached(run: Run) -> None:
    script = """
        def end():
            for each in (apart.commit, apart.rollback):
                with suppress(Exception):
                    each()

        for child in (gc.collect, end):
            apart = app.engine.connect()
            apart.detach()
            write(f"parent, {child.__name__}", apart)
            mine = server_pid(apart)
            fork(child)
            assert server_pid(apart) == mine
            apart.commit()
            apart.close()
    """
    run(script, {"parent, collect", "parent, end"})


#: Made from an engine's URL: what it has connected before it is given to the middleware.
POOLS = {
    "out": "create_engine(URL, pool_size=1)",
    "static": "create_engine(URL, poolclass=StaticPool)",
    "thread": "create_engine(URL, poolclass=SingletonThreadPool)",
    "assertion": "create_engine(URL, poolclass=AssertionPool)",
}


@pytest.mark.parametrize("url", rows_of("psycopg", "MySQLdb"), indirect=True)
@pytest.mark.parametrize("kind", POOLS)
def test_parent_goes_on_whatever_pool_had_its_connection_before(run: Run, kind: str) -> None:
    script = f"""
        from sqlalchemy.pool import AssertionPool, SingletonThreadPool, StaticPool

        engine = {POOLS[kind]}
        with engine.connect() as connection:
            mine = server_pid(connection)
            if {kind == "out"}:
                app = SQLASessionMiddleware(lambda environ, start: [], engine)
        app = SQLASessionMiddleware(lambda environ, start: [], engine)

        def child():
            with suppress(Exception):
                inherited.rollback()

        with app.context():
            write("parent")
            inherited = session()
            fork(child)
            assert server_pid() == mine
            session.commit()
        engine.dispose()
    """
    run(script, {"parent"})


@ONE_EACH
def test_parent_goes_on_when_a_child_can_open_no_more_files(run: Run) -> None:
    script = """
        import resource

        def child():
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            with suppress(Exception):
                inherited.rollback()

        with app.context():
            write("parent")
            inherited = session()
            before = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), before[1]))
            with suppress(OSError):
                while True:
                    os.dup(0)
            fork(child)
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            session.commit()
    """
    run(script, {"parent"})


@POSTGRESQL
def test_each_generation_goes_on_when_it_forks_another(run: Run) -> None:
    script = """
        def live(generation):
            if generation < 3:
                pid = server_pid()
                assert pid not in pids
                pids.append(pid)
                write(str(generation))
                fork(lambda: live(generation + 1))
                assert server_pid() == pid
                session.commit()

        pids = []
        with app.context():
            live(0)
    """
    run(script, {"0", "1", "2"})


@POSTGRESQL
def test_child_shares_no_engine_when_there_are_binds_and_replicas(run: Run) -> None:
    script = """
        app = SQLASessionMiddleware(lambda environ, start: [], URL, binds={"audit": URL}, replicas=[URL])

        def use(name):
            "Use each engine in one transaction, and return the servers' processes."
            write(f"{name}, default")
            insert = text(f"INSERT INTO {TABLE} VALUES ('{name}, audit')")
            session.execute(insert, bind_arguments={"bind": app.engines["audit"]})
            return pids()

        def pids():
            ask = text("SELECT pg_backend_pid()")
            return {session.scalar(ask, bind_arguments={"bind": engine}) for engine in app.engines.values()}

        def child():
            theirs = use("child")
            assert len(theirs) == 3
            assert not theirs & mine
            session.commit()

        with app.context():
            mine = use("parent")
            assert len(mine) == 3
            fork(child)
            assert pids() == mine
            session.commit()
    """
    run(script, {f"{who}, {engine}" for who in ("parent", "child") for engine in ("default", "audit")})


@POSTGRESQL
def test_child_waits_for_no_lock_that_a_thread_of_the_parent_has(run: Run) -> None:
    script = """
        Table(f"{TABLE}_created", schema.metadata, Column("name", String(20)))

        def child():
            app.init_database()
            app.drop_database()
            with app.context():
                write(name)
                session.commit()

        locks = {"sessions": sessions._opening, "engines": engines._creating, "schema": schema._creating}
        for name, lock in locks.items():
            with thread_in(lock):
                fork(child)
    """
    run(script, {"sessions", "engines", "schema"})


@POSTGRESQL
def test_child_connects_when_a_thread_of_the_parent_is_connecting_for_the_first_time(run: Run) -> None:
    """SQLAlchemy has a lock of its own for as long as that takes."""
    script = """
        connecting, go_on = threading.Event(), threading.Event()

        def take_long(driver_connection, record):
            if threading.current_thread() is not threading.main_thread():
                connecting.set()
                go_on.wait()

        def child():
            with app.context():
                write("child")
                session.commit()

        event.listen(app.engine, "connect", take_long)
        thread = threading.Thread(target=lambda: app.engine.connect().close())
        thread.start()
        connecting.wait()
        try:
            fork(child)
        finally:
            go_on.set()
            thread.join()
    """
    run(script, {"child"})


@POSTGRESQL
@pytest.mark.parametrize("use", ["session", "app.new_session()", "app.engine.connect()"])
def test_child_finds_out_by_itself_when_python_was_not_told_of_the_fork(run: Run, use: str) -> None:
    script = f"""
        def use():
            with app.context():
                used = {use}
                try:
                    return server_pid(used)
                finally:
                    used.close()

        def child():
            assert use() != mine

        mine = use()
        fork(child, "uWSGI")
        assert use() == mine
    """
    run(script, set(), in_uwsgi=True)


@POSTGRESQL
def test_no_thread_of_a_child_is_ahead_when_another_one_finds_out_about_the_fork(run: Run) -> None:
    script = """
        def use():
            with app.context():
                return server_pid()

        def child():
            finding_out, used = threading.Event(), threading.Event()
            pids = []

            @forks.after_fork
            def take_long():
                finding_out.set()
                used.wait(1)

            def follow():
                finding_out.wait()
                pids.append(use())
                used.set()

            thread = threading.Thread(target=follow)
            thread.start()
            pids.append(use())
            thread.join()
            assert mine not in pids, (mine, pids)

        mine = use()
        fork(child, "uWSGI")
        assert use() == mine
    """
    run(script, set(), in_uwsgi=True)


@POSTGRESQL
def test_request_is_committed_when_a_child_was_forked_in_it(run: Run) -> None:
    script = """
        def inner(environ, start):
            write("parent")
            mine = server_pid()

            def child():
                assert server_pid() != mine
                write("child")
                session.commit()

            fork(child)
            assert server_pid() == mine
            start("200 OK", [])
            return [b"done"]

        app = SQLASessionMiddleware(inner, URL, transaction=True)
        with closing(app({"REQUEST_METHOD": "POST"}, lambda *start: None)) as body:
            assert list(body) == [b"done"]
    """
    run(script, {"parent", "child"})


@POSTGRESQL
def test_responses_go_on_when_a_child_lets_go_of_them(run: Run) -> None:
    script = """
        def inner(environ, start):
            start("200 OK", [])
            write(environ["name"])
            yield b"1"
            session.commit()
            yield b"2"

        def child():
            global bodies, steps
            del bodies, steps
            gc.collect()

        app = SQLASessionMiddleware(inner, URL)
        bodies = [app({"REQUEST_METHOD": "GET", "name": name}, lambda *start: None) for name in ("first", "second")]
        steps = [iter(body) for body in bodies]
        assert [next(each) for each in steps] == [b"1", b"1"]
        fork(child)
        assert [list(each) for each in steps] == [[b"2"], [b"2"]]
        for body in bodies:
            body.close()
    """
    run(script, {"first", "second"})


def test_child_and_parent_each_go_on_when_the_database_is_in_memory() -> None:
    script = """
        def names():
            with app.context():
                return list(session.scalars(text(f"SELECT name FROM {TABLE} ORDER BY name")))

        def add(name):
            with app.context():
                write(name)
                session.commit()

        def child():
            assert names() == before
            add("child")
            assert names() == sorted([*before, "child"])

        with app.context():
            session.execute(text(f"CREATE TABLE {TABLE} (name VARCHAR(20))"))
        for how in ("sys.exit", "os._exit", "multiprocessing", "uWSGI"):
            before = names()
            fork(child, how)
            assert names() == before
            add(how)
        assert names() == ["multiprocessing", "os._exit", "sys.exit", "uWSGI"]
    """
    assert run_script("sqlite://", "names", script, in_uwsgi=True) == (0, "", "")


#: Much more than the few pages that may be in memory: most of what a transaction does is in the file before its COMMIT.
ROWS = 200


@pytest.mark.parametrize("then", ["lets go of", "ends"])
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_file_is_whole_when_children_were_forked_in_a_transaction(tmp_path: Path, mode: str, then: str) -> None:
    path = tmp_path / "test.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute("CREATE TABLE names (name VARCHAR(20), more BLOB)")
        connection.executemany("INSERT INTO names VALUES ('', randomblob(4000))", [()] * ROWS)
    script = f"""
        def child():
            global inherited
            if {then == "ends"}:
                for end in (inherited.rollback, inherited.close):
                    with suppress(Exception):
                        end()
            del inherited
            gc.collect()

        for how in ("sys.exit", "os._exit", "multiprocessing"):
            with app.context():
                session.execute(text("PRAGMA cache_size = 5"))
                session.execute(text("UPDATE names SET name = :how, more = randomblob(4000)"), {{"how": how}})
                inherited = session()
                fork(child, how)
                session.execute(text("INSERT INTO names VALUES (:how, randomblob(4000))"), {{"how": how}})
                session.commit()
                assert session.scalar(text("PRAGMA integrity_check")) == "ok"
    """
    assert run_script(f"sqlite:///{path}", "names", script) == (0, "", "")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA journal_mode").fetchall() == [(mode,)]
        found = connection.execute("SELECT name, count(*) FROM names GROUP BY name").fetchall()
    assert found == [("multiprocessing", ROWS + 3)]


@pytest.mark.parametrize("parent", ["keeps its connections", "disposes of them", "has ended"])
def test_no_commit_is_lost_when_children_were_forked_between_requests(tmp_path: Path, parent: str) -> None:
    """SQLite forgets who has a WAL when a child has a copy of what it knows, even of a connection that nobody uses."""
    path = tmp_path / "test.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("CREATE TABLE names (name VARCHAR(20) PRIMARY KEY)")
    script = f"""
        import sqlite3

        def add(name):
            with app.context():
                write(name)
                session.commit()

        def visit(name):
            "Another process, which is the last to close the file as far as it knows."
            command = "import sqlite3, sys; it = sqlite3.connect(sys.argv[1]);"
            command += f"it.execute('INSERT INTO names VALUES (?)', sys.argv[2:]); it.commit(); it.close()"
            assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", command, {str(path)!r}, name) == 0

        add("parent")
        told, tell = os.pipe()
        done, finish = os.pipe()
        child = os.fork()
        if not child:
            signal.alarm({PATIENCE})
            os.read(told, 1)
            for number in range(3):
                add(f"child {{number}}")
                visit(f"visitor {{number}}")
            os.write(finish, b"x")
            os._exit(0)
        if {parent != "keeps its connections"}:
            app.dispose()
        os.write(tell, b"x")
        if {parent == "has ended"}:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        add("parent again")
    """
    assert run_script(f"sqlite:///{path}", "names", script) == (0, "", "")
    expected = {"parent", *(f"{who} {number}" for who in ("child", "visitor") for number in range(3))}
    if parent != "has ended":
        expected.add("parent again")
    with closing(sqlite3.connect(path)) as connection:
        assert {name for (name,) in connection.execute("SELECT name FROM names")} == expected
