"""Import of TensorRT and TensorRT-RTX, and one interface to both: engines, contexts, error lines.

The two differ in their module's name and in how a context is made: RTX compiles kernels at their
first use, and keeps them in a cache between runs of the program.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import mmap
import sys
import tempfile
from pathlib import Path
from typing import Any

from mmi_deploy.errors import EngineError
from mmi_deploy.spec.backends import BACKENDS, TENSORRT, TENSORRT_RTX
from mmi_deploy.system.files import write_file

# Python module -> command that installs it. TensorRT's lean runtime runs engines and builds none.
INSTALL = {row.module: f"pip install {row.package}" for row in BACKENDS.values() if row.on_gpu} | {
    "tensorrt_lean_bindings": "pip install tensorrt-lean-cu13-libs tensorrt-lean-cu13-bindings",
}

_KEPT_LINES = 20


def import_tensorrt(module: str) -> Any:
    """Import `module`, one of `INSTALL`, so that it can parse graphs with plugins.

    TensorRT-RTX must be imported by this function: its parser opens `libtensorrt_rtx.so` for a
    plugin, the wheel has only `libtensorrt_rtx.so.1`, and the process would be aborted. Raises
    `EngineError` where the module is not installed, or RTX was imported in another way.
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
    """Open RTX's libraries through a folder of links that also has their unversioned names.

    The libraries look for one another beside themselves (their run path is $ORIGIN), which is then
    that folder; the wheel opens the same files later and gets the copies that are open.
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
    # The builder's library goes first: the parser's looks for it.
    for library in sorted(libraries, key=lambda library: "parser" in library.name):
        ctypes.CDLL(str(folder / library.name))


class TensorRt:
    """One of the two, with its logger and our plugin."""

    def __init__(
        self, module: Any, runtime: str, plugin: Path | None = None, cache: Path | None = None
    ) -> None:
        """plugin: our library (`mmi plugins build tensorrt`), for engines that need it. cache: the
        folder of RTX's compiled kernels; None keeps none. Raises `EngineError`."""
        self.module, self.runtime_name = module, runtime
        self.version = str(module.__version__)
        self.errors: list[str] = []
        self._logger = _logger(module, self.errors)
        self._cache = cache
        self._runtime = module.Runtime(self._logger)
        if self.errors:
            # An empty shell, as without a driver: it would crash when it is used or deleted.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._runtime))
            raise EngineError(f"{module.__name__} {self.version} cannot start{self.reason()}")
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
        """The engine in the file `path`; its weights go to the GPU. `fix`: the command that
        builds it. Raises `EngineError`."""
        self.errors.clear()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(
                f"{self.module.__name__} {self.version} cannot load {path}{self.reason()}",
                fix=self._fix(fix),
            )
        return engine

    def context(self, engine: Any, cache_name: str) -> tuple[Any, Any]:
        """A context whose scratch memory comes from us, and RTX's cache of kernels or None."""
        self.errors.clear()
        ours = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        cache = None
        if self.runtime_name == TENSORRT:
            context = engine.create_execution_context(ours)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(ours)
            cache = config.create_runtime_cache()
            if (file := self._cache_file(cache_name)) and file.is_file():
                cache.deserialize(file.read_bytes())  # what is of no use here is left out
            config.set_runtime_cache(cache)
            context = engine.create_execution_context(config)
        if context is None:
            raise EngineError(f"no context for {cache_name}{self.reason()}")
        return context, cache

    def save(self, cache: Any, cache_name: str) -> None:
        """Keep RTX's compiled kernels for the next time, where there is room for them."""
        file = self._cache_file(cache_name)
        if cache is None or file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, bytes(cache.serialize()))
        except OSError:
            return  # a cache: without it they are compiled again

    def may_record(self, context: Any, stream: int) -> bool:
        """Whether a run may be recorded as a CUDA graph now: RTX may still be compiling."""
        return self.runtime_name == TENSORRT or context.is_stream_capturable(stream)

    def reason(self) -> str:
        """What was logged as an error since the last call, as the end of a sentence, or ""."""
        return "".join(f": {line}" for line in self.errors[:1])

    def _cache_file(self, name: str) -> Path | None:
        return self._cache and self._cache / f"{name}-{self.version}.cache"

    def _fix(self, fix: str) -> str:
        said = " ".join(self.errors).lower()
        if "plugin" in said or "creator" in said:
            return (
                "give it our plugin: build it with `mmi plugins build tensorrt`; it is then found "
                "by itself, or by --kernels FILE"
            )
        if "memory" in said:
            return "keep fewer engines on the GPU with --resident, or build smaller ones: " + fix
        return f"build it again on this machine with `{fix}`"


def _logger(module: Any, errors: list[str]) -> Any:
    """Keeps the first errors since they were last read; TensorRT gives them to nobody else."""
    severities = (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR)

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in severities and len(errors) < _KEPT_LINES:
                errors.append(" ".join(message.split()))

    return Logger()
