import pytest
import torch

from moss_rlhf import finetune, load, save
from moss_rlhf.errors import ModelError, RecipeError
from moss_rlhf.optimization import magnitude_mask, narrow, prune, quantize, shorten


@pytest.mark.parametrize(
    ("weight", "sparsity", "mask"),
    [
        ([[1.0, -0.2, 3.0], [0.1, -5.0, 0.3]], 0.5, [[0, 1, 0], [1, 0, 1]]),
        ([[1.0, -0.2, 3.0], [0.1, -5.0, 0.3]], 0.49, [[0, 1, 0], [1, 0, 0]]),  # 2.94 weights: rounded down
        ([[2.0, -2.0, 2.0, -2.0]], 0.5, [[1, 1, 0, 0]]),  # ties go by position
        ([[0.0, 1.0, 0.0, 2.0]], 0.25, [[1, 0, 0, 0]]),
        ([[1.0, 2.0]], 0.0, [[0, 0]]),
        ([3.0, -1.0, 2.0], 0.4, [0, 1, 0]),
    ],
)
def test_masks_by_hand(weight, sparsity, mask):
    weight = torch.tensor(weight)
    before = weight.clone()
    found = magnitude_mask(weight, sparsity)
    assert found.dtype == torch.bool
    assert found.int().tolist() == mask
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_exactly_the_share_goes_and_nothing_kept_is_smaller(dtype):
    weight = torch.randn(13, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = magnitude_mask(weight, 0.37)
    assert int(mask.sum()) == 81  # 0.37 · 221 = 81.77
    assert weight[mask].abs().max() <= weight[~mask].abs().min()


@pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, float("nan")])
def test_a_share_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        magnitude_mask(torch.ones(2, 2), sparsity)


def test_what_is_not_finite_has_no_order():
    with pytest.raises(ValueError, match="not finite"):
        magnitude_mask(torch.tensor([1.0, float("nan")]), 0.5)


def test_pruning_takes_the_smallest_of_every_matrix_of_the_blocks(tiny_model):
    model, untouched = tiny_model(), tiny_model()
    facts = prune(model, sparsity=0.25)
    for block, before in zip(model.anatomy.blocks, untouched.anatomy.blocks, strict=True):
        for linear, old in zip(block.matrices, before.matrices, strict=True):
            expected = old.weight.masked_fill(magnitude_mask(old.weight, 0.25), 0)
            assert torch.equal(linear.weight, expected)
            assert torch.equal(linear.bias, old.bias)
    for part in ("embeddings", "head"):
        pairs = zip(getattr(model.anatomy, part), getattr(untouched.anatomy, part), strict=True)
        assert all(torch.equal(new, old) for (_, new), (_, old) in pairs)
    matrices = 3 * (4 * 32 * 32 + 2 * 32 * 48)
    assert facts["of"] == matrices
    assert facts["zeroed"] == matrices // 4 == untouched.parameters - model.nonzero
    assert facts["sparsity"] == 0.25


def test_pruning_again_goes_on_from_the_zeros(tiny_model):
    twice, once = tiny_model(), tiny_model()
    prune(twice, sparsity=0.3)
    prune(twice, sparsity=0.6)
    prune(once, sparsity=0.6)
    assert len(twice.pruned) == len(once.pruned) == 18
    pairs = zip(twice.network.parameters(), once.network.parameters(), strict=True)
    assert all(torch.equal(new, old) for new, old in pairs)


def test_what_pruning_refuses(tiny_model):
    with pytest.raises(RecipeError, match=r"prune\.sparsity: 1\.0 can't be used; it must be less than 1"):
        prune(tiny_model(), sparsity=1.0)
    with pytest.raises(ModelError, match=r"query\.weight has 1024 weights, and sparsity 0\.0005 is less than one of"):
        prune(tiny_model(), sparsity=0.0005)
    broken = tiny_model()
    with torch.no_grad():
        broken.anatomy.blocks[2].feed_forward.down.weight[0, 0] = float("inf")
    before = [parameter.clone() for parameter in broken.network.parameters()]
    with pytest.raises(ModelError, match=r"layer\.2\.output\.dense\.weight: weight is not finite"):
        prune(broken, sparsity=0.5)
    assert all(torch.equal(new, old) for new, old in zip(broken.network.parameters(), before, strict=True))
    assert not broken.pruned
    quantized = tiny_model()
    quantize(quantized)
    with pytest.raises(ModelError, match="quantized already"):
        prune(quantized, sparsity=0.5)


def zeros_of(model):
    names = {id(parameter): name for name, parameter in model.network.named_parameters()}
    return {names[id(part)]: part.detach() == 0 for part in model.pruned}


def test_zeros_survive_saving_loading_and_training(tiny_model, rows, tmp_path):
    model = tiny_model()
    prune(model, sparsity=0.5)
    zeros = zeros_of(model)
    assert sum(int(mask.sum()) for mask in zeros.values()) == 3 * (4 * 32 * 32 + 2 * 32 * 48) // 2
    for step in ("first", "second"):
        save(model, tmp_path / step)
        model = load(tmp_path / step)
        before = {name: part.detach().clone() for name, part in model.network.named_parameters()}
        finetune(model, rows[:32], rows[32:], epochs=1, learning_rate=1e-2, batch_size=8, precision="float32")
    save(model, tmp_path / "last")
    found = zeros_of(load(tmp_path / "last"))
    assert found.keys() == zeros.keys()
    assert all(bool(found[name][mask].all()) for name, mask in zeros.items())
    moved = {name: part != before[name] for name, part in model.network.named_parameters()}
    assert all(bool(moved[name][~mask].any()) for name, mask in zeros.items())  # the others did learn


def test_what_is_cut_off_a_pruned_model_is_forgotten(tiny_model, rows, tmp_path):
    model = tiny_model()
    prune(model, sparsity=0.5)
    shorten(model, rows, remove=1, rows=8)
    narrow(model, rows, heads=0.5, feed_forward=0.5, rows=8)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert len(again.pruned) == 12
    assert all(bool(mask.any()) for mask in zeros_of(again).values())
