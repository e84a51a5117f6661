"""Changed copies of training rows that keep their labels: words, characters, models. Off unless asked for.

Imports no torch; the models are loaded by `load_masked_words` and `load_back_translation`.
"""

from moss_rlhf.strategy.augmentation.applying import (
    Answer,
    Answerable,
    Operation,
    Rewriting,
    WordOperation,
    augment_answerable,
    change_text,
    word_operations,
)
from moss_rlhf.strategy.augmentation.back_translation import BackTranslation, check_translator, load_back_translation
from moss_rlhf.strategy.augmentation.draws import Draws, key_of
from moss_rlhf.strategy.augmentation.masked import MaskedWords, check_masked_model, load_masked_words
from moss_rlhf.strategy.augmentation.mixup import Mixed, mixup, mixup_loss
from moss_rlhf.strategy.augmentation.requirements import check_operations, language_of
from moss_rlhf.strategy.augmentation.rows import augment_rows, augmentation_facts, check_task, make_copy
from moss_rlhf.strategy.augmentation.synonyms import find_wordnet, wordnet_synonyms
from moss_rlhf.strategy.augmentation.words import Language, check_jieba, tell_language

__all__ = [
    "Answer",
    "Answerable",
    "BackTranslation",
    "Draws",
    "Language",
    "MaskedWords",
    "Mixed",
    "Operation",
    "Rewriting",
    "WordOperation",
    "augment_answerable",
    "augment_rows",
    "augmentation_facts",
    "change_text",
    "check_jieba",
    "check_masked_model",
    "check_operations",
    "check_task",
    "check_translator",
    "find_wordnet",
    "key_of",
    "language_of",
    "load_back_translation",
    "load_masked_words",
    "make_copy",
    "mixup",
    "mixup_loss",
    "tell_language",
    "word_operations",
    "wordnet_synonyms",
]
