"""The command `moss`: parses, calls, prints. No logic, and nothing heavy imported before a command runs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from moss_rlhf.errors import DataError, Interrupted, UserError

app = typer.Typer(
    help="Make a pretrained language model small, fast and good at your task, with a report that proves it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(help="the recipe, a YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="FIELD=VALUE, such as stages.0.finetune.epochs=5; may be repeated")
]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"moss-rlhf {version('moss-rlhf')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and leave", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Options of every command; `_without_debug` takes --debug out before they are parsed, here it is only told of."""


@app.command()
def init(
    train: Annotated[Path, typer.Option(help="a data file: csv, tsv, txt, json, jsonl, parquet, also .gz")],
    task: Annotated[
        str, typer.Option(help="text-classification, text-generation or translation")
    ] = "text-classification",
    model: Annotated[str | None, typer.Option(help="hub id or directory; else a usual one for the task")] = None,
    test: Annotated[Path | None, typer.Option(help="a file to measure on; else validation is")] = None,
    target: Annotated[Path | None, typer.Option(help="translation: the targets of the lines of --train")] = None,
    test_target: Annotated[Path | None, typer.Option(help="translation: those of --test")] = None,
) -> None:
    """Write a recipe for your data to standard output."""
    from moss_rlhf.starting import starting_recipe

    print(starting_recipe(task, model, train, test, target, test_target), end="")


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check recipe, data and model, and foretell parameters, memory and time, before any work."""
    from moss_rlhf.checking import check as check_recipe
    from moss_rlhf.progress import Progress
    from moss_rlhf.recipe import read_recipe
    from moss_rlhf.reporting.forecast import forecast_text

    print(forecast_text(check_recipe(read_recipe(recipe, overrides or ()), Progress())))


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of going on")] = False,
) -> None:
    """Do what a recipe says; run again after an interruption and it goes on from there."""
    from moss_rlhf.progress import Progress
    from moss_rlhf.recipe import read_recipe

    settings = read_recipe(recipe, overrides or ())
    from moss_rlhf.pipeline import run as run_recipe
    from moss_rlhf.reporting import terminal_summary

    report = run_recipe(settings, fresh=fresh, progress=Progress())
    print(terminal_summary(report))
    print(f"\nreport: {Path(settings.output) / 'report.html'}")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="a run, a checkpoint, or a directory with model.onnx")],
    texts: Annotated[list[str] | None, typer.Argument(help="texts; none: lines of standard input")] = None,
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", help="one more of the same labels: the mean probability answers; may be repeated"),
    ] = None,
) -> None:
    """Print label, probability and text of each text, tab-separated."""
    from moss_rlhf.serving import Committee, Predictor

    predictor = Committee.open([model, *others]) if others else Predictor.open(model)
    shown, asked = itertools.tee(texts or _input_lines())
    for text, answer in zip(shown, predictor.predict(asked), strict=True):
        print(f"{answer.label}\t{answer.probability:.3f}\t{text}")


def _input_lines() -> Iterator[str]:
    """Lines of standard input, blank ones left out."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise DataError(
                f"standard input, line {number}: its bytes are not UTF-8. Convert it first, as with iconv."
            ) from None
        if text:
            yield text


@app.command()
def collect(
    corpus: Annotated[Path, typer.Argument(help="csv, tsv, txt, json, jsonl or parquet, also .gz")],
    output: Annotated[Path, typer.Argument(help="the jsonl file to write, which a recipe then names")],
    count: Annotated[int, typer.Option(help="texts to take")],
    like: Annotated[Path | None, typer.Option(help="a file of example texts")] = None,
    keyword: Annotated[list[str] | None, typer.Option(help="a word that texts must hold; may be repeated")] = None,
    model: Annotated[str | None, typer.Option(help="hub id or checkpoint whose embeddings compare texts")] = None,
    perplexity: Annotated[str | None, typer.Option(help="a causal language model")] = None,
    max_perplexity: Annotated[float | None, typer.Option(help="texts above it are passed over")] = None,
    diversity: Annotated[float, typer.Option(help="0: the best alone; 1: the farthest apart")] = 0.3,
    column: Annotated[str, typer.Option(help="where texts stand")] = "text",
    seed: Annotated[int, typer.Option(help="decides between texts that are equally good")] = 0,
) -> None:
    """Choose a task's texts out of a large corpus: like examples, with words, of low perplexity, and diverse."""
    from moss_rlhf.progress import Progress, quiet_libraries
    from moss_rlhf.tasks.collecting import collect as collect_texts

    quiet_libraries()
    found = collect_texts(
        corpus,
        count=count,
        like=like,
        keywords=keyword or (),
        model=model,
        perplexity=perplexity,
        max_perplexity=max_perplexity,
        diversity=diversity,
        column=column,
        seed=seed,
        output=output,
        progress=Progress(),
    )
    print(f"{len(found)} texts: {output}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="a checkpoint")],
    data: Annotated[Path, typer.Argument(help="a data file with the columns of the model's task")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="how to read the file, such as data.test.columns.text=review; may be repeated"),
    ] = None,
) -> None:
    """Measure a checkpoint on a data file: metrics with 95 % intervals, as JSON."""
    from moss_rlhf.starting import evaluate_file

    print(json.dumps(evaluate_file(model, data, overrides or ()), indent=1, ensure_ascii=False))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="a checkpoint")],
    output: Annotated[Path, typer.Argument(help="a directory for the files and their tokenizer")],
    format: Annotated[
        str, typer.Option(help="auto, onnx, ctranslate2 or compressed-tensors; auto: by the kind of the model")
    ] = "auto",
) -> None:
    """Write a checkpoint for its runtime, quantized where it is; held against PyTorch before it counts."""
    from moss_rlhf.starting import export_checkpoint

    print(json.dumps(export_checkpoint(model, output, format), indent=1))


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema: editors complete from it."""
    from moss_rlhf.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit status: 0 done, 1 a fault of ours, 2 the input is wrong, 130 interrupted and resumable."""
    words, debug = _without_debug(sys.argv[1:] if arguments is None else arguments)
    try:
        _call(words or ["--help"])
        sys.stdout.flush()
    except typer.TyperException as error:
        _stop(f"{error.format_message()} (moss --help and moss COMMAND --help tell more)", 2, debug)
    except UserError as error:
        _stop(str(error), 2, debug)
    except Interrupted as error:
        _stop(str(error), 130, debug)
    except KeyboardInterrupt:
        _stop("interrupted; run again to go on from what is finished", 130, debug)
    except BrokenPipeError:  # the reader of our output has left: say nothing, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:  # everything that no one foresaw
        from moss_rlhf.files import disk_fault

        if fault := disk_fault(error):
            _stop(fault, 2, debug)
        _stop(f"a fault of moss-rlhf: {type(error).__name__}: {error} (--debug shows where)", 1, debug)


def _without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The words but for --debug, which may stand anywhere before a `--`."""
    words = list(itertools.takewhile(lambda word: word != "--", arguments))
    kept = [word for word in words if word != "--debug"]
    return [*kept, *arguments[len(words) :]], len(kept) < len(words)


def _call(arguments: list[str]) -> None:
    """Not typer's own way to call: that makes every KeyboardInterrupt a silent exit, and an Interrupted has words."""
    command = typer.main.get_command(app)
    with contextlib.suppress(typer.Exit), command.make_context("moss", arguments) as context:
        command.invoke(context)


def _stop(message: str, status: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"moss: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
