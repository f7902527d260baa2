"""What the commands do for tenants: for one, or for one after the other, with a summary of what has failed."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING

import click

from .._database.engines import without_passwords_of_urls
from ..errors import UnknownTenantError
from ..middleware import SQLASessionMiddleware
from ..tenants import TenantsMiddleware
from .messages import complain, counted, describe_error, fail, refuse
from .shell import run_code
from .survey import ping

if TYPE_CHECKING:
    from .._tenants.application import TenantApplication
    from .ini import Ini

__all__ = ["applications_of", "check_all", "create_all", "run_in_all", "tenants_of"]

Found = list[SQLASessionMiddleware | TenantsMiddleware]


def tenants_of(found: Found, ini: Ini) -> TenantsMiddleware:
    """The middleware of an ini that has the tenants. Exits with 2 if there is none, or more than one."""
    tenants = [each for each in found if isinstance(each, TenantsMiddleware)]
    if len(tenants) != 1:
        number = counted(len(tenants), "middleware", "middlewares")
        refuse(f"{ini} has {number} with tenants, where one is needed: pick another application by {ini.path}#NAME.")
    return tenants[0]


def applications_of(found: Found, ini: Ini, tenant: str | None = None) -> list[SQLASessionMiddleware]:
    """The applications that a command is for. Exits with 2 if they are those of tenants and none is named."""
    if tenant is not None:
        try:
            return [tenants_of(found, ini).application(tenant)]
        except UnknownTenantError as error:
            refuse(str(error))
    applications = [each for each in found if isinstance(each, SQLASessionMiddleware)]
    if len(applications) < len(found):
        refuse(f"{ini} has tenants: give --tenant NAME or --all-tenants to a command that takes it.")
    return applications


def create_all(tenants: TenantsMiddleware) -> None:
    """Create the tables of all tenants."""

    def create(application: TenantApplication) -> str:
        application.init_database()
        return "created"

    _for_each(tenants, create)


def check_all(tenants: TenantsMiddleware) -> None:
    """Ping the engines of all tenants."""

    def check(application: TenantApplication) -> str:
        said = []
        for name, engine in application.engines.items():
            answer = ping(engine, application)
            if answer.problem is not None:
                raise LookupError(f"{name} does not answer: {answer.problem}")
            said.append(f"{name} {answer.milliseconds:.1f} ms")
        return ", ".join(said)

    _for_each(tenants, check)


def run_in_all(tenants: TenantsMiddleware, given: CodeType, commit: bool) -> None:
    """Run code in a context of each tenant.

    :param commit: commit what the code has left open.
    """

    def run(application: TenantApplication) -> str:
        run_code(application, given, commit)
        return "done"

    _for_each(tenants, run)


def _for_each(tenants: TenantsMiddleware, action: Callable[[TenantApplication], str]) -> None:
    """Call a function for each tenant. Exits with 1 if it has raised for any of them.

    :param action: returns what is printed.
    """
    names, failed = tenants.names(), []
    for number, name in enumerate(names, 1):
        try:
            application = tenants.application(name)
            try:
                click.echo(f"{number} of {len(names)}: {name}: {action(application)}")
            except Exception as error:
                raise LookupError(describe_error(error, application)) from error
            finally:
                application.close_idle()
        except Exception as error:
            failed.append(name)
            complain(f"the tenant {name}: {without_passwords_of_urls(str(error))}")
    done = counted(len(names) - len(failed), "tenant", "tenants")
    click.echo(f"done: {done}")
    if failed:
        fail(f"{len(failed)} of {counted(len(names), 'tenant', 'tenants')} have failed: {', '.join(failed)}")
