"""`tunevax restore`: one method on one model, and a run folder.

A method is a dataclass of options with `paper`, `seed`, `output_dir` and a method `run(job)`: it takes models and data
from the `Job`, writes into its folder and says in its record what was done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tunevax.data.contamination import chosen_with, hashes
from tunevax.data.roles import load_rows
from tunevax.environment import require_one_process
from tunevax.errors import RunError, UsageError
from tunevax.lineage import Lineage
from tunevax.mixins import AllowOverlap, ModelOptions, RunOptions, option
from tunevax.modeling.biases import save_biases
from tunevax.modeling.loading import Loaded, load
from tunevax.records import Example, data_entry, digest, is_run
from tunevax.runs import record_prompts, writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunevax.records import ModelInfo, RunRecord


@dataclass
class RestoreOptions(ModelOptions, AllowOverlap, RunOptions):
    """What `tunevax restore` takes besides the method's own options."""

    safety_data: str | None = option(None, "prompt, chosen, rejected: file, hub id, or organism; its alignment split")


@dataclass
class Job:
    """What a method works with.

    Attributes:
        options: of the verb.
        method: its name on the command line, for messages.
        folder: the run folder being written.
        record: merged into run.json; the method adds what it measured. `finding`, if the method sets it, says why
            it came to no model: the run is kept and the command fails with that sentence.
    """

    options: RestoreOptions
    method: str
    folder: Path
    record: RunRecord

    @property
    def ref(self) -> str:
        """The `--model`."""
        if self.options.model is None:
            raise UsageError("--model is missing")
        return self.options.model

    def load(self, ref: str | None = None, **how: Any) -> Loaded:
        """`ref` (default the `--model`) as `tunevax.modeling.loading.load` gives it; `how` goes there too.

        The `--model`, whenever it is loaded, is what run.json says the run started from.
        """
        own = ref is None or ref == self.options.model
        options: dict[str, Any] = {"revision": self.options.revision} if own else {}
        ref = ref or self.ref
        options |= {"dtype": self.options.dtype, "chat_template": self.options.chat_template, **how}
        loaded = load(ref, **options)
        if not own:  # its weights go into the result too
            record_prompts(self.folder, **Lineage.of(ref).prompts)
        if own:
            self.record.update(
                {"model": cast("ModelInfo", loaded.info), "template_hash": digest(loaded.tokenizer.chat_template)}
            )
        return loaded

    def pairs(self, need: tuple[str, ...] = ("chosen", "rejected")) -> list[Example]:
        """The safety data's alignment split, recorded in the run and its prompts kept for later overlap checks."""
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
        """Keep that the prompts with these hashes were used in hardening, so that no later score may rest on them."""
        record_prompts(self.folder, alignment=hashes)

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a stock checkpoint, `model/` in the run folder, with the biases attached to the model beside it."""
        model.save_pretrained(self.folder / "model")
        tokenizer.save_pretrained(self.folder / "model")
        self.record.update({"adapter": "model", "attached": save_biases(model, self.folder / "model")})


def restore(method: str, options: RestoreOptions, config: Any, command: str = "") -> Path:
    """Run one method of restoration and return the run folder.

    Args:
        method: its name, for the record.
        config: the method's options, an instance of the class that `METHODS` names.

    Raises:
        UsageError: bad data, model or options; nothing is left behind.
        RunError: the method came to no model; the run folder says why.
    """
    require_one_process("restoration")
    ref = options.model
    record: RunRecord = {
        "verb": "restore",
        "method": method,
        "paper": config.paper,
        "command": command,
        "seed": config.seed,
        "data": [],
        "parent": str(Path(ref).absolute()) if ref and is_run(ref) else None,
        "config": {
            k: v
            for k, v in {**vars(options), **dataclasses.asdict(config)}.items()
            if k not in ("output_dir", "overwrite")
        },
        "adapter": None,
    }
    with writing(config.output_dir, record, overwrite=options.overwrite) as run:
        config.run(Job(options, method, run.path, record))
    if record.get("finding"):
        raise RunError(f"{record['finding']}; {run.final} has the numbers")
    return run.final
