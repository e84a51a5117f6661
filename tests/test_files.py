"""Files are whole or absent, whatever happens while they are written; and an error says when it is the disk's."""

import errno
import hashlib
import os
import subprocess
import sys

import pytest

from moss_rlhf import files


def _entries(place):
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def test_a_directory_appears_whole_and_replaces_what_stood_there(tmp_path):
    place = tmp_path / "a" / "model"
    for content in ("old", "new"):
        with files.new_directory(place) as partial:
            (partial / content).write_text(content)
            assert not (place / content).exists()
    assert _entries(tmp_path) == ["a", "a/model", "a/model/new"]
    assert place.stat().st_mode & 0o777 == 0o755  # mkdtemp's 0o700 would shut out the people it is shipped to


def test_an_error_leaves_what_stood_there(tmp_path):
    place = tmp_path / "model"
    files.write_text(place / "weights", "old")
    files.write_text(tmp_path / "facts", "old")
    with pytest.raises(ZeroDivisionError), files.new_directory(place) as partial:
        (partial / "weights").write_text("half")
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError), files.new_file(tmp_path / "facts") as partial:
        partial.write_text("half")
        1 / 0  # noqa: B018
    assert _entries(tmp_path) == ["facts", "model", "model/weights"]
    assert (place / "weights").read_text() == (tmp_path / "facts").read_text() == "old"


def test_a_process_that_is_killed_leaves_no_half_written_file(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from moss_rlhf import files\n"
        "with files.new_file(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    place = tmp_path / "facts.json"
    files.write_json(place, {"whole": True})
    done = subprocess.run([sys.executable, "-c", code, place], check=False)
    assert done.returncode == -9
    assert files.read_json(place) == {"whole": True}


def test_json_is_utf_8_and_refuses_what_json_can_t_say(tmp_path):
    files.write_json(tmp_path / "a.json", {"名": [1, None]})
    assert "名" in (tmp_path / "a.json").read_text("utf-8")
    with pytest.raises(ValueError, match="Out of range float"):
        files.write_json(tmp_path / "a.json", float("nan"))
    assert files.read_json(tmp_path / "a.json") == {"名": [1, None]}
    assert _entries(tmp_path) == ["a.json"]


def test_a_digest_names_the_value_whatever_the_order_of_its_keys():
    known = hashlib.sha256(b'{"a": 1, "b": 2}').hexdigest()
    assert files.digest({"b": 2, "a": 1}) == files.digest({"a": 1, "b": 2}) == known
    assert files.digest([1, 2]) != files.digest([2, 1])
    assert files.digest(1) != files.digest("1")


def test_a_file_s_digest(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_copy_replaces_the_whole_directory(tmp_path):
    files.write_text(tmp_path / "from" / "sub" / "new", "new")
    files.write_text(tmp_path / "to" / "old", "old")
    files.copy_directory(tmp_path / "from", tmp_path / "to")
    assert _entries(tmp_path / "to") == ["sub", "sub/new"]
    assert _entries(tmp_path / "from") == ["sub", "sub/new"]


def _error(error, cause=None):
    try:
        raise error from cause
    except Exception as raised:
        return raised


FAULTS = {
    "full": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/my/x"), "runs/my/x: no space is left on the disk"),
    "quota": (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "x"), "x: the disk quota is used up"),
    "read-only": (OSError(errno.EROFS, os.strerror(errno.EROFS), "x"), "x: the file system is read-only"),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "x"), "x: no permission"),
    "below a file": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/x"), "a/x: a part of this path is a file"),
    "a library's words": (RuntimeError("I/O error: No space left on device (os error 28)"), "output: no space"),
    "torch's words": (RuntimeError("PytorchStreamWriter failed writing file data/0"), "output: no space"),
    "as a cause": (_error(ValueError("bad"), OSError(errno.ENOSPC, "full", "x")), "x: no space is left"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_the_disk_s_fault(case):
    error, sentence = FAULTS[case]
    assert files.disk_fault(error).startswith(sentence)
    assert files.disk_fault(error).endswith(".")


def test_what_is_not():
    for error in (ValueError("no space for this"), KeyError("x"), FileNotFoundError(errno.ENOENT, "No such file", "x")):
        assert files.disk_fault(error) is None
