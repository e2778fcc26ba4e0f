"""Fetches a file over HTTP within limits of size, time and address."""

import base64
import contextlib
import functools
import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import string
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from encodings.idna import nameprep
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urljoin
from urllib.request import getproxies, proxy_bypass

from .image_decoding import shorten

MAX_REDIRECTS = 5
MAX_URL_LENGTH = 1 << 20  # far more than any server reads
MAX_AUTHORITY_LENGTH = 4096  # names have at most 253 letters, quoted ones twelve times that
MAX_TIMEOUT_SECONDS = 1e6  # sockets take no more than 24 days
CHUNK_BYTES = 65536
# Some servers answer a client that names itself as nothing, or as Python, with an error.
HEADERS = {
    "User-Agent": "Mozilla/5.0 (compatible; flashsloth)",
    "Accept": "image/*,*/*;q=0.5",
    "Accept-Encoding": "identity",
    "Connection": "close",
}
DEFAULT_PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)

URL_PARTS = re.compile(r"(https?)://([^/?#]+)([^?#]*)(\?[^#]*)?(?:#.*)?", re.IGNORECASE | re.DOTALL)
AUTHORITY_PARTS = re.compile(r"(\[[^\[\]]*\]|[^\[\]:]*)(?::([0-9]{0,5}))?")
HOST_NAME = re.compile(r"[a-z0-9_.-]+")
ZONE = re.compile(r"[A-Za-z0-9_.~-]*")
CONTROLS_AND_SPACE = "".join(map(chr, range(33)))
# What browsers leave as it is in a path or a query; the per cent sign may belong to a character quoted already.
UNQUOTED = "!$%&'()*+,/:;=?@[]|~"

# The tables of `ipaddress` differ between releases of Python. Networks that serve no public addresses, from the
# registries of special-purpose addresses of IANA:
PRIVATE_IPV4 = [
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
]
PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")  # all that was ever given out
PRIVATE_IPV6 = [ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "3fff::/20")]
# Networks whose addresses lead to an IPv4 address, and how many bits stand behind that.
IPV4_IN_IPV6 = [
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),
    (ipaddress.IPv6Network("2002::/16"), 80),
]


def download(url: str, max_bytes: int, timeout: float, allow_private_urls: bool = False) -> bytes:
    """Fetches a URL; at most `max_bytes` + 1 bytes are returned, so that the caller can tell a file that is too long.

    Args:
        url: http or https; characters that a URL cannot hold are quoted as browsers do.
        max_bytes: limit of the file, also after decompression.
        timeout: seconds for all there is to do: names, connections, redirects and the whole answer.
        allow_private_urls: also connect to addresses that are not public.

    Every address connected to, those of redirects included, must be public unless `allow_private_urls`. The check is
    made on the address itself, after names are resolved. An HTTP proxy that the environment names is connected to
    wherever it is; it resolves names once more, so that those it is asked for are resolved here only to be checked.

    Raises:
        ValueError: names the URL and what went wrong.
    """
    deadline = time.monotonic() + min(timeout, MAX_TIMEOUT_SECONDS)
    target = url
    for _ in range(MAX_REDIRECTS + 1):
        name = f"image {shorten(url)!r}" + (f" (redirected to {shorten(target)!r})" if target != url else "")
        try:
            address = _parse(target)
            with (
                _connect(address, deadline, allow_private_urls) as (connection, request_target, headers),
                _ask(connection, deadline, f"GET {request_target}", headers) as response,
            ):
                location = _redirection(response)
                if location is None:
                    return _read_body(response, max_bytes)
            target = urljoin(address.url, location)
        except TimeoutError as error:
            raise ValueError(f"{name} did not arrive within {timeout:g} seconds") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ValueError(f"{name} cannot be fetched: {shorten(_cause(error))}") from error
    raise ValueError(f"image {shorten(url)!r} cannot be fetched: more than {MAX_REDIRECTS} redirects")


def _cause(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return "".join(letter if letter.isprintable() else " " for letter in text)


class _Address(NamedTuple):
    """What was read from a URL. Whatever is checked, connected to and sent is made of these parts alone."""

    scheme: str
    host: str  # an ASCII name or an IP address; IPv6 without brackets, perhaps with %zone
    port: int
    target: str  # path and query

    @property
    def host_and_port(self) -> str:
        host = f"[{self.host.partition('%')[0]}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def authority(self) -> str:
        return self.host_and_port.removesuffix(f":{DEFAULT_PORTS[self.scheme]}")

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


def _parse(url: str) -> _Address:
    if len(url) > MAX_URL_LENGTH:
        raise ValueError(f"it has {len(url):,} characters, more than the limit of {MAX_URL_LENGTH:,}")
    match = URL_PARTS.fullmatch(re.sub(r"[\t\r\n]", "", url.strip(CONTROLS_AND_SPACE)))
    if match is None:
        raise ValueError("it is not an http or https address")
    scheme, authority, path, query = match.groups(default="")
    if "@" in authority:
        raise ValueError("it has a user name before its host, which is not supported; fetch the file yourself")
    match = AUTHORITY_PARTS.fullmatch(authority)
    if match is None or len(authority) > MAX_AUTHORITY_LENGTH:
        raise ValueError(f"{shorten(authority)!r} is not a host and a port")
    host, port = match.groups()
    scheme = scheme.lower()
    if int(port or 0) > 65535:
        raise ValueError(f"there is no port {port}")
    target = quote(path.replace("\\", "/") or "/", safe=UNQUOTED) + quote(query, safe=UNQUOTED)
    return _Address(scheme, _parse_host(host), int(port) if port else DEFAULT_PORTS[scheme], target)


def _parse_host(text: str) -> str:
    if text.startswith("["):
        address, _, zone = text[1:-1].partition("%")
        zone = zone[2:] if zone.startswith("25") and len(zone) > 2 else zone  # in a URL a per cent sign is %25
        if not ZONE.fullmatch(zone):
            raise ValueError(f"{text!r} is not an IPv6 address")
        return str(ipaddress.IPv6Address(address)) + (f"%{zone}" if zone else "")
    labels = re.split("[.\u3002\uff0e\uff61]", unquote(text, errors="strict"))
    host = ".".join(map(_label_to_ascii, labels))
    if not HOST_NAME.fullmatch(host):
        raise ValueError(f"{text!r} is not a host name")
    # 127.1, 0x7f000001 and 2130706433 are spellings of addresses that a proxy may read in another way.
    with contextlib.suppress(OSError):
        return socket.inet_ntoa(socket.inet_aton(host.removesuffix(".")))
    return host


def _label_to_ascii(label: str) -> str:
    if label.isascii():
        return label.lower()
    # The rules of Python's codec are of 2003 and make ss and σ of these two, which are other names since 2008.
    prepared = "".join(part if part in ("ß", "ς") else nameprep(part) for part in re.split("([ßς])", label))
    return prepared if prepared.isascii() else "xn--" + prepared.encode("punycode").decode("ascii")


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _within(deadline: float, function: Callable[[], Any]) -> Any:
    """Calls what has no time-out of its own in a thread, which is left to itself where the deadline comes first."""
    results: queue.SimpleQueue = queue.SimpleQueue()

    def call() -> None:
        try:
            results.put((function(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    try:
        result, error = results.get(timeout=_remaining(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def _connect(
    address: _Address, deadline: float, allow_private_urls: bool
) -> Iterator[tuple[socket.socket, str, dict[str, str]]]:
    """A connection over which to ask for an address, and what to ask for: its path, or its URL from a proxy."""
    proxy, proxy_headers = _find_proxy(address, deadline)
    if proxy is None:
        places = _resolve(address, deadline)
    elif not allow_private_urls:
        places = _resolve(address, deadline, " here to check that it is public (allow_private_urls leaves that out)")
    for *_, place in places if not allow_private_urls else ():
        if not is_public_address(place[0]):
            host = shorten(address.host, 80)
            raise ValueError(f"{host} is the address {place[0]}, which is not public (allow_private_urls permits it)")
    connection = _open_socket(places if proxy is None else _resolve(proxy, deadline), deadline)
    target, headers = address.target, {"Host": address.authority, **HEADERS}
    try:
        if proxy is not None and address.scheme == "https":
            # A proxy named as https:// is spoken to in the clear here as well, as everyone does.
            tunnel_headers = {"Host": address.host_and_port, **proxy_headers}
            with _ask(connection, deadline, f"CONNECT {address.host_and_port}", tunnel_headers) as response:
                if response.status != HTTPStatus.OK:
                    raise ValueError(f"the proxy answered {response.status} {response.reason}")
        elif proxy is not None:
            target, headers = address.url, {**headers, **proxy_headers}
        for end in (proxy, address) if proxy is not None and address.scheme == "http" else (address,):
            if end.scheme == "https":
                connection.settimeout(_remaining(deadline))
                server_name = end.host.partition("%")[0].removesuffix(".")
                connection = ssl.create_default_context().wrap_socket(connection, server_hostname=server_name)
        yield connection, target, headers
    finally:
        connection.close()


def _find_proxy(address: _Address, deadline: float) -> tuple[_Address | None, dict[str, str]]:
    """The proxy that the environment or the system names, if any, and the headers that it wants."""
    url = getproxies().get(address.scheme)
    if not url or any(
        _within(deadline, functools.partial(proxy_bypass, host)) for host in {address.authority, address.host}
    ):
        return None, {}
    scheme, _, rest = url.rpartition("://")
    user, _, authority = rest.rpartition("@")
    try:
        proxy = _parse(f"{scheme or 'http'}://{authority}")
    except ValueError as error:
        raise ValueError(f"the proxy set for {address.scheme} is not the address of an HTTP proxy: {error}") from error
    if not user:
        return proxy, {}
    return proxy, {"Proxy-Authorization": "Basic " + base64.b64encode(unquote(user).encode()).decode()}


def _resolve(address: _Address, deadline: float, why: str = "") -> list[tuple]:
    resolve = functools.partial(socket.getaddrinfo, address.host, address.port, type=socket.SOCK_STREAM)
    try:
        return _within(deadline, resolve)
    except (socket.gaierror, UnicodeError) as error:
        host = shorten(address.host, 80)
        raise ValueError(f"the name {host} cannot be resolved{why}: {_cause(error)}") from error


def is_public_address(address: str) -> bool:
    """Whether an IP address is globally routable, also after unwrapping IPv4 inside IPv6 (mapped, 6to4, NAT64)."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        for network, bits_behind in IPV4_IN_IPV6:
            if parsed in network:
                return is_public_address(str(ipaddress.IPv4Address(int(parsed) >> bits_behind & 0xFFFFFFFF)))
        return parsed in PUBLIC_IPV6 and not any(parsed in network for network in PRIVATE_IPV6)
    return not any(parsed in network for network in PRIVATE_IPV4)


def _open_socket(places: list[tuple], deadline: float) -> socket.socket:
    """Connects to the first place that answers; an address that was checked, so that no name can change meanwhile."""
    failure: OSError = OSError("the name has no address")
    for index, (family, kind, protocol, _, place) in enumerate(places):
        connection = None
        try:
            connection = socket.socket(family, kind, protocol)
            connection.settimeout(_remaining(deadline) / (len(places) - index))
            connection.connect(place)
            return connection
        except OSError as error:
            if connection is not None:
                connection.close()
            failure = error
    raise failure


class _Stream(io.RawIOBase):
    """What a socket receives before the deadline, however slowly: the time that is left is set before each wait."""

    def __init__(self, connection: socket.socket, deadline: float):
        self.connection = connection
        self.deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.connection.settimeout(_remaining(self.deadline))
        return self.connection.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, CHUNK_BYTES)


@contextlib.contextmanager
def _ask(connection: socket.socket, deadline: float, request: str, headers: dict[str, str]) -> Iterator[Any]:
    """The answer to a request, its status and headers read."""
    lines = [f"{request} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    unsent = memoryview("\r\n".join(lines).encode("ascii"))
    while unsent:
        connection.settimeout(_remaining(deadline))
        unsent = unsent[connection.send(unsent) :]
    stream: Any = _Stream(connection, deadline)
    response: Any
    with http.client.HTTPResponse(stream) as response:
        response.begin()
        while response.status in (HTTPStatus.PROCESSING, HTTPStatus.EARLY_HINTS):  # `begin` itself skips only 100
            response.headers = None
            response.begin()
        yield response


def _redirection(response: Any) -> str | None:
    """Where the answer redirects to; `None` where it is the file, and an error where it is neither."""
    if response.status == HTTPStatus.OK:
        return None
    location = response.headers.get("Location")
    if response.status not in REDIRECTS or location is None:
        raise ValueError(f"the server answered {response.status} {response.reason}")
    # Headers are read as Latin-1; what is not ASCII is UTF-8 nearly always and goes back as the bytes that came.
    return quote(location.encode("latin-1"), safe=string.printable)


def _read_body(response: Any, max_bytes: int) -> bytes:
    transfer_encoding = response.headers.get("Transfer-Encoding", "identity").strip().lower()
    if transfer_encoding not in ("", "identity", "chunked"):
        raise ValueError(f"the server sends it with transfer encoding {transfer_encoding!r}, which is not supported")
    limit = min(max_bytes + 1, sys.maxsize)
    length = limit if response.length is None else min(response.length, limit)
    data = bytearray()
    while len(data) < length and (chunk := response.read1(min(CHUNK_BYTES, length - len(data)))):
        data += chunk
    if response.length is not None and len(data) < length:
        raise ValueError(f"the connection ended early, after {len(data):,} bytes")
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity") or len(data) >= limit:
        return bytes(data[:limit])
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"the server sends it with content encoding {encoding!r}, which was not asked for")
    decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # of gzip's header or zlib's
    try:
        inflated = decompressor.decompress(data, limit)
    except zlib.error as error:
        raise ValueError(f"the server says it is compressed by {encoding}, which is damaged: {error}") from error
    if not decompressor.eof and len(inflated) < limit:
        raise ValueError(f"the file compressed by {encoding} ends early, after {len(inflated):,} bytes")
    return inflated
