"""The inspector's pages, and the same as JSON.

All of them need no script, but for the list that renews itself. No page has a script, a style or an image within, so
that a text from a request cannot become one: their Content-Security-Policy allows the inspector's own files alone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from io import BytesIO
from json import dumps
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from werkzeug.wrappers import Request, Response

from .explain import Plan, explain, may_run
from .groups import grouped
from .pools import pools_of
from .sql import first_words, highlighted
from .timeline import WIDTH, draw, summed

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from sqlalchemy import Engine

    from .access import Access
    from .kept import Engines, Kept
    from .watch import Watch

__all__ = ["Pages"]

#: What the browser may load, and what it may do: the inspector's own files, and forms to its own addresses.
_POLICY: Final = "; ".join(
    (
        *("default-src 'none'", "style-src 'self'", "script-src 'self'", "img-src 'self'", "connect-src 'self'"),
        *("form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'"),
    )
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_FILES: Final = {"style.css": "text/css", "script.js": "text/javascript", "icon.svg": "image/svg+xml"}
_EXPLAIN: Final = re.compile(r"/r/([0-9a-f]+)/q/([0-9]{1,9})/explain")
_REQUEST: Final = re.compile(r"/r/([0-9a-f]+)(\.json)?")
#: How many bytes a form may have.
_FORM: Final = 4096


class Pages:
    """Answers requests below the inspector's path.

    :param path: the path, without a slash at its end.
    :param engines: returns all engines by their names.
    """

    def __init__(
        self, path: str, access: Access, watch: Watch, found: Engines, engines: Callable[[], Mapping[str, Engine]]
    ) -> None:
        self._path = path
        self._access = access
        self._watch = watch
        self._found = found
        self._engines = engines
        self._templates = Environment(
            loader=PackageLoader("sqlasession_middleware._inspector"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(ms=_milliseconds, clock=_clock, sql=highlighted, line=first_words)
        self._templates.globals.update(WIDTH=WIDTH)

    def answer(self, environ: WSGIEnvironment) -> Response | None:
        """The response to a request; None if the application is to answer."""
        access = self._access
        if not access.admits(environ):
            return None
        below = environ.get("PATH_INFO", "").removeprefix(self._path)
        root = quote(environ.get("SCRIPT_NAME", "").encode("latin-1") + self._path.encode())
        method = environ.get("REQUEST_METHOD", "")
        given = parse_qs(environ.get("QUERY_STRING", "")).get("token", [""])[0]
        if given and method in ("GET", "HEAD") and access.has_token(given):
            response = _redirect(root + (quote(below.encode("latin-1")) or "/"))
            response.headers.add("Set-Cookie", access.cookie(environ, f"{root}/"))
            return response
        if not access.has_cookie(environ):
            return None
        if method == "POST":
            return self._answer_post(environ, below, root)
        if method not in ("GET", "HEAD"):
            return None
        return self._answer_get(below, root)

    def _answer_get(self, below: str, root: str) -> Response:
        if not below:
            return _redirect(f"{root}/")
        name = below.removeprefix("/static/")
        if name in _FILES:
            content = files(__package__).joinpath("static", name).read_bytes()
            return _response(content, _FILES[name])
        if below == "/":
            return self._page("requests.html", root, requests=self._watch.summaries())
        if below == "/requests.json":
            return _json(self._watch.summaries())
        if below in ("/pools", "/pools.json"):
            pools = pools_of(self._engines())
            return _json(pools) if below.endswith(".json") else self._page("pools.html", root, pools=pools)
        asked = _REQUEST.fullmatch(below)
        kept = None if asked is None else self._watch.find(asked[1])
        if asked is None or kept is None:
            return self._page("missing.html", root, status=404)
        return _json(kept.data) if asked[2] else self._page_of(kept, root)

    def _page_of(self, kept: Kept, root: str) -> Response:
        data = kept.data
        can_run = {number: may_run(original.sql) for number, original in kept.originals.items()}
        page = self._page(
            "request.html",
            root,
            data=data,
            lanes=draw(data),
            parts=summed(data),
            groups=grouped(data["statements"]),
            can_run=can_run,
        )
        # Of a page without a referrer, a form has the origin "null".
        page.headers["Referrer-Policy"] = "same-origin"
        return page

    def _answer_post(self, environ: WSGIEnvironment, below: str, root: str) -> Response | None:
        asked = _EXPLAIN.fullmatch(below)
        if asked is None or not self._access.is_same_origin(environ):
            return None
        form = _read_form(environ)
        if not self._access.has_form_token(form.get("token", [""])[0]):
            return None
        kept = self._watch.find(asked[1])
        number = int(asked[2])
        if kept is None or number >= len(kept.data["statements"]):
            return self._page("missing.html", root, status=404)
        statement = kept.data["statements"][number]
        original = kept.originals.get(number)
        if original is None:
            plan = Plan([], [], statement["explain"])
        else:
            plan = explain(original, self._found, analyze="analyze" in form)
        accepted = Request(environ).accept_mimetypes.best_match(["text/html", "application/json"])
        if accepted == "application/json":
            return _json({"columns": plan.columns, "rows": plan.rows, "problem": plan.problem})
        told = {"data": kept.data, "statement": statement, "number": number, "plan": plan}
        return self._page("explain.html", root, **told)

    def _page(self, template: str, root: str, status: int = 200, **values: Any) -> Response:
        page = self._templates.get_template(template)
        html = page.render(root=root, form_token=self._access.form_token, **values)
        return _response(html, "text/html", status)


def _read_form(environ: WSGIEnvironment) -> dict[str, list[str]]:
    """The fields of a form. Its body can be read again, by the application."""
    try:
        length = int(environ.get("CONTENT_LENGTH", ""))
    except ValueError:
        return {}
    if not 0 < length <= _FORM:
        return {}
    body = environ["wsgi.input"].read(length)
    environ["wsgi.input"] = BytesIO(body)
    return parse_qs(body.decode("latin-1"))


def _response(content: str | bytes, kind: str, status: int = 200) -> Response:
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")  # Half a character of UTF-16 is no text.
    response = Response(content, status, content_type=f"{kind}; charset=utf-8")
    response.headers.update(_HEADERS)
    return response


def _json(content: Any) -> Response:
    return _response(dumps(content), "application/json")


def _redirect(address: str) -> Response:
    response = _response("", "text/plain", 303)
    response.headers["Location"] = address
    response.autocorrect_location_header = False
    return response


def _milliseconds(seconds: float) -> str:
    milliseconds = seconds * 1000
    return f"{milliseconds:.{0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2}f} ms"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
