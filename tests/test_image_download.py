"""Images fetched over HTTP: within limits of size and time, from public addresses only."""

import http.server
import io
import json
import socket
import threading

import numpy as np
import pytest
from PIL import Image

from flashsloth.model.image_download import download, is_public_address
from flashsloth.model.image_loading import load_image
from flashsloth.model.image_processing_flashsloth import FlashSlothImageProcessor

LEVELS = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PNG = encoded(Image.fromarray(LEVELS))


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
    # A name that is public when it is looked at and private when it is connected to.
    answers = iter(["93.184.216.34", "127.0.0.1", "127.0.0.1"])
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, port, **kwargs: [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (next(answers), port))],
    )
    with pytest.raises(ValueError, match="not public"):
        load_image(f"http://example.com:{port}/image")


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
