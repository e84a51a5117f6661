"""A model on rows, and two models on the same rows: the numbers of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.evaluation.statistics import Estimate, bootstrap, paired_difference
from moss_rlhf.model.cost import macs_per_token
from moss_rlhf.model.fingerprint import network_digest
from moss_rlhf.model.runtime import OnnxRuntime, Runtime, TorchRuntime, TranslatorRuntime, Writer
from moss_rlhf.model.temperature import Temperature
from moss_rlhf.tasks import TASKS, Task, TextClassification, Translation
from moss_rlhf.tasks.calibration import fit_temperature as fitted_temperature
from moss_rlhf.tasks.calibration import probability_statistics, reliability
from moss_rlhf.tasks.metrics import Metric, confusion
from moss_rlhf.tasks.overlap import chrf, has_sacrebleu, overlap
from moss_rlhf.tasks.row_statistics import RowStatistics, confusion_cells, written_out

if TYPE_CHECKING:
    from moss_rlhf.model.checkpoint import Model

_ROWS_DRAWN, _FEWEST_RESAMPLES = 2**24, 200  # of probabilities: seconds, however many rows there are


class Answers(Protocol):
    """What a runtime answered on rows, as far as every task's is alike."""

    @property
    def statistics(self) -> RowStatistics: ...
    @property
    def unknown(self) -> frozenset[str]:
        """The task's metrics that these answers don't tell."""
        ...


@dataclass(frozen=True)
class ClassAnswers:
    """Answers of classification: logits (rows, classes), class ids (rows,), and the truth (rows,)."""

    logits: NDArray[np.float32]
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    unknown: frozenset[str] = frozenset()

    @property
    def classes(self) -> int:
        return int(self.logits.shape[1])

    @property
    def statistics(self) -> RowStatistics:
        return confusion_cells(self.labels, self.ids, self.classes)

    @property
    def confidence_in_truth(self) -> NDArray[np.float64]:
        """The probability given to the true class, (rows,)."""
        logits = self.logits.astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        truth: NDArray[np.float64] = exponentials[np.arange(len(self.labels)), self.labels] / exponentials.sum(axis=1)
        return truth


@dataclass(frozen=True)
class TokenAnswers:
    """Answers of a language model, whose logits are never kept: (rows, 3) of Σ −log p, target tokens, right ones."""

    scores: NDArray[np.float64]
    unknown: frozenset[str] = frozenset()

    @property
    def statistics(self) -> RowStatistics:
        return written_out(self.scores)

    @property
    def losses(self) -> NDArray[np.float64]:
        """−log p a target token of each row, (rows,)."""
        losses: NDArray[np.float64] = self.scores[:, 0] / self.scores[:, 1]
        return losses


@dataclass(frozen=True)
class WrittenAnswers:
    """Texts that a translator wrote by itself, and (rows, 28) of their likeness to the references."""

    texts: list[str]
    likeness: NDArray[np.float64]
    unknown: frozenset[str] = frozenset()

    @property
    def statistics(self) -> RowStatistics:
        return written_out(self.likeness)

    @property
    def row_scores(self) -> NDArray[np.float64]:
        """ChrF of each row by itself, (rows,), which is seldom 0 where BLEU mostly is."""
        return chrf(self.likeness)


def translate(model: Model, runtime: Writer, rows: Any, references: Sequence[str]) -> WrittenAnswers:
    """Let a translator write to encoded rows, and hold it against the references.

    It may write twice as many tokens as the longest source or target has, and ten more, within the model's positions.
    raises   MachineError where sacrebleu is not installed.
    """
    task = TASKS[model.task]
    assert isinstance(task, Translation)  # noqa: S101  # of an encoder-decoder
    most = min(2 * max(rows["length"]) + 10, model.max_length - 1)
    texts = task.write(runtime, rows, model.tokenizer, most)
    return WrittenAnswers(texts, overlap(texts, references))


def answer(task: Task, runtime: Runtime, rows: Any, tokenizer: Any) -> Answers:
    """Ask a runtime about encoded rows with labels.

    raises   ModelError where a language model is in ONNX Runtime, or its scores are not finite.
    """
    if isinstance(task, TextClassification):
        logits = task.predict(runtime, rows, tokenizer)
        return ClassAnswers(logits, task.answers(logits), task.labels(rows))
    if isinstance(runtime, OnnxRuntime):
        raise ModelError(f"evaluate: {task.name} is not measured in {runtime.name}; export it to CTranslate2.")
    if isinstance(runtime, TorchRuntime):
        scores = task.scores(runtime.network, rows, tokenizer)
    else:
        scores = task.runtime_scores(runtime, rows, tokenizer)
    if not np.isfinite(scores).all():
        raise ModelError("evaluate: the model's probabilities are not finite; look for inf or nan in the checkpoint.")
    return TokenAnswers(scores, frozenset({"token_accuracy"} if isinstance(runtime, TranslatorRuntime) else ()))


def metrics_of(task: Task, answers: Answers, *, confidence: float, resamples: int, seed: int) -> dict[str, Any]:
    """Every metric of the task that the answers tell, with its interval: {name: {"value", "low", "high"}}."""
    usual: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    metrics = _metrics_for(task, answers)
    told = {name: metric for name, metric in metrics.items() if name not in answers.unknown}
    found = bootstrap(answers.statistics, metrics=told, **usual)
    if isinstance(answers, ClassAnswers):
        found |= probability_metrics_of(answers, **usual)
    return dict(found)


def _metrics_for(task: Task, answers: Answers) -> Mapping[str, Metric]:
    """The metrics that are functions of such answers, the one that a gain is told in first."""
    if isinstance(answers, WrittenAnswers) and isinstance(task, Translation):
        return task.written_metrics
    return {task.metric: task.metrics[task.metric], **task.metrics}


def probability_metrics_of(
    answers: ClassAnswers, temperature: float = 1.0, *, confidence: float, resamples: int, seed: int
) -> dict[str, Estimate]:
    """Log loss and expected calibration error with their intervals, of logits divided by the temperature.

    An interval is stretched to hold its value where it does not: resampling adds noise to every bin, so that a small
    calibration error is larger in nearly every resample than in the sample.
    """
    rows = probability_statistics(answers.logits, answers.labels, temperature)
    metrics = TextClassification.probability_metrics
    count = min(resamples, max(_FEWEST_RESAMPLES, _ROWS_DRAWN // len(rows)))  # no two rows are alike: each is drawn
    found = bootstrap(rows, metrics=metrics, confidence=confidence, resamples=count, seed=seed)
    return {name: _holding_its_value(estimate) for name, estimate in found.items()}


def _holding_its_value(estimate: Estimate) -> Estimate:
    value = estimate["value"]
    return Estimate(value=value, low=min(value, estimate["low"]), high=max(value, estimate["high"]))


def temperature_of(answers: ClassAnswers, network: Any) -> Temperature:
    """The temperature fitted on answers, bound to the network that gave them."""
    return Temperature(fitted_temperature(answers.logits, answers.labels), network_digest(network))


def calibration_of(
    answers: ClassAnswers, temperature: float, *, confidence: float, resamples: int, seed: int
) -> dict[str, Any]:
    """The metrics of probabilities after scaling, and the reliability diagrams before and after it."""
    usual: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    return {
        "temperature": temperature,
        "metrics": probability_metrics_of(answers, temperature, **usual),
        "reliability": reliability(answers.logits, answers.labels),
        "reliability_scaled": reliability(answers.logits, answers.labels, temperature),
    }


def fit_temperature(model: Model, rows: Any) -> float:
    """Fit `model.temperature` on labelled rows that it was not trained on, and return its value; answers stay the same.

    rows     encoded rows, or rows with the task's columns.
    raises   ModelError where the task has no classes; DataError where there are no rows.
    """
    from moss_rlhf.tasks.loading import encoded

    task = TASKS[model.task]
    if not isinstance(task, TextClassification):
        raise ModelError(f"fit_temperature: is for classifiers, and this is a model for {model.task}.")
    ready = encoded(model, rows, judged=True)
    if not len(ready):
        raise DataError("fit_temperature: there are no rows to fit on; give validation rows.")
    answers = answer(task, TorchRuntime(model.network), ready, model.tokenizer)
    assert isinstance(answers, ClassAnswers)  # noqa: S101  # of a classification
    model.temperature = temperature_of(answers, model.network)
    return model.temperature.value


def sizes_of(model: Model, mean_length: float) -> dict[str, Any]:
    """Parameters, those that are not zero, and multiply-accumulates a token at the mean length."""
    return {
        "parameters": model.parameters,
        "nonzero": model.nonzero,
        "macs_per_token": macs_per_token(model.dimensions, mean_length),
    }


def gain_of(
    task: Task, before: Answers, after: Answers, *, confidence: float, resamples: int, seed: int
) -> dict[str, Any]:
    """The difference of the task's metric, after − before, on the same rows; "lower_is_better" where it is so.

    Of written translations it is BLEU's.
    """
    name, metric = next(iter(_metrics_for(task, after).items()))
    difference = paired_difference(
        before.statistics,
        after.statistics,
        metric=metric,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    direction = {"lower_is_better": True} if name in task.lower_is_better else {}
    return {"name": name, **difference, **direction}


def changed(before: ClassAnswers, after: ClassAnswers, most: int) -> tuple[list[int], int]:
    """Up to `most` rows whose answer changed, the largest move of confidence in the truth first; and how many did."""
    rows = np.flatnonzero(before.ids != after.ids)
    moved = np.abs(after.confidence_in_truth - before.confidence_in_truth)[rows]
    return [int(row) for row in rows[np.argsort(-moved, kind="stable")][:most]], len(rows)


def moved(before: TokenAnswers, after: TokenAnswers, most: int) -> list[int]:
    """Up to `most` rows, those first whose −log p a token moved the furthest."""
    furthest = np.argsort(-np.abs(after.losses - before.losses), kind="stable")
    return [int(row) for row in furthest[:most]]


def rewritten(before: WrittenAnswers, after: WrittenAnswers, most: int) -> list[int]:
    """Up to `most` rows that are written otherwise now, those first whose likeness to the reference moved furthest."""
    change = np.abs(after.row_scores - before.row_scores)
    rows = [row for row, texts in enumerate(zip(before.texts, after.texts, strict=True)) if len(set(texts)) > 1]
    return sorted(rows, key=lambda row: -change[row])[:most]


def confusion_of(answers: ClassAnswers) -> list[list[int]]:
    matrix: list[list[int]] = confusion(answers.labels, answers.ids, answers.classes).tolist()
    return matrix


def evaluate(
    model: Model, rows: Any, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Measure a model in PyTorch on labelled rows: metrics with intervals, rows, sizes.

    rows     encoded rows, or rows with the task's columns. From the latter a translator also writes its own
             translations, for BLEU and chrF, where sacrebleu is installed.
    raises   DataError where there is none, or none from which a language model foretells a token.
    """
    from moss_rlhf.tasks.loading import encoded

    task, runtime = TASKS[model.task], TorchRuntime(model.network)
    ready = encoded(model, rows, judged=True)
    if not len(ready):
        raise DataError("evaluate: there are no rows to measure on; give at least one with a text.")
    answers = answer(task, runtime, ready, model.tokenizer)
    usual: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    metrics = metrics_of(task, answers, **usual)
    if isinstance(task, Translation) and ready is not rows and has_sacrebleu():
        written = translate(model, runtime, ready, [row["target"] for row in rows])
        metrics |= metrics_of(task, written, **usual)
    result = {"metrics": metrics, "rows": len(ready), **sizes_of(model, float(np.mean(ready["length"])))}
    if model.temperature and isinstance(answers, ClassAnswers):
        result["calibration"] = calibration_of(answers, model.temperature.value, **usual)
    return result
