"""From a model to a folder that runs without torch: graphs, tokenizer, manifest, and a check of what was written."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashsloth_edge.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Generation,
    Graph,
    ImageSettings,
    Manifest,
    Port,
    Sizes,
)

from ..checkpoints import hub
from ..checkpoints.files import write_json
from ..checkpoints.folder import check_destination, size_of, write_folder
from ..checkpoints.loading import load_model
from ..checkpoints.pretrained import load_processor
from ..inference.session import FlashSloth
from ..model.modeling_flashsloth import FlashSlothForConditionalGeneration
from ..model.processing_flashsloth import FlashSlothProcessor
from .check import check_export
from .prompt_layout import prompt_layout, save_tokenizer

FORMATS = ("onnx", "openvino")
WEIGHTS = ("float32", "float16", "int8", "int4")
# a file of protocol buffers ends at 2 GB; weights beyond this stand in a file beside the graph
MOST_BYTES_INSIDE = 1_500_000_000
LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino")

Step = Callable[[str], None]


def export_folder(
    name: str | os.PathLike[str],
    destination: Path,
    format: str = "onnx",
    weights: str = "float32",
    overwrite: bool = False,
    on_step: Step | None = None,
) -> Manifest:
    """Write a model as graphs that run without torch, and compare them with the model.

    Args:
        name: packaged model, folder (an adapter is merged in memory), or hub id.
        destination: folder to write; appears whole and checked, or not at all.
        format: one of `FORMATS`.
        weights: one of `WEIGHTS`.
        overwrite: replace a folder that is not empty.
        on_step: called with what is about to be done.

    Returns:
        the manifest, with what the check found.

    Raises:
        ValueError: an unknown format or kind of weights; a model that is quantized already; a chat template that
            cannot be cut; graphs that do not agree with the model.
        ImportError: without onnx, onnxscript or onnxruntime.
        OSError: no such model; a destination in use.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}; known are {', '.join(WEIGHTS)}")
    import_exporter(format)
    tell = on_step or (lambda _: None)
    source = hub.resolve(name)
    check_destination(source, destination, overwrite)
    tell("loading the model")
    model = load_model(source, "float32").eval()
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{source} is quantized already; export the folder it was made from, with --weights")
    processor = load_processor(source)
    written: list[Manifest] = []

    def write(folder: Path) -> None:
        written.append(write_export(model, processor, folder, format, weights, os.fspath(name), tell))

    write_folder(destination, overwrite, write, 2 * size_of(source))
    return written[0]


def write_export(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    folder: Path,
    format: str,
    weights: str,
    source: str,
    tell: Step = lambda _: None,
) -> Manifest:
    """Write a loaded model to an existing empty folder and check it; arguments and errors as `export_folder`."""
    from .graphs import trace_decoder, trace_vision

    save_tokenizer(processor, folder / TOKENIZER_NAME)
    graphs = []
    for name, trace in (("vision", trace_vision), ("decoder", trace_decoder)):
        tell(f"tracing {name}")
        program, _ = trace(model)
        tell(f"writing {name}, weights {weights}")
        graphs.append(save_graph(program.model, folder, name, format, weights))
        del program
    manifest = describe(model, processor, graphs[0], graphs[1], format, weights, source)
    write_json(folder / MANIFEST_NAME, manifest.to_dict())
    tell("comparing answers with the model")
    found = check_export(FlashSloth(model, processor), folder, exact=weights == "float32")
    manifest = Manifest(**{**vars(manifest), "check": found})
    write_json(folder / MANIFEST_NAME, manifest.to_dict())
    return manifest


def save_graph(model: Any, folder: Path, name: str, format: str, weights: str) -> Graph:
    """Hold the weights of a traced graph as asked, write it, and describe its inputs and outputs."""
    import onnx_ir as ir

    from .graphs import CACHE_NAMES, DYNAMIC_NAMES
    from .weights import hold_weights

    hold_weights(model, weights, integer_products=format == "onnx")
    for node in model.graph:  # how the module was written; as large as small weights
        node.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    num_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    file = folder / f"{name}.onnx"
    if num_bytes > MOST_BYTES_INSIDE:
        ir.save(model, file, external_data=f"{file.name}.data")
    else:
        ir.save(model, file)
    if format == "openvino":
        file = _convert(file)

    def port(value: Any, names: dict[int, str]) -> Port:
        sizes = enumerate(value.shape)
        shape = [names.get(axis, size if isinstance(size, int) else str(size)) for axis, size in sizes]
        return Port(value.name, str(value.dtype).lower(), shape)

    inputs = [port(value, DYNAMIC_NAMES.get(value.name, CACHE_NAMES)) for value in model.graph.inputs]
    outputs = [port(value, {}) for value in model.graph.outputs]
    return Graph(file.name, inputs, outputs)


def _convert(file: Path) -> Path:
    """OpenVINO's files instead of a graph of ONNX."""
    import openvino

    converted = file.with_suffix(".xml")
    openvino.save_model(openvino.convert_model(file), converted, compress_to_fp16=False)
    for path in (file, file.with_name(f"{file.name}.data")):
        path.unlink(missing_ok=True)
    return converted


def describe(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    vision: Graph,
    decoder: Graph,
    format: str,
    weights: str,
    source: str,
) -> Manifest:
    """The manifest of a model, before it is checked."""
    config, images, own = model.config, processor.image_processor, model.generation_config
    cache = [[int(port.shape[1]), int(port.shape[3])] for port in decoder.inputs if port.name.startswith("past_")]
    eos = own.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else processor.tokenizer.pad_token_id
    import flashsloth

    versions = {"flashsloth": flashsloth.__version__}
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is not None:
            versions[library] = importlib.metadata.version(library)
    return Manifest(
        format_version=FORMAT_VERSION,
        format=format,
        weights=weights,
        source=source,
        versions=versions,
        vision=vision,
        decoder=decoder,
        sizes=Sizes(
            views=config.num_views,
            channels=config.vision_config.num_channels,
            height=config.image_height,
            width=config.image_width,
            patches=config.num_views * config.num_patches_per_view,
            feature_width=config.vision_config.hidden_size,
            text_width=config.text_config.hidden_size,
            visual_tokens=config.num_image_tokens,
            visual_token_choices=list(config.visual_token_choices),
            query_tokens=config.num_query_tokens,
            context=config.text_config.max_position_embeddings,
            cache=cache,
        ),
        prompt=prompt_layout(processor),
        images=ImageSettings(
            view_grid=images.view_grid,
            do_pad=images.do_pad,
            resample=images.resample,
            rescale_factor=images.rescale_factor if images.do_rescale else None,
            mean=images.image_mean if images.do_normalize else None,
            std=images.image_std if images.do_normalize else None,
            padding_color=[int(255 * value) for value in images.image_mean],
            alpha_background=images.alpha_background,
            max_pixels=images.max_pixels,
            max_bytes=images.max_bytes,
        ),
        generation=Generation(
            eos_token_ids=[] if eos is None else [eos] if isinstance(eos, int) else list(eos),
            pad_token_id=pad or 0,
            suppress_tokens=list(own.suppress_tokens or ()),
            max_new_tokens=own.max_new_tokens,
            do_sample=bool(own.do_sample),
            temperature=_or(own.temperature, 1.0),
            top_k=_or(own.top_k, 50),
            top_p=_or(own.top_p, 1.0),
            repetition_penalty=_or(own.repetition_penalty, 1.0),
        ),
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def import_exporter(format: str) -> None:
    """Raises:
    ImportError: what an export needs is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "an export needs onnx, onnxscript and onnxruntime; pip install 'flashsloth[export]'"
        ) from error
    if format == "openvino":
        try:
            import openvino  # noqa: F401
        except ImportError as error:
            raise ImportError("this format needs openvino; pip install 'flashsloth[openvino]'") from error
