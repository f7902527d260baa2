"""What the inspector keeps of requests: how much, without what, in memory and in files; and what it asks databases."""

from __future__ import annotations

import gc
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from paste.deploy import loadapp
from sqlalchemy import StaticPool, create_engine, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._inspector import store as stores
from sqlasession_middleware._recording import record as records
from sqlasession_middleware.errors import ConfigurationError
from sqlasession_middleware.inspector import InspectorMiddleware

from .test_inspector import PATH, TOKEN, Author, Site, make, read, shop
from .wsgi import consume, environ, start_response

__all__ = ["make"]

pytestmark = pytest.mark.usefixtures("disposes")

SECRET = "hunter2-s3cret"


# -- how much


def test_last_requests_are_kept_and_memory_stays_flat(make: Any) -> None:
    site = make()

    def ask(times: int) -> int:
        for _ in range(times):
            consume(site.app(environ(work=read), start_response))
        gc.collect()
        return sys.getallocatedblocks()

    before = ask(500)
    after = ask(10_000)
    assert len(site.requests()) == 100
    # One block more for each request would be 10,000.
    assert after - before < 2_000


def test_memory_is_bounded(make: Any) -> None:
    site = make(memory=200_000)
    for _ in range(50):
        site.work(lambda: session.execute(text(f"SELECT '{'x' * 15_000}'")))
    few = len(site.requests())
    assert 1 < few < 15
    site.work(lambda: [session.execute(text(f"SELECT {number}, '{'x' * 15_000}'")) for number in range(20)])
    # The last one is kept, however large it was: without what is long.
    assert site.requests()[0]["queries"] == len(site.last()["statements"]) == 20


def test_statements_of_a_request_are_bounded(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "AT_MOST", 5)
    site = make()
    site.work(lambda: [session.execute(text("SELECT 1")) for _ in range(8)])
    data = site.last()
    assert (data["queries"], len(data["statements"])) == (8, 5)
    assert "The first 5 of 8." in site.page(f"/r/{data['id']}")


def test_nothing_of_the_request_is_kept_alive(make: Any) -> None:
    class Value:
        def __str__(self) -> str:
            return "value"

    alive: list[Any] = []

    def work() -> None:
        author = Author(name="Ada")
        session.add(author)
        session.flush()
        error = None
        try:
            session.execute(text("SELECT nothing FROM nowhere"))
        except Exception as raised:
            error = raised
        alive.extend([ref(author), ref(error)])

    site = make()
    mark = Value()
    alive.append(ref(mark))
    site.work(work, mark=mark)
    del mark
    gc.collect()
    assert [each() for each in alive] == [None, None, None]
    assert len(site.requests()) == 1


# -- what must not be there


@pytest.mark.parametrize("is_stored", [False, True])
def test_planted_secret_is_on_no_page_and_in_no_json(make: Any, tmp_path: Path, is_stored: bool) -> None:
    more: dict[str, Any] = {"store": str(tmp_path / "store")} if is_stored else {}
    site = make(**more)

    def work() -> None:
        session.add(Author(name="Ada", password=SECRET))
        session.flush()
        session.execute(select(Author.id).where(Author.password == SECRET))
        session.execute(update(Author).values(password=SECRET))
        session.execute(text(f"UPDATE {Author.__tablename__} SET password = '{SECRET}'"))
        session.connection().exec_driver_sql(f"UPDATE {Author.__tablename__} SET password = ?", (SECRET,))
        session.execute(text("SELECT :password").bindparams(password=SECRET))

    site.browser.post(
        f"/?password={SECRET}&{SECRET}",
        data={"password": SECRET},
        headers={
            "Authorization": f"Bearer {SECRET}",
            "Cookie": f"login={SECRET}",
            "Referer": f"http://localhost/{SECRET}",
        },
        environ_overrides={"work": work},
        buffered=True,
    )
    number = site.requests()[0]["id"]
    pages = [site.page(page) for page in ("/", "/requests.json", f"/r/{number}", f"/r/{number}.json", "/pools")]
    count = len(site.last()["statements"])
    assert count == 6
    pages += [site.explain(each, accept="text/html") for each in range(count)]
    assert [page for page in pages if SECRET in page] == []
    if is_stored:
        files = [path.read_bytes() for path in (tmp_path / "store").iterdir()]
        assert [file for file in files if SECRET.encode() in file] == []


def test_passwords_of_engines_are_not_shown(make: Any, tmp_path: Path) -> None:
    site = make(options={"engine_options": {"connect_args": {"timeout": 5}}})
    other = SQLASessionMiddleware(shop, f"postgresql+psycopg://ada:{SECRET}@127.0.0.1/nothing")
    site.inspector._applications.add([other])
    site.work(lambda: session.execute(text(f"SELECT '{SECRET}', :value"), {"value": f"x {SECRET}"}))
    number = site.requests()[0]["id"]
    for page in (f"/r/{number}", f"/r/{number}.json", "/pools"):
        assert SECRET not in site.page(page)


def test_values_are_hidden_when_the_engine_says_so(make: Any) -> None:
    site = make(options={"engine_options": {"hide_parameters": True}})
    name = "Ada" + " Lovelace"
    site.work(lambda: session.execute(select(Author.id).where(Author.name == name)))
    assert name not in site.page(f"/r/{site.last()['id']}")
    assert site.explain(0)["problem"] == ""


# -- plans


@pytest.fixture
def server(make: Any, database_url: str) -> Site:
    site: Site = make(database_url, options={"transaction": True})

    def write() -> None:
        session.execute(insert(Author).values(id=1, name="Ada", password="old"))

    site.work(write)
    return site


def rows_of(site: Site) -> list[Any]:
    assert site.database is not None
    with site.database.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(select(Author.name, Author.password))]


def test_plan_of_a_write_leaves_the_rows(server: Site) -> None:
    def write() -> None:
        session.execute(update(Author).where(Author.id == 1).values(name="Lin"))
        session.execute(text(f"DELETE FROM {Author.__tablename__}"))
        session.execute(insert(Author).values(id=2, name="Grace"))
        session.rollback()

    server.work(write)
    assert len(server.last()["statements"]) == 3
    refused = "It is not run, because it may write or lock something."
    for number in range(3):
        plan = server.explain(number)
        assert (plan["problem"], bool(plan["columns"])) == ("", True)
        assert server.explain(number, analyze=True)["problem"] == refused
    assert rows_of(server) == [("Ada", "old")]


def test_plan_of_a_read(server: Site) -> None:
    server.work(lambda: session.execute(select(Author.name).where(Author.name == "Ada", Author.id == 1)).all())
    plan = server.explain(0)
    assert plan["problem"] == ""
    assert plan["rows"]
    page = server.explain(0, accept="text/html")
    assert "Plan of statement 1" in page
    assert plan["rows"][0][0] in page.replace("&#39;", "'").replace("&gt;", ">")
    ran = server.explain(0, analyze=True)
    assert server.database is not None
    name = server.database.engine.dialect.name
    if name == "sqlite":
        assert ran["problem"] == "There is no EXPLAIN ANALYZE for sqlite."
    else:
        assert ran["problem"] == ""
        assert "actual" in repr(ran["rows"]) if name == "postgresql" else "r_rows" in ran["columns"]


def test_plan_does_not_show_secrets(server: Site) -> None:
    server.work(lambda: session.execute(select(Author.id).where(Author.password == SECRET, Author.name == "Ada")))
    plan = server.explain(0)
    assert plan["problem"] == ""
    assert SECRET not in repr(plan)


def test_read_that_writes_writes_nothing(server: Site) -> None:
    """A server that takes it for a read refuses it, or its rows are there as before."""
    assert server.database is not None
    if server.database.engine.dialect.name != "postgresql":
        pytest.skip("writes in a WITH are PostgreSQL's")
    sql = f"WITH gone AS (DELETE FROM {Author.__tablename__} RETURNING id) SELECT * FROM gone"
    server.work(lambda: (session.execute(text(sql)), session.rollback()))
    assert "read-only" in server.explain(0, analyze=True)["problem"]
    assert rows_of(server) == [("Ada", "old")]


def test_plan_is_asked_for_outside_of_the_pool(make: Any, database_url: str) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
    site = make(database_url, options={"engine_options": options})
    site.work(read)
    with site.database.engine.connect():
        assert site.explain(0)["problem"] == ""
    assert site.requests()[0]["queries"] == 1


def test_read_ends_after_its_time(make: Any, server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlasession_middleware._inspector.explain.SECONDS", 1)
    site = make(server_url)
    sleep = "pg_sleep" if site.database.engine.dialect.name == "postgresql" else "SLEEP"
    monkeypatch.setattr("sqlasession_middleware._inspector.explain.SECONDS", 1)
    site.work(lambda: session.execute(text(f"SELECT {sleep}(:seconds)"), {"seconds": 0}))
    kept = site.inspector._watch.find(site.requests()[0]["id"])
    assert kept is not None
    original = kept.originals[0]
    values = {"seconds": 60} if isinstance(original.parameters, dict) else (60,)
    kept.originals[0] = original._replace(parameters=values)  # type: ignore[index]  # a dict
    problem = site.explain(0, analyze=True)
    assert "QueryCanceled" in problem["problem"] or "max_statement_time" in problem["problem"]


def test_plans_that_there_are_not(make: Any) -> None:
    site = make()

    def work() -> None:
        session.execute(text("PRAGMA user_version"))
        session.execute(text("SELECT :large"), {"large": "x" * 70_000})
        session.execute(text(f"SELECT '{'x' * 30_000}'"))
        session.execute(text("-- UPDATE\nSELECT 1 /* DELETE */"))
        session.execute(insert(Author), [{"name": "Ada"}, {"name": "Lin"}])
        with pytest.raises(DBAPIError):
            session.connection().exec_driver_sql("SELECT ?", (object(),))

    site.work(work)
    problems = [site.explain(number)["problem"] for number in range(6)]
    assert problems.pop() == problems[1]
    assert problems[0] == "Only SELECT, INSERT, UPDATE, DELETE and their like have a plan, one at a time."
    assert problems[1] == "Its values are too large to be kept, or not of Python's own classes."
    assert problems[2] == "It is too long to be kept as it was sent."
    assert problems[3:] == ["", ""]
    page = site.page(f"/r/{site.last()['id']}")
    assert "It cannot be explained. It is too long to be kept as it was sent." in page
    path = f"{PATH}/r/{site.requests()[0]['id']}/q/99/explain"
    form = {"token": site.form_token()}
    response = site.browser.post(path, data=form, headers={"Origin": "http://localhost"}, environ_overrides=site.sent)
    assert response.status_code == 404


def test_plan_that_the_database_refuses(make: Any) -> None:
    site = make()
    site.work(lambda: _fails("SELECT 1 FROM nowhere"))
    assert site.explain(0)["problem"] == "OperationalError: no such table: nowhere"


def _fails(sql: str) -> None:
    with pytest.raises(Exception, match="nowhere"):
        session.execute(text(sql))


def test_plan_of_a_database_with_one_connection(make: Any) -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    site = make(engine)
    site.work(read)
    assert site.explain(0)["problem"] == "This engine has one connection only, which the application uses."


def test_plan_of_a_database_that_is_not_known(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make()
    site.work(read)
    monkeypatch.delattr("sqlasession_middleware._drivers.sqlite.SQLite.begin_explaining")
    assert site.explain(0)["problem"] == "There is no EXPLAIN for sqlite."


# -- files, for several processes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_processes_share_what_is_stored(make: Any, folder: Path) -> None:
    site = make(store=str(folder))
    other = Site(InspectorMiddleware(site.database, token=TOKEN, store=str(folder)))
    other.log_in()
    site.work(read, "/one")
    other.work(read, "/two")
    assert [each["path"] for each in site.requests()] == ["/two", "/one"] == [each["path"] for each in other.requests()]
    assert site.explain(0)["problem"] == ""
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_processes_share_a_token_that_was_made(folder: Path) -> None:
    first, second = (InspectorMiddleware(shop, store=str(folder)) for _ in range(2))
    assert first.url("") == second.url("")
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600


def test_store_is_bounded(make: Any, folder: Path) -> None:
    site = make(store=str(folder), requests=5)
    for number in range(9):
        site.work(read, f"/{number}")
    assert [each["path"] for each in site.requests()] == ["/8", "/7", "/6", "/5", "/4"]
    small = make(store=str(folder), memory=30_000)
    for _ in range(9):
        small.work(lambda: session.execute(text(f"SELECT '{'x' * 4_000}'")))
    assert 1 < len(small.requests()) < 6


def test_values_that_are_hidden_are_not_stored(make: Any, folder: Path) -> None:
    site = make(store=str(folder))
    site.work(lambda: session.execute(select(Author.id).where(Author.password == SECRET)))
    reason = "Requests are kept in a file, without values that are hidden or are not those of JSON."
    assert reason in site.page(f"/r/{site.last()['id']}")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda file: file.unlink(),
    "overwritten": lambda file: file.write_bytes(b"no database" * 1000),
    "empty": lambda file: file.write_bytes(b""),
    "folder deleted": lambda file: ([each.unlink() for each in file.parent.iterdir()], file.parent.rmdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_store_that_is_damaged_is_made_anew(
    make: Any, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    site = make(store=str(folder))
    site.work(read, "/before")
    DAMAGES[damage](folder / "requests.sqlite3")
    site.work(read, "/after")
    site.work(read, "/again")
    assert [each["path"] for each in site.requests()][:2] == ["/again", "/after"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_store_that_cannot_be_used_is_no_trouble(
    make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = make(store=str(folder))
    monkeypatch.setattr(stores, "_PATIENCE", 0.0)
    locked = sqlite3.connect(folder / "requests.sqlite3", isolation_level=None)
    locked.execute("PRAGMA journal_mode = WAL")
    locked.execute("CREATE TABLE IF NOT EXISTS a (b)")
    locked.execute("BEGIN IMMEDIATE")
    for _ in range(2):
        assert site.work(read).data == b"done"
    locked.rollback()
    locked.close()
    assert [each.message for each in caplog.records if "cannot be kept" in each.message] == [
        f"Requests cannot be kept in {folder}/requests.sqlite3: database is locked"
    ]
    site.work(read, "/after")
    assert [each["path"] for each in site.requests()] == ["/after"]
    assert site.page("/")


def test_folder_has_to_be_the_user_s_own(folder: Path) -> None:
    folder.mkdir(0o755)
    with pytest.raises(ConfigurationError, match="must be a folder that only the user"):
        InspectorMiddleware(shop, store=str(folder))
    file = folder / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        InspectorMiddleware(shop, store=str(file / "below"))


FORKING = """
import os, sys
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from werkzeug.test import Client
from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.inspector import InspectorMiddleware

def shop(environ, start):
    session.execute(text("SELECT 1"))
    start("200 OK", [])
    return [b"done"]

app = InspectorMiddleware(SQLASessionMiddleware(shop, "sqlite:///" + sys.argv[2]), store=sys.argv[1])
client = Client(app)
client.get("/parent", buffered=True)
children = []
for number in range(3):
    child = os.fork()
    if not child:
        client.get("/child", buffered=True)
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
client.get("/parent", buffered=True)
print(sorted(each["path"] for each in app._watch.summaries()))
print(len({each["process"] for each in app._watch.summaries()}))
"""


def test_forked_processes_store_together(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKING, str(folder), str(tmp_path / "forks.db")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "['/child', '/child', '/child', '/parent', '/parent']\n4\n", done.stderr


# -- in an ini file

INI = """
[app:shop]
use = call:tests.test_inspector_kept:make_shop

[filter:db]
use = egg:sqlasession_middleware
sqlalchemy.url = sqlite:///%(here)s/ini.db

[filter:inspector]
use = egg:sqlasession_middleware#inspector
token = a-token-of-the-tests
path = /debug
hosts = localhost, [::1], dev.example
peers = 127.0.0.0/8, 10.0.0.0/8
requests = 5
memory = 100000
store = %(here)s/store

[pipeline:main]
pipeline = inspector db shop
"""


def make_shop(global_conf: Any) -> Any:
    return shop


def test_filter_reads_its_options(tmp_path: Path) -> None:
    ini = tmp_path / "development.ini"
    ini.write_text(INI)
    app = loadapp(f"config:{ini}")
    response = Client(app).get(app.url(""), environ_overrides={"REMOTE_ADDR": "10.1.1.1", "HTTP_HOST": "dev.example"})
    assert (response.status_code, response.location) == (303, "/debug/")
    assert (tmp_path / "store").is_dir()
    app.app.dispose()
    ini.write_text(INI.replace("requests = 5", "requests = 0"))
    with pytest.raises(ConfigurationError, match=r"'requests' in .*development.ini must be a whole number from 1"):
        loadapp(f"config:{ini}")


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sqlasession_middleware._inspector.pages", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigurationError, match=r"needs jinja2: pip install 'sqlasession_middleware.inspector.'"):
        InspectorMiddleware(shop)


def test_nothing_is_imported_before_an_inspector_is_made() -> None:
    code = (
        "import sys, sqlasession_middleware.paste, sqlasession_middleware.health\n"
        "print([name for name in sys.modules if name.endswith(('_inspector', 'listeners', 'jinja2', 'sqlparse'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_file_that_is_none_of_sqlite_is_made_anew(make: Any, folder: Path) -> None:
    folder.mkdir(0o700)
    (folder / "requests.sqlite3").write_bytes(b"no database" * 1000)
    site = make(store=str(folder))
    site.work(read, "/one")
    assert [each["path"] for each in site.requests()] == ["/one"]
    assert site.inspector._watch.find("nothing") is None


def test_folder_that_became_a_file_is_no_trouble(make: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    site = make(store=str(folder))
    for each in folder.iterdir():
        each.unlink()
    folder.rmdir()
    folder.touch()
    assert site.work(read).data == b"done"
    assert site.requests() == []
    assert "cannot be kept" in caplog.text
