"""YAML → Recipe, with errors that say where, what, which rule, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from moss_rlhf.errors import RecipeError
from moss_rlhf.recipe.schema import STAGE_KINDS, Recipe

_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: `yes` and `no` are text, `5e-5` is a number; a key given twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]  # PyYAML
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = node.value[index][0].start_mark.line + 1
                raise RecipeError(f"line {line}: the key {key!r} is given twice; keep one of them.")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file.

    overrides   `dotted.path=value` strings, the value written as in YAML: `stages.0.finetune.epochs=5`.
    raises      RecipeError, one line a fault.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(
            f"{path}: can't be read ({error.strerror}). Give the path of a recipe, such as recipes/quickstart.yaml."
        ) from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not UTF-8 text. A recipe is a YAML file; save it as UTF-8.") from None
    values = parse_yaml(text, str(path))
    for override in overrides:
        apply_override(values, override)
    return make_recipe(values, str(path))


def parse_yaml(text: str, place: str) -> dict[str, Any]:
    """The mapping that a YAML text holds."""
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{place}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{place}: a recipe is a mapping of fields (task, model, data, stages …), this is {type(values).__name__}."
        )
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one field in place from `dotted.path=value`."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: must be FIELD=VALUE, such as --set stages.0.finetune.epochs=5.")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: the value is not YAML; quote it.") from None
    target: Any = values
    *parents, last = path.split(".")
    for name in parents:
        target = _descend(target, name, override)
    _assign(target, last, value, override)


def _descend(target: Any, name: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_position(target, name, override)]
    if not isinstance(target, dict):
        raise RecipeError(f"--set {override}: {name!r} lies inside a value that has no fields.")
    if isinstance(target.get(name), str) and name in ("train", "validation", "test"):
        target[name] = {"file": target[name]}  # `data.test.header=false` on the short form
    if target.get(name) is None:
        target[name] = {}
    return target[name]


def _assign(target: Any, name: str, value: Any, override: str) -> None:
    if isinstance(target, list):
        target[_position(target, name, override)] = value
    elif isinstance(target, dict):
        target[name] = value
    else:
        raise RecipeError(f"--set {override}: {name!r} lies inside a value that has no fields.")


def _position(target: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(target):
        raise RecipeError(f"--set {override}: {name!r} is no position in a list of {len(target)} (they count from 0).")
    return int(name)


def make_recipe(values: Mapping[str, Any], place: str = "recipe") -> Recipe:
    """A Recipe from plain values; RecipeError with one line a fault."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        faults = [fault for fault in error.errors() if not _beside_the_point(fault)]
        lines = list(dict.fromkeys(_explain(fault) for fault in faults))
        raise RecipeError("\n".join(f"{place}: {line}" for line in lines)) from None


def _beside_the_point(fault: Any) -> bool:
    """A mapping is told what is wrong inside it, not that it might have been a string or a number instead."""
    return isinstance(fault["input"], Mapping) and fault["type"].removesuffix("_type") in ("string", "float", "int")


def _explain(fault: Any) -> str:
    names = [str(part) for part in fault["loc"]]
    where = ".".join(_without_tags(names)) or "the recipe"
    if fault["type"] == "missing":
        return f"{where}: is missing; it must be given."
    message = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    value = fault["input"]
    if fault["type"] in ("unknown_key", "stage", "order", "nothing", "one_source"):
        return f"{where}: {message}".rstrip(".") + "."
    return f"{where}: {value!r} can't be used; it {message}.".replace("it should be", "it must be")


_UNION_TAGS = frozenset({"float", "int", "str", "SplitLayout", "constrained-int", "constrained-float"})


def _without_tags(names: list[str]) -> list[str]:
    """Pydantic's location with the names of union members left out: stages.0.narrow.narrow.heads → stages.0.narrow.heads."""
    kept: list[str] = []
    for index, name in enumerate(names):
        repeated = name in STAGE_KINDS and index > 0 and names[index - 1] == name
        if not repeated and name not in _UNION_TAGS and "[" not in name and "(" not in name:
            kept.append(name)
    return kept


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe, defaults filled in, as plain JSON values."""
    return recipe.model_dump(mode="json")


def recipe_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults filled in, as YAML."""
    return yaml.safe_dump(recipe_values(recipe), sort_keys=False, allow_unicode=True)
