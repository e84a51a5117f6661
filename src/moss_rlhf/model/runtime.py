"""Whatever answers a tokenized batch: the network in PyTorch, or an exported file in its own runtime."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Batch = Mapping[str, NDArray[np.int64]]


class Runtime(Protocol):
    """`name` is for people; `run` maps {input name: (batch, length)} to float32 answers.

    Logits: of a classifier (batch, classes), of a language model (batch, length, vocabulary). A `TranslatorRuntime`
    gives log probabilities instead.
    """

    name: str

    def run(self, batch: Batch) -> NDArray[np.float32]: ...


class Writer(Protocol):
    """What writes texts by itself: an encoder-decoder in PyTorch or in CTranslate2."""

    def write(self, batch: Batch, most: int) -> list[list[int]]: ...


class TorchRuntime:
    """The network in PyTorch, as its weights are (float32), evaluation mode. `labels` in a batch are left out."""

    def __init__(self, network: object) -> None:
        import torch

        if not isinstance(network, torch.nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
        self.name = "PyTorch float32"
        self.network = network

    def run(self, batch: Batch) -> NDArray[np.float32]:
        import torch

        device = next(self.network.parameters()).device
        self.network.eval()
        with torch.inference_mode():
            given = {name: value for name, value in batch.items() if name != "labels"}
            inputs = {name: torch.from_numpy(value).to(device) for name, value in given.items()}
            logits: NDArray[np.float32] = self.network(**inputs).logits.float().cpu().numpy()
        return logits

    def write(self, batch: Batch, most: int) -> list[list[int]]:
        """What an encoder-decoder writes to each source, up to `most` tokens, always the likeliest next one."""
        import torch

        device = next(self.network.parameters()).device
        given = {name: torch.from_numpy(batch[name]).to(device) for name in ("input_ids", "attention_mask")}
        network: Any = self.network
        settings = copy.deepcopy(network.generation_config)
        settings.update(num_beams=1, do_sample=False, max_length=None, max_new_tokens=most + 1)
        network.eval()
        with torch.inference_mode():
            written = network.generate(**given, generation_config=settings)
        found: list[list[int]] = written[:, 1 : most + 1].tolist()  # BART's settings force an end upon the last
        return found


class OnnxRuntime:
    """An ONNX file in ONNX Runtime on the CPU. Inputs that the file does not name are left out."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        self.name = "ONNX Runtime"
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]

    def run(self, batch: Batch) -> NDArray[np.float32]:
        outputs: list[NDArray[np.float32]] = self.session.run(None, {name: batch[name] for name in self.inputs})
        return outputs[0]


class GeneratorRuntime:
    """A decoder in CTranslate2 on the CPU.

    place        the directory with model.bin.
    vocabulary   tokens that logits are given for; CTranslate2 may hold a few more. None: all that it holds.
    """

    def __init__(self, place: Path, threads: int | None = None, vocabulary: int | None = None) -> None:
        import ctranslate2

        self.name = "CTranslate2"
        self.vocabulary = vocabulary
        self.generator = ctranslate2.Generator(str(place), intra_threads=threads or usable_cores(), inter_threads=1)
        self._view: Any = ctranslate2.StorageView.from_array

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits (batch, length, vocabulary) of rows padded on the right."""
        tokens = np.ascontiguousarray(batch["input_ids"], dtype=np.int32)
        lengths = batch["attention_mask"].sum(axis=1, dtype=np.int32)
        logits: NDArray[np.float32] = np.asarray(self.generator.forward_batch(self._view(tokens), self._view(lengths)))
        return logits[:, :, : self.vocabulary]


class TranslatorRuntime:
    """An encoder-decoder in CTranslate2 on the CPU.

    It takes tokens by their names, and tells the probability of given targets, not that of every token.
    """

    def __init__(self, place: Path, threads: int | None = None) -> None:
        import ctranslate2

        self.name = "CTranslate2"
        self.sources, self.targets = _vocabularies(place)
        self._ids = {name: index for index, name in enumerate(self.targets)}
        self.end = str(json.loads((place / "config.json").read_text(encoding="utf-8"))["eos_token"])
        self.translator = ctranslate2.Translator(str(place), intra_threads=threads or usable_cores(), inter_threads=1)

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Log probabilities (batch, length) of the targets `labels`, 0 where those are negative."""
        labels, sources = batch["labels"], self._named_sources(batch)
        targets = [_named(row[row >= 0], self.targets) for row in labels]
        # it puts the token that ends a target after each, and scores it
        scored = self.translator.score_batch(sources, [row[:-1] if row[-1:] == [self.end] else row for row in targets])
        answers = np.zeros(labels.shape, dtype=np.float32)
        for row, (target, found) in enumerate(zip(targets, scored, strict=True)):
            answers[row, : len(target)] = found.log_probs[: len(target)]
        return answers

    def write(self, batch: Batch, most: int) -> list[list[int]]:
        """What it writes to each source, up to `most` tokens, always the likeliest next one."""
        found = self.translator.translate_batch(
            self._named_sources(batch), beam_size=1, min_decoding_length=0, max_decoding_length=most
        )
        return [[self._ids[name] for name in written.hypotheses[0]] for written in found]

    def _named_sources(self, batch: Batch) -> list[list[str]]:
        lengths = batch["attention_mask"].sum(axis=1)
        return [_named(row[:length], self.sources) for row, length in zip(batch["input_ids"], lengths, strict=True)]


def _named(ids: NDArray[np.int64], vocabulary: list[str]) -> list[str]:
    return [vocabulary[index] for index in ids.tolist()]


def _vocabularies(place: Path) -> tuple[list[str], list[str]]:
    """Of the sources, of the targets: tokens in the order of their ids."""
    shared = place / "shared_vocabulary.json"
    files = (
        (shared, shared) if shared.exists() else (place / "source_vocabulary.json", place / "target_vocabulary.json")
    )
    source, target = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return source, target


def open_ctranslate2(place: Path, vocabulary: int | None = None) -> GeneratorRuntime | TranslatorRuntime:
    """The runtime of a directory that `export_ctranslate2` wrote."""
    if (place / "vocabulary.json").exists():  # an encoder-decoder's bears the names of its sides
        return GeneratorRuntime(place, vocabulary=vocabulary)
    return TranslatorRuntime(place)


def usable_cores() -> int:
    """Cores this process may run on, which containers often make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
