"""The application of ``site.ini``: notes of who is logged in, and how often the browser has been here."""

import hashlib
import hmac
from collections.abc import Mapping
from wsgiref.types import WSGIApplication, WSGIEnvironment

from sqlalchemy import String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from webob import Request, Response
from webob.dec import wsgify
from webob.exc import HTTPBadRequest, HTTPUnauthorized
from werkzeug.middleware.proxy_fix import ProxyFix

from sqlasession_middleware import session


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"
    login: Mapped[str] = mapped_column(String(40), primary_key=True)
    digest: Mapped[bytes]


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    login: Mapped[str] = mapped_column(String(40))
    text: Mapped[str] = mapped_column(String(200))


def digest(login: str, password: str) -> bytes:
    return hashlib.scrypt(password.encode(), salt=login.encode(), n=2**14, r=8, p=1)


class Accounts:
    """An authenticator of repoze.who. The first who comes with a login gets an account."""

    def authenticate(self, environ: WSGIEnvironment, identity: Mapping[str, str]) -> str | None:
        login, given = identity["login"], digest(identity["login"], identity["password"])
        if not (0 < len(login) <= 40 and login.isprintable()):
            return None
        account = session.get(Account, login) or Account(login=login, digest=given)
        session.add(account)
        return login if hmac.compare_digest(account.digest, given) else None


@wsgify
def notes(request: Request) -> Response:
    if request.remote_user is None:
        raise HTTPUnauthorized  # repoze.who asks for the password.
    if request.method == "POST":
        text = request.POST.get("text")
        if not (isinstance(text, str) and 0 < len(text) <= 200 and text.isprintable()):  # It may be a file.
            raise HTTPBadRequest("A note has 1 to 200 characters, and one line.")
        session.add(Note(login=request.remote_user, text=text))
    visits = request.environ["beaker.session"]
    visits["count"] = visits.get("count", 0) + 1
    visits.save()
    mine = session.scalars(select(Note.text).where(Note.login == request.remote_user).order_by(Note.id))
    return Response(
        "\n".join([f"{request.remote_user}, visit {visits['count']}", *mine, ""]), content_type="text/plain"
    )


def make_app(global_conf: Mapping[str, str], **settings: str) -> WSGIApplication:
    return notes


def proxy_fix(app: WSGIApplication, global_conf: Mapping[str, str], **settings: str) -> ProxyFix:
    return ProxyFix(app)
