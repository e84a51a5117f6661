"""Frozen blocks run once: the same training as when they run at every step, in every family."""

import shutil

import pytest
import torch

from moss_rlhf.errors import MachineError, RecipeError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.companions import KeptZeros
from moss_rlhf.finetuning.layers import layer_groups
from moss_rlhf.finetuning.prefix_cache import PrefixCache
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.prefix import Prefix
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import FinetuneSpec
from moss_rlhf.stages import StageContext, apply_stage
from moss_rlhf.tasks.loading import encoded

DROPOUTS = {
    "distilbert": ("dropout", "attention_dropout"),
    "modernbert": ("embedding_dropout", "mlp_dropout", "attention_dropout", "classifier_dropout"),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "gpt_neox": ("hidden_dropout", "attention_dropout"),
    "opt": ("dropout", "attention_dropout"),
    "t5": ("dropout_rate",),
    "mt5": ("dropout_rate",),
    "bart": ("dropout", "attention_dropout", "activation_dropout"),
    "marian": ("dropout", "attention_dropout", "activation_dropout"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), ("attention_dropout",)),
}
USUAL = ("hidden_dropout_prob", "attention_probs_dropout_prob")
SETTINGS = {"batch_size": 4, "learning_rate": 3e-3, "precision": "float32", "schedule": "constant"}


def _dropping(tiny_model, family, **sizes):
    """A model of the family with dropout wherever it has any."""
    return tiny_model(family, **sizes, **dict.fromkeys(DROPOUTS.get(family, USUAL), 0.2))


def _upper(family, blocks):
    """Names of the groups that train: the head and the highest block."""
    if FAMILIES[family].shared:
        return ["head"]
    two = len(FAMILIES[family].stacks) > 1
    return [f"{'decoder' if two else 'block'}.{blocks - 1}", "head"]


def _trained(model, rows, **options):
    result = finetune(model, rows[:10], rows[10:14], **(SETTINGS | options))
    return {name: value.clone() for name, value in model.network.state_dict().items()}, result


def _assert_close(one, other, bound):
    far = {name: float((one[name] - other[name]).abs().max()) for name in one if one[name].is_floating_point()}
    assert {name: distance for name, distance in far.items() if distance >= bound} == {}


def _without_key_biases(weights):
    """A softmax does not see them: their gradients are rounding errors, which AdamW turns into whole steps."""
    return {name: value for name, value in weights.items() if "key.bias" not in name and "key_proj.bias" not in name}


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "albert", "gemma", "t5"])
def test_cached_is_uncached(family, tiny_model, rows_of):
    rows = rows_of(tiny_model(family).task)
    phases = [{"train": _upper(family, 3), "epochs": 2}]
    plain, uncached = _trained(_dropping(tiny_model, family), rows, phases=phases, cache="off")
    stored, cached = _trained(_dropping(tiny_model, family), rows, phases=phases, cache="required")
    assert cached.facts["cache"].endswith("blocks, steps 1 to 6"), cached.facts["cache"]
    assert cached.facts["cache_bytes"] > 0
    assert cached.flops < uncached.flops
    _assert_close(_without_key_biases(plain), stored, 3e-5)
    for one, other in zip(uncached.history["train"], cached.history["train"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    before = tiny_model(family).network.state_dict()
    assert any(not torch.equal(before[name], stored[name]) for name in before)


def test_a_bfloat16_cache_is_near(tiny_model, rows):
    phases = [{"train": _upper("bert", 3), "epochs": 2}]
    plain, uncached = _trained(_dropping(tiny_model, "bert"), rows, phases=phases, cache="off")
    halved, cached = _trained(
        _dropping(tiny_model, "bert"), rows, phases=phases, cache={"dtype": "bfloat16", "required": True}
    )
    whole = _trained(_dropping(tiny_model, "bert"), rows, phases=phases, cache="required")[1]
    assert cached.facts["cache_bytes"] * 2 == whole.facts["cache_bytes"]
    for one, other in zip(uncached.history["train"], cached.history["train"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-2)
    assert not all(torch.equal(plain[name], halved[name]) for name in plain)


def test_frozen_groups_neither_move_nor_decay_and_thawed_ones_move(tiny_model, rows, acting):
    """Six steps of the head, six of the head and the highest block, then all; with a cache below block 2."""
    model, seen = _dropping(tiny_model, "bert"), []

    def snapshot(_):
        groups = layer_groups(model.network)
        seen.append([[value.detach().clone() for _, value in group.parameters] for group in groups])

    snapshot(0)
    phases = [
        {"train": ["head"], "epochs": 1},
        {"train": ["head", "block.2"], "epochs": 1, "learning_rate": 1e-3},
        {"train": "all", "epochs": 1},
    ]
    result = _trained(model, rows, phases=phases, weight_decay=0.5, progress=acting(snapshot), batch_size=5)[1]
    assert result.facts["cache"] == "2 blocks, steps 1 to 4"
    for step in range(6):
        moved = [
            any(not torch.equal(old, new) for old, new in zip(*parts, strict=True))
            for parts in zip(seen[step], seen[step + 1], strict=True)
        ]
        assert moved == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]][step // 2], step


@pytest.mark.parametrize("cache", ["off", "required"])
def test_resumed_in_the_middle_of_a_phase_is_never_stopped(cache, tiny_model, rows, acting, tmp_path):
    """Stopped within the first phase, within the second, and right at its first step; with the cache once lost."""
    phases = [
        {"train": ["head"], "epochs": 2, "schedule": "linear"},
        {"train": ["head", "block.2"], "epochs": 2, "learning_rate": 1e-3},
        {"train": "all", "epochs": 1, "layer_decay": 0.5},
    ]
    options = {"phases": phases, "cache": cache, "save_every_seconds": 0.0, "batch_size": 4}

    def stopping(step):
        def act(done):
            if done == step:
                raise RuntimeError("stopped by the test")

        return acting(act)

    whole, expected = _trained(_dropping(tiny_model, "bert"), rows, **options)
    for step in (3, 7, 10):
        with pytest.raises(RuntimeError, match="stopped by the test"):
            _trained(_dropping(tiny_model, "bert"), rows, workspace=tmp_path, progress=stopping(step), **options)
        if cache == "required":
            assert len(list(tmp_path.glob("prefix/*/part-000/encoder.bin"))) == 1
        if step == 7:
            shutil.rmtree(tmp_path / "prefix", ignore_errors=True)
    resumed, result = _trained(_dropping(tiny_model, "bert"), rows, workspace=tmp_path, **options)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert result.history == expected.history
    assert result.flops == expected.flops
    assert result.facts.get("cache_bytes") == expected.facts.get("cache_bytes")
    assert not list(tmp_path.glob("prefix/*"))


def test_a_shared_folder_serves_other_trainings_and_other_rows(tiny_model, rows, monkeypatch, tmp_path):
    filled = []
    fill = PrefixCache._fill
    monkeypatch.setattr(
        PrefixCache,
        "_fill",
        lambda self, store, prefix, missing: filled.append(len(missing)) or fill(self, store, prefix, missing),
    )
    options = SETTINGS | {
        "phases": [{"train": ["head"], "epochs": 1}],
        "cache": {"epochs": 1, "required": True},
        "cache_folder": tmp_path,
    }
    finetune(tiny_model(), rows[:10], rows[10:14], **options)
    finetune(tiny_model(), rows[:10], rows[10:14], **(options | {"learning_rate": 1e-4, "seed": 3}))
    finetune(tiny_model(), rows[5:16], rows[:4], **options)  # another fold: six new texts
    other = tiny_model()
    next(other.anatomy.blocks[0].module.parameters()).data.add_(0.1)
    finetune(other, rows[:10], rows[10:14], **options)
    assert filled == [10, 0, 6, 10]


def test_what_can_not_be_kept_is_said(tiny_model, rows, monkeypatch):
    phases = [{"train": ["head"], "epochs": 2}]
    result = _trained(tiny_model(), rows, phases=phases, cache={"bytes": 100})[1]
    assert "may take 0.00" in result.facts["cache"]
    assert result.facts["cache_bytes"] == 0
    with pytest.raises(MachineError, match="required, but it would take"):
        _trained(tiny_model(), rows, phases=phases, cache={"bytes": 100, "required": True})
    with pytest.raises(MachineError, match="no block stays frozen for 2 epochs"):
        _trained(tiny_model(), rows, epochs=1, cache="required")
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "the disk has room for" in _trained(tiny_model(), rows, phases=phases)[1].facts["cache"]


def test_a_state_too_large_for_its_numbers_is_not_kept(tiny_model, rows):
    model = tiny_model()
    for parameter in model.anatomy.blocks[-1].module.output.LayerNorm.parameters():
        parameter.data.fill_(1e6)  # above float16's largest
    result = _trained(model, rows, phases=[{"train": ["head"], "epochs": 2}], cache={"dtype": "float16"})[1]
    assert result.facts["cache"] == "none: a hidden state is not finite in float16"
    with pytest.raises(MachineError, match="required, but a hidden state is not finite"):
        _trained(model, rows, phases=[{"train": ["head"], "epochs": 2}], cache={"dtype": "float16", "required": True})


def test_a_network_that_answers_otherwise_is_not_trusted(tiny_model, rows, monkeypatch):
    """Were a family to read more of its blocks than we know, training would go on with the blocks themselves."""
    states = Prefix.states
    monkeypatch.setattr(
        Prefix, "states", lambda self, given: {name: state + 0.5 for name, state in states(self, given).items()}
    )
    model, other = tiny_model(), tiny_model()
    phases = [{"train": ["head"], "epochs": 2}]
    weights, result = _trained(model, rows, phases=phases)
    assert "answers otherwise" in result.facts["cache"]
    plain, _ = _trained(other, rows, phases=phases, cache="off")
    assert all(torch.equal(value, plain[name]) for name, value in weights.items())


def test_weights_altered_on_the_way_are_not_cached(tiny_model, rows, monkeypatch):
    monkeypatch.setattr(KeptZeros, "alters_forward", True)
    result = _trained(tiny_model(), rows, phases=[{"train": ["head"], "epochs": 2}])[1]
    assert "weights are altered on the way" in result.facts["cache"]


@pytest.mark.parametrize("cache", ["sometimes", {"dtype": "int8"}, {"bytes": 0}, {"type": "float16"}])
def test_a_cache_that_can_not_be_is_refused(cache, tiny_model, rows):
    with pytest.raises(RecipeError, match=r"finetune\.cache"):
        _trained(tiny_model(), rows, cache=cache)


def test_distillation_reads_the_teachers_answers_beside_the_cache(tiny_model, rows):
    options = {"phases": [{"train": ["head"], "epochs": 2}], "teacher": tiny_model(blocks=2)}
    plain, _ = _trained(tiny_model(), rows, cache="off", **options)
    stored, _ = _trained(tiny_model(), rows, cache="required", **options)
    _assert_close(plain, stored, 1e-5)


def test_a_recipe_s_stage_trains_in_phases_with_the_cache(tiny_model, rows, tmp_path):
    spec = FinetuneSpec(
        phases=[{"train": ["head"], "epochs": 2, "learning_rate": 1e-2}, {"train": "all"}],
        batch_size=5,
        reinitialise=1,
        cache={"dtype": "float16"},
        precision="float32",
    )
    model = tiny_model()
    train, validation = encoded(model, rows[:10]), encoded(model, rows[10:14])
    context = StageContext(train, train, validation, rows, 0, tmp_path, lambda _: model, Progress(quiet=True))
    outcome = apply_stage(spec, model, context)
    assert outcome.facts["cache"] == "3 blocks, steps 1 to 4"
    assert outcome.facts["cache_bytes"] == sum(train["length"]) * 32 * 2
    assert outcome.facts["learning_rates"]["head"] == 1e-2
    assert outcome.facts["steps"] == 6
