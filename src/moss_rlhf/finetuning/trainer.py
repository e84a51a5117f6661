"""The one Trainer subclass, and the callbacks that steer it.

What transformers' Trainer does not do, and why it is done here:
- every parameter is in the optimizer from the start: Trainer takes only those with requires_grad at that moment, and
  layers unfrozen later would silently never move (frozen ones have no gradient: AdamW neither moves nor decays them);
- checkpoints are written beside their place and renamed: Trainer writes in place, and a kill would leave half of one;
- the order of rows is a function of (seed, epoch), so a resumed run ends in the same bits as one never stopped;
- the loss since the last logged point goes into the checkpoint: Trainer forgets it, and a resumed curve would differ;
- a batch is cut into pieces with the gradient of the whole: Trainer's accumulation averages micro-batches, however many
  targets each has, and a batch that does not fit ends the training;
- evaluations, early stopping, saving and the best checkpoint follow one setting instead of five entangled ones.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from moss_rlhf.errors import Interrupted, ModelError
from moss_rlhf.files import new_file
from moss_rlhf.finetuning.averaging import keep_for_average, steps_to_average
from moss_rlhf.finetuning.companions import Companions
from moss_rlhf.finetuning.layers import LayerGroup
from moss_rlhf.finetuning.objective import Goal
from moss_rlhf.finetuning.optimizers import make_optimizer
from moss_rlhf.finetuning.options import Averaging, Optimizer
from moss_rlhf.finetuning.pieces import Pieces, in_pieces
from moss_rlhf.finetuning.sampling import EpochBatches
from moss_rlhf.finetuning.timetable import Timetable
from moss_rlhf.model.cost import Dimensions, training_flops
from moss_rlhf.progress import Bar, Progress
from moss_rlhf.strategy import Judge, reductions

SAVE_EVERY_SECONDS = 60.0
BEST = "best.safetensors"
_UNLOGGED = "unlogged loss"
_PIECES = "rows of a piece"
_ROWS_SHOWN = 32


@dataclass(frozen=True)
class Plan:
    """What one fine-tuning does, step by step; nothing here changes while it runs."""

    groups: tuple[LayerGroup, ...]
    timetable: Timetable
    objective: Goal
    companions: Companions
    optimizer: Optimizer
    weight_decay: float
    evaluate_at: frozenset[int]  # steps
    steps: int
    judge: Judge
    patience: int | None
    average: Averaging | None
    dimensions: Dimensions
    plateau: Plateau | None = None


@dataclass(frozen=True)
class Plateau:
    """Rates are multiplied by `factor` after every `patience` evaluations in a row without a better one."""

    factor: float
    patience: int

    def multiplier(self, step: int, log: Sequence[Mapping[str, float]], judge: Judge) -> float:
        """At a step, of what was evaluated before it: so a resumed run has the rates of one never stopped."""
        seen = [entry for entry in log if judge.sees(entry) and entry["step"] < step]
        values = [(entry[f"eval_{judge.metric}"], entry["eval_loss"]) for entry in seen]
        return self.factor ** reductions(values, self.patience, judge.lower_is_better)


class LayerwiseTrainer(Trainer):
    """Trains a `Plan`; `evaluator` measures the network and returns {"loss", metric: value}."""

    def __init__(
        self,
        *,
        plan: Plan,
        evaluator: Callable[[], dict[str, float]],
        batches: EpochBatches,
        pieces: Pieces,
        progress: Progress,
        network: Any,
        arguments: TrainingArguments,
        collate: Callable[[Any], Any],
        train: Any,
    ) -> None:
        super().__init__(model=network, args=arguments, data_collator=collate, train_dataset=train)
        self.plan, self.evaluator, self.batches, self.pieces, self.progress = plan, evaluator, batches, pieces, progress
        self.remove_callback(PrinterCallback)
        self._folder: str | None = None
        self._carried_seconds = 0.0
        self._started = time.monotonic()

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = make_optimizer(self.plan.optimizer, self._parameter_groups())
        return self.optimizer

    def _parameter_groups(self) -> Iterator[dict[str, Any]]:
        """Two groups a layer group, matrices decay, biases and norms do not; then one for each companion's own.

        Where decay is part of the gradient, the embeddings have none: see `regularisers.py`.
        """
        coupled = not self.plan.optimizer.decouples
        for index, (group, rate) in enumerate(zip(self.plan.groups, self.plan.timetable.peaks, strict=True)):
            matrices = [parameter for _, parameter in group.parameters if parameter.dim() > 1]
            vectors = [parameter for _, parameter in group.parameters if parameter.dim() <= 1]
            yield {
                "params": matrices,
                "lr": rate,
                "weight_decay": 0.0 if coupled and index == 0 else self.plan.weight_decay,
            }
            yield {"params": vectors, "lr": rate, "weight_decay": 0.0}
        for extra in self.plan.companions.extras():
            yield {"params": [extra.parameter], "lr": extra.learning_rate, "weight_decay": extra.weight_decay}

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        groups = len(self.plan.groups)
        layers = [partial(self._multiplier, group) for group in range(groups) for _ in range(2)]
        extras = [partial(self._multiplier, groups - 1)] * len(self.plan.companions.extras())
        self.lr_scheduler = LambdaLR(self.optimizer, [*layers, *extras])
        return self.lr_scheduler

    def _multiplier(self, group: int, step: int) -> float:
        share, plateau = self.plan.timetable.multiplier(step, group), self.plan.plateau
        return share * plateau.multiplier(step, self.state.log_history, self.plan.judge) if plateau else share

    @property
    def rates(self) -> list[float]:
        """The learning rate of each layer group now."""
        return [float(group["lr"]) for group in self.optimizer.param_groups[: 2 * len(self.plan.groups) : 2]]

    def _get_learning_rate(self) -> float:
        return self.rates[-1]  # the head's, which is the recipe's

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a batch, in pieces where one at once is too much; its mean loss."""
        model.train()
        batch = self._prepare_inputs(inputs)

        def backward(piece: Mapping[str, Tensor], share: float) -> Tensor:
            with self.plan.companions.around(piece):  # the backward pass too: checkpointed blocks run again in it
                with self.compute_loss_context_manager():
                    loss = self.plan.companions.penalised(self.plan.objective(model, piece))
                self._refuse_infinite(loss, piece)
                self.accelerator.backward(loss * share)
            return loss.detach() * share

        return in_pieces(self.pieces, batch, self.plan.objective.targets, backward, self._start_over)

    def _start_over(self, rows: int) -> None:
        self.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.progress.say(f"  a batch does not fit into memory; going on in pieces of {rows} rows, to the same result")

    def _refuse_infinite(self, loss: Tensor, piece: Mapping[str, Tensor]) -> None:
        if not loss.isfinite():
            rows = ", ".join(map(str, piece["row"].tolist()[:_ROWS_SHOWN]))
            raise ModelError(
                f"finetune: the loss became {loss.item()} at step {self.state.global_step}, on rows {rows} of train "
                "(counted from 0). Lower learning_rate, look at those rows, or look for inf or nan in the checkpoint."
            )

    def floating_point_ops(self, inputs: Mapping[str, Tensor]) -> float:
        rows, length = inputs["input_ids"].shape
        lowest = self.plan.timetable.trains(self.state.global_step).index(True)
        once = training_flops(self.plan.dimensions, length, rows * length, max(0, lowest - 1))
        return once * self.plan.objective.passes + self.plan.companions.flops(length, rows * length)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        with self.plan.companions.as_shipped():
            found = self.evaluator()
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.progress.event("evaluated", step=self.state.global_step, **found)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def seconds(self) -> float:
        """Training time, that of interrupted runs which this one resumes included."""
        return self._carried_seconds + time.monotonic() - self._started

    def pick_up(self) -> None:
        """Start the clock, and go on from what the checkpoint says of the time and the loss so far."""
        log = self.state.log_history
        self._carried_seconds, self._started = (log[-1]["seconds"] if log else 0.0), time.monotonic()
        unlogged = self.state.stateful_callbacks.get(_UNLOGGED)
        if unlogged is not None:
            self._tr_loss += unlogged["loss"]
            self._globalstep_last_logged = unlogged["since"]
            self.pieces.rows = self.state.stateful_callbacks[_PIECES]["rows"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "seconds": round(self.seconds, 3)}, start_time)

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._folder or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._folder = str(final.parent / "partial")
        # the one part of the state that transformers keeps as it is, whatever its name
        unlogged = {"loss": self._tr_loss.item(), "since": self._globalstep_last_logged}
        self.state.stateful_callbacks[_UNLOGGED] = unlogged
        self.state.stateful_callbacks[_PIECES] = {"rows": self.pieces.rows}
        try:
            super()._save_checkpoint(model, trial)
            (Path(self._folder) / final.name).replace(final)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        for older in checkpoints(final.parent)[:-1]:
            shutil.rmtree(older)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # weights alone: config and tokenizer stand in the stage's input, and training_args.bin is a pickle
        place = Path(output_dir or self.args.output_dir)
        place.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(place / "model.safetensors"))
        self.plan.companions.save(place)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.plan.companions.load(Path(resume_from_checkpoint))


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, the oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda place: int(place.name.rpartition("-")[2]))


class Conductor(TrainerCallback):
    """Freezes and thaws layers, leads the companions, decides when to evaluate, save and stop, shows how it goes."""

    def __init__(self, trainer: LayerwiseTrainer, bar: Bar, save_every_seconds: float) -> None:
        self.trainer, self.plan, self.bar = trainer, trainer.plan, bar
        self.save_every_seconds = save_every_seconds
        self.stop_requested = threading.Event()
        self.saved_at = time.monotonic()
        self.shown: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.pick_up()
        self.bar.advance(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for group, trains in zip(self.plan.groups, self.plan.timetable.trains(state.global_step), strict=True):
            group.train(trains)
        self.plan.companions.before_step(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for extra in self.plan.companions.extras():
            extra.parameter.grad = None  # Trainer empties the gradients of the network alone
        self.plan.companions.after_step(state.global_step, self.trainer.rates)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_evaluate = state.global_step in self.plan.evaluate_at
        waited = time.monotonic() - self.saved_at
        if self.stop_requested.is_set() or waited > self.save_every_seconds:
            control.should_save = True
        self.bar.advance(1, "  ".join(f"{name} {value:.4g}" for name, value in self.shown.items()))
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        metric = self.plan.judge.metric
        names = {"loss": "loss", "learning_rate": "rate", f"eval_{metric}": metric}
        self.shown |= {names[name]: value for name, value in (logs or {}).items() if name in names}

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        best, folder = self.plan.judge.best(state.log_history), Path(args.output_dir)
        with self.plan.companions.as_shipped():
            if best.step == state.global_step:
                with new_file(folder / BEST) as place:
                    save_model(self.trainer.model, str(place))
            if self.plan.average:
                wanted = steps_to_average(state.log_history, self.plan.average, self.plan.judge)
                keep_for_average(self.trainer.model, state.global_step, wanted, folder)
        tired = self.plan.patience is not None and best.waited >= self.plan.patience
        control.should_training_stop |= tired
        # from a checkpoint of the end, training would go on, past early stopping; from the one before, it ends the same
        control.should_save = not tired and state.global_step < self.plan.steps
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved_at = time.monotonic()
        if self.stop_requested.is_set():
            raise Interrupted(
                f"stopped at step {state.global_step} of {self.plan.steps}; run again to go on from there"
            )

    @contextmanager
    def catching_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C lets the step end and saves; the second stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def request(*_: object) -> None:
            self.stop_requested.set()
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
