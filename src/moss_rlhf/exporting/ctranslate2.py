"""CTranslate2 for decoders and encoder-decoders on the CPU: float32, or the int8 grid of a quantized checkpoint.

Its converter reads Hugging Face models of the day it was written for; what transformers 5 renamed is put back on a copy
of the network (`_as_expected`). It quantizes each row by round(weight · 127 / max|row|): the codes of our grid. Every
export is held against PyTorch on real texts before it counts, for a converter that misreads a shape says nothing.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moss_rlhf.errors import MachineError, ModelError, MossError
from moss_rlhf.files import new_directory
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.config import WINDOWED, has_windows, scales_by_hidden_size
from moss_rlhf.model.grid import LARGEST_CODE
from moss_rlhf.model.runtime import GeneratorRuntime, TranslatorRuntime

FILE = "model.bin"
_FLOAT_TOLERANCE = 1e-3
_LONGEST = 512  # tokens of a text that is compared
_INT8_TOLERANCE = 0.5  # activations in 8 bits, of a graph that was right in float32
_SERVED = ("gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "t5", "mt5", "bart", "marian")


def export_ctranslate2(
    model: Model, place: Path, texts: Sequence[tuple[str, str]], float_place: Path | None = None
) -> dict[str, object]:
    """Write a directory that `ctranslate2.Generator` or `Translator` loads, tokenizer beside it, whole or not at all.

    texts        (source, target) to hold it against PyTorch with; a decoder reads the sources alone.
    float_place  where to leave the same weights in float32, to compare speeds with.
    returns      the facts.
    raises   ModelError on a shape or scheme that CTranslate2 can't hold; MachineError where it is not installed;
             MossError where the file does not answer as PyTorch does.
    """
    _refuse(model)
    with new_directory(place) as partial:
        _convert(model, partial, None)
        # in float32 first: what int8 rounds would hide a shape that the converter misread
        difference = _verify(model, partial, texts, _FLOAT_TOLERANCE)
        if float_place is not None:
            with new_directory(float_place) as other:
                shutil.copytree(partial, other, dirs_exist_ok=True)
        if model.quantization:
            _convert(model, partial, "int8")
            difference = _verify(model, partial, texts, _INT8_TOLERANCE)
        model.tokenizer.save_pretrained(partial)
    return {"file": f"{place.name}/{FILE}", "difference_to_pytorch": difference}


def _refuse(model: Model) -> None:
    kind, scheme = model.network.config.model_type, str(model.quantization or "float32")
    if kind not in _SERVED:
        raise ModelError(f"export: CTranslate2 serves {', '.join(_SERVED)}; a {kind} goes to ONNX.")
    if scheme not in ("float32", "int8"):
        raise ModelError(
            f"export: CTranslate2 holds float32 and int8, and the model is {scheme}. Quantize to int8, or "
            "export int4 to compressed-tensors."
        )
    if scales_by_hidden_size(model.network.config.to_dict()) and model.anatomy.hidden_size != _stock_hidden(model):
        raise ModelError(
            f"export: CTranslate2 scales a {kind}'s embeddings by the root of the hidden size that it finds, and this "
            "one is narrowed. Leave hidden out of narrow."
        )
    if has_windows(model.network.config.to_dict()):
        raise ModelError(f"export: CTranslate2: {WINDOWED.format(kind=kind)}")
    heads = {part.heads for block in model.anatomy.blocks for part in block.attentions}
    if len(heads) > 1:
        raise ModelError(
            f"export: CTranslate2 holds one number of heads for all layers, and the blocks have {sorted(heads)}. "
            "Narrow by the same share of heads everywhere."
        )


def _stock_hidden(model: Model) -> int:
    return int(getattr(model.network.config, model.anatomy.family.hidden))


def _library() -> Any:
    try:
        import ctranslate2
    except ImportError:
        raise MachineError("export: CTranslate2 is not installed: pip install 'moss-rlhf[ctranslate2]'.") from None
    return ctranslate2


def _convert(model: Model, place: Path, quantization: str | None) -> None:
    library = _library()
    from ctranslate2.converters import TransformersConverter
    from ctranslate2.specs.model_spec import visit_spec

    network = _as_expected(copy.deepcopy(model.network), model)

    class Converter(TransformersConverter):
        def load_model(self, *_: Any, **__: Any) -> Any:
            return network

        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            return model.tokenizer

    network.config.save_pretrained(place)  # the converter chooses its loader by it
    converter = Converter(str(place))
    try:
        spec = converter._load()  # its `convert` would not let us set the head size
        _set_head_size(spec, model)
        _name_all(spec, model)
        spec.validate()
        spec.optimize(quantization=quantization)
        if quantization:
            visit_spec(spec, _hold_seven_bits)
        spec.save(str(place))
    except (AttributeError, ValueError, RuntimeError) as error:
        raise MossError(f"export: CTranslate2 {library.__version__} can't convert this model: {error}") from error


def _hold_seven_bits(part: Any, name: str, value: Any) -> None:
    """Codes of at most 64 instead of 127, and the scale with them: without VNNI sums of pairs saturate at 16 bits.

    The converter's codes are round(weight · 127 / max); of weights on our grid, code · 64 / 127 is ours again.
    """
    from ctranslate2.specs.model_spec import NumpyVariable

    key = name.rpartition("/")[2]
    scale = getattr(part, f"{key}_scale", None)
    if getattr(value, "dtype", None) != "int8" or scale is None:
        return
    shrink = LARGEST_CODE / 127
    setattr(part, key, NumpyVariable(np.rint(value.numpy() * shrink).astype(np.int8)))
    setattr(part, f"{key}_scale", NumpyVariable((scale.numpy() * shrink).astype(np.float32)))


def _set_head_size(spec: Any, model: Model) -> None:
    """The converter takes a head to be hidden size / heads, which narrowing makes wrong."""
    size = np.int32(model.anatomy.blocks[0].attention.head_size)
    for stack in (getattr(spec, name, None) for name in ("encoder", "decoder")):
        for layer in getattr(stack, "layer", None) or getattr(stack, "layers", None) or ():
            for name in ("self_attention", "attention"):
                part = getattr(layer, name, None)
                if part is not None:
                    vars(part)["head_dim"] = size  # a spec takes no attribute that its own constructor left out


def _name_all(spec: Any, model: Model) -> None:
    """The runtime wants a name for tokens that a vocabulary of bytes may lack: it holds every text."""
    for name in ("unk_token", "bos_token"):
        if getattr(spec.config, name) is None:
            setattr(spec.config, name, model.tokenizer.eos_token)


def _as_expected(network: Any, model: Model) -> Any:
    """A copy as the converter expects it: names of transformers 4, and a vocabulary as long as it will count."""
    config = network.config
    expected: Mapping[str, Callable[[], None]] = {
        "gpt_neox": lambda: _rename_neox(network, model),
        "bart": lambda: _add(config, normalize_before=False, normalize_embedding=True, add_final_layer_norm=False),
        "mt5": lambda: _add(config, tie_word_embeddings=bool(getattr(config, "scale_decoder_outputs", False))),
        "opt": lambda: _lengthen(network, -(-len(model.tokenizer) // 8) * 8),
    }
    expected.get(config.model_type, lambda: None)()
    for stack in model.anatomy.family.stacks:  # the stock config may still say the sizes from before narrowing
        blocks = model.anatomy.stack(stack.name)
        setattr(config, stack.heads, blocks[0].attention.heads)
        if stack.key_value_heads:
            setattr(config, stack.key_value_heads, blocks[0].attention.key_value_heads)
    return network


def _add(config: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _rename_neox(network: Any, model: Model) -> None:
    attention, hidden = model.anatomy.blocks[0].attention, model.anatomy.hidden_size
    network.config.hidden_size = hidden
    turned = _rope(network.config, "partial_rotary_factor", 1.0) * attention.head_size
    network.config.rotary_pct = turned / (hidden // attention.heads)  # of what the converter takes a head's size to be
    network.embed_out = network.lm_head


def _rope(config: Any, name: str, default: float) -> float:
    return float((getattr(config, "rope_parameters", None) or {}).get(name, default))


@torch.no_grad()
def _lengthen(network: Any, rows: int) -> None:
    for table in {
        id(each): each for each in (network.get_input_embeddings(), network.get_output_embeddings())
    }.values():
        weight = table.weight.data
        if len(weight) < rows:
            table.weight.data = torch.cat([weight, weight.new_zeros(rows - len(weight), weight.shape[1])])


# --- against PyTorch -----------------------------------------------------------------------------------------------


def _verify(model: Model, place: Path, texts: Sequence[tuple[str, str]], bound: float) -> float:
    """‖CTranslate2 − PyTorch‖ / ‖PyTorch‖ over log probabilities of real texts."""
    answer = _decoder_answers if model.anatomy.family.kind == "decoder" else _translator_answers
    expected, found = answer(model, place, texts)
    difference = float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-12))
    if not difference <= bound:
        raise MossError(
            f"export: {place.name} answers differently from PyTorch: relative difference {difference:.3g}, at most "
            f"{bound} may be"
        )
    return difference


Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


@torch.no_grad()
def _decoder_answers(model: Model, place: Path, texts: Sequence[tuple[str, str]]) -> Pair:
    runtime, expected, found = GeneratorRuntime(place, vocabulary=model.network.config.vocab_size), [], []
    for source, _ in texts:
        ids = np.array([_ids(model, source)], dtype=np.int64)
        expected.append(model.network(input_ids=torch.from_numpy(ids)).logits.double().numpy().ravel())
        answered = runtime.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        found.append(answered.ravel().astype(np.float64))
    return np.concatenate(expected), np.concatenate(found)


@torch.no_grad()
def _translator_answers(model: Model, place: Path, texts: Sequence[tuple[str, str]]) -> Pair:
    runtime, expected, found = TranslatorRuntime(place), [], []
    for source, target in texts:
        ids = np.array([_ids(model, source)], dtype=np.int64)
        limit = min(model.max_length, _LONGEST)
        wanted = model.tokenizer(text_target=target, truncation=True, max_length=limit)["input_ids"]
        labels = torch.tensor([wanted])
        decoder = model.network.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = model.network(input_ids=torch.from_numpy(ids), decoder_input_ids=decoder).logits
        expected.append(logits[0].double().log_softmax(dim=-1)[range(len(wanted)), wanted].numpy())
        answered = runtime.run({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels.numpy()})
        found.append(answered[0].astype(np.float64))
    return np.concatenate(expected), np.concatenate(found)


def _ids(model: Model, text: str) -> list[int]:
    limit = min(model.max_length, _LONGEST)
    ids: list[int] = model.tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    return ids
