"""gunicorn: two processes of eight threads serve the application of ``production.ini``.

In this folder, where gunicorn finds this file by itself::

    gunicorn
"""

from pathlib import Path

here = Path(__file__).resolve().parent

wsgi_app = f"paste.deploy:loadapp('config:{here}/production.ini')"
pythonpath = str(here.parent)  # Where the guestbook is.
bind = "127.0.0.1:8000"

# The application is loaded once, before the processes are forked. They share no connection: there is nothing to do in
# a post_fork hook.
preload_app = True
workers = 2
worker_class = "gthread"
threads = 8  # As many as a process has connections, see production.ini.

# Seconds. A worker that is not heard of for so long is killed, and its connections with it. A thread's slow request is
# none of it: what limits that is the database's own statement_timeout.
timeout = 30
# For requests to end, when the server is told to stop or to reload.
graceful_timeout = 30

# Each worker is replaced after so many requests, not all at once.
max_requests = 10_000
max_requests_jitter = 1_000
