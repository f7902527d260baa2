"""The engines of an application: how they are made, shared, observed, and kept from forked processes.

Belongs here: what concerns an engine, its pool or its tables. Does not belong here: what concerns one Session
(``_sessions``), and what differs by server or driver (``_drivers``).
"""
