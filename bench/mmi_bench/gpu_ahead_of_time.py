"""`mmi build` for TensorRT where no compiler or no headers are: the plugin goes into the engines
ahead of time, as PTX by NVRTC, and they need nothing of ours when they run.

`python -m mmi_bench.gpu_ahead_of_time BUNDLE sm89 fp16`.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from mmi_deploy.build.cache import EngineCache
from mmi_deploy.build.evidence import Evidence
from mmi_deploy.build.precision import recipe
from mmi_deploy.build.target import TENSORRT, Target
from mmi_deploy.build.tensorrt import Plugin, open_tensorrt
from mmi_deploy.build.tensorrt_plan import Request
from mmi_deploy.build.tensorrt_target import build_targets
from mmi_deploy.bundle import Bundle
from mmi_deploy.commands.tensorrt_plugin import tensorrt_copy
from mmi_deploy.errors import MmiError
from mmi_deploy.manifest import sha256_of
from mmi_deploy.runtime.tensorrt_target import AHEAD_OF_TIME
from mmi_plugins import tensorrt_aot
from mmi_plugins.launch_plan import CSRC
from mmi_plugins.tensorrt_graph import check_plugin_layers
from mmi_plugins.tensorrt_load import import_tensorrt


class Registered:
    """The plugin in TensorRT's registry: for as long as the process lives."""

    def last_report(self) -> str:
        return ""

    def unregister(self) -> None:
        return


def plugin(architecture: str) -> Plugin:
    """The plugin for the builder, for GPUs of `architecture` and later ones."""
    number = int(architecture.removeprefix("sm"))
    capability = divmod(number, 10)
    sources = sha256_of(CSRC / "attention.cuh")[:16]
    target = tensorrt_aot.ptx_target(capability)
    return Plugin(
        identity=f"{AHEAD_OF_TIME}-sm{target}:{sources}",
        stand_in=False,
        import_tensorrt=import_tensorrt,
        load=partial(_register, capability),
        copy=tensorrt_copy,
        check=check_plugin_layers,
    )


def _register(capability: tuple[int, int], tensorrt: Any) -> Registered:
    tensorrt_aot.register_ahead_of_time(tensorrt, capability)
    return Registered()


def build(folder: Path, architecture: str, precision: str) -> None:
    """Build the engines of a bundle. Raises `MmiError`."""
    bundle, chosen, cache = Bundle.open(folder), recipe(precision), EngineCache.of_user()
    target, made = Target(TENSORRT, architecture, precision), plugin(architecture)
    trt = open_tensorrt(made, TENSORRT, architecture)
    evidence = Evidence(bundle, cache.folder.parent / "ranges")
    graphs = tuple(bundle.graphs)
    ranges = {name: evidence.ranges(name, chosen, TENSORRT) for name in graphs}
    request = Request(
        bundle, (target,), chosen, graphs, made, trt.__version__, None, ranges, evidence
    )
    build_targets(request, cache, lambda what, done, of, phase: None)


def main() -> None:
    """The program."""
    folder, architecture, precision = sys.argv[1:]
    try:
        build(Path(folder), architecture, precision)
    except MmiError as error:
        print(f"mmi: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
