"""`flashsloth bench run`: the stages, the process of each case, other load, the file and its tables."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest
import torch

from flashsloth.bench import anatomy, machine, measured, stages, stock, worker
from flashsloth.bench.machine import Reading, other_load
from flashsloth.bench.measured import measure_in_process, open_results, run_all, settings_of
from flashsloth.bench.models import MODELS, BenchModel
from flashsloth.bench.results import STAGES, Measurement, Results, Roofline, Settings, Stage
from flashsloth.bench.stages import Stages, build_filled
from flashsloth.bench.tables import measured_markdown, measured_tables
from flashsloth.bench.token_rules import fixed
from flashsloth.bench.worker import measure, repeat
from flashsloth.model.configuration_flashsloth import FlashSlothConfig
from flashsloth.model.modeling_flashsloth import FlashSlothForConditionalGeneration
from flashsloth_cli.main import main

VISION = {
    "model_type": "siglip_vision_model", "image_size": 36, "patch_size": 6, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip
TEXT = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
VALUES = {
    "vision_config": VISION, "text_config": TEXT, "embedded_query_layer": 1, "embedded_query_num_heads": 2,
    "num_query_tokens": 2,
}  # fmt: skip
TINY = BenchModel(
    "Tiny",
    "own",
    lambda: FlashSlothForConditionalGeneration(FlashSlothConfig(**VALUES)),
    anatomy.flashsloth,
    fixed(6, 4),
)
ROOFLINE = Roofline("cpu", "float32", 1, 100.0, 10.0, (1, 1, 1))
TINY_STOCK = BenchModel(
    "Tiny stock", "rebuilt", lambda: stock.StockFlashSloth(FlashSlothConfig(**VALUES)),
    stock.STOCK["flashsloth"].dissect, fixed(6, 4),
)  # fmt: skip
SETTINGS = Settings("tiny", 50, 40, images=2, batch=2, text_tokens=5, output_tokens=3, dtype="float32")


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setitem(stock.STOCK, "tiny", TINY_STOCK)


def test_every_stage_of_an_own_model_is_timed_and_weighed():
    result = measure(SETTINGS, ROOFLINE, repetitions=2, warm_up=1, allow_load=True)
    assert set(result.stages) == set(STAGES)
    samples = {name: stage.samples for name, stage in result.stages.items()}
    assert all(len(values) == 2 and min(values) > 0 for values in samples.values())
    for index in range(2):
        first = sum(samples[name][index] for name in ("encode", "compress", "prefill"))
        assert samples["time_to_first_token"][index] == pytest.approx(first)
        assert samples["total"][index] == pytest.approx(first + 2 * samples["decode_per_token"][index])
    assert result.share_of_roofline["encode"] == pytest.approx(result.flops["encode"] / result.median("encode") / 100)
    read = 4 * (32 * 64 + sum(p.numel() for p in TINY.dissect(TINY.build()).layers.parameters())) + result.cache_bytes
    assert result.share_of_roofline["decode_per_token"] == pytest.approx(read / result.median("decode_per_token") / 10)
    assert (result.visual_tokens, result.prompt_tokens) == (8, 8 + 5 + 2)
    assert result.parameter_bytes == 4 * sum(p.numel() for p in TINY.build().parameters())
    assert result.cache_bytes == 2 * 17 * 4 * (2 * 16) * 4  # prompts, positions, layers, key and value, bytes
    assert result.flops["encode"] == 4 * TINY.dissect(TINY.on_meta()).vision_flops(fixed(6, 4)(50, 40))


def test_decoding_is_held_against_the_rate_of_reading_beside_it(monkeypatch):
    rates = iter([10.0, 30.0, 40.0, 60.0])

    class Reading:
        def __init__(self, dtype: str, device: str) -> None:
            assert (dtype, device) == ("float32", "cpu")

        def measure(self) -> float:
            return next(rates)

    monkeypatch.setattr(worker, "ReadingRate", Reading)
    monkeypatch.setattr(worker, "READ_BYTES", {"cpu": 0})
    result = measure(SETTINGS, ROOFLINE, repetitions=2, warm_up=1, allow_load=True)
    assert result.read_rates == [20.0, 50.0] and next(rates, None) is None
    read = 4 * (32 * 64 + sum(p.numel() for p in TINY.dissect(TINY.build()).layers.parameters())) + result.cache_bytes
    first, second = result.stages["decode_per_token"].samples
    share = read / ((first * 20 + second * 50) / 2)
    assert result.share_of_roofline["decode_per_token"] == pytest.approx(share)
    assert set(result.stages) == set(STAGES)


def test_the_rate_of_reading_is_that_of_the_roofline(monkeypatch):
    monkeypatch.setattr(machine, "READ_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(machine, "_times", lambda work, device: [0.5, 0.25])
    assert machine.ReadingRate("float32", "cpu").measure() == 2**20 / 0.25
    assert machine.measure_roofline("float32", "cpu", 1).bandwidth_bytes_per_second == 2**20 / 0.25


@pytest.mark.parametrize(("kernels", "pages"), [("packed", "1"), ("torch", None)])
def test_huge_pages_belong_to_the_packed_kernels(kernels, pages, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # as the command line sets it
    seen = []

    def run(command, env, **options):
        seen.append(env.get("THP_MEM_ALLOC_ENABLE"))
        return subprocess.CompletedProcess(command, 1, stderr="no")

    monkeypatch.setattr(measured.subprocess, "run", run)
    measure_in_process(dataclasses.replace(SETTINGS, kernels=kernels), ROOFLINE, 1, 1, True)
    assert seen == [pages]


def test_the_stages_really_run_the_model():
    """The first token of the timed path is the one a plain forward pass gives."""
    model = build_filled(TINY, torch.float32, "cpu")
    timed = Stages(TINY, model, SETTINGS)
    features = model.get_image_features(torch.randn(4, 3, 36, 36))
    token = timed._prefill(features, timed._cache())
    output = model(
        inputs_embeds=timed.embeds_BTD, image_features=features, image_positions=timed.image_positions_BK, **timed.more
    )
    assert torch.equal(token, output.logits[:, -1:].argmax(-1))
    assert timed.more["question_ids"].sum() == 2 * 5
    assert timed.image_positions_BK.tolist() == [[0, 4], [0, 4]]


def test_compiled_stages_are_compiled_once(monkeypatch):
    """The cache has its memory before anything is traced, and lies where it lay in every repetition."""

    def compile_part(part, device, dynamic):
        part.compile(backend="aot_eager", dynamic=dynamic)

    torch._dynamo.reset()
    monkeypatch.setattr(stages, "compile_part", compile_part)
    timed = Stages(TINY, build_filled(TINY, torch.float32, "cpu"), dataclasses.replace(SETTINGS, compile=True))
    layer = timed.static_cache.layers[0]
    addresses = layer.keys.data_ptr(), layer.values.data_ptr()
    timed.run()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert set(timed.run()) == set(STAGES)
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == addresses
    assert layer.keys.abs().sum() > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_no_clock_cuts_a_compiled_encoder(monkeypatch, compiled):
    """As in Qwen2-VL, whose encoder holds what merges its tokens."""

    def with_merger(model):
        parts = anatomy.flashsloth(model)
        return dataclasses.replace(parts, connector=[parts.vision.encoder.layers[-1]])

    monkeypatch.setattr(stages, "compile_part", lambda part, device, dynamic: None)
    entry = dataclasses.replace(TINY, dissect=with_merger)
    timed = Stages(entry, build_filled(entry, torch.float32, "cpu"), dataclasses.replace(SETTINGS, compile=compiled))
    inside = [module for module in timed.parts.vision.modules() if module._forward_pre_hooks]
    assert inside == ([] if compiled else timed.parts.connector)
    assert ("compress" in timed.run()) == (not compiled)


def test_weights_are_filled_and_alike_in_scale():
    model = build_filled(TINY, torch.bfloat16, "cpu")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.float().abs().max() > 0, name
    assert model.lm_head.weight.float().std() == pytest.approx(0.02, rel=0.1)


def test_stock_parts_are_measured_beside_them():
    stocked = dataclasses.replace(SETTINGS, assembly="stock")
    result = measure(stocked, ROOFLINE, repetitions=1, warm_up=1, allow_load=True)
    assert set(result.stages) == set(STAGES) - {"preprocess"}
    assert result.prompt_tokens == 8 + 5  # it has no queries


def test_stock_pooling_is_spatial_attention_pooling():
    torch.manual_seed(0)
    model = TINY.build().eval()
    loop = stock.WindowLoop(32, 32, 3)
    loop.score[0].load_state_dict(model.model.compressor.score[0].state_dict())
    loop.score[2].load_state_dict(model.model.compressor.score[3].state_dict())
    loop.projector = model.model.projector
    features = torch.randn(2, 36, 32)
    torch.testing.assert_close(loop(features), model.model.compress(features))


@pytest.mark.parametrize("name", ["internvl3-1b", "gemma3-4b", "fastvlm-1.5b"])
def test_the_vision_side_of_rivals_gives_the_tokens_of_the_static_tier(name):
    """On the meta device: shapes only, at real size."""
    entry = MODELS[name]
    model = entry.on_meta()
    image = entry.rule(384, 384)
    case = Settings(name, 384, 384, device="meta", dtype="float32")
    seen = []
    parts = entry.dissect(model)
    parts.connector[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        stages._VISION[entry.dissect](model, case, image, torch.float32)()
    tokens = seen[-1].shape[:-1].numel()
    assert tokens == image.tokens


def readings(loads):
    """Readings before and after repetitions in which others take these shares of the processors."""
    clock, everybody, own = 0.0, 0.0, 0.0
    cores = len(machine.cores())
    for load in loads:
        yield Reading(clock, everybody, own)
        clock += 1.0
        own += 0.5 * cores
        everybody += (0.5 + load) * cores
        yield Reading(clock, everybody, own)


def test_disturbed_repetitions_are_thrown_away():
    loads = readings([0.0, 0.4, 0.05, 0.3, 0.0])
    laps = iter(range(5))
    seconds, discarded, loaded = repeat(lambda: {"encode": float(next(laps))}, 3, False, lambda: next(loads))
    assert seconds == {"encode": [0.0, 2.0, 4.0]}
    assert (discarded, loaded) == (2, False)


def test_a_machine_in_use_is_refused_and_marked_when_allowed():
    loads = readings([0.5] * 20)
    with pytest.raises(ValueError, match=r"other processes took 50%.*--allow-load"):
        repeat(lambda: {"encode": 1.0}, 2, False, lambda: next(loads))
    loads = readings([0.5] * 20)
    assert repeat(lambda: {"encode": 1.0}, 2, True, lambda: next(loads)) == ({"encode": [1.0, 1.0]}, 0, True)


def test_other_load_is_a_share_of_our_processors():
    cores = len(machine.cores())
    assert other_load(Reading(0, 0, 0), Reading(2, 1.0 * cores, 0.5 * cores)) == pytest.approx(0.25)
    assert other_load(Reading(0, 0, 0), Reading(1, 0.1, 0.2)) == 0.0


def made_results():
    flops = {"encode": 100, "compress": 1, "prefill": 150}
    found = []
    for model, factor in (("flashsloth", 1), ("siglip-phi2-729", 2)):
        times = {"encode": [1.0, 2.0, 3.0], "time_to_first_token": [5.0, 3.0, 6.0], "decode_per_token": [0.5] * 3}
        stages = {name: Stage([factor * value for value in values]) for name, values in times.items()}
        found.append(Measurement(dataclasses.replace(SETTINGS, model=model), stages, 8, 15, flops=flops))
    return Results(machine.machine_card("cpu", 1), {"torch": "1"}, "abc", [ROOFLINE], found)


def test_ratios_are_to_flashsloth_as_it_ships():
    (table,) = measured_tables(made_results())
    first, second = (index for index, column in enumerate(table.columns) if column == "/ FlashSloth")
    assert [(row[first], row[second]) for row in table.rows] == [("1.00", "1.00"), ("2.00", "2.00")]
    assert table.rows[0][table.columns.index("spread")] == "60%"


def test_results_of_another_machine_are_not_mixed(tmp_path):
    path = tmp_path / "bench.json"
    made_results().save(path)
    assert open_results(path, "cpu", 1) == made_results()
    with pytest.raises(ValueError, match="another machine"):
        open_results(path, "cpu", 7)


def test_what_is_measured_is_kept_and_a_failure_does_not_stop_the_rest(tmp_path, monkeypatch):
    path, asked, seen = tmp_path / "bench.json", [], []

    def fake(settings, *unused):
        asked.append(settings.batch)
        if settings.batch == 2:
            return Measurement(settings, error="killed")
        return Measurement(settings, {"time_to_first_token": Stage([1.0])})

    monkeypatch.setattr(measured, "measure_in_process", fake)
    wanted = settings_of(["tiny"], [(36, 36)], [1], [1, 2, 3], [1], ["float32"], {})
    results = Results(machine.machine_card("cpu", 1), {}, None, [ROOFLINE])
    for _ in range(2):
        run_all(wanted, results, path, 1, 1, False, lambda m, fresh: seen.append((m.settings.batch, fresh)))
        results = Results.load(path)
    assert asked == [1, 2, 3, 2]  # only what failed is tried again
    assert seen == [(1, True), (2, True), (3, True), (1, False), (2, True), (3, False)]
    assert "not measured: tiny: killed" in measured_markdown(results)


def test_what_a_process_cannot_measure_is_a_line():
    """The child does not know the model that only this process has: an error, not a crash of the parent."""
    result = measure_in_process(SETTINGS, ROOFLINE, 1, 1, True)
    assert "unknown model 'tiny'" in (result.error or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "flashslot"], "did you mean flashsloth"),
        (["--sizes", "big"], "--sizes has 'big'"),
        (["--dtype", "int3"], "--dtype has 'int3'"),
        (["--batch", "0"], "--batch has '0'"),
        (["--quantization", "int2"], "--quantization is 'int2'"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--weights", "stock=x"], "--weights names 'stock'"),
        (["--models", "gemma3-4b", "--stock"], "gemma3-4b has no stock assembly"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys, tmp_path):
    assert main(["bench", "run", "-o", str(tmp_path / "bench.json"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_measures_writes_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "measure_in_process", worker.measure)
    monkeypatch.setattr(measured, "measure_roofline", lambda dtype, device, threads: ROOFLINE)
    path = tmp_path / "bench.json"
    arguments = [
        "--models",
        "tiny",
        "--sizes",
        "36x36",
        "--dtype",
        "float32",
        "--repetitions",
        "1",
        "--allow-load",
        "--threads",
        "1",
    ]
    assert main(["bench", "run", "-o", str(path), *arguments]) == 0
    assert "Tiny" in path.with_suffix(".md").read_text()
    assert Results.load(path).measurements[0].settings.model == "tiny"
    assert main(["bench", "run", "-o", str(path), *arguments]) == 0
    assert "in the file already" in capsys.readouterr().err
