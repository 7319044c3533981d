"""Recipes: settings of a run in TOML files, and their order of precedence.

Without torch, so that the command line can show its defaults. The recipe `lora` holds all defaults;
another one says what differs from it. Options of the command overrule the recipe, and `--set`
overrules both.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from mmi_deploy.errors import ConfigError

DEFAULTS = "lora"

# The value of `groups` in a recipe without any.
NO_GROUPS = "none"

# Settings of which a later layer's replaces the other's.
_EXCLUSIVE = {"steps": "epochs", "epochs": "steps"}

_FOLDER = files("mmi_train") / "recipes"


@dataclass(frozen=True)
class Layer:
    """Settings by name, as `rate` or `lora.rank`, of one source, which `name` names."""

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)


class Value(NamedTuple):
    """A setting and the name of the layer that it comes from."""

    value: Any
    source: str


Values = dict[str, Value]


def shipped() -> list[str]:
    """Names of the recipes of this package."""
    names = (Path(entry.name) for entry in _FOLDER.iterdir())
    return sorted(name.stem for name in names if name.suffix == ".toml")


def recipe(name: str) -> Layer:
    """Read a shipped recipe by its name, or a file by its path, which ends in `.toml`. Raises
    `ConfigError`."""
    if not name.endswith(".toml"):
        if name not in shipped():
            near = get_close_matches(name, shipped(), n=1)
            raise ConfigError(
                f"there is no recipe {name!r}",
                expected=f"{', '.join(shipped())}, or a file that ends in .toml",
                fix=f"the nearest one is {near[0]}" if near else "",
            )
        return _parsed((_FOLDER / f"{name}.toml").read_bytes(), f"recipe {name}")
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {name}: {error.strerror}") from None
    return _parsed(content, f"recipe {name}")


def _parsed(content: bytes, name: str) -> Layer:
    try:
        return Layer(name, dict(_flat(tomllib.loads(content.decode("utf-8-sig")))))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the {name} is not TOML: {error}") from None


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def assignments(texts: Iterable[str]) -> Layer:
    """Settings of `--set key=value`; a value is TOML, or a text without quotation marks. Raises
    `ConfigError`."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not key or not equals:
            raise ConfigError("--set is not understood", expected="key=value", got=text)
        try:
            found[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = value
    return Layer("--set", found)


@cache
def defaults() -> Layer:
    """The recipe of the defaults."""
    return recipe(DEFAULTS)


def default(key: str) -> str:
    """Default of an option, as its help shows it."""
    return _written(defaults().values[key]).strip('"')


def layered(*layers: Layer) -> Values:
    """Settings of all layers over the defaults, the last of which counts. A number of steps
    replaces one of epochs, and the other way round. Raises `ConfigError` for a layer with both."""
    found: Values = {}
    for layer in (defaults(), *layers):
        for key, value in layer.values.items():
            if (other := _EXCLUSIVE.get(key)) is not None:
                if other in layer.values:
                    raise ConfigError(f"{layer.name} has both steps and epochs", fix="choose one")
                found.pop(other, None)
            found[key] = Value(value, layer.name)
    return found


def written(values: Values) -> str:
    """The settings as a recipe, each with its source as a comment; tables come last."""
    tables = list(dict.fromkeys(key.rpartition(".")[0] for key in values))
    tables.sort(key=lambda table: (table != "", table.count(".")))
    ordered = sorted(values, key=lambda key: tables.index(key.rpartition(".")[0]))
    lines, table = [], ""
    for key in ordered:
        own, _, name = key.rpartition(".")
        if own != table:
            lines += ["", f"[{'.'.join(map(_key, own.split('.')))}]"]
            table = own
        lines.append(f"{name} = {_written(values[key].value)}  # {values[key].source}")
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    """A key in TOML, in quotation marks if it needs them, as refcoco+."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _written(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    # JSON's texts, numbers and truth values are TOML's, apart from DEL, which JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
