"""Copies of rows: which rows, which columns, the same wherever they are made; and mixup."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from moss_rlhf.errors import RecipeError
from moss_rlhf.strategy.augmentation import (
    Draws,
    Rewriting,
    augment_rows,
    augmentation_facts,
    key_of,
    make_copy,
    mixup,
    mixup_loss,
    word_operations,
)

WORDS = {"swap": 0.1, "delete": 0.1, "typo": 0.1, "punctuation": 0.3}


@pytest.fixture
def data(rows):
    return Dataset.from_list([{"text": row["text"], "label": int(row["label"] == "positive")} for row in rows])


def test_originals_come_first_and_copies_keep_their_labels(data):
    made = augment_rows(data, word_operations(WORDS, "en"), copies=2, seed=3)
    assert made[:60] == data[:]
    assert made["label"][:] == data["label"][:] * 3
    one, two = (made.select(range(start, start + 60))["text"][:] for start in (60, 120))
    changed = [text != copy for text, copy in zip(data["text"], one, strict=True)]
    assert sum(changed) == 60
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 20, "each copy has draws of its own"


def test_a_copy_depends_on_seed_and_position_alone(data):
    operations = word_operations(WORDS, "en")
    whole = make_copy(data, operations, number=1, seed=0)["text"][:]
    assert make_copy(data, operations, number=1, seed=0)["text"][:] == whole
    assert make_copy(data.select(range(7)), operations, number=1, seed=0)["text"][:] == whole[:7]
    assert make_copy(data, operations, number=1, seed=1)["text"][:] != whole
    turned = data.select(range(59, -1, -1))
    assert make_copy(turned, operations, number=1, seed=0)["text"][:] != whole[::-1]


def test_one_operation_a_row_or_all_of_them(data):
    operations = word_operations({"delete": 0.1, "punctuation": 0.3}, "en")
    marks = set(".;?:!,")

    def what(combine):
        copy = make_copy(data, operations, number=1, seed=0, combine=combine)["text"][:]
        pairs = [(text.split(), new.split()) for text, new in zip(data["text"], copy, strict=True)]
        return [
            (
                len([w for w in new if w not in marks]) < len([w for w in old if w not in marks]),
                sum(w in marks for w in new) > sum(w in marks for w in old),
            )
            for old, new in pairs
        ]

    assert all(removed != marked for removed, marked in what("one"))
    assert {removed for removed, _ in what("one")} == {True, False}
    assert what("all") == [(True, True)] * 60


def test_a_row_that_one_operation_can_not_change_is_left_to_the_next():
    data = Dataset.from_list([{"text": "ok", "label": 0}] * 30)  # nothing to swap, to delete, too short for a slip
    copy = make_copy(data, word_operations(WORDS, "en"), number=1, seed=0)
    assert all(text != "ok" for text in copy["text"])
    facts = augmentation_facts(
        data, [make_copy(data, word_operations({"swap": 0.1}, "en"), number=1, seed=0)], "text-classification"
    )
    assert facts == {"rows": 30, "unchanged": 30, "examples": []}


def test_models_get_the_rows_that_fall_to_them(data):
    seen = []

    def shout(texts, draws):
        seen.extend(texts)
        return [text.upper() for text in texts]

    operations = [Rewriting("masked_lm", shout), *word_operations({"typo": 0.1}, "en")]
    copy = make_copy(data, operations, number=1, seed=0)["text"][:]
    shouted = [text for text, new in zip(data["text"], copy, strict=True) if new == text.upper()]
    assert shouted == seen
    assert 15 < len(seen) < 45
    both = make_copy(data, operations, number=1, seed=0, combine="all")["text"][:]
    assert all(new.isupper() for new in both)
    slipped = [new != text.upper() for text, new in zip(data["text"], both, strict=True)]
    assert slipped == [any(len(word) > 3 for word in text.split()) for text in data["text"]]


def test_a_translation_keeps_its_target_and_its_words(rows_of):
    data = Dataset.from_list(rows_of("translation"))
    made = augment_rows(data, word_operations({"typo": 0.1, "punctuation": 0.3}, "en"), task="translation")
    assert made["target"][:] == data["target"][:] * 2
    assert all(new != old for new, old in zip(made["source"][60:], data["source"], strict=True))
    with pytest.raises(RecipeError, match=r"delete.*translation"):
        augment_rows(data, word_operations({"delete": 0.1}, "en"), task="translation")


def test_question_rows_keep_their_answers():
    context = "The tower was built in Paris by an engineer , and it was never moved ."
    row = {
        "context": context,
        "question": "Where was it built ?",
        "answers": {"text": ["Paris", "in Paris"], "answer_start": [context.index("Paris"), context.index("in Paris")]},
    }
    data = Dataset.from_list([row] * 40)
    made = augment_rows(data, word_operations(WORDS, "en"), copies=2, task="question-answering", combine="all")
    assert made.features == data.features
    for new in made.select(range(40, 120)):
        assert new["context"] != context
        assert new["answers"]["text"] == ["Paris", "in Paris"]
        for start, text in zip(new["answers"]["answer_start"], new["answers"]["text"], strict=True):
            assert new["context"][start : start + len(text)] == text


def test_facts_count_and_show_what_was_made(data):
    copies = [make_copy(data, word_operations(WORDS, "en"), number=number, seed=0) for number in (1, 2)]
    facts = augmentation_facts(data, copies, "text-classification")
    assert facts["rows"] == 120
    assert facts["unchanged"] == 0
    assert len(facts["examples"]) == 5
    assert facts["examples"][0] == {"original": data[0]["text"], "copy": copies[0][0]["text"]}


def test_a_cached_copy_is_taken_as_it_stands(data, tmp_path):
    place = tmp_path / "copy.arrow"
    operations = word_operations(WORDS, "en")
    made = make_copy(data, operations, number=1, seed=0, cache_file=place)["text"][:]
    assert make_copy(data, [], number=1, seed=0, cache_file=place)["text"][:] == made


# --- mixup -----------------------------------------------------------------------------------------------------------


def test_mixup_lies_between_a_row_and_its_partner():
    generator = torch.Generator().manual_seed(0)
    hidden, mask = torch.randn(5, 3, 2, generator=generator), torch.tensor([[1, 1, 1]] * 2 + [[1, 0, 0]] * 3)
    targets = torch.eye(5)[:, :4]
    mixed = mixup(hidden, targets, 0.4, np.random.default_rng(1), mask)
    assert torch.equal(mixed.partner.sort().values, torch.arange(5))
    assert ((mixed.weight >= 0.5) & (mixed.weight <= 1)).all()
    for row, (partner, weight) in enumerate(zip(mixed.partner.tolist(), mixed.weight.tolist(), strict=True)):
        for place in range(3):
            own, other = hidden[row, place] * mask[row, place], hidden[partner, place] * mask[partner, place]
            torch.testing.assert_close(mixed.hidden[row, place], weight * own + (1 - weight) * other)
            assert mixed.mask[row, place] == max(mask[row, place], mask[partner, place])
        torch.testing.assert_close(mixed.targets[row], weight * targets[row] + (1 - weight) * targets[partner])


def test_the_loss_is_the_mean_of_both_labels_losses():
    from torch.nn.functional import cross_entropy, one_hot

    logits, labels = torch.randn(6, 3, dtype=torch.float64).float(), torch.tensor([0, 1, 2, 0, 1, 2])
    mixed = mixup(torch.zeros(6, 1), one_hot(labels, 3).float(), 1.0, np.random.default_rng(0))
    own, other = (cross_entropy(logits, target, reduction="none") for target in (labels, labels[mixed.partner]))
    expected = (mixed.weight * own + (1 - mixed.weight) * other).mean()
    torch.testing.assert_close(mixup_loss(logits, mixed.targets), expected)


def test_mixup_follows_its_generator_and_alpha():
    hidden, targets = torch.randn(2000, 2), torch.ones(2000, 1)
    one, again = (mixup(hidden, targets, 0.2, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(one.hidden, again.hidden)
    # E max(λ, 1 − λ) of an even λ is 3/4; a small alpha leaves rows nearly alone
    assert abs(mixup(hidden, targets, 1.0, np.random.default_rng(5)).weight.mean() - 0.75) < 0.01
    assert one.weight.mean() > 0.88
    with pytest.raises(ValueError, match="alpha must be above 0"):
        mixup(hidden, targets, 0.0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="2000 rows and targets 3"):
        mixup(hidden, targets[:3], 1.0, np.random.default_rng(0))


def test_streams_of_rows_do_not_meet():
    firsts = {
        Draws(key_of(key_of(seed, copy), row)).below(2**32)
        for seed in range(5)
        for copy in (1, 2)
        for row in range(500)
    }
    assert len(firsts) > 4990


@pytest.mark.parametrize(
    ("rates", "language", "message"),
    [
        ({"swop": 0.1}, "en", r"augment: there is no operation 'swop'; did you mean 'swap'"),
        ({"swap": 2.0}, "en", r"augment\.swap: 2\.0 can't be used; it must be"),
        ({"swap": -1}, "en", r"augment\.swap: -1 can't be used"),
        ({"swap": 0.1}, "fr", r"augment\.language: 'fr' can't be used; it must be en, other, zh"),
        ({"keyboard": 0.3}, "zh", r"keyboard: the texts are Chinese, and a QWERTY keyboard's keys are Latin letters"),
    ],
)
def test_what_a_recipe_could_not_hold_is_refused_in_python(rates, language, message):
    with pytest.raises(RecipeError, match=message):
        word_operations(rates, language)


def test_rows_may_be_a_list_and_copies_are_at_least_one():
    rows = [{"text": "a good film about a house", "label": 1}]
    operations = word_operations({"swap": 0.2}, "en")
    assert augment_rows(rows, operations, seed=1)["label"][:] == [1, 1]
    with pytest.raises(RecipeError, match=r"augment\.copies: 0 can't be used"):
        augment_rows(rows, operations, copies=0)
