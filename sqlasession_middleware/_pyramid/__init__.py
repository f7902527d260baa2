"""What ``config.include("sqlasession_middleware.pyramid")`` is made of.

Belongs here: whatever imports Pyramid or the ``transaction`` package. Does not belong here: what a request owns, and
how it is committed and repeated (``_scope``, ``_transaction``). The WSGI middleware does that, around Pyramid.
"""
