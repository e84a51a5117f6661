import math

import pytest
import torch
from test_merging import SINGLE, batches_of, silence

import moss_rlhf
from moss_rlhf import quantize, shorten
from moss_rlhf.errors import ModelError, UserError
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.checkpoint import load_checkpoint, save_checkpoint
from moss_rlhf.model.surgery import keep_blocks, keep_feed_forward
from moss_rlhf.optimization.calibration import calibration_rows, mean_loss
from moss_rlhf.optimization.layer_scores import angular_distance, block_influence, span_distances
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

MERGES = ("merge_average", "merge_collapse", "merge_least_squares")
families = pytest.mark.parametrize("family", SINGLE)


def trainable(tiny_model, rows_of, family, **sizes):
    """(a model, rows of its task); skips while the task has no file yet."""
    model = tiny_model(family, **sizes)
    if model.task not in TASKS:
        pytest.skip(f"no task {model.task} yet")
    return model, rows_of(model.task)


def state(model):
    return {name: value.clone() for name, value in model.network.state_dict().items()}


def unchanged(model, before):
    after = model.network.state_dict()
    return before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


# --- scores


@pytest.mark.parametrize(
    ("before", "after", "distance", "influence"),
    [
        ([1.0, 0.0], [5.0, 0.0], 0.0, 0.0),  # length does not matter
        ([1.0, 0.0], [0.0, 2.0], 0.5, 1.0),
        ([1.0, 0.0], [-3.0, 0.0], 1.0, 2.0),
        ([1.0, 0.0], [1.0, 1.0], 0.25, 1 - math.sqrt(0.5)),
        ([1.0, 1.0], [1.0, math.sqrt(3)], 1 / 12, 1 - math.cos(math.pi / 12)),  # 45° and 60°
    ],
)
def test_distances_by_hand(before, after, distance, influence):
    states = torch.tensor([[before]]), torch.tensor([[after]])
    assert angular_distance(*states).shape == block_influence(*states).shape == (1, 1)
    assert float(angular_distance(*states)) == pytest.approx(distance, abs=1e-7)
    assert float(block_influence(*states)) == pytest.approx(influence, abs=1e-7)


@families
def test_distances_are_those_of_what_enters_and_leaves_without_padding(tiny_model, family):
    """Against each text run alone, where there is no padding to leave out."""
    model = tiny_model(family, blocks=4)
    blocks, batches = model.anatomy.blocks, batches_of(model)
    spans = [(0,), (2,), (1, 2), tuple(range(len(blocks) - 2, len(blocks)))]
    entered, left = ({index: [] for index in range(len(blocks))} for _ in range(2))

    def hook(index):
        def record(_, args, kwargs, output):
            entered[index].append((args[0] if args else kwargs["hidden_states"])[0])
            left[index].append((output[0] if isinstance(output, tuple) else output)[0])

        return record

    handles = [block.module.register_forward_hook(hook(index), with_kwargs=True) for index, block in enumerate(blocks)]
    for inputs, labels in batches:
        for row, target in enumerate(labels):
            length = int(inputs["attention_mask"][row].sum())
            assert length == int((target != -100).sum())
            with torch.no_grad():
                model.network.eval()(**{name: value[row : row + 1, :length] for name, value in inputs.items()})
    for handle in handles:
        handle.remove()
    for distance in (angular_distance, block_influence):
        found = span_distances(model.network, batches, spans, distance)
        for span, value in zip(spans, found, strict=True):
            expected = distance(torch.cat(entered[span[0]]), torch.cat(left[span[-1]])).mean()
            assert value == pytest.approx(float(expected), abs=2e-5)


@pytest.mark.parametrize("score", ["angular", "block_influence"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "gpt_neox"])
def test_a_block_that_is_the_identity_has_no_influence(tiny_model, family, score):
    model = tiny_model(family)
    silence(model.anatomy.blocks[1])
    distance = {"angular": angular_distance, "block_influence": block_influence}[score]
    found = span_distances(model.network, batches_of(model), [(0,), (1,), (2,)], distance)
    assert found[1] == pytest.approx(0, abs=1e-7)
    assert min(found[0], found[2]) > 0.01


def test_states_that_are_not_finite_are_refused(tiny_model):
    model = tiny_model()
    model.anatomy.blocks[1].feed_forward.down.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"block\.1 is not finite"):
        span_distances(model.network, batches_of(model), [(0,), (1,)], block_influence)


# --- dropping


def loss_with(tiny_model, rows, kept):
    model = tiny_model(blocks=4)
    keep_blocks(model.network, kept)
    return mean_loss(model, encoded(model, rows))


def test_the_block_goes_whose_loss_is_lowest_one_after_the_other(tiny_model, rows):
    model = tiny_model(blocks=4)
    facts = shorten(model, rows, remove=2, score="loss")
    left, rounds = [0, 1, 2, 3], []
    for _ in range(2):
        losses = {gone: loss_with(tiny_model, rows, [block for block in left if block != gone]) for gone in left}
        rounds.append({f"loss without block {gone}": pytest.approx(loss, abs=1e-6) for gone, loss in losses.items()})
        left.remove(min(losses, key=losses.get))
    assert facts["scores"] == rounds
    assert facts["dropped"] == sorted({0, 1, 2, 3} - set(left))
    assert facts["loss"] == pytest.approx(loss_with(tiny_model, rows, left), abs=1e-6)
    assert facts["loss"] == pytest.approx(mean_loss(model, encoded(model, rows)), abs=1e-6)
    assert model.network.config.num_hidden_layers == len(model.anatomy.blocks) == 2
    assert facts["layers"] == "4 → 2"
    assert facts["faster_here"] == "yes: 2 of 4 blocks are not computed any more"


def test_neighbours_that_turn_least_go(tiny_model, rows):
    model = tiny_model(blocks=4)
    facts = shorten(model, rows, remove=2, score="angular")
    assert len(facts["scores"][0]) == 3
    lowest = min(facts["scores"][0], key=facts["scores"][0].get)
    assert lowest == f"angle over blocks {facts['dropped'][0]}–{facts['dropped'][1]}"
    assert len(model.anatomy.blocks) == 2


def test_blocks_of_least_influence_go(tiny_model, rows):
    model = tiny_model(blocks=4)
    facts = shorten(model, rows, remove=2, score="block_influence")
    ranked = sorted(facts["scores"][0], key=facts["scores"][0].get)
    assert len(ranked) == 4
    assert sorted(f"influence of block {index}" for index in facts["dropped"]) == sorted(ranked[:2])


@pytest.mark.parametrize("score", ["angular", "block_influence"])
def test_blocks_that_do_nothing_are_found(tiny_model, rows, score):
    model = tiny_model(blocks=4)
    modules = [block.module for block in model.anatomy.blocks]
    with torch.no_grad():
        for index in (1, 2):  # after a plain norm, adding nothing and norming again changes nothing
            silence(model.anatomy.blocks[index])
            norms = (modules[0].output, modules[index].attention.output, modules[index].output)
            for norm in (part.LayerNorm for part in norms):
                norm.weight.fill_(1), norm.bias.zero_()
    facts = shorten(model, rows, remove=2, score=score, rows=8)
    assert facts["dropped"] == [1, 2]
    assert min(facts["scores"][0].values()) < 1e-4


# --- merging


@pytest.mark.parametrize("how", MERGES)
def test_the_pair_is_merged_whose_loss_is_lowest(tiny_model, rows, how):
    model = tiny_model(blocks=4)
    facts = shorten(model, rows, how=how)
    (losses,) = facts["scores"]
    assert list(losses) == [f"loss with blocks {index}–{index + 1} merged" for index in range(3)]
    assert facts["loss"] == min(losses.values())
    assert facts["loss"] == pytest.approx(mean_loss(model, encoded(model, rows)), abs=1e-6)
    ((base, members),) = facts["merged"].items()
    best = min(losses, key=losses.get)
    assert best == f"loss with blocks {members[0][-1]}–{members[1][-1]} merged"
    assert base in members
    assert facts["dropped"] == [int(name[-1]) for name in members if name != base]
    assert len(model.anatomy.blocks) == 3


@pytest.mark.parametrize(("how", "weights"), [("merge_average", (0.5, 0.5)), ("merge_collapse", (0.0, 1.0))])
def test_merged_weights_by_hand(tiny_model, rows, how, weights):
    """θ₁ + (θ₂ − θ₁) is θ₂: of two blocks the collapse is the later one."""
    model, old = tiny_model(blocks=2), tiny_model(blocks=2)
    shorten(model, rows, how=how)
    (merged,), pair = model.anatomy.blocks, old.anatomy.blocks
    first, second = (dict(block.module.named_parameters()) for block in pair)
    for name, parameter in merged.module.named_parameters():
        expected = weights[0] * first[name].data + weights[1] * second[name].data
        torch.testing.assert_close(parameter.data, expected, rtol=1e-6, atol=1e-6)


def test_what_was_merged_can_be_merged_again_from_the_old_weights(tiny_model, rows):
    model, old = tiny_model(blocks=3), tiny_model(blocks=3)
    facts = shorten(model, rows, remove=2, how="merge_average")
    assert facts["merged"] == {"block.0": ["block.0", "block.1", "block.2"]}
    expected = sum(block.feed_forward.down.weight.double() for block in old.anatomy.blocks) / 3
    found = model.anatomy.blocks[0].feed_forward.down.weight
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("score", ["angular", "block_influence"])
@pytest.mark.parametrize("how", MERGES)
def test_chosen_blocks_become_one_with_the_block_below(tiny_model, rows, how, score):
    dropped = shorten(tiny_model(blocks=4), rows, score=score)["dropped"]
    facts = shorten(tiny_model(blocks=4), rows, score=score, how=how)
    (members,) = facts["merged"].values()
    lower = max(dropped[0] - 1, 0)
    assert members == [f"block.{lower}", f"block.{lower + 1}"]


def test_auto_keeps_the_way_of_lowest_loss_on_rows_it_did_not_see(tiny_model, rows):
    model = tiny_model(blocks=4)
    sample = calibration_rows(encoded(model, rows), 40, 3)
    held_out = sample.select(range(0, 40, 4))
    facts = shorten(model, rows, how="auto", rows=40, seed=3)
    assert set(facts["candidates"]) == {"drop", *MERGES}
    assert facts["how"] == min(facts["candidates"], key=facts["candidates"].get)
    assert facts["loss"] == facts["candidates"][facts["how"]] == pytest.approx(mean_loss(model, held_out), abs=1e-6)
    assert facts["loss_before"] == pytest.approx(mean_loss(tiny_model(blocks=4), held_out), abs=1e-6)
    assert (facts["rows_scored"], facts["rows_held_out"]) == (30, 10)


def test_a_threshold_of_similarity_stops_merges(tiny_model, rows):
    model = tiny_model(blocks=4)
    before = state(model)
    with pytest.raises(ModelError, match=r"as similar as 0\.9999; the best reaches 0\.\d+\. Give a lower"):
        shorten(model, rows, how="merge_collapse", similarity=0.9999)
    assert unchanged(model, before)
    facts = shorten(model, rows, how="merge_collapse", similarity=0.01)
    alike = {name: value for name, value in facts["scores"][0].items() if name.startswith("similarity")}
    assert len(alike) == 3
    assert all(-1 <= value < 1 for value in alike.values())


def test_only_similar_enough_merges_are_taken(tiny_model, rows):
    """With the threshold between the best similarity and the others', the best one is taken, whatever its loss."""
    facts = shorten(tiny_model(blocks=4), rows, how="merge_average", similarity=0.001)
    alike = {name[11:]: value for name, value in facts["scores"][0].items() if name.startswith("similarity")}
    most, second = sorted(alike, key=alike.get, reverse=True)[:2]
    facts = shorten(tiny_model(blocks=4), rows, how="merge_average", similarity=(alike[most] + alike[second]) / 2)
    ((_, members),) = facts["merged"].items()
    assert most == f"with blocks {members[0][-1]}–{members[1][-1]} merged"


# --- stacks and families


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_every_kind_saves_and_loads_what_auto_found(tiny_model, rows_of, tmp_path, family):
    """Each way by itself, of every family, is in tests/contract."""
    model, rows = trainable(tiny_model, rows_of, family)
    depth = len(model.anatomy.blocks)
    facts = shorten(model, rows, how="auto", score="block_influence", rows=12)
    assert len(model.anatomy.blocks) == depth - 1
    assert len(facts["dropped"]) == 1
    assert "yes" in facts["faster_here"] or "a little" in facts["faster_here"]
    save_checkpoint(model, tmp_path / "short")
    again = load_checkpoint(tmp_path / "short", TASKS[model.task].auto_class())
    for inputs, _ in batches_of(model):
        with torch.no_grad():
            found, expected = again.network(**inputs).logits, model.network(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", ["drop", "merge_collapse"])
@pytest.mark.parametrize("family", ["t5", "mt5", "bart", "marian"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_only_the_stack_asked_for_loses_blocks(tiny_model, rows_of, family, stack, how):
    model, rows = trainable(tiny_model, rows_of, family)
    facts = shorten(model, rows, remove=2, how=how, stack=stack, rows=8)
    left = {name: len(model.anatomy.stack(name)) for name in ("encoder", "decoder")}
    assert left == {"encoder": 3, "decoder": 3} | {stack: 1}
    assert facts["faster_here"].startswith("a little" if stack == "encoder" else "yes")


def test_the_first_block_of_modernbert_stays(tiny_model, rows):
    model = tiny_model("modernbert")
    first = model.anatomy.blocks[0].module
    facts = shorten(model, rows, remove=2)
    assert facts["dropped"] == [1, 2]
    assert model.anatomy.blocks[0].module is first
    merged = tiny_model("modernbert")
    facts = shorten(merged, rows, how="merge_average")
    assert facts["merged"] == {"block.1": ["block.1", "block.2"]}
    with pytest.raises(ModelError, match=r"can't remove 2 of 3 layers.*Give 1 to 1"):
        shorten(tiny_model("modernbert"), rows, remove=2, how="merge_average")
    with pytest.raises(ModelError, match="of 2 layers none can be merged"):
        shorten(tiny_model("modernbert", blocks=2), rows, how="merge_average")
    facts = shorten(tiny_model("modernbert", blocks=2), rows, how="auto")
    assert facts["how"] == "drop"
    assert set(facts["impossible"]) == set(MERGES)


# --- masks


@pytest.mark.parametrize("how", MERGES)
def test_zeros_that_merged_blocks_share_stay_pruned(tiny_model, rows, tmp_path, how):
    model = tiny_model(blocks=2)
    model.pruned = [matrix.parameter for block in model.anatomy.blocks for matrix in block.matrices]
    for parameter in model.pruned:
        parameter.data[:, ::2] = 0
    shorten(model, rows, how=how)
    assert len(model.pruned) == 6
    assert all((parameter[:, ::2] == 0).all() for parameter in model.pruned)
    assert all((parameter[:, 1::2] != 0).all() for parameter in model.pruned)
    save_checkpoint(model, tmp_path / "pruned")
    assert len(load_checkpoint(tmp_path / "pruned", TASKS[model.task].auto_class()).pruned) == 6


def test_zeros_that_merging_fills_are_told(tiny_model, rows):
    model = tiny_model(blocks=2)
    first, second = (block.feed_forward.down.parameter for block in model.anatomy.blocks)
    first.data[:3] = 0  # 3 · 48
    second.data[3:] = 0
    model.pruned = [first, second]
    facts = shorten(model, rows, how="merge_average")
    assert facts["pruned_zeros"].startswith("144 → 0")
    assert facts["no_longer_pruned"] == 1
    assert model.pruned == []


def test_dropped_parameters_are_pruned_no_longer(tiny_model, rows):
    model = tiny_model()
    model.pruned = [block.feed_forward.down.parameter for block in model.anatomy.blocks]
    for parameter in model.pruned:
        parameter.data[0] = 0
    shorten(model, rows, remove=2)
    assert len(model.pruned) == 1
    assert model.pruned[0] is model.anatomy.blocks[0].feed_forward.down.parameter


# --- what is refused


@pytest.mark.parametrize("how", ["drop", *MERGES, "auto"])
@pytest.mark.parametrize("remove", [0, -1, 3, 4])
def test_one_must_go_and_one_must_stay(tiny_model, rows, remove, how):
    few = rf"shorten\.remove: {remove} can't be used; it must be greater than or equal to 1"
    with pytest.raises(UserError, match=few if remove < 1 else f"can't remove {remove} of 3 layers.*Give 1 to 2"):
        shorten(tiny_model(), rows, remove=remove, how=how)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"how": "merge_colapse"}, "how: 'merge_colapse' can't be used; .*'merge_collapse'"),
        ({"score": "angle"}, "score: 'angle' can't be used; it must be 'loss'"),
        ({"stack": "both"}, "stack: 'both' can't be used"),
        ({"stack": "decoder"}, "no decoder, only one encoder"),
        ({"similarity": 1.5, "how": "merge_average"}, r"similarity: 1\.5 can't be used"),
        ({"similarity": 0.5}, "how is drop"),
        ({"rows": 0}, "rows: 0 can't be used; it must be greater than or equal to 1"),
    ],
)
def test_wrong_arguments_are_named(tiny_model, rows, given, message):
    model = tiny_model()
    before = state(model)
    with pytest.raises(UserError, match=message):
        shorten(model, rows, **given)
    assert unchanged(model, before)


@pytest.mark.parametrize("score", ["loss", "angular"])
def test_blocks_of_unequal_shapes_are_not_merged_by_their_weights(tiny_model, rows, score):
    model = tiny_model(blocks=2)
    keep_feed_forward(model.anatomy.blocks[0], torch.arange(40))
    before = state(model)
    for how in ("merge_average", "merge_collapse"):
        with pytest.raises(ModelError, match=r"equal shapes.*block\.0 and block\.1.*Drop instead"):
            shorten(model, rows, how=how, score=score)
        assert unchanged(model, before)
    facts = shorten(model, rows, how="auto", score=score)
    assert set(facts["candidates"]) == {"drop", "merge_least_squares"}
    assert set(facts["impossible"]) == {"merge_average", "merge_collapse"}


@pytest.mark.parametrize("how", ["drop", "auto"])
def test_shared_layers_are_not_shortened(tiny_model, rows, how):
    assert FAMILIES["albert"].shared
    with pytest.raises(ModelError, match=r"share one block.*Narrow, prune or quantize"):
        shorten(tiny_model("albert"), rows, how=how)


def test_a_loss_that_is_never_finite_is_refused(tiny_model, rows):
    model = tiny_model()
    model.network.classifier.weight.data.fill_(3e38)  # finite, and overflows
    for how in ("drop", "auto"):
        with pytest.raises(ModelError, match="not finite whatever is taken out"):
            shorten(model, rows, how=how)
    broken = tiny_model()
    broken.anatomy.blocks[0].attention.output.weight.fill_(3e38)
    with pytest.raises(ModelError, match=r"blocks 0–1 can't be merged.*finite"):
        shorten(broken, rows, how="merge_least_squares")


def test_a_quantized_model_is_not_shortened(tiny_model, rows):
    model = tiny_model()
    quantize(model)
    with pytest.raises(ModelError, match="quantized already"):
        shorten(model, rows)


def test_it_is_a_public_name():
    assert moss_rlhf.shorten is shorten
