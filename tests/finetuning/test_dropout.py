"""Quick dropout: the right share, the right scale, the same attention, and the same masks where they must be."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moss_rlhf.finetuning import dropout as quick
from moss_rlhf.finetuning.dropout import attention, dropout, kept, quick_dropout


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_and_the_mean_stays(share):
    torch.manual_seed(0)
    found = dropout(torch.ones(1000, 997), share)
    dropped = float((found == 0).float().mean())
    assert abs(dropped - share) < 5 * (share * (1 - share) / found.numel()) ** 0.5 + 1 / 65536
    scale = 65536 / (65536 - round(share * 65536))
    assert torch.equal(found[found != 0].unique(), torch.tensor([scale]))


def test_each_sixteen_bits_of_a_draw_are_a_number_of_their_own():
    torch.manual_seed(0)
    masks = kept((250_000, 4), 1 << 15, torch.float32) - 0.5
    together = (masks.T @ masks) / len(masks) * 4
    assert torch.allclose(together, torch.eye(4), atol=0.01)


def test_a_seed_gives_the_same_masks_and_they_differ_from_call_to_call():
    torch.manual_seed(3)
    first, second = kept((100, 7), 6554, torch.float32), kept((100, 7), 6554, torch.float32)
    torch.manual_seed(3)
    assert torch.equal(first, kept((100, 7), 6554, torch.float32))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("groups", [1, 3])
def test_where_nothing_is_dropped_attention_is_pytorchs(mask, groups, monkeypatch):
    monkeypatch.setattr(quick, "kept", lambda shape, *_: torch.ones(*shape))
    monkeypatch.setattr(quick, "_scale", lambda _: 1.0)
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, 6 // groups, 7, 8), torch.randn(2, 6 // groups, 7, 8)
    inside = torch.rand(2, 1, 5, 7) > 0.3
    inside[..., 0] = True
    given = {
        "none": {"scale": 0.2},
        "bool": {"attn_mask": inside},
        "float": {"attn_mask": torch.randn(2, 1, 5, 7)},
        "causal": {"is_causal": True},
    }[mask]
    expected = functional.scaled_dot_product_attention(query, key, value, enable_gqa=groups > 1, **given)
    found = attention(query, key, value, dropout_p=0.1, enable_gqa=groups > 1, **given)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_row_without_a_single_token_is_no_nan():
    one = torch.randn(1, 1, 2, 4)
    assert attention(one, one, one, torch.zeros(1, 1, 2, 2, dtype=torch.bool), 0.1).isfinite().all()


def test_the_mean_over_masks_is_attention_without_dropout():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 4, 8).unbind()
    many = torch.stack([attention(query, key, value, dropout_p=0.2) for _ in range(4000)]).mean(dim=0)
    assert torch.allclose(many, functional.scaled_dot_product_attention(query, key, value), atol=0.05)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.3)

    def forward(self, values, again):
        run = (lambda x: self.dropout(self.linear(x))) if not again else self.again
        return run(values).square().sum()

    def again(self, values):
        return checkpoint(lambda x: self.dropout(self.linear(x)), values, use_reentrant=False)


def gradients(again):
    torch.manual_seed(1)
    net = Net()
    with quick_dropout():
        net(torch.randn(4, 8), again).backward()
    return net.linear.weight.grad


def test_what_is_computed_again_for_the_gradient_has_the_same_masks():
    assert torch.equal(gradients(again=True), gradients(again=False))


def test_modules_and_attentions_use_it_in_training_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(quick, "kept", lambda shape, *_: calls.append(shape) or torch.ones(*shape))
    module, values = nn.Dropout(0.1), torch.ones(1, 2, 3, 4)
    with quick_dropout():
        module(values)
        functional.scaled_dot_product_attention(values, values, values, dropout_p=0.1)
        functional.scaled_dot_product_attention(values, values, values)
        module.eval()(values)
        nn.Dropout(0.0)(values)
    assert functional.dropout.__module__ == "torch.nn.functional"
    module.train()(values)
    assert calls == [(1, 2, 3, 4), (1, 2, 3, 3)]


def test_short_attentions_in_bfloat16_are_plain_products_where_they_learn(monkeypatch):
    calls = []
    monkeypatch.setattr(quick, "attention", lambda *args, **given: calls.append(args[0].dtype) or args[0])
    with quick_dropout():
        for dtype in (torch.float32, torch.bfloat16):
            values = torch.ones(1, 2, 3, 4, dtype=dtype, requires_grad=True)
            functional.scaled_dot_product_attention(values, values, values)
            functional.scaled_dot_product_attention(values.detach(), values.detach(), values.detach())
        long = torch.ones(1, 1, 513, 4, dtype=torch.bfloat16, requires_grad=True)
        functional.scaled_dot_product_attention(long, long, long)
    assert calls == [torch.bfloat16]
