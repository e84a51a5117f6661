"""The method's own case study against plain fine-tuning: accuracy, paired, and the cost of both in operations.

`python benchmarks/case_study.py --work FOLDER [--set data.limit=2000 …] [--plain ACCURACY ROWS OPERATIONS]`, on top of
recipes/case-study.yaml.

Plain: the uncompressed model with the Hugging Face Trainer's defaults (3 epochs, AdamW at 5e-5 falling linearly,
float32, random order, each text's first tokens). Beside it the same with the recipe's way of cutting texts, so that
what this alone gains can be seen. Ours is what the recipe ships: the ONNX file. All answer the same test texts.
Operations are those of every training pass, padding included, of asking a teacher, and of the search's trials.
--plain: what the first contender reached on another machine, instead of training it here; then the difference is that
of two independent shares (normal approximation), wider than a paired one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from common import keep, read_report, table

from moss_rlhf import run
from moss_rlhf.evaluation import Answers, answer, gain_of, metrics_of
from moss_rlhf.measuring import same_threads
from moss_rlhf.model.device import on_accelerator
from moss_rlhf.model.runtime import OnnxRuntime, TorchRuntime
from moss_rlhf.pipeline import on_validation
from moss_rlhf.preparing import Session, prepare
from moss_rlhf.progress import Progress, quiet_libraries
from moss_rlhf.recipe import Recipe, read_recipe, with_values
from moss_rlhf.rundir import open_run
from moss_rlhf.tasks import TASKS

RECIPE = "recipes/case-study.yaml"
DEFAULTS = {"epochs": 3, "length_bucketing": False, "precision": "float32", "warmup": 0.0}
SHOWN = Progress()
INTERVALS = {"confidence": 0.95, "resamples": 2000, "seed": 0}


@dataclass(frozen=True)
class Contender:
    name: str
    answers: Answers
    flops: float
    bytes: int = 0


def plain(recipe: Recipe, name: str, output: Path, truncation: str) -> Contender:
    """The uncompressed model by the default training."""
    changed = {
        "stages": [{"finetune": DEFAULTS}],
        "search": None,
        "export": [],
        "data.augment": None,
        "data.clean": None,
        "data.truncation": truncation,
        "output": str(output),
    }
    recipe = with_values(recipe, changed)
    on_validation(recipe, "accuracy", SHOWN)
    with open_run(output) as place:
        session = prepare(recipe, place, SHOWN, same_threads())
        model = session.model_after(1)
        with on_accelerator(model.network):
            answers = asked(session, TorchRuntime(model.network), model.tokenizer)
        return Contender(name, answers, session.folders[0].read()["flops"])


def ours(recipe: Recipe, output: Path) -> tuple[Contender, dict[str, Any]]:
    """What the recipe ships."""
    run(with_values(recipe, {"output": str(output)}), progress=SHOWN)
    report = read_report(output)
    flops = report["cost"]["flops"] + report["cost"].get("search_flops", 0.0)
    recipe = read_recipe(output / "recipe.yaml")
    chosen = output / "search" / "best.yaml"
    recipe = read_recipe(chosen) if chosen.exists() else recipe
    with open_run(output) as place:
        session = prepare(with_values(recipe, {"output": str(output)}), place, SHOWN, same_threads())
        answers = asked(session, OnnxRuntime(output / report["after"]["artifact"]), session.model_after(1).tokenizer)
    return Contender("ours, the int8 file", answers, flops, report["after"]["bytes"]), report


def asked(session: Session, runtime: Any, tokenizer: Any) -> Answers:
    rows = session.rows_after(len(session.folders)).evaluation
    return answer(TASKS[session.recipe.task], runtime, rows, tokenizer)


@dataclass(frozen=True)
class Elsewhere:
    """The plain training, measured on another machine: how many of so many rows it answered rightly."""

    accuracy: float
    rows: int
    flops: float
    name: str = "plain, the first 256 tokens, on another machine"


def unpaired(before: Elsewhere, after: Contender, measured: Mapping[str, Any]) -> tuple[str, str, str]:
    """The difference of two shares of independent answers, and its normal interval."""
    found, rows = measured["metrics"]["accuracy"]["value"], measured["rows"]
    shares = ((before.accuracy, before.rows), (found, rows))
    error = sum(share * (1 - share) / count for share, count in shares) ** 0.5
    delta = found - before.accuracy
    p_value = 2 * NormalDist().cdf(-abs(delta) / error)
    between = f"({delta - 1.96 * error:+.4f} to {delta + 1.96 * error:+.4f})"
    return (
        f"{after.name}, against {before.name}",
        f"{delta:+.4f} {between}, p = {p_value:.2g}, unpaired",
        f"{after.flops / before.flops:.2f}× the operations",
    )


def row_of(contender: Contender, task: Any) -> tuple[str, str, str]:
    found = metrics_of(task, contender.answers, **INTERVALS)["accuracy"]
    return (
        contender.name,
        f"{found['value']:.4f} ({found['low']:.4f} to {found['high']:.4f})",
        f"{contender.flops:.3g} operations",
    )


def difference(task: Any, first: Contender, second: Contender) -> tuple[str, str, str]:
    gain = gain_of(task, first.answers, second.answers, **INTERVALS)
    return (
        f"{second.name}, against {first.name}",
        f"{gain['delta']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f}), p = {gain['p_value']:.2g}",
        f"{second.flops / first.flops:.2f}× the operations",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], help="fields of the recipe, for all contenders")
    parser.add_argument("--plain", nargs=3, type=float, metavar=("ACCURACY", "ROWS", "OPERATIONS"))
    options = parser.parse_args()
    quiet_libraries()
    recipe = read_recipe(RECIPE, options.set)
    task = TASKS[recipe.task]
    given = Elsewhere(options.plain[0], int(options.plain[1]), options.plain[2]) if options.plain else None
    trained = [] if given else plain_contenders(recipe, options.work)
    shipped, report = ours(recipe, options.work / "ours")
    speed = ", ".join(f"{ratio:.1f}× at batch {size}" for size, ratio in report["gain"]["speedup"].items())
    rows = [row_of(contender, task) for contender in (*trained, shipped)]
    rows += [difference(task, contender, shipped) for contender in trained]
    if given:
        rows.insert(0, (given.name, f"{given.accuracy:.4f} of {given.rows:,} rows", f"{given.flops:.3g} operations"))
        rows.append(unpaired(given, shipped, report["after"]))
    lost = f"{report['gain']['metric']['delta']:+.4f}"
    rows.append(
        ("ours, against its own uncompressed parent", f"{lost}, {1 / report['gain']['size']:.2f}× bytes", speed)
    )
    title = f"`{RECIPE}` {' '.join(options.set)}".strip()
    keep("case_study", table(title, rows, ("what", "test accuracy", "cost")))


def plain_contenders(recipe: Recipe, work: Path) -> list[Contender]:
    default = plain(recipe, "plain, the first 256 tokens", work / "plain", "head")
    if recipe.data.truncation == "head":
        return [default]
    return [default, plain(recipe, f"plain, {recipe.data.truncation}", work / "plain-cut", recipe.data.truncation)]


if __name__ == "__main__":
    main()
