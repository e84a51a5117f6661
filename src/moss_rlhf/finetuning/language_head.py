"""The network that a model speaks with: its own, or its body under a language model's head made for the time being."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import anatomy_of
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.locate import weight_files


def language_network(model: Model, seed: int) -> tuple[Any, str]:
    """(network with a language model's head, where that head is from: 'its own', 'the checkpoint' or 'new').

    The body is the model's, the same modules: what trains here trains there. The output layer is tied to the
    embeddings; the rest of the head comes from the checkpoint the model was loaded from, where it holds one, else it is
    drawn by `seed` (normal, initializer_range; norms 1, biases 0).
    raises   ModelError where the hidden size was narrowed: no head of the family fits.
    """
    network = model.network
    if network.get_output_embeddings() is not None:
        return network, "its own"
    anatomy = anatomy_of(network)
    if anatomy.hidden_size != getattr(network.config, anatomy.family.hidden):
        raise ModelError(
            "pretrain: the hidden size was narrowed, and a language model's head fits the whole one. Put pretrain "
            "before the stage that narrows it."
        )
    speaking = _headed(network, anatomy.family.kind)
    head = _untied(speaking)
    loaded = _from_checkpoint(network.config.name_or_path, set(head))
    _fill(speaking, loaded, seed)
    return speaking.eval(), "the checkpoint" if loaded else "new"


def _headed(network: Any, kind: str) -> Any:
    """The family's language model with this body in it; what is its head's own lies on the meta device."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    classes = {
        "encoder": AutoModelForMaskedLM,
        "decoder": AutoModelForCausalLM,
        "encoder-decoder": AutoModelForSeq2SeqLM,
    }
    with init_empty_weights(include_buffers=False):
        speaking = classes[kind].from_config(copy.deepcopy(network.config), dtype=torch.float32)
    setattr(speaking, speaking.base_model_prefix, network.base_model)
    speaking.tie_weights()
    return speaking


def _untied(network: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.is_meta}


def _from_checkpoint(place: str, names: set[str]) -> dict[str, torch.Tensor]:
    """The head that a checkpoint holds, whole or not at all."""
    files = weight_files(Path(place)) if place and Path(place).is_dir() else []
    stored = {_today(name): tensor for file in files for name, tensor in load_file(file).items()}
    found = {name: tensor.float() for name, tensor in stored.items() if name in names}
    return found if found.keys() == names else {}


def _today(name: str) -> str:
    """BERT's first checkpoints call a norm's weight and bias gamma and beta."""
    return re.sub(
        r"LayerNorm\.(gamma|beta)$", lambda old: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[old[1]], name
    )


@torch.no_grad()
def _fill(network: Any, loaded: dict[str, torch.Tensor], seed: int) -> None:
    """Put values in place of what lies on the meta device; a parameter that two modules share stays one."""
    random = torch.Generator().manual_seed(seed)
    untied = _untied(network)  # held until the end: no new parameter may get the id of an old one
    names = {id(parameter): name for name, parameter in untied.items()}
    made: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for part, parameter in dict(module.named_parameters(recurse=False)).items():
            if id(parameter) in names:
                value = loaded.get(names[id(parameter)])
                if id(parameter) not in made:
                    drawn = _drawn(module, part, parameter, network.config, random) if value is None else value
                    made[id(parameter)] = nn.Parameter(drawn)
                setattr(module, part, made[id(parameter)])


def _drawn(module: nn.Module, part: str, parameter: torch.Tensor, config: Any, random: torch.Generator) -> torch.Tensor:
    if parameter.dim() > 1:
        spread = getattr(config, "initializer_range", 0.02)
        return torch.empty(parameter.shape).normal_(0.0, spread, generator=random)
    scale = part == "weight" and "Norm" in type(module).__name__
    return torch.full(parameter.shape, float(scale))
