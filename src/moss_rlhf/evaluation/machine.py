"""The machine and the versions that numbers were measured with: a speed means nothing without them."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import TypedDict

from moss_rlhf.model.processor import (
    BFLOAT16_FLAGS,
    INT8_FLAGS,
    cpuinfo_field,
    fast_bfloat16,
    fast_int8,
    parse_flags,
    read_cpuinfo,
)
from moss_rlhf.model.runtime import usable_cores

_PACKAGES = ("moss-rlhf", "torch", "transformers", "datasets", "onnxruntime", "tokenizers", "numpy")
_INSTRUCTIONS = ("avx2", "avx512f", *INT8_FLAGS, *BFLOAT16_FLAGS)


class Machine(TypedDict):
    processor: str
    cores: int
    threads: int
    memory_bytes: int
    system: str
    python: str
    instructions: list[str]
    int8: str
    bfloat16: bool


def describe_machine() -> Machine:
    """What a reader needs to judge a speed measured here. `cores` are those this process may use."""
    import psutil

    cpuinfo = read_cpuinfo()
    flags = parse_flags(cpuinfo)
    return Machine(
        processor=cpuinfo_field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        cores=usable_cores(),
        threads=_threads(),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        instructions=[name for name in _INSTRUCTIONS if name in flags],
        int8=describe_int8(flags),
        bfloat16=fast_bfloat16(flags),
    )


def versions() -> dict[str, str | None]:
    """{package: version} of Python and the packages that numbers depend on; None where one is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def describe_int8(flags: frozenset[str]) -> str:
    """One sentence: whether int8 is fast on a processor with these flags."""
    if not flags:
        return "Unknown: this system does not list its processor's instructions."
    if fast_int8(flags):
        return f"Fast: the processor has {', '.join(name for name in INT8_FLAGS if name in flags)}."
    return (
        "Not accelerated: the processor has no VNNI, AMX or dot-product instructions, so int8 makes the files smaller "
        "and gains less speed over float32 in the same runtime than elsewhere."
    )


def _threads() -> int:
    """PyTorch's threads, where it is in use; importing it for this would cost seconds."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else usable_cores()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
