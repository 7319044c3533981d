"""ONNX Runtime's CUDA provider on a machine without a GPU: which nodes does it place on the GPU?

    pip download onnxruntime-gpu --no-deps -d DIR
    python -m mmi_emulator.cuda_provider DIR/onnxruntime_gpu-*.whl

The provider's library is loaded beside libraries under the names of CUDA's that compute nothing
(csrc/no_gpu.c). Kernel registry, placement, I/O binding, streams and CUDA graphs are then the
provider's own; numbers are not. The command writes its kernel registry for
`mmi_deploy.targets.placement`. Requires gcc and binutils' nm, on x86-64 Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SOURCE = Path(__file__).with_name("csrc") / "no_gpu.c"
OUT = "mmi_deploy/targets/cuda_kernels.json"

PROVIDER = "CUDAExecutionProvider"

# Operator sets of the graphs. Kernels of earlier operators alone are left out of the registry.
DOMAINS = ("", "com.microsoft")
OPSET = 24

# ONNX Runtime's value for "all later versions".
_OPEN = 2**31 - 1

# Libraries beside CUDA's runtime that the provider is linked with, or opens itself.
_LIBRARIES = {
    "libcudart.so.13": "libcudart.so.13",
    "libcublas.so.13": "libcublas.so.13",
    "libcublasLt.so.13": "libcublasLt.so.13",
    "libcuda.so.1": "",
    "libcurand.so.10": "",
    "libcudnn.so.9": "libcudnn.so.9",
    "libnvinfer.so.10": "",
    "libnvonnxparser.so.10": "",
}

# Functions that give a handle through their first argument.
_HANDLES = (
    "cublasCreate_v2",
    "cublasLtCreate",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixTransformDescCreate",
    "cudnnCreate",
)

# Functions of TensorRT, whose provider is asked for its kernels too; it is linked without versions.
_TENSORRT = ("createInfer", "createNvOnnx", "getInferLibVersion", "getPluginRegistry", "__gcov_")


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack a wheel of onnxruntime-gpu, so that `folder` can be put on the Python path."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def build_libraries(package: Path, folder: Path) -> None:
    """Compile the libraries into `folder`. package: the folder of the unpacked wheel."""
    capi = package / "onnxruntime" / "capi"
    functions: dict[str, set[str]] = {version: set() for version in _LIBRARIES.values()}
    for name in ("cuda", "tensorrt"):
        library = capi / f"libonnxruntime_providers_{name}.so"
        command = ["nm", "-D", "--undefined-only", str(library)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for line in lines.splitlines():
            function, _, version = line.split()[-1].partition("@")
            if version in functions and (version or function.startswith(("cu", *_TENSORRT))):
                functions[version].add(function)
    runtime = SOURCE.read_text()
    for name, version in _LIBRARIES.items():
        source = runtime if name.startswith("libcudart") else "#include <stddef.h>\n"
        source += "static long mmi_object;\n"
        for function in sorted(functions[version]):
            if f" {function}(" in source or f"* {function}(" in source:
                continue
            if function in _HANDLES:
                source += f"int {function}(void** made) {{ return *made = &mmi_object, 0; }}\n"
            else:
                source += f"void* {function}() {{ return NULL; }}\n"
        _compile(source, folder / name, version)


def _compile(source: str, library: Path, version: str) -> None:
    path = library.with_suffix(".c")
    path.write_text(source)
    flags = ["-w", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}"]
    if version:
        script = library.with_suffix(".map")
        script.write_text(f"{version} {{ global: *; }};\n")
        flags.append(f"-Wl,--version-script={script}")
    subprocess.run(["gcc", *flags, "-o", str(library), str(path)], check=True)


def environment(package: Path, libraries: Path) -> dict[str, str]:
    """Environment of a Python process that imports the wheel with these libraries."""
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "LD_LIBRARY_PATH": str(libraries),
        "ORT_DISABLE_TELEMETRY": "1",
    }


_READ = """
import json, onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def
kernels = [
    [k.domain, k.op_name, *k.version_range, {n: sorted(t) for n, t in k.type_constraints.items()}]
    for k in get_all_opkernel_def() if k.provider == "CUDAExecutionProvider"
]
print(json.dumps([onnxruntime.__version__, kernels]))
"""


def read_registry(package: Path, libraries: Path) -> dict[str, Any]:
    """Read the CUDA provider's kernel registry in a process of its own."""
    command = [sys.executable, "-c", _READ]
    process = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment(package, libraries)
    )
    version, rows = json.loads(process.stdout.splitlines()[-1])
    kernels: dict[str, dict[str, list[list[Any]]]] = {name: defaultdict(list) for name in DOMAINS}
    for domain, operator, first, last, types in rows:
        if domain not in DOMAINS or (not domain and last < OPSET):
            continue
        short = {
            name: [kind.removeprefix("tensor(").removesuffix(")") for kind in kinds]
            for name, kinds in sorted(types.items())
        }
        entry = [first, None if last == _OPEN else last, short]
        if entry not in kernels[domain][operator]:
            kernels[domain][operator].append(entry)
    return {
        "source": "kernel registry of CUDAExecutionProvider in the wheel of onnxruntime-gpu, read "
        "by `python -m mmi_emulator.cuda_provider`",
        "version": version,
        "opset": OPSET,
        "kernels": {name: dict(sorted(found.items())) for name, found in kernels.items()},
    }


def registry_text(registry: dict[str, Any]) -> str:
    """JSON of a registry, one operator a line."""
    head = {key: value for key, value in registry.items() if key != "kernels"}
    parts = []
    for domain, operators in registry["kernels"].items():
        lines = [f"   {json.dumps(name)}: {json.dumps(found)}" for name, found in operators.items()]
        parts.append(f"  {json.dumps(domain)}: {{\n" + ",\n".join(lines) + "\n  }")
    kernels = ",\n".join(parts)
    return json.dumps(head, indent=1)[:-2] + f',\n "kernels": {{\n{kernels}\n }}\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="wheel of onnxruntime-gpu")
    parser.add_argument("-o", "--out", type=Path, default=Path(OUT))
    options = parser.parse_args()
    with TemporaryDirectory(prefix="mmi-no-gpu-") as name:
        folder = Path(name)
        unpack(options.wheel, folder / "package")
        (folder / "libraries").mkdir()
        build_libraries(folder / "package", folder / "libraries")
        registry = read_registry(folder / "package", folder / "libraries")
    options.out.write_text(registry_text(registry))
    count = sum(len(found) for found in registry["kernels"].values())
    print(f"{options.out}: {count} operators of onnxruntime-gpu {registry['version']}")


if __name__ == "__main__":
    main()
