"""The fields of `data.clean`: what is looked for in the rows, and what is done about it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moss_rlhf.recipe.spec import Positive, Spec

Check = Literal["off", "flag", "drop"]


class CleanSpec(Spec):
    """Checks of the rows, in this order. `flag` lists what is found, `drop` also leaves it out; never out of test."""

    empty: Check = Field("off", description="texts with fewer letters and digits than min_letters")
    min_letters: Positive = 1
    markup: Literal["off", "flag", "drop", "mend"] = Field(
        "off", description="remnants of HTML; mend: tags and entities are undone in train"
    )
    duplicates: Check = Field("off", description="the same text and label again, within a split")
    conflicts: Check = Field("off", description="the same text under different labels, within a split")
    near_duplicates: Check = Field("off", description="texts like an earlier one of their split and label")
    leaks: Check = Field("off", description="texts like one of a later split; equal texts are dropped in any case")
    threshold: float = Field(
        0.8, gt=0, le=1, description="of near_duplicates and leaks: shingles in common over shingles in all"
    )
    boilerplate: Check = Field("off", description="texts made mostly of a sentence that stands in many others")
    boilerplate_rows: int = Field(10, ge=2, description="different texts that make a sentence boilerplate")
    language: Check = Field("off", description="texts in another language than most of train")
    length: Check = Field("off", description="texts far longer or shorter than most of train")
    label_errors: Check = Field("off", description="labels in train that the other rows contradict")
    label_method: Literal["neighbours", "confident"] = Field(
        "neighbours", description="of label_errors: the nearest rows' votes, or confident learning (cleanlab)"
    )
    label_support: float = Field(
        0.85,
        gt=0,
        lt=1,
        description="of neighbours: a label is suspicious below this part of its class's usual support",
    )
    folds: int = Field(5, ge=2, le=20, description="of confident learning: parts that are each judged by the others")
    ablate: bool = Field(False, description="measure on validation what cleaning does to a cheap classifier")

    @property
    def checks(self) -> dict[str, str]:
        """{check: "flag", "drop" or "mend"} of those that are on, in the order they are done."""
        values = {name: getattr(self, name) for name in CHECKS}
        return {name: value for name, value in values.items() if value != "off"}

    @property
    def packages(self) -> dict[str, tuple[str, ...]]:
        """{field: what it imports that the core installation lacks}; the extra `clean` brings it."""
        confident = self.label_errors != "off" and self.label_method == "confident"
        wanted = {
            "language": ("py3langid",) if self.language != "off" else (),
            "label_method": ("sklearn", "cleanlab") if confident else (),
            "ablate": ("sklearn",) if self.ablate else (),
        }
        return {field: packages for field, packages in wanted.items() if packages}


CHECKS = (
    "empty",
    "markup",
    "duplicates",
    "conflicts",
    "near_duplicates",
    "leaks",
    "boilerplate",
    "language",
    "length",
    "label_errors",
)
