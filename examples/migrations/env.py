"""Alembic's environment: it migrates the database of the application that an ini file describes.

The application is loaded as a server would load it, and provides its engine and its tables. So the URL, the options of
the engine and the models are configured in one place only. Where it has tenants, each of them is migrated, or one.

    alembic -c development.ini upgrade head
    alembic -c development.ini check
    alembic -c development.ini revision --autogenerate -m "Add a table"
    alembic -c tenants.ini upgrade head
    alembic -c tenants.ini -x tenant=acme upgrade head
"""

import sys
from pathlib import Path

from alembic import context
from paste.deploy import loadapp
from sqlalchemy import text

from sqlasession_middleware.tenants import TenantsMiddleware


def migrate(app):
    options = {
        "target_metadata": app.metadata,
        "render_as_batch": app.engine.dialect.name == "sqlite",  # SQLite cannot alter a table in place: copy it.
    }
    if context.is_offline_mode():  # alembic upgrade head --sql
        context.configure(url=app.engine.url, literal_binds=True, **options)
        with context.begin_transaction():
            context.run_migrations()
        return
    with app.engine.connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            if connection.dialect.name == "postgresql":  # Several processes may do this at once.
                connection.execute(text("SELECT pg_advisory_xact_lock(8517, hashtext(current_schema()))"))
            context.run_migrations()


def migrate_tenants(tenants, names):
    failed = []
    for number, name in enumerate(names, 1):
        try:
            application = tenants.application(name)
            application.create_schema()
            migrate(application)
            print(f"{number} of {len(names)}: {name} is migrated")
        except Exception as error:
            failed.append(name)
            print(f"{number} of {len(names)}: {name} has failed: {type(error).__name__}: {error}", file=sys.stderr)
    if failed:
        sys.exit(f"{len(failed)} of {len(names)} tenants have failed: {', '.join(failed)}")


app = loadapp(f"config:{Path(context.config.config_file_name).resolve()}")
try:
    if isinstance(app, TenantsMiddleware):
        chosen = context.get_x_argument(as_dictionary=True).get("tenant")
        migrate_tenants(app, [chosen] if chosen else app.names())
    else:
        migrate(app)
finally:
    app.dispose()
