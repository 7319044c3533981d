"""The CUDA provider of a wheel of onnxruntime-gpu, run without a GPU: placement, host copies,
streams and recordings of every graph are the provider's own. Numbers are not computed.

Set MMI_ONNXRUNTIME_GPU to the wheel's path (`pip download onnxruntime-gpu --no-deps`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.targets import placement
from mmi_deploy.targets.cuda import build_cuda_target, typed
from mmi_deploy.targets.precision import recipe
from mmi_emulator.cuda_provider import (
    build_libraries,
    environment,
    read_registry,
    registry_text,
    unpack,
)
from mmi_plugins.constants import CSRC

if TYPE_CHECKING:
    from exports import Exported

WHEEL = os.environ.get("MMI_ONNXRUNTIME_GPU")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WHEEL, reason="set MMI_ONNXRUNTIME_GPU to a wheel of onnxruntime-gpu"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="there is no gcc"),
]

# In place of the kernel: it only checks that it was given a workspace.
_LAUNCH = """
#include "launch.h"
namespace mmi {
size_t workspace_bytes(const MmfsCall&) { return 4096; }
void preload() {}
const char* launch(const MmfsCall&, void* workspace, CUstream_st* stream) {
  return workspace && stream ? nullptr : "no workspace or no stream";
}
}  // namespace mmi
"""

_RUN = """
import json, os, sys
from pathlib import Path
import numpy as np
from deploy.runtime.tensorrt.fake_cuda import FakeCuda
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.runtime.device_memory import Cuda, DeviceMemory
from mmi_deploy.runtime.onnxruntime.cuda_backend import RECORDED
from mmi_deploy.runtime.onnxruntime.cuda_engine import CudaEngine
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions
from mmi_deploy.spec.graphs import graphs

bundle, files, kernels = Bundle.open(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
log = Path(os.environ["MMI_NO_GPU_LOG"])
memory = DeviceMemory(Cuda(FakeCuda()))
found = {}
for name, graph in graphs(bundle.config, bundle.limits).items():
    graph = graph.typed(sys.argv[4])
    engine = CudaEngine(
        files / f"{name}.onnx", graph, OnnxOptions(1, kernels), memory, record=name in RECORDED
    )
    sizes = {"b": 1, "t": 1, "w": 1, "v": 1, "n": 1, "m": 1, "x": 4, "steps": 4}
    given = {t.name: np.full(t.resolve(**sizes), t.min, t.dtype) for t in graph.inputs}
    given |= {old: memory.from_array(given[old]) for old in graph.in_place.values()}
    outputs, runs = None, []
    for _ in range(4):
        log.write_text("")
        outputs = engine.run(given, outputs)
        runs.append([line.split() for line in log.read_text().splitlines()])
    found[name] = {"launches": engine.launches, "refusal": engine.refusal, "runs": runs}
print(json.dumps({"stream": memory.stream, "engines": found}))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the unpacked wheel, CUDA's libraries that compute nothing, and our kernel
    library, whose kernel does nothing."""
    folder = tmp_path_factory.mktemp("provider")
    (folder / "libraries").mkdir()
    unpack(Path(str(WHEEL)), folder / "package")
    build_libraries(folder / "package", folder / "libraries")
    (folder / "launch.cpp").write_text(_LAUNCH)
    sources = [str(CSRC / f"{name}.cpp") for name in ("mmfs_cpu", "mmfs_cpu_kernel")]
    sources += [str(CSRC / "onnxruntime_library.cpp"), str(folder / "launch.cpp")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DMMI_CUDA", "-DMMI_VARIANT=base"]
    out = ["-o", str(folder / "kernels.so")]
    subprocess.run(["g++", *flags, f"-I{CSRC}", *sources, *out], check=True)
    return folder


def test_the_registry_is_that_of_the_wheel(work: Path) -> None:
    read = read_registry(work / "package", work / "libraries")
    assert registry_text(read) == placement.KERNELS.read_text()


@pytest.mark.parametrize(
    ("precision", "activations"), [("fp32", "float32"), ("fp16", "float16"), ("int4", "float16")]
)
def test_every_graph_runs_on_the_provider_and_repeated_runs_copy_nothing(
    exported_once: Callable[[str], Exported],
    tmp_path: Path,
    work: Path,
    precision: str,
    activations: str,
) -> None:
    """cuDNN is absent, so convolutions give way to operators of the same shapes."""
    folder = tmp_path / "bundle"
    shutil.copytree(exported_once("paper").bundle.folder, folder)
    build_cuda_target(Bundle.open(folder), recipe(precision), None)
    files = tmp_path / precision
    shutil.copytree(folder / "engines" / f"cuda-{precision}", files)
    for path in files.glob("*.onnx"):
        without_convolutions(path)
    program = [sys.executable, "-c", _RUN, str(folder), str(files), str(work / "kernels.so")]
    log = str(tmp_path / "log")
    done = subprocess.run(
        [*program, activations],
        env={**environment(work / "package", work / "libraries"), "MMI_NO_GPU_LOG": log},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check(json.loads(done.stdout.splitlines()[-1]))


def check(found: dict) -> None:
    recorded = {name for name, engine in found["engines"].items() if engine["launches"]}
    assert recorded == {"llm", "denoise_step", "denoise_shallow"}
    cache = 1 << 14  # less than a KV cache, and more than what slices and joins move
    for name, engine in found["engines"].items():
        assert not engine["refusal"]
        called = [[what for what, _ in run] for run in engine["runs"]]
        assert "malloc_async" not in sum(called, []) and "to_host" not in sum(called, [])
        if name not in recorded:
            continue
        first, second, *later = engine["runs"]
        assert "to_device" not in called[0] + called[1], "a recording would copy from the host"
        if name == "llm":
            assert all(int(size) < cache for what, size in first if what == "on_device")
        start = called[1].index("begin_capture")
        assert "malloc" not in called[1][start:], "memory is allocated while a graph is recorded"
        assert {int(n) for what, n in second if what == "begin_capture"} == {found["stream"]}
        assert later == [[["launch", str(found["stream"])]]] * 2


def without_convolutions(path: Path) -> None:
    """Replace each Conv by a mean that is expanded to its shape."""
    model = onnx.load(path, load_external_data=False)
    known = typed(model).graph
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*known.value_info, *known.output)
    }
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose"):
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
            continue
        (out,) = node.output
        for word, values in (("axes", [1, 2, 3]), ("shape", [1, *shapes[out][1:]])):
            tensor = numpy_helper.from_array(np.array(values, np.int64), f"{out}.{word}")
            model.graph.initializer.append(tensor)
        mean = f"{out}.mean"
        nodes.append(helper.make_node("ReduceMean", [node.input[0], f"{out}.axes"], [mean]))
        nodes.append(helper.make_node("Expand", [mean, f"{out}.shape"], [out]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
