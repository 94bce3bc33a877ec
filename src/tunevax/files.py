"""The files of models and adapters: names, damage, the hash of their content, and room for them."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from functools import lru_cache
from pathlib import Path

from tunevax.console import as_bytes
from tunevax.errors import UsageError

GGUF = ".gguf"
"""The ending of a file that holds a whole model, as llama.cpp and Ollama use it."""
ADAPTER = "adapter_config.json"
"""The file of a PEFT adapter folder."""
BIASES = "bias.safetensors"
"""Beside the weights of a model, or as an adapter of its own: vectors that are added to the output of the attention
output projections, whether or not the architecture has a bias there. Block number to [hidden], fp32."""


def damage(file: Path) -> str | None:
    """The error message for a git-lfs pointer or a truncated weight file, else None."""
    if not file.is_file():
        return None
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(40)
        if start.startswith(b"version https://git-lfs"):
            return f"{file} is a git-lfs pointer and not the file itself; run `git lfs pull` in its folder"
        if file.suffix == ".safetensors":
            length = int.from_bytes(start[:8], "little")
            content.seek(8)
            try:
                if size < 8 or length > size - 8:
                    raise ValueError
                header = json.loads(content.read(length))
                end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
            except (ValueError, KeyError, TypeError, AttributeError):
                return f"{file} is cut short or no safetensors file ({size} bytes); download it again"
            if 8 + length + end > size:
                return f"{file} is cut short: {size} of {8 + length + end} bytes; download it again"
        elif file.suffix == GGUF and not start.startswith(b"GGUF"):
            return f"{file} is no GGUF file (it does not begin with GGUF); download it again"
        elif file.suffix == ".bin" and not start.startswith(b"\x80") and not zipfile.is_zipfile(file):
            return f"{file} is cut short or no PyTorch file ({size} bytes); download it again"
    return None


def model_hash(base: str) -> str | None:
    """16 hexadecimal digits over the config of a model or adapter and, of each weight file, name, size and content;
    over a GGUF file, which has both. None for a hub id, which its revision identifies.

    A file is read once in a process, 0.8 s per GB. Earlier versions left the middle of files over 2 MiB out; controls
    and locks of their runs are refused as those of another base.
    """
    path = Path(base)
    if path.suffix == GGUF and path.is_file():
        return _content_of(path).hex()[:16]
    if not path.is_dir():
        return None
    sha = hashlib.sha256()
    names = ("config.json", "adapter_config.json", "*.safetensors", "*.bin")
    for file in sorted(file for name in names for file in path.glob(name)):
        state = file.stat()
        sha.update(f"{file.name} {state.st_size}".encode())
        if state.st_size > 2**21:
            sha.update(_content_of(file))
            continue
        with file.open("rb") as content:  # two overlapping halves, as in earlier versions
            sha.update(content.read(2**20))
            content.seek(max(0, state.st_size - 2**20))
            sha.update(content.read())
    return sha.hexdigest()[:16]


def _content_of(file: Path) -> bytes:
    state = file.stat()
    return _content_hash(file.absolute(), state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=1024)
def _content_hash(file: Path, _size: int, _modified: int, _changed: int) -> bytes:
    """SHA-256 of a file, read again only when it has changed."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def require_room(folder: Path, needed: int, largest: int, hint: str) -> None:
    """Raise `UsageError` if `needed` more bytes in `folder`, `largest` of them in one file, do not fit; `hint` is
    another way out than another folder."""
    free, limit = shutil.disk_usage(folder).free, _file_size_limit()
    if needed > free:
        why = f"{as_bytes(free)} are free there"
    elif limit is not None and largest > limit:
        why = f"one of them has {as_bytes(largest)}, and no file may have more than {as_bytes(limit)} (ulimit -f)"
    else:
        return
    raise UsageError(f"{folder} needs {as_bytes(needed)} for its files, and {why}; {hint}choose another --output-dir")


def _file_size_limit() -> int | None:
    """Bytes that one file of this process may have, or None."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit
