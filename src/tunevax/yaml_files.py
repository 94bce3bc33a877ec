"""YAML files without the surprises of YAML 1.1, where `off`, `no`, `on` and `yes` are booleans, `1e-4` is a string,
`010` is 8 and `12:30` is 750."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from tunevax.errors import UsageError

NO = ("no", "off", "false")
YES = ("yes", "on", "true")
INTEGER = r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+"
FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"


def read_yaml(path: str | Path, words: bool = False) -> Any:
    """The content of a YAML file. With `words` every scalar but null stays text; otherwise `true` and `false` are
    booleans, and what looks like a number is one, including `1e-4` and `1_000`. Raises `UsageError`: no such file, not
    YAML, or a duplicate key."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return yaml.load(text, _loader(words))  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UsageError(f"no such file: {path}" if not Path(path).exists() else f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: not UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        why = getattr(error, "problem", None)
        if not isinstance(error, yaml.constructor.ConstructorError):
            why = f"not valid YAML ({why})" if why else "not valid YAML"
        raise UsageError(f"{path}:{mark.line + 1 if mark else 1}: {why}") from error


@cache
def _loader(words: bool) -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - not to change the base class's

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            seen: set[Any] = set()
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        why = f"the key {key.value!r} is there twice"
                        raise yaml.constructor.ConstructorError(None, None, why, key.start_mark)
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    def resolve(tag: str, pattern: str) -> None:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), None)

    resolve("null", "~|null|Null|NULL|")
    resolve("merge", "<<")
    if not words:
        resolve("bool", "true|True|TRUE|false|False|FALSE")
        resolve("int", INTEGER)
        resolve("float", FLOAT)
        Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: number(node.value))
        Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: number(node.value))
    return Loader


def meant(value: Any, name: str, kind: Any) -> Any:
    """A scalar of a YAML file converted for an option of this name and type; an invalid one is returned as it is."""
    if not isinstance(value, str | bool | int | float):
        return value
    types = set(re.findall(r"\w+", str(kind)))
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if name.endswith("_strategy") and text.lower() in NO:  # `no` is a value of these options of transformers
        return "no"
    if "bool" in types and "str" not in types:
        return True if text.lower() in YES else False if text.lower() in NO else value
    if types & {"int", "float"} and "str" not in types:
        parsed = number(text)
        whole = parsed is not None and "float" not in types and parsed == parsed // 1
        return value if parsed is None else int(parsed) if whole else parsed
    return text if "str" in types else value


def number(text: str) -> int | float | None:
    """The number that a text represents in YAML, including 0o17 and 0x1f (010 is ten), or None."""
    if re.fullmatch(INTEGER, text):
        return int(text, 0) if text[:2].lower() in ("0o", "0x") else int(text)
    return float(re.sub(r"^([-+]?)\.(?=[a-zA-Z])", r"\1", text)) if re.fullmatch(FLOAT, text) else None
