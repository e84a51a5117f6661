"""Label errors on news topics as real annotators named them: found with which precision, and what cleaning is worth.

    python benchmarks/label_errors.py --data ../shared/data --work /tmp/label_errors

10,000 rows, 19.8 % of them with a label that is not the true one (`gt`, which only scores; `group` is never read). Both
finders get the same embeddings of MiniLM, untrained. Then a logistic regression on those embeddings is trained on all
rows and on what is left, and measured on the official test split; --finetune does the same with the whole network.
"""

import argparse
import csv
import gzip
import json
from pathlib import Path

import numpy as np
from common import keep, table

from moss_rlhf.data.cleaning.label_errors import (
    SUPPORT,
    confident_errors,
    neighbour_shares,
    out_of_fold,
    unsupported,
)
from moss_rlhf.data.cleaning.probe import probe_answers
from moss_rlhf.evaluation import paired_difference
from moss_rlhf.tasks.metrics import accuracy
from moss_rlhf.tasks.row_statistics import confusion_cells

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
CLASSES = 4


def _read(data: Path) -> dict:
    """Texts and labels; the true ones only score."""
    with gzip.open(data / "ag_news" / "noisy_annotators.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with gzip.open(data / "ag_news" / "test.csv.gz", "rt", encoding="utf-8", newline="") as file:
        test = list(csv.reader(file))
    return {
        "texts": [row["text"] for row in rows],
        "given": np.array([int(row["label"]) for row in rows]),
        "true": np.array([int(row["gt"]) for row in rows]),
        "test_texts": [f"{row[1]} {row[2]}" for row in test],
        "test_labels": np.array([int(row[0]) - 1 for row in test]),
    }


def _vectors(work: Path, name: str, texts: list[str]) -> np.ndarray:
    """Embeddings, kept in the work folder: minutes to make."""
    place = work / f"{name}.npy"
    if not place.exists():
        from moss_rlhf.model.checkpoint import load_pretrained
        from moss_rlhf.model.locate import locate
        from moss_rlhf.progress import Progress, quiet_libraries
        from moss_rlhf.tasks import TASKS
        from moss_rlhf.tasks.embedding import embed_texts

        quiet_libraries()
        task = TASKS["text-classification"]
        model = load_pretrained(locate(MODEL), task.name, task.auto_class(), [str(label) for label in range(CLASSES)])
        np.save(place, embed_texts(model, texts, max_length=128, progress=Progress()))
    return np.load(place)


def _found(name: str, errors: np.ndarray, wrong: np.ndarray, asked: str = "") -> tuple[str, str, str]:
    precision, recall = wrong[errors].mean(), wrong[errors].sum() / wrong.sum()
    return name, f"precision {precision:.3f} at recall {recall:.3f} ({errors.sum():,} rows)", asked


def _at_recall(scores: np.ndarray, wrong: np.ndarray, recall: float) -> float:
    """Precision where the rows of the highest scores hold this share of all errors."""
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(wrong[order])
    place = int(np.searchsorted(found, recall * wrong.sum()))
    return float(found[place] / (place + 1))


def _compared(raw: np.ndarray, cleaned: np.ndarray, labels: np.ndarray) -> tuple[str, str, str]:
    cells = [confusion_cells(labels, answers, CLASSES) for answers in (raw, cleaned)]
    found = paired_difference(*cells, metric=accuracy, confidence=0.95, resamples=2000, seed=0)
    value = f"{found['delta']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f}), p = {found['p_value']:.2g}"
    return "cleaned − raw, paired 95 % interval", value, "above 0"


def _finetuned(data: dict, work: Path, rows: np.ndarray, name: str) -> float:
    """Test accuracy (first 2,000 rows) of MiniLM fine-tuned for an epoch on some rows."""
    import moss_rlhf

    place = work / f"finetuned-{name}.json"
    if not place.exists():
        model = moss_rlhf.load(MODEL, labels=[str(label) for label in range(CLASSES)])
        train = [{"text": data["texts"][row], "label": str(data["given"][row])} for row in np.flatnonzero(rows)]
        test = [
            {"text": text, "label": str(label)}
            for text, label in list(zip(data["test_texts"], data["test_labels"], strict=True))[:2000]
        ]
        moss_rlhf.finetune(model, train, train[:200], epochs=1, learning_rate=5e-5)
        place.write_text(json.dumps(moss_rlhf.evaluate(model, test)["metrics"]["accuracy"]["value"]))
    return float(json.loads(place.read_text()))


def _finding(vectors: np.ndarray, data: dict) -> tuple[list, np.ndarray]:
    """Rows of the table on what is found, and which rows neighbours call wrong."""
    given, wrong = data["given"], data["given"] != data["true"]
    probabilities = out_of_fold(vectors, given, folds=5, seed=0)
    shares = neighbour_shares(vectors, given)
    errors = unsupported(shares, given, SUPPORT)
    ranked, ours = (_at_recall(1 - part[np.arange(len(wrong)), given], wrong, 0.6) for part in (probabilities, shares))
    contradicted = probabilities.argmax(axis=1) != given
    return [
        ("labels that are wrong", f"{wrong.mean():.1%} of {len(wrong):,}", ""),
        _found("cleanlab, `find_label_issues`", confident_errors(probabilities, given), wrong),
        _found("rows whose answer is not their label, same probabilities", contradicted, wrong),
        ("cleanlab's ranking (self-confidence), cut at recall 0.6", f"precision {ranked:.3f}", ""),
        _found("**neighbours, as `label_errors` does**", errors, wrong, "0.5 at 0.6"),
        ("neighbours' ranking, cut at recall 0.6", f"precision {ours:.3f}", "≥ cleanlab's"),
    ], errors


def _training(vectors: np.ndarray, test: np.ndarray, data: dict, errors: np.ndarray) -> list:
    """Rows of the table on what training gives, with and without what was found."""
    sets = {
        "test accuracy of a logistic regression, raw rows": np.ones(len(errors), dtype=bool),
        "the same, cleaned rows": ~errors,
        "the same, only rows whose label is true": data["given"] == data["true"],
    }
    answers = {name: probe_answers(vectors[part], data["given"][part], test) for name, part in sets.items()}
    right = {name: (found == data["test_labels"]).mean() for name, found in answers.items()}
    raw, cleaned, _ = answers.values()
    rows = [(name, f"{share:.4f} ({sets[name].sum():,} rows)", "") for name, share in right.items()]
    return [*rows, _compared(raw, cleaned, data["test_labels"])]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="the folder that holds ag_news")
    arguments.add_argument("--work", type=Path, required=True, help="where embeddings are kept")
    arguments.add_argument("--finetune", action="store_true", help="also fine-tune the network, twice")
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = _read(options.data)
    vectors = _vectors(options.work, "train", data["texts"])
    test = _vectors(options.work, "test", data["test_texts"])
    rows, errors = _finding(vectors, data)
    rows += _training(vectors, test, data, errors)
    if options.finetune:
        sets = {"raw": np.ones(len(errors), dtype=bool), "clean": ~errors}
        accuracies = [f"{_finetuned(data, options.work, part, name):.4f}" for name, part in sets.items()]
        rows.append(("fine-tuned one epoch, 2,000 test rows: raw; cleaned", "; ".join(accuracies), "above the first"))
    keep("label_errors", table("Label errors, ag_news/noisy_annotators", rows))


if __name__ == "__main__":
    main()
