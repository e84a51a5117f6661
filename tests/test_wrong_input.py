"""Every kind of wrong input ends in exit status 2 and one sentence: the value, the rule, the place, the remedy."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moss_rlhf.cli import main

MOSS = str(Path(sys.executable).with_name("moss"))
GOOD = "text,label\n" + "".join(
    f"a {'good' if n % 2 else 'bad'} film {n},{'pos' if n % 2 else 'neg'}\n" for n in range(40)
)


@pytest.fixture
def recipe(tiny_checkpoint, tmp_path, monkeypatch):
    """A directory to work in, with a recipe that is right, its data beside it."""
    monkeypatch.chdir(tmp_path)
    Path("train.csv").write_text(GOOD)
    values = {
        "task": "text-classification",
        "model": str(tiny_checkpoint("bert")),
        "data": {"train": "train.csv"},
        "stages": [{"finetune": {"epochs": 1}}, {"narrow": {"heads": 0.5}}, {"finetune": {"epochs": 1}}, "quantize"],
        "output": "run",
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    return Path("recipe.yaml")


def _fails(capsys, *arguments):
    """The sentence that a command ends with; everything else about it is asserted here."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 2, captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err
    sentence = captured.err.splitlines()[-1]
    assert captured.err.count("moss: ") == 1
    assert sentence.startswith("moss: ")
    assert re.search(r"[.)?^]$", sentence), sentence
    return sentence


def _check(capsys, recipe, *overrides):
    return _fails(capsys, "check", recipe, *(word for override in overrides for word in ("--set", override)))


def test_the_recipe_itself_is_right(recipe, capsys):
    main(["check", str(recipe)])
    assert capsys.readouterr().out.endswith("ok\n")


# --- the recipe ----------------------------------------------------------------------------------------------------

FIELDS = {
    "unknown field": ("dta={}", r"unknown field 'dta'; did you mean 'data'\? Known names: data, evaluate"),
    "unknown field of a stage": ("stages.0.finetune.epoch=3", r"stages\.0\.finetune: unknown field 'epoch'.*'epochs'"),
    "unknown field of the data": ("data.trian=a.csv", r"data: unknown field 'trian'; did you mean 'train'"),
    "unknown stage": ("stages.0={prunne: {}}", r"stages\.0: unknown stage 'prunne'; did you mean 'prune'"),
    "two kinds in a stage": ("stages.0={prune: {sparsity: 0.5}, quantize: {}}", r"stages\.0: a stage is one kind"),
    "no stages": ("stages=[]", r"stages: \[\] can't be used; .*at least 1 item"),
    "unknown task": ("task=translating", r"task: 'translating' can't be used; .*'text-classification'"),
    "share of all": ("stages.1.narrow.heads=1.0", r"stages\.1\.narrow\.heads: 1\.0 can't be used; .*less than 1"),
    "negative share": ("stages.1.narrow.heads=-0.5", r"stages\.1\.narrow\.heads: -0\.5 can't be used"),
    "not a number": ("stages.0.finetune.learning_rate=fast", r"learning_rate: 'fast' can't be used; .*number"),
    "not finite": ("stages.0.finetune.learning_rate=.nan", r"learning_rate: nan can't be used; .*finite"),
    "zero epochs": (
        "stages.0.finetune.epochs=0",
        r"stages\.0\.finetune\.epochs: 0 can't be used; .*greater than or eq",
    ),
    "half an epoch": (
        "stages.0.finetune.epochs=1.5",
        r"stages\.0\.finetune\.epochs: 1\.5 can't be used; .*(integer|whole)",
    ),
    "validation of all": ("data.validation=1.0", r"data\.validation: 1\.0 can't be used; .*less than 1"),
    "negative seed": ("seed=-1", r"seed: -1 can't be used"),
    "unknown runtime": ("export=[tflite]", r"export\.0: 'tflite' can't be used; .*'onnx'"),
    "narrow removes nothing": ("stages.1.narrow={heads: 0}", r"stages\.1\.narrow: removes nothing; give heads"),
    "quantize before finetune": (
        "stages.1=quantize",
        r"stages: stages\.1 is quantize, and finetune follows.*to the end",
    ),
    "less than a unit": (
        "stages.1.narrow.heads=0.1",
        r"stages\.1\.narrow: heads 0\.1 would remove nothing of 4 heads",
    ),
    "shorten all": (
        "stages.1={shorten: {remove: 3}}",
        r"shorten: can't remove 3 of 3 layers; .* Give 1 to 2\.",
    ),
    "groups that fill no row": (
        "stages.3.quantize={scheme: int4, group_size: 128}",
        r"stages\.3\.quantize\.group_size: 128 does not divide rows of \d+ weights\. Give a divisor of",
    ),
    "smooth with int4": (
        "stages.3.quantize={scheme: int4, group_size: 8, smooth: 0.5}",
        r"stages\.3\.quantize: smooth evens out activations for int8 .* Leave it out",
    ),
    "smooth above one": ("stages.3.quantize.smooth=1.5", r"stages\.3\.quantize\.smooth: 1\.5 can't be used"),
    "smooth and awq": (
        "stages.3.quantize={method: awq, smooth: 0.5}",
        r"stages\.3\.quantize: smooth and method awq .* Give one",
    ),
    "activation order without gptq": (
        "stages.3.quantize={activation_order: true}",
        r"stages\.3\.quantize: activation_order and sparsity are for method gptq, not nearest",
    ),
    "int4 to ONNX": (
        ("stages.3.quantize={scheme: int4, group_size: 8}", "export=[onnx]"),
        r"stages\.3\.quantize\.scheme: int4 can't be exported to ONNX\. Give int8, or compressed-tensors",
    ),
    "fewer heads for vLLM": (
        "export=[compressed-tensors]",
        r"export: compressed-tensors: the stock config of a bert can't say .*fewer heads.*another format",
    ),
    "float32 for vLLM": (
        ("stages=[finetune]", "export=[compressed-tensors]"),
        r"export: compressed-tensors: it holds quantized models\. Put quantize",
    ),
    "teacher too early": (
        "stages.0.finetune.distill={}",
        r"stages\.0\.finetune\.distill\.teacher: 'parent' .* before it",
    ),
    "teacher that is nowhere": (
        "stages.2.finetune.distill.teacher=./teacher",
        r"'\./teacher' is no directory. Give the path of a checkpoint",
    ),
    "train given twice": ("data.train={file: a.csv, hub: b}", r"data\.train: give one of 'file', 'files' and 'hub'"),
    "train missing": ("data={}", r"data\.train: is missing"),
    "data as a text": ("data=train.csv", r"data: 'train\.csv' can't be used"),
    "--set without value": ("seed", r"--set seed: must be FIELD=VALUE, such as"),
    "--set beyond the list": ("stages.9.finetune.epochs=1", r"'9' is no position in a list of 4"),
    "--set inside a value": ("task.value=1", r"'value' lies inside a value that has no fields"),
    "--set not YAML": ("seed=[1", r"--set seed=\[1: .*not YAML"),
    "unknown column of the task": (
        "data.columns.txt=text",
        r"data\.columns\.txt: is no column of this task; did you mean",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_wrong_field(case, recipe, capsys):
    override, message = FIELDS[case]
    overrides = (override,) if isinstance(override, str) else override
    assert re.search(message, _check(capsys, recipe, *overrides))
    assert not Path("run").exists()


def test_a_teacher_whose_head_was_never_trained(recipe, capsys):
    stages = "stages=[{narrow: {heads: 0.5}}, {finetune: {distill: {teacher: parent}}}]"
    assert "whose head was never trained. Put a finetune stage first" in _check(capsys, recipe, stages)


TEXTS = {
    "not YAML": (b"task: [", r"recipe\.yaml: is not YAML: .*line 1"),
    "a list": (b"- task", r"recipe\.yaml: a recipe is a mapping of fields .*, this is list"),
    "empty": (b"", r"recipe\.yaml: a recipe is a mapping of fields"),
    "a key twice": (b"task: a\nseed: 1\nseed: 2\n", r"line 3: the key 'seed' is given twice"),
    "not UTF-8": (b"task: \xff\xfe", r"recipe\.yaml: is not UTF-8 text"),
    "code": (b"task: !!python/object/apply:os.system [ls]", r"recipe\.yaml: is not YAML: could not determine"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_file_that_is_no_recipe(case, tmp_path, monkeypatch, capsys):
    content, message = TEXTS[case]
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_bytes(content)
    assert re.search(message, _fails(capsys, "check", "recipe.yaml"))
    assert re.search(message, _fails(capsys, "run", "recipe.yaml"))


def test_a_recipe_that_is_missing_or_a_folder(tmp_path, capsys):
    assert "can't be read (No such file" in _fails(capsys, "run", tmp_path / "recipe.yml")
    assert "can't be read (Is a directory)" in _fails(capsys, "run", tmp_path)


def test_every_fault_of_a_recipe_is_told_at_once(recipe, capsys):
    with pytest.raises(SystemExit):
        main(["check", str(recipe), "--set", "seed=-1", "--set", "stages.0.finetune.epoch=1"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "stages.0.finetune: unknown field 'epoch'" in lines[0]
    assert "seed: -1" in lines[1]


# --- the data ------------------------------------------------------------------------------------------------------

DATA = {
    "empty": (b"", (), r"train\.csv: is empty; it must hold a row a line"),
    "header only": (b"text,label\n", (), r"train\.csv: has a header and no rows"),
    "missing column": (
        GOOD.replace("label", "mood").encode(),
        ("data.train={file: train.csv, header: true}",),
        r"line 1: there is no column 'label'.*set data\.columns\.label",
    ),
    "named column missing": (GOOD.encode(), ("data.columns.label=sentiment",), r"there is no column 'sentiment'"),
    "broken line": (
        GOOD.encode() + b"only a text\n",
        (),
        r"line 42: has 1 cells, the header has 2\. Correct it, or set",
    ),
    "open quote": (GOOD.encode() + b'"open,1\n', (), r"line 42: a quote opens here and is never closed"),
    "not UTF-8": (GOOD.encode() + "好,pos\n".encode("gb18030"), (), r"line 42: its bytes are not utf-8; .*gb18030"),
    "one class": (GOOD.replace("neg", "pos").encode(), (), r"every label is 'pos'; a classifier needs two classes"),
    "scores": (GOOD.replace("neg", "0.5").encode(), (), r"line 2: the label '0\.5' is not a whole number; .*scores"),
    "labels are texts": (
        re.sub(r"(\d+),(neg|pos)", r"\1,class \1", GOOD).encode(),
        (),
        r"40 different labels in 40 rows",
    ),
    "limit too low": (GOOD.encode(), ("data.limit=1",), r"data\.limit: 1 leaves rows of one class only"),
    "unknown encoding": (GOOD.encode(), ("data.train={file: train.csv, encoding: utf8x}",), r"'utf8x' is not known"),
    "train is test": (GOOD.encode(), ("data.test=train.csv",), r"no row is left for train \(40 rows also in test\)"),
    "no file": (GOOD.encode(), ("data.test=tests.csv",), r"data\.test: there is no file tests\.csv"),
    "neighbour": (
        GOOD.encode(),
        ("data.train=trains.csv",),
        r"there is no file trains\.csv\. Did you mean train\.csv\?",
    ),
    "no such format": (GOOD.encode(), ("data.train.file=recipe.yaml",), r"recipe\.yaml has no known ending \(csv, tsv"),
    "no data set": (GOOD.encode(), ("data.train=/nowhere/at/all",), r"is no file, no folder, and no data set id"),
}


@pytest.mark.parametrize("case", DATA)
def test_wrong_data(case, recipe, capsys):
    content, overrides, message = DATA[case]
    Path("train.csv").write_bytes(content)
    assert re.search(message, _check(capsys, recipe, *overrides))


def test_a_gzip_file_that_is_cut_off(recipe, capsys):
    Path("train.csv.gz").write_bytes(gzip.compress(GOOD.encode())[:-12])
    assert "train.csv.gz: the gzip file is cut off" in _check(capsys, recipe, "data.train=train.csv.gz")


def test_a_label_in_test_that_train_lacks(recipe, capsys):
    Path("test.csv").write_text("text,label\none,pos\ntwo,neutral\n")
    message = _check(capsys, recipe, "data.test=test.csv")
    assert "test.csv, line 3: the label 'neutral' does not occur in train (known: neg, pos)" in message


# --- the model -----------------------------------------------------------------------------------------------------


def _edit_config(place, **values):
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | values))


def _truncate(place):
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _pickle_only(place):
    (place / "model.safetensors").rename(place / "pytorch_model.bin")


MODELS = {
    "no config": (lambda place: (place / "config.json").unlink(), r"holds no config\.json, so it is no checkpoint"),
    "broken config": (lambda place: (place / "config.json").write_text("{"), r"config\.json is broken"),
    "no model type": (lambda place: (place / "config.json").write_text("{}"), r"names no model_type"),
    "pickle only": (_pickle_only, r"its weights are pickled, which can run code .*convert them once"),
    "no weights": (lambda place: (place / "model.safetensors").unlink(), r"holds no safetensors file: give a folder"),
    "unknown family": (
        lambda place: _edit_config(place, model_type="gpt5"),
        r"'gpt5' is not known .*albert, bart, bert",
    ),
    "truncated": (_truncate, r"model\.safetensors is broken .*Fetch or save"),
    "empty file": (lambda place: (place / "model.safetensors").write_bytes(b""), r"model\.safetensors is broken"),
    "broken tokenizer": (lambda place: (place / "tokenizer.json").write_text("{}"), r"tokenizer\.json is broken"),
    "packed for vLLM": (
        lambda place: _edit_config(place, quantization_config={"quant_method": "compressed-tensors"}),
        r"is quantized already, by compressed-tensors, .*Give the checkpoint that it was made of",
    ),
    "quantized already": (
        lambda place: _edit_config(place, moss_rlhf={"quantization": {"scheme": "int8"}}),
        r"stages\.0\.finetune: .* is quantized already; give the checkpoint from before",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_wrong_model(case, recipe, tiny_checkpoint, capsys):
    spoil, message = MODELS[case]
    shutil.copytree(tiny_checkpoint("bert"), "model")
    spoil(Path("model"))
    assert re.search(message, _check(capsys, recipe, "model=model"))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c", "../..", "", "a b"])
def test_a_model_that_is_nowhere(name, recipe, capsys):
    assert _check(capsys, recipe, f"model={name!r}")


def test_a_model_that_only_the_hub_has_says_how_to_get_it(recipe, capsys, monkeypatch):
    monkeypatch.delenv("MOSS_MODELS", raising=False)
    assert "set MOSS_MODELS to a directory that holds someone/something/" in _check(
        capsys, recipe, "model=someone/something"
    )


def test_a_trained_model_with_other_labels(recipe, tiny_checkpoint, capsys):
    shutil.copytree(tiny_checkpoint("bert", ("negative", "positive")), "model")
    _edit_config(Path("model"), moss_rlhf={"task": "text-classification"})
    message = _check(capsys, recipe, "model=model")
    assert "was trained for the labels negative, positive; the data has neg, pos" in message


# --- the machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("output", ["file", "file/below", "file/far/below"])
def test_an_output_that_is_a_file_or_below_one(command, output, recipe, capsys):
    Path("file").write_text("mine")
    message = _fails(capsys, command, recipe, "--set", f"output={output}")
    assert "file" in message
    assert "is a file" in message
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("command", ["check", "run"])
def test_an_output_that_holds_something_else(command, recipe, capsys):
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("mine")
    assert "run is not empty and no run of moss wrote it. Give another output" in _fails(capsys, command, recipe)
    assert [file.name for file in Path("run").iterdir()] == ["thesis.txt"]


def _refuse(*_, **__):
    raise PermissionError(13, "Permission denied", "run")


def test_an_output_that_may_not_be_written(recipe, capsys, monkeypatch):
    """Root may write everywhere, so that the refusal is made up here and real in the next test."""
    monkeypatch.setattr(Path, "mkdir", _refuse)
    assert "output: no permission to write run. Give an output that you may write" in _fails(capsys, "run", recipe)
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    assert re.search(r"output: no permission to write .*Give an output that you may write", _check(capsys, recipe))


def _mounted(options, *command):
    """A command's end, with a new file system at small/ that it alone sees; skips where none can be mounted."""
    Path("small").mkdir()
    mount = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o {options} none small && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run([*mount, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_an_output_on_a_read_only_file_system(recipe):
    message = _mounted("ro", MOSS, "check", "recipe.yaml", "--set", "output=small/run")
    assert re.search(r"moss: output: no permission to write .*small\. Give", message)


def test_two_runs_at_once(recipe, capsys):
    from moss_rlhf.rundir import open_run

    with open_run(Path("run")):
        assert "another moss run is writing run. Wait for it, or give another output" in _fails(capsys, "run", recipe)


def test_a_disk_that_is_too_small_is_told_before_the_run(recipe, capsys, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = _fails(capsys, "check", recipe)
    assert re.search(r"has 0\.00 GB free and the run needs about 0\.00 GB\. Free some space", message)


def test_a_disk_that_fills_up_in_the_middle_of_a_run(recipe, capsys, monkeypatch):
    """The first checkpoint does not fit any more: nothing half-written is left, and a second run goes on."""

    def full(place, *_):
        raise OSError(28, "No space left on device", str(place))

    replace = Path.rename
    monkeypatch.setattr(Path, "rename", lambda place, to: full(to) if "model" in to.name else replace(place, to))
    stages = "stages=[{prune: {sparsity: 0.5}}]"
    message = _fails(capsys, "run", recipe, "--set", stages)
    assert "model: no space is left on the disk. Free some, or give an output on another disk; run again" in message
    assert not list(Path("run").rglob("*.partial"))
    assert not list(Path("run").rglob("model"))


def test_a_disk_that_is_really_full(recipe):
    """200 kB: the real errors of the real libraries."""
    message = _mounted("size=200k", MOSS, "run", "recipe.yaml", "--set", "output=small/run")
    assert re.search(r"moss: .*(no space is left on the disk|GB free)", message)


# --- the other commands --------------------------------------------------------------------------------------------

COMMANDS = {
    "no such command": (["rn"], r"No such command 'rn'\. Did you mean 'run'\?"),
    "no argument": (["run"], r"Missing argument"),
    "unknown option": (["run", "recipe.yaml", "--epochs", "3"], r"No such option: --epochs"),
    "init without data": (["init"], r"Missing option '--train'"),
    "init with a missing file": (
        ["init", "--train", "trains.csv"],
        r"there is no file trains\.csv\. Did you mean train",
    ),
    "init with an unknown task": (["init", "--train", "train.csv", "--task", "qa"], r"--task qa: unknown task"),
    "init without a label column": (["init", "--train", "words.csv"], r"the text and the label can't be told for sure"),
    "predict from nowhere": (["predict", "nowhere", "a"], r"nowhere: is no run, checkpoint or ONNX directory"),
    "predict from a run that is not finished": (
        ["predict", "half", "a"],
        r"half: this run is not finished\. Go on with",
    ),
    "predict from a broken file": (["predict", "broken", "a"], r"model\.onnx: ONNX Runtime can't open it"),
    "predict without a tokenizer": (["predict", "mute", "a"], r"mute: holds no tokenizer\.json"),
    "evaluate nowhere": (["evaluate", "no/where", "train.csv"], r"'no/where' is not on this machine"),
    "evaluate other labels": (["evaluate", "trained", "train.csv"], r"line 2: the label 'neg' is none of the model's"),
    "evaluate, a recipe's field": (
        ["evaluate", "trained", "train.csv", "--set", "seed=1"],
        r"only the data can be set",
    ),
    "evaluate, unknown field": (
        ["evaluate", "trained", "train.csv", "--set", "data.test.colums={}"],
        r"data\.test: unknown field 'colums'; did you mean 'columns'",
    ),
    "export nowhere": (["export", "no/where", "onnx"], r"'no/where' is not on this machine"),
    "export over something": (
        ["export", "trained", "half"],
        r"half: is there already\. Give the path of a new directory",
    ),
    "export below a file": (["export", "trained", "train.csv/onnx"], r"train\.csv.*is a file"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command(case, recipe, tiny_checkpoint, capsys):
    arguments, message = COMMANDS[case]
    Path("words.csv").write_text("word\n" + "".join(f"word{n}\n" for n in range(9)))
    trained = tiny_checkpoint("bert", ("negative", "positive"))
    shutil.copytree(trained, "trained")
    Path("half").mkdir()
    shutil.copy("recipe.yaml", "half")
    for name in ("broken", "mute"):
        shutil.copytree(trained, name)
        Path(name, "model.onnx").write_bytes(b"no graph")
    Path("mute/tokenizer.json").unlink()
    assert re.search(message, _fails(capsys, *arguments))


def test_standard_input_that_is_not_utf_8(tiny_checkpoint):
    command = [MOSS, "predict", tiny_checkpoint("bert", ("negative", "positive"))]
    done = subprocess.run(command, input=b"a good film\n\xff\xfe\n", capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.decode().endswith(
        "standard input, line 2: its bytes are not UTF-8. Convert it first, as with iconv.\n"
    )


def test_the_command_itself_ends_with_the_status(recipe):
    done = subprocess.run([MOSS, "check", "nowhere.yaml"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "moss: nowhere.yaml: can't be read (No such file or directory). "
        "Give the path of a recipe, such as recipes/quickstart.yaml.\n"
    )
