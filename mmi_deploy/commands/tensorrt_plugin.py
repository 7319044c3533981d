"""The MMFS plugin for `mmi build`: the compiled library where there is one, else the stand-in."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmi_deploy.errors import EngineError

if TYPE_CHECKING:
    import onnx

    from mmi_deploy.build.tensorrt import Plugin


def plugin_for(runtime: str, library: Path | None) -> Plugin:
    """What the builder needs of `mmi_plugins`. library: `--plugin`, or None for the newest that
    `mmi plugins build` made. TensorRT-RTX takes the stand-in where there is none: its engines are
    not run on the machine that builds them. Raises `EngineError` where nothing will do."""
    from mmi_deploy.build.target import TENSORRT
    from mmi_deploy.build.tensorrt import Plugin
    from mmi_deploy.manifest import sha256_of
    from mmi_plugins import tensorrt_stand_in
    from mmi_plugins.tensorrt_graph import check_plugin_layers
    from mmi_plugins.tensorrt_load import import_tensorrt

    if library is not None and not library.is_file():
        raise EngineError(
            f"there is no TensorRT plugin {library}",
            fix="Build it with `mmi plugins build tensorrt`",
        )
    library = library or newest_library()
    if library is None and runtime == TENSORRT:
        raise EngineError(
            "TensorRT needs our plugin, and there is none",
            fix="Build it with `mmi plugins build tensorrt`, or name one with --plugin",
        )
    stand_in = library is None
    source = Path(tensorrt_stand_in.__file__) if library is None else library
    return Plugin(
        identity=f"{'stand-in' if stand_in else source.name}:{sha256_of(source)[:16]}",
        stand_in=stand_in,
        import_tensorrt=import_tensorrt,
        load=_stand_in if library is None else partial(_library, library.resolve()),
        copy=tensorrt_copy,
        check=check_plugin_layers,
    )


def newest_library() -> Path | None:
    """The plugin library that `mmi plugins build tensorrt` made last."""
    from mmi_plugins.onnxruntime_library import cache_folder

    found = [
        path
        for path in (cache_folder() / "tensorrt").glob("libmmi_tensorrt-*.so")
        if path.is_file()
    ]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def tensorrt_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """What TensorRT's parser needs beyond the file, and no other runtime takes."""
    from mmi_plugins.operator import DOMAIN
    from mmi_plugins.tensorrt_graph import with_decomposable_attention, with_plugin

    if any(node.domain == DOMAIN for node in model.graph.node):
        model = with_plugin(model)
    return with_decomposable_attention(model)


def _stand_in(tensorrt: Any) -> Any:
    from mmi_plugins.tensorrt_stand_in import register_stand_in

    return register_stand_in(tensorrt)


def _library(path: Path, tensorrt: Any) -> Any:
    from mmi_plugins.tensorrt_load import load_tensorrt_plugin

    return load_tensorrt_plugin(path, tensorrt)
