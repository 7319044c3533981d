"""Import of TensorRT and TensorRT-RTX, and one interface to both: engines, contexts, errors.

They differ in the module's name and in the creation of contexts: RTX compiles kernels at first use
(just in time), and this module keeps them in a cache file between runs of the program.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import logging
import mmap
import sys
import tempfile
from pathlib import Path
from typing import Any

from mmi_deploy.errors import EngineError
from mmi_deploy.spec.backends import BACKENDS, TENSORRT, TENSORRT_RTX
from mmi_deploy.system.files import write_file

log = logging.getLogger(__name__)

# Python module -> command that installs it. TensorRT's lean runtime runs engines and builds none.
INSTALL = {row.module: f"pip install {row.package}" for row in BACKENDS.values() if row.plugin} | {
    "tensorrt_lean_bindings": "pip install tensorrt-lean-cu13-libs tensorrt-lean-cu13-bindings",
}

# In the error line of a TensorRT runtime that was not created. Its object is invalid, and TensorRT
# crashes when it is used. Other error lines at the start are about what it does without, such as a
# library that it may load.
_NOT_CREATED = ("createInferRuntime", "CUDA initialization failure", "checkCudaInstallation")

# Most errors that the logger keeps.
_KEPT_LINES = 20


def import_tensorrt(module: str) -> Any:
    """Import `module`, one of `INSTALL`, so that it can parse graphs with plugins.

    TensorRT-RTX must be imported by this function: for a plugin, its parser opens
    `libtensorrt_rtx.so`, but the wheel has only `libtensorrt_rtx.so.1`, and the process would
    abort. Raises `EngineError` if the module is not installed, or RTX was imported otherwise.
    """
    if module == BACKENDS[TENSORRT_RTX].module:
        _link_rtx_libraries()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EngineError(
            f"{module} cannot be imported: {error}", fix=f"install it with: {INSTALL[module]}"
        ) from error


_rtx_links: tempfile.TemporaryDirectory[str] | None = None


def _link_rtx_libraries() -> None:
    """Load RTX's libraries through a folder of symbolic links that adds their unversioned names.

    The libraries search one another in their own folder (RUNPATH $ORIGIN), which is then that
    folder. When the wheel loads the same files later, it gets the libraries that are loaded.
    """
    global _rtx_links
    name = BACKENDS[TENSORRT_RTX].module
    found = importlib.util.find_spec(f"{name}_libs")
    if _rtx_links is not None or found is None or not found.submodule_search_locations:
        return
    if name in sys.modules:
        raise EngineError(
            f"{name} was imported already",
            fix=f'import it with mmi_deploy.runtime.tensorrt.module.import_tensorrt("{name}")',
        )
    libraries = sorted(Path(found.submodule_search_locations[0]).glob("lib*.so.*"))
    _rtx_links = tempfile.TemporaryDirectory(prefix="mmi-rtx-")
    atexit.register(_rtx_links.cleanup)
    folder = Path(_rtx_links.name)
    for library in libraries:
        for link in (library.name, library.name.partition(".so")[0] + ".so"):
            (folder / link).symlink_to(library)
    # The core library before the parser's, which depends on it.
    for library in sorted(libraries, key=lambda library: "parser" in library.name):
        ctypes.CDLL(str(folder / library.name))


class TensorRt:
    """TensorRT or TensorRT-RTX, with its logger and our plugin."""

    def __init__(
        self, module: Any, runtime: str, plugin: Path | None = None, cache: Path | None = None
    ) -> None:
        """plugin: our plugin library (`mmi plugins build tensorrt`), for engines that need it.
        cache: folder of RTX's compiled kernels; None disables the cache. Raises `EngineError`."""
        self.module, self.runtime_name = module, runtime
        self.version = str(module.__version__)
        self.errors: list[str] = []
        self._logger = _logger(module, self.errors)
        self._cache = cache
        self._runtime = module.Runtime(self._logger)
        if any(words in line for line in self.errors for words in _NOT_CREATED):
            # Its destructor would crash: the extra reference keeps it from ever being deleted.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._runtime))
            raise EngineError(f"{module.__name__} {self.version} cannot start{self.reason()}")
        for line in self.errors:
            log.warning("%s at its start: %s", module.__name__, line)
        if plugin is not None:
            self._load_plugin(plugin)

    def _load_plugin(self, plugin: Path) -> None:
        registry = self.module.get_plugin_registry()
        if not plugin.is_file() or registry.load_library(str(plugin.resolve())) is None:
            raise EngineError(
                f"{self.module.__name__} cannot load the plugin {plugin}{self.reason()}",
                fix="build it for this TensorRT with `mmi plugins build tensorrt`",
            )

    def load(self, path: Path, fix: str) -> Any:
        """Deserialise the engine file `path`; its weights are copied to the GPU. fix: command that
        builds it. Raises `EngineError`."""
        self.errors.clear()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(
                f"{self.module.__name__} {self.version} cannot load {path}{self.reason()}",
                fix=self._load_fix(fix),
            )
        return engine

    def context(self, engine: Any, cache_name: str, cache: Any = None) -> tuple[Any, Any]:
        """Create an execution context whose workspace the caller sets; returns it and RTX's kernel
        cache, or None. cache: that of the engine's other contexts, which it then shares; without
        one it is read from the cache folder."""
        self.errors.clear()
        ours = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.runtime_name == TENSORRT:
            context = engine.create_execution_context(ours)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(ours)
            # By default RTX runs new shapes with slow kernels and compiles theirs in the
            # background: a recording made meanwhile would keep the slow ones for its life.
            eager = self.module.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            if cache is None:
                cache = config.create_runtime_cache()
                if (file := self._cache_file(cache_name)) and file.is_file():
                    cache.deserialize(file.read_bytes())  # kernels of another GPU are ignored
            config.set_runtime_cache(cache)
            context = engine.create_execution_context(config)
        if context is None:
            raise EngineError(f"no context for {cache_name}{self.reason()}")
        return context, cache

    def save(self, cache: Any, cache_name: str) -> None:
        """Write RTX's compiled kernels to the cache folder, if it can be written to."""
        file = self._cache_file(cache_name)
        if cache is None or file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, bytes(cache.serialize()))
        except OSError:
            return  # without the cache, the kernels are compiled again

    def may_record(self, context: Any, stream: int) -> bool:
        """True if a run can be captured as a CUDA graph now. RTX cannot be captured while it
        compiles kernels."""
        return self.runtime_name == TENSORRT or context.is_stream_capturable(stream)

    def reason(self) -> str:
        """First error that TensorRT logged since `errors` was cleared, as ": error", or ""."""
        return "".join(f": {line}" for line in self.errors[:1])

    def _cache_file(self, name: str) -> Path | None:
        return self._cache and self._cache / f"{name}-{self.version}.cache"

    def _load_fix(self, fix: str) -> str:
        """Fix of a failed load by its logged errors; `fix`, the command that builds, by default."""
        logged = " ".join(self.errors).lower()
        if "plugin" in logged or "creator" in logged:
            return (
                "build our plugin with `mmi plugins build tensorrt` (it is then found by default), "
                "or give its library with --kernels FILE"
            )
        if "memory" in logged:
            return "keep fewer engines on the GPU with --resident, or build smaller ones: " + fix
        return f"build it again on this machine with `{fix}`"


def _logger(module: Any, errors: list[str]) -> Any:
    """Make a logger that collects errors in `errors`: TensorRT's calls only return None or False,
    and the reason is logged."""
    severities = (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR)

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in severities and len(errors) < _KEPT_LINES:
                errors.append(" ".join(message.split()))

    return Logger()
