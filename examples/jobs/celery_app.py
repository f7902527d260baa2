"""The jobs of shop_jobs.py as tasks of Celery."""

import os

import shop_jobs
from celery import Celery

app = Celery("shop", broker=os.environ.get("REDIS_URL", "redis://localhost:6379/0"))


@app.task(acks_late=True)
def confirm_order(order_id: int) -> int:
    return shop_jobs.confirm_order(order_id)
