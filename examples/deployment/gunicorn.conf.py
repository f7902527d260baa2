"""gunicorn: two processes of eight threads serve the application of ``production.ini``.

Run it in this folder, where gunicorn finds this file automatically::

    gunicorn
"""

from pathlib import Path

here = Path(__file__).resolve().parent

wsgi_app = f"paste.deploy:loadapp('config:{here}/production.ini')"
pythonpath = str(here.parent)  # The folder of the guestbook.
bind = "127.0.0.1:8000"

# The application is loaded once, before the processes are forked. They share no connection, so no post_fork hook is
# needed.
preload_app = True
workers = 2
worker_class = "gthread"
threads = 8  # As many as the pool has connections, see production.ini.

# In seconds. A worker that has not reported for this long is killed, together with its connections. This does not limit
# a slow request in a thread; use the database's statement_timeout for that.
timeout = 30
# Time for requests to end when the server stops or reloads.
graceful_timeout = 30

# Each worker is replaced after this many requests, but not all at once.
max_requests = 10_000
max_requests_jitter = 1_000
