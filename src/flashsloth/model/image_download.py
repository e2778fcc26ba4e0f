"""Fetches a file over HTTP within limits of size, time and address."""

import http.client
import ipaddress
import socket
import ssl
import time
from http import HTTPStatus
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

MAX_REDIRECTS = 5
CHUNK_BYTES = 65536
# Some servers answer a client that names itself as nothing, or as Python, with an error.
HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; flashsloth)", "Accept": "image/*,*/*;q=0.5"}


def download(url: str, max_bytes: int, timeout: float, allow_private_urls: bool = False) -> bytes:
    """Fetches a URL; at most `max_bytes` + 1 bytes are read, so that the caller can tell a file that is too long.

    Every address connected to, those of redirects included, must be public unless `allow_private_urls`. With an HTTP
    proxy configured in the environment, names are resolved here only to check them.

    Raises:
        ValueError: names the URL and what went wrong.
    """
    deadline = time.monotonic() + timeout
    target = url
    for _ in range(MAX_REDIRECTS + 1):
        parts = urlparse(target)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"image {url!r}: {target!r} is not an http or https address")
        try:
            return _fetch(target, max_bytes, deadline, allow_private_urls)
        except _RedirectError as redirect:
            target = redirect.url
        except HTTPError as error:
            error.close()
            raise ValueError(f"image {url!r}: the server answered {error.code} {error.reason}") from error
        except URLError as error:
            raise ValueError(f"image {url!r} cannot be fetched: {error.reason}") from error
        except TimeoutError as error:
            raise ValueError(f"image {url!r} did not arrive within {timeout:g} seconds") from error
        except _PrivateAddressError as error:
            raise ValueError(f"image {url!r}: {error} (allow_private_urls permits it)") from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise ValueError(f"image {url!r} cannot be fetched: {error or type(error).__name__}") from error
    raise ValueError(f"image {url!r}: more than {MAX_REDIRECTS} redirects")


class _RedirectError(Exception):
    def __init__(self, url: str):
        super().__init__(url)
        self.url = url


class _PrivateAddressError(Exception):
    pass


def _fetch(url: str, max_bytes: int, deadline: float, allow_private_urls: bool) -> bytes:
    opener = OpenerDirector()
    connection_handlers = (
        (HTTPHandler(), HTTPSHandler()) if allow_private_urls else (_PublicHTTPHandler(), _PublicHTTPSHandler())
    )
    handlers = (ProxyHandler(), HTTPErrorProcessor(), HTTPDefaultErrorHandler(), _RedirectHandler())
    for handler in (*connection_handlers, *handlers):
        opener.add_handler(handler)
    with opener.open(Request(url, headers=HEADERS), timeout=_remaining(deadline)) as response:
        if response.status != HTTPStatus.OK:
            raise HTTPError(url, response.status, "is no file", response.headers, None)
        data = bytearray()
        while len(data) <= max_bytes:
            _remaining(deadline)
            chunk = response.read1(min(CHUNK_BYTES, max_bytes + 1 - len(data)))
            if not chunk:
                break
            data += chunk
        return bytes(data)


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


class _RedirectHandler(HTTPRedirectHandler):
    """Hands redirects to the caller: the default handler reads their whole body first, however long it is."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        fp.close()
        raise _RedirectError(newurl)


def is_public_address(address: str) -> bool:
    """Whether an IP address is globally routable, also after unwrapping IPv4 inside IPv6 (mapped, 6to4, NAT64)."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if inner is None and parsed in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return is_public_address(str(inner))
    return parsed.is_global and not parsed.is_multicast


def _public_addresses(host: str, port: int) -> list[tuple]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(address[4][0]) for address in found]
    refused = [address for address in addresses if not is_public_address(address)]
    if refused:
        raise _PrivateAddressError(f"{host} is the address {refused[0]}, which is not public")
    return found


def _connect_public(host: str, port: int, timeout: Any) -> socket.socket:
    """Connects to an address that was checked, so that a name cannot change its meaning after the check."""
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in _public_addresses(host, port):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout)
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


class _PublicHTTPConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _connect_public(self.host, self.port, self.timeout)


class _PublicHTTPSConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        connection = _connect_public(self.host, self.port, self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(connection, server_hostname=self.host)


class _PublicHTTPHandler(HTTPHandler):
    def http_request(self, request: Request) -> Request:
        _check_target(request)
        return super().http_request(request)

    def http_open(self, req: Request) -> Any:
        return self.do_open(http.client.HTTPConnection if _is_proxied(req) else _PublicHTTPConnection, req)


class _PublicHTTPSHandler(HTTPSHandler):
    def https_request(self, request: Request) -> Request:
        _check_target(request)
        return super().https_request(request)

    def https_open(self, req: Request) -> Any:
        return self.do_open(http.client.HTTPSConnection if _is_proxied(req) else _PublicHTTPSConnection, req)


def _is_proxied(request: Request) -> bool:
    """A proxy, which only the environment can name, may live on a private address."""
    return request.has_proxy() or bool(getattr(request, "_tunnel_host", None))


def _check_target(request: Request) -> None:
    parts = urlparse(request.full_url)
    assert parts.hostname is not None  # checked by `download`
    _public_addresses(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
