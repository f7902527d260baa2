"""What a request or a context owns: the scope, and the Local that leads to it.

Belongs here: how the current scope is found, begun and left, and what it holds. Does not belong here: how its session
is made (``_sessions``), and how it ends (``_lifecycle``). Imports no SQLAlchemy.
"""
