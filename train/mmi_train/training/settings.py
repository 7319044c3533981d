"""Settings of a fine-tuning run as a recipe holds them, validated.

A recipe has the fields of `FineTuning` and `RunConfig` under their own names, the adapters as a
table `lora`, changes of the diffusion as a table `diffusion`, the length of the run in optimiser
steps or in epochs, and a table for each data set of its mixture, as `[data.coco-caption]`, with the
fields of `SetChoice`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import first_flaw
from mmi_train.data.readers.mixture import SetChoice
from mmi_train.data.readers.registry import entry_called
from mmi_train.training.fine_tuning import DiffusionChange, FineTuning, steps_of
from mmi_train.training.loop import RunConfig
from mmi_train.training.lora import LoraConfig
from mmi_train.training.recipes import NO_GROUPS, Layer, Values, defaults, layered
from mmi_train.training.stages.distillation import Distillation


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Settings(FineTuning, RunConfig):
    """A whole recipe. `steps`: optimiser steps, None: those of `epochs` passes through the
    documents. In a recipe `groups` is "none" for adapters alone, and `lora.rank` 0 for none;
    `lora.alpha` is twice the rank if it is left out. `data`: data sets by their names.
    `given_pixels`, `drawn_pixels`: sides of the pictures that the recipe was made for; the model
    decides those of the run."""

    steps: int | None = Field(default=None, ge=1)
    epochs: float = Field(default=3.0, gt=0)
    seed: int = Field(default=0, ge=0)
    accumulate: int = Field(default=1, ge=1)
    average: float = Field(default=0.0, ge=0, lt=1)
    log_every: int = Field(default=50, ge=1)
    checkpoint_every: int = Field(default=250, ge=1)
    keep: int = Field(default=2, ge=1)
    workers: int = Field(default=0, ge=0)
    most_skipped: int = Field(default=3, ge=0)
    given_pixels: int | None = Field(default=None, ge=1)
    drawn_pixels: int | None = Field(default=None, ge=1)
    data: Mapping[str, SetChoice] = Field(default_factory=dict)

    @field_validator("groups", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return None if value == NO_GROUPS else value

    @field_validator("lora", mode="before")
    @classmethod
    def _adapters(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if value.get("rank") == 0:
            return None
        if "alpha" not in value and isinstance(value.get("rank"), int):
            return {**value, "alpha": 2 * value["rank"]}
        return value

    def tuning(self) -> FineTuning:
        """Weights that learn, and their optimiser."""
        return FineTuning(**{field.name: getattr(self, field.name) for field in fields(FineTuning)})

    def run(self) -> RunConfig:
        """Settings of the loop."""
        return RunConfig(**{field.name: getattr(self, field.name) for field in fields(RunConfig)})

    def steps_for(self, documents: int, ranks: int = 1) -> int:
        """Optimiser steps on that many documents."""
        return self.steps or steps_of(self.epochs, documents, self.batch * self.accumulate * ranks)


_TABLES = ("lora", "diffusion", "distill", "data")

# Names of all settings: those of the tables `lora`, `diffusion` and `distill` have their names
# before them. Those of a data set are `data.NAME.` and one of `SET_KEYS`.
KEYS = (
    *(field.name for field in fields(Settings) if field.name not in _TABLES),
    *(f"lora.{field.name}" for field in fields(LoraConfig)),
    *(f"diffusion.{field.name}" for field in fields(DiffusionChange)),
    *(f"distill.{field.name}" for field in fields(Distillation)),
)
SET_KEYS = tuple(field.name for field in fields(SetChoice))


def settings_of(*layers: Layer) -> tuple[Settings, Values]:
    """Settings of the recipe `lora` with those of `layers` over it, the last of which counts; and
    the values with their sources. Raises `ConfigError` for an unknown name, a value that does not
    fit, and groups of weights without a rate of their own."""
    for layer in layers:
        for key in layer.values:
            _check_known(key, layer.name)
    values = layered(*layers)
    nested: dict[str, Any] = {}
    for key, (value, _) in values.items():
        *tables, name = key.split(".")
        place = nested
        for table in tables:
            place = place.setdefault(table, {})
        place[name] = value
    try:
        found = TypeAdapter(Settings).validate_python(nested)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        source = next((own for name, (_, own) in values.items() if key.startswith(name)), "")
        raise ConfigError(
            f"the settings of {source or 'the run'} are not valid: {first_flaw(error)}"
        ) from None
    found.tuning().optimiser(1)  # refuses unknown groups
    if found.groups is not None and values["rate"].source == defaults().name:
        raise ConfigError(
            f"the groups {found.groups} need a learning rate, which theirs are relative to",
            fix="choose it with --rate, or take the recipe of these groups with --recipe",
        )
    return found, values


def _check_known(key: str, source: str) -> None:
    if key in KEYS:
        return
    if key.startswith("data."):
        _check_set(key, source)
        return
    near = get_close_matches(key, KEYS, n=1) or [
        known for known in KEYS if known.rpartition(".")[2] == key
    ]
    raise ConfigError(
        f"{source} has an unknown setting {key!r}",
        fix=f"the nearest one is {near[0]}" if near else f"choose among {', '.join(KEYS)}",
    )


def _check_set(key: str, source: str) -> None:
    """Raise `ConfigError` unless `key` is `data.NAME.SETTING`."""
    _, name, *rest = key.split(".")
    if len(rest) != 1 or rest[0] not in SET_KEYS:
        near = get_close_matches(".".join(rest), SET_KEYS, n=1)
        raise ConfigError(
            f"{source} has an unknown setting {key!r}",
            fix=f"the nearest one is data.{name}.{near[0]}"
            if near
            else f"of a data set it can say {', '.join(SET_KEYS)}",
        )
    try:
        entry_called(name)
    except ConfigError as error:
        raise ConfigError(f"{source} has an unknown setting {key!r}: {error}") from None
