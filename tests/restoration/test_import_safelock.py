"""Published locks are read as they are, and no file makes the reader run, crash, hang or swallow memory."""

import io
import os
import pickle
import random
import stat
import struct
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from tunevax.errors import UsageError
from tunevax.modeling import load
from tunevax.restoration.import_safelock import MAX_BYTES, ConvertLock, LockError, parse, read_pickle, read_safelock
from tunevax.restoration.lock import SafetyLock, head_shape
from tunevax.restoration.restore import RestoreOptions, restore


def published(heads=((3, (0, 5)), (1, (2,))), size=128):
    """What a published file holds: layers by falling score, heads in order, everything fp16."""
    draw = np.random.default_rng(0)

    def unit():
        vector = draw.normal(size=size)
        return (vector / np.linalg.norm(vector)).astype(np.float16)

    return {
        f"model.layers.{layer}.self_attn.head_out": [
            (np.int64(h), unit(), np.float16(0.1 + draw.random())) for h in own
        ]
        for layer, own in heads
    }


def pickled(path) -> bytes:
    archive = zipfile.ZipFile(path)
    return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


def archive(body: bytes, name="lock/data.pkl", **changes) -> bytes:
    """A zip with one stored entry."""
    entry = zipfile.ZipInfo(name)
    for key, value in changes.items():
        setattr(entry, key, value)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(entry, body)
    return out.getvalue()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("locks") / "Llama-3.safelock"
    torch.save(published(), path)
    return path


def test_reads_what_torch_saves(file, tmp_path):
    truth, found = published(), read_safelock(file)
    assert list(zip(found.layer, found.head, strict=True)) == [(1, 2), (3, 0), (3, 5)]
    places = [(1, 0), (3, 0), (3, 1)]
    for i, (layer, position) in enumerate(places):
        _, u, sigma = truth[f"model.layers.{layer}.self_attn.head_out"][position]
        assert found.u[i].tolist() == u.astype(np.float32).tolist() and found.sigma[i] == np.float32(sigma)
    assert [a.dtype for a in found] == [np.float32, np.float32, np.int64, np.int64]
    # The published files are of numpy 1, which had its own names, of the archive's own choice of stem.
    old = pickled(file).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in old
    (tmp_path / "old.safelock").write_bytes(archive(old, "another_stem/data.pkl"))
    assert all(np.array_equal(a, b) for a, b in zip(found, read_safelock(tmp_path / "old.safelock"), strict=True))
    many = published([(layer, range(12)) for layer in range(60)])  # more than a batch of items, more than 256 memo keys
    torch.save(many, tmp_path / "many.safelock")
    assert read_safelock(tmp_path / "many.safelock").u.shape == (720, 128)


def edited(**changes):
    """A lock with one head and something wrong with it."""
    key, [(head, u, sigma)] = next(iter(published([(2, (1,))], 16).items()))
    parts = {"key": key, "head": head, "u": u, "sigma": sigma, **changes}
    return {parts["key"]: [(parts["head"], parts["u"], parts["sigma"])]}


UNIT = np.eye(1, 16, dtype=np.float16)[0]
MALFORMED = {
    "empty": {},
    "list": [],
    "no heads": {"model.layers.2.self_attn.head_out": []},
    "key": edited(key="model.layers.2.self_attn.o_proj"),
    "key tail": edited(key="model.layers.2.self_attn.head_out\n"),
    "layer": edited(key="model.layers.02.self_attn.head_out"),
    "not unit": edited(u=UNIT * 2),
    "nan": edited(u=UNIT * np.float16("nan")),
    "inf": edited(u=np.full(16, np.inf, np.float16)),
    "matrix": edited(u=np.eye(1, 16, dtype=np.float16)),
    "ints": edited(u=UNIT.astype(np.int64)),
    "double": edited(u=UNIT.astype(np.float64)),
    "big-endian": edited(u=UNIT.astype(">f2")),
    "objects": edited(u=np.array([1, None], object)),
    "records": edited(u=np.zeros(2, [("a", "f2")])),
    "no vector": edited(u=np.zeros(0, np.float16)),
    "sigma 0": edited(sigma=np.float16(0)),
    "sigma nan": edited(sigma=np.float16("nan")),
    "sigma inf": edited(sigma=np.float16("inf")),
    "sigma int": edited(sigma=np.int64(1)),
    "head < 0": edited(head=np.int64(-1)),
    "head 1e9": edited(head=np.int64(10**9)),
    "head bool": edited(head=True),
    "head float": edited(head=np.float16(1)),
    "twice": {"model.layers.2.self_attn.head_out": [(np.int64(1), UNIT, np.float16(1))] * 2},
    "sizes": {f"model.layers.{n}.self_attn.head_out": [(np.int64(1), np.eye(1, 8 * n, dtype=np.float16)[0], np.float16(1))] for n in (1, 2)},
    "tensor": edited(u=torch.ones(1)),
    "protocol 4": None,
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_refuses_what_is_no_lock(what, file, tmp_path):
    bad = tmp_path / "bad.safelock"
    torch.save(MALFORMED[what] if what != "protocol 4" else published(), bad, pickle_protocol=4 if "4" in what else 2)
    with pytest.raises(LockError) as caught:
        read_safelock(bad)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


# --- hostile files -------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def hostile_pickles(canary: str, good: bytes) -> dict[str, bytes]:
    """By name. Those marked `live` do what they say when unpickled."""
    command = f"touch {canary}"
    line = f"S'{command}'\n".encode()
    system = b"cposix\nsystem\n"
    key = text("model.layers.1.self_attn.head_out")
    encode = b"c_codecs\nencode\n"
    laughs = (
        b"]q\x00"
        + text("ha")
        + b"a"
        + b"".join(b"]q" + bytes([i + 1]) + b"(" + (b"h" + bytes([i])) * 10 + b"e" for i in range(120))
    )
    big = text("a" * 60_000)
    dtype = b"cnumpy\ndtype\n" + text("f2") + b"\x89\x88\x87R"
    ready = dtype + b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    blank = (
        b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + encode
        + text("b")
        + text("latin1")
        + b"\x86R\x87R"
    )
    bodies = {
        "live reduce": system + text(command) + b"\x85R",
        "live os": b"cos\nsystem\n(" + line + b"tR",
        "live inst": b"(" + line + b"iposix\nsystem\n",
        "live obj": b"(" + system + line + b"o",
        "live stack global": text("posix") + text("system") + b"\x93" + text(command) + b"\x85R",
        "live eval": b"cbuiltins\neval\n" + text(f"__import__('os').system({command!r})") + b"\x85R",
        "live newobj": b"cfunctools\npartial\n" + system + text(command) + b"\x86\x81)R",
        "live newobj_ex": b"cfunctools\npartial\n" + system + text(command) + b"\x86}\x92)R",
        "live build": b"cargparse\nNamespace\n)\x81}" + text("__setstate__") + system + b"sb" + text(command) + b"b",
        "live in a lock": good[2:-1] + b"0" + system + text(command) + b"\x85R",
        "live behind getattr": b"cbuiltins\ngetattr\n" + b"cos\nsystem\n" + text("__call__") + b"\x86R" + text(command) + b"\x85R",
        "load": b"cnumpy\nload\n" + text("x.npy") + b"\x85R",
        "runstring": b"cnumpy.testing._private.utils\nrunstring\n" + text("1") + b"}\x86R",
        "decode": b"c_codecs\ndecode\n" + text("a") + text("rot13") + b"\x86R",
        "rot13": encode + text("a") + text("rot13") + b"\x86R",
        "encode self": encode + encode + encode + b"\x86R",
        "no latin": encode + text("\u20ac") + text("latin1") + b"\x86R",
        "dotted": b"cnumpy.core.multiarray\nscalar.__init__\n",
        "spaced": b"cnumpy.core.multiarray scalar\n\n",
        "long name": b"c" + b"a" * 10**5 + b"\n\n",
        "no line": b"cnumpy",
        "persid": b"Pos\n", "binpersid": b"NQ", "ext1": b"\x82\x01", "ext2": b"\x83\x01\x00", "ext4": b"\x84\x01\x00\x00\x00",
        "binunicode8": b"\x8d" + b"\xff" * 8, "binbytes8": b"\x8e" + b"\xff" * 8, "frame": b"\x95" + b"\xff" * 8,
        "long1": b"\x8a\xff" + b"\xff" * 255, "long4": b"\x8b\xff\xff\xff\x7f", "long": b"L" + b"9" * 10**5 + b"L\n",
        "int": b"I" + b"9" * 10**5 + b"\n", "binunicode": b"X\xff\xff\xff\xff", "string": b"S'a'\n", "float": b"G" + b"\x7f" * 8,
        "buffer": b"\x97", "bytearray": b"\x96" + b"\xff" * 8, "frozenset": b"(\x91", "not utf-8": b"X\x01\x00\x00\x00\xff",
        "deep lists": b"]" * 50_000 + b"a" * 49_999,
        "deep tuples": b")" + b"\x85" * 10**5,
        "deep marks": b"(" * 10**5,
        "deep closed": b"(" * 50_000 + b"t" * 50_000,
        "deep state": dtype + b")" + b"\x85" * 10**5 + b"b",
        "deep key": b"}" + b")" + b"\x85" * 10**5 + b"Ns",
        "deep key, fatal to torch's loader": b"}" + b")" + b"\x85" * 4 * 10**5 + b"Ns",
        "reconstruct 8 GB": b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\x00\xca\x9a\x3b\x85" + text("f8") + b"\x87R",
        "list in itself": b"]q\x00h\x00a", "dict in itself": b"}q\x00" + key + b"h\x00s",
        "laughs": laughs, "laughs as key": b"}" + laughs + b"Ns", "laughs as heads": b"}" + key + laughs + b"s",
        "wide": b"]q\x00" + b"(" + b"h\x00" * 60_000 + b"e",
        "memo": b"N" + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - i) for i in range(30_000)),
        "no memo": b"h\x07", "empty pop": b"\x85", "no mark": b"t", "append to str": text("a") + b"Na", "odd": b"}(Nu",
        "encode bomb": big + b"q\x000" + text("latin1") + b"q\x010" + b"(" + (encode + b"h\x00h\x01\x86R") * 10_000 + b"t",
        "encode bomb, no pop": big + b"q\x00" + text("latin1") + b"q\x01" + (encode + b"h\x00h\x01\x86R") * 10_000,
        "same key": b"}" + key + b"Ns" + key + b"Ns", "int key": b"}K\x00Ns",
        "array of tuple": ready + b"q\x000" + blank + b"(K\x01)h\x00\x89" + encode + text("") + text("latin1") + b"\x86Rtb",
        "array < 0": ready + b"q\x00" + blank + b"(K\x01J\xff\xff\xff\xff\x85h\x00\x89" + encode + text("") + text("latin1") + b"\x86Rtb",
        "array 2e9": ready + b"q\x00" + blank + b"(K\x01J\xff\xff\xff\x7f\x85h\x00\x89" + encode + text("ab") + text("latin1") + b"\x86Rtb",
        "dtype twice": ready + b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        "object dtype": b"cnumpy\ndtype\n" + text("O8") + b"\x89\x88\x87R",
        "dtype unready": b"cnumpy._core.multiarray\nscalar\n" + dtype + encode + text("ab") + text("latin1") + b"\x86R\x86R",
        "subclass": b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85" + encode + text("b") + text("latin1") + b"\x86R\x87R",
        "call dict": b"})R", "build list": b"]}b", "build tuple": b")}b", "build name": b"cnumpy\nndarray\n}b",
    }  # fmt: skip
    bodies = {name: b"\x80\x02" + body + b"." for name, body in bodies.items()}
    return bodies | {"empty": b"", "text": b"hello", "rest": good + good, "no stop": good[:-1], "zip": archive(good)}


def hostile_archives(good: bytes) -> dict[str, bytes]:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("lock/data.pkl", b"\x80\x02" + b"N0" * 10_000_000 + b"N.")  # 20 MB in 20 kB
    many, twice, folders = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(many, "w") as file:
        for i in range(5000):
            file.writestr(f"lock/{i}", b"")
        file.writestr("lock/data.pkl", good)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(twice, "w") as file:
        file.writestr("lock/data.pkl", good)
        file.writestr("lock/data.pkl", good)
    with zipfile.ZipFile(folders, "w") as file:
        file.writestr("lock/data.pkl", good)
        file.writestr("other/data.pkl", good)
    plain = archive(good)
    centre = plain.rfind(b"PK\x01\x02")
    sizes = plain[: centre + 20] + b"\xf0\xff\xff\xff" * 2 + plain[centre + 28 :]
    return {
        "bomb": out.getvalue(), "many": many.getvalue(), "twice": twice.getvalue(), "folders": folders.getvalue(),
        "sizes": sizes, "in itself": plain.replace(b"lock/data.pkl", b"lock/data.zip"),
        "symlink": archive(b"/etc/passwd", external_attr=(stat.S_IFLNK | 0o777) << 16),
        "fifo": archive(good, external_attr=(stat.S_IFIFO | 0o777) << 16), "encrypted": plain[:centre + 8] + b"\x01" + plain[centre + 9 :],
        "up": archive(good, "../data.pkl"), "root": archive(good, "/data.pkl"), "deep": archive(good, "a/../data.pkl"),
        "backslash": archive(good, "a\\b/data.pkl"), "folder": archive(b"", "lock/data.pkl/"), "bare": archive(good, "data.pkl"),
        "nul": archive(good, "lock/data.pkl\0.txt")[:-22] + b"", "empty zip": b"PK\x05\x06" + bytes(18), "nothing": b"",
        "too large": b"PK" + bytes(MAX_BYTES), "lzma": archive(good).replace(b"\0\0\0\0\x21\0", b"\x0e\0\0\0\x21\0"),
    }  # fmt: skip


class Watch:
    """Notes what Python's own audit events say is run, opened for writing or unpickled."""

    RUNS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "exec", "pickle.find_class", "os.symlink")

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self.note)

    def note(self, event, args):
        if self.on and (event in self.RUNS or (event == "open" and "w" in str(args[1]))):
            self.seen.append((event, args))


WATCH = Watch()


def is_read(content: bytes) -> bool:
    """Whether it was read; anything but an orderly refusal is raised. What is read is a lock."""
    WATCH.on = True
    try:
        found = parse(content, "hostile")
    except LockError as error:
        assert len(str(error)) < 300
        return False
    finally:
        WATCH.on = False
    assert np.allclose(np.linalg.norm(found.u, axis=1), 1, atol=1.1e-2)
    assert (found.sigma > 0).all() and np.isfinite(found.sigma).all() and (found.head >= 0).all()
    return True


@pytest.mark.slow
def test_hostile_files_run_nothing(file, tmp_path):
    canary = tmp_path / "canary"
    pickles = hostile_pickles(str(canary), pickled(file))
    for name, body in pickles.items():
        if name.startswith("live"):  # else it would prove nothing that they do not run below
            pickle.loads(body)
            assert canary.exists(), name
            canary.unlink()
    WATCH.seen.clear()
    slowest, largest = 0.0, 0
    for name, content in [*((n, archive(b)) for n, b in pickles.items()), *hostile_archives(pickled(file)).items()]:
        start = time.process_time()
        assert not is_read(content), name
        slowest = max(slowest, time.process_time() - start)
        if name.startswith(("encode", "memo", "wide", "laughs", "bomb")):
            tracemalloc.start()
            assert not is_read(content), name
            largest = max(largest, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert not canary.exists() and not WATCH.seen
    assert slowest < 5 and largest < 100 * 2**20, (slowest, largest)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in (tmp_path / "fifo", tmp_path / "loop", tmp_path, tmp_path / "none", "/dev/zero", "a\0b"):
        with pytest.raises(LockError):
            read_safelock(place)


@pytest.mark.slow
def test_ten_thousand_damaged_files(file, tmp_path):
    """Cut, bits flipped, bytes and opcodes put in, taken out and moved: in the archive and in the pickle alone."""
    draw, canary = random.Random(0), tmp_path / "canary"
    whole, good = file.read_bytes(), pickled(file)
    opcodes = [bytes([ord(o.code)]) for o in __import__("pickletools").opcodes]
    live = list(hostile_pickles(str(canary), good).values())
    live = [body for body in live if 2 < len(body) < 10**4]

    def flipped(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)

    def cut(data: bytes) -> bytes:
        return data[: draw.randrange(len(data))]

    def spliced(data: bytes) -> bytes:
        a, b = sorted(draw.randrange(len(data)) for _ in range(2))
        inserted = draw.choice(
            (draw.choice(opcodes), draw.randbytes(draw.randrange(9)), data[a : a + 40], draw.choice(live)[2:-1])
        )
        return data[:a] + inserted + data[draw.choice((a, b)) :]

    def invented(_: bytes) -> bytes:
        return (
            b"\x80\x02"
            + b"".join(draw.choice(opcodes) + draw.randbytes(draw.randrange(3)) for _ in range(draw.randrange(60)))
            + b"."
        )

    WATCH.seen.clear()
    read = 0
    start = time.process_time()
    for number in range(10_000):
        if number % 4 == 0:
            content = draw.choice((flipped, cut, spliced))(whole)
        else:
            content = archive(draw.choice((flipped, cut, spliced, invented))(good))
        read += is_read(content)
    assert not canary.exists() and not WATCH.seen
    assert 0 < read < 3000  # some damage hits a digit of a direction, or what nothing depends on
    assert time.process_time() - start < 60
    for body in live:  # and the reader of pickles alone, without the archive's checksum in front
        for _ in range(20):
            with pytest.raises(LockError):
                read_pickle(cut(body), "hostile")


# --- conversion ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_converts(tmp_path):
    blocks, heads, size = head_shape(load("organism").model)
    torch.save(published([(blocks - 1, (0, heads - 1))], size), tmp_path / "a.safelock")
    truth = read_safelock(tmp_path / "a.safelock")
    for name, model in (("unknown", None), ("known", "organism")):
        config = ConvertLock(str(tmp_path / name), lock=str(tmp_path / "a.safelock"))
        out = restore("convert-lock", RestoreOptions(model=model), config)
        lock = SafetyLock.load(out)
        assert torch.equal(lock.u, torch.from_numpy(truth.u)) and lock.head.tolist() == [0, heads - 1]
        assert (lock.meta["base"] is None) == (model is None) and ("base unknown" in lock.meta["source"]) == (
            model is None
        )
    assert lock.meta["base"]["ref"] == "organism" and lock.meta["n_heads"] == heads
    for wrong, what in ((published([(0, (0,))], size * 2), "size"), (published([(0, (heads,))], size), "head"), (published([(blocks, (0,))], size), "block")):  # fmt: skip
        torch.save(wrong, tmp_path / "b.safelock")
        with pytest.raises(UsageError, match=what):
            restore(
                "convert-lock",
                RestoreOptions(model="organism"),
                ConvertLock(str(tmp_path / "no"), lock=str(tmp_path / "b.safelock")),
            )
    with pytest.raises(UsageError, match="convert-lock"):
        SafetyLock.load(tmp_path / "a.safelock")
