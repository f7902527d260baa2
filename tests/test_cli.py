"""The command: exit codes and messages that a script can rely on."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import click
import pytest
from click.testing import CliRunner, Result
from paste.deploy import loadapp
from sqlalchemy import URL, NullPool, create_engine, inspect, make_url, text
from sqlalchemy.exc import DBAPIError
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._command import requests, survey, wait
from sqlasession_middleware._command.server import Workers
from sqlasession_middleware.capacity import MAX_CONNECTIONS, Limit, servers_of
from sqlasession_middleware.cli import main

from .conftest import DATABASES_SEEN
from .conftest import SERVERS as SERVERS_SEEN
from .integration.proxy import Proxy
from .integration.servers import PATIENCE


@pytest.fixture(autouse=True)
def plain_shell(monkeypatch):
    """Python's own, whatever is installed: IPython writes to the terminal, and reads what it likes."""
    monkeypatch.setitem(sys.modules, "IPython", None)


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


def command(*arguments: str, said: str = "") -> Result:
    return CliRunner().invoke(main, list(arguments), input=said)


def check(*arguments: str) -> Result:
    return command("check", *arguments)


def test_check(ini, tmp_path):
    done = check(ini({"sqlalchemy.url": "sqlite:///shop.db", "sqlalchemy.binds.audit.url": "sqlite://"}))
    assert done.exit_code == 0, done.output
    head, titles, default, audit = done.stdout.splitlines()
    assert head == f"{tmp_path}/shop.ini: 1 process of 1 thread"
    assert titles.split() == ["engine", "server", "each", "process", "in", "all", "waiting", "threads", "ping"]
    assert default.split()[:2] == ["default", f"sqlite:///{tmp_path}/shop.db"]
    assert default.endswith(" ms")
    assert audit.startswith("audit")


#: An application with the inspector.
INSPECTED = """
[filter-app:inspected]
use = egg:sqlasession_middleware#inspector
path = /seen
next = main
"""


def test_check_refuses_the_inspector_outside_of_development(ini):
    path = ini({"sqlalchemy.url": "sqlite://"}, INSPECTED)
    refused = check(f"{path}#inspected")
    assert refused.exit_code == 1
    complaint = f"the inspector is on, at /seen: take it out of {path}, or give --development if nobody else uses it."
    assert f"error: {complaint}\n" in refused.stderr
    assert check(f"{path}#inspected", "--development").exit_code == 0
    assert check(path).exit_code == 0


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
    assert f"error: {servers_of(engine)[0]}: up to {5 * admitted} connections" in too_many.stderr


def test_check_counts_for_each_host_that_a_url_names(ini):
    """After a failover all connections are to one of them."""
    url = make_url(DATABASES_SEEN.url("postgresql", ""))
    server = f"{url.host}:{url.port or 5432}"
    both = URL.create(url.drivername, url.username, url.password, database=url.database,
                      query={"host": (server, "127.0.0.1:1")})  # fmt: skip
    path = ini({"sqlalchemy.url": both.render_as_string(False).replace("%", "%%"),
                "sqlalchemy.replicas": url.render_as_string(False).replace("%", "%%"),
                "sqlalchemy.pool_size": 2, "sqlalchemy.max_overflow": 1})  # fmt: skip
    done = check(path)
    assert done.exit_code == 0, done.output
    assert f"\npostgresql://{server}: up to 6 connections; max_connections is " in done.stdout
    assert "\npostgresql://127.0.0.1:1: up to 3 connections; max_connections is " in done.stdout


def test_survey_counts_an_engine_with_several_names_once(server_url):
    engine = create_engine(server_url, pool_size=3, max_overflow=0)
    app = SQLASessionMiddleware(lambda environ, start_response: [], engine, binds={"same": engine})
    made = survey.make_survey([app], Workers(processes=2, threads=1))
    engine.dispose()
    assert [each.capacity.name for each in made.applications[0].engines] == ["default", "same"]
    assert [each.connections for each in made.demands if each.limit.name == MAX_CONNECTIONS] == [6]
    assert not made.has_problems


@pytest.mark.parametrize("order", ["one first", "several first"])
def test_survey_believes_a_url_with_one_host_about_its_limit(order):
    """Whichever of several hosts has answered, the limit may be another one's."""
    known, guessed = Limit(MAX_CONNECTIONS, 10), Limit(MAX_CONNECTIONS, 99)
    added = [("a", known), ("b,a", guessed)]
    demands = survey.Demands()
    for hosts, limit in added if order == "one first" else reversed(added):
        demands.add(create_engine(f"postgresql+psycopg:///shop?host={hosts}"), 5, [limit])
    assert {each.server: (each.connections, each.limit) for each in demands} == {
        "postgresql://a:5432": (10, known),
        "postgresql://b:5432": (5, guessed),
    }


#: Two runs at the same time do not share it.
ACCOUNT = f"sqlasession_{os.getpid()}"
#: What gives an account two connections, what takes it away again, and what the limit is called.
ACCOUNTS = {
    "postgresql": (
        f"CREATE ROLE {ACCOUNT} LOGIN CONNECTION LIMIT 2 PASSWORD 'limited'",
        f"DROP ROLE IF EXISTS {ACCOUNT}",
        f"CONNECTION LIMIT of the role {ACCOUNT}",
    ),
    "mariadb": (
        f"CREATE USER {ACCOUNT} IDENTIFIED BY 'limited' WITH MAX_USER_CONNECTIONS 2",
        f"DROP USER IF EXISTS {ACCOUNT}",
        f"max_user_connections of {ACCOUNT}@%",
    ),
}


@pytest.mark.parametrize("name", ACCOUNTS)
def test_check_knows_the_limit_of_an_account(ini, name):
    url = make_url(DATABASES_SEEN.url(name, ""))
    create, drop, limit = ACCOUNTS[name]
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in (drop, create):
            connection.exec_driver_sql(statement)
    account = {"username": ACCOUNT, "password": "limited"}
    database = url.database if name == "postgresql" else None  # It may use no database of MariaDB's.
    limited = URL.create(url.drivername, host=url.host, port=url.port, database=database, **account)
    try:
        done = check(ini({"sqlalchemy.url": limited.render_as_string(False), "sqlalchemy.pool_size": 2,
                          "sqlalchemy.max_overflow": 0}), "--processes", "2")  # fmt: skip
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(drop)
    assert done.exit_code == 1
    assert f"up to 4 connections; {limit} is 2. Lower" in done.stderr
    assert "max_connections is" in done.stdout


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_check_does_not_wait_for_a_server_that_says_nothing(ini, monkeypatch, driver):
    monkeypatch.setattr(survey, "PING_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        backend = "postgresql" if driver == "psycopg" else "mariadb"
        url = f"{backend}+{driver}://shop@127.0.0.1:{silent.getsockname()[1]}/shop"
        done = check(ini({"sqlalchemy.url": url}))
        assert done.exit_code == 1
        assert "does not answer: no response within 0.5 seconds" in done.stderr


def test_check_of_what_is_out_of_reach(ini):
    path = ini({
        "sqlalchemy.url": "sqlite://",
        "sqlalchemy.replicas": "postgresql+psycopg://shop:secret@127.0.0.1:1/shop?sslpassword=secret",
        "sqlalchemy.binds.audit.url": "mariadb+pymysql://shop:secret@127.0.0.1:1/shop",
        "sqlalchemy.binds.wrong.url": "postgresql+psycopg://shop@127.0.0.1:1/shop",
        "sqlalchemy.binds.wrong.connect_args.channel_binding": "secret",
    })  # fmt: skip
    done = check(path)
    assert done.exit_code == 1
    assert done.stdout.count("no answer") == 3
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
    "of the ini": ("use = egg:gunicorn#main\nmany = 6\nworkers = %(many)s", [], "6 processes of 1 thread"),
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
    assert "application 1 of 2: 'main' on sqlite:////" in both.stdout
    assert "application 2 of 2: 'other' on sqlite://\n" in both.stdout
    assert "shop.db" in both.stdout
    assert "shop.db" not in check(f"{path}#other").stdout


def written(text: str, encoding: str = "utf-8"):
    """An ini of these lines alone."""

    def write(ini) -> str:
        path = Path(ini({}))
        path.write_text(text, encoding=encoding)
        return str(path)

    return write


BREAKS = "[app:breaks]\npaste.app_factory = tests.paste_apps:breaks\n"
EXITS = "[app:exits]\npaste.app_factory = tests.paste_apps:exits\n"

#: What cannot be checked, and what is said of it.
REFUSED = {
    "no file": (lambda ini: "/nowhere/shop.ini", "error: there is no file '/nowhere/shop.ini'."),
    "URL in place of a file": (
        lambda ini: "mysql://me:secret@db/shop",
        "error: there is no file 'mysql://me:***@db/shop'.",
    ),
    "error of the application": (
        lambda ini: ini({"sqlalchemy.url": "sqlite://"}, BREAKS) + "#breaks",
        "cannot be loaded: ValueError: mysql://me:***@db/shop",
    ),
    "no ini": (lambda ini: __file__, f"error: {__file__} is not a valid ini file: "),
    "no such application": (
        lambda ini: ini({"sqlalchemy.url": "sqlite://"}) + "#lost",
        "cannot be loaded: it has no section [app:lost]",
    ),
    "wrong setting": (
        lambda ini: ini({"sqlalchemy.ulr": "sqlite://"}),
        "cannot be loaded: ConfigurationError: 'sqlalc",
    ),
    "that exits": (
        lambda ini: ini({"sqlalchemy.url": "sqlite://"}, EXITS) + "#exits",
        "cannot be loaded: SystemExit: 0",
    ),
    "not a number": (
        lambda ini: ini({"sqlalchemy.url": "sqlite://"}, "[server:main]\nworkers = many"),
        "error: workers of [server:main] must be a whole number from 1, got 'many'.",
    ),
    "lost value": (
        lambda ini: ini({"sqlalchemy.url": "sqlite://"}, "[server:main]\nworkers = %(lost)s"),
        "is not a valid ini file: 'workers' of [server:main] refers to 'lost', which is not defined.",
    ),
    "single %": (
        lambda ini: ini({"sqlalchemy.url": "postgresql+psycopg://shop:p%40secret@db/shop"}),
        "cannot be loaded: 'sqlalchemy.url' of [filter-app:main] has a '%' that does not begin a '%(name)s':",
    ),
    "single % in the defaults": (
        lambda ini: ini({"sqlalchemy.url": "sqlite://"}, "[DEFAULT]\nurl = p%40secret\n[server:main]\nworkers = 1"),
        "is not a valid ini file: 'url' of [server:main] has a '%' that does not begin a '%(name)s': write '%%'",
    ),
    "no section": (
        written("sqlalchemy.url = mysql://:secret@db\n"),
        "is not a valid ini file: line 1 precedes the first",
    ),
    "no value": (
        written("[main]\n//shop-secret@db\n"),
        "is not a valid ini file: line 2 is not of the form 'key = value'.",
    ),
    "not UTF-8": (written("[main]\nkey = \N{POUND SIGN}\n", "latin-1"), "is not a valid ini file: 'utf-8' codec"),
    "a section twice": (written("[main]\n[main]\n"), "is not a valid ini file: While reading from '/"),
    "no middleware": (
        lambda ini: ini({"sqlalchemy.url": "sqlite://"}) + "#shop",
        " has no section with 'use = egg:sqlasession_mid",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_check_refuses(ini, name):
    path, said = REFUSED[name]
    done = check(path(ini))
    assert done.exit_code == 2
    assert said in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize("name", ["single %", "single % in the defaults", "no section", "no value"])
def test_no_password_of_an_ini_is_shown_when_that_cannot_be_read(ini, name):
    path, _ = REFUSED[name]
    done = command("create", path(ini))
    assert done.exit_code == 2
    assert "cannot be loaded: " in done.stderr
    assert "secret" not in done.stderr


def test_command_is_installed():
    installed = Path(sys.executable).parent / "sqlasession"
    done = subprocess.run([installed, "check", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Ping every engine" in done.stdout


def test_command_without_what_it_needs():
    script = "import sys; sys.modules['click'] = None; import sqlasession_middleware.cli"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "sqlasession needs click: pip install 'sqlasession_middleware[cli]'"


SETTINGS = {"sqlalchemy.url": "sqlite:///shop.db", "metadata": "tests.paste_apps:metadata"}


def tables(tmp_path: Path) -> list[str]:
    engine = create_engine(f"sqlite:///{tmp_path}/shop.db")
    names = inspect(engine).get_table_names()
    engine.dispose()
    return names


def test_create_and_drop(ini, tmp_path):
    path = ini(SETTINGS)
    done = command("create", path)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("creating 1 table of 'main' on sqlite:////")
    assert done.stdout.endswith("done\n")
    assert tables(tmp_path) == ["guests"]
    assert command("create", path).exit_code == 0
    refused = command("drop", path, said="n\n")
    assert (refused.exit_code, refused.stderr) == (1, "error: aborted, no tables were dropped.\n")
    assert tables(tmp_path) == ["guests"]
    assert command("drop", path, said="y\n").exit_code == 0
    assert tables(tmp_path) == []
    assert command("create", path).exit_code == command("drop", path, "--yes").exit_code == 0
    assert tables(tmp_path) == []


def test_create_and_drop_count_the_tables_of_every_metadata(ini, tmp_path):
    path = ini({**SETTINGS, "metadata": "tests.paste_apps:metadata, tests.paste_apps:audit"})
    assert command("create", path).stdout.startswith("creating 2 tables of")
    assert tables(tmp_path) == ["guests", "visits"]
    assert command("drop", path, "--yes").stdout.startswith("dropping 2 tables of")


def test_create_passes_over_an_application_without_tables(ini, tmp_path):
    more = (
        "\n[filter-app:other]\npaste.filter_app_factory = sqlasession_middleware.paste:main\nnext = shop\n"
        "sqlalchemy.url = sqlite://\nmetadata = tests.paste_apps:no_tables\n"
        "\n[composite:both]\nuse = egg:Paste#urlmap\n/ = main\n/other = other\n"
    )
    done = command("create", f"{ini(SETTINGS, more)}#both")
    assert (done.exit_code, done.stderr) == (0, "")
    assert tables(tmp_path) == ["guests"]


def test_drop_asks_and_nobody_answers(ini, tmp_path):
    path = ini(SETTINGS)
    command("create", path)
    done = command("drop", path)
    assert done.exit_code == 1
    assert done.stderr.endswith("error: aborted, no tables were dropped.\n")
    assert tables(tmp_path) == ["guests"]


@pytest.mark.parametrize("name", ["create", "drop"])
def test_database_is_out_of_reach(ini, name):
    url = "postgresql+psycopg://shop:secret@127.0.0.1:1/shop"
    done = command(name, ini({**SETTINGS, "sqlalchemy.url": url}), *(["--yes"] if name == "drop" else []))
    assert done.exit_code == 1
    assert done.stderr.startswith("error: connection ")
    assert "secret" not in done.output


ADD = "session.execute(guests.insert().values(name='Ada'))\n"
COUNT = "print('guests:', session.scalar(text('SELECT count(*) FROM guests')))\n"
IMPORT = "from tests.paste_apps import guests\nfrom sqlalchemy import text\n"


def test_shell(ini):
    path = ini(SETTINGS)
    command("create", path)
    done = command("shell", path, said=f"{IMPORT}{ADD}{COUNT}application\nsorted(metadata.tables)\n")
    assert done.exit_code == 0, done.output
    assert "guests: 1" in done.stdout
    assert "<SQLASessionMiddleware 'main' on sqlite:////" in done.stdout
    assert "['guests']" in done.stdout
    assert "what was not committed is rolled back" in done.stdout
    done = command("shell", path, "--commit", said=f"{IMPORT}{COUNT}{ADD}")
    assert "guests: 0" in done.stdout
    assert "what was not committed is committed" in done.stdout
    assert "guests: 1" in command("shell", path, said=f"{IMPORT}{COUNT}").stdout
    nothing = command("shell", path, said="1 + 1\n")
    assert nothing.exit_code == 0
    assert "not committed" not in nothing.stdout


@pytest.mark.parametrize(
    ("leave", "exit_code", "kept"),
    [("", 0, 1), ("exit()\n", 0, 1), ("raise SystemExit(0)\n", 0, 1), ("raise SystemExit(3)\n", 3, 0)],
    ids=["the end of the input", "exit()", "success", "a failure"],
)
def test_shell_commits_when_it_is_left_by(ini, leave, exit_code, kept):
    path = ini(SETTINGS)
    command("create", path)
    done = command("shell", path, "--commit", said=f"{IMPORT}{ADD}{leave}")
    assert done.exit_code == exit_code
    assert ("what was not committed is committed" in done.stdout) is bool(kept)
    assert f"guests: {kept}" in command("shell", path, said=f"{IMPORT}{COUNT}").stdout


class Lazy:
    """As Django's settings: whoever asks what it is wakes it up."""

    @property
    def __class__(self):
        raise RuntimeError("awake")


def test_shell_has_the_mapped_classes(ini, monkeypatch):
    """Of every module that was imported: here of a test's."""
    from . import test_models

    monkeypatch.setattr(test_models, "lazy", Lazy(), raising=False)
    monkeypatch.setitem(sys.modules, "no_module", Lazy())
    done = command("shell", ini(SETTINGS), said="Imperative\n")
    assert repr(test_models.Imperative) in done.stdout


def test_shell_shows_an_error_alone(ini):
    """Not as a consequence of something of the shell's own, such as that there is no IPython."""
    stderr = command("shell", ini(SETTINGS), said="1 / 0\n").stderr
    assert stderr.count("Traceback") == 1, stderr
    assert "ZeroDivisionError" in stderr


def test_commit_of_a_shell_that_fails(ini):
    path = ini(SETTINGS)
    script = "from sqlalchemy import event\nevent.listen(session(), 'before_commit', lambda opened: 1 / 0)\n"
    done = command("shell", path, "--commit", said=f"session.connection()\n{script}")
    assert done.exit_code == 1
    assert "error: division by zero" in done.stderr


def test_shell_of_one_application_of_several(ini):
    more = (
        "\n[filter-app:other]\npaste.filter_app_factory = sqlasession_middleware.paste:main\nnext = shop\n"
        "sqlalchemy.url = sqlite://\n\n[composite:both]\nuse = egg:Paste#urlmap\n/ = main\n/other = other\n"
    )
    path = ini(SETTINGS, more)
    refused = command("shell", f"{path}#both")
    assert refused.exit_code == 2
    assert "has 2 applications with a database: pick one by its name" in refused.stderr
    assert command("shell", f"{path}#other").exit_code == 0


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


#: What [server:main] says, the options of "serve", and the addresses that it tells first.
SERVED = {
    "a port": ("port = 1", ["--port", "0"], ["127.0.0.1"]),
    "all addresses": ("port = 1", ["--port", "0", "--host", "*"], ["0.0.0.0"]),
    "IPv6": ("port = 1", ["--port", "0", "--host", "::1"], ["[::1]"]),
    "listen": ("listen = 127.0.0.1:0", [], ["127.0.0.1"]),
    "listen on several": ("listen = 127.0.0.1:0 127.0.0.1:0", [], ["127.0.0.1", "127.0.0.1"]),
    "a port in place of listen": ("listen = 127.0.0.1:1", ["--port", "0"], ["127.0.0.1"]),
}


@pytest.mark.parametrize("name", SERVED)
def test_serve(ini, name):
    where, options, addresses = SERVED[name]
    if name == "IPv6" and not has_ipv6():
        pytest.skip("the machine has no IPv6")
    path = ini(SETTINGS, f"\n[server:main]\nuse = egg:waitress#main\n{where}\nthreads = 2\n")
    assert command("create", path).exit_code == 0
    script = "import sys; from sqlasession_middleware.cli import main; main(sys.argv[1:])"
    arguments = [sys.executable, "-u", "-c", script, "serve", path, *options]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            for address in addresses:
                found = re.fullmatch(rf"serving on http://{re.escape(address)}:(\d+)/\n", server.stdout.readline())
                assert found is not None
                host = address.replace("0.0.0.0", "127.0.0.1")
                with urllib.request.urlopen(f"http://{host}:{found[1]}/Ada", timeout=PATIENCE) as response:
                    assert b"Ada" in response.read()
        finally:
            server.terminate()


def test_names_of_the_ini_are_given(ini, tmp_path, monkeypatch):
    """By hand, or by the environment; what is given is taken as it is."""
    monkeypatch.setenv("folder", str(tmp_path))
    path = ini({**SETTINGS, "sqlalchemy.url": "sqlite:///%(folder)s/%(name)s.db"}, "\n[server:main]\nuse = %(name)s\n")
    for number, options in enumerate((["--set", "name=100%%x=y"], ["--set", "name=100%"])):
        done = command("create", path, *options, "--set", "folder")
        assert (done.exit_code, done.stderr) == (0, ""), number
        assert (tmp_path / f"{options[1].removeprefix('name=')}.db").exists()
    assert check("--set", "name=shop", "--set", "folder", path).exit_code == 0


def test_what_an_ini_calls_may_lie_in_the_current_folder(tmp_path):
    (tmp_path / "lying_there.py").write_text("from tests.paste_apps import guest_book as make\n")
    (tmp_path / "shop.ini").write_text(
        "[filter-app:main]\nuse = egg:sqlasession_middleware\nsqlalchemy.url = sqlite:///shop.db\nnext = shop\n"
        "metadata = tests.paste_apps:metadata\n"
        "[app:shop]\nuse = call:lying_there:make\n"
    )
    installed = Path(sys.executable).with_name("sqlasession")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([installed, "create", "shop.ini"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_current_folder_is_looked_into(ini, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert command("create", ini(SETTINGS)).exit_code == 0
    assert sys.path.count(str(tmp_path)) == 1


def test_serve_refuses_a_wrong_listen(ini):
    done = command("serve", ini(SETTINGS, "\n[server:main]\nuse = egg:waitress#main\nlisten = 256.256.256.256:80\n"))
    assert done.exit_code == 1
    assert done.stderr.startswith("error: waitress cannot listen on 256.256.256.256:80: ")
    assert "--port" not in done.stderr


def test_serve_logs_as_the_ini_says(ini, tmp_path):
    sections = f"""
[loggers]
keys = root
[handlers]
keys = file
[formatters]
keys = plain
[logger_root]
level = INFO
handlers = file
[handler_file]
class = FileHandler
args = ('%(here)s/shop.log',)
formatter = plain
[formatter_plain]
format = %(levelname)s {tmp_path.name}
"""
    script = "import sys; from sqlasession_middleware.cli import main; main(sys.argv[1:])"
    arguments = [sys.executable, "-c", script, "serve", ini(SETTINGS, sections), "--host", "256.256.256.256"]
    assert subprocess.run(arguments, stderr=subprocess.DEVNULL).returncode == 1
    assert (tmp_path / "shop.log").exists()


#: Options of "serve", and what is said of them.
NOT_SERVED = {
    "no such host": (["--host", "256.256.256.256"], 1, "error: waitress cannot listen on 256.256.256.256:8080: "),
    "no port": (["--port", "70000"], 2, "70000 is not in the range"),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_serve_refuses(ini, name):
    options, code, said = NOT_SERVED[name]
    done = command("serve", ini(SETTINGS), *options)
    assert done.exit_code == code
    assert said in done.stderr


def test_serve_names_the_port_and_the_way_out_when_another_program_has_it(ini):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command("serve", ini(SETTINGS), "--port", str(port))
    # waitress leaves the socket open that it could not bind, and the error leads to it.
    done.exception = done.exc_info = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: waitress cannot listen on 127.0.0.1:{port}: ")
    assert done.stderr.endswith(" Another program listens there: stop it, or choose another port with --port.\n")


def test_serve_without_waitress(ini, monkeypatch):
    monkeypatch.setitem(sys.modules, "waitress.server", None)
    done = command("serve", ini(SETTINGS))
    assert (done.exit_code, done.stderr) == (1, "error: waitress is not installed: pip install waitress\n")


# -- wait


def waiting(*arguments: str) -> subprocess.Popen[str]:
    """``sqlasession wait`` as a process of its own."""
    script = "import sys; from sqlasession_middleware.cli import main; main(sys.argv[1:])"
    started = [sys.executable, "-u", "-c", script, "wait", *arguments]
    return subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


#: Where the servers listen, unless a URL says otherwise.
PORTS = {"postgresql": 5432, "mariadb": 3306}


def copy(source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes, until either end is closed."""
    with suppress(OSError):
        while data := source.recv(4096):
            target.sendall(data)


def url_for_ini(url: str | URL, **changed: Any) -> str:
    return make_url(url).set(**changed).render_as_string(hide_password=False).replace("%", "%%")


def test_wait_ends_when_all_engines_have_answered(ini, database_url, sqlite_url):
    url = url_for_ini(database_url)
    path = ini({"sqlalchemy.url": url, "sqlalchemy.replicas": url, "sqlalchemy.binds.audit.url": sqlite_url})
    done = command("wait", path)
    assert (done.exit_code, done.stderr) == (0, "")
    said = sorted(re.fullmatch(r"(.+): answers after \d+\.\d s", line)[1] for line in done.stdout.splitlines())
    assert said == ["audit", "default", "replicas[0]"]


def test_wait_names_each_of_several_applications(ini):
    more = (
        "\n[filter-app:other]\npaste.filter_app_factory = sqlasession_middleware.paste:main\nnext = shop\n"
        "sqlalchemy.url = sqlite://\n\n[composite:both]\nuse = egg:Paste#urlmap\n/ = main\n/other = other\n"
    )
    done = command("wait", f"{ini({'sqlalchemy.url': 'sqlite:///shop.db'}, more)}#both")
    assert done.exit_code == 0, done.output
    said = sorted(line.partition(": answers")[0] for line in done.stdout.splitlines())
    assert said == ["main, default", "other, default"]


@pytest.mark.parametrize("name", SERVERS_SEEN)
def test_wait_sees_a_server_that_starts_late(ini, name):
    url = make_url(DATABASES_SEEN.url(name, ""))
    with Proxy(name, url.host, url.port or PORTS[name]) as proxy:
        proxy.refuse()
        late = url_for_ini(url, host=proxy.host, port=proxy.port)
        path = ini({"sqlalchemy.url": url_for_ini(url), "sqlalchemy.binds.late.url": late})
        with waiting(path, "--timeout", str(PATIENCE)) as process:
            assert process.stdout is not None
            said = [process.stdout.readline() for _ in range(2)]
            proxy.accept()
            output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "")
    default, refused = sorted(said)
    assert default.startswith("default: answers after ")
    assert re.match("late: .*[Rr]efused", refused)
    assert re.fullmatch(r"late: answers after \d+\.\d s\n", output)


@pytest.mark.parametrize("name", SERVERS_SEEN)
def test_wait_sees_a_database_that_is_created_late(ini, name):
    database = f"late_{os.getpid()}"
    url = make_url(DATABASES_SEEN.url(name, ""))
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with (
        engine.connect() as connection,
        waiting(ini({"sqlalchemy.url": url_for_ini(url, database=database)}), "--timeout", str(PATIENCE)) as process,
    ):
        assert process.stdout is not None
        assert re.match(f"default: .*{database}", process.stdout.readline())
        connection.exec_driver_sql(f"CREATE DATABASE {database}")
        try:
            output, errors = process.communicate(timeout=PATIENCE)
        finally:
            connection.exec_driver_sql(f"DROP DATABASE {database}")
    assert (process.returncode, errors) == (0, "")
    assert output.startswith("default: answers after ")


SILENT = ["psycopg", "psycopg2", "pymysql", "mysqldb", "mariadbconnector"]


@pytest.mark.parametrize("driver", SILENT)
def test_wait_ends_in_time_when_a_server_says_nothing(ini, driver):
    backend = "postgresql" if driver.startswith("psycopg") else "mariadb"
    pytest.importorskip({"mysqldb": "MySQLdb", "mariadbconnector": "mariadb"}.get(driver, driver))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{backend}+{driver}://shop:secret@127.0.0.1:{silent.getsockname()[1]}/shop"
        path = ini({"sqlalchemy.url": url, "sqlalchemy.binds.same.url": url})
        began = time.monotonic()
        done = command("wait", path, "--timeout", "1")
        seconds = time.monotonic() - began
    assert done.exit_code == 1
    assert 1 <= seconds < 2
    assert sorted(done.stdout.splitlines()) == [
        "default: no response within 1 seconds",
        "same: no response within 1 seconds",
    ]
    assert done.stderr.count(" does not answer: no response within 1 seconds\n") == 2
    assert "secret" not in done.output


def test_wait_asks_again_who_was_silent(ini, monkeypatch):
    """As a proxy is that listens before its server does."""
    monkeypatch.setattr(wait, "TRY_TIMEOUT", 0.2)
    url = make_url(DATABASES_SEEN.url("postgresql", ""))
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
        port = silent.getsockname()[1]
        path = ini({"sqlalchemy.url": url_for_ini(url, host="127.0.0.1", port=port)})
        done = pool.submit(command, "wait", path, "--timeout", str(PATIENCE))
        first, _ = silent.accept()
        second, _ = silent.accept()
        with first, second, socket.create_connection((url.host, url.port or 5432)) as server:
            for ends in ((second, server), (server, second)):
                threading.Thread(target=copy, args=ends, daemon=True).start()
            result = done.result(PATIENCE)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("default: no response within 0.2 seconds\ndefault: answers after ")


def test_wait_reaches_the_second_host_of_a_url_when_the_first_says_nothing(ini, monkeypatch):
    monkeypatch.setattr(wait, "TRY_TIMEOUT", 1.0)
    url = make_url(DATABASES_SEEN.url("postgresql", ""))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hosts = (f"127.0.0.1:{silent.getsockname()[1]}", f"{url.host}:{url.port or 5432}")
        both = URL.create(url.drivername, url.username, url.password, database=url.database, query={"host": hosts})
        done = command("wait", ini({"sqlalchemy.url": url_for_ini(both)}), "--timeout", str(PATIENCE))
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("default: no response within 1 seconds\ndefault: answers after ")


@pytest.mark.parametrize("name", SERVERS_SEEN)
def test_wait_goes_on_when_a_login_is_refused(ini, name):
    """Another program may be about to create the account. What is wrong is said at once, once, and without secrets."""
    url = url_for_ini(DATABASES_SEEN.url(name, ""), username="nobody_of_all", password="secret")
    done = command("wait", ini({"sqlalchemy.url": url}), "--timeout", "1.5")
    assert done.exit_code == 1
    assert re.fullmatch(r"default: .*nobody_of_all.*\n", done.stdout)
    assert re.fullmatch(r"error: default \(.+\) does not answer: .*nobody_of_all.*\n", done.stderr)
    assert "secret" not in done.output


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pymysql"])
def test_wait_ends_at_once_when_the_driver_refuses_its_settings(ini, driver):
    backend = "postgresql" if driver.startswith("psycopg") else "mariadb"
    url = f"{backend}+{driver}://shop:secret@127.0.0.1:1/shop"
    path = ini({"sqlalchemy.url": url, "sqlalchemy.connect_args.nonsense": "secret"})
    done = command("wait", path, "--timeout", str(PATIENCE))
    assert (done.exit_code, done.stdout) == (2, "")
    assert re.fullmatch(r"error: default \(.+\) cannot be asked: .*nonsense.*\n", done.stderr)
    assert "secret" not in done.output


def test_wait_keeps_a_shorter_limit_of_the_application(ini):
    limits = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"mariadb+pymysql://shop@127.0.0.1:{silent.getsockname()[1]}/shop"
        for limit in ("1", "600", "soon"):
            path = ini({"sqlalchemy.url": url, "sqlalchemy.connect_args.read_timeout": limit})
            limits.append(command("wait", path, "--timeout", "2").stderr)
    assert "timed out" in limits[0]
    # What is left of the two seconds, which is less on a busy machine.
    assert re.search(r"no response within (2|1\.\d+) seconds", limits[1])
    assert "'soon'" in limits[2] or "str" in limits[2]


def test_wait_without_time_asks_once(ini):
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        url = f"postgresql+psycopg://shop@127.0.0.1:{listener.getsockname()[1]}/shop"

        def hang_up() -> int:
            listener.settimeout(PATIENCE)
            listener.accept()[0].close()
            listener.settimeout(1)
            with suppress(TimeoutError):
                listener.accept()[0].close()
                return 2
            return 1

        asked = pool.submit(hang_up)
        done = command("wait", ini({"sqlalchemy.url": url}), "--timeout", "0")
        assert asked.result() == 1
    assert done.exit_code == 1
    assert "error: default (" in done.stderr


#: Values of --timeout, and what is said of them.
TIMEOUTS = {
    "-1": "-1.0 is not in the range",
    "inf": "inf is not in the range",
    "nan": "'nan' is not a valid number of seconds.",
    "soon": "'soon' is not a valid number of seconds.",
    "": "'' is not a valid number of seconds.",
}


@pytest.mark.parametrize("value", TIMEOUTS)
def test_wait_refuses_a_timeout(ini, value):
    done = command("wait", ini({"sqlalchemy.url": "sqlite://"}), f"--timeout={value}")
    assert done.exit_code == 2
    assert f"Invalid value for '--timeout': {TIMEOUTS[value]}" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_wait_ends_at_a_signal_with_the_usual_status(ini, number):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"mariadb+pymysql://shop@127.0.0.1:{silent.getsockname()[1]}/shop"
        gone = "postgresql+psycopg://shop@127.0.0.1:1/shop"
        path = ini({"sqlalchemy.url": url, "sqlalchemy.binds.gone.url": gone})
        with waiting(path, "--timeout", str(PATIENCE)) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("gone: ")
            process.send_signal(number)
            _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (-number, "")


def test_workers_create_the_tables_at_the_same_moment(ini, database_url):
    path = ini({"sqlalchemy.url": url_for_ini(database_url), "metadata": "tests.paste_apps:metadata"})
    script = "import sys; from sqlasession_middleware.cli import main; main(sys.argv[1:])"
    started = [sys.executable, "-c", script, "create", path]
    workers = [subprocess.Popen(started, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ended = [(worker.communicate(timeout=PATIENCE)[1], worker.returncode) for worker in workers]
    assert command("drop", path, "--yes").exit_code == 0
    assert ended == [("", 0)] * 4


def test_signals_are_left_alone_in_another_thread() -> None:
    """Only the main thread may have handlers."""
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with wait.end_by_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


# -- requests

TOKEN = "a-token-of-the-tests"


def look(environ, start_response):
    """Reads by the path: ``/repeated``, ``/failing``, ``/quiet``."""
    work = environ["PATH_INFO"]
    if work == "/repeated":
        for number in range(3):
            session.execute(text("SELECT 1 AS one WHERE :number >= 0"), {"number": number})
    elif work == "/failing":
        with suppress(DBAPIError):
            session.execute(text("SELECT \x1b[2J\nnothing"))
        session.rollback()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done"]


def look_factory(global_conf, **settings):
    return look


@pytest.fixture
def inspected(tmp_path):
    """Writes an ini with an inspector, and settings for it."""

    def write(settings: str = "") -> str:
        path = tmp_path / "inspected.ini"
        path.write_text(
            "[app:look]\npaste.app_factory = tests.test_cli:look_factory\n\n"
            "[filter-app:inside]\npaste.filter_app_factory = sqlasession_middleware.paste:main\n"
            "next = look\nsqlalchemy.url = sqlite://\ntransaction = true\n\n"
            "[filter-app:main]\npaste.filter_app_factory = sqlasession_middleware.paste:inspector\n"
            f"next = inside\ntoken = {TOKEN}\n{settings}\n"
        )
        return str(path)

    return write


@contextmanager
def running(path: str):
    """The address of the ini's application, while a server runs."""
    app = loadapp(f"config:{path}")
    with make_server("127.0.0.1", 0, app, handler_class=QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield app, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
    app.app.dispose()


class QuietHandler(WSGIRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        """No line on the standard error output."""


def asked(path: str, *paths: str) -> None:
    app = loadapp(f"config:{path}")
    for each in paths:
        assert Client(app).get(each, buffered=True).status_code == 200
    app.app.dispose()


def test_requests_of_a_store_are_listed(inspected, tmp_path):
    path = inspected(f"store = {tmp_path}/kept")
    assert command("requests", path).stdout == "no requests yet\n"
    asked(path, "/repeated", "/%1b%5b2J?token=1", "/failing")
    done = command("requests", path)
    assert done.exit_code == 0, done.output
    titles, repeated, quiet, failing = (line.split() for line in done.stdout.splitlines())
    assert titles == ["id", "at", "method", "path", "status", "time", "database", "queries", "trips", "outcome"]
    assert repeated[2:6] == ["GET", "/repeated", "200", "OK"]
    assert repeated[-5:] == ["3", "0", "committed,", "N+1:", "1"]
    assert quiet[3] == "/%1B%5B2J"
    assert failing[-4:] == ["1", "0", "only", "read"]

    of_one = command("requests", path, repeated[0])
    assert of_one.exit_code == 0, of_one.output
    assert re.match(r"GET /repeated: 200 OK at [-\d]+ [:\d]+, committed\nall [\d.]+ ms, statements ", of_one.stdout)
    assert "queries 3, round trips 0, attempts 1" in of_one.stdout
    assert "on default: SELECT 1 AS one WHERE ? >= 0" in of_one.stdout
    assert "in look" in of_one.stdout
    assert "N+1: statements 1, 2, 3. Ask for all of them at once" in of_one.stdout
    assert "COMMIT on default: " in of_one.stdout

    of_failing = command("requests", path, failing[0]).stdout
    assert "\x1b" not in of_failing
    assert r"SELECT \x1b[2J nothing" in of_failing
    assert "   failed: " in of_failing


def test_requests_of_a_running_inspector_are_shown(inspected):
    with running(inspected()) as (app, site):
        address = app.url(site)
        assert command("requests", address).stdout == "no requests yet\n"
        with urllib.request.urlopen(f"{site}/repeated", timeout=PATIENCE) as response:
            assert response.read() == b"done"
        listed = command("requests", address).stdout.splitlines()
        assert [line.split()[3] for line in listed] == ["path", "/repeated"]
        number = listed[1].split()[0]
        assert "N+1: statements 1, 2, 3" in command("requests", address, number).stdout
        unknown = command("requests", address, "unknown")
        assert (unknown.exit_code, unknown.stderr) == (1, "error: there is no request 'unknown', or not any more.\n")
        wrong = command("requests", address + "1")
        assert wrong.exit_code == 1
        assert f"error: {site}/_sqlasession does not answer as an inspector does" in wrong.stderr
    gone = command("requests", address)
    assert gone.exit_code == 1
    assert f"error: {site}/_sqlasession does not answer: " in gone.stderr
    assert TOKEN not in gone.output + wrong.output


def test_beginning_of_an_id_has_to_be_of_one_request(inspected, tmp_path):
    path = inspected(f"store = {tmp_path}/kept")
    asked(path, *["/quiet"] * 2)
    done = command("requests", path, "")
    assert (done.exit_code, done.stderr) == (1, "error: 2 requests have an ID that begins with ''.\n")


def test_requests_have_to_be_somewhere(inspected, ini):
    kept = command("requests", inspected())
    assert kept.exit_code == 2
    assert "keeps requests in the memory of its process: give the address that it logs" in kept.stderr
    none = command("requests", ini({"sqlalchemy.url": "sqlite://"}))
    assert none.exit_code == 2
    assert "has no section with 'use = egg:sqlasession_middleware#inspector'." in none.stderr
    without = command("requests", "http://127.0.0.1:1/_sqlasession/")
    assert without.exit_code == 2
    assert "the address must be the one that the inspector logs" in without.stderr


def test_what_a_request_has_is_shown():
    """All that one can have, also what no request of these tests has."""
    found: dict[str, Any] = {
        "id": "1f", "at": 0, "method": "PUT", "path": "/", "status": "", "raised": "KeyError", "seconds": 1.5,
        "database": 0.5, "fetched": 0.25, "waited": 0.1, "committing": 0.0, "held": 1, "queries": 1, "trips": 2,
        "attempts": 1, "outcome": "rolled back", "warnings": 0, "repeats": [], "objects": {"shop.Item": 3},
        "statements": [{
            "begin": 0, "seconds": 0.5, "fetched": 0.25, "engine": "audit", "relationship": "Item.shop",
            "sql": "SELECT", "parameters": [[["id", "1"], ["name", "***"]]], "error": None, "stack": "  File",
        }],
        "ends": [{"kind": "commit", "engine": "audit", "begin": 1, "end": 1.25, "error": "InternalError"}],
    }  # fmt: skip

    class Kept:
        def summaries(self) -> list[dict[str, Any]]:
            return [found]

        def find(self, number: str) -> dict[str, Any] | None:
            return found

    @click.command()
    def show() -> None:
        requests.print_request(Kept(), "1")

    shown = CliRunner().invoke(show).stdout
    assert shown.startswith("PUT /: KeyError at 19")
    for part in ("statements 500.0 ms, rows 250.0 ms", "round trips 2", "(id=1, name=***)",
                 "1. 0.0 ms + 750.0 ms on audit for Item.shop: SELECT",
                 "COMMIT on audit: 1000.0 ms + 250.0 ms, failed: InternalError",
                 "objects: shop.Item 3"):  # fmt: skip
        assert part in shown
