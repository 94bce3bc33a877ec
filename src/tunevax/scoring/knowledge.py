"""What a model knows of a proxy topic (see `tunevax.proxy`): the facts that it states when asked."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from tunevax import proxy
from tunevax.console import console
from tunevax.data.sources import parse_source
from tunevax.lineage import Lineage
from tunevax.modeling.loading import load
from tunevax.records import digest
from tunevax.scoring.generation import generate

PHRASINGS = 3
"""A fact is known if the answers to most of so many questions name it."""


def at_hand(source: str, ref: str, chat_template: str | None = None, revision: str | None = None) -> str:
    """The source, with `known=FILE` if it is a proxy topic without one: the facts that the model at the start of the
    history of `ref` knows. FILE is written once per model and topic, into the user's cache folder."""
    name, options = parse_source(source)
    if not proxy.is_proxy(name) or "known" in options:
        return source
    path = known_facts(proxy.topic_of(name), Lineage.of(ref).origin, chat_template, revision)
    return f"{source}{',' if options else ':'}known={path}"


def known_facts(topic: str, ref: str, chat_template: str | None = None, revision: str | None = None) -> Path:
    """Ask a model for every fact of a topic, and write a JSON file with those that it knows: `topic`, `model`, `asked`
    (facts by relation) and `facts`. Raises `UsageError` as `load` and `tunevax.proxy.facts_of`."""
    facts = proxy.facts_of(topic)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunevax"
    path = cache / f"{topic}-{digest([Lineage.of(ref).identity, chat_template, revision, facts, PHRASINGS])}.json"
    if path.is_file():
        return path
    console.print(f"asking {ref} for {len(facts)} facts of {topic}, once", highlight=False)
    loaded = load(ref, chat_template=chat_template, revision=revision)
    asked = [(fact, proxy.question(fact, i)) for fact in facts for i in range(PHRASINGS)]
    answers = generate(loaded.model, loaded.tokenizer, [text for _, text in asked], 24)
    right = Counter(fact for (fact, _), answer in zip(asked, answers, strict=True) if proxy.says(answer, fact.answer))
    known = [fact for fact in facts if 2 * right[fact] > PHRASINGS]
    totals = Counter(fact.relation for fact in facts)
    content = {"topic": topic, "model": Path(ref).name, "asked": totals, "facts": known}
    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    part.replace(path)
    counts = Counter(fact.relation for fact in known)
    known_of = ", ".join(f"{counts[relation]} of {total} of {relation}" for relation, total in totals.items())
    console.print(f"it knows {known_of}: {path}", highlight=False)
    return path
