"""`flashsloth bench tokens`: visual tokens, parameters, FLOPs and memory of FlashSloth and its peers."""

from __future__ import annotations

import functools
import json
import random
import re
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from flashsloth.bench import anatomy
from flashsloth.bench.memory import cache_bytes, cache_bytes_per_token, feature_map_elements, widest_block_elements
from flashsloth.bench.models import MODELS
from flashsloth.bench.rebuilt import FastViTHD
from flashsloth.bench.tables import token_markdown
from flashsloth.bench.token_rules import VisualInput
from flashsloth.bench.tokens import DEFAULT_SIZES, ModelCost, available_models, measure, measure_all
from flashsloth.checkpoints.files import write_whole
from flashsloth.model.backbones import CACHE_ARGUMENT, decoder_layers
from flashsloth_cli.commands.bench import options
from flashsloth_cli.main import main

ROOT = Path(__file__).parents[1]

# At 384x384, 768x768, 1024x768 and 1344x1344, counted once from the models' own preprocessors and modules: parameters,
# visual tokens, encoder patches, TFLOPs with 64 text tokens, the share of vision and language model at 768x768, and
# KiB of keys and values per token in bfloat16. One number stands for four equal ones.
EXPECTED = {
    "flashsloth": (3_196_373_985, [81], [729], [1.43], (0.65, 0.78), 320),
    "flashsloth-hd": (3_196_373_985, [405], [3645], [5.73], (3.25, 2.48), 320),
    "siglip-phi2-729": (3_186_937_120, [729], [729], [4.85], (0.66, 4.20), 320),
    "siglip-phi2-average": (3_186_937_120, [81], [729], [1.38], (0.64, 0.74), 320),
    "flashsloth-qwen3-0.6b": (1_002_792_929, [81], [729], [0.79], (0.65, 0.14), 112),
    "flashsloth-qwen3-1.7b": (2_133_425_121, [81], [729], [1.09], (0.65, 0.44), 112),
    "flashsloth-smollm2-360m": (768_252_065, [81], [729], [0.75], (0.65, 0.10), 40),
    "flashsloth-qwen3-0.6b-elastic": (680_295_553, [64], [576], [0.23], (0.10, 0.13), 112),
    "flashsloth-smollm2-135m-elastic": (217_178_305, [64], [576], [0.13], (0.10, 0.03), 22.5),
    "qwen2-vl-2b": (
        2_208_985_600, [196, 729, 999, 2304], [784, 2916, 3996, 9216], [1.80, 7.31, 10.71, 32.87], (5.12, 2.19), 28,
    ),
    "qwen2.5-vl-3b": (
        3_754_622_976, [196, 729, 999, 2304], [784, 2916, 3996, 9216], [2.49, 8.52, 11.72, 28.43], (3.94, 4.59), 36,
    ),
    "qwen3-vl-2b": (
        2_127_532_032, [144, 576, 768, 1764], [576, 2304, 3072, 7056], [1.01, 3.94, 5.45, 15.45], (2.04, 1.90), 112,
    ),
    "internvl2-2b": (
        2_205_754_368, [256, 1280, 3328, 2560], [1024, 5120, 13312, 10240], [1.72, 8.06, 22.00, 16.58], (3.65, 4.41),
        96,
    ),
    "internvl3-1b": (
        938_193_024, [256, 1280, 3328, 2560], [1024, 5120, 13312, 10240], [0.96, 4.75, 12.85, 9.73], (3.63, 1.12), 12,
    ),
    "internvl3-2b": (
        2_088_957_440, [256, 1280, 3328, 2560], [1024, 5120, 13312, 10240], [1.59, 7.47, 20.33, 15.34], (3.64, 3.83),
        28,
    ),
    "minicpm-v-2": (
        3_435_158_176, [64, 320, 320, 640], [1024, 5120, 5180, 10240], [1.60, 6.77, 6.83, 13.30], (4.84, 1.93), 360,
    ),
    "minicpm-v-4.6": (
        1_300_659_440, [64, 320, 315, 640], [1024, 5120, 5040, 10240], [0.61, 2.81, 2.76, 5.56], (2.40, 0.41), 12,
    ),
    "smolvlm-500m": (
        507_482_304, [1088, 1088, 832, 1088], [17408, 17408, 13312, 17408], [4.55, 4.55, 3.46, 4.55], (3.66, 0.89),
        40,
    ),
    "smolvlm2-2.2b": (
        2_246_784_880, [1377, 1377, 1053, 1377], [12393, 12393, 9477, 12393], [16.44, 16.44, 12.55, 16.44],
        (11.39, 5.05), 192,
    ),
    "paligemma2-3b-224": (3_032_242_416, [256], [256], [1.54], (0.22, 1.32), 104),
    "paligemma2-3b-448": (3_033_127_152, [1024], [1024], [5.64], (0.98, 4.66), 104),
    "fastvlm-1.5b": (1_906_883_168, [256], [256], [1.35], (0.49, 0.86), 28),
    "lfm2-vl-1.6b": (
        1_584_804_000, [144, 1280, 1770, 2560], [576, 5120, 7080, 10240], [0.94, 7.61, 10.50, 15.24], (4.73, 2.87),
        12,
    ),
    "gemma3-4b": (4_300_079_472, [256], [4096], [7.55], (5.46, 2.08), 136),
    "mobilevlm-v2-3b": (3_014_273_536, [144], [576], [1.46], (0.39, 1.07), 320),
    "moondream2": (
        1_866_919_792, [729], [7290, 7290, 9477, 7290], [8.76, 8.76, 10.76, 8.76], (6.72, 2.04), 192,
    ),
}  # fmt: skip
# half of the last digit above; totals are sums of two rounded parts
ROUNDING, ROUNDING_OF_SUM = 0.005, 0.01


@functools.cache
def default_cost(name: str) -> ModelCost:
    """Measured once for all tests; 64 text tokens, bfloat16."""
    return measure(name, DEFAULT_SIZES, text_tokens=64, dtype="bfloat16")


def four(values: list) -> list:
    return values * 4 if len(values) == 1 else values


def test_every_model_has_its_expectation() -> None:
    assert list(EXPECTED) == list(MODELS)


@pytest.mark.parametrize("name", EXPECTED)
def test_model(name: str) -> None:
    parameters, tokens, patches, teraflops, (vision, language), cache = EXPECTED[name]
    cost = default_cost(name)
    assert cost.total_parameters == parameters
    assert cost.published_parameters in (None, parameters)
    assert [image.one.image.tokens for image in cost.images] == four(tokens)
    assert [image.one.image.patches for image in cost.images] == four(patches)
    measured = [image.one.first_token_flops / 1e12 for image in cost.images]
    assert measured == pytest.approx(four(teraflops), abs=ROUNDING_OF_SUM)
    middle = cost.images[1].one.flops
    assert (middle["encode"] + middle["compress"]) / 1e12 == pytest.approx(vision, abs=ROUNDING)
    assert middle["prefill"] / 1e12 == pytest.approx(language, abs=ROUNDING)
    assert cost.cache_bytes_per_token == cache * 1024


def test_parts_of_flashsloth() -> None:
    cost = measure("flashsloth", [(768, 768)], text_tokens=64, dtype="bfloat16")
    size, width, inner = 1152, 2560, 576
    score = size * size + size + size + 1
    projector = size * width + width + width * width + width
    assert cost.parameters["connector"] == score + projector
    queries, down = 9 * width, (width + 1) * inner + (size + 1) * inner
    attentions = 5 * (inner + 1) * inner + (size + 1) * size
    assert cost.parameters["embedded_query"] == queries + down + attentions + 3 * 2 * inner + (size + 1) * width
    assert cost.parameters["head"] == (width + 1) * 51200
    (image,) = cost.images
    assert image.one.prompt_tokens == 81 + 9 + 64
    assert image.memory.cache == 154 * 320 * 1024
    assert image.memory.weights == 2 * cost.total_parameters
    # of the language model the embeddings and the final norm are not read for one more token
    unread = 51200 * width + 2 * width
    assert cost.decode_bytes == 2 * (cost.parameters["language_model"] + cost.parameters["head"] - unread)


def test_batch_and_dtype_change_memory_only() -> None:
    one = measure("flashsloth", [(384, 384)], 64, "bfloat16")
    many = measure("flashsloth", [(384, 384)], 64, "float32", batch=3)
    assert many.images[0].one.flops == one.images[0].one.flops
    assert many.images[0].one.decode_flops == one.images[0].one.decode_flops
    assert many.images[0].memory.weights == 2 * one.images[0].memory.weights
    assert many.images[0].memory.cache == 6 * one.images[0].memory.cache
    assert many.images[0].memory.activations == 6 * one.images[0].memory.activations
    assert many.cache_bytes_per_token == 2 * one.cache_bytes_per_token


@pytest.mark.parametrize(
    "name, tokens, flops",
    [
        ("internvl2-2b", [68, 94, 98, 97], [17, 82, 93, 91]),
        ("qwen2-vl-2b", [59, 89, 92, 96], [20, 80, 87, 96]),
        ("minicpm-v-2", [-27, 75, 75, 87], [10, 79, 79, 89]),
        ("siglip-phi2-729", [89], [70]),
    ],
)
def test_saving_of_flashsloth_in_percent(name: str, tokens: list[int], flops: list[int]) -> None:
    ours, theirs = (default_cost(model).images for model in ("flashsloth", name))
    pairs = list(zip(ours, theirs, strict=True))
    assert [round(100 - 100 * a.one.image.tokens / b.one.image.tokens) for a, b in pairs] == four(tokens)
    assert [round(100 - 100 * a.one.first_token_flops / b.one.first_token_flops) for a, b in pairs] == four(flops)


def test_building_takes_no_memory() -> None:
    for name in ("flashsloth", "minicpm-v-2"):
        assert {parameter.device.type for parameter in MODELS[name].on_meta().parameters()} == {"meta"}


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.origin == "own"])
def test_rules_of_flashsloth_are_those_of_its_configuration(name: str) -> None:
    config = MODELS[name].on_meta().config
    grid = (config.grid_height, config.grid_width)
    expected = VisualInput((grid,) * config.num_views, config.num_image_tokens)
    assert MODELS[name].rule(1024, 768) == expected


# -- token rules against the preprocessors of transformers ---------------------------------------------------------

RANDOM = random.Random(0)
SIZES = [(RANDOM.randint(64, 2400), RANDOM.randint(64, 2400)) for _ in range(60)]
SIZES += [(448, 448), (449, 448), (896, 448), (1536, 384), (512, 512), (640, 480), (1920, 1080), (1080, 1920)]


def pil_processor(module: str) -> object:
    return pytest.importorskip(f"transformers.models.{module}")


@pytest.mark.parametrize(
    "name, factor, bounds",
    [("qwen2-vl-2b", 28, (3136, 12_845_056)), ("qwen3-vl-2b", 32, (65_536, 16_777_216))],
)
def test_qwen_rule(name: str, factor: int, bounds: tuple[int, int]) -> None:
    module = pil_processor("qwen2_vl.image_processing_pil_qwen2_vl")
    for width, height in [*SIZES, (40, 40), (6000, 3000)]:
        rows, columns = module.smart_resize(height, width, factor, *bounds)
        image = MODELS[name].rule(width, height)
        assert image.grids == ((2 * rows // factor, 2 * columns // factor),), (width, height)
        assert image.tokens == rows * columns // factor**2


def test_internvl_rule() -> None:
    module = pil_processor("got_ocr2.image_processing_pil_got_ocr2")
    for width, height in SIZES:
        columns, rows = module.get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
        tiles = columns * rows
        assert MODELS["internvl3-1b"].rule(width, height).views == tiles + (tiles > 1), (width, height)


@pytest.mark.parametrize("name, tile, side", [("smolvlm2-2.2b", 384, 1536), ("smolvlm-500m", 512, 2048)])
def test_smolvlm_rule(name: str, tile: int, side: int) -> None:
    processor = pil_processor("smolvlm.image_processing_pil_smolvlm").SmolVLMImageProcessorPil(
        size={"longest_edge": side}, max_image_size={"longest_edge": tile}
    )
    for width, height in SIZES:
        views, *_ = processor.get_number_of_image_patches(height, width, {})
        assert MODELS[name].rule(width, height).views == views, (width, height)


def test_minicpm_rule() -> None:
    processor = pil_processor("minicpmv4_6.image_processing_pil_minicpmv4_6").MiniCPMV4_6ImageProcessorPil()
    for width, height in SIZES[::8]:
        pixels = torch.zeros(3, height, width, dtype=torch.uint8).numpy()
        grids = processor(pixels, return_tensors="pt", input_data_format="channels_first")["target_sizes"]
        image = MODELS["minicpm-v-4.6"].rule(width, height)
        assert sorted(image.grids) == sorted(tuple(grid) for grid in grids.tolist()), (width, height)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("size", [(1, 1), (1, 400), (30, 2000), (5000, 200)])
def test_rules_take_any_size(name: str, size: tuple[int, int]) -> None:
    image = MODELS[name].rule(*size)
    assert image.tokens > 0
    assert image.views == len(image.patches_of_views)
    assert min(image.patches_of_views) > 0


def test_lfm2_tiles_only_large_images() -> None:
    rule = MODELS["lfm2-vl-1.6b"].rule
    assert rule(512, 512) == VisualInput(((32, 32),), 256)
    assert rule(724, 704).views == 1  # under twice the area of 512 x 512
    assert rule(768, 768).grids == ((32, 32),) * 5
    assert rule(1024, 768).grids[-1] == (26, 36)  # the thumbnail keeps the aspect ratio


# -- memory --------------------------------------------------------------------------------------------------------


class LivePeak(TorchDispatchMode):
    """Largest number of bytes of the tensors that are made under it and live at the same time."""

    def __init__(self, model: torch.nn.Module, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {
            tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *inputs)
        }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(output)[0]:
            if isinstance(tensor, torch.Tensor) and (address := tensor.untyped_storage().data_ptr()) not in self.known:
                self.known.add(address)
                self.live += tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.release, address, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live)
        return output

    def release(self, address: int, count: int) -> None:
        self.known.discard(address)
        self.live -= count


@pytest.mark.parametrize("model_type", ["phi", "llama", "qwen3"])
@pytest.mark.parametrize("mlp", [256, 1024])
def test_activations_of_a_prompt(model_type: str, mlp: int) -> None:
    config = CONFIG_MAPPING[model_type](
        hidden_size=256, intermediate_size=mlp, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8,
        head_dim=32, vocab_size=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    positions = 300
    embeds = torch.zeros(1, positions, 256)
    with torch.no_grad(), LivePeak(model, embeds) as tracker:
        model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    block = widest_block_elements(decoder_layers(model.base_model)[0], 256)
    assert 4 * positions * block == pytest.approx(tracker.peak - cache_bytes(config, positions, 4), rel=0.3)


@pytest.mark.parametrize("model_type", ["siglip_vision_model", "clip_vision_model"])
def test_activations_of_an_encoder(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, image_size=64,
        patch_size=4,
    )  # fmt: skip
    model = AutoModel.from_config(config).eval()
    pixels = torch.zeros(3, 3, 64, 64)
    with torch.no_grad(), LivePeak(model, pixels) as tracker:
        model(pixel_values=pixels)
    assert 4 * 3 * 256 * widest_block_elements(model.encoder.layers[0], 128) == pytest.approx(tracker.peak, rel=0.3)


def test_activations_of_a_convolutional_encoder() -> None:
    with torch.device("meta"):
        shape_only = FastViTHD(depths=(1, 1), width=32, attention_stages=1, reduction=4)
    shape = (2, 3, 128, 128)
    model, pixels = FastViTHD(depths=(1, 1), width=32, attention_stages=1, reduction=4).eval(), torch.zeros(shape)
    with torch.no_grad(), LivePeak(model, pixels) as tracker:
        model(pixels)
    assert 4 * feature_map_elements(shape_only, shape) == pytest.approx(tracker.peak, rel=0.3)


def test_cache_of_every_kind_of_layer() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8}
    sliding = CONFIG_MAPPING["gemma3_text"](
        **sizes, head_dim=16, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"],
        sliding_window=10,
    )  # fmt: skip
    per_layer = 2 * 2 * 16 * 2
    assert cache_bytes_per_token(sliding, 2) == 2 * per_layer
    assert cache_bytes(sliding, 30, 2) == per_layer * (10 + 30)
    convolution = CONFIG_MAPPING["lfm2"](**sizes, num_hidden_layers=2, layer_types=["conv", "full_attention"])
    assert cache_bytes(convolution, 30, 2) == 64 * convolution.conv_L_cache * 2 + per_layer * 30


def test_convolution_states_are_those_transformers_keeps() -> None:
    config = CONFIG_MAPPING["lfm2"](
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=8, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(inputs_embeds=torch.zeros(1, 30, 64), use_cache=True)[CACHE_ARGUMENT]
    tensors = {id(tensor): tensor for layer in cache.layers for tensor in tree_flatten(vars(layer))[0]}
    kept = sum(tensor.nbytes for tensor in tensors.values() if isinstance(tensor, torch.Tensor))
    assert cache_bytes(config, 30, 4) == kept


# -- the command ---------------------------------------------------------------------------------------------------


def test_json_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, markdown_file = tmp_path / "tokens.json", tmp_path / "tokens.md"
    code = main([
        "bench", "tokens", "--models", "flashsloth,smolvlm-500m", "--sizes", "1024x768", "--text-tokens", "10",
        "--json", str(json_file), "--markdown", str(markdown_file),
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert "An image of 1024x768 and 10 text tokens" in out
    content = json.loads(json_file.read_text())
    assert content["versions"]["transformers"] == transformers.__version__
    assert content["settings"] == {"sizes": [[1024, 768]], "text_tokens": 10, "dtype": "bfloat16", "batch": 1}
    flashsloth, smolvlm = content["models"]
    assert smolvlm["images"][0]["visual_tokens"] == 832
    flops = flashsloth["images"][0]["flops"]
    assert flops["to_first_token"] == flops["vision"] + flops["compressor"] + flops["prefill"]
    assert flashsloth["total_parameters"] == EXPECTED["flashsloth"][0]
    costs = measure_all(["flashsloth", "smolvlm-500m"], [(1024, 768)], 10, "bfloat16")
    assert markdown_file.read_text().endswith(token_markdown(costs, 10, "bfloat16", 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.json", "tokens.md"]


def test_choices_of_visual_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = tmp_path / "tokens.json", tmp_path / "tokens.md"
    names = "flashsloth,siglip-phi2-729,flashsloth-smollm2-135m-elastic,paligemma2-3b-224"
    files = ["--json", str(path), "--markdown", str(page)]
    assert main(["bench", "tokens", "--models", names, "--sizes", "384x384", *files]) == 0
    assert "elastic" in capsys.readouterr().out
    found = [model["visual_token_choices"] for model in json.loads(path.read_text())["models"]]
    assert found == [[], [], [64, 36, 16, 4], []]
    text = page.read_text()
    assert "elastic | 1 | 576 | 64 or 36, 16, 4 | 0.10 |" in text and text.count(" or ") == 1
    assert "729 tokens | 1 | 729 | 729 | 0.64 |" in text


def test_the_default_is_the_first_choice() -> None:
    model = MODELS["flashsloth-smollm2-135m-elastic"].on_meta()
    model.config.compressor_window = 6
    assert anatomy.flashsloth(model).visual_token_choices == [16, 64, 36, 4]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["tokens.json"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--models", "qwen2-vl"], ["'qwen2-vl'", "qwen2-vl-2b"]),
        (["--models", "flashsloth,zzz"], ["'zzz'", "known are"]),
        (["--sizes", "384"], ["--sizes", "'384'", "WIDTHxHEIGHT"]),
        (["--sizes", "0x384"], ["'0x384'"]),
        (["--dtype", "int3", "--models", "flashsloth"], ["'int3'", "bfloat16"]),
    ],
)
def test_bad_settings_are_one_line(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tokens", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(word in errors[0] for word in words)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert " tokens " in capsys.readouterr().out
    assert main(["bench", "tokens", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples" in out
    assert "flashsloth bench tokens --models" in out


def test_default_sizes_agree() -> None:
    assert tuple(options.sizes(options.DEFAULT_SIZES, "--sizes")) == DEFAULT_SIZES


def test_list_names_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tokens", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(name)} ", out, re.MULTILINE) for name in MODELS)


def test_a_model_that_transformers_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODELS["gemma3-4b"].build, "name", "FutureForConditionalGeneration")
    assert "gemma3-4b" not in available_models()
    with pytest.raises(ValueError, match="install a newer transformers"):
        measure("gemma3-4b", [(384, 384)], 64, "bfloat16")


def test_the_document_shows_what_the_command_prints() -> None:
    assert available_models() == list(MODELS)
    costs = [default_cost(name) for name in MODELS]
    assert token_markdown(costs, 64, "bfloat16", 1) in (ROOT / "docs" / "efficiency-tables.md").read_text()
