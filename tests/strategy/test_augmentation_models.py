"""Masked words and back-translation, on tiny random models."""

from pathlib import Path

import pytest
import torch

from moss_rlhf.errors import ModelError
from moss_rlhf.strategy.augmentation import (
    Draws,
    check_masked_model,
    check_translator,
    key_of,
    load_back_translation,
    load_masked_words,
)
from moss_rlhf.strategy.augmentation.back_translation import translate
from moss_rlhf.strategy.augmentation.masked import foretell, word_pieces


@pytest.fixture(scope="module")
def masked_checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """A tiny BERT with its masked-LM head."""
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    source, place = tiny_checkpoint("bert"), tmp_path_factory.mktemp("masked") / "bert"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(place)
    AutoTokenizer.from_pretrained(source).save_pretrained(place)
    return place


def _draws(count):
    return [Draws(key_of(0, row)) for row in range(count)]


def test_masked_words_are_words_and_the_rest_stays(masked_checkpoint, rows):
    model = load_masked_words(str(masked_checkpoint), 0.2, 5, "en")
    texts = [row["text"] for row in rows]
    made = model.rewrite(texts, _draws(60))
    assert sum(new != old for new, old in zip(made, texts, strict=True)) == 60
    known = set(word_pieces(model.tokenizer, "en"))
    for old, new in zip(texts, made, strict=True):
        before, after = old.split(), new.split()
        assert len(before) == len(after)
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert len(changed) == max(1, int(0.2 * len(before)))
        assert all(b in known for _, b in changed)


def test_masked_words_depend_on_the_row_and_not_on_its_batch(masked_checkpoint, rows):
    model = load_masked_words(str(masked_checkpoint), 0.2, 5, "en")
    texts = [row["text"] for row in rows]
    together = model.rewrite(texts, _draws(60))
    assert [model.rewrite([text], [own])[0] for text, own in zip(texts, _draws(60), strict=True)] == together


def test_masked_words_are_the_models_likeliest(masked_checkpoint):
    model = load_masked_words(str(masked_checkpoint), 0.2, 5, "en")
    words = word_pieces(model.tokenizer, "en")
    [(names, shares)] = foretell(["the [MASK] was good"], model.network, model.tokenizer, words, 4)
    encoded = model.tokenizer("the [MASK] was good", return_tensors="pt")
    with torch.no_grad():
        logits = model.network(**encoded).logits[0, 2]
    usable = torch.tensor([bool(word) for word in words])
    expected = logits.masked_fill(~usable, -torch.inf).softmax(dim=0).topk(4)
    assert names == [[words[token] for token in expected.indices.tolist()]]
    torch.testing.assert_close(torch.tensor(shares[0]), expected.values)


def test_chinese_is_masked_by_characters(masked_checkpoint):
    model = load_masked_words(str(masked_checkpoint), 0.2, 5, "zh")
    text = "这店味道很好，服务态度也好。"
    for seed in range(10):
        [made] = model.rewrite([text], [Draws(key_of(seed))])
        assert len(made) == len(text)
        assert sum(a != b for a, b in zip(made, text, strict=True)) == 2


def test_a_text_longer_than_the_model_reads_keeps_its_tail(masked_checkpoint):
    model = load_masked_words(str(masked_checkpoint), 0.3, 5, "en")
    text = "good film " * 60
    [made] = model.rewrite([text], _draws(1))
    assert made != text
    assert made[-270:] == text[-270:]


def test_a_checkpoint_without_the_head_is_refused(tiny_checkpoint):
    with pytest.raises(ModelError, match=r"masked_lm\.model.*BertModel"):
        check_masked_model(str(tiny_checkpoint("bert")))
    with pytest.raises(ModelError, match="no directory"):
        check_masked_model("./nowhere")


def test_a_head_that_the_file_lacks_is_refused(tiny_checkpoint, tmp_path):
    import json
    import shutil

    place = Path(shutil.copytree(tiny_checkpoint("bert"), tmp_path / "claims"))
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    (place / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}), encoding="utf-8")
    with pytest.raises(ModelError, match="lacks cls"):
        load_masked_words(str(place), 0.2, 5, "en")


@pytest.mark.parametrize(("beams", "temperature"), [(1, 0.0), (2, 0.0), (1, 1.0)])
def test_back_translation_is_there_and_back(tiny_checkpoint, rows, beams, temperature):
    to, back = tiny_checkpoint("marian"), tiny_checkpoint("marian", blocks=2)
    pair = load_back_translation(str(to), str(back), beams, temperature)
    texts = [row["text"] for row in rows[:5]]
    state = torch.get_rng_state()
    made = pair.rewrite(texts, _draws(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert pair.rewrite(texts, _draws(5)) == made
    order = sorted(range(5), key=lambda row: len(texts[row]))
    seed = _draws(5)[order[0]].below(2**31)
    there = translate([texts[row] for row in order], pair.to, beams, temperature, seed)
    again = translate([text or " " for text in there], pair.back, beams, temperature, seed)
    assert [made[row] for row in order] == [
        text if first and text else texts[row] for row, first, text in zip(order, there, again, strict=True)
    ]


def test_what_is_too_long_to_translate_stays(tiny_checkpoint):
    model = load_back_translation(str(tiny_checkpoint("marian")), str(tiny_checkpoint("marian")))
    long = "good film " * 60
    assert model.rewrite([long, "the film was good"], _draws(2))[0] == long


def test_what_translates_nothing_is_refused(tiny_checkpoint):
    with pytest.raises(ModelError, match=r"back_translation\.back: .*translates nothing"):
        check_translator(str(tiny_checkpoint("bert")), "back")
