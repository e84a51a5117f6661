"""Adapters: what trains, merging against the closed form and the unmerged network, pruned zeros, resume."""

import math

import pytest
import torch

from moss_rlhf.errors import ModelError, RecipeError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.adapters import Adapters
from moss_rlhf.finetuning.options import Adapter
from moss_rlhf.model.checkpoint import load_checkpoint, save_checkpoint
from moss_rlhf.model.surgery import keep_heads
from moss_rlhf.optimization import prune
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

FAMILIES = ["bert", "gpt2", "llama", "t5"]
SETTINGS = {"epochs": 1, "batch_size": 8, "learning_rate": 3e-3, "precision": "float32"}


def _weights(model):
    return {name: value.clone() for name, value in model.network.state_dict().items()}


def _logits(model, rows):
    task = TASKS[model.task]
    batch = task.collate([dict(row) for row in encoded(model, rows)], model.tokenizer)
    with torch.no_grad():
        return model.network.eval()(**task.inputs(model.network, batch)).logits


def _stirred(model, options):
    """Adapters whose B is not zero."""
    adapters = Adapters(model, options, 0)
    torch.manual_seed(3)
    for group in adapters.groups:
        for name, parameter in group.parameters:
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
    return adapters


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_unmerged(kind, family, tiny_model, rows_of):
    model = tiny_model(family)
    rows, plain = rows_of(model.task)[:4], _logits(model, rows_of(model.task)[:4])
    adapters = _stirred(model, Adapter(kind=kind, rank=4, alpha=8))
    apart = _logits(model, rows)
    adapters.finish()
    merged = _logits(model, rows)
    assert (apart - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, apart, rtol=1e-5, atol=1e-5 * float(apart.abs().max()))


@pytest.mark.parametrize(("kind", "scale"), [("lora", 8 / 4), ("rslora", 8 / math.sqrt(4))])
def test_the_closed_form(kind, scale, tiny_model):
    model = tiny_model("gpt2")  # whose matrices are stored transposed
    matrix = model.anatomy.blocks[1].feed_forward.down
    before = matrix.weight.clone()
    adapters = _stirred(model, Adapter(kind=kind, rank=4, alpha=8))
    module = model.network.get_submodule(matrix.name.removesuffix(".weight"))
    change = scale * module.lora_B["default"].weight @ module.lora_A["default"].weight
    adapters.finish()
    torch.testing.assert_close(matrix.weight, before + change.detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapted_matrices_and_a_classifiers_head_move(family, tiny_model, rows_of, tmp_path):
    model = tiny_model(family)
    rows, before = rows_of(model.task), _weights(model)
    trainable = [parameter.requires_grad for parameter in model.network.parameters()]
    identities = [id(parameter) for parameter in model.network.parameters()]
    training = finetune(model, rows[:24], rows[24:40], adapter={"targets": "attention", "rank": 2}, **SETTINGS)
    after = _weights(model)
    assert list(after) == list(before)
    assert [id(parameter) for parameter in model.network.parameters()] == identities
    assert [parameter.requires_grad for parameter in model.network.parameters()] == trainable
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {matrix.name for block in model.anatomy.blocks for part in block.attentions for matrix in part.matrices}
    head = {name for name, _ in model.anatomy.head} if family == "bert" else set()
    assert adapted <= moved <= adapted | head
    assert bool(moved & head) is bool(head)
    sizes = [matrix.in_features + matrix.out_features for matrix in model.anatomy.matrices if matrix.name in adapted]
    assert training.facts["adapter"] == {"kind": "lora", "rank": 2, "parameters": 2 * sum(sizes)}
    assert not hasattr(model.network, "peft_config")
    save_checkpoint(model, tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model", TASKS[model.task].auto_class())
    torch.testing.assert_close(_logits(loaded, rows[:4]), _logits(model, rows[:4]))


def test_a_training_that_is_refused_leaves_no_adapter(tiny_model, rows):
    model = tiny_model()
    names = [name for name, _ in model.network.named_parameters()]
    with pytest.raises(RecipeError, match="l2: -1"):
        finetune(model, rows, rows[:8], adapter={"rank": 2}, l2=-1)
    assert [name for name, _ in model.network.named_parameters()] == names


def test_names_choose_matrices(tiny_model):
    model = tiny_model()
    adapters = Adapters(model, Adapter(targets=["query", "output.dense"]), 0)
    names = {matrix.name.rpartition("layer.0.")[2] for matrix in adapters.targets if "layer.0" in matrix.name}
    assert names == {"attention.self.query.weight", "attention.output.dense.weight", "output.dense.weight"}
    adapters.detach()
    with pytest.raises(ModelError, match="no matrix of a block is called 'qeury'; did you mean 'query'"):
        Adapters(model, Adapter(targets=["qeury"]), 0)


def test_pruned_matrices_are_refused_or_their_zeros_kept(tiny_model, rows):
    model = tiny_model()
    prune(model, sparsity=0.5)
    zeros = [parameter == 0 for parameter in model.pruned]
    with pytest.raises(ModelError, match=r"would undo it\. Set keep_zeros: true"):
        finetune(model, rows[:24], rows[24:40], adapter={}, **SETTINGS)
    before = _weights(model)
    training = finetune(model, rows[:24], rows[24:40], adapter={"keep_zeros": True}, **SETTINGS)
    assert 0 < training.facts["adapter"]["undone_by_zeros"] < 0.5
    for parameter, mask in zip(model.pruned, zeros, strict=True):
        assert (parameter[mask] == 0).all()
    assert any(not torch.equal(before[name], value) for name, value in _weights(model).items())


def test_narrowed_heads_of_a_transposed_family(tiny_model, rows_of):
    model = tiny_model("gpt2")
    keep_heads(model.anatomy.blocks[0].attention, [0, 1, 2])
    shapes = model.anatomy.shapes
    adapters = Adapters(model, Adapter(), 0)
    assert model.anatomy.shapes == shapes
    adapters.detach()
    rows = rows_of("text-generation")
    finetune(model, rows[:16], rows[16:24], adapter={"kind": "dora"}, **SETTINGS)
    assert model.anatomy.shapes == shapes


def _stopping(acting, step):
    def act(done):
        if done == step:
            raise RuntimeError("stopped by the test")

    return acting(act)


def test_resumed_is_never_stopped_and_an_error_leaves_no_adapter(tiny_model, rows, acting, tmp_path):
    settings = SETTINGS | {"epochs": 2, "save_every_seconds": 0.0, "adapter": {"kind": "dora"}}
    stopped, resumed, whole = (tiny_model(blocks=2) for _ in range(3))
    names = list(stopped.network.state_dict())
    with pytest.raises(RuntimeError, match="stopped by the test"):
        finetune(stopped, rows[:30], rows[30:], workspace=tmp_path, progress=_stopping(acting, 5), **settings)
    assert list(stopped.network.state_dict()) == names
    one = finetune(resumed, rows[:30], rows[30:], workspace=tmp_path, **settings)
    two = finetune(whole, rows[:30], rows[30:], **settings)
    assert one.history == two.history
    for name, value in _weights(whole).items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
