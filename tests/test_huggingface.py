"""A saved model is an ordinary Hugging Face folder: Auto classes, pipeline, PEFT, placement, remote code, streams."""

import copy
import io
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    TextStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothModel, FlashSlothProcessor
from flashsloth.model.embedded_query import INPUTS_KEYWORD
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
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert isinstance(auto_class.from_pretrained(folder), FlashSlothForConditionalGeneration)
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


def test_pipeline_from_any_to_any(folder, monkeypatch):
    # it insists on torchvision for any model that sees, which this one does not use
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": noise_image()}, {"type": "text", "text": QUESTION}]}
    ]
    options = {"generate_kwargs": {"do_sample": False, "max_new_tokens": 4}, "return_full_text": False}
    expected = pipeline("image-text-to-text", model=str(folder))(text=messages, **options)
    found = pipeline("any-to-any", model=str(folder))(text=messages, **options)
    assert found[0]["generated_text"] == expected[0]["generated_text"]


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


ROWS = [[(1, 5, 2), (0, 3, 1)], [(0, 4, 0)], [(2, 2, 3)]]


def implementations(model):
    """What each part uses, by its own account, its layers' and that of the configuration."""
    base = model.model
    vision, text = base.vision_tower, base.language_model
    for part, layer, config in (
        (vision, vision.encoder.layers[0].self_attn, model.config.vision_config),
        (text, text.layers[0].self_attn, model.config.text_config),
    ):
        found = {part.config._attn_implementation, layer.config._attn_implementation, config._attn_implementation}
        assert len(found) == 1
        yield found.pop()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"vision_config": "eager"}, ["eager", "sdpa"]),
        ({"text_config": "eager"}, ["sdpa", "eager"]),
        ({"vision_config": "eager", "text_config": "eager"}, ["eager", "eager"]),
        ("eager", ["eager", "eager"]),
    ],
)
def test_attention_is_chosen_by_part(folder, tmp_path, caplog, chosen, expected):
    model = FlashSlothForConditionalGeneration.from_pretrained(folder)
    whole = model.config.vision_config
    model.set_attn_implementation(chosen)
    assert list(implementations(model)) == expected
    assert model.config.vision_config is whole
    assert "without finding the associated sub-model" not in caplog.text
    loaded = FlashSlothForConditionalGeneration.from_pretrained(folder, attn_implementation=chosen)
    assert list(implementations(loaded)) == expected
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vision_config.num_hidden_layers == whole.num_hidden_layers
    base = FlashSlothModel(model.config)
    base.set_attn_implementation({"vision_config": "sdpa"})
    assert base.vision_tower.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation({"vision_config": "nonsense"})
    assert model.config.vision_config is whole


def test_labels_that_are_already_shifted():
    model = tiny_model("llama")
    batch = build_rows(model.config, ROWS)
    labels = batch["input_ids"].masked_fill(batch["question_ids"] > 0, -100)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    other = torch.full_like(labels, 11)
    with torch.no_grad():
        for more in ({}, {"loss_only": True}, {"num_items_in_batch": torch.tensor(50)}):
            expected = model(**batch, labels=labels, **more).loss
            torch.testing.assert_close(model(**batch, shift_labels=shifted, **more).loss, expected)
            torch.testing.assert_close(model(**batch, labels=other, shift_labels=shifted, **more).loss, expected)
            assert not torch.allclose(model(**batch, labels=labels, shift_labels=other, **more).loss, expected)
        model.head_loss = lambda model, hidden_ND, labels_N, items: labels_N.float().sum()
        kept = shifted[shifted != -100].sum()
        assert model(**batch, shift_labels=shifted, loss_only=True).loss == kept
    model.head_loss = None
    with pytest.raises(ValueError, match="loss_only needs labels"):
        model(**batch, loss_only=True)


def test_predictions_of_the_trainer_are_logits(tmp_path):
    model = tiny_model("llama")
    rows = [build_rows(model.config, [turns], seed=seed) for seed, turns in enumerate(([(1, 5, 2)], [(2, 3, 1)]))]
    settings = {"report_to": [], "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=1, **settings)
    seen = []

    def metrics(evaluated):
        seen.append(evaluated)
        return {"rows": len(evaluated.predictions)}

    data = [{**row, "labels": row["input_ids"]} for row in rows]
    trainer = Trainer(model, arguments, data_collator=lambda one: one[0], compute_metrics=metrics)
    predicted = trainer.predict(data)
    assert trainer.evaluate(data)["eval_rows"] == 2
    for logits in (predicted.predictions, seen[-1].predictions):
        assert isinstance(logits, np.ndarray)
        assert logits.shape[-1] == model.config.text_config.vocab_size
        for row, found in zip(rows, logits, strict=True):
            with torch.no_grad():
                expected = model(**row).logits[0]
            torch.testing.assert_close(torch.from_numpy(found[: len(expected)]), expected)
    assert predicted.metrics["test_loss"] > 0


@pytest.mark.parametrize("decoder", ["llama", "phi"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_either_kind_gives_the_same_gradients(decoder, use_reentrant):
    plain = tiny_model(decoder, compressor_dropout=0.0).train()
    batch = build_rows(plain.config, ROWS)
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    gradients = []
    for each in (plain, model):
        each(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert "model.vision_tower.embeddings.patch_embedding.weight" in gradients[0]
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-4, msg=name)


def test_image_features_with_what_the_encoder_keeps():
    model = tiny_model("llama", "clip", view_grid=[1, 2])
    pixels = build_rows(model.config, [[(2, 2, 1)]])["pixel_values"]
    plain = model.get_image_features(pixels)
    assert isinstance(model.get_image_features(pixels, return_dict=False), tuple)
    model.set_attn_implementation({"vision_config": "eager"})
    output = model.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(output.pooler_output, plain.pooler_output)
    kept = len(model.model.vision_tower.encoder.layers)
    assert len(output.hidden_states) == kept + 1 and len(output.attentions) == kept
    for states in output.hidden_states:
        assert states.shape == plain.last_hidden_state.shape == (2, 3 * 36, 24)
    torch.testing.assert_close(output.hidden_states[-1], plain.last_hidden_state)


def test_the_head_of_a_tied_model_is_cut_as_its_embeddings_are():
    """In tensor parallel: they are one weight."""
    model = tiny_model("qwen2")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.tp_plan["model.language_model.embed_tokens"] == "embedding_rowwise"
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    assert tiny_model("phi").tp_plan["lm_head"] == "colwise_gather_output"


def test_the_decoder_can_be_exported_as_a_component():
    """Exporters call the whole, catch a component's inputs, and change and rebuild them."""
    model = tiny_model("qwen3")
    caught = {}
    layer = model.model.language_model.layers[model.config.embedded_query_layer]
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: caught.update(hidden=args[0], inputs=kwargs[INPUTS_KEYWORD]),
        with_kwargs=True,
        prepend=True,
    )
    with torch.no_grad():
        model(**build_rows(model.config, [[(1, 5, 2)]]))
    hook.remove()
    module, hidden, inputs = model.model.embedded_query, caught["hidden"], caught["inputs"]
    expected = module(hidden, inputs)
    for name, value in vars(inputs).items():
        setattr(inputs, name, value.clone())
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (hidden, inputs)), file)
    file.seek(0)
    with torch.serialization.safe_globals([type(inputs)]):
        torch.testing.assert_close(torch.export.load(file).module()(hidden, inputs), expected)
