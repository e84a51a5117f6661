import sys
import time

import numpy as np
import pytest

from moss_rlhf.evaluation import PeakMemory, peak_memory
from moss_rlhf.model.peak import _high_water_mark, own_peak
from moss_rlhf.progress import Progress

MEGABYTE = 2**20
REPORT = "; from moss_rlhf.model.peak import own_peak; print('other words'); print(own_peak())"


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code + REPORT]


def test_a_child_reports_what_it_held_at_most() -> None:
    small = peak_memory(child("pass"))
    large = peak_memory(child("held = b'x' * 200 * 2**20; del held"))
    assert small is not None and large is not None
    assert small < 150 * MEGABYTE
    assert 200 * MEGABYTE < large < small + 210 * MEGABYTE


def test_a_child_does_not_inherit_the_peak_of_its_parent() -> None:
    held = np.ones(300 * MEGABYTE, dtype=np.uint8)
    small = peak_memory(child("pass"))
    assert small is not None
    assert own_peak() >= held.nbytes > 1.5 * small


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ([sys.executable, "-c", "raise SystemExit('the file is broken')"], "the file is broken"),
        ([sys.executable, "-c", "print('nothing of use')"], "invalid literal"),
        (["./no-such-program"], "No such file"),
    ],
)
def test_a_failed_measurement_is_none_and_says_why(command: list[str], reason: str, capsys) -> None:
    assert peak_memory(command, progress=Progress()) is None
    assert reason in capsys.readouterr().err


def test_a_command_that_hangs_is_stopped() -> None:
    started = time.monotonic()
    assert peak_memory([sys.executable, "-c", "import time; time.sleep(60)"], timeout_seconds=0.5) is None
    assert time.monotonic() - started < 10


def test_the_peak_of_a_block_counts_what_was_freed_before_its_end() -> None:
    with PeakMemory() as quiet:
        pass
    with PeakMemory() as peak:
        held = np.ones(200 * MEGABYTE, dtype=np.uint8)
        time.sleep(0.2)
        del held
    assert 180 * MEGABYTE < peak.bytes - quiet.bytes < 260 * MEGABYTE


def test_the_watch_ends_with_the_block_that_raises() -> None:
    peak = PeakMemory()
    with pytest.raises(KeyError), peak:
        raise KeyError
    assert not peak._thread.is_alive()
    assert peak.bytes > 0


def test_high_water_mark_is_in_bytes() -> None:
    assert _high_water_mark("VmPeak:\t    9 kB\nVmHWM:\t    2056 kB\nVmRSS:\t 1 kB\n") == 2056 * 1024
    assert _high_water_mark("VmRSS:\t 1 kB\n") is None
