"""Text and images of users' files reach the records as they are written and where they are written, or are named."""

import io
import itertools
import json
import logging
import os
import tarfile
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_files import image_bytes, llava_turns, message_rows
from flashsloth.data.broken import BrokenSamples
from flashsloth.data.recipe import LlavaData, MessagesData, WebdatasetData
from flashsloth.data.records import RecordFile, iterate_records
from flashsloth.data.rows import data_files
from flashsloth.data.schema import Origin, make_record
from flashsloth.data.sources import LlavaSamples, MessagesSamples
from flashsloth.data.streams import MessagesStream, WebdatasetStream
from flashsloth.data.text_files import printable

SIZES = (8, 9, 10, 11)  # widths tell images apart


def llava(path: Path, **limits) -> LlavaSamples:
    return LlavaSamples(LlavaData(kind="llava", path=path, image_folder=path.parent, **limits))


def messages(path: Path, **options) -> MessagesSamples | MessagesStream:
    source = MessagesData(kind="messages", path=str(path), **options)
    return MessagesStream(source, "chats", 0) if source.streaming else MessagesSamples(source, "chats")


def records_of(source) -> list:
    return list(source.one_pass()) if hasattr(source, "one_pass") else [source[index] for index in range(len(source))]


def conversation(answer: str, question: str = "what?") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def answer_of(record) -> str:
    return record.messages[1]["content"][0]["text"]


# which readers of tables make a date, a number or a break of a line of
TEXTS = [
    "2024-01-01",
    "2024-01-01 10:00:00",
    "0012",
    "1e5",
    "NA",
    "null",
    "a\u2028b",
    "a\u2029b",
    "a\u0085b",
    "a\r\nb",
]


@pytest.mark.parametrize("form", ["data.jsonl", "DATA.JSONL", "data.json", "lines.json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_text_stays_as_it_is_written(tmp_path, form, streaming):
    rows = [{"id": text, "messages": conversation(text, text)} for text in TEXTS]
    rows[0]["id"] = None
    rows[1]["messages"][0]["content"] = [{"type": "text", "text": TEXTS[1]}]  # text here, parts there
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = json.dumps(rows, ensure_ascii=False) if form == "data.json" else lines
    (tmp_path / form).write_bytes(b"\xef\xbb\xbf" + text.encode())
    records = records_of(messages(tmp_path / form, streaming=streaming))
    assert [record.defects for record in records] == [[]] * len(TEXTS)
    assert [answer_of(record) for record in records] == TEXTS
    assert [record.identifier for record in records] == [None, *TEXTS[1:]]
    assert str(tmp_path / form) in records[0].origin.place


def test_a_llava_file_keeps_ids_and_takes_a_byte_order_mark(tmp_path):
    records = [{"id": identifier, "image": None, "conversations": llava_turns(0)} for identifier in ("0012", 12, None)]
    (tmp_path / "data.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(records).encode())
    assert [record.identifier for record in records_of(llava(tmp_path / "data.json"))] == ["0012", "12", None]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_line_is_one_broken_sample_among_messages_too(tmp_path, streaming, caplog):
    good = json.dumps({"messages": conversation("yes")})
    deep = '{"messages": ' + "[" * 100_000 + "}"
    lines = [good, '{"id": "cut', deep, '{"messages": "\\ud83d"}', f'{{"messages": {"9" * 5000}}}', "\xff", good]
    (tmp_path / "rows.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    source = messages(tmp_path / "rows.jsonl", streaming=streaming, max_broken=9)
    with caplog.at_level(logging.WARNING):
        samples = [record.load() for record in records_of(source)]
    assert [sample is not None for sample in samples] == [True] + [False] * 5 + [True]
    for number, reason in ((2, "not valid JSON"), (3, "nested too deeply"), (6, "UTF-8")):
        assert f"rows.jsonl: line {number} is broken: the line is " in caplog.text and reason in caplog.text


def test_text_without_characters_is_a_defect_of_its_record(tmp_path, caplog):
    records = [
        {"id": "cut \ud83d", "conversations": llava_turns(0)},
        {"id": "2", "conversations": [{"from": "human", "value": "what \udc00?"}, {"from": "gpt", "value": "x"}]},
        {"id": "3", "image": "\ud83d.png", "conversations": llava_turns(1)},
        {"id": "4", "image": "a\0.png", "conversations": llava_turns(1)},
        {"id": "x" * 10_000, "conversations": [{"from": "y" * 10_000, "value": "z"}]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    source = llava(tmp_path / "data.json", max_broken=9)
    with caplog.at_level(logging.WARNING):
        usable = [record.load() is not None for record in records_of(source)]
    assert usable == [True, False, False, False, False]  # a strange id is a matter of names alone
    assert "half of a surrogate pair" in caplog.text and source[0].origin.place.endswith(r"(id cut \ud83d)")
    for record in caplog.records:
        record.getMessage().encode()
        assert len(record.getMessage()) < 1200


def test_a_damaged_image_of_a_table_is_a_broken_sample_and_others_go_on(tmp_path, caplog):
    rows = message_rows(6)
    rows[4]["images"][0]["bytes"] = b"no image"
    for row in rows:  # a picture that no record is made of
        row["thumbnail"] = {"bytes": b"no image either", "path": None}
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    table = table.cast_column("thumbnail", datasets.Image())
    table.to_parquet(str(tmp_path / "rows.parquet"))
    for streaming in (False, True):
        source = messages(tmp_path / "rows.parquet", streaming=streaming, max_broken=1)
        records = records_of(source)  # listing decodes nothing
        with caplog.at_level(logging.WARNING):
            assert [record.load() is not None for record in records] == [True, True, True, True, False, True]
        assert "rows.parquet: row 4 is broken: " in caplog.text
        if not streaming:
            assert [images for images, _ in source.sizes()] == [0, 1, 2, 0, 1, 2]


def test_linked_folders_are_read_and_what_is_not_is_counted(tmp_path, caplog):
    for folder in ("disk/sub", "data"):
        (tmp_path / folder).mkdir(parents=True)
    row = json.dumps({"messages": conversation("yes")})
    for name in ("disk/sub/b.jsonl", "data/a.JSONL"):
        (tmp_path / name).write_text(row)
    for name in ("data/README", "data/1.png", "data/2.PNG"):
        (tmp_path / name).write_text("x")
    (tmp_path / "data/more").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/again").symlink_to(tmp_path / "data")
    with caplog.at_level(logging.WARNING):
        assert [file.name for file in data_files(tmp_path / "data")] == ["a.JSONL", "b.jsonl"]
    assert "2 x .png, 1 x without ending" in caplog.text
    assert len(records_of(messages(tmp_path / "data"))) == 2


def write_tar(path: Path, members: dict[str, bytes | int]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = image_bytes(size=data) if isinstance(data, int) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def talk(asked: int | list[dict], **fields) -> bytes:
    parts = [{"type": "image"}] * asked if isinstance(asked, int) else asked
    question = {"role": "user", "content": [*parts, {"type": "text", "text": "q"}]}
    return json.dumps({"messages": [question, {"role": "assistant", "content": "a"}], **fields}).encode()


def shard_records(path: Path) -> list:
    return list(WebdatasetStream(WebdatasetData(kind="webdataset", shards=str(path)), "tars", 0).one_pass())


def widths(record) -> list[int]:
    return [record.load_image(index).size[0] for index in range(len(record.images))]


NAMED = [{"type": "image", "image": "b.png"}, {"type": "image", "image": "a.png"}]
INDEXED = [{"type": "image", "index": 1}, {"type": "image", "index": 0}]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"s.0.png": 8, "s.1.png": 9, "s.10.png": 11, "s.2.png": 10, "s.json": talk(4)}, [8, 9, 10, 11]),
        ({"s.img_10.jpg": 9, "s.img_9.png": 8, "s.json": talk(2)}, [8, 9]),
        ({"s.a.png": 8, "s.b.png": 9, "s.json": talk(2, images=["s.b.png", "s.a.png"])}, [9, 8]),
        ({"x/s.a.png": 8, "x/s.b.png": 9, "x/s.json": talk(2, image=[{"path": "y/s.B.png"}, "a.png"])}, [9, 8]),
        ({"s.a.png": 8, "s.b.png": 9, "s.json": talk(NAMED)}, [9, 8]),
        ({"s.0.png": 8, "s.1.png": 9, "s.json": talk(INDEXED)}, [9, 8]),
        ({"s.png": 8, "s.json": talk(1, image="coco/000017.jpg")}, [8]),  # one image has one place, whatever its name
        ({"s.0.png": 8, "s.1.png": 9, "s.json": talk(2, images=["s.0.png", "s.2.png"])}, "does not hold"),
        ({"s.0.png": 8, "s.1.png": 9, "s.json": talk(2, images=["s.0.png", "s.0.png"])}, "does not name the image"),
        ({"s.after.png": 8, "s.before.png": 9, "s.json": talk(2)}, "nothing tells the order"),
        ({"s.png": 8, "s.1.png": 9, "s.json": talk(2)}, "nothing tells the order"),
        ({"s.1.png": 8, "s.01.png": 9, "s.json": talk(2)}, "nothing tells the order"),
        ({"s.0.png": 8, "s.1.png": 9, "s.json": talk([INDEXED[0], INDEXED[0]])}, "image parts name 1, 1"),
    ],
)  # fmt: skip
def test_every_image_of_a_shard_stands_for_its_placeholder(tmp_path, members, expected):
    (record,) = shard_records(write_tar(tmp_path / "a.tar", members))
    if isinstance(expected, list):
        assert not record.defects and widths(record) == expected
    else:
        assert [defect.kind for defect in record.defects] == ["image order"]
        assert expected in record.defects[0].message


def test_image_parts_of_messages_say_which_image_they_are(tmp_path):
    for name, size in (("a.png", 8), ("b.png", 9)):
        (tmp_path / name).write_bytes(image_bytes(size=size))
    lines = [talk(parts, images=["a.png", "b.png"]).decode() for parts in (2, NAMED, INDEXED)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    records = records_of(messages(tmp_path / "rows.jsonl", image_folder=tmp_path))
    assert [widths(record) for record in records] == [[8, 9], [9, 8], [9, 8]]


def test_files_of_a_shard_that_are_not_read_are_named_once(tmp_path, caplog):
    members = {}
    for number in range(3):
        members |= {f"{number}.heic": b"x", f"{number}.txt": "\ufeffa caption\r\n".encode(), f"{number}.JPEG": 8}
    with caplog.at_level(logging.WARNING):
        records = shard_records(write_tar(tmp_path / "a.tar", members))
    assert [answer_of(record) for record in records] == ["a caption"] * 3 and widths(records[0]) == [8]
    assert caplog.text.count("files that end in .heic are not read") == 1


def test_every_pattern_of_shards_has_to_match(tmp_path):
    (tmp_path / "one" / "deep").mkdir(parents=True)
    write_tar(tmp_path / "one" / "deep" / "a.tar", {"s.png": 8, "s.json": talk(1)})
    assert len(shard_records(tmp_path / "**" / "*.tar")) == 1
    with pytest.raises(ValueError, match="no file matches .*two"):
        shard_records(f"{tmp_path}/one/*/*.tar::{tmp_path}/two/*.tar")


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", "none.json", "."):
        with pytest.raises(ValueError, match="cannot read data file"):
            llava(tmp_path / name)
    with pytest.raises(ValueError, match=r"pipe\.json is no regular file"):
        shard_records(tmp_path / "pipe.*")


def test_messages_hold_what_a_terminal_can_show():
    assert printable("a\x1b[31m\ud83d\u2028é", 100) == r"a\x1b[31m\ud83d\u2028é"
    assert printable("x" * 50, 10) == "x" * 10 + "..."
    with pytest.raises(ValueError) as caught:
        BrokenSamples(0).add("\udcff" * 10_000, "\0" * 10_000)
    assert len(str(caught.value).encode()) < 1500


JSON = json.dumps(
    [
        {"id": "0", "image": "a.png", "conversations": llava_turns(1)},
        {"id": None, "messages": json.loads(talk(INDEXED))["messages"], "images": ["a.png", "b.png"]},
    ]
).encode()
PIECES = st.sampled_from(
    [b"[" * 3000, b"null", b"{}", b"[]", b'"', b"1e999", b"\\ud83d", b"\xff", b"\n", b"-1", b"index"]
)
EDITS = st.lists(
    st.tuples(st.integers(0, len(JSON)), st.integers(0, 8), PIECES | st.binary(max_size=2)), min_size=1, max_size=3
)


@settings(max_examples=200, deadline=None)
@given(EDITS, st.sampled_from([".json", ".jsonl"]))
def test_mutations_of_records_are_read_or_named(tmp_path_factory, edits, suffix):
    data = JSON if suffix == ".json" else JSON[1:-1].replace(b'}, {"id"', b'}\n{"id"')
    for place, length, piece in edits:
        data = data[:place] + piece + data[place + length :]
    path = tmp_path_factory.getbasetemp() / f"mutated{suffix}"
    path.write_bytes(data)
    try:
        file = RecordFile(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    indexed = [file.read(index) for index in range(len(file))]
    assert indexed == list(iterate_records(path)) or "nan" in str(indexed).lower()
    for source in (llava(path, max_broken=99), messages_or_none(path)):
        for record in itertools.islice(source or (), len(file)):
            record.load()  # named or loaded, and nothing else


def messages_or_none(path: Path) -> MessagesSamples | None:
    try:
        return messages(path, max_broken=99)
    except ValueError:
        return None


WORDS = ["user", "gpt", "<image>", "image", "text", "\ud83d"]
KEYS = ["role", "content", "from", "value", "type", "text", "index", "image"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.sampled_from(["messages", "conversations"]), st.lists(st.just(b"x"), max_size=2))
def test_any_json_value_gives_a_record_or_its_defects(value, key, images):
    for raw in ({key: value, "id": value}, {key: [value, value]}, value):
        record = make_record(Origin("s", "p"), raw, images, 16, 10**6, names=["a.png"] * len(images))
        assert record.defects or record.messages


TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w") as _tar:
    for _name, _data in {"0.png": image_bytes(), "0.json": talk(1), "1.txt": b"a", "1.png": image_bytes()}.items():
        _member = tarfile.TarInfo(_name)
        _member.size = len(_data)
        _tar.addfile(_member, io.BytesIO(_data))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(TAR.getvalue())), st.binary(min_size=1, max_size=3)), max_size=4))
def test_mutations_of_a_shard_are_read_or_named(tmp_path_factory, edits):
    data = bytearray(TAR.getvalue())
    for place, piece in edits:
        data[place : place + len(piece)] = piece
    path = tmp_path_factory.getbasetemp() / "mutated.tar"
    path.write_bytes(bytes(data))
    stream = WebdatasetStream(WebdatasetData(kind="webdataset", shards=str(path), max_broken=99), "tars", 0)
    for record in stream.one_pass():
        record.load()
