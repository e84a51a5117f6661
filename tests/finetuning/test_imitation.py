"""Hidden states and attention relations: the formulas against float64, what is captured in every family, the maps."""

import math

import numpy as np
import pytest
import torch

from moss_rlhf.errors import ModelError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.imitation import Imitation, Tutor, hidden_loss, relation_heads, relation_loss
from moss_rlhf.finetuning.options import Distillation
from moss_rlhf.finetuning.watching import watching
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.layer_map import layer_map, uniform_map
from moss_rlhf.model.surgery import keep_blocks, keep_heads, keep_hidden
from moss_rlhf.optimization import shorten
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

RANDOM = np.random.default_rng(5)
SETTINGS = {"epochs": 1, "batch_size": 8, "learning_rate": 2e-3, "precision": "float32"}


# --- formulas ------------------------------------------------------------------------------------------------------


def test_hidden_loss_is_twice_one_minus_the_cosine():
    one, two = RANDOM.normal(size=(2, 7, 5))
    cosine = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    found = float(hidden_loss(torch.tensor(one), torch.tensor(two)))
    assert found == pytest.approx(float((2 - 2 * cosine).mean()), rel=1e-5)
    assert float(hidden_loss(torch.tensor(one), torch.tensor(3 * one))) == pytest.approx(0, abs=1e-10)


def _relations(part, heads, inside, causal):
    """{(row, head, token): probabilities over the tokens that it may relate to}, worked one by one."""
    rows, _, features = part.shape
    size, found = features // heads, {}
    for row in range(rows):
        for head in range(heads):
            vectors = part[row, :, head * size : (head + 1) * size]
            for token in np.flatnonzero(inside[row]):
                others = [other for other in np.flatnonzero(inside[row]) if not causal or other <= token]
                scores = np.array([vectors[token] @ vectors[other] for other in others]) / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                found[row, head, token] = weights / weights.sum()
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_relation_loss_by_hand(heads, causal):
    """Six features of the teacher, four of the student; a row with padding."""
    student, teacher = RANDOM.normal(size=(2, 5, 4)), RANDOM.normal(size=(2, 5, 6))
    inside = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=bool)
    own, taught = _relations(student, heads, inside, causal), _relations(teacher, heads, inside, causal)
    expected = np.mean([(taught[key] * np.log(taught[key] / own[key])).sum() for key in taught])
    given = (torch.tensor(student), torch.tensor(teacher), heads, torch.tensor(inside), causal)
    assert float(relation_loss(*given)) == pytest.approx(expected, rel=1e-5)


def test_relation_loss_has_a_finite_gradient_beside_padding():
    student = torch.randn(2, 4, 6, requires_grad=True)
    inside = torch.tensor([[True, True, False, False], [True, True, True, True]])
    relation_loss(student, torch.randn(2, 4, 6), 3, inside, True).backward()
    assert student.grad.isfinite().all()
    assert (student.grad[0, 2:] == 0).all()


def test_relation_heads_divide_everything():
    assert relation_heads([48, 96, 32], 12) == 8
    assert relation_heads([48, 96, 32], 16) == 16
    assert relation_heads([7, 9], 12) == 1


# --- maps ----------------------------------------------------------------------------------------------------------


def test_uniform_maps():
    assert uniform_map(4, 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]  # TinyBERT's
    assert uniform_map(2, 3) == [(0, 1), (1, 2)]
    assert uniform_map(3, 3) == [(0, 0), (1, 1), (2, 2)]


def test_auto_follows_what_was_dropped_and_what_the_teacher_lost(tiny_model):
    whole, parent, student = (tiny_model(blocks=6) for _ in range(3))
    keep_blocks(parent.network, [0, 1, 3, 5])
    keep_blocks(student.network, [0, 1, 3, 5])
    keep_blocks(student.network, [0, 2, 3])
    assert layer_map(student.anatomy, whole.anatomy, "auto") == [(0, 0), (1, 3), (2, 5)]
    assert layer_map(student.anatomy, parent.anatomy, "auto") == [(0, 0), (1, 2), (2, 3)]
    assert layer_map(student.anatomy, whole.anatomy, "uniform") == [(0, 1), (1, 3), (2, 5)]
    assert layer_map(student.anatomy, whole.anatomy, "last") == [(2, 5)]


def test_auto_is_uniform_where_the_teacher_is_no_ancestor(tiny_model):
    student, deep, lacking = tiny_model(blocks=3), tiny_model(blocks=6), tiny_model(blocks=6)
    assert layer_map(student.anatomy, deep.anatomy, "auto") == [(0, 1), (1, 3), (2, 5)]
    cut = tiny_model(blocks=6)
    keep_blocks(cut.network, [0, 1, 2])
    keep_blocks(lacking.network, [0, 4, 5])
    assert layer_map(cut.anatomy, lacking.anatomy, "auto") == [(0, 0), (1, 1), (2, 2)]


def test_the_stacks_of_an_encoder_decoder_are_mapped_apart(tiny_model):
    teacher, student = tiny_model("t5", blocks=3), tiny_model("t5", blocks=3)
    keep_blocks(student.network, [0, 2, 3, 4, 5])
    assert layer_map(student.anatomy, teacher.anatomy, "auto") == [(0, 0), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert layer_map(student.anatomy, teacher.anatomy, "last") == [(1, 2), (4, 5)]
    with pytest.raises(ModelError, match="pairs the encoder with the decoder"):
        layer_map(student.anatomy, teacher.anatomy, [[0, 3]])
    with pytest.raises(ModelError, match="below 5 and 6"):
        layer_map(student.anatomy, teacher.anatomy, [[5, 5]])


# --- capture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_seen_is_what_the_attention_reads(family, tiny_model, rows_of):
    """The value relations of a head equal those of the unfused values; states are those of a plain run."""
    model = tiny_model(family)
    task = TASKS[model.task]
    batch = task.collate([dict(row) for row in encoded(model, rows_of(model.task)[:3])], model.tokenizer)
    given = task.inputs(model.network, batch)
    anatomy = model.anatomy
    layers = range(len(anatomy.blocks) * anatomy.repeats)
    model.network.eval()
    with torch.no_grad(), watching(anatomy, layers, True, True) as seen:
        model.network(**given)
    for layer in layers:
        block = anatomy.blocks[0 if anatomy.repeats > 1 else layer]
        queries, keys, values = seen.parts(layer)
        size = block.attention.head_size
        assert queries.shape[-1] == block.attention.heads * size
        assert keys.shape[-1] == values.shape[-1] == block.attention.key_value_heads * size
        assert queries.shape[:2] == seen.state(layer).shape[:2]
        assert seen.state(layer).shape[-1] == anatomy.hidden_size
    assert len({float(seen.state(layer).sum()) for layer in layers}) == len(layers)


def test_fused_parts_are_the_heads_that_surgery_knows(tiny_model):
    """Without its second head, a block gives the other heads' queries, keys and values, whatever module fuses them."""
    for family in ("gpt2", "gpt_neox", "modernbert"):
        whole, cut = tiny_model(family), tiny_model(family)
        for block in cut.anatomy.blocks[:1]:
            keep_heads(block.attention, [0, 2, 3])
        size = whole.anatomy.blocks[0].attention.head_size
        kept = [head * size + offset for head in (0, 2, 3) for offset in range(size)]
        ids = torch.tensor([[5, 6, 7, 8]])
        found = []
        for model in (whole, cut):
            with torch.no_grad(), watching(model.anatomy, [0], False, True) as seen:
                model.network.eval()(input_ids=ids)
            found.append(seen.parts(0))
        for before, after in zip(*found, strict=True):
            torch.testing.assert_close(before[..., kept], after)


# --- training ------------------------------------------------------------------------------------------------------


def _losses(student, teacher, rows, options):
    imitation = Imitation(student, Tutor(teacher.network.eval()), options, 1e-3, 0)
    task = TASKS[student.task]
    batch = task.collate([dict(row) for row in encoded(student, rows)], student.tokenizer)
    student.network.eval()
    with torch.no_grad(), imitation.around(batch):
        student.network(**task.inputs(student.network, batch))
        return float(imitation.penalty())


@pytest.mark.parametrize("family", ["bert", "albert", "deberta-v2", "modernbert", "gpt2", "llama", "t5", "bart"])
def test_zero_for_a_twin_and_above_for_another(family, tiny_model, rows_of):
    options = Distillation(hidden=1.0, attention=1.0)
    student, teacher = tiny_model(family), tiny_model(family)
    rows = rows_of(student.task)[:4]
    assert _losses(student, teacher, rows, options) == pytest.approx(0, abs=1e-6)
    for matrix in student.anatomy.matrices:
        matrix.weight.mul_(0.5)
    assert _losses(student, teacher, rows, options) > 1e-4


def test_fewer_heads_and_features_learn_through_relation_heads_and_a_projection(tiny_model, rows):
    teacher, student = tiny_model(blocks=3), tiny_model(blocks=3)
    for block in student.anatomy.blocks:
        keep_heads(block.attention, [0, 1, 2])
    keep_hidden(student.network, torch.arange(24))
    shorten(student, rows, remove=1, rows=20)
    options = {"hidden": 1.0, "attention": 1.0, "weight": 0.5}
    training = finetune(student, rows[:24], rows[24:40], teacher=teacher, distill=options, **SETTINGS)
    assert training.facts["relation_heads"] == [4, 4]  # of 24 and 32 features
    assert training.facts["taught_through"] == "a learned projection, 24 → 32"
    origins = [block.origin.index for block in student.anatomy.blocks]
    assert training.facts["taught_layers"] == [[0, origins[0]], [1, origins[1]]]


@pytest.mark.parametrize("part", ["hidden", "attention"])
def test_training_brings_the_student_nearer(part, tiny_model, rows):
    teacher, student = tiny_model(blocks=3), tiny_model(blocks=3)
    keep_blocks(student.network, [0, 2])
    options = Distillation(**{part: 1.0})
    before = _losses(student, teacher, rows[40:], options)
    settings = SETTINGS | {"epochs": 6}
    finetune(student, rows[:40], rows[40:], teacher=teacher, distill={part: 20.0, "weight": 0.1}, **settings)
    student.network.cpu()
    assert _losses(student, teacher, rows[40:], options) < 0.8 * before


def test_relation_heads_that_divide_nothing_are_refused(tiny_model, rows):
    with pytest.raises(ModelError, match="relation_heads: 5 does not divide 32"):
        finetune(
            tiny_model(), rows[:8], rows[8:16], teacher=tiny_model(), distill={"attention": 1.0, "relation_heads": 5}
        )


def test_a_teacher_of_other_stacks_is_refused(tiny_model):
    with pytest.raises(ModelError, match="the student has encoder, the teacher decoder"):
        layer_map(tiny_model("bert").anatomy, tiny_model("gpt2").anatomy, "auto")
