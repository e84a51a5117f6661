import pytest
import torch

from moss_rlhf import narrow, quantize
from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.model.anatomy import FAMILIES, BlockShape
from moss_rlhf.optimization.calibration import calibration_rows, mean_loss
from moss_rlhf.optimization.narrow import fisher_scores, keep_highest
from moss_rlhf.progress import Progress
from moss_rlhf.tasks.loading import encoded

QUIET = Progress(quiet=True)
PRIMES = {"hidden": 35, "heads": 5, "blocks": 3, "feed_forward": 53}  # head size 7


def test_the_highest_are_kept_in_their_order_and_ties_go_to_the_lower_index():
    assert keep_highest(torch.tensor([0.1, 5.0, 0.2, 3.0]), 2).tolist() == [1, 3]
    assert keep_highest(torch.tensor([2.0, 1.0, 2.0, 2.0]), 2).tolist() == [0, 2]
    assert keep_highest(torch.zeros(3), 3).tolist() == [0, 1, 2]


def reference_scores(model, rows):
    """By another road: for a mask m = 1 on x, ∂loss/∂m = Σ x · ∂loss/∂x over tokens and features; one row at a time,
    unpadded, float64."""
    network = model.network.double().eval()
    blocks = model.anatomy.blocks
    totals = [torch.zeros(2, 64, dtype=torch.float64) for _ in blocks]
    entered = {}

    def keep(linear):
        def hook(_, given):
            given[0].retain_grad()
            entered[linear] = given[0]

        return linear.register_forward_pre_hook(hook)

    hooks = [keep(linear) for block in blocks for linear in (block.attention_output, block.down)]
    for row in rows:
        inputs = model.tokenizer(row["text"], return_tensors="pt")
        loss = network(**inputs, labels=torch.tensor([model.labels.index(row["label"])])).loss
        loss.backward()
        for block, total in zip(blocks, totals, strict=True):
            for linear, sums in zip((block.attention_output, block.down), total, strict=True):
                of_features = (entered[linear] * entered[linear].grad).sum(dim=(0, 1)).detach()
                of_units = of_features.reshape(-1, block.head_size if linear is block.attention_output else 1).sum(
                    dim=1
                )
                sums[: len(of_units)] += of_units**2
    for hook in hooks:
        hook.remove()
    return [
        (heads[: block.shape.heads], neurons[: block.shape.feed_forward])
        for block, (heads, neurons) in zip(blocks, totals, strict=True)
    ]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fisher_scores_equal_a_float64_reference_row_by_row(tiny_model, rows, family):
    model = tiny_model(family, **PRIMES)
    sample = [rows[index] for index in range(0, 45, 7)]  # texts of unequal length, both labels
    scores = fisher_scores(model, calibration_rows(encoded(model, sample), rows=100, seed=0), QUIET)
    for found, expected in zip(scores, reference_scores(model, sample), strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.float64
            assert theirs.min() > 0
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=0)


def test_the_units_of_lowest_score_go_and_the_others_keep_their_weights(tiny_model, rows):
    model, whole = tiny_model(**PRIMES), tiny_model(**PRIMES)
    scores = reference_scores(tiny_model(**PRIMES), rows)
    facts = narrow(model, rows, heads=0.5, feed_forward=0.5, multiple_of=8)
    assert model.anatomy.shapes == (BlockShape(3, 32),) * 3  # 5 − 2 heads; 53 − 26 = 27 neurons, up to 32
    blocks = zip(model.anatomy.blocks, whole.anatomy.blocks, scores, facts["score_lost"], strict=True)
    for block, old, (of_heads, of_neurons), lost in blocks:
        heads = of_heads.topk(3).indices.sort().values
        features = torch.cat([torch.arange(7 * head, 7 * head + 7) for head in heads])
        neurons = of_neurons.topk(32).indices.sort().values
        assert torch.equal(block.query.weight, old.query.weight[features])
        assert torch.equal(block.value.bias, old.value.bias[features])
        assert torch.equal(block.attention_output.weight, old.attention_output.weight[:, features])
        assert torch.equal(block.up.weight, old.up.weight[neurons])
        assert torch.equal(block.down.weight, old.down.weight[:, neurons])
        assert lost["heads"] == pytest.approx(1 - float(of_heads[heads].sum() / of_heads.sum()), rel=1e-3)
    assert facts["rows_scored"] == 60


def test_dead_units_go_first_and_cost_nothing(tiny_model, rows):
    model = tiny_model()
    with torch.no_grad():
        for block in model.anatomy.blocks:
            block.attention_output.weight[:, 8:16] = 0  # head 1
            block.down.weight[:, ::2] = 0
    sample = encoded(model, rows)
    before = mean_loss(model, sample)
    facts = narrow(model, rows, heads=0.25, feed_forward=0.5)
    assert mean_loss(model, sample) == pytest.approx(before, abs=1e-6)
    assert [lost for block in facts["score_lost"] for lost in block.values()] == pytest.approx([0.0] * 6, abs=1e-15)


def test_one_share_alone_leaves_the_other_matrices_alone(tiny_model, rows):
    model, whole = tiny_model(), tiny_model()
    narrow(model, rows, heads=0.5, rows=8)
    assert model.anatomy.shapes == (BlockShape(2, 48),) * 3
    assert torch.equal(model.anatomy.blocks[1].up.weight, whole.anatomy.blocks[1].up.weight)


def test_an_uneven_model_loses_the_share_of_each_block(tiny_model, rows):
    model = tiny_model()
    narrow(model, rows, heads=0.5, rows=8)
    narrow(model, rows, heads=0.5, feed_forward=0.3, rows=8)
    assert model.anatomy.shapes == (BlockShape(1, 40),) * 3


def test_the_same_seed_scores_the_same_rows(tiny_model, rows):
    def chosen(seed):
        model = tiny_model()
        return [row["input_ids"] for row in calibration_rows(encoded(model, rows), rows=9, seed=seed)]

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)
    assert [len(ids) for ids in chosen(1)] == sorted(len(ids) for ids in chosen(1))


@pytest.mark.parametrize(
    ("shares", "word"),
    [
        ({"heads": 1.0}, r"heads is the share removed and must be in \[0, 1\), got 1\.0"),
        ({"feed_forward": -0.1}, "feed_forward is the share removed"),
        ({}, "less than one unit"),
        ({"heads": 0.2}, "less than one unit"),  # 0.8 of a head
        ({"feed_forward": 0.1}, "less than one unit"),  # 44 of 48 are rounded up again
    ],
)
def test_what_narrowing_refuses(tiny_model, rows, shares, word):
    model = tiny_model()
    before = [parameter.clone() for parameter in model.network.parameters()]
    with pytest.raises(ModelError, match=word):
        narrow(model, rows, rows=8, **shares)
    assert all(torch.equal(new, old) for new, old in zip(model.network.parameters(), before, strict=True))


def test_a_quantized_model_is_not_narrowed_and_no_rows_are_no_sample(tiny_model):
    model = tiny_model()
    with pytest.raises(DataError, match="no rows"):
        narrow(model, encoded(model, [{"text": "bad", "label": 0}]).select([]), heads=0.5)
    quantize(model)
    with pytest.raises(ModelError, match="quantized already"):
        narrow(model, [{"text": "bad", "label": 0}], heads=0.5)
