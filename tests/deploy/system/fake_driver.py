"""`libcuda` of a machine with some GPUs, called as ctypes calls it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest

from mmi_deploy.system import nvidia_driver

NO_DEVICE = 100


class FakeDriver:
    """gpus: (name, (major, minor), free bytes, total bytes) of each. cuda: version, as 12080."""

    def __init__(
        self, gpus: Sequence[tuple[str, tuple[int, int], int, int]] = (), cuda: int = 13000
    ) -> None:
        self._gpus, self._cuda, self._current = gpus, cuda, -1
        self.retained = 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self._cuda
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0 if self._gpus else NO_DEVICE

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self._gpus)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = 7 * ordinal  # a handle, not the ordinal
        return 0 if ordinal < len(self._gpus) else NO_DEVICE

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:  # noqa: N802
        name.value = self._gpus[device.value // 7][0].encode()
        return 0

    def cuDeviceGetAttribute(  # noqa: N802
        self, value: Any, attribute: int, device: ctypes.c_int
    ) -> int:
        value._obj.value = self._gpus[device.value // 7][1][attribute - 75]
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> int:  # noqa: N802
        context._obj.value = device.value // 7 + 1
        self.retained += 1
        return 0

    def cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> int:  # noqa: N802
        self._current = (context.value or 0) - 1
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802
        assert self._current >= 0, "without a context"
        free._obj.value, total._obj.value = self._gpus[self._current][2:]
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self._current = -1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: ctypes.c_int) -> int:  # noqa: N802
        self.retained -= 1
        return 0


def install(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None) -> None:
    """Give every module this driver in place of the machine's, or none."""

    def library() -> FakeDriver:
        if driver is None:
            raise OSError("libcuda.so.1")
        return driver

    monkeypatch.setattr(nvidia_driver, "_open_library", library)
