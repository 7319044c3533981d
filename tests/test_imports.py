"""Who may import whom: the runtime installs without torch; model code knows nothing of export."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOTS = {
    "mmi_deploy": ".",
    "mmi_export": "export",
    "mmi_train": "train",
    "mmi_bench": "bench",
    "mmi_plugins": "plugins",
}
TRAINING = {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "tensorboard"}

FORBIDDEN = {
    "mmi_deploy": {"mmi_export", "mmi_train", "mmi_bench", "mmi_plugins", *TRAINING},
    "mmi_train": {"mmi_export", "mmi_bench", "onnx", "onnxscript", "onnx_ir"},
    "mmi_export": {"mmi_bench"},
    "mmi_bench": set(),
    "mmi_plugins": {"mmi_train", "mmi_bench", "diffusers", "transformers"},
}
"""Top-level modules that no module of a package may import, not even inside a function."""

BUILD = "mmi_deploy.targets"
"""What makes engines out of ONNX files reads and writes those: an installation with the extra
`build`."""

LAZY = "mmi_deploy.cli"
"""The commands of the command line: they alone reach into the other packages, when called."""


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str) -> dict[str, Path]:
    """Every module of `package` by dotted name."""
    root = REPOSITORY / ROOTS[package]
    return {module_name(path, root): path for path in sorted((root / package).rglob("*.py"))}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that a syntax tree imports; `from a import b` counts as `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide who imports whom"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def module_level(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and `if TYPE_CHECKING:` blocks."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            if "TYPE_CHECKING" in ast.unparse(node.test):
                return None
            return self.generic_visit(node)

    return Strip().visit(tree)


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", ROOTS)
def test_no_package_imports_what_it_must_not_know(package: str) -> None:
    for name, path in modules(package).items():
        tree = ast.parse(path.read_text())
        found = imports(module_level(tree) if name.startswith(LAZY) else tree)
        allowed = {"onnx", "onnx_ir"} if name.startswith(BUILD) else set()
        assert not tops(found) & (FORBIDDEN[package] - allowed), name


def test_model_code_knows_neither_data_nor_loop_nor_export() -> None:
    """Of our own packages the model knows its parts, its losses and the configuration."""
    known = ("mmi_train.model", "mmi_train.model.losses", "mmi_deploy")
    for name, path in modules("mmi_train").items():
        if name.startswith("mmi_train.model"):
            ours = {n for n in imports(ast.parse(path.read_text())) if n.startswith("mmi_")}
            assert {n for n in ours if not n.startswith(known)} <= {"mmi_train"}, name


def test_graphs_know_neither_runtime_nor_build() -> None:
    """Inside mmi_deploy the contract is below the runtime, never the reverse."""
    below = ("config", "presets", "graphs", "errors", "layout", "document", "images", "manifest")
    for name, path in modules("mmi_deploy").items():
        if name.removeprefix("mmi_deploy.") in below:
            found = imports(ast.parse(path.read_text()))
            above = (
                "mmi_deploy.runtime",
                "mmi_deploy.targets",
                "mmi_deploy.serve",
                "mmi_deploy.cli.app",
            )
            assert not [n for n in found if n.startswith(above)], name


def test_importing_the_runtime_loads_neither_torch_nor_the_other_packages() -> None:
    """In a fresh process, every module of mmi_deploy together, the command line included."""
    names = [name for name in modules("mmi_deploy") if not name.startswith((LAZY, BUILD))]
    heavy = TRAINING | set(ROOTS) - {"mmi_deploy"}
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
