"""A model whose weights stay on disk gives the same bits as one in memory."""

import pytest
import torch

import moss_rlhf

METHODS = {
    "magnitude": lambda model, rows: moss_rlhf.prune(model, sparsity=0.5),
    "sparsegpt": lambda model, rows: moss_rlhf.prune(model, rows, method="sparsegpt", sparsity=0.5, rows=16),
    "nearest": lambda model, rows: moss_rlhf.quantize(model, scheme="int4", group_size=8),
    "gptq": lambda model, rows: moss_rlhf.quantize(model, rows, method="gptq", rows=16),
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "albert"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_weights_as_in_memory(family, method, tiny_model, rows_of, tmp_path):
    model = tiny_model(family)
    rows = rows_of(model.task)
    moss_rlhf.save(model, tmp_path / "source")
    on_disk = moss_rlhf.load(tmp_path / "source", offload=True)
    in_memory = moss_rlhf.load(tmp_path / "source")
    METHODS[method](on_disk, rows)
    METHODS[method](in_memory, rows)
    moss_rlhf.save(on_disk, tmp_path / "saved")
    again = moss_rlhf.load(tmp_path / "saved")
    for one, other in zip(again.network.parameters(), in_memory.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(again.pruned) == len(in_memory.pruned)


def test_blocks_in_half_precision_are_worked_on_in_float32(tiny_model, rows_of, tmp_path):
    model = tiny_model("llama")
    model.network.bfloat16()
    model.network.save_pretrained(tmp_path / "source")
    model.tokenizer.save_pretrained(tmp_path / "source")
    on_disk = moss_rlhf.load(tmp_path / "source", task="text-generation", offload=True)
    assert on_disk.anatomy.matrices[0].weight.dtype == torch.bfloat16
    moss_rlhf.prune(on_disk, rows_of("text-generation"), method="wanda", sparsity=0.5, rows=16)
    assert on_disk.anatomy.matrices[0].weight.dtype == torch.float32
    assert float((on_disk.anatomy.matrices[0].weight == 0).double().mean()) == 0.5
