"""The history of a model.

A run names the model that it started from (`parent`, or the model it loaded). Its weights may belong on another model
(`adapter_on`): a recomputed adapter belongs on the model that its first version was trained on. An adapter folder that
is not a run belongs on the base that it names.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunevax.errors import UsageError
from tunevax.files import ADAPTER, BIASES, damage, model_hash
from tunevax.records import PROMPTS, RunRecord, digest, is_run, read_prompts, read_run

ORGANISM = "organism"
"""The name of the model that comes with tunevax."""
PARTS = ("adapter", "model")
"""Where a run keeps its weights."""


@dataclass(frozen=True)
class Lineage:
    """A model with its history."""

    ref: str  # a hub id, a folder with a model, a folder with an adapter, a run folder, or `organism`
    path: Path  # `ref` as a path; of `RUN/adapter` and `RUN/model`, the run
    folder: Path | None  # of its records, `path` or the folder around it; None if it is no folder here
    record: RunRecord  # run.json, empty if it is no run
    parent: str | None  # the model that it was made from
    adapter_on: str | None  # the model below its adapter, mostly the parent

    @classmethod
    def of(cls, ref: str | Path, start: Path | None = None) -> Lineage:
        """The lineage of the model that `ref` names, a run as `find_run` finds it. Raises `UsageError` if its run.json
        or adapter_config.json is damaged."""
        ref = _named(str(ref), start)
        path, run = Path(ref), find_run(ref)
        if run is not None:
            record = read_run(run)
            parent = record.get("parent") or (record.get("model") or {}).get("ref")
            sits_on = record.get("adapter_on") or parent
            return cls(ref, run, run, record, parent and _named(parent, run), sits_on and _named(sits_on, run))
        beside = path.parent if path.name in PARTS and (path.parent / PROMPTS).is_file() else path
        configs = [file for file in (path / ADAPTER, beside / "adapter" / ADAPTER) if file.is_file()]
        base = _base_of(configs[0]) if configs else None
        return cls(ref, path, beside if beside.is_dir() and ref != ORGANISM else None, {}, base, base)

    @cached_property
    def history(self) -> list[Lineage]:
        """The model, the one that it was made from, and so on, youngest first."""
        return list(self._walk(lambda link: [link.parent]))

    @property
    def origin(self) -> str:
        """The model at the start of its history, for example the public base."""
        return self.history[-1].ref

    @property
    def defences(self) -> list[str]:
        """The methods in its history, youngest first, without plain fine-tuning and attacks."""
        known = [link.record for link in self.history if link.record.get("verb") != "attack"]
        return [method for record in known if (method := record.get("method")) and method != "sft"]

    @cached_property
    def ancestors(self) -> list[Lineage]:
        """The model and all models in its history or below its weights, the model first."""
        return list(self._walk(lambda link: [link.adapter_on, link.parent]))

    @property
    def gone(self) -> list[str]:
        """The folders among its ancestors that no longer exist."""
        absent = (link.ref for link in self.ancestors if Path(link.ref).is_absolute() and not Path(link.ref).exists())
        return list(dict.fromkeys(absent))

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        """Hashes of the prompts that it and its ancestors used, by role; empty for a plain model."""
        used = defaultdict[str, set[str]](set)
        for folder in (link.folder for link in self.ancestors if link.folder):
            for role, hashes in read_prompts(folder).items():
                used[role].update(hashes)
        return {role: sorted(hashes) for role, hashes in used.items()}

    @property
    def categories(self) -> set[str]:
        """The categories of harm that it and its ancestors were aligned with."""
        entries = [entry for link in self.ancestors for entry in link.record.get("data") or []]
        return {c for entry in entries if entry.get("role") == "alignment" for c in entry.get("categories") or []}

    @property
    def base(self) -> str:
        """The folder or hub id of the model below its adapters. Raises as `adapters` does."""
        return self._weights[0]

    @property
    def adapters(self) -> list[Path]:
        """The folders of the adapters on the base, lowest first; a `UsageError` if there are no weights, or in a
        circle."""
        return self._weights[1]

    @property
    def identity(self) -> str:
        """16 hexadecimal digits, others for a model that was trained anew into the same folder."""
        return digest(_hashes(self.base, self.adapters, None))

    def identities(
        self, revision: str | None = None, commit_of: Callable[[str, str | None], str | None] | None = None
    ) -> dict[str, str]:
        """Identity to name of the model and of every model below its weights, itself first. `revision` is that of a hub
        base that no run pinned, `commit_of` the commit of a hub id at a revision."""
        named: dict[str, str] = {}
        for model in self._walk(lambda link: [Lineage.of(link.base).parent]):  # merged weights have a history, too
            try:
                base, adapters = model.base, model.adapters
            except UsageError:
                if model is self:
                    raise
                break  # it no longer exists: the models below it are unknown
            if adapters:  # the revision that its base was pinned to
                revision = _revision(Lineage.of(adapters[0])) or revision
            commit = commit_of(base, revision) if commit_of and not Path(base).is_dir() else None
            hashes = _hashes(base, adapters, commit)
            names = [base, *(str(a.parent if a.name == "adapter" else a) for a in adapters)]
            named |= {digest(hashes[: i + 1]): names[i] for i in reversed(range(len(names)))}
            revision = _revision(Lineage.of(base))
        return named

    def _walk(self, edges: Callable[[Lineage], list[str | None]]) -> Iterator[Lineage]:
        """The model and all that `edges` lead to, the nearest first, each folder once."""
        todo, seen = [self], set[Path | str]()
        while todo:
            link = todo.pop(0)
            key = link.folder.resolve() if link.folder else link.ref
            if key not in seen:
                seen.add(key)
                yield link
                todo += [Lineage.of(below) for below in edges(link) if below]

    @cached_property
    def _weights(self) -> tuple[str, list[Path]]:
        adapters: list[Path] = []
        for link in self._walk(lambda link: [link.adapter_on]):
            path = link.path
            if link.ref == ORGANISM:
                from tunevax.organism import path as shipped

                return str(shipped()), adapters
            if link.record:
                if (path / "model" / "config.json").is_file():
                    return str(path / "model"), adapters
                if not any((path / "adapter" / name).is_file() for name in (ADAPTER, BIASES)):
                    deleted = "its attacked weights were deleted; attack again with --keep-weights"
                    why = deleted if link.record.get("verb") == "attack" else "it holds no weights"
                    raise UsageError(f"{link.ref} cannot be loaded as a model: {why}")
                adapters.insert(0, path / "adapter")
            elif (path / ADAPTER).is_file():
                adapters.insert(0, path)
            elif path.is_dir() and not (path / "config.json").is_file():
                neither = "neither a model folder (no config.json) nor a finished run (no run.json)"
                raise UsageError(f"{link.ref} is {neither}")
            else:
                return link.ref, adapters
            if not link.adapter_on:
                raise UsageError(f"{link.ref} is an adapter that does not name its base model")
        raise UsageError(f"{self.ref} cannot be loaded: the runs below it lead back to {adapters[0].parent}")


def absolute(ref: str) -> str:
    """`ref` independent of the working directory: an absolute path, a hub id, or `organism`."""
    return str(Path(ref).absolute()) if ref != ORGANISM and Path(ref).exists() else ref


def find_run(ref: str, start: Path | None = None) -> Path | None:
    """The run folder that `ref` names, relative to the working folder or to a folder above `start`; None if it names
    none. `RUN/adapter` and `RUN/model` name the run."""
    if ref == ORGANISM:
        return None
    paths = [above / Path(ref).expanduser() for above in (Path(), *(start.resolve().parents if start else ()))]
    folders = (folder for path in paths for folder in ((path, path.parent) if path.name in PARTS else (path,)))
    return next(filter(is_run, folders), None)


def _named(ref: str, start: Path | None) -> str:
    """`ref`, or the path of the run that it names from `start`."""
    run = None if Path(ref).exists() else find_run(ref, start)
    return str(run) if run else ref


def _revision(model: Lineage) -> str | None:
    return (model.record.get("model") or {}).get("revision")


def _base_of(config: Path) -> str | None:
    """The model that an adapter_config.json names as its base."""
    if why := damage(config):
        raise UsageError(why)
    try:
        return dict(json.loads(config.read_text(encoding="utf-8"))).get("base_model_name_or_path")
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{config} cannot be read as a JSON object; save the adapter again") from error


def _hashes(base: str, adapters: list[Path], commit: str | None) -> list[Any]:
    """The identity of the base and of each adapter: a hash of the content; of a hub id, name and commit."""
    return [model_hash(base) or [base, commit], *(model_hash(str(adapter)) for adapter in adapters)]
