"""WSGI without a database: bodies, held heads, file wrappers, event streams, kept requests, error pages.

Belongs here: code that needs only an environ, a head, or a body. Does not belong here: anything that imports SQLAlchemy
or a scope.
"""
