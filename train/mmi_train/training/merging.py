"""Model folders from a base and what was learned apart from it: a delta, or LoRA adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmi_deploy.errors import WeightsError
from mmi_deploy.spec.config import ModelConfig, read_config
from mmi_deploy.system.progress import Progress, silent
from mmi_train.training import lora
from mmi_train.weights import delta
from mmi_train.weights.lazy_tensor import StoredTensor
from mmi_train.weights.model_folder import CONFIG, WEIGHTS, check_fits, write_changed
from mmi_train.weights.safetensors_files import read_safetensors


def merge(base: Path, learned: Path, folder: Path, progress: Progress = silent) -> int:
    """Write the model folder `base` with the delta, or the adapters, in the folder `learned` into
    `folder`; returns the number of changed weights. Raises `WeightsError` if they belong to another
    base."""
    changed, config = _changed(base, learned)
    check_fits(config, read_safetensors(base / WEIGHTS), f"{base} with the config of {learned}")
    progress("writing the model")
    write_changed(folder, base, changed, config)
    return len(changed)


def _changed(base: Path, learned: Path) -> tuple[Mapping[str, StoredTensor], ModelConfig]:
    """The weights that replace those of `base`, and the configuration of the result."""
    if (learned / delta.ABOUT).is_file():
        made = delta.read_delta(learned)
        return made.changed(base), made.config
    if (learned / lora.ABOUT).is_file():
        # Adapters from before configurations were kept beside them have that of their base.
        beside = learned / CONFIG
        config = read_config(beside if beside.is_file() else base / CONFIG)
        return lora.read_adapters(learned).merged(base), config
    raise WeightsError(
        f"{learned} holds neither a delta nor adapters",
        expected=f"{delta.ABOUT} or {lora.ABOUT}",
        fix="give what `mmi delta make` wrote, or the folder `adapters` of `mmi train`",
    )
