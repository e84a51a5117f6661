"""The temperature that a classifier's logits are divided by before they become probabilities. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_rlhf.errors import ModelError
from moss_rlhf.files import write_json
from moss_rlhf.model.config import KEY


@dataclass(frozen=True)
class Temperature:
    """A temperature, and the digest of the network that it was fitted on: it is no other's."""

    value: float
    network: str = ""

    def declared(self) -> dict[str, Any]:
        """As config.json says it."""
        return {"temperature": self.value, "temperature_of": self.network}

    @classmethod
    def read(cls, ours: Mapping[str, Any], place: Path) -> Temperature | None:
        """What our part of config.json says; ModelError where it is no number above 0."""
        value = ours.get("temperature")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelError(
                f"{place}: config.json declares the temperature {value!r}; it must be a number above 0. Take it out, "
                "or save the checkpoint again."
            )
        return cls(float(value), str(ours.get("temperature_of", "")))


def write_temperature(place: Path, temperature: Temperature) -> None:
    """Declare it in the config.json of a checkpoint or an exported file's directory."""
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    write_json(place / "config.json", config | {KEY: config.get(KEY, {}) | temperature.declared()})
