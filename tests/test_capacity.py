"""The capacity report, and the command that compares it with what the servers admit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import NullPool, StaticPool, create_engine, make_url, text

from sqlasession_middleware import SQLASessionMiddleware
from sqlasession_middleware.capacity import server_of
from sqlasession_middleware.cli import main
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


@pytest.mark.parametrize("numbers", [{"processes": 0}, {"threads": -1}, {"threads": "4"}, {"processes": True}])
def test_numbers_that_are_none(numbers):
    app = SQLASessionMiddleware(nothing, "sqlite://")
    with pytest.raises(ConfigurationError, match=f"{next(iter(numbers))} must be a whole number from 1"):
        app.capacity(**numbers)


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("postgresql+psycopg://u:p@h:5432/a", "postgresql://h:5432"),
        ("postgresql+psycopg2://u:p@h:5432/b", "postgresql://h:5432"),
        ("postgresql+psycopg://u:p@/a?host=one:1&host=two:2", "postgresql://one:1,two:2"),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
    ],
)
def test_engines_of_one_server(url, server):
    assert server_of(create_engine(url)) == server


@pytest.fixture
def ini(tmp_path):
    """Writes an ini file: settings of the middleware, and what else is to be in it."""

    def write(settings: dict[str, object], more: str = "") -> str:
        path = tmp_path / "shop.ini"
        lines = [f"{key} = {value}" for key, value in settings.items()]
        path.write_text(
            "[app:shop]\npaste.app_factory = tests.paste_apps:guest_book\n\n[filter-app:main]\n"
            "paste.filter_app_factory = sqlasession_middleware.paste:main\nnext = shop\n"
            + "\n".join(lines)
            + "\n"
            + more
        )
        return str(path)

    return write


def check(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["check", *arguments])


def test_check(ini, tmp_path):
    done = check(ini({"sqlalchemy.url": "sqlite:///shop.db", "sqlalchemy.binds.audit.url": "sqlite://"}))
    assert done.exit_code == 0, done.output
    head, titles, default, audit = done.stdout.splitlines()
    assert head == f"{tmp_path}/shop.ini: 1 process of 1 thread"
    assert titles.split() == ["engine", "server", "each", "process", "in", "all", "waiting", "threads", "ping"]
    assert default.split()[:2] == ["default", f"sqlite:///{tmp_path}/shop.db"]
    assert default.endswith(" ms")
    assert audit.startswith("audit")


def test_check_compares_with_what_the_server_admits(ini, server_url):
    engine = create_engine(server_url)
    with engine.connect() as connection:
        asked = "SHOW max_connections" if engine.dialect.name == "postgresql" else "SELECT @@max_connections"
        admitted = int(connection.execute(text(asked)).scalar_one())
    engine.dispose()
    url = make_url(server_url).render_as_string(hide_password=False).replace("%", "%%")
    path = ini({"sqlalchemy.url": url, "sqlalchemy.pool_size": 4, "sqlalchemy.max_overflow": 0,
                "sqlalchemy.binds.same.url": url, "sqlalchemy.binds.same.pool_size": 1,
                "sqlalchemy.binds.same.max_overflow": 0})  # fmt: skip
    assert check(path, "--processes", "2").exit_code == 0
    assert f"up to 10 connections; max_connections is {admitted}" in check(path, "--processes", "2").stdout
    too_many = check(path, "--processes", str(admitted))
    assert too_many.exit_code == 1
    assert f"error: {server_of(engine)}: up to {5 * admitted} connections" in too_many.stderr


def test_check_of_what_is_out_of_reach(ini):
    path = ini({
        "sqlalchemy.url": "sqlite://",
        "sqlalchemy.replicas": "postgresql+psycopg://shop:secret@127.0.0.1:1/shop?sslpassword=secret",
        "sqlalchemy.binds.audit.url": "mariadb+pymysql://shop:secret@127.0.0.1:1/shop",
    })  # fmt: skip
    done = check(path)
    assert done.exit_code == 1
    assert done.stdout.count("no answer") == 2
    assert "error: replicas[0] (postgresql+psycopg://127.0.0.1:1/shop) does not answer: " in done.stderr
    assert "error: audit (mariadb+pymysql://127.0.0.1:1/shop) does not answer: " in done.stderr
    assert "secret" not in done.output


#: The [server:main] of an ini, options of the command, and what it takes from them.
SERVERS = {
    "waitress": ("use = egg:waitress#main\nthreads = 7", [], "1 process of 7 threads"),
    "waitress by default": ("use = egg:waitress#main", [], "1 process of 4 threads"),
    "gunicorn": ("use = egg:gunicorn#main\nworkers = 3\nthreads = 2", [], "3 processes of 2 threads"),
    "options first": (
        "use = egg:gunicorn#main\nworkers = 3",
        ["--processes", "5", "--threads", "1"],
        "5 processes of 1 t",
    ),
    "not a number": ("use = egg:gunicorn#main\nworkers = %(many)s", [], "1 process of 1 thread"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_check_takes_processes_and_threads_from_the_ini(ini, name):
    server, options, said = SERVERS[name]
    done = check(ini({"sqlalchemy.url": "sqlite://"}, f"\n[server:main]\n{server}\n"), *options)
    assert done.exit_code == 0, done.output
    assert said in done.stdout


def test_check_of_several_applications_and_of_one_by_name(ini):
    more = (
        "\n[filter-app:other]\npaste.filter_app_factory = sqlasession_middleware.paste:main\nnext = shop\n"
        "sqlalchemy.url = sqlite://\n\n[composite:both]\nuse = egg:Paste#urlmap\n/ = main\n/other = other\n"
    )
    path = ini({"sqlalchemy.url": "sqlite:///shop.db"}, more)
    both = check(f"{path}#both")
    assert both.exit_code == 0, both.output
    assert "application 1 of 2: <SQLASessionMiddleware of" in both.stdout
    assert "shop.db" in both.stdout
    assert "shop.db" not in check(f"{path}#other").stdout


#: What cannot be checked, and what is said of it.
REFUSED = {
    "no file": (lambda ini: "/nowhere/shop.ini", "error: there is no file '/nowhere/shop.ini'."),
    "no ini": (lambda ini: __file__, f"error: {__file__} is no ini file: "),
    "no such application": (
        lambda ini: ini({"sqlalchemy.url": "sqlite://"}) + "#lost",
        "cannot be loaded: LookupError",
    ),
    "wrong setting": (
        lambda ini: ini({"sqlalchemy.ulr": "sqlite://"}),
        "cannot be loaded: ConfigurationError: 'sqlalc",
    ),
    "no middleware": (
        lambda ini: ini({"sqlalchemy.url": "sqlite://"}) + "#shop",
        "error: no 'use = egg:sqlasession_mid",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_check_refuses(ini, name):
    path, said = REFUSED[name]
    done = check(path(ini))
    assert done.exit_code == 2
    assert said in done.stderr


def test_command_is_installed():
    command = Path(sys.executable).parent / "sqlasession"
    done = subprocess.run([command, "check", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Ping every engine" in done.stdout


def test_command_without_what_it_needs():
    script = "import sys; sys.modules['click'] = None; import sqlasession_middleware.cli"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "sqlasession needs click: pip install 'sqlasession_middleware[cli]'"
