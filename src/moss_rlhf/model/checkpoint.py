"""Checkpoints that stand alone: save, load, and the sentence that plain transformers fails with where it must.

A result that the stock config can say is a plain Hugging Face checkpoint. Where it can't (fewer heads than hidden /
head size, sizes that differ by block), config.json declares the shapes and `load` builds them. `"transformers_weights"`
is the name of the weight file for transformers 5: a sentence in its place makes every Auto class stop with it.

Everything of ours stands under one key of config.json:

    "moss_rlhf": {"task", "shapes": [[heads, feed_forward], …], "hidden", "pruned": [names], "quantization": {"scheme"},
                  "temperature", "temperature_of", "origin": {stack: {"blocks": [0, 1, 3, 5], "of": 6}},
                  "cut": {"keep", "max_length"}}

where all but the task are absent if there is nothing to say. A block with cross-attention declares its heads third.
`origin` says where the blocks of a shortened stack stood: distillation follows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn

from moss_rlhf.errors import ModelError
from moss_rlhf.files import new_directory, read_json, refuse_foreign_files, write_json
from moss_rlhf.model.anatomy import Anatomy, Family, Origin, anatomy_of
from moss_rlhf.model.config import (
    KEY,
    block_shapes,
    is_gated,
    position_limit,
    queries_per_key,
    read_config,
    trained_labels,
)
from moss_rlhf.model.cost import Dimensions
from moss_rlhf.model.cutting import Cut
from moss_rlhf.model.fingerprint import network_digest
from moss_rlhf.model.locate import read_header, weight_files
from moss_rlhf.model.offload import MappedWeights
from moss_rlhf.model.quantization import Quantization
from moss_rlhf.model.surgery import reshape
from moss_rlhf.model.temperature import Temperature

SENSITIVITY = "sensitivity.json"
_UNFIT = "config.json and the weights don't belong together"
REFUSAL = (
    "this checkpoint's layers have shapes that config.json of transformers can't express: use moss_rlhf.load(path)"
)


@dataclass
class Model:
    """A network with what is needed to use it. Methods change the network in place.

    pruned         parameters whose exact zeros stay zero; they keep their identity through surgery, names do not.
    quantization   the scheme whose grid the weights lie on.
    sensitivity    what `sensitivity` measured, for later stages.
    temperature    what logits are divided by before they are probabilities; saved while the network is the one it
                   was fitted on.
    weights        where the blocks' weights are while they are not in memory (load(path, offload=True)).
    cut            which tokens of long texts it was trained on; None: as many of the first as it has positions for.
    """

    network: Any
    tokenizer: Any
    task: str
    pruned: list[nn.Parameter] = field(default_factory=list)
    quantization: Quantization | None = None
    sensitivity: dict[str, Any] | None = None
    temperature: Temperature | None = None
    weights: MappedWeights | None = None
    cut: Cut | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        names = self.network.config.id2label
        return tuple(names[index] for index in range(len(names)))

    @property
    def anatomy(self) -> Anatomy:
        return anatomy_of(self.network)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def nonzero(self) -> int:
        return sum(int(torch.count_nonzero(parameter)) for parameter in self.network.parameters())

    @property
    def max_length(self) -> int:
        """Tokens that the network has positions for."""
        return position_limit(self.network.config.to_dict(), self.tokenizer.model_max_length)

    @property
    def dimensions(self) -> Dimensions:
        anatomy, config = self.anatomy, self.network.config.to_dict()
        vocabulary = self.network.get_output_embeddings()
        head = {id(part): part.numel() for _, part in anatomy.head if part.dim() == 2}
        linears = {id(module.weight) for module in self.network.modules() if isinstance(module, (nn.Linear, nn.Conv1d))}
        below = {id(part): part.numel() for _, part in anatomy.embeddings if id(part) in linears}
        every_token = below | ({id(vocabulary.weight): vocabulary.weight.numel()} if vocabulary is not None else {})
        return Dimensions(
            anatomy.hidden_size,
            anatomy.blocks[0].attention.head_size,
            anatomy.shapes,
            sum(size for part, size in head.items() if part not in every_token),
            sum(every_token.values()),
            is_gated(config),
            queries_per_key(config),
            anatomy.repeats,
        )


Given = ParamSpec("Given")
Returned = TypeVar("Returned")


def takes_model(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """A function whose first argument is a Model; ModelError on a path or a bare network."""

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        refuse_no_model(args[0] if args else kwargs.get("model"), function.__name__)
        return function(*args, **kwargs)

    return call


def refuse_no_model(given: object, place: str) -> None:
    """ModelError on anything but a Model."""
    if not isinstance(given, Model):
        raise ModelError(
            f"{place}: takes a Model, got {type(given).__name__}. Open a checkpoint with moss_rlhf.load(path)."
        )


def load_pretrained(
    place: Path, task: str, auto_class: Any, labels: Sequence[str] | None, trust_remote_code: bool = False
) -> Model:
    """Load a checkpoint for a task; a head that was not trained for these labels is drawn anew, by torch's generator.

    place    a local directory (see `locate`).
    labels   names in class-id order; None for a task without classes, whose head must stand in the file.
    raises   ModelError where files are broken, or tensors below the head are missing, too many or of other shapes.
    """
    config = read_config(place)
    if KEY in config or "transformers_weights" in config:
        model = load_checkpoint(place, auto_class)
        if labels is not None and model.labels != tuple(labels):
            raise ModelError(
                f"{place}: was trained for the labels {', '.join(model.labels)}; the data has {', '.join(labels)}. "
                "Give the same labels in the same order."
            )
        return model
    same_head = labels is None or trained_labels(config) == tuple(labels)
    network, info = _from_pretrained(auto_class, place, labels, trust_remote_code)
    _refuse_garbage(network, info, same_head, place)
    _store_everything(network)
    if not same_head:
        _draw_head(network, None if trained_labels(config) else info["missing_keys"])
    tokenizer = _fitting_tokenizer(network, place, trust_remote_code)
    if network.config.pad_token_id is None:
        network.config.pad_token_id = tokenizer.pad_token_id
    if network.can_generate() and network.generation_config.pad_token_id is None:
        network.generation_config.pad_token_id = tokenizer.pad_token_id
    return Model(network, tokenizer, task)


def _from_pretrained(
    auto_class: Any, place: Path, labels: Sequence[str] | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """The network, and what transformers found missing, unexpected and mismatched."""
    for file in weight_files(place):
        read_header(file)  # says which file is broken
    names = dict(enumerate(labels or ()))
    classes = {"id2label": names, "label2id": {name: index for index, name in names.items()}} if names else {}
    try:
        network, info = auto_class.from_pretrained(
            place,
            **classes,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # of the head, which is drawn anew then; `_refuse_garbage` sees to the rest
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model: {place} can't be loaded: {' '.join(str(error).split())[:400]}") from error
    return network, info


def _refuse_garbage(network: Any, info: Any, same_head: bool, place: Path) -> None:
    """ModelError where random numbers would stand in for weights, or weights would be left out."""
    anatomy = anatomy_of(network)
    drawn = set() if same_head else {name for name, _ in anatomy.head}
    faults = {
        "is missing": set(info["missing_keys"]) - drawn,
        "has another shape than config.json says": {name for name, *_ in info["mismatched_keys"]} - drawn,
        "is of no layer that config.json knows": {
            name
            for name in info["unexpected_keys"]
            if any(f"{stack.blocks}." in name for stack in anatomy.family.stacks)
        },
    }
    for fault, names in faults.items():
        if names:
            raise ModelError(
                f"{place}: config.json and the weights don't belong together: {min(names)} {fault} ({len(names)} such "
                "tensors). Fetch or save the checkpoint again."
            )


@torch.no_grad()
def _draw_head(network: Any, missing: Iterable[str] | None) -> None:
    """Draw the dense layers above the base model: those that the file lacks, or all where they served other labels.

    A pretrained file may hold some: ModernBERT's dense layer before the classifier.
    """
    # not transformers' _init_weights: it leaves whatever came from the file as it is
    for name, linear in network.named_modules():
        above = not name.startswith(f"{network.base_model_prefix}.") and isinstance(linear, nn.Linear)
        if above and (missing is None or f"{name}.weight" in missing):
            linear.weight.normal_(0.0, network.config.initializer_range)
            if linear.bias is not None:
                linear.bias.zero_()


def load_tokenizer(place: Path, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model: the tokenizer in {place} can't be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # decoders often have none; the attention mask hides it
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"model: the tokenizer in {place} has no padding token. Set pad_token in its tokenizer_config.json."
        )
    return tokenizer


def _fitting_tokenizer(network: Any, place: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer; ModelError where it knows no words, or more than the network embeds."""
    tokenizer, table = load_tokenizer(place, trust_remote_code), network.get_input_embeddings().num_embeddings
    if not len(tokenizer.all_special_tokens) < len(tokenizer) <= table:
        raise ModelError(
            f"{place}: the tokenizer has {len(tokenizer)} tokens and the network embeds {table}; copy the tokenizer's "
            "own files (tokenizer.json, tokenizer_config.json, vocabulary) beside the weights."
        )
    return tokenizer


def load_checkpoint(place: Path, auto_class: Any, *, offload: bool = False) -> Model:
    """Load what `save_checkpoint` wrote, or any file whose tensors bear the network's own names.

    offload  leave the blocks' weights on disk, one block in memory at a time (see `offload.py`).
    raises   ModelError where tensors are missing, too many or of other shapes than declared, or pruned zeros are gone.
    """
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights  # which draws nothing, and ties nothing

    declared = read_config(place)
    ours, shapes = declared.get(KEY, {}), block_shapes(declared)
    config = AutoConfig.from_pretrained(place)
    for name in (KEY, "transformers_weights"):
        if hasattr(config, name):
            delattr(config, name)
    with init_empty_weights(include_buffers=False), no_init_weights():
        network = auto_class.from_config(config, dtype=torch.float32)
    network.tie_weights()
    _store_everything(network)
    reshape(network, shapes, ours.get("hidden"))
    _load_weights(network, place, offload)
    _load_origins(anatomy_of(network), ours.get("origin", {}), place)
    model = Model(network.eval(), _fitting_tokenizer(network, place), ours.get("task", "text-classification"))
    _load_generation(network, place)
    model.quantization = Quantization.read(ours.get("quantization"), place)
    if (place / SENSITIVITY).exists():
        model.sensitivity = read_json(place / SENSITIVITY)
    model.temperature = Temperature.read(ours, place)
    model.pruned = _pruned_parameters(network, ours.get("pruned", []), place)
    model.weights = MappedWeights() if offload else None
    model.cut = Cut.read(ours.get("cut"), place)
    return model


def _load_weights(network: Any, place: Path, offload: bool) -> None:
    for file in weight_files(place):
        read_header(file)  # says which file is broken
    mapped = {name: tensor for file in weight_files(place) for name, tensor in load_file(file).items()}
    stored = mapped if offload else {name: tensor.float() for name, tensor in mapped.items()}
    names = _names_in_network(network, stored)
    weights = {names[name]: tensor for name, tensor in stored.items()}
    try:
        found = network.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{place}: {_UNFIT}: {' '.join(str(error).split())[:400]}") from None
    # both tensors of a pair in the file are told apart: an untied T5's config says tied all the same
    network.tie_weights(missing_keys=set(found.missing_keys), recompute_mapping=False)
    missing = [name for name, value in network.state_dict().items() if value.is_meta]
    if missing or found.unexpected_keys:
        lacking, unknown = ", ".join(missing[:3]) or "nothing", ", ".join(found.unexpected_keys[:3]) or "nothing"
        raise ModelError(f"{place}: {_UNFIT}: missing is {lacking}, unknown is {unknown}. Fetch or save it again.")
    anatomy = anatomy_of(network)
    for _, parameter in (*anatomy.embeddings, *anatomy.head):
        parameter.data = parameter.data.float()  # a block's are when it is loaded


def _names_in_network(network: Any, names: Iterable[str]) -> dict[str, str]:
    """{name in the file: name in the network}; transformers writes some as its older versions did, as `embed_out`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import apply_renamings

    renamings = get_model_conversion_mapping(network)
    return {name: apply_renamings(name, renamings) for name in names}


def _store_everything(network: Any) -> None:
    """Let files hold Marian's sinusoids, which transformers leaves out and yet hands out as trainable.

    Trained, rounded or cut to fewer features, they are no longer what it would compute anew.
    """
    for name in network._keys_to_ignore_on_save:
        network.get_parameter(name).requires_grad_(False)
    network._keys_to_ignore_on_save = set()


def _load_generation(network: Any, place: Path) -> None:
    """How the checkpoint generates, where its folder says so: a network built from config.json alone knows it not."""
    from transformers import GenerationConfig

    if network.can_generate() and (place / "generation_config.json").exists():
        network.generation_config = GenerationConfig.from_pretrained(place)


def _load_origins(anatomy: Anatomy, declared: Any, place: Path) -> None:
    for stack, origin in declared.items():
        blocks = anatomy.stack(stack)
        if len(blocks) != len(origin["blocks"]):
            raise ModelError(
                f"{place}: config.json gives the origin of {len(origin['blocks'])} blocks and the {stack} has "
                f"{len(blocks)}. Save or fetch the checkpoint again."
            )
        for block, index in zip(blocks, origin["blocks"], strict=True):
            block.set_origin(Origin(index, origin["of"]))


def _origins_of(anatomy: Anatomy) -> dict[str, Any]:
    """{stack: {"blocks", "of"}} of the stacks that were shortened."""
    stacks = {part.name: [block.origin for block in anatomy.stack(part.name)] for part in anatomy.family.stacks}
    found = {name: [origin for origin in origins if origin] for name, origins in stacks.items()}
    return {
        name: {"blocks": [origin.index for origin in origins], "of": origins[0].depth}
        for name, origins in found.items()
        if origins and len(origins) < origins[0].depth
    }


def _pruned_parameters(network: Any, names: Sequence[str], place: Path) -> list[nn.Parameter]:
    parameters = dict(network.named_parameters())
    unknown = [name for name in names if name not in parameters]
    if unknown:
        raise ModelError(
            f"{place}: config.json lists {unknown[0]} as pruned, but there is no such tensor. "
            "Save the checkpoint again."
        )
    pruned = [parameters[name] for name in names]
    _assert_zeros(dict(zip(names, pruned, strict=True)), place)
    return pruned


def _assert_zeros(pruned: dict[str, nn.Parameter], place: Path) -> None:
    for name, parameter in pruned.items():
        if torch.count_nonzero(parameter) == parameter.numel():
            raise ModelError(
                f"{place}: {name} is listed as pruned and holds no zero any more; something trained over the mask."
            )


@takes_model
def save_checkpoint(model: Model, place: str | Path) -> None:
    """Write a checkpoint that stands alone, whole or not at all.

    raises   ModelError where a pruned tensor has lost its zeros; MachineError where `place` holds other files.
    """
    place = Path(place).resolve()
    refuse_foreign_files(place)
    names = {id(parameter): name for name, parameter in model.network.named_parameters()}
    pruned = {names[id(parameter)]: parameter for parameter in model.pruned}
    _assert_zeros(pruned, place)
    ours: dict[str, Any] = {"task": model.task}
    uniform = declare_sizes(model.network)
    if not uniform:
        ours |= _shapes_of(model.anatomy, model.network.config)
    if pruned:
        ours["pruned"] = sorted(pruned)
    if origins := _origins_of(model.anatomy):
        ours["origin"] = origins
    if model.quantization:
        ours["quantization"] = model.quantization.declared()
    if model.temperature and model.temperature.network == network_digest(model.network):
        ours |= model.temperature.declared()
    if model.cut:
        ours["cut"] = model.cut.declared()
    with new_directory(place) as partial:
        model.network.save_pretrained(partial)
        model.tokenizer.save_pretrained(partial)
        if model.sensitivity:
            write_json(partial / SENSITIVITY, model.sensitivity)
        _add_to_config(partial / "config.json", {KEY: ours} | ({} if uniform else {"transformers_weights": REFUSAL}))


def _shapes_of(anatomy: Anatomy, config: Any) -> dict[str, Any]:
    """What config.json declares where the stock keys can't."""
    shapes = [
        [size for size in (shape.heads, shape.feed_forward, shape.cross_heads) if size] for shape in anatomy.shapes
    ]
    stock = getattr(config, anatomy.family.hidden)
    return {"shapes": shapes} | ({} if anatomy.hidden_size == stock else {"hidden": anatomy.hidden_size})


def declare_sizes(network: Any) -> bool:
    """Whether the stock config can say the shapes; if so, it does afterwards."""
    anatomy, config = anatomy_of(network), network.config
    family, wanted = anatomy.family, _stock_sizes(anatomy)
    if wanted is None or not _expressible(family, wanted, config, anatomy.blocks[0].attention.head_size):
        return False
    changed = any(value != getattr(config, key, None) for key, value in wanted.items() if key != "n_inner")
    for key, value in wanted.items():
        if getattr(config, key, None) != value and not (key == "n_inner" and value == 4 * anatomy.hidden_size):
            setattr(config, key, value)
    if changed and family.head_size:
        setattr(config, family.head_size, anatomy.blocks[0].attention.head_size)
    return True


def _stock_sizes(anatomy: Anatomy) -> dict[str, int] | None:
    """{config key: size}, or None where one key would need two sizes."""
    sizes: dict[str, set[int]] = {anatomy.family.hidden: {anatomy.hidden_size}}
    for stack in anatomy.family.stacks:
        for block in anatomy.stack(stack.name):
            sizes.setdefault(stack.heads, set()).update(part.heads for part in block.attentions)
            sizes.setdefault(stack.feed_forward_size, set()).add(block.feed_forward.width)
            if stack.key_value_heads:
                sizes.setdefault(stack.key_value_heads, set()).add(block.attention.key_value_heads)
    return (
        None if any(len(found) > 1 for found in sizes.values()) else {key: found.pop() for key, found in sizes.items()}
    )


def _expressible(family: Family, wanted: dict[str, int], config: Any, head_size: int) -> bool:
    hidden, stock = wanted[family.hidden], getattr(config, family.hidden)
    if hidden != stock and (family.scales_embeddings or not family.head_size):
        return False
    heads = {wanted[stack.heads] for stack in family.stacks}
    if family.head_size:
        return not family.heads_divide_hidden or all(hidden % count == 0 for count in heads)
    return all(count * head_size == hidden for count in heads)


def _add_to_config(place: Path, keys: dict[str, Any]) -> None:
    write_json(place, json.loads(place.read_text(encoding="utf-8")) | keys)
