"""What is wrong with a file is said with the file, the line, the rule and the remedy."""

import gzip
import json
import os

import pytest

from moss_rlhf.data import Column, check_data, sniff
from moss_rlhf.errors import DataError
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import DataSpec

COLUMNS = (Column("text", "text"), Column("label", "label"))
QUIET = Progress(quiet=True)
GOOD = "text\tlabel\n" + "".join(f"a text {n}\t{n % 2}\n" for n in range(10))
BARE = GOOD.removeprefix("text\tlabel\n")
MANY = "text\tlabel\n" + "".join(f"a text {n}\t{{}}\n" for n in range(30))


def _check(**fields):
    return check_data(DataSpec(**fields), COLUMNS, seed=0, progress=QUIET)


FAULTS = {
    "empty": ("a.tsv", "", {}, "a.tsv: is empty"),
    "empty json": ("a.json", "", {}, "a.json: is empty"),
    "empty list": ("a.json", "[]", {}, "a.json: is empty"),
    "blank lines only": ("a.csv", "\n\n", {}, "a.csv: is empty"),
    "header only": ("a.tsv", "text\tlabel\n", {}, "has a header and no rows"),
    "one class": ("a.tsv", "text\tlabel\na\t1\nb\t1\n", {}, "every label is '1'; .* two classes"),
    "missing cell": ("a.tsv", GOOD + "no label\n", {}, "line 12: has 1 cells, the header has 2. .*broken_lines: skip"),
    "extra cell": ("a.csv", "text,label\na,0\nb, c,1\n", {}, "line 3: has 3 cells, the header has 2"),
    "extra cell, no header": ("a.tsv", BARE + "a\tb\t1\n", {}, "line 11: has 3 cells, the others have 2"),
    "empty text": ("a.tsv", GOOD + " \t1\n", {}, "line 12: the column 'text' is empty"),
    "empty label": ("a.tsv", GOOD + "a\t \n", {}, "line 12: the column 'label' is empty"),
    "broken jsonl": ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', {}, "a.jsonl, line 2: is not JSON"),
    "jsonl list": ("a.jsonl", '{"text": "a", "label": 1}\n[1]\n', {}, "line 2: is a JSON list"),
    "jsonl field missing": (
        "a.jsonl",
        '{"text": "a", "label": 1}\n{"text": "b"}\n',
        {},
        "line 2: has no field 'label'",
    ),
    "jsonl null": ("a.jsonl", '{"text": null, "label": 1}\n', {}, "line 1: the column 'text' is empty"),
    "jsonl nested text": ("a.jsonl", '{"text": ["a"], "label": 1}\n', {}, "line 1: the column 'text' is a list"),
    "jsonl nested label": ("a.jsonl", '{"text": "a", "label": {}}\n', {}, "line 1: the label is a dict"),
    "lone surrogate": ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', {}, "line 1: .*half a character"),
    "deep json": ("a.json", "[" * 100_000, {}, "not JSON that can be read"),
    "broken json": ("a.json", '[\n{"text": "a",\n', {}, "a.json, line 3: is not JSON"),
    "jsonl named json": ("a.json", '{"text": "a"}\n{"text": "b"}\n', {}, "line 2: .*set format: jsonl"),
    "json of two lists": ("a.json", '{"a": [], "b": []}', {}, "an object with 2 lists; .*one list"),
    "open quote": (
        "a.csv",
        'text,label\na,0\n"b\nc",1\n"d,0\ne,1\n',
        {},
        "a.csv, line 5: a quote opens here and is never",
    ),
    "quote in a quoted cell": ("a.csv", 'text,label\na,0\n"b "c" d",1\n', {}, "line 3: is not CSV .*written twice"),
    "no such column": ("a.tsv", GOOD, {"columns": {"text": "txt"}}, "no column 'txt'; did you mean 'text'"),
    "standard name missing": (
        "a.tsv",
        "text\tsentiment\n",
        {"header": True},
        "no column 'label'; .*Known names: sentiment, text",
    ),
    "position too high": (
        "a.tsv",
        GOOD,
        {"columns": {"text": 0, "label": 2}, "header": True},
        "no column 2; .* 2 cells",
    ),
    "label position not given": ("a.tsv", BARE, {"columns": {"text": 0}}, "columns.label: is missing"),
    "unknown standard column": ("a.tsv", GOOD, {"columns": {"texts": 0}}, "texts: is no column .*did you mean 'text'"),
    "two columns for a label": ("a.tsv", GOOD, {"columns": {"label": [0, 1]}}, "a label is one column"),
    "names without header": ("a.tsv", GOOD, {"columns": {"text": "text"}, "header": False}, "by name need a header"),
    "positions for json": ("a.json", '[{"text": "a", "label": 1}]', {"columns": {"text": 0}}, "0 is a position"),
    "one name twice": ("a.csv", "text,text,label\na,b,1\n", {}, "2 columns are named 'text'"),
    "header for json": ("a.json", "[]", {"header": True}, "header: True has no meaning for json"),
    "split of a file": ("a.tsv", GOOD, {"split": "train"}, "split: 'train' has no meaning for a file"),
    "unknown encoding": ("a.tsv", GOOD, {"encoding": "utf-9"}, "encoding: 'utf-9' is not known"),
    "no encoding of text": ("a.tsv", GOOD, {"encoding": "base64"}, "encoding: 'base64' is not known"),
    "unknown ending": ("a.data", GOOD, {}, "no known ending .*set data.train.format"),
    "not gzip": ("a.tsv.gz", GOOD, {}, "is not a gzip file though"),
    "not parquet": ("a.parquet", GOOD, {}, "is not a whole parquet file"),
    "scores": (
        "a.tsv",
        GOOD + "a\t0.5\n",
        {},
        "line 12: the label '0.5' is not a whole number; .*scores are no classes",
    ),
    "labels that are text": (
        "a.tsv",
        "".join(MANY.format(*range(30)).splitlines(keepends=True)),
        {},
        "30 different labels in 30 rows .*the label column looks like text",
    ),
    "label not renamed": ("a.tsv", GOOD, {"labels": {1: "good"}}, r"line 2: the label '0' is not among .*\('1'\)"),
    "one cell a row": ("a.csv", BARE, {}, "every row has one cell, .*delimiter"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_told_with_place_and_rule(tmp_path, case):
    name, content, layout, message = FAULTS[case]
    (tmp_path / name).write_text(content, "utf-8", newline="")
    with pytest.raises(DataError, match=message):
        _check(train={"file": str(tmp_path / name), **layout})


UNCLEAR = {
    "unknown header": (
        "review\tmood\n" + BARE,
        r"data.columns: \{text: review, label: mood\}.* or, if .*header: false",
    ),
    "two texts": (
        "".join(f"{n % 2}\ttitle {n}\ta body {n}\n" for n in range(9)),
        "can't be told for sure .*column 1: 'title 0'",
    ),
    "two labels": ("".join(f"{n % 2}\t{n % 3}\ta body {n}\n" for n in range(9)), "can't be told for sure"),
    "no label": ("".join(f"a {n}\ta body {n}\n" for n in range(9)), "can't be told for sure"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_not_clear_is_asked(tmp_path, case):
    content, message = UNCLEAR[case]
    (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(DataError, match=message):
        _check(train=str(tmp_path / "a.tsv"))


def test_columns_by_position_ask_whether_the_first_line_is_a_header(tmp_path):
    (tmp_path / "a.tsv").write_text("review\tmood\n" + BARE)
    with pytest.raises(DataError, match=r"line 1: the label 'mood' does not occur again .*header: true .*or false"):
        _check(train=str(tmp_path / "a.tsv"), columns={"text": 0, "label": 1})
    layout = {"file": str(tmp_path / "a.tsv"), "header": True, "columns": {"text": 0, "label": 1}}
    assert _check(train=layout).facts["train"]["layout"] == "tsv, header; text = 'review', label = 'mood'"


def test_an_id_beside_the_text_is_no_text(tmp_path):
    (tmp_path / "a.tsv").write_text("".join(f"id_{n}\t{n % 2}\tsome words {n}\n" for n in range(9)))
    check = _check(train=str(tmp_path / "a.tsv"))
    assert check.notes == (
        "train: the layout was found by looking: tsv, no header; text = column 2, label = column 1.",
    )


def test_remnants_of_html_are_kept_and_told(tmp_path):
    rows = ["good<br />film\t1", "#39;s bad\t0", "1 < 2 and 3 > 2 & so on\t1", "plain\t0", "a &amp; b\t1", "dull\t0"]
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "\n".join(rows))
    assert any("train: 3 texts hold remnants of HTML" in note for note in _check(train=str(tmp_path / "a.tsv")).notes)


def test_labels_that_train_lacks(tmp_path):
    (tmp_path / "train.tsv").write_text(GOOD)
    (tmp_path / "test.tsv").write_text("text\tlabel\nfirst\t1\nsecond\t2\n")
    with pytest.raises(
        DataError, match=r"test.tsv, line 3: the label '2' .*known: 0, 1.*data.test.labels: \{1: 0, 2: 1\}"
    ):
        _check(train=str(tmp_path / "train.tsv"), test=str(tmp_path / "test.tsv"))
    (tmp_path / "test.tsv").write_text("text\tlabel\nfirst\t1\nsecond\tgood\n")
    with pytest.raises(DataError, match=r"the label 'good' does not occur in train .*Correct it"):
        _check(train=str(tmp_path / "train.tsv"), validation=str(tmp_path / "test.tsv"))


def test_more_classes_than_a_thousand_stop_the_reading(tmp_path):
    lines = (f"a text {n}\tclass {n % 1001}\n" for n in range(3000))
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(lines))
    with pytest.raises(DataError, match="more than 1,000 different labels"):
        _check(train=str(tmp_path / "a.tsv"))


def test_files_that_can_t_be_read(tmp_path):
    (tmp_path / "reviews.tsv").write_text(GOOD)
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    os.mkfifo(tmp_path / "pipe.tsv")
    cases = {
        "review.tsv": r"there is no file .*review\.tsv\. Did you mean .*reviews\.tsv\?",
        "none/reviews.tsv": "There is no folder",
        "cut.tsv.gz": "is cut off or damaged",
        "pipe.tsv": "not a regular file",
        "no/such/thing": "is no file, no folder, and no data set id",
        "x" * 5000 + ".tsv": "can't be looked at",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            _check(train=str(tmp_path / name))
    with pytest.raises(DataError, match="not a regular file"):
        _check(train="/dev/null")
    with pytest.raises(DataError, match="is a folder, not a file"):
        _check(train={"file": str(tmp_path), "format": "csv"})


def test_no_permission(tmp_path, monkeypatch):
    import pathlib

    (tmp_path / "a.tsv").write_text(GOOD)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", refuse)  # a mode of 000 does not stop root
    with pytest.raises(DataError, match="no permission to read it"):
        _check(train=str(tmp_path / "a.tsv"))


def test_hub_data_that_can_t_be_reached_is_one_sentence(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"data\.train: the split 'train' of 'someone/something' can't be loaded"
    ) as caught:
        _check(train="someone/something")
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="can't be loaded"):
        _check(train=str(tmp_path / "empty"))
    with pytest.raises(DataError, match="encoding: 'gb18030' has no meaning"):
        _check(train={"hub": "someone/something", "encoding": "gb18030"})


def test_broken_lines_can_be_skipped_and_are_counted(tmp_path):
    content = GOOD.encode() + b"one cell\n\t1\nbytes \xff\t1\na\tb\t1\n" + b"last\t0\n"
    (tmp_path / "a.tsv").write_bytes(content)
    check = _check(train=str(tmp_path / "a.tsv"), broken_lines="skip", validation=0.2)
    assert check.facts["train"]["dropped"] == {"broken line": 4}
    assert check.facts["train"]["rows"] + check.facts["validation"]["rows"] == 11
    (note,) = check.notes
    assert note.startswith(
        "train: 4 broken lines skipped: line 12 has 1 cells, the header has 2; line 13 the column 'text'"
    )
    assert "line 14 its bytes are not utf-8" in note
    assert "line 15" not in note


def test_a_broken_csv_line_costs_one_row(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\na,0\n"b "c" d",1\ne,1\nf,0\ng,1\n')
    check = _check(train=str(tmp_path / "a.csv"), broken_lines="skip", validation=0.5)
    assert check.facts["train"]["dropped"] == {"broken line": 1}
    assert check.facts["train"]["rows"] + check.facts["validation"]["rows"] == 4


def test_renamed_labels_are_names(tmp_path):
    (tmp_path / "a.tsv").write_text(GOOD)
    check = _check(train=str(tmp_path / "a.tsv"), labels={0: "bad", 1.0: "good"}, validation=0.2)
    assert check.labels == ("bad", "good")


SNIFFED = {
    "standard names": (
        "a.csv",
        "id,text,label\n" + "".join(f"{n},words and {n},{n % 2}\n" for n in range(9)),
        "text",
        "label",
    ),
    "other names": ("a.csv", "mood,review\n" + "".join(f"{n % 2},words and {n}\n" for n in range(9)), "review", "mood"),
    "no header": ("a.tsv", BARE, 0, 1),
    "json": ("a.json", json.dumps([{"y": n % 2, "review": f"some words {n}"} for n in range(9)]), "review", "y"),
}


@pytest.mark.parametrize("case", SNIFFED)
def test_sniffing_writes_a_data_section_that_checks(tmp_path, case):
    name, content, text, label = SNIFFED[case]
    (tmp_path / name).write_text(content)
    section = sniff(tmp_path / name).data_section()
    assert section["columns"] == {"text": text, "label": label}
    assert _check(**section, validation=0.25).labels == ("0", "1")


def test_sniffing_gives_the_candidates_where_it_is_not_sure(tmp_path):
    (tmp_path / "a.csv").write_text("".join(f"{n % 2},title {n},body of {n}\n" for n in range(9)))
    sniffed = sniff(tmp_path / "a.csv")
    assert (sniffed.header, sniffed.texts, sniffed.labels) == (False, (1, 2), (0,))
    with pytest.raises(DataError, match=r"texts may be \[1, 2\], labels \[0\]"):
        sniffed.data_section()
