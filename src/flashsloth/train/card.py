"""The model card of a trained folder, and the picture of its loss."""

import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoints.adapters import BASE_FILE, CARD_FILE
from ..checkpoints.files import read_json, replace_file, write_json
from ..data.recipe import DataRecipe, MixtureData, SyntheticData, WebdatasetData
from .callbacks import read_log
from .freeze import PartCount
from .recipe import SAMPLES_FILE, Recipe, StageRecipe, dump_recipe

CURVE_FILE = "loss.png"
# The curve is smoothed over this share of its points, which leaves its course and takes its noise.
SMOOTH_POINTS = 100


def write_card(folder: Path, recipe: Recipe, stage: StageRecipe, counts: Sequence[PartCount], log: Path) -> None:
    """Write README.md and loss.png: what was trained on what, for how long, by which code, and the whole recipe.

    Args:
        folder: of the trained model, or of the adapter.
        stage: the last one so far.
        counts: parameters of the model in that stage.
        log: the run's log.jsonl; what `record_samples` has written lies beside it.
    """
    rows = read_log(log)
    counts_file = log.with_name(SAMPLES_FILE)
    samples = read_json(counts_file) if counts_file.exists() else {}
    done = recipe.stages[: [entry.name for entry in recipe.stages].index(stage.name) + 1]
    has_curve = plot_losses(rows, [entry.name for entry in done], folder / CURVE_FILE)
    base = read_json(folder / BASE_FILE)["name"] if stage.lora is not None else None
    lines = [*_metadata(recipe, base), f"# {recipe.output_dir.name}: FlashSloth, after stage {stage.name}", ""]
    if stage.lora is not None:
        lines += [
            f"A LoRA adapter (rank {stage.lora.rank}, alpha {stage.lora.alpha:g}) for the base model `{base}`; it "
            "holds the parts that were trained in full as well. `flashsloth merge` makes a whole model of it.",
            "",
        ]
    lines += [*_parts(counts, is_adapter=base is not None), *_stages(done, rows)]
    if has_curve:
        lines += [f"![Loss by step, stage by stage]({CURVE_FILE})", ""]
    lines += [*_data(recipe, done, samples), *_software()]
    lines += ["## Recipe", "", "```yaml", dump_recipe(recipe).rstrip(), "```", ""]
    (folder / CARD_FILE).write_text("\n".join(lines), encoding="utf-8")


def record_samples(folder: Path, stage: str, samples: int) -> None:
    """Note in the run's folder how many samples the data of a stage holds, for the card."""
    path = folder / SAMPLES_FILE
    counts = {**(read_json(path) if path.exists() else {}), stage: samples}
    replace_file(path, lambda staging: write_json(staging, counts))


def plot_losses(rows: Sequence[dict[str, Any]], stages: Sequence[str], path: Path) -> bool:
    """Draw the loss of each stage over its steps; returns whether there was anything to draw."""
    by_stage = {name: [row for row in rows if row["stage"] == name] for name in stages}
    present = {name: points for name, points in by_stage.items() if points}
    if not present:
        return False
    # the figure is made without pyplot, which would keep it and look for a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(present), 3.2), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(present), squeeze=False)[0], present.items(), strict=True):
        steps, losses = [row["step"] for row in points], [row["loss"] for row in points]
        axes.plot(steps, losses, linewidth=0.8, alpha=0.5, color="tab:blue")
        axes.plot(steps, _smoothed(losses), linewidth=1.6, color="tab:blue")
        axes.set(title=name, xlabel="optimiser step", ylabel="loss", yscale="log" if min(losses) > 0 else "linear")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
    return True


def _smoothed(values: Sequence[float]) -> list[float]:
    """A trailing mean."""
    window = max(1, len(values) // SMOOTH_POINTS)
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def _metadata(recipe: Recipe, base: str | None) -> list[str]:
    """The fields that hubs read."""
    lines = ["---", f"library_name: {'transformers' if base is None else 'peft'}", "pipeline_tag: image-text-to-text"]
    if recipe.license is not None:
        lines.append(f"license: {recipe.license}")
    model = recipe.model
    origins = [base] if base is not None else [model.checkpoint, model.vision, model.language]
    # a hub knows repositories by owner/name; folders of this machine and packaged models mean nothing to it
    names = [name for name in origins if isinstance(name, str) and "/" in name and not Path(name).exists()]
    if names:
        lines += ["base_model:", *(f"- {name}" for name in names)]
        if len(names) == 1:
            lines.append(f"base_model_relation: {'finetune' if base is None else 'adapter'}")
    return [*lines, "tags:", "- flashsloth", "---"]


def _parts(counts: Sequence[PartCount], is_adapter: bool) -> list[str]:
    if not is_adapter:
        rows = [f"| {count.name} | {count.trainable + count.frozen:,} |" for count in counts]
        return ["| part | parameters |", "|---|---|", *rows, ""]
    rows = [f"| {count.name} | {count.trainable:,} | {count.frozen:,} |" for count in counts]
    return ["| part | in the adapter | in the base model |", "|---|---|---|", *rows, ""]


def _stages(stages: Sequence[StageRecipe], rows: Sequence[dict[str, Any]]) -> list[str]:
    last = {row["stage"]: row for row in rows}
    lines = [
        "## Training",
        "",
        "| stage | trained | learning rate | steps | images | tokens | minutes | peak memory | final loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in stages:
        if stage.name not in last:
            continue
        row = last[stage.name]
        tokens = f"{row['tokens']:,}" if "tokens" in row else "not counted"
        memory = f"{row['peak_memory_gb']:.2f} GB" if "peak_memory_gb" in row else "not measured"
        trained = ", ".join(stage.train) + (" (LoRA)" if stage.lora is not None else "")
        lines.append(
            f"| {stage.name} | {trained} | {stage.learning_rate:g} | {row['step']:,} | {row['images']:,} | {tokens} | "
            f"{row.get('seconds', 0) / 60:.1f} | {memory} | {row['loss']:.4f} |"
        )
    return [*lines, ""]


def _data(recipe: Recipe, stages: Sequence[StageRecipe], samples: dict[str, int]) -> list[str]:
    lines = ["## Data", "", "| stage | source | samples |", "|---|---|---|"]
    for stage in stages:
        number = f"{samples[stage.name]:,}" if stage.name in samples else "a stream"
        lines.append(f"| {stage.name} | {describe_source(stage.data, recipe.data)} | {number} |")
    return [*lines, ""]


def describe_source(name: str, data: dict[str, DataRecipe]) -> str:
    """A source of data in one line; a mixture with its parts and their weights."""
    source = data[name]
    if isinstance(source, MixtureData):
        parts = (f"{weight:g} x {describe_source(part, data)}" for part, weight in source.sources.items())
        return f"{name}: {'; '.join(parts)}"
    if isinstance(source, SyntheticData):
        weights = ", ".join(f"{family} {weight:g}" for family, weight in source.weights.items())
        return f"{name}: images rendered by flashsloth.synthetic ({weights}), seed {source.seed}"
    place = source.shards if isinstance(source, WebdatasetData) else source.path
    return f"{name}: {source.kind} `{place}`"


def _software() -> list[str]:
    packages = ("flashsloth", "torch", "transformers", "accelerate", "peft")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    commit = code_commit(Path(__file__).parent)
    return ["## Software", "", f"{versions}{'' if commit is None else f'; commit {commit} of the code'}.", ""]


def code_commit(folder: Path) -> str | None:
    """The commit a folder is at, marked where files differ from it; None outside git."""
    # only files that git knows: a package installed into some project's folder is not that project's
    command = ["git", "-C", str(folder)]
    try:
        subprocess.run([*command, "ls-files", "--error-unmatch", "."], check=True, capture_output=True, timeout=30)
        commit = subprocess.run(
            [*command, "rev-parse", "HEAD"], check=True, capture_output=True, text=True, timeout=30
        ).stdout.strip()
        changed = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"], check=True, capture_output=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} with local changes" if changed else commit
