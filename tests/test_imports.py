"""Imports go one way: the order of folders, and the libraries that each may use."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOTS = {
    "mmi_deploy": ".",
    "mmi_plugins": "plugins",
    "mmi_emulator": "plugins",
    "mmi_train": "train",
    "mmi_export": "export",
    "mmi_bench": "bench",
}

# From the bottom to the top: a file imports from its own folder and from those above it in this
# list, nothing else. A module that lies loose at the top of a package counts as a folder. Imports
# inside functions and for types alone count like all others, so no two folders import each other.
ORDER = """
    mmi_deploy.errors
    mmi_deploy.parity
    mmi_deploy.system
    mmi_deploy.spec
    mmi_deploy.documents
    mmi_deploy.bundle
    mmi_deploy.runtime
    mmi_deploy.runtime.onnxruntime
    mmi_deploy.runtime.tensorrt
    mmi_deploy.batching
    mmi_deploy.server
    mmi_deploy.server.api
    mmi_deploy.server.engine
    mmi_deploy.server.ray
    mmi_deploy.server.http
    mmi_deploy.server.triton
    mmi_deploy.targets.precision
    mmi_deploy.targets
    mmi_deploy.targets.polygraphy
    mmi_deploy.analysis
    mmi_deploy.hub
    mmi_deploy.cli
    mmi_deploy.cli.inspect
    mmi_deploy.__main__
    mmi_deploy
    mmi_plugins.constants
    mmi_plugins.operator
    mmi_plugins.reference
    mmi_plugins.onnx_function
    mmi_plugins.compile
    mmi_plugins.gemv
    mmi_plugins.torch
    mmi_plugins.onnxruntime
    mmi_plugins.tensorrt
    mmi_plugins.library
    mmi_plugins.conformance
    mmi_plugins.cli
    mmi_plugins.check
    mmi_plugins.budget
    mmi_plugins
    mmi_emulator.ptx
    mmi_emulator.mutants
    mmi_emulator.emulator
    mmi_emulator.shim
    mmi_emulator.gemv
    mmi_emulator.ptx_budget
    mmi_emulator.cuda_provider
    mmi_emulator.gemv_budget
    mmi_emulator
    mmi_train.model
    mmi_train.weights
    mmi_train.data
    mmi_train.data.synthetic
    mmi_train.data.emoji
    mmi_train.data.readers
    mmi_train.training.stages
    mmi_train.training
    mmi_train.checkpoint_import.published
    mmi_train.checkpoint_import
    mmi_train.baseline
    mmi_train.evaluation.metrics
    mmi_train.evaluation.benchmarks
    mmi_train.evaluation
    mmi_train.ablation
    mmi_train.golden
    mmi_train.cli
    mmi_train
    mmi_export.schedules
    mmi_export.tracing
    mmi_export.graphs
    mmi_export.parity
    mmi_export.preview_map
    mmi_export.tokenizer_files
    mmi_export.placeholder_model
    mmi_export.plan
    mmi_export.export
    mmi_export.release
    mmi_export.cli
    mmi_export
    mmi_bench.machine
    mmi_bench.statistics
    mmi_bench.runs
    mmi_bench.emulated_precision
    mmi_bench.compare
    mmi_bench.batch
    mmi_bench.decode
    mmi_bench.kernel
    mmi_bench.graph
    mmi_bench.scale
    mmi_bench.quality
    mmi_bench.flops_saved
    mmi_bench.text_divergence
    mmi_bench.training
    mmi_bench.paper_small
    mmi_bench.gpu_train_check
    mmi_bench.plan_lint
    mmi_bench.gpu_check
    mmi_bench.serve
    mmi_bench.cli
    mmi_bench
""".split()

TORCH = {"torch", "diffusers", "transformers", "tensorboard"}
ONNX = {"onnx", "onnxscript", "onnx_ir"}

# Folder -> libraries that no file of it may import, not even inside a function. The longest prefix
# counts. Building and analysing graphs takes ONNX; an installation with the extra `build` has it.
FORBIDDEN = {
    "mmi_deploy": TORCH | ONNX,
    "mmi_deploy.runtime.onnxruntime": TORCH,
    "mmi_deploy.targets": TORCH,
    "mmi_deploy.analysis": TORCH,
    "mmi_deploy.cli": TORCH | ONNX,
    "mmi_plugins": {"diffusers", "transformers"},
    "mmi_emulator": TORCH | ONNX,
    "mmi_train": ONNX,
    "mmi_export": set(),
    "mmi_bench": set(),
}


def modules(package: str) -> dict[str, Path]:
    """Every module of `package` by dotted name."""
    root = REPOSITORY / ROOTS[package]
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {name: path for package in ROOTS for name, path in modules(package).items()}


def folder_of(module: str) -> str:
    """The entry of `ORDER` that a module belongs to."""
    package, _, rest = module.partition(".")
    path = MODULES[module]
    if path.name == "__init__.py":
        return module
    folder = module.rpartition(".")[0]
    return module if folder == package and rest else folder


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a syntax tree imports, whether in a function, for types, or at the top."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide who imports whom"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_in(name: str) -> str | None:
    """The module of this repository that an imported name is, or lies in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def test_every_folder_has_its_place_in_the_order() -> None:
    assert {folder_of(module) for module in MODULES} <= set(ORDER)
    assert len(set(ORDER)) == len(ORDER)
    assert set(ORDER) <= {folder_of(module) for module in MODULES}, "an entry without files"


@pytest.mark.parametrize("package", ROOTS)
def test_imports_go_one_way(package: str) -> None:
    place = {folder: number for number, folder in enumerate(ORDER)}
    wrong = []
    for module, path in modules(package).items():
        for name in imports(ast.parse(path.read_text())):
            target = module_in(name)
            if target and place[folder_of(target)] > place[folder_of(module)]:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ROOTS)
def test_no_file_imports_a_library_that_its_folder_does_without(package: str) -> None:
    wrong = []
    for module, path in modules(package).items():
        folder = max((f for f in FORBIDDEN if f"{module}.".startswith(f"{f}.")), key=len)
        used = {name.partition(".")[0] for name in imports(ast.parse(path.read_text()))}
        wrong += [f"{module} imports {library}" for library in used & FORBIDDEN[folder]]
    assert not wrong, "\n".join(wrong)


def test_model_code_knows_neither_data_nor_training_nor_export() -> None:
    """The model imports its own parts and `mmi_deploy` alone."""
    for module, path in modules("mmi_train").items():
        if module.startswith("mmi_train.model"):
            used = {name for name in imports(ast.parse(path.read_text())) if module_in(name)}
            assert all(n.startswith(("mmi_train.model", "mmi_deploy")) for n in used), module


@pytest.mark.parametrize("package", ROOTS)
def test_onnx_runtime_is_imported_where_its_telemetry_is_switched_off(package: str) -> None:
    importers = {
        name
        for name, path in modules(package).items()
        if any(n.partition(".")[0] == "onnxruntime" for n in imports(ast.parse(path.read_text())))
    }
    assert importers == (
        {"mmi_deploy.runtime.onnxruntime.module"} if package == "mmi_deploy" else set()
    )


def test_importing_the_runtime_loads_neither_torch_nor_the_other_packages() -> None:
    """In a fresh process, every module of mmi_deploy together, the command line included."""
    names = [
        name
        for name in modules("mmi_deploy")
        if not name.startswith(("mmi_deploy.targets", "mmi_deploy.analysis"))
        and name
        not in (
            "mmi_deploy.__main__",
            "mmi_deploy.runtime.onnxruntime.run_graph",
            "mmi_deploy.server.ray.affinity_router",  # Ray alone imports it
        )
    ]
    heavy = TORCH | ONNX | set(ROOTS) - {"mmi_deploy"}
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    path = os.pathsep.join(str(REPOSITORY / root) for root in ROOTS.values())
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
