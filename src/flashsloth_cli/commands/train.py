"""`flashsloth train`: a recipe, stage after stage."""

from pathlib import Path
from typing import Annotated

import typer

from flashsloth_cli import messages


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

    from flashsloth.train.recipe import load_recipe

    messages.show_log()
    settings = load_recipe(recipe, overrides)

    from transformers.utils import logging as transformers_logging

    from flashsloth.train.run import last_checkpoint, run

    transformers_logging.disable_progress_bar()  # of each file that is saved

    try:
        folder = run(settings, resume=resume)
    except KeyboardInterrupt as error:
        command = shlex.join(["flashsloth", "train", str(recipe), *(overrides or [])])
        checkpoint = last_checkpoint(settings)
        if checkpoint is None:
            raise KeyboardInterrupt(f"no checkpoint was made yet; begin again with: {command}") from error
        raise KeyboardInterrupt(f"{checkpoint} is kept; go on with: {command} --resume") from error
    logging.getLogger("flashsloth").info("trained model: %s", folder)
