"""Before against after: what would be shipped otherwise, and what this run ships, on the same rows and batches."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.artifacts import Artifact
from moss_rlhf.evaluation import (
    Answers,
    ClassAnswers,
    Speed,
    TokenAnswers,
    WrittenAnswers,
    answer,
    calibration_of,
    gain_of,
    measure_speed,
    metrics_of,
    peak_memory,
    sizes_of,
    speed_batches,
    temperature_of,
    translate,
)
from moss_rlhf.examples import changed_examples, confusions, moved_examples, rewritten_examples
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.device import on_accelerator
from moss_rlhf.model.fingerprint import network_digest
from moss_rlhf.model.runtime import (
    Batch,
    TorchRuntime,
    TranslatorRuntime,
    usable_cores,
)
from moss_rlhf.model.temperature import Temperature, write_temperature
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import EvaluateSpec
from moss_rlhf.tasks import TASKS, TextClassification, Translation
from moss_rlhf.tasks.calibration import reliability
from moss_rlhf.tasks.overlap import has_sacrebleu

_SPEED_POOL = 2000
PROTOCOL = (
    "Before and after answer the same rows; 'before' is the uncompressed fine-tuned model in PyTorch float32.",
    "Intervals are percentile bootstraps over rows; the difference is paired, row by row, and its p-value is McNemar's "
    "exact test for accuracy, and a test of random swaps of the two answers to each row for any other metric.",
    "Log loss and calibration error are of the probabilities before temperature scaling; the error is over 15 bins of "
    "equal width, and its interval leans upwards, the more so the fewer the rows.",
    "BLEU (sacrebleu: 13a words, or Chinese characters) and chrF2, 0 to 1, are of translations written greedily to a "
    "seeded sample of the rows, as many as `translated` says, against their targets.",
    "Speed: identical tokenized batches of evaluation texts in random order, padded to their longest, the same number "
    "of threads; rounds of before and after interleaved after a warm-up; medians. Tokenization is excluded. "
    "A language model reads given tokens in one pass and writes none: a decoder answers with the logits of all tokens, "
    "a translator in CTranslate2 with the probabilities of the given targets. With a trimmed vocabulary the same texts "
    "are read in its own tokens.",
    "Peak memory: of a fresh process that loads the artifact and answers one batch of the largest size, libraries "
    "included.",
    "Bytes count weight files only. MACs are multiply-accumulates a token at the mean length of the evaluation texts.",
)


@dataclass(frozen=True)
class Measuring:
    """How to measure: on which encoded rows of which split, relative to which directory, by which settings."""

    rows: Any
    split: str
    root: Path
    spec: EvaluateSpec
    seed: int
    progress: Progress

    @property
    def _intervals(self) -> dict[str, Any]:
        return {"confidence": self.spec.confidence, "resamples": self.spec.resamples, "seed": self.seed}

    def rows_of(self, artifact: Artifact) -> Any:
        return self.rows if artifact.rows is None else artifact.rows

    def quality(self, artifact: Artifact) -> tuple[Answers, dict[str, Any]]:
        """The answers, and the part of a measurement that needs no clock."""
        task, model, rows = TASKS[artifact.model.task], artifact.model, self.rows_of(artifact)
        with on_accelerator(model.network) if isinstance(artifact.runtime, TorchRuntime) else nullcontext():
            answers = answer(task, artifact.runtime, rows, model.tokenizer)
        return answers, {
            "artifact": _relative(artifact.path, self.root),
            "runtime": artifact.runtime.name,
            "split": self.split,
            "metrics": metrics_of(task, answers, **self._intervals),
            "rows": task.texts(rows) if isinstance(task, TextClassification) else len(rows),
            **sizes_of(model, float(np.mean(rows["length"]))),
            "bytes": artifact.bytes,
        }

    def compare(
        self,
        before: Artifact | None,
        after: Artifact,
        reference: Artifact | None,
        texts: Any,
        validation: Any = None,
    ) -> dict[str, Any]:
        """The report's before, after, reference, gain, calibration, confusion, changed answers, notes on it all.

        validation   encoded rows, where the temperature of the shipped probabilities is to be fitted on them.
        """
        artifacts = {"before": before, "after": after, "reference": reference}
        present = {name: artifact for name, artifact in artifacts.items() if artifact is not None}
        quality = {name: self.quality(artifact) for name, artifact in present.items()}
        speeds, peaks = self._speed(present)
        measured = {name: {**quality[name][1], **speeds[name], "peak_memory_bytes": peaks[name]} for name in present}
        answers = {name: part[0] for name, part in quality.items()}
        written = self._translations({name: present[name] for name in ("before", "after") if name in present}, texts)
        for name, translations in written.items():
            found = metrics_of(TASKS[after.model.task], translations, **self._intervals)
            measured[name]["metrics"] |= found
            measured[name]["translated"] = len(translations.texts)
        return {
            **{name: measured.get(name) for name in artifacts},
            "gain": self._gain(before, after, measured, {**answers, **written}),
            "calibration": self._calibration(after, answers, validation),
            **self._examples(answers, after, texts),
            "rewritten": self._rewritten(written, texts),
            "notes": [*_notes(answers, after), *self._unwritten(after)],
        }

    def _translations(self, artifacts: Mapping[str, Artifact], texts: Any) -> dict[str, WrittenAnswers]:
        """What translators write to the same seeded sample of the rows; nothing of any other task."""
        translators = all(artifact.model.task == Translation.name for artifact in artifacts.values())
        if not translators or texts is None or not self.spec.translate or not has_sacrebleu():
            return {}
        chosen, found = self._translated(len(texts)), {}
        references = texts.select(chosen)["target"][:]
        for name, artifact in artifacts.items():
            runtime, rows = artifact.runtime, self.rows_of(artifact).select(chosen)
            assert isinstance(runtime, TorchRuntime | TranslatorRuntime)  # noqa: S101  # an encoder-decoder's
            with on_accelerator(artifact.model.network) if isinstance(runtime, TorchRuntime) else nullcontext():
                found[name] = translate(artifact.model, runtime, rows, references)
        return found

    def _translated(self, rows: int) -> NDArray[np.int64]:
        return np.sort(np.random.default_rng(self.seed).permutation(rows)[: self.spec.translate])

    def _rewritten(self, written: Mapping[str, WrittenAnswers], texts: Any) -> list[dict[str, str]]:
        if len(written) < 2:
            return []
        return rewritten_examples(written["before"], written["after"], texts.select(self._translated(len(texts))))

    def _unwritten(self, after: Artifact) -> list[str]:
        if after.model.task != Translation.name or not self.spec.translate or has_sacrebleu():
            return []
        return ["BLEU and chrF are left out: sacrebleu is not installed (pip install 'moss-rlhf[translation]')."]

    def _gain(
        self, before: Artifact | None, after: Artifact, measured: Mapping[str, Any], answers: Mapping[str, Answers]
    ) -> dict[str, Any] | None:
        if before is None or not comparable(answers["before"], answers["after"]):
            return None
        first, second = measured["before"], measured["after"]
        same = first["runtime"] == second["runtime"] and first["bytes"] == second["bytes"]
        sizes = [str(size) for size in self.spec.batch_sizes]
        return {
            "identical": same and network_digest(before.model.network) == network_digest(after.model.network),
            "metric": gain_of(TASKS[before.model.task], answers["before"], answers["after"], **self._intervals),
            "size": first["bytes"] / second["bytes"],
            "speedup": {size: second["throughput"][size] / first["throughput"][size] for size in sizes},
            "latency": {size: first["latency_ms"][size]["p50"] / second["latency_ms"][size]["p50"] for size in sizes},
        }

    def _calibration(self, after: Artifact, answers: Mapping[str, Answers], validation: Any) -> dict[str, Any] | None:
        """The shipped artifact's own temperature, and what it does to its probabilities; None of a language model."""
        given, first, task = answers["after"], answers.get("before"), TASKS[after.model.task]
        if not isinstance(given, ClassAnswers) or validation is None or not self.spec.temperature:
            return None
        asked = given if self.split == "validation" else answer(task, after.runtime, validation, after.model.tokenizer)
        if not isinstance(asked, ClassAnswers):
            return None
        fitted = temperature_of(asked, after.model.network)
        found = calibration_of(given, fitted.value, **self._intervals)
        if isinstance(first, ClassAnswers):
            found["reliability_before"] = reliability(first.logits, first.labels)
        return found | {"network": fitted.network, "fitted_on": "validation", "rows": len(validation)}

    def keep_temperature(self, after: Artifact, calibration: Mapping[str, Any] | None) -> None:
        """Declare the fitted temperature, if there is one, in the config.json of all that is shipped."""
        if calibration is not None:
            fitted = Temperature(calibration["temperature"], calibration["network"])
            for folder in {after.path.parent if after.path.is_file() else after.path, self.root / "model"}:
                write_temperature(folder, fitted)

    def _examples(self, answers: Mapping[str, Answers], artifact: Artifact, texts: Any) -> dict[str, Any]:
        """The answers themselves, as far as the report shows them."""
        before, after, model = answers.get("before"), answers["after"], artifact.model
        if isinstance(after, ClassAnswers):
            first = before if isinstance(before, ClassAnswers) else None
            return confusions(first, after, model.labels) | changed_examples(first, after, model.labels, texts)
        if isinstance(before, TokenAnswers) and isinstance(after, TokenAnswers) and comparable(before, after):
            return {"moved": moved_examples(before, after, self.rows_of(artifact), model.tokenizer)}
        return {"moved": []}

    def _speed(self, artifacts: Mapping[str, Artifact]) -> tuple[dict[str, Speed], dict[str, int | None]]:
        own = {name: self._batches(artifact) for name, artifact in artifacts.items()}
        runtimes = {name: artifact.runtime for name, artifact in artifacts.items()}
        first = next(iter(own.values()))
        speeds = measure_speed(runtimes, first, own=own, progress=self.progress, budget_seconds=self.spec.speed_seconds)
        largest = {
            name: max(batches[max(batches)], key=lambda batch: batch["input_ids"].size) for name, batches in own.items()
        }
        with ThreadPoolExecutor() as pool:  # memory, not time, is measured: they may run side by side
            peaks = pool.map(lambda name: self._peak(artifacts[name].path, largest[name]), artifacts)
            return speeds, dict(zip(artifacts, peaks, strict=True))

    def _batches(self, artifact: Artifact) -> dict[int, list[Batch]]:
        """The same texts in the same order for every artifact, in the tokens of its own tokenizer."""
        model, rows = artifact.model, self.rows_of(artifact)
        padding = TASKS[model.task].padding(model.tokenizer)
        padded = speed_batches(
            self._pool(rows), self.spec.batch_sizes, padding, seed=self.seed, rows_per_size=self.spec.speed_rows
        )
        return {size: [_inputs(model, batch) for batch in group] for size, group in padded.items()}

    def _pool(self, rows: Any) -> list[dict[str, list[int]]]:
        order = np.random.default_rng(self.seed).permutation(len(rows))[:_SPEED_POOL]
        return [dict(row) for row in rows.select(np.sort(order))]

    def _peak(self, path: Path, batch: Batch) -> int | None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "batch.npz"
            np.savez(file, allow_pickle=False, **batch)
            command = [sys.executable, "-m", "moss_rlhf.probe", str(path.resolve()), str(file)]
            return peak_memory(command, progress=self.progress)


def comparable(before: Answers, after: Answers) -> bool:
    """Whether both answered the same: perplexities of texts that are spelled in other tokens are not alike."""
    first, second = before.statistics, after.statistics
    if not (isinstance(before, TokenAnswers) and isinstance(after, TokenAnswers)):
        return len(first) == len(second)
    return np.array_equal(before.scores[:, 1], after.scores[:, 1])


def _notes(answers: Mapping[str, Answers], after: Artifact) -> list[str]:
    before, now = answers.get("before"), answers["after"]
    found = [
        f"{after.runtime.name} scores given targets and tells no others: there is no {name.replace('_', ' ')} of after."
        for name in sorted(now.unknown)
    ]
    if before is not None and not comparable(before, now):
        found.append(
            "The trimmed vocabulary spells some of the texts measured on in other tokens, so that perplexities a token "
            "of before and after can't be compared."
        )
    return found


def _inputs(model: Model, batch: Batch) -> Batch:
    """What runtimes are called with: of an encoder-decoder, the targets, and their tokens shifted right too."""
    import torch

    tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
    given = TASKS[model.task].inputs(model.network, tensors)
    return {**batch, **{name: tensor.cpu().numpy() for name, tensor in given.items()}}


def same_threads() -> int:
    """Give PyTorch as many threads as the other runtimes get; returns how many."""
    import torch

    threads = usable_cores()
    torch.set_num_threads(threads)
    return threads


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
