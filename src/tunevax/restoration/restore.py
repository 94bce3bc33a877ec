"""`tunevax restore`: one method applied to one model, and a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tunevax.data.contamination import chosen_with, hashes
from tunevax.data.roles import load_rows
from tunevax.environment import require_one_process
from tunevax.errors import RunError, UsageError
from tunevax.lineage import Lineage, absolute
from tunevax.mixins import AllowOverlap, ModelOptions, RunOptions, option
from tunevax.modeling.biases import save_biases
from tunevax.modeling.loading import Loaded, load
from tunevax.records import Example, data_entry, digest, is_run
from tunevax.runs import record_prompts, writing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunevax.records import RunRecord


@dataclass
class RestoreOptions(ModelOptions, AllowOverlap, RunOptions):
    """What `tunevax restore` takes besides the method's own options."""

    safety_data: str | None = option(
        None, "prompt, chosen, rejected: file, hub id, organism, or proxy:TOPIC; its alignment split"
    )


@dataclass
class Job:
    """Models, data and the run folder for one run of a method.

    The method adds its measurements to the record. If it sets `finding`, the reason why there is no model, the run is
    kept and the command fails with that sentence.
    """

    options: RestoreOptions  # of the verb
    method: str  # its name on the command line, for messages
    folder: Path  # the run folder being written
    record: RunRecord  # the content of run.json

    @property
    def ref(self) -> str:
        """The `--model`."""
        if self.options.model is None:
            raise UsageError("--model is missing")
        return self.options.model

    def load(
        self, ref: str | None = None, *, dtype: str | None = None, device: str | None = None, merge: bool = True
    ) -> Loaded:
        """`ref`, default the `--model`, which is recorded as the model of the run. `dtype` replaces that of the verb;
        `device` and `merge` are those of `tunevax.modeling.loading.load`."""
        o, own, ref = self.options, ref is None or ref == self.options.model, ref or self.ref
        loaded = load(
            ref, revision=o.revision if own else None, dtype=dtype or o.dtype, device=device,
            chat_template=o.chat_template, merge=merge,
        )  # fmt: skip
        if own:
            self.record.update({"model": loaded.info, "template_hash": digest(loaded.tokenizer.chat_template)})
        else:  # its weights go into the result too
            record_prompts(self.folder, **Lineage.of(ref).prompts)
        return loaded

    def pairs(self, need: tuple[str, ...] = ("chosen", "rejected")) -> list[Example]:
        """The safety data's alignment split, recorded in the run with its prompts for later overlap checks."""
        source = self.options.safety_data
        if source is None:
            raise UsageError(f"--safety-data is missing: {self.method} needs {' and '.join(need)}")
        rows = load_rows("alignment", source, need, self.method)
        self.note_data(source, rows)
        return rows

    def note_data(self, source: str, rows: Sequence[Example]) -> None:
        """Record that these rows of `source` were used in hardening."""
        entry = data_entry("alignment", source, rows)
        if entry not in self.record["data"]:
            self.record["data"].append(entry)
        self.note_prompts(hashes(rows) | chosen_with(source))

    def note_prompts(self, hashes: Iterable[str]) -> None:
        """Record that the prompts with these hashes were used in hardening, for later overlap checks."""
        record_prompts(self.folder, alignment=hashes)

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a stock checkpoint to `model/` in the run folder, with the biases attached to the model beside it."""
        model.save_pretrained(self.folder / "model")
        tokenizer.save_pretrained(self.folder / "model")
        self.record.update({"adapter": "model", "attached": save_biases(model, self.folder / "model")})

    def save_adapter(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, below: str) -> None:
        """Write the adapter of `model`, which belongs on the model `below`, to `adapter/` in the run folder."""
        model.save_pretrained(str(self.folder / "adapter"))
        tokenizer.save_pretrained(self.folder / "adapter")
        self.record.update({"adapter": "adapter", "adapter_on": absolute(below)})


class Method(Protocol):
    """A dataclass of options with a method that restores a model; `paper` is its source."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    output_dir: str | None
    seed: int
    paper: ClassVar[str]

    def run(self, job: Job) -> None:
        """Read models and data from `job`, write into its folder, and add to its record."""


def restore(method: str, options: RestoreOptions, config: Method, command: str = "") -> Path:
    """Run one method of restoration, `config`, under its name `method` and return the run folder.

    Raises:
        UsageError: bad data, model or options; nothing is left behind.
        RunError: the method gave no model; the run folder has the reason.
    """
    require_one_process("restoration")
    if config.output_dir is None:
        raise UsageError("--output-dir is missing")
    ref, values = options.model, {**vars(options), **dataclasses.asdict(config)}
    record: RunRecord = {
        "verb": "restore", "method": method, "paper": config.paper, "command": command, "seed": config.seed, "data": [],
        "parent": str(Path(ref).absolute()) if ref and is_run(ref) else None,
        "config": {k: v for k, v in values.items() if k not in ("output_dir", "overwrite")},
        "adapter": None,
    }  # fmt: skip
    with writing(config.output_dir, record, overwrite=options.overwrite) as run:
        config.run(Job(options, method, run.path, record))
    if record.get("finding"):
        raise RunError(f"{record['finding']}; {run.final} has the numbers")
    return run.final
