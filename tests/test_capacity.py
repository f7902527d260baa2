"""The capacity report, and the command that compares it with what the servers admit."""

from __future__ import annotations

import pytest
from sqlalchemy import NullPool, StaticPool, create_engine

from sqlasession_middleware import SQLASessionMiddleware
from sqlasession_middleware.capacity import servers_of
from sqlasession_middleware.errors import ConfigurationError


def nothing(environ, start_response):
    start_response("204 No Content", [])
    return []


#: Options of an engine, and what 3 processes of 8 threads open: each process, all of them, and threads that wait.
POOLS = {
    "default": ({}, (15, 45, 0)),
    "small": ({"pool_size": 2, "max_overflow": 1}, (3, 9, 5)),
    "no overflow": ({"pool_size": 8, "max_overflow": 0}, (8, 24, 0)),
    "overflow without a limit": ({"max_overflow": -1}, (None, 24, 0)),
    "size without a limit": ({"pool_size": 0}, (None, 24, 0)),
    "no pool": ({"poolclass": NullPool}, (None, 24, 0)),
    "one connection": ({"poolclass": StaticPool}, (1, 3, 7)),
}


@pytest.mark.parametrize("name", POOLS)
def test_capacity(name, tmp_path):
    options, expected = POOLS[name]
    app = SQLASessionMiddleware(nothing, f"sqlite:///{tmp_path}/shop.db", engine_options=options)
    (each,) = app.capacity(processes=3, threads=8)
    assert (each.each, each.total, each.waiting) == expected
    assert each.name == "default"
    assert each.server == f"sqlite:///{tmp_path}/shop.db"


def test_every_engine_counts_and_no_password_shows():
    app = SQLASessionMiddleware(
        nothing,
        "postgresql+psycopg://shop:secret@one:5433/shop?sslpassword=secret",
        binds={"audit": {"url": "mariadb+pymysql://shop:secret@two/audit", "pool_size": 1, "max_overflow": 0}},
        replicas=["postgresql+psycopg://shop:secret@/shop?host=three:1&host=four:2&password=secret"],
    )
    capacity = app.capacity(processes=2)
    assert [(each.name, each.server, each.total) for each in capacity] == [
        ("default", "postgresql+psycopg://one:5433/shop", 30),
        ("audit", "mariadb+pymysql://two/audit", 2),
        ("replicas[0]", "postgresql+psycopg://three:1,four:2/shop", 30),
    ]
    assert capacity.total == 62
    assert "secret" not in str(capacity)
    assert str(capacity).splitlines()[2].split() == ["audit", "mariadb+pymysql://two/audit", "1", "2", "0"]


def test_engine_with_several_names_counts_once(sqlite_engine):
    app = SQLASessionMiddleware(nothing, sqlite_engine, binds={"audit": sqlite_engine})
    assert [each.total for each in app.capacity()] == [15, 15]
    assert app.capacity().total == 15


@pytest.mark.parametrize("numbers", [{"processes": 0}, {"threads": -1}, {"threads": "4"}, {"processes": True}])
def test_numbers_that_are_none(numbers):
    app = SQLASessionMiddleware(nothing, "sqlite://")
    with pytest.raises(ConfigurationError, match=f"{next(iter(numbers))} must be a whole number from 1"):
        app.capacity(**numbers)


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("postgresql+psycopg://u:p@h:5432/a", ["postgresql://h:5432"]),
        ("postgresql+psycopg://u:p@h/a", ["postgresql://h:5432"]),
        ("postgresql+psycopg:///a", ["postgresql://"]),
        ("mariadb+pymysql://u:p@h/a", ["mysql://h:3306"]),
        ("mysql+pymysql://u:p@h:3306/b", ["mysql://h:3306"]),
        ("postgresql+psycopg2://u:p@h:5432/b", ["postgresql://h:5432"]),
        ("postgresql+psycopg://u:p@/a?host=one:1&host=two:2", ["postgresql://one:1", "postgresql://two:2"]),
        ("postgresql+psycopg://u:p@/a?host=one,two&port=1,2", ["postgresql://one:1", "postgresql://two:2"]),
        ("postgresql+psycopg://u:p@/a?host=one&host=two", ["postgresql://one:5432", "postgresql://two:5432"]),
        ("sqlite:////tmp/a.db", ["sqlite:////tmp/a.db"]),
    ],
)
def test_engines_of_one_server(url, servers):
    assert list(servers_of(create_engine(url))) == servers
