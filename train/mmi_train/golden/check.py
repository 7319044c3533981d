"""Run every golden unit and every golden case of a folder and collect the comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError

from mmi_deploy.errors import MmiError
from mmi_deploy.spec.config import first_flaw
from mmi_train.golden import full, generate, llama, mmfs, unet, vision
from mmi_train.golden.case_files import check_cases, read_cases
from mmi_train.golden.compare import Checks, Line
from mmi_train.golden.full import Weights
from mmi_train.golden.units import KINDS, Folder, Unit, UnitError, kind_of, read_unit, scan

_PARTS: dict[str, Callable[[Unit, Checks], None]] = {
    "mmfs_llm": mmfs.check,
    "mmfs_unet": mmfs.check,
    "visual_tokenizer": vision.check,
    "llama_mmfs": llama.check,
    "sd_unet_mmfs": unet.check,
}
_WHOLE: dict[str, Callable[[Unit, Checks, Weights], None]] = {
    "full_forward": full.check,
    "full_generate_texts": generate.check_texts,
    "full_generate_scores": generate.check_scores,
    "full_generate_images": generate.check_images,
}
assert {*_PARTS, *_WHOLE} == set(KINDS)

_FORWARD = "full_forward"


@dataclass
class Report:
    """Result of `check_folder`. `broken`: units that cannot run, with the reason. `ignored`: files
    that do not belong to a unit, with the reason."""

    lines: list[Line] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return bool(self.broken) or any(line.verdict == "FAIL" for line in self.lines)


def check_folder(
    path: Path, weights: Path | None = None, on_unit: Callable[[str], None] = lambda name: None
) -> Report:
    """Run all units and case files of `path`; `weights`: the folder whose `full_forward` holds the
    weights of the whole model. `on_unit` gets each name before it runs. Raises `UnitError` if a
    folder does not exist."""
    folder = scan(path)
    pool = _WeightPool(folder if weights is None else scan(weights))
    report = Report(ignored=dict(folder.ignored))
    for file in sorted(folder.ignored):
        name = Path(file).stem
        if file.endswith(".json") and (cases := read_cases(folder.path / file)) is not None:
            on_unit(name)
            report.lines += check_cases(name, cases)
            for suffix in (".json", ".safetensors"):  # the file, and arrays that it names
                report.ignored.pop(name + suffix, None)
    if not folder.units and not report.lines:
        report.broken[str(path)] = "holds no golden unit"
    for name, base in folder.units.items():
        on_unit(name)
        try:
            with _plain_convolutions():
                report.lines += _check_unit(base, pool)
        except Exception as error:  # a faulty file must not stop the other units
            report.broken[name] = one_line(error)
    return report


def _check_unit(base: Path, pool: _WeightPool) -> list[Line]:
    unit = read_unit(base)
    checks = Checks(unit)
    reason = generate.not_comparable(unit) if unit.kind == "full_generate_texts" else ""
    if reason:
        for name in unit.outputs:
            checks.skip(name, reason)
    else:
        with torch.no_grad():
            if unit.kind in _PARTS:
                _PARTS[unit.kind](unit, checks)
            else:
                _WHOLE[unit.kind](unit, checks, pool.weights_for(unit))
    return checks.finish()


@contextmanager
def _plain_convolutions() -> Iterator[None]:
    """Context with PyTorch's own convolutions in place of oneDNN's.

    oneDNN's sums (Winograd for some shapes) are about four times less exact in fp32. At ReLU and
    max-pooling that suffices to route the gradient of single pixels differently.
    """
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class _WeightPool:
    """Cache of whole models by their `full_forward` unit; holds the last one."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._kept: tuple[str, Weights] | None = None

    def weights_for(self, unit: Unit) -> Weights:
        """The model that `unit` ran with; raises `UnitError` if the folder does not hold it."""
        name = (
            unit.name
            if unit.kind == _FORWARD and unit.name in self._folder.units
            else self._source(unit)
        )
        if self._kept is None or self._kept[0] != name:
            self._kept = None
            self._kept = name, full.load(read_unit(self._folder.units[name]))
        return self._kept[1]

    def _source(self, unit: Unit) -> str:
        """Name of the unit's `full_forward`: the one with the longest suffix that the unit's suffix
        starts with, or the only one."""
        known = [name for name in self._folder.units if kind_of(name) == _FORWARD]
        ending = unit.name.removeprefix(unit.kind)
        own = [name for name in known if ending.startswith(name.removeprefix(_FORWARD))]
        if own:
            return max(own, key=len)
        if len(known) == 1:
            return known[0]
        raise UnitError(
            "its weights are those of full_forward, which is not in this folder",
            fix="give the folder that holds it with --weights",
        )


def one_line(error: Exception) -> str:
    """Format an error on one line: our own errors as they are, others with their type."""
    if isinstance(error, ValidationError):
        return f"its configuration cannot be: {first_flaw(error)}"
    text = " ".join(str(error).split())
    return text if isinstance(error, MmiError) else f"{type(error).__name__}: {text}"
