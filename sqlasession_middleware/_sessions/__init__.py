"""The Sessions of requests: their classes, where their statements go, and how they are opened and closed.

Belongs here: subclasses of SQLAlchemy's Session, the global ``session``, what looks into a Session, and the connection
that the Sessions of an isolated test share. Does not belong here: when a request begins and ends (``_lifecycle``), and
when it commits (``_transaction``).
"""
