"""Saving replaces a checkpoint and nothing else."""

import pytest

import moss_rlhf
from moss_rlhf.errors import MachineError


def test_saving_never_replaces_the_users_files(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    for place in (".", tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(MachineError, match="nothing is overwritten"):
            moss_rlhf.save(tiny_model(), place)
        with pytest.raises(MachineError, match="nothing is overwritten"):
            moss_rlhf.export(tiny_model(), place)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "config.json").write_text("{}")  # a project's own, beside other files
    with pytest.raises(MachineError):
        moss_rlhf.save(tiny_model(), tmp_path)
    moss_rlhf.save(tiny_model(), "new")
    moss_rlhf.save(tiny_model(), "new")  # an earlier checkpoint may be replaced
    assert (tmp_path / "new" / "model.safetensors").exists()
