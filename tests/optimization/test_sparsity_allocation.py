import pytest
import torch

from moss_rlhf.optimization.allocation import outlier_ratio, sparsities_by_outliers


def test_the_outlier_ratio_by_hand():
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -1.0, 1.0]])
    norm = torch.tensor([1.0, 1.0, 1.0, 9.0])  # mean score 3: two of eight are 3 times the mean, none more
    assert outlier_ratio(weight, norm, threshold=2.5) == 0.25
    assert outlier_ratio(weight, norm, threshold=3.0) == 0
    assert outlier_ratio(weight, norm) == 0


def test_the_outlier_ratio_has_no_scale():
    generator = torch.Generator().manual_seed(0)
    weight, norm = torch.randn(17, 31, generator=generator).exp(), torch.rand(31, generator=generator)
    ratio = outlier_ratio(weight, norm, threshold=3.0)
    assert 0 < ratio < 1
    assert outlier_ratio(8 * weight, norm / 4, threshold=3.0) == ratio


def test_sparsities_by_hand():
    # mean ratio 0.02; the farthest is 0.02 away
    assert sparsities_by_outliers([0.01, 0.01, 0.04], 0.5, weights=[1, 1, 1], spread=0.1) == pytest.approx(
        [0.55, 0.55, 0.4]
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_mean_is_kept_and_so_is_the_spread(seed):
    generator = torch.Generator().manual_seed(seed)
    ratios = (torch.rand(7, generator=generator) ** 8 * 0.1).tolist()
    weights = torch.randint(1, 10**6, (7,), generator=generator).tolist()
    found = sparsities_by_outliers(ratios, 0.7, weights=weights, spread=0.08)
    mean = sum(one * size for one, size in zip(found, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(0.7, abs=1e-12)
    assert max(abs(one - 0.7) for one in found) == pytest.approx(0.08)
    assert sorted(range(7), key=found.__getitem__) == sorted(range(7), key=lambda block: -ratios[block])


def test_equal_ratios_or_no_spread_are_uniform():
    assert sparsities_by_outliers([0.1, 0.1, 0.1], 0.6, weights=[3, 1, 2]) == [0.6, 0.6, 0.6]
    assert sparsities_by_outliers([0.0, 0.1], 0.6, weights=[3, 1], spread=0.0) == [0.6, 0.6]


@pytest.mark.parametrize(
    ("ratios", "sparsity", "weights", "spread", "message"),
    [
        ([0.1, 0.2], 1.0, [1, 1], 0.1, r"sparsity must be in \[0, 1\)"),
        ([0.1, 0.2], 0.05, [1, 1], 0.08, "spread 0.08 around sparsity 0.05 leaves"),
        ([0.1, 0.2], 0.95, [1, 1], 0.08, "give a smaller spread"),
        ([0.1, 0.2], 0.5, [1, 1], -0.1, "0 or above"),
        ([0.1, 0.2], 0.5, [1], 0.1, "one outlier ratio and one number of weights a block, got 2 and 1"),
        ([], 0.5, [], 0.1, "got 0 and 0"),
    ],
)
def test_what_sparsities_refuse(ratios, sparsity, weights, spread, message):
    with pytest.raises(ValueError, match=message):
        sparsities_by_outliers(ratios, sparsity, weights=weights, spread=spread)


def test_what_the_ratio_refuses():
    with pytest.raises(ValueError, match="threshold must be above 0"):
        outlier_ratio(torch.ones(2, 3), torch.ones(3), threshold=0)
    with pytest.raises(ValueError, match="input_norm is not finite"):
        outlier_ratio(torch.ones(2, 3), torch.full((3,), torch.nan))
