"""Where the model that a run starts from lies; one that begins from scratch is made first."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.files import digest, file_digest, new_directory
from moss_rlhf.model.locate import locate
from moss_rlhf.recipe import Recipe, ScratchSpec

_DECIDING = ("moss-rlhf", "torch", "transformers", "tokenizers")
_HEAD = ("first", "second")  # of a classifier's head that is not kept


def source_of(recipe: Recipe) -> Path:
    """The directory of a recipe's model.

    A model from scratch is kept under ~/.cache/moss-rlhf (or XDG_CACHE_HOME), named by all that decides its bits: a
    recipe that is checked and then run makes it once, and a run that goes on finds it again.

    raises   ModelError where it is nowhere, or can't be made; DataError where its texts can't be read.
    """
    return locate(recipe.model) if isinstance(recipe.model, str) else _from_scratch(recipe.model, recipe.seed)


def named(recipe: Recipe) -> str:
    """What messages call a recipe's model."""
    return recipe.model if isinstance(recipe.model, str) else "the model from scratch"


def _from_scratch(spec: ScratchSpec, seed: int) -> Path:
    versions = {name: importlib.metadata.version(name) for name in _DECIDING}
    texts = _texts_digest(spec.texts)
    place = _cache() / digest([spec.model_dump(mode="json"), texts, seed, versions])[:16]
    if not place.exists():
        _make(spec, seed, place)
    return place


def _texts_digest(file: str) -> str:
    """By what the file holds, wherever it lies; a file that is none is told of where it is read."""
    return file_digest(Path(file)) if Path(file).is_file() else ""


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "moss-rlhf" / "from-scratch"


def _make(spec: ScratchSpec, seed: int, place: Path) -> None:
    from moss_rlhf.data import read_texts
    from moss_rlhf.finetuning import from_scratch
    from moss_rlhf.progress import quiet_libraries

    quiet_libraries()
    texts = read_texts(spec.texts, "model.texts")
    try:
        model = from_scratch(spec.config, texts, vocabulary=spec.vocabulary, labels=_HEAD, seed=seed)
    except (ModelError, DataError) as error:
        raise type(error)(str(error).replace("from_scratch", "model", 1)) from None
    body = model.network.base_model if model.anatomy.family.kind == "encoder" else model.network
    with new_directory(place) as partial:  # without the head: the data's labels are not known yet
        body.save_pretrained(partial)
        model.tokenizer.save_pretrained(partial)
