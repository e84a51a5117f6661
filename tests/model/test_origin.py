"""Where a block stood before any was dropped: through surgery, save, load, and being shortened again."""

import json

import pytest

from moss_rlhf.errors import ModelError
from moss_rlhf.model.checkpoint import load_checkpoint, save_checkpoint
from moss_rlhf.model.surgery import keep_blocks, only_blocks
from moss_rlhf.optimization import shorten
from moss_rlhf.tasks import TASKS


def _origins(model):
    return [(block.stack, block.origin.index, block.origin.depth) for block in model.anatomy.blocks if block.origin]


def _reloaded(model, place):
    save_checkpoint(model, place)
    return load_checkpoint(place, TASKS[model.task].auto_class())


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama"])
def test_a_stack_shortened_twice_and_saved_between(family, tiny_model, tmp_path):
    model = tiny_model(family, blocks=6)
    stack = model.anatomy.blocks[0].stack
    assert _origins(model) == []
    keep_blocks(model.network, [0, 1, 3, 5])
    model = _reloaded(model, tmp_path / "once")
    assert _origins(model) == [(stack, index, 6) for index in (0, 1, 3, 5)]
    keep_blocks(model.network, [0, 2, 3])
    again = _reloaded(model, tmp_path / "twice")
    assert _origins(again) == [(stack, index, 6) for index in (0, 3, 5)]
    declared = json.loads((tmp_path / "twice" / "config.json").read_text())["moss_rlhf"]["origin"]
    assert declared == {stack: {"blocks": [0, 3, 5], "of": 6}}


def test_each_stack_counts_its_own(tiny_model, tmp_path):
    model = tiny_model("t5", blocks=3)
    keep_blocks(model.network, [0, 1, 2, 4, 5])  # the decoder's first goes
    assert _origins(_reloaded(model, tmp_path / "model")) == [("decoder", 1, 3), ("decoder", 2, 3)]


def test_what_is_left_out_for_a_while_leaves_no_trace_in_the_checkpoint(tiny_model, tmp_path):
    model = tiny_model(blocks=3)
    with only_blocks(model.network, [0, 2]):
        pass
    save_checkpoint(model, tmp_path / "model")
    assert "origin" not in json.loads((tmp_path / "model" / "config.json").read_text())["moss_rlhf"]


def test_a_merged_block_ends_where_the_last_of_its_group_did(tiny_model, rows):
    model = tiny_model(blocks=3)
    facts = shorten(model, rows, remove=1, how="merge_average", rows=20)
    ((merged,),) = [facts["merged"].values()]
    last = int(merged[-1].rpartition(".")[2])
    assert last in [block.origin.index for block in model.anatomy.blocks]
    assert len(model.anatomy.blocks) == 2


def test_a_config_that_counts_other_blocks_is_refused(tiny_model, tmp_path):
    model = tiny_model(blocks=3)
    keep_blocks(model.network, [0, 2])
    save_checkpoint(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["moss_rlhf"]["origin"]["encoder"]["blocks"] = [0, 1, 2]
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="origin of 3 blocks and the encoder has 2"):
        load_checkpoint(tmp_path / "model", TASKS[model.task].auto_class())
