"""THE STORY: load → stages in order → export → evaluate → report. Read this first."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moss_rlhf.artifacts import torch_artifact
from moss_rlhf.checking import check_candidates, settled
from moss_rlhf.evaluation import PeakMemory, describe_machine, versions
from moss_rlhf.files import copy_directory, read_json, write_json, write_text
from moss_rlhf.measuring import PROTOCOL, Measuring, same_threads
from moss_rlhf.model.checkpoint import save_checkpoint
from moss_rlhf.preparing import Session, prepare
from moss_rlhf.progress import Progress, quiet_libraries
from moss_rlhf.recipe import Recipe, make_recipe, read_recipe, recipe_values, recipe_yaml, stage_kind, stage_spec
from moss_rlhf.reporting import write_page
from moss_rlhf.rundir import RunDirectory, open_run
from moss_rlhf.searching import Found, Measured, search
from moss_rlhf.shipping import ship, ship_for_vllm
from moss_rlhf.stages import apply_stage


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path, *, fresh: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Do what a recipe says; returns the report, which also stands in `output`/report.json and report.html.

    fresh    start over instead of going on from the stages that are finished.
    raises   UserError where the recipe, data, model or machine can't do it; Interrupted after Ctrl-C, resumable.
    """
    recipe, progress = settled(_as_recipe(recipe)), progress or Progress(quiet=True)
    quiet_libraries()
    with open_run(Path(recipe.output), fresh) as place:
        write_text(place.path / "recipe.yaml", recipe_yaml(recipe))
        progress = progress.logging_to(place.log)
        found = _search(recipe, place, progress)
        session = prepare(found.recipe if found else recipe, place, progress, same_threads())
        for note in session.notes:
            progress.say(f"note: {note}")
        if (finished := _finished_report(session)) is not None:
            progress.say("finished before; --fresh starts over")
            return finished
        stages = [_do_stage(session, index) for index in range(len(session.folders))]
        header, compared = _header(session), _compare(session)
        notes = {"notes": [*header["notes"], *compared["notes"]]}
        cost = _cost(session, stages) | ({"search_flops": found.facts["flops"]} if found else {})
        report = header | compared | notes | {"stages": stages, "cost": cost}
        report |= {"search": found.facts} if found else {}
        write_page(report, place.path / "report.html")
        write_json(place.path / "report.json", report)  # last: it says that all else stands
        progress.event("finished", gain=report["gain"])
        return report


def _search(recipe: Recipe, place: RunDirectory, progress: Progress) -> Found | None:
    """The winner of the recipe's search. What trials found counts as long as the data and the model stay the same."""
    if recipe.search is None:
        return None
    check_candidates(recipe)
    basis = prepare(recipe.model_copy(update={"search": None}), place, progress, same_threads()).fingerprint
    return search(recipe, recipe.search, on_validation, place.path / "search", progress, basis)


def on_validation(recipe: Recipe, metric: str, progress: Progress) -> Measured:
    """Run the stages alone and look at validation: a trial of a search, which never sees the test split's answers."""
    with open_run(Path(recipe.output)) as place:
        session = prepare(recipe, place, progress.logging_to(place.log), same_threads())
        session = replace(session, prefix=place.path / "prefix")  # the next trial may freeze the same blocks
        stages = [_do_stage(session, index) for index in range(len(recipe.stages))]
    found = stages[-1]["measurement"]["metrics"][metric]["value"]
    flops = sum(stage["flops"] for stage in stages if not stage["resumed"])
    return Measured(found, tuple(folder.path for folder in session.folders), flops)


def _as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return make_recipe(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe)


def _finished_report(session: Session) -> dict[str, Any] | None:
    place = session.place.path / "report.json"
    report = read_json(place) if place.exists() and (session.place.path / "report.html").exists() else {}
    return report if report.get("fingerprint") == session.fingerprint else None


def _do_stage(session: Session, index: int) -> dict[str, Any]:
    """One stage, or what it left when it was finished before."""
    stage, folder, progress = session.recipe.stages[index], session.folders[index], session.progress
    title = f"stage {index + 1} of {len(session.folders)}: {stage_kind(stage)}"
    if folder.done:
        progress.say(f"{title}, finished before")
        return folder.read() | {"resumed": True}
    progress.say(title)
    progress.event("stage started", name=folder.path.name)
    model, context, started = session.model_after(index), session.context(index), time.monotonic()
    with PeakMemory() as peak:
        outcome = apply_stage(stage_spec(stage), model, context)
    seconds = outcome.facts.pop("seconds", time.monotonic() - started)
    model.cut = session.cut(model.tokenizer)
    save_checkpoint(model, folder.model)
    saved = torch_artifact(folder.model, session.model_after(index + 1))
    validation = session.rows_after(index + 1).validation
    _, measurement = _measuring(session, validation, "validation").quality(saved)
    result = {
        "kind": stage_kind(stage),
        "name": folder.path.name,
        "seconds": seconds,
        "flops": outcome.flops,
        "peak_memory_bytes": peak.bytes,
        "facts": outcome.facts,
        "history": outcome.history,
        "measurement": measurement,
    }
    folder.finish(result)
    progress.event("stage finished", **{name: result[name] for name in ("name", "seconds", "facts")})
    return result | {"resumed": False}


def _measuring(session: Session, rows: Any, split: str) -> Measuring:
    recipe = session.recipe
    return Measuring(rows, split, session.place.path, recipe.evaluate, recipe.seed, session.progress)


def _compare(session: Session) -> dict[str, Any]:
    """Ship the final model, and measure what is shipped against what would have been."""
    session.progress.say("exporting and measuring")
    (session.place.path / "report.json").unlink(missing_ok=True)  # another recipe's: its files are replaced now
    copy_directory(session.folder_after(len(session.folders)), session.place.path / "model")
    first, last = session.rows_after(session.parent), session.rows_after(len(session.folders))
    parent = session.folder_after(session.parent), session.model_after(session.parent)
    before = torch_artifact(*parent, first.evaluation) if session.head_is_trained else None
    after, reference = ship(session)
    measuring = _measuring(session, last.evaluation, session.encoder.evaluation_split)
    result = measuring.compare(before, after, reference, session.encoder.evaluated, last.validation)
    measuring.keep_temperature(after, result["calibration"])
    result["exports"] = ship_for_vllm(session, after.model)
    if reference is not None:
        shutil.rmtree(session.place.path / "work")
        result["reference"]["artifact"] = "(only compared with, not kept)"
    return result


def _header(session: Session) -> dict[str, Any]:
    recipe = session.recipe
    return {
        "recipe": recipe_values(recipe),
        "fingerprint": session.fingerprint,
        "seed": recipe.seed,
        "task": recipe.task,
        "machine": describe_machine(),
        "versions": versions(),
        "data": session.rows_after(0).facts,
        "notes": [*session.notes, *session.caveats],
        "protocol": list(PROTOCOL),
    }


def _cost(session: Session, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds and operations of all stages, against those before compression: plain fine-tuning of the dense model."""
    dense = [stage for stage in stages[: session.parent] if stage["kind"] == "finetune"]
    total = {name: sum(stage[name] for stage in stages) for name in ("seconds", "flops")}
    return total | {f"dense_{name}": sum(stage[name] for stage in dense) if dense else None for name in total}
