"""Converts a published `.safelock` file (arXiv 2410.10343) into a lock of tunevax, without unpickling it.

A `.safelock` is what `torch.save` makes of

    {"model.layers.{l}.self_attn.head_out": [(np.int64 head, np.ndarray u [d], np.float16 sigma), ...], ...}

a zip archive, uncompressed, with one pickle in it, `STEM/data.pkl`, and no tensors. Unpickling calls whatever the file
names. Here nothing in the file is called: `read_pickle` knows the 28 opcodes of pickle protocol 2 that such an object
takes, and gives the names that numpy writes a meaning of its own, without importing them. Any other opcode or name
ends the reading. The file says neither which model it belongs to nor how many heads that has.

Cost: linear in the file, which may not exceed 512 KiB (24 heads of 128 take 14), in memory and in time.
"""

from __future__ import annotations

import hashlib
import io
import re
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from tunevax.errors import UsageError
from tunevax.restoration.lock import FILE, SafetyLock, check_shape, head_shape, lineage
from tunevax.restoration.restore import Job

MAX_BYTES = 2**19  # of the file; and of all bytes and arrays made from it
MAX_ENTRIES = 16  # torch.save writes 4 to 6
MAX_HEADS = 4096  # heads in a lock, in a block, and values of a direction: beyond any decoder
KEY = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,3})\.self_attn\.head_out", re.ASCII)
SIZES = {"f2": 2, "f4": 4, "i8": 8}

NAMES = {
    "numpy.core.multiarray scalar": "scalar",
    "numpy._core.multiarray scalar": "scalar",  # numpy 2
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy dtype": "dtype",
    "numpy ndarray": "ndarray",
    "_codecs encode": "encode",
}


class LockError(UsageError):
    """A file is not a `.safelock` that can be read safely."""


class Directions(NamedTuple):
    """What a `.safelock` holds, sorted by block and head.

    Attributes:
        u: [K, d] fp32, unit vectors up to the rounding of fp16.
        sigma: [K] fp32, positive.
        layer, head: [K] int64.
    """

    u: np.ndarray
    sigma: np.ndarray
    layer: np.ndarray
    head: np.ndarray


@dataclass
class ConvertLock:
    """Writes `lock.safetensors` from a `.safelock`. With `--model`, the base the lock was made for, its heads are
    checked against the model's, and that base is noted in it; without, its base stays unknown and its user must know.
    """

    output_dir: str | None = field(default=None, metadata={"help": "the run folder to write"})
    seed: int = field(default=42, metadata={"help": "not used: nothing here is random"})
    lock: str | None = field(default=None, metadata={"help": "the .safelock file to convert"})

    paper: ClassVar[str] = "2410.10343"
    models: ClassVar[int] = 0

    def run(self, job: Job) -> None:
        """Read, check, write.

        Raises:
            UsageError: no such file, a file that cannot be read safely, or a lock for other heads than the model's.
        """
        if self.lock is None:
            raise UsageError("--lock is missing: the .safelock file to convert")
        found = read_safelock(self.lock)
        digest = hashlib.sha256(Path(self.lock).read_bytes()).hexdigest()[:16]
        lock = SafetyLock(
            *(torch.from_numpy(array) for array in found),
            {
                "base": None, "n_layers": None, "n_heads": None, "head_dim": found.u.shape[1], "r": None, "probe": None,
                "accuracy": None, "template_hash": None, "data_hash": None, "prompts": [], "pairs": None, "seed": None,
                "source": f"imported from {Path(self.lock).name}", "source_hash": digest,
            },
        )  # fmt: skip
        if job.options.model is not None:
            note_base(job, lock)
        else:
            lock.meta["source"] += ", base unknown"
        lock.save(job.folder / FILE)
        job.record["lock"] = {**lock.meta, "heads": lock.named()}


def note_base(job: Job, lock: SafetyLock) -> None:
    """Check `lock` against the job's model and note that as its base."""
    loaded = job.load()
    check_shape(loaded.model, lock)
    layers, heads, _ = head_shape(loaded.model)
    identity = next(iter(lineage(job.options.model, job.options.revision)))
    base = {**{k: loaded.info[k] for k in ("ref", "base", "revision")}, "identity": identity}
    lock.meta.update(n_layers=layers, n_heads=heads, base=base)


def read_safelock(path: str | Path) -> Directions:
    """The directions in a published `.safelock` file. Nothing in the file is run, imported or written to disk.

    Raises:
        LockError: there is no such file, or anything in it is not as published locks are.
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
        raise LockError(f"{place} is larger than {MAX_BYTES >> 10} KiB, which no .safelock is")
    return directions(read_pickle(pickle_of(content, place), place), place)


# --- the archive ---------------------------------------------------------------------------------------------------


def pickle_of(content: bytes, place: str) -> bytes:
    """The bytes of `STEM/data.pkl` in the archive; nothing is unpacked to disk."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            check_entries(entries, place)
            chosen = [e for e in entries if e.filename.split("/")[1:] == ["data.pkl"]]
            if len(chosen) != 1:
                raise LockError(f"{place} has {len(chosen)} data.pkl in it, where a .safelock has one")
            return archive.read(chosen[0])
    # What zipfile lets through of a damaged archive; it documents only the first two.
    except (
        zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, ValueError, KeyError, IndexError,
        OverflowError, EOFError, OSError, struct.error, zlib.error, AttributeError, TypeError,
    ) as error:  # fmt: skip
        raise LockError(f"{place} is not a zip archive as torch.save writes it ({type(error).__name__})") from error


def check_entries(entries: list[zipfile.ZipInfo], place: str) -> None:
    """Refuse an archive with entries that are compressed, encrypted, linked, repeated, or outside one folder."""
    names = [entry.filename for entry in entries]
    if not 1 <= len(entries) <= MAX_ENTRIES:
        raise LockError(f"{place} has {len(entries)} files in it, where a .safelock has about five")
    if len({name.split("/")[0] for name in names}) > 1 or len(set(names)) < len(names):
        raise LockError(f"{place} has more than one folder in it, or a file twice")
    for entry in entries:
        parts = entry.filename.split("/")
        if len(parts) < 2 or "\\" in entry.filename or any(part in ("", ".", "..") for part in parts):
            raise LockError(f"{place} has a file in it with a path that torch.save does not write")
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG) or entry.flag_bits & 0x1:
            raise LockError(f"{place} has a link or an encrypted file in it")
        if entry.compress_type != zipfile.ZIP_STORED or not entry.file_size == entry.compress_size <= MAX_BYTES:
            raise LockError(f"{place} has a compressed file in it, and torch.save does not compress")


# --- the pickle ----------------------------------------------------------------------------------------------------


class Name(str):
    """One of the values of `NAMES` on the stack; never looked up."""


class Dtype:
    """A numpy dtype: its code, and whether its byte order has been given."""

    def __init__(self, code: str) -> None:
        self.code, self.ready = code, False


class Array:
    """A numpy array: filled once, after it was made."""

    values: np.ndarray | None = None


class Reader:
    """A stack machine for the opcodes of `OPCODES`. Every opcode costs its own length, and what is made of them at
    most `MAX_BYTES`; nothing on the stack is compared, printed or hashed before its type is known, so that neither
    depth nor sharing costs anything.
    """

    def __init__(self, data: bytes, place: str) -> None:
        self.data, self.place, self.at, self.made = data, place, 0, 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each open mark
        self.memo: dict[int, Any] = {}

    def fail(self, what: str) -> LockError:
        """The error for what is wrong at this point."""
        return LockError(f"{self.place}: byte {self.at} of its pickle {what}, so it was not read")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > len(self.data) - self.at:
            raise self.fail("promises more than there is")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, layout: str) -> int:
        """The next integer, little-endian."""
        return struct.unpack("<" + layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """Up to the next line feed, which names only have a few letters before."""
        end = self.data.find(b"\n", self.at, self.at + 64)
        if end < 0:
            raise self.fail("names what no lock needs")
        return self.take(end + 1 - self.at)[:-1].decode("latin-1")

    def pop(self) -> Any:
        """The top of the stack."""
        if not self.stack:
            raise self.fail("takes a value that is not there")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        if not self.below:
            raise self.fail("closes what was not opened")
        found, self.stack = self.stack, self.below.pop()
        return found

    def count(self, size: int) -> None:
        """Account for `size` more bytes."""
        self.made += size
        if self.made > MAX_BYTES:
            raise self.fail("makes more data than a lock has")

    def run(self) -> Any:
        """The object; the pickle must end with it."""
        if self.take(2) != b"\x80\x02":
            raise self.fail("is not of protocol 2")
        while (code := self.take(1)) != b".":
            if code not in OPCODES:
                raise self.fail(f"has the opcode {code!r}, which a lock does not need")
            OPCODES[code](self)
        if len(self.stack) != 1 or self.below or self.at != len(self.data):
            raise self.fail("ends, and something is left over")
        return self.stack[0]

    # --- opcodes ---------------------------------------------------------------------------------------------------

    def text(self) -> None:
        """BINUNICODE."""
        try:
            self.stack.append(self.take(self.number("I")).decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise self.fail("is not UTF-8") from error

    def mark(self) -> None:
        """MARK."""
        self.below.append(self.stack)
        self.stack = []

    def put(self, layout: str) -> None:
        """BINPUT, LONG_BINPUT."""
        key = self.number(layout)
        self.memo[key] = self.pop()
        self.stack.append(self.memo[key])

    def get(self, layout: str) -> None:
        """BINGET, LONG_BINGET."""
        key = self.number(layout)
        if key not in self.memo:
            raise self.fail("asks for a value that was not kept")
        self.stack.append(self.memo[key])

    def tuple_of(self, size: int) -> None:
        """TUPLE1, TUPLE2, TUPLE3."""
        self.stack.append(tuple([self.pop() for _ in range(size)][::-1]))

    def tuple_of_mark(self) -> None:
        """TUPLE."""
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def extend(self, items: list[Any]) -> None:
        """APPEND, APPENDS."""
        target = self.pop()
        if type(target) is not list:
            raise self.fail(f"appends to a {type(target).__name__}")
        target.extend(items)
        self.stack.append(target)

    def update(self, items: list[Any]) -> None:
        """SETITEM, SETITEMS."""
        target = self.pop()
        if type(target) is not dict or len(items) % 2:
            raise self.fail("sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise self.fail("has a key that is no text, or has it twice")
            target[key] = value
        self.stack.append(target)

    def name(self) -> None:
        """GLOBAL: a known name stands for itself."""
        name = f"{self.line()} {self.line()}"
        if name not in NAMES:
            raise self.fail("names what no lock needs")
        self.stack.append(Name(NAMES[name]))

    def call(self) -> None:
        """REDUCE: what the name stands for, done here."""
        arguments, name = self.pop(), self.pop()
        if type(arguments) is not tuple or type(name) is not Name:
            raise self.fail("calls what is no name")
        kinds = [type(argument) for argument in arguments]
        if name == "encode" and kinds == [str, str] and arguments[1] == "latin1":
            self.count(len(arguments[0]))
            try:
                self.stack.append(arguments[0].encode("latin-1"))
            except UnicodeEncodeError as error:
                raise self.fail("has a character where there should be a byte") from error
        elif name == "dtype" and kinds and kinds[0] is str and arguments[0] in SIZES and len(kinds) == 3:
            self.stack.append(Dtype(arguments[0]))
        elif name == "scalar" and kinds == [Dtype, bytes]:
            self.stack.append(self.numbers(arguments[0], 1, arguments[1])[0])
        elif name == "reconstruct" and kinds == [Name, tuple, bytes] and arguments[0] == "ndarray":
            self.stack.append(Array())
        else:
            raise self.fail("calls a name with other arguments than numpy writes")

    def build(self) -> None:
        """BUILD: the byte order of a dtype, the values of an array."""
        state, target = self.pop(), self.pop()
        kinds = [type(value) for value in state] if type(state) is tuple else []
        if type(target) is Dtype and len(kinds) == 8 and kinds[1] is str and state[1] == "<" and not target.ready:
            target.ready = True
        elif type(target) is Array and kinds == [int, tuple, Dtype, bool, bytes] and target.values is None:
            (_, shape, dtype, _, content) = state
            if len(shape) != 1 or type(shape[0]) is not int or not 0 < shape[0] <= MAX_HEADS:
                raise self.fail("has an array that is no vector")
            self.count(len(content))
            target.values = self.numbers(dtype, shape[0], content)
        else:
            raise self.fail("fills in what is no new array, or one of big-endian numbers")
        self.stack.append(target)

    def numbers(self, dtype: Dtype, size: int, content: bytes) -> np.ndarray:
        """`size` numbers out of exactly as many bytes."""
        if not dtype.ready or len(content) != size * SIZES[dtype.code]:
            raise self.fail("has numbers of another size than it says")
        return np.frombuffer(content, "<" + dtype.code)


OPCODES = {
    b"(": Reader.mark,
    b"t": Reader.tuple_of_mark,
    b")": lambda r: r.stack.append(()),
    b"\x85": lambda r: r.tuple_of(1),
    b"\x86": lambda r: r.tuple_of(2),
    b"\x87": lambda r: r.tuple_of(3),
    b"]": lambda r: r.stack.append([]),
    b"a": lambda r: r.extend([r.pop()]),
    b"e": lambda r: r.extend(r.pop_mark()),
    b"}": lambda r: r.stack.append({}),
    b"s": lambda r: r.update([r.pop(), r.pop()][::-1]),
    b"u": lambda r: r.update(r.pop_mark()),
    b"N": lambda r: r.stack.append(None),
    b"\x88": lambda r: r.stack.append(True),
    b"\x89": lambda r: r.stack.append(False),
    b"K": lambda r: r.stack.append(r.number("B")),
    b"M": lambda r: r.stack.append(r.number("H")),
    b"J": lambda r: r.stack.append(r.number("i")),
    b"X": Reader.text,
    b"q": lambda r: r.put("B"),
    b"r": lambda r: r.put("I"),
    b"h": lambda r: r.get("B"),
    b"j": lambda r: r.get("I"),
    b"c": Reader.name,
    b"R": Reader.call,
    b"b": Reader.build,
}


def read_pickle(data: bytes, place: str) -> Any:
    """The object that `data` describes, of dict, list, tuple, str, int, bool, None, bytes, numpy numbers and `Array`.

    Raises:
        LockError: anything else is in it.
    """
    return Reader(data, place).run()


# --- what it means -------------------------------------------------------------------------------------------------


def directions(found: Any, place: str) -> Directions:
    """The object of a `.safelock`, checked.

    Raises:
        LockError: another structure; a vector that is not of unit length to 1e-2 or not as long as the others; a sigma
            that is not positive and finite; a head twice or beyond any model.
    """
    if type(found) is not dict or not found:
        raise LockError(f"{place} does not hold a dictionary of attention heads")
    heads: dict[tuple[int, int], tuple[np.ndarray, float]] = {}
    for key, entries in found.items():
        match = KEY.fullmatch(key)
        if match is None or type(entries) is not list or not entries:
            raise LockError(
                f"{place} has a key that is not model.layers.NUMBER.self_attn.head_out, or no head under it"
            )
        for entry in entries:
            if type(entry) is not tuple or len(entry) != 3 or type(entry[1]) is not Array:
                raise LockError(f"{place} has a head that is not (number, direction, scale)")
            head, vector, sigma = entry[0], entry[1].values, entry[2]
            if type(head) not in (int, np.int64) or not 0 <= head < MAX_HEADS or (int(match[1]), int(head)) in heads:
                raise LockError(f"{place} has a head with a number that is none, or twice")
            if type(sigma) not in (np.float16, np.float32) or not (np.isfinite(sigma) and sigma > 0):
                raise LockError(f"{place} has a scale that is not a positive number")
            if vector is None or vector.dtype.kind != "f":
                raise LockError(f"{place} has a direction that is no vector")
            if not abs(np.linalg.norm(vector.astype(np.float64)) - 1) <= 1e-2:  # nor if it is nan
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
