"""What a tracker is sent is what the training tells of itself, and it outlives the folder the training works in."""

import pytest

from moss_rlhf import ensemble, finetune
from moss_rlhf.rundir import StageFolder

pytest.importorskip("tensorboard")
OPTIONS = {"epochs": 2, "batch_size": 12, "learning_rate": 1e-3, "evaluations_per_epoch": 1}


def _scalars(place):
    """{name: {step: value}} of the event files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in sorted(place.rglob("events.*")):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return found


def test_tensorboard_reads_back_the_curves_of_a_training(tiny_model, rows, tmp_path):
    training = finetune(tiny_model(), rows, rows[:20], **OPTIONS, report_to=["tensorboard"], workspace=tmp_path)
    read, history = _scalars(tmp_path / "tensorboard"), training.history
    for name in ("loss", "learning_rate"):
        told = {point["step"]: point[name] for point in history["train"]}
        assert len(told) == 10
        assert {step: read[f"train/{name}"][step] for step in told} == pytest.approx(told, rel=1e-5)
    told = {point["step"]: point["accuracy"] for point in history["validation"]}
    assert read["eval/accuracy"] == pytest.approx(told)
    assert set(told) == {5, 10}


def test_without_a_workspace_they_stand_in_the_working_directory(tiny_model, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finetune(tiny_model(), rows, rows[:20], **OPTIONS, report_to=["tensorboard"])
    assert _scalars(tmp_path / "runs")["eval/accuracy"].keys() == {5, 10}


def test_the_environment_may_name_the_place(tiny_model, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    finetune(tiny_model(), rows, rows[:20], **OPTIONS, report_to=["tensorboard"], workspace=tmp_path / "work")
    assert "train/loss" in _scalars(tmp_path / "elsewhere")
    assert not (tmp_path / "work" / "tensorboard").exists()


def test_a_finished_stage_keeps_its_curves_the_members_of_an_ensemble_too(tiny_model, rows, tmp_path):
    stage = StageFolder(tmp_path / "01-ensemble", "f" * 64)
    options = OPTIONS | {"epochs": 1, "report_to": ["tensorboard"]}
    ensemble(tiny_model(), rows, rows[:20], members=2, workspace=stage.work, finetune=options)
    stage.finish({})
    assert not stage.work.exists()
    for part in ("member-1", "member-2", "one"):
        assert _scalars(stage.path / "tensorboard" / part)["eval/accuracy"].keys() == {5}
