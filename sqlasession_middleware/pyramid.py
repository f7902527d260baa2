"""The include for Pyramid: one line in place of pyramid_tm, pyramid_retry and zope.sqlalchemy.

.. code-block:: python

    config.include("sqlasession_middleware.pyramid")

It reads the application's settings (:doc:`ini`, and those of the packages that it replaces), gives each request a
``dbsession`` and a ``tm``, and wraps Pyramid's Router, from the inside, in a
:class:`~sqlasession_middleware.SQLASessionMiddleware` with ``transaction``. See :doc:`from_pyramid_tm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import transaction
from pyramid.config import PHASE1_CONFIG, Configurator
from pyramid.config.actions import ActionInfo
from pyramid.interfaces import ITweens
from pyramid.request import Request
from pyramid.tweens import EXCVIEW
from sqlalchemy.orm import Session

from ._pyramid.joining import CHARGE, JOINED, JoinedSession
from ._pyramid.names import (
    TM_MANAGER,
    BeforeRetry,
    IBeforeRetry,
    IRetryableError,
    RetryableException,
    default_commit_veto,
    explicit_manager,
    is_error_retryable,
    is_last_attempt,
    is_tm_active,
    mark_error_retryable,
)
from ._pyramid.policy import PyramidPolicy, policy_of
from ._pyramid.predicates import PREDICATES
from ._pyramid.settings import read_options
from ._pyramid.tween import tm_tween_factory
from ._scope.scope import running_scope
from ._sessions.registry import open_session
from .errors import ConfigurationError

__all__ = [
    "BeforeRetry",
    "IBeforeRetry",
    "IRetryableError",
    "RetryableException",
    "default_commit_veto",
    "explicit_manager",
    "includeme",
    "is_error_retryable",
    "is_last_attempt",
    "is_tm_active",
    "mark_error_retryable",
    "tm_tween_factory",
]

#: The name of the tween, so that the tweens of others that have to be over or under it find their place.
TWEEN = "pyramid_tm.tm_tween_factory"
REMOVE = "sqlasession_middleware.pyramid takes the place of {0}: remove config.include({0!r})."
OWN_TWEEN = f"{__name__}.tm_tween_factory"
#: After everything that a package may do to the chain of tweens.
_LAST = 1000


def includeme(config: Configurator) -> None:
    """Called by ``config.include("sqlasession_middleware.pyramid")``.

    The settings are read when the configuration is committed, so whoever is included later may still set some.

    :raises pyramid.exceptions.ConfigurationError: when the configuration is committed, if pyramid_tm or pyramid_retry
        is included as well, or if a setting is wrong.
    """
    policy = PyramidPolicy()
    registry, package = config.registry, config.root_package.__name__

    def set_up() -> None:
        policy.set_up(read_options(config.get_settings(), None if package == "__main__" else package), registry)

    def place_tween() -> None:
        if policy.transaction is not None:
            tweens.add_implicit(TWEEN, tm_tween_factory, over=EXCVIEW)

    tweens = registry.getUtility(ITweens)
    config.action(OWN_TWEEN, set_up, order=PHASE1_CONFIG)
    with _in_place(config, REMOVE.format("pyramid_tm")):
        config.add_request_method(find_manager, "tm", reify=True)
        config.action(("tween", TWEEN, False), place_tween)
    with _in_place(config, REMOVE.format("pyramid_retry")):
        config.set_execution_policy(policy)
    for name, (predicate, replaced) in PREDICATES.items():
        with _in_place(config, REMOVE.format(replaced)):
            config.add_view_predicate(name, predicate)
    with _in_place(config, "sqlasession_middleware.pyramid adds request.dbsession: remove the application's own."):
        config.add_request_method(find_session, "dbsession", property=True)
    config.action(None, partial(_place_in_explicit_chain, tweens, policy), order=_LAST)


@contextmanager
def _in_place(config: Configurator, told: str) -> Iterator[None]:
    """Have Pyramid say what to remove, should actions that are added here conflict with those of others."""
    actions = config.action_state.actions
    before = len(actions)
    yield
    for action in actions[before:]:
        where = action["info"]
        action["info"] = ActionInfo(where.file, where.line, where.function, told)


def _place_in_explicit_chain(tweens: Any, policy: PyramidPolicy) -> None:
    """Take the tween's place in the chain of ``pyramid.tweens``, if the settings have one."""
    if policy.transaction is None or not tweens.explicit:
        return
    names = [name for name, _ in tweens.explicit]
    if TWEEN not in names and OWN_TWEEN not in names:
        raise ConfigurationError("'pyramid.tweens'", f"lists the tweens, so it has to list {OWN_TWEEN} as well.")
    tweens.explicit[:] = [(name, tm_tween_factory if name == TWEEN else factory) for name, factory in tweens.explicit]


def find_manager(request: Request) -> Any:
    """``request.tm``: the manager of the request's transaction, of the ``transaction`` package."""
    manager = request.environ.get(TM_MANAGER)
    if manager is not None:
        return manager
    scope = running_scope()
    charge = None if scope is None or scope.environ is None else scope.environ.get(CHARGE)
    if charge is not None and not charge.is_over:
        return charge.manager  # The request that this one is part of.
    make_manager = policy_of(request.registry).options.make_manager
    return transaction.manager if make_manager is None else make_manager(request)


def find_session(request: Request) -> Session:
    """``request.dbsession``: the Session of the request.

    In a script or a shell, where there is no request, it is one of its own, which ``request.tm`` commits, and which is
    closed with the environment that ``bootstrap()`` or ``prepare()`` has made.
    """
    given = request.environ.get("app.dbsession")
    if given is not None:
        return cast("Session", given)
    middleware = policy_of(request.registry).middleware
    scope = running_scope()
    if scope is None or scope.owner is not middleware:
        session = middleware.new_session()
        session.info.update({"request": request, JOINED: JoinedSession(session, request.tm)})
        request.add_finished_callback(lambda request: session.close())
        request.dbsession = session
        return session
    session = scope.session or open_session(scope)
    info = session.info
    if "request" not in info:
        info["request"] = request
        if scope.environ is None:  # In "with app.context():" the application may commit by itself.
            joined = info[JOINED] = JoinedSession(session, request.tm, waits=True)
            if session.in_transaction():
                joined.attach()
    return session
