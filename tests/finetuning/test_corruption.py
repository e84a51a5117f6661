"""Masks and spans: shares, whole words, the paper's own example, and what is drawn for whom."""

import numpy as np
import pytest

from moss_rlhf.finetuning.corruption import (
    chosen_spans,
    chosen_tokens,
    infilled,
    masked,
    spans_replaced,
)

RANDOM = np.random.default_rng


def test_the_share_of_tokens_is_exact():
    for count in (3, 20, 100, 101):
        chosen = chosen_tokens(np.ones(count, bool), 0.15, False, RANDOM(count))
        assert chosen.sum() == max(1, round(0.15 * count))


def test_every_token_is_as_likely_as_the_others():
    starts = np.ones(10, bool)
    counts = sum(chosen_tokens(starts, 0.2, False, RANDOM(seed)).astype(int) for seed in range(4000))
    assert np.abs(counts / 4000 - 0.2).max() < 0.03  # 4.7 standard deviations


def test_whole_words_go_together_and_never_beyond_the_share():
    starts = np.array([1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0], bool)
    words = np.cumsum(starts) - 1
    for seed in range(200):
        chosen = chosen_tokens(starts, 0.3, True, RANDOM(seed))
        assert 1 <= chosen.sum() <= 6
        for word in range(words[-1] + 1):
            assert len(set(chosen[words == word])) == 1


def test_a_single_long_word_is_taken_whole():
    assert chosen_tokens(np.array([1, 0, 0, 0], bool), 0.15, True, RANDOM(0)).all()


def test_eighty_ten_ten():
    """100,000 chosen tokens: shares within five standard deviations; of the random ones one in 50 is the same again."""
    count, mask, words = 100_000, 7, np.arange(10, 60)
    ids = np.full(count, 20)
    shown = masked(ids, np.ones(count, bool), mask, words, RANDOM(3))
    assert np.mean(shown == mask) == pytest.approx(0.8, abs=0.0064)
    assert np.mean(shown == 20) == pytest.approx(0.1 + 0.1 / 50, abs=0.005)
    others = shown[(shown != mask) & (shown != 20)]
    assert set(others) <= set(words)
    assert len(set(others)) == 49


def test_what_is_not_chosen_stays():
    ids = np.arange(100)
    chosen = np.arange(100) % 3 == 0
    shown = masked(ids, chosen, 999, np.arange(200, 300), RANDOM(1))
    assert (shown[~chosen] == ids[~chosen]).all()


def test_the_papers_example():
    """Thank you for inviting me to your party last week: `for inviting` and `last` go (T5, figure 2)."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "<X>", "<Y>", "<Z>"]
    ids, sentinels = np.arange(10), (10, 11, 12)
    chosen = np.isin(ids, [2, 3, 8])
    shown, target = spans_replaced(ids, chosen, sentinels)
    assert " ".join(words[index] for index in shown) == "Thank you <X> me to your party <Y> week"
    assert " ".join(words[index] for index in target) == "<X> for inviting <Y> last <Z>"


def test_a_span_at_the_end_is_closed_too():
    shown, target = spans_replaced(np.arange(4), np.array([0, 1, 0, 1], bool), (10, 11, 12))
    assert shown.tolist() == [0, 10, 2, 11]
    assert target.tolist() == [10, 1, 11, 3, 12]


def test_infilling_leaves_one_mask_a_span():
    chosen = np.array([0, 1, 1, 0, 1], bool)
    assert infilled(np.arange(5), chosen, 9).tolist() == [0, 9, 3, 9]


@pytest.mark.parametrize("length", [2, 3, 7, 50, 512])
def test_spans_hold_the_share_and_three_tokens_on_average(length):
    for seed in range(50):
        chosen = chosen_spans(length, 0.15, 3.0, RANDOM(seed))
        assert len(chosen) == length
        noise = min(max(1, round(0.15 * length)), length - 1)
        assert chosen.sum() == noise
        begins = int((np.diff(np.concatenate([[False], chosen]).astype(int)) == 1).sum())
        assert begins == min(max(1, round(noise / 3)), noise, length - noise)
        assert not chosen[0]


def test_nothing_is_lost_between_input_and_target():
    """Put back at its sentinel, the target gives the text again."""
    ids, sentinels = np.arange(100), tuple(range(200, 220))
    for seed in range(20):
        shown, target = spans_replaced(ids, chosen_spans(100, 0.3, 3.0, RANDOM(seed)), sentinels)
        parts, last = {}, 0
        for token in target:
            last = token if token >= 200 else last
            parts.setdefault(int(last), []).extend([] if token >= 200 else [int(token)])
        again = [piece for token in shown for piece in (parts[int(token)] if token >= 200 else [int(token)])]
        assert again == ids.tolist()


def test_spans_need_two_tokens():
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        chosen_spans(1, 0.15, 3.0, RANDOM(0))
