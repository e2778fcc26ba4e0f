"""`flashsloth bench run`: time to the first token, tokens a second and memory, by stopwatch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    models: Annotated[str, typer.Option(help="Names separated by commas; see `bench tokens --list`.")] = (
        "flashsloth,siglip-phi2-729"
    ),
    sizes: Annotated[str, typer.Option(metavar="WxH,...", help="Image sizes in pixels.")] = "768x768",
    images: Annotated[str, typer.Option(metavar="N,...", help="Images of a prompt.")] = "1",
    batch: Annotated[str, typer.Option(metavar="N,...", help="Prompts at a time.")] = "1",
    output_tokens: Annotated[str, typer.Option(metavar="N,...", help="Tokens of an answer.")] = "8",
    text_tokens: Annotated[int, typer.Option(help="Tokens of the prompt beside the images.", min=1)] = 32,
    dtype: Annotated[str, typer.Option(metavar="NAME,...", help="float32, bfloat16, float16.")] = "bfloat16",
    attention: Annotated[str, typer.Option(help="eager, sdpa, flash_attention_2 ...")] = "sdpa",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile encoder and decoder; static cache.")] = False,
    quantization: Annotated[
        str | None, typer.Option(help="A scheme of `flashsloth quantize`, for our own models.", show_default=False)
    ] = None,
    kernels: Annotated[
        str, typer.Option(help="auto, torch or packed (in huge pages), of our own models on a CPU as in `ask`.")
    ] = "auto",
    stock: Annotated[
        bool, typer.Option("--stock", help="Measure plain assemblies of transformers' parts instead.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="Of torch; default all cores.", min=1, show_default=False)
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Timed runs of each case.", min=1)] = 5,
    warm_up: Annotated[int, typer.Option(help="Untimed runs before them.", min=1)] = 1,
    allow_load: Annotated[bool, typer.Option(help="Keep repetitions that other processes disturbed; marked.")] = False,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Real weights of one of our models.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON; a page is written beside it.")] = Path(
        "bench.json"
    ),
) -> None:
    """Measure models at their real sizes, each in a process of its own, with random weights.

    Nothing is downloaded. A case that the output file already has is not measured again,
    so a run that was stopped goes on. Other work on the machine spoils a repetition: it is
    thrown away and repeated.

    [bold]Examples[/bold]

      flashsloth bench run --models flashsloth,siglip-phi2-729,internvl3-1b,qwen2-vl-2b

      flashsloth bench run --models flashsloth --stock          # added to the same file

      flashsloth bench run --models flashsloth-smollm2-360m --batch 1,4,16 --images 1,4
    """
    from rich.console import Console

    from flashsloth.bench.machine import cores
    from flashsloth.bench.measured import open_results, run_all, settings_of
    from flashsloth.bench.results import Measurement
    from flashsloth.bench.tables import failures, machine_line, measured_markdown, measured_tables
    from flashsloth.checkpoints.files import write_whole
    from flashsloth.checkpoints.loading import DTYPES
    from flashsloth.kernels.quantization import SCHEMES

    from ...tables import print_table, table_console
    from . import options

    console, log = table_console(), Console(stderr=True, highlight=False)
    dtypes = options.names(dtype)
    for name in dtypes:
        if name not in DTYPES:
            raise ValueError(f"--dtype has {name!r}; known are {', '.join(DTYPES)}")
    if quantization is not None and quantization not in SCHEMES:
        raise ValueError(f"--quantization is {quantization!r}; known are {', '.join(SCHEMES)}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device!r}; known are cpu and cuda")
    names = options.names(models)
    folders = dict(item.partition("=")[::2] for item in weights or ())
    strays = sorted(set(folders) - set(names))
    if strays:
        raise ValueError(f"--weights names {strays[0]!r}, which --models does not list")
    threads = threads or len(cores())
    wanted = settings_of(
        names,
        options.sizes(sizes, "--sizes"),
        options.numbers(images, "--images"),
        options.numbers(batch, "--batch"),
        options.numbers(output_tokens, "--output-tokens"),
        dtypes,
        folders,
        kernels,
        text_tokens=text_tokens,
        attention=attention,
        compile=compiled,
        quantization=quantization,
        assembly="stock" if stock else "own",
        device=device,
        threads=threads,
    )
    total, done = len(wanted), 0
    with log.status(f"0 of {total} measured") as status:

        def report(measurement: Measurement, fresh: bool) -> None:
            nonlocal done
            done += 1
            first = measurement.median("time_to_first_token") or 0.0
            line = measurement.error or f"first token after {first:.2f} s{'' if fresh else ', in the file already'}"
            style = "red" if measurement.error else "dim"
            log.print(f"{done}/{total} {measurement.settings.model}: {line}", style=style)
            status.update(f"{done} of {total} measured")

        results = run_all(
            wanted, open_results(output, device, threads), output, repetitions, warm_up, allow_load, report
        )
    for table in measured_tables(results):
        print_table(console, table)
        console.print()
    console.print(machine_line(results), style="dim")
    write_whole(output.with_suffix(".md"), measured_markdown(results))
    if failed := failures(results):
        raise ValueError(f"{len(failed)} of {total} cases have no numbers: {'; '.join(failed)}")
