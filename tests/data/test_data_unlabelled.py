"""Rows without labels: documents of a plain text, pairs in one file or in two, against splits by hand."""

import gzip
import json

import pytest

from moss_rlhf.data import Column, check_data, load_rows, load_splits
from moss_rlhf.errors import DataError, RecipeError
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import DataSpec, make_recipe

TEXT = (Column("text", "text"),)
PAIR = (Column("source", "text"), Column("target", "text"))
QUIET = Progress(quiet=True)
STORY = "\nOne line\nand its second.\n\n\nAnother\r\n \nThe last one.\n"


def _load(folder, task=TEXT, seed=0, **fields):
    spec = DataSpec(**fields)
    splits = load_splits(spec, task, seed=seed, cache=folder / "cache", progress=QUIET)
    found = check_data(spec, task, seed=seed, progress=QUIET)
    assert (found.labels, found.facts, found.notes) == ((), splits.facts, splits.notes)
    again = load_splits(spec, task, seed=seed, cache=folder / "cache", progress=QUIET)  # from its cache
    assert (again.facts, again.digest) == (splits.facts, splits.digest)
    return splits


def _file(place, text):
    place.write_text(text, encoding="utf-8", newline="")
    return str(place)


def _layout(file, **fields):
    return {"file": file, **fields}


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("lines", ["One line", "and its second.", "Another", "The last one."]),
        ("paragraphs", ["One line\nand its second.", "Another", "The last one."]),
        ("file", ["One line\nand its second.\n\n\nAnother\n \nThe last one."]),
    ],
)
def test_a_plain_text_is_parted_as_asked(documents, expected, tmp_path):
    story = _file(tmp_path / "story.txt", STORY)
    other = _file(tmp_path / "other.txt", "Held out.\n")
    splits = _load(tmp_path, train=_layout(story, documents=documents), validation=_layout(other, documents="file"))
    assert splits.train["text"][:] == expected
    assert splits.train.column_names == ["text"]
    assert splits.notes == ()


def test_a_blank_line_between_two_others_makes_paragraphs_and_the_notes_say_so(tmp_path):
    lines = _file(tmp_path / "lines.txt", "\none\ttab\ntwo\nthree\n\n")
    story = _file(tmp_path / "story.txt", STORY)
    splits = _load(tmp_path, train=story, validation=lines)
    assert len(splits.train) == 3
    assert splits.validation["text"][:] == ["one\ttab", "two", "three"]  # plain text has no cells
    assert splits.notes == (
        "train: the layout was found by looking: txt, a document a paragraph, parted by blank lines.",
        "validation: the layout was found by looking: txt, a document a line.",
    )
    assert splits.facts["train"]["layout"] == "txt, a document a paragraph, parted by blank lines"
    assert "classes" not in splits.facts["train"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb18030"])
def test_documents_of_a_packed_file_in_another_encoding(encoding, tmp_path):
    place = tmp_path / "story.txt.gz"
    place.write_bytes(gzip.compress("第一段\n还是第一段\n\n第二段\n".encode(encoding)))
    splits = _load(tmp_path, train=_layout(str(place), encoding=encoding), validation=0.5)
    assert sorted([*splits.train["text"], *splits.validation["text"]]) == ["第一段\n还是第一段", "第二段"]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_texts_stand_in_a_named_column_too(name, tmp_path):
    rows = [f"text {n}" for n in range(10)]
    lines = [json.dumps({"text": row}) for row in rows] if name == "a.jsonl" else ["text", *rows]
    splits = _load(tmp_path, train=_file(tmp_path / name, "\n".join(lines)), validation=0.25)
    assert len(splits.validation) == 3  # 2.5 rounded half up, of one class
    assert sorted([*splits.train["text"], *splits.validation["text"]]) == sorted(rows)


def test_one_column_without_a_header_is_the_text(tmp_path):
    splits = _load(tmp_path, train=_file(tmp_path / "a.csv", "one\ntwo\nthree\n"), validation=0.3)
    assert len(splits.train) == 2
    assert splits.notes[0].endswith("csv, no header; one column, text.")


def test_leaks_shares_and_limits_go_by_the_texts(tmp_path):
    train = _file(tmp_path / "a.txt", "".join(f"text {n % 80}\n" for n in range(160)))
    test = _file(tmp_path / "b.txt", "".join(f"text {n}\n" for n in range(10)))
    splits = _load(tmp_path, train=train, test=test, validation=0.2, limit={"train": 50})
    texts = {split: set(getattr(splits, split)["text"]) for split in ("train", "validation", "test")}
    assert (len(splits.train), len(texts["validation"]), len(texts["test"])) == (50, 14, 10)
    assert not texts["train"] & (texts["validation"] | texts["test"])
    assert not texts["validation"] & texts["test"]
    assert splits.facts["train"]["dropped"] == {"also in test": 20, "also in validation": 14, "limit": 62}
    assert _load(tmp_path, train=train, test=test, validation=0.2, seed=1).digest != splits.digest


def test_a_pair_leaks_only_as_a_pair(tmp_path):
    train = _file(tmp_path / "a.tsv", "source\ttarget\na\tb\nc\td\na\tc\ne\tf\n")
    validation = _file(tmp_path / "c.tsv", "source\ttarget\na\tb\nc\td\na\tc\n")
    test = _file(tmp_path / "b.tsv", "source\ttarget\na\tb\n")
    splits = _load(tmp_path, PAIR, train=train, validation=validation, test=test)
    assert splits.facts["validation"]["dropped"] == {"also in test": 1}
    assert splits.validation.to_list() == [{"source": "c", "target": "d"}, {"source": "a", "target": "c"}]


def _pairs(folder, english, german):
    for name, lines in (("en", english), ("de", german)):
        (folder / f"train.{name}.gz").write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    return {"files": {"source": str(folder / "train.en.gz"), "target": str(folder / "train.de.gz")}}


def test_two_files_are_read_line_by_line(tmp_path):
    """In the order of the task's columns, whatever order the recipe gives them in; no cell is cut at a tab."""
    files = _pairs(tmp_path, ["one\tgo", "two", "three"], ["eins", "zwei", "drei"])
    files["files"] = dict(reversed(files["files"].items()))
    splits = _load(tmp_path, PAIR, train=files, validation=0.34)
    rows = {row["source"]: row["target"] for row in [*splits.train, *splits.validation]}
    assert rows == {"one\tgo": "eins", "two": "zwei", "three": "drei"}
    assert load_rows(DataSpec(train="none", test=files), PAIR, ())[1] == {"source": "two", "target": "zwei"}


def test_files_of_different_lengths_are_refused_with_both(tmp_path):
    files = _pairs(tmp_path, ["one", "two", "three"], ["eins", "zwei"])
    with pytest.raises(DataError, match=r"train\.en\.gz has 3 lines, .*train\.de\.gz has 2 lines; .*must have as many"):
        _load(tmp_path, PAIR, train=files)


def test_a_blank_line_of_a_pair_is_broken_and_shifts_nothing(tmp_path):
    files = _pairs(tmp_path, ["one", "", "three", "four"], ["eins", "zwei", "drei", "vier"])
    with pytest.raises(DataError, match=r"line 2: the column 'source' is empty"):
        _load(tmp_path, PAIR, train=files)
    splits = _load(tmp_path, PAIR, train=files, validation=0.4, broken_lines="skip")
    rows = {row["source"]: row["target"] for row in [*splits.train, *splits.validation]}
    assert rows == {"one": "eins", "three": "drei", "four": "vier"}
    assert splits.facts["train"]["dropped"] == {
        "broken line": 1,
    }


def test_pairs_without_names_are_never_guessed(tmp_path):
    file = _file(tmp_path / "a.tsv", "".join(f"word {n}\tWort {n}\n" for n in range(9)))
    with pytest.raises(DataError, match=r"'source' and 'target' can't be told.*\{source: 0, target: 1\}"):
        _load(tmp_path, PAIR, train=file)
    columns = {"source": 0, "target": 1}
    with pytest.raises(DataError, match=r"line 1: 'word 0', 'Wort 0' may be a row or the columns' names"):
        _load(tmp_path, PAIR, train=file, columns=columns)
    splits = _load(tmp_path, PAIR, train=_layout(file, header=False), columns=columns)
    assert len(splits.train) + len(splits.validation) == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"documents": "lines", "header": True},
            r"train\.documents: 'lines' has no meaning for a file with cells",
        ),
        ({"labels": {"a": "b"}}, r"data\.train\.labels: .* this task has none"),
    ],
)
def test_options_that_mean_nothing_are_refused(fields, message, tmp_path):
    with pytest.raises(DataError, match=message):
        _load(tmp_path, train=_layout(_file(tmp_path / "a.txt", STORY), **fields))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"source": "a.txt"}, r"data\.train\.files: gives source; it must give one file for each of source, target"),
        ({"source": "a.txt", "target": "none.txt"}, r"data\.train\.files\.target: there is no file"),
        ({"source": "a.txt", "target": "b.csv"}, r"files\.target: .*b\.csv is csv, and files are read as plain text"),
    ],
)
def test_parallel_files_that_are_none(files, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.csv"):
        _file(tmp_path / name, "one\n")
    with pytest.raises(DataError, match=message):
        _load(tmp_path, PAIR, train={"files": files})


def test_one_document_can_not_be_shared_out(tmp_path):
    with pytest.raises(DataError, match=r"no row is left for validation .* that there are several rows"):
        _load(tmp_path, train=_layout(_file(tmp_path / "a.txt", STORY), documents="file"))


def test_a_recipe_names_one_source():
    fields = {"task": "translation", "model": "m", "stages": ["finetune"]}
    with pytest.raises(RecipeError, match="give one of 'file', 'files' and 'hub'"):
        make_recipe(fields | {"data": {"train": {"file": "a", "files": {"source": "b"}}}})
