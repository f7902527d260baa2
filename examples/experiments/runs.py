"""What the experiments do: each asks a shop for something, and measures what has come of it.

Each function runs with both shops, the one with the library and the one by hand. ``experiments.py`` describes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier, Thread
from time import sleep
from typing import TYPE_CHECKING, Any

from .asking import Asked, grouped
from .database import POOL_SIZE, Database
from .entrance import way_in
from .hooks import MEETING, Meeting

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

__all__ = ["Found", "Shop", "away", "fail", "last_ticket", "leak", "n_plus_one", "slow_readers", "streams"]

#: Of the log, so that it shows no folders of this machine.
FOLDER = f"{Path(__file__).parent.parent}/"
STREAMS = 20
#: Seconds after which a stream is given up that has lost the others.
PATIENCE = 30


@dataclass
class Shop:
    """One of the two shops.

    :param path: where it is mounted.
    :param views: its views, by "METHOD /path".
    :param forgotten: the results that its report has left open.
    :param watching: a block that raises an AssertionError if it finds N+1.
    """

    title: str
    path: str
    app: WSGIApplication
    database: Database
    views: dict[str, Callable[..., Any]]
    forgotten: list[Any]
    watching: Callable[[], AbstractContextManager[None]]
    #: what was asked since the switch was moved
    since_away: list[Asked] = field(default_factory=list)
    #: of the request that has pressed the button
    environ: Mapping[str, Any] = field(default_factory=dict)

    def begin(self, label: str, target: str, **environ: Any) -> Asked:
        """Ask, and leave the response open.

        :param target: ``GET /path``, below the shop's own.
        """
        method, path = target.split()
        app, script, mounted = way_in(self.environ)
        return Asked(app, label, method, f"{mounted}{self.path}{path}", SCRIPT_NAME=script, **environ)

    def ask(self, label: str, target: str, **environ: Any) -> Asked:
        """Ask, and read the whole response."""
        asked = self.begin(label, target, **environ)
        while asked.step():
            pass
        asked.close()
        return asked


@dataclass
class Found:
    """What an experiment has found with one shop.

    :param facts: what was measured.
    :param requests: those that were sent; the last one of each is shown with its log.
    :param told: what the library has said: nothing of it is there by hand.
    """

    facts: dict[str, object]
    requests: list[Asked]
    told: str = ""

    @property
    def groups(self) -> list[tuple[int, Asked]]:
        return list(grouped(self.requests))


# -- the experiments


def fail(shop: Shop) -> Found:
    shop.database.fill()
    asked = shop.ask("Order a ticket", "POST /order")
    return Found({"The client was told": asked.status, "Orders stored": shop.database.count_orders()}, [asked])


def last_ticket(shop: Shop) -> Found:
    shop.database.fill()
    meeting = Meeting()
    requests: list[Asked] = []

    def buy() -> None:
        requests.append(shop.ask("Buy the last ticket", "POST /buy", **{MEETING: meeting}))
        meeting.one_is_done.set()

    run_together([buy, buy])
    statuses = ", ".join(str(each.status) for each in requests)
    return Found({"The clients were told": statuses, "Tickets sold": shop.database.count_orders()}, requests)


def away(shop: Shop) -> Found:
    """Move the switch, and ask before and after."""
    if not shop.database.is_away:
        shop.database.fill()
        shop.since_away = [shop.ask("Before", "GET /")]
        shop.database.take_away()
        shop.since_away.append(shop.ask("The database is away", "GET /"))
    else:
        shop.database.bring_back()
        for _ in range(PATIENCE * 10):
            shop.since_away.append(shop.ask("The database is back", "GET /"))
            if shop.since_away[-1].status != 503:
                break
            sleep(0.1)  # A visitor has asked three times meanwhile, and so opened the breaker for a second.
    return Found({each.label: each.status for each in shop.since_away}, list(shop.since_away))


def streams(shop: Shop) -> Found:
    shop.database.fill()
    requests: list[Asked] = []
    all_began, all_seen = Barrier(STREAMS + 1), Barrier(STREAMS + 1)

    def watch() -> None:
        asked = shop.begin("Watch the tickets", "GET /events")
        if asked.step():
            asked.pause("the client has the first event, and waits for the next one")
        requests.append(asked)
        all_began.wait(PATIENCE)
        all_seen.wait(PATIENCE)
        asked.close()

    threads = start_together([watch] * STREAMS)
    all_began.wait(PATIENCE)
    facts = {
        "Streams that got an event": sum(each.status == 200 for each in requests),
        "Connections held by the open streams": f"{shop.database.held()} of {POOL_SIZE}",
    }
    all_seen.wait(PATIENCE)
    for thread in threads:
        thread.join()
    return Found(facts, requests)


def slow_readers(shop: Shop) -> Found:
    shop.database.fill()
    readers = [shop.begin("A slow reader of the catalogue", "GET /catalogue") for _ in range(POOL_SIZE)]
    for each in readers:
        each.step()
        each.pause("the server has the page, and sends it as slowly as the client reads")
    held = shop.database.held()
    another = shop.ask("Another visitor meanwhile", "GET /")
    for each in readers:
        each.close()
    return Found(
        {"Connections held by the slow readers": f"{held} of {POOL_SIZE}", "The other visitor got": another.status},
        [*readers, another],
    )


def leak(shop: Shop) -> Found:
    shop.database.fill()
    messages: list[str] = []
    handler = Messages(messages)
    logger = logging.getLogger("sqlasession_middleware.leaks")
    logger.addHandler(handler)
    try:
        requests = [shop.ask("Ask for the report", "GET /report") for _ in range(POOL_SIZE + 1)]
    finally:
        logger.removeHandler(handler)
    held = shop.database.held()
    while shop.forgotten:  # Or the other experiments would find no connection.
        shop.forgotten.pop().connection.close()
    facts = {
        "The clients were told": ", ".join(str(each.status) for each in requests),
        "Connections that never came back": held,
        "Warnings in the log": len(messages),
    }
    return Found(facts, requests, shorten(messages[0]) if messages else "")


def n_plus_one(shop: Shop) -> Found:
    shop.database.fill()
    told = ""
    try:
        with shop.watching():
            asked = shop.ask("List the buyers", "GET /buyers")
    except AssertionError as error:
        told = str(error).replace(FOLDER, "")
    cured = shop.ask("List the buyers, cured", "GET /buyers-at-once")
    return Found({"Statements": count_reads(asked), "Statements, cured": count_reads(cured)}, [asked, cured], told)


# -- tools


class Messages(logging.Handler):
    """A handler that collects messages."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def shorten(message: str, calls: int = 4) -> str:
    """A message with a stack, with its last calls only."""
    first, *stack = message.replace(FOLDER, "").rstrip().splitlines()
    return "\n".join([first, "  …", *stack[-2 * calls :]])


def count_reads(asked: Asked) -> int:
    return sum(line.kind == "statement" and line.text.startswith("SELECT") for line in asked.lines)


def start_together(calls: Iterable[Callable[[], None]]) -> list[Thread]:
    threads = [Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def run_together(calls: Iterable[Callable[[], None]]) -> None:
    for thread in start_together(calls):
        thread.join()
