"""`flashsloth bench report`: ratios, crossovers, slopes and losses of numbers made by hand, then the whole command."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from pathlib import Path

import pytest

import flashsloth.bench
import flashsloth.reports
from flashsloth.bench.comparison import (
    Case,
    Condition,
    Variant,
    baseline_of,
    crossovers,
    groups_of,
    losses,
    pairs,
    rivals_of,
)
from flashsloth.bench.counted import count
from flashsloth.bench.page_tables import crossover_table, loss_tables, ratio_text
from flashsloth.bench.results import Machine, Measurement, Results, Roofline, Settings, Stage
from flashsloth.bench.scaling import log_log_slope, scaling
from flashsloth.bench.tables import spread
from flashsloth_cli.main import main

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "efficiency-cpu.json"
MACHINE = Machine("Linux", "a processor", cores=2, threads=2, memory_bytes=2**34, cpu_flags=["avx2"])
ROOFLINE = Roofline("cpu", "bfloat16", 2, 1e12, 1e10, (8, 8, 8))
RIVAL, RIVAL_TITLE = "internvl3-1b", "InternVL3-1B"
PLOTS = {"first-token", "image-size", "total-time", "visual-tokens", "memory", "scaling"}


def measured(
    model: str = "flashsloth", first: float = 1.0, step: float = 0.1, peak: int = 10**9, **settings
) -> Measurement:
    """Half of the first token is encoding; every answer is on one straight line."""
    found = Settings(
        model, **{"width": 768, "height": 768, "output_tokens": 8, "threads": 2, "kernels": "packed", **settings}
    )
    stages = {
        "encode": Stage([0.5 * first]),
        "compress": Stage([0.1 * first]),
        "prefill": Stage([0.4 * first]),
        "time_to_first_token": Stage([first]),
        "total": Stage([first + (found.output_tokens - 1) * step]),
    }
    if found.output_tokens > 1:
        stages["decode_per_token"] = Stage([step])
    return Measurement(found, stages, 81, 120, 2 * 10**9, 10**7, peak)


def results(*measurements: Measurement, machine: Machine = MACHINE, commit: str | None = "abc") -> Results:
    return Results(machine, {"torch": "2"}, commit, [ROOFLINE], list(measurements))


def cases(*measurements: Measurement) -> list[Case]:
    (group,) = groups_of({"a.json": results(*measurements)})
    return group.cases()


def report(folder: Path, *files: Path) -> str:
    assert main(["bench", "report", *map(str, files), "-o", str(folder)]) == 0
    return (folder / "report.md").read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    return re.split(r"^#+ ", page.split(f"## {heading}", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(page: str) -> set[tuple[str, ...]]:
    """Rows of all tables of a page."""
    return {tuple(line.strip("| ").split(" | ")) for line in page.splitlines() if line.startswith("| ")}


def test_totals_are_measured_interpolated_and_extended():
    (case,) = cases(measured(output_tokens=1), dataclasses.replace(measured(output_tokens=11, step=0.2)))
    assert case.knots() == [(1, 1.0), (11, pytest.approx(3.0))]
    assert case.total(6) == pytest.approx(2.0)
    assert case.total(21) == pytest.approx(5.0)
    assert case.total(0.5) is None
    (short,) = cases(measured(output_tokens=1))
    assert short.total(1) == 1.0 and short.total(2) is None


def test_the_first_token_has_the_samples_of_all_lengths():
    (case,) = cases(measured(first=1.0, output_tokens=1), measured(first=3.0, output_tokens=8))
    assert case.stage("time_to_first_token") == Stage([1.0, 3.0])
    assert case.stage("preprocess") is None


def test_crossover_of_two_lines():
    """1 + 0.2 (n - 1) and 3 + 0.1 (n - 1) meet at n = 21, at 5 s."""
    base, rival = cases(measured(first=1.0, step=0.2), measured(RIVAL, first=3.0, step=0.1))
    (found,) = crossovers(rival, base)
    assert found.tokens == pytest.approx(21) and found.seconds == pytest.approx(5)
    assert found.baseline_slower_after and not found.measured
    (back,) = crossovers(base, rival)
    assert back.tokens == pytest.approx(21) and not back.baseline_slower_after
    assert crossovers(rival, base, longest=20) == []


def test_crossover_inside_what_was_measured():
    base, rival = cases(
        measured(first=1.0, step=0.2), measured(first=1.0, step=0.2, output_tokens=64),
        measured(RIVAL, first=3.0, step=0.1), measured(RIVAL, first=3.0, step=0.1, output_tokens=64),
    )  # fmt: skip
    (found,) = crossovers(rival, base)
    assert found.measured and found.tokens == pytest.approx(21)


def test_crossover_at_a_measured_length_is_that_length():
    base, rival = cases(
        measured(first=1.0, step=0.2, output_tokens=21), measured(RIVAL, first=3.0, step=0.1, output_tokens=21)
    )
    base.by_length[21].stages["total"].samples[:] = rival.by_length[21].stages["total"].samples
    (found,) = crossovers(rival, base)
    assert found.tokens == 21 and found.measured


def test_two_crossovers_of_bent_lines():
    """The rival is slower, faster, and slower again."""
    base, rival = cases(
        *(measured(first=1.0, step=0.2, output_tokens=n) for n in (11, 21)),
        *(measured(RIVAL, first=2.0, step=s, output_tokens=n) for n, s in ((11, 0.05), (21, 0.2))),
    )  # fmt: skip
    first, second = crossovers(rival, base)
    assert first.baseline_slower_after and not second.baseline_slower_after
    assert 1 < first.tokens < 11 < second.tokens < 21


def test_lines_that_do_not_cross():
    base, rival = cases(measured(), measured(RIVAL, first=2.0, step=0.3))
    assert crossovers(rival, base) == []
    assert crossover_table([(rival, base)]).rows == [
        ("InternVL3-1B", "InternVL3-1B", "at every length up to 10,000", "", "")
    ]


@pytest.mark.parametrize(("power", "factor"), [(1, 3.0), (2, 0.5), (0, 7.0)])
def test_slope_of_a_power(power: int, factor: float):
    xs = [1, 2, 4, 16]
    assert log_log_slope(xs, [factor * x**power for x in xs]) == pytest.approx(power)


@pytest.mark.parametrize("xs, ys, message", [([2, 2], [1, 3], "two different"), ([1, 2], [0, 1], "positive")])
def test_slopes_that_are_none(xs, ys, message):
    with pytest.raises(ValueError, match=message):
        log_log_slope(xs, ys)


def test_series_hold_one_axis_and_stand_beside_what_is_expected():
    grid = [
        measured(batch=batch, images=images, first=2.0 * batch, peak=10**9 * images)
        for batch, images in itertools.product((1, 2, 8), (1, 4))
    ]
    found, left_out = scaling(grid, lambda settings, metric: float(settings.batch**2))
    by_key = {(one.axis, one.metric): one for one in found}
    assert set(by_key) == {
        ("images", "time_to_first_token"), ("images", "peak_memory_bytes"), ("batch", "time_to_first_token"),
        ("batch", "decode_per_token"), ("batch", "peak_memory_bytes"),
    }  # fmt: skip
    batch = by_key["batch", "time_to_first_token"]
    assert (batch.values, batch.measured) == ([1, 2, 8], [2.0, 4.0, 16.0])
    assert batch.slope == pytest.approx(1) and batch.expected_slope == pytest.approx(2)
    assert by_key["images", "peak_memory_bytes"].slope == pytest.approx(1)
    assert left_out == 2 + 1  # images at two more batches, batches at one more number of images
    nothing, _ = scaling(grid, lambda settings, metric: None)
    assert {one.expected_slope for one in nothing} == {None}


def test_count_agrees_with_the_result_file():
    """The example was counted by the static tier when it was measured."""
    for measurement in Results.load(EXAMPLE).measurements:
        counted = count(measurement.settings)
        assert counted.flops == measurement.flops
        # the static tier counts weights as they are before they are quantized
        if measurement.settings.quantization is None:
            assert counted.memory.weights == measurement.parameter_bytes


def test_count_follows_images_batch_and_length():
    settings = Settings("flashsloth", 384, 384, output_tokens=1)
    one = count(settings)
    many = count(dataclasses.replace(settings, batch=4))
    assert many.first_token_flops == 4 * one.first_token_flops
    assert many.memory.cache == 4 * one.memory.cache and many.memory.weights == one.memory.weights
    images = count(dataclasses.replace(settings, images=3))
    assert images.flops["encode"] == 3 * one.flops["encode"]
    assert images.memory.cache - one.memory.cache == 2 * 81 * 320 * 2**10
    longer = count(dataclasses.replace(settings, output_tokens=11))
    assert longer.memory.cache - one.memory.cache == 10 * 320 * 2**10
    step = longer.decode_bytes / ROOFLINE.bandwidth_bytes_per_second
    assert longer.per_token(ROOFLINE) == pytest.approx(step)
    assert longer.total(ROOFLINE) == pytest.approx(longer.first_token(ROOFLINE) + 10 * step)
    assert longer.total(None) is None
    assert count(Settings("a model of tomorrow", 384, 384)) is None


def test_pairs_take_the_longest_common_answer():
    base, rival = cases(
        *(measured(step=0.1, output_tokens=n, peak=n) for n in (1, 8, 64)),
        *(measured(RIVAL, first=2.0, step=0.05, output_tokens=n, peak=3 * n) for n in (1, 8, 512)),
    )  # fmt: skip
    found = {(pair.metric, pair.output_tokens): pair for pair in pairs(rival, base)}
    assert found["peak_memory_bytes", 8].ratio == 3
    assert found["decode_per_token", 8].ratio == pytest.approx(0.5)
    assert found["total", 8].ratio == pytest.approx((2 + 7 * 0.05) / (1 + 7 * 0.1))
    assert {length for metric, length in found if metric == "total"} == {8}
    assert found["time_to_first_token", None].overlaps is False
    with pytest.raises(ValueError, match="not to be compared"):
        pairs(rival, dataclasses.replace(base, condition=dataclasses.replace(base.condition, batch=2)))


def test_losses_are_every_metric_of_which_a_rival_needs_less():
    found = cases(measured(), measured(RIVAL, first=2.0, step=0.05, peak=5 * 10**8))
    baseline = baseline_of(found, "flashsloth")
    (loss,) = losses(found, baseline)
    assert [pair.metric for pair in loss.pairs] == ["decode_per_token", "peak_memory_bytes"]
    assert [crossing.tokens for crossing in loss.crossovers] == [pytest.approx(21)]
    (table,) = loss_tables([loss], rivals_of(found, baseline), "FlashSloth")
    assert [row[2:] for row in table.rows] == [
        ("time a token", "", "50 ms", "100 ms", "0.50"),
        ("peak memory", "", "0.50 GB", "1.00 GB", "0.50"),
        ("answers from 21 tokens on", "by ms/token, longer than was measured", "", "", ""),
    ]


def test_a_rival_that_is_worse_everywhere_is_no_loss():
    found = cases(measured(), measured(RIVAL, first=2.0, step=0.2, peak=2 * 10**9))
    assert losses(found, baseline_of(found, "flashsloth")) == []


def test_overlapping_samples_are_called_chance():
    noisy = measured()
    noisy.stages["time_to_first_token"].samples[:] = [0.9, 1.0, 1.1]
    found = cases(noisy, measured(RIVAL, first=0.95, step=0.2))
    baseline = baseline_of(found, "flashsloth")
    (loss,) = losses(found, baseline)
    (first,) = [pair for pair in loss.pairs if pair.metric == "time_to_first_token"]
    assert first.overlaps
    (table,) = loss_tables([loss], rivals_of(found, baseline), "FlashSloth")
    assert table.rows[0][2:] == ("first token", "samples overlap: may be chance", "950 ms", "1.00 s", "0.95")


def test_sizes_are_won_and_lost_by_the_clock():
    sizes = [(384, 0.5), (768, 2.0), (1344, 3.0)]
    found = cases(
        *(measured(width=size, height=size) for size, _ in sizes),
        *(measured(RIVAL, width=size, height=size, first=first) for size, first in sizes),
    )
    baseline = baseline_of(found, "flashsloth")
    sooner = {
        (loss.rival.title, loss.condition.size): pair.ratio
        for loss in losses(found, baseline)
        for pair in loss.pairs
        if pair.metric == "time_to_first_token"
    }
    assert sooner == {("InternVL3-1B", "384x384"): 0.5}
    tally, each = loss_tables(losses(found, baseline), rivals_of(found, baseline), "FlashSloth")
    assert ("InternVL3-1B", "first token", "1 of 3", "0.50") in tally.rows
    assert len([row for row in each.rows if row[2] == "first token"]) == 1


def test_what_was_measured_under_load_or_differently_is_not_the_baseline():
    loaded = dataclasses.replace(measured(), under_load=True)
    assert baseline_of(cases(loaded), "flashsloth") is None
    found = cases(measured(compile=True), measured(attention="eager", compile=True), measured(assembly="stock"))
    assert baseline_of(found, "flashsloth").title == "FlashSloth (compiled)"
    rivals = cases(measured(), dataclasses.replace(measured(RIVAL, first=0.1, step=0.01), under_load=True))
    assert losses(rivals, baseline_of(rivals, "flashsloth")) == []


def test_titles_of_models_that_are_not_known_here():
    (case,) = cases(measured("a-model-of-tomorrow", weights="/models/its-weights"))
    assert case.variant.title == "a-model-of-tomorrow (weights of its-weights)"


def test_ratios_are_told_from_one():
    assert [ratio_text(ratio) for ratio in (2.346, 0.997, 1.0)] == ["2.35", "0.997", "1.00"]
    assert spread([1.0, 2.0, 3.0]) == 1.0


def test_groups_never_mix_machines_dtypes_threads_or_code():
    other = dataclasses.replace(MACHINE, cpu="another processor")
    files = {
        "a.json": results(measured(), measured(dtype="float32"), measured(threads=1)),
        "b.json": results(measured(RIVAL)),
        "c.json": results(measured(RIVAL), machine=other),
        "d.json": results(measured(RIVAL), commit="def"),
    }
    groups = groups_of(files)
    assert [group.files for group in groups] == [["a.json", "b.json"], ["a.json"], ["a.json"], ["c.json"], ["d.json"]]
    assert groups[0].roofline == ROOFLINE and groups[1].roofline is None


def test_the_last_of_two_files_counts():
    (group,) = groups_of({"a.json": results(measured(first=1.0)), "b.json": results(measured(first=2.0))})
    assert [m.median("time_to_first_token") for m in group.measurements] == [2.0]
    assert group.repeated == [
        ("FlashSloth, an image of 768x768, 32 text tokens, batch 1, 8 output tokens", "b.json counts")
    ]


def test_the_example_end_to_end(tmp_path: Path, capsys):
    page = report(tmp_path / "new" / "folder", EXAMPLE)
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "folder" / "report.md")
    drawn = {path.stem for path in (tmp_path / "new" / "folder").glob("*.png")}
    assert drawn == PLOTS - {"image-size", "scaling"}
    assert drawn == set(re.findall(r"!\[[^]]+\]\(([\w-]+)\.png\)", page))
    assert not list((tmp_path / "new" / "folder").glob("*incomplete*"))
    # packed layers are how it is shipped; those of torch are a variant
    assert "| FlashSloth (torch kernels) | 2.28 s (1.38) |" in section(page, "Ratios")
    assert "| Qwen2-VL-2B | 17.28 s (10.46) | 18.46 s (6.94) | ≈ 22.50 s (3.71) |" in page
    crossed = {(row[0], row[1]): row[2:] for row in rows(section(page, "Total time"))}
    assert crossed["InternVL3-1B", "FlashSloth"][:2] == ("by ms/token beyond what was measured", "111")
    assert crossed["Qwen2-VL-2B", "Qwen2-VL-2B"][0] == "at every length up to 10,000"
    lost = {(row[0], row[2]): row[3:] for row in rows(section(page, "Where FlashSloth loses")) if len(row) == 7}
    assert lost["InternVL3-1B", "time a token"] == ("", "62.5 ms", "142 ms", "0.44")
    assert "an image of 384x384, which was not timed here, are by count, not by clock" in page
    assert "| operations at 384x384 / FlashSloth |" in section(page, "Memory")
    missing = dict(row for row in rows(section(page, "What is missing")))
    lacking = "InternVL3-1B, Qwen2-VL-2B, FlashSloth, stock parts, FlashSloth-HD, stock parts"
    assert missing["preprocess"] == f"not measured for {lacking}"
    assert "no model was measured at two sizes" in missing["Time to the first token against image size"]
    for axis in ("images a prompt", "prompts a batch", "output tokens"):
        assert "there is no slope to fit" in missing[f"Scaling with {axis}"]
    facts = dict(row for row in rows(section(page, "Machine and settings")))
    assert "AMD EPYC" in facts["machine"] and "torch 2.13.0" in facts["versions"]
    assert facts["matrix product"].startswith("0.994 TFLOP/s")


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    """Several sizes, images, batches and lengths; the rival is sooner with small images only."""
    path = tmp_path_factory.mktemp("grid") / "grid.json"
    found = []
    for size, images, batch, length in itertools.product((384, 768), (1, 2), (1, 4), (1, 8)):
        common = {"width": size, "height": size, "images": images, "batch": batch, "output_tokens": length}
        found.append(measured(first=1.0 * images * batch, step=0.2, peak=8 * 10**9, **common))
        first = (0.5 if size == 384 else 3.0) * images * batch
        found.append(measured(RIVAL, first=first, step=0.1, peak=3 * 10**9, **common))
    results(*found).save(path)
    return path


def test_a_grid_end_to_end(grid: Path, tmp_path: Path):
    page = report(tmp_path, grid)
    assert {path.stem for path in tmp_path.glob("*.png")} == PLOTS
    slopes = [row for row in rows(section(page, "Scaling")) if row[0] == "FlashSloth"]
    found = {row[1]: (float(row[4]), float(row[5])) for row in slopes}
    assert found["first token / prompts a batch"] == (1.0, 1.0)
    assert found["peak memory / prompts a batch"][0] == 0.0 and found["peak memory / prompts a batch"][1] > 0
    measured_slope, expected = found["first token / images a prompt"]
    assert measured_slope == 1.0 and 0.8 < expected < 1.0  # text and query tokens do not grow with the images
    assert "which was not timed here" not in page
    assert page.count("<details>") == page.count("</details>") == 3
    lost = rows(section(page, "Where FlashSloth loses"))
    sooner = {row[1] for row in lost if len(row) == 7 and row[2] == "first token"}
    assert len(sooner) == 4 and all("384x384" in setting for setting in sooner)
    # 3 + 0.1 n catches 1 + 0.2 n at n = 21, eight times as much at n = 161
    assert {
        (RIVAL_TITLE, "first token", "4 of 8", "0.50"),
        (RIVAL_TITLE, "time a token", "8 of 8", "0.50"),
    } <= lost
    assert any(row[1] == "answers from 21 to 161 tokens on" for row in lost)


def test_a_file_in_which_nothing_is_lost_says_so(tmp_path: Path):
    path = tmp_path / "won.json"
    results(measured(width=384, height=384), measured(RIVAL, 2.0, 0.2, 2 * 10**9, width=384, height=384)).save(path)
    assert "Nowhere in these files" in section(report(tmp_path / "report", path), "Where FlashSloth loses")


def test_machines_are_reported_apart(tmp_path: Path):
    """FlashSloth here, its rival there: there is nothing to compare."""
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    results(measured()).save(here)
    results(measured(RIVAL), machine=dataclasses.replace(MACHINE, gpu="a GPU", gpu_memory_bytes=2**36)).save(there)
    page = report(tmp_path / "report", here, there)
    assert "They hold 2 groups" in page and "never set against each other" in page
    assert "# 1. 2 cores of a processor" in page and "# 2. a GPU" in page
    assert page.count("Cannot be told") == 2
    assert not re.search(r"\(\d\.\d\d\)", page.replace("(1.00)", ""))
    assert {path.name[:2] for path in (tmp_path / "report").glob("*.png")} == {"1-", "2-"}


def test_what_a_file_lacks_is_named_and_not_drawn(tmp_path: Path):
    path = tmp_path / "short.json"
    bare = dataclasses.replace(measured(output_tokens=1), peak_memory_bytes=None, visual_tokens=None)
    del bare.stages["compress"]
    failed = Measurement(dataclasses.replace(bare.settings, model=RIVAL), error="killed, probably for want of memory")
    results(bare, failed).save(path)
    page = report(tmp_path / "report", path)
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"first-token", "memory"}
    assert "No other model than FlashSloth was measured here" in page
    missing = section(page, "What is missing")
    for line in (
        "| compress | not measured for FlashSloth |", "| FlashSloth | visual tokens unknown, not drawn |",
        "no answer longer than one token was measured", "killed, probably for want of memory",
    ):  # fmt: skip
        assert line in missing


def test_a_file_without_times_is_still_a_report(tmp_path: Path):
    path = tmp_path / "bare.json"
    results(dataclasses.replace(measured(), stages={})).save(path)
    page = report(tmp_path / "report", path)
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"memory"}
    assert "| Time to the first token | not measured for any model, not drawn |" in section(page, "What is missing")


def test_a_model_that_is_not_known_here_is_reported_without_counts(tmp_path: Path):
    path = tmp_path / "tomorrow.json"
    results(*(measured("a-model-of-tomorrow", batch=batch) for batch in (1, 2))).save(path)
    page = report(tmp_path / "report", path)
    assert "| a-model-of-tomorrow | - | - | - | - | 1.00 |" in section(page, "Memory")
    assert "`flashsloth` was not measured here" in page


def test_another_baseline(grid: Path, tmp_path: Path):
    assert main(["bench", "report", str(grid), "-o", str(tmp_path), "--baseline", RIVAL]) == 0
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## Where InternVL3-1B loses" in page and "| InternVL3-1B | 500 ms (1.00) |" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give JSON files written by flashsloth bench run"),
        ("no", "is not JSON"),
        ('{"format": 7}', "is no result file of format 1"),
    ],
)
def test_files_that_are_none_are_refused_in_one_line(content, message: str, tmp_path: Path, capsys):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_text(content)
    assert main(["bench", "report", str(path), "-o", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "report").exists()


def test_files_without_a_measurement_are_refused(tmp_path: Path, capsys):
    path = tmp_path / "failed.json"
    results(Measurement(Settings("flashsloth", 384, 384), error="out of memory")).save(path)
    assert main(["bench", "report", str(path), "-o", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert "no measurement to report" in error and "out of memory" in error
    assert not (tmp_path / "report").exists()


def test_options_that_make_no_sense_are_refused(grid: Path, tmp_path: Path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("")
    assert main(["bench", "report", str(grid), "-o", str(taken)]) == 2
    assert f"{taken} is a file" in capsys.readouterr().err
    assert main(["bench", "report", str(grid), "--output-tokens", "8,many"]) == 2
    assert "--output-tokens has '8,many'" in capsys.readouterr().err
    assert main(["bench", "report", str(tmp_path), "-o", str(tmp_path / "report")]) == 2
    assert "is a folder; give JSON files" in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence(grid: Path, tmp_path: Path, monkeypatch, capsys):
    for package, name in ((flashsloth.bench, "page"), (flashsloth.bench, "plots"), (flashsloth.reports, "plots")):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
        monkeypatch.delattr(package, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "report", str(grid), "-o", str(tmp_path / "report")]) == 2
    assert (
        capsys.readouterr().err == "error: plots need matplotlib; install it with: pip install 'flashsloth[bench]'\n"
    )


def test_help_teaches(capsys):
    assert main(["bench", "report", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples" in out and "flashsloth bench report bench.json -o report" in out


def test_conditions_are_told_in_words():
    variant, condition = Variant.of(measured()), Condition.of(measured(images=2, batch=4))
    assert (variant.title, str(condition)) == ("FlashSloth", "2 images of 768x768, 32 text tokens, batch 4")
