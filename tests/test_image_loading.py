"""Where an image is read from: open files, paths and URLs, however odd."""

import base64
import gzip
import io
import os
import sys

import numpy as np
import pytest
from PIL import Image

from flashsloth.model.image_loading import load_image

LEVELS = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
FILE = io.BytesIO()
Image.fromarray(LEVELS).save(FILE, "PNG")
PNG = FILE.getvalue()


class Dribble:
    """An object with `read` alone, which gives less than it is asked for."""

    def __init__(self, data):
        self.file = io.BytesIO(data)

    def read(self, size):
        return self.file.read(min(size, 7))


@pytest.mark.parametrize("place", [0, 20, len(PNG)])
@pytest.mark.parametrize(
    "open_stream",
    [
        lambda path: io.BytesIO(PNG),
        lambda path: path.open("rb"),
        lambda path: path.open("rb", buffering=0),
        lambda path: gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(PNG))),
    ],
    ids=["bytes", "file", "unbuffered", "gzip"],
)
def test_an_open_file_can_be_read_twice_and_stays_where_it_stood(open_stream, place, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    with open_stream(path) as stream:
        stream.seek(place)
        for _ in range(2):
            np.testing.assert_array_equal(np.asarray(load_image(stream)), LEVELS)
            assert stream.tell() == place


def test_a_stream_that_cannot_be_rewound_says_so():
    stream = Dribble(PNG)
    np.testing.assert_array_equal(np.asarray(load_image(stream)), LEVELS)
    with pytest.raises(ValueError, match="cannot be read again; pass the bytes"):
        load_image(stream)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_may_never_end_is_not_opened(kind, tmp_path):
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = "/dev/zero"
    with pytest.raises(ValueError, match="is not a file"):
        load_image(path)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_names_that_are_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9 %41#?.png")
    path.write_bytes(PNG)
    for source in (path, str(path), path.as_uri()):
        np.testing.assert_array_equal(np.asarray(load_image(source)), LEVELS)
    np.testing.assert_array_equal(np.asarray(load_image(path.as_uri().replace("file://", "FILE://localhost"))), LEVELS)


class Unreadable:
    name = "n" * 10_000

    def read(self, size):
        raise RuntimeError("no " * 10_000)


CLOSED = io.BytesIO(PNG)
CLOSED.close()


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("a\0b.png", "null"),
        ("\ud800.png", "surrogates"),
        ("x" * 300, "cannot be read"),
        ("x/" * 5000, "cannot be read"),
        ("file://elsewhere/a.png", "another machine, 'elsewhere'"),
        ("file://[a/b.png", "not a valid URL"),
        ("file:///%00.png", "null"),
        ("data:image/png,\ud800", "per cent encoding"),
        ("data:image/png;base64,\ud800", "base64"),
        ("data:image/png;base64," + "!" * 10_000, "base64"),
        ("data:image/png;base64," + base64.b64encode(b"no image").decode(), "not an image"),
        (io.StringIO("text"), "binary mode"),
        (CLOSED, "closed"),
        (Unreadable(), "no no"),
    ],
)
def test_odd_sources_are_refused_in_a_short_line(source, cause):
    with pytest.raises(ValueError, match=cause) as caught:
        load_image(source)
    message = str(caught.value)
    assert message.startswith(("image ", "file ", "the given data URL"))
    assert len(message) < 600
    message.encode()  # can be printed


def test_unusual_paths_that_do_not_exist(tmp_path):
    (tmp_path / "file").write_bytes(PNG)
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path / "file" / "a.png", tmp_path / "link", "", "no\nsuch\x1bfile"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_image(path)
