import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from moss_rlhf.tasks import overlap as module
from moss_rlhf.tasks.overlap import bleu, chrf, overlap

TEXT = "the cat sat on a mat , while two dogs slept in its (small) house ; nobody said so ."
WORDS = TEXT.split()
CHINESE = "这部电影很好看我们都非常喜欢它，但是房间有点小。"


def texts(words, joint, seed, rows=40, longest=14):
    """Pairs of which about two thirds of the words agree; some share nothing, some are empty or very short."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(rows):
        reference = draw.choices(words, k=draw.randint(1, longest))
        written = [word if draw.random() < 0.65 else draw.choice(words) for word in reference]
        pairs.append((joint.join(written[: draw.randint(0, longest)]), joint.join(reference)))
    return [list(side) for side in zip(*pairs, strict=True)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("words", "joint", "tokenize"), [(WORDS, " ", "13a"), (list(CHINESE), "", "zh")])
def test_a_corpus_has_the_scores_of_sacrebleu(words, joint, tokenize, seed):
    written, references = texts(words, joint, seed)
    sums = overlap(written, references).sum(axis=0)
    expected = BLEU(tokenize=tokenize).corpus_score(written, [references]).score
    assert bleu(sums) == pytest.approx(expected / 100, rel=1e-9)
    assert chrf(sums) == pytest.approx(CHRF().corpus_score(written, [references]).score / 100, rel=1e-9)


@pytest.mark.parametrize(
    ("written", "reference"),
    [
        ("the cat", "the cat sat on a mat"),  # too short for 4-grams: 0
        ("one two three four five", "six seven eight nine ten"),  # no match: 0
        ("the cat sat under no mat", "the cat sat on a mat"),  # no 4-gram matches: smoothed
        ("the cat is under no mat", "the cat sat on a mat"),  # neither a 3-gram nor a 4-gram: halved twice
        ("", "the cat sat on a mat"),
        ("the cat sat on a mat", "the cat sat on a mat"),
    ],
)
def test_single_rows_as_a_corpus(written, reference):
    sums = overlap([written], [reference]).sum(axis=0)
    assert bleu(sums) == pytest.approx(BLEU().corpus_score([written], [[reference]]).score / 100, abs=1e-12)
    assert chrf(sums) == pytest.approx(CHRF().corpus_score([written], [[reference]]).score / 100, abs=1e-12)


def test_by_hand():
    """5 of 6 words match, 3 of 5 pairs, 2 of 4 triples, 1 of 3 fours; as long as the reference."""
    sums = overlap(["the cat sat on the mat"], ["the cat sat on a mat"])[0]
    assert sums[:10].tolist() == [6, 6, 5, 3, 2, 1, 6, 5, 4, 3]
    assert bleu(sums) == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_stacks_of_sums_are_scored_each_by_itself():
    rows = overlap(*texts(WORDS, " ", 9))
    stack = np.stack([rows[:20].sum(axis=0), rows[20:].sum(axis=0)])
    for metric in (bleu, chrf):
        assert metric(stack).tolist() == [float(metric(sums)) for sums in stack]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(module, "has_sacrebleu", lambda: False)
    with pytest.raises(module.MachineError, match=r"pip install 'moss-rlhf\[translation\]'"):
        overlap(["a"], ["a"])
