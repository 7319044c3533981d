"""The compiled plugin library: load it into TensorRT, TensorRT-RTX or the lean runtime.

`tensorrt`, `tensorrt_rtx` (builds engines without a GPU) and `tensorrt_lean_bindings` (only runs
them) share one plugin interface; every function here takes any of these modules.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.tensorrt.module import import_tensorrt
from mmi_deploy.spec.backends import BACKENDS, TENSORRT, TENSORRT_RTX
from mmi_plugins.compile.checksum import checksum_error
from mmi_plugins.operator import DOMAIN, NAME, VERSION


class PluginLibrary:
    """A plugin library, open in this process and registered with a TensorRT module."""

    def __init__(self, path: Path, library: ctypes.CDLL, registry: Any) -> None:
        self.path, self._library, self._registry = path, library, registry
        self._handle = registry.load_library(str(path.resolve()))

    @property
    def headers(self) -> str:
        """Version of the headers that the library was built with, such as "TensorRT 11.1"."""
        return _headers_of(self._library)

    def last_report(self) -> str:
        """Last error line, or "": TensorRT itself only says that a call failed."""
        line = ctypes.create_string_buffer(1024)
        self._library.mmi_last_report(line, ctypes.c_size_t(len(line)))
        return line.value.decode()

    def unregister(self) -> None:
        """Remove the plugin from the registry, so that another of the same name can be loaded."""
        self._registry.deregister_library(self._handle)


def load_tensorrt_plugin(path: Path, tensorrt: ModuleType | None = None) -> PluginLibrary:
    """Load the library that `mmi plugins build tensorrt` made into a TensorRT module (`tensorrt` by
    default). Raises `EngineError` for a library that is missing, damaged, not this plugin, or built
    for another major version, and where a plugin of that name is registered already."""
    module: Any = import_tensorrt(BACKENDS[TENSORRT].module) if tensorrt is None else tensorrt
    fix = "Build it with `mmi plugins build`"
    if not path.is_file():
        raise EngineError(f"there is no TensorRT plugin {path}", fix=fix)
    if damage := checksum_error(path):
        raise EngineError(f"the TensorRT plugin {path} is damaged: {damage}", fix=fix)
    try:
        library = ctypes.CDLL(str(path.resolve()))
        headers = _headers_of(library)
    except (OSError, AttributeError) as error:
        raise EngineError(f"{path} is not our TensorRT plugin: {error}", fix=fix) from error
    _check_version(path, headers, module)
    if plugin_creator(module) is not None:
        raise EngineError(f"{module.__name__} has a plugin {DOMAIN}::{NAME} already")
    plugin = PluginLibrary(path, library, module.get_plugin_registry())
    if plugin_creator(module) is None:
        raise EngineError(f"{module.__name__} did not take the plugin {path}", fix=fix)
    return plugin


def plugin_creator(tensorrt: Any) -> Any:
    """The operator's creator in a module's plugin registry, whoever registered it, or None."""
    wanted = (NAME, DOMAIN, str(VERSION))
    for creator in tensorrt.get_plugin_registry().all_creators:
        if (creator.name, creator.plugin_namespace, creator.plugin_version) == wanted:
            return creator
    return None


def _headers_of(library: ctypes.CDLL) -> str:
    library.mmi_tensorrt_headers.restype = ctypes.c_char_p
    return str(library.mmi_tensorrt_headers().decode())


def _check_version(path: Path, headers: str, module: Any) -> None:
    """Raise `EngineError` for a library whose headers do not fit the running module.

    TensorRT keeps the plugin interface within a major version. RTX, whose versions are counted
    separately, has the interface of TensorRT 10.12 and later.
    """
    built = re.fullmatch(r"(TensorRT|RTX) (\d+)\.\d+", headers)
    runs_rtx = module.__name__.startswith(BACKENDS[TENSORRT_RTX].module)
    running = ("RTX " if runs_rtx else "TensorRT ") + module.__version__
    major = module.__version__.partition(".")[0]
    if built is not None and runs_rtx and (built[1] == "TensorRT" or built[2] == major):
        return
    if built is None or runs_rtx or built.groups() != ("TensorRT", major):
        raise EngineError(
            f"the plugin {path} was built for another TensorRT",
            expected=running,
            got=headers,
            fix="Build it again: mmi plugins build --tensorrt-include DIR",
        )
