"""Members, their mean answer by hand, folds, and the one that learns from all; stopped anywhere = never stopped."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from moss_rlhf.errors import DataError, ModelError, RecipeError
from moss_rlhf.finetuning import ensemble, finetune
from moss_rlhf.finetuning.ensemble import stratified_folds
from moss_rlhf.finetuning.ingredients import with_teachers
from moss_rlhf.model.checkpoint import load_checkpoint
from moss_rlhf.model.runtime import TorchRuntime
from moss_rlhf.progress import Progress
from moss_rlhf.tasks import TextClassification
from moss_rlhf.tasks.loading import encoded
from moss_rlhf.tasks.probabilities import brier_score, log_mean_probability, mean_log_loss

TASK = TextClassification()
SETTINGS = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "precision": "float32", "save_every_seconds": 0.0}
TIMING = {"seconds", "examples_per_second"}


# --- pure functions -------------------------------------------------------------------------------------------------


def test_the_mean_of_probabilities_by_hand():
    """softmax(ln 3, 0) = (3/4, 1/4), softmax(0, ln 9) = (1/10, 9/10): the mean is (17/40, 23/40)."""
    logits = np.log([[[3.0, 1.0]], [[1.0, 9.0]]])
    mean = log_mean_probability(logits)
    np.testing.assert_allclose(mean, np.log([[17 / 40, 23 / 40]]), rtol=1e-12)
    np.testing.assert_allclose(log_mean_probability(logits + 50.0), mean, rtol=1e-12)  # softmax forgets a constant
    np.testing.assert_allclose(log_mean_probability(logits[:1]), np.log([[0.75, 0.25]]), rtol=1e-12)


def test_probabilities_too_small_for_floats_have_finite_logarithms():
    logits = np.array([[[0.0, -2000.0]], [[0.0, -2000.0]]], dtype=np.float32)
    np.testing.assert_allclose(log_mean_probability(logits), [[0.0, -2000.0]], atol=1e-12)


def test_log_loss_and_brier_by_hand():
    logs, labels = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), np.array([0, 2])
    assert mean_log_loss(logs, labels) == pytest.approx((np.log(2) + np.log(10)) / 2)
    assert brier_score(logs, labels) == pytest.approx(((0.25 + 2 * 0.0625) + (0.01 + 0.64 + 0.81)) / 2)


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_folds_partition_and_stratify(folds):
    labels = np.repeat([0, 1, 2], [7, 23, 41])
    np.random.default_rng(5).shuffle(labels)
    found = stratified_folds(labels, folds, seed=1)
    assert sorted(set(found)) == list(range(folds))
    sizes = np.bincount(found)
    assert sizes.sum() == 71
    assert sizes.max() - sizes.min() <= 1
    for label in range(3):
        of_class = np.bincount(found[labels == label], minlength=folds)
        assert of_class.max() - of_class.min() <= 1
    np.testing.assert_array_equal(found, stratified_folds(labels, folds, seed=1))
    assert (found != stratified_folds(labels, folds, seed=2)).any()


def test_more_folds_than_rows_of_a_class():
    labels = np.array([0] * 9 + [1] * 2)
    message = r"3 folds, but train has only 2 of the class 'rare', .* Give at most 2, or by: seeds\."
    with pytest.raises(DataError, match=message):
        stratified_folds(labels, 3, 0, ("common", "rare"))
    with pytest.raises(DataError, match=r"only 1 of the class 1, and each fold needs one\. Give by: seeds\."):
        stratified_folds(labels[:10], 2, 0)


# --- training -------------------------------------------------------------------------------------------------------


def _logits(model, rows):
    return TASK.predict(TorchRuntime(model.network), encoded(model, rows), model.tokenizer)


def test_several_teachers_are_one_with_the_logarithm_of_their_mean_probability(tiny_model, rows):
    teachers, given = [tiny_model(blocks=1), tiny_model(blocks=2)], encoded(tiny_model(), rows[:9])
    quiet = Progress(quiet=True)
    taught = np.array(with_teachers(given, [given] * 2, teachers, TASK, False, quiet)["teacher_logits"])
    each = [torch.tensor(_logits(teacher, given)).double().softmax(1).numpy() for teacher in teachers]
    np.testing.assert_allclose(np.exp(taught), np.mean(each, axis=0), atol=1e-6)
    alone = np.array(with_teachers(given, [given], teachers[:1], TASK, False, quiet)["teacher_logits"])
    np.testing.assert_array_equal(alone.astype(np.float32), _logits(teachers[0], given))


def test_a_language_model_learns_from_one_teacher(tiny_model, rows_of):
    rows = rows_of("text-generation")[:8]
    model = tiny_model("gpt2", blocks=1)
    with pytest.raises(ModelError, match="2 teachers; a model for text-generation learns from one"):
        finetune(model, rows, rows, teacher=[model, model], epochs=1)
    with pytest.raises(ModelError, match="combined for text-classification only"):
        ensemble(model, rows, rows)


@pytest.mark.parametrize("by", ["seeds", "folds"])
def test_members_are_plain_fine_tunings_and_the_facts_are_theirs(by, tiny_model, rows, tmp_path):
    model, start = tiny_model(blocks=1), tiny_model(blocks=1)
    validation = rows[1::3]
    result = ensemble(model, rows, validation, members=2, by=by, finetune=SETTINGS, seed=3, workspace=tmp_path)
    members = [load_checkpoint(tmp_path / f"member-{k}" / "model", TASK.auto_class()) for k in (1, 2)]
    folds = stratified_folds(np.array(encoded(start, rows)["labels"]), 2, 3)
    parts = [[row for row, fold in zip(rows, folds, strict=True) if fold == k] for k in (0, 1)]
    second = (parts[0], parts[1]) if by == "folds" else (rows, validation)
    finetune(start, *second, seed=4, **SETTINGS)
    for name, value in start.network.state_dict().items():
        assert torch.equal(value, members[1].network.state_dict()[name]), name
    labels = np.array([model.labels.index(row["label"]) for row in validation])
    mean = np.mean([torch.tensor(_logits(each, validation)).double().softmax(1).numpy() for each in members], axis=0)
    facts = result.facts
    assert facts["combined"]["accuracy"] == pytest.approx((mean.argmax(1) == labels).mean())
    assert facts["combined"]["log_loss"] == pytest.approx(-np.log(mean[np.arange(len(labels)), labels]).mean())
    assert [each["seed"] for each in facts["members"]] == [3, 4]
    for found, member in zip(facts["members"], members, strict=True):
        assert found["accuracy"] == pytest.approx((_logits(member, validation).argmax(1) == labels).mean())
    assert facts["one"]["accuracy"] == pytest.approx((_logits(model, validation).argmax(1) == labels).mean())
    assert ("out_of_fold" in facts) == (by == "folds")
    if by == "folds":
        right = [_logits(member, part).argmax(1) for member, part in zip(members, parts, strict=True)]
        truth = [[model.labels.index(row["label"]) for row in part] for part in parts]
        share = np.mean(np.concatenate(right) == np.concatenate(truth))
        assert facts["out_of_fold"]["accuracy"] == pytest.approx(share)
    assert facts["seconds"] > sum(each["seconds"] for each in facts["members"])


@pytest.mark.parametrize("by", ["seeds", "folds"])
def test_windows_of_a_text_are_judged_as_one_and_stay_in_one_fold(by, tiny_model, rows):
    model = tiny_model(blocks=1)
    long = [
        {"text": " ".join([row["text"]] * (1 + index % 3)), "label": row["label"]} for index, row in enumerate(rows)
    ]
    data = Dataset.from_dict(
        {"text": [row["text"] for row in long], "label": [model.labels.index(row["label"]) for row in long]}
    )
    windows = TASK.encode(data, model.tokenizer, 6, keep="windows")
    assert len(windows) > len(rows) == TASK.texts(windows)
    facts = ensemble(model, windows, windows, members=2, by=by, finetune=SETTINGS, seed=3).facts
    accuracy = (TASK.predict(TorchRuntime(model.network), windows, model.tokenizer).argmax(1) == data["label"]).mean()
    assert facts["one"]["accuracy"] == pytest.approx(accuracy)
    assert ("out_of_fold" in facts) == (by == "folds")


def test_a_teacher_answers_every_window(tiny_model, rows):
    model, teacher = tiny_model(blocks=1), tiny_model(blocks=1)
    data = Dataset.from_dict(
        {
            "text": [f"{row['text']} {row['text']}" for row in rows],
            "label": [model.labels.index(row["label"]) for row in rows],
        }
    )
    windows = TASK.encode(data, model.tokenizer, 6, keep="windows")
    finetune(model, windows, windows, teacher=teacher, distill={"weight": 0.5}, **SETTINGS)


def test_the_one_learns(tiny_model, rows):
    model = tiny_model(blocks=1)
    settings = {"epochs": 12, "learning_rate": 5e-3, "batch_size": 8, "precision": "float32"}
    facts = ensemble(model, rows, rows, members=2, finetune=settings).facts
    assert facts["combined"]["accuracy"] > 0.9
    assert facts["one"]["accuracy"] > 0.9


def test_stopped_in_a_member_and_in_the_one_and_resumed_is_never_stopped(tiny_model, rows, acting, tmp_path):
    """Steps of the second member and of the one that learns, of 8 each; what is finished is not done again."""

    def train(progress=None, workspace=None):
        model = tiny_model(blocks=1)
        result = ensemble(
            model, rows[:30], rows[30:], members=2, finetune=SETTINGS, workspace=workspace, progress=progress
        )
        facts = {name: value for name, value in result.facts.items() if name not in TIMING}
        facts["members"] = [{k: v for k, v in each.items() if k not in TIMING} for each in facts["members"]]
        facts["learning"] = {k: v for k, v in facts["learning"].items() if k not in TIMING}
        return dict(model.network.state_dict()), facts, result.history, result.flops

    def stop_after(count):
        left = [count]

        def act(_):
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("stopped by the test")

        return acting(act)

    with pytest.raises(RuntimeError, match="stopped by the test"):
        train(stop_after(13), tmp_path)
    kept = (tmp_path / "member-1" / "model" / "model.safetensors").stat().st_mtime_ns
    assert not (tmp_path / "member-2" / "facts.json").exists()
    with pytest.raises(RuntimeError, match="stopped by the test"):
        train(stop_after(9), tmp_path)
    assert (tmp_path / "member-2" / "facts.json").exists()
    weights, *rest = train(workspace=tmp_path)
    assert (tmp_path / "member-1" / "model" / "model.safetensors").stat().st_mtime_ns == kept
    other, *other_rest = train()
    assert rest == other_rest
    for name, value in weights.items():
        assert torch.equal(value, other[name]), name


def test_frozen_blocks_are_run_once_for_all(tiny_model, rows, tmp_path):
    """Members that share the outputs of their frozen blocks end as those that don't."""
    settings = SETTINGS | {"phases": [{"train": ["head"], "epochs": 2}]}
    settings.pop("epochs")
    shared, alone = tiny_model(blocks=2), tiny_model(blocks=2)
    ensemble(shared, rows, rows[::2], members=2, by="folds", finetune=settings, workspace=tmp_path)
    assert len(list((tmp_path / "prefix").iterdir())) == 1
    ensemble(alone, rows, rows[::2], members=2, by="folds", finetune=settings | {"cache": "off"})
    np.testing.assert_allclose(_logits(shared, rows), _logits(alone, rows), atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"members": 1}, "ensemble.members: 1 is no ensemble"),
        ({"by": "bags"}, "ensemble.by: 'bags' can't be used; give seeds or folds"),
        ({"finetune": {"epoch": 3}}, "ensemble.finetune: 'epoch' can't be given here; .*epochs"),
        ({"finetune": {"teacher": None}}, "ensemble.finetune: 'teacher' can't be given here"),
        ({"distill": {"heat": 1}}, "finetune.distill: unknown field 'heat'"),
    ],
)
def test_what_is_refused(given, message, tiny_model, rows):
    with pytest.raises(RecipeError, match=message):
        ensemble(tiny_model(blocks=1), rows, rows, **given)


def test_folds_are_checked_before_any_work(tiny_model, rows, tmp_path):
    few = [*[row for row in rows if row["label"] == "negative"][:9], rows[0]]
    with pytest.raises(DataError, match="3 folds, but train has only 1 of the class 'positive'"):
        ensemble(tiny_model(blocks=1), few, rows, by="folds", workspace=tmp_path / "work")
    assert not (tmp_path / "work").exists()
