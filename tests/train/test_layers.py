"""Imports between the folders of mmi_train go one way: from the cli down to model, data,
weights."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[2] / "train"

# A folder imports its own layer and those before it, in functions and for types too.
LAYERS = (
    ("model", "data", "data.emoji", "data.readers", "data.synthetic", "weights"),
    (
        "training",
        "training.stages",
        "checkpoint_import",
        "checkpoint_import.published",
        "baseline",
        "evaluation",
        "evaluation.metrics",
        "evaluation.benchmarks",
        "golden",
        "ablation",
    ),
    ("cli",),
)


def folder_of(name: str) -> str | None:
    """Folder of a dotted name as `training.stages`; None outside mmi_train and for its contents."""
    path = TRAIN.joinpath(*name.split("."))
    if path.is_dir():
        folder = path
    elif path.with_suffix(".py").is_file():
        folder = path.parent
    else:
        return None
    return ".".join(folder.relative_to(TRAIN).parts[1:])


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere; `from a import b` counts as `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def folder_imports() -> dict[str, set[str]]:
    """Other folders of mmi_train that the files of each folder import."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in (TRAIN / "mmi_train").rglob("*.py"):
        own = ".".join(path.parent.relative_to(TRAIN).parts[1:])
        folders = {folder_of(name) for name in imported(path) if name.startswith("mmi_train.")}
        found[own] |= {folder for folder in folders if folder and folder != own}
    return {folder: others for folder, others in found.items() if folder}


def test_every_folder_has_a_layer_and_imports_no_higher_one() -> None:
    layer = {folder: height for height, layer in enumerate(LAYERS) for folder in layer}
    imports = folder_imports()
    assert set(imports) == set(layer)
    upward = [(a, b) for a, others in imports.items() for b in others if layer[b] > layer[a]]
    assert not upward


def test_no_circle_of_imports_between_folders() -> None:
    TopologicalSorter(folder_imports()).prepare()  # raises CycleError, which names the folders


def test_rows_do_not_know_the_synthetic_world_nor_stages_the_loop() -> None:
    imports = folder_imports()
    assert "data.synthetic" not in imports["data"]
    assert "training" not in imports["training.stages"]
