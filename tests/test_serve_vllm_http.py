"""`flashsloth serve --engine vllm`: OpenAI's client and curl against the running command; what is refused.

The server runs in the environment of `make serve-env` (`make serve-test`); skipped where vLLM is not installed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
from PIL import Image
from typer.testing import CliRunner

from flashsloth.inference import load
from flashsloth_cli.main import app
from tiny_session import noise_image

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; see `make serve-env`")
KEY = "secret"
TOKENS = 16
CIRCLES = "how many circles are there?"


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def parts(text: str, *seeds: int) -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": data_url(noise_image(seed))}} for seed in seeds]
    return [*images, {"type": "text", "text": text}]


def user(text: str, *seeds: int) -> dict:
    return {"role": "user", "content": parts(text, *seeds)}


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    environment = os.environ | {
        "FLASHSLOTH_API_KEY": KEY,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "flashsloth_cli", "serve", "nano", "--engine", "vllm", "--port", "0"]
    options = ["--dtype", "float32", "--max-images", "2", "--vllm-options", "--gpu-memory-utilization 0.2"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], env=environment, stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + 600
            while (found := re.search(r"is served at (http://[\d.:]+)/v1", log.read_text())) is None:
                assert process.poll() is None, log.read_text()[-5000:]
                assert time.monotonic() < deadline, log.read_text()[-5000:]
                time.sleep(0.5)
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()[-5000:]
    assert KEY not in log.read_text()


def answered(messages: list[dict], images: list[Image.Image]) -> str:
    """By the model's own `generate`."""
    session = load("nano", device="cpu", dtype="float32")
    chat = [
        {
            "role": message["role"],
            "content": [part if part["type"] == "text" else {"type": "image"} for part in message["content"]],
        }
        for message in messages
    ]
    inputs = session.processor.apply_chat_template(
        chat, images=images or None, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = session.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return session.processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@needs_vllm
@pytest.mark.slow
class TestServer:
    @pytest.fixture
    def client(self, url):
        import openai

        return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=300, max_retries=0)

    @staticmethod
    def ask(client, *messages: dict, **options) -> str:
        answer = client.chat.completions.create(
            model="nano", messages=list(messages), **({"max_tokens": TOKENS} | options)
        )
        return answer.choices[0].message.content

    def test_the_client_gets_the_answers_of_generate(self, client):
        first = user(CIRCLES, 0)
        said = self.ask(client, first)
        assert said.strip() == answered([first], [noise_image(0)]).strip()
        two = user("are both the same?", 0, 1)
        assert self.ask(client, two).strip() == answered([two], [noise_image(0), noise_image(1)]).strip()
        turns = [first, {"role": "assistant", "content": [{"type": "text", "text": said}]}, user("which color?")]
        assert self.ask(client, *turns).strip() == answered(turns, [noise_image(0)]).strip()
        assert self.ask(client, user("who are you?")).strip() == answered([user("who are you?")], []).strip()
        stream = client.chat.completions.create(model="nano", messages=[first], max_tokens=TOKENS, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == said
        with ThreadPoolExecutor(32) as pool:
            assert list(pool.map(lambda _: self.ask(client, first), range(32))) == [said] * 32

    def test_answers_have_the_form_that_is_asked_for(self, client):
        choices = {"structured_outputs": {"choice": ["yes", "no"]}}
        assert self.ask(client, user(CIRCLES, 0), extra_body=choices) in ("yes", "no")
        schema = {
            "type": "object",
            "properties": {"count": {"enum": [0, 1, 2, 3]}},
            "required": ["count"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema}}
        answer = json.loads(self.ask(client, user(CIRCLES, 0), response_format=form, max_tokens=40))
        assert answer["count"] in (0, 1, 2, 3)

    @pytest.mark.parametrize(
        ("message", "status"),
        [
            (user(""), 400),
            (user("", 0), 400),
            (user("x " * 5000), 400),
            (user("which", 0, 1, 2), 400),
            ({"role": "assistant", "content": "x"}, 400),
            ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a"}}]}, 422),
            ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}, 422),
            ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}, 422),
            ({"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,x"}}]}, 400),
        ],
    )
    def test_what_cannot_be_answered_is_refused_and_the_next_is_answered(self, message, status, client):
        import openai

        with pytest.raises(openai.APIStatusError) as caught:
            self.ask(client, message)
        assert caught.value.status_code == status, caught.value
        assert self.ask(client, user(CIRCLES, 0))

    def test_paths_and_keys(self, url):
        def status(path: str, *options: str) -> int:
            command = ["curl", "-s", "-o", os.devnull, "-w", "%{http_code}", url + path, *options]
            return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)

        key = ("-H", f"Authorization: Bearer {KEY}")
        assert shutil.which("curl")
        for path in ("/health", "/ready", "/metrics", "/docs"):
            assert status(path) == 200
        assert status("/v1/models") == 401
        assert status("/v1/models", *key) == 200
        for path in ("/tokenize", "/load", "/server_info"):
            assert status(path, *key) == 404
        body = json.dumps({"model": "nano", "messages": [user(CIRCLES, 0)], "max_tokens": TOKENS})
        json_type = ("-H", "Content-Type: application/json", "-d", body)
        assert status("/v1/chat/completions", *json_type) == 401
        assert status("/v1/chat/completions", *key, *json_type) == 200


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--engine", "vllm", "--quantize", "int4-packed"], "--quantize does not go with --engine vllm"),
        (["--engine", "vllm", "--request-seconds", "3"], "--request-seconds does not go with --engine vllm"),
        (["--engine", "vllm", "--image-store-mib", "256"], "--image-store-mib does not go with --engine vllm"),
        (["--vllm-options", "--max-model-len 9"], "--vllm-options are for --engine vllm"),
        (["--engine", "sglang"], "there is no engine 'sglang'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, error):
    result = CliRunner().invoke(app, ["serve", *options])
    assert error in str(result.exception)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_a_missing_vllm_is_one_sentence_with_the_command():
    result = CliRunner().invoke(app, ["serve", "--engine", "vllm"])
    assert "pip install 'flashsloth[vllm]'" in str(result.exception)
