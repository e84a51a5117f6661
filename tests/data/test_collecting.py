"""Which texts are taken, against choices worked by hand."""

import gzip
import json

import numpy as np
import pytest

from moss_rlhf.data.collecting import Candidate, Keywords, Pool, choose_diverse, read_corpus
from moss_rlhf.errors import DataError


def _candidate(line, score, text=None):
    return Candidate(line, text or f"text {line}", score, "")


def test_the_pool_keeps_the_best_and_no_text_twice():
    pool = Pool(3, seed=0)
    for line, score in enumerate([0.1, 0.9, 0.5, 0.7, 0.2]):
        pool.offer(_candidate(line, score))
    pool.offer(_candidate(9, 0.9, "text 1"))
    assert [candidate.line for candidate in pool.best()] == [1, 3, 2]


def test_of_equal_scores_a_seeded_draw_decides():
    def kept(seed):
        pool = Pool(5, seed)
        for line in range(100):
            pool.offer(_candidate(line, 1.0))
        return [candidate.line for candidate in pool.best()]

    assert kept(0) == kept(0)
    assert kept(0) != kept(1)
    assert max(kept(0)) > 10  # not simply the first


def test_maximal_marginal_relevance_by_hand():
    # two texts alike and one across: by relevance alone 0, 1, 2
    vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    scores = np.array([1.0, 0.75, 0.5])  # scaled: 1, 0.5, 0
    assert choose_diverse(scores, vectors, 3, 0.0) == [0, 1, 2]
    # d = 0.5 after the first: 0.25 − 0.4 = −0.15 for the second, 0 − 0 = 0 for the third
    assert choose_diverse(scores, vectors, 2, 0.5) == [0, 2]
    # d = 0.2: 0.4 − 0.16 = 0.24 against 0
    assert choose_diverse(scores, vectors, 2, 0.2) == [0, 1]
    assert choose_diverse(np.ones(3), vectors, 9, 0.5) == [0, 2, 1]  # more than there are


def test_keywords_are_whole_words_and_parts_of_chinese():
    words = Keywords(["cat", "C++", "电影"])
    assert words.found("The CAT, and concatenate") == ["cat"]
    assert words.found("concatenate c+") == []
    assert words.found("in c++.") == ["C++"]
    assert words.found("这部电影很好") == ["电影"]


def test_a_corpus_is_read_row_by_row(tmp_path):
    rows = [{"text": "one", "id": 1}, {"text": "  ", "id": 2}, {"text": None, "id": 3}, {"text": "four", "id": 4}]
    jsonl = tmp_path / "corpus.jsonl.gz"
    with gzip.open(jsonl, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
    assert list(read_corpus(jsonl, "text")) == [(1, "one", {"id": 1}), (4, "four", {"id": 4})]
    csv = tmp_path / "corpus.csv"
    csv.write_text('id,body\n7,"two\nlines"\n8,three\n', "utf-8")
    assert [(text, fields) for _, text, fields in read_corpus(csv, "body")] == [
        ("two\nlines", {"id": "7"}),
        ("three", {"id": "8"}),
    ]
    txt = tmp_path / "corpus.txt"
    txt.write_text("a line\tof two\nanother\n", "utf-8")
    assert [text for _, text, _ in read_corpus(txt, "text")] == ["a line\tof two", "another"]


@pytest.mark.parametrize(("name", "content"), [("c.csv", "id,body\n1,x\n"), ("c.jsonl", '{"body": "x"}\n')])
def test_a_missing_column_is_named(name, content, tmp_path):
    path = tmp_path / name
    path.write_text(content, "utf-8")
    with pytest.raises(DataError, match=r"there is no column 'text'.*body"):
        list(read_corpus(path, "text"))
