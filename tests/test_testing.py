"""What the library has for the tests of applications."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import suppress
from textwrap import dedent

import pytest
from sqlalchemy import Integer, MetaData, String, create_engine, event, func, insert, make_url, select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.testing import assert_queries, isolated, no_leaks

from .conftest import DATABASES_SEEN

pytest_plugins = ["pytester"]

metadata = MetaData()


class Base(DeclarativeBase):
    metadata = metadata


class Guest(Base):
    __tablename__ = "testing_guest"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(20), unique=True)


def commits(environ, start_response):
    session.add(Guest(name=environ["PATH_INFO"].strip("/")))
    session.commit()
    return respond(environ, start_response)


def commits_by_the_middleware(environ, start_response):
    session.add(Guest(name=environ["PATH_INFO"].strip("/")))
    session.flush()
    return respond(environ, start_response)


def respond(environ, start_response):
    start_response(environ["QUERY_STRING"] or "200 OK", [("Content-Type", "text/plain")])
    return [b"%d" % session.scalar(select(func.count(Guest.id)))]


APPLICATIONS = {
    "by itself": (commits, {}),
    "with a transaction": (commits_by_the_middleware, {"transaction": True}),
    "with attempts": (commits_by_the_middleware, {"transaction": {"attempts": 3}}),
}


@pytest.fixture(params=APPLICATIONS)
def app(request, database_url) -> Iterator[SQLASessionMiddleware]:
    inner, options = APPLICATIONS[request.param]
    app = SQLASessionMiddleware(inner, database_url, metadata=metadata, **options)
    app.drop_database()
    app.init_database()
    yield app
    assert app.engine.pool.checkedout() == 0
    app.drop_database()
    app.dispose()


def count(app) -> int:
    with app.context():
        return session.scalar(select(func.count(Guest.id)))


def test_what_was_committed_is_seen_and_gone_at_the_end(app):
    client = Client(app)
    for _ in range(2):
        with isolated(app):
            assert client.get("/Ada", buffered=True).text == "1"
            assert client.get("/Grace", buffered=True).text == "2"
            assert count(app) == 2
            with app.engine.connect() as connection:  # Outside.
                assert connection.execute(select(func.count(Guest.id))).scalar_one() == 0
        assert count(app) == 0
    assert client.get("/Ada", buffered=True).text == "1"


def test_what_a_request_rolls_back_is_gone_and_the_rest_stays(app):
    client = Client(app)
    with isolated(app):
        client.get("/Ada", buffered=True)
        with pytest.raises(IntegrityError):
            client.get("/Ada", buffered=True)
        assert count(app) == 1
        with app.context():
            session.add(Guest(name="Grace"))
            session.flush()
        assert count(app) == 1
        with app.context(), session.begin_nested():
            session.add(Guest(name="Grace"))
            session.commit()
    assert count(app) == 0


def test_isolation_may_be_nested(app):
    """As where a class or module stores something for all of its tests, each of which is isolated as well."""
    client = Client(app)
    with isolated(app):
        assert client.get("/Ada", buffered=True).text == "1"
        for _ in range(2):
            with isolated(app):
                assert client.get("/Grace", buffered=True).text == "2"
                with isolated(app):
                    assert client.get("/Bea", buffered=True).text == "3"
                assert count(app) == 2
            assert count(app) == 1
    for _ in range(2):
        with isolated(app), isolated(app):
            assert client.get("/Grace", buffered=True).text == "1"
    assert count(app) == 0


def test_isolation_may_be_nested_where_the_engine_is_chosen_by_hand(app):
    def count_by_hand() -> int:
        with app.context():
            connection = session.connection(bind_arguments={"bind": app.engine})
            return connection.scalar(select(func.count(Guest.id)))

    with isolated(app):
        Client(app).get("/Ada", buffered=True)
        with isolated(app):
            assert count_by_hand() == 1
            Client(app).get("/Grace", buffered=True)
            assert count_by_hand() == 2
        assert count_by_hand() == 1
    assert count(app) == 0


def test_session_class_of_the_application(tmp_path):
    """It chooses its engine as always, and its events are heard, those too that are listened to later."""
    other = create_engine(f"sqlite:///{tmp_path}/other.db")
    metadata.create_all(other)

    class OwnSession(Session):
        def get_bind(self, *arguments, **options):
            super().get_bind(*arguments, **options)
            return other

        def connection(self, bind_arguments=None, execution_options=None):
            heard.append("connection")
            return super().connection(bind_arguments, execution_options)

    heard = []
    event.listen(OwnSession, "before_commit", lambda each: heard.append("before_commit"))
    app = SQLASessionMiddleware(commits, f"sqlite:///{tmp_path}/app.db", session_options={"class_": OwnSession})
    with isolated(app):
        event.listen(OwnSession, "after_commit", lambda each: heard.append("after_commit"))
        assert Client(app).get("/Ada", buffered=True).text == "1"
        with app.new_session() as opened:
            assert opened.connection().engine is other
            assert isinstance(opened, OwnSession)
            assert type(opened).__name__ == "OwnSession"
    assert heard == ["before_commit", "after_commit", "connection"]
    with other.connect() as connection:
        assert connection.scalar(select(func.count(Guest.id))) == 0
    app.dispose()
    other.dispose()


def test_veto_inside_of_isolation(database_url):
    app = SQLASessionMiddleware(commits_by_the_middleware, database_url, metadata=metadata, transaction=True)
    app.drop_database()
    app.init_database()
    with isolated(app):
        assert Client(app).get("/Ada?400 Bad Request", buffered=True).status_code == 400
        assert count(app) == 0
    app.drop_database()
    app.dispose()


def test_failing_test_leaves_nothing(app):
    def fail() -> None:
        with isolated(app):
            Client(app).get("/Ada", buffered=True)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert count(app) == 0


def test_binds_and_replicas(tmp_path):
    far = MetaData(info={"bind_key": "far"})

    class Far(DeclarativeBase):
        metadata = far

    class Star(Far):
        __tablename__ = "star"
        id: Mapped[int] = mapped_column(primary_key=True)

    def inner(environ, start_response):
        if environ["REQUEST_METHOD"] == "POST":
            session.add(Guest(name="Ada"))
            # By the engine itself, too.
            session.connection(bind_arguments={"bind": app.engines["far"]}).execute(insert(Star).values(id=1))
            session.commit()
        start_response("200 OK", [])
        return [f"{len(session.scalars(select(Guest)).all())} {len(session.scalars(select(Star)).all())}".encode()]

    app = SQLASessionMiddleware(
        inner, f"sqlite:///{tmp_path}/a.db", binds={"far": "sqlite://"}, replicas=[f"sqlite:///{tmp_path}/b.db"],
        metadata=[metadata, far],
    )  # fmt: skip
    app.init_database()
    with isolated(app):
        assert Client(app).post("/", buffered=True).text == "1 1"
        reading = Client(app, use_cookies=False).get("/", buffered=True)
        assert (reading.text, reading.headers.get("Set-Cookie")) == ("1 1", None)
    # Nobody has asked the replica, whose table is not there.
    assert not os.path.exists(tmp_path / "b.db")
    assert Client(app).post("/", buffered=True).text == "1 1"
    app.dispose()


def test_applications_on_one_engine_share_its_transaction(sqlite_engine):
    metadata.create_all(sqlite_engine)
    one, two = (SQLASessionMiddleware(commits, sqlite_engine) for _ in range(2))
    with isolated(one, two):
        Client(one).get("/Ada", buffered=True)
        assert count(two) == 1
    assert count(one) == 0
    new_session = one.new_session
    with isolated(one), isolated(two):
        pass
    assert one.new_session is new_session


def serializable(environ, start_response):
    session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    return commits(environ, start_response)


#: What an application may have that goes against one transaction for all.
CONTRARY = {
    "two phases": (commits, {"session_options": {"twophase": True}}),
    "a level of its own": (serializable, {}),
    "autocommit": (commits, {"engine_options": {"isolation_level": "AUTOCOMMIT"}}),
}
if "execution_options" in inspect.signature(Session).parameters:  # since SQLAlchemy 2.1
    levels = {"execution_options": {"isolation_level": "SERIALIZABLE"}}
    CONTRARY["a level of its sessions"] = (commits, {"session_options": levels})


@pytest.mark.parametrize("name", CONTRARY)
def test_is_isolated_in_spite_of(database_url, name):
    inner, options = CONTRARY[name]
    app = SQLASessionMiddleware(inner, database_url, metadata=metadata, **options)
    app.drop_database()
    app.init_database()
    with isolated(app):
        assert Client(app).get("/Ada", buffered=True).text == "1"
        assert Client(app).get("/Grace", buffered=True).text == "2"
    with app.engine.connect() as connection:
        assert connection.scalar(select(func.count(Guest.id))) == 0
    app.drop_database()
    app.dispose()


def test_sqlite_whose_transactions_nobody_begins(sqlite_url):
    options = {"connect_args": {"isolation_level": None}}
    app = SQLASessionMiddleware(commits, sqlite_url, metadata=metadata, engine_options=options)
    app.init_database()
    with isolated(app):
        assert Client(app).get("/Ada", buffered=True).text == "1"
    assert count(app) == 0
    app.dispose()


def test_isolation_that_begins_in_a_test_for_leaks_is_none(app):
    with isolated(app):
        with no_leaks():
            Client(app).get("/Ada", buffered=True)
        kept = []
        with pytest.raises(AssertionError, match=r"^1 connections"), no_leaks():
            kept.append(app.engine.connect())
        kept.pop().close()


def test_database_that_is_down_is_unavailable_inside_of_isolation(server_url):
    """Also where the application has made a page of the error: it is the scope that knows."""

    def inner(environ, start_response):
        with suppress(OperationalError):
            session.execute(text("SELECT 1"))
        start_response("500 Internal Server Error", [])
        return [b""]

    app = SQLASessionMiddleware(inner, make_url(server_url).set(port=1), unavailable=True)
    with isolated(app):
        assert Client(app).get("/", buffered=True).status_code == 503
    app.dispose()


def test_assert_queries(sqlite_engine):
    with assert_queries(2) as statements, sqlite_engine.begin() as connection:
        connection.execute(text("SELECT 1"))
        connection.execute(text("SELECT 2"))
    assert statements == ["SELECT 1", "SELECT 2"]
    with assert_queries(0):
        pass


def test_assert_queries_does_not_count_what_a_transaction_needs(database_url):
    """Neither by itself nor where a replica's transaction is ended."""

    replicas = [database_url]
    app = SQLASessionMiddleware(respond, database_url, metadata=metadata, transaction=True, replicas=replicas)
    app.drop_database()
    app.init_database()
    with assert_queries(1):
        Client(app).get("/", buffered=True)
    app.drop_database()
    app.dispose()


def test_assert_queries_does_not_count_two_phases():
    """MariaDB's, which every server of it admits."""
    app = SQLASessionMiddleware(
        commits, DATABASES_SEEN.url("mariadb", ""), metadata=metadata, session_options={"twophase": True}
    )
    app.drop_database()
    app.init_database()
    with assert_queries(2):
        Client(app).get("/Ada", buffered=True)
    app.drop_database()
    app.dispose()


@pytest.mark.parametrize("statement", ["BEGIN", "BEGIN IMMEDIATE", "rollback"])
def test_assert_queries_does_not_count_who_begins_by_hand(sqlite_url, statement):
    engine = create_engine(sqlite_url, isolation_level="AUTOCOMMIT")
    with assert_queries(1), engine.connect() as connection:
        if statement == "rollback":
            connection.connection.dbapi_connection.execute("BEGIN")
        connection.execute(text(statement))
        connection.execute(text("SELECT 1"))
    engine.dispose()


def ask(engine, expected: int, *statements: str) -> None:
    with assert_queries(expected), engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))


def test_assert_queries_shows_the_statements(sqlite_engine):
    with pytest.raises(AssertionError, match=r"^expected 1 statements, but 2 were sent:\n1. SELECT 1\n2. SELECT 2$"):
        ask(sqlite_engine, 1, "SELECT 1", "SELECT 2")
    with pytest.raises(AssertionError, match=r"but 0 were sent: none$"):
        ask(sqlite_engine, 1)
    with pytest.raises(ZeroDivisionError), assert_queries(1):
        raise ZeroDivisionError


def test_leak_is_shown_where_it_was_taken(sqlite_engine):
    kept = []

    def take() -> None:
        kept.append(sqlite_engine.connect())

    said = r"1 connections were checked out and not returned(.|\n)*in take"
    with pytest.raises(AssertionError, match=said) as caught, no_leaks():
        take()
    assert "sqlalchemy/pool" not in str(caught.value)
    kept.pop().close()
    with no_leaks():
        sqlite_engine.connect().close()
        connection = sqlite_engine.connect()
        connection.detach()
    connection.close()


def test_plugin(pytester, tmp_path):
    pytester.makeini("[pytest]\nsqlasession_leaks = true\n")
    pytester.makeconftest(
        dedent(f"""
        import pytest
        from sqlalchemy import Column, Integer, MetaData, Table
        from sqlasession_middleware import SQLASessionMiddleware

        metadata = MetaData()
        things = Table("thing", metadata, Column("id", Integer, primary_key=True))

        @pytest.fixture
        def sqlasession_app():
            app = SQLASessionMiddleware(lambda environ, start: [], "sqlite:///{tmp_path}/plugin.db", metadata=metadata)
            app.init_database()
            yield app
            app.dispose()
    """)
    )
    pytester.makepyfile(
        dedent("""
        from sqlalchemy import text
        from sqlasession_middleware import session

        def store(app):
            with app.context():
                session.execute(text("INSERT INTO thing VALUES (1)"))
                session.commit()

        def test_one(isolated_app, assert_queries):
            with assert_queries(1):
                store(isolated_app)

        def test_two(isolated_app):
            store(isolated_app)

        def test_leak(sqlasession_app):
            global kept
            kept = sqlasession_app.engine.connect()

        def test_end():
            kept.invalidate()
            kept.close()
    """)
    )
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    done.assert_outcomes(passed=4, errors=1)
    done.stdout.fnmatch_lines(["*1 connections were checked out and not returned*", "*in test_leak*"])


def test_plugin_without_an_application(pytester):
    pytester.makepyfile("def test_it(isolated_app): pass")
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    done.stdout.fnmatch_lines(["*define a fixture 'sqlasession_app'*"])


def test_given_bind_is_left_alone(sqlite_engine):
    other = create_engine("sqlite://")
    app = SQLASessionMiddleware(commits, sqlite_engine)
    with isolated(app), app.context(), other.connect() as connection, app.new_session(bind=connection) as opened:
        assert opened.get_bind() is connection
    other.dispose()
