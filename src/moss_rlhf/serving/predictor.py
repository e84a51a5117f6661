"""Text in, label out: the tokenizer and the runtime of whatever was shipped. An ONNX file is served without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.errors import ModelError
from moss_rlhf.files import read_json
from moss_rlhf.model.config import KEY, position_limit, read_config
from moss_rlhf.model.cutting import Cut, pool_windows
from moss_rlhf.model.runtime import OnnxRuntime, Runtime, TorchRuntime
from moss_rlhf.model.temperature import Temperature
from moss_rlhf.tasks.batching import batches_of

FILE = "model.onnx"
_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    label: str
    probability: float


@dataclass(frozen=True)
class Predictor:
    """Answers texts. `open` takes a run's directory (what it shipped), a checkpoint, or a directory with model.onnx."""

    runtime: Runtime
    tokenizer: Any  # of the package tokenizers
    padding: dict[str, int]
    labels: tuple[str, ...]
    cut: Cut
    temperature: float = 1.0  # what logits are divided by; it changes no answer's label

    @classmethod
    def open(cls, path: str | Path) -> Predictor:
        """What answers for a path. Raises ModelError where it holds nothing that can."""
        place = _shipped(Path(path))
        config = read_config(place)
        task = config.get(KEY, {}).get("task", "text-classification")
        if task != "text-classification":
            raise ModelError(f"{place}: is a model for {task}, and labels can be asked of a classifier only.")
        names = config.get("id2label") or {}
        limit = position_limit(config, float("inf"))
        trained = Cut.read(config.get(KEY, {}).get("cut"), place) or Cut("head", limit)
        cut = Cut(trained.keep, min(trained.max_length, limit))
        tokenizer = _tokenizer(place, cut)
        padding = {name: config.get("pad_token_id") or 0 if name == "input_ids" else 0 for name in _INPUTS}
        if (place / FILE).exists():
            runtime: Runtime = _onnx(place / FILE)
        else:
            runtime, padding = _torch(place, padding)
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
        fitted = Temperature.read(config.get(KEY, {}), place)
        return cls(runtime, tokenizer, padding, labels, cut, fitted.value if fitted else 1.0)

    def predict(self, texts: Iterable[str], batch_size: int = 32) -> Iterator[Answer]:
        """One answer a text, in order; reads as many texts at a time as a batch holds."""
        return _answers(texts, batch_size, self.labels, self.probabilities)

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """(texts, labels), rows of sum 1; at least one text, all in one batch."""
        encodings = self.tokenizer.encode_batch(list(texts))
        kept = [
            (text, encoding, self.cut.rows(encoding.special_tokens_mask)) for text, encoding in enumerate(encodings)
        ]
        rows = [_row(encoding, places) for _, encoding, windows in kept for places in windows]
        numbers = np.array([text for text, _, windows in kept for _ in windows])
        parts = [self.runtime.run(batch) for batch in batches_of(rows, max(len(texts), 1), self.padding)]
        logits = pool_windows(np.concatenate(parts), numbers).astype(np.float64) / self.temperature
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        result: Probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        return result


@dataclass(frozen=True)
class Committee:
    """Several predictors that answer together, by the mean of their probabilities (docs/ensemble.md)."""

    members: tuple[Predictor, ...]

    @classmethod
    def open(cls, paths: Sequence[str | Path]) -> Committee:
        """What `Predictor.open` gives for each path.

        raises   ModelError where it does, or where they don't know the same labels; their order may differ.
        """
        members = tuple(Predictor.open(path) for path in paths)
        for path, member in zip(paths, members, strict=True):
            if set(member.labels) != set(members[0].labels):
                raise ModelError(
                    f"{path}: its labels are {', '.join(member.labels)}; those of {paths[0]} are "
                    f"{', '.join(members[0].labels)}. Give models of the same labels."
                )
        return cls(members)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.members[0].labels

    def predict(self, texts: Iterable[str], batch_size: int = 32) -> Iterator[Answer]:
        """One answer a text, in order; reads as many texts at a time as a batch holds."""
        return _answers(texts, batch_size, self.labels, self.probabilities)

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """(texts, labels), the mean of the members', in the first one's order of labels."""
        every = [member.probabilities(texts)[:, self._order(member)] for member in self.members]
        mean: Probabilities = np.mean(every, axis=0)
        return mean

    def _order(self, member: Predictor) -> list[int]:
        return [member.labels.index(label) for label in self.labels]


def _answers(
    texts: Iterable[str], size: int, labels: Sequence[str], ask: Callable[[Sequence[str]], Probabilities]
) -> Iterator[Answer]:
    """The likeliest label of each text, asked of as many at a time as a batch holds."""
    remaining = iter(texts)
    while batch := list(islice(remaining, size)):
        for values in ask(batch):
            yield Answer(labels[int(values.argmax())], float(values.max()))


def _row(encoding: Any, places: NDArray[np.int64]) -> dict[str, list[int]]:
    columns = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
    return {name: [values[place] for place in places] for name, values in columns.items()}


def _shipped(path: Path) -> Path:
    """The directory to serve from: of a run, the one whose artifact its report measured."""
    if (path / "recipe.yaml").is_file() and not (path / "report.json").is_file():
        raise ModelError(f"{path}: this run is not finished. Go on with moss run {path}/recipe.yaml.")
    place = path / _artifact(path) if (path / "report.json").is_file() else path
    place = place.parent if place.name == FILE else place
    if not (place / "config.json").is_file():
        raise ModelError(
            f"{place}: is no run, checkpoint or ONNX directory. Give a run such as runs/my, or runs/my/model."
        )
    return place


def _artifact(run: Path) -> str:
    return str(read_json(run / "report.json")["after"]["artifact"])


def _tokenizer(place: Path, cut: Cut) -> Any:
    from tokenizers import Tokenizer

    file = place / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{place}: holds no tokenizer.json. Give a directory that moss run wrote.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower one
        raise ModelError(f"{file}: is broken ({error}). Export or fetch it again.") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if cut.keep == "head":  # the same as cutting afterwards, and a long text costs less
        tokenizer.enable_truncation(cut.max_length)
    return tokenizer


def _onnx(file: Path) -> Runtime:
    try:
        return OnnxRuntime(file)
    except Exception as error:  # the library raises a dozen that share no base
        reason = " ".join(str(error).split())
        raise ModelError(f"{file}: ONNX Runtime can't open it ({reason}). Export it again.") from None


def _torch(place: Path, padding: dict[str, int]) -> tuple[Runtime, dict[str, int]]:
    from moss_rlhf.progress import quiet_libraries
    from moss_rlhf.tasks.batching import padding_of
    from moss_rlhf.tasks.loading import load

    quiet_libraries()
    model = load(place)
    return TorchRuntime(model.network), {name: padding[name] for name in padding_of(model.tokenizer)}
