"""The model card of a trained folder."""

import json
from pathlib import Path

from transformers import PreTrainedModel

from .freeze import PART_NAMES, part_of
from .recipe import Recipe, StageRecipe, dump_recipe


def write_card(folder: Path, recipe: Recipe, stage: StageRecipe, model: PreTrainedModel, log: Path) -> None:
    """Write README.md: what was trained on what, for how long, to which loss, and the whole recipe."""
    sizes = dict.fromkeys(PART_NAMES, 0)
    for name, parameter in model.named_parameters():
        # DeepSpeed leaves an empty tensor where it has taken a parameter apart
        sizes[part_of(name)] += getattr(parameter, "ds_numel", parameter.numel())
    last = {}
    if log.exists():
        for line in log.read_text().splitlines():
            row = json.loads(line)
            last[row["stage"]] = row
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        f"# {recipe.output_dir.name}: FlashSloth, after stage {stage.name}",
        "",
        "| part | parameters |",
        "|---|---|",
        *(f"| {part} | {size:,} |" for part, size in sizes.items()),
        "",
        "| stage | trained | steps | images | minutes | final loss |",
        "|---|---|---|---|---|---|",
    ]
    for entry in recipe.stages:
        if entry.name in last:
            row = last[entry.name]
            lines.append(
                f"| {entry.name} | {', '.join(entry.train)} | {row['step']:,} | {row['images']:,} | "
                f"{row.get('seconds', 0) / 60:.1f} | {row['loss']:.4f} |"
            )
        if entry.name == stage.name:
            break
    lines += ["", "## Recipe", "", "```yaml", dump_recipe(recipe).rstrip(), "```", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
