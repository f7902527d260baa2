"""The experiments of the page, in their order, with what it says about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import getsource

from . import runs
from .runs import Found, Shop

__all__ = ["Experiment", "make_experiments"]


@dataclass
class Experiment:
    """A button of the page.

    :param name: the end of its address, and the anchor on the page.
    :param story: what it does.
    :param look: what to look for.
    :param views: those whose code is shown, by "METHOD /path".
    :param page: of the documentation.
    """

    name: str
    title: str
    button: str
    story: str
    look: str
    run: Callable[[Shop], Found]
    views: tuple[str, ...]
    page: str
    #: what the last run has found, by the title of the shop
    found: dict[str, Found] = field(default_factory=dict)

    def code(self, shop: Shop) -> str:
        """The code of the shop that it runs."""
        return "\n\n".join(getsource(shop.views[name]) for name in self.views)


def make_experiments() -> list[Experiment]:
    return [
        Experiment(
            "failure",
            "A request fails after its INSERT",
            "Order a ticket",
            "The order is stored, and then the page that says thank you raises an error.",
            "The client is told 500 both times. Is there an order that nobody knows of?",
            runs.fail,
            ("POST /order",),
            "transactions",
        ),
        Experiment(
            "last-ticket",
            "Two buyers of the last ticket",
            "Buy it twice at once",
            "Two requests look at the last ticket at the same time, both see it, and both buy it. The database lets one"
            " of them do so.",
            "The other buyer: told that it is sold out, in attempt 2, or shown an error?",
            runs.last_ticket,
            ("POST /buy",),
            "retries",
        ),
        Experiment(
            "outage",
            "The database away, and back",
            "Take the database away",
            "A switch: it moves the shop's SQLite file, so that it cannot be opened, and back.",
            "503 with Retry-After, which clients and load balancers understand, or 500, which is a bug; and 200 once it"
            " is back.",
            runs.away,
            ("GET /",),
            "unavailable",
        ),
        Experiment(
            "streams",
            "Twenty event streams on a pool of two connections",
            "Open twenty streams",
            "Twenty clients watch how many tickets are left. Each has its first event, and waits for the next one.",
            "How many get an event, and how many connections the open streams hold while they wait.",
            runs.streams,
            ("GET /events",),
            "streams",
        ),
        Experiment(
            "slow-readers",
            "Two slow readers",
            "Read slowly",
            "Two clients on a slow network read a long page. The server has it from the application, and sends it for"
            " minutes, as gunicorn and uWSGI do. (waitress would keep up to 16 MB in memory, and close the response"
            " earlier.)",
            "How many connections are held meanwhile, and what another visitor gets.",
            runs.slow_readers,
            ("GET /catalogue",),
            "transactions",
        ),
        Experiment(
            "leak",
            "A connection that is not given back",
            "Ask for the report three times",
            "The report takes a connection of its own, and forgets it. The pool has two.",
            "Nobody can mend that from outside: the third client gets none. But does somebody say where it is lost?",
            runs.leak,
            ("GET /report",),
            "leaks",
        ),
        Experiment(
            "n-plus-one",
            "One SELECT for each row, and its cure",
            "List the buyers",
            "The page lists ten concerts, and the buyers of each. SQLAlchemy loads these when they are asked for.",
            "Eleven statements, or two. Who says that, and how to mend it? Here it is the check for tests,"
            " no_n_plus_one(); the inspector shows the same.",
            runs.n_plus_one,
            ("GET /buyers", "GET /buyers-at-once"),
            "testing",
        ),
    ]
