"""Alembic's environment: it migrates the database of the application that an ini file describes.

The application is loaded as a server would load it, and provides its engine and its tables. So the URL, the options of
the engine and the models are configured in one place only.

    alembic -c development.ini upgrade head
    alembic -c development.ini check
    alembic -c development.ini revision --autogenerate -m "Add a table"
"""

from pathlib import Path

from alembic import context
from paste.deploy import loadapp

ini = Path(context.config.config_file_name).resolve()
app = loadapp(f"config:{ini}")
options = {
    "target_metadata": app.metadata,
    "render_as_batch": app.engine.dialect.name == "sqlite",  # SQLite cannot alter a table in place: copy it.
}

try:
    if context.is_offline_mode():  # alembic upgrade head --sql
        context.configure(url=app.engine.url, literal_binds=True, **options)
        with context.begin_transaction():
            context.run_migrations()
    else:
        with app.engine.connect() as connection:
            context.configure(connection=connection, **options)
            with context.begin_transaction():
                context.run_migrations()
finally:
    app.dispose()
