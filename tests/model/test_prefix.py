"""Stored states in the place of frozen blocks: the same logits, the same gradients, in every family."""

import pytest
import torch

from moss_rlhf.errors import MossError
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.prefix import Prefix
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded


def _batch(model, rows):
    task, data = TASKS[model.task], encoded(model, rows)
    batch = task.collate([data[index] for index in range(len(data))], model.tokenizer)
    return task.inputs(model.network, batch), batch["labels"]


def _learned(model, given, labels):
    """Loss and gradients of what is above."""
    task, network = TASKS[model.task], model.network
    loss = task.loss(network(**given).logits, labels)
    trained: dict[str, torch.Tensor] = {
        name: value for name, value in network.named_parameters() if value.requires_grad
    }
    return loss, dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True), strict=True))


def _cuts(family):
    """Within the first stack, at its end, and the whole depth; one block for a family that shares it."""
    if FAMILIES[family].shared:
        return [1]
    if len(FAMILIES[family].stacks) == 1:
        return [1, 2, 3]
    return [1, 2, 3, 4, 5 if family in ("bart", "marian") else 6]  # all of whose head is tied to the embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_states_give_the_same_loss_and_gradients(family, tiny_model, rows_of):
    model = tiny_model(family)
    given, labels = _batch(model, rows_of(model.task)[:7])
    for cut in _cuts(family):
        for parameter in model.network.parameters():
            parameter.requires_grad_(True)
        prefix = Prefix(model.network, cut)
        for _, parameter in (*prefix.embeddings, *(p for b in prefix.blocks for p in b.module.named_parameters())):
            parameter.requires_grad_(False)
        loss, gradients = _learned(model, given, labels)
        states = prefix.states(given)
        for stack, state in states.items():  # what padding held is not kept
            inside = (
                (labels != -100) if stack == "decoder" and "decoder_input_ids" in given else given["attention_mask"]
            )
            state[~inside.bool()] = 0
        with prefix.answering(states):
            stored_loss, stored = _learned(model, given, labels)
        assert stored_loss.item() == pytest.approx(loss.item(), abs=1e-5)
        assert len(gradients) > 0
        for name, gradient in gradients.items():
            if gradient is not None:
                torch.testing.assert_close(stored[name], gradient, atol=1e-5, rtol=1e-4, msg=f"{cut} {name}")
    assert all("forward" not in vars(block.module) for block in model.anatomy.blocks)


def test_the_frozen_blocks_do_not_run(tiny_model, rows):
    model = tiny_model()
    given, _ = _batch(model, rows[:4])
    prefix = Prefix(model.network, 2)
    states = prefix.states(given)
    for block in prefix.blocks:  # if one ran, its output would not be finite
        for parameter in block.module.parameters():
            parameter.data.fill_(float("nan"))
    with prefix.answering(states):
        assert model.network(**given).logits.isfinite().all()
    assert not model.network(**given).logits.isfinite().any()


def test_a_batch_of_another_shape_is_an_error(tiny_model, rows):
    model = tiny_model()
    given, _ = _batch(model, rows[:4])
    other, _ = _batch(model, rows[:3])
    prefix = Prefix(model.network, 2)
    states = prefix.states(given)
    with prefix.answering(states), pytest.raises(MossError, match="stored is"):
        model.network(**other)


def test_the_fingerprint_follows_what_lies_below_the_cut(tiny_model):
    model = tiny_model()
    blocks = [block.module for block in model.anatomy.blocks]
    before = Prefix(model.network, 2).fingerprint()
    assert Prefix(model.network, 1).fingerprint() != before
    next(blocks[2].parameters()).data.add_(1.0)
    assert Prefix(model.network, 2).fingerprint() == before
    next(blocks[1].parameters()).data.add_(1.0)
    assert Prefix(model.network, 2).fingerprint() != before
