"""OpenTelemetry: a span for each request, with a child span for each statement.

Run it in this folder, and see the spans of a request on the terminal::

    waitress-serve --listen 127.0.0.1:8000 opentelemetry_app:app
    curl http://127.0.0.1:8000/
"""

from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from webob import Response
from webob.dec import wsgify

from sqlasession_middleware import SQLASessionMiddleware, session


class Base(DeclarativeBase):
    pass


class Visit(Base):
    __tablename__ = "visit"
    id: Mapped[int] = mapped_column(primary_key=True)


@wsgify
def app(request):
    session.add(Visit())
    return Response(f"Visit number {session.scalar(select(func.count(Visit.id)))}\n", content_type="text/plain")


# In production, use a BatchSpanProcessor with an OTLPSpanExporter.
provider = TracerProvider(resource=Resource.create({"service.name": "visits"}))
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))

database = SQLASessionMiddleware(app, "sqlite:///visits.db", metadata=Base.metadata, transaction=True)
database.init_database()
SQLAlchemyInstrumentor().instrument(
    # All engines of this application, including binds and replicas, regardless of the order of imports.
    engines=list(database.engines.values()),
    tracer_provider=provider,
    # The instrumentation declares SQLAlchemy older than 2.1, but works with 2.1.
    skip_dep_check=True,
)
# Outermost, so that the spans of the statements are children of the request's span.
app = OpenTelemetryMiddleware(database, tracer_provider=provider)
