import copy

import pytest
import torch

from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.optimization.calibration import calibration_rows, labelled_batches
from moss_rlhf.optimization.repair import Moments, refit, repair_outputs
from moss_rlhf.optimization.unit_scores import groups_of, parts_of
from moss_rlhf.tasks.loading import encoded


def moments_of(features, targets, weight):
    moments = Moments.empty(features.shape[1], targets.shape[1])
    for rows in torch.arange(len(features)).split(7):
        moments.add(features[rows], targets[rows] - features[rows] @ weight.T, targets[rows])
    return moments


def test_the_refit_is_torchs_least_squares_where_texts_are_many():
    draw = torch.Generator().manual_seed(0)
    features, targets, weight = (torch.randn(*shape, generator=draw) for shape in ((50, 5), (50, 3), (3, 5)))
    found = weight + refit(moments_of(features, targets, weight), ridge=1e-9)
    expected = torch.linalg.lstsq(features.double(), targets.double()).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_ridge_holds_the_weight_where_texts_say_nothing():
    features, weight = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 7.0]])
    moments = moments_of(features, torch.tensor([[3.0], [6.0]]), weight)
    change = refit(moments, ridge=0.1)  # mean squared feature 2.5: (5 + 0.25) · change = 15 − 5
    torch.testing.assert_close(change, torch.tensor([[10 / 5.25, 0.0]], dtype=torch.float64))
    assert not refit(Moments.empty(2, 1), ridge=0.1).any()
    with pytest.raises(ValueError, match="ridge must be above 0, got 0"):
        refit(moments, ridge=0)


def test_the_error_from_moments_is_that_of_the_tokens():
    draw = torch.Generator().manual_seed(1)
    features, targets = torch.randn(20, 4, generator=draw), torch.randn(20, 3, generator=draw)
    weight, change = torch.randn(3, 4, generator=draw), torch.randn(3, 4, generator=draw)
    expected = (features @ (weight + change).T - targets).square().sum()
    moments = moments_of(features, targets, weight)
    assert moments.error(change) == pytest.approx(float(expected), rel=1e-5)
    assert moments.scale == pytest.approx(float(targets.square().sum()), rel=1e-6)


def batches_of(model, rows):
    return list(labelled_batches(model, calibration_rows(encoded(model, rows), 60, 0)))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_uncut_network_has_nothing_to_repair(tiny_model, rows_of, family):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    errors = repair_outputs(model.network, copy.deepcopy(model.network), batches_of(model, rows_of(model.task)[:8]))
    assert list(errors) == [part.name for part in parts_of(model.anatomy)]
    assert max(error for pair in errors.values() for error in pair) < 1e-9
    for name, value in model.network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_units_that_are_copies_of_others_are_made_up_for_exactly(tiny_model, rows_of, family):
    """The last neuron is made a copy of the first: without it the first can write for both."""
    model = tiny_model(family)
    for block in model.anatomy.blocks:
        part = block.feed_forward
        for matrix in part.ups:
            for first in range(0, matrix.out_features, part.width):  # gate and up may be one matrix
                matrix.weight[first + part.width - 1] = matrix.weight[first]
                if matrix.bias is not None:
                    matrix.bias[first + part.width - 1] = matrix.bias[first]
    batches = batches_of(model, rows_of(model.task))
    uncut = copy.deepcopy(model.network)
    for part, *_ in groups_of(model.anatomy):
        if part.kind == "feed_forward":
            part.keep(torch.arange(part.units - 1))
    inputs, labels = batches[-1]
    own = slice(None) if labels.dim() == 1 else labels != -100  # what the network says of padding is nobody's concern
    wanted, cut = uncut(**inputs).logits[own], model.network(**inputs).logits[own]
    errors = repair_outputs(model.network, uncut, batches, ridge=1e-7)
    repaired = model.network(**inputs).logits[own]
    assert float((repaired - wanted).square().sum()) < 0.05 * float((cut - wanted).square().sum())
    assert all(after <= before + 1e-6 for before, after in errors.values())


def test_frozen_parameters_stay_as_they_are(tiny_model, rows):
    model = tiny_model()
    uncut = copy.deepcopy(model.network)
    for part in parts_of(model.anatomy):
        part.keep(torch.arange(part.units // 2))
    frozen = model.anatomy.blocks[1].feed_forward.down.parameter
    before = frozen.clone()
    errors = repair_outputs(model.network, uncut, batches_of(model, rows), frozen={id(frozen)})
    assert torch.equal(frozen, before)
    assert "block.1.feed_forward" not in errors
    assert len(errors) == 5
    assert all(after < before for before, after in errors.values())
