"""Synonyms from WordNet's own files, where nltk's downloader or a package of the system has put them.

Reading them takes half a second; `nltk`'s own reader takes ten, and a millisecond a word. Nothing is downloaded.
The format: https://wordnet.princeton.edu/documentation/wndb5wn (Fellbaum 1998, *WordNet*).
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from moss_rlhf.errors import MachineError
from moss_rlhf.strategy.augmentation.operations import Synonyms

_POS = ("noun", "verb", "adj", "adv")
_POS_OF_KEY = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}  # ss_type of a sense key; 5: satellite
FILES = ("cntlist.rev", *(f"{kind}.{pos}" for pos in _POS for kind in ("index", "data")))
_MARKER = re.compile(r"\((a|p|ip)\)$")  # of an adjective's place in the sentence
Read = Callable[[str], bytes]
# words of the closed classes have entries too ("a": the ångström), which no sentence means
_CLOSED = """
a about above across after again against all almost also although always am among an and another any anybody anyone
anything are around as at away back be became because become been before behind being below between both but by came
can come could did do does done down during each either else enough etc even ever every everybody everyone everything
few for from get go goes going gone got had has have he hence her here hers herself him himself his how however i if in
into is it its itself just least less let like made make many may maybe me might mine more most much must my myself now
of off often on once one only onto or other others our ours ourselves out over own per perhaps quite rather really said
same say says seem seems several shall she should since so some somebody someone something still such than that the
their theirs them themselves then there these they this those though through thus to too toward towards under until up
upon us very was we well went were what whatever when where whether which while who whom whose why will with within
would yet you your yours yourself
"""


class Sense(NamedTuple):
    """The sense that a word most often has: how often it was met in SemCor, and where it stands in data.<pos>."""

    met: int
    pos: str
    offset: int


def wordnet_synonyms() -> Synonyms:
    """Word → its synonyms in alphabetical order: lower-case lemmas of the sense that the word most often has.

    Senses are ranked by WordNet's own counts; noun, verb, adjective, adverb win ties in this order. Only words in their
    base form have any, so that "films" never becomes "movie"; closed-class words (the, in, be …) have none.

    raises   MachineError where WordNet is missing or broken.
    """
    read = find_wordnet()
    try:
        senses = _senses(read)
        data = {pos: read(f"data.{pos}") for pos in _POS}
    except (OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise MachineError(f"data.augment: WordNet can't be read ({error}). {_remedy()}") from None

    @lru_cache(None)
    def synonyms(word: str) -> tuple[str, ...]:
        if word not in senses:
            return ()
        sense = senses[word]
        return tuple(sorted({name for name in _lemmas(data[sense.pos], sense.offset) if name.islower()} - {word}))

    return synonyms


def find_wordnet() -> Read:
    """The function that reads one of WordNet's files whole.

    raises   MachineError where no folder holds them.
    """
    for place in _places():
        if all((place / name).is_file() for name in FILES):
            return partial(_whole, place)
        packed = place.with_name(f"{place.name}.zip")
        if packed.is_file():
            return partial(_unpacked, packed)
    raise MachineError(f"data.augment: synonym and insert need WordNet, which is not on this machine. {_remedy()}")


def _remedy() -> str:
    return (
        "Fetch it once: pip install 'moss-rlhf[words]' and python -m nltk.downloader wordnet (or set NLTK_DATA to a "
        "folder that holds corpora/wordnet); or leave synonym and insert out."
    )


def _places() -> list[Path]:
    """Where nltk looks for its data, in its order; and where Debian puts WordNet."""
    given = [Path(folder) for folder in os.environ.get("NLTK_DATA", "").split(os.pathsep) if folder]
    prefix = [Path(sys.prefix) / folder for folder in ("nltk_data", "share/nltk_data", "lib/nltk_data")]
    system = [Path(folder) / "nltk_data" for folder in ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")]
    home = [Path("~/nltk_data").expanduser()] if "HOME" in os.environ else []
    return [*(place / "corpora" / "wordnet" for place in [*given, *home, *prefix, *system]), Path("/usr/share/wordnet")]


def _whole(place: Path, name: str) -> bytes:
    return (place / name).read_bytes()


def _unpacked(packed: Path, name: str) -> bytes:
    with zipfile.ZipFile(packed) as archive:
        return archive.read(f"wordnet/{name}")


def _senses(read: Read) -> dict[str, Sense]:
    """{word of lower-case letters: its most frequent sense}."""
    counts = dict(_first_counts(read("cntlist.rev").decode()))
    senses: dict[str, Sense] = {}
    for pos in _POS:
        for word, offset in _first_offsets(read(f"index.{pos}").decode()):
            sense = Sense(counts.get((word, pos), 0), pos, offset)
            if word not in senses or sense.met > senses[word].met:
                senses[word] = sense
    return senses


def _first_counts(text: str) -> Iterator[tuple[tuple[str, str], int]]:
    """((word, part of speech), count) of every first sense: lines `film%1:10:00:: 1 25` (key, number, count)."""
    for line in text.splitlines():
        key, number, count = line.split(" ")
        if number == "1":
            word, _, rest = key.partition("%")
            yield (word, _POS_OF_KEY[rest[0]]), int(count)


def _first_offsets(text: str) -> Iterator[tuple[str, int]]:
    """(word, offset of its first sense), lines `lemma pos synsets pointers [pointer …] senses tagged offset …`."""
    closed = set(_CLOSED.split())
    for line in text.splitlines():
        word = line[: line.find(" ")]
        if word.isalpha() and word not in closed:  # the licence's lines begin with a space
            fields = line.split()
            yield word, int(fields[6 + int(fields[3])])


def _lemmas(data: bytes, offset: int) -> list[str]:
    """Of the line at an offset, `offset file type words(hex) word id [word id …] …`: its words."""
    fields = data[offset : data.index(b"\n", offset)].decode().split(" ")
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    return [_MARKER.sub("", word).replace("_", " ") for word in words]
