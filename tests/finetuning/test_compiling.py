"""The faster way is kept, and stays what it was when a training resumes. The compiler itself runs in the slow test."""

import pytest
import torch

from moss_rlhf.files import read_json
from moss_rlhf.finetuning import compiling, finetune
from moss_rlhf.finetuning.compiling import CHOICE, compile_where_it_pays


class _Network(torch.nn.Linear):
    """Takes the time that a clock of its own says."""

    def __init__(self, plain, compiled):
        super().__init__(2, 2)
        self.cost, self.now, self.fails = {False: plain, True: compiled}, 0.0, False

    def compile(self, dynamic):
        if self.fails:
            raise RuntimeError("no compiler")
        self._compiled_call_impl = self.forward

    def step(self, batch):
        self.now += self.cost[self._compiled_call_impl is not None]


@pytest.fixture
def choose(monkeypatch, tmp_path):
    def run(network, wanted="auto", steps=1000):
        monkeypatch.setattr(compiling.time, "monotonic", lambda: network.now)
        return compile_where_it_pays(network, wanted, [1, 2, 3], network.step, steps, tmp_path)

    return run


def test_the_faster_is_kept(choose):
    network = _Network(plain=1.0, compiled=0.5)
    facts = choose(network)["compile"]
    assert facts == {"compiled": True, "step_seconds": 1.0, "compiled_step_seconds": 0.5, "compile_seconds": 1.5}
    assert network._compiled_call_impl is not None


def test_the_slower_is_dropped(choose):
    network = _Network(plain=1.0, compiled=0.99)
    assert not choose(network)["compile"]["compiled"]
    assert network._compiled_call_impl is None


def test_a_short_training_is_not_compiled(choose):
    facts = choose(_Network(plain=1.0, compiled=0.1), steps=100)["compile"]
    assert facts == {"compiled": False, "why": "the training takes 100 s uncompiled; compiling pays from 300 s on"}


def test_a_machine_without_a_compiler_trains_all_the_same(choose):
    network = _Network(plain=1.0, compiled=0.1)
    network.fails = True
    assert choose(network)["compile"] == {"compiled": False, "why": "it can't be compiled here: RuntimeError"}


def test_a_resumed_training_goes_on_the_same_way(choose, tmp_path):
    choose(_Network(plain=1.0, compiled=0.5))
    slower_now = _Network(plain=1.0, compiled=2.0)
    assert choose(slower_now)["compile"]["compiled"]
    assert read_json(tmp_path / CHOICE)["compiled"]


def test_off_leaves_no_trace(choose, tmp_path):
    assert choose(_Network(1.0, 0.1), "off") == {}
    assert not (tmp_path / CHOICE).exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_training_is_plain_training(tiny_model, rows):
    """Within rounding, and the network is itself again afterwards."""
    settings = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "precision": "float32"}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain, compiled = tiny_model(**still), tiny_model(**still)
    finetune(plain, rows, rows[:8], **settings)
    training = finetune(compiled, rows, rows[:8], compile="on", **settings)
    assert training.facts["compile"] == {"compiled": True}
    assert compiled.network._compiled_call_impl is None
    head = (plain.network.classifier.weight, compiled.network.classifier.weight)
    assert torch.allclose(*head, atol=1e-4)
