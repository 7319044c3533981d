"""Driver, bindings, TensorRT and GPU that do not fit one another: one line with the cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.runtime.fake_model import LIMITS, fake_config
from deploy.runtime.tensorrt.fake_cuda import FakeCuda
from deploy.runtime.tensorrt.gpu_targets import add_target, fake_bundle, machine
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.tensorrt import backend
from mmi_deploy.runtime.tensorrt.versions import Versions, check_versions, cuda_majors
from mmi_deploy.spec.backends import TENSORRT, TENSORRT_RTX
from mmi_deploy.system.files import size as readable

MIB = 1 << 20


@pytest.mark.parametrize(
    "versions",
    [
        Versions(),
        Versions((13, 0), (13, 5), {13}),
        Versions((13, 2), (12, 9), {12}),
        Versions((12, 4), (12, 9), {12}),  # CUDA's compatibility of minor versions
        Versions(None, (13, 0), {13}),
        Versions((13, 0), (13, 5), set()),
    ],
)
def test_versions_that_fit_are_taken(versions: Versions) -> None:
    check_versions(TENSORRT, versions)


REPLACE = (
    "pip uninstall -y tensorrt tensorrt-cu13 tensorrt-cu13-libs tensorrt-cu13-bindings && "
    "pip install tensorrt-cu12 'cuda-bindings>=12.9,<13'"
)


@pytest.mark.parametrize(
    ("versions", "parts"),
    [
        (
            Versions((12, 8), (13, 5), {13}),
            ["driver is older than tensorrt (for CUDA 13) and cuda-bindings 13.5",
             "expected driver 580 or newer (CUDA 13); got CUDA 12.8", REPLACE],
        ),
        (
            Versions((12, 8), (13, 5), set()),
            ["driver is older than cuda-bindings 13.5", "pip install tensorrt-cu12 'cuda-b"],
        ),
        (
            Versions((13, 2), (12, 9), {13}),
            ["tensorrt and cuda-bindings are of different versions of CUDA",
             "expected cuda-bindings for CUDA 13; got 12.9",
             "Run: pip install 'cuda-bindings>=13,<14'"],
        ),
        (
            Versions((13, 2), (13, 5), {12}),
            ["expected cuda-bindings for CUDA 12", "pip install 'cuda-bindings>=12.9,<13'"],
        ),
        (
            Versions((13, 2), (13, 5), {12, 13}),
            ["installed for several versions of CUDA (12, 13)",
             "pip uninstall -y tensorrt tensorrt-cu12 tensorrt-cu12-libs tensorrt-cu12-bindings "
             "tensorrt-cu13", "&& pip install tensorrt-cu13 'cuda-bindings>=13,<14'"],
        ),
        (
            Versions((11, 8), (13, 5), {13}),
            ["driver is too old", "driver 525 and newer", "got CUDA 11.8", "Update the driver"],
        ),
    ],
)  # fmt: skip
def test_versions_that_do_not_fit_are_one_line_with_the_cure(
    versions: Versions, parts: list[str]
) -> None:
    with pytest.raises(EngineError) as caught:
        check_versions(TENSORRT, versions)
    line = str(caught.value)
    assert "\n" not in line and all(part in line for part in parts), line


def test_tensorrt_rtx_has_packages_of_its_own() -> None:
    with pytest.raises(EngineError, match="pip install tensorrt-rtx-cu12 'cuda-bindings>=12.9"):
        check_versions(TENSORRT_RTX, Versions((12, 8), None, {13}))


def test_installed_packages_tell_their_version_of_cuda() -> None:
    names = ["tensorrt_cu13_libs", "tensorrt-cu13-bindings", "tensorrt_rtx_cu12", "TensorRT-cu13",
             "tensorrt-lean-cu11", "tensorrt", "numpy", "tensorrt-cu12x"]  # fmt: skip
    assert cuda_majors("tensorrt", names) == {13}
    assert cuda_majors("tensorrt-rtx", names) == {12}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return fake_bundle(tmp_path / "bundle", fake_config(), LIMITS)


def refusal(bundle: Bundle, cuda: FakeCuda) -> str:
    with pytest.raises(EngineError) as caught:
        machine(bundle, add_target(bundle), cuda=cuda)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_older_driver_is_refused_before_it_is_used(bundle: Bundle) -> None:
    cuda = FakeCuda(driver=12080, devices=0)  # as CUDA says of a driver that is too old
    line = refusal(bundle, cuda)
    assert "expected driver 580 or newer (CUDA 13); got CUDA 12.8" in line and "pip install" in line
    assert {name for name, _ in cuda.calls} == {"cudaDriverGetVersion", "cudaRuntimeGetVersion"}


def test_bindings_for_another_cuda_than_tensorrt_are_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(runtime: str, cuda: Any) -> Versions:
        return Versions((13, 0), (12, 9), cuda_majors(runtime, ["tensorrt-cu13"]))

    monkeypatch.setattr(backend, "installed_versions", installed)
    assert "pip install 'cuda-bindings>=13,<14'" in refusal(bundle, FakeCuda(bindings=12090))


def test_no_gpu_is_said(bundle: Bundle) -> None:
    assert "no usable NVIDIA GPU" in refusal(bundle, FakeCuda(devices=0, driver=0))


def test_of_two_kinds_of_gpus_the_right_one_is_named(bundle: Bundle) -> None:
    line = refusal(bundle, FakeCuda(capability=(9, 0), others=((9, 0), (8, 9))))
    assert "built for another GPU; expected sm89" in line and "--device 2" in line
    line = refusal(bundle, FakeCuda(capability=(9, 0), others=((9, 0),)))
    assert "build for it: `mmi build" in line
    name = add_target(bundle)
    mixed = FakeCuda(capability=(9, 0), others=((8, 9),))
    assert machine(bundle, name, cuda=mixed, device=1).target.memory.gpu.architecture == "sm89"


def test_an_occupied_gpu_is_told_from_one_that_is_too_small(bundle: Bundle) -> None:
    name = add_target(bundle)
    need = machine(bundle, name).target.plan().total
    with pytest.raises(EngineError) as occupied:
        cuda = FakeCuda(need + 64 * MIB, occupied=64 * MIB + need // 2)
        machine(bundle, name, cuda=cuda).target.plan().check()
    assert f"other programs hold {readable(64 * MIB + need // 2)}" in str(occupied.value)
    assert "--device" in str(occupied.value) and "nvidia-smi" in str(occupied.value)
    with pytest.raises(EngineError) as small:
        machine(bundle, name, cuda=FakeCuda(need // 2)).target.plan().check()
    assert "other programs" not in str(small.value) and "--resident" in str(small.value)


def test_a_harmless_error_line_does_not_stop_the_start(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from deploy.runtime.tensorrt.fake_tensorrt import FakeTensorRt

    make, lines = FakeTensorRt.Runtime, ["Unable to load library: libnvinfer_vc_plugin.so.10"]

    def noisy(self: FakeTensorRt, logger: Any) -> Any:
        made = make(self, logger)
        for line in lines:
            self.error(line)
        return made

    monkeypatch.setattr(FakeTensorRt, "Runtime", noisy)
    started = machine(bundle, add_target(bundle))
    assert lines[0] in caplog.text
    started.runtime.close()
    lines[:] = ["createInferRuntime: Error Code 6: API Usage Error (CUDA initialization failure)"]
    assert "cannot start: createInferRuntime" in refusal(bundle, FakeCuda())
