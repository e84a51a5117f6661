"""Losses of the labels: pure functions of logits, each the mean over targets (docs/losses.md derives the gradients).

In what follows z are the logits of one target, p = softmax(z), y its label of K classes, and q the distribution that is
asked for: one-hot, or smoothed by ε to q_k = (1 − ε) · [k = y] + ε / K (Szegedy et al. 2016, arXiv:1512.00567, §7).

Every loss is linear in the rows, class weights included: the mean of eight rows is the mean of eight means of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot

from moss_rlhf.errors import RecipeError, nearest
from moss_rlhf.finetuning.options import Loss
from moss_rlhf.recipe.pairs import loss_fault
from moss_rlhf.tasks import Task, TextClassification
from moss_rlhf.tasks.language import IGNORED

_LEAST = 1e-7  # of 1 − p under a power below 1, whose slope has no bound at 0


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, gamma: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Σ_k q_k · (1 − p_k)^gamma · (−log p_k), times the label's weight; the mean over targets.

    With gamma 0 the cross-entropy of q and p, whose gradient is p − q. Above 0 the focal loss (Lin et al. 2017,
    arXiv:1708.02002, eq. 4), which counts targets less the better they are known.

    logits    (targets, classes); computed in float32.
    labels    (targets,) class ids.
    weights   (classes,) or None: all 1.
    returns   () float32.
    """
    log_p = log_softmax(logits.float(), dim=-1)
    losses = -log_p
    if gamma:
        losses = losses * (-torch.expm1(log_p)).clamp_min(_LEAST) ** gamma
    each = losses.gather(1, labels[:, None])[:, 0]
    if label_smoothing:
        each = torch.lerp(each, losses.mean(dim=1), label_smoothing)
    return _mean(each, labels, weights)


def mean_squared_error(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Σ_k (p_k − q_k)² of the probabilities, times the label's weight; the mean over targets (Brier 1950).

    Its gradient is 2 p_j · ((p_j − q_j) − Σ_k p_k (p_k − q_k)): it is bounded, and vanishes where p is sure of the
    wrong class, unlike that of the cross-entropy.

    logits, labels, weights   as above.
    """
    p = logits.float().softmax(dim=-1)
    q = torch.lerp(one_hot(labels, p.shape[1]).to(p), torch.full_like(p, 1 / p.shape[1]), label_smoothing)
    return _mean((p - q).square().sum(dim=1), labels, weights)


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """½ KL(p ‖ p') + ½ KL(p' ‖ p) of two passes' answers, the mean over targets (Liang et al. 2021, arXiv:2106.14448).

    The two sum to Σ_k (p_k − p'_k)(log p_k − log p'_k), so nothing is lost in a difference of large numbers.

    first, second   (targets, classes) logits; computed in float32.
    """
    one, other = log_softmax(first.float(), dim=-1), log_softmax(second.float(), dim=-1)
    return 0.5 * ((one.exp() - other.exp()) * (one - other)).sum(dim=-1).mean()


def _mean(each: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    return each.mean() if weights is None else (each * weights.to(each.device)[labels]).mean()


def class_weights(asked: str | Mapping[str, float], names: Sequence[str], labels: ArrayLike) -> Tensor:
    """The weight of each class, (classes,) float32, scaled so that their mean over the training rows is 1.

    So the size of the loss, and with it of the learning rate, stays what it was, and every row's share can be told
    without the other rows of its batch.

    asked    'balanced': rows / (classes that occur · rows of the class); or {label: weight}, others weigh 1.
    names    of the classes, in the order of their ids.
    labels   class ids of the training rows.
    raises   RecipeError where a label is unknown.
    """
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=len(names))
    if isinstance(asked, str):
        wanted = 1 / np.maximum(counts, 1)
    else:
        refuse_unknown_labels(asked, names, "finetune.loss.class_weights")
        wanted = np.array([float(asked.get(name, 1.0)) for name in names])
    return torch.tensor(wanted * counts.sum() / (wanted * counts).sum(), dtype=torch.float32)


def refuse_unknown_labels(asked: Mapping[str, float], names: Sequence[str], field: str) -> None:
    """RecipeError where a weight is for no label of the data."""
    for label in asked:
        if label not in names:
            raise RecipeError(f"{field}: the data has no label {label!r}; {nearest(str(label), names)}")


@dataclass(frozen=True)
class LabelLoss:
    """The loss of a batch's labels as the user asked for it.

    weights   (classes,) float32, or None.
    """

    task: Task
    options: Loss
    weights: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch's targets, () float32; logits and labels as the task has them."""
        rows, classes = self._targets(logits, labels)
        smoothing = self.options.label_smoothing
        if self.options.kind == "mean_squared_error":
            return mean_squared_error(rows, classes, smoothing, self.weights)
        return cross_entropy(rows, classes, smoothing, self.options.gamma, self.weights)

    def _targets(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.task, TextClassification):
            return logits, labels
        logits, labels = self.task.aligned(logits, labels)
        inside = labels != IGNORED
        return logits[inside], labels[inside]


def label_loss(task: Task, options: Loss, names: Sequence[str], labels: ArrayLike) -> LabelLoss:
    """The loss that was asked for.

    names    of the classes.
    labels   class ids of the training rows; neither is looked at for a language model.
    raises   RecipeError on a loss that is not for the task, or weights of unknown labels.
    """
    if not task.has_classes and (fault := loss_fault(task.name, options)):
        raise RecipeError(f"finetune.{fault}")
    asked = options.class_weights
    return LabelLoss(task, options, None if asked is None else class_weights(asked, names, labels))
