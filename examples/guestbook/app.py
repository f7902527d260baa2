"""The guestbook: a list of entries, a form, and a CSV export.

``session`` is the Session of the current request. This module never opens, commits or closes it: ``transaction = true``
in the ini file commits a request that succeeds, and rolls back the others.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from sqlalchemy import select
from webob import Response
from webob.exc import HTTPBadRequest, HTTPMethodNotAllowed, HTTPNotFound, HTTPSeeOther

from sqlasession_middleware import application, session
from sqlasession_middleware.request import Request

from .forms import EntryForm
from .models import Entry
from .pages import Site

PAGE_SIZE = 10
EXPORT_BATCH = 500


class Guestbook(Site):
    """One guestbook. The middleware determines its database: see ``development.ini``."""

    def __init__(self, title: str, color: str) -> None:
        super().__init__(title, color)
        self._tables_exist = False

    def respond(self, request: Request) -> Response:
        self._create_tables()
        allowed = {"/": ("GET", "HEAD", "POST"), "/export.csv": ("GET", "HEAD")}.get(request.path_info)
        if allowed is None:
            raise HTTPNotFound("This guestbook has no such page.")
        if request.method not in allowed:
            raise HTTPMethodNotAllowed(headers={"Allow": ", ".join(allowed)})
        if request.path_info == "/export.csv":
            return export()
        if request.method == "POST":
            return self.sign(request)
        return self.list_entries(request, EntryForm())

    def list_entries(self, request: Request, form: EntryForm, status: int = 200) -> Response:
        """One page of entries, newest first, under the form."""
        page = request.paginate(select(Entry).order_by(Entry.id.desc()), per_page=PAGE_SIZE)
        return Response(self.render(request, "guestbook.html", form=form, page=page), status=status)

    def sign(self, request: Request) -> Response:
        """Add an entry, or show the form again with its errors."""
        form = EntryForm.from_fields(read_fields(request))
        if form.errors:
            return self.list_entries(request, form, status=422)
        entry = Entry(name=form.name, message=form.message)
        session.add(entry)
        session.flush()  # It gives the entry its number.
        # Redirect, because reloading this page would add the entry again.
        return HTTPSeeOther(location=f"{request.application_url}/#entry-{entry.id}")

    def _create_tables(self) -> None:
        """Create the tables at the first request. Threads and processes may do this at the same time."""
        if not self._tables_exist:
            application.init_database()
            self._tables_exist = True


def read_fields(request: Request) -> dict[str, object]:
    try:
        return dict(request.POST.items())
    except (ValueError, DeprecationWarning):  # WebOb raises the warning for a form that is not in UTF-8.
        raise HTTPBadRequest("The form could not be read.") from None


def export() -> Response:
    """Export all entries, oldest first. They are read while they are sent, so they need not fit into memory."""
    return Response(
        app_iter=csv_chunks(),
        content_type="text/csv",
        charset="utf-8",
        content_disposition='attachment; filename="guestbook.csv"',
    )


def csv_chunks() -> Iterator[bytes]:
    # The server iterates over this after the application has returned. The session stays open until the end.
    oldest_first = select(Entry).order_by(Entry.id).execution_options(yield_per=EXPORT_BATCH)
    with session.scalars(oldest_first) as entries:  # If the client disconnects, close() of the body ends this block.
        # Not before the query: after the first chunk, a failure of the database could be no 503 any more.
        yield csv_lines([("written", "name", "message")])
        for batch in entries.partitions():
            yield csv_lines([(f"{entry.written.isoformat()}Z", entry.name, entry.message) for entry in batch])


def csv_lines(rows: list[tuple[str, str, str]]) -> bytes:
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows(rows)
    return lines.getvalue().encode()
