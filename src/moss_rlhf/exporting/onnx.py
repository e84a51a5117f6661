"""ONNX for ONNX Runtime on the CPU: float32, or the int8 grid of a quantized checkpoint, exactly.

int8 is dynamic: weights are stored as codes and scales, the runtime quantizes activations by each batch's range.
Every export is held against PyTorch on real rows before it counts: the weights bit for bit, the logits within a bound.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.errors import ModelError, MossError
from moss_rlhf.exporting.int8 import quantize_graph
from moss_rlhf.files import new_directory
from moss_rlhf.model.anatomy import anatomy_of
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.config import KEY
from moss_rlhf.model.fingerprint import network_digest
from moss_rlhf.model.grid import quantized_weights
from moss_rlhf.model.runtime import Batch, OnnxRuntime, TorchRuntime
from moss_rlhf.tasks.batching import padding_of

FILE = "model.onnx"
_OPSET = 20
_FLOAT_TOLERANCE = 1e-3
_INT8_TOLERANCE = 0.5  # activations in 8 bits, of a graph that was right in float32


def export_onnx(
    model: Model, place: Path, batches: Sequence[Batch], float_file: Path | None = None
) -> dict[str, object]:
    """Write `place`/model.onnx with the tokenizer and config beside it, whole or not at all; returns the facts.

    batches      real tokenized batches to hold the file against PyTorch with.
    float_file   where to leave the float32 file that an int8 file is made of, to compare speeds with.
    raises       MossError where the file does not answer as PyTorch does.
    """
    if model.quantization and model.quantization.scheme == "int4":
        raise ModelError(
            "export: ONNX holds float32 and int8, and the model is int4. Quantize to int8, or export int4 to "
            "compressed-tensors."
        )
    with new_directory(place) as partial, tempfile.TemporaryDirectory(dir=partial) as scratch:
        plain = Path(scratch) / FILE if model.quantization else partial / FILE
        _export_float(model, plain, batches[0])
        # in float32 first: what int8 rounds would hide a graph that is wrong
        difference = _verify_logits(model, plain, batches, _FLOAT_TOLERANCE)
        if model.quantization:
            _quantize(model, plain, partial / FILE)
            difference = _verify_logits(model, partial / FILE, batches, _INT8_TOLERANCE)
            _keep(plain, float_file)
        _write_companions(model, partial)
    return {
        "file": f"{place.name}/{FILE}",
        "difference_to_pytorch": difference,
    }


def _keep(file: Path, place: Path | None) -> None:
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)


def _write_companions(model: Model, place: Path) -> None:
    model.tokenizer.save_pretrained(place)
    config = copy.deepcopy(model.network.config)
    ours = {"task": model.task, "quantization": model.quantization.declared() if model.quantization else None}
    if model.temperature and model.temperature.network == network_digest(model.network):
        ours |= model.temperature.declared()
    if model.cut:
        ours["cut"] = model.cut.declared()
    setattr(config, KEY, ours)
    config.save_pretrained(place)


def _export_float(model: Model, place: Path, example: Batch) -> None:
    import onnx
    import torch

    network = copy.deepcopy(model.network).cpu().eval()
    network.set_attn_implementation("eager")  # the smaller graph: no masks of masks; ONNX Runtime fuses either as fast
    # two rows: the exporter takes a batch of one for a constant
    names = list(padding_of(model.tokenizer))
    inputs = {name: torch.from_numpy(example[name][:1].repeat(2, axis=0)) for name in names}
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with _quiet_exporter():
        program = torch.onnx.export(
            network,
            kwargs=inputs,
            dynamo=True,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=dict.fromkeys(inputs, axes),
            opset_version=_OPSET,
            verbose=False,
        )
    if program is None:
        raise MossError("export: PyTorch's ONNX exporter returned nothing")
    onnx.save(_with_plain_norms(_without_notes(program.model_proto)), place)


def _without_notes(proto: Any) -> Any:
    """The same model without what the exporter notes at every node: stack traces, the half of a small file."""
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        del part.metadata_props[:]
    return proto


def _with_plain_norms(proto: Any) -> Any:
    """The same model, its norms kept apart from the additions before them.

    ONNX Runtime fuses the two into SkipLayerNormalization, whose kernel takes four times as long as both by themselves
    (1.32 on a processor): a third of a small int8 model's time. A Sum of two is an Add that it does not look for.
    """
    normed = {node.input[0] for node in proto.graph.node if node.op_type == "LayerNormalization"}
    for node in proto.graph.node:
        if node.op_type == "Add" and node.output[0] in normed:
            node.op_type = "Sum"
    return proto


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the dynamo exporter says of its own internals: deprecated functions, a missing torchvision."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx._internal.exporter._registration", "onnxscript", "root")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _quantize(model: Model, source: Path, target: Path) -> None:
    import onnx

    network, proto = model.network, onnx.load(source)
    names = _grid_initializers(proto.graph, network)
    quantize_graph(proto, names, _ranges(proto.graph, names, model))
    onnx.checker.check_model(proto)
    onnx.save(proto, target)
    _verify_weights(proto.graph, names, network)


def _grid_initializers(graph: Any, network: Any) -> dict[str, str]:
    """{initializer: op that reads it} of every weight on the grid; found by its bits, for the exporter renames some."""
    from onnx import numpy_helper

    readers = {name: node.op_type for node in graph.node for name in node.input}
    on_grid = {key for weight in _grid_weights(network) for key in (_key(weight), _key(weight.T))}
    return {
        value.name: readers[value.name]
        for value in graph.initializer
        if readers.get(value.name) in ("MatMul", "Gather") and _key(numpy_helper.to_array(value)) in on_grid
    }


def _ranges(graph: Any, names: Mapping[str, str], model: Model) -> dict[str, tuple[float, float]]:
    """{initializer: range of what enters it}, as measured for int8_static."""
    from onnx import numpy_helper

    measured = model.quantization.ranges if model.quantization else {}
    weights = {matrix.name: matrix.weight.detach().cpu().numpy() for matrix in model.anatomy.matrices}
    known = {_key(weights[name].T): ends for name, ends in measured.items()}
    values = {value.name: value for value in graph.initializer}
    found = {name: known.get(_key(numpy_helper.to_array(values[name]))) for name in names}
    return {name: ends for name, ends in found.items() if ends is not None}


def _grid_weights(network: Any) -> list[NDArray[np.float32]]:
    return [parameter.detach().cpu().numpy() for parameter in quantized_weights(network).values()]


def _key(array: NDArray[Any]) -> tuple[tuple[int, ...], bytes]:
    """Names a matrix by its shape and bits; -0 and 0 are one."""
    return array.shape, hashlib.blake2b(np.ascontiguousarray(array + 0.0).tobytes(), digest_size=16).digest()


def _verify_weights(graph: Any, names: Mapping[str, str], network: Any) -> None:
    """Every weight on the grid stands in the file, bit for bit; MossError where one does not."""
    from onnx import numpy_helper

    values = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    found = {_key(values[f"{name}_codes"].astype(np.float32) * values[f"{name}_scale"]) for name in names}
    for name, parameter in quantized_weights(network).items():
        weight = parameter.detach().cpu().numpy()
        if found.isdisjoint((_key(weight), _key(weight.T))):
            raise MossError(f"export: the int8 file does not hold {name} as the checkpoint has it")


def _verify_logits(model: Model, place: Path, batches: Sequence[Batch], bound: float) -> float:
    """‖ONNX − PyTorch‖ / ‖PyTorch‖ over the logits of all batches; of int8, PyTorch rounds what the runtime rounds.

    Against unrounded activations the nearly equal logits of a classifier that has hardly learned would differ by more
    than they are large.
    """
    network = _with_8_bit_inputs(model) if bound == _INT8_TOLERANCE else model.network
    reference, exported = TorchRuntime(network), OnnxRuntime(place)
    expected = np.concatenate([reference.run(batch) for batch in batches])
    answered = np.concatenate([exported.run(batch) for batch in batches])
    difference = float(np.linalg.norm(answered - expected) / max(float(np.linalg.norm(expected)), 1e-12))
    if not difference <= bound:
        found = f"relative difference {difference:.3g}, at most {bound} may be"
        raise MossError(f"export: {place.name} answers differently from PyTorch: {found}")
    return difference


def _with_8_bit_inputs(model: Model) -> Any:
    """A copy of the network whose quantized matrices read what the runtime's do: each batch in 8 bits of its range."""
    import torch

    network = copy.deepcopy(model.network)
    ranges = model.quantization.ranges if model.quantization else {}

    def rounding(fixed: tuple[float, float] | None) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            values, *others = inputs
            low, high = fixed or (min(0.0, float(values.min())), max(0.0, float(values.max())))
            scale = max((high - low) / 255, 1e-12)
            zero = round(-low / scale)
            return (((values / scale).round() + zero).clamp(0, 255).sub(zero) * scale, *others)

        return hook

    for matrix in anatomy_of(network).matrices:
        matrix.module.register_forward_pre_hook(rounding(ranges.get(matrix.name)))
    return network
