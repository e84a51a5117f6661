import pytest
import torch
from torch import nn

from moss_rlhf.optimization.smoothquant import fold_scales, smoothing_scales


def normed(inputs, weight, bias, kind):
    """LayerNorm, RMSNorm (T5, llama) and gemma's RMSNorm, which multiplies by 1 + weight; all in float64."""
    if kind == "layer":
        return nn.functional.layer_norm(inputs, weight.shape, weight, bias, eps=1e-5)
    plain = inputs * (inputs.pow(2).mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
    return plain * (weight + 1 if kind == "gemma" else weight)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_scales_by_hand():
    activation, weight = torch.tensor([16.0, 1.0, 0.0, 4.0]), torch.tensor([4.0, 9.0, 3.0, 0.0])
    assert smoothing_scales(activation, weight).tolist() == pytest.approx([2.0, 1 / 3, 1.0, 1.0])
    assert smoothing_scales(activation, weight, alpha=1.0).tolist() == [16.0, 1.0, 1.0, 1.0]
    assert smoothing_scales(activation, weight, alpha=0.0).tolist() == pytest.approx([1 / 4, 1 / 9, 1.0, 1.0])
    assert smoothing_scales(torch.tensor([16.0]), torch.tensor([16.0]), alpha=0.75).tolist() == pytest.approx([4.0])


def test_at_one_half_activations_and_weights_end_with_the_same_maxima():
    inputs, weight = random(50, 7) * random(7, seed=1).exp(), random(5, 7, seed=2)
    scales = smoothing_scales(inputs.abs().amax(dim=0), weight.abs().amax(dim=0))
    torch.testing.assert_close((inputs / scales).abs().amax(dim=0), (weight * scales).abs().amax(dim=0))


@pytest.mark.parametrize("kind", ["layer", "rms", "gemma"])
def test_the_function_stays_the_same_behind_a_norm(kind):
    inputs, weight, bias = random(11, 13) * 5, random(13, seed=1), random(13, seed=2) if kind == "layer" else None
    followers = [random(3, 13, seed=3), random(17, 13, seed=4)]
    before = [part.clone() for part in (weight, *followers)]
    scales = random(13, seed=5).mul(2).exp()
    made, made_bias, read = fold_scales(scales, weight, bias, followers, unit_offset=kind == "gemma")
    inner = normed(inputs, made, made_bias, kind)
    torch.testing.assert_close(inner, normed(inputs, weight, bias, kind) / scales, rtol=1e-12, atol=1e-12)
    for old, new in zip(followers, read, strict=True):
        torch.testing.assert_close(inner @ new.T, normed(inputs, weight, bias, kind) @ old.T, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(now, then) for now, then in zip((weight, *followers), before, strict=True))


def test_the_function_stays_the_same_behind_the_up_projection_of_a_gated_feed_forward():
    inputs, gate, up, down = random(5, 6), random(7, 6, seed=1), random(7, 6, seed=2), random(3, 7, seed=3)
    bias, scales = random(7, seed=4), random(7, seed=5).exp()
    new_up, new_bias, (new_down,) = fold_scales(scales, up, bias, [down])
    opened = nn.functional.silu(inputs @ gate.T)
    before, after = opened * (inputs @ up.T + bias), opened * (inputs @ new_up.T + new_bias)
    torch.testing.assert_close(after @ new_down.T, before @ down.T, rtol=1e-12, atol=1e-12)


def test_dtypes_are_kept_and_rounded_once():
    weight, follower = torch.ones(4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.float16)
    scales = torch.tensor([2.0, 4.0, 8.0, 0.5])
    made, bias, (read,) = fold_scales(scales, weight, None, [follower])
    assert (made.dtype, bias, read.dtype) == (torch.bfloat16, None, torch.float16)
    assert made.tolist() == [0.5, 0.25, 0.125, 2.0]
    assert read[1].tolist() == scales.tolist()
    assert smoothing_scales(weight, weight).dtype == torch.float32


@pytest.mark.parametrize(
    ("activation", "weight", "alpha", "message"),
    [
        ([1.0, 2.0], [1.0], 0.5, r"must both be \(in,\), got \(2,\) and \(1,\)"),
        ([[1.0]], [[1.0]], 0.5, r"must both be \(in,\)"),
        ([1.0], [1.0], 1.1, r"alpha must be in \[0, 1\], got 1.1"),
        ([1.0], [1.0], float("nan"), "alpha must be in"),
        ([float("nan")], [1.0], 0.5, "activation_maximum must be finite"),
        ([1.0], [float("inf")], 0.5, "weight_maximum must be finite"),
        ([-1.0], [1.0], 0.5, "activation_maximum must be finite and >= 0"),
    ],
)
def test_bad_maxima(activation, weight, alpha, message):
    with pytest.raises(ValueError, match=message):
        smoothing_scales(torch.tensor(activation), torch.tensor(weight), alpha)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.tensor([1.0, 0.0, 1.0])}, "finite and > 0"),
        ({"scales": torch.tensor([1.0, float("nan"), 1.0])}, "finite and > 0"),
        ({"scales": torch.ones(1, 3)}, r"scales must be \(in,\)"),
        ({"weight": torch.ones(4)}, r"3 scales fit a maker of 3 features, got weight \(4,\)"),
        ({"bias": torch.ones(2)}, r"bias \(2,\)"),
        ({"followers": [torch.ones(3, 4)]}, r"3 scales fit matrices \(out, 3\), got \(3, 4\)"),
        ({"weight": torch.ones(3, 3), "unit_offset": True}, "unit_offset is for the weight of a norm"),
    ],
)
def test_what_does_not_fit(change, message):
    arguments = {"scales": torch.ones(3), "weight": torch.ones(3), "bias": None, "followers": []} | change
    with pytest.raises(ValueError, match=message):
        fold_scales(**arguments)
