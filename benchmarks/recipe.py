"""Run a recipe from nothing and print what it reached: `python benchmarks/recipe.py recipes/sst2.yaml [--set …]`.

The wall time is that of `moss run` as a user starts it, imports and report included. The shipped file's accuracy is
measured once more by a script of its own: plain onnxruntime and the tokenizer, one text at a time. With `--finished`
the table is that of a run that stands already.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from common import keep, read_report, table

from moss_rlhf.recipe import read_recipe

ASKED = {
    "quickstart": {
        "wall": "≤ 180 s",
        "before": "≥ 0.85",
        "drop": "≤ 0.03",
        "size": "",
        "throughput": "",
        "latency": "",
    },
    "sst2": {
        "wall": "≤ 1500 s",
        "before": "≥ 0.87",
        "drop": "≤ 0.015",
        "size": "≤ 0.25×",
        "throughput": "≥ 3×",
        "latency": "≥ 6×",
    },
    "sst2-small": {"drop": "≤ 0.015", "size": "≤ 0.14×", "throughput": "≥ 5×", "latency": "≥ 10×"},
    "ag_news": {"before": "≥ 0.905"},
}


def main(recipe: str, *overrides: str) -> None:
    finished, overrides = "--finished" in overrides, [value for value in overrides if value != "--finished"]
    settings = read_recipe(recipe, [value for value in overrides if value != "--set"])
    started = time.perf_counter()
    if not finished:
        moss = Path(sys.executable).with_name("moss")
        subprocess.run([moss, "run", recipe, *overrides, "--fresh"], check=True)
    wall = time.perf_counter() - started
    name, run = Path(recipe).stem, Path(settings.output)
    report = read_report(run)
    before, after, gain = report["before"], report["after"], report["gain"]
    asked = ASKED.get(name, {})
    metric = gain["metric"]["name"]
    rows = [
        *([] if finished else [("wall time of moss run", f"{wall:.0f} s", asked.get("wall", ""))]),
        (f"{metric} before", _interval(before["metrics"][metric]), asked.get("before", "")),
        (f"{metric} after", _interval(after["metrics"][metric]), ""),
        (
            "difference, paired",
            _interval({**gain["metric"], "value": gain["metric"]["delta"]}),
            f"drop {asked['drop']}" if asked.get("drop") else "",
        ),
        ("the same, by plain onnxruntime one text at a time", f"{independent_accuracy(run, report):.4f}", ""),
        ("size of the shipped file / dense checkpoint", f"{1 / gain['size']:.3f}×", asked.get("size", "")),
        *(
            (f"throughput, batch {size}", f"{ratio:.2f}×", asked.get("throughput", "") if size == "32" else "")
            for size, ratio in gain["speedup"].items()
        ),
        *(
            (f"latency p50, batch {size}", f"{ratio:.2f}×", asked.get("latency", "") if size == "1" else "")
            for size, ratio in gain["latency"].items()
        ),
    ]
    if report["reference"]:
        for size, value in report["reference"]["throughput"].items():
            rows.append(
                (
                    f"throughput, batch {size}, same shape in float32 ONNX",
                    f"{value / before['throughput'][size]:.2f}×",
                    "",
                )
            )
    rows += [
        (f"seconds of stage {stage['name'].rsplit('-', 1)[0]}", f"{stage['seconds']:.0f}", "")
        for stage in report["stages"]
    ]
    keep(name, table(f"`{recipe}` {' '.join(overrides)}", rows))


def _interval(value: dict) -> str:
    return f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})"


def independent_accuracy(run: Path, report: dict) -> float:
    """Someone else's evaluation: none of our code between the file and the number."""
    import json

    import numpy as np
    import onnxruntime
    from datasets import Dataset
    from transformers import AutoTokenizer

    session = onnxruntime.InferenceSession(str(run / report["after"]["artifact"]))
    tokenizer = AutoTokenizer.from_pretrained(run / "onnx")
    labels = json.loads((run / "onnx" / "config.json").read_text(encoding="utf-8"))["id2label"]
    rows = Dataset.from_file(str(next((run / "data").glob("test-????????????????.arrow"))))
    names = json.loads(next((run / "data").glob("test-????????????????.json")).read_text(encoding="utf-8"))["labels"][
        "names"
    ]
    longest = int(report["data"]["test"]["tokens"]["max_length"])
    right = 0
    for row in rows:
        encoded = tokenizer(row["text"], truncation=True, max_length=longest, return_tensors="np")
        inputs = {value.name: encoded[value.name].astype(np.int64) for value in session.get_inputs()}
        answer = labels[str(int(session.run(None, inputs)[0].argmax()))]
        right += answer == names[row["label position"]]
    return right / len(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
