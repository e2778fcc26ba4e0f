"""Maps of attention: the weights that the modules use, in the geometry of the image, without a change to answers."""

import json
import re
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from flashsloth.inference import FlashSloth
from flashsloth.inference.attention import attention_maps, with_readable_attention
from flashsloth.inference.explanation import Word, words_of
from flashsloth.inference.heat import lay_over
from flashsloth.inference.maps import brightest_place, join_windows, spread, spread_windows
from flashsloth.model.compressors import COMPRESSORS, split_windows
from flashsloth.model.image_processing_flashsloth import FlashSlothImageProcessor
from flashsloth.model.image_views import _resize_padded
from flashsloth_cli.main import main
from tiny_models import DECODERS, build_rows, tiny_model
from tiny_session import TEMPLATE, character_tokenizer, noise_image, tiny_folder


def session_of(model, **processor):
    from flashsloth import FlashSlothProcessor

    model.generation_config.suppress_tokens = [0, 1, 2, 3]
    made = FlashSlothProcessor.from_config(model.config, character_tokenizer(), chat_template=TEMPLATE)
    for name, value in processor.items():
        setattr(made.image_processor, name, value)
    return FlashSloth(model, made)


def maps_by_hand(model, inputs, features):
    """Attention of the whole row from the inputs of its modules, with nothing but the formulas."""
    seen = {}
    module = model.model.embedded_query
    handle = module.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0], inputs=args[1]))
    with torch.inference_mode():
        model(**inputs, image_features=features)
    handle.remove()
    hidden, given = seen["hidden"][0], seen["inputs"]
    heads, text = module.image_attention.num_heads, module.text_attention
    queries = given.query_index_BGQ[0, -1]
    asked = given.question_mask_BGT[0, -1]

    def attend(attention, query, key):
        query, key = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (query, key))
        return (query @ key.transpose(1, 2) / key.shape[-1] ** 0.5).softmax(-1)

    with torch.inference_mode():
        small = module.down_projection_text(hidden)
        words = module.norm_text(small[asked])
        question = attend(text, text.query(module.norm_query(small[queries])), text.key(words))
        values = text.value(words).unflatten(-1, (heads, -1)).transpose(0, 1)
        fetched = (question @ values).transpose(0, 1).flatten(1)
        patches = given.features_IME.flatten(0, 1)
        keys = module.image_attention.key(module.norm_image(module.down_projection_image(patches)))
        return question, attend(module.image_attention, module.image_attention.query(fetched), keys)


@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.parametrize("options", [{}, {"view_grid": [2, 2]}], ids=["one view", "HD"])
def test_maps_are_the_attention_by_hand(decoder, options):
    model = tiny_model(decoder, **options)
    config = model.config
    inputs = build_rows(config, [[(2, 5, 3), (0, 4, 6)]])
    pixels = inputs.pop("pixel_values")
    prompt_tokens = inputs["input_ids"].shape[1] - 6
    with torch.inference_mode():
        features = model.get_image_features(pixels)
        # Gemma 2 caps its scores in this implementation alone
        model.set_attn_implementation({"text_config": "eager"})
        question, image = maps_by_hand(model, inputs, features)
        windows, _ = split_windows(features.last_hidden_state.reshape(-1, 6, 6, 24), 3)
        pooling = model.model.compressor.score(windows).squeeze(-1).softmax(-1)
        expected = model(**inputs, image_features=features, output_attentions=True)
    maps = attention_maps(with_readable_attention(model), features.last_hidden_state, None, inputs, prompt_tokens)
    views = config.num_views
    np.testing.assert_allclose(maps.question_HQT, question, atol=1e-6)
    np.testing.assert_allclose(maps.image_HQIVRC.reshape(image.shape), image, atol=1e-6)
    by_window = join_windows(pooling.reshape(2, views, 4, 9)[1].numpy(), 3, (6, 6))
    np.testing.assert_allclose(maps.pooling_IVRC[1], by_window, atol=1e-6)
    np.testing.assert_allclose(maps.question_HQT.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(maps.image_HQIVRC.sum((2, 3, 4, 5)), 1, atol=1e-6)
    np.testing.assert_allclose(maps.pooling_IVRC.sum(), 2 * views * 4, rtol=1e-6)
    visual = inputs["input_ids"][0] == config.image_token_id
    by_hand = torch.stack([layer[0][:, prompt_tokens - 1 : -1][..., visual] for layer in expected.attentions])
    np.testing.assert_allclose(maps.decoder_LHAN, by_hand, atol=1e-5)
    np.testing.assert_allclose(maps.decoder_AIVRC.sum((1, 2, 3, 4)), by_hand.mean((0, 1)).sum(-1), rtol=1e-4)
    log_probabilities = expected.logits[0].log_softmax(-1)[prompt_tokens - 1 : -1]
    answer = inputs["input_ids"][0, prompt_tokens:]
    np.testing.assert_allclose(maps.log_probabilities_A, log_probabilities.gather(1, answer[:, None])[:, 0], atol=1e-4)


class Watcher:
    """What an engine does: it counts by a hook, and holds what cannot be copied."""

    def __init__(self):
        self.lock, self.calls = threading.Lock(), 0

    def note(self, module, args):
        self.calls += 1


def test_the_answering_model_stays_as_it_is(tmp_path):
    session = FlashSloth(*_loaded(tmp_path))
    question, image = "What is it?", noise_image()
    watcher = Watcher()
    session.model.model.embedded_query.register_forward_pre_hook(watcher.note)
    before = session.ask(image, question, max_new_tokens=6, output_logits=True)
    modules = {name: dict(vars(module)) for name, module in session.model.named_modules()}
    implementation = session.model.model.language_model.config._attn_implementation
    explanation = session.explain(image, question, max_new_tokens=6)
    assert explanation.answer == before.text
    assert session.ask(image, question, max_new_tokens=6).text == before.text
    assert session.model.model.language_model.config._attn_implementation == implementation != "eager"
    for name, module in session.model.named_modules():
        assert vars(module).keys() == modules[name].keys()
    with session.readable_model() as twin:
        own = {parameter.data_ptr() for parameter in session.model.parameters()}
        assert {parameter.data_ptr() for parameter in twin.parameters()} == own  # no weight is held twice
        assert twin.model.embedded_query.image_attention.on_weights is None


def _loaded(folder):
    from flashsloth.inference import load

    session = load(tiny_folder(folder / "tiny"), device="cpu")
    return session.model, session.processor


# -- geometry --------------------------------------------------------------------------------------------------------


def sees_brightness(model):
    """Set the weights so that every patch is its own brightness, and EmbQ and SAP look for the bright."""
    tower, base = model.model.vision_tower, model.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1)
        patches = next(module for module in tower.modules() if isinstance(module, torch.nn.Conv2d))
        patches.weight[0] = 1 / patches.weight[0].numel()  # -1 for black, 1 for white
        base.compressor.score[0].weight[0, 0], base.compressor.score[0].bias[0] = 1.0, 1.0
        base.compressor.score[3].weight[0, 0] = 40.0
        module = base.embedded_query
        # what is at least three quarters white counts as bright, and the grey of padding does not
        module.down_projection_image.weight[0, 0], module.down_projection_image.bias[0] = 1.0, -0.5
        module.image_attention.key.weight[:, 0] = 1.0
        module.image_attention.query.bias.fill_(12.0)
    return model


SIZES = {"wide": (90, 40), "tall": (33, 81), "square": (64, 64)}
FORMS = {
    "squashed": ({}, {"do_pad": False}),
    "padded": ({}, {"do_pad": True}),
    "HD": ({"view_grid": [2, 2]}, {"do_pad": False}),
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("place", [(0.15, 0.2), (0.8, 0.3), (0.55, 0.85)])
def test_a_planted_object_lights_up_where_it_is(form, size, place):
    options, processing = FORMS[form]
    width, height = SIZES[size]
    session = session_of(sees_brightness(tiny_model(vision_feature_layer=-2, **options)), **processing)
    side = max(width, height) // 3  # holds a whole patch of the coarsest view, wherever it is
    left, top = round(place[0] * (width - side)), round(place[1] * (height - side))
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), (left, top, left + side, top + side))
    explanation = session.explain(image, "where?", max_new_tokens=2)
    # what a cell shows may reach beyond the object by the size of a cell of the coarsest view
    cell_x, cell_y = ((max(width, height) if form == "padded" else edge) / 6 for edge in (width, height))
    if form == "HD":
        cell_x = cell_y = max(width, height) / 6
    map_HW = explanation.over_image("embq", shape=(height, width))
    box = map_HW[
        max(0, round(top - cell_y / 2)) : round(top + side + cell_y / 2),
        max(0, round(left - cell_x / 2)) : round(left + side + cell_x / 2),
    ]
    x, y = brightest_place(map_HW)
    assert left <= x * width <= left + side and top <= y * height <= top + side
    assert map_HW.sum() == pytest.approx(1, abs=1e-3)  # nothing of it on the padding
    assert box.sum() > 0.99
    # every window has the same amount in all, and those that hold a part of the object give it to that
    saliency = explanation.over_image("sap", shape=(height, width))
    is_inside = np.zeros((height, width), dtype=bool)
    is_inside[top : top + side, left : left + side] = True
    assert saliency[is_inside].mean() > 2 * saliency[~is_inside].mean()


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (64, 64), (31, 17)])
def test_rectangles_are_where_the_processor_puts_the_image(size):
    """A picture with a dark and a bright half on each axis comes out of the processor with its edges there."""
    processor = FlashSlothImageProcessor(size={"height": 120, "width": 120}, view_grid=[2, 2], do_pad=True)
    (left, top, right, bottom), *tiles = processor.view_rectangles(size)
    width, height = size
    padded = np.asarray(_resize_padded(Image.new("RGB", size, (255,) * 3), (240, 240), (0,) * 3, 0))[..., 0]
    rows, columns = padded.max(axis=1) > 0, padded.max(axis=0) > 0
    assert columns.argmax() == pytest.approx(-left / (right - left) * 240, abs=1)
    assert columns.sum() == pytest.approx(width / (right - left) * 240, abs=1)
    assert rows.argmax() == pytest.approx(-top / (bottom - top) * 240, abs=1)
    assert rows.sum() == pytest.approx(height / (bottom - top) * 240, abs=1)
    assert tiles[0][:2] == (left, top) and tiles[3][2:] == (right, bottom)
    assert tiles[0][2] == tiles[1][0] and tiles[0][3] == tiles[2][1]
    assert FlashSlothImageProcessor(do_pad=False).view_rectangles(size) == [(0, 0, *size)]


@pytest.mark.parametrize("size", [(25_000, 4), (3, 26_001)])
def test_rectangles_of_images_that_are_averaged_first(size):
    """A bright patch at a known place of a very long image is found there."""
    width, height = size
    processor = FlashSlothImageProcessor(do_pad=True, size={"height": 1000, "width": 1000})
    (left, top, right, bottom) = processor.view_rectangles(size)[0]
    image = Image.new("RGB", size)
    start = max(size) * 3 // 4
    image.paste((255,) * 3, (start, 0, start + 2000, height) if width > height else (0, start, width, start + 2000))
    pixels = np.asarray(_resize_padded(image, (1000, 1000), (0,) * 3, 2))[..., 0].astype(float)
    rows, columns = pixels.sum(axis=1), pixels.sum(axis=0)
    middle_x = (columns * (np.arange(1000) + 0.5)).sum() / columns.sum() / 1000 * (right - left) + left
    middle_y = (rows * (np.arange(1000) + 0.5)).sum() / rows.sum() / 1000 * (bottom - top) + top
    long, short = (middle_x, middle_y) if width > height else (middle_y, middle_x)
    assert long == pytest.approx(start + 1000, abs=2)
    assert short == pytest.approx(min(size) / 2, abs=14)  # half a pixel of the view


def test_amounts_stay_when_maps_are_spread():
    generator = np.random.default_rng(0)
    maps = generator.random((2, 3, 4))
    whole = spread(maps, [(0, 0, 50, 30), (0, 0, 50, 30)], (50, 30), (7, 9))
    assert whole.sum() == pytest.approx(maps.sum())
    assert spread(maps[:1], [(0, 0, 50, 30)], (50, 30), (3, 4)) == pytest.approx(maps[0])
    outside = spread(maps[:1], [(-50, 0, 50, 30)], (50, 30), (3, 4))
    assert outside.sum() == pytest.approx(maps[0, :, 2:].sum())  # the left half lies on padding


@pytest.mark.parametrize("grid, window", [((6, 6), 3), ((5, 7), 3), ((4, 4), 1)])
def test_windows_lie_on_the_grid_as_the_compressor_cuts_them(grid, window):
    rows, columns = grid
    numbers = torch.arange(rows * columns, dtype=torch.float32).reshape(1, rows, columns, 1)
    windows, keep = split_windows(numbers, window)
    joined = join_windows(windows.squeeze(-1).numpy(), window, grid)
    np.testing.assert_array_equal(joined[0], numbers[0, :, :, 0])
    tokens = windows.shape[1]
    spread_tokens = spread_windows(np.arange(1.0, tokens + 1)[None], window, grid)[0]
    kept = torch.ones(windows.shape[1:3], dtype=torch.bool) if keep is None else keep
    own = np.repeat(np.arange(tokens), window * window).reshape(1, tokens, window * window)
    of_token = join_windows(own, window, grid)[0]
    for token in range(tokens):
        values = spread_tokens[of_token == token]
        assert len(values) == int(kept[token].sum()) and values.sum() == pytest.approx(token + 1)


# -- explanations ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    session = FlashSloth(*_loaded(tmp_path_factory.mktemp("explained")))
    return session.explain([noise_image(1), noise_image(2, (20, 50))], "red or blue?", max_new_tokens=5)


def test_parts_of_an_explanation_add_up(explained):
    queries = [explained.on_grid("embq", query=query) for query in range(2)]
    np.testing.assert_allclose(np.mean(queries, axis=0), explained.on_grid("embq"), rtol=1e-5)
    heads = [explained.on_grid("embq", head=head) for head in range(4)]
    np.testing.assert_allclose(np.mean(heads, axis=0), explained.on_grid("embq"), rtol=1e-5)
    assert [word.text for word in explained.question_words] == ["red", "or", "blue?"]
    assert sum(explained.word_weights()) == pytest.approx(1, abs=1e-5)
    assert explained.on_grid("embq", word=1).sum() == pytest.approx(1, abs=1e-5)
    total = sum(explained.over_image("embq", image).sum() for image in range(2))
    assert total == pytest.approx(1, abs=1e-5)
    assert explained.on_grid("decoder").shape == explained.on_grid("sap").shape == (2, 1, 6, 6)
    assert 0 < explained.probability < 1


@pytest.mark.parametrize(
    "layer, part, message",
    [
        ("embq", {"query": 2}, "query 2 is not there; there are 2"),
        ("embq", {"word": 3}, "question word 3"),
        ("sap", {"head": 0}, "parts of the layer 'embq'"),
        ("sap", {"word": 0}, "SAP does not see the question"),
        ("other", {}, "this model has embq, sap, decoder"),
    ],
)
def test_parts_that_are_not_there(explained, layer, part, message):
    with pytest.raises(ValueError, match=message):
        explained.on_grid(layer, **part)


@pytest.mark.parametrize("compressor", [name for name in COMPRESSORS if name != "spatial_attention"])
def test_models_without_maps_of_a_kind(compressor):
    session = session_of(tiny_model(compressor=compressor))
    explanation = session.explain(noise_image(), "what?", max_new_tokens=2)
    assert list(explanation.layers) == ["embq", "decoder"]
    assert explanation.over_image("decoder").sum() > 0
    without = session_of(tiny_model(compressor=compressor, num_query_tokens=0))
    assert list(without.explain(noise_image(), "what?", max_new_tokens=2).layers) == ["decoder"]


def test_a_model_whose_queries_do_not_read_the_question(tmp_path):
    session = session_of(tiny_model(embedded_query_uses_question=False))
    explanation = session.explain(noise_image(), "what?", max_new_tokens=2)
    assert explanation.word_weights() == []
    explanation.save(tmp_path / "page.html")
    with pytest.raises(ValueError, match="do not read the question"):
        explanation.on_grid("embq", word=0)


def test_fewer_visual_tokens():
    session = session_of(tiny_model(compressor_windows=[2, 3, 6], compressor_window=3))
    explanation = session.explain(
        [noise_image(), noise_image(1)], "what?", visual_tokens=[9, 1], max_new_tokens=2, answer="it"
    )
    assert explanation.answer == "it" and explanation.visual_tokens == 10
    np.testing.assert_allclose(explanation.maps.pooling_IVRC.sum((1, 2, 3)), [9, 1], rtol=1e-5)
    assert explanation.maps.decoder_LHAN.shape[-1] == 10


def test_words_keep_their_tokens():
    tokenizer = character_tokenizer()
    ids = tokenizer("ab  c d?").input_ids
    assert words_of(tokenizer, [*ids, tokenizer.eos_token_id]) == (
        Word("ab", (0, 1)),
        Word("c", (3, 4)),
        Word("d?", (5, 6, 7)),
    )


def test_heat_is_brightest_where_most_is():
    image = Image.new("RGB", (60, 40), (128, 128, 128))
    map_HW = np.zeros((4, 6))
    map_HW[1, 4] = 2.0
    brightness = np.asarray(lay_over(image, map_HW)).sum(axis=-1)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert 10 <= row < 20 and 40 <= column < 50


def test_files(explained, tmp_path):
    with pytest.raises(ValueError, match=r"written as \.png, \.html, \.npz"):
        explained.save(tmp_path / "map.gif")
    with pytest.raises(FileNotFoundError, match="no folder"):
        explained.save(tmp_path / "missing" / "map.png")
    with pytest.raises(ValueError, match="this model has"):
        explained.save(tmp_path / "map.png", layers=["other"])
    wide = Image.open(explained.save(tmp_path / "map.png"))
    assert Image.open(explained.save(tmp_path / "heads.png", per="head")).height > wide.height
    arrays = np.load(explained.save(tmp_path / "map.npz"))
    np.testing.assert_array_equal(arrays["embq_image_attention"], explained.maps.image_HQIVRC)
    np.testing.assert_array_equal(arrays["sap_over_image_1"], explained.over_image("sap", 1))
    text = explained.save(tmp_path / "map.html", per="head").read_text()
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    own = data["images"][1]["maps"]
    assert len(own["words"]) == 3 and len(own["queries"]) == 2 and len(own["heads"]) == 4
    most = np.array(own["embq"]).reshape(6, 6)
    assert np.unravel_index(most.argmax(), (6, 6)) == np.unravel_index(
        explained.over_image("embq", 1).argmax(), (6, 6)
    )
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text  # it needs nothing else


def test_page_escapes_what_users_write(tmp_path):
    session = FlashSloth(*_loaded(tmp_path))
    text = "</script><b>x</b>"
    written = session.explain(noise_image(), text, answer=text).save(tmp_path / "page.html").read_text()
    assert "<b>" not in written and written.count("</script>") == 2


def test_command(tmp_path, capsys):
    folder = tiny_folder(tmp_path / "tiny")
    noise_image().save(tmp_path / "a.png")
    command = ["explain", str(tmp_path / "a.png"), "what?", "--model", str(folder), "--max-new-tokens", "3"]
    files = [tmp_path / name for name in ("m.png", "m.html", "m.npz")]
    outputs = [word for file in files for word in ("-o", str(file))]
    assert main([*command, *outputs, "--layer", "embq"]) == 0
    explained_answer = capsys.readouterr().out
    assert all(file.stat().st_size > 500 for file in files)
    ask = ["ask", str(tmp_path / "a.png"), "what?", "--model", str(folder), "--max-new-tokens", "3"]
    assert main(ask) == 0
    assert capsys.readouterr().out == explained_answer
    for wrong, message in (
        ([*command, "-o", "m.txt"], "explanations are written as"),
        ([*command, *outputs, "--layer", "all"], "choose from embq, sap, decoder"),
        ([*command, *outputs, "--per", "layer"], "choose query or head"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
