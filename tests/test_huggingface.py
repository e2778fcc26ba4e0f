"""A saved model is an ordinary Hugging Face folder: Auto classes, pipeline, PEFT, placement, remote code, streams."""

import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    TextStreamer,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothModel, FlashSlothProcessor
from tiny_models import build_rows, tiny_model
from tiny_session import noise_image, tiny_folder

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"), "qwen3")


def conversation(question=QUESTION):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def prompt(processor, question=QUESTION, seed=0):
    text = processor.apply_chat_template(conversation(question), add_generation_prompt=True, tokenize=False)
    return processor(images=[noise_image(seed)], text=text, return_tensors="pt")


def test_auto_classes(folder):
    assert AutoConfig.from_pretrained(folder).model_type == "flashsloth"
    assert isinstance(AutoModel.from_pretrained(folder), FlashSlothModel)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(folder), FlashSlothForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(folder), FlashSlothProcessor)
    assert AutoImageProcessor.from_pretrained(folder).size["height"] == 24


def test_pipeline_answers_as_the_model_does(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    batch = prompt(processor)
    ids = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch["input_ids"].shape[1] :]
    pipe = pipeline("image-text-to-text", model=str(folder))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": noise_image()}, {"type": "text", "text": QUESTION}]}
    ]
    found = pipe(text=messages, max_new_tokens=4, generate_kwargs={"do_sample": False}, return_full_text=False)
    assert found[0]["generated_text"] == processor.decode(ids, skip_special_tokens=True)


def test_pipeline_batches_prompts_of_different_lengths(folder):
    """The pipeline pads after the processor has run; placeholders move and must be found again."""
    pipe = pipeline("image-text-to-text", model=str(folder))
    questions = ["What?", "What is it, and where does it stand?", "How many are there?"]
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": noise_image(seed)}, {"type": "text", "text": text}]}]
        for seed, text in enumerate(questions)
    ]

    def ask(text, **options):
        generate_kwargs = {"do_sample": False, "max_new_tokens": 5}
        return pipe(text=text, generate_kwargs=generate_kwargs, return_full_text=False, **options)

    together = ask(messages, batch_size=3)
    for message, found in zip(messages, together, strict=True):
        assert found[0]["generated_text"] == ask(message)[0]["generated_text"]


def test_streaming_gives_the_same_text(folder, capsys):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    batch = prompt(processor)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
    ids = model.generate(**batch, max_new_tokens=5, do_sample=False, streamer=streamer)
    text = processor.decode(ids[0, batch["input_ids"].shape[1] :])
    assert capsys.readouterr().out.strip() == text.strip()


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 5}, {"num_beams": 2, "num_return_sequences": 2}])
def test_sampling_and_several_answers(folder, options):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    batch = prompt(AutoProcessor.from_pretrained(folder))
    rows = options.get("num_return_sequences", 1)
    answers = model.generate(**batch, max_new_tokens=3, **options)
    assert answers.shape == (rows, batch["input_ids"].shape[1] + 3)


def test_dtype_and_device_map(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="bfloat16", device_map="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    batch = prompt(AutoProcessor.from_pretrained(folder))
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] == batch["input_ids"].shape[1] + 2


def test_parts_on_disk_answer_alike(folder, tmp_path):
    """The decoder layers are offloaded, the embedded query module is not: its hook still finds everything."""
    batch = prompt(AutoProcessor.from_pretrained(folder))
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    device_map = {"model.language_model.layers": "disk", "model.language_model.norm": "cpu", "lm_head": "cpu"}
    for name, _ in plain.model.named_children():
        if name != "language_model":
            device_map[f"model.{name}"] = "cpu"
    device_map |= {"model.language_model.embed_tokens": "cpu", "model.language_model.rotary_emb": "cpu"}
    split = AutoModelForImageTextToText.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(split(**batch).logits, plain(**batch).logits)


def test_meta_device_then_weights(folder):
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = FlashSlothForConditionalGeneration(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    loaded = FlashSlothForConditionalGeneration.from_pretrained(folder)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}


def test_lora_reaches_every_part_and_merges(folder, tmp_path):
    peft = pytest.importorskip("peft")
    batch = prompt(AutoProcessor.from_pretrained(folder))
    settings = peft.LoraConfig(
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["compressor", "projector", "query_tokens", "embedded_query"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(FlashSlothForConditionalGeneration.from_pretrained(folder), settings)
    labels = torch.where(torch.arange(batch["input_ids"].shape[1]) > 8, batch["input_ids"], -100)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch, labels=labels).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()}
    for part in ("compressor", "projector", "query_tokens", "embedded_query", "lora_A", "lora_B"):
        assert any(part in name for name in trained), part
    optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    base = FlashSlothForConditionalGeneration.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, expected)
    merged = again.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_resized_vocabulary_still_answers(folder):
    model = FlashSlothForConditionalGeneration.from_pretrained(folder)
    batch = prompt(AutoProcessor.from_pretrained(folder))
    with torch.no_grad():
        before = model(**batch).logits
        size = model.config.text_config.vocab_size
        model.resize_token_embeddings(size + 8, mean_resizing=False)
        torch.testing.assert_close(model(**batch).logits[..., :size], before)


def test_folder_with_code_loads_without_the_package(tmp_path):
    from flashsloth.remote_code import save_with_code

    source = tiny_folder(tmp_path / "plain", "qwen3")
    target = tmp_path / "with_code"
    model = FlashSlothForConditionalGeneration.from_pretrained(source)
    save_with_code(model, AutoProcessor.from_pretrained(source), target)
    script = f"""
        import sys
        sys.modules["flashsloth"] = None  # as if it were not installed
        from transformers import AutoModelForImageTextToText, AutoProcessor
        model = AutoModelForImageTextToText.from_pretrained({str(target)!r}, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained({str(target)!r}, trust_remote_code=True)
        batch = processor(images=None, text="Q:<question>hello<learnable>A:", return_tensors="pt")
        print(model(**batch).logits.sum().item(), type(model).__module__)
    """
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    total, module = done.stdout.split()
    batch = AutoProcessor.from_pretrained(source)(
        images=None, text="Q:<question>hello<learnable>A:", return_tensors="pt"
    )
    with torch.no_grad():
        assert float(total) == pytest.approx(model(**batch).logits.sum().item(), rel=1e-4)
    assert module.startswith("transformers_modules.")


def test_gradient_reaches_every_part():
    model = tiny_model("llama").train()
    batch = build_rows(model.config, [[(1, 5, 2)]])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # a softmax is blind to what is added to all its scores: these gradients are zero but for rounding
    assert all(name == "model.compressor.score.3.bias" or name.endswith("key.bias") for name in silent), silent
