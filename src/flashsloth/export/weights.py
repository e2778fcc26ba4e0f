"""How the weights of a graph are held: float32, float16, int8 or int4. Rewrites a traced graph, one weight at a time.

Linear layers of the encoder and the decoder and the head are quantized; compressor, projector, embedded query module
and what is not a matrix are small and keep their precision, in float16 where it holds them.

Shape suffixes: R inputs of a layer, O outputs, J blocks of inputs, k inputs of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from flashsloth_edge.engines import FEATURES

WEIGHTS = ("float32", "float16", "int8", "int4")
INT4_BLOCK = 32
# Processors without VNNI add two products in 16 bits: of inputs up to 255, weights up to this cannot pass their end.
# What passes is cut off there, without a word.
LARGEST_INT8 = 64
LARGEST_WIDENED_INT8 = 127
SMALLEST_FLOAT16 = 256  # values; smaller tensors stay as they are
MICROSOFT = "com.microsoft"
# inputs of MatMulNBits are quantized to 8 bits, block by block
INT8_ACTIVATIONS = 4
# where a traced module stood, as torch.onnx.export notes it
SCOPES_KEY = "pkg.torch.onnx.name_scopes"
# parts whose layers keep their precision
KEPT_PARTS = ("compressor", "projector", "embedded_query", "query_tokens")


@dataclass
class Report:
    """What was done: number of layers by kind, and the bytes of all weights."""

    int8: int = 0
    int4: int = 0
    float16: int = 0


def hold_weights(model: ir.Model, weights: str, integer_products: bool = True) -> Report:
    """Rewrite a traced graph in place.

    Args:
        integer_products: layers of 8 bits multiply integers; otherwise their weights are widened, for engines that
            choose by themselves how to multiply them.
        weights: one of `WEIGHTS`. With int4, layers of the decoder have 4 bits, the encoder and the head 8: they
            compute more than they read, and lose more.
    """
    report = Report()
    share_transposed(model)
    if weights == "float32":
        return report
    if weights in ("int8", "int4"):
        is_decoder = any(value.name == FEATURES for value in model.graph.inputs)
        quantized: dict[str, ir.Node] = {}
        for node in list(model.graph):
            weight = _weight_of(node)
            if weight is None or _is_kept(node):
                continue
            if weights == "int4" and is_decoder and _is_inside(node, "layers"):
                _to_int4(model, node, weight)
                report.int4 += 1
            else:
                _to_int8(model, node, weight, quantized if integer_products else None)
                report.int8 += 1
    report.float16 = _to_float16(model)
    _drop_unused(model)
    return report


def share_transposed(model: ir.Model) -> None:
    """Hold a head that is tied to the embeddings once: its matrix was transposed while the graph was traced."""
    graph = model.graph
    tables = [node.inputs[0] for node in graph if node.op_type == "Gather" and _is_matrix(node.inputs[0])]
    for node in list(graph):
        weight = _weight_of(node)
        if weight is None:
            continue
        for table in tables:
            if table is None or tuple(table.const_value.shape) != tuple(reversed(weight.const_value.shape)):
                continue
            if np.array_equal(table.const_value.numpy().T, weight.const_value.numpy()):
                transposed = ir.node("Transpose", [table], {"perm": [1, 0]}, name=f"{weight.name}_of_table")
                graph.insert_before(node, transposed)
                node.replace_input_with(1, transposed.outputs[0])
                break
    _drop_unused(model)


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 2


def _weight_of(node: ir.Node) -> ir.Value | None:
    """The matrix (R, O) of a linear layer."""
    if node.op_type != "MatMul":
        return None
    value = node.inputs[1]
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Transpose" and _is_matrix(producer.inputs[0]):
        table = producer.inputs[0]
        return ir.Value(
            name=f"{table.name}_transposed",
            const_value=ir.Tensor(np.ascontiguousarray(table.const_value.numpy().T)),
        )
    return value if _is_matrix(value) and value.const_value.dtype == ir.DataType.FLOAT else None


def _scopes(node: ir.Node) -> str:
    return str(node.metadata_props.get(SCOPES_KEY, ""))


def _is_inside(node: ir.Node, part: str) -> bool:
    return f".{part}." in _scopes(node)


def _is_kept(node: ir.Node) -> bool:
    scopes = _scopes(node)
    return any(f".{part}'" in scopes or f".{part}." in scopes for part in KEPT_PARTS)


def _register(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    value.dtype, value.shape = value.const_value.dtype, value.const_value.shape
    model.graph.register_initializer(value)
    return value


def _replace(model: ir.Model, node: ir.Node, new: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last gives its output."""
    output, replacement = node.outputs[0], new[-1].outputs[0]
    if output.dtype is not None:
        replacement.shape, replacement.dtype = output.shape, output.dtype
    model.graph.insert_before(node, new)
    output.replace_all_uses_with(replacement, replace_graph_outputs=True)
    name, output.name = output.name, f"{output.name}_replaced"
    replacement.name = name
    model.graph.remove(node, safe=True)


def _to_int8(model: ir.Model, node: ir.Node, weight: ir.Value, quantized: dict[str, ir.Node] | None) -> None:
    """Weights of 8 bits with a scale for each output; inputs are quantized when they come, a scale for all of them.

    Args:
        quantized: inputs that are quantized already, by name; None to widen the weights instead.
    """
    matrix_RO = weight.const_value.numpy()
    largest = np.float32(LARGEST_WIDENED_INT8 if quantized is None else LARGEST_INT8)
    scale_O = np.maximum(np.abs(matrix_RO).max(axis=0), np.finfo(np.float32).tiny * largest) / largest
    values_RO = np.rint(matrix_RO / scale_O).astype(np.int8)
    source, name = node.inputs[0], weight.name
    assert source is not None, "a product has two factors"
    if quantized is None:
        held = [_register(model, f"{name}_int8", values_RO), _register(model, f"{name}_scale", scale_O)]
        widen = ir.node("DequantizeLinear", held, {"axis": 1}, name=f"{node.name}_{name}_widen")
        widen.outputs[0].name = f"{node.name}_{name}_widened"
        product = ir.node("MatMul", [source, widen.outputs[0]], name=f"{node.name}_{name}_product")
        product.outputs[0].name = product.name
        _replace(model, node, [widen, product])
        return
    new: list[ir.Node] = []
    if source.name not in quantized:
        quantize = ir.node("DynamicQuantizeLinear", [source], num_outputs=3, name=f"{source.name}_quantize")
        for output, suffix in zip(quantize.outputs, ("values", "scale", "zero"), strict=True):
            output.name = f"{source.name}_{suffix}"
        quantized[source.name] = quantize
        new.append(quantize)
    values, scale, zero = quantized[source.name].outputs
    product = ir.node("MatMulInteger", [values, _register(model, f"{name}_int8", values_RO), zero])
    cast = ir.node("Cast", product.outputs, {"to": ir.DataType.FLOAT})
    scales = ir.node("Mul", [scale, _register(model, f"{name}_scale", scale_O)])
    scaled = ir.node("Mul", [cast.outputs[0], scales.outputs[0]])
    for part, suffix in ((product, "product"), (cast, "float"), (scales, "scales"), (scaled, "scaled")):
        part.name = part.outputs[0].name = f"{node.name}_{name}_{suffix}"
    _replace(model, node, [*new, product, cast, scales, scaled])


def _to_int4(model: ir.Model, node: ir.Node, weight: ir.Value) -> None:
    """Weights of 4 bits, each block of inputs of each output with a scale and a zero of its own."""
    matrix_OR = weight.const_value.numpy().T
    outputs, inputs = matrix_OR.shape
    padding = -inputs % INT4_BLOCK
    blocks_OJk = np.pad(matrix_OR, ((0, 0), (0, padding))).reshape(outputs, -1, INT4_BLOCK)
    lowest_OJ1 = np.minimum(blocks_OJk.min(axis=-1, keepdims=True), 0)
    highest_OJ1 = np.maximum(blocks_OJk.max(axis=-1, keepdims=True), 0)
    scale_OJ1 = np.maximum((highest_OJ1 - lowest_OJ1) / 15, np.finfo(np.float32).tiny)
    zero_OJ1 = np.clip(np.rint(-lowest_OJ1 / scale_OJ1), 0, 15)
    values_OJk = np.clip(np.rint(blocks_OJk / scale_OJ1) + zero_OJ1, 0, 15).astype(np.uint8)
    zero_OJ = zero_OJ1[..., 0].astype(np.uint8)
    zero_OJ = np.pad(zero_OJ, ((0, 0), (0, zero_OJ.shape[1] % 2)))
    name = weight.name
    new = ir.node(
        "MatMulNBits",
        [
            node.inputs[0],
            _register(model, f"{name}_int4", values_OJk[..., ::2] | values_OJk[..., 1::2] << 4),
            _register(model, f"{name}_scale", scale_OJ1.astype(np.float32).reshape(-1)),
            _register(model, f"{name}_zero", (zero_OJ[:, ::2] | zero_OJ[:, 1::2] << 4).reshape(-1)),
        ],
        {"K": inputs, "N": outputs, "bits": 4, "block_size": INT4_BLOCK, "accuracy_level": INT8_ACTIVATIONS},
        domain=MICROSOFT,
        name=f"{node.name}_int4",
    )
    new.outputs[0].name = f"{node.name}_int4_product"
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    _replace(model, node, [new])


def _to_float16(model: ir.Model) -> int:
    """Hold what is left of the larger tensors in float16; they are widened when they are used."""
    changed = 0
    graph = model.graph
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST_FLOAT16:
            continue
        if value.name.endswith("_scale") or not value.uses():
            continue
        array = tensor.numpy()
        if np.abs(array).max() > np.finfo(np.float16).max:
            continue
        half = _register(model, f"{value.name}_float16", array.astype(np.float16))
        for node, index in list(value.uses()):
            if node.op_type == "Gather" and index == 0:  # rows are widened after they are taken
                _widen_rows(model, node, half)
                continue
            cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT}, name=f"{node.name}_{index}_widen")
            cast.outputs[0].name = f"{node.name}_{index}_widened"
            cast.outputs[0].dtype, cast.outputs[0].shape = value.dtype, value.shape
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
        changed += 1
    return changed


def _widen_rows(model: ir.Model, node: ir.Node, half: ir.Value) -> None:
    gather = ir.node("Gather", [half, node.inputs[1]], {"axis": 0}, name=f"{node.name}_float16")
    gather.outputs[0].name = f"{node.outputs[0].name}_float16"
    cast = ir.node("Cast", gather.outputs, {"to": ir.DataType.FLOAT}, name=f"{node.name}_widen")
    cast.outputs[0].name = f"{node.outputs[0].name}_widened"
    _replace(model, node, [gather, cast])


def _drop_unused(model: ir.Model) -> None:
    graph = model.graph
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
