"""An ONNX graph in float32 → the same graph with the int8 grid's codes and scales, exactly.

ONNX Runtime's own quantizer finds ranges anew, knows no scale a row for embedding tables, and takes the classifier
along. The checkpoint's weights lie on our grid already, so this only writes them down as codes:

    MatMul(x, W)      →  Cast(MatMulInteger(DynamicQuantizeLinear(x), codes)) · (scale of x · scale of each column)
    Gather(T, ids)    →  Cast(Gather(codes, ids)) · Gather(scale of each row, ids)

which ONNX Runtime fuses into its int8 kernels (`DynamicQuantizeMatMul`). Where ranges were measured beforehand
(int8_static), QuantizeLinear with constants stands in the place of DynamicQuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.model.grid import LARGEST_CODE

Codes = NDArray[np.int8]
Scale = NDArray[np.float32]


def quantize_graph(proto: Any, names: Mapping[str, str], ranges: Mapping[str, tuple[float, float]]) -> None:
    """Rewrite an onnx.ModelProto in place.

    names    {initializer: op type}: which to write as codes, and the op that reads them, 'MatMul' or 'Gather'.
             A MatMul's weight stands as (in, out) with a scale a column, a table as (rows, width) with a scale a row.
    ranges   {initializer: (least, most)} of what enters its MatMul; without one, the range is each batch's own.
    """
    writer = _Writer(proto.graph, ranges)
    for name, op_type in names.items():
        writer.replace_weight(name, axis=0 if op_type == "MatMul" else 1)
    nodes = [new for node in proto.graph.node for new in writer.rewritten(node, names)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def codes_of(weight: NDArray[np.float32], axis: int) -> tuple[Codes, Scale]:
    """Codes and scales of a weight that lies on the grid; `axis` is the one that shares a scale, kept with length 1."""
    largest = np.abs(weight).max(axis=axis, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(LARGEST_CODE), 1).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def activation_grid(least: float, most: float) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scale and zero point of 256 codes over least … most, 0 among them: as DynamicQuantizeLinear finds them."""
    low, high = min(least, 0.0), max(most, 0.0)
    scale = np.float32((high - low) / 255) if high > low else np.float32(1)
    return np.array(scale), np.array(np.clip(np.rint(-low / scale), 0, 255), dtype=np.uint8)


class _Writer:
    """Adds initializers to a graph and spells out the nodes that read them."""

    def __init__(self, graph: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
        self.graph, self.ranges = graph, ranges
        self.values = {value.name: value for value in graph.initializer}
        self.quantized_inputs: set[str] = set()

    def replace_weight(self, name: str, axis: int) -> None:
        from onnx import numpy_helper

        codes, scale = codes_of(numpy_helper.to_array(self.values[name]), axis)
        self.graph.initializer.remove(self.values[name])
        flat = scale.reshape(-1) if axis == 0 else scale
        self.graph.initializer.append(numpy_helper.from_array(codes, f"{name}_codes"))
        self.graph.initializer.append(numpy_helper.from_array(flat, f"{name}_scale"))

    def rewritten(self, node: Any, names: Mapping[str, str]) -> Iterator[Any]:
        if node.op_type == "MatMul" and names.get(node.input[1]) == "MatMul":
            yield from self._matmul(node)
        elif node.op_type == "Gather" and names.get(node.input[0]) == "Gather":
            yield from self._gather(node)
        else:
            yield node

    def _matmul(self, node: Any) -> Iterator[Any]:
        from onnx import TensorProto
        from onnx.helper import make_node

        (x, weight), output = node.input, node.output[0]
        quantized = [f"{x}_{part}" for part in ("codes", "scale", "zero_point")]
        if x not in self.quantized_inputs:  # q, k and v read one input: quantize it once
            self.quantized_inputs.add(x)
            yield self._quantized(x, quantized, self.ranges.get(weight))
        yield make_node("MatMulInteger", [quantized[0], f"{weight}_codes", quantized[2]], [f"{output}_sum"])
        yield make_node("Cast", [f"{output}_sum"], [f"{output}_float"], to=TensorProto.FLOAT)
        yield make_node("Mul", [quantized[1], f"{weight}_scale"], [f"{output}_scale"])
        yield make_node("Mul", [f"{output}_float", f"{output}_scale"], [output])

    def _quantized(self, x: str, names: list[str], ends: tuple[float, float] | None) -> Any:
        """The node that turns `x` into codes; the scale and zero point under the names given."""
        from onnx import numpy_helper
        from onnx.helper import make_node

        if ends is None:
            return make_node("DynamicQuantizeLinear", [x], names)
        scale, zero = activation_grid(*ends)
        self.graph.initializer.append(numpy_helper.from_array(scale, names[1]))
        self.graph.initializer.append(numpy_helper.from_array(zero, names[2]))
        return make_node("QuantizeLinear", [x, names[1], names[2]], names[:1])

    def _gather(self, node: Any) -> Iterator[Any]:
        from onnx import TensorProto
        from onnx.helper import make_node

        (table, ids), output = node.input, node.output[0]
        yield make_node("Gather", [f"{table}_codes", ids], [f"{output}_codes"])
        yield make_node("Cast", [f"{output}_codes"], [f"{output}_float"], to=TensorProto.FLOAT)
        yield make_node("Gather", [f"{table}_scale", ids], [f"{output}_scale"])
        yield make_node("Mul", [f"{output}_float", f"{output}_scale"], [output])
