import json
import random
from copy import deepcopy

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from moss_rlhf.errors import DataError, ModelError, RecipeError
from moss_rlhf.model.checkpoint import Model, load_checkpoint, save_checkpoint
from moss_rlhf.model.vocabulary import ids_in
from moss_rlhf.optimization.trim_vocabulary import trim_vocabulary

SPECIAL = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>", "cls": "<s>", "mask": "<mask>"}
TEXTS = [
    f"{opening} {thing} {verb} {how}"
    for opening in ("the", "my old", "这个", "no")
    for thing in ("film", "hotel room", "电影", "soup", "telephone")
    for verb in ("was", "wasn't", "很", "seemed")
    for how in ("good", "awfully boring", "好看", "unremarkable !", "不错。")
]
OTHERS = ["quartz zebra sphinx", "房间 干净", "vexed 世界 jumping"]


def engine(kind):
    special = list(SPECIAL.values())
    options = {"special_tokens": special, "show_progress": False, "vocab_size": 260}
    corpus = [*TEXTS, *OTHERS]
    if kind == "WordPiece":
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk"])), trainers.WordPieceTrainer(**options)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif kind == "BPE":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(**options | {"vocab_size": 400}, initial_alphabet=alphabet)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(**options, unk_token=SPECIAL["unk"])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def tokenizer_of(kind):
    return PreTrainedTokenizerFast(
        tokenizer_object=engine(kind),
        model_max_length=64,
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    )


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
SMALL_BART = {
    "d_model": 16,
    **{f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")},
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "bos_token_id": 3,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
}
FAMILIES = {
    "bert": ("WordPiece", AutoModelForMaskedLM, SMALL),
    "roberta": ("BPE", AutoModelForMaskedLM, SMALL),
    "deberta-v2": ("Unigram", AutoModelForMaskedLM, SMALL),
    "gpt2": ("BPE", AutoModelForCausalLM, {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama": ("Unigram", AutoModelForCausalLM, SMALL | {"tie_word_embeddings": False}),
    "t5": ("Unigram", AutoModelForSeq2SeqLM, SMALL_T5),
    "bart": ("BPE", AutoModelForSeq2SeqLM, SMALL_BART),
}


def model_of(family, spare_rows=3):
    kind, auto_class, sizes = FAMILIES[family]
    tokenizer = tokenizer_of(kind)
    defaults = {"vocab_size": len(tokenizer) + spare_rows, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1}
    config = AutoConfig.for_model(family, **defaults | sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = auto_class.from_config(config).eval()
        for tensor in [*network.parameters(), *(b for b in network.buffers() if b.shape[:1] == (1,) and b.dim() == 2)]:
            if tensor.is_floating_point():
                tensor.data += 0.1 * torch.randn_like(tensor)
    return Model(network, tokenizer, "text-classification")


def logits_of(model, texts):
    outputs = []
    for text in texts:
        inputs = model.tokenizer(text, return_tensors="pt")
        if model.network.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            outputs.append(model.network(**inputs).logits[0])
    return outputs


def assert_same(loaded, model, texts):
    """The same weights to the bit; logits within what the place of weights in memory does to the order of sums."""
    state = model.network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.network.state_dict().items())
    for old, new in zip(logits_of(model, texts), logits_of(loaded, texts), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=2e-6)


@pytest.fixture(scope="module", params=FAMILIES)
def trimmed(request):
    """A model, what it was trimmed to, and the facts."""
    before = model_of(request.param)
    after = deepcopy(before)
    facts = trim_vocabulary(after, TEXTS[::7], characters="seen")
    return before, after, facts


def test_kept_texts_get_the_same_pieces_and_the_same_logits(trimmed):
    before, after, _ = trimmed
    columns = ids_in(after.tokenizer.get_vocab(), before.tokenizer.get_vocab())
    sample = TEXTS[::7]
    assert [after.tokenizer.tokenize(text) for text in sample] == [before.tokenizer.tokenize(text) for text in sample]
    for old, new in zip(logits_of(before, sample), logits_of(after, sample), strict=True):
        assert new.shape[1] == len(after.tokenizer) < len(before.tokenizer)
        # the head's product is the same to the bit but for the order a library may sum narrower matrices in
        torch.testing.assert_close(new, old[:, columns], rtol=0, atol=2e-6)


def test_what_the_network_computes_below_the_head_is_the_same_bit_for_bit(trimmed):
    before, after, _ = trimmed
    for text in TEXTS[::7]:
        states = []
        for model in (before, after):
            ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
            inner = model.network.get_encoder() if model.network.config.is_encoder_decoder else model.network.base_model
            with torch.no_grad():
                states.append(inner(input_ids=ids).last_hidden_state)
        assert torch.equal(*states)


def test_tables_configs_and_ties_follow(trimmed):
    before, after, facts = trimmed
    network, size = after.network, len(after.tokenizer)
    assert size % 8 == 0
    assert network.config.vocab_size == network.get_input_embeddings().num_embeddings == size
    assert network.get_output_embeddings().weight.shape[0] == network.get_output_embeddings().out_features == size
    tied = [model.network.get_output_embeddings().weight is model.network.get_input_embeddings().weight
            for model in (before, after)]  # fmt: skip
    assert tied[0] == tied[1]
    removed = before.network.get_input_embeddings().num_embeddings - size
    assert facts["tokens"] == f"{size + removed} → {size}"
    assert facts["parameters"] == f"{before.parameters} → {after.parameters}"
    assert facts["bytes_saved"] == 4 * (before.parameters - after.parameters) >= 4 * 16 * removed
    assert facts["corpora"] | {"tokens": ""} == {
        "texts": len(TEXTS[::7]), "texts_same": 1.0, "tokens_gone": 0.0, "tokens": "", "unknown": "0 → 0"
    }  # fmt: skip
    assert facts["faster_here"].startswith("yes")


def test_saved_and_loaded_it_is_the_same(trimmed, tmp_path):
    _, after, _ = trimmed
    after.network.save_pretrained(tmp_path)
    after.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == after.tokenizer.get_vocab()
    assert tokenizer.model_max_length == after.tokenizer.model_max_length == 64
    random.seed(0)
    for _ in range(200):
        text = "".join(random.choices(" ".join([*TEXTS, *OTHERS, "Ω🙂"]), k=12))
        assert tokenizer(text)["input_ids"] == after.tokenizer(text)["input_ids"]
    network = type(after.network).from_pretrained(tmp_path).eval()
    assert_same(Model(network, tokenizer, after.task), after, TEXTS[:3])
    state = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "added_tokens_decoder" not in state  # it would hold old ids


def test_special_tokens_keep_their_meaning(trimmed):
    before, after, _ = trimmed
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id"):
        old, new = (getattr(model.network.config, name, None) for model in (before, after))
        assert (old is None) == (new is None)
        if old is not None:
            assert after.tokenizer.convert_ids_to_tokens(new) == before.tokenizer.convert_ids_to_tokens(old)
    assert after.tokenizer.special_tokens_map == before.tokenizer.special_tokens_map


def test_ids_in_the_configs_follow():
    model = model_of("gpt2")
    vocabulary = model.tokenizer.get_vocab()
    last, film, gone = (vocabulary[token] for token in ("Ġunremarkable", "Ġfilm", "Ġzebra"))
    model.network.generation_config = GenerationConfig(
        eos_token_id=[1, last],
        suppress_tokens=[film, gone],
        bad_words_ids=[[film, 0], [gone], [film, gone]],
        forced_bos_token_id=last,
        forced_decoder_ids=[[1, film]],
    )
    trim_vocabulary(model, ["the film"])
    now, config = model.tokenizer.get_vocab(), model.network.generation_config
    assert "Ġzebra" not in now
    assert now["Ġunremarkable"] < last
    assert config.eos_token_id == [1, now["Ġunremarkable"]]
    assert config.suppress_tokens == [now["Ġfilm"]]
    assert config.bad_words_ids == [[now["Ġfilm"], 0]]
    assert config.forced_bos_token_id == now["Ġunremarkable"]
    assert config.forced_decoder_ids == [[1, now["Ġfilm"]]]


def test_positions_counted_from_the_padding_id_stay():
    model = model_of("roberta")
    tokenizer = json.loads(model.tokenizer.backend_tokenizer.to_str())
    padding = model.tokenizer.get_vocab()["!"]  # many tokens before it are needed by no text
    embeddings = model.network.base_model.embeddings
    embeddings.padding_idx = embeddings.position_embeddings.padding_idx = padding
    embeddings.word_embeddings.padding_idx = model.network.config.pad_token_id = padding
    model.tokenizer.pad_token = "!"  # noqa: S105
    assert tokenizer["model"]["vocab"]["!"] == padding > 4
    trim_vocabulary(model, ["the film"])
    assert model.tokenizer.pad_token_id == model.network.config.pad_token_id == padding
    assert embeddings.word_embeddings.padding_idx == embeddings.padding_idx == padding


@pytest.mark.parametrize(
    ("tokenizer_class", "first"),
    [(T5Tokenizer, ("<pad>", "</s>", "<unk>")), (XLMRobertaTokenizer, ("<s>", "<pad>", "</s>", "<unk>"))],
)
def test_classes_that_build_themselves_anew_come_back_the_same(tokenizer_class, first):
    learnt = json.loads(engine("Unigram").to_str())["model"]["vocab"]
    extra = [[f"<extra_id_{index}>", 0.0] for index in range(99, -1, -1)] if tokenizer_class is T5Tokenizer else []
    table = [
        *([token, 0.0] for token in first),
        *(entry for entry in learnt if entry[0] not in SPECIAL.values()),
        *extra,
    ]
    tokenizer = tokenizer_class(vocab=[tuple(entry) for entry in table])
    model = model_of("t5")
    model.network.resize_token_embeddings(len(tokenizer))
    model.tokenizer = tokenizer
    sample = [*TEXTS[::7], "<mask> the film" if tokenizer_class is XLMRobertaTokenizer else "<extra_id_3> film"]
    pieces = [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in sample]
    trim_vocabulary(model, sample, characters="seen")
    assert len(model.tokenizer) < len(tokenizer)
    assert type(model.tokenizer) is tokenizer_class
    assert [model.tokenizer.convert_ids_to_tokens(model.tokenizer(text)["input_ids"]) for text in sample] == pieces


# --- options -------------------------------------------------------------------------------------------------------


def test_rare_tokens_go_and_their_words_are_spelled():
    model = model_of("bert")
    facts = trim_vocabulary(model, [*["the film was good"] * 3, "my old soup"], minimum_count=2, multiple_of=1)
    assert model.tokenizer.tokenize("the film was good") == ["the", "film", "was", "good"]
    spelled = model.tokenizer.tokenize("soup")
    assert spelled != ["soup"]
    assert "".join(piece.removeprefix("##") for piece in spelled) == "soup"
    assert facts["corpora"]["texts_same"] == 3 / 4
    # 5 tokens with the ending, three times, and 4; my, old and soup are gone
    assert facts["corpora"]["tokens_gone"] == pytest.approx(3 / 19)
    assert facts["corpora"]["unknown"] == "0 → 0"


def test_kept_words_stay_in_and_at_the_start_of_a_sentence():
    for keep in ((), ("zebra",)):
        model = model_of("gpt2")
        whole = model.tokenizer.tokenize("zebra zebra")
        trim_vocabulary(model, ["the film"] * 5, minimum_count=5, keep=keep)
        assert (model.tokenizer.tokenize("zebra zebra") == whole) == bool(keep)


def test_all_characters_stay_or_those_seen():
    unseen = {}
    for characters in ("all", "seen"):
        model = model_of("bert")
        facts = trim_vocabulary(model, ["the film"], characters=characters, held_out=["quartz 世界", "the film"])
        unseen[characters] = model.tokenizer.unk_token in model.tokenizer.tokenize("quartz 世界")
        assert facts["held_out"]["texts"] == 2
        assert facts["held_out"]["texts_same"] == 0.5
    assert unseen == {"all": False, "seen": True}
    assert facts["held_out"]["unknown"] == "0 → 3"  # quartz, 世, 界


def test_unknown_words_of_the_corpora_stay_unknown():
    model = model_of("bert")
    vocabulary = json.loads(model.tokenizer.backend_tokenizer.to_str())
    # abcd: "abc", then stuck; without "abc" it would be a ##bcd
    pieces = [*SPECIAL.values(), "abc", "a", "##bcd", "x"]
    vocabulary["model"]["vocab"] = {piece: index for index, piece in enumerate(pieces)}
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(vocabulary)),
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    )
    facts = trim_vocabulary(model, ["abcd x", "a", "abcd <mask>"], multiple_of=1)
    assert model.tokenizer.tokenize("abcd x") == ["<unk>", "x"]
    assert set(model.tokenizer.get_vocab()) == {*SPECIAL.values(), "abc", "a", "x"}
    assert facts["corpora"]["texts_same"] == 1.0


def test_rows_and_data_sets_are_read_as_texts():
    from datasets import Dataset

    rows = [{"text": text, "label": 0} for text in TEXTS[::7]]
    sizes = set()
    for corpora in (TEXTS[::7], rows, Dataset.from_list(rows)):
        model = model_of("bert")
        sizes.add((trim_vocabulary(model, corpora)["tokens"], tuple(sorted(model.tokenizer.get_vocab()))))
    assert len(sizes) == 1


# --- with the rest of the house ------------------------------------------------------------------------------------


def test_the_parent_teaches_through_the_ids_of_its_own_vocabulary():
    parent = model_of("gpt2")
    child = deepcopy(parent)
    trim_vocabulary(child, TEXTS[::7])
    parents = torch.from_numpy(ids_in(child.tokenizer.get_vocab(), parent.tokenizer.get_vocab()))
    ids = child.tokenizer(TEXTS[7], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        taught = parent.network(input_ids=parents[ids]).logits[..., parents]
        torch.testing.assert_close(child.network(input_ids=ids).logits, taught, rtol=0, atol=2e-6)


def test_zeros_that_must_stay_are_those_that_are_left():
    model = model_of("bert")
    table = model.network.get_input_embeddings().weight
    attention = model.network.base_model.encoder.layer[0].attention.self.query.weight
    gone, stays = (model.tokenizer.get_vocab()[token] for token in ("zebra", "film"))
    attention.data[0] = 0
    table.data[gone] = 0
    model.pruned = [table, attention]
    other = deepcopy(model)
    other.network.get_input_embeddings().weight.data[stays, :2] = 0
    for each in (model, other):
        trim_vocabulary(each, TEXTS[::7], characters="seen", multiple_of=1)
    assert [id(each) for each in model.pruned] == [id(attention)]
    assert other.pruned[0] is other.network.get_input_embeddings().weight
    assert torch.count_nonzero(other.pruned[0] == 0) == 2


def test_a_trimmed_classifier_is_a_plain_checkpoint(tiny_model, rows, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = tiny_model("bert")
    before = logits_of(model, [row["text"] for row in rows])
    facts = trim_vocabulary(model, rows)
    assert facts["faster_here"].startswith("no")
    assert all(torch.equal(*pair) for pair in zip(before, logits_of(model, [r["text"] for r in rows]), strict=True))
    save_checkpoint(model, tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model", AutoModelForSequenceClassification)
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    for network in (loaded.network, plain.eval()):
        assert_same(Model(network, loaded.tokenizer, model.task), model, [row["text"] for row in rows])


def test_trimming_twice_changes_nothing_more():
    model = model_of("t5")
    trim_vocabulary(model, TEXTS[::7])
    once, state = model.tokenizer.get_vocab(), deepcopy(model.network.state_dict())
    trim_vocabulary(model, TEXTS[::7])
    assert model.tokenizer.get_vocab() == once
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.network.state_dict().items())


# --- what is refused -----------------------------------------------------------------------------------------------


class Slow:
    is_fast = False


def slow(model):
    model.tokenizer = Slow()


def quantized(model):
    model.quantization = "int8"


def at_random(model):
    model.tokenizer._tokenizer.model.dropout = 0.1


def word_level(model):
    model.tokenizer._tokenizer.model = models.WordLevel({"<unk>": 0, "film": 1}, unk_token=SPECIAL["unk"])


@pytest.mark.parametrize(
    ("spoil", "texts", "options", "error", "message"),
    [
        (quantized, TEXTS, {}, ModelError, "quantized already"),
        (slow, TEXTS, {}, ModelError, "Slow has no tokenizer.json"),
        (at_random, TEXTS, {}, ModelError, "drops merges at random"),
        (word_level, TEXTS, {}, ModelError, "of the kind WordLevel; WordPiece, BPE, Unigram"),
        (None, [], {}, DataError, r"expected a list of texts or rows, got \[\]"),
        (None, "the film", {}, DataError, "expected a list of texts"),
        (None, ["", ""], {}, DataError, "hold no token"),
        (
            None,
            [{"input_ids": [1, 2]}],
            {},
            DataError,
            "columns input_ids and text-classification keeps its texts in t",
        ),
        (
            None,
            TEXTS,
            {"minimum_count": 0},
            RecipeError,
            "minimum_count: 0 can't be used; it must be greater than or equal to 1",
        ),
        (
            None,
            TEXTS,
            {"multiple_of": -8},
            RecipeError,
            "multiple_of: -8 can't be used; it must be greater than or equal to 1",
        ),
    ],
)
def test_what_can_not_be_trimmed_is_refused_and_untouched(spoil, texts, options, error, message):
    model = model_of("gpt2")
    if spoil is not None:
        spoil(model)
    state, tokenizer = deepcopy(model.network.state_dict()), model.tokenizer
    with pytest.raises(error, match=message):
        trim_vocabulary(model, texts, **options)
    assert model.tokenizer is tokenizer
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.network.state_dict().items())
