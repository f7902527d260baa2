"""The example in examples/guestbook, as its users see it."""

from __future__ import annotations

import csv
import http.client
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from paste.deploy import loadapp
from webtest import TestApp

from sqlasession_middleware import metadata

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TIMEOUT = 30


@pytest.fixture
def examples(monkeypatch) -> Iterator[None]:
    """``import guestbook`` works, as it does for who stands in examples/."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    # Other tests count on their own tables being all that is in the shared metadata.
    for name in [each for each in sys.modules if each.partition(".")[0] in ("guestbook", "experiments")]:
        del sys.modules[name]
    if "guestbook_entry" in metadata.tables:
        metadata.remove(metadata.tables["guestbook_entry"])


@pytest.fixture
def book(examples, tmp_path, database_url) -> Iterator[TestApp]:
    """The guestbook of production.ini on each database in turn."""
    ini = (EXAMPLES / "guestbook" / "production.ini").read_text("utf-8")
    ini, replaced = re.subn(
        "^sqlalchemy.url = .*$", lambda match: f"sqlalchemy.url = {database_url}".replace("%", "%%"), ini, flags=re.M
    )
    assert replaced == 1
    (tmp_path / "production.ini").write_text(ini, "utf-8")
    app = loadapp(f"config:{tmp_path}/production.ini")
    app.drop_database()
    yield TestApp(app)
    app.drop_database()
    app.dispose()


@pytest.fixture
def books(examples, development_ini) -> Iterator[TestApp]:
    """Everything in development.ini, with its SQLite files in a folder of the test's own."""
    app = loadapp(f"config:{development_ini}")
    yield TestApp(app)
    for mounted in mounts_of(app).values():
        mounted.dispose()


def mounts_of(app: Any) -> dict[str, Any]:
    """What the application has by its paths, inside of all middleware."""
    while not hasattr(app, "mounts"):
        app = app.app
    return app.mounts


@pytest.fixture
def development_ini(tmp_path) -> Path:
    return Path(shutil.copy(EXAMPLES / "guestbook" / "development.ini", tmp_path))


def sign(book: TestApp, name: str, message: str, path: str = "/", **options: Any) -> Any:
    form = book.get(path).form
    form["name"], form["message"] = name, message
    return form.submit(**options)


def write(book: TestApp, count: int) -> None:
    """Entries numbered from 1, without a request for each."""
    from guestbook.models import Entry

    book.app.init_database()
    with book.app.context() as session:
        session.add_all(Entry(name="Ada", message=f"message {number}") for number in range(1, count + 1))
        session.commit()


def messages(page: Any) -> list[str]:
    return [each.text for each in page.html.select(".message")]


def test_an_entry_is_on_the_page_when_it_was_posted(book):
    assert "Nobody has signed yet" in book.get("/")
    answer = sign(book, "  Ada  Lovelace ", "Hello,\r\nworld ✨🎈\r\n", status=303)
    page = answer.follow()
    assert messages(page) == ["Hello,\nworld ✨🎈"]
    assert page.html.select_one(".byline strong").text == "Ada Lovelace"
    assert page.html.select_one("article")["id"] == urlsplit(answer.location).fragment
    assert page.form["name"].value == page.form["message"].value == ""
    assert book.app.engine.pool.checkedout() == 0


@pytest.mark.parametrize(
    ("name", "message", "error"),
    [
        (" \t", "Hello", "Please tell us your name."),
        ("n" * 81, "Hello", "Please shorten your name to 80 characters (it has 81)."),
        ("Ada", "\0\r\n ", "Please write a message."),
        ("Ada", "m" * 2001, "Please shorten your message to 2000 characters (it has 2001)."),
    ],
)
def test_the_form_says_what_is_wrong_and_keeps_the_input_when_a_field_cannot_be_used(book, name, message, error):
    page = sign(book, name, message, status=422)
    assert [each.text for each in page.html.select(".error")] == [error]
    assert page.form["name"].value == name.strip()
    assert page.form["message"].value == message.strip("\0\r\n ")
    assert messages(page) == []
    assert sign(book, "Ada", "m" * 2000, status=303).follow().html.select_one(".message").text == "m" * 2000


def test_html_is_shown_as_text_when_someone_writes_it(book):
    evil = "<script>alert('\"hi\"')</script>"
    page = sign(book, evil, evil).follow()
    assert messages(page) == [evil]
    assert page.html.select("script") == []
    kept = sign(book, evil, "", status=422)
    assert kept.form["name"].value == evil
    assert kept.html.select("script") == []


def test_entries_are_on_pages_newest_first_when_there_are_many(book):
    write(book, 23)
    first = book.get("/")
    assert messages(first) == [f"message {number}" for number in range(23, 13, -1)]
    assert not first.html.select("[rel=prev]")
    last = first.click("Older").click("Older")
    assert messages(last) == ["message 3", "message 2", "message 1"]
    assert "Page 3 of 3" in last
    assert not last.html.select("[rel=next]")
    assert messages(last.click("Newer").click("Newer")) == messages(first)


@pytest.mark.parametrize("page", ["abc", "0", "-1", "3", "1.5", "", "9" * 30, "9" * 5000])
def test_there_is_no_such_page_when_its_number_is_none(book, page):
    write(book, 11)
    assert "There is no such page." in book.get("/", {"page": page}, status=404)


@pytest.mark.parametrize(("path", "status"), [("/?page=%FF", 404), ("/?%FF=1", 200), ("/%FF", 400)])
def test_only_text_that_is_used_has_to_be_utf8(book, path, status):
    book.get(path, status=status)


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data", "multipart/form-data; boundary=", "text/plain; charset=latin-1"]
)
def test_the_request_is_bad_or_empty_when_its_form_cannot_be_read(book, content_type):
    book.post("/", b"name=Ada", content_type=content_type, status=(400, 422))


def test_a_file_is_no_name_when_one_is_uploaded(book):
    page = book.post("/", {"message": "Hello"}, upload_files=[("name", "a.txt", b"Ada")], status=422)
    assert "Please tell us your name." in page


def test_the_error_page_leads_back_when_there_is_no_such_page_or_method(book):
    page = book.get("/nothing", status=404)
    assert "This guestbook has no such page." in page
    assert page.click("Our guestbook").form["name"].value == ""
    assert book.put("/", status=405).headers["Allow"] == "GET, HEAD, POST"


def test_the_export_streams_every_entry_when_there_are_more_than_a_batch(book):
    write(book, 1203)
    sign(book, 'A "B", C', "two\r\nlines")
    answer = book.get("/export.csv")
    assert answer.content_type == "text/csv"
    rows = list(csv.reader(answer.text.splitlines(keepends=True)))
    assert rows[0] == ["written", "name", "message"]
    assert [row[2] for row in rows[1:-1]] == [f"message {number}" for number in range(1, 1204)]
    assert rows[-1][1:] == ['A "B", C', "two\nlines"]
    assert book.app.engine.pool.checkedout() == 0


# PyMySQL says so: the transaction is rolled back before the body is closed, and reads the rest.
@pytest.mark.filterwarnings("ignore:Previous unbuffered result was left incomplete:UserWarning")
def test_the_connection_is_given_back_when_a_reader_of_the_export_goes_away(book):
    write(book, 1203)
    environ = {"REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/export.csv"}
    body = book.app(environ, lambda status, headers, exc_info=None: None)
    chunks = iter(body)
    assert next(chunks) == b"written,name,message\r\n"
    assert b"message 1\r\n" in next(chunks)
    assert book.app.engine.pool.checkedout() == 1
    body.close()
    assert book.app.engine.pool.checkedout() == 0


def test_both_are_answered_when_two_threads_make_the_first_request(book, monkeypatch):
    create, both_inside, answers = book.app.init_database, threading.Barrier(2), []

    def init_database() -> None:
        both_inside.wait(timeout=30)
        create()

    monkeypatch.setattr(book.app, "init_database", init_database)
    threads = [threading.Thread(target=lambda: answers.append(book.get("/").status_int)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200, 200]


def test_red_and_blue_keep_their_entries_apart_when_one_is_signed(books, tmp_path):
    landing = books.get("/")
    red = landing.click("The red guestbook")
    assert red.html.title.text == "The red guestbook"
    assert red.html.html["class"] == ["red"]
    page = sign(books, "Ada", "I like red.", path="/red/", status=303).follow()
    assert messages(page) == ["I like red."]
    blue = landing.click("The blue guestbook")
    assert blue.html.html["class"] == ["blue"]
    assert messages(blue) == []
    assert {path.name for path in tmp_path.glob("*.db")} == {"guestbook-red.db", "guestbook-blue.db"}


def test_links_stay_inside_when_the_application_is_mounted_somewhere(books):
    write(SimpleNamespace(app=mounts_of(books.app)["/red"]), 11)
    mounted = {"SCRIPT_NAME": "/a b"}

    def links(path: str, status: int = 200) -> set[str]:
        page = books.get(path, extra_environ=mounted, status=status)
        found = page.html.select("a[href], form[action]")
        return {urlsplit(each.get("href") or each["action"]).path for each in found}

    assert links("/") == {"/a%20b/red/", "/a%20b/blue/", "/a%20b/experiments/"}
    assert links("/red/") == {"/a%20b/red/", "/a%20b/red/export.csv"}
    assert links("/red/nothing", 404) == {"/a%20b/red/"}
    assert books.get("/red?page=2", extra_environ=mounted, status=302).location.endswith("/a%20b/red/?page=2")
    signed = books.post("/red/", {"name": "Ada", "message": "Hello"}, extra_environ=mounted, status=303)
    assert urlsplit(signed.location).path == "/a%20b/red/"


def test_there_is_a_page_for_it_when_nothing_is_mounted_at_the_address(books):
    assert "There is no such page here." in books.get("/green/", status=404)


@pytest.fixture
def command(development_ini) -> list[str]:
    return [sys.executable, "-m", "guestbook", str(development_ini)]


def test_it_serves_where_it_says_when_it_is_started_as_a_program(command):
    """A real server, found by the address that it announces, is used by a real client."""
    server = subprocess.Popen(
        [*command, "--port", "0"], cwd=EXAMPLES, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        announced = server.stdout.readline()
        found = re.fullmatch(r"Guestbook on http://127\.0\.0\.1:(\d+)/ \(stop with Ctrl-C\)\n", announced)
        assert found, announced + (server.stderr.read() if server.poll() is not None else "")
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=TIMEOUT)
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert exchange(connection, "POST", "/red/", "name=Ada&message=Hello", form)[0] == 303
        assert '<p class="message">Hello</p>' in exchange(connection, "GET", "/red/")[1]
        assert "Hello" not in exchange(connection, "GET", "/blue/")[1]
        assert exchange(connection, "GET", "/red/export.csv")[1].endswith(",Ada,Hello\r\n")
        told = re.fullmatch(
            rf"What .*: http://127\.0\.0\.1:{found[1]}(/_sqlasession/\?token=\S+)\n", server.stdout.readline()
        )
        assert told
        connection.request("GET", told[1])
        with connection.getresponse() as entered:
            cookie = entered.headers["Set-Cookie"].partition(";")[0]
        seen = exchange(connection, "GET", "/_sqlasession/", None, {"Cookie": cookie})[1]
        assert "<b>POST</b> /red/" in seen
        assert exchange(connection, "GET", "/_sqlasession/")[0] == 404
        connection.close()
    finally:
        server.terminate()
        rest, logged = server.communicate(timeout=TIMEOUT)
    # What waitress says of a machine that is too busy to start its threads at once.
    logged = re.sub(r"^.* WARNING waitress\.queue: Task queue depth is \d+\n", "", logged, flags=re.MULTILINE)
    assert (rest, logged) == ("", "")


def exchange(connection: http.client.HTTPConnection, *request: Any) -> tuple[int, str]:
    connection.request(*request)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_one_line_names_the_setting_when_the_port_is_taken(command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [*command, "--port", str(port)], cwd=EXAMPLES, capture_output=True, text=True, timeout=TIMEOUT
        )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"Cannot serve on 127.0.0.1:{port} (--port): ")
    assert "make demo PORT=8080" in ended.stderr


def test_the_ini_is_named_when_its_own_port_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ini = tmp_path / "shop.ini"
        ini.write_text(
            (EXAMPLES / "guestbook" / "development.ini").read_text("utf-8").replace("6543", str(port)), "utf-8"
        )
        # In a process of its own: the ini configures the logging of all.
        command = [sys.executable, "-m", "guestbook", str(ini)]
        ended = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=TIMEOUT)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"Cannot serve on 127.0.0.1:{port} ('port' of [server:main] in shop.ini): ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "99999"], "a port is a number from 0 to 65535, not 99999"),
        (["nothing.ini"], "There is no file"),
    ],
)
def test_it_says_so_when_an_argument_is_wrong(examples, monkeypatch, capsys, arguments, said):
    from guestbook.__main__ import main

    monkeypatch.setattr(sys, "argv", ["guestbook", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code
    assert said in capsys.readouterr().err + str(ended.value)
