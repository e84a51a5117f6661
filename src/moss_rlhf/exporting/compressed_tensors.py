"""compressed-tensors: int4 and int8 checkpoints as vLLM loads them, and plain transformers too.

int4   "pack-quantized" (W4A16): eight codes in 32 bits, a scale a group, activations in float.
int8   "int-quantized" (W8A8): codes and a scale a row; the runtime quantizes the activations of each token.

The weights lie on the grid already, so nothing is rounded here: codes and scales are read off them. A written file is
read back by the library itself before it counts, its weights compared bit for bit, its logits on real texts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moss_rlhf.errors import MachineError, ModelError, MossError
from moss_rlhf.files import new_directory, read_json, write_json
from moss_rlhf.model.anatomy import Matrix
from moss_rlhf.model.checkpoint import Model, declare_sizes
from moss_rlhf.model.config import KEY
from moss_rlhf.model.grid import Grid, grid_codes, grid_parameters, scheme_grid
from moss_rlhf.model.locate import read_header, weight_bytes, weight_files
from moss_rlhf.model.quantization import Quantization
from moss_rlhf.model.runtime import Batch, TorchRuntime
from moss_rlhf.tasks import TASKS

SHARD_BYTES = 4 * 2**30
_TOLERANCE = 1e-4
_FORMATS: Mapping[str, str] = {"int4": "pack-quantized", "int8": "int-quantized"}


def export_compressed_tensors(
    model: Model, place: Path, batches: Sequence[Batch], shard_bytes: int = SHARD_BYTES
) -> dict[str, object]:
    """Write a directory that vLLM serves, tokenizer beside it, whole or not at all; returns the facts.

    batches       real tokenized batches to hold it against PyTorch with. A model whose weights are left on disk is
                  compared by its weights alone, which takes no more memory than one matrix.
    shard_bytes   about how large a file becomes; one file at a time is in memory.
    raises        ModelError on a model that the format can't hold; MachineError where the library is not installed;
                  MossError where the files do not hold what the model does.
    """
    _library()
    declared = _servable(model)
    settings = _settings(declared, _left_alone(model))
    with new_directory(place) as partial:
        _write_weights(model, declared, partial, shard_bytes)
        _write_companions(model, partial, settings)
        compared = _verify_weights(model, partial, settings)
        difference = None if model.weights else _verify_logits(model, partial, batches)
        size = weight_bytes(partial)
    return {
        "directory": place.name,
        "format": _FORMATS[declared.scheme],
        "bytes": size,
        "matrices_compared": compared,
        "difference_to_pytorch": difference,
    }


def _library() -> Any:
    try:
        import compressed_tensors
    except ImportError:
        raise MachineError("export: compressed-tensors is not installed: pip install 'moss-rlhf[vllm]'.") from None
    return compressed_tensors


def _servable(model: Model) -> Quantization:
    """The model's scheme; ModelError where the format or its readers can't hold the model."""
    kind, declared = model.network.config.model_type, model.quantization
    if declared is None or declared.scheme not in _FORMATS:
        raise ModelError(
            "export: compressed-tensors holds int4 and int8 with activations quantized at run time, and the model is "
            f"{declared or 'float32'}. Quantize to int4 or int8."
        )
    if model.anatomy.family.kind == "encoder-decoder":
        raise ModelError(
            f"export: compressed-tensors is for vLLM, which serves no encoder-decoder such as a {kind}. Quantize to "
            "int8 and export to CTranslate2."
        )
    if any(matrix.transposed for matrix in model.anatomy.matrices):
        raise ModelError(
            f"export: compressed-tensors holds linear layers; a {kind} keeps its matrices transposed, in Conv1D, "
            "which its readers pass over. Quantize to int8 and export to CTranslate2."
        )
    if not declare_sizes(model.network):
        raise ModelError(
            f"export: the stock config of a {kind} can't say this model's shapes, so neither vLLM nor transformers "
            "builds it. Compress to shapes that are the same in every block, or export to another format."
        )
    return declared


# --- what is written -----------------------------------------------------------------------------------------------


def _settings(declared: Quantization, ignore: list[str]) -> Any:
    """The library's own description of a scheme, a QuantizationConfig."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    per_token = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    weights = QuantizationArgs(
        num_bits=4 if declared.scheme == "int4" else 8,
        type="int",
        symmetric=True,
        strategy="group" if declared.group_size else "channel",
        group_size=declared.group_size,
    )
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=per_token if declared.scheme == "int8" else None,
        format=_FORMATS[declared.scheme],
    )
    return QuantizationConfig(
        config_groups={"group_0": scheme},
        format=_FORMATS[declared.scheme],
        quantization_status="compressed",
        ignore=ignore,
    )


def _left_alone(model: Model) -> list[str]:
    """The linear layers outside the blocks, by their names in the network and, where those differ, in the file."""
    inside = {id(matrix.module) for matrix in model.anatomy.matrices}
    written = {id(tensor): name.removesuffix(".weight") for name, tensor in _tensors(model).items()}
    outside = {
        name: written.get(id(module.weight), name)
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside
    }
    return sorted({*outside, *(name for name in outside.values() if "embed_tokens" not in name)})


def _tensors(model: Model) -> dict[str, Tensor]:
    """{name in the file: parameter or buffer}, tied ones once; transformers writes some names as it used to."""
    from transformers.core_model_loading import revert_weight_conversion

    parameters, stored = dict(model.network.named_parameters()), model.network.state_dict()
    buffers = {name: value for name, value in model.network.named_buffers() if name in stored}
    found: dict[str, Tensor] = revert_weight_conversion(model.network, parameters | buffers)
    return found


def _entries(model: Model, declared: Quantization) -> Iterator[tuple[str, Tensor]]:
    """Everything that the files hold, by name: of a matrix of the blocks its codes and scales."""
    matrices = {id(matrix.parameter): matrix for matrix in model.anatomy.matrices}
    for name, tensor in _tensors(model).items():
        if id(tensor) not in matrices:
            yield name, tensor.detach().cpu()
            continue
        for part, value in _compressed(matrices[id(tensor)], scheme_grid(declared.scheme, declared.group_size)):
            yield f"{name.removesuffix('weight')}{part}", value


def _compressed(matrix: Matrix, grid: Grid) -> Iterator[tuple[str, Tensor]]:
    """One matrix as the library stores it, codes and scales as the weights alone tell them."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    weight = matrix.weight.detach().cpu()
    scale, zero = grid_parameters(weight, grid)
    codes = grid_codes(weight, scale, zero, grid)
    yield "weight_scale", scale
    if grid.highest > 7:
        yield "weight", codes
        return
    yield "weight_packed", pack_to_int32(codes, 4)
    yield "weight_shape", torch.tensor(weight.shape)


def _write_weights(model: Model, declared: Quantization, place: Path, shard_bytes: int) -> None:
    """One safetensors file after the other, each in memory while it is filled; an index where there are several."""
    where: dict[str, int] = {}
    size = count = 0
    for count, shard in enumerate(_shards(_entries(model, declared), shard_bytes), 1):  # the last one
        save_file(shard, place / f"{count}.partial", {"format": "pt"})
        where |= dict.fromkeys(shard, count)
        size += sum(_bytes(value) for value in shard.values())
    files = {number: f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)}
    if count == 1:
        files = {1: "model.safetensors"}
    else:
        weight_map = {name: files[number] for name, number in where.items()}
        write_json(place / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    for number, file in files.items():
        (place / f"{number}.partial").rename(place / file)


def _shards(entries: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, value in entries:
        if shard and sum(map(_bytes, shard.values())) + _bytes(value) > shard_bytes:
            yield shard
            shard = {}
        shard[name] = value.contiguous()
    yield shard


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _write_companions(model: Model, place: Path, settings: Any) -> None:
    """config.json with the library's key as vLLM reads it, how the model generates, the tokenizer."""
    config = copy.deepcopy(model.network.config)
    config.architectures, config.dtype = [type(model.network).__name__], torch.float32
    config.save_pretrained(place)
    values = {name: value for name, value in read_json(place / "config.json").items() if name != KEY}
    declared = {"version": _library().__version__} | settings.model_dump(mode="json", exclude={"moe_sparsity_config"})
    write_json(place / "config.json", values | {"quantization_config": declared})
    if model.network.can_generate():
        model.network.generation_config.save_pretrained(place)
    model.tokenizer.save_pretrained(place)


# --- against what was meant ----------------------------------------------------------------------------------------


def _verify_weights(model: Model, place: Path, settings: Any) -> int:
    """How many matrices the library unpacks from the files as the model has them, bit for bit; MossError otherwise."""
    from compressed_tensors.compressors import BaseCompressor

    scheme = settings.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(settings.format)
    files = {name: file for file in weight_files(place) for name in read_header(file)}
    matrices = {id(matrix.parameter): matrix for matrix in model.anatomy.matrices}
    names = {name.removesuffix("weight"): matrices.get(id(tensor)) for name, tensor in _tensors(model).items()}
    for stem, matrix in names.items():
        if matrix is not None:
            present = [part for part in _PARTS if f"{stem}{part}" in files]
            parts = {part: _read(files[f"{stem}{part}"], f"{stem}{part}") for part in present}
            if not torch.equal(compressor.decompress(parts, scheme)["weight"], matrix.weight.cpu()):
                raise MossError(f"export: {place.name} does not hold {matrix.name} as the checkpoint has it")
    return len(matrices)


_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape")


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def _verify_logits(model: Model, place: Path, batches: Sequence[Batch]) -> float:
    """‖files − PyTorch‖ / ‖PyTorch‖ over the logits of all batches, the files loaded by plain transformers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(place)
    config.quantization_config["dequantize"] = True  # else int8 rounds activations too
    auto_class = TASKS[model.task].auto_class()
    network = auto_class.from_pretrained(place, config=config, dtype=torch.float32)
    reference, exported = TorchRuntime(model.network), TorchRuntime(network)
    expected = np.concatenate([reference.run(batch).ravel() for batch in batches])
    answered = np.concatenate([exported.run(batch).ravel() for batch in batches])
    difference = float(np.linalg.norm(answered - expected) / max(float(np.linalg.norm(expected)), 1e-12))
    if not difference <= _TOLERANCE:
        raise MossError(
            f"export: {place.name} answers differently from PyTorch: relative difference {difference:.3g}, at most "
            f"{_TOLERANCE} may be"
        )
    return difference
