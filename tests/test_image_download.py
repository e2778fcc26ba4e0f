"""Images fetched over HTTP: within limits of size and time, from public addresses only."""

import contextlib
import gzip
import http.server
import io
import json
import re
import socket
import ssl
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flashsloth.model import image_download
from flashsloth.model.image_download import download, is_public_address
from flashsloth.model.image_loading import load_image
from flashsloth.model.image_processing_flashsloth import FlashSlothImageProcessor

LEVELS = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PNG = encoded(Image.fromarray(LEVELS))
TCP = (socket.AF_INET, socket.SOCK_STREAM, 0)


class Handler(http.server.BaseHTTPRequestHandler):
    """`/image`, `/page`, `/long`, `/to?URL` redirects, anything else 404."""

    def do_GET(self):  # noqa: N802
        path, _, query = self.path.partition("?")
        bodies = {"/image": PNG, "/page": b"<html>", "/long": bytes(100_000)}
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", query)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = bodies.get(path, b"")
        self.send_response(200 if path in bodies else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_url(server):
    for path in ("/image", f"/to?{server}/image", "/to?/image"):
        image = load_image(server + path, allow_private_urls=True)
        np.testing.assert_array_equal(np.asarray(image), LEVELS)
    pixels = FlashSlothImageProcessor()(server + "/image", allow_private_urls=True)["pixel_values"]
    assert pixels.shape == (1, 1, 3, 384, 384)


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("/nothing", "404"),
        ("/page", "not an image"),
        ("/long", "max_bytes"),
        ("/to?/to?/image", None),
        ("/to?file:///etc/hostname", "http"),
        ("/to?ftp://127.0.0.1/a", "http"),
    ],
)
def test_url_that_gives_no_image(server, path, cause):
    if cause is None:
        load_image(server + path, allow_private_urls=True)
        return
    with pytest.raises(ValueError, match=cause) as caught:
        load_image(server + path, allow_private_urls=True, max_bytes=50_000)
    assert path.split("?")[0] in str(caught.value)


def test_endless_redirects_end(server):
    loop = "/to?" * 7 + "/image"
    with pytest.raises(ValueError, match="redirects"):
        download(server + loop, 1000, 5, allow_private_urls=True)


def test_silent_server_times_out():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        with pytest.raises(ValueError, match=r"0\.1 seconds"):
            load_image(url, timeout=0.1, allow_private_urls=True)


def test_addresses_that_are_not_public_are_refused_by_default(server, monkeypatch):
    with pytest.raises(ValueError, match="not public"):
        load_image(server + "/image")
    port = server.rpartition(":")[2]
    with pytest.raises(ValueError, match="not public"):
        load_image(f"http://localhost:{port}/image")


def test_a_name_is_resolved_once_and_what_was_checked_is_connected_to(server, monkeypatch):
    # A name that is public when it is looked at and private when it is looked at again.
    answers = iter(["93.184.216.34", "127.0.0.1"])
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **kwargs: [(*TCP, "", (next(answers), port))])
    places = []

    def connect(self, place):
        places.append(place)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(ValueError, match="ConnectionRefusedError"):
        download("http://example.com:81/image", 1000, 5)
    assert places == [("93.184.216.34", 81)]


def test_every_address_of_a_name_is_tried_within_the_time(server, monkeypatch):
    port = int(server.rpartition(":")[2])
    # To the first, whose queue of one is full, no connection comes about.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        silent = full.getsockname()
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(silent)
        places = [silent, ("127.0.0.1", 1), ("127.0.0.1", port)]
        found = [(*TCP, "", place) for place in places]
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **kwargs: found)
        assert download("http://several.example/image", 1000, 1.5, allow_private_urls=True) == PNG


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b::8.8.8.8", True),
        ("64:ff9b:1::8.8.8.8", False),
        ("2002:808:808::", True),
        ("2002:a00:1::1", False),
        ("2001:0:808:808::", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("5f00::1", False),
        ("100::1", False),
        ("fec0::1", False),
        ("ff0e::1", False),
        ("::", False),
        ("::127.0.0.1", False),
        ("::8.8.8.8", False),
        ("::ffff:0:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("192.0.0.9", False),
        ("192.0.2.1", False),
        ("192.88.99.1", False),
        ("198.19.255.255", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("239.1.1.1", False),
        ("1.1.1.1", True),
        ("172.32.0.1", True),
        ("100.128.0.1", True),
    ],
)
def test_public_addresses(address, public):
    assert is_public_address(address) is public


def test_private_urls_cannot_be_allowed_by_a_saved_file(server, tmp_path):
    FlashSlothImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "allow_private_urls": True}))
    with pytest.raises(ValueError, match="not public"):
        FlashSlothImageProcessor.from_pretrained(tmp_path)(server + "/image")


@contextlib.contextmanager
def raw_server(answer, host="127.0.0.1"):
    """Hands one connection after another to `answer`; yields the port. Clients must have hung up at the end."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    done = threading.Event()

    def serve():
        while not done.is_set():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(5)
                    answer(connection)

    with socket.create_server((host, 0), family=family) as listener:
        listener.settimeout(0.02)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        done.set()
        thread.join(3)
        assert not thread.is_alive()


def read_request(connection):
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        request += connection.recv(65536)
    return request.decode("ascii")


def answering(response, requests=None):
    def answer(connection):
        request = read_request(connection)
        if requests is not None:
            requests.append(request)
        connection.sendall(response)

    return answer


def dripping(start, drop, seconds=0.02):
    """Sends the start of an answer, then one drop after another while somebody listens, for at most 3 seconds."""

    def answer(connection):
        connection.recv(65536)
        connection.sendall(start)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            connection.sendall(drop)
            time.sleep(seconds)

    return answer


def silent(connection):
    while connection.recv(65536):
        pass


def redirecting(connection):
    read_request(connection)
    time.sleep(0.08)
    connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n")


OK = b"HTTP/1.1 200 OK\r\n"
SLOW_ANSWERS = {
    "nothing": silent,
    "status line": dripping(b"HTTP/1.1 200 O", b"K"),
    "header": dripping(OK + b"Server: ", b"x"),
    "interim answers": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "interim answers at full speed": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 50, 0),
    "early hints": dripping(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "body": dripping(OK + b"Content-Length: 900\r\n\r\n", b"x"),
    "body without a length": dripping(OK + b"\r\n", b"x"),
    "chunk size": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "chunk extension": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x"),
    "trailers": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n"),
    "redirects": redirecting,
}


@contextlib.contextmanager
def ends_in_time(timeout=0.25, slack=1.5):
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"did not arrive within {timeout:g} seconds"):
        yield timeout
    assert time.monotonic() - start < timeout + slack


@pytest.mark.parametrize("part", SLOW_ANSWERS)
def test_no_part_of_an_answer_outlasts_the_timeout(part):
    with raw_server(SLOW_ANSWERS[part]) as port, ends_in_time() as timeout:
        download(f"http://127.0.0.1:{port}/a.png", 10**6, timeout, allow_private_urls=True)


def test_a_long_request_does_not_outlast_the_timeout(monkeypatch):
    hung_up = threading.Event()

    def answer(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        while not hung_up.wait(0.02) and connection.recv(1000):  # what is on its way by then may be megabytes
            pass

    url = "http://127.0.0.1:{}/" + "a" * 8_000_000
    with pytest.raises(ValueError, match="characters, more than the limit"):
        download(url.format(1), 1000, 5, allow_private_urls=True)
    monkeypatch.setattr(image_download, "MAX_URL_LENGTH", 10**7)
    with raw_server(answer) as port:
        with ends_in_time() as timeout:
            download(url.format(port), 1000, timeout, allow_private_urls=True)
        hung_up.set()


@pytest.mark.parametrize("answer", [silent, dripping(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc", b"\x03")])
def test_no_handshake_outlasts_the_timeout(answer):
    with raw_server(answer) as port, ends_in_time() as timeout:
        download(f"https://127.0.0.1:{port}/a.png", 1000, timeout, allow_private_urls=True)


@pytest.fixture
def unchecked_tls(monkeypatch):
    """Both ends of TLS without certificates."""

    def context(protocol):
        context = ssl.SSLContext(protocol)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.set_ciphers("AECDH:@SECLEVEL=0")
        except ssl.SSLError:
            pytest.skip("this OpenSSL has no ciphers without certificates")
        return context

    def client_context():
        client = context(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        return client

    server = context(ssl.PROTOCOL_TLS_SERVER)
    monkeypatch.setattr(ssl, "create_default_context", client_context)

    def encrypted(answer):
        def answer_encrypted(connection):
            with server.wrap_socket(connection, server_side=True) as wrapped:
                answer(wrapped)

        return answer_encrypted

    return encrypted


def test_https(unchecked_tls):
    with raw_server(unchecked_tls(answering(OK + b"Content-Length: 3\r\n\r\nabc"))) as port:
        assert download(f"https://localhost:{port}/", 1000, 5, allow_private_urls=True) == b"abc"
    with raw_server(unchecked_tls(SLOW_ANSWERS["header"])) as port, ends_in_time() as timeout:
        download(f"https://127.0.0.1:{port}/", 1000, timeout, allow_private_urls=True)


def test_no_name_outlasts_the_timeout(monkeypatch):
    hung = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: hung.wait(10))
    with ends_in_time() as timeout:
        download("http://example.com/a.png", 1000, timeout)
    hung.set()


def test_no_proxy_outlasts_the_timeout(monkeypatch):
    for answer in (silent, dripping(OK + b"Via: ", b"x")):
        with raw_server(answer) as port, ends_in_time() as timeout:
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
            download("https://example.com/a.png", 1000, timeout, allow_private_urls=True)


def test_a_timeout_may_be_without_end(server):
    assert download(server + "/image", 10**400, float("inf"), allow_private_urls=True) == PNG


GOOD_ANSWERS = {
    "length": (OK + b"Content-Length: 3\r\n\r\nabc", b"abc"),
    "more than its length": (OK + b"Content-Length: 3\r\n\r\nabcdef", b"abc"),
    "no length": (OK + b"\r\nabc", b"abc"),
    "chunks": (OK + b"Transfer-Encoding: Chunked\r\n\r\n1\r\na\r\n2;x=y\r\nbc\r\n0\r\n\r\n", b"abc"),
    "too long": (OK + b"\r\n" + bytes(2000), bytes(1001)),
    "a length beyond the limit": (OK + b"Content-Length: 99999999999\r\n\r\n" + bytes(2000), bytes(1001)),
    "a chunk of negative size": (OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + bytes(5000), bytes(1001)),
    "gzip": (OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"abc"), b"abc"),
    "a bomb": (OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(500_000)), bytes(1001)),
    "after hints": (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK + b"\r\nabc", b"abc"),
}


@pytest.mark.parametrize("kind", GOOD_ANSWERS)
def test_answers_that_are_read(kind):
    response, expected = GOOD_ANSWERS[kind]
    with raw_server(answering(response)) as port:
        assert download(f"http://127.0.0.1:{port}/", 1000, 5, allow_private_urls=True) == expected


BAD_ANSWERS = {
    "nothing": (b"", "closed connection"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.9\r\n", "SSH-2"),
    "another version": (b"HTTP/3.0 200 OK\r\n\r\n", "HTTP/3"),
    "an endless line": (b"HTTP/1.1 200 " + b"x" * 200_000, "got more than"),
    "too many headers": (OK + b"A: b\r\n" * 200 + b"\r\n", "headers"),
    "a long reason": (b"HTTP/1.1 404 \x1b[31m" + b"x" * 60_000 + b"\r\n\r\n", "answered 404"),
    "a part": (b"HTTP/1.1 206 Partial Content\r\n\r\nabc", "206"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", "204"),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\nLocation: /\r\n\r\n", "304"),
    "another protocol": (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "101"),
    "less than its length": (OK + b"Content-Length: 9\r\n\r\nabc", "early, after 3 bytes"),
    "chunks that end": (OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\nabc", "IncompleteRead"),
    "no chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n\x89PNG", "IncompleteRead"),
    "another transfer": (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "gzip, chunked"),
    "another encoding": (OK + b"Content-Encoding: br\r\n\r\nabc", "'br'"),
    "no gzip": (OK + b"Content-Encoding: gzip\r\n\r\nabc", "damaged"),
    "half a gzip": (OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"abc")[:-9], "ends early"),
    "a redirect to nowhere": (b"HTTP/1.1 302 Found\r\n\r\n", "answered 302"),
    "a redirect to itself": (b"HTTP/1.1 308 Moved\r\nLocation:\r\n\r\n", "5 redirects"),
    "a redirect to data": (b"HTTP/1.1 301 Moved\r\nLocation: data:,abc\r\n\r\n", "'data:,abc'.* not an http"),
    "a redirect to a file": (b"HTTP/1.1 303 Other\r\nLocation: FILE:///etc/passwd\r\n\r\n", "not an http"),
    "a redirect to half an address": (b"HTTP/1.1 307 T\r\nLocation: http://[::1/\r\n\r\n", "cannot be fetched"),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_answers_that_are_named_with_their_cause(kind):
    response, cause = BAD_ANSWERS[kind]
    with raw_server(answering(response)) as port:
        url = f"http://127.0.0.1:{port}/" + "a" * 5000
        with pytest.raises(ValueError, match=cause) as caught:
            download(url, 1000, 5, allow_private_urls=True)
    message = str(caught.value)
    assert message.startswith(f"image {url[:200] + '...'!r}")
    assert len(message) < 800
    assert message.isprintable()


def test_redirects_must_be_public_too(server, monkeypatch):
    # The first address passes as a public one; where it redirects to does not.
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **kwargs: [(*TCP, "", (ADDRESSES[host], port))])
    monkeypatch.setattr(image_download, "is_public_address", lambda address: address != "127.0.0.2")
    ADDRESSES = {"first.example": "127.0.0.1", "second.example": "127.0.0.2"}  # noqa: N806
    port = server.rpartition(":")[2]
    with pytest.raises(ValueError, match=r"first\.example.* \(redirected to .*127\.0\.0\.2, which is not public"):
        download(f"http://first.example:{port}/to?http://second.example:{port}/image", 1000, 5)


@pytest.mark.parametrize(
    "host",
    [
        *("127.1", "2130706433", "0x7f.1", "0x7F000001", "0177.0.0.1", "127.0.0.1.", "127.000.000.001", "LOCALHOST"),
        *("%31%32%37.0.0.1", "127%2e0.0.1", "\uff11\uff12\uff17.0.0.1", "127\u30020\uff0e0\uff611", "lo\tcal\nhost"),
    ],
)
def test_spellings_of_an_address(server, host):
    port = server.rpartition(":")[2]
    for url in (f"http://{host}:{port}/image", f" HTTP://{host}:{port}/image#part\n"):
        with pytest.raises(ValueError, match=r"127\.0\.0\.1, which is not public"):
            load_image(url)
        np.testing.assert_array_equal(np.asarray(load_image(url, allow_private_urls=True)), LEVELS)


def test_ipv6_addresses():
    requests = []
    try:
        server = raw_server(answering(OK + b"\r\n" + PNG, requests), "::1")
        port = server.__enter__()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with contextlib.ExitStack() as stack:
        stack.push(server)
        for host in ("[::1]", "[0:0:0:0:0:0:0:1]"):
            with pytest.raises(ValueError, match="::1.*, which is not public"):
                load_image(f"http://{host}:{port}/")
        load_image(f"http://[0::1]:{port}/", allow_private_urls=True)
    assert f"\r\nHost: [::1]:{port}\r\n" in requests[0]


@pytest.mark.parametrize("host", ["[2001:db8::1]", "[fe80::1%25lo]", "[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]"])
def test_private_ipv6_addresses_are_refused(host):
    with pytest.raises(ValueError, match="which is not public"):
        load_image(f"http://{host}/a.png")


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://good.example\\@127.0.0.1/",
            "http://good.example\\127.0.0.1/",
            "http://a@b@c/",
            "http://me:pass@host/",
        ),
        *("http:///a.png", "http://", "http:a.png", "http:/a.png", "https:?", "http://:80/", "http://host:port/"),
        *(
            "http://host:99999/",
            "http://host:-1/",
            "http://host:\u0661/",
            "http://a b/",
            "http://a%00b/",
            "http://a%2fb/",
        ),
        *(
            "http://a%40b/",
            "http://[::1",
            "http://[::1]]/",
            "http://[::1]x/",
            "http://[v1.a]/",
            "http://::1/",
            "http://[]/",
        ),
        *("http://\u2100.example/", "http://\ud800/", "http://host/\ud800", "http://%ff/", "http://a..b/"),
        *("http://" + "a" * 99, "http://[::1%25a b]/", "http://host%0d%0aX:y/", "http://[::1%0d%0a]/"),
    ],
)
def test_addresses_that_cannot_be_fetched(url):
    with pytest.raises(ValueError, match=re.escape(repr(url))):
        download(url, 1000, 1, allow_private_urls=True)


def test_a_long_name_takes_no_time():
    start = time.monotonic()
    for length in (4000, 900_000):
        with pytest.raises(ValueError, match="cannot be fetched"):
            download("http://" + "\U0001f9a5\u00e4" * (length // 2), 1000, 5, allow_private_urls=True)
    assert time.monotonic() - start < 2


def test_addresses_are_quoted_as_browsers_do():
    cases = {
        "/\u00e4/ bild.png?q=\u00fc": "/%C3%A4/%20bild.png?q=%C3%BC",
        "/%C3%a4%20x%?a=%2F&b=c+d%25": "/%C3%a4%20x%?a=%2F&b=c+d%25",
        "?a=b": "/?a=b",
        "/a\\b\"<>`{}|[]'?\x7f\x00.": "/a/b%22%3C%3E%60%7B%7D|[]'?%7F%00.",
        "/a?b?c#\u00fc?d": "/a?b?c",
        "/\U0001f9a5;v=1,2:3@4$!*()~": "/%F0%9F%A6%A5;v=1,2:3@4$!*()~",
        "/a\r\nX-Injected: b": "/aX-Injected:%20b",
    }
    requests = []
    with raw_server(answering(OK + b"\r\nabc", requests)) as port:
        for path in cases:
            download(f"http://127.0.0.1:{port}{path}", 1000, 5, allow_private_urls=True)
    assert [request.split("\r\n")[0] for request in requests] == [f"GET {path} HTTP/1.1" for path in cases.values()]


def test_names_that_are_not_ascii(monkeypatch):
    cases = {
        "B\u00fccher.example": "xn--bcher-kva.example",
        "b%C3%BCcher.example": "xn--bcher-kva.example",
        "stra\u00dfe.example": "xn--strae-oqa.example",
        "\u65e5\u672c\u3002example": "xn--wgv71a.example",
        "xn--bcher-kva.Example": "xn--bcher-kva.example",
    }
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **kwargs: asked.append(host) or [])
    for host in cases:
        with pytest.raises(ValueError, match="no address"):
            download(f"http://{host}/", 1000, 5)
    assert asked == list(cases.values())


def test_redirects_that_are_not_ascii():
    requests = []
    responses = [b"HTTP/1.1 302 F\r\nLocation: \xc3\xa4 b%20\xe4\r\n\r\n", OK + b"\r\nabc"]
    with raw_server(lambda connection: answering(responses.pop(0), requests)(connection)) as port:
        assert download(f"http://127.0.0.1:{port}/x/y", 1000, 5, allow_private_urls=True) == b"abc"
    assert requests[1].startswith("GET /x/%C3%A4%20b%20%E4 HTTP/1.1")


def test_a_proxy_is_asked_for_what_was_checked(monkeypatch):
    requests = []
    with raw_server(answering(OK + b"\r\nabc", requests)) as port:
        monkeypatch.setenv("http_proxy", f"http://me:p%40ss@127.0.0.1:{port}/")
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "::1,localhost")
        assert download("http://8.8.8.8/\u00e4 b?c#d", 1000, 5) == b"abc"
        # Octal to some, decimal and private to others.
        assert download("http://010.8.8.8:81/", 1000, 5) == b"abc"
        assert download("http://nowhere.invalid/", 1000, 5, allow_private_urls=True) == b"abc"
        for url in ("http://127.0.0.1/", "http://2130706433/", "http://[::ffff:a00:1]/", "https://[::1]/"):
            with pytest.raises(ValueError, match="not public"):
                download(url, 1000, 5)
        with pytest.raises(ValueError, match=r"resolved here to check .*allow_private_urls"):
            download("http://a..b/", 1000, 5)
        for url in ("http://8.8.8.8\\@10.0.0.1/", "http://10.0.0.1@8.8.8.8/"):
            with pytest.raises(ValueError, match="cannot be fetched"):
                download(url, 1000, 5)
        for host in ("[::1]", "localhost"):  # not over the proxy
            with pytest.raises(ValueError, match="refused"):
                download(f"http://{host}:1/", 1000, 5, allow_private_urls=True)
        with pytest.raises(ValueError, match="cannot be fetched"):  # the answer is no TLS
            download("https://8.8.4.4/", 1000, 5)
    assert [request.split(" HTTP/1.1")[0] for request in requests] == [
        "GET http://8.8.8.8/%C3%A4%20b?c",
        "GET http://8.8.8.8:81/",
        "GET http://nowhere.invalid/",
        "CONNECT 8.8.4.4:443",
    ]
    assert "\r\nHost: 8.8.8.8:81\r\n" in requests[1]
    assert "\r\nProxy-Authorization: Basic bWU6cEBzcw==\r\n" in requests[0]
    assert "Proxy-Authorization" not in requests[3]


def test_a_proxy_that_refuses(monkeypatch):
    with raw_server(answering(b"HTTP/1.1 407 Log in\r\n\r\n")) as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        with pytest.raises(ValueError, match="the proxy answered 407 Log in"):
            download("https://8.8.8.8/", 1000, 5)
    monkeypatch.setenv("https_proxy", "socks5://secret:word@127.0.0.1:1")
    with pytest.raises(ValueError, match="the proxy set for https is not") as caught:
        download("https://8.8.8.8/", 1000, 5)
    assert "secret" not in str(caught.value)


def test_https_over_a_proxy(unchecked_tls, monkeypatch):
    def proxy(connection):
        assert read_request(connection).startswith("CONNECT localhost:443 HTTP/1.1\r\nHost: localhost:443\r\n")
        connection.sendall(OK + b"\r\n")
        unchecked_tls(answering(OK + b"Content-Length: 3\r\n\r\nabc"))(connection)

    with raw_server(proxy) as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert download("https://localhost/", 1000, 5, allow_private_urls=True) == b"abc"


FUZZED = [response for response, _ in (*GOOD_ANSWERS.values(), *BAD_ANSWERS.values()) if len(response) < 300]
PIECES = [b"", b"\r\n", b"\n", b" ", b":", b"\0", b"\xff", b"-", b"0", b"9" * 20, b"HTTP/1.1 100 C\r\n\r\n"]


@pytest.fixture(scope="module")
def fuzzed_server():
    response = [b""]
    with raw_server(lambda connection: answering(response[0])(connection)) as port:
        yield response, port


@settings(max_examples=150, deadline=None)
@given(
    response=st.sampled_from(FUZZED) | st.binary(max_size=100).map(OK.__add__),
    changes=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 20), st.sampled_from(PIECES) | st.binary(max_size=3)), max_size=4
    ),
)
def test_any_answer_gives_bytes_or_a_value_error(fuzzed_server, response, changes):
    for place, length, piece in changes:
        start = int(place * len(response))
        response = response[:start] + piece + response[start + length :]
    fuzzed_server[0][0] = response
    start = time.monotonic()
    url = f"http://127.0.0.1:{fuzzed_server[1]}/a.png"
    try:
        data = download(url, 50, 0.5, allow_private_urls=True)
        assert isinstance(data, bytes)
        assert len(data) <= 51
    except ValueError as error:
        assert str(error).startswith(f"image {url!r}")
    assert time.monotonic() - start < 2
