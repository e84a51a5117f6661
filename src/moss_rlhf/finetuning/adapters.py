"""Train small matrices beside frozen ones, and add them in at the end; by peft, of the extra `adapters`.

    W x  →  W x + s · B A x,   A (rank, in), B (out, rank), B = 0 at first

lora     s = alpha / rank   (Hu et al. 2021, arXiv:2106.09685, §4.1)
rslora   s = alpha / √rank  (Kalajdzievski 2023, arXiv:2312.03732)
dora     the columns' norms of W + s B A are learned apart from their directions (Liu et al. 2024, arXiv:2402.09353)

While they train, every adapted module of the network is peft's; afterwards each is what it was, with other weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moss_rlhf.errors import MachineError, ModelError, nearest
from moss_rlhf.finetuning.companions import Companion
from moss_rlhf.finetuning.layers import LayerGroup, layer_groups
from moss_rlhf.finetuning.options import Adapter
from moss_rlhf.model.anatomy import Matrix, anatomy_of
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.zeros import Zeros
from moss_rlhf.tasks import TASKS


class Adapters(Companion):
    """The adapters of a network, from when they are put in until they are merged.

    groups   what trains: of each block its adapters, and the head where the task has classes.
    raises   MachineError without peft; ModelError where a target is in no block, or merging would undo pruning and
             `keep_zeros` is not set.
    """

    name = "adapters"

    def __init__(self, model: Model, options: Adapter, seed: int) -> None:
        self.network, self.options = model.network, options
        self.targets = _targets(model, options)
        pruned = {id(parameter) for parameter in model.pruned}
        touched = [matrix.parameter for matrix in self.targets if id(matrix.parameter) in pruned]
        if touched and not options.keep_zeros:
            raise ModelError(
                f"finetune.adapter: {len(touched)} of the adapted matrices are pruned, and merging adapters into them "
                "would undo it. Set keep_zeros: true, which sets the zeros again after merging, or leave adapter out."
            )
        self.zeros = Zeros.of(touched)
        self.trained = {parameter: parameter.requires_grad for parameter in model.network.parameters()}
        before = layer_groups(model.network)
        _inject(model.network, self.targets, options, seed)
        self.groups = tuple(self._group(group, TASKS[model.task].has_classes) for group in before)

    def _group(self, group: LayerGroup, head_trains: bool) -> LayerGroup:
        if group.name == "head":
            return group if head_trains else LayerGroup("head", ())
        blocks = {block.name: block.module for block in anatomy_of(self.network).blocks}
        own = blocks[group.name].named_parameters() if group.name in blocks else ()
        return LayerGroup(group.name, tuple((name, part) for name, part in own if part not in self.trained))

    @property
    def parameters(self) -> int:
        return sum(part.numel() for group in self.groups for _, part in group.parameters if part not in self.trained)

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Merge; the network is as it was but for its weights."""
        facts: dict[str, Any] = {"kind": self.options.kind, "rank": self.options.rank, "parameters": self.parameters}
        for _, _, module in self._adapted():
            module.merge()
        if self.zeros.parameters:
            facts["undone_by_zeros"] = self._restore_zeros()
        self.detach()
        return {"adapter": facts}

    def _restore_zeros(self) -> float:
        """Set the pruned weights to zero again; returns which share of the merged weights' square norm that took."""
        found = [
            (parameter.detach(), kept) for parameter, kept in zip(self.zeros.parameters, self.zeros.kept, strict=True)
        ]
        lost = sum(float(weight[~kept.to(weight.device)].square().sum()) for weight, kept in found)
        whole = sum(float(weight.square().sum()) for weight, _ in found)
        self.zeros.restore()
        return lost / whole if whole else 0.0

    def detach(self) -> None:
        """Take the adapters out, merged or not."""
        for parent, name, module in self._adapted():
            setattr(parent, name, module.get_base_layer())
        if "peft_config" in vars(self.network):
            del self.network.peft_config
        for parameter, trains in self.trained.items():
            parameter.requires_grad_(trains)

    def _adapted(self) -> list[tuple[nn.Module, str, Any]]:
        """(parent, name, peft's module) of every adapted matrix."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        found = []
        for matrix in self.targets:
            parent, _, name = matrix.name.removesuffix(".weight").rpartition(".")
            module = self.network.get_submodule(f"{parent}.{name}")
            if isinstance(module, BaseTunerLayer):
                found.append((self.network.get_submodule(parent), name, module))
        return found


def _targets(model: Model, options: Adapter) -> list[Matrix]:
    """The matrices of the blocks that are asked for."""
    blocks = model.anatomy.blocks
    if options.targets == "all-linear":
        return [matrix for block in blocks for matrix in block.matrices]
    if options.targets == "attention":
        return [matrix for block in blocks for part in block.attentions for matrix in part.matrices]
    every = {matrix.name.removesuffix(".weight"): matrix for block in blocks for matrix in block.matrices}
    found = {
        name: matrix for name, matrix in every.items() if name.endswith(tuple(f".{end}" for end in options.targets))
    }
    last = {name.rpartition(".")[2] for name in every}
    for end in options.targets:
        if not any(name.endswith(f".{end}") for name in every):
            raise ModelError(f"finetune.adapter.targets: no matrix of a block is called {end!r}; {nearest(end, last)}")
    return list(found.values())


def _inject(network: Any, targets: Sequence[Matrix], options: Adapter, seed: int) -> None:
    """Put peft's modules in place of the targets; A is drawn by `seed`."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MachineError(
            "finetune.adapter: peft is not installed. Install it with: pip install 'moss-rlhf[adapters]'."
        ) from None
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=[matrix.name.removesuffix(".weight") for matrix in targets],
        use_rslora=options.kind == "rslora",
        use_dora=options.kind == "dora",
        fan_in_fan_out=targets[0].transposed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network)
