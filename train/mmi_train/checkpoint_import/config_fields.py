"""Configurations of parts: JSON files of others, read with errors for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import first_flaw
from mmi_deploy.system.safetensors_reader import reject_duplicates

Fields = dict[str, Any]


def read_json(path: Path) -> Fields:
    """The object in `path`; raises `ConfigError`, for a name that stands twice in it as well."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=reject_duplicates)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", fix="give a folder that holds it"
        ) from None
    except (ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{path} is no JSON object: {line}", fix="download it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is no JSON object", fix="download it again")
    return value


def agreed(source: Path, places: Mapping[str, object]) -> Any:
    """The value of a field that may stand in several `places` (by their names) of `source`; None
    where no place has one. Raises `ConfigError` where two contradict each other."""
    stated = {place: value for place, value in places.items() if value is not None}
    first = next(iter(stated.values()), None)
    if any(value != first for value in stated.values()):
        raise ConfigError(
            f"{source} contradicts itself",
            expected=f"one value in {' and '.join(stated)}",
            got=" and ".join(map(repr, stated.values())),
            fix="leave only the value that it was trained with",
        )
    return first


def count(source: Path, fields: Fields, name: str) -> int:
    """The positive number `name` of `fields`, which were read from `source`."""
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{source}: {name} is wrong", expected="a positive number", got=value)
    return value


def refuse(source: Path, field: str, expected: object, got: object) -> ConfigError:
    """The error for a `field` of another architecture than ours."""
    return ConfigError(
        f"{source}: our blocks do not have {field}",
        expected=expected,
        got=repr(got),
        fix="build on a plain LLaMA",
    )


@contextmanager
def fitting(source: object) -> Iterator[None]:
    """Around what is made of the fields of `source`: sizes that contradict each other become a
    `ConfigError`."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(f"{source} cannot be built on: {first_flaw(error)}") from None
    except KeyError as error:
        raise ConfigError(f"{source} cannot be built on: it lacks {error}") from None
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{source} cannot be built on: {line}") from None
