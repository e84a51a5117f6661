"""The method's own case study against plain fine-tuning: accuracy, paired, and the cost of both in operations.

`python benchmarks/case_study.py --work FOLDER [--set data.limit=2000 …]`, on top of recipes/case-study.yaml.

Plain: the uncompressed model with the Hugging Face Trainer's defaults (3 epochs, AdamW at 5e-5 falling linearly,
float32, random order, each text's first tokens). Beside it the same with the recipe's way of cutting texts, so that
what this alone gains can be seen. Ours is what the recipe ships: the ONNX file. All answer the same test texts.
Operations are those of every training pass, padding included, and of asking the teacher; a search's are not counted.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
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
    recipe = read_recipe(output / "recipe.yaml")
    chosen = output / "search" / "best.yaml"
    recipe = read_recipe(chosen) if chosen.exists() else recipe
    with open_run(output) as place:
        session = prepare(with_values(recipe, {"output": str(output)}), place, SHOWN, same_threads())
        answers = asked(session, OnnxRuntime(output / report["after"]["artifact"]), session.model_after(1).tokenizer)
    return Contender("ours, the int8 file", answers, report["cost"]["flops"], report["after"]["bytes"]), report


def asked(session: Session, runtime: Any, tokenizer: Any) -> Answers:
    rows = session.rows_after(len(session.folders)).evaluation
    return answer(TASKS[session.recipe.task], runtime, rows, tokenizer)


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
    options = parser.parse_args()
    quiet_libraries()
    recipe = read_recipe(RECIPE, options.set)
    task = TASKS[recipe.task]
    default = plain(recipe, "plain, the first 256 tokens", options.work / "plain", "head")
    cut = plain(recipe, f"plain, {recipe.data.truncation}", options.work / "plain-cut", recipe.data.truncation)
    shipped, report = ours(recipe, options.work / "ours")
    speed = ", ".join(f"{ratio:.1f}× at batch {size}" for size, ratio in report["gain"]["speedup"].items())
    rows = [row_of(contender, task) for contender in (default, cut, shipped)]
    rows += [difference(task, default, shipped), difference(task, cut, shipped)]
    rows.append(("ours, against its own uncompressed parent", f"{1 / report['gain']['size']:.2f}× bytes", speed))
    title = f"`{RECIPE}` {' '.join(options.set)}".strip()
    keep("case_study", table(title, rows, ("what", "test accuracy", "cost")))


if __name__ == "__main__":
    main()
