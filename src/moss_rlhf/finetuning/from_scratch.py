"""A model from nothing but texts and sizes: a tokenizer learned from the texts, a network drawn at random."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moss_rlhf.data.texts import read_texts
from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.model.anatomy import family_of
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.tasks import TASKS

_TOKENS: Mapping[str, dict[str, str]] = {
    "encoder": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "decoder": {"pad": "<pad>", "bos": "<s>", "eos": "</s>"},
    "encoder-decoder": {"pad": "<pad>", "eos": "</s>"},
}
_FRAMES = {"encoder": "[CLS] $A [SEP]", "decoder": "<s> $A", "encoder-decoder": "$A </s>"}
_SENTINELS = 100
_OWN_TASK = {"encoder": "text-classification", "decoder": "text-generation", "encoder-decoder": "translation"}
_LONGEST = 512  # tokens, where the sizes name no limit


def from_scratch(
    config: Mapping[str, Any],
    texts: str | Path | Sequence[str],
    *,
    vocabulary: int = 8000,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> Model:
    """A model whose tokenizer is learned from `texts` and whose weights are drawn; `pretrain` it next.

    Encoders get WordPiece (lower case, each Chinese character by itself) and a classifier's head; decoders and
    encoder-decoders byte-level pairs, the latter with 100 sentinels, and the head they speak with.

    config      as in config.json: `model_type` and its sizes; ids of special tokens and `vocab_size` are filled in.
    texts       one a document; or a file, as for `pretrain`.
    vocabulary  most tokens that are learned, special ones included.
    labels      names in class-id order, of an encoder's head.
    raises      ModelError where the type is unknown or the labels are missing; DataError where there are no texts, or
                they are too many for the vocabulary's letters.
    """
    kind = family_of(str(config.get("model_type"))).kind
    if kind == "encoder" and not labels:
        raise ModelError("from_scratch: an encoder classifies; give the class names, labels=['negative', 'positive'].")
    found = read_texts(texts) if isinstance(texts, str | Path) else [text for text in texts if text.strip()]
    if not found:
        raise DataError("from_scratch.texts: there is no text; give at least one.")
    tokenizer = learned_tokenizer(found, kind, vocabulary, int(config.get("max_position_embeddings", _LONGEST)))
    return Model(_network(config, tokenizer, kind, labels, seed), tokenizer, _OWN_TASK[kind])


def learned_tokenizer(texts: Sequence[str], kind: str, vocabulary: int, longest: int) -> Any:
    """A fast tokenizer with the special tokens of a kind of network, the first ids theirs."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    named = _TOKENS[kind]
    sentinels = [f"<extra_id_{index}>" for index in range(_SENTINELS)] if kind == "encoder-decoder" else []
    special = [*named.values(), *sentinels]
    trainer: Any
    if kind == "encoder":
        tokenizer = Tokenizer(models.WordPiece(unk_token=named["unk"]))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=sorted(letters), show_progress=False
        )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() > vocabulary:
        raise DataError(
            f"from_scratch.vocabulary: {vocabulary} tokens don't hold the {tokenizer.get_vocab_size()} letters and "
            "special tokens of the texts. Give more."
        )
    frame = _FRAMES[kind]
    ends = [(token, tokenizer.token_to_id(token)) for token in frame.split() if token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=sentinels,
        **{f"{name}_token": token for name, token in named.items()},
    )


def _network(config: Mapping[str, Any], tokenizer: Any, kind: str, labels: Sequence[str] | None, seed: int) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    starts = {"decoder_start_token_id": tokenizer.pad_token_id} if kind == "encoder-decoder" else {}
    names = dict(enumerate(labels or ()))
    classes = {"id2label": names, "label2id": {name: index for index, name in names.items()}} if names else {}
    filled_in = ids | starts | classes | {"vocab_size": len(tokenizer)}
    _refuse_misspelt(config["model_type"], values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            ready = AutoConfig.for_model(config["model_type"], **(values | filled_in))
            _refuse_no_blocks(ready.to_dict())
            return TASKS[_OWN_TASK[kind]].auto_class().from_config(ready).eval()
        except (
            StrictDataclassError,
            ArithmeticError,
            AssertionError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            # whatever a family says of sizes that don't fit one another, each in its own way
            raise ModelError(f"from_scratch.config: no {config['model_type']} of such sizes: {error}") from None


def _refuse_no_blocks(config: Mapping[str, Any]) -> None:
    for stack in family_of(config["model_type"]).stacks:
        if int(config[stack.layers]) < 1:
            raise ModelError(f"from_scratch.config: {stack.layers} is {config[stack.layers]}; give at least 1.")


def _refuse_misspelt(kind: str, values: Mapping[str, Any]) -> None:
    """A configuration takes any key, older ones too: with hiden_size 32 the hidden size would be 768."""
    from transformers import AutoConfig

    usual = AutoConfig.for_model(kind)
    known = {*usual.to_dict(), *usual.attribute_map, *vars(usual)}
    for name in values:
        close = [] if name in known else difflib.get_close_matches(str(name), known, n=1, cutoff=0.85)
        if close:
            raise ModelError(f"from_scratch.config: a {kind} has no {name}; did you mean {close[0]!r}?")
