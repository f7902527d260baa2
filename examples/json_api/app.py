"""A JSON API in Flask: documents are uploaded, and a job counts their words.

Run it in this folder, upload a file, and look at it when the job is done::

    gunicorn --bind 127.0.0.1:8000 --threads 4 app:app
    curl -F file=@app.py http://127.0.0.1:8000/documents
    curl http://127.0.0.1:8000/documents/1
"""

import os
from typing import Any, cast

import flask
from documents import Base, Document, count_words
from flask import Flask, url_for
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from werkzeug.exceptions import HTTPException
from werkzeug.utils import secure_filename

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.request import DatabaseRequest

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///documents.db")


class ApiRequest(DatabaseRequest, flask.Request):  # type: ignore[misc]  # Each has an "application" of its own.
    """Flask's request, with ``get_or_404()`` and ``paginate()``."""


app = Flask(__name__)
app.request_class = ApiRequest
app.config["MAX_CONTENT_LENGTH"] = 50_000
request = cast(ApiRequest, flask.request)


@app.get("/documents")
def list_documents() -> dict[str, Any]:
    page = request.paginate(select(Document).order_by(Document.id))
    return {"documents": [each.as_dict() for each in page], "next_page": page.next_num}


@app.post("/documents")
def add_document() -> tuple[dict[str, Any], int, dict[str, str]]:
    file = request.files["file"]  # Without one, Flask answers 400.
    name = secure_filename(file.filename or "")[:100]
    if not name:
        flask.abort(400, "The file has no name.")
    document = Document(name=name, content=file.read())
    session.add(document)
    session.flush()  # This sets the id, and finds out whether the name is taken.
    database.background(count_words, document.id)  # It begins after the commit.
    return document.as_dict(), 202, {"Location": url_for("show_document", number=document.id)}


@app.get("/documents/<int:number>")
def show_document(number: int) -> dict[str, Any]:
    return request.get_or_404(Document, number).as_dict()


@app.errorhandler(HTTPException)
def describe(error: HTTPException) -> tuple[dict[str, Any], int]:
    return {"error": error.description}, error.code or 500


@app.errorhandler(IntegrityError)
def refuse_taken_name(error: IntegrityError) -> tuple[dict[str, Any], int]:
    return {"error": "There is a document of that name."}, 409  # Like any 4xx or 5xx, it rolls back.


database = SQLASessionMiddleware(
    app.wsgi_app, DATABASE_URL, name="documents", metadata=Base.metadata, transaction={"attempts": 3}, unavailable=True
)
app.wsgi_app = database  # type: ignore[method-assign]  # as Flask documents it
database.init_database()
