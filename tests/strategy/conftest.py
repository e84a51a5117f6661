"""A WordNet of a few words, in its own format."""

from pathlib import Path

import pytest

# part of speech, words, how often the first word's sense was met, its number among that word's senses
SYNSETS = [
    ("noun", ["film", "movie", "motion_picture"], 25, 1),
    ("verb", ["film", "shoot", "take"], 2, 1),
    ("noun", ["run", "tally"], 1, 1),
    ("verb", ["run", "operate"], 9, 1),
    ("adj", ["glad", "happy(p)"], 5, 1),
    ("adv", ["quickly", "rapidly"], 3, 1),
    ("noun", ["in", "inch"], 50, 1),
    ("noun", ["story", "tale"], 4, 1),
]
SHORT = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


@pytest.fixture(scope="session")
def wordnet(tmp_path_factory) -> Path:
    """A folder to name in NLTK_DATA."""
    place = tmp_path_factory.mktemp("nltk_data")
    folder = place / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    counts = []
    for number, pos in enumerate(SHORT, 1):
        data, index = "  1 the licence of WordNet\n", ["  1 the licence of WordNet"]
        for _, words, count, sense in (entry for entry in SYNSETS if entry[0] == pos):
            offset = len(data)
            cells = " ".join(f"{word} 0" for word in words)
            data += f"{offset:08d} 03 {SHORT[pos]} {len(words):02x} {cells} 001 @ 00000000 n 0000 | a gloss  \n"
            index += [f"{word.partition('(')[0]} {SHORT[pos]} 1 1 @ 1 1 {offset:08d}  " for word in words]
            counts.append(f"{words[0]}%{number}:03:00:: {sense} {count}")
        (folder / f"data.{pos}").write_text(data, encoding="utf-8")
        (folder / f"index.{pos}").write_text("\n".join(index) + "\n", encoding="utf-8")
    (folder / "cntlist.rev").write_text("\n".join(counts) + "\n", encoding="utf-8")
    return place
