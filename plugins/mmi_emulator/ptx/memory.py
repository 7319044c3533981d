"""Device memory of an emulated launch, with every access checked.

Global memory is a set of allocations far apart; shared memory belongs to a block, local memory to
a thread. An access that is out of bounds, misaligned, of uninitialised bytes, or a data race is a
`Fault`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mmi_emulator.ptx.parser import PtxError

FIRST_ADDRESS = 0x7F20_0000_0000
# Bytes between allocations: more than 2^32, so that an index cut to 32 bits misses all of them.
_APART = 0x1_4000_0000

# Bases of shared, local and parameter memory among generic addresses.
SHARED_WINDOW, LOCAL_WINDOW, PARAMETER_WINDOW = 1 << 50, 1 << 51, 1 << 52

_UNITS = {width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)}
_NOBODY, _SEVERAL, _ELSEWHERE = -1, -2, -3
_ROUND = 256


class Fault(PtxError):
    """Undefined behaviour or an error on a GPU. `lane` counts all emulated threads; the machine
    reports it as block and thread."""

    def __init__(self, what: str, lane: int | None = None) -> None:
        super().__init__(what)
        self.lane = lane


@dataclass
class _Allocation:
    name: str
    address: int
    offset: int
    size: int
    writable: bool
    # Writable memory, for every two bytes: whether written, and by which lane of this launch.
    known: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    writer: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))


class GlobalMemory:
    """Allocations of `capacity` bytes in all; `allocate` copies arrays in."""

    def __init__(self, capacity: int) -> None:
        bytes_ = -(-capacity // _ROUND) * _ROUND
        self._bytes = np.full(bytes_, 0xA5, np.uint8)
        self._views = {width: self._bytes.view(unit) for width, unit in _UNITS.items()}
        self._allocations: list[_Allocation] = []
        self._end = 0

    def allocate(self, array: np.ndarray, name: str) -> int:
        """Address of read-only memory that holds `array`."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        found = self._new(raw.size, name, writable=False)
        self._bytes[found.offset : found.offset + raw.size] = raw
        return found.address

    def reserve(self, size: int, name: str) -> int:
        """Address of `size` writable, uninitialised bytes."""
        found = self._new(size, name, writable=True)
        found.known = np.zeros(-(-size // 2), bool)
        found.writer = np.full(-(-size // 2), _NOBODY, np.int32)
        return found.address

    def _new(self, size: int, name: str, writable: bool) -> _Allocation:
        address = FIRST_ADDRESS + len(self._allocations) * _APART
        found = _Allocation(name, address, self._end, size, writable)
        self._end = -(-(self._end + size) // _ROUND) * _ROUND
        if self._end > self._bytes.size:
            raise ValueError(f"the emulator's memory is too small for {name}: {self._end} bytes")
        self._allocations.append(found)
        return found

    def written(self, address: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Content of reserved memory, and for each number whether all of it was written."""
        found = next(each for each in self._allocations if each.address == address)
        content = self._bytes[found.offset : found.offset + found.size].view(dtype)
        known = np.repeat(found.known, 2)[: found.size].reshape(content.size, -1)
        return content.copy(), np.asarray(known.all(1))

    def next_blocks(self) -> None:
        """Begin the next batch of blocks of the launch, whose lanes are numbered anew."""
        for each in self._allocations:
            each.writer[each.writer != _NOBODY] = _ELSEWHERE

    def next_launch(self) -> None:
        """Begin the next launch, which may read what the last one wrote."""
        for each in self._allocations:
            each.writer.fill(_NOBODY)

    def load(
        self, address: np.ndarray, width: int, count: int, lanes: np.ndarray
    ) -> list[np.ndarray]:
        """`count` neighbouring numbers of `width` bytes at every address."""
        offset = np.empty(address.shape, np.int64)
        for found, chosen in self._owners(address, width * count, lanes):
            inside = address[chosen].astype(np.int64) - found.address
            offset[chosen] = inside + found.offset
            if found.writable:
                self._check_read(found, inside, width * count, lanes[chosen])
        view, index = self._views[width], offset // width
        return [view[index + part] for part in range(count)]

    def store(self, address: np.ndarray, parts: list[np.ndarray], lanes: np.ndarray) -> None:
        """Write `parts` one after another at every address."""
        width = parts[0].dtype.itemsize
        size = width * len(parts)
        for found, chosen in self._owners(address, size, lanes):
            if not found.writable:
                raise Fault(f"a store into {found.name}, which is an input", int(lanes[chosen][0]))
            inside = address[chosen].astype(np.int64) - found.address
            halves = (inside[:, None] // 2 + np.arange(max(1, size // 2))).reshape(-1)
            owners = np.repeat(lanes[chosen], max(1, size // 2)).astype(np.int32)
            before = found.writer[halves]
            found.writer[halves] = owners
            clash = ((before != _NOBODY) & (before != owners)) | (found.writer[halves] != owners)
            if clash.any():
                raise Fault(
                    f"two threads write the same bytes of {found.name}", int(owners[clash][0])
                )
            found.known[halves] = True
            index = (inside + found.offset) // width
            for part, values in enumerate(parts):
                self._views[width][index + part] = values[chosen]

    def _check_read(
        self, found: _Allocation, inside: np.ndarray, size: int, lanes: np.ndarray
    ) -> None:
        halves = inside[:, None] // 2 + np.arange(max(1, size // 2))
        if not found.known[halves].all():
            bad = ~found.known[halves].all(1)
            raise Fault(f"a load from {found.name} that nobody has written", int(lanes[bad][0]))
        writer = found.writer[halves]
        race = (writer != _NOBODY) & (writer != lanes[:, None])
        if race.any():
            raise Fault(f"a load from {found.name} races with a store", int(lanes[race.any(1)][0]))

    def _owners(
        self, address: np.ndarray, size: int, lanes: np.ndarray
    ) -> list[tuple[_Allocation, np.ndarray | slice]]:
        """The allocations that contain the addresses, each with its subset of them."""
        place = address.astype(np.int64)
        number = (place - FIRST_ADDRESS) // _APART
        low, high = int(number.min()), int(number.max())
        owners = []
        for each in [low] if low == high else np.unique(number).tolist():
            chosen: np.ndarray | slice = slice(None) if low == high else number == each
            mine = place[chosen]
            if 0 <= each < len(self._allocations):
                found = self._allocations[each]
                bad = (mine < found.address) | (mine + size > found.address + found.size)
                name = f"{found.name} ({found.size} bytes)"
            else:
                bad, name = np.ones(mine.shape, bool), "every allocation"
            if bad.any():
                offset = int(mine[bad][0]) - (
                    found.address if 0 <= each < len(self._allocations) else 0
                )
                raise Fault(
                    f"{size} bytes at {offset} are outside {name}", int(lanes[chosen][bad][0])
                )
            if (mine % size).any():
                raise Fault(
                    f"misaligned {size}-byte access", int(lanes[chosen][mine % size != 0][0])
                )
            owners.append((found, chosen))
        return owners


class SharedMemory:
    """Shared memory of all emulated blocks, with detection of data races.

    Two accesses by different threads, one of them a write, must have a barrier between them: one
    of the block, or one of the warp where both are in the same. `lanes` are threads counted over
    all blocks, `width` threads each (a multiple of 32).
    """

    def __init__(self, blocks: int, size: int, width: int, unit: int) -> None:
        self.size, self._width, self._unit = size, width, unit
        stride = -(-size // 16) * 16
        self._stride = stride
        self._bytes = np.full(max(blocks * stride, 16), 0xA5, np.uint8)
        self._views = {each: self._bytes.view(kind) for each, kind in _UNITS.items()}
        units = self._bytes.size // unit
        # For every unit: its last writer and reader, and the barriers that they had passed then.
        self._writer = np.full(units, _NOBODY, np.int32)
        self._write_time = np.zeros((2, units), np.int32)
        self._reader = np.full(units, _NOBODY, np.int32)
        self._reading_warp = np.full(units, _NOBODY, np.int32)
        self._read_time = np.zeros((2, units), np.int32)
        # Barriers passed by each block and each warp.
        self.block_time = np.zeros(blocks, np.int32)
        self.warp_time = np.zeros(blocks * width // 32, np.int32)

    def load(
        self, address: np.ndarray, width: int, count: int, lanes: np.ndarray
    ) -> list[np.ndarray]:
        """`count` neighbouring numbers of `width` bytes at every address of the lanes' blocks."""
        place = self._place(address, width * count, lanes)
        units, owners = self._units(place, width * count, lanes)
        writer = self._writer[units]
        if (writer == _NOBODY).any():
            raise Fault(
                "a load of shared memory that nobody has written",
                int(owners[writer == _NOBODY][0]),
            )
        self._check_order(units, owners, writer, "a load of shared memory races with a store")
        self._note_read(units, owners)
        view, index = self._views[width], place // width
        return [view[index + part] for part in range(count)]

    def store(self, address: np.ndarray, parts: list[np.ndarray], lanes: np.ndarray) -> None:
        """Write `parts` one after another at every address of the lanes' blocks."""
        width = parts[0].dtype.itemsize
        place = self._place(address, width * len(parts), lanes)
        units, owners = self._units(place, width * len(parts), lanes)
        writer = self._writer[units]
        self._check_order(units, owners, writer, "two threads write the same shared memory")
        self._check_readers(units, owners)
        self._writer[units] = owners
        twice = self._writer[units] != owners
        if twice.any():
            raise Fault("two threads write the same shared memory at once", int(owners[twice][0]))
        block, warp = owners // self._width, owners // 32
        self._write_time[0, units] = self.block_time[block]
        self._write_time[1, units] = self.warp_time[warp]
        for part, values in enumerate(parts):
            self._views[width][place // width + part] = values

    def _place(self, address: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        inside = address.astype(np.int64)
        bad = (inside < 0) | (inside + size > self.size)
        if bad.any():
            what = f"{size} bytes at {int(inside[bad][0])}"
            raise Fault(f"{what} are outside shared memory ({self.size} bytes)", int(lanes[bad][0]))
        if (inside % size).any():
            raise Fault(f"misaligned {size}-byte access", int(lanes[inside % size != 0][0]))
        return inside + (lanes // self._width) * self._stride

    def _units(
        self, place: np.ndarray, size: int, lanes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        count = size // self._unit
        first = place // self._unit
        if count == 1:
            return first, lanes
        return (first[:, None] + np.arange(count)).reshape(-1), np.repeat(lanes, count)

    def _check_order(
        self, units: np.ndarray, owners: np.ndarray, writer: np.ndarray, what: str
    ) -> None:
        """Raise `Fault` unless a barrier separates each unit's last write from `owners`' access."""
        other = (writer != owners) & (writer != _NOBODY)
        if not other.any():
            return
        units, owners, writer = units[other], owners[other], writer[other]
        block, warp = owners // self._width, owners // 32
        ordered = self._write_time[0, units] < self.block_time[block]
        ordered |= (writer // 32 == warp) & (self._write_time[1, units] < self.warp_time[warp])
        if not ordered.all():
            raise Fault(f"{what}: no barrier between them", int(owners[~ordered][0]))

    def _check_readers(self, units: np.ndarray, owners: np.ndarray) -> None:
        """Raise `Fault` unless a barrier separates each unit's reads from `owners`' write."""
        reader = self._reader[units]
        other = (reader != owners) & (reader != _NOBODY)
        if not other.any():
            return
        units, owners = units[other], owners[other]
        block, warp = owners // self._width, owners // 32
        ordered = self._read_time[0, units] < self.block_time[block]
        same = self._reading_warp[units] == warp
        ordered |= same & (self._read_time[1, units] < self.warp_time[warp])
        if not ordered.all():
            what = "a store to shared memory races with a load: no barrier between them"
            raise Fault(what, int(owners[~ordered][0]))

    def _note_read(self, units: np.ndarray, owners: np.ndarray) -> None:
        """Record each unit's readers since the last barrier: one thread, or `_SEVERAL`."""
        block, warp = owners // self._width, owners // 32
        same_block_time = self._read_time[0, units] == self.block_time[block]
        before_warp = np.where(same_block_time, self._reading_warp[units], _NOBODY)
        alone = (before_warp == _NOBODY) | (before_warp == warp)
        same_warp_time = (before_warp == warp) & (self._read_time[1, units] == self.warp_time[warp])
        before = np.where(same_warp_time, self._reader[units], _NOBODY)
        before = np.where(alone, before, _SEVERAL)
        mine = np.where((before == _NOBODY) | (before == owners), owners, _SEVERAL)
        self._reader[units] = mine
        self._reading_warp[units] = np.where(alone, warp, _SEVERAL)
        self._read_time[0, units] = self.block_time[block]
        self._read_time[1, units] = self.warp_time[warp]
        # Where several threads of this instruction read one unit, the last assignment above won.
        shared = (self._reader[units] != owners) & (self._reader[units] != _SEVERAL)
        self._reader[units[shared]] = _SEVERAL
        warps = (self._reading_warp[units] != warp) & (self._reading_warp[units] != _SEVERAL)
        self._reading_warp[units[warps]] = _SEVERAL


class LocalMemory:
    """Local memory, private to each thread."""

    def __init__(self, lanes: int, size: int) -> None:
        self.size = size
        self._stride = -(-size // 16) * 16
        self._bytes = np.full(max(lanes * self._stride, 16), 0xA5, np.uint8)
        self._views = {each: self._bytes.view(kind) for each, kind in _UNITS.items()}

    def load(
        self, address: np.ndarray, width: int, count: int, lanes: np.ndarray
    ) -> list[np.ndarray]:
        """`count` neighbouring numbers of `width` bytes at every lane's address."""
        index = self._place(address, width * count, lanes) // width
        return [self._views[width][index + part] for part in range(count)]

    def store(self, address: np.ndarray, parts: list[np.ndarray], lanes: np.ndarray) -> None:
        """Write `parts` one after another at every lane's address."""
        width = parts[0].dtype.itemsize
        index = self._place(address, width * len(parts), lanes) // width
        for part, values in enumerate(parts):
            self._views[width][index + part] = values

    def _place(self, address: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        inside = address.astype(np.int64)
        bad = (inside < 0) | (inside + size > self.size) | (inside % size != 0)
        if bad.any():
            what = f"{size} bytes at {int(inside[bad][0])} of local memory ({self.size} bytes)"
            raise Fault(f"{what}: outside or misaligned", int(lanes[bad][0]))
        return inside + lanes * self._stride
