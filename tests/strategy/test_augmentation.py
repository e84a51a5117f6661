"""Words and characters: what changes, how much, and what never does."""

import random
from collections import Counter

import pytest

from moss_rlhf.errors import DataError, MachineError, RecipeError
from moss_rlhf.strategy.augmentation import (
    Draws,
    augment_answerable,
    change_text,
    check_operations,
    key_of,
    tell_language,
    word_operations,
    wordnet_synonyms,
)
from moss_rlhf.strategy.augmentation.operations import (
    MARKS,
    NEIGHBOURS,
    changes,
    delete_words,
    insert_punctuation,
    insert_synonyms,
    press_neighbours,
    replace_with_synonyms,
    slip_characters,
    slip_letters,
    swap_words,
    with_synonyms,
)
from moss_rlhf.strategy.augmentation.words import (
    is_free,
    is_free_chinese,
    parts,
    split_characters,
    split_spaced,
    splitter,
)

TEXT = "The quick brown fox, which was not lazy, jumps over (seven) sleeping dogs near the river bank."
TEXTS = [
    TEXT,
    "  two  spaces\tand a tab\nand lines \n",
    "one",
    "",
    " ",
    "wo n't you don't stop 's it",
    "see <br /> http://a.b/c or me@x.org now please",
    "漂亮 the 电影，很 good！",
]
CHINESE = "这家酒店的房间很干净，服务态度也不错，下次还会再来。"
TOY = {"quick": ("fast", "rapid"), "river": ("stream",), "sleeping": ("dozing",)}


def synonyms(word):
    return TOY.get(word, ())


def test_a_stream_depends_on_its_key_alone():
    assert key_of(1, 2, 3) != key_of(1, 3, 2) != key_of(2, 1, 3)
    assert [Draws(5).below(10) for _ in range(3)] == [Draws(5).below(10)] * 3
    draws = Draws(key_of(0))
    counts = Counter(draws.below(7) for _ in range(70_000))
    assert set(counts) == set(range(7))
    assert max(abs(count - 10_000) for count in counts.values()) < 450  # 5 standard deviations


@pytest.mark.parametrize("text", TEXTS)
def test_words_put_together_are_the_text(text):
    assert "".join(split_spaced(text)) == text
    assert "".join(split_characters(text)) == text
    assert "".join(splitter("zh")(text)) == text
    for word in split_spaced(text):
        assert "".join(parts(word)) == word


def test_punctuation_is_parted_from_the_letters():
    assert parts("(film, ") == ("(", "film", ", ")
    assert parts("don't ") == ("", "don't", " ")
    assert parts("... ") == ("... ", "", "")


def test_negations_links_and_tags_are_never_free():
    kept = ["not ", "Never, ", "n't ", "don't ", "isn’t", "'s ", "<br ", "/> ", "http://a.b/c", "me@x.org ", ", ", ""]
    assert not any(map(is_free, kept))
    assert all(map(is_free, ["film, ", "(good) ", "B2B ", "knot "]))
    assert not any(map(is_free_chinese, ["不错", "没", "，", "good"]))
    assert is_free_chinese("酒店")


@pytest.mark.parametrize(
    ("rate", "length", "count"), [(0.1, 19, 1), (0.1, 20, 2), (0.1, 3, 1), (0, 50, 0), (0.5, 0, 0)]
)
def test_a_rate_rounds_down_and_changes_one_word_at_least(rate, length, count):
    assert changes(rate, length) == count


def test_every_set_of_positions_is_as_likely():
    words = ["a", ",", "b", "c", ".", "d"]
    draws = Draws(3)
    found = Counter(frozenset(draws.positions(words, str.isalpha, 2)) for _ in range(6000))
    assert len(found) == 6
    assert max(abs(count - 1000) for count in found.values()) < 150
    assert sorted(draws.positions(words, str.isalpha, 9)) == [0, 2, 3, 5]
    rare = ["."] * 200 + ["x"]
    assert draws.positions(rare, str.isalpha, 1) == [200]


@pytest.mark.parametrize("seed", range(30))
def test_swapping_keeps_the_words_and_the_punctuation(seed):
    words = split_spaced(TEXT)
    changed = swap_words(words, is_free, 3, Draws(seed))
    assert Counter(parts(word)[1] for word in changed) == Counter(parts(word)[1] for word in words)
    assert [parts(word)[::2] for word in changed] == [parts(word)[::2] for word in words]
    assert words.index("not ") == changed.index("not ")
    assert changed != words or seed  # three exchanges may undo each other


def test_one_exchange_moves_two_words():
    words = split_spaced(TEXT)
    for seed in range(50):
        changed = swap_words(words, is_free, 1, Draws(seed))
        assert sum(one != other for one, other in zip(words, changed, strict=True)) == 2
    assert swap_words(["same ", "same"], is_free, 1, Draws(0)) == ["same ", "same"]


@pytest.mark.parametrize("seed", range(30))
def test_deleting_leaves_out_as_many_words_as_asked(seed):
    changed = "".join(delete_words(split_spaced(TEXT), is_free, 4, Draws(seed)))
    before, after = (Counter("".join(c if c.isalpha() else " " for c in text).split()) for text in (TEXT, changed))
    assert sum((before - after).values()) == 4
    assert not after - before
    assert "not" in after
    assert changed.endswith(".")
    assert "  " not in changed


def test_deleting_keeps_the_last_free_word_and_closes_the_gap():
    assert delete_words(["never ", "mind"], is_free, 5, Draws(0)) == ["never ", "mind"]
    found = {"".join(delete_words(["good ", "film, ", "but"], is_free, 1, Draws(seed))) for seed in range(40)}
    assert found == {"film, but", "good, but", "good film,"}
    assert "".join(delete_words(["a ", "b."], is_free, 1, Draws(0))) in ("a.", "b.")


@pytest.mark.parametrize("seed", range(20))
def test_marks_are_put_before_words_and_nothing_else_changes(seed):
    words = split_spaced(TEXT)
    changed = insert_punctuation(words, bool, 5, Draws(seed))
    marks = [word for word in changed if word[0] in MARKS]
    assert 1 <= len(marks) <= 5
    assert [word for word in changed if word not in marks] == words


def test_the_number_of_marks_is_even_between_one_and_the_most():
    words = split_spaced(TEXT)
    counts = Counter(len(insert_punctuation(words, bool, 4, Draws(key_of(seed)))) - len(words) for seed in range(4000))
    assert set(counts) == {1, 2, 3, 4}
    assert max(abs(count - 1000) for count in counts.values()) < 150


def test_a_slip_is_one_letter_and_never_the_first():
    for seed in range(200):
        changed = slip_letters(["sleeping "], is_free, 1, Draws(key_of(seed)))[0]
        assert changed[0] == "s"
        assert changed != "sleeping "
        assert _distance(changed, "sleeping ") <= 2  # an exchange counts twice
    assert slip_letters(["the ", "fox"], is_free, 2, Draws(0)) == ["the ", "fox"]


def test_a_neighbouring_key_is_one_that_touches():
    assert set(NEIGHBOURS["g"]) == set("fhtyvb")
    assert set(NEIGHBOURS["a"]) == set("sqwz")
    assert set(NEIGHBOURS["p"]) == set("ol")
    assert all(letter in NEIGHBOURS[near] for letter, every in NEIGHBOURS.items() for near in every)
    for seed in range(50):
        changed = press_neighbours(["Sleeping"], is_free, 1, Draws(key_of(seed)))[0]
        [(old, new)] = [pair for pair in zip("Sleeping", changed, strict=True) if pair[0] != pair[1]]
        assert new in NEIGHBOURS[old]
    assert press_neighbours(["слово"], is_free, 1, Draws(0)) == ["слово"]


def test_synonyms_take_the_place_of_words_that_have_one():
    free = with_synonyms(is_free, synonyms)
    words = split_spaced(TEXT)
    changed = replace_with_synonyms(words, free, 2, Draws(1))
    pairs = [(parts(one)[1], parts(other)[1]) for one, other in zip(words, changed, strict=True) if one != other]
    assert len(pairs) == 2
    assert all(new in TOY[old] for old, new in pairs)
    inserted = insert_synonyms(words, free, 2, Draws(1))
    added = Counter(inserted) - Counter(words)
    assert sum(added.values()) == 2
    assert {word.strip() for word in added} <= {name for names in TOY.values() for name in names}
    assert replace_with_synonyms(["none ", "here"], free, 2, Draws(1)) == ["none ", "here"]


# --- Chinese ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_chinese_is_changed_by_words_and_by_characters(seed):
    swap, delete, typo, marks = (
        word_operations({name: 0.1}, "zh")[0] for name in ("swap", "delete", "typo", "punctuation")
    )
    swapped = change_text(CHINESE, [swap], Draws(seed))
    assert sorted(swapped) == sorted(CHINESE)
    assert swapped != CHINESE
    assert "不错" in swapped  # a negation stays with what it negates
    deleted = change_text(CHINESE, [delete], Draws(seed))
    words = splitter("zh")(CHINESE)
    assert any(deleted == "".join(words[:place] + words[place + 1 :]) for place in range(len(words)))
    slipped = change_text(CHINESE, [typo], Draws(seed))
    assert slipped != CHINESE
    assert "不" in slipped
    marked = change_text(CHINESE, [marks], Draws(seed))
    assert "".join(c for c in marked if c not in "。；？：！，") == "".join(
        c for c in CHINESE if c not in "。；？：！，"
    )
    assert len(marked) > len(CHINESE)


def test_one_character_stays():
    assert slip_characters(["好"], is_free_chinese, 3, Draws(0)) == ["好"]


def test_the_language_is_told_by_its_characters():
    assert tell_language([CHINESE, "iPhone 手机屏幕很好"]) == "zh"
    assert tell_language(["A film by 张艺谋 that many people liked"]) == "en"
    assert tell_language(["", "123"]) == "en"
    for text in ("この映画はとてもよかったです", "ภาพยนตร์เรื่องนี้ดีมาก"):
        with pytest.raises(DataError, match="language"):
            tell_language([text])


# --- what can't be made ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["synonym", "insert", "keyboard"])
def test_what_needs_latin_words_is_refused_for_chinese(name):
    with pytest.raises(RecipeError, match=rf"data\.augment\.{name}: the texts are Chinese"):
        check_operations([name], "zh", "text-classification")


def test_synonyms_are_refused_for_other_languages():
    with pytest.raises(RecipeError, match="WordNet"):
        check_operations(["swap", "synonym"], "other", "text-classification")
    check_operations(["swap", "keyboard", "typo"], "other", "text-classification")


def test_what_would_make_answers_wrong_is_refused():
    for task, name in (("translation", "delete"), ("text-generation", "typo"), ("question-answering", "masked_lm")):
        with pytest.raises(RecipeError, match=rf"data\.augment\.{name}.*{task}"):
            check_operations([name], "en", task)
    with pytest.raises(RecipeError, match="question-answering"):
        check_operations(["swap"], "en", "question-answring")


def test_missing_wordnet_says_how_to_get_it(monkeypatch, tmp_path):
    _only_here(monkeypatch, tmp_path)
    with pytest.raises(MachineError, match=r"pip install 'moss-rlhf\[words\]' and python -m nltk.downloader wordnet"):
        check_operations(["synonym"], "en", "text-classification")


def test_missing_jieba_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"pip install 'moss-rlhf\[words\]'"):
        check_operations(["swap"], "zh", "text-classification")
    check_operations(["typo", "punctuation"], "zh", "text-classification")


# --- WordNet ---------------------------------------------------------------------------------------------------------


def test_synonyms_are_of_the_most_frequent_sense(monkeypatch, wordnet):
    monkeypatch.setenv("NLTK_DATA", str(wordnet))
    found = wordnet_synonyms()
    assert found("film") == ("motion picture", "movie")  # the noun, met 25 times, and not the verb, met twice
    assert found("glad") == ("happy",)  # "happy(p)" in the file
    assert found("run") == ("operate",)  # the verb, though the noun comes first
    assert found("films") == found("Film") == found("in") == found("xyz") == ()


def test_packed_wordnet_is_read_too(monkeypatch, wordnet, tmp_path):
    import zipfile

    (tmp_path / "corpora").mkdir()
    with zipfile.ZipFile(tmp_path / "corpora" / "wordnet.zip", "w") as archive:
        for file in (wordnet / "corpora" / "wordnet").iterdir():
            archive.write(file, f"wordnet/{file.name}")
    _only_here(monkeypatch, tmp_path)
    assert wordnet_synonyms()("film") == ("motion picture", "movie")


def test_broken_wordnet_is_an_error(monkeypatch, wordnet, tmp_path):
    import shutil

    shutil.copytree(wordnet, tmp_path / "data")
    (tmp_path / "data" / "corpora" / "wordnet" / "cntlist.rev").write_text("nonsense\n", encoding="utf-8")
    _only_here(monkeypatch, tmp_path / "data")
    with pytest.raises(MachineError, match="can't be read"):
        wordnet_synonyms()


def _only_here(monkeypatch, place):
    """WordNet is looked for in one folder alone, whatever this machine has."""
    monkeypatch.setattr("moss_rlhf.strategy.augmentation.synonyms._places", lambda: [place / "corpora" / "wordnet"])


# --- questions and their answers -------------------------------------------------------------------------------------

CONTEXT = (
    "In 1889 the Eiffel Tower was built in Paris (France), by the engineer Gustave Eiffel's firm.\n"
    "It is 330 metres tall; a mast was added in 2022."
)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_answers_stand_where_they_are_said_to(rate, monkeypatch, wordnet):
    monkeypatch.setenv("NLTK_DATA", str(wordnet))
    names = ("synonym", "insert", "swap", "delete", "typo", "keyboard", "punctuation")
    operations = word_operations(dict.fromkeys(names, rate), "en")
    source, changed = random.Random(0), 0
    for seed in range(150):
        answers = [_span(CONTEXT, source) for _ in range(source.randrange(4))]
        used = source.sample(operations, source.randint(1, 4))
        made = augment_answerable(CONTEXT, "Where was the tower built?", answers, used, Draws(key_of(seed)))
        assert [answer.text for answer in made.answers] == [text for _, text in answers]
        for answer in made.answers:
            assert made.context[answer.start : answer.start + len(answer.text)] == answer.text
        changed += made.context != CONTEXT
    assert changed > 120


def test_answers_in_chinese_stand_where_they_are_said_to():
    operations = word_operations({"swap": 0.2, "delete": 0.2, "typo": 0.2, "punctuation": 0.3}, "zh")
    source = random.Random(1)
    for seed in range(100):
        answers = [_span(CHINESE, source, 4)]
        made = augment_answerable(CHINESE, "房间怎么样？", answers, operations, Draws(key_of(seed)))
        assert made.context[made.answers[0].start :].startswith(answers[0][1])
        assert made.context != CHINESE


def test_the_whole_word_around_an_answer_is_kept():
    operations = word_operations({"typo": 0.5, "keyboard": 0.5, "swap": 0.5, "delete": 0.5}, "en")
    start = CONTEXT.index("Gustave")
    for seed in range(50):
        made = augment_answerable(CONTEXT, "Who?", [(start, "Gustave Eiffel")], operations, Draws(key_of(seed)))
        assert "Gustave Eiffel's " in made.context


def test_a_question_loses_no_words():
    operations = word_operations({"swap": 0.5, "delete": 0.5}, "en")
    question = "Where was the tower built?"
    for seed in range(20):
        assert augment_answerable(CONTEXT, question, [(3, "1889")], operations, Draws(seed)).question == question


def test_an_answer_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="'1890' does not stand at 3"):
        augment_answerable(CONTEXT, "When?", [(3, "1890")], word_operations({"swap": 0.1}, "en"), Draws(0))


def _span(text, source, longest=30):
    start = source.randrange(len(text) - 1)
    return start, text[start : start + source.randint(1, longest)]


def _distance(one, other):
    row = list(range(len(other) + 1))
    for place, letter in enumerate(one, 1):
        before, row = row, [place]
        for column, own in enumerate(other, 1):
            row.append(min(row[-1] + 1, before[column] + 1, before[column - 1] + (letter != own)))
    return row[-1]
