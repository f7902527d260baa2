from __future__ import annotations

from alembic import context
from guests.models import Base
from pyramid.paster import get_appsettings, setup_logging
from sqlalchemy import engine_from_config

setup_logging(context.config.config_file_name)
settings = get_appsettings(context.config.config_file_name)
engine = engine_from_config(settings, prefix="sqlalchemy.")
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
