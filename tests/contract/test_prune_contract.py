"""Pruning by what the rows say, of every family: what it promises. Magnitude is in test_contract."""

import numpy as np
import pytest
import torch

import moss_rlhf
from moss_rlhf.model.anatomy import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "pattern"),
    [("wanda", "2:4"), ("sparsegpt", "unstructured"), pytest.param("sparsegpt", "2:4", marks=pytest.mark.slow)],
)
def test_half_of_every_matrix_is_zero_and_stays_so(family, method, pattern, tiny_model, rows_of, tmp_path):
    model = tiny_model(family)
    rows = rows_of(model.task)
    sparsity = 0.5 if pattern == "unstructured" else None
    facts = moss_rlhf.prune(model, rows, method=method, sparsity=sparsity, pattern=pattern, rows=16)
    assert facts["sparsity"] == pytest.approx(0.5, abs=0.02)
    for matrix in model.anatomy.matrices:
        zeros = (matrix.weight == 0).double()
        assert float(zeros.mean()) == pytest.approx(0.5, abs=0.03)
        if pattern == "2:4":
            assert bool((zeros.unflatten(1, (-1, 4)).sum(dim=2) >= 2).all())
    moss_rlhf.save(model, tmp_path / "saved")
    loaded = moss_rlhf.load(tmp_path / "saved")
    zeros = [parameter == 0 for parameter in loaded.pruned]
    assert len(zeros) == len(model.pruned) == len(model.anatomy.matrices)
    moss_rlhf.finetune(loaded, rows[:16], rows[:8], epochs=1, batch_size=16, learning_rate=1e-3, precision="float32")
    assert all(torch.equal(parameter == 0, zero) for parameter, zero in zip(loaded.pruned, zeros, strict=True))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("allocation", ["outliers", "sensitivity"])
def test_blocks_that_need_their_weights_keep_more_and_the_total_is_met(family, allocation, tiny_model, rows_of):
    model = tiny_model(family)
    facts = moss_rlhf.prune(model, rows_of(model.task), method="wanda", sparsity=0.5, allocation=allocation, rows=16)
    assert facts["sparsity"] == pytest.approx(0.5, abs=0.03)
    assert len(set(facts["shares"].values())) > 1


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_same_seed_gives_the_same_bits(family, tiny_model, rows_of):
    weights = []
    for _ in range(2):
        model = tiny_model(family)
        moss_rlhf.prune(model, rows_of(model.task), method="sparsegpt", sparsity=0.4, rows=8, seed=3)
        weights.append([matrix.weight.clone() for matrix in model.anatomy.matrices])
    assert all(torch.equal(first, second) for first, second in zip(*weights, strict=True))
    assert np.isfinite(weights[0][0].numpy()).all()
