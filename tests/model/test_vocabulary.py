import csv
import json
import random
from importlib import resources

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from moss_rlhf.errors import ModelError
from moss_rlhf.model.vocabulary import Vocabulary, ids_in, rewrite, words, words_probe

BRACKETED, UNKNOWN, PADDING = "[UNK]", "<unk>", "[PAD]"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def demo_texts(language):
    with (resources.files("moss_rlhf.data") / f"demo/{language}-train.csv").open(encoding="utf-8", newline="") as file:
        return [max(row.values(), key=len) for row in csv.DictReader(file)]


TEXTS = [*demo_texts("english")[:400], *demo_texts("chinese")]


def trained(model, trainer, *, split, normalizer=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def wordpiece():
    return trained(
        models.WordPiece(unk_token=BRACKETED),
        trainers.WordPieceTrainer(
            vocab_size=900, special_tokens=["[PAD]", "[UNK]"], show_progress=False, limit_alphabet=80
        ),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        split=pre_tokenizers.BertPreTokenizer(),
    )


def byte_level():
    return trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=900,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<end>"],
            show_progress=False,
        ),
        split=pre_tokenizers.ByteLevel(add_prefix_space=False),
    )


def whole_words():
    tokenizer = json.loads(byte_level().to_str())
    tokenizer["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(tokenizer))


def byte_fallback():
    """As Llama's are converted from SentencePiece: every split of a piece is a merge, a text is one word."""
    learnt = trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=700, limit_alphabet=120, special_tokens=["<unk>"], show_progress=False),
        split=pre_tokenizers.Metaspace(),
    )
    order = sorted(learnt.get_vocab().items(), key=lambda item: item[1])
    pieces = {piece: index for index, piece in enumerate(["<unk>", *BYTES, *(piece for piece, _ in order[1:])])}
    splits = [(piece[:at], piece[at:]) for piece in pieces if piece not in BYTES for at in range(1, len(piece))]
    merges = [(left, right) for left, right in splits if left in pieces and right in pieces]
    assert len(merges) > len({left + right for left, right in merges})  # some pieces have several
    tokenizer = Tokenizer(models.BPE(pieces, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return tokenizer


def marked(**marks):
    return trained(
        models.BPE(unk_token=UNKNOWN, **marks),
        trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"], limit_alphabet=90, show_progress=False, **marks),
        split=pre_tokenizers.Whitespace(),
    )


def unigram():
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=2500, special_tokens=["<unk>"], unk_token=UNKNOWN, show_progress=False),
        split=pre_tokenizers.Metaspace(),
    )


KINDS = {
    "WordPiece": wordpiece,
    "byte-level BPE": byte_level,
    "BPE that takes whole words": whole_words,
    "BPE with byte fallback": byte_fallback,
    "BPE with </w>": lambda: marked(end_of_word_suffix="</w>"),
    "BPE with ##": lambda: marked(continuing_subword_prefix="##"),
    "Unigram": unigram,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def spec_of(tokenizer):
    return json.loads(tokenizer.to_str())


def kept_ids(vocabulary, pieces):
    return sorted(vocabulary.ids[piece] for piece in vocabulary.closed(set(pieces) | vocabulary.always()))


def rebuilt(spec, kept):
    return Tokenizer.from_str(json.dumps(rewrite(spec, kept)))


def random_texts(source, count):
    """Texts whose words come from `source` but stand in other places, some cut short, some run together."""
    pool = [word for text in source for word in text.split()]
    for _ in range(count):
        chosen = random.choices(pool, k=random.randint(1, 6))
        text = random.choice([" ", " ", ""]).join(chosen)
        yield text[: random.randint(1, len(text))]


def test_every_text_of_kept_pieces_encodes_to_the_same_pieces(tokenizer):
    random.seed(0)
    vocabulary = Vocabulary(spec_of(tokenizer))
    compared = 0
    for _ in range(4):
        chosen = random.sample(TEXTS, 60)
        used = {vocabulary.pieces[index] for text in chosen for index in tokenizer.encode(text).ids}
        kept = kept_ids(vocabulary, used)
        small = rebuilt(vocabulary.spec, kept)
        assert small.get_vocab_size() == len(kept) < tokenizer.get_vocab_size()
        assert small.get_vocab() == {vocabulary.pieces[old]: new for new, old in enumerate(kept)}
        for text in [*chosen, *random_texts(chosen, 400), *TEXTS]:
            before, after = tokenizer.encode(text), small.encode(text)
            known = vocabulary.kind != "WordPiece" or vocabulary.ids[vocabulary.unknown] not in before.ids
            if set(before.ids) <= set(kept) and known:
                assert after.tokens == before.tokens
                assert [kept[index] for index in after.ids] == before.ids
                compared += 1
    assert compared > 400


def test_nothing_becomes_unknown_where_all_characters_stay(tokenizer):
    random.seed(1)
    vocabulary = Vocabulary(spec_of(tokenizer))
    pieces = vocabulary.characters(None, lambda _: True) | vocabulary.always()
    small = rebuilt(vocabulary.spec, kept_ids(vocabulary, pieces))
    unknown = vocabulary.ids.get(vocabulary.unknown)
    for text in [*TEXTS, *random_texts(TEXTS, 300)]:
        lost = {index for index in small.encode(text).ids if small.id_to_token(index) == vocabulary.unknown}
        assert not lost or unknown in tokenizer.encode(text).ids


# --- what would go wrong without each rule -------------------------------------------------------------------------


def bare_wordpiece(*pieces):
    return Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token=BRACKETED))


def test_a_word_that_gets_stuck_stays_unknown_only_with_the_pieces_of_its_walk():
    tokenizer = bare_wordpiece("[UNK]", "abc", "a", "##bcd")
    vocabulary = Vocabulary(spec_of(tokenizer))
    assert tokenizer.encode("abcd").tokens == ["[UNK]"]
    assert rebuilt(vocabulary.spec, [0, 2, 3]).encode("abcd").tokens == ["a", "##bcd"]  # the trap
    assert vocabulary.failed_walk("abcd") == ["abc"]
    assert vocabulary.failed_walk("abc") == []
    assert vocabulary.failed_walk("a" * 101) == []  # unknown for its length, whatever the pieces
    assert rebuilt(vocabulary.spec, [0, 1, 2, 3]).encode("abcd").tokens == ["[UNK]"]


def test_merges_by_hand():
    # "abcd": bc (rank 0), then a+bc (1), then abc+d (3); ab (2) never gets the chance
    merges = [("b", "c"), ("a", "bc"), ("a", "b"), ("abc", "d"), ("ab", "c")]
    pieces = {piece: index for index, piece in enumerate(["a", "b", "c", "d", "bc", "abc", "ab", "abcd"])}
    vocabulary = Vocabulary(spec_of(Tokenizer(models.BPE(pieces, merges))))
    assert vocabulary.derivation("abcd") == [("b", "c"), ("a", "bc"), ("abc", "d")]
    assert vocabulary.closed({"abcd"}) == {"a", "b", "c", "d", "bc", "abc", "abcd"}
    assert vocabulary.derivation("d") == vocabulary.derivation("dd") == []
    smaller = rewrite(vocabulary.spec, [pieces[piece] for piece in vocabulary.closed({"abcd"})])
    assert smaller["model"]["merges"] == [["b", "c"], ["a", "bc"], ["abc", "d"]]


def test_the_leftmost_of_equal_merges_comes_first():
    vocabulary = Vocabulary(spec_of(Tokenizer(models.BPE({"a": 0, "aa": 1, "aaa": 2}, [("a", "a"), ("aa", "a")]))))
    assert vocabulary.derivation("aaa") == [("a", "a"), ("aa", "a")]


def test_merges_of_marked_words_by_hand():
    pieces = ["l", "##o", "##w", "lo", "low", "##ow"]
    tokenizer = models.BPE(
        {piece: index for index, piece in enumerate(pieces)},
        [("l", "##o"), ("lo", "##w"), ("##o", "##w")],
        continuing_subword_prefix="##",
    )
    vocabulary = Vocabulary(spec_of(Tokenizer(tokenizer)))
    assert vocabulary.derivation("low") == [("l", "##o"), ("lo", "##w")]
    assert vocabulary.derivation("##ow") == [("##o", "##w")]
    suffixed = models.BPE(
        {piece: index for index, piece in enumerate(["l", "o", "w</w>", "lo", "low</w>"])},
        [("l", "o"), ("lo", "w</w>")],
        end_of_word_suffix="</w>",
    )
    assert Vocabulary(spec_of(Tokenizer(suffixed))).derivation("low</w>") == [("l", "o"), ("lo", "w</w>")]


def bare_unigram(**scores):
    return Tokenizer(models.Unigram([("<unk>", 0.0), *scores.items()], unk_id=0))


def test_the_lowest_score_stays_for_the_unknown_piece_takes_its_own_from_it():
    # xy + zw = −60; x has no piece of its own: unknown + yzw = (lowest − 10) − 1, −111 with far and −41 without
    tokenizer = bare_unigram(xy=-30.0, zw=-30.0, yzw=-1.0, far=-100.0)
    vocabulary = Vocabulary(spec_of(tokenizer))
    assert tokenizer.encode("xyzw").tokens == ["xy", "zw"]
    assert rebuilt(vocabulary.spec, [0, 1, 2, 3]).encode("xyzw").tokens == ["x", "yzw"]  # the trap
    assert vocabulary.always() == {"<unk>", "far"}
    assert rebuilt(vocabulary.spec, kept_ids(vocabulary, {"xy", "zw", "yzw"})).encode("xyzw").tokens == ["xy", "zw"]


def test_a_character_without_its_piece_is_no_cheaper_as_an_unknown_one():
    # ab + cd = −12; a + b + cd = −13; without a and b: unknown + unknown + cd = −2 · 19.5 − 1
    tokenizer = bare_unigram(ab=-9.5, cd=-2.5, a=-1.0, b=-9.5)
    vocabulary = Vocabulary(spec_of(tokenizer))
    small = rebuilt(vocabulary.spec, kept_ids(vocabulary, {"ab", "cd"}))
    assert "a" not in small.get_vocab()
    assert small.encode("abcd").tokens == tokenizer.encode("abcd").tokens == ["ab", "cd"]


# --- the rest of the file ------------------------------------------------------------------------------------------


def with_specials(processor):
    tokenizer = bare_wordpiece("[PAD]", "x", "[UNK]", "y", "[CLS]", "[SEP]", "z")
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<extra>"])
    tokenizer.post_processor = processor
    tokenizer.enable_padding(pad_id=0, pad_token=PADDING, length=6)
    return tokenizer


@pytest.mark.parametrize(
    "processor",
    [
        processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]),
        processors.BertProcessing(("[SEP]", 5), ("[CLS]", 4)),
        processors.RobertaProcessing(("[SEP]", 5), ("[CLS]", 4)),
        processors.Sequence(
            [
                processors.ByteLevel(),
                processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]),
            ]
        ),
    ],
    ids=["template", "bert", "roberta", "sequence"],
)
def test_what_stands_around_a_text_and_the_padding_follow(processor):
    vocabulary = Vocabulary(spec_of(with_specials(processor)))
    assert vocabulary.always() == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "<extra>"}
    small = rebuilt(vocabulary.spec, kept_ids(vocabulary, {"z"}))
    assert small.encode("z").ids == [2, 4, 3, 0, 0, 0]
    assert small.get_vocab() == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "z": 4, "<extra>": 5}
    with pytest.raises(ModelError, match=r"\[SEP\] is put around every text"):
        rewrite(vocabulary.spec, [0, 2, 4])


def test_the_file_given_is_not_changed():
    spec = spec_of(with_specials(processors.BertProcessing(("[SEP]", 5), ("[CLS]", 4))))
    untouched = json.dumps(spec)
    rewrite(spec, [0, 2, 4, 5, 7])
    assert json.dumps(spec) == untouched


def test_bytes_stay():
    assert Vocabulary(spec_of(byte_fallback())).always() >= set(BYTES)
    vocabulary = Vocabulary(spec_of(byte_level()))
    assert vocabulary.always() == {"<end>", *pre_tokenizers.ByteLevel.alphabet()}
    small = byte_level()
    small.decoder = decoders.ByteLevel()
    small = rebuilt(spec_of(small), kept_ids(vocabulary, ()))
    assert small.get_vocab_size() == 257
    assert small.decode(small.encode("naïve 漢字 🙂").ids) == "naïve 漢字 🙂"


def test_merges_written_as_text_are_read():
    spec = spec_of(Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])))
    spec["model"]["merges"] = ["a b"]
    assert Vocabulary(spec).derivation("ab") == [("a", "b")]
    assert rewrite(spec, [0, 1, 2])["model"]["merges"] == [["a", "b"]]


def test_words_are_what_the_model_is_given():
    tokenizer = with_specials(processors.BertProcessing(("[SEP]", 5), ("[CLS]", 4)))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    probe = Tokenizer.from_str(json.dumps(words_probe(spec_of(tokenizer))))
    found = probe.encode("Héllo, 漢字!<extra>ok", add_special_tokens=False)
    assert words(found.tokens, found.word_ids) == ["hello", ",", "漢", "字", "!", "ok"]


def test_continuations_that_no_text_reaches_are_left_out():
    vocabulary = Vocabulary(spec_of(bare_wordpiece("[UNK]", "a", "##a", "漢", "##漢", "ab")))
    assert vocabulary.characters(None, str.isascii) == {"a", "##a", "漢"}
    assert vocabulary.characters({"a"}, lambda _: True) == {"a", "##a"}


def test_filling_takes_pieces_whose_parts_are_there():
    merges = [("b", "c"), ("a", "bc"), ("d", "d")]
    pieces = {piece: index for index, piece in enumerate(["a", "b", "c", "d", "bc", "abc", "dd"])}
    vocabulary = Vocabulary(spec_of(Tokenizer(models.BPE(pieces, merges))))
    order = ["abc", "bc", "dd", "d"]
    assert vocabulary.filled({"a", "b", "c"}, 0, 4, order) == {"a", "b", "c", "bc"}  # abc alone would lack bc
    assert vocabulary.filled({"a", "b", "c"}, 1, 4, order) == {"a", "b", "c"}
    assert len(vocabulary.filled({"a"}, 0, 4, ["a"])) == 1  # nothing left to fill with


def test_ids_in_the_larger_vocabulary():
    assert ids_in({"a": 1, "b": 0}, {"x": 0, "b": 1, "a": 2}).tolist() == [1, 2]
    assert ids_in({"a": 2}, {"a": 5}).tolist() == [-1, -1, 5]
    assert ids_in({"a": 0}, {"a": 5}).dtype == np.int64
    with pytest.raises(ModelError, match="such as 'b', that the other one lacks"):
        ids_in({"a": 0, "b": 1}, {"a": 0})
