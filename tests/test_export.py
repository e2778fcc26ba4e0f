"""Exported models: prompts without templates, weights of few bits, sampling, and answers equal to the model's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import flashsloth_edge
from flashsloth.checkpoints.pretrained import load_processor
from flashsloth.hub import resolve
from flashsloth.inference import load
from flashsloth.model.chat_text import DEFAULT_CHAT_TEMPLATE
from flashsloth_edge.generation import Chooser, Sampling
from flashsloth_edge.manifest import MANIFEST_NAME, Generation
from flashsloth_edge.prompts import Prompts, Turns
from tiny_models import DECODERS, ENCODERS
from tiny_session import noise_image, tiny_folder

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from flashsloth.export.prompt_layout import check_layout, prompt_layout, save_tokenizer  # noqa: E402
from flashsloth.export.weights import hold_weights  # noqa: E402
from flashsloth.export.writing import export_folder  # noqa: E402

SETTINGS = Generation(
    eos_token_ids=[1],
    pad_token_id=0,
    suppress_tokens=[2],
    max_new_tokens=None,
    do_sample=False,
    temperature=1.0,
    top_k=50,
    top_p=1.0,
    repetition_penalty=1.0,
)


def prompts_of(processor, folder: Path) -> Prompts:
    save_tokenizer(processor, folder / "tokenizer.json")
    layout = prompt_layout(processor)
    return Prompts(folder / "tokenizer.json", layout, processor.num_query_tokens, processor.num_image_tokens)


def test_prompts_are_those_of_the_processor(tmp_path: Path) -> None:
    processor = load_processor(resolve("nano"))
    assert check_layout(processor, prompts_of(processor, tmp_path)) == 24  # its template takes no system prompt


def test_prompts_of_the_default_template_are_those_of_the_processor(tmp_path: Path) -> None:
    processor = load_processor(tiny_folder(tmp_path / "model"))
    processor.chat_template = DEFAULT_CHAT_TEMPLATE
    assert check_layout(processor, prompts_of(processor, tmp_path)) == 72


def test_a_template_that_reads_what_is_asked_is_refused(tmp_path: Path) -> None:
    processor = load_processor(tiny_folder(tmp_path / "model"))
    processor.chat_template = processor.chat_template.replace("{{ part.text }}", "{{ part.text | upper }}")
    with pytest.raises(ValueError, match="does not write"):
        prompt_layout(processor)
    processor.chat_template = processor.chat_template.replace("upper", "replace('tree', 'bush')")
    with pytest.raises(ValueError, match="cannot be cut into pieces"):
        check_layout(processor, prompts_of(processor, tmp_path))


def test_rows_are_padded_on_the_left(tmp_path: Path) -> None:
    processor = load_processor(resolve("nano"))
    prompts = prompts_of(processor, tmp_path)
    visual = processor.num_image_tokens
    batch = prompts.encode([Turns(["what is it?"], [visual]), Turns(["no image here, but many more words to read?"])])
    for row, turns in enumerate(([visual], [])):
        alone = prompts.encode([Turns([["what is it?", "no image here, but many more words to read?"][row]], turns)])
        length = alone["input_ids"].shape[1]
        assert batch["input_ids"][row, -length:].tolist() == alone["input_ids"][0].tolist()
        assert batch["attention_mask"][row].sum() == length
    with pytest.raises(ValueError, match="system"):
        prompts.encode([Turns(["what is it?"], system="Be brief.")])


def linear_graph(weights_RO: np.ndarray, part: str, table_VD: np.ndarray) -> ir.Model:
    """ids -> rows of a table -> linear layer; the layer stands in a part of a model."""
    ids = ir.Value(name="ids", shape=ir.Shape(["tokens"]), type=ir.TensorType(ir.DataType.INT64))
    marker = ir.Value(name="image_features", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    values = [
        ir.Value(name=name, const_value=ir.Tensor(array), shape=ir.Shape(array.shape), type=ir.TensorType(kind))
        for name, array, kind in (
            ("table", table_VD, ir.DataType.FLOAT),
            ("weight", weights_RO, ir.DataType.FLOAT),
        )
    ]
    gather = ir.node("Gather", [values[0], ids], {"axis": 0}, name="gather")
    product = ir.node("MatMul", [gather.outputs[0], values[1]], name="product")
    product.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', 'model.{part}', 'x']"
    product.outputs[0].name, product.outputs[0].dtype = "logits", ir.DataType.FLOAT
    product.outputs[0].shape = ir.Shape(["tokens", weights_RO.shape[1]])
    graph = ir.Graph(
        [ids, marker], product.outputs, nodes=[gather, product], initializers=values, opset_imports={"": 20}
    )
    return ir.Model(graph, ir_version=10)


def run_graph(model: ir.Model, ids: np.ndarray) -> np.ndarray:
    import onnxruntime

    data = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"ids": ids, "image_features": np.zeros(1, np.float32)})[0]


@pytest.mark.parametrize(
    ("weights", "part", "operation", "most_difference"),
    [
        ("float32", "layers.0.fc", "MatMul", 1e-5),
        ("float16", "layers.0.fc", "MatMul", 2e-3),
        ("int8", "layers.0.fc", "MatMulInteger", 6e-2),
        ("int4", "layers.0.fc", "MatMulNBits", 6e-1),
        ("int4", "lm_head", "MatMulInteger", 6e-2),
        ("int4", "embedded_query.down", "MatMul", 2e-3),
    ],
)
def test_weights_of_few_bits_are_near(weights: str, part: str, operation: str, most_difference: float) -> None:
    generator = np.random.default_rng(0)
    weights_RO = generator.normal(size=(40, 48)).astype(np.float32) / 6
    table_VD = generator.normal(size=(16, 40)).astype(np.float32)
    ids = np.arange(16)
    model = linear_graph(weights_RO, part, table_VD)
    before = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    hold_weights(model, weights)
    assert operation in [node.op_type for node in model.graph]
    after = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    assert after == before if weights == "float32" else after < 0.6 * before
    difference = np.abs(run_graph(model, ids) - table_VD @ weights_RO)
    assert difference.max() < most_difference
    assert difference.max() > 0 or weights == "float32"


def test_a_tied_head_is_held_once() -> None:
    table_VD = np.random.default_rng(0).normal(size=(48, 40)).astype(np.float32)
    model = linear_graph(np.ascontiguousarray(table_VD.T), "lm_head", table_VD)
    hold_weights(model, "float32")
    assert list(model.graph.initializers) == ["table"]
    np.testing.assert_allclose(run_graph(model, np.arange(3)), table_VD[:3] @ table_VD.T, atol=1e-5)


def test_greedy_choice_leaves_out_what_is_suppressed() -> None:
    logits_BV = np.array([[0, 1, 9, 3], [5, 4, 9, 3]], dtype=np.float32)
    choose = Chooser(SETTINGS, Sampling(min_new_tokens=1), [[], []])
    assert choose(logits_BV) == [3, 0]
    assert choose(np.array([[0, 7, 9, 3], [5, 4, 9, 3]], dtype=np.float32)) == [1, 0]


def test_repetition_is_punished_as_in_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits_BV = np.random.default_rng(0).normal(size=(1, 12)).astype(np.float32)
    seen = [[0, 3, 4, 4, 11]]
    expected = RepetitionPenaltyLogitsProcessor(5.0)(torch.tensor(seen), torch.from_numpy(logits_BV.copy()))
    expected[:, 2] = -torch.inf
    chosen = Chooser(SETTINGS, Sampling(repetition_penalty=5.0), seen)(logits_BV)
    assert chosen == expected.argmax(-1).tolist()


def test_draws_follow_the_probabilities() -> None:
    logits_V = np.log(np.array([0.1, 0.2, 0.0001, 0.3, 0.3999], dtype=np.float32))
    draws = 4000
    sampling = Sampling(do_sample=True, top_k=0, seed=0)
    counts = np.bincount(Chooser(SETTINGS, sampling, [[]] * draws)(np.tile(logits_V, (draws, 1))), minlength=5)
    np.testing.assert_allclose(counts / draws, [0.1, 0.2, 0.0, 0.3, 0.4], atol=0.03)
    few = Sampling(do_sample=True, top_k=2, seed=0)
    assert set(Chooser(SETTINGS, few, [[]] * 50)(np.tile(logits_V, (50, 1)))) == {3, 4}
    narrow = Sampling(do_sample=True, top_k=0, top_p=0.35, seed=0)
    assert set(Chooser(SETTINGS, narrow, [[]] * 50)(np.tile(logits_V, (50, 1)))) == {4}
    with pytest.raises(ValueError, match="do not know|does not know"):
        Sampling.of(SETTINGS, {"num_beams": 2})


def test_the_commands_of_the_page_are_those_of_the_program() -> None:
    from flashsloth_edge.cli import build_parser

    text = (Path(__file__).parents[1] / "docs" / "edge.md").read_text()
    (block,) = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines()]
    commands = [words[1:] for words in lines if words[0] == "flashsloth-edge"]
    assert [build_parser().parse_args(words).model for words in commands] == ["nano-onnx"] * 4
    assert lines[0] == ["pip", "install", "./edge"]


# Exports of tiny models: half a minute each, so that one is shared by the tests of a session.


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its export."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_folder(folder / "model")
    export_folder(folder / "model", folder / "onnx")
    return folder / "model", folder / "onnx"


def test_what_was_written_describes_itself(tiny_export: tuple[Path, Path]) -> None:
    _, folder = tiny_export
    assert {path.name for path in folder.iterdir()} == {
        "vision.onnx", "decoder.onnx", "tokenizer.json", MANIFEST_NAME,
    }  # fmt: skip
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    inputs = {port["name"]: port["shape"] for port in manifest["decoder"]["inputs"]}
    assert inputs["input_ids"] == ["rows", "tokens"]
    assert inputs["past_0"] == ["rows", 4, "past_tokens", 8]
    assert manifest["check"]["equal_answers"] == manifest["check"]["answers"] > 5
    assert manifest["check"]["logit_difference"] < 1e-4
    assert manifest["versions"]["torch"] == torch.__version__


def test_answers_of_turns_images_and_batches_are_the_models(tiny_export: tuple[Path, Path]) -> None:
    model, folder = tiny_export
    theirs, ours = load(model, kernels="torch"), flashsloth_edge.load(folder)
    images = [noise_image(seed) for seed in range(3)]
    for own in ([images[0]], images[:2], []):
        talks = theirs.conversation(own), ours.conversation(own)
        for question in ("what?", "and then?", "why is that so?"):
            expected, found = (talk.ask(question, max_new_tokens=6) for talk in talks)
            assert found.text == expected.text
            assert (found.prompt_tokens, found.reused_tokens) == (expected.prompt_tokens, expected.reused_tokens)
            assert found.visual_tokens == expected.visual_tokens
    rows = [([images[0]], "what?"), (images[1:], "who are they, and where?"), ([], "hm?")]
    alone = [theirs.ask(own, question, max_new_tokens=6).text for own, question in rows]
    assert ours.ask_batch(rows, max_new_tokens=6) == alone


def test_streams_end_early_and_samples_repeat(tiny_export: tuple[Path, Path]) -> None:
    model = flashsloth_edge.load(tiny_export[1])
    image = noise_image()
    stream = model.stream(image, "what?", max_new_tokens=8)
    pieces = list(stream)
    assert stream.answer is not None and "".join(pieces) == stream.answer.text
    assert len(pieces) > 2
    drawn = [model.ask(image, "what?", max_new_tokens=8, do_sample=True, seed=seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ValueError, match="empty"):
        model.ask(image, "  ")
    with pytest.raises(ValueError, match="visual tokens"):
        model.ask(image, "what?", visual_tokens=3)
    with pytest.warns(UserWarning, match="context ends"):
        model.ask(image, "what?" * 45, max_new_tokens=500)


def test_a_reset_conversation_keeps_its_images(tiny_export: tuple[Path, Path]) -> None:
    conversation = flashsloth_edge.load(tiny_export[1]).conversation(noise_image())
    first = conversation.ask("what?", max_new_tokens=4)
    conversation.reset()
    again = conversation.ask("what?", max_new_tokens=4)
    assert again.text == first.text
    assert again.timings.encode == 0 and again.reused_tokens > 0


def test_no_torch_is_imported(tiny_export: tuple[Path, Path], tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    noise_image().save(picture)
    code = (
        "import sys, flashsloth_edge.cli\n"
        f"assert flashsloth_edge.cli.main(['ask', {str(tiny_export[1])!r}, {str(picture)!r}, 'what?']) == 0\n"
        "assert not {'torch', 'transformers', 'flashsloth', 'jinja2'} & sys.modules.keys()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "visual tokens instead of" in result.stderr


def test_a_run_goes_on_where_it_was_stopped(tiny_export: tuple[Path, Path], tmp_path: Path) -> None:
    from flashsloth_edge.batch_run import run_file

    model = flashsloth_edge.load(tiny_export[1])
    noise_image().save(tmp_path / "a.png")
    lines = [{"id": str(index), "image": "a.png", "question": "what?" * (index + 1)} for index in range(3)]
    lines += [{"id": "bad", "image": "none.png", "question": "what?"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "out.jsonl"
    assert run_file(model, str(tmp_path / "in.jsonl"), str(output), 2, 4) == 1
    whole = output.read_text()
    answers = {line["id"]: line for line in map(json.loads, whole.splitlines())}
    assert "no such file" in answers["bad"]["error"]
    expected = model.ask(tmp_path / "a.png", "what?what?", max_new_tokens=4).text
    assert answers["1"]["answer"] == expected
    output.write_text(whole[: len(whole) // 2])
    run_file(model, str(tmp_path / "in.jsonl"), str(output), 2, 4)
    assert {line["id"]: line for line in map(json.loads, output.read_text().splitlines())} == answers


def test_a_server_answers_openais_clients(tiny_export: tuple[Path, Path], tmp_path: Path) -> None:
    import base64
    import threading
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from flashsloth_edge.server import make_server

    model = flashsloth_edge.load(tiny_export[1])
    noise_image().save(tmp_path / "a.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
    server = make_server(model, "127.0.0.1", 0, None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/v1/chat/completions"

    def post(body: dict) -> str:
        return urlopen(Request(address, json.dumps(body).encode()), timeout=60).read().decode()

    try:
        expected = model.ask(tmp_path / "a.png", "what?", max_new_tokens=4).text
        assert json.loads(post(body))["choices"][0]["message"]["content"] == expected
        events = [line.removeprefix("data: ") for line in post(body | {"stream": True}).splitlines() if line]
        assert events[-1] == "[DONE]"
        deltas = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
        assert "".join(deltas) == expected
        content[0]["image_url"]["url"] = str(tmp_path / "a.png")
        with pytest.raises(HTTPError) as refused:
            post(body)
        assert refused.value.code == 400
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "parameter", ["query_tokens.weight", "compressor.score.0.weight", "embedded_query.up_projection.weight"]
)
def test_a_missing_part_is_noticed(tiny_export: tuple[Path, Path], tmp_path: Path, parameter: str) -> None:
    from flashsloth.export.check import check_export

    model, folder = tiny_export
    session = load(model, kernels="torch")
    wanted = session.model.model.get_parameter(parameter).detach().numpy()
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    check_export(session, broken, exact=True)
    emptied = 0
    for file in ("vision.onnx", "decoder.onnx"):
        graph = ir.load(broken / file)
        for value in graph.graph.initializers.values():
            array = value.const_value.numpy()
            if any(np.array_equal(array, own) for own in (wanted, wanted.T)):
                array = array.copy()
                array[: 1 if parameter.startswith("query") else None] = 0  # one token, or all of the weights
                value.const_value = ir.Tensor(array)
                emptied += 1
        ir.save(graph, broken / file)
    assert emptied == 1
    with pytest.raises(ValueError, match="nothing was written"):
        check_export(session, broken, exact=True)


CASES = {
    **{decoder: {"decoder": decoder} for decoder in DECODERS if decoder != "phi"},
    **{encoder: {"encoder": encoder} for encoder in ENCODERS if encoder != "siglip"},
    "hd": {"view_grid": [2, 2]},
    "no queries": {"num_query_tokens": 0},
    "several numbers of visual tokens": {"compressor_windows": [2, 3]},
    "random": {"compressor": "random"},
    "no question": {"embedded_query_uses_question": False},
    "average": {"compressor": "average"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_family_is_exported(case: str, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", **CASES[case])
    manifest = export_folder(tmp_path / "model", tmp_path / "onnx")
    assert manifest.check["equal_answers"] == manifest.check["answers"]
    theirs, ours = load(tmp_path / "model", kernels="torch"), flashsloth_edge.load(tmp_path / "onnx")
    images = [noise_image(seed) for seed in range(2)]
    for count in manifest.sizes.visual_token_choices:
        expected = theirs.ask(images, "what is it?", max_new_tokens=70, visual_tokens=count)  # beyond sliding windows
        found = ours.ask(images, "what is it?", max_new_tokens=70, visual_tokens=count)
        assert found.text == expected.text
    if len(manifest.sizes.visual_token_choices) > 1:
        mixed = list(manifest.sizes.visual_token_choices)
        expected = theirs.ask(images, "what is it?", max_new_tokens=6, visual_tokens=mixed)
        assert ours.ask(images, "what is it?", max_new_tokens=6, visual_tokens=mixed).text == expected.text


def test_exported_folders_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flashsloth_cli.main import main

    (tmp_path / MANIFEST_NAME).write_text('{"format_version": 0}')
    asked = ["ask", "a.jpg", "what?", "--model", str(tmp_path)]
    for arguments, complaint in (
        (asked, "export the model again"),
        ([*asked, "--runtime", "torch"], "torch cannot run it"),
        ([*asked, "--runtime", "tflite"], "no runtime 'tflite'"),
        ([*asked, "--choices", "a,b"], "--choices: exported models answer freely"),
        (["serve", str(tmp_path)], "flashsloth-edge serve"),
        (["run", "questions.jsonl", "-o", "out.jsonl", "--model", str(tmp_path)], "flashsloth-edge run"),
        (["export", "nano", str(tmp_path / "x"), "--weights", "int2"], "unknown weights 'int2'"),
        (["export", "nano", str(tmp_path / "x"), "--format", "gguf"], "unknown format 'gguf'"),
    ):
        assert main(arguments) == 2
        assert complaint in capsys.readouterr().err


def test_two_readers_of_a_stream_both_come_to_its_end():
    from flashsloth_edge.streaming import AnswerStream

    start = threading.Event()

    def ask(on_text, stopped):
        start.wait()
        on_text("red")

    stream = AnswerStream(ask)
    readers = [threading.Thread(target=lambda: list(stream), daemon=True) for _ in range(2)]
    for reader in readers:
        reader.start()
    start.set()
    for reader in readers:
        reader.join(timeout=10)
    assert not any(reader.is_alive() for reader in readers)
