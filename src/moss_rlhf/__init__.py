"""Make a pretrained language model small, fast and good at your task. The public names, each imported when first used.

run(recipe)          the whole story: a recipe, a path to one, or a mapping → the report
load(path)           a checkpoint → Model with .network, .tokenizer, .task; load(id, labels=[…]): a pretrained one
save(model, path)    a checkpoint that stands alone
Recipe               the recipe's type
from_scratch(config, texts)   a model whose tokenizer is learned and whose weights are drawn, to be pretrained
clean(rows, …)       rows without those that are not worth training on, and what was found
collect(corpus, …)   a task's texts out of a large corpus, as a list or a jsonl file
prune, narrow, shorten, trim_vocabulary, quantize, sensitivity, pretrain, finetune, ensemble,
fit_temperature, evaluate, export
                     each on a Model in memory, without a recipe
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_rlhf.evaluation import evaluate, fit_temperature
    from moss_rlhf.exporting import export
    from moss_rlhf.finetuning import ensemble, finetune, from_scratch, pretrain
    from moss_rlhf.model.checkpoint import Model
    from moss_rlhf.model.checkpoint import save_checkpoint as save
    from moss_rlhf.optimization import narrow, prune, quantize, sensitivity, shorten, trim_vocabulary
    from moss_rlhf.pipeline import run
    from moss_rlhf.recipe import Recipe
    from moss_rlhf.tasks.cleaning import clean
    from moss_rlhf.tasks.collecting import collect
    from moss_rlhf.tasks.loading import load

_HOMES = {
    "Model": ("moss_rlhf.model.checkpoint", "Model"),
    "Recipe": ("moss_rlhf.recipe", "Recipe"),
    "clean": ("moss_rlhf.tasks.cleaning", "clean"),
    "collect": ("moss_rlhf.tasks.collecting", "collect"),
    "ensemble": ("moss_rlhf.finetuning", "ensemble"),
    "evaluate": ("moss_rlhf.evaluation", "evaluate"),
    "export": ("moss_rlhf.exporting", "export"),
    "fit_temperature": ("moss_rlhf.evaluation", "fit_temperature"),
    "finetune": ("moss_rlhf.finetuning", "finetune"),
    "from_scratch": ("moss_rlhf.finetuning", "from_scratch"),
    "load": ("moss_rlhf.tasks.loading", "load"),
    "narrow": ("moss_rlhf.optimization", "narrow"),
    "pretrain": ("moss_rlhf.finetuning", "pretrain"),
    "prune": ("moss_rlhf.optimization", "prune"),
    "quantize": ("moss_rlhf.optimization", "quantize"),
    "run": ("moss_rlhf.pipeline", "run"),
    "save": ("moss_rlhf.model.checkpoint", "save_checkpoint"),
    "sensitivity": ("moss_rlhf.optimization", "sensitivity"),
    "shorten": ("moss_rlhf.optimization", "shorten"),
    "trim_vocabulary": ("moss_rlhf.optimization", "trim_vocabulary"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moss_rlhf' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


__all__ = [
    "Model",
    "Recipe",
    "clean",
    "collect",
    "ensemble",
    "evaluate",
    "export",
    "finetune",
    "fit_temperature",
    "from_scratch",
    "load",
    "narrow",
    "pretrain",
    "prune",
    "quantize",
    "run",
    "save",
    "sensitivity",
    "shorten",
    "trim_vocabulary",
]
