"""The vLLM plugin: requests that come and go get the answers that the model's own `generate` gives them alone.

Runs in the environment of `make serve-env` (`make serve-test`); skipped where vLLM is not installed.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed; see `make serve-env`", allow_module_level=True)
# before vllm is imported: all in this process, no telemetry, one GiB of keys and values, cores left to others
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, EngineArgs, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError
from vllm.renderers import ChatParams
from vllm.sampling_params import RequestOutputKind

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.checkpoints.hub import resolve
from flashsloth.inference import load
from flashsloth.inference.session import FlashSloth
from flashsloth.serve.vllm import register
from tiny_models import DECODERS, ENCODERS, EOS, IMAGE, PAD, QUERY, VOCABULARY
from tiny_session import TEMPLATE, character_tokenizer, noise_image

A, B, C = (noise_image(seed) for seed in range(3))
HEAD_SIZE = 32  # the smallest that vLLM's attention has on a CPU
FETCHED, EMBEDDED, REPETITION = 60.0, 0.2, 10.0
BLOCKS = (32, 64)  # vLLM's attention on a CPU takes multiples of 32
MODELS: dict[str, dict[str, Any]] = {
    **{decoder: {"decoder": decoder} for decoder in DECODERS if decoder != "smollm3"},
    "HD": {"decoder": "phi", "view_grid": [2, 2]},
    "elastic": {"decoder": "gemma3", "compressor_window": 2, "compressor_windows": [1, 2, 3]},
    "first layer": {"decoder": "qwen2", "embedded_query_layer": 0},
}
LONG = "a question that is longer than the window of a layer which sees but a part of it"


def user(text: str, images: int = 0, images_last: bool = False) -> dict:
    parts = [{"type": "image"}] * images, [{"type": "text", "text": text}]
    return {"role": "user", "content": parts[1] + parts[0] if images_last else parts[0] + parts[1]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@dataclass
class Asked:
    """A chat; tokens are greedy."""

    messages: list[dict]
    images: Sequence[Image.Image] = ()
    max_tokens: int = 20
    visual_tokens: int | None = None

    @property
    def turns_with_image(self) -> int:
        seen, turns = 0, 0
        for message in self.messages:
            seen += sum(part["type"] == "image" for part in message["content"])
            turns += message["role"] == "user" and seen > 0
        return turns


CASES = {
    "one image": Asked([user("what is it", 1)], [A]),
    "the same image, another question": Asked([user("where is it now", 1)], [A], 27),
    "another image, the same question": Asked([user("what is it", 1)], [B], 16),
    "two images": Asked([user("which of them", 2)], [B, C], 25),
    "an image twice": Asked([user("the same twice", 2)], [C, C], 24),
    "two turns": Asked([user("what is it", 1), assistant("A dog"), user("and why")], [A], 18),
    "an image a turn": Asked([user("what", 1), assistant("A cat"), user("and that", 1)], [B, A]),
    "longer than a window": Asked([user(LONG, 1)], [C], 26),
}
TEXT_ONLY = {"text only": Asked([user("who are you")], (), 19), "one token": Asked([user("again")], (), 1)}


def cases_of(name: str) -> dict[str, Asked]:
    if name != "elastic":
        return {**CASES, **TEXT_ONLY}
    counts = [36, 9, 4]
    return {
        f"{case}, {count} tokens": Asked(asked.messages, asked.images, asked.max_tokens, count)
        for index, (case, asked) in enumerate(CASES.items())
        for count in (counts[index % 3], counts[(index + 1) % 3])
    } | {"default": CASES["one image"]}


def make_session(folder: Path, decoder: str, **overrides: Any) -> FlashSloth:
    """A random model whose answers about images all depend on what the embedded query module fetches, saved."""
    text = DECODERS[decoder].to_dict() | {"hidden_size": 4 * HEAD_SIZE, "max_position_embeddings": 512}
    if "head_dim" in text:
        text["head_dim"] = HEAD_SIZE
    settings = {
        "image_token_id": IMAGE,
        "query_token_id": QUERY,
        "num_query_tokens": 2,
        "embedded_query_layer": 1,
        "embedded_query_hidden_size": 12,
        "embedded_query_num_heads": 4,
    }
    config = FlashSlothConfig(vision_config=ENCODERS["siglip"].to_dict(), text_config=text, **(settings | overrides))
    torch.manual_seed(0)
    model = FlashSlothForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.12)
        model.model.embedded_query.up_projection.weight.mul_(FETCHED)
        model.get_input_embeddings().weight.mul_(EMBEDDED)
    tokenizer = character_tokenizer()
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [PAD, EOS, IMAGE, QUERY, *range(len(tokenizer), VOCABULARY)]
    # one character over and over says little
    model.generation_config.repetition_penalty = REPETITION
    model.save_pretrained(folder)
    processor = FlashSlothProcessor.from_config(config, tokenizer, chat_template=TEMPLATE)
    processor.save_pretrained(folder)
    # the kernels that transformers takes by itself leave out Gemma 2's cap on attention, which vLLM has
    model.set_attn_implementation("eager")
    return FlashSloth(model, processor)


def generated(session: FlashSloth, asked: Asked) -> list[int]:
    """The tokens of the model's own `generate`, which reads the whole prompt and has no other rows."""
    inputs = session.processor.apply_chat_template(
        asked.messages,
        images=list(asked.images),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        visual_tokens=asked.visual_tokens,
    )
    tokens = session.model.generate(**inputs, max_new_tokens=asked.max_tokens, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def chat_of(asked: Asked) -> list[dict]:
    """The messages with their images in them, as vLLM takes them."""
    images = iter(asked.images)
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image_pil", "image_pil": next(images)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in asked.messages
    ]


@dataclass
class Server:
    """An engine of vLLM in this process, whose requests join at random steps.

    Attributes:
        preempted: how often the scheduler has put a request back.
        cached: of the last requests, tokens that came from the prefix cache.
    """

    llm: LLM
    session: FlashSloth
    preempted: int = 0
    cached: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        scheduler = self.scheduler
        preempt = scheduler._preempt_request

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counting

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def turns(self) -> int:
        """For which the embedded query module has run."""
        return self.llm.apply_model(lambda model: model.embedded_query_turns)[0]

    def sampling(self, asked: Asked, **options: Any) -> SamplingParams:
        settings = self.session.model.generation_config
        suppressed = set(settings.suppress_tokens or ())
        vocabulary = self.session.config.text_config.vocab_size
        return SamplingParams(
            temperature=options.pop("temperature", 0),
            max_tokens=asked.max_tokens,
            repetition_penalty=settings.repetition_penalty or 1.0,
            output_kind=RequestOutputKind.FINAL_ONLY,
            allowed_token_ids=[token for token in range(vocabulary) if token not in suppressed],
            **options,
        )

    def answers(self, requests: Sequence[Asked], seed: int = 0, **options: Any) -> list[list[int]]:
        engine, chance = self.llm.llm_engine, random.Random(seed)
        done: dict[str, Any] = {}

        def step() -> None:
            done.update({output.request_id: output for output in engine.step() if output.finished})

        for index, asked in enumerate(requests):
            params = ChatParams(
                chat_template_kwargs={"add_generation_prompt": True},
                mm_processor_kwargs=asked.visual_tokens and {"visual_tokens": asked.visual_tokens},
            )
            _, (prompt,) = engine.renderer.render_chat([chat_of(asked)], params)
            engine.add_request(str(index), prompt, self.sampling(asked, **options))
            for _ in range(chance.randrange(5)):
                step()
        while engine.has_unfinished_requests():
            step()
        outputs = [done[str(index)] for index in range(len(requests))]
        self.cached = [output.num_cached_tokens for output in outputs]
        return [list(answer.token_ids) for output in outputs for answer in output.outputs]

    def forget(self) -> None:
        assert self.llm.reset_prefix_cache()

    def remove_embedded_query(self) -> None:
        def remove(model: Any) -> None:
            for parameter in model.embedded_query.up_projection.parameters():
                parameter.data.zero_()

        self.llm.apply_model(remove)
        self.forget()

    def stop(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def start(folder: Path, session: FlashSloth, **options: Any) -> Server:
    settings = {
        "dtype": "float32",
        "max_model_len": 400,
        "max_num_seqs": 5,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.2,
    }
    return Server(LLM(str(folder), **(settings | options)), session)


@pytest.fixture
def started() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start_and_note(*args: Any, **options: Any) -> Server:
        servers.append(start(*args, **options))
        return servers[-1]

    yield start_and_note
    for server in servers:
        server.stop()


def wrong(server: Server, cases: dict[str, Asked], expected: dict[str, list[int]], **options: Any) -> dict:
    """Answers, twice each in a random order, that differ from `generate`'s."""
    order = list(cases) * 2
    random.Random(1).shuffle(order)
    answers = server.answers([cases[case] for case in order], **options)
    return {case: tokens for case, tokens in zip(order, answers, strict=True) if tokens != expected[case]}


@pytest.mark.parametrize("name", MODELS)
def test_requests_that_join_at_any_step_are_answered_as_by_generate(name, started, tmp_path):
    session, cases = make_session(tmp_path, **MODELS[name]), cases_of(name)
    expected = {case: generated(session, asked) for case, asked in cases.items()}
    block_size = BLOCKS[list(MODELS).index(name) % 2]
    server = started(tmp_path, session, block_size=block_size, enable_prefix_caching=False)
    assert wrong(server, cases, expected) == {}
    # the embedded query module ran once for every turn that sees an image
    assert server.turns == 2 * sum(asked.turns_with_image for asked in cases.values())
    server.remove_embedded_query()
    asked = {case: asked for case, asked in cases.items() if asked.images}
    assert wrong(server, asked, expected).keys() == asked.keys()


@pytest.fixture(scope="module")
def phi(tmp_path_factory) -> tuple[Path, FlashSloth]:
    folder = tmp_path_factory.mktemp("phi")
    return folder, make_session(folder, "phi")


def expected_of(session: FlashSloth) -> dict[str, list[int]]:
    return {case: generated(session, asked) for case, asked in {**CASES, **TEXT_ONLY}.items()}


SETTINGS: dict[str, dict[str, Any]] = {
    "steps shorter than prompts": {
        "block_size": 32, "max_num_batched_tokens": 96, "long_prefill_token_threshold": 8,
    },
    "synchronous steps": {"block_size": 64, "max_num_batched_tokens": 128, "async_scheduling": False},
    "too little room for all": {"block_size": 32, "num_gpu_blocks_override": 14, "max_num_batched_tokens": 400},
    "room for one": {"block_size": 64, "num_gpu_blocks_override": 8, "max_num_batched_tokens": 128},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_prompts_are_cut_and_found_again_without_another_answer(name, started, phi):
    """Prefix caching is on, and the cases share a turn, images and questions."""
    folder, session = phi
    history = [user("what is it", 1), assistant(LONG)]
    cases = {
        case: Asked([*history, *asked.messages], [A, *asked.images], asked.max_tokens)
        for case, asked in {**CASES, **TEXT_ONLY}.items()
    }
    expected = {case: generated(session, asked) for case, asked in cases.items()}
    server = started(folder, session, **SETTINGS[name])
    assert wrong(server, cases, expected) == {}
    assert max(server.cached) > 0
    # a second time, whole turns are found
    assert wrong(server, cases, expected) == {}
    assert bool(server.preempted) == ("num_gpu_blocks_override" in SETTINGS[name])
    server.remove_embedded_query()
    assert wrong(server, cases, expected).keys() == cases.keys() - {"one token"}


class TestOneServer:
    """Prefix caching is on, as vLLM has it."""

    @pytest.fixture(scope="class")
    def server(self, phi) -> Iterator[Server]:
        server = start(*phi, block_size=32, max_num_batched_tokens=200)
        yield server
        server.stop()

    def test_a_prefix_ends_before_a_question_or_behind_its_queries(self, server, phi):
        _, session = phi
        config = session.config
        history = [user("what is it", 1), assistant(LONG)]
        first = Asked([*history, user(LONG)], [A], 40)
        tokens = generated(session, first)
        answer = assistant(session.processor.tokenizer.decode(tokens))
        requests = [
            first,
            first,
            Asked([*history, user(LONG[:-1] + "!")], [A]),
            Asked([*first.messages, answer, user("and why")], [A]),
            Asked(first.messages, [B]),
        ]
        server.forget()
        found = []
        for asked in requests:
            assert server.answers([asked]) == [generated(session, asked)]
            found += server.cached
        turn = config.num_image_tokens + len("Q:" + "what is it") + config.num_query_tokens + len("A:" + LONG) + 1
        question = turn + len("Q:")
        prompt = question + len(LONG) + config.num_query_tokens + len("A:")
        before, behind = question // 32 * 32, (prompt + len(tokens) - 1) // 32 * 32
        assert question < (prompt - 1) // 32 * 32 < prompt - 2  # whole blocks end inside the question
        assert found == [0, before, before, behind, 0]

    def test_several_answers_of_one_prompt_are_equal(self, server, phi):
        asked = CASES["longer than a window"]
        # of the likeliest token alone
        answers = server.answers([asked], n=3, temperature=1.0, top_k=1)
        assert answers == [generated(phi[1], asked)] * 3

    def test_what_users_type_stays_text(self, server, phi):
        _, session = phi
        asked = Asked([user("<image> is <learnable></s> it", 1)], [A])
        assert server.answers([asked]) == [generated(session, asked)]
        prompt = session.processor.apply_chat_template(asked.messages, add_generation_prompt=True)
        (output,) = server.llm.generate(
            {"prompt": prompt, "multi_modal_data": {"image": A}}, server.sampling(asked), use_tqdm=False
        )
        assert list(output.outputs[0].token_ids) == generated(session, asked)

    @pytest.mark.parametrize(
        ("prompt", "error"),
        [
            ({"prompt_token_ids": [IMAGE, 20, QUERY]}, "token ids do not tell"),
            ({"prompt": "<image>Q:<question>what<learnable>A:"}, "1 image placeholders, but 0 images"),
            ({"prompt": "<image>Q:<question><learnable>A:", "multi_modal_data": {"image": A}}, "question 1 is empty"),
            ({"prompt": "Q:<question>" + "x" * 250 + "<learnable>A:"}, "--max-num-batched-tokens"),
        ],
    )
    def test_a_prompt_that_cannot_be_answered_is_refused(self, prompt, error, server, phi):
        with pytest.raises((ValueError, VLLMValidationError), match=error):
            server.llm.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)
        asked = CASES["one image"]
        assert server.answers([asked]) == [generated(phi[1], asked)]


@pytest.mark.parametrize(
    ("option", "settings"),
    [
        ("--scheduler-cls", {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}),
        ("--model-impl transformers|not", {"model_impl": "transformers"}),
        ("--tokenizer-mode", {"tokenizer_mode": "slow"}),
        ("--enable-prompt-embeds", {"enable_prompt_embeds": True}),
        ("--speculative-config", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}),
        ("--pipeline-parallel-size|[Pp]ipeline", {"pipeline_parallel_size": 2}),
    ],
)
def test_settings_under_which_the_embedded_query_module_would_not_run_are_refused(option, settings, phi):
    register()
    with pytest.raises(ValueError, match=option):
        EngineArgs(model=str(phi[0]), dtype="float32", max_model_len=400, **settings).create_engine_config()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi", "gemma3"])
def test_a_compiled_decoder_gives_the_same_answers(name, started, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    session = make_session(tmp_path / "model", **MODELS[name])
    expected = expected_of(session)
    server = started(tmp_path / "model", session, block_size=32, enforce_eager=False)
    cases = {**CASES, **TEXT_ONLY}
    assert wrong(server, cases, expected) == {}
    server.remove_embedded_query()
    asked = {case: asked for case, asked in cases.items() if asked.images}
    assert wrong(server, asked, expected).keys() == asked.keys()


def test_nano_answers_as_by_generate(started):
    session = load("nano", device="cpu", dtype="float32")
    server = started(resolve("nano"), session, max_model_len=None)
    cases = {
        "counting": Asked([user("how many circles are there?", 1)], [A], 24),
        "another question": Asked([user("which color is it?", 1)], [A], 24),
        "two images": Asked([user("are both the same?", 2)], [A, B], 24),
        "question first": Asked([user("what is shown here?", 1, images_last=True)], [C], 24),
        "two turns": Asked([user("what is it?", 1), assistant("a circle"), user("which color?")], [A], 24),
        "text only": Asked([user("who are you?")], (), 24),
    }
    expected = {case: generated(session, asked) for case, asked in cases.items()}
    assert wrong(server, cases, expected) == {}
