"""Jobs of a queue, with Celery or RQ: each is a transaction, and is called again if it meets a deadlock.

Install ``celery[redis]`` or ``rq``, start a Redis server, and run one of these in this folder::

    celery --app celery_app worker
    rq worker

The application hands over a job once the order is durable, so that no worker looks for it too early::

    after_commit(lambda: celery_app.confirm_order.delay(order_id))
    after_commit(lambda: Queue(connection=Redis()).enqueue("shop_jobs.confirm_order", order_id))

Both fork, and each child makes connections of its own.
"""

import os

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlasession_middleware import SQLASessionMiddleware, session


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "shop_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    confirmations: Mapped[int] = mapped_column(default=0)


database = SQLASessionMiddleware.without_app(
    os.environ.get("DATABASE_URL", "sqlite:///shop.db"), metadata=Base.metadata, transaction={"attempts": 3}
)


def confirm(order_id: int) -> int:
    order = session.get_one(Order, order_id, with_for_update=True)
    order.confirmations += 1
    return order.confirmations


def confirm_order(order_id: int) -> int:
    """The job."""
    return database.run(confirm, order_id)
