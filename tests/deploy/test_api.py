"""The public API: complete, typed, and cheap to import."""

from __future__ import annotations

import subprocess
import sys
import typing
from importlib.metadata import version

import mmi_deploy

HEAVY = {"numpy", "torch", "onnxruntime", "onnx", "PIL", "tokenizers", "pydantic", "rich", "typer"}


def test_every_name_is_what_its_module_defines() -> None:
    for name, entry_point in mmi_deploy._ENTRY_POINTS.items():
        assert getattr(mmi_deploy, name) is not None, entry_point
    assert {*mmi_deploy._ENTRY_POINTS, "__version__"} == set(mmi_deploy.__all__)
    assert mmi_deploy.__version__ == version("mmi_deploy")
    assert set(mmi_deploy.__all__) <= set(dir(mmi_deploy))


def test_every_kind_of_event_and_of_part_is_exported() -> None:
    for union in (mmi_deploy.Event, mmi_deploy.Part):
        assert {kind.__name__ for kind in typing.get_args(union)} <= set(mmi_deploy.__all__)


def test_importing_it_loads_nothing_else() -> None:
    code = f"import sys, mmi_deploy; print(sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_generating_needs_no_torch() -> None:
    code = (
        "import sys; from mmi_deploy import Runtime, generate, document_of; "
        "print(sorted({'torch', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
