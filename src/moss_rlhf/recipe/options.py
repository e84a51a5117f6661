"""The rules of a recipe's fields, for the same options given in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from typing import Annotated, Any, ParamSpec, TypeVar, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from moss_rlhf.errors import RecipeError
from moss_rlhf.recipe.reading import rule
from moss_rlhf.recipe.spec import Spec

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


def follows(spec: type[Spec], place: str) -> Callable[[Callable[Given, Returned]], Callable[Given, Returned]]:
    """A function whose keyword arguments keep to the fields of `spec` that have their names, see `check_options`.

    Words and numbers reach it as a recipe would hold them: "0.5" as 0.5 where a number is wanted.
    """

    def checked(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
        @wraps(function)
        def call(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
            kwargs.update(check_options(spec, kwargs, place))
            return function(*args, **kwargs)

        return call

    return checked


def check_options(spec: type[Spec], given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Hold numbers, words and mappings of them to the fields of a spec; the rest is for whoever takes it.

    returns  the numbers and words, as the fields hold them.
    raises   RecipeError on the first value that a recipe could not hold.
    """
    held = {}
    for name, value in given.items():
        if name not in spec.model_fields:
            continue
        inner = _inner(spec.model_fields[name].annotation)
        if isinstance(value, Mapping) and inner is not None:
            check_options(inner, value, f"{place}.{name}")
        elif isinstance(value, str | int | float):
            held[name] = _held(spec, name, value, f"{place}.{name}")
    return held


def _held(spec: type[Spec], name: str, value: object, place: str) -> Any:
    try:
        return _adapter(spec, name).validate_python(value)
    except ValidationError as error:
        plain = [fault for fault in error.errors() if fault["type"] not in _STRUCTURES] or error.errors()
        rules = dict.fromkeys(map(rule, plain))
        raise RecipeError(f"{place}: {value!r} can't be used; it must {' or '.join(rules)}.") from None


_STRUCTURES = ("model_type", "model_attributes_type", "list_type", "dict_type")


@lru_cache(None)
def _adapter(spec: type[Spec], name: str) -> TypeAdapter[Any]:
    info = spec.model_fields[name]
    field: Any = Annotated[info.annotation, info]
    return TypeAdapter(field, config=ConfigDict(allow_inf_nan=False))


def _inner(annotation: object) -> type[Spec] | None:
    """The spec that a field may be a mapping of."""
    parts = (annotation, *get_args(annotation))
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Spec)), None)
