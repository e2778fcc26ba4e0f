"""A server under load: how much, how soon, in how much memory, and what a kill does; see `--help`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import machine
from rich.console import Console
from rich.progress import Progress
from serving_client import Outcome, Server, run_clients, served

from flashsloth.synthetic import SyntheticDataset

FAMILIES = {"scenes": 1.0, "charts": 1.0, "text": 1.0}  # those that need no photographs
QUESTIONS_OF_AN_IMAGE = 10
LONG_ANSWER = 32  # letters
WORKLOADS = {
    "new": "another image with every question",
    "again": f"{QUESTIONS_OF_AN_IMAGE} questions about each image, in any order",
    "long": f"another image with every question, answers of {LONG_ANSWER} letters",
}
QUANTILES = (50, 95, 99)
MEBIBYTE = 1 << 20
NO_REPLY = 30.0  # seconds after which a killed server's clients are given up

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Output = Annotated[Path, typer.Option("--output", "-o", help="JSON file; a markdown table is written beside it.")]
Model = Annotated[str, typer.Option("--model", help="As in `flashsloth serve`.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", help="More words for `flashsloth serve`, as --option=--dtype=bfloat16.", show_default=False
    ),
]
Workload = Annotated[
    str, typer.Option("--workload", help="; ".join(f"{name}: {what}" for name, what in WORKLOADS.items()) + ".")
]


class Bodies:
    """Chat requests about rendered images, others at every call.

    Args:
        workload: of `WORKLOADS`.
        model: its name at the server.
        stream: whether answers are streamed.
    """

    def __init__(self, workload: str, model: str, stream: bool) -> None:
        if workload not in WORKLOADS:
            raise typer.BadParameter(f"--workload is {workload!r}; use {', '.join(WORKLOADS)}")
        self.model, self.stream, self.workload = model, stream, workload
        self.turns = QUESTIONS_OF_AN_IMAGE if workload == "again" else 1
        self._data = SyntheticDataset("test", 1 << 30, seed=7, weights=FAMILIES, turns=self.turns)
        self._images = 0

    def take(self, count: int) -> list[bytes]:
        """So many bodies, none of an image that was asked about before."""
        bodies: list[bytes] = []
        while len(bodies) < count:
            bodies += [self.body(*pair) for pair in self.next_questions()]
        random.Random(self._images).shuffle(bodies)
        return bodies[:count]

    def next_questions(self) -> list[tuple[bytes, str]]:
        """The next image, in PNG, with each of its questions."""
        sample = self._data.sample(self._images)
        self._images += 1
        buffer = io.BytesIO()
        sample.image.save(buffer, "PNG")
        return [(buffer.getvalue(), turn.question) for turn in sample.turns[: self.turns]]

    def body(self, image: bytes, question: str) -> bytes:
        """One request."""
        parts = [{"type": "image_url", "image_url": {"url": _data_url(image)}}, {"type": "text", "text": question}]
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": parts}]}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.workload == "long":
            body |= {"max_tokens": 4 * LONG_ANSWER, "structured_outputs": {"regex": f"[a-z]{{{LONG_ANSWER}}}"}}
        return json.dumps(body).encode()


def _data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


@contextlib.contextmanager
def _servers(
    engines: Sequence[str], urls: Sequence[str], model: str, options: Sequence[str] | None
) -> Iterator[list[Server]]:
    with contextlib.ExitStack() as stack:
        found = [
            stack.enter_context(
                served(engine, [model, "--engine", engine, "--max-in-flight", "1024", *(options or ())])
            )
            for engine in engines
        ]
        for url in urls:
            name, separator, address = url.partition("=")
            found.append(Server(name, address) if separator else Server(url, url))
        yield found


def _progress() -> Progress:
    return Progress(console=Console(stderr=True))


def _run(server: Server, bodies: Sequence[bytes], clients: int, progress: Progress, key: str | None) -> dict[str, Any]:
    task = progress.add_task(f"{server.name}, {clients} clients", total=len(bodies))
    before, started = server.processor_seconds(), time.perf_counter()
    outcomes = asyncio.run(run_clients(server.url, bodies, clients, lambda outcome: progress.advance(task), key))
    seconds = time.perf_counter() - started
    progress.remove_task(task)
    good = [outcome for outcome in outcomes if outcome.error is None]
    tokens = sum(outcome.tokens for outcome in good)
    after = server.processor_seconds()
    return {
        "requests": len(outcomes),
        "failures": [outcome.error for outcome in outcomes if outcome.error is not None][:20],
        "failed": len(outcomes) - len(good),
        "requests_per_second": len(good) / seconds,
        "tokens_per_second": tokens / seconds,
        "processor_seconds_per_request": None if before is None else (after - before) / len(outcomes),
        "seconds": _quantiles([outcome.seconds for outcome in good]),
        "first_text_seconds": _quantiles([outcome.first for outcome in good if outcome.first is not None]),
        "seconds_between_texts": _quantiles([gap for outcome in good for gap in outcome.gaps]),
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{q}": float(np.percentile(values, q)) for q in QUANTILES}


@app.command("load")
def load(
    engines: Annotated[
        list[str] | None, typer.Option("--engine", help="Of `flashsloth serve`; may be repeated.", show_default=False)
    ] = None,
    urls: Annotated[
        list[str] | None,
        typer.Option("--url", help="NAME=http://... of a server that runs; may be repeated.", show_default=False),
    ] = None,
    clients: Annotated[str, typer.Option("--clients", help="Numbers of clients, with commas.")] = "1,4,16,64",
    requests: Annotated[int, typer.Option("--requests", help="Of each server, number and round.", min=1)] = 256,
    rounds: Annotated[int, typer.Option("--rounds", help="The servers take turns in each.", min=1)] = 3,
    workload: Workload = "new",
    model: Model = "nano",
    options: Options = None,
    key: Annotated[str | None, typer.Option("--key", help="API key of the servers.", show_default=False)] = None,
    output: Output = Path("serving_load.json"),
) -> None:
    """Requests/s, time to the first text and between texts, of servers that take turns.

    Every client sends its next request when the last is answered. Servers are started here (both engines where neither
    --engine nor --url is given), on this machine, which the clients share.
    """
    if not engines and not urls:
        engines = ["batching", "one-at-a-time"]
    counts = [int(count) for count in clients.split(",")]
    bodies = Bodies(workload, model, stream=True)
    cells: dict[str, dict[int, list[dict[str, Any]]]] = {}
    with _servers(engines or (), urls or (), model, options) as servers, _progress() as progress:
        warm = bodies.take(2 * max(counts))
        for server in servers:
            _run(server, warm, max(counts), progress, key)
        for _ in range(rounds):
            for count in counts:
                shared = bodies.take(requests)
                for server in servers:
                    row = _run(server, shared, count, progress, key)
                    cells.setdefault(server.name, {}).setdefault(count, []).append(row)
        ready = {server.name: server.ready_seconds for server in servers}
    report = {
        "machine": {**machine(), "load": os.getloadavg()[0]},
        "settings": {
            "workload": workload,
            "clients": counts,
            "requests": requests,
            "rounds": rounds,
            "model": model,
            "options": options or [],
        },
        "ready_seconds": ready,
        "servers": cells,
        "ratios_of_requests_per_second": _ratios(cells),
    }
    columns = ["", "clients", "requests/s", "ratio to the last", "ms to first text", "ms between texts", "failed"]
    rows = []
    last = list(cells)[-1]
    for name, by_count in cells.items():
        for count, measured in by_count.items():
            rate = statistics.median(row["requests_per_second"] for row in measured)
            ratio = report["ratios_of_requests_per_second"].get(f"{name} / {last}", {}).get(count)
            rows.append(
                [
                    name,
                    str(count),
                    f"{rate:.1f}",
                    "" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
                    *(_milliseconds(measured, what) for what in ("first_text_seconds", "seconds_between_texts")),
                    str(sum(row["failed"] for row in measured)),
                ]
            )
    write(output, report, columns, rows)


def _ratios(cells: dict[str, dict[int, list[dict[str, Any]]]]) -> dict[str, dict[int, dict[str, float]]]:
    """Of each server to the last, round by round."""
    *names, last = cells
    return {
        f"{name} / {last}": {
            count: _spread(
                [
                    own["requests_per_second"] / other["requests_per_second"]
                    for own, other in zip(rows, cells[last][count], strict=True)
                    if other["requests_per_second"]
                ]
            )
            for count, rows in cells[name].items()
        }
        for name in names
    }


def _milliseconds(measured: Sequence[dict[str, Any]], what: str) -> str:
    """Medians over the rounds of p50 / p95 / p99."""
    found = [row[what] for row in measured if row[what]]
    return (
        " / ".join(f"{1000 * statistics.median(row[f'p{q}'] for row in found):.0f}" for q in QUANTILES)
        if found
        else ""
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@app.command("one-client")
def one_client(
    engine: Annotated[str, typer.Option("--engine", help="Of `flashsloth serve`.")] = "batching",
    requests: Annotated[int, typer.Option("--requests", help="Of each round.", min=1)] = 100,
    rounds: Annotated[int, typer.Option("--rounds", help="The two take turns in each.", min=1)] = 5,
    workload: Workload = "new",
    model: Model = "nano",
    options: Options = None,
    output: Output = Path("serving_one_client.json"),
) -> None:
    """What one client waits for an answer, and what `FlashSloth.ask` takes for it in a process that is loaded."""
    from flashsloth import inference

    if workload == "long":
        raise typer.BadParameter("--workload long is for `load`; use new or again")
    session = inference.load(model)
    bodies = Bodies(workload, model, stream=False)
    measured: list[dict[str, Any]] = []
    different = 0
    with _servers([engine], (), model, options) as (server,), _progress() as progress:
        for index in range(rounds + 1):  # the first warms up
            pairs: list[tuple[bytes, str]] = []
            while len(pairs) < requests:
                pairs += bodies.next_questions()
            pairs = pairs[:requests]
            asked, answers = [], []
            for image, question in pairs:
                started = time.perf_counter()
                answers.append(session.ask(_data_url(image), question).text)
                asked.append(time.perf_counter() - started)
            shared = [bodies.body(*pair) for pair in pairs]
            task = progress.add_task(f"round {index}", total=requests)
            outcomes = asyncio.run(run_clients(server.url, shared, 1, lambda _, task=task: progress.advance(task)))
            progress.remove_task(task)
            if index:
                different += sum(own.text != text for own, text in zip(outcomes, answers, strict=True))
                served_seconds = [outcome.seconds for outcome in outcomes]
                measured.append(
                    {
                        "ask_seconds": sum(asked) / requests,
                        "served_seconds": sum(served_seconds) / requests,
                        "ratio": sum(served_seconds) / sum(asked),
                        "ratio_of_medians": statistics.median(served_seconds) / statistics.median(asked),
                        "failed": sum(outcome.error is not None for outcome in outcomes),
                    }
                )
    report = {
        "machine": {**machine(), "load": os.getloadavg()[0]},
        "settings": {"workload": workload, "requests": requests, "rounds": rounds, "model": model, "engine": engine},
        "ratio": _spread([row["ratio"] for row in measured]),
        "ratio_of_medians": _spread([row["ratio_of_medians"] for row in measured]),
        "answers_that_differ": different,
        "rounds": measured,
    }
    columns = ["", "ask, ms", "one client, ms", "ratio", "answers that differ", "failed"]
    ratio = report["ratio"]
    row = [
        f"{model}, {workload}, {engine}",
        *(
            f"{1000 * statistics.median(one[what] for one in measured):.1f}"
            for what in ("ask_seconds", "served_seconds")
        ),
        f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
        f"{different} of {rounds * requests}",
        str(sum(one["failed"] for one in measured)),
    ]
    write(output, report, columns, [row])


@app.command("memory")
def memory(
    engine: Annotated[str, typer.Option("--engine", help="Of `flashsloth serve`.")] = "batching",
    requests: Annotated[int, typer.Option("--requests", help="All together.", min=20)] = 5000,
    clients: Annotated[int, typer.Option("--clients", min=1)] = 16,
    workload: Workload = "new",
    model: Model = "nano",
    options: Options = None,
    output: Output = Path("serving_memory.json"),
) -> None:
    """Resident memory of the server after each twentieth of the requests.

    Caches grow to their limits first; give these as --option where they are larger than the run.
    """
    bodies = Bodies(workload, model, stream=True)
    samples, failed = [], 0
    with _servers([engine], (), model, options) as (server,), _progress() as progress:
        samples.append({"requests": 0, "bytes": server.resident_bytes()})
        step = requests // 20
        for index in range(20):
            row = _run(server, bodies.take(step), clients, progress, None)
            failed += row["failed"]
            samples.append({"requests": (index + 1) * step, "bytes": server.resident_bytes()})
    second_half = samples[len(samples) // 2 :]
    report = {
        "machine": {**machine(), "load": os.getloadavg()[0]},
        "settings": {
            "workload": workload,
            "requests": requests,
            "clients": clients,
            "model": model,
            "engine": engine,
            "options": options or [],
        },
        "failed": failed,
        "samples": samples,
        "growth_of_the_second_half_bytes": second_half[-1]["bytes"] - second_half[0]["bytes"],
    }
    columns = ["", "started, MiB", "a tenth, MiB", "half, MiB", "end, MiB", "most, MiB", "failed"]
    marks = [samples[0], samples[2], samples[10], samples[-1], max(samples, key=lambda sample: sample["bytes"])]
    row = [
        f"{model}, {engine}, {requests} requests, {clients} clients",
        *(f"{mark['bytes'] / MEBIBYTE:.0f}" for mark in marks),
        str(failed),
    ]
    write(output, report, columns, [row])


@app.command("kill")
def kill(
    engine: Annotated[str, typer.Option("--engine", help="Of `flashsloth serve`.")] = "batching",
    clients: Annotated[int, typer.Option("--clients", min=1)] = 32,
    restarts: Annotated[int, typer.Option("--restarts", help="Kills under load, each with a restart.", min=1)] = 3,
    model: Model = "nano",
    options: Options = None,
    output: Output = Path("serving_kill.json"),
) -> None:
    """SIGKILL under load: what clients see, and how soon another server is ready."""
    bodies = Bodies("long", model, stream=True)
    rows = []
    for _ in range(restarts):
        with _servers([engine], (), model, options) as (server,):
            rows.append({"ready_seconds": server.ready_seconds, **_kill(server, bodies.take(8 * clients), clients)})
    with _servers([engine], (), model, options) as (server,):
        last = server.ready_seconds
        again = asyncio.run(run_clients(server.url, bodies.take(clients), clients, lambda _: None))
    report = {
        "machine": {**machine(), "load": os.getloadavg()[0]},
        "settings": {"clients": clients, "restarts": restarts, "model": model, "engine": engine},
        "kills": rows,
        "ready_seconds_after": [*(row["ready_seconds"] for row in rows[1:]), last],
        "failed_after": sum(outcome.error is not None for outcome in again),
    }
    columns = ["", "answered before", "clean errors", "without an end", "ready again, s", "failed after"]
    table = [
        [
            f"{model}, {engine}, kill {index + 1}",
            str(row["answered"]),
            str(row["errors"]),
            str(row["hung"]),
            f"{report['ready_seconds_after'][index]:.1f}",
            str(report["failed_after"]) if index == len(rows) - 1 else "",
        ]
        for index, row in enumerate(rows)
    ]
    write(output, report, columns, table)


def _kill(server: Server, bodies: Sequence[bytes], clients: int) -> dict[str, Any]:
    """Kill a server when half of its requests are answered."""
    assert server.process is not None
    answered: list[Outcome] = []
    kinds: dict[str, int] = {}

    def note(outcome: Outcome) -> None:
        if outcome.error is None:
            answered.append(outcome)
            if len(answered) == len(bodies) // 2:
                server.process.kill()
        else:
            kind = outcome.error.partition(":")[0]
            kinds[kind] = kinds.get(kind, 0) + 1

    async def run() -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(run_clients(server.url, bodies, clients, note), NO_REPLY)

    asyncio.run(run())
    errors = sum(kinds.values())
    return {
        "requests": len(bodies),
        "answered": len(answered),
        "errors": errors,
        "kinds_of_errors": kinds,
        "hung": len(bodies) - len(answered) - errors,
    }


def write(output: Path, report: dict[str, Any], columns: list[str], rows: list[list[str]]) -> None:
    output.write_text(json.dumps(report, indent=2) + "\n")
    lines = [columns, ["---"] * len(columns), *rows]
    table = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    output.with_suffix(".md").write_text(table)
    typer.echo(table)


if __name__ == "__main__":
    app()
