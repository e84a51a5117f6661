import json
import platform
import subprocess
import sys

from moss_rlhf.evaluation import describe_machine, versions
from moss_rlhf.evaluation.machine import describe_int8
from moss_rlhf.model.runtime import usable_cores


def test_the_description_is_json_and_agrees_with_the_system() -> None:
    machine = describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    assert machine["cores"] == usable_cores()
    assert machine["python"] == platform.python_version()
    assert machine["memory_bytes"] > 2**28
    assert machine["processor"]


def test_int8_names_the_instructions_that_make_it_fast() -> None:
    assert describe_int8(frozenset({"avx2", "avx512_vnni", "amx_int8"})).endswith("has avx512_vnni, amx_int8.")
    assert describe_int8(frozenset({"avx2"})).startswith("Not accelerated")
    assert describe_int8(frozenset()).startswith("Unknown")


def test_versions_name_the_packages_and_mark_the_absent(monkeypatch) -> None:
    import numpy

    assert versions()["numpy"] == numpy.__version__
    monkeypatch.setattr("moss_rlhf.evaluation.machine._PACKAGES", ("no-such-package-of-ours",))
    assert versions() == {"python": platform.python_version(), "no-such-package-of-ours": None}


def test_importing_the_room_imports_no_heavy_package() -> None:
    code = "import sys, moss_rlhf.evaluation as e; e.describe_machine(); print({'torch', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
