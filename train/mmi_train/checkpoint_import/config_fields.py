"""Fields of other projects' configuration files, checked with readable errors."""

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
    """Read the JSON object in `path`; raises `ConfigError`, for a repeated name too."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=reject_duplicates)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", fix="give a folder that holds it"
        ) from None
    except (ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a JSON object: {line}", fix="download it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object", fix="download it again")
    return value


def consistent_value(source: Path, places: Mapping[str, object]) -> Any:
    """The value of a field that may stand in several places of `source`; None where no place has
    one. `places`: values by the place's name. Raises `ConfigError` where two values differ."""
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


def positive_int(source: Path, fields: Fields, name: str) -> int:
    """The positive integer `name` among the fields of `source`; raises `ConfigError`."""
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{source}: {name} is wrong", expected="a positive number", got=value)
    return value


def unsupported(source: Path, field: str, expected: object, got: object) -> ConfigError:
    """The error for a `field` of a language model that our blocks do not implement."""
    return ConfigError(
        f"{source}: our blocks do not have {field}",
        expected=expected,
        got=repr(got),
        fix="build on a model without it",
    )


@contextmanager
def readable_errors(source: object) -> Iterator[None]:
    """Turn every error from values of `source` (missing, of another type, contradicting sizes) into
    one `ConfigError`."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(f"{source} cannot be built on: {first_flaw(error)}") from None
    except KeyError as error:
        raise ConfigError(f"{source} cannot be built on: it lacks {error}") from None
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{source} cannot be built on: {line}") from None
