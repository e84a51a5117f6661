import pytest
import torch

from moss_rlhf.optimization.wanda import wanda_mask, wanda_mask_n_of_m, wanda_score


def layer(out_features, width, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, width, generator=generator)
    norm = torch.rand(width, generator=generator).exp() * 10
    return weight.to(dtype), norm


def one_row_after_the_other(weight, norm, sparsity):
    """Eq. 1 in plain Python floats, which are float64."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for row, values in enumerate(weight.tolist()):
        score = [abs(value) * scale for value, scale in zip(values, norm.tolist(), strict=True)]
        for column in sorted(range(len(score)), key=score.__getitem__)[: int(len(score) * sparsity)]:
            mask[row, column] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77])
@pytest.mark.parametrize(("out_features", "width", "seed"), [(7, 131, 0), (31, 64, 1), (1, 1, 2), (53, 257, 3)])
def test_the_mask_is_the_plain_one_bit_for_bit(out_features, width, seed, sparsity, dtype):
    weight, norm = layer(out_features, width, seed, dtype)
    before = weight.clone()
    mask = wanda_mask(weight, norm, sparsity)
    assert torch.equal(mask, one_row_after_the_other(weight, norm, sparsity))
    assert mask.sum(dim=1).tolist() == [int(width * sparsity)] * out_features
    assert torch.equal(weight, before)


def test_by_hand():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, -2.0, 1.0]])
    norm = torch.tensor([8.0, 1.0, 1.0, 0.5])  # scores 8 2 3 2, and 32 3 2 0.5
    assert wanda_score(weight, norm).tolist() == [[8, 2, 3, 2], [32, 3, 2, 0.5]]
    assert wanda_mask(weight, norm, 0.5).int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]
    assert wanda_mask(weight, norm, 0.25).int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]  # the tie goes by position
    assert wanda_mask_n_of_m(weight, norm, 1, 2).int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]


def test_inputs_that_never_spoke_go_first():
    weight, norm = layer(11, 40, 4)
    norm[::2] = 0
    assert bool(wanda_mask(weight, norm, 0.5)[:, ::2].all())
    half = wanda_mask(weight, norm, 0.25)
    assert bool(half[:, :20:2].all())  # ties at 0, by position
    assert not bool(half[:, 20:].any())


def test_a_common_scale_of_the_norms_changes_nothing():
    weight, norm = layer(13, 96, 5)
    mask = wanda_mask(weight, norm, 0.5)
    for scale in (2.0**-30, 2.0**20):
        assert torch.equal(wanda_mask(weight, scale * norm, 0.5), mask)


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8)])
def test_n_of_m_keeps_the_highest_of_every_group(kept, of):
    weight, norm = layer(17, 5 * of, 6)
    mask = wanda_mask_n_of_m(weight, norm, kept, of).reshape(17, -1, of)
    assert bool((mask.sum(dim=2) == of - kept).all())
    score = wanda_score(weight, norm).reshape(mask.shape)
    assert bool((score.masked_fill(~mask, 0).amax(dim=2) <= score.masked_fill(mask, torch.inf).amin(dim=2)).all())


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(broken):
    weight, norm = layer(3, 8, 7)
    for change, message in ((weight, "weight is not finite"), (norm, "input_norm is not finite")):
        kept = change.flatten()[5].item()
        change.view(-1)[5] = broken
        with pytest.raises(ValueError, match=message):
            wanda_mask(weight, norm, 0.5)
        change.view(-1)[5] = kept


def test_a_broken_weight_of_an_input_that_never_spoke_is_found():
    weight, norm = layer(3, 8, 7)
    weight[1, 5], norm[5] = float("inf"), 0
    with pytest.raises(ValueError, match="weight is not finite"):
        wanda_mask(weight, norm, 0.5)


@pytest.mark.parametrize(
    ("weight", "norm", "sparsity", "message"),
    [
        (torch.ones(2, 4), torch.ones(3), 0.5, r"input_norm must be \(4,\), got \(3,\)"),
        (torch.ones(2, 4), torch.ones(4, 4), 0.5, r"input_norm must be \(4,\), got \(4, 4\)"),
        (torch.ones(4), torch.ones(()), 0.5, r"weight must be \(out, in\), got \(4,\)"),
        (torch.ones(2, 0), torch.ones(0), 0.5, r"weight must be \(out, in\), got \(2, 0\)"),
        (torch.ones(2, 4), -torch.ones(4), 0.5, "input_norm holds numbers below 0"),
        (torch.ones(2, 4), torch.ones(4), 1.0, r"sparsity must be in \[0, 1\), got 1\.0"),
        (torch.ones(2, 4), torch.ones(4), -0.5, r"sparsity must be in \[0, 1\), got -0\.5"),
    ],
)
def test_what_is_refused(weight, norm, sparsity, message):
    with pytest.raises(ValueError, match=message):
        wanda_mask(weight, norm, sparsity)
