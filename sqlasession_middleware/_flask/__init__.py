"""What ties the library to Flask: application contexts, its configuration, and its error handlers.

Belongs here: when an application context has a scope of its own, whose session ``db.session`` is, the keys of Flask's
configuration, and the commit under Flask's contexts. Does not belong here: the class that stands for Flask-SQLAlchemy's
(``flask_sqlalchemy``), and anything that works without Flask. The modules import Flask; they do not import
Flask-SQLAlchemy.
"""
