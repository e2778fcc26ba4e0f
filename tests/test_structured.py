"""Answers that follow a schema, choices or a regular expression, and how probable they are."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, LogitsProcessorList, PreTrainedTokenizerFast

from flashsloth.hub import ASSETS
from flashsloth.inference import AnswerForm, FlashSloth, compile_form, guide, load
from flashsloth.inference.batches import Record, answer, prepare
from flashsloth.inference.structured import FormProcessor
from flashsloth.inference.token_bytes import TokenBytes
from flashsloth.offline import RunSettings, run_records
from flashsloth_cli.main import main
from tiny_session import SPECIAL, character_tokenizer, noise_image, tiny_folder

SCHEMA = {
    "type": "object",
    "properties": {
        "Colour": {"enum": ["red", "Blue", "very dark green"]},  # upper case, which nano's tokenizer does not write
        "count": {"type": "integer", "minimum": 0, "maximum": 250},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "seen": {"type": ["boolean", "null"]},
    },
    "required": ["Colour", "count", "tags", "seen"],
    "additionalProperties": False,
}
CHOICES = ("yes", "no", "no idea", "a red circle")
REGEX = "[0-9]{1,3} (Dogs?|cats?)( and [a-z]{2,4})?"
FORMS = {"schema": AnswerForm(SCHEMA), "choices": AnswerForm(choices=CHOICES), "regex": AnswerForm(regex=REGEX)}
BRACES = "\t\r\x0b\x0c^`~|"  # left out of a vocabulary that has braces
IMAGES = sorted(str(path) for path in (ASSETS / "samples").glob("*.jpg"))


def is_valid(form: AnswerForm, text: str) -> bool:
    if form.schema is not None:
        jsonschema.validate(json.loads(text), form.schema)
        return text == json.dumps(json.loads(text), ensure_ascii="\\u" in text) or "\\" in text
    return text in form.choices if form.choices is not None else bool(re.fullmatch(form.regex, text))


@pytest.fixture(scope="module")
def nano() -> FlashSloth:
    return load("nano", device="cpu")


@pytest.fixture(scope="module", params=["phi", "gemma2", "smollm3"])
def tiny(request, tmp_path_factory) -> FlashSloth:
    folder = tmp_path_factory.mktemp("models") / request.param
    return load(tiny_folder(folder, request.param, character_tokenizer(BRACES)), device="cpu")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    pieces = ["▁", "▁yes", "yes", "▁no", "n", "o", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("n", "o")][:0], byte_fallback=True, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return with_specials(tokenizer)


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    pieces = ["yes", "##s", "no", "n", "##o", ",", "1"]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return with_specials(tokenizer)


def with_specials(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "<learnable>"]})
    return fast


def nano_tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "nano")


def check_bytes(tokenizer) -> None:
    """Any tokens one after the other decode to the bytes of each."""
    spelled = TokenBytes(tokenizer, tokenizer.all_special_ids, tokenizer.eos_token_id).tokens
    assert {index for index, token in enumerate(spelled) if not token} <= set(tokenizer.all_special_ids)
    ids = [index for index, token in enumerate(spelled) if token and token.decode("utf-8", "ignore").encode() == token]
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        some = [ids[place] for place in torch.randint(len(ids), (40,), generator=generator).tolist()]
        some[0] = next(index for index in ids if tokenizer.convert_ids_to_tokens(index).isalpha())
        whole = b"".join(spelled[index] for index in some).decode()
        assert whole.strip() == tokenizer.decode(some, clean_up_tokenization_spaces=False).strip()
    if len(ids) > 200:  # and can spell everything
        text = "é€😀 no"
        written = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(spelled[index] for index in written).decode().strip() == text


@pytest.mark.parametrize(
    "make",
    [nano_tokenizer, character_tokenizer, byte_fallback_tokenizer, word_piece_tokenizer],
    ids=lambda m: m.__name__,
)
def test_a_vocabulary_is_read_as_its_tokenizer_decodes_it(make):
    check_bytes(make())


@pytest.mark.parity
def test_the_published_vocabulary_is_read_as_its_tokenizer_decodes_it(parity_dir):
    check_bytes(AutoTokenizer.from_pretrained(parity_dir / "phi2-tokenizer"))


@pytest.mark.parametrize("kind", FORMS)
def test_whatever_logits_choose_every_answer_has_the_form(kind, nano):
    grammar = compile_form(FORMS[kind], nano.processor, nano.model.generation_config)
    texts = []
    for _ in range(150):
        state, ids = grammar.start(), []
        while not state.done:
            logits_1V = torch.randn(1, nano.config.text_config.vocab_size + 3)  # wider than the vocabulary
            state.mask_logits(logits_1V)
            ids.append(int(logits_1V.argmax()))
            state.accept(ids[-1])
        texts.append(nano.processor.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" "))
    assert all(is_valid(FORMS[kind], text) for text in texts)
    assert len(set(texts)) == (4 if kind == "choices" else len(set(texts)) if len(set(texts)) > 50 else 0)


@pytest.mark.parametrize("kind", FORMS)
def test_sampled_answers_have_the_form(kind, tiny):
    form = FORMS[kind]
    options = dataclasses.asdict(form)
    said = tiny.ask(noise_image(), "what?", do_sample=True, num_return_sequences=50, max_new_tokens=200, **options)
    assert len(said.others) == 49 and all(is_valid(form, text) for text in (said.text, *said.others))
    sampled = tiny.ask([], "what?", do_sample=True, temperature=4.0, top_k=3, max_new_tokens=200, **options)
    assert is_valid(form, sampled.text)


@pytest.mark.parametrize("kind", FORMS)
def test_a_batch_gives_the_answers_of_single_questions(kind, nano):
    form = dataclasses.replace(FORMS[kind], confidence=True)
    records = [Record("one", (IMAGES[0],), "what is it?"), Record("two", tuple(IMAGES[:2]), "what changed?")]
    records += [Record(path, (path,), "how many circles are there in this picture?") for path in IMAGES[:2]]
    lines = answer(nano, prepare(records, nano.processor, 400), 150, form)
    options = {name: getattr(form, name) for name in ("schema", "choices", "regex")}
    for record, line in zip(records, lines, strict=True):
        said = nano.ask(list(record.images), record.question, max_new_tokens=150, confidence=True, **options)
        assert (line["id"], line["answer"]) == (record.id, said.text) and is_valid(form, said.text)
        assert line["confidence"] == pytest.approx(said.confidence, rel=1e-4) and 0 < said.confidence <= 1


def test_every_token_up_to_the_end_may_come_and_nothing_else(nano):
    grammar = compile_form(FORMS["choices"], nano.processor, nano.model.generation_config)
    assert compile_form(AnswerForm(choices=list(CHOICES)), nano.processor, nano.model.generation_config) is grammar
    tokenizer, state = nano.processor.tokenizer, grammar.start()
    logits_V = torch.zeros(len(tokenizer))
    state.mask_logits(logits_V)
    starts = {"Ġyes", "Ġno", "Ġa"}
    assert set(tokenizer.convert_ids_to_tokens((logits_V == 0).nonzero().flatten().tolist())) == starts
    assert not state.complete and not state.done
    state.accept(tokenizer.convert_tokens_to_ids("Ġno"))
    assert state.complete and not state.done  # "no idea" may follow
    assert state.allowed(len(tokenizer))[tokenizer.eos_token_id]
    state.accept(tokenizer.eos_token_id)
    assert state.done and state.tokens == 2
    assert state.allowed(len(tokenizer)).nonzero().flatten().tolist() == [tokenizer.eos_token_id]
    with pytest.raises(ValueError, match="not one that may come next"):
        grammar.start().accept(tokenizer.eos_token_id)


def test_generate_of_transformers_takes_the_form(nano):
    config = nano.model.generation_config
    grammar = compile_form(AnswerForm(SCHEMA), nano.processor, config)
    chats = [[{"role": "user", "content": text}] for text in ("hello", "what is the colour of this?")]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    inputs = nano.processor.apply_chat_template(chats, add_generation_prompt=True, **options)
    processor = FormProcessor(grammar)
    ids = nano.model.generate(**inputs, max_new_tokens=150, logits_processor=LogitsProcessorList([processor]))
    texts = nano.processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert all(is_valid(AnswerForm(SCHEMA), text.removeprefix(grammar.lead)) for text in texts)
    assert all(state.done for state in processor.states)
    with pytest.raises(ValueError, match="make a new one"):
        nano.model.generate(**inputs, max_new_tokens=5, logits_processor=LogitsProcessorList([processor]))


def log_probability(session: FlashSloth, inputs: dict, ids: list[int]) -> Tensor:
    """Of tokens behind a prompt, by one pass over all of them, without a cache: (len(ids), V) each."""
    given = {name: value for name, value in inputs.items() if name != "attention_mask"}
    prompt = given.pop("input_ids")
    if "question_ids" in given:
        given["question_ids"] = torch.nn.functional.pad(given["question_ids"], (0, len(ids)))
    with torch.inference_mode():
        logits = session.model(input_ids=torch.cat([prompt, torch.tensor([ids])], dim=1), **given).logits
    return logits[0, prompt.shape[1] - 1 : -1].float().log_softmax(dim=-1)


def prompt_of(session: FlashSloth, image, question: str) -> dict:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return dict(
        session.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


def check_choices(session: FlashSloth, lead: str, monkeypatch) -> None:
    tokenizer, end = session.processor.tokenizer, session.processor.tokenizer.eos_token_id
    image, question = noise_image(), "is it?"
    inputs, scores = prompt_of(session, image, question), []
    for choice in CHOICES:
        ids = [*tokenizer(lead + choice, add_special_tokens=False)["input_ids"], end]
        scores.append(log_probability(session, inputs, ids).gather(1, torch.tensor(ids)[:, None]).sum())
    expected = dict(zip(CHOICES, torch.stack(scores).softmax(dim=0).tolist(), strict=True))
    for rows in (64, 1):  # all choices in one pass; one after the other
        monkeypatch.setattr(guide, "ROWS_AT_ONCE", rows)
        said = session.ask(image, question, choices=CHOICES, confidence=True)
        assert said.confidence == pytest.approx(expected[said.text], rel=1e-3)
        # whichever of them is answered: together they are certain
        parts = []
        for choice in CHOICES:
            only = compile_form(AnswerForm(choices=[choice]), session.processor, session.model.generation_config)
            forced = session.ask(
                image, question, choices=CHOICES, confidence=True, logits_processor=[FormProcessor(only)]
            )
            assert forced.text == choice
            parts.append(forced.confidence)
        assert sum(parts) == pytest.approx(1, abs=1e-5)


def test_confidence_of_choices_is_their_share_of_the_probability(tiny, monkeypatch):
    check_choices(tiny, "", monkeypatch)


def test_confidence_of_choices_is_their_share_of_the_probability_of_nano(nano, monkeypatch):
    check_choices(nano, " ", monkeypatch)


@torch.inference_mode()
@pytest.mark.parametrize("rows_at_once", [64, 1])
def test_the_rows_of_a_batch_are_scored_as_single_prompts(tiny, rows_at_once, monkeypatch):
    monkeypatch.setattr(guide, "ROWS_AT_ONCE", rows_at_once)
    asked = [(noise_image(), "is it?"), (noise_image(1), "what is it, then?")]
    records = [Record(question, (image,), question) for image, question in asked]
    batch = prepare(records, tiny.processor, 200)
    features = tiny.model.get_image_features(batch.pixel_values, return_dict=True)
    end = tiny.processor.tokenizer.eos_token_id
    choices = [tiny.processor.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in CHOICES]
    scores_BN = guide.score_choices(tiny.model, dict(batch.inputs), features, choices, frozenset([end]))
    for row, (image, question) in enumerate(asked):
        inputs = prompt_of(tiny, image, question)
        for column, ids in enumerate([*ids, end] for ids in choices):
            expected = log_probability(tiny, inputs, ids).gather(1, torch.tensor(ids)[:, None]).sum()
            assert float(scores_BN[row, column]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    "form", [AnswerForm(), AnswerForm(SCHEMA), AnswerForm(regex=REGEX)], ids=["free", "schema", "regex"]
)
def test_confidence_of_other_answers_is_the_product_of_their_tokens(form, nano):
    config, tokenizer = nano.model.generation_config, nano.processor.tokenizer
    image, question, seen = noise_image(), "what is it?", []

    def keep(ids, scores, **_):
        seen.append(ids[0].tolist())
        return torch.zeros(len(ids), dtype=torch.bool)

    said = nano.ask(
        image,
        question,
        max_new_tokens=150,
        confidence=True,
        schema=form.schema,
        regex=form.regex,
        stopping_criteria=[keep],
    )
    inputs = prompt_of(nano, image, question)
    ids = seen[-1][inputs["input_ids"].shape[1] :]
    logits_TV = log_probability(nano, inputs, ids)
    logits_TV[:, config.suppress_tokens] = -torch.inf
    if not form.is_free:
        state = compile_form(form, nano.processor, config).start()
        for logits_V, token in zip(logits_TV, ids, strict=True):
            state.mask_logits(logits_V)
            state.accept(token)
    expected = logits_TV.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None]).sum().exp()
    assert said.new_tokens == len(ids) and (form.schema is not None or ids[-1] == tokenizer.eos_token_id)
    assert said.confidence == pytest.approx(float(expected), rel=1e-3)


def test_conversations_and_streams_take_forms(nano):
    conversation = nano.conversation(IMAGES[0])
    first = conversation.ask("is it red?", choices=["yes", "no"])
    second = conversation.ask("how many?", regex="[0-9]{2}", confidence=True)
    assert first.text in ("yes", "no") and first.confidence is None and re.fullmatch("[0-9]{2}", second.text)
    assert second.reused_tokens >= first.prompt_tokens
    free = conversation.ask("and now?", max_new_tokens=4)
    assert free.confidence is None
    stream = nano.stream(IMAGES[0], "describe it", schema=SCHEMA, max_new_tokens=150, confidence=True)
    text = "".join(stream).strip()
    assert is_valid(AnswerForm(SCHEMA), text) and stream.answer.text == text and 0 < stream.answer.confidence < 1
    with pytest.raises(ValueError, match="exclude each other"):
        nano.stream(IMAGES[0], "describe it", schema=SCHEMA, regex="a")


def test_forms_go_with_fewer_visual_tokens(tmp_path):
    elastic = {"compressor_window": 2, "compressor_windows": [1, 2, 3, 6]}
    session = load(tiny_folder(tmp_path / "elastic", "qwen3", **elastic), device="cpu")
    for count in (36, 9, 1):
        said = session.ask(noise_image(), "is it?", visual_tokens=count, choices=CHOICES, confidence=True)
        assert said.text in CHOICES and said.visual_tokens == count
        records = [Record("a", (noise_image(),), "is it?"), Record("b", (noise_image(1),), "what is it, then?")]
        line = answer(
            session, prepare(records, session.processor, 99, count), 20, AnswerForm(choices=CHOICES, confidence=True)
        )[0]
        assert line["answer"] == said.text and line["confidence"] == pytest.approx(said.confidence, rel=1e-4)


@pytest.mark.parametrize(
    "form, message",
    [
        ({"schema": {}, "choices": ["a"]}, "schema and choices exclude each other"),
        ({"schema": [1]}, "a JSON schema is an object"),
        ({"schema": {"const": {1, 2}}}, "the schema is no JSON"),
        ({"schema": {"const": float("nan")}}, "the schema is no JSON"),
        ({"schema": {"type": "objekt"}}, "JSON schema cannot be used: Invalid type: objekt"),
        ({"schema": {"not": {"type": "null"}}}, "JSON schema cannot be used: .*not"),
        ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "JSON schema cannot be used: Unsatisfiable"),
        ({"schema": {"$ref": "#/nowhere"}}, "JSON schema cannot be used: .*nowhere"),
        ({"choices": []}, "choices is empty"),
        ({"choices": "yes"}, "choices must be a list"),
        ({"choices": ["yes", " "]}, "choice 2 is ' '"),
        ({"choices": ["yes", 3]}, "choice 2 is 3"),
        ({"choices": ["yes", "no "]}, "begins or ends with a blank"),
        ({"choices": ["yes", "yes"]}, "comes twice"),
        ({"choices": ["yes", "NO"]}, "'NO' cannot be spelled by the model's tokenizer, which writes 'no'"),
        ({"regex": ""}, "regex must be"),
        ({"regex": "(a"}, "regular expression cannot be used: unclosed group"),
        ({"regex": "a)(b"}, "regular expression cannot be used: unopened group"),
        ({"regex": "(?=a)b"}, "regular expression cannot be used: look-around"),
        ({"choices": ["yes"], "num_beams": 2}, "not with beam_search"),
        ({"confidence": True, "prompt_lookup_num_tokens": 2}, "not with assisted_generation"),
        ({"choices": ["yes"], "suppress_tokens": list(range(2, 800))}, "rule out every token"),
        (
            {"schema": SCHEMA, "max_new_tokens": 6},
            "cut after 6 tokens, before the JSON schema was complete; raise max",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(form, message, nano):
    with pytest.raises(ValueError, match=message) as caught:
        nano.ask(IMAGES[0], "is it?", **form)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_vocabulary_that_lacks_what_a_form_needs_is_named(tmp_path, monkeypatch):
    session = load(tiny_folder(tmp_path / "tiny"), device="cpu")  # without braces
    with pytest.raises(ValueError, match="JSON schema cannot be answered: no token of the vocabulary spells"):
        session.ask([], "what?", schema=SCHEMA)
    with pytest.raises(ValueError, match="no token of the vocabulary spells what has to follow after 3 tokens"):
        session.ask([], "what?", regex="abc@.")
    with pytest.raises(ValueError, match="'a~' cannot be spelled"):
        session.ask([], "what?", choices=["a", "a~"])
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'flashsloth\[structured\]'"):
        session.ask([], "what?", choices=["a"])


def lines_of(path: Path) -> dict[str, dict]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_a_run_keeps_to_its_form_and_cannot_go_on_with_another(tmp_path, nano):
    records = [Record(path, (path,), "is it a circle?") for path in IMAGES]
    settings = RunSettings(device="cpu", workers=0, choices=["yes", "no"], confidence=True)
    output = tmp_path / "out.jsonl"
    assert run_records(records[:2], output, settings).answered == 2
    assert run_records(records, output, settings).answered == len(records) - 2
    for path, row in lines_of(output).items():
        said = nano.ask(path, "is it a circle?", choices=["yes", "no"], confidence=True)
        assert (row["answer"], row["confidence"]) == (said.text, pytest.approx(said.confidence, rel=1e-4))
    for change in ({"choices": ["yes", "no", "both"]}, {"choices": None}, {"confidence": False}):
        with pytest.raises(ValueError, match=f"was begun with {next(iter(change))}="):
            run_records(records, output, dataclasses.replace(settings, **change))
    with pytest.raises(ValueError, match="exclude each other"):
        RunSettings(choices=["yes"], regex="a")
    bad = dataclasses.replace(settings, choices=["YES"])
    with pytest.raises(ValueError, match="cannot be spelled"):
        run_records(records, tmp_path / "bad.jsonl", bad)
    assert not (tmp_path / "bad.jsonl").exists()
    short = RunSettings(device="cpu", workers=0, schema=SCHEMA, max_new_tokens=5)
    assert run_records(records, tmp_path / "short.jsonl", short).failed == len(records)
    assert all("cut after 5 tokens" in row["error"] for row in lines_of(tmp_path / "short.jsonl").values())


def test_the_command_line_takes_forms(tmp_path, capsys):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA), encoding="utf-16")
    ask = ["ask", IMAGES[0], "what is it?", "--device", "cpu"]
    assert main([*ask, "--choices", 'yes, no,"no idea"', "--confidence"]) == 0
    out = capsys.readouterr()
    assert out.out.strip() in ("yes", "no", "no idea") and re.search(r"confidence [01]\.\d{3}", out.err)
    assert main([*ask, "--schema", str(schema), "--max-new-tokens", "150", "--json", "--confidence"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert is_valid(AnswerForm(SCHEMA), said["text"]) and 0 < said["confidence"] <= 1
    output = tmp_path / "out.jsonl"
    run = ["run", str(ASSETS / "samples"), "-o", str(output), "-q", "how many?", "--device", "cpu", "--workers", "0"]
    assert main([*run, "--regex", "[0-9]", "--confidence"]) == 0
    assert all(re.fullmatch("[0-9]", row["answer"]) and row["confidence"] for row in lines_of(output).values())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--schema", "FILE", "--choices", "a"], "--schema and --choices exclude each other"),
        (["--schema", "FILE"], "is no JSON"),
        (["--schema", "LIST"], "holds no JSON schema"),
        (["--schema", "nowhere.json"], "No such file"),
        (["--choices", ""], "choices is empty"),
        (["--choices", "a,,b"], "choice 2 is ''"),
        (["--choices", '"a'], "cannot be read"),
        (["--regex", ""], "regex must be"),
    ],
    ids=str,
)
def test_the_command_line_refuses_bad_forms_before_a_model_is_loaded(options, message, tmp_path, capsys):
    (tmp_path / "FILE").write_bytes(b"\xff\xfe{")
    (tmp_path / "LIST").write_text("[1]")
    words = [str(tmp_path / word) if word in ("FILE", "LIST") else word for word in options]
    assert main(["ask", IMAGES[0], "what?", "--model", "no such model", *words]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ") and "no such model" not in error
