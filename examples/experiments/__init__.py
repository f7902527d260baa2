"""Experiments: what comes of a failure with sqlasession_middleware, and without it.

Read ``with_library.py`` and ``by_hand.py`` side by side, then ``runs.py``.
"""

from .factories import entrance, experiments

__all__ = ["entrance", "experiments"]
