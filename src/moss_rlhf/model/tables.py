"""What of a network is counted in tokens: embeddings, heads over tokens with their biases, and ids in its configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# of config.json and generation_config.json: ids that must not be generated
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


def tokens_in_configs(network: Any) -> set[int]:
    """Ids below the size of the table that the network's configs name: start, end, padding, forced ones.

    Where positions are counted from the padding id (RoBERTa), all ids up to it: if it moved, so would the positions.
    """
    size = network.get_input_embeddings().num_embeddings
    named = {index for config in _configs(network) for value in _named(config) for index in _flat(value)}
    tables = {id(table) for table in _embeddings(network)}
    for module in network.modules():
        if isinstance(module, nn.Embedding) and id(module) not in tables and module.padding_idx is not None:
            named |= set(range(module.padding_idx + 1))
    return {index for index in named if 0 <= index < size}


def has_token_head(network: Any) -> bool:
    """Whether the network scores tokens, as those that generate do."""
    return bool(_heads(network))


@torch.no_grad()
def keep_tokens(network: Any, kept: Sequence[int]) -> None:
    """Keep the rows `kept` (old ids, ascending) of everything counted in tokens, in place; the configs follow.

    Parameters keep their identity, so tied ones stay tied. Ids of tokens that went leave the lists of suppressed and
    forbidden ones: what can't be said need not be forbidden.
    """
    size, rows = network.get_input_embeddings().num_embeddings, torch.as_tensor(kept)
    new = {old: index for index, old in enumerate(kept)}
    for parameter in _parameters(network, size):
        parameter.data = parameter.data.index_select(0, rows.to(parameter.device)).clone()
        parameter.grad = None
    _cut_buffers(network, size, rows)
    _declare(network, size, new)
    for config in _configs(network):
        _follow(config, new)


def _stacks(network: Any) -> list[Any]:
    """The network and the stacks inside that have embeddings or a head of their own."""
    from transformers import PreTrainedModel

    return [module for module in network.modules() if isinstance(module, PreTrainedModel)]


def _embeddings(network: Any) -> list[nn.Embedding]:
    """Tables of tokens: those that stacks read, and Marian's `shared`, which has their weights and nothing reads."""
    weights = {id(stack.get_input_embeddings().weight) for stack in _stacks(network)}
    return [part for part in network.modules() if isinstance(part, nn.Embedding) and id(part.weight) in weights]


def _heads(network: Any) -> list[Any]:
    found = (stack.get_output_embeddings() for stack in _stacks(network))
    return list({id(head): head for head in found if head is not None}.values())


def _holders(network: Any) -> list[nn.Module]:
    """Modules that hold a head, and may hold its bias."""
    heads = {id(head) for head in _heads(network)}
    return [module for module in network.modules() if any(id(child) in heads for child in module.children())]


def _parameters(network: Any, size: int) -> list[nn.Parameter]:
    own = [module.parameters(recurse=False) for module in (*_embeddings(network), *_heads(network))]
    biases = (bias for holder in _holders(network) for bias in holder.parameters(recurse=False) if bias.dim() == 1)
    found = {id(each): each for parameters in (*own, biases) for each in parameters if each.shape[0] == size}
    return list(found.values())


def _cut_buffers(network: Any, size: int, rows: Tensor) -> None:
    for holder in _holders(network):  # final_logits_bias of BART and Marian, (1, tokens)
        for name, buffer in holder.named_buffers(recurse=False):
            if buffer.dim() == 2 and buffer.shape == (1, size):
                holder.register_buffer(name, buffer.index_select(1, rows.to(buffer.device)).clone())


def _declare(network: Any, size: int, new: Mapping[int, int]) -> None:
    tables = {id(table) for table in _embeddings(network)}
    for table in _embeddings(network):
        table.num_embeddings = len(new)
    for head in _heads(network):
        head.out_features = len(new)
    for module in network.modules():
        if isinstance(module, nn.Embedding) and id(module) not in tables:
            continue  # a table of positions: `tokens_in_configs` sees to it that its padding stays where it is
        if vars(module).get("padding_idx") is not None:
            module.padding_idx = new.get(module.padding_idx)
        if vars(module).get("vocab_size") == size:
            module.vocab_size = len(new)


def _configs(network: Any) -> list[Any]:
    """config.json, the stacks' own copies of it (T5), and generation_config.json where there is one."""
    stacks = _stacks(network)
    found = [stack.config for stack in stacks] + [getattr(stack, "generation_config", None) for stack in stacks]
    return list({id(config): config for config in found if config is not None}.values())


def _named(config: Any) -> Iterator[Any]:
    for name, value in vars(config).items():
        if name.endswith("_token_id") or name == "force_words_ids":
            yield value
    for _, index in vars(config).get("forced_decoder_ids") or ():
        yield index


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    for inner in value if isinstance(value, list | tuple) else ():
        yield from _flat(inner)


def _follow(config: Any, new: Mapping[int, int]) -> None:
    if "vocab_size" in vars(config):
        config.vocab_size = len(new)
    for name, value in list(vars(config).items()):
        if value is None:
            continue
        if name.endswith("_token_id") or name == "force_words_ids":
            setattr(config, name, _renumbered(value, new))
        elif name in _SUPPRESSED:
            setattr(config, name, [new[old] for old in value if old in new])
        elif name == "bad_words_ids":
            said = [word for word in value if all(old in new for old in word)]
            setattr(config, name, [[new[old] for old in word] for word in said] or None)
        elif name == "forced_decoder_ids":
            setattr(config, name, [[at, _renumbered(old, new)] for at, old in value])


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    """An id, or nested lists of ids; an id outside the table, which names no token, stays."""
    if isinstance(value, list | tuple):
        return [_renumbered(inner, new) for inner in value]
    return new.get(value, value)
