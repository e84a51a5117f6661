"""Mixed states and labels, by the network's own parts; what does not go together is refused."""

import numpy as np
import pytest
import torch

from moss_rlhf.errors import RecipeError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.finetune import evaluate_loss
from moss_rlhf.finetuning.mixing import MixedObjective
from moss_rlhf.strategy.augmentation import mixup, mixup_loss
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

TASK = TASKS["text-classification"]
LEARNING = {"epochs": 8, "learning_rate": 5e-3, "batch_size": 8, "precision": "float32"}


def _batch(model, rows):
    chosen = [dict(row) for row in encoded(model, rows[:6])]
    return TASK.collate(chosen, model.tokenizer) | {"row": torch.arange(6)}


def test_states_and_labels_are_mixed_alike(tiny_model, rows):
    model = tiny_model()
    network, batch = model.network.eval(), _batch(model, rows)
    with torch.no_grad():
        found = MixedObjective(model, 0.7, seed=3)(network, batch)
        states = network.bert(**TASK.inputs(network, {k: v for k, v in batch.items() if k != "row"})).last_hidden_state
        random = np.random.default_rng([3, 0, 1, 2, 3, 4, 5])
        targets = torch.nn.functional.one_hot(batch["labels"], 2).float()
        mixed = mixup(states, targets, 0.7, random, batch["attention_mask"])
        expected = mixup_loss(network.classifier(network.bert.pooler(mixed.hidden)), mixed.targets)
        plain = TASK.loss(network(**TASK.inputs(network, {k: v for k, v in batch.items() if k != "row"})).logits,
                          batch["labels"])  # fmt: skip
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(found) != pytest.approx(float(plain), rel=1e-3)
    assert not network.bert.encoder.layer[-1]._forward_hooks


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2"])
def test_it_learns_mixed(family, tiny_model, rows):
    model = tiny_model(family)
    finetune(model, rows, rows, mixup=0.2, **LEARNING | {"epochs": 16})
    assert evaluate_loss(model, encoded(model, rows), TASK)["accuracy"] > 0.9


def test_what_mixed_rows_do_not_have_is_refused(tiny_model, rows, rows_of):
    with pytest.raises(RecipeError, match="no teacher's answer of their own"):
        finetune(tiny_model(), rows, rows, mixup=0.2, teacher=tiny_model())
    with pytest.raises(RecipeError, match="no loss of their own"):
        finetune(tiny_model(), rows, rows, mixup=0.2, loss={"gamma": 2.0})
    with pytest.raises(RecipeError, match="albert's one block serves all layers"):
        finetune(tiny_model("albert"), rows, rows, mixup=0.2)
    texts = rows_of("text-generation")
    with pytest.raises(RecipeError, match="text-generation has no classes to mix"):
        finetune(tiny_model("gpt2"), texts, texts[:8], mixup=0.2)
