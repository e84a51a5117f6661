"""What this processor computes fast: read from the flags that Linux lists in /proc/cpuinfo."""

from __future__ import annotations

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_FLAG_FIELDS = ("flags", "Features")  # x86, ARM

INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Instructions that multiply 8-bit integers and add into 32 bits in one step; int8 seldom beats float32 without."""

BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
"""Instructions that multiply bfloat16; without them bfloat16 is emulated, slower than float32."""


def read_cpuinfo() -> str:
    """The text of /proc/cpuinfo; empty where the system has none."""
    return _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.exists() else ""


def cpuinfo_field(cpuinfo: str, *names: str) -> str | None:
    """The value of the first line whose field is one of `names`; None where there is no such line."""
    for line in cpuinfo.splitlines():
        field, colon, value = line.partition(":")
        if colon and field.strip() in names:
            return value.strip()
    return None


def parse_flags(cpuinfo: str) -> frozenset[str]:
    """The instruction-set flags of the first core, by Linux's names: {'avx2', 'avx512_vnni', …}."""
    return frozenset((cpuinfo_field(cpuinfo, *_FLAG_FIELDS) or "").split())


def processor_flags() -> frozenset[str]:
    """The flags of this machine; empty where the system does not list them, which means unknown, not none."""
    return parse_flags(read_cpuinfo())


def fast_int8(flags: frozenset[str]) -> bool:
    """Whether 8-bit integer products have their own instructions here."""
    return not flags.isdisjoint(INT8_FLAGS)


def fast_bfloat16(flags: frozenset[str]) -> bool:
    """Whether bfloat16 products have their own instructions here."""
    return not flags.isdisjoint(BFLOAT16_FLAGS)
