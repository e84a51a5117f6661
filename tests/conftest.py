"""Tiny random models of every family, with a tokenizer of their own, and rows that they can learn. No network."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on matrices this small a second thread only waits

import pytest

LABELS = ("negative", "positive")
SEED = 7
# special tokens in the order of their ids, which the families expect
BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_TOKENS = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
ALBERT_TOKENS = {"pad": "<pad>", "unk": "<unk>", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
DEBERTA_TOKENS = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
LLAMA_TOKENS = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}  # none for padding
GPT_TOKENS = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}  # one for all, none for padding
QWEN_TOKENS = {"pad": "<|endoftext|>", "eos": "<|im_end|>", "unk": "<unk>"}
T5_TOKENS = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
BART_TOKENS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
TOKENS = {
    "roberta": ROBERTA_TOKENS,
    "xlm-roberta": ROBERTA_TOKENS,
    "albert": ALBERT_TOKENS,
    "deberta-v2": DEBERTA_TOKENS,
    "gpt2": GPT_TOKENS,
    "gpt_neox": GPT_TOKENS,
    "opt": BART_TOKENS,
    "llama": LLAMA_TOKENS,
    "mistral": LLAMA_TOKENS,
    "qwen2": QWEN_TOKENS,
    "qwen3": QWEN_TOKENS,
    "gemma": {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"},
    "t5": T5_TOKENS,
    "mt5": T5_TOKENS,
    "bart": BART_TOKENS,
    "marian": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
}
FRAMES = {  # what stands around a text
    "gpt2": "$A",
    "gpt_neox": "$A",
    "opt": "</s> $A",
    "llama": "<s> $A",
    "mistral": "<s> $A",
    "qwen2": "$A",
    "qwen3": "$A",
    "gemma": "<bos> $A",
    "t5": "$A </s>",
    "mt5": "$A </s>",
    "bart": "<s> $A </s>",
    "marian": "$A </s>",
}
TWO_SEGMENTS = ("bert", "electra", "albert", "deberta-v2")  # their tokenizers make token_type_ids
CHINESE = (
    "的一不是了我很好这个有也在就都没还太人店味道电影房间服务态度质量手机屏幕快慢差坏美喜欢失望推荐值得便宜贵，。！？"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
THINGS = ("film", "hotel", "phone", "soup", "room", "book", "service", "app", "staff", "story")
OPINIONS = (("good", "bad"), ("great", "awful"), ("lovely", "boring"))  # a pair for each filler
FILLERS = ("the {0} was {1}", "what a {1} {0} , we all said so in the end", "{1} {0} , and we would know")


@pytest.fixture(scope="session")
def imported() -> set[str]:
    """The modules whose objects were frozen."""
    return set()


@pytest.fixture(autouse=True)
def frozen_imports(imported: set[str]) -> None:
    """Keep what is imported out of garbage collection, which every training asks for: a quarter of a second each."""
    if len(sys.modules) > len(imported) + 20:
        imported.update(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def one_round() -> Iterator[None]:
    """Let narrow and shorten time their networks once: no test reads the milliseconds, and 15 rounds outlast them."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:
            patch.setattr("moss_rlhf.model.latency._MOST_ROUNDS", 1)
        yield


@pytest.fixture(scope="module")
def memory_not_measured() -> Iterator[None]:
    """Let runs leave peak memory out: each measurement is a process that imports everything, seconds long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moss_rlhf.measuring.peak_memory", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """Tiny matrices: two threads only wait for each other. How many there are is part of a fingerprint.

    Tests that run at the same time get a core each.
    """
    cores = sorted(os.sched_getaffinity(0))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {cores[-1 - worker % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


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
def rows_of(rows: list[dict[str, str]]) -> Callable[[str], list[dict[str, str]]]:
    """`rows_of(task)` → 60 rows with the task's columns: a translation turns its source's words round."""
    columns = {
        "text-classification": lambda row: row,
        "text-generation": lambda row: {"text": row["text"]},
        "translation": lambda row: {"source": row["text"], "target": " ".join(reversed(row["text"].split()))},
    }
    return lambda task: [columns[task](row) for row in rows]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(family="bert", labels=None, **sizes)` → a directory that is built once and must not be changed.

    Encoders get a head for classification, decoders and encoder-decoders the one they speak with.

    labels   class names of a trained-looking classifier; None: the bare network, as pretrained encoders are.
    sizes    hidden=32, heads=4, blocks=3, feed_forward=48, positions=64; further ones as config.json names them.
    """
    built: dict[str, Path] = {}

    def build(family: str = "bert", labels: Sequence[str] | None = None, **sizes: Any) -> Path:
        key = repr((family, labels and tuple(labels), sorted(sizes.items())))
        if key not in built:
            built[key] = tmp_path_factory.mktemp("tiny") / family
            _write_checkpoint(built[key], family, labels, sizes)
        return built[key]

    return build


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """`tiny_model(family="bert", labels=LABELS, **sizes)` → a fresh Model each time, free to change.

    Encoders classify, decoders generate text, encoder-decoders translate.
    """
    loaded: dict[Path, Any] = {}

    def build(family: str = "bert", labels: Sequence[str] = LABELS, **sizes: Any) -> Any:
        place = tiny_checkpoint(family, tuple(labels), **sizes)
        if place not in loaded:
            loaded[place] = _load(place, family)
        return deepcopy(loaded[place])  # a hundredth of the time of loading

    return build


def _load(place: Path, family: str) -> Any:
    from moss_rlhf.model.checkpoint import load_pretrained
    from moss_rlhf.tasks import TASKS
    from moss_rlhf.tasks.loading import load

    if _task(family) in TASKS:
        return load(place, task=_task(family))
    return load_pretrained(place, _task(family), _auto_class(family, None), None)


def _task(family: str) -> str:
    from moss_rlhf.model.anatomy import FAMILIES

    tasks = {"encoder": "text-classification", "decoder": "text-generation", "encoder-decoder": "translation"}
    return tasks[FAMILIES[family].kind]


def _auto_class(family: str, labels: Sequence[str] | None) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    speaking = {"text-generation": AutoModelForCausalLM, "translation": AutoModelForSeq2SeqLM}
    return speaking.get(_task(family), AutoModel if labels is None else AutoModelForSequenceClassification)


def _write_checkpoint(place: Path, family: str, labels: Sequence[str] | None, sizes: dict[str, Any]) -> None:
    import torch

    tokenizer = _tokenizer(family, sizes.get("positions", 64))
    config = _config(family, tokenizer, **sizes)
    if labels is not None and _task(family) == "text-classification":
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = _auto_class(family, labels).from_config(config)
        for parameter in network.parameters():  # biases of 0 and norms of 1 would hide a wrong axis
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        if family in ("bart", "marian"):
            network.final_logits_bias += 0.1 * torch.randn_like(network.final_logits_bias)
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
    **further: Any,
) -> Any:
    from transformers import AutoConfig

    sizes = _sizes(family, hidden, heads, blocks, feed_forward)
    offset = tokenizer.pad_token_id + 1 if family in ("roberta", "xlm-roberta") else 0
    limits = {} if family in ("t5", "mt5") else {"max_position_embeddings": positions + offset}
    range_name = {"opt": "init_std", "bart": "init_std", "marian": "init_std"}.get(family, "initializer_range")
    own = _peculiarities(family, hidden, heads, blocks, len(tokenizer) - 1)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    ids = special if _task(family) != "text-classification" else {"pad_token_id": tokenizer.pad_token_id}
    spread = {} if family in ("t5", "mt5") else {range_name: 0.1}
    return AutoConfig.for_model(
        family, **({"vocab_size": len(tokenizer)} | sizes | limits | spread | ids | own | further)
    )


def _sizes(family: str, hidden: int, heads: int, blocks: int, feed_forward: int) -> dict[str, Any]:
    """The four sizes under the family's own names."""
    values = (hidden, heads, blocks, feed_forward)
    names = {
        "distilbert": ("dim", "n_heads", "n_layers", "hidden_dim"),
        "gpt2": ("n_embd", "n_head", "n_layer", "n_inner"),
        "opt": ("hidden_size", "num_attention_heads", "num_hidden_layers", "ffn_dim"),
        "t5": ("d_model", "num_heads", "num_layers", "d_ff"),
        "mt5": ("d_model", "num_heads", "num_layers", "d_ff"),
    }.get(family, ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"))
    if family in ("bart", "marian"):
        stacks = ("encoder", "decoder")
        parts = {f"{stack}_{part}" for stack in stacks for part in ("attention_heads", "layers", "ffn_dim")}
        of = {"attention_heads": heads, "layers": blocks, "ffn_dim": feed_forward}
        return {"d_model": hidden} | {part: of[part.partition("_")[2]] for part in sorted(parts)}
    return dict(zip(names, values, strict=True))


def _peculiarities(family: str, hidden: int, heads: int, blocks: int, last_token: int) -> dict[str, Any]:
    """What makes a family differ from the plain case, each at least once."""
    patterns = {
        "modernbert": ["full_attention", *["sliding_attention", "full_attention"] * blocks][:blocks],
        "qwen2": [*["sliding_attention", "full_attention"] * blocks][:blocks],
    }
    relative = {"d_kv": hidden // heads, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8}
    pairs = {"num_key_value_heads": heads // 2 if heads % 2 == 0 else 1}
    return {
        "electra": {"embedding_size": hidden // 2 + 1},  # smaller than hidden: a projection stands between
        "albert": {"embedding_size": hidden // 2 + 1},
        "deberta-v2": {
            "relative_attention": True,
            "pos_att_type": "c2p|p2c",
            "share_att_key": True,
            "position_buckets": 5,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "conv_kernel_size": 3,
            "max_relative_positions": -1,
        },
        "modernbert": {
            "layer_types": patterns["modernbert"],
            "local_attention": 6,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "opt": {"word_embed_proj_dim": hidden},
        "llama": pairs,
        "mistral": {**pairs, "head_dim": 6},  # not hidden / heads
        "qwen2": {
            **pairs,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": patterns["qwen2"],
            "tie_word_embeddings": True,
        },
        "qwen3": {**pairs, "head_dim": 10},
        "gemma": {"num_key_value_heads": 1, "head_dim": hidden // heads},
        "t5": {**relative, "decoder_start_token_id": 0},
        "mt5": {**relative, "d_kv": 6, "decoder_start_token_id": 0},
        "bart": {"decoder_start_token_id": 2, "forced_eos_token_id": 2},
        "marian": {"decoder_start_token_id": last_token, "forced_eos_token_id": 0, "scale_embedding": True},
    }.get(family, {})


def _tokenizer(family: str, positions: int) -> Any:
    if family == "qwen2":  # transformers takes Qwen2Tokenizer for it, whatever class the file names
        return _byte_pairs(positions)
    return _word_pieces(family, positions)


def _byte_pairs(positions: int) -> Any:
    """Qwen2's own tokenizer over the rows' words and single bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(QWEN_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([filler.format("", "") for filler in FILLERS], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    special = {f"{name}_token": token for name, token in QWEN_TOKENS.items()}
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges, model_max_length=positions, **special)


def _word_pieces(family: str, positions: int) -> Any:
    """WordPiece over the rows' words, single letters and Chinese characters, special tokens as the family has them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = TOKENS.get(family, BERT_TOKENS)
    words = sorted({*THINGS, *sum(OPINIONS, ()), *" ".join(FILLERS).format("", "").split()})
    pieces = dict.fromkeys([*special.values(), *LETTERS, *(f"##{letter}" for letter in LETTERS), *CHINESE, *words])
    if family == "marian":  # its padding, which is also where the decoder starts, is the last one
        del pieces[special["pad"]]
        pieces[special["pad"]] = None
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # spaces around Chinese characters
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    frame = FRAMES.get(family) or f"{special['cls']} $A {special['sep']}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame,
        special_tokens=[(piece, vocabulary[piece]) for piece in frame.split() if piece in vocabulary],
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if family in TWO_SEGMENTS else None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=positions,
        model_input_names=inputs or ["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in special.items()},
    )
