"""The page of experiments of ``make demo``: what it claims is measured here, with the library and without it."""

from __future__ import annotations

import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from io import StringIO
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import IO, Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest
from bs4 import BeautifulSoup
from paste.deploy import loadapp
from werkzeug.test import Client

from sqlasession_middleware import metadata

from .ports import free_port

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PATIENCE = 60

#: Ask for a page, with redirects: the status, the headers and the text.
Visit = Callable[[str, str], tuple[int, Any, str]]


@pytest.fixture
def app(monkeypatch, tmp_path) -> Iterator[Any]:
    """All of development.ini, with its SQLite files in a folder of the test's own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    shutil.copy(EXAMPLES / "guestbook" / "development.ini", tmp_path)
    app = loadapp(f"config:{tmp_path}/development.ini")
    yield app
    for mounted in mounts_of(app).values():
        mounted.dispose()
    # Other tests count on their own tables being all that is in the shared metadata.
    for name in [each for each in sys.modules if each.partition(".")[0] in ("guestbook", "experiments")]:
        del sys.modules[name]
    metadata.remove(metadata.tables["guestbook_entry"])


def mounts_of(app: Any) -> dict[str, Any]:
    """What the application has by its paths, inside of all middleware."""
    while not hasattr(app, "mounts"):
        app = app.app
    mounts: dict[str, Any] = app.mounts
    return mounts


class Server(ThreadingMixIn, WSGIServer):
    """A server with a thread for each request, whose end waits for them."""

    request_queue_size = 50


class Handler(WSGIRequestHandler):
    """It does not log, and no test is about the errors that it is asked to write."""

    def log_message(self, *arguments: object) -> None: ...

    def get_stderr(self) -> IO[str]:
        return StringIO()


@pytest.fixture
def port(app) -> Iterator[int]:
    """Where it is served, in this process."""
    server = make_server("127.0.0.1", free_port(), app, Server, Handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join(PATIENCE)
    server.server_close()


@pytest.fixture(params=["called", "served"])
def visit(request, app) -> Visit:
    """A client that calls the application, or one of a real server."""

    def call(method: str, path: str) -> tuple[int, Any, str]:
        answer = Client(app).open(path, method=method, follow_redirects=True, buffered=True)
        return answer.status_code, answer.headers, answer.text

    def send(method: str, path: str) -> tuple[int, Any, str]:
        try:
            with urlopen(Request(f"http://127.0.0.1:{port}{path}", method=method), timeout=PATIENCE) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.headers, error.read().decode()

    if request.param == "called":
        return call
    port = request.getfixturevalue("port")
    return send


class Seen(NamedTuple):
    """What the page shows of one shop."""

    facts: dict[str, str]
    log: list[str]
    told: str


def press(visit: Visit, name: str) -> tuple[Seen, Seen]:
    """Press a button of the page; what it shows with the library, and by hand."""
    status, _, text = visit("POST", f"/experiments/{name}")
    assert status == 200
    library, hand = (_seen(each) for each in BeautifulSoup(text, "html.parser").select(f"#{name} article"))
    return library, hand


def _seen(article: Any) -> Seen:
    facts = {each.dt.text: each.dd.text for each in article.select("dl div")}
    told = article.select_one(".told")
    lines = [" ".join(each.text.split()) for each in article.select(".log p, .log li")]
    return Seen(facts, lines, told.text if told else "")


def test_nothing_is_stored_when_the_request_fails_after_its_insert(visit):
    library, hand = press(visit, "failure")
    assert library.facts == {"The client was told": "500", "Orders stored": "0"}
    assert hand.facts == {"The client was told": "500", "Orders stored": "1"}
    insert = "INSERT INTO orders (buyer, concert_id) VALUES (?, ?) ('Linus', 1)"
    assert [line for line in library.log if line in (insert, "COMMIT", "ROLLBACK")] == [insert, "ROLLBACK"]
    assert [line for line in hand.log if line in (insert, "COMMIT", "ROLLBACK")] == [insert, "COMMIT"]


def test_the_other_buyer_is_told_of_it_in_attempt_2_when_the_ticket_is_gone(visit):
    library, hand = press(visit, "last-ticket")
    assert sorted(library.facts["The clients were told"].split(", ")) == ["200", "409"]
    assert sorted(hand.facts["The clients were told"].split(", ")) == ["200", "500"]
    assert library.facts["Tickets sold"] == hand.facts["Tickets sold"] == "1"
    assert {"200 You have it, in attempt 1.", "409 Sold out."} <= set(library.log)
    assert [line for line in library.log if line.startswith("attempt")].count("attempt 2") == 1
    assert any(line.startswith("500 OperationalError") and "locked" in line for line in hand.log)
    assert not any(line.startswith("attempt") for line in hand.log)


def test_clients_are_told_503_until_it_is_back_when_the_database_is_away(visit):
    library, hand = press(visit, "outage")
    assert library.facts == {"Before": "200", "The database is away": "503"}
    assert hand.facts == {"Before": "200", "The database is away": "500"}
    assert any(line.startswith("503 Retry-After: 1.") for line in library.log)
    status, headers, _ = visit("GET", "/experiments/library/")
    assert (status, headers["Retry-After"]) == (503, "1")
    page = BeautifulSoup(visit("GET", "/experiments/")[2], "html.parser")
    assert page.select_one("#outage button").text == "Bring the database back"

    library, hand = press(visit, "outage")
    assert library.facts == {"Before": "200", "The database is away": "503", "The database is back": "200"}
    assert hand.facts == {"Before": "200", "The database is away": "500", "The database is back": "200"}
    assert visit("GET", "/experiments/library/")[0] == 200
    assert press(visit, "outage")[0].facts == {"Before": "200", "The database is away": "503"}


def test_it_comes_back_when_visitors_have_opened_the_breaker(visit):
    press(visit, "outage")
    assert [visit("GET", "/experiments/library/")[0] for _ in range(4)] == [503] * 4
    library, _ = press(visit, "outage")
    assert library.facts["The database is back"] == "200"


def test_the_database_comes_back_when_another_button_is_pressed(visit):
    press(visit, "outage")
    library, hand = press(visit, "failure")
    assert (library.facts["Orders stored"], hand.facts["Orders stored"]) == ("0", "1")
    assert visit("GET", "/experiments/by-hand/")[0] == 200


def test_the_demo_begins_anew_when_the_last_one_ended_while_the_database_was_away(app, tmp_path):
    for name in ("experiments-library.db", "experiments-library.away.db", "experiments-library.db-wal"):
        (tmp_path / name).write_bytes(b"left over")
    status = Client(app).get("/experiments/library/", buffered=True).status_code
    page = BeautifulSoup(Client(app).get("/experiments/").text, "html.parser")
    assert status == 200
    assert page.select_one("#outage button").text == "Take the database away"


def test_open_streams_hold_no_connection_when_there_are_twenty(visit):
    library, hand = press(visit, "streams")
    assert library.facts == {"Streams that got an event": "20", "Connections held by the open streams": "0 of 2"}
    assert hand.facts == {"Streams that got an event": "2", "Connections held by the open streams": "2 of 2"}
    assert "Watch the tickets × 20" in library.log
    assert {"Watch the tickets × 2", "Watch the tickets × 18"} <= set(hand.log)
    assert any(line.startswith("500 TimeoutError: QueuePool limit") for line in hand.log)


def test_slow_readers_hold_no_connection_when_another_visitor_comes(visit):
    library, hand = press(visit, "slow-readers")
    held, got = "Connections held by the slow readers", "The other visitor got"
    assert library.facts == {held: "0 of 2", got: "200"}
    assert hand.facts == {held: "2 of 2", got: "500"}


def test_the_line_is_named_that_loses_a_connection_when_one_is_not_given_back(visit):
    library, hand = press(visit, "leak")
    lost, warnings = "Connections that never came back", "Warnings in the log"
    assert library.facts == {"The clients were told": "200, 200, 503", lost: "2", warnings: "2"}
    assert hand.facts == {"The clients were told": "200, 200, 500", lost: "2", warnings: "0"}
    assert re.search(
        r'File "experiments/with_library\.py", line \d+, in report\n    connection = application\.engine\.connect\(\)',
        library.told,
    )
    assert hand.told == ""


def test_the_relationship_and_the_cure_are_named_when_each_row_sends_a_select(visit):
    library, hand = press(visit, "n-plus-one")
    assert library.facts == hand.facts == {"Statements": "11", "Statements, cured": "2"}
    assert "10 times: SELECT orders" in library.told
    assert ".options(selectinload(Concert.orders))" in library.told
    assert hand.told == ""


@pytest.mark.parametrize("visit", ["called"], indirect=True)
def test_all_connections_are_back_when_every_button_was_pressed_twice(app, visit):
    mounted = mounts_of(app)["/experiments"]
    names = [name for name in mounted.app.experiments if name != "outage"]
    assert len(names) == 6
    for name in names:
        before, again = press(visit, name), press(visit, name)
        if name != "last-ticket":  # Either of the buyers may be the first.
            assert again == before
    assert [shop.database.held() for shop in mounted.shops] == [0, 0]


def test_real_streams_hold_nothing_when_browsers_have_them_open(app, port):
    library, hand = (shop.database for shop in mounts_of(app)["/experiments"].shops)
    with ExitStack() as opened:

        def watch(path: str) -> int:
            client = opened.enter_context(closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE)))
            client.request("GET", path)
            answer = opened.enter_context(client.getresponse())
            assert answer.status != 200 or answer.readline() == b"data: 1\n"
            return answer.status

        assert [watch("/experiments/library/events") for _ in range(20)] == [200] * 20
        assert [watch("/experiments/by-hand/events") for _ in range(3)] == [200, 200, 500]
        assert hand.held() == 2
        # Each of them asks again each second.
        assert wait_until(lambda: library.held() == 0)


def wait_until(is_so: Callable[[], bool]) -> bool:
    waiting = threading.Event()
    return any(is_so() or waiting.wait(0.02) for _ in range(PATIENCE * 50))


def test_the_page_shows_both_sides_and_the_code_before_a_button_is_pressed(visit):
    status, headers, text = visit("GET", "/experiments")
    page = BeautifulSoup(text, "html.parser")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert not page.select("script, style, [style], [onclick]")
    assert len(page.select("section")) == len(page.select("form button")) == len(page.select(".look")) == 7
    assert [each.text for each in page.select("h3")] == ["With the library", "By hand"] * 7
    library, hand = (each.text for each in page.select("#failure details pre"))
    assert "session.flush()" in library
    assert "session.commit()" in hand
    assert len({each["id"] for each in page.select("[id]")}) == len(page.select("[id]"))


def test_every_link_of_the_page_leads_somewhere_when_it_is_mounted(app):
    client = Client(app)
    mounted = {"SCRIPT_NAME": "/a b"}
    page = BeautifulSoup(client.get("/experiments/", environ_overrides=mounted).text, "html.parser")
    links = {each["href"] for each in page.select("[href]")} | {each["action"] for each in page.select("form")}
    anchors = {each[1:] for each in links if each.startswith("#")}
    assert anchors == {each["id"] for each in page.select("section")}
    paths = {each.removeprefix("http://localhost/a%20b") for each in links if each.startswith("http:")}
    pressed = {f"/experiments/{anchor}" for anchor in anchors}
    shown = {f"/experiments/{shop}/{path}" for shop in ("library", "by-hand") for path in ("", "events")}
    assert paths == pressed | shown | {"/experiments/style.css"}
    assert links - {each for each in links if each.startswith(("#", "http:"))} == {"data:,", "../"}
    for path in ("/", "/experiments/style.css", "/experiments/library/", "/experiments/by-hand/"):
        assert client.get(path, buffered=True).status_code == 200
    assert client.post("/experiments/failure", environ_overrides=mounted).location == (
        "http://localhost/a%20b/experiments/#failure"
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/experiments/failure", 405),
        ("POST", "/experiments/nothing", 404),
        ("GET", "/experiments/library/nothing", 404),
        ("GET", "/experiments/by-hand/nothing", 404),
    ],
)
def test_there_is_no_such_page_when_nothing_is_at_the_address(app, method, path, status):
    assert Client(app).open(path, method=method, buffered=True).status_code == status
