"""TensorRT and its relatives as Python modules, and our plugin library inside them.

`tensorrt`, `tensorrt_rtx` (builds engines without a GPU) and `tensorrt_lean` (runs them only) share
one plugin interface; every function here takes whichever module is meant.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from mmi_deploy.errors import EngineError
from mmi_plugins.compile.checksum import checksum_error
from mmi_plugins.operator import DOMAIN, NAME, VERSION

INSTALL = {
    "tensorrt": "pip install tensorrt",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
    "tensorrt_lean_bindings": "pip install tensorrt-lean-cu13-libs tensorrt-lean-cu13-bindings",
}
_RTX = "tensorrt_rtx"


def import_tensorrt(name: str) -> Any:
    """The module `name`, one of `INSTALL`, ready to parse graphs with plugins.

    TensorRT-RTX must be imported by this function: its parser asks for `libtensorrt_rtx.so` when it
    meets a plugin, the wheel has only `libtensorrt_rtx.so.1`, and the process would be aborted.
    Raises `EngineError` where it is not installed, or RTX was imported without this.
    """
    if name == _RTX:
        _give_rtx_its_name()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EngineError(f"{name} cannot be imported: {error}", fix=INSTALL[name]) from error


_rtx_links: tempfile.TemporaryDirectory[str] | None = None


def _give_rtx_its_name() -> None:
    """Open RTX's libraries in a folder of links that holds the unversioned names too.

    They look for one another beside themselves (their run path is $ORIGIN), which is then that
    folder; the wheel opens the same files later and gets the copies that are open.
    """
    global _rtx_links
    found = importlib.util.find_spec(f"{_RTX}_libs")
    if _rtx_links is not None or found is None or not found.submodule_search_locations:
        return
    if _RTX in sys.modules:
        raise EngineError(
            f"{_RTX} was imported already",
            fix=f'Import it with mmi_plugins.tensorrt.plugin_library.import_tensorrt("{_RTX}")',
        )
    libraries = sorted(Path(found.submodule_search_locations[0]).glob("lib*.so.*"))
    _rtx_links = tempfile.TemporaryDirectory(prefix="mmi-rtx-")
    atexit.register(_rtx_links.cleanup)
    folder = Path(_rtx_links.name)
    for library in libraries:
        for link in (library.name, library.name.partition(".so")[0] + ".so"):
            (folder / link).symlink_to(library)
    # The builder's library first: the parser's asks for it.
    for library in sorted(libraries, key=lambda library: "parser" in library.name):
        ctypes.CDLL(str(folder / library.name))


class PluginLibrary:
    """Our library, open in this process and known to a TensorRT module's plugin registry."""

    def __init__(self, path: Path, library: ctypes.CDLL, registry: Any) -> None:
        self.path, self._library, self._registry = path, library, registry
        self._handle = registry.load_library(str(path.resolve()))

    @property
    def headers(self) -> str:
        """Against what it was built: "TensorRT 11.1"."""
        return _headers_of(self._library)

    def last_report(self) -> str:
        """The last error line of the plugin, or "": TensorRT itself says only that a call
        failed."""
        line = ctypes.create_string_buffer(1024)
        self._library.mmi_last_report(line, ctypes.c_size_t(len(line)))
        return line.value.decode()

    def unregister(self) -> None:
        """Make room for another plugin of the same name."""
        self._registry.deregister_library(self._handle)


def load_tensorrt_plugin(path: Path, tensorrt: ModuleType | None = None) -> PluginLibrary:
    """Load the library that `mmi plugins build` made into a TensorRT module (`tensorrt` itself by
    default). Raises `EngineError` where it is missing, of another kind or built for a TensorRT
    with another major version, or where a plugin of that name is known already."""
    module: Any = import_tensorrt("tensorrt") if tensorrt is None else tensorrt
    mend = "Build it with `mmi plugins build`"
    if not path.is_file():
        raise EngineError(f"there is no TensorRT plugin {path}", fix=mend)
    if harm := checksum_error(path):
        raise EngineError(f"the TensorRT plugin {path} is damaged: {harm}", fix=mend)
    try:
        library = ctypes.CDLL(str(path.resolve()))
        headers = _headers_of(library)
    except (OSError, AttributeError) as error:
        raise EngineError(f"{path} is no TensorRT plugin of ours: {error}", fix=mend) from error
    _check_version(path, headers, module)
    if plugin_creator(module) is not None:
        raise EngineError(f"{module.__name__} has a plugin {DOMAIN}::{NAME} already")
    plugin = PluginLibrary(path, library, module.get_plugin_registry())
    if plugin_creator(module) is None:
        raise EngineError(f"{module.__name__} did not take the plugin {path}", fix=mend)
    return plugin


def plugin_creator(tensorrt: Any) -> Any:
    """The creator of the operator in a module's registry, from whatever registered it, or None."""
    wanted = (NAME, DOMAIN, str(VERSION))
    for creator in tensorrt.get_plugin_registry().all_creators:
        if (creator.name, creator.plugin_namespace, creator.plugin_version) == wanted:
            return creator
    return None


def _headers_of(library: ctypes.CDLL) -> str:
    library.mmi_tensorrt_headers.restype = ctypes.c_char_p
    return str(library.mmi_tensorrt_headers().decode())


def _check_version(path: Path, headers: str, module: Any) -> None:
    """TensorRT keeps the interface within a major version. RTX, which counts on its own, has the
    interface of TensorRT 10.12 and later."""
    built = re.fullmatch(r"(TensorRT|RTX) (\d+)\.\d+", headers)
    runs_rtx = module.__name__.startswith(_RTX)
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
