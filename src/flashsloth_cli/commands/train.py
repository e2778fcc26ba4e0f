"""`flashsloth train`: a recipe, stage after stage."""

from pathlib import Path
from typing import Annotated

import typer

INTERRUPTED = 130  # as shells count a process that SIGINT has ended


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Overrides, such as stages.finetune.batch_size=8.", show_default=False
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir.")] = False,
) -> None:
    """Train a model from a recipe.

    [bold]Examples[/bold]

      flashsloth train configs/debug/two_stages.yaml output_dir=runs/debug

      flashsloth train configs/nano/nano.yaml --resume
    """
    import logging
    import shlex

    from rich.logging import RichHandler

    from flashsloth.train.recipe import load_recipe

    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    logging.getLogger("flashsloth").setLevel(logging.INFO)
    settings = load_recipe(recipe, overrides)

    from flashsloth.train.run import last_checkpoint, run

    try:
        folder = run(settings, resume=resume)
    except KeyboardInterrupt:
        command = shlex.join(["flashsloth", "train", str(recipe), *(overrides or [])])
        checkpoint = last_checkpoint(settings)
        if checkpoint is None:
            message = f"interrupted before the first checkpoint; begin again with: {command}"
        else:
            message = f"interrupted; {checkpoint} is kept. Go on with: {command} --resume"
        typer.echo(message, err=True)
        raise typer.Exit(INTERRUPTED) from None
    logging.getLogger("flashsloth").info("trained model: %s", folder)
