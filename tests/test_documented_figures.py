"""The tables of measured times in the documents show what the result files beside them hold."""

import json
import re
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
MODELS = {
    "FlashSloth": "flashsloth",
    "FlashSloth-HD": "flashsloth-hd",
    "SigLIP + Phi-2, 729 tokens": "siglip-phi2-729",
    "InternVL3-1B": "internvl3-1b",
    "Qwen2-VL-2B": "qwen2-vl-2b",
}
SHARES = {
    "encoder, prefill of matrix rate": ("encode", "prefill"),
    "decode of bandwidth": ("decode_per_token",),
}
STAGES = {
    "encode": "encode",
    "compress": "compress",
    "prefill": "prefill",
    "first token": "time_to_first_token",
    "ms/token": "decode_per_token",
    "ms/token after it": "decode_per_token",
    "ms/step": "decode_per_token",
}


def tables(path):
    """Tables whose rows are models, each with the result file that the text before it names last."""
    text = path.read_text()
    for match in re.finditer(r"^\| model \|.*\n\|[-:| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in match.group().splitlines()]
        files = re.findall(r"\((?:docs/)?(efficiency-[a-z-]+\.json)\)", text[: match.start()])
        if files and any(name.startswith("first token") for name in head):
            yield pytest.param(files[-1], head, rows, id=f"{path.name}: {files[-1]}")


def measurement(file, row):
    """The one of a result file that a row's first cell, batch and dtype name."""
    label = row["model"].replace("`", "")
    name = max((name for name in MODELS if label.startswith(name)), key=len)
    options = [option for option in label.removeprefix(name).split(", ") if option]
    compiled, stock, torch = (option in options for option in ("compiled", "stock assembly", "--kernels torch"))
    scheme = next((option for option in options if option.startswith("int")), None)
    assert len(options) == compiled + stock + torch + (scheme is not None), label
    wanted = {
        "model": MODELS[name],
        "compile": compiled,
        "assembly": "stock" if stock else "own",
        "quantization": scheme,
        "batch": int(row.get("batch", 1)),
        "images": 1,
        "dtype": row.get("dtype", "bfloat16"),
    }
    found = [m for m in file["measurements"] if wanted.items() <= m["settings"].items()]
    if len(found) > 1:
        found = [m for m in found if (m["settings"]["kernels"] == "torch") == torch]
    assert len(found) == 1, label
    return found[0]


def values(measured, column):
    """What a cell of a column states, in its unit; None for a column that is no figure of one measurement."""
    if column == "visual tokens":
        return [measured["visual_tokens"]]
    if column == "peak GB":
        return [measured["peak_memory_bytes"] / 1e9]
    if column == "reading GB/s":
        return [median(measured["read_rates"]) / 1e9]
    if column in SHARES:
        return [100 * measured["share_of_roofline"][stage] for stage in SHARES[column]]
    stage = STAGES.get(re.sub(r" m?s$", "", column))
    return stage and [measured["summary"][stage]["median"] * (1 if column.endswith(" s") else 1e3)]


def agrees(shown, value):
    """Whether a number as written is the value, rounded to as many digits."""
    text = shown.replace(",", "")
    return abs(float(text) - value) <= 0.5 * 10 ** -len(text.partition(".")[2]) * 1.01


@pytest.mark.parametrize(
    "name, head, rows",
    [t for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) for t in tables(path)],
)
def test_tables_show_what_the_result_files_hold(name, head, rows):
    file = json.loads((ROOT / "docs" / name).read_text())
    base, wrong = [], []
    for cells in rows:
        measured = measurement(file, dict(zip(head, cells, strict=True)))
        stated = [values(measured, column) for column in head]
        base = stated if "1.00" in cells else base
        for place, (column, cell) in enumerate(zip(head, cells, strict=True)):
            expected = stated[place]
            if column.startswith("/ ") and cell:  # of the column before it, to the row above that has 1.00
                expected = [stated[place - 1][0] / base[place - 1][0]]
            if cell and expected:
                shown = re.findall(r"\d[\d,]*(?:\.\d+)?", cell.replace(" %,", ";"))
                if len(shown) != len(expected) or not all(map(agrees, shown, expected)):
                    wrong.append((cells[0], column, cell, expected))
    assert not wrong


def test_the_tables_are_found():
    """A heading that is no longer recognised must not pass unseen."""
    pages = [path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) for _ in tables(path)]
    assert {path.name: pages.count(path) for path in pages} == {
        "README.md": 1,
        "efficiency.md": 1,
        "efficiency-log.md": 6,
    }
