"""Where the page's answers come from; the page itself is tested in a browser by test_web_page.py."""

import json

import pytest

httpx = pytest.importorskip("httpx")
from flashsloth.inference import load  # noqa: E402
from flashsloth.serve.requests import Finished, Piece, Usage  # noqa: E402
from flashsloth.web.sources import Cost, InProcess, Remote, Turn  # noqa: E402
from flashsloth_cli.main import main  # noqa: E402
from tiny_session import noise_image, tiny_folder  # noqa: E402

TURNS = [Turn("what?", "red"), Turn("and now?")]


def remote(answer):
    source = Remote("http://server/v1/", "secret")
    source._client = httpx.Client(transport=httpx.MockTransport(answer), headers=source._client.headers)
    return source


def events(*chunks):
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


def test_a_server_is_asked_and_tells_what_it_took():
    asked = []

    def answer(request):
        asked.append(request)
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "one"}, {"id": "two"}]})
        usage = {"prompt_tokens": 20, "prompt_tokens_details": {"image_tokens": 16}}
        chunks = [
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"content": "blue "}}]},
            {"choices": [{"delta": {"content": "sky"}}]},
            {"choices": [{"delta": {}, "finish_reason": "length"}]},
            {"choices": [], "usage": usage, "timings": {"queue": 9.0, "encode": 0.5}},
        ]
        return httpx.Response(200, content=events(*chunks))

    source = remote(answer)
    assert source.models() == ["one", "two"]
    *pieces, cost = source.answer("two", [noise_image(), noise_image(1)], TURNS, None)
    assert pieces == ["blue ", "sky"]
    assert cost == Cost(16, None, {"encode": 0.5}, True)
    body = json.loads(asked[-1].content)
    assert body["model"] == "two" and body["stream"] and asked[-1].headers["authorization"] == "Bearer secret"
    kinds = [[part["type"] for part in message["content"]] for message in body["messages"]]
    assert kinds == [["image_url", "image_url", "text"], ["text"], ["text"]]
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert source.explain("two", [noise_image()], TURNS, None) is None


def refuse(request):
    raise httpx.ConnectError("refused", request=request)


@pytest.mark.parametrize(
    "answer, message",
    [
        (refuse, "does not answer"),
        (lambda request: httpx.Response(401, json={"error": {"message": "the API key is wrong"}}), "key is wrong"),
        (lambda request: httpx.Response(500, text="oops"), "status 500: oops"),
    ],
)
def test_what_is_wrong_with_a_server_is_told(answer, message):
    with pytest.raises(OSError, match=message):
        remote(answer).models()
    with pytest.raises(OSError, match=message):
        list(remote(answer).answer("one", [], TURNS, None))


def test_a_stream_that_breaks_off_and_a_page_that_is_no_list_of_models():
    broken = remote(lambda request: httpx.Response(200, content=events({"error": {"message": "out of memory"}})))
    with pytest.raises(OSError, match="broke off: out of memory"):
        list(broken.answer("one", [], TURNS, None))
    with pytest.raises(OSError, match="ends with /v1"):
        remote(lambda request: httpx.Response(200, text="<html>")).models()


class Scripted:
    """An engine whose tickets say what they are told."""

    def __init__(self, *events):
        self.events, self.requests, self.cancelled = list(events), [], False

    def submit(self, request):
        self.requests.append(request)
        return self

    def get(self):
        return self.events.pop(0)

    def cancel(self):
        self.cancelled = True


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return load(tiny_folder(tmp_path_factory.mktemp("tiny") / "m", compressor_windows=[2, 3], compressor_window=3))


def test_an_engine_of_this_process(session):
    seconds = {"queue": 1.0, "encode": 0.25, "decode": 0.5}
    engine = Scripted(Piece("a"), Piece("b"), Finished("stop", Usage(9, 0, 8, 2, seconds)))
    source = InProcess({"tiny": (engine, session)}, 7)
    assert source.models() == ["tiny"] and source.token_choices("tiny") == [4, 9]  # the model's own first
    *pieces, cost = source.answer("tiny", [noise_image(), noise_image(1)], TURNS, 9)
    assert pieces == ["a", "b"] and cost == Cost(8, 72, {"encode": 0.25, "decode": 0.5}, False)
    (request,) = engine.requests
    assert len(request.images) == 2 and request.visual_tokens == 9 and request.sampling.max_tokens == 7
    assert [message["role"] for message in request.messages] == ["user", "assistant", "user"]
    explanation = source.explain("tiny", [noise_image()], [*TURNS[:-1], Turn("and now?", "sky")], 9)
    assert explanation.answer == "sky" and explanation.question == "and now?" and explanation.visual_tokens == 9


def test_an_answer_that_nobody_waits_for_is_given_up(session):
    engine = Scripted(Piece("a"), Piece("b"))
    answer = InProcess({"tiny": (engine, session)}).answer("tiny", [], TURNS, None)
    assert next(answer) == "a" and not engine.cancelled
    answer.close()
    assert engine.cancelled


def test_commands_say_what_is_missing(monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    for command in (["web", "--no-open"], ["serve", "--page", "--port", "0"]):
        assert main(command) == 2
        assert "pip install 'flashsloth[web]'" in capsys.readouterr().err
    monkeypatch.setattr("flashsloth_cli.options.has_page", lambda wanted: True)
    assert main(["web", "nano", "--url", "http://127.0.0.1:1/v1"]) == 2
    assert "takes the place of models" in capsys.readouterr().err
