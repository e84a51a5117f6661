import pytest
import torch

from moss_rlhf.optimization.magnitude import global_magnitude_masks, magnitude_mask


def matrices(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(13, 17, 1.0), (5, 31, 0.3), (7, 3, 2.0)]
    return [(torch.randn(rows, width, generator=generator) * scale).to(dtype) for rows, width, scale in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.0, 0.003, 0.5, 0.9])
def test_one_threshold_for_all(sparsity, dtype):
    weights = matrices(dtype)
    masks = global_magnitude_masks(weights, sparsity)
    total = sum(weight.numel() for weight in weights)
    assert sum(int(mask.sum()) for mask in masks) == int(total * sparsity)
    pairs = list(zip(weights, masks, strict=True))
    gone = torch.cat([weight[mask].abs() for weight, mask in pairs])
    kept = torch.cat([weight[~mask].abs() for weight, mask in pairs])
    assert len(gone) == 0 or gone.max() <= kept.min()


def test_of_one_matrix_it_is_the_mask_of_that_matrix():
    for weight in matrices():
        assert torch.equal(global_magnitude_masks([weight], 0.4)[0], magnitude_mask(weight, 0.4))


def test_ties_go_by_matrix_and_position():
    weights = [torch.tensor([[1.0, -2.0], [2.0, 3.0]]), torch.tensor([[-1.0, 2.0, -2.0]])]
    found = [mask.int().tolist() for mask in global_magnitude_masks(weights, 4 / 7)]
    assert found == [[[1, 1], [1, 0]], [[1, 0, 0]]]


def test_small_matrices_may_go_whole_and_the_caller_can_see_it():
    masks = global_magnitude_masks([torch.full((2, 3), 0.1), torch.ones(3, 4)], 0.4)
    assert [bool(mask.all()) for mask in masks] == [True, False]
    assert int(masks[1].sum()) == 1


def test_a_float64_matrix_among_others_is_compared_in_float64():
    weights = [torch.ones(1, 2), torch.tensor([[1 + 1e-12, 1 - 1e-12]], dtype=torch.float64)]
    assert [mask.int().tolist() for mask in global_magnitude_masks(weights, 0.25)] == [[[0, 0]], [[0, 1]]]


def test_the_sign_of_zero_and_the_layout_do_not_matter():
    weight = torch.tensor([[0.0, -0.0, 1.0], [-3.0, 2.0, -0.0]])
    assert magnitude_mask(weight, 0.34).int().tolist() == [[1, 1, 0], [0, 0, 0]]
    assert torch.equal(magnitude_mask(weight.T.contiguous().T, 0.34), magnitude_mask(weight, 0.34))


def test_a_parameter_that_trains_is_masked_too():
    weight = torch.nn.Parameter(torch.randn(4, 5))
    assert int(magnitude_mask(weight, 0.5).sum()) == 10


def test_what_is_refused():
    broken = [torch.ones(2, 2), torch.tensor([[1.0, float("nan")]])]
    with pytest.raises(ValueError, match="weight 1 is not finite"):
        global_magnitude_masks(broken, 0.5)
    for sparsity in (1, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
            global_magnitude_masks(matrices(), sparsity)
