"""The command `moss`, as a person or a script meets it: what it prints where, and the status it ends with."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from moss_rlhf import cli, errors
from moss_rlhf.recipe import make_recipe, parse_yaml

MOSS = str(Path(sys.executable).with_name("moss"))
LABELS = ("negative", "positive")


def _moss(*arguments, **options):
    return subprocess.run([MOSS, *map(str, arguments)], capture_output=True, text=True, check=False, **options)


def _status(*arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code


# --- statuses and help ---------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from moss_rlhf.cli import main; main(['--help'])\n"
        "heavy = 'torch transformers datasets pyarrow pydantic yaml numpy rich onnxruntime jinja2 plotly'.split()\n"
        "print(*[name for name in heavy if name in sys.modules], file=sys.stderr, end='')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert all(name in done.stdout for name in ("init", "check", "run", "predict", "evaluate", "export", "schema"))


def test_moss_alone_is_help(capsys):
    cli.main([])
    alone = capsys.readouterr().out
    cli.main(["--help"])
    assert capsys.readouterr().out == alone


@pytest.mark.parametrize("command", ["init", "check", "run", "predict", "evaluate", "export", "schema"])
def test_every_command_and_every_argument_has_a_help(command, capsys):
    cli.main([command, "--help"])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert command in captured.out
    assert "Options:" in captured.out


def test_the_version_is_the_distribution_s(capsys):
    from importlib.metadata import version

    cli.main(["--version"])
    assert capsys.readouterr().out == f"moss-rlhf {version('moss-rlhf')}\n"


STATUSES = {
    "ours": (ValueError("odd"), 1, "moss: a fault of moss-rlhf: ValueError: odd (--debug shows where)\n"),
    "ours, told on purpose": (errors.MossError("odd"), 1, "moss: a fault of moss-rlhf: MossError: odd"),
    "the user's": (errors.DataError("a.csv: odd."), 2, "moss: a.csv: odd.\n"),
    "the disk's": (OSError(28, "No space left on device", "run"), 2, "moss: run: no space is left on the disk."),
    "stopped, resumable": (
        errors.Interrupted("stopped at step 3; run again"),
        130,
        "moss: stopped at step 3; run again\n",
    ),
    "stopped": (KeyboardInterrupt(), 130, "moss: interrupted; run again to go on from what is finished\n"),
}


@pytest.mark.parametrize("case", STATUSES)
@pytest.mark.parametrize("debug", [False, True])
def test_statuses(case, debug, monkeypatch, capsys):
    """--debug shows the traceback before the sentence, from wherever it stands; the status stays."""
    error, status, message = STATUSES[case]

    def fail(*_):
        raise error

    monkeypatch.setattr("moss_rlhf.recipe.read_recipe", fail)
    for arguments in (
        (["--debug", "check", "a.yaml"], ["check", "a.yaml", "--debug"]) if debug else (["check", "a.yaml"],)
    ):
        assert _status(*arguments) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("Traceback" in captured.err) == debug
        assert captured.err.startswith(message) or debug
        assert message in captured.err


def test_words_after_a_double_dash_are_no_options():
    assert cli._without_debug(["--debug", "predict", "m", "--", "--debug", "a"]) == (
        ["predict", "m", "--", "--debug", "a"],
        True,
    )
    assert cli._without_debug(["predict", "m", "--", "--debug"]) == (["predict", "m", "--", "--debug"], False)


def test_a_reader_that_leaves_is_no_error():
    """`moss schema | head -1`: more than a pipe holds is not needed, the reader is gone before the first write."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([MOSS, "schema"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


# --- init, schema --------------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRICKY = [
    "=SUM(A1:A9) is what it felt like",
    'he said "never", and left',
    "tab\there",
    "'quoted'",
    "很好，喜欢",
    "- no: [list]",
]
ROWS = [(f"{TRICKY[n % 6]} number {n}", ("bad", "good")[n % 2]) for n in range(36)]


def _write(place, kind, header):
    import csv
    import io

    names = [("review", "mood")] if header else []
    if kind in ("csv", "csv.gz"):
        text = io.StringIO()
        csv.writer(text).writerows([*names, *ROWS])
        content = text.getvalue().encode()
        place.write_bytes(gzip.compress(content) if kind == "csv.gz" else content)
    elif kind in ("tsv", "txt"):
        rows = [(text.replace("\t", " "), label) for text, label in ROWS]
        place.write_text("".join(f"{text}\t{label}\n" for text, label in [*names, *rows]), "utf-8")
    elif kind in ("json", "jsonl"):
        objects = [{"review": text, "mood": label} for text, label in ROWS]
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)
        place.write_text(json.dumps(objects) if kind == "json" else lines, "utf-8")
    else:
        import pyarrow
        from pyarrow import parquet

        review, mood = zip(*ROWS, strict=True)
        parquet.write_table(pyarrow.table({"review": review, "mood": mood}), place)


NAMED = ("json", "jsonl", "parquet")  # formats whose columns always have names
FORMS = [("csv", False), ("csv", True), ("csv.gz", True), ("tsv", False), ("tsv", True), ("txt", False), ("txt", True)]


@pytest.mark.parametrize(("kind", "header"), [*FORMS, *((kind, True) for kind in NAMED)])
def test_init_writes_a_recipe_that_checks(kind, header, tiny_checkpoint, workplace, capsys):
    _write(Path(f"my.{kind}"), kind, header)
    cli.main(["init", "--model", str(tiny_checkpoint("bert")), "--train", f"my.{kind}"])
    text = capsys.readouterr().out
    Path("my.yaml").write_text(text, "utf-8")
    recipe = make_recipe(parse_yaml(text, "my.yaml"))
    assert recipe.output == "runs/my"
    assert recipe.data.columns == ({"text": "review", "label": "mood"} if header else {"text": 0, "label": 1})
    cli.main(["check", "my.yaml"])
    shown = capsys.readouterr().out
    assert shown.startswith("labels: bad, good\ntrain ")
    assert " 32 rows " in shown
    assert shown.endswith("ok\n")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("task", "family", "arguments"),
    [
        ("text-generation", "gpt2", ["--train", "story.txt"]),
        ("translation", "t5", ["--train", "a.en", "--target", "a.de", "--test", "a.en", "--test-target", "a.de"]),
        ("translation", "t5", ["--train", "pairs.tsv"]),
    ],
)
def test_init_for_language_models_writes_a_recipe_that_checks(
    task, family, arguments, tiny_checkpoint, workplace, capsys
):
    pytest.importorskip("ctranslate2")
    (workplace / "story.txt").write_text("\n\n".join(f"the film {n} was good" for n in range(20)))
    for name in ("a.en", "a.de"):
        (workplace / name).write_text("".join(f"{name} {n} was good\n" for n in range(20)))
    (workplace / "pairs.tsv").write_text("source\ttarget\n" + "".join(f"a {n}\tb {n}\n" for n in range(20)))
    cli.main(["init", "--task", task, "--model", str(tiny_checkpoint(family)), *arguments])
    recipe = capsys.readouterr().out
    Path("recipe.yaml").write_text(recipe)
    if "--test" in arguments:
        assert "test:\n    files:" in recipe
        return
    cli.main(["check", "recipe.yaml"])
    assert capsys.readouterr().out.endswith("ok\n")


def test_init_refuses_targets_of_another_task(workplace, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["init", "--train", "train.tsv", "--target", "train.tsv"])
    assert stop.value.code == 2
    assert "--target: is for translation" in capsys.readouterr().err


def test_init_with_a_test_file_keeps_its_layout(workplace, capsys):
    for name in ("train", "test"):
        _write(Path(f"{name}.tsv"), "tsv", header=False)
    cli.main(["init", "--train", "train.tsv", "--test", "test.tsv"])
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["train"] == {"file": "train.tsv", "header": False}
    assert data["test"] == {"file": "test.tsv", "header": False}


def test_schema_is_json_schema_of_the_recipe(capsys):
    cli.main(["schema"])
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["required"]) == {"task", "model", "data", "stages"}
    assert schema["additionalProperties"] is False


# --- evaluate, export, predict -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_model, rows, tmp_path_factory):
    """A checkpoint that answers every row right."""
    import moss_rlhf

    model = tiny_model("bert", blocks=1)
    place = tmp_path_factory.mktemp("trained")
    moss_rlhf.finetune(model, rows, rows, epochs=20, learning_rate=5e-3, batch_size=8)
    moss_rlhf.save(model, place / "model")
    return place / "model"


def test_evaluate_prints_json_with_intervals(trained, rows, tmp_path, capsys):
    lines = "".join(f"{row['text'].replace(',', ' ')},{row['label']}\n" for row in rows)
    (tmp_path / "test.csv").write_text("text,label\n" + lines)
    cli.main(["evaluate", str(trained), str(tmp_path / "test.csv")])
    plain = json.loads(capsys.readouterr().out)
    assert plain["rows"] == 60
    assert plain["metrics"]["accuracy"]["value"] > 0.95
    assert plain["metrics"]["accuracy"]["low"] <= plain["metrics"]["accuracy"]["value"]
    (tmp_path / "other.csv").write_text(
        "review;stars\n" + lines.replace(",", ";").replace("negative", "1").replace("positive", "5")
    )
    layout = ["columns={text: review, label: stars}", "delimiter=;", "labels={1: negative, 5: positive}"]
    overrides = [word for field in layout for word in ("--set", f"data.test.{field}")]
    cli.main(["evaluate", str(trained), str(tmp_path / "other.csv"), *overrides])
    assert json.loads(capsys.readouterr().out)["metrics"] == plain["metrics"]


@pytest.fixture(scope="module")
def shipped(trained, tmp_path_factory):
    """A run as it stands in the end, as far as it is needed to answer: its report, and what `moss export` wrote."""
    run = tmp_path_factory.mktemp("run")
    done = _moss("export", trained, run / "onnx")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["difference_to_pytorch"] < 1e-4
    (run / "report.json").write_text(json.dumps({"after": {"artifact": "onnx/model.onnx"}}))
    return run


def test_a_checkpoint_an_onnx_directory_its_file_and_a_run_answer_the_same(trained, shipped, rows, capsys):
    texts = [row["text"] for row in rows]
    answers = []
    for place in (trained, shipped, shipped / "onnx", shipped / "onnx" / "model.onnx"):
        cli.main(["predict", str(place), *texts])
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 1
    lines = [line.split("\t") for line in answers[0].splitlines()]
    assert [text for _, _, text in lines] == texts
    assert sum(label == row["label"] for (label, _, _), row in zip(lines, rows, strict=True)) > 57
    assert all(0.5 <= float(probability) <= 1 for _, probability, _ in lines)


def test_predict_with_another_model(trained, shipped, tiny_checkpoint, rows, capsys):
    """With itself: the same answers. With one that was never trained: others, and still none of its path is a text."""
    texts, answers = [row["text"] for row in rows[:4]], []
    for others in ([], [shipped], [shipped, trained], [tiny_checkpoint("bert", ("negative", "positive"))]):
        cli.main(["predict", str(trained), *(word for place in others for word in ("--with", str(place))), *texts])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2] != answers[3]
    assert len(answers[3].splitlines()) == 4


def test_predict_reads_standard_input(shipped, rows, capsys):
    """With a byte order mark, Windows line ends and blank lines, as files have them."""
    texts = [row["text"] for row in rows] + ["这家店很好"]
    cli.main(["predict", str(shipped), *texts])
    piped = _moss("predict", shipped, input="\ufeff" + "\r\n".join(texts) + "\n\n")
    assert (piped.returncode, piped.stderr) == (0, "")
    assert piped.stdout == capsys.readouterr().out
    nothing = _moss("predict", shipped, input="")
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "")


def test_predict_of_an_onnx_file_imports_no_torch(shipped):
    """A server without PyTorch is enough for what is shipped."""
    code = (
        "import sys; from moss_rlhf.cli import main; main(['predict', sys.argv[1], 'a good film'])\n"
        "print(*[name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, shipped], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].endswith("\ta good film")
    assert done.stdout.splitlines()[1] == ""


@pytest.mark.skipif(not Path("/proc/self/wchan").exists(), reason="needs Linux's /proc")
def test_control_c_ends_with_130_and_a_sentence(shipped):
    """A process that waits for more of its standard input is interrupted."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background is deaf to it
    process = subprocess.Popen([MOSS, "predict", str(shipped)], text=True, preexec_fn=heard, **pipes)  # noqa: PLW1509
    process.stdin.write("a film\n")
    process.stdin.flush()
    for _ in range(200):
        if "pipe" in Path(f"/proc/{process.pid}/wchan").read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "moss: interrupted; run again to go on from what is finished\n"
