"""GGUF files by name: errors before anything is read. `tests/real` loads one."""

import importlib.util

import pytest

from tunevax.errors import UsageError
from tunevax.files import damage, model_hash
from tunevax.modeling.checkpoints import config_of, place


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_a_file_is_read_from_its_folder(installed):
    assert place("models/a.gguf") == ("models", {"gguf_file": "a.gguf"})
    assert place("org/name/a.gguf") == ("org/name", {"gguf_file": "a.gguf"})
    assert place("models/a") == ("models/a", {})


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'tunevax\[gguf\]'"):
        place("a.gguf")


def test_a_part_of_a_model_is_refused(installed):
    with pytest.raises(UsageError, match="llama-gguf-split --merge"):
        place("big-00001-of-00003.gguf")


def test_a_file_of_another_kind_is_refused(installed, tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"<!doctype html>" + b" " * 50)
    assert "no GGUF file" in damage(file)
    with pytest.raises(UsageError, match="no GGUF file"):
        config_of(str(file))


def test_a_missing_file_is_refused(installed, tmp_path):
    with pytest.raises(UsageError, match="no such model file"):
        config_of(str(tmp_path / "a.gguf"))


def test_the_identity_of_a_file_is_its_content(tmp_path):
    files = [tmp_path / name for name in ("a.gguf", "b.gguf", "c.gguf")]
    for file, content in zip(files, (b"GGUF one", b"GGUF one", b"GGUF two"), strict=True):
        file.write_bytes(content)
    a, b, c = (model_hash(str(file)) for file in files)
    assert a == b != c and model_hash(str(tmp_path / "none.gguf")) is None
