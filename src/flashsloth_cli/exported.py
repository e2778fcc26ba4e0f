"""Models that `flashsloth export` wrote, for the commands that also load models of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from flashsloth_cli import messages

RUNTIMES = ("auto", "torch", "onnx")


class TorchSettings(NamedTuple):
    """Options that only torch knows, as the commands got them."""

    device: str
    dtype: str
    quantize: str | None
    compiled: bool
    share_equal_views: bool

    def ignored(self) -> list[str]:
        """Those that were given."""
        return [
            name
            for name, is_given in (
                ("--device", self.device not in ("auto", "cpu")),
                ("--dtype", self.dtype != "auto"),
                ("--quantize", self.quantize is not None),
                ("--compile", self.compiled),
                ("--share-equal-views", self.share_equal_views),
            )
            if is_given
        ]


def folder_to_run(model: str, runtime: str, settings: TorchSettings) -> Path | None:
    """The exported folder to run; None where torch runs the model.

    Raises:
        ValueError: an unknown runtime, or torch for an exported folder.
    """
    from flashsloth_edge.manifest import MANIFEST_NAME

    if runtime not in RUNTIMES:
        raise ValueError(f"there is no runtime {runtime!r}; choose from {', '.join(RUNTIMES)}")
    is_exported = (Path(model) / MANIFEST_NAME).is_file()
    if is_exported and runtime == "torch":
        raise ValueError(f"{model} was exported, and torch cannot run it; give the model it was made from")
    folder = Path(model) if is_exported else _exported_once(model) if runtime == "onnx" else None
    if folder is not None and (ignored := settings.ignored()):
        messages.say(f"warning: {', '.join(ignored)} ignored: an exported model is as it was written")
    return folder


def refuse(model: str, command: str) -> None:
    """Raises:
    ValueError: an exported folder, for a command that runs models of torch.
    """
    from flashsloth_edge.manifest import MANIFEST_NAME

    if (Path(model) / MANIFEST_NAME).is_file():
        raise ValueError(
            f"{model} was exported; use `flashsloth-edge {command}`, see `flashsloth-edge {command} --help`"
        )


def load(folder: Path) -> Any:
    """The exported model, ready to be asked."""
    import flashsloth_edge

    return flashsloth_edge.load(folder)


def check_no_form(schema: Any, choices: Any, regex: Any, confidence: bool) -> None:
    """Raises:
    ValueError: a form of answers, which an exported model does not know.
    """
    given = (("schema", schema), ("choices", choices), ("regex", regex), ("confidence", confidence or None))
    if names := [f"--{name}" for name, value in given if value is not None]:
        raise ValueError(
            f"{', '.join(names)}: exported models answer freely; use --runtime torch with the model itself"
        )


def _exported_once(model: str) -> Path:
    """The folder of a model in the cache, written at first use."""
    from rich.console import Console

    from flashsloth.checkpoints import hub
    from flashsloth.checkpoints.fingerprint import fingerprint
    from flashsloth_edge.manifest import MANIFEST_NAME

    source = hub.resolve(model)
    folder = hub.cache_folder() / "exported" / f"{source.name}-{fingerprint(source)}"
    if not (folder / MANIFEST_NAME).is_file():
        from flashsloth.export import export_folder

        folder.parent.mkdir(parents=True, exist_ok=True)
        with Console(stderr=True).status("exporting, once ...") as status:
            export_folder(source, folder, overwrite=True, on_step=lambda step: status.update(f"{step}, once ..."))
    return folder
