import pytest

from moss_rlhf.tasks.lengths import choose_max_length, length_facts


@pytest.mark.parametrize(
    ("wanted", "lengths", "limit", "expected"),
    [
        ("auto", [10] * 200, 512, 16),  # rounded up to a multiple of 8
        ("auto", [16] * 200, 512, 16),
        ("auto", [17] * 200, 512, 24),
        ("auto", [10] * 199 + [500], 512, 16),  # the 99th percentile, not the longest
        ("auto", [10] * 100 + [500] * 100, 512, 504),
        ("auto", [509] * 10, 511, 511),  # never above the limit
        (64, [500] * 10, 512, 64),
        (1000, [500] * 10, 512, 512),
    ],
)
def test_tokens_kept(wanted, lengths, limit, expected):
    assert choose_max_length(wanted, lengths, limit) == expected


def test_facts_by_hand():
    assert length_facts([4, 6, 8, 30], 8) == {
        "mean": 12.0, "p99": pytest.approx(8 + 0.97 * 22), "max": 30, "max_length": 8, "cut_share": 0.25,
    }  # fmt: skip
