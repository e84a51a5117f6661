"""What a person sees while work goes on: a bar in a terminal, plain lines in a pipe, events in a log."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")


class Progress:
    """Shows long work on standard error and appends every event to a log file, where one is given."""

    def __init__(self, log: Path | None = None, quiet: bool = False) -> None:
        self.log = log
        self.quiet = quiet

    def logging_to(self, log: Path) -> Progress:
        """The same, with a log file."""
        other = copy.copy(self)
        other.log = log
        return other

    def say(self, text: str) -> None:
        """One line for the person."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def event(self, event: str, /, **fields: Any) -> None:
        """One line for the log: {"time": …, "event": name, …}."""
        if self.log is not None:
            line = json.dumps(
                {"time": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False, default=str
            )
            with self.log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def bar(self, title: str, total: int | None) -> Bar:
        return Bar(title, total, visible=not self.quiet)

    def track(self, items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
        """The items, with a bar that counts them."""
        with self.bar(title, total) as bar:
            for item in items:
                yield item
                bar.advance()


class Bar:
    """A progress bar with a free text beside it; in a pipe, a line every ten seconds."""

    def __init__(self, title: str, total: int | None, visible: bool) -> None:
        self.title, self.total, self.visible = title, total, visible
        self.done = 0
        self.text = ""
        self._printed = time.monotonic()
        self._rich: Any = None

    def __enter__(self) -> Bar:
        if self.visible and sys.stderr.isatty():
            self._rich = _rich_bar()
            self._rich.start()
            self._task = self._rich.add_task(self.title, total=self.total, text="")
        return self

    def advance(self, count: int = 1, text: str | None = None) -> None:
        self.done += count
        self.text = self.text if text is None else text
        if self._rich is not None:
            self._rich.update(self._task, advance=count, text=self.text)
        elif self.visible and time.monotonic() - self._printed > 10:
            self._printed = time.monotonic()
            of = f"/{self.total}" if self.total else ""
            print(f"  {self.title}: {self.done}{of} {self.text}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._rich is not None:
            self._rich.stop()


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
        transient=True,
    )


def quiet_libraries() -> None:
    """Keep the libraries' own bars and load reports off the screen: what matters of them, our messages say."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
