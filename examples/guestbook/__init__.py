"""A guestbook: a small application that shows how to use sqlasession_middleware.

Read ``models.py`` and ``app.py`` first, then ``development.ini``.
"""

from .factories import guestbook, mount

__all__ = ["guestbook", "mount"]
