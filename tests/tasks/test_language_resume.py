"""A language model's fine-tuning, interrupted and resumed, ends in the bits of one never stopped."""

import pytest
import torch

import moss_rlhf
from moss_rlhf.progress import Bar, Progress

SETTINGS = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "precision": "float32", "save_every_seconds": 0.0}


class _StoppingBar(Bar):
    def advance(self, count=1, text=None):
        super().advance(count, text)
        if count and self.done == 6:
            raise RuntimeError("stopped by the test")


class _Stopping(Progress):
    """Ends the training after its sixth step, in the middle of the second epoch."""

    def bar(self, title, total):
        return _StoppingBar(title, total, visible=False) if title == "fine-tuning" else super().bar(title, total)


@pytest.mark.parametrize(("family", "taught"), [("gpt2", False), ("llama", True), ("t5", True), ("bart", False)])
def test_resumed_is_never_stopped(tiny_model, rows_of, tmp_path, family, taught):
    """With tied embeddings, which files hold once, and with a teacher that is asked at every step."""

    def train(workspace=None, progress=None):
        model = tiny_model(family, blocks=2)
        rows = rows_of(model.task)
        settings = SETTINGS | ({"teacher": tiny_model(family)} if taught else {})
        training = moss_rlhf.finetune(model, rows[:30], rows[30:], workspace=workspace, progress=progress, **settings)
        return model.network.state_dict(), training.history

    with pytest.raises(RuntimeError, match="stopped by the test"):
        train(tmp_path, _Stopping(quiet=True))
    assert list(tmp_path.glob("checkpoint-*"))
    (weights, history), (resumed, resumed_history) = train(), train(tmp_path)
    assert resumed_history == history
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
