"""Finds out of a request whose it is.

A resolver is called with environ, and returns the tenant's name as the request has it; None if it has none. Nothing
of it can be trusted: an empty text is what no tenant has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from .._settings.checks import resolve_option
from ..errors import ConfigurationError, shown

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["Resolver", "make_resolver", "shift_path"]

Resolver = Callable[["WSGIEnvironment"], str | None]

#: The name of no tenant, where the request asks for one.
NOBODY: Final = ""

_HEADER: Final = "header:"


def make_resolver(tenant: Any, domain: str | None, hosts: Any) -> Resolver:
    """Make a resolver.

    :param tenant: ``"host"``, ``"subdomain"``, ``"path"``, ``"header:NAME"``; or a callable, or its dotted name.
    :param domain: for ``"subdomain"``, the domain.
    :param hosts: for ``"host"``, a dict of tenants by hosts, or a callable of the host, or its dotted name.
    :raises ConfigurationError: if it is none of these, or if something else is missing or wrong.
    """
    if (domain is not None) != (tenant == "subdomain"):
        raise ConfigurationError("domain", "must be set with tenant='subdomain', and only then: such as 'example.com'.")
    if (hosts is not None) != (tenant == "host"):
        raise ConfigurationError("hosts", "must be set with tenant='host', and only then: the tenant of each host.")
    if tenant == "path":
        return _from_path
    if tenant == "host":
        return _from_host(hosts)
    if tenant == "subdomain":
        return _from_subdomain(domain)
    if isinstance(tenant, str) and tenant.lower().startswith(_HEADER):
        return _from_header(tenant[len(_HEADER) :].strip())
    if not callable(tenant) and not (isinstance(tenant, str) and ("." in tenant or ":" in tenant)):
        raise ConfigurationError(
            "tenant",
            "must be 'host', 'subdomain', 'path', 'header:NAME', a callable of environ, or its dotted name, got"
            f" {shown(tenant)}.",
        )
    resolver: Resolver = resolve_option("tenant", tenant)
    return resolver


def host_of(environ: WSGIEnvironment) -> str:
    """The host that a request names, without its port: in lower case, as no host has another one (RFC 9110, 4.2.3).

    The dot at the end of an absolute name is left out, too (RFC 1034, 3.1): browsers send it as it was typed.
    """
    host: str = environ.get("HTTP_HOST") or environ.get("SERVER_NAME", "")
    name, colon, port = host.rpartition(":")
    if colon and (port.isdecimal() or not port):
        host = name
    # Outside of ASCII lower() makes letters out of others.
    return host.lower().removesuffix(".") if host.isascii() else NOBODY


def _from_subdomain(domain: Any) -> Resolver:
    if not isinstance(domain, str) or not domain.isascii() or domain.strip(". ") != domain or not domain:
        raise ConfigurationError("domain", f"must be a domain such as 'example.com', got {shown(domain)}.")
    domain = domain.lower()
    suffix = f".{domain}"

    def resolve(environ: WSGIEnvironment) -> str | None:
        host = host_of(environ)
        if host.endswith(suffix):
            return host[: -len(suffix)]
        return None if host == domain else NOBODY

    return resolve


def _from_host(hosts: Any) -> Resolver:
    if isinstance(hosts, Mapping):
        by_host = {str(host).lower().removesuffix("."): tenant for host, tenant in hosts.items()}
        return lambda environ: by_host.get(host_of(environ), NOBODY)
    find = resolve_option("hosts", hosts)
    return lambda environ: find(host_of(environ))


def _from_header(name: str) -> Resolver:
    if not name or not name.replace("-", "").isalnum() or not name.isascii():
        raise ConfigurationError("tenant", f"must have the name of a header after 'header:', got {shown(name)}.")
    key = f"HTTP_{name.upper().replace('-', '_')}"
    return lambda environ: environ.get(key)


def _from_path(environ: WSGIEnvironment) -> str | None:
    path: str = environ.get("PATH_INFO", "")
    if not path.startswith("/"):
        return NOBODY if path else None
    return path[1:].partition("/")[0] or None


def shift_path(environ: WSGIEnvironment, name: str) -> None:
    """Make the first segment of the path a part of where the application is mounted."""
    environ["SCRIPT_NAME"] = f"{environ.get('SCRIPT_NAME', '')}/{name}"
    environ["PATH_INFO"] = environ["PATH_INFO"][1 + len(name) :]
