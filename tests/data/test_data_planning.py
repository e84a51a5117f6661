"""Which rows each split keeps, against counts worked by hand."""

import numpy as np
import pytest

from moss_rlhf.data import Column, check_data, load_splits
from moss_rlhf.data.cleaning import clean_splits
from moss_rlhf.data.labels import label_name, order_labels, shifted_codes
from moss_rlhf.data.planning import hold_out, number_texts
from moss_rlhf.errors import DataError
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import CleanSpec, DataSpec

COLUMNS = (Column("text", "text"), Column("label", "label"))
QUIET = Progress(quiet=True)


def _write(path, rows):
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), "utf-8")
    return str(path)


def _load(folder, seed=0, known_labels=None, **fields):
    return load_splits(
        DataSpec(**fields), COLUMNS, seed=seed, cache=folder / "cache", known_labels=known_labels, progress=QUIET
    )


@pytest.mark.parametrize(
    ("value", "name"),
    [
        *((1, "1"), (1.0, "1"), ("1", "1"), (" 1.0 ", "1"), ("+1.", "1"), ("-0", "0"), ("007", "007"), (True, "true")),
        *(("good", "good"), (None, ""), (float("nan"), ""), ("", ""), ("0.5", "0.5"), ("1" * 5000, "1" * 5000)),
    ],
)
def test_label_names(value, name):
    assert label_name(value) == name


def test_labels_are_sorted_as_numbers_where_all_are_and_a_trained_head_keeps_its_order():
    assert order_labels({"10", "9", "-1"}) == ("-1", "9", "10")
    assert order_labels({"10", "9", "b"}) == ("10", "9", "b")
    assert order_labels({"a", "b"}, ["b", "a"]) == ("b", "a")
    assert order_labels({"a", "b"}, ["b", "a", "c"]) == ("a", "b")


def test_shifted_codes():
    assert shifted_codes(["0", "1"], ["1", "2"]) == {1: 0, 2: 1}
    assert shifted_codes(["1", "2", "3"], ["0", "2"]) == {0: 1, 2: 3}
    assert shifted_codes(["0", "1"], ["5"]) is None
    assert shifted_codes(["0", "1"], ["good"]) is None


def test_equal_digests_get_equal_numbers_in_every_split():
    one = np.array([[1, 2], [0, 9], [1, 2], [1, 3]], dtype=np.uint64)
    other = np.array([[0, 9], [2, 1]], dtype=np.uint64)
    first, second = number_texts([one, other])
    assert first[0] == first[2]
    assert first[1] == second[0]
    assert len({*first, *second}) == 4


@pytest.mark.parametrize("seed", range(3))
def test_the_share_is_stratified_in_closed_form(seed):
    """Of 1, 2, 7, 25 and 100 rows at 0.1: 0, 1, 1, 3 (2.5 rounded half up) and 10."""
    sizes = [1, 2, 7, 25, 100]
    classes = np.random.default_rng(seed).permutation(np.repeat(np.arange(5), sizes))
    held = hold_out(classes, np.arange(len(classes)), 0.1, seed)
    assert np.bincount(classes[held], minlength=5).tolist() == [0, 1, 1, 3, 10]
    assert (np.diff(held) > 0).all()
    assert (held == hold_out(classes, np.arange(len(classes)), 0.1, seed)).all()


def test_every_class_keeps_a_row_in_train_whatever_the_share_and_the_copies():
    classes = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    texts = np.array([0, 0, 1, 2, 3, 4, 5, 5])
    held = hold_out(classes, texts, 0.99, 0)
    left = ~np.isin(texts, texts[held])
    assert np.bincount(classes[held], minlength=3).tolist() == [2, 1, 0]
    assert np.unique(classes[left]).tolist() == [0, 1, 2]


def test_a_text_of_two_classes_is_not_held_out():
    classes = np.array([0, 1, 0, 0, 1, 1, 1])
    texts = np.array([9, 9, 1, 2, 3, 4, 4])
    for seed in range(10):
        held = hold_out(classes, texts, 0.99, seed)
        assert len(held) == 2  # of two texts of each class that no other class has
        assert not {0, 1, 6} & set(held)


@pytest.mark.parametrize("seed", range(6))
def test_cleaning_sees_every_row_of_a_conflict_whatever_is_held_out(seed, tmp_path):
    rows = [(f"text {n}", n % 2) for n in range(8)] + [(f"text {n}", (n + 1) % 2) for n in range(3)]
    splits = _load(tmp_path, seed, train=_write(tmp_path / "a.tsv", rows), validation=0.5)
    assert "also in validation" not in splits.facts["train"]["dropped"]
    spec = CleanSpec(conflicts="drop")
    cleaned = clean_splits(splits, COLUMNS, spec, seed=seed, embed=lambda texts: None, progress=QUIET)
    assert sorted(found.line for found in cleaned.findings) == [2, 3, 4, 10, 11, 12]
    assert cleaned.splits.facts["train"]["dropped"] == {"conflicts": 6}


def test_leaks_go_from_train_first_then_validation_never_from_test(tmp_path):
    train = [("in all", 0), ("in test", 1), (" in test ", 1), ("in validation", 0), ("own", 1), ("own", 1), ("mine", 0)]
    validation = [("in all", 0), ("in validation", 0), ("in both", 1), ("only here", 1)]
    test = [("in all", 0), ("in test", 1), ("in both", 1), ("in both", 1)]
    files = {"train": train, "validation": validation, "test": test}
    splits = _load(tmp_path, **{split: _write(tmp_path / f"{split}.tsv", rows) for split, rows in files.items()})
    assert splits.train["text"][:] == ["own", "own", "mine"]
    assert splits.validation["text"][:] == ["in validation", "only here"]
    assert splits.test["text"][:] == ["in all", "in test", "in both", "in both"]
    dropped = {split: facts["dropped"] for split, facts in splits.facts.items()}
    assert dropped["train"] == {"also in test": 3, "also in validation": 1}
    assert dropped["validation"] == {"also in test": 2}
    assert dropped["test"] == {}
    assert {split: facts["duplicates"] for split, facts in splits.facts.items()} == {
        "train": 1,
        "validation": 0,
        "test": 1,
    }
    assert "validation: 2 rows dropped because their text is also in test." in splits.notes


def test_a_share_shares_no_text_with_train_or_test(tmp_path):
    train = [(f"text {n % 80}", n % 2) for n in range(160)]
    test = [(f"text {n}", n % 2) for n in range(10)]
    splits = _load(
        tmp_path, train=_write(tmp_path / "a.tsv", train), test=_write(tmp_path / "b.tsv", test), validation=0.2
    )
    texts = {split: set(getattr(splits, split)["text"]) for split in ("train", "validation", "test")}
    assert [len(texts[split]) for split in texts] == [56, 14, 10]
    assert len(set.union(*texts.values())) == 80
    assert splits.facts["train"]["dropped"] == {"also in test": 20, "also in validation": 14}
    assert splits.facts["train"]["rows"] == 112
    assert splits.facts["validation"]["classes"] == {"0": 7, "1": 7}


def test_a_limit_is_a_seeded_subset_in_order_taken_after_the_share(tmp_path):
    path = _write(tmp_path / "a.tsv", [(f"{n:04d}", int(n >= 500)) for n in range(1000)])  # sorted by label, as IMDB is
    splits = _load(tmp_path, train=path, limit={"train": 100, "validation": 40}, validation=0.1)
    train = splits.train["text"][:]
    assert (len(train), len(splits.validation)) == (100, 40)
    assert train == sorted(train)
    assert 30 < splits.facts["train"]["classes"]["1"] < 70  # the first 100 rows would have none
    assert splits.facts["train"]["dropped"] == {"limit": 800}
    assert train == _load(tmp_path, train=path, limit={"train": 100}, validation=0.1).train["text"][:]
    other = _load(tmp_path, seed=1, train=path, limit={"train": 100, "validation": 40}, validation=0.1)
    assert other.train["text"][:] != train
    assert other.digest != splits.digest


def test_a_limit_that_leaves_one_class_is_refused(tmp_path):
    path = _write(tmp_path / "a.tsv", [(f"{n}", n % 2) for n in range(20)])
    with pytest.raises(DataError, match=r"data\.limit: 1 leaves rows of one class only"):
        _load(tmp_path, train=path, limit=1)
    assert _load(tmp_path, train=path, limit=1000).facts["train"]["dropped"] == {}


def test_a_train_that_is_all_in_test_is_refused(tmp_path):
    path = _write(tmp_path / "a.tsv", [(f"{n}", n % 2) for n in range(20)])
    with pytest.raises(DataError, match=r"no row is left for train \(20 rows also in test\)"):
        _load(tmp_path, train=path, test=path)


def test_class_ids_follow_the_names_in_every_split_and_a_trained_head(tmp_path):
    train = _write(tmp_path / "a.tsv", [(f"t {n}", ["pos", "neg"][n % 2]) for n in range(8)])
    test = _write(tmp_path / "b.tsv", [("only good", "pos"), ("then bad", "neg")])
    splits = _load(tmp_path, train=train, test=test)
    assert (splits.labels, splits.test["label"][:]) == (("neg", "pos"), [1, 0])
    trained = _load(tmp_path, train=train, test=test, known_labels=["pos", "neg"])
    assert (trained.labels, trained.test["label"][:]) == (("pos", "neg"), [0, 1])
    assert trained.digest != splits.digest


def test_a_class_that_loses_every_row_is_told(tmp_path):
    train = _write(tmp_path / "a.tsv", [("x", 2), *((f"t {n}", n % 2) for n in range(8))])
    test = _write(tmp_path / "b.tsv", [("x", 2)])
    check = check_data(DataSpec(train=train, test=test), COLUMNS, seed=0, progress=QUIET)
    assert check.notes[-1] == "train: no row of the class '2' is left."


def test_a_failed_reading_leaves_nothing_in_the_cache(tmp_path):
    path = _write(tmp_path / "a.tsv", [*((f"{n}", n % 2) for n in range(5000)), ("", 1)])
    with pytest.raises(DataError, match="line 5002: the column 'text' is empty"):
        _load(tmp_path, train=path)
    assert list((tmp_path / "cache").iterdir()) == []
