"""What a driver's connection says of its transaction, where the other tests do not see it."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import DBAPIError

from sqlasession_middleware import SQLASessionMiddleware, release, session
from sqlasession_middleware.drivers import has_open_cursor, has_written, is_aborted, written_position

from .conftest import SERVERS
from .test_unavailable import kill


def test_connection_that_is_closed_has_nothing_to_keep(database_url: str) -> None:
    engine = create_engine(database_url)
    connection = engine.connect()
    connection.close()
    assert not is_aborted(connection)
    assert not has_written(connection)
    assert not has_open_cursor(connection)
    engine.dispose()


def test_transaction_ends_when_its_connection_was_lost_and_the_application_went_on(server_url: str) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], server_url)
    with app.context():
        session.execute(select(1))
        kill(server_url)
        with pytest.raises(DBAPIError):
            session.execute(select(1))
        assert release() is True
        assert session.scalar(select(2)) == 2
    assert app.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    app.dispose()


def test_error_passes_when_the_connection_was_lost_unnoticed(server_url: str) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], server_url)
    with app.context():
        session.execute(select(1))
        kill(server_url)
        try:
            release()
        except DBAPIError as error:
            assert error.connection_invalidated  # noqa: PT017  # It may pass unnoticed as well: by then it is over.
        session.rollback()
        assert session.scalar(select(2)) == 2
    assert app.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    app.dispose()


def test_position_that_nobody_tells_any_more(server_url: str) -> None:
    """What was committed stays so, whatever becomes of the connection."""
    app = SQLASessionMiddleware(lambda environ, start: [], server_url)
    with app.context():
        session.execute(select(1))
        kill(server_url)
        assert written_position(session.connection()) is None
    app.dispose()


class Fake:
    """As much of a Connection as is asked for."""

    closed = invalidated = False

    def __init__(self, name: str, driver: str, driver_connection: Any) -> None:
        self.dialect = type("Dialect", (), {"name": name, "driver": driver})
        self.connection = type("Fairy", (), {"dbapi_connection": driver_connection})


MYSQL = ["mysql+pymysql", "mysql+mysqldb", "mariadb+mariadbconnector"]


@pytest.mark.parametrize("driver", MYSQL)
@pytest.mark.parametrize("options", [{"stream_results": True}, {"yield_per": 1}])
def test_connection_is_kept_until_the_last_row_whatever_the_driver(driver: str, options: Any) -> None:
    pytest.importorskip({"mysqldb": "MySQLdb", "mariadbconnector": "mariadb"}.get(driver.partition("+")[2], "pymysql"))
    app = SQLASessionMiddleware(lambda environ, start: [], SERVERS["mariadb"].replace("mariadb+pymysql", driver))
    try:
        app.engine.connect().close()
    except DBAPIError:
        pytest.skip("MariaDB is not reachable")
    with app.context():
        rows = session.execute(text("SELECT 1 UNION SELECT 2 UNION SELECT 3"), execution_options=options)
        next(rows)
        assert release() is False
        assert len(rows.all()) == 2
        assert release() is True
        rows = session.execute(text("SELECT 1 UNION SELECT 2"), execution_options=options)
        next(rows)
        assert release() is False
        rows.close()
        assert release() is True
        assert session.scalar(select(1)) == 1
    app.dispose()


def test_database_that_cannot_be_asked_may_have_written() -> None:
    assert has_written(Fake("oracle", "oracledb", None))  # type: ignore[arg-type]
    assert not has_open_cursor(Fake("oracle", "oracledb", None))  # type: ignore[arg-type]
    yugabyte = type("Connection", (), {})()
    yugabyte.info = type(
        "Info", (), {"parameter_status": staticmethod(lambda name: "11.2-YB-2.20.0"), "transaction_status": 2}
    )
    assert has_written(Fake("postgresql", "psycopg2", yugabyte))  # type: ignore[arg-type]
    assert has_written(Fake("postgresql", "pg8000", object()))  # type: ignore[arg-type]
