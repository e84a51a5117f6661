import pytest
import torch

from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.optimization.calibration import calibration_rows, labelled_batches
from moss_rlhf.optimization.unit_scores import (
    activation_scores,
    fisher_score,
    groups_of,
    hidden_scores,
    mask_gradients,
    parts_of,
    taylor_score,
)
from moss_rlhf.progress import Progress
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

QUIET = Progress(quiet=True)
FAMILY_NAMES = sorted(FAMILIES)


def test_scores_of_gradients_worked_by_hand():
    gradients = torch.tensor([[1.0, -2.0], [3.0, 2.0]])
    assert fisher_score(gradients).tolist() == [10.0, 8.0]
    assert taylor_score(gradients).tolist() == [4.0, 4.0]


def some(rows):
    return [rows[index] for index in range(0, 45, 7)]  # texts of unequal length


def batches_of(model, rows, at_once):
    """In batches of one row, unpadded; or all together, padded."""
    sample = calibration_rows(encoded(model, rows), 100, 0)
    if not at_once:
        return [batch for index in range(len(sample)) for batch in labelled_batches(model, sample.select([index]))]
    return list(labelled_batches(model, sample))


def reference_gradients(model, batches):
    """By another road: for a mask m = 1 on x, ∂loss/∂m = Σ x · ∂loss/∂x over tokens and features; a row at a time."""
    network, parts = model.network.double().eval(), parts_of(model.anatomy)
    found = {part.name: [] for part in parts}
    for inputs, labels in batches:
        entered = {part.name: [] for part in parts}
        hooks = [part.output.module.register_forward_pre_hook(keeper(entered[part.name])) for part in parts]
        loss = TASKS[model.task].loss(network(**inputs).logits, labels, reduction="sum")
        for hook in hooks:
            hook.remove()
        for part in parts:
            values = entered[part.name]  # one a use: a shared block has several
            gradients = torch.autograd.grad(loss, values, retain_graph=True)
            products = [(x * g).flatten(0, -2).sum(dim=0) for x, g in zip(values, gradients, strict=True)]
            found[part.name].append(sum(products).reshape(part.units, -1).sum(dim=1).detach())
    return {name: torch.stack(rows) for name, rows in found.items()}


def keeper(values):
    return lambda _, args: values.append(args[0])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_mask_gradients_equal_a_float64_reference_row_by_row(tiny_model, rows_of, family):
    model = tiny_model(family)
    train = some(rows_of(model.task))
    found = mask_gradients(model, batches_of(model, train, at_once=True), QUIET)
    expected = reference_gradients(model, batches_of(model, train, at_once=False))
    assert list(found) == list(expected)
    for name, gradients in found.items():
        scale = float(expected[name].abs().max())
        assert scale > 0
        # torch sums the loss of a text in float32
        torch.testing.assert_close(gradients.double(), expected[name], rtol=2e-3, atol=3e-4 * scale)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_activation_scores_leave_out_the_padding(tiny_model, rows_of, family):
    model = tiny_model(family)
    train = some(rows_of(model.task))
    together = activation_scores(model, batches_of(model, train, at_once=True), QUIET)
    alone = activation_scores(model, batches_of(model, train, at_once=False), QUIET)
    parts = parts_of(model.anatomy)
    assert list(together) == [part.name for part in parts]
    for part in parts:
        assert together[part.name].shape == (part.units,)
        torch.testing.assert_close(together[part.name], alone[part.name], rtol=1e-3, atol=1e-6)


def test_activation_scores_are_the_norms_of_what_enters(tiny_model, rows):
    model = tiny_model()
    batches, entered = batches_of(model, rows[:1], at_once=True), []
    block = model.anatomy.blocks[1]
    hook = block.attention.output.module.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    model.network.eval()(**batches[0][0])
    hook.remove()
    expected = entered[0].double().reshape(-1, 4, 8).square().sum(dim=(0, 2)).sqrt()
    torch.testing.assert_close(activation_scores(model, batches, QUIET)["block.1.heads"], expected, rtol=1e-5, atol=0)


def test_features_that_norms_shut_off_score_nothing(tiny_model, rows):
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "LayerNorm" in name:
                parameter[5] = 0
    scores = hidden_scores(model, batches_of(model, rows[:4], at_once=True), QUIET)
    assert scores.shape == (32,)
    assert scores.argmin() == 5
    assert float(scores[5]) == 0


def test_only_a_stack_that_says_so_ties_its_heads(tiny_model):
    assert [len(group) for group in groups_of(tiny_model("bert").anatomy)] == [1] * 6
    tied = groups_of(tiny_model("t5").anatomy)
    assert sorted(len(group) for group in tied) == [1] * 6 + [3] * 3  # feed-forwards; heads, heads, cross heads
    assert {part.kind for group in tied if len(group) > 1 for part in group} == {"heads", "cross_heads"}
