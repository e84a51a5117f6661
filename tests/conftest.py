"""Tiny random models of every family, with a tokenizer of their own, and rows that they can learn. No network."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on matrices this small a second thread only waits

import pytest

LABELS = ("negative", "positive")
SEED = 7
# in the order of their ids, which the families expect
BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_TOKENS = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
CHINESE = (
    "的一不是了我很好这个有也在就都没还太人店味道电影房间服务态度质量手机屏幕快慢差坏美喜欢失望推荐值得便宜贵，。！？"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
THINGS = ("film", "hotel", "phone", "soup", "room", "book", "service", "app", "staff", "story")
OPINIONS = (("good", "bad"), ("great", "awful"), ("lovely", "boring"))  # a pair for each filler
FILLERS = ("the {0} was {1}", "what a {1} {0} , we all said so in the end", "{1} {0} , and we would know")


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """60 short texts of unequal length, half positive and half negative; one word of each decides."""
    return [
        {"text": filler.format(thing, word), "label": label}
        for thing in THINGS
        for filler, pair in zip(FILLERS, OPINIONS, strict=True)
        for word, label in zip(pair, ("positive", "negative"), strict=True)
    ]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(family="bert", labels=None, **sizes)` → a directory that is built once and must not be changed.

    labels   class names of a trained-looking classifier; None: the bare network, as pretrained ones are.
    sizes    hidden=32, heads=4, blocks=3, feed_forward=48, positions=64.
    """
    built: dict[tuple[object, ...], Path] = {}

    def build(family: str = "bert", labels: Sequence[str] | None = None, **sizes: int) -> Path:
        key = (family, labels and tuple(labels), *sorted(sizes.items()))
        if key not in built:
            built[key] = tmp_path_factory.mktemp("tiny") / family
            _write_checkpoint(built[key], family, labels, sizes)
        return built[key]

    return build


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """`tiny_model(family="bert", labels=LABELS, **sizes)` → a fresh Model each time, free to change."""
    from moss_rlhf.tasks.loading import load

    loaded: dict[Path, Any] = {}

    def build(family: str = "bert", labels: Sequence[str] = LABELS, **sizes: int) -> Any:
        place = tiny_checkpoint(family, tuple(labels), **sizes)
        if place not in loaded:
            loaded[place] = load(place)
        return deepcopy(loaded[place])  # a hundredth of the time of loading

    return build


def _write_checkpoint(place: Path, family: str, labels: Sequence[str] | None, sizes: dict[str, int]) -> None:
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification

    tokenizer = _tokenizer(family, sizes.get("positions", 64))
    config = _config(family, tokenizer, **sizes)
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
    auto_class = AutoModel if labels is None else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = auto_class.from_config(config)
        for parameter in network.parameters():  # biases of 0 and norms of 1 would hide a wrong axis
            parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_pretrained(place)
    tokenizer.save_pretrained(place)


def _config(
    family: str,
    tokenizer: Any,
    *,
    hidden: int = 32,
    heads: int = 4,
    blocks: int = 3,
    feed_forward: int = 48,
    positions: int = 64,
) -> Any:
    from transformers import AutoConfig

    names = (
        {"dim": hidden, "n_heads": heads, "n_layers": blocks, "hidden_dim": feed_forward}
        if family == "distilbert"
        else {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_hidden_layers": blocks,
            "intermediate_size": feed_forward,
        }
    )
    if family == "electra":
        names["embedding_size"] = hidden // 2 + 1  # smaller than hidden: a projection stands between
    if "roberta" in family:
        positions += tokenizer.pad_token_id + 1
    return AutoConfig.for_model(
        family,
        **names,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=positions,
        initializer_range=0.1,
    )


def _tokenizer(family: str, positions: int) -> Any:
    """WordPiece over the rows' words, single letters and Chinese characters, special tokens as the family has them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ROBERTA_TOKENS if "roberta" in family else BERT_TOKENS
    words = sorted({*THINGS, *sum(OPINIONS, ()), *" ".join(FILLERS).format("", "").split()})
    pieces = dict.fromkeys([*special.values(), *LETTERS, *(f"##{letter}" for letter in LETTERS), *CHINESE, *words])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # spaces around Chinese characters
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special['cls']} $A {special['sep']}",
        special_tokens=[(special[name], vocabulary[special[name]]) for name in ("cls", "sep")],
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if family in ("bert", "electra") else None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=positions,
        model_input_names=inputs or ["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in special.items()},
    )
