"""What no method works on."""

from __future__ import annotations

from moss_rlhf.errors import ModelError
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.grid import is_finite


def refuse_not_finite(model: Model, stage: str) -> None:
    """ModelError where any weight, bias or norm of the network is inf or nan."""
    for name, parameter in model.network.named_parameters():
        if not is_finite(parameter.detach()):
            raise ModelError(
                f"{stage}: {name}: weight is not finite: the checkpoint holds inf or nan. Fine-tune again with a lower "
                "learning rate, or fetch the checkpoint again."
            )
