"""One suite over every method and family: what a method promises, whatever it is applied to."""

import itertools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moss_rlhf
from moss_rlhf.errors import ModelError
from moss_rlhf.files import read_json
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.config import KEY
from moss_rlhf.model.grid import quantized_tables, round_to_int8
from moss_rlhf.model.runtime import TorchRuntime
from moss_rlhf.model.vocabulary import ids_in
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.batching import batches_of, padding_of
from moss_rlhf.tasks.loading import encoded

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINING = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "precision": "float32"}
ENCODERS = [name for name, family in FAMILIES.items() if family.kind == "encoder"]
ANSWERED = 3  # rows of unequal length, which a trimmed vocabulary holds and most others it does not
TIMES = ("measured", "seconds", "examples_per_second")  # facts that differ from run to run


def train(model, rows):
    return moss_rlhf.finetune(model, rows[:16], rows[:8], **TRAINING)


# --- what each method is asked for, and how one sees that it did it -------------------------------------------------


@dataclass(frozen=True)
class Method:
    """`apply` works on a model in place and returns the facts; `target` asserts that they were met.

    target         of the model as it was, as it is, and the facts.
    same_answers   the network answers as before.
    """

    apply: Callable
    target: Callable
    same_answers: bool = False


def finetuned(old, model, _):
    assert model.anatomy.shapes == old.anatomy.shapes
    assert not any(torch.equal(matrix.weight, was.weight) for matrix, was in matrices(model, old))


def narrowed(old, model, _):
    halves = [
        replace(shape, heads=2, feed_forward=32, cross_heads=shape.cross_heads // 2) for shape in old.anatomy.shapes
    ]
    assert model.anatomy.shapes == tuple(halves)


def half_pruned(old, model, _):
    assert model.anatomy.shapes == old.anatomy.shapes
    for matrix, was in matrices(model, old):
        assert int((matrix.weight == 0).sum()) == matrix.weight.numel() // 2
        assert bool(((matrix.weight == 0) | (matrix.weight == was.weight)).all())


def on_the_grid(old, model, _):
    assert str(model.quantization) == "int8"
    assert model.anatomy.shapes == old.anatomy.shapes
    for matrix in (*model.anatomy.matrices, *quantized_tables(model.network)):
        assert torch.equal(round_to_int8(matrix.weight.detach()), matrix.weight), matrix.name


def shortened(old, model, facts):
    """One block less; every other one is what it was, but for the one that a merge put its neighbour into."""
    kept = [block for index, block in enumerate(old.anatomy.blocks) if [index] != facts["dropped"]]
    assert len(model.anatomy.blocks) == len(kept) == len(old.anatomy.blocks) - 1
    assert model.parameters < old.parameters
    blocks = {block.name: block for block in old.anatomy.blocks}
    ((base, names),) = facts.get("merged", {None: ()}).items() or [(None, ())]
    for block, was in zip(model.anatomy.blocks, kept, strict=True):
        members = [blocks[name] for name in names] if was.name == base else [was]
        for position, matrix in enumerate(block.matrices):
            expected = MERGED[facts["how"]]([member.matrices[position].weight for member in members], was, position)
            assert expected is None or torch.allclose(matrix.weight, expected, rtol=1e-6, atol=1e-7), matrix.name


def refitted(weights, base, position):
    """Least squares changes what writes into the stream, by as much as the rows ask for."""
    if len(weights) > 1 and base.matrices[position] in [part.matrices[-1] for part in base.parts]:
        return None
    return base.matrices[position].weight


MERGED = {
    "drop": lambda weights, *_: weights[0],
    "merge_average": lambda weights, *_: sum(weight.double() for weight in weights).div(len(weights)).float(),
    "merge_collapse": lambda weights, *_: weights[-1],  # of two, θ₁ + (θ₂ − θ₁)
    "merge_least_squares": refitted,
}


def trimmed(old, model, facts):
    assert model.anatomy.shapes == old.anatomy.shapes
    size = model.network.get_input_embeddings().num_embeddings
    assert size == len(model.tokenizer) == model.network.config.vocab_size < len(old.tokenizer)
    assert size % 8 == 0
    assert facts["corpora"]["texts_same"] == 1


def scored(old, model, facts):
    assert all(torch.equal(*pair) for pair in zip(model.network.parameters(), old.network.parameters(), strict=True))
    table = facts["table"]
    assert list(table["matrices"]) == [matrix.name for matrix in model.anatomy.matrices]
    assert list(table["blocks"]) == [block.name for block in model.anatomy.blocks]
    for block in model.anatomy.blocks:
        scores = table["blocks"][block.name]
        assert (len(scores["heads"]), len(scores["feed_forward"])) == (block.attention.units, block.feed_forward.width)
        assert all(score >= 0 for score in [scores["drop"], *scores["heads"], *scores["feed_forward"]])


def shorten_by(how):
    return Method(lambda model, rows: moss_rlhf.shorten(model, rows, how=how, rows=8), shortened)


METHODS = {
    "finetune": Method(lambda model, rows: train(model, rows).facts, finetuned),
    "narrow": Method(lambda model, rows: moss_rlhf.narrow(model, rows, heads=0.5, feed_forward=0.34, rows=8), narrowed),
    "prune": Method(lambda model, rows: moss_rlhf.prune(model, sparsity=0.5), half_pruned),
    "quantize": Method(lambda model, rows: moss_rlhf.quantize(model), on_the_grid),
    "shorten": shorten_by("drop"),
    "merge_average": shorten_by("merge_average"),
    "merge_collapse": shorten_by("merge_collapse"),
    "merge_least_squares": shorten_by("merge_least_squares"),
    "trim_vocabulary": Method(
        lambda model, rows: moss_rlhf.trim_vocabulary(model, rows[:ANSWERED], characters="seen"),
        trimmed,
        same_answers=True,
    ),
    "sensitivity": Method(lambda model, rows: moss_rlhf.sensitivity(model, rows, rows=8), scored, same_answers=True),
}
SHORTENING = [name for name, method in METHODS.items() if method.target is shortened]
CASES = [
    case for case in itertools.product(METHODS, FAMILIES) if not (case[0] in SHORTENING and FAMILIES[case[1]].shared)
]


# --- what is looked at ----------------------------------------------------------------------------------------------


def matrices(model, old):
    return zip(model.anatomy.matrices, old.anatomy.matrices, strict=True)


def state_of(model):
    """All of a model that a method may change, as values that can be compared."""
    pruned = {id(parameter) for parameter in model.pruned}
    return {
        "weights": {name: value.clone() for name, value in model.network.state_dict().items()},
        "zeros": {name: value == 0 for name, value in model.network.named_parameters() if id(value) in pruned},
        "vocabulary": model.tokenizer.get_vocab() if model.tokenizer.is_fast else model.tokenizer,
        "rest": deepcopy((model.anatomy.shapes, str(model.quantization), model.sensitivity)),
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def assert_same(found, expected):
    assert_equal(found["weights"], expected["weights"])
    assert_equal(found["zeros"], expected["zeros"])
    assert found["vocabulary"] == expected["vocabulary"]
    assert found["rest"] == expected["rest"]


@torch.no_grad()
def answers(model, rows, network=None):
    """Logits of a padded batch: (rows, classes), or (rows, length, vocabulary) of a model that speaks."""
    task, network = TASKS[model.task], (network or model.network).eval()
    batch = task.collate(list(encoded(model, rows[:ANSWERED])), model.tokenizer)
    return network(**task.inputs(network, batch)).logits


def in_the_old_vocabulary(logits, model, old):
    """The old model's logits of the tokens that the new one has, in its order."""
    if TASKS[model.task].has_classes:
        return logits
    return logits[..., torch.from_numpy(ids_in(model.tokenizer.get_vocab(), old.tokenizer.get_vocab()))]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def with_zeros(tiny_model):
    """`with_zeros(family)` → a fresh model whose down projections have lost every other row to pruning."""

    def build(family):
        model = tiny_model(family)
        model.pruned = [block.feed_forward.down.parameter for block in model.anatomy.blocks]
        model.pruned = list({id(parameter): parameter for parameter in model.pruned}.values())
        for block in model.anatomy.blocks:
            block.feed_forward.down.weight[::2] = 0
        return model

    return build


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), CASES)
def test_contract(name, family, with_zeros, rows_of, tmp_path):
    method, old = METHODS[name], with_zeros(family)
    rows = rows_of(old.task)[:16]
    given, runs = deepcopy(rows), []
    for seed in (0, 1):  # of the process: the methods have their own
        model = with_zeros(family)
        torch.manual_seed(seed)
        facts = method.apply(model, rows)
        assert rows == given
        facts = {key: value for key, value in facts.items() if key not in TIMES}
        runs.append((state_of(model), facts))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    method.target(old, model, facts)
    assert all(bool((block.feed_forward.down.weight[::2] == 0).all()) for block in model.anatomy.blocks)

    logits, before = answers(model, rows), in_the_old_vocabulary(answers(old, rows), model, old)
    assert logits.shape == before.shape
    assert {value.dtype for value in (logits, *model.network.parameters())} == {torch.float32}
    assert bool(logits.isfinite().all())
    assert torch.allclose(logits, before, rtol=0, atol=2e-6) == method.same_answers
    loaded = _saved_and_loaded(model, rows, logits, tmp_path / "saved")
    _trained_further(loaded, rows)


def _saved_and_loaded(model, rows, logits, place):
    """Ours is the same; so is plain transformers', or it says who can load it."""
    moss_rlhf.save(model, place)
    loaded = moss_rlhf.load(place)
    assert (loaded.labels, loaded.task) == (model.labels, model.task)
    assert_same(state_of(loaded), state_of(model))
    assert torch.allclose(answers(loaded, rows), logits, rtol=0, atol=1e-6)
    auto_class = TASKS[model.task].auto_class()
    if "shapes" in read_json(place / "config.json")[KEY]:
        with pytest.raises(Exception, match=r"moss_rlhf\.load"):
            auto_class.from_pretrained(place)
    else:
        assert torch.allclose(answers(model, rows, auto_class.from_pretrained(place)), logits, rtol=0, atol=1e-6)
    return loaded


def _trained_further(model, rows):
    """Fine-tuning keeps shapes and zeros, and moves weights; a quantized model is not trained."""
    before = state_of(model)
    if model.quantization:
        with pytest.raises(ModelError, match="quantized already"):
            train(model, rows)
        return
    train(model, rows)
    after = state_of(model)
    assert after["rest"][0] == before["rest"][0]
    assert_equal(after["zeros"], before["zeros"])
    assert any(not torch.equal(value, before["weights"][name]) for name, value in after["weights"].items())


# --- what is refused ------------------------------------------------------------------------------------------------


def quantized(model):
    moss_rlhf.quantize(model)


def with_a_tokenizer_in_python(model):
    model.tokenizer = SimpleNamespace(is_fast=False)  # as MarianTokenizer, which reads SentencePiece


REFUSED = [
    *((name, "albert", None, "share one block") for name in SHORTENING),
    ("trim_vocabulary", "marian", with_a_tokenizer_in_python, r"has no tokenizer\.json.*leave this stage out"),
    *((name, family, quantized, "quantized already") for name in METHODS for family in ("bert", "llama", "t5")),
]


@pytest.mark.parametrize(("name", "family", "spoil", "message"), REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(name, family, spoil, message, with_zeros, rows_of):
    model = with_zeros(family)
    if spoil is not None:
        spoil(model)
    before = state_of(model)
    with pytest.raises(ModelError, match=message):
        METHODS[name].apply(model, rows_of(model.task))
    assert_same(state_of(model), before)


# --- what leaves the house ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "family"),
    [
        (("prune", "narrow", "shorten", "quantize"), "bert"),
        *(
            pytest.param(methods, family, marks=pytest.mark.slow)
            for methods, family in itertools.product(
                [("finetune",), ("narrow", "shorten"), ("prune", "narrow", "shorten", "quantize")], ENCODERS
            )
            if (len(methods), family) != (4, "bert") and ("shorten" not in methods or family != "albert")
        ),
    ],
)
def test_exported_file_answers_as_the_network_does(methods, family, tiny_model, rows, tmp_path):
    """Float32 within rounding; int8 as PyTorch does when what enters each quantized layer is rounded to 8 bits."""
    model = tiny_model(family)
    for method in methods:
        METHODS[method].apply(model, rows)
    moss_rlhf.export(model, tmp_path / "onnx")
    session = _session(tmp_path / "onnx" / "model.onnx")
    if model.quantization:
        for matrix in model.anatomy.matrices:
            matrix.module.register_forward_pre_hook(lambda _, inputs: (_rounded_to_8_bits(inputs[0]),))
    tokens = [model.tokenizer(row["text"]) for row in rows[:6]]
    (whole,) = batches_of(tokens, len(tokens), padding_of(model.tokenizer))
    for count in (1, 5):  # batch and length are free
        batch = {name: values[:count] for name, values in whole.items()}
        expected = TorchRuntime(model.network).run(batch)
        # a value on the edge between two codes may fall to either side: one of 255 steps, in one place
        (exported,) = session.run(None, {value.name: batch[value.name] for value in session.get_inputs()})
        np.testing.assert_allclose(exported, expected, atol=0.01 if model.quantization else 1e-4)


def _session(place):
    import onnxruntime

    return onnxruntime.InferenceSession(str(place), providers=["CPUExecutionProvider"])


def _rounded_to_8_bits(values):
    """DynamicQuantizeLinear of the ONNX standard, and back."""
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round().clamp(0, 255)
    return (((values / scale).round() + zero).clamp(0, 255) - zero) * scale
