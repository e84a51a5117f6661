import pytest

from moss_rlhf.model.processor import cpuinfo_field, fast_bfloat16, fast_int8, parse_flags

AMD_ZEN3 = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 7763 64-Core Processor
flags\t\t: fpu vme sse sse2 avx f16c avx2 bmi2 vaes
bugs\t\t: sysret_ss_attrs avx512_bf16_is_not_here
"""
AMD_ZEN4 = AMD_ZEN3.replace("vaes", "vaes avx512f avx512_bf16 avx512_vnni")
INTEL_ALDER_LAKE = "model name\t: 12th Gen Intel(R) Core(TM) i5\nflags\t\t: avx2 fma avx_vnni\nvmx flags\t: vnmi ept\n"
INTEL_SAPPHIRE_RAPIDS = "flags\t\t: avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8\n"
GRAVITON2 = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd aes atomics fphp asimdhp asimddp\n"
GRAVITON3 = "Features\t: fp asimd asimddp sve svei8mm svebf16 i8mm bf16\nCPU implementer\t: 0x41\n"
CORTEX_A72 = "Features\t: fp asimd evtstrm crc32 cpuid\n"


@pytest.mark.parametrize(
    ("cpuinfo", "int8", "bfloat16"),
    [
        (AMD_ZEN3, False, False),
        (AMD_ZEN4, True, True),
        (INTEL_ALDER_LAKE, True, False),
        (INTEL_SAPPHIRE_RAPIDS, True, True),
        (GRAVITON2, True, False),
        (GRAVITON3, True, True),
        (CORTEX_A72, False, False),
        ("", False, False),
    ],
)
def test_what_a_processor_computes_fast(cpuinfo: str, int8: bool, bfloat16: bool) -> None:
    flags = parse_flags(cpuinfo)
    assert (fast_int8(flags), fast_bfloat16(flags)) == (int8, bfloat16)


def test_flags_are_those_of_the_first_flags_line_alone() -> None:
    assert parse_flags(INTEL_ALDER_LAKE) == {"avx2", "fma", "avx_vnni"}
    assert parse_flags(AMD_ZEN4 + "flags\t\t: amx_int8\n") >= {"avx512f"}
    assert "amx_int8" not in parse_flags(AMD_ZEN4 + "flags\t\t: amx_int8\n")


def test_a_field_keeps_the_colons_of_its_value() -> None:
    assert cpuinfo_field("model name\t: odd: name\n", "model name") == "odd: name"
    assert cpuinfo_field(GRAVITON3, "model name") is None
