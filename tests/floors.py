"""The oldest versions that pyproject.toml declares for the runtime, for `make floors`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
EXTRAS = ("cpu",)


def floors() -> dict[str, str]:
    """Dependency -> its least version, of what `pip install mmi_deploy[cpu]` takes."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    found = {}
    for requirement in [*project["dependencies"], *extras]:
        match = re.match(r"([A-Za-z0-9_-]+)>=([0-9.]+)(,|$)", requirement)
        assert match, f"{requirement} has no least version"
        found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    print(" ".join(f"{name}=={version}" for name, version in floors().items()))
