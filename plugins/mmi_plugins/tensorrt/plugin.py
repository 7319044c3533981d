"""MMFS plugin for `mmi build`: a compiled library, ahead of time, or build-only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmi_deploy.bundle.manifest import file_entries, hash_of_files, sha256_of
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.spec.backends import AUTO
from mmi_deploy.system.files import cache_folder

if TYPE_CHECKING:
    import onnx

    from mmi_deploy.targets.tensorrt_build import Plugin

_COMPILE = "compile the plugin with `mmi plugins build tensorrt`"


def plugin_for(runtime: str, architecture: str, choice: str = AUTO) -> Plugin:
    """The plugin for engines of `runtime` on `architecture`.

    choice: a library; `ahead-of-time`, for TensorRT alone; or `auto`, the newest library that
    `mmi plugins build` made. Without a library, TensorRT takes the plugin ahead of time, and
    TensorRT-RTX the build-only plugin, whose engines prove that the graph compiles but cannot run.
    Raises `EngineError` where no plugin is available, `ConfigError` for a choice that the runtime
    does not have.
    """
    from mmi_deploy.runtime.tensorrt.backend import AHEAD_OF_TIME
    from mmi_deploy.spec.backends import TENSORRT

    if choice == AHEAD_OF_TIME:
        return _ahead_of_time(runtime, architecture)
    library = newest_library() if choice == AUTO else Path(choice)
    if library is None:
        return _ahead_of_time(runtime, architecture) if runtime == TENSORRT else _build_only()
    if not library.is_file():
        raise EngineError(f"there is no TensorRT plugin {library}", fix=_COMPILE)
    load = partial(_load_library, library.resolve())
    return _plugin(library.name, sha256_of(library), load)


def newest_library() -> Path | None:
    """The newest plugin library that `mmi plugins build tensorrt` made, or None."""
    try:
        libraries = (cache_folder() / "tensorrt").glob("libmmi_tensorrt-*.so")
    except ConfigError:  # no home folder, so none was kept in it
        return None
    found = [path for path in libraries if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def tensorrt_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """TensorRT's own copy of a graph: plugin namespaces, and Attention that it may decompose."""
    from mmi_plugins.operator import DOMAIN, NAME
    from mmi_plugins.tensorrt.graph import with_decomposable_attention, with_plugin

    if any((node.domain, node.op_type) == (DOMAIN, NAME) for node in model.graph.node):
        model = with_plugin(model)
    return with_decomposable_attention(model)


def _build_only() -> Plugin:
    from mmi_deploy.runtime.tensorrt.backend import BUILD_ONLY
    from mmi_plugins.tensorrt import build_only_plugin

    version = sha256_of(Path(build_only_plugin.__file__))
    return _plugin(BUILD_ONLY, version, _load_build_only, build_only=True)


def _ahead_of_time(runtime: str, architecture: str) -> Plugin:
    from mmi_deploy.runtime.tensorrt.backend import AHEAD_OF_TIME
    from mmi_deploy.spec.backends import TENSORRT
    from mmi_plugins.compile import nvrtc
    from mmi_plugins.constants import CSRC
    from mmi_plugins.tensorrt import ahead_of_time

    if runtime != TENSORRT:
        raise ConfigError(f"{runtime} does not take the plugin ahead of time", fix=_COMPILE)
    if missing := nvrtc.missing():
        raise EngineError(
            f"TensorRT needs our plugin: there is no library, and {missing}",
            fix=f"{_COMPILE}, or install NVRTC: then it goes into the engines ahead of time",
        )
    capability = divmod(int(architecture.removeprefix("sm")), 10)
    name = f"{AHEAD_OF_TIME}-sm{ahead_of_time.ptx_target(capability)}"
    version = hash_of_files(file_entries(CSRC))
    return _plugin(name, version, partial(_load_ahead_of_time, capability))


def _plugin(
    name: str, version: str, load: Callable[[Any], Any], *, build_only: bool = False
) -> Plugin:
    from mmi_deploy.runtime.tensorrt.module import import_tensorrt
    from mmi_deploy.targets.tensorrt_build import Plugin
    from mmi_plugins.tensorrt.graph import check_plugin_layers
    from mmi_plugins.tensorrt.weight_only import weight_only_products

    return Plugin(
        identity=f"{name}:{version[:16]}",
        build_only=build_only,
        import_tensorrt=import_tensorrt,
        load=load,
        copy=tensorrt_copy,
        check=check_plugin_layers,
        products=weight_only_products,
    )


def _load_library(path: Path, tensorrt: Any) -> Any:
    from mmi_plugins.tensorrt.plugin_library import load_tensorrt_plugin

    return load_tensorrt_plugin(path, tensorrt)


def _load_build_only(tensorrt: Any) -> Any:
    from mmi_plugins.tensorrt.build_only_plugin import register_build_only_plugin

    return register_build_only_plugin(tensorrt)


def _load_ahead_of_time(capability: tuple[int, int], tensorrt: Any) -> Any:
    from mmi_plugins.tensorrt.ahead_of_time import register_ahead_of_time

    return register_ahead_of_time(tensorrt, capability)
