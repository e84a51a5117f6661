"""Search over a recipe's fields: trials on validation, the winner trained again with several seeds.

optuna proposes (TPE; Bergstra et al. 2011) and stops bad trials (the median rule). What it has seen lies in a journal:
a killed search goes on where it stopped, the interrupted trial from its last checkpoint. Trials are runs of stages in a
directory that keeps stages by their fingerprints, so trials that share their first stages do them once. The sampler is
seeded anew for every round by what is finished, so a resumed search proposes what one never stopped would have.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from moss_rlhf.errors import MachineError, RecipeError, UserError
from moss_rlhf.files import digest, write_text
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import RangeSpec, Recipe, SearchSpec, recipe_values, recipe_yaml, with_values
from moss_rlhf.tasks import TASKS

_STAGE = 10_000  # evaluations of one stage, at most: steps of a trial's curve are stage · this + evaluation
_WARMUP = 5  # trials before the median rule, and before TPE's model


@dataclass(frozen=True)
class Measured:
    """What one training came to: the metric on validation, the folders of its stages, the operations it took."""

    value: float
    folders: tuple[Path, ...]
    flops: float = 0.0


Measure = Callable[[Recipe, str, Progress], Measured]
"""(recipe, metric, progress): run the stages of a recipe into its output; a function of a module, for processes."""


@dataclass(frozen=True)
class Found:
    recipe: Recipe
    facts: dict[str, Any]


def search(
    recipe: Recipe, spec: SearchSpec, measure: Measure, folder: Path, progress: Progress, basis: str = ""
) -> Found:
    """Try, choose, and train the winner `spec.seeds` times; the recipe with the winner's values, and the facts.

    folder   where the journal and the trials lie.
    basis    a fingerprint of what the recipe's names stand for, its rows and weights: with others, what trials came to
             before no longer counts.
    raises   MachineError where optuna is missing; RecipeError where every trial failed.
    """
    with _quiet():
        study = _Study(recipe, spec, measure, folder, progress, basis)
        study.run()
        best = study.best_recipe()
        write_text(folder / "best.yaml", recipe_yaml(best))
        again = study.train_again(best)
        for prefix in folder.glob("*/prefix"):  # what trials had of one another's frozen blocks
            shutil.rmtree(prefix)
        return Found(best, study.facts() | again)


@contextmanager
def _quiet() -> Iterator[None]:
    """What optuna says of itself stays off the screen."""
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MachineError("search: optuna is not installed. Run: pip install 'moss-rlhf[search]'") from None
    return optuna


class _Study:
    """One search: its journal, its rounds, what it keeps of the trials' files."""

    def __init__(
        self, recipe: Recipe, spec: SearchSpec, measure: Measure, folder: Path, progress: Progress, basis: str
    ) -> None:
        self.base, self.spec, self.measure = recipe.model_copy(update={"search": None}), spec, measure
        self.tried = _on_rows(self.base, spec.rows)
        self.folder, self.progress = folder, progress
        task = TASKS[recipe.task]
        self.metric = spec.metric or task.metric
        self.sign = -1 if self.metric in task.lower_is_better or self.metric == "loss" else 1
        self.journal = folder / "journal.log"
        folder.mkdir(parents=True, exist_ok=True)
        varied = {field: recipe_values(recipe)["search"]["space"][field] for field in spec.space}
        self.name = digest([recipe_values(self.tried), varied, self.metric, spec.stop_bad, basis])[:16]
        self.study = _open_study(self.journal, self.name)

    def run(self) -> None:
        """Rounds of trials until as many as asked are finished."""
        with self.progress.bar("searching", self.spec.trials) as bar:
            bar.advance(len(self._finished()))
            while (left := self.spec.trials - len(self._finished())) > 0:
                before = len(self._finished())
                self._round(min(left, self.spec.parallel))
                bar.advance(len(self._finished()) - before, self._best_text())

    def _finished(self) -> list[Any]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    def _best_text(self) -> str:
        done = self._complete()
        return f"best {self.metric} {self.sign * max(trial.value for trial in done):.4g}" if done else ""

    def _complete(self) -> list[Any]:
        return [trial for trial in self._finished() if trial.value is not None and trial.state.name == "COMPLETE"]

    def _round(self, count: int) -> None:
        open_trials = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name == "RUNNING"]
        numbers = [trial.number for trial in open_trials][:count]
        optuna, seen = _optuna(), len(self._finished())
        self.study.sampler = optuna.samplers.TPESampler(
            seed=int(np.random.default_rng((self.base.seed, seen)).integers(2**31)),
            n_startup_trials=_WARMUP,
            constant_liar=self.spec.parallel > 1,
        )
        while len(numbers) < count:
            numbers.append(self.study.ask(_distributions(self.spec.space)).number)
        self._tell(numbers, self._measure_all(numbers))

    def _measure_all(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        jobs = [self._job(number, worker) for worker, number in enumerate(numbers)]
        if self.spec.parallel == 1:
            return [_run_trial(job, self.progress) for job in jobs]
        with ProcessPoolExecutor(self.spec.parallel, mp_context=get_context("spawn")) as pool:
            return list(pool.map(_run_trial, jobs))

    def _job(self, number: int, worker: int) -> _Job:
        recipe = with_values(self.tried, self._values(number) | {"output": str(self.folder / f"worker-{worker}")})
        return _Job(recipe, self.metric, self.sign, self.measure, self.journal, self.name, number, self.spec.stop_bad)

    def _values(self, number: int) -> dict[str, Any]:
        params = self.study.get_trials(deepcopy=False)[number].params
        return {field: _value_of(self.spec.space[field], given) for field, given in params.items()}

    def _tell(self, numbers: Sequence[int], results: Sequence[Mapping[str, Any]]) -> None:
        states = _optuna().trial.TrialState
        for number, result in zip(numbers, results, strict=True):
            self.study._storage.set_trial_user_attr(self._id(number), "result", dict(result))
            if result["state"] == "done":
                self.study.tell(number, self.sign * result["value"])
            else:
                self.study.tell(number, state=states.PRUNED if result["state"] == "stopped" else states.FAIL)
            values = ", ".join(f"{field} {value}" for field, value in self._values(number).items())
            self.progress.say(f"  trial {number}: {values}: {_outcome(result, self.metric)}")
        self._drop_files()

    def _id(self, number: int) -> int:
        found: int = self.study.get_trials(deepcopy=False)[number]._trial_id
        return found

    def _drop_files(self) -> None:
        """Of all trials, only the best one's stages stay."""
        complete = self._complete()
        best = max(complete, key=lambda trial: (trial.value, -trial.number), default=None)
        kept = set(best.user_attrs["result"]["folders"]) if best else set()
        for stage in self.folder.glob("worker-*/stages/*"):
            if str(stage) not in kept:
                shutil.rmtree(stage)

    def best_recipe(self) -> Recipe:
        """The base recipe with the values of the best trial; of equals the earlier."""
        complete = self._complete()
        if not complete:
            reasons = {str(trial.user_attrs["result"].get("why")) for trial in self._finished()}
            raise RecipeError(f"search: none of {self.spec.trials} trials came to an end: {'; '.join(sorted(reasons))}")
        best = max(complete, key=lambda trial: (trial.value, -trial.number))
        return with_values(self.base, self._values(best.number))

    def train_again(self, best: Recipe) -> dict[str, Any]:
        """The winner with other seeds: what its metric is worth, luck of the choice left out; and what all took."""
        kept = f"again {digest(recipe_values(best))[:16]}"  # with more trials another may win
        known = self.study.user_attrs.get(kept, {"values": [], "flops": 0.0})
        values, flops = list(known["values"]), float(known["flops"])
        for seed in range(best.seed + 1 + len(values), best.seed + 1 + self.spec.seeds):
            self.progress.say(f"  the winner again, seed {seed}")
            recipe = with_values(best, {"seed": seed, "output": str(self.folder / "winner")})
            measured = self.measure(recipe, self.metric, self.progress)
            values, flops = [*values, measured.value], flops + measured.flops
            shutil.rmtree(self.folder / "winner" / "stages")
            self.study.set_user_attr(kept, {"values": values, "flops": flops})
        tried = sum(trial.user_attrs["result"].get("flops", 0.0) for trial in self._finished())
        winner = {"seeds": len(values), "values": values, **mean_interval(values)} if values else None
        return {"winner": winner, "flops": tried + flops}

    def facts(self) -> dict[str, Any]:
        """Every trial: what it tried and what came of it."""
        trials = [
            {"number": trial.number, "values": self._values(trial.number)}
            | {name: value for name, value in trial.user_attrs["result"].items() if name != "folders"}
            for trial in self._finished()
        ]
        about = {"metric": self.metric, "lower_is_better": self.sign < 0, "split": "validation", "rows": self.spec.rows}
        return about | {"trials": trials}


def _on_rows(recipe: Recipe, rows: int | None) -> Recipe:
    """The recipe with so many training rows at most; its validation rows stay."""
    if rows is None:
        return recipe
    given = recipe.data.limit
    limits = dict(given) if isinstance(given, dict) else {} if given is None else {"validation": given, "test": given}
    most = given if isinstance(given, int) else limits.get("train", rows)
    return with_values(recipe, {"data.limit": limits | {"train": min(rows, most)}})


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, float | None]:
    """Mean and its Student interval, ± t · s / √n; no interval of a single value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    from scipy import stats

    half = float(stats.t.ppf((1 + confidence) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _outcome(result: Mapping[str, Any], metric: str) -> str:
    if result["state"] == "done":
        return f"{metric} {result['value']:.4g}"
    return "stopped early" if result["state"] == "stopped" else f"failed ({result['why']})"


def _open_study(journal: Path, name: str) -> Any:
    """The study of that name in the journal: another search into the same output is another study."""
    optuna = _optuna()
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=_WARMUP)
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=name,
        direction="maximize",
        pruner=pruner,
        load_if_exists=True,
    )


def _distributions(space: Mapping[str, RangeSpec | list[Any]]) -> dict[str, Any]:
    library = _optuna().distributions
    return {field: _distribution(library, choice) for field, choice in space.items()}


def _distribution(library: Any, choice: RangeSpec | list[Any]) -> Any:
    if isinstance(choice, list):
        return library.CategoricalDistribution([json.dumps(value) for value in choice])  # any value, as text
    low, high = choice.ends
    if choice.whole:
        return library.IntDistribution(low, high, log=choice.log, step=int(choice.step or 1))
    return library.FloatDistribution(low, high, log=choice.log, step=choice.step)


def _value_of(choice: RangeSpec | list[Any], given: Any) -> Any:
    return json.loads(given) if isinstance(choice, list) else given


@dataclass(frozen=True)
class _Job:
    """One trial, as a process of its own may be given it."""

    recipe: Recipe
    metric: str
    sign: int
    measure: Measure
    journal: Path
    study: str
    number: int
    stop_bad: bool


def _run_trial(job: _Job, progress: Progress | None = None) -> dict[str, Any]:
    """{"state": done, stopped or failed, "value", "why", "flops", "folders"}; a user's error fails the trial alone.

    What a trial took that came to no end is not known.
    """
    optuna = _optuna()
    with _quiet():
        study = _open_study(job.journal, job.study)
        trial = optuna.trial.Trial(study, study.get_trials(deepcopy=False)[job.number]._trial_id)
        watching = _Watching(trial, job, progress)
        try:
            measured = job.measure(job.recipe, job.metric, watching)
        except optuna.TrialPruned:
            return _unfinished("stopped", "below the median of the finished trials")
        except UserError as error:
            return _unfinished("failed", str(error))
        return {
            "state": "done",
            "value": measured.value,
            "why": None,
            "flops": measured.flops,
            "folders": [str(folder) for folder in measured.folders],
        }


def _unfinished(state: str, why: str) -> dict[str, Any]:
    return {"state": state, "value": None, "why": why, "flops": 0.0, "folders": []}


class _Watching(Progress):
    """Reads the evaluations of a trial's fine-tunings as they are logged, and ends the trial where it is hopeless.

    What pretraining calls its accuracy is that of masked words: a trial that masks more is no worse for it.
    """

    def __init__(self, trial: Any, job: _Job, progress: Progress | None) -> None:
        super().__init__(quiet=True)
        self.trial, self.job, self.shown = trial, job, progress
        self.stage, self.evaluation, self.counts = 0, 0, True

    def event(self, event: str, /, **fields: Any) -> None:
        super().event(event, **fields)
        if event == "stage started":
            number, kind, *_ = str(fields["name"]).split("-")
            self.stage, self.evaluation, self.counts = int(number), 0, kind != "pretrain"
        elif event == "evaluated" and self.counts and self.job.metric in fields:
            self._report(self.job.sign * fields[self.job.metric])

    def _report(self, value: float) -> None:
        step = self.stage * _STAGE + self.evaluation
        self.evaluation += 1
        self.trial.report(value, step)  # of a step that is known already, optuna keeps the first value
        if self.job.stop_bad and self.trial.should_prune():
            raise _optuna().TrialPruned
