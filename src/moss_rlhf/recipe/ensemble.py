"""The fields of `ensemble`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.finetuning import DistillSpec, FinetuneSpec
from moss_rlhf.recipe.spec import Spec


class LearnedTogetherSpec(Spec):
    """How the members' mean answer is learned."""

    temperature: float = Field(2.0, gt=0)
    weight: float = Field(0.7, gt=0, le=1, description="share of the members' loss; the rest is the labels'")


class EnsembleSpec(Spec):
    """Fine-tune several copies of the model, and distil their mean answer into one."""

    members: Annotated[int, Field(ge=2)] = 3
    by: Literal["seeds", "folds"] = Field(
        "seeds",
        description="seeds: each learns all of train; folds: each leaves out a part and is judged on it",
    )
    finetune: FinetuneSpec = Field(FinetuneSpec(), description="of each member, and of the one; all but distill")
    distill: LearnedTogetherSpec = LearnedTogetherSpec()

    @model_validator(mode="after")
    def _members_have_no_teacher(self) -> EnsembleSpec:
        if isinstance(self.finetune.distill, DistillSpec):
            raise PydanticCustomError(
                "nothing", "the members are the teachers; leave finetune.distill out, and say how in ensemble.distill"
            )
        if self.finetune.mixup:
            raise PydanticCustomError(
                "nothing", "the one learns from the members, and mixed rows have no answer of theirs; leave mixup out"
            )
        alone = self.finetune.model_copy(update={"distill": None})
        self.__dict__["finetune"] = alone  # frozen for everyone else: auto finds no teacher but the members
        return self
