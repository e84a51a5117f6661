"""Users' data as it is: leaks, copies, missing headers, odd line ends, codes that differ between splits."""

from pathlib import Path

import pytest

from moss_rlhf.data import Column, check_data, load_splits, sniff
from moss_rlhf.errors import DataError
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import DataSpec

DATA = Path(__file__).parents[3] / "shared" / "data"
COLUMNS = (Column("text", "text"), Column("label", "label"))
QUIET = Progress(quiet=True)
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not DATA.is_dir(), reason="the data folder beside the checkout is missing"),
]


def _spec(**fields):
    paths = {split: str(DATA / value) for split, value in fields.items() if split in ("train", "validation", "test")}
    return DataSpec(**{**fields, **paths})


def _check(**fields):
    return check_data(_spec(**fields), COLUMNS, seed=0, progress=QUIET)


def test_sst2_without_header():
    """Two texts of train stand in test, one of them twice in train; of train's nine copies that leaves eight."""
    facts = _check(train="sst2/train.tsv", validation="sst2/dev.tsv", test="sst2/test.tsv").facts
    assert [facts[split]["rows"] for split in facts] == [6917, 872, 1821]
    assert facts["train"]["dropped"] == {"also in test": 3}
    assert facts["train"]["duplicates"] == 8
    assert _check(train="sst2/train.tsv", validation="sst2/dev.tsv").facts["train"]["duplicates"] == 9
    assert facts["train"]["layout"] == "tsv, no header; text = column 0, label = column 1"


def test_sst2_of_glue_says_which_columns_to_name():
    files = {"train": "sst2_glue/train.tsv.gz", "validation": "sst2_glue/dev.tsv"}
    with pytest.raises(DataError, match=r"data\.columns: \{text: sentence, label: label\}"):
        _check(**files)
    facts = _check(**files, columns={"text": "sentence", "label": "label"}).facts
    assert [facts[split]["rows"] for split in facts] == [67349, 872]


def test_ag_news_as_one_recipe(tmp_path):
    test = {"file": str(DATA / "ag_news/test.csv.gz"), "header": False, "columns": {"label": 0, "text": [1, 2]}}
    train = str(DATA / "ag_news/train.csv.gz")
    with pytest.raises(DataError, match=r"data\.test\.labels: \{1: 0, 2: 1, 3: 2, 4: 3\}"):
        check_data(DataSpec(train=train, test=test), COLUMNS, seed=0, progress=QUIET)
    spec = DataSpec(train=train, test={**test, "labels": {1: 0, 2: 1, 3: 2, 4: 3}})
    splits = load_splits(spec, COLUMNS, seed=0, cache=tmp_path, progress=QUIET)
    assert len(splits.train) + len(splits.validation) == 18055
    assert splits.facts["test"]["classes"] == {"0": 1900, "1": 1900, "2": 1900, "3": 1900}
    assert splits.test[0]["text"].startswith("Fears for T N pension after talks Unions representing")


def test_chnsenticorp_has_leaks_between_all_splits():
    files = {
        split: f"chnsenticorp/{name}.tsv.gz"
        for split, name in [("train", "train"), ("validation", "dev"), ("test", "test")]
    }
    facts = _check(**files, columns={"text": "text_a", "label": "label"}).facts
    assert facts["train"]["dropped"] == {"also in test": 345, "also in validation": 342}
    assert facts["validation"]["dropped"] == {"also in test": 39}
    assert [facts[split]["rows"] for split in facts] == [8913, 1161, 1200]


def test_imdb_is_sorted_by_label_and_leaks():
    check = _check(train="imdb/train.tsv.gz", test="imdb/test.tsv.gz", limit=500)
    assert check.facts["train"]["dropped"]["also in test"] == 123
    assert all(min(facts["classes"].values()) > 150 for facts in check.facts.values())
    assert check.facts["test"] | {"classes": 0} == {
        "rows": 500,
        "dropped": {"limit": 24500},
        "layout": "tsv, header; text = 'text', label = 'label'",
        "classes": 0,
        "duplicates": 0,
    }


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("sst2/train.tsv", {"text": 0, "label": 1}),
        ("sst2_glue/dev.tsv", {"text": "sentence", "label": "label"}),
        ("chnsenticorp/dev.tsv.gz", {"text": "text_a", "label": "label"}),
        ("ag_news/train.csv.gz", {"text": "text", "label": "label"}),
    ],
)
def test_sniffing(file, columns):
    assert sniff(DATA / file).data_section()["columns"] == columns
