"""quantize_graph on a graph made by hand: the codes, the scales and what ONNX Runtime answers."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from moss_rlhf.exporting.int8 import codes_of, quantize_graph

TABLE = np.array([[0.5, -1.0], [128, 2], [0, 0]], dtype=np.float32)
"""Scales a row: 1/64, 2, and 1 for the row of zeros."""
WEIGHT = np.array([[6.4, 0, 3], [-0.1, 0, -64], [3.2, 0, 32]], dtype=np.float32)


def _graph(nodes, initializers, inputs, outputs):
    graph = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _run(proto, **inputs):
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def _values(proto):
    return {value.name: numpy_helper.to_array(value) for value in proto.graph.initializer}


def test_codes_by_hand():
    codes, scale = codes_of(TABLE, axis=1)
    assert codes.tolist() == [[32, -64], [64, 1], [0, 0]]
    assert scale.tolist() == [[1 / 64], [2], [1]]
    codes, scale = codes_of(WEIGHT, axis=0)
    assert codes.tolist() == [[64, 0, 3], [-1, 0, -64], [32, 0, 32]]
    np.testing.assert_allclose(scale, [[0.1, 1, 1]], rtol=1e-7)


def test_a_table_answers_codes_times_scales_exactly():
    nodes = [helper.make_node("Gather", ["table", "ids"], ["rows"])]
    inputs = [("ids", TensorProto.INT64, ["batch", "length"])]
    proto = _graph(nodes, {"table": TABLE}, inputs, [("rows", ["batch", "length", 2])])
    quantize_graph(proto, {"table": "Gather"}, {})
    assert set(_values(proto)) == {"table_codes", "table_scale"}
    assert _values(proto)["table_codes"].dtype == np.int8
    (rows,) = _run(proto, ids=np.array([[1, 2, 0]]))
    assert rows.tolist() == [[[128, 2], [0, 0], [0.5, -1]]]


def test_a_product_is_the_integer_product_times_both_scales():
    """x = 0 … 255 in steps of 1: the runtime's own grid for it has scale 1 and zero 0, so that nothing is rounded."""
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["y"])]
    proto = _graph(
        nodes, {"weight": WEIGHT}, [("x", TensorProto.FLOAT, ["batch", "length", 3])], [("y", ["batch", "length", 3])]
    )
    quantize_graph(proto, {"weight": "MatMul"}, {})
    assert [node.op_type for node in proto.graph.node] == [
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "Cast",
        "Mul",
        "Mul",
    ]
    x = np.array([[[0, 255, 1], [7, 100, 2]]], dtype=np.float32)
    (y,) = _run(proto, x=x)
    np.testing.assert_allclose(y, x @ WEIGHT, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 5, 7)])
def test_random_products_are_near_those_in_float(shape):
    """On every processor: without VNNI the runtime adds two products in 16 bits, which codes of 127 overflow."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((7, 11), dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "q"], ["a"]),
        helper.make_node("MatMul", ["x", "k"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    inputs, outputs = [("x", TensorProto.FLOAT, ["batch", "length", 7])], [("y", ["batch", "length", 11])]
    proto = _graph(nodes, {"q": weight, "k": 2 * weight + 1}, inputs, outputs)
    x = generator.standard_normal(shape, dtype=np.float32)
    (expected,) = _run(proto, x=x)
    quantize_graph(proto, {"q": "MatMul", "k": "MatMul"}, {})
    assert [node.op_type for node in proto.graph.node].count("DynamicQuantizeLinear") == 1  # one for both readers of x
    (answered,) = _run(proto, x=x)
    assert 0 < np.linalg.norm(answered - expected) / np.linalg.norm(expected) < 0.02


def test_what_is_not_named_stays_as_it_is():
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["a"]), helper.make_node("MatMul", ["a", "head"], ["y"])]
    initializers = {"weight": WEIGHT, "head": WEIGHT.T.copy()}
    proto = _graph(nodes, initializers, [("x", TensorProto.FLOAT, [2, 3])], [("y", [2, 3])])
    quantize_graph(proto, {"weight": "MatMul"}, {})
    assert (_values(proto)["head"] == WEIGHT.T).all()
    assert [node.op_type for node in proto.graph.node].count("MatMul") == 1
