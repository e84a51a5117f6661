"""trim_vocabulary in a recipe: rows follow the tokenizer, the parent sees its own tokens, a resumed run is the same."""

import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch

from moss_rlhf import evaluate, finetune, run, trim_vocabulary
from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.finetuning.distillation import LargerTeacher
from moss_rlhf.model.vocabulary import ids_in
from moss_rlhf.tasks.loading import encoded, load

pytestmark = pytest.mark.usefixtures("one_core", "memory_not_measured")
ALONE = "zebra hotel was good"  # its first word is in no text of train


def _recipe(model, rows, place, **fields):
    for name, part in (("train", rows[:44]), ("test", [*rows[44:], {"text": ALONE, "label": "positive"}])):
        lines = ["text,label", *(f'"{row["text"]}",{row["label"]}' for row in part)]
        (place / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (place / "more.txt").write_text("soup 7\n")
    return {
        "task": "text-classification",
        "model": str(model),
        "data": {"train": str(place / "train.csv"), "validation": 0.2, "test": str(place / "test.csv")},
        "stages": [
            {"finetune": {"epochs": 1, "learning_rate": 3e-3}},
            {"trim_vocabulary": {"characters": "seen", "corpora": [str(place / "more.txt")]}},
            {"finetune": {"epochs": 1, "learning_rate": 3e-3, "distill": {"teacher": "parent"}}},
            "quantize",
        ],
        "evaluate": {"batch_sizes": [1], "resamples": 200, "speed_seconds": 0.05, "speed_rows": 4},
        "output": str(place / "run"),
    } | fields


@pytest.fixture(scope="module")
def trimmed(tiny_checkpoint, rows, tmp_path_factory):
    place = tmp_path_factory.mktemp("trim")
    recipe = _recipe(tiny_checkpoint("bert"), rows, place)
    report = run(recipe)
    kept = shutil.copytree(place / "run", place / "kept")
    (place / "run" / "report.json").unlink()
    for folder in (place / "run" / "stages").glob("03*"):  # as if killed in the recovery
        (folder / "done").unlink()
        shutil.rmtree(folder / "model")
    return report, kept, run(recipe), place / "run"


def _stage(place, number):
    return next(place.glob(f"stages/{number:02d}-*")) / "model"


def test_the_tables_rows_go_and_the_tokenizer_with_them(trimmed):
    report, place, _, _ = trimmed
    before, after = load(_stage(place, 1)), load(_stage(place, 2))
    assert len(after.tokenizer) < len(before.tokenizer)
    assert report["after"]["parameters"] == after.parameters
    words = {"soup", "7", "film"}  # of the corpora's file, and of train
    assert words <= after.tokenizer.get_vocab().keys()
    assert "z" not in after.tokenizer.get_vocab()  # of test alone, which is not looked at
    assert after.tokenizer.unk_token_id in after.tokenizer(ALONE)["input_ids"]
    assert report["before"]["parameters"] == before.parameters
    assert report["gain"]["metric"]["name"] == "accuracy"


def test_what_is_measured_are_the_rows_of_the_trimmed_tokenizer(trimmed, rows):
    """The saved model, asked about the texts anew, is as right as the report says; so is the one before trimming."""
    report, place, _, _ = trimmed
    texts = [*rows[44:], {"text": ALONE, "label": "positive"}]
    for side, model in (("before", _stage(place, 1)), ("after", place / "model")):
        found = evaluate(load(model), texts, resamples=200)["metrics"]["accuracy"]["value"]
        assert report[side]["metrics"]["accuracy"]["value"] == found
        assert report[side]["rows"] == len(texts)


def test_resumed_in_the_recovery_it_ends_in_the_same_bits(trimmed):
    first, place, second, again = trimmed
    assert [stage["resumed"] for stage in second["stages"]] == [True, True, False, True]
    one, other = (load(_stage(folder, 3)).network.state_dict() for folder in (place, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert first["after"]["metrics"] == second["after"]["metrics"]


def test_a_teacher_with_the_whole_table_reads_its_own_ids(tiny_model, rows):
    """Asked through the mapping, it answers as on its own encoding of texts whose tokens all stayed."""
    teacher, student = tiny_model(), tiny_model()
    trim_vocabulary(student, [row["text"] for row in rows])
    ready = encoded(student, rows)
    table = ids_in(student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab())
    own = encoded(teacher, rows)
    assert [table[ids].tolist() for ids in ready["input_ids"]] == own["input_ids"][:]
    histories = [
        finetune(deepcopy(student), ready, ready, epochs=1, teacher=teacher, teacher_rows=taught).history
        for taught in (None, own)
    ]
    assert histories[0] == histories[1]
    with pytest.raises(DataError, match="teacher_rows are 3 rows, train 60"):
        finetune(student, ready, ready, epochs=1, teacher=teacher, teacher_rows=own.select(range(3)))


def test_a_language_models_teacher_answers_in_the_students_tokens(tiny_model, rows_of):
    teacher, student = tiny_model("t5"), tiny_model("t5")
    rows = rows_of("translation")
    trim_vocabulary(student, rows, characters="seen")
    ids = ids_in(student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab())
    asked = LargerTeacher(teacher.network, torch.from_numpy(ids))
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[0, 5]])}
    with torch.no_grad():
        found = asked(**batch, attention_mask=torch.ones(1, 3, dtype=torch.long)).logits
        there = {name: torch.from_numpy(ids[value]) for name, value in batch.items()}
        whole = teacher.network(**there).logits
    np.testing.assert_allclose(found.numpy(), whole.numpy()[..., ids], rtol=1e-5, atol=1e-6)
    training = finetune(student, rows, rows, epochs=1, teacher=teacher, learning_rate=1e-3)
    assert np.isfinite(training.history["train"][-1]["loss"])


def test_a_teacher_that_lacks_tokens_is_refused(tiny_model, rows):
    teacher, student = tiny_model(), tiny_model()
    trim_vocabulary(teacher, [rows[0]["text"]], characters="seen")
    with pytest.raises(ModelError, match="another vocabulary"):
        finetune(student, rows, rows, epochs=1, teacher=teacher)
