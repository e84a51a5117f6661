"""One small data set, written in every form that users have, reads the same."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from moss_rlhf.data import Column, check_data, load_splits
from moss_rlhf.errors import DataError
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import DataSpec

COLUMNS = (Column("text", "text"), Column("label", "label"))
QUIET = Progress(quiet=True)
ROWS = [("a good film", "1"), ('he said "no" loudly', "0"), ("很好，喜欢", "1"), ("too long, too dull", "0")] * 3
ROWS = [(f"{text} {number}", label) for number, (text, label) in enumerate(ROWS)]
SWAPPED = [(label, text) for text, label in ROWS]


def _quoted(cell):
    return '"' + cell.replace('"', '""') + '"'


def _csv(rows, end="\n"):
    return "".join(",".join(map(_quoted, row)) + end for row in rows)


def _tsv(rows, end="\n"):
    return "".join("\t".join(row) + end for row in rows)


def _objects(rows=ROWS, label=str):
    return [{"text": text, "label": label(value)} for text, value in rows]


def _json(value):
    return json.dumps(value, ensure_ascii=False)


HEADER = [("text", "label")]
BY_POSITION = {"text": 0, "label": 1}
FORMS = {
    "csv with header": ("a.csv", _csv(HEADER + ROWS), {}),
    "csv, names in capitals": ("a.csv", _csv([("Label", "TEXT"), *SWAPPED]), {}),
    "csv without header": ("a.csv", _csv(ROWS), {}),
    "csv, semicolons": ("a.csv", _csv(HEADER + ROWS).replace('","', '";"'), {"delimiter": ";"}),
    "csv, CRLF": ("a.csv", _csv(HEADER + ROWS, "\r\n"), {}),
    "csv, BOM": ("a.csv", "\ufeff" + _csv(HEADER + ROWS), {}),
    "csv, blank lines": ("a.csv", _csv(HEADER + ROWS, "\n\n"), {}),
    "csv, other names": (
        "a.csv",
        _csv([("review", "stars"), *ROWS]),
        {"columns": {"text": "review", "label": "stars"}},
    ),
    "csv, by position": ("a.csv", _csv(SWAPPED), {"columns": {"text": 1, "label": 0}}),
    "csv, by position under a header": ("a.csv", _csv([("x", "y"), *ROWS]), {"columns": BY_POSITION, "header": True}),
    "tsv with header": ("a.tsv", _tsv(HEADER + ROWS), {}),
    "tsv without header": ("a.tsv", _tsv(SWAPPED), {}),
    "txt, text first": ("a.txt", _tsv(ROWS), {}),
    "txt, label first, CRLF": ("a.txt", _tsv(SWAPPED, "\r\n"), {}),
    "json list": ("a.json", _json(_objects()), {}),
    "json, floats for labels": ("a.json", _json(_objects(label=float)), {}),
    "json object": ("a.json", _json({"version": 1, "data": _objects(label=int)}), {}),
    "jsonl": ("a.jsonl", "".join(_json(row) + "\n" for row in _objects()), {}),
    "jsonl, other names": (
        "a.jsonl",
        "".join(_json({"id": 7, "review": text, "y": int(label)}) + "\n" for text, label in ROWS),
        {"columns": {"text": "review", "label": "y"}},
    ),
    "labels as floats": ("a.tsv", _tsv((text, f"{label}.0") for text, label in ROWS), {}),
    "any name, format given": ("a.data", _tsv(ROWS), {"format": "tsv"}),
}


def _read(folder, spec):
    splits = load_splits(spec, COLUMNS, seed=0, cache=folder / "cache", progress=QUIET)
    rows = {name: list(zip(part["text"], part["label"], strict=True)) for name, part in _parts(splits)}
    return splits, rows


def _parts(splits):
    return [("train", splits.train), ("validation", splits.validation)] + (
        [("test", splits.test)] if splits.test else []
    )


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_the_same(tmp_path, form, packed):
    name, text, layout = FORMS[form]
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    if packed and form == "any name, format given":
        layout = {"format": "tsv"}
    splits, rows = _read(tmp_path, DataSpec(train={"file": str(path), **layout}, validation=0.25))
    assert splits.labels == ("0", "1")
    assert sorted(rows["train"] + rows["validation"]) == sorted((text, int(label)) for text, label in ROWS)
    assert splits.facts["validation"]["classes"] == {"0": 2, "1": 2}  # a quarter of six, rounded half up, of each class


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_parquet(tmp_path, packed):
    path = tmp_path / ("a.parquet" + ".gz" * packed)
    parquet.write_table(pyarrow.Table.from_pylist(_objects(label=int)), tmp_path / "plain")
    content = (tmp_path / "plain").read_bytes()
    path.write_bytes(gzip.compress(content) if packed else content)
    _, rows = _read(tmp_path, DataSpec(train=str(path), validation=0.25))
    assert sorted(rows["train"] + rows["validation"]) == sorted((text, int(label)) for text, label in ROWS)


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-le", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("form", ["csv with header", "tsv without header", "json list", "jsonl"])
def test_encodings(tmp_path, form, encoding):
    name, text, _ = FORMS[form]
    (tmp_path / name).write_bytes(text.encode(encoding))
    _, rows = _read(tmp_path, DataSpec(train={"file": str(tmp_path / name), "encoding": encoding}, validation=0.25))
    assert sorted(rows["train"] + rows["validation"]) == sorted((text, int(label)) for text, label in ROWS)


@pytest.mark.parametrize(("encoding", "hint"), [("gb18030", "encoding: gb18030"), ("utf-16", "encoding: utf-16")])
def test_a_wrong_encoding_names_the_line_and_the_right_one(tmp_path, encoding, hint):
    (tmp_path / "a.tsv").write_bytes(_tsv([("plain", "1"), ("plainer", "0"), *ROWS]).encode(encoding))
    line = 1 if encoding == "utf-16" else 5
    with pytest.raises(DataError, match=f"a.tsv, line {line}: .*{hint}"):
        check_data(DataSpec(train=str(tmp_path / "a.tsv")), COLUMNS, seed=0, progress=QUIET)


def test_newlines_quotes_nulls_and_long_cells_in_csv_are_data(tmp_path):
    texts = [
        "two\nlines",
        "two\r\nlines",
        'a "quoted" word',
        "nul \0 byte",
        "=1+1",
        "x" * 300_000,
        "line\u2028separator",
        "f",
    ]
    rows = [(text, str(number % 2)) for number, text in enumerate(texts)]
    (tmp_path / "a.csv").write_bytes(_csv(HEADER + rows).encode())
    _, read = _read(tmp_path, DataSpec(train=str(tmp_path / "a.csv")))
    assert sorted(text for part in read.values() for text, _ in part) == sorted(texts)


def test_tsv_takes_quotes_literally(tmp_path):
    texts = ['"an open quote', 'closed" here', '"all"', 'mid"dle', "\u2028 and \x0b", "plain"]
    (tmp_path / "a.tsv").write_text(
        _tsv(HEADER + [(text, str(n % 2)) for n, text in enumerate(texts)]), "utf-8", newline=""
    )
    _, read = _read(tmp_path, DataSpec(train=str(tmp_path / "a.tsv")))
    assert sorted(text for part in read.values() for text, _ in part) == sorted(texts)


def test_a_split_with_its_own_layout(tmp_path):
    """AG News: train with a header and codes from 0; test without, codes from 1, the text in two columns."""
    train = [("label", "text", "source"), *((str(n % 4), f"story number {n}", "wire") for n in range(16))]
    test = [(str(n % 4 + 1), f"title {n}", f"body, {n}") for n in range(8)]
    (tmp_path / "train.csv").write_text(_csv(train))
    (tmp_path / "test.csv").write_text(_csv(test))
    own = {"header": False, "columns": {"label": 0, "text": [1, 2]}, "labels": {1: 0, 2: 1, 3: 2, 4: 3}}
    spec = DataSpec(train=str(tmp_path / "train.csv"), test={"file": str(tmp_path / "test.csv"), **own})
    splits, rows = _read(tmp_path, spec)
    assert splits.labels == ("0", "1", "2", "3")
    assert rows["test"] == [(f"title {n} body, {n}", n % 4) for n in range(8)]
    assert splits.facts["test"]["layout"] == "csv, no header; text = column 1 + column 2, label = column 0"


def test_a_split_s_own_columns_win_over_those_of_all(tmp_path):
    (tmp_path / "train.csv").write_text(_csv([("review", "mood"), *ROWS]))
    (tmp_path / "test.csv").write_text(_csv([("body", "mood"), ("another", "1"), ("and another", "0")]))
    own = {"file": str(tmp_path / "test.csv"), "columns": {"text": "body", "label": "mood"}}
    spec = DataSpec(train=str(tmp_path / "train.csv"), test=own, columns={"text": "review", "label": "mood"})
    assert _read(tmp_path, spec)[1]["test"] == [("another", 1), ("and another", 0)]


def test_several_text_columns_of_a_task(tmp_path):
    columns = (Column("premise", "text"), Column("hypothesis", "text"), Column("label", "label"))
    rows = [(f"premise {n}", f"hypothesis {n}", "yes" if n % 2 else "no") for n in range(8)]
    (tmp_path / "a.csv").write_text(_csv([("premise", "hypothesis", "label"), *rows]))
    spec = DataSpec(train=str(tmp_path / "a.csv"), validation=0.25)
    splits = load_splits(spec, columns, seed=0, cache=tmp_path, progress=QUIET)
    assert splits.train.column_names == ["premise", "hypothesis", "label"]
    check = check_data(spec, columns, seed=0, progress=QUIET)
    assert ("premise 3", "hypothesis 3") in check.samples["train"]


def test_features_are_text_and_class_ids(tmp_path):
    (tmp_path / "a.tsv").write_text(_tsv(ROWS), "utf-8")
    splits, _ = _read(tmp_path, DataSpec(train=str(tmp_path / "a.tsv")))
    assert {name: feature.dtype for name, feature in splits.train.features.items()} == {
        "text": "string",
        "label": "int64",
    }


def test_a_local_folder_is_loaded_as_a_data_set(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"text": f"{split} {n}", "label": n % 2} for n in range(8)]
        (folder / f"{split}.jsonl").write_text("".join(_json(row) + "\n" for row in rows))
    _, rows = _read(tmp_path, DataSpec(train=str(folder), test=str(folder), validation=0.25))
    assert rows["test"] == [(f"test {n}", n % 2) for n in range(8)]
    assert len(rows["train"]) + len(rows["validation"]) == 8
    with pytest.raises(DataError, match=r"data\.validation: the split 'validation'"):
        _read(tmp_path, DataSpec(train=str(folder), validation=str(folder)))
    both = DataSpec(train=str(folder), validation={"hub": str(folder), "split": "test"})
    assert len(_read(tmp_path, both)[1]["validation"]) == 8


def test_class_names_of_a_hub_data_set_are_the_labels():
    import datasets

    from moss_rlhf.data.sources import HubSource

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    assert [record.cells["label"] for record in HubSource("here", rows).records()] == ["pos", "neg", None]


def test_memory_grows_with_digests_and_labels_only(tmp_path):
    path = tmp_path / "big.tsv"
    with path.open("w") as file:
        file.write("text\tlabel\n")
        for number in range(20_000):
            file.write(f"{number} {'word ' * 200}\t{number % 2}\n")
    assert path.stat().st_size > 20_000_000
    import datasets  # noqa: F401  # its import is not what is measured

    tracemalloc.start()
    splits = load_splits(DataSpec(train=str(path)), COLUMNS, seed=0, cache=tmp_path / "cache", progress=QUIET)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(splits.train) + len(splits.validation) == 20_000
    assert peak < 8_000_000


def test_arrow_files_are_used_again_until_the_content_changes(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(_tsv(ROWS), "utf-8")
    spec = DataSpec(train=str(path), validation=0.25)
    first, rows = _read(tmp_path, spec)
    (written,) = (tmp_path / "cache").glob("*.arrow")
    stamp = written.stat().st_mtime_ns
    second, again = _read(tmp_path, spec)
    assert (second.digest, second.facts, again) == (first.digest, first.facts, rows)
    assert written.stat().st_mtime_ns == stamp
    path.write_text(_tsv([*ROWS, ("one more", "1")]), "utf-8")
    third, _ = _read(tmp_path, spec)
    assert third.digest != first.digest
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2


def test_the_digest_does_not_know_the_file_s_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.tsv").write_text(_tsv(ROWS), "utf-8")
    one, other = (_read(tmp_path, DataSpec(train=str(tmp_path / f"{name}.tsv")))[0].digest for name in ("a", "b"))
    assert one == other


def test_check_finds_what_loading_finds_and_writes_nothing(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(_tsv(ROWS), "utf-8")
    spec = DataSpec(train=str(path), validation=0.25)
    check = check_data(spec, COLUMNS, seed=0, progress=QUIET)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tsv"]
    splits, _ = _read(tmp_path, spec)
    assert (check.facts, check.labels, check.notes) == (splits.facts, splits.labels, splits.notes)
    assert sorted(check.samples["train"]) == sorted((text,) for text, _ in ROWS)


def test_samples_are_a_thousand_rows_from_everywhere(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + "".join(f"row {n}\t{n % 2}\n" for n in range(5000)))
    samples = check_data(DataSpec(train=str(path)), COLUMNS, seed=3, progress=QUIET).samples["train"]
    numbers = [int(text.split()[1]) for (text,) in samples]
    assert len(set(numbers)) == 1000
    assert abs(sum(numbers) / 1000 - 2500) < 200  # over four standard errors (41)


def test_nothing_heavy_is_imported_for_a_check():
    import subprocess
    import sys

    code = "import sys, moss_rlhf.data; print(*(name in sys.modules for name in ('torch', 'datasets', 'pyarrow')))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False"] * 3


def test_one_path_can_be_given_relative(tmp_path, monkeypatch):
    (tmp_path / "a.tsv").write_text(_tsv(ROWS), "utf-8")
    monkeypatch.chdir(tmp_path)
    assert check_data(DataSpec(train="a.tsv"), COLUMNS, seed=0, progress=QUIET).facts["train"]["rows"] == 10
    assert Path("a.tsv").exists()
