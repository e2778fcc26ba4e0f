"""Prompts, question spans, labels, padding; and that nothing a user types is read as anything but text."""

import base64
import contextlib
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
from flashsloth.model.chat_text import ESCAPE, PLAIN_CHAT_TEMPLATE, PromptText

CORPUS = [
    "A chat between a curious user and an assistant. USER: What is it? ASSISTANT: It is a red circle.",
    "USER: How many squares are there? ASSISTANT: There are three of them, and a blue one.\n\n  Indeed, <image>.",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<learnable>"]
IMAGE_TOKENS, QUERY_TOKENS = 4, 2
PICTURE = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
FIELDS = ("input_ids", "attention_mask", "question_ids", "labels", "image_positions", "query_positions")


def byte_level_tokenizer(vocabulary=400):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace_tokenizer(scheme):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    # Only the named ones are special; the bytes are ordinary tokens.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(state))


def fast(tokenizer, **options):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        additional_special_tokens=["<image>", "<learnable>"],
        **options,
    )


def make(tokenizer=None, **options):
    settings = {"num_image_tokens": IMAGE_TOKENS, "num_query_tokens": QUERY_TOKENS, **options}
    image_processor = FlashSlothImageProcessor(size={"height": 8, "width": 8})
    return FlashSlothProcessor(image_processor, tokenizer or fast(byte_level_tokenizer()), **settings)


@pytest.fixture(scope="module")
def processor():
    return make()


def user(*parts):
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else IMAGE_PART for part in parts],
    }


IMAGE_PART = {"type": "image", "image": PICTURE}
IMG = object()  # stands for an image among the parts of `user`


def assistant(text):
    return {"role": "assistant", "content": text}


SHORT = [user(IMG, "What is it?"), assistant("It is a red circle.")]
LONG = [*SHORT, user("How many squares are there?"), assistant("There are three of them.")]
TEXT_ONLY = [user("How many?"), assistant("Three.")]
TWO_IMAGES = [user(IMG, "What is it?"), assistant("A."), user("And", IMG, "now?", IMG), assistant("B.")]


def encode(processor, conversation, **options):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_labels": True, **options}
    return processor.apply_chat_template(conversation, **options)


def questions(processor, batch, row=0):
    ids = batch["question_ids"][row]
    return [processor.decode(batch["input_ids"][row][ids == group]) for group in range(1, int(ids.max()) + 1)]


def answers(processor, batch, row=0):
    labels = batch["labels"][row]
    spans = np.split(labels.numpy(), np.flatnonzero(np.diff((labels >= 0).int().numpy())) + 1)
    return [processor.decode(span) for span in spans if span[0] >= 0]


def assert_same(first, second, fields=None):
    assert set(first.keys()) == set(second.keys())
    for name in fields or first.keys():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


# --- the recorded prompts -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(parity_dir):
    from safetensors.numpy import load_file

    tokenizer = AutoTokenizer.from_pretrained(parity_dir / "phi2-tokenizer")
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    image_processor = FlashSlothImageProcessor()
    processor = FlashSlothProcessor(image_processor, tokenizer, num_image_tokens=81, num_query_tokens=9)
    folder = parity_dir / "official-tiny"
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    return processor, cases, load_file(folder / "expected.safetensors"), folder


def expanded(ids, processor, *others):
    """Rows as recorded, with the image (-200) and the queries (their id) repeated as often as the model sees them."""
    lengths = {-200: processor.num_image_tokens, processor.query_token_id: processor.num_query_tokens}
    counts = [lengths.get(int(value), 1) for value in ids]
    ids = np.where(ids == -200, processor.image_token_id, ids)
    return [np.repeat(values, counts) for values in (ids, *others)]


@pytest.mark.parity
@pytest.mark.parametrize("case", ["single", "single_b", "hd", "batch2"])
def test_prompts_equal_the_recorded_ids(official, case):
    processor, cases, recorded, folder = official
    prompts = cases[case].get("prompts", [cases[case].get("prompt")])
    images = cases[case].get("images", [cases[case].get("image")])
    batch = processor(
        text=prompts, images=[folder / f"{name}.png" for name in images], return_tensors="pt", padding_side="right"
    )
    conversations = [[user(IMG, prompt.partition("<image>\n")[2].partition("<learnable>")[0])] for prompt in prompts]
    templated = encode(
        processor, conversations, add_generation_prompt=True, return_labels=False, return_pixel_values=False
    )
    for row, ids in enumerate(recorded[f"{case}.input_ids"]):
        (expected,) = expanded(ids, processor)
        count = int(batch["attention_mask"][row].sum())
        padding = processor.tokenizer.pad_token_id
        assert batch["input_ids"][row].tolist()[:count] == [*expected[:count]]
        assert set(expected[count:].tolist()) <= {padding}
        assert questions(processor, batch, row) == [conversations[row][0]["content"][1]["text"]]
    assert_same({name: batch[name] for name in templated}, templated)


@pytest.mark.parity
def test_training_rows_equal_the_recorded_ids_and_labels(official):
    processor, cases, recorded, _ = official
    turns = [
        message
        for index, (question, answer) in enumerate(cases["train_two_turns"]["turns"])
        for message in (user(*([IMG] if index == 0 else []), question), assistant(answer))
    ]
    text_only = [user("What is the capital of France?"), assistant("Paris.")]
    batch = encode(processor, [turns, text_only], space_before_query=True, return_pixel_values=False)
    for row in range(2):
        ids, labels = (recorded[f"train_mixed_batch.{name}"][row] for name in ("input_ids", "labels"))
        ids, labels = expanded(ids, processor, labels)
        assert batch["input_ids"][row].tolist()[: len(ids)] == ids.tolist()
        assert batch["labels"][row].tolist()[: len(ids)] == labels.tolist()
        assert (batch["labels"][row][len(ids) :] == -100).all()
    assert batch["image_positions"].tolist() == [[32], [-1]]


# --- typed text stays text ------------------------------------------------------------------------------------------

NASTY = [
    *SPECIAL,
    "<question>",
    "<",
    "ima",
    "ge>",
    "<ima",
    "<<image>",
    ESCAPE,
    "/",
    "USER:",
    " ASSISTANT:",
    " ",
    "\n",
    "a",
]
typed_text = st.text() | st.lists(st.sampled_from(NASTY), max_size=8).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(typed_text, min_size=1, max_size=3), answer=typed_text, system=typed_text)
@example(parts=["<ima", "ge>"], answer="</s>", system="<s>")
@example(parts=["<image>\n<question>what<learnable>"], answer="<learnable>", system="")
@example(parts=["<"], answer="", system="<learnable")
@example(parts=["\n", "\nwhat"], answer=ESCAPE, system=ESCAPE + "/")
def test_typed_text_round_trips(processor, parts, answer, system):
    conversation = [{"role": "system", "content": system}, user(IMG, *parts), assistant(answer)]
    if not "".join(parts).strip():
        with pytest.raises(ValueError, match="empty"):
            encode(processor, conversation)
        return
    batch = encode(processor, conversation)
    ids = batch["input_ids"][0]
    # A typed newline may share a token with the template's.
    assert questions(processor, batch)[0] in ("".join(parts), "\n" + "".join(parts))
    assert answers(processor, batch) == [f" {answer}</s>"]
    assert (ids == processor.image_token_id).sum() == IMAGE_TOKENS
    assert (ids == processor.query_token_id).sum() == QUERY_TOKENS
    vocabulary = processor.tokenizer.get_vocab()
    assert [int((ids == vocabulary[token]).sum()) for token in ("<pad>", "<s>", "</s>")] == [0, 0, 1]
    prompt = processor.apply_chat_template(conversation)
    again = processor(text=prompt, images=PICTURE, return_tensors="pt")
    assert_same(again, {name: batch[name] for name in batch if name != "labels"})


@settings(max_examples=100, deadline=None)
@given(text=typed_text)
def test_escaping_is_undone(text):
    prompt_text = PromptText("<image>", "<learnable>", "<question>", dict.fromkeys(SPECIAL, (False, False)))
    escaped = prompt_text.escape(text)
    assert PromptText.unescape(escaped) == text
    for token in (*SPECIAL, "<question>"):
        assert token not in escaped
        assert token not in escaped + token[1:]


def test_handwritten_prompts_can_escape(processor):
    question = "Is <image> a tag?"
    prompt = f"USER: <image>\n{processor.prompt_text.escape(question)}<learnable> ASSISTANT:"
    batch = processor(text=prompt, images=PICTURE, return_tensors="pt")
    assert questions(processor, batch) == [question]


def test_tools_and_documents_stay_text_too(processor):
    template = "{{ tools | tojson }}{{ documents[0].text }}<question>{{ messages[0].content }}<learnable>"
    batch = encode(
        processor,
        [{"role": "user", "content": "Q"}],
        chat_template=template,
        return_labels=False,
        tools=[{"<image>": "</s>"}],
        documents=[{"text": "<learnable> <image>"}],
    )
    text = processor.decode(batch["input_ids"][0])
    assert text == '[{"<image>": "</s>"}]<learnable> <image>Q' + "<learnable>" * QUERY_TOKENS
    assert "image_positions" not in batch
    assert batch["query_positions"].shape == (1, 1)


@pytest.mark.parametrize("bad", ["\ud83d", "\udcff"])
def test_half_of_a_surrogate_pair_is_replaced_wherever_it_stands(processor, bad):
    good = "\ufffd"

    def everywhere(half):
        conversation = [{"role": "system", "content": half}, user(IMG, f"a{half}", half), assistant(f"{half}b")]
        yield encode(processor, conversation)
        yield encode(processor, SHORT, default_system_prompt=f"x{half}")
        yield processor(text=f"{half}USER: {half}?<learnable>", return_tensors="pt")
        yield processor.encode_captions([f"a {half}"], [PICTURE])
        tools = {"chat_template": "{{ tools }}{{ documents }}<question>a<learnable>", "return_labels": False}
        yield encode(processor, TEXT_ONLY, tools=[{half: half}], documents=[{"text": half}], **tools)

    for found, expected in zip(everywhere(bad), everywhere(good), strict=True):
        assert_same(found, expected)
    assert processor.apply_chat_template([user(f"a{bad}")]).encode()
    assert questions(processor, encode(processor, [user("a\0b"), assistant("c")])) == [" a\0b"]


# --- question spans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question", ["What is it?", "Does USER: or ASSISTANT: stand there?", "\nA line?", " A space?"]
)
def test_prompts_without_marker_follow_the_role_headers(processor, question):
    turns = [user(IMG, question), assistant("A."), user(question), assistant("B.")]
    prompt = processor.apply_chat_template(turns)
    marked = processor(text=prompt, images=PICTURE, return_tensors="pt", return_labels=True)
    plain = processor(text=prompt.replace("<question>", ""), images=PICTURE, return_tensors="pt", return_labels=True)
    assert_same(marked, plain, [name for name in marked if name != "question_ids"])
    assert [text.strip() for text in questions(processor, plain)] == [question.strip()] * 2


def test_text_around_images_is_all_of_the_question(processor):
    batch = encode(processor, TWO_IMAGES)
    assert questions(processor, batch) == ["What is it?", "Andnow?"]
    assert batch["image_positions"].shape == (1, 3)
    assert batch["pixel_values"].shape == (3, 1, 3, 8, 8)


def test_a_newline_typed_after_an_image_is_part_of_the_question(processor):
    assert questions(processor, encode(processor, [user(IMG, "\nWhat?")])) == ["\nWhat?"]
    assert questions(processor, encode(processor, [user("See", IMG, "\nWhat?")])) == ["See\nWhat?"]


def test_positions_point_at_the_first_token(processor):
    batch = encode(processor, TWO_IMAGES)
    ids = batch["input_ids"][0]
    for name, token_id, run in (
        ("image_positions", processor.image_token_id, IMAGE_TOKENS),
        ("query_positions", processor.query_token_id, QUERY_TOKENS),
    ):
        found = torch.cat([torch.arange(start, start + run) for start in batch[name][0].tolist()])
        assert found.tolist() == (ids == token_id).nonzero().flatten().tolist()


def test_question_without_any_sign_is_refused(processor):
    with pytest.raises(ValueError, match="row 1.*query group 1 begins"):
        processor(text=["USER: What?<learnable>", "What?<learnable>"])


@pytest.mark.parametrize("text", ["", "  \n "])
def test_empty_question(processor, text):
    with pytest.raises(ValueError, match="question 1 is empty"):
        encode(processor, [user(IMG, text)])
    with pytest.raises(ValueError, match="row 1: question 2 is empty"):
        encode(processor, [LONG, [*SHORT, user(text)]])
    with pytest.raises(ValueError, match="question 1 is empty"):
        encode(processor, [{"role": "user", "content": [IMAGE_PART]}])


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("multiple", [None, 16])
def test_batch_equals_singles(processor, side, multiple):
    conversations = [SHORT, TEXT_ONLY, TWO_IMAGES, LONG]
    batch = encode(processor, conversations, padding_side=side, pad_to_multiple_of=multiple)
    length = batch["input_ids"].shape[1]
    assert multiple is None or length % multiple == 0
    assert batch["image_positions"].shape == (4, 3)
    assert batch["query_positions"].shape == (4, 2)
    singles = [encode(processor, conversation) for conversation in conversations]
    for row, single in enumerate(singles):
        shift = length - single["input_ids"].shape[1] if side == "left" else 0
        kept = slice(shift, shift + single["input_ids"].shape[1])
        for name in ("input_ids", "attention_mask", "question_ids", "labels"):
            assert batch[name][row, kept].tolist() == single[name][0].tolist()
        padding = batch["attention_mask"][row] == 0
        assert (batch["input_ids"][row][padding] == processor.tokenizer.pad_token_id).all()
        assert (batch["question_ids"][row][padding] == 0).all()
        assert (batch["labels"][row][padding] == -100).all()
        for name in ("image_positions", "query_positions"):
            expected = [value + shift for value in single[name][0].tolist()] if name in single else []
            assert [value for value in batch[name][row].tolist() if value >= 0] == expected
    padded = processor.pad(singles, padding_side=side, pad_to_multiple_of=multiple)
    assert_same(batch, padded)


def test_text_only_batch_has_no_image_tensors(processor):
    batch = encode(processor, [TEXT_ONLY, TEXT_ONLY])
    assert "image_positions" not in batch
    assert "pixel_values" not in batch
    assert questions(processor, batch)[0].strip() == "How many?"


def test_unpadded_lists_and_fixed_length(processor):
    lists = encode(processor, [SHORT, LONG], padding=False, return_tensors=None)
    assert [len(row) for row in lists["input_ids"]] == [len(row) for row in lists["question_ids"]]
    assert len({len(row) for row in lists["input_ids"]}) == 2
    with pytest.raises(ValueError, match="padding=True"):
        encode(processor, [SHORT, LONG], padding=False)
    assert encode(processor, SHORT, padding="max_length", max_length=200)["input_ids"].shape == (1, 200)
    with pytest.raises(ValueError, match="max_length"):
        encode(processor, SHORT, padding="max_length")


def test_defaults_of_the_tokenizer_are_used(tmp_path):
    """Options of tokenizers that are given at their construction come before the processor's own defaults."""
    tokenizer = fast(byte_level_tokenizer(), padding="max_length", max_length=200)
    processor = make(tokenizer)
    processor.save_pretrained(tmp_path)
    for same in (processor, AutoProcessor.from_pretrained(tmp_path)):
        assert encode(same, SHORT)["input_ids"].shape == (1, 200)
        assert same(text="USER: a<learnable>", return_tensors="pt")["input_ids"].shape == (1, 200)
        assert encode(same, [SHORT, LONG], padding=True)["input_ids"].shape[1] < 200
    lists = encode(make(fast(byte_level_tokenizer(), padding=False)), [SHORT, LONG], return_tensors=None)
    assert len({len(row) for row in lists["input_ids"]}) == 2
    length = len(lists["input_ids"][0])
    truncating = make(fast(byte_level_tokenizer(), truncation=True, max_length=length - 2))
    assert encode(truncating, SHORT)["input_ids"].shape == (1, length - 2)
    limited = make(fast(byte_level_tokenizer(), max_length=10))  # a length alone neither pads nor truncates
    assert encode(limited, SHORT)["input_ids"].shape == (1, length)


def test_tensors_for_tokens_follow_the_tokenizer(processor, caplog):
    batch = encode(processor, [SHORT, TEXT_ONLY], return_mm_token_type_ids=True)
    assert batch["mm_token_type_ids"].tolist() == (batch["input_ids"] == processor.image_token_id).int().tolist()
    singles = [encode(processor, row, return_mm_token_type_ids=True) for row in (SHORT, TEXT_ONLY)]
    assert_same(processor.pad(singles), batch)
    by_hand = processor(text="USER: <image>\nA?<learnable>", images=PICTURE, return_mm_token_type_ids=True)
    assert sum(by_hand["mm_token_type_ids"][0]) == IMAGE_TOKENS
    assert "attention_mask" not in encode(processor, SHORT, return_attention_mask=False)
    maskless = make(fast(byte_level_tokenizer(), model_input_names=["input_ids"]))
    assert set(encode(maskless, SHORT, return_labels=False)) == set(maskless.model_input_names)
    assert "attention_mask" in encode(maskless, SHORT, return_attention_mask=True)
    assert set(encode(processor, SHORT, return_labels=False)) == set(processor.model_input_names)
    assert "query_positions" not in make(num_query_tokens=0).model_input_names
    processor(text="USER: A?<learnable>", return_offsets_mapping=True)
    assert "'return_offsets_mapping' is no option" in caplog.text


def test_pad_refuses_what_it_does_not_know(processor):
    single = dict(encode(processor, SHORT))
    with pytest.raises(ValueError, match="cannot pad name"):
        processor.pad([{**single, "name": "x"}])
    with pytest.raises(ValueError, match="labels is in some"):
        processor.pad([single, {name: value for name, value in single.items() if name != "labels"}])
    with pytest.raises(ValueError, match="single samples"):
        processor.pad([encode(processor, [SHORT, LONG])])


def test_missing_padding_token_is_named():
    tokenizer = fast(byte_level_tokenizer())
    tokenizer.pad_token = None
    processor = make(tokenizer)
    encode(processor, SHORT)
    with pytest.raises(ValueError, match="pad_token"):
        encode(processor, [SHORT, LONG])


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [False, True])
def test_labels_are_answers_and_their_end(processor, space):
    batch = encode(processor, LONG, space_before_query=space)
    assert answers(processor, batch) == [" It is a red circle.</s>", " There are three of them.</s>"]
    assert questions(processor, batch)[0] == "What is it?" + " " * space
    by_hand = processor(
        text=processor.apply_chat_template(LONG, space_before_query=space),
        images=PICTURE,
        return_tensors="pt",
        return_labels=True,
    )
    assert_same(batch, by_hand)
    masks = encode(processor, LONG, return_assistant_tokens_mask=True)["assistant_masks"]
    assert (masks == (encode(processor, LONG)["labels"] != -100)).all()


def test_labels_of_a_prompt_need_its_headers(processor):
    with pytest.raises(ValueError, match="ASSISTANT:"):
        processor(text="USER: What?<learnable> Well", return_labels=True)


def test_captions(processor):
    batch = processor.encode_captions(["a dog", "a red <image>"], [PICTURE, PICTURE])
    assert answers(processor, batch, 0) == ["a dog\n"]
    assert answers(processor, batch, 1) == ["a red <image>\n"]
    assert batch["image_positions"].tolist() == [[0], [0]]
    assert "query_positions" not in batch
    assert batch["input_ids"][0, :IMAGE_TOKENS].tolist() == [processor.image_token_id] * IMAGE_TOKENS
    with pytest.raises(ValueError, match="2 image parts .* 1 images"):
        processor.encode_captions(["a", "b"], [PICTURE])


def test_continued_answer_has_no_end(processor):
    prompt = processor.apply_chat_template(SHORT, continue_final_message=True)
    assert prompt.endswith(" ASSISTANT: It is a red circle.")
    batch = encode(processor, SHORT, continue_final_message=True, return_labels=False)
    assert processor.decode(batch["input_ids"][0]).endswith("circle.")
    with pytest.raises(ValueError, match="continue_final_message"):
        encode(processor, SHORT, continue_final_message=True)


@pytest.mark.parametrize("parts", [False, True])
def test_mask_of_a_continued_answer(processor, parts):
    begun = [{"type": "text", "text": "There are"}] if parts else "There are"
    conversation = [*LONG[:3], assistant(begun)]
    options = {"continue_final_message": True, "return_labels": False, "return_assistant_tokens_mask": True}
    batch = encode(processor, conversation, **options)
    mask = batch["assistant_masks"][0].bool()
    assert processor.decode(batch["input_ids"][0][mask]) == " It is a red circle.</s> There are"
    assert mask[-1]


# --- lengths --------------------------------------------------------------------------------------------------------


def test_truncation_only_takes_what_nothing_depends_on(processor):
    whole = encode(processor, SHORT)
    length = whole["input_ids"].shape[1]
    cut = encode(processor, SHORT, truncation=True, max_length=length - 2)
    for name in ("input_ids", "attention_mask", "question_ids", "labels"):
        assert cut[name][0].tolist() == whole[name][0].tolist()[:-2]
    end_of_queries = int(whole["query_positions"][0, 0]) + QUERY_TOKENS
    assert encode(processor, SHORT, truncation=True, max_length=end_of_queries)["input_ids"].shape[1] == end_of_queries
    with pytest.raises(ValueError, match=f"{length} tokens .*max_length {end_of_queries - 1} would cut"):
        encode(processor, SHORT, truncation=True, max_length=end_of_queries - 1)
    with pytest.raises(ValueError, match="row 1: .*would cut"):
        encode(processor, [TEXT_ONLY, [user(IMG, "What is it? " * 100)]], truncation=True, max_length=150)


def test_truncation_from_the_left():
    tokenizer = fast(byte_level_tokenizer(), truncation_side="left")
    processor = make(tokenizer)
    whole = encode(processor, SHORT)
    length = whole["input_ids"].shape[1]
    cut = encode(processor, SHORT, truncation=True, max_length=length - 5)
    assert cut["input_ids"][0].tolist() == whole["input_ids"][0].tolist()[5:]
    assert cut["image_positions"].tolist() == (whole["image_positions"] - 5).tolist()
    with pytest.raises(ValueError, match="would cut"):
        encode(processor, SHORT, truncation=True, max_length=IMAGE_TOKENS)


def test_prompt_longer_than_the_context():
    processor = make(fast(byte_level_tokenizer(), model_max_length=40))
    with pytest.raises(ValueError, match="model_max_length 40"):
        encode(processor, [user(IMG, "What is it? " * 50)])
    with pytest.raises(ValueError, match="max_length 50"):
        encode(processor, [user(IMG, "What is it? " * 50)], max_length=50)
    encode(processor, [user(IMG, "What is it? " * 50)], max_length=10_000)


# --- images ---------------------------------------------------------------------------------------------------------


def test_numbers_of_images_and_placeholders(processor):
    prompts = ["USER: <image>\nA?<learnable>", "USER: B?<learnable>", "USER: <image><image>\nC?<learnable>"]
    for images in ([PICTURE] * 3, [[PICTURE], [], [PICTURE] * 2]):
        assert processor(text=prompts, images=images)["pixel_values"].shape == (3, 1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"3 <image> placeholders \(row 0: 1, row 1: 0, row 2: 2\) but 2 images"):
        processor(text=prompts, images=[PICTURE] * 2)
    with pytest.raises(ValueError, match="row 1 has 0 <image> placeholders but 1 images"):
        processor(text=prompts, images=[[PICTURE], [PICTURE], [PICTURE]])
    with pytest.raises(ValueError, match="images has 2 rows, text has 3"):
        processor(text=prompts, images=[[PICTURE], [PICTURE] * 2])
    with pytest.raises(ValueError, match="3 <image> placeholders .* but 0 images"):
        processor(text=prompts)
    with pytest.raises(ValueError, match="0 <image> placeholders but 1 images"):
        processor(text=prompts[1], images=PICTURE)
    assert "pixel_values" not in processor(text=prompts, return_pixel_values=False)


def test_every_way_to_name_an_image(processor, tmp_path):
    path = tmp_path / "a.png"
    PICTURE.save(path)
    code = base64.b64encode(path.read_bytes()).decode()
    expected = encode(processor, SHORT)
    for part in (
        {"type": "image", "path": str(path)},
        {"type": "image", "url": path.as_uri()},
        {"type": "image", "image": path},
        {"type": "image", "image": np.asarray(PICTURE)},
        {"type": "image", "base64": code},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{code}"}},
        {"type": "image_url", "image_url": path.as_uri()},
    ):
        conversation = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}, SHORT[1]]
        before = repr(conversation)
        assert_same(encode(processor, conversation), expected)
        assert repr(conversation) == before
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}, SHORT[1]]
    assert_same(encode(processor, bare, images=PICTURE), expected)
    with pytest.raises(ValueError, match="1 image parts that name no image, and 0"):
        encode(processor, bare)


def test_images_alone(processor):
    assert set(processor(images=[PICTURE], return_tensors="pt")) == {"pixel_values"}
    with pytest.raises(ValueError, match="text, images, or both"):
        processor()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conversation", "cause"),
    [
        ([assistant("Hello.")], "alternate"),
        ([user("a"), user("b")], "alternate"),
        ([], "non-empty"),
        ("What?", "list of messages"),
        ([{"content": "a"}], "role"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "video"),
        ([{"role": 5, "content": "a"}], "role"),
        (["What?"], "must be a dict"),
        ([{"role": "user", "content": 5}], "content must be text"),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], "content must be text"),
        ([{"role": "user", "content": [5]}], "must be text or a dict"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must be a string, got None"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "must be a string, got 5"),
        ([{"role": "user", "content": [{"type": "image", "base64": 5}]}], "must be a string, got 5"),
        ([SHORT, 5], "row 1: a conversation is a non-empty list"),
        ([SHORT, []], "row 1: a conversation is a non-empty list"),
    ],
)
def test_malformed_conversations(processor, conversation, cause):
    with pytest.raises(ValueError, match=cause):
        encode(processor, conversation)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ a.b.c }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{{ range(10 ** 12) | list }}",
        "{{ messages[9].content.x }}",
        5,
    ],
)
def test_whatever_a_template_raises_is_a_value_error(processor, template):
    with pytest.raises(ValueError, match="chat.template") as refused:
        encode(processor, SHORT, chat_template=template)
    assert len(str(refused.value)) < 500


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["text", "image", "user", b"x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "image", "url", "base64"]), inner)
    ),
    max_leaves=6,
)
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]) | anything, "content": anything})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=anything | st.lists(message | anything, max_size=3))
def test_any_conversation_is_encoded_or_refused_in_words(processor, conversation):
    with contextlib.suppress(ValueError):
        assert "input_ids" in encode(processor, conversation, return_pixel_values=False)


def test_wrong_construction():
    tokenizer = fast(byte_level_tokenizer())
    with pytest.raises(ValueError, match="num_image_tokens"):
        FlashSlothProcessor(FlashSlothImageProcessor(), tokenizer)
    with pytest.raises(ValueError, match="'<picture>' is not in the tokenizer"):
        make(tokenizer, image_token="<picture>")


# --- tokenizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte level", "first", "always", "never", "normalizer"])
@pytest.mark.parametrize("bos", [False, True])
def test_ids_equal_the_tokenizers_own(kind, bos):
    tokenizer = byte_level_tokenizer() if kind == "byte level" else metaspace_tokenizer(kind)
    if bos:
        beginning = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[beginning])
    processor = make(fast(tokenizer))
    prompt = processor.apply_chat_template(LONG).replace("<question>", "")
    own = prompt.replace("<image>", "<image>" * IMAGE_TOKENS).replace("<learnable>", "<learnable>" * QUERY_TOKENS)
    batch = encode(processor, LONG)
    assert batch["input_ids"][0].tolist() == processor.tokenizer(own)["input_ids"]
    # The decoder drops spaces at the beginning of a text.
    without_spaces = [text.replace(" ", "") for text in questions(processor, batch) + answers(processor, batch)]
    expected = (
        "What is it?",
        "How many squares are there?",
        "It is a red circle.</s>",
        "There are three of them.</s>",
    )
    assert without_spaces == [text.replace(" ", "") for text in expected]
    forged = encode(processor, [user(IMG, "a <image> b</s>")])
    assert (forged["input_ids"] == processor.image_token_id).sum() == IMAGE_TOKENS
    assert (forged["input_ids"] == processor.tokenizer.eos_token_id).sum() == 0


def test_beginning_of_sequence_is_not_doubled():
    tokenizer = byte_level_tokenizer()
    beginning = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", beginning)])
    processor = make(fast(tokenizer))
    for prompt in ("USER: a?<learnable>", "<s>USER: a?<learnable>"):
        ids = processor(text=prompt)["input_ids"][0]
        assert ids[0] == beginning
        assert ids.count(beginning) == 1
    assert beginning not in processor(text="USER: a?<learnable>", add_special_tokens=False)["input_ids"][0]


def test_tokens_added_later_are_escaped_too():
    processor = make()
    processor.prompt_text  # noqa: B018
    processor.tokenizer.add_tokens(["<new>"], special_tokens=True)
    new = processor.tokenizer.convert_tokens_to_ids("<new>")
    assert new not in encode(processor, [user("What is <new>?")])["input_ids"]
    assert new in processor(text="USER: <new>?<learnable>", return_tensors="pt")["input_ids"]


def test_model_without_queries():
    processor = make(num_query_tokens=0)
    batch = encode(processor, LONG)
    assert "query_positions" not in batch
    assert "question_ids" not in batch
    assert processor.query_token_id not in batch["input_ids"]
    assert answers(processor, batch)[0] == " It is a red circle.</s>"
    assert "<learnable>" not in processor.apply_chat_template(LONG)


# --- saving, Auto classes, pipeline ---------------------------------------------------------------------------------


def test_saved_processor_comes_back(tmp_path):
    processor = make(
        user_header="Q:", chat_template={"default": "{{ messages[0].content }}", "plain": PLAIN_CHAT_TEMPLATE}
    )
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, FlashSlothProcessor)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    assert_same(
        loaded.encode_captions(["a dog"], [PICTURE]),
        processor.encode_captions(["a dog"], [PICTURE]),
    )
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), FlashSlothImageProcessor)


def test_default_template_is_stored_beside_the_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert "ASSISTANT:" in (tmp_path / "chat_template.jinja").read_text()
    loaded = FlashSlothProcessor.from_pretrained(tmp_path)
    assert_same(encode(loaded, LONG), encode(processor, LONG))


def test_counts_for_serving_engines(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (30, 40)])
    assert counts["num_image_tokens"] == [IMAGE_TOKENS] * 2
    assert counts["num_image_patches"] == [1, 1]


def test_pipeline(tmp_path):
    from transformers import pipeline

    from tiny_session import tiny_folder

    answer = pipeline("image-text-to-text", model=str(tiny_folder(tmp_path)), max_new_tokens=3)
    chat = [user(IMG, "What is <image>?")]
    (result,) = answer(text=chat, return_full_text=False)
    assert isinstance(result["generated_text"], str)
    prompt = answer.processor.apply_chat_template(chat, add_generation_prompt=True)
    (same,) = answer(images=[PICTURE], text=prompt, return_full_text=False)
    assert same["generated_text"] == result["generated_text"]
    batch = answer(text=[chat, [user("Hello?")]], batch_size=1, return_full_text=False)
    assert batch[0][0]["generated_text"] == result["generated_text"]


def test_image_bytes_are_read_once(processor):
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    file.seek(0)
    batch = processor(text="USER: <image>\nA?<learnable>", images=file)
    assert batch["pixel_values"].shape == (1, 1, 3, 8, 8)
