"""Converts a published `.safelock` file (arXiv 2410.10343) into a lock of tunevax, without unpickling it.

A `.safelock` is written by `torch.save` from

    {"model.layers.{l}.self_attn.head_out": [(np.int64 head, np.ndarray u [d], np.float16 sigma), ...], ...}

as an uncompressed zip archive with one pickle, `STEM/data.pkl`, and no tensors. Unpickling calls any function that the
file names. `read_pickle` calls none: it implements the 28 opcodes of pickle protocol 2 that such an object needs,
and the names that numpy writes, without importing them; any other opcode or name is an error. The file does not record
its model. `torch.load(weights_only=True)` is no alternative: with numpy's names allowed, 100 bytes make numpy allocate
7 GiB, and a dictionary key of nested tuples (400 kB) ends the process.

Time and memory are linear in the size of the file, at most 512 KiB (24 heads of 128 take 14).
"""

from __future__ import annotations

import hashlib
import io
import pickletools
import re
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from tunevax.errors import UsageError, shortened
from tunevax.mixins import option
from tunevax.restoration.lock import FILE, SafetyLock, base_of, check_shape, head_shape
from tunevax.restoration.restore import Job

MAX_BYTES = 2**19  # of the file, and of all bytes and arrays made from it
MAX_ENTRIES = 16  # torch.save writes 4 to 6
MAX_HEADS = 4096  # heads in a lock, in a block, and values of a direction: beyond any decoder
KEY = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,3})\.self_attn\.head_out", re.ASCII)
SIZES = {"f2": 2, "f4": 4, "i8": 8}
NAMES = {
    "numpy.core.multiarray scalar": "scalar", "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray scalar": "scalar", "numpy._core.multiarray _reconstruct": "reconstruct",  # numpy 2
    "numpy dtype": "dtype", "numpy ndarray": "ndarray", "_codecs encode": "encode",
}  # fmt: skip


class LockError(UsageError):
    """The file is not a `.safelock` that can be read safely."""


class Directions(NamedTuple):
    """The content of a `.safelock`, sorted by block and head."""

    u: np.ndarray  # [K, d] fp32, unit vectors up to the rounding of fp16
    sigma: np.ndarray  # [K] fp32, positive
    layer: np.ndarray  # [K] int64
    head: np.ndarray  # [K] int64


@dataclass
class ConvertLock:
    """Writes `lock.safetensors` from a `.safelock`. With `--model`, the base of the lock, its heads are checked against
    the model's and the base is recorded; otherwise its base is unknown."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "not used: nothing here is random")
    lock: str | None = option(None, "the .safelock file to convert")
    models_held: ClassVar[int] = 0
    paper: ClassVar[str] = "arXiv 2410.10343"

    def run(self, job: Job) -> None:
        """Read, check and write."""
        if self.lock is None:
            raise UsageError("--lock is missing: the .safelock file to convert")
        u, sigma, layer, head = (torch.from_numpy(array) for array in read_safelock(self.lock))
        meta: dict[str, object] = {
            "base": None, "n_layers": None, "n_heads": None, "head_dim": u.shape[1], "r": None, "probe": None,
            "accuracy": None, "template_hash": None, "data_hash": None, "prompts": [], "pairs": None, "seed": None,
            "source": f"imported from {Path(self.lock).name}{', base unknown' if job.options.model is None else ''}",
            "source_hash": hashlib.sha256(Path(self.lock).read_bytes()).hexdigest()[:16],
        }  # fmt: skip
        lock = SafetyLock(u, sigma, layer, head, meta)
        if job.options.model is not None:
            loaded = job.load()
            check_shape(loaded.model, lock)
            lock.meta["base"] = base_of(loaded.info, job.ref, job.options.revision)
            lock.meta["n_layers"], lock.meta["n_heads"], _ = head_shape(loaded.model)
        lock.save(job.folder / FILE)
        job.record["lock"] = {**lock.meta, "heads": lock.named()}


def read_safelock(path: str | Path) -> Directions:
    """The directions in a published `.safelock` file. Nothing in it is run, imported or written to disk.

    Raises:
        LockError: there is no such file, or anything in it differs from published locks.
    """
    try:
        if not Path(path).is_file():
            raise LockError(f"no such file: {path}")
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise LockError(f"{path} cannot be read ({type(error).__name__})") from error
    return parse(content, str(path))


def parse(content: bytes, place: str) -> Directions:
    """The directions in the bytes of a `.safelock`; `place` is its name in messages."""
    if len(content) > MAX_BYTES:
        raise LockError(f"{place} is larger than {MAX_BYTES >> 10} KiB, and no .safelock is")
    return directions(read_pickle(pickle_of(content, place), place), place)


def pickle_of(content: bytes, place: str) -> bytes:
    """The bytes of `STEM/data.pkl` in the archive; nothing is unpacked to disk."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            check_entries(archive.infolist(), place)
            chosen = [e for e in archive.infolist() if e.filename.split("/")[1:] == ["data.pkl"]]
            if len(chosen) != 1:
                raise LockError(f"{place} has {len(chosen)} files data.pkl and a .safelock has one")
            return archive.read(chosen[0])
    except (LockError, MemoryError):
        raise
    except Exception as error:  # zipfile documents two of the many errors that a damaged archive raises
        raise LockError(f"{place} is not a zip archive as torch.save writes it ({type(error).__name__})") from error


def check_entries(entries: list[zipfile.ZipInfo], place: str) -> None:
    """Refuse an archive with entries that are compressed, encrypted, linked, repeated, or outside one folder."""
    names = [entry.filename for entry in entries]
    if not 1 <= len(entries) <= MAX_ENTRIES:
        raise LockError(f"{place} has {len(entries)} files and a .safelock has about five")
    if len({name.split("/")[0] for name in names}) > 1 or len(set(names)) < len(names):
        raise LockError(f"{place} has more than one folder, or a file twice")
    for entry in entries:
        parts = entry.filename.split("/")
        if len(parts) < 2 or "\\" in entry.filename or any(part in ("", ".", "..") for part in parts):
            raise LockError(f"{place} has a file with a path that torch.save does not write")
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG) or entry.flag_bits & 0x1:
            raise LockError(f"{place} has a link or an encrypted file")
        if entry.compress_type != zipfile.ZIP_STORED or not entry.file_size == entry.compress_size <= MAX_BYTES:
            raise LockError(f"{place} has a compressed file, and torch.save does not compress")


ALLOWED = {
    "PROTO", "STOP", "MARK", "TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINUNICODE",
    "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip
OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes if opcode.name in ALLOWED}
PLAIN: dict[str, Callable[[], object]] = {
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "NONE": lambda: None, "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}  # fmt: skip


class Name(str):
    """One of the values of `NAMES` on the stack; never imported."""


class Dtype:
    """A numpy dtype: its code, and whether its byte order has been given."""

    def __init__(self, code: str) -> None:
        self.code, self.ready = code, False


class Array:
    """A numpy array: filled once, after it was made."""

    values: np.ndarray | None = None


def read_pickle(data: bytes, place: str) -> Any:
    """The object that `data` describes, of dict, list, tuple, str, int, bool, None, bytes, numpy numbers and `Array`; a
    LockError for anything else.

    `pickletools` decodes the arguments of allowed opcodes and runs nothing. Each opcode costs its own length, and the
    objects at most `MAX_BYTES`; nothing on the stack is compared, printed or hashed before its type is known, so depth
    and sharing cost nothing.
    """
    at = 0
    try:
        stack: list[Any] = []
        below: list[list[Any]] = []  # the stacks under each open mark
        memo: dict[int, Any] = {}
        made = 0
        stream, name = io.BytesIO(data), ""
        while name != "STOP":
            at = stream.tell()
            opcode = OPCODES.get(stream.read(1))
            if opcode is None or (opcode.name == "PROTO") != (at == 0):
                raise ValueError("no lock has this opcode here")
            name = opcode.name
            decode: Any = opcode.arg and opcode.arg.reader
            argument: Any = decode(stream) if decode else None
            if name in PLAIN:
                stack.append(PLAIN[name]())
            elif name in ("BININT", "BININT1", "BININT2", "BINUNICODE"):
                stack.append(argument)
            elif name == "GLOBAL":
                stack.append(Name(NAMES[argument]))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                below.append(stack)
                stack = []
            elif name in ("TUPLE", "APPENDS", "SETITEMS"):
                items, stack = stack, below.pop()
                if name == "TUPLE":
                    stack.append(tuple(items))
                else:
                    extend(stack[-1], items)
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                stack.append(tuple([stack.pop() for _ in range(int(name[-1]))][::-1]))
            elif name in ("APPEND", "SETITEM"):
                items = [stack.pop() for _ in range(1 if name == "APPEND" else 2)][::-1]
                extend(stack[-1], items)
            elif name == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(call(function, arguments))
                made += len(stack[-1]) if type(stack[-1]) is bytes else 0
            elif name == "BUILD":
                state = stack.pop()
                made += fill(stack[-1], state)
            elif name == "PROTO" and argument != 2:
                raise ValueError("it is not of protocol 2")
            if made > MAX_BYTES:
                raise ValueError("it has more data than a lock")
        if len(stack) != 1 or below or stream.read(1):
            raise ValueError("it goes on after its end")
        return stack[0]
    except MemoryError:
        raise
    except Exception as error:  # also of damage: a stack or a memo without the value, missing bytes
        why = shortened(error) if type(error) is ValueError else type(error).__name__
        raise LockError(f"{place} cannot be read at byte {at} of its pickle: {why}") from error


def extend(target: object, items: list[Any]) -> None:
    """Append items to a list, or set keys and values of a dictionary."""
    if type(target) is list:
        target.extend(items)
        return
    if type(target) is not dict:
        raise ValueError("it adds items to an object that is not a list or dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str or key in target:
            raise ValueError("a key is not text, or there twice")
        target[key] = value


def call(name: Any, arguments: Any) -> Any:
    """The result of numpy's function of that name, for the arguments that numpy writes."""
    kinds = [type(argument) for argument in arguments] if type(arguments) is tuple and type(name) is Name else []
    if name == "encode" and kinds == [str, str] and arguments[1] == "latin1":
        return arguments[0].encode("latin-1")
    if name == "dtype" and len(kinds) == 3 and kinds[0] is str and arguments[0] in SIZES:
        return Dtype(arguments[0])
    if name == "scalar" and kinds == [Dtype, bytes]:
        return numbers(arguments[0], 1, arguments[1])[0]
    if name == "reconstruct" and kinds == [Name, tuple, bytes] and arguments[0] == "ndarray":
        return Array()
    raise ValueError("it calls another function than a lock, or with other arguments than numpy writes")


def fill(target: Any, state: Any) -> int:
    """Set the byte order of a dtype or the values of an array; returns the number of new bytes."""
    kinds = [type(value) for value in state] if type(state) is tuple else []
    if type(target) is Dtype and len(kinds) == 8 and kinds[1] is str and state[1] == "<" and not target.ready:
        target.ready = True
        return 0
    if type(target) is Array and kinds == [int, tuple, Dtype, bool, bytes] and target.values is None:
        _, shape, dtype, _, content = state
        if len(shape) != 1 or type(shape[0]) is not int or not 0 < shape[0] <= MAX_HEADS:
            raise ValueError("it has an array that is not a vector")
        target.values = numbers(dtype, shape[0], content)
        return len(content)
    raise ValueError("it sets the state of an object that is not a new array, or of big-endian numbers")


def numbers(dtype: Dtype, size: int, content: bytes) -> np.ndarray:
    """`size` numbers out of exactly as many bytes."""
    if not dtype.ready or len(content) != size * SIZES[dtype.code]:
        raise ValueError("its numbers have another size than it states")
    return np.frombuffer(content, "<" + dtype.code)


def directions(content: object, place: str) -> Directions:
    """The directions in the object of a `.safelock`, if it has the structure and values of one; else a LockError."""
    if type(content) is not dict or not content:
        raise LockError(f"{place} does not hold a dictionary of attention heads")
    heads: dict[tuple[int, int], tuple[np.ndarray, float]] = {}
    for key, entries in content.items():
        match = KEY.fullmatch(key)
        if match is None or type(entries) is not list or not entries:
            raise LockError(f"{place} has a key other than model.layers.NUMBER.self_attn.head_out, or no head under it")
        for entry in entries:
            if type(entry) is not tuple or len(entry) != 3 or type(entry[1]) is not Array:
                raise LockError(f"{place} has a head that is not (number, direction, scale)")
            head, vector, sigma = entry[0], entry[1].values, entry[2]
            if type(head) not in (int, np.int64) or not 0 <= head < MAX_HEADS or (int(match[1]), int(head)) in heads:
                raise LockError(f"{place} has a head without a valid number, or twice")
            if type(sigma) not in (np.float16, np.float32) or not (np.isfinite(sigma) and sigma > 0):
                raise LockError(f"{place} has a scale that is not a positive number")
            if vector is None or vector.dtype.kind != "f":
                raise LockError(f"{place} has a direction that is not a vector")
            if not abs(np.linalg.norm(vector.astype(np.float64)) - 1) <= 1e-2:  # also if it is nan
                raise LockError(f"{place} has a direction that is not of unit length")
            heads[int(match[1]), int(head)] = vector, float(sigma)
            if len(heads) > MAX_HEADS or len(heads) * len(vector) > MAX_BYTES:
                raise LockError(f"{place} has more heads than any lock")
    if len({len(vector) for vector, _ in heads.values()}) > 1:
        raise LockError(f"{place} has directions of different lengths")
    order = sorted(heads)
    return Directions(
        np.stack([heads[key][0] for key in order]).astype(np.float32),
        np.array([heads[key][1] for key in order], np.float32),
        np.array([layer for layer, _ in order], np.int64),
        np.array([head for _, head in order], np.int64),
    )
