"""The measured tier of the bench."""

import json
from pathlib import Path

import pytest

from flashsloth.bench.results import Machine, Measurement, Results, Roofline, Settings, Stage

SETTINGS = Settings(model="flashsloth", width=384, height=384)


def results(*measurements: Measurement) -> Results:
    machine = Machine("Linux", "a processor", cores=2, threads=1, memory_bytes=2**30, cpu_flags=["avx512_bf16"])
    roofline = Roofline("cpu", "bfloat16", 1, 1e11, 1e10, (256, 1024, 1024))
    return Results(machine, {"torch": "2"}, "abc", [roofline], list(measurements))


def test_result_file_comes_back_equal_and_states_its_medians(tmp_path: Path) -> None:
    measured = results(Measurement(SETTINGS, {"encode": Stage([1.0, 2.0, 6.0])}, visual_tokens=81))
    path = tmp_path / "run.json"
    measured.save(path)
    assert Results.load(path) == measured
    summary = json.loads(path.read_text())["measurements"][0]["summary"]
    assert summary == {"encode": {"median": 2.0, "quartiles": [1.5, 4.0]}}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_only_a_success_with_equal_settings_is_found() -> None:
    failed = Measurement(SETTINGS, error="out of memory")
    assert results(failed).find(SETTINGS) is None
    success = Measurement(SETTINGS, {"encode": Stage([1.0])})
    merged = results(failed).with_measurements([success])
    assert merged.measurements == [success] and merged.find(SETTINGS) is success
    assert merged.find(Settings(model="flashsloth", width=384, height=384, batch=2)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain.update(format=0), "no result file of format"),
        (lambda plain: plain["measurements"][0].update(speed=1), r"measurements\.0\.speed"),
        (lambda plain: plain["measurements"][0]["settings"].pop("width"), r"settings\.width"),
        (
            lambda plain: plain["measurements"][0]["stages"].update(thinking={"samples": [1]}),
            "unknown stages thinking",
        ),
        (lambda plain: plain["measurements"][0]["stages"].update(encode={"samples": []}), "without samples: encode"),
    ],
)
def test_broken_result_files_are_refused_by_the_field(change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    results(Measurement(SETTINGS, {"encode": Stage([1.0])})).save(path)
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=message):
        Results.load(path)


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("no")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        Results.load(path)
