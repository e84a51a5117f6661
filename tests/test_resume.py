"""Killed anywhere and run again = never stopped; what is finished is left alone; nobody's files are overwritten."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moss_rlhf.errors import MachineError
from moss_rlhf.files import read_json
from moss_rlhf.progress import Progress
from moss_rlhf.rundir import open_run

pytestmark = pytest.mark.usefixtures("one_core", "memory_not_measured")
# Runs a recipe again and again, each time in a forked process that kills itself at the next of these points. A process
# that forks has imported everything once, and computed nothing: no threads to lose.
KILLER = '''
import json, os, signal, sys
from pathlib import Path

import moss_rlhf.exporting.onnx, moss_rlhf.measuring, moss_rlhf.model.checkpoint, moss_rlhf.pipeline
from moss_rlhf.pipeline import run
from moss_rlhf.progress import Bar, Progress


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


class KillingBar(Bar):
    def advance(self, count=1, text=None):
        super().advance(count, text)
        if self.done == self.last:
            die()


class Killing(Progress):
    """Dies at a step of the bar of a title, in the stage of a kind."""

    def __init__(self, title, step):
        super().__init__(quiet=True)
        self.title, self.step = title, step

    def bar(self, title, total):
        if title != self.title:
            return super().bar(title, total)
        bar = KillingBar(title, total, visible=False)
        bar.last = self.step
        return bar


def after(module, name):
    real = getattr(module, name)

    def call(*arguments, **named):
        real(*arguments, **named)
        die()

    setattr(module, name, call)


def before(module, name):
    setattr(module, name, die)


def at(point):
    """Set the trap; returns the progress to run with."""
    if isinstance(point, list):
        return Killing(*point)
    if point == "saved, not marked":
        after(moss_rlhf.pipeline, "save_checkpoint")
    elif point == "half a checkpoint":
        before(moss_rlhf.model.checkpoint, "_add_to_config")
    elif point == "exporting":
        before(moss_rlhf.exporting.onnx, "_export_float")
    elif point == "measuring":
        before(moss_rlhf.measuring, "measure_speed")
    return Progress(quiet=True)


job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
moss_rlhf.measuring.peak_memory = lambda *_, **__: None  # a process each, which no kill can harm
for output, point in job["runs"]:
    child = os.fork()
    if child == 0:
        report = run(job["recipe"] | {"output": output}, progress=at(point))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(output, point, -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
'''
POINTS = [
    ["fine-tuning", 7],  # 4 steps an epoch: in the middle of the second
    "saved, not marked",  # of finetune
    "half a checkpoint",  # of prune
    ["scoring units", 1],
    ["shortening: drop", 2],
    ["fine-tuning", 3],
    "half a checkpoint",  # of quantize
    "measuring",
    "exporting",
]


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    for name, part in (("train", rows[:40]), ("test", rows[40:])):
        lines = ["text,label", *(f'"{row["text"]}",{row["label"]}' for row in part)]
        (place / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"train": str(place / "train.csv"), "validation": 0.2, "test": str(place / "test.csv")}


@pytest.fixture
def recipe(data, tiny_checkpoint, tmp_path):
    """Two quick stages, nothing exported."""
    return {
        "task": "text-classification",
        "model": str(tiny_checkpoint("bert", blocks=2)),
        "data": data,
        "stages": [{"finetune": {"epochs": 1, "batch_size": 8}}, {"prune": {"sparsity": 0.5}}],
        "evaluate": {"batch_sizes": [1], "resamples": 200, "speed_seconds": 0.01},
        "output": str(tmp_path / "run"),
    }


def _run(recipe, **options):
    from moss_rlhf import run

    return run(recipe, **options)


def _weights(place: Path) -> dict[str, str]:
    files = [*place.glob("stages/*/model/model.safetensors"), place / "model" / "model.safetensors"]
    return {
        str(file.relative_to(place)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.exists()
    }


def _times(place: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(place.rglob("*")) if file.is_file()}


def test_killed_in_every_stage_and_run_again_is_never_stopped(recipe, tmp_path):
    """SIGKILL, nine times in one run; the weights of every stage and the numbers are those of a run left in peace."""
    recipe["stages"] = [
        {"finetune": {"epochs": 3, "batch_size": 8, "learning_rate": 2e-3}},
        {"prune": {"sparsity": 0.3}},
        {"narrow": {"heads": 0.5, "feed_forward": 0.3}},
        {"shorten": {"remove": 1}},
        {"finetune": {"epochs": 1, "batch_size": 8, "unfreeze": "gradual", "distill": {}}},
        {"quantize": {}},
    ]
    recipe["export"] = ["onnx"]
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    runs = [*((str(killed), point) for point in POINTS), (str(killed), None), (str(undisturbed), None)]
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"recipe": recipe, "runs": runs}), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", KILLER, str(job)], capture_output=True, text=True, check=False)
    statuses = [line.rpartition(" ")[2] for line in done.stdout.splitlines()]
    assert statuses == ["-9"] * len(POINTS) + ["0", "0"], done.stderr[-2000:]

    one, other = (read_json(place / "report.json") for place in (killed, undisturbed))
    assert _weights(killed) == _weights(undisturbed)
    assert len(_weights(killed)) == 7
    assert [stage["name"] for stage in one["stages"]] == [stage["name"] for stage in other["stages"]]
    for mine, theirs in zip(one["stages"], other["stages"], strict=True):
        assert mine["measurement"]["metrics"] == theirs["measurement"]["metrics"]
        assert mine["history"] == theirs["history"]
        assert mine["flops"] == theirs["flops"]
    for name in ("before", "after", "reference"):
        assert one[name]["metrics"] == other[name]["metrics"]
        assert one[name]["bytes"] == other[name]["bytes"]
    assert one["gain"]["metric"] == other["gain"]["metric"]
    assert (one["confusion"], one["changed"]) == (other["confusion"], other["changed"])
    model = [hashlib.sha256((place / "onnx" / "model.onnx").read_bytes()).digest() for place in (killed, undisturbed)]
    assert model[0] == model[1]
    assert not [*killed.rglob("*.partial"), *killed.rglob("work/checkpoint-*")]


def test_finished_run_prints_at_once_and_touches_nothing(recipe, capsys):
    report = _run(recipe)
    place = Path(recipe["output"])
    before = _times(place)
    again = _run(recipe, progress=Progress())
    after = _times(place)
    assert again == report
    assert "finished before" in capsys.readouterr().err
    changed = {name for name in after if after[name] != before.get(name)}
    assert {Path(name).name for name in changed} <= {"recipe.yaml", "fingerprint", ".lock"}


def test_a_changed_later_stage_leaves_the_earlier_ones_alone(recipe):
    first = _run(recipe)
    place = Path(recipe["output"])
    old = {name: digest for name, digest in _weights(place).items() if name.startswith("stages")}
    recipe["stages"][1]["prune"]["sparsity"] = 0.25
    second = _run(recipe)
    assert [stage["resumed"] for stage in first["stages"]] == [False, False]
    assert [stage["resumed"] for stage in second["stages"]] == [True, False]
    assert second["stages"][0]["name"] == first["stages"][0]["name"]
    assert second["stages"][1]["name"] != first["stages"][1]["name"]
    assert old.items() <= _weights(place).items(), "the folder of the other recipe stays as it was"
    assert second["after"]["nonzero"] > first["after"]["nonzero"]


def test_back_to_the_recipe_before_ships_its_model_again(recipe):
    """Killed while another recipe's model replaced the shipped one: the old report must not pass for finished."""
    first = _run(recipe)
    place = Path(recipe["output"])
    shipped = _weights(place)["model/model.safetensors"]

    other = recipe | {"stages": [recipe["stages"][0], {"prune": {"sparsity": 0.25}}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("moss_rlhf.pipeline.write_page")
        with pytest.raises(NameError, match="write_page"):
            _run(other)
    again = _run(recipe)
    assert _weights(place)["model/model.safetensors"] == shipped
    assert again["after"]["metrics"] == first["after"]["metrics"]


def test_fresh_starts_over_and_ends_in_the_same_bits(recipe):
    first = _run(recipe)
    place = Path(recipe["output"])
    weights = _weights(place)
    (place / "notes.txt").write_text("mine", encoding="utf-8")
    again = _run(recipe, fresh=True)
    assert [stage["resumed"] for stage in again["stages"]] == [False, False]
    assert _weights(place) == weights
    assert again["after"]["metrics"] == first["after"]["metrics"]
    assert (place / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_what_decides_the_bits_decides_the_folder(recipe, data, tmp_path):
    """Seed, data and model each lead to folders of their own; the folder of the run does not."""
    names = {}
    train = tmp_path / "train.csv"
    lines = Path(data["train"]).read_text(encoding="utf-8").splitlines(keepends=True)
    train.write_text("".join(lines[:-1]), encoding="utf-8")
    changes = {
        "same": {"output": str(tmp_path / "elsewhere")},
        "seed": {"seed": 1},
        "data": {"data": data | {"train": str(train)}},
        "nothing": {},
    }
    recipe["stages"] = [{"prune": {"sparsity": 0.5}}]
    for name, change in changes.items():
        names[name] = _run(recipe | change)["stages"][0]["name"]
    assert names["same"] == names["nothing"]
    assert len(set(names.values())) == 3


def test_another_teacher_in_the_same_place_is_another_stage(recipe, tiny_model, tmp_path):
    from moss_rlhf import save

    teacher = tmp_path / "teacher"
    recipe["stages"] = [{"finetune": {"epochs": 1, "batch_size": 8, "distill": {"teacher": str(teacher)}}}]
    names = []
    for blocks in (2, 3):
        save(tiny_model(blocks=blocks), teacher)
        names.append(_run(recipe)["stages"][0]["name"])
    assert names[0] != names[1]


def test_two_runs_at_once_are_refused(recipe):
    with (
        open_run(Path(recipe["output"])),
        pytest.raises(MachineError, match=r"another moss run is writing .*run\. Wait for it"),
    ):
        _run(recipe)


@pytest.mark.parametrize("name", ["thesis.docx", "recipe.yaml"])
def test_a_directory_of_someone_elses_is_refused(recipe, name):
    """Even one that holds a recipe: what the user wrote is not ours to replace."""
    place = Path(recipe["output"])
    place.mkdir()
    (place / name).write_text("mine", encoding="utf-8")
    with pytest.raises(MachineError, match="is not empty and no run of moss wrote it"):
        _run(recipe, fresh=True)
    assert [(file.name, file.read_text(encoding="utf-8")) for file in place.iterdir()] == [(name, "mine")]


def test_a_file_in_the_place_of_the_output_is_refused(recipe, tmp_path):
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    with pytest.raises(MachineError, match=r"run is a file\. Give the path of a directory"):
        _run(recipe)


def test_two_stages_of_one_short_fingerprint_get_two_folders(tmp_path):
    with open_run(tmp_path / "run") as place:
        first, second = place.stage(0, "prune", "abcd" + "0" * 60), place.stage(0, "prune", "abcd" + "1" * 60)
        assert first.path != second.path
        assert place.stage(0, "prune", "abcd" + "0" * 60) == first


def test_what_a_kill_left_half_written_is_removed_and_nothing_else(tmp_path):
    with open_run(tmp_path / "run") as place:
        folder = place.stage(0, "prune", "abcd" + "0" * 60)
        folder.model.mkdir()
        folder.finish({})
    half, late, mine = folder.path / ".model-x1.partial", folder.work, tmp_path / "run" / "notes.partial"
    for directory in (half, late):
        directory.mkdir()
        (directory / "file").write_text("half", encoding="utf-8")
    mine.write_text("mine", encoding="utf-8")
    with open_run(tmp_path / "run") as place:
        assert place.stage(0, "prune", "abcd" + "0" * 60).done
    assert (half.exists(), late.exists(), mine.exists(), folder.model.exists()) == (False, False, True, True)
