"""Memory of a GPU: what is written is read, whenever copies are done; all of it is given back."""

from __future__ import annotations

import gc
import threading

import ml_dtypes
import numpy as np
import pytest

from deploy.runtime.tensorrt.fake_cuda import DEVICE, PINNED, FakeCuda, Fault
from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.device_memory import ALIGNMENT, STAGING, Cuda, DeviceMemory


@pytest.fixture
def gpu() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def memory(gpu: FakeCuda) -> DeviceMemory:
    return DeviceMemory(Cuda(gpu))


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "int64", "int32", "uint8", ml_dtypes.bfloat16]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 7), (0, 4), (1, STAGING // 2)])
def test_what_is_held_is_read(memory: DeviceMemory, shape: tuple[int, ...], dtype: type) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    buffer = memory.from_array(array)
    assert buffer.pointer % ALIGNMENT == 0 and buffer.shape == shape and buffer.dtype == dtype
    found = buffer.read()
    assert found.dtype == dtype and found.shape == shape
    np.testing.assert_array_equal(found, array)


def test_new_memory_is_zeros(memory: DeviceMemory) -> None:
    for dtype in ("float32", "bfloat16", "int64"):
        assert not memory.allocate((3, 100), dtype).read().any()


def test_an_array_may_change_while_its_copy_is_under_way(memory: DeviceMemory) -> None:
    """More writes than the staging memory holds at once, none of them waited for."""
    count, size = 40, STAGING // 16
    buffers = [memory.allocate((size,), np.uint8) for _ in range(count)]
    array = np.zeros(size, np.uint8)
    for index, buffer in enumerate(buffers):
        array[...] = index
        buffer.write(array)
    array[...] = 99
    assert [set(buffer.read().tolist()) for buffer in buffers] == [{i} for i in range(count)]


def test_an_array_larger_than_the_staging_memory(gpu: FakeCuda, memory: DeviceMemory) -> None:
    array = np.arange(STAGING, dtype=np.int32)  # four times as large
    np.testing.assert_array_equal(memory.from_array(array).read(), array)
    assert gpu.held(PINNED) == 4 * STAGING


def test_staging_memory_is_left_as_it_was_where_there_is_no_more(
    gpu: FakeCuda, memory: DeviceMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = memory.from_array(np.arange(8, dtype=np.int32))
    refused = (gpu.cudaError_t.cudaErrorMemoryAllocation, None)
    with monkeypatch.context() as patched, pytest.raises(EngineError, match="memory is full"):
        patched.setattr(gpu, "cudaMallocHost", lambda size: refused)
        memory.from_array(np.zeros(STAGING, np.int32))
    assert buffer.read().tolist() == list(range(8)) and gpu.held(PINNED) == STAGING


def test_rows_and_copies(memory: DeviceMemory) -> None:
    whole = memory.from_array(np.arange(12, dtype=np.float32).reshape(4, 3))
    other = memory.allocate((4, 3), np.float32)
    memory.copy(whole, other)
    np.testing.assert_array_equal(other.read(), whole.read())
    memory.copy(whole.rows(1, 3), other.rows(0, 2))
    assert other.read()[:2].tolist() == [[3, 4, 5], [6, 7, 8]]
    memory.copy(whole.rows(1, 1), other.rows(2, 2))
    with pytest.raises(ValueError, match="cannot copy float32"):
        memory.copy(whole, other.rows(0, 2))
    with pytest.raises(Fault, match="overlaps"):
        memory.copy(whole.rows(0, 2), whole.rows(1, 3))


def test_everything_is_given_back_once(gpu: FakeCuda) -> None:
    memory = DeviceMemory(Cuda(gpu))
    kept = memory.allocate((100,), np.float32)
    for _ in range(3):
        part = memory.from_array(np.ones((10, 10), np.float32)).rows(2, 4)
        assert gpu.held() == 800  # rows keep their memory alive
        del part
        assert gpu.held() == 400
    del kept, memory
    gc.collect()
    assert gpu.held(DEVICE) == gpu.held(PINNED) == 0 and not gpu.streams and not gpu.faults


def test_a_full_gpu(gpu: FakeCuda) -> None:
    gpu.capacity = 1000
    memory = DeviceMemory(Cuda(gpu))
    with pytest.raises(EngineError, match="memory is full.*--resident.*mmi build --precision int8"):
        memory.allocate((1001,), np.uint8)
    assert memory.allocate((1000,), np.uint8).read().sum() == 0


def test_machines_without_the_gpu_that_is_asked_for() -> None:
    with pytest.raises(EngineError, match="no usable NVIDIA GPU: .*InsufficientDriver"):
        DeviceMemory(Cuda(FakeCuda(devices=0)))
    with pytest.raises(EngineError, match="no GPU 2; expected 0 to 1; got 2"):
        DeviceMemory(Cuda(FakeCuda(devices=2)), 2)
    memory = DeviceMemory(Cuda(FakeCuda(devices=2, capability=(9, 0))), 1)
    assert (memory.gpu.name, memory.gpu.architecture) == ("Fake GPU", "sm90")


def test_other_errors_are_told_in_cudas_words(gpu: FakeCuda, memory: DeviceMemory) -> None:
    with pytest.raises(EngineError, match="CUDA's cudaSetDevice failed: cudaErrorInvalidValue"):
        memory.cuda("cudaSetDevice", 7)


def test_threads_take_turns(memory: DeviceMemory) -> None:
    wrong = []

    def work(number: int) -> None:
        for step in range(50):
            array = np.full(300, 100 * number + step, np.int32)
            if (memory.from_array(array).read() != array).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_given_back_while_a_graph_is_recorded(
    gpu: FakeCuda, memory: DeviceMemory
) -> None:
    """Buffers dropped by another thread, or by the garbage collector in the one that records."""
    before = gpu.held()
    buffers = [memory.allocate((1000,), np.uint8) for _ in range(3)]
    other = threading.Thread(target=buffers.pop)
    with memory.lock.recording():
        held = gpu.held()
        other.start()
        other.join()
        buffers.pop()
        gc.collect()
        assert gpu.held() == held
    assert gpu.held() == before + 1000
    with memory.lock:  # an ordinary turn of the same thread does not keep it
        buffers.pop()
        assert gpu.held() == before
