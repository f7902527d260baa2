"""Who may see the inspector's pages.

A page is for one who has the token, on this machine, under a name of this machine. The token alone would not do: a page
of any site can send requests to this machine (that is why POST needs more than a cookie), and a name of a stranger may
lead to it (DNS rebinding, which is why ``Host`` is looked at). Whoever is refused gets what the application answers.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Collection
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any, Final

from werkzeug.http import dump_cookie
from werkzeug.sansio.http import parse_cookie
from werkzeug.sansio.utils import host_is_trusted

from .._settings.checks import check_text_or_none
from ..errors import ConfigurationError, shown

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["Access"]

COOKIE: Final = "sqlasession_inspector"
#: What proxies add: the peer is the proxy then, and on this machine whoever the client is.
_FORWARDING: Final = (
    *("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_REAL_IP", "HTTP_X_CLIENT_IP", "HTTP_X_CLUSTER_CLIENT_IP"),
    *("HTTP_X_ORIGINAL_HOST", "HTTP_TRUE_CLIENT_IP", "HTTP_CF_CONNECTING_IP"),
)
_FORWARDING_PREFIX: Final = "HTTP_X_FORWARDED"
#: A text of at least so many characters may be a token.
_LENGTH: Final = 16
_IPV6_HOST: Final = re.compile(r"\[([0-9a-fA-F:.]+)\](?::\d{1,5})?")


class Access:
    """Decides by a request's environ.

    :param token: None for one that is made here.
    :param hosts: the names that the site has for its developers, as in ``Host``, without a port.
    :param peers: the addresses and networks that requests may come from.
    :param proxied: whether requests may have passed a proxy.
    :raises ConfigurationError: if one of them is wrong.
    """

    def __init__(self, token: str | None, hosts: Collection[str], peers: Collection[str], proxied: bool) -> None:
        check_text_or_none("token", token)
        if token is None:
            token = secrets.token_urlsafe(24)
        elif len(token) < _LENGTH or re.fullmatch(r"[\w.~-]+", token, re.ASCII) is None:
            problem = f"must be a text of {_LENGTH} characters or more, letters, digits, '-', '_', '.' and '~'."
            raise ConfigurationError("token", problem)
        #: what the address has
        self.token = token
        # Cookies do not know ports: two sites of one machine must not take each other's.
        self._name = f"{COOKIE}_{self._derived('name')[:8]}"
        self._cookie = self._derived("cookie")
        #: what forms have
        self.form_token = self._derived("form")
        self._hosts = _read_hosts(hosts)
        self._networks = _read_networks(peers)
        self._proxied = proxied

    def _derived(self, use: str) -> str:
        """Something that is known only to who has the token, and does not tell it."""
        return hmac.new(self.token.encode(), use.encode(), sha256).hexdigest()

    def admits(self, environ: WSGIEnvironment) -> bool:
        """Whether a request comes from where it may come from, whoever it is."""
        return (
            self._is_peer(environ.get("REMOTE_ADDR", ""))
            and self._is_host(environ.get("HTTP_HOST", ""))
            and (self._proxied or not _is_forwarded(environ))
        )

    def has_token(self, given: str) -> bool:
        """Whether a text is the token."""
        return hmac.compare_digest(given.encode(), self.token.encode())

    def has_cookie(self, environ: WSGIEnvironment) -> bool:
        """Whether a request has the cookie that the token was swapped for."""
        header = environ.get("HTTP_COOKIE", "").encode("latin-1", "replace").decode("ascii", "replace")
        values = parse_cookie(header).getlist(self._name)
        return any(hmac.compare_digest(value.encode(), self._cookie.encode()) for value in values)

    def has_form_token(self, given: str) -> bool:
        """Whether a text is the token of forms."""
        return hmac.compare_digest(given.encode(), self.form_token.encode())

    def cookie(self, environ: WSGIEnvironment, path: str) -> str:
        """The value of ``Set-Cookie``."""
        is_secure = environ.get("wsgi.url_scheme") == "https"
        return dump_cookie(self._name, self._cookie, path=path, secure=is_secure, httponly=True, samesite="Strict")

    def is_same_origin(self, environ: WSGIEnvironment) -> bool:
        """Whether a request was sent by a page of this site."""
        site = f"{environ.get('wsgi.url_scheme', '')}://{environ.get('HTTP_HOST', '')}"
        return bool(environ.get("HTTP_ORIGIN") == site)

    def _is_peer(self, address: str) -> bool:
        try:
            found = ip_address(address.partition("%")[0])
        except ValueError:  # Such as that of a socket in the file system.
            return False
        if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        return any(found in network for network in self._networks)

    def _is_host(self, host: str) -> bool:
        names, addresses = self._hosts
        bracketed = _IPV6_HOST.fullmatch(host)
        if bracketed is not None:  # Werkzeug takes the first colon for that of the port.
            try:
                return IPv6Address(bracketed[1]) in addresses
            except ValueError:
                return False
        # With an empty list, all are trusted. Older versions of Werkzeug take letters of full width for plain ones.
        return (
            bool(names)
            and re.fullmatch(r"[\w.-]+(:\d{1,5})?", host, re.ASCII) is not None
            and host_is_trusted(host, names)
        )


def _is_forwarded(environ: WSGIEnvironment) -> bool:
    return any(name in environ for name in _FORWARDING) or any(name.startswith(_FORWARDING_PREFIX) for name in environ)


def _read_hosts(hosts: Any) -> tuple[list[str], set[IPv6Address]]:
    """Names, and addresses of IPv6, which are in brackets."""
    names, addresses = [], set()
    for host in _read_texts("hosts", hosts):
        try:
            if host.startswith("["):
                addresses.add(IPv6Address(host.removeprefix("[").removesuffix("]")))
            elif re.fullmatch(r"\.?[\w-]+(\.[\w-]+)*", host):
                names.append(host)
            else:
                raise ValueError(host)
        except ValueError:
            problem = f"must be names as in 'Host', without a port: 'localhost', '[::1]', got {shown(host)}."
            raise ConfigurationError("hosts", problem) from None
    return names, addresses


def _read_networks(peers: Any) -> list[IPv4Network | IPv6Network]:
    networks = []
    for peer in _read_texts("peers", peers):
        try:
            networks.append(ip_network(peer))
        except ValueError:
            problem = f"must be addresses or networks, such as '127.0.0.1' or '10.1.0.0/16', got {shown(peer)}."
            raise ConfigurationError("peers", problem) from None
    return networks


def _read_texts(parameter: str, values: Any) -> list[str]:
    if isinstance(values, str) or not isinstance(values, Collection) or not all(isinstance(v, str) for v in values):
        raise ConfigurationError(parameter, f"must be a list of texts, got {shown(values)}.")
    return list(values)
