"""YAML → Recipe, with errors that say where, what, which rule, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from moss_rlhf.errors import RecipeError
from moss_rlhf.recipe.schema import Recipe
from moss_rlhf.recipe.search import candidates
from moss_rlhf.recipe.spec import OUR_FAULTS
from moss_rlhf.recipe.stages import STAGE_KINDS

_INT = re.compile(r"[-+]?(0|[1-9][\d_]*)$")
_FLOAT = re.compile(r"[-+]?((\d[\d_]*\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$")
_MERGE = "tag:yaml.org,2002:merge"  # `<<: *defaults`


class _Loader(yaml.SafeLoader):
    """SafeLoader that guesses no more than a recipe wants; a key given twice is refused.

    Only null and plain numbers are read as such. Of YAML 1.1, `yes` and `true` stay text (a field that wants true or
    false takes them), `1:30` is no 90, `010` no 8 and `2024-05-01` no date; `5e-5` is a number.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != _MERGE]
        keys = [self.construct_object(key, deep=True) for key in own]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = own[index].start_mark.line + 1
                raise RecipeError(f"line {line}: the key {key!r} is given twice; keep one of them.")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (_MERGE, "tag:yaml.org,2002:null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes texts which only our reader takes for numbers, such as 5e-5."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


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


def _load(text: str, place: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise RecipeError(f"{place}: is not YAML: {' '.join(str(error).split())}") from None


def parse_yaml(text: str, place: str) -> dict[str, Any]:
    """The mapping that a YAML text holds."""
    values = _load(text, place)
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
    value = _load(text, f"--set {override}")
    target: Any = values
    *parents, last = path.split(".")
    for name in parents:
        target = _descend(target, name, override)
    _assign(target, last, value, override)


def _descend(target: Any, name: str, override: str) -> Any:
    if isinstance(target, list):
        position = _position(target, name, override)
        if isinstance(target[position], str):
            target[position] = {target[position]: {}}  # `stages.1.prune.sparsity=0.5` on `- prune`
        return target[position]
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
    if not (name.isascii() and name.isdigit()) or int(name) >= len(target):
        raise RecipeError(f"--set {override}: {name!r} is no position in a list of {len(target)} (they count from 0).")
    return int(name)


def make_recipe(values: Mapping[str, Any], place: str = "recipe") -> Recipe:
    """A Recipe from plain values; RecipeError with one line a fault."""
    try:
        recipe = Recipe.model_validate(values)
        _check_space(recipe)
        return recipe
    except ValidationError as error:
        every = error.errors()
        faults = [fault for fault in every if not _beside_the_point(fault)] or every
        raise RecipeError("\n".join(f"{place}: {line}" for line in _explain(faults))) from None


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields set: {dotted path: value}; checked as if it had been written so.

    raises  RecipeError.
    """
    whole = recipe_values(recipe)
    for path, value in values.items():
        target: Any = whole
        *parents, last = path.split(".")
        for name in parents:
            target = _descend(target, name, path)
        _assign(target, last, value, path)
    return make_recipe(whole)


def _check_space(recipe: Recipe) -> None:
    """Every field of the search exists, and takes every value; of a range, its ends."""
    base = recipe.model_copy(update={"search": None})
    for field, choice in (recipe.search.space if recipe.search else {}).items():
        for value in candidates(choice):
            try:
                with_values(base, {field: value})
            except RecipeError as error:
                why = str(error).removeprefix("recipe: ").removeprefix(f"--set {field}: ")
                raise RecipeError(f"search.space.{field}: {value!r} can't be tried: {why}") from None


def _beside_the_point(fault: Any) -> bool:
    """A mapping is told what is wrong inside it, not that it might have been a string or a number instead."""
    return isinstance(fault["input"], Mapping) and fault["type"].removesuffix("_type") in _PLAIN_TYPES


_PLAIN_TYPES = ("string", "float", "int", "list", "literal_error")


def _explain(faults: Sequence[Any]) -> list[str]:
    """One line a place; what each member of a union asks for is joined by 'or'."""
    rules: dict[tuple[str, str], list[str]] = {}
    for fault in faults:
        where = ".".join(_without_tags([str(part) for part in fault["loc"]])) or "the recipe"
        rules.setdefault((where, _complaint(fault)), []).append(rule(fault))
    return [f"{where}: {complaint}{' or '.join(dict.fromkeys(found))}." for (where, complaint), found in rules.items()]


def _complaint(fault: Any) -> str:
    if fault["type"] in OUR_FAULTS:
        return ""
    return "is missing; " if fault["type"] == "missing" else f"{fault['input']!r} can't be used; it must "


def rule(fault: Any) -> str:
    """What a value must do, in words that need no knowledge of Python: 'be a whole number'."""
    if fault["type"] in OUR_FAULTS:
        return str(fault["msg"]).rstrip(".")
    message = re.sub(r"^(Input|String|List|Dictionary) should ", "", str(fault["msg"]))
    return _RULES.get(fault["type"], message.partition(" after validation")[0])


_RULES = {
    "missing": "it must be given",
    "string_type": "be text",
    "int_type": "be a whole number",
    "int_parsing": "be a whole number",
    "int_from_float": "be a whole number",
    "float_type": "be a number",
    "float_parsing": "be a number",
    "bool_type": "be true or false",
    "bool_parsing": "be true or false",
    "list_type": "be a list",
    "dict_type": "be a mapping",
    "model_type": "be a mapping of fields",
}
_UNION_TAGS = frozenset(
    {
        *("float", "int", "str", "constrained-int", "constrained-float"),
        *("SplitLayout", "CacheSpec", "DistillSpec", "OptimizerSpec", "ScheduleSpec", "ScratchSpec"),
    }
)


def _without_tags(names: list[str]) -> list[str]:
    """Pydantic's location without union members: stages.0.narrow.narrow.heads → stages.0.narrow.heads."""
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
    return yaml.dump(recipe_values(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
