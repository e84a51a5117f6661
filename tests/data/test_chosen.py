"""Chosen texts → splits: which rows stay, what is told of them, and which choices leave nothing to train on."""

import csv

import pytest

from moss_rlhf.data import Column, load_splits
from moss_rlhf.data.chosen import Chosen, corpus_rows, keep_chosen, rows_of_texts, write_collected
from moss_rlhf.data.collecting import Candidate, read_examples
from moss_rlhf.errors import DataError
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import DataSpec

COLUMNS = (Column("text", "text"), Column("label", "label"))
PAIRS = (Column("source", "text"), Column("target", "text"))
BOTH = ("train", "validation")
ROWS = [(f"text {number}", "ab"[number % 2]) for number in range(20)]


@pytest.fixture
def split(tmp_path):
    def build(rows=ROWS, **fields):
        path = tmp_path / "rows.tsv"
        path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), "utf-8")
        spec = DataSpec(train=str(path), **fields)
        return load_splits(spec, COLUMNS, seed=0, cache=tmp_path / "cache", progress=Progress(quiet=True))

    return build


def _chosen(splits, texts):
    candidates = [Candidate(0, text, 1.0 - rank / 10, f"reason {rank}") for rank, text in enumerate(texts)]
    return rows_of_texts(candidates, corpus_rows(splits, COLUMNS, BOTH))


def test_positions_run_through_train_and_then_validation(split):
    splits = split(validation=0.2)
    rows = [(position, text) for position, text, _ in corpus_rows(splits, COLUMNS, BOTH)]
    assert rows == list(enumerate([*splits.train["text"], *splits.validation["text"]]))


def test_only_the_chosen_stay_wherever_they_were(split):
    before = split(validation=0.2)
    wanted = [before.validation["text"][1], *before.train["text"][3:7], before.train["text"][0]]
    kept, listed = keep_chosen(before, COLUMNS, BOTH, _chosen(before, wanted), "hand")
    assert kept.train["text"][:] == [before.train["text"][0], *before.train["text"][3:7]]
    assert kept.validation["text"][:] == [before.validation["text"][1]]
    assert [entry.text for entry in listed] == wanted  # the first chosen first
    for entry in listed:
        text, label = ROWS[entry.line - 2]
        assert (entry.text, entry.label) == (text, label)
    assert kept.origins["train"].lines.tolist() == [before.line("train", row) for row in (0, 3, 4, 5, 6)]
    facts = kept.facts["train"]
    assert (facts["rows"], facts["dropped"]["not collected"]) == (5, len(before.train) - 5)
    assert sum(facts["classes"].values()) == 5
    assert {name: facts["collected"][name] for name in ("of", "chosen", "by")} == {
        "of": len(before.train),
        "chosen": 5,
        "by": "hand",
    }
    assert [entry["reason"] for entry in facts["collected"]["examples"]] == [f"reason {rank}" for rank in range(1, 6)]
    assert f"validation: data.collect chose 1 of {len(before.validation)} rows; collected.csv" in kept.notes[-1]


def test_a_text_s_copies_stay_for_cleaning_to_find(split, tmp_path):
    other = tmp_path / "validation.tsv"
    other.write_text("text\tlabel\nanother\ta\n", "utf-8")
    before = split([*ROWS, ("text 1", "b"), ("text 1", "a")], validation=str(other))
    candidates = [Candidate(0, text, 1.0, "") for text in ("text 1", "text 2")]
    chosen = rows_of_texts(candidates, corpus_rows(before, COLUMNS, ("train",)))
    kept, listed = keep_chosen(before, COLUMNS, ("train",), chosen, "hand")
    assert [(entry.line, entry.label) for entry in listed] == [(3, "b"), (22, "b"), (23, "a"), (4, "a")]
    assert kept.facts["train"]["duplicates"] == 2
    assert kept.validation["text"][:] == ["another"]
    assert "collected" not in kept.facts["validation"]


def test_the_digest_names_the_rows_that_stay(split):
    before = split(validation=0.2)
    texts = [*before.train["text"][:6], before.validation["text"][0]]

    def digest(chosen):
        return keep_chosen(before, COLUMNS, BOTH, _chosen(before, chosen), "hand")[0].digest

    assert digest(texts) == digest(texts[::-1]) != before.digest
    assert digest(texts) != digest(texts[1:])


def test_one_class_or_no_row_is_refused_with_the_counts(split):
    before = split(validation=0.2)
    of_a = [text for text, label in zip(before.train["text"], before.train["label"], strict=True) if label == 0]
    with pytest.raises(DataError, match=r"data\.collect: .* one class \(a: 3, b: 0\); a classifier needs two"):
        keep_chosen(before, COLUMNS, BOTH, _chosen(before, [*of_a[:3], before.validation["text"][0]]), "hand")
    with pytest.raises(DataError, match=r"of 4 rows chosen none is of validation\. Give a larger count, or a valid"):
        keep_chosen(before, COLUMNS, BOTH, _chosen(before, before.train["text"][:4]), "hand")


def test_the_list_is_a_table(split, tmp_path):
    before = split(validation=0.2)
    texts = [*before.train["text"][:4], before.validation["text"][0]]
    _, listed = keep_chosen(before, COLUMNS, BOTH, _chosen(before, texts), "hand")
    write_collected(listed, tmp_path / "collected.csv")
    with (tmp_path / "collected.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == texts
    assert rows[-1]["split"] == "validation"
    assert rows[1]["score"] == "0.9"


def test_pairs_are_compared_by_both_texts(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("source\ttarget\n" + "".join(f"s{row}\tt{row}\n" for row in range(9)), "utf-8")
    spec = DataSpec(train=str(path), validation=0.3)
    splits = load_splits(spec, PAIRS, seed=0, cache=tmp_path / "cache", progress=Progress(quiet=True))
    texts = [text for _, text, _ in corpus_rows(splits, PAIRS, BOTH)]
    assert sorted(texts) == [f"s{row} t{row}" for row in range(9)]
    kept, listed = keep_chosen(splits, PAIRS, BOTH, [Chosen(0, 1.0, "r"), Chosen(8, 0.5, "r")], "hand")
    assert (len(kept.train), len(kept.validation)) == (1, 1)
    assert listed[0].label == ""
    assert read_examples(path, ["source", "target"], "data.collect.like")[:2] == ["s0 t0", "s1 t1"]


def test_examples_are_asked_for_by_the_field_that_names_them(tmp_path):
    with pytest.raises(DataError, match=r"^data\.collect\.like: there is no file .*none\.csv"):
        read_examples(tmp_path / "none.csv", ["text"], "data.collect.like")
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label\n", "utf-8")
    with pytest.raises(DataError, match=r"^data\.collect\.like: .* holds no example"):
        read_examples(empty, ["text"], "data.collect.like")
