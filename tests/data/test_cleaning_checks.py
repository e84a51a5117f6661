"""Each check on rows made by hand: what is planted is found, what only looks like it is not."""

import numpy as np
import pytest

from moss_rlhf.data.balance import balanced_rows
from moss_rlhf.data.cleaning.duplicates import conflicting_rows, duplicate_rows
from moss_rlhf.data.cleaning.markup import find_markup, mend_markup
from moss_rlhf.data.cleaning.minhash import (
    MinHash,
    band_rows,
    even_out,
    jaccard,
    leaking_rows,
    near_duplicates,
    shingles,
)
from moss_rlhf.data.cleaning.texts import boilerplate_texts, empty_texts, foreign_texts, length_outliers, usual_language

LONG = "The hotel stands by the harbour and its rooms look out over the boats, which leave every morning before six."
OTHER = "A dry report on the price of copper in the second quarter, with four tables and no conclusion at the end."


def _rows(hits):
    return [hit.row for hit in hits]


# --- markup ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("good<br /><br />film", "good film"),
        ("Smith &amp; Co, &quot;fine&quot;", 'Smith & Co, "fine"'),
        ("the company #39;s lawyer", "the company's lawyer"),
        ("he said  quot;no quot; twice", 'he said "no " twice'),
        ("&lt;b&gt;bold&lt;/b&gt; words", "bold words"),
        ("&amp;lt;i&amp;gt;twice", "twice"),
        ('see <A HREF="http://x.org">here</A>', "see here"),
        ("one <!-- note\n --> two", "one two"),
        ("  #36;10 million", "$10 million"),
        ("line one\nline two<br>end", "line one\nline two end"),
        ("<br />", ""),
    ],
)
def test_markup_is_found_and_mended(text, mended):
    assert find_markup(text)
    assert mend_markup(text) == mended
    assert not find_markup(mended)


@pytest.mark.parametrize(
    "text", ["I <3 it", "a < b and c > d", "AT&T; fine", "C#39 is a note", "x &notathing; y", "R&D", "  two  spaces "]
)
def test_what_only_looks_like_markup_stays(text):
    assert find_markup(text) == ""
    assert mend_markup(text) == text


# --- single texts ----------------------------------------------------------------------------------------------------


def test_texts_without_letters_are_empty_and_one_ideograph_is_enough():
    assert _rows(empty_texts(["?!", "好", "a", "...", "7"], min_letters=1)) == [0, 3]
    assert _rows(empty_texts(["好", "ab", "abc"], min_letters=3)) == [0, 1]


def test_length_outliers_by_hand():
    # logs of 1 + n: 9 texts of 7 characters (log 8), one of 3 (log 4): MAD 0, mean deviation log 2 / 10
    # spread = 0.0693 / 0.7979 = 0.0869, so z of the short one is −0.6931 / 0.0869 = −7.98
    texts = ["abcdefg"] * 9 + ["abc"]
    (hit,) = length_outliers(texts, texts)
    assert hit.row == 9
    assert "z = -8.0" in hit.reason
    assert length_outliers(["abc"] * 5, ["abc"] * 5) == []


def test_lengths_are_judged_by_the_reference_alone():
    usual = ["x" * length for length in range(20, 40)]
    assert _rows(length_outliers(["x" * 30, "x" * 3000], usual)) == [1]


def test_boilerplate_is_what_many_different_texts_hold_and_certain_where_it_is_half_the_text():
    banner = "Visit our site for more offers today."
    long_own = "A view of the sea that nobody who was there for the summer is going to forget soon"
    texts = [
        *(f"Text number {number}. {banner}" for number in range(5)),
        f"{long_own}. {banner}",
        "no banner here at all.",
    ]
    hits = boilerplate_texts(texts, 6, texts)
    assert _rows(hits) == [0, 1, 2, 3, 4, 5]
    assert [hit.certain for hit in hits] == [True] * 5 + [False]
    assert boilerplate_texts(texts, 7, texts) == []
    assert (
        boilerplate_texts([banner] * 20, 2, [banner] * 20) == []
    )  # one text, twenty times: duplicates, not boilerplate


def test_foreign_texts_with_a_given_identifier():
    def identify(text):
        return ("de", 0.95) if "der" in text else ("de", 0.6) if "das" in text else ("en", 0.99)

    texts = [LONG, OTHER, LONG + OTHER, "der " * 15, "das " * 15, "der"]
    assert usual_language(texts, identify) == "en"
    assert _rows(foreign_texts(texts, texts, identify)) == [3]  # the others: unsure, too short to tell


def test_foreign_texts_with_the_real_one():
    pytest.importorskip("py3langid")
    from moss_rlhf.data.cleaning.texts import language_identifier

    german = "Das Hotel liegt direkt am Hafen, und die Zimmer sind so ruhig, dass man sehr gut schlafen kann."
    chinese = "这家酒店的位置非常好，房间干净整洁，服务员的态度也很热情，下次还会再来。"
    texts = [LONG, OTHER, german, chinese, "Ja, gut."]
    assert _rows(foreign_texts(texts, texts, language_identifier())) == [2, 3]


# --- equal texts -----------------------------------------------------------------------------------------------------


def test_duplicates_are_of_the_same_label_and_name_the_first():
    texts, labels = ["a b", " a b ", "a b", "c"], ["x", "x", "y", "x"]
    (hit,) = duplicate_rows("train", texts, labels)
    assert (hit.row, hit.partner) == (1, ("train", 0))
    assert _rows(duplicate_rows("train", texts, None)) == [1, 2]


def test_conflicts_leave_the_majority_and_in_a_tie_nobody():
    texts = ["a", "a", "a", "b", "b", "c"]
    labels = ["x", "x", "y", "x", "y", "x"]
    hits = conflicting_rows("train", texts, labels)
    assert [(hit.row, hit.certain) for hit in hits] == [(0, False), (1, False), (2, True), (3, True), (4, True)]
    assert hits[2].partner == ("train", 0)
    assert "2 × x, 1 × y" in hits[2].reason


# --- near duplicates -------------------------------------------------------------------------------------------------


def test_shingles_and_their_similarity_by_hand():
    # abcdef: abcde bcdef;  abcdefg: abcde bcdef cdefg
    assert len(shingles("abcdef")) == 2
    assert jaccard(shingles("abcdef"), shingles("abcdefg")) == pytest.approx(2 / 3)
    assert jaccard(shingles("ABC  def"), shingles("abc def")) == 1  # case and white space do not count
    assert len(shingles("很好吃")) == 2  # 很好 好吃
    assert len(shingles("ab")) == len(shingles("")) == 1
    assert even_out("Ａ\tb") == "a b"


def test_signatures_agree_as_often_as_the_sets_are_alike():
    """The share of 128 equal places estimates Jaccard: within four standard deviations over many pairs."""
    generator, minhash = np.random.default_rng(0), MinHash()
    for common in (20, 100, 180):
        values = generator.integers(2**63, size=400, dtype=np.uint64)
        one, other = np.unique(values[:200]), np.unique(values[200 - common : 400 - common])
        truth = jaccard(one, other)
        estimate = (minhash.signature(one) == minhash.signature(other)).mean()
        assert abs(estimate - truth) < 4 * (truth * (1 - truth) / 128) ** 0.5


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_find_a_pair_at_the_threshold(threshold):
    rows = band_rows(threshold)
    found = 1 - (1 - threshold**rows) ** (128 // rows)
    assert found >= 0.995
    assert rows == 32 or 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.995


def test_near_duplicates_with_one_word_changed():
    changed = LONG.replace("morning", "evening")
    texts = [LONG, OTHER, changed, LONG.upper(), OTHER + "!"]
    hits = near_duplicates("train", texts, ["a"] * 5, 0.8)
    assert [(hit.row, hit.partner) for hit in hits] == [(2, ("train", 0)), (3, ("train", 0)), (4, ("train", 1))]
    assert all(hit.certain for hit in hits)
    assert _rows(near_duplicates("train", texts, ["a"] * 5, 1.0)) == [3]


def test_a_near_duplicate_of_another_label_is_listed_and_not_certain():
    texts = [LONG, LONG.replace("morning", "evening"), LONG.replace("morning", "evening") + "!"]
    hits = near_duplicates("train", texts, ["a", "b", "b"], 0.8)
    assert [(hit.row, hit.certain) for hit in hits] == [(1, False), (2, True)]
    assert "another label" in hits[0].reason


def test_every_pair_that_reaches_the_threshold_is_found_as_by_comparing_all():
    """Against the quadratic way, on texts of words drawn by chance with words exchanged."""
    generator = np.random.default_rng(3)
    words = ["".join(generator.choice(list("abcdefghij"), size=6)) for _ in range(80)]
    texts = []
    for _ in range(40):
        text = generator.choice(words, size=15)
        texts.append(" ".join(text))
        for count in (1, 2, 4):
            other = text.copy()
            other[generator.choice(15, size=count, replace=False)] = generator.choice(words, size=count)
            texts.append(" ".join(other))
    sets = [shingles(text) for text in texts]
    kept, expected = [], []
    for row, hashes in enumerate(sets):
        if any(jaccard(hashes, sets[other]) >= 0.8 for other in kept):
            expected.append(row)
        else:
            kept.append(row)
    assert len(expected) > 10
    assert _rows(near_duplicates("train", texts, None, 0.8)) == expected


def test_leaks_name_the_row_of_the_other_split():
    hits = leaking_rows([OTHER, LONG + " Yes."], {"test": ["nothing", LONG], "validation": [LONG]}, 0.8)
    assert [(hit.row, hit.partner) for hit in hits] == [(1, ("test", 1))]


# --- balance ---------------------------------------------------------------------------------------------------------


def test_oversampling_repeats_every_row_as_often_as_any_other():
    classes = np.array([0, 1, 0, 0, 1, 0, 0, 0])  # 6 and 2
    rows = balanced_rows(classes, "oversample", seed=0)
    assert np.bincount(classes[rows]).tolist() == [6, 6]
    assert np.bincount(rows).tolist() == [1, 3, 1, 1, 3, 1, 1, 1]
    uneven = balanced_rows(np.array([0] * 7 + [1] * 3), "oversample", seed=0)
    assert sorted(np.bincount(uneven)[7:].tolist()) == [2, 2, 3]


def test_undersampling_is_seeded_and_leaves_the_rarest_class_whole():
    classes = np.array([0] * 50 + [2] * 5)
    rows = balanced_rows(classes, "undersample", seed=0)
    assert len(rows) == len(set(rows.tolist())) == 10
    assert set(range(50, 55)) <= set(rows.tolist())
    assert rows.tolist() == balanced_rows(classes, "undersample", seed=0).tolist()
    assert rows.tolist() != balanced_rows(classes, "undersample", seed=1).tolist()
