"""What the benchmarks share: the machine, a table, a place for results."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

from moss_rlhf.evaluation import describe_machine, versions

RESULTS = Path(__file__).parent / "results"


def table(
    title: str, rows: list[tuple[str, str, str]], header: tuple[str, str, str] = ("what", "measured", "asked")
) -> str:
    """Three columns as Markdown, under the machine's name and the versions."""
    machine = describe_machine()
    instructions = ", ".join(machine["instructions"]) or "none of note"
    lines = [
        f"# {title}",
        "",
        f"{time.strftime('%Y-%m-%d')}, {machine['processor']}, {machine['cores']} cores ({instructions}), "
        f"{platform.system()}; " + ", ".join(f"{name} {version}" for name, version in versions().items() if version),
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def keep(name: str, text: str) -> None:
    """Print a table and keep it in benchmarks/results/."""
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


def read_report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text(encoding="utf-8"))
