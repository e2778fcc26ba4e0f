"""Planted answers go through lmms-eval's own code of each benchmark and give the score computed by hand."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

pytest.importorskip("lmms_eval", reason="evaluating needs lmms-eval: pip install --no-deps lmms-eval")

from benchmark_records import ALL, GRADES
from flashsloth.evaluate.benchmarks import BENCHMARKS, PAPER
from flashsloth.evaluate.constant import ConstantAnswers
from flashsloth.evaluate.harness import load_task, quieten, task_index
from flashsloth.evaluate.judge import use_judge
from flashsloth.evaluate.scoring import run_task
from flashsloth.evaluate.verdicts import DONE, NOT_JUDGED


class _Judge(BaseHTTPRequestHandler):
    """Grades by the table of the records; reads letters and numbers out of sentences."""

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        graded = re.search(r"\| ([^|]*) \|$", question.strip())
        if graded:
            text = GRADES.get(graded.group(1), "0.0")
        elif "Extracted answer" in question:
            text = "(A)" if "option (A)" in question.rsplit("\n\n", 2)[-2] else "7"
        else:
            text = "yes"
        content = {
            "id": "1", "object": "chat.completion", "created": 0, "model": "judge",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def judge():
    server = HTTPServer(("127.0.0.1", 0), _Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("API_TYPE", "OPENAI_API_URL", "MODEL_VERSION", "OPENAI_API_KEY"):
            patch.setenv(name, "none")  # what is set below is taken back in the end
        assert use_judge(f"http://127.0.0.1:{server.server_port}/v1", "judge") == ""
        yield
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def index():
    quieten()
    return task_index(PAPER)


def test_the_suite_is_that_of_the_paper():
    assert [row.task for row in PAPER] == list(ALL)
    assert all(len(row.published) == 2 for row in PAPER)


@pytest.mark.parametrize("name", list(ALL))
def test_planted_answers_give_the_score_computed_by_hand(name, index, judge, tmp_path):
    planted, benchmark = ALL[name](), BENCHMARKS[name]
    assert len(planted.rows) >= 8
    planted.save(tmp_path, name)
    task = load_task(index, benchmark, tmp_path, {})
    result = run_task(ConstantAnswers({name: planted.answers}), benchmark, task, None, True, tmp_path)
    assert result.row["status"] == DONE, result.row["reason"]
    assert result.row["score"] == pytest.approx(planted.score, abs=0.01)
    assert [sample["prediction"] for sample in result.samples] != [sample["gold"] for sample in result.samples]
    scores = [sample["score"] for sample in result.samples]
    assert 0 < sum(score is not None and score > 0 for score in scores) < len(scores)


def test_without_a_judge_answers_are_kept_and_no_score_is_made_up(index, tmp_path):
    planted, benchmark = ALL["mmvet"](), BENCHMARKS["mmvet"]
    planted.save(tmp_path, "mmvet")
    task = load_task(index, benchmark, tmp_path, {})
    result = run_task(ConstantAnswers({"mmvet": planted.answers}), benchmark, task, None, False, tmp_path)
    assert result.row["status"] == NOT_JUDGED and "score" not in result.row
    assert [sample["prediction"] for sample in result.samples] == planted.answers
    assert {sample["score"] for sample in result.samples} == {None}
