"""Rows of the pictures that are being drawn, kept dense: a run takes the first ones.

Letters: b batch, m image slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.runtime.buffers import HOST, Array, Buffer
from mmi_deploy.runtime.caches import padded_count
from mmi_deploy.runtime.engine import BoundPlan
from mmi_deploy.runtime.keyed_random import first_latents, step_noise
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.work import Denoise, Picture
from mmi_deploy.spec.graphs import DEEP, Graph
from mmi_deploy.spec.schedule import LAST_DATA_ROW

# Output of a step -> the rows that it becomes.
_NEXT = {"next_latents": "latents", "next_history": "history", DEEP: DEEP}

# Inputs that are written on the host before each run.
_WRITTEN = {"step", "guidance", "image_slot", "image_position"}


class PictureRows:
    """Sampler state, condition and deep features of pictures, one row each.

    Each row has a step, sampler and guidance of its own. A step's output is copied back into the
    rows, so that one set of addresses serves all steps.
    """

    def __init__(self, runtime: Runtime, rows: int, values: Mapping[str, Buffer]) -> None:
        """values: pool of the U-Net's image values."""
        self.rows = rows
        self._runtime, self._values = runtime, values
        graphs, memory = runtime.graphs, runtime.memory
        step: Graph = graphs["denoise_step"]
        self._seen = step.ranges["m"].max
        condition = [tensor.name for tensor in graphs["image_condition"].outputs]

        def allocate(name: str) -> Buffer:
            return memory.allocate(step[name].resolve(b=rows), step[name].dtype)

        # Per row, exchanged when rows change places.
        names = ("latents", "history", "noise", DEEP, *condition)
        self._state = {name: allocate(name) for name in names}
        self._next = {name: allocate(name) for name in _NEXT}
        self._scratch: dict[str, Buffer] = {}  # one row of each, at the first exchange
        # Written on the host before each run; the first b rows of contiguous arrays.
        self._steps, self._guidance = np.zeros(rows, np.int64), np.zeros(rows, np.float32)
        self._slot = np.zeros((rows, self._seen), np.int32)
        self._position = np.zeros((rows, self._seen), np.int32)
        self._images = np.zeros(rows, np.int64)  # visible images of each row
        self._noisy = np.zeros(rows, np.bool_)  # rows whose noise is not zero
        self._plans: dict[tuple[str, int, int], tuple[BoundPlan, dict[str, Array]]] = {}

    def condition(self, row: int) -> dict[str, Buffer]:
        """Buffers of a row's condition, to write to."""
        outputs = self._runtime.graphs["image_condition"].outputs
        return {t.name: self._state[t.name].rows(row, row + 1) for t in outputs}

    def latents(self, row: int) -> Buffer:
        """Latents [1, ...] of a row."""
        return self._state["latents"].rows(row, row + 1)

    def preview(self, row: int) -> NDArray[np.float32]:
        """Pixels [3, side, side] of a row's last data prediction, not clipped."""
        history = self._state["history"].rows(row, row + 1)
        kept = history.reshaped(history.shape[1:])
        data: NDArray[np.float32] = kept.rows(LAST_DATA_ROW, LAST_DATA_ROW + 1).read()[0]
        return self._runtime.preview_map.pixels(data)

    def begin(
        self, row: int, picture: Picture, slot: NDArray[np.int32], position: NDArray[np.int32]
    ) -> None:
        """Start `picture` in `row`, from its first latents and an empty history. It sees the images
        in `slot` [m] at the relative positions `position` [m]."""
        latents = self.latents(row)
        noise = first_latents(picture.seed, picture.index, latents.shape)
        initial_sigma = self._runtime.schedule(picture.schedule).schedule.initial_sigma
        latents.write(noise * initial_sigma)
        history = self._state["history"].rows(row, row + 1)
        history.write(np.zeros(history.shape, history.dtype))
        self._guidance[row] = picture.guidance
        count = self._images[row] = len(slot)
        self._slot[row], self._position[row] = slot[0], 0
        self._slot[row, :count], self._position[row, :count] = slot, position

    def denoise(self, steps: Sequence[Denoise], b: int) -> None:
        """Run a step of the pictures in the first rows, one of `steps` each: all whole ones, or all
        shallow ones. b: rows of the run, of which those beyond the steps are padding."""
        for row, work in enumerate(steps):
            picture, step = work.picture, work.step
            bound = self._runtime.schedule(picture.schedule)
            self._steps[row] = bound.first + step
            draws = bound.schedule.draws_noise(step)
            if draws or self._noisy[row]:
                noise = self._state["noise"].rows(row, row + 1)
                zero = np.zeros(noise.shape, noise.dtype)
                key = (picture.seed, picture.index, step, noise.shape)
                noise.write(step_noise(*key) if draws else zero)
                self._noisy[row] = draws
        self.run("denoise_step" if steps[0].full else "denoise_shallow", b, len(steps))

    def run(self, name: str, b: int, count: int) -> None:
        """Run the graph `name`, `denoise_step` or `denoise_shallow`, over the first `b` rows, of
        which `count` take the step: the others may be pictures that wait for another run."""
        m = padded_count(int(self._images[:b].max()), self._seen)
        plan, written = self._plan(name, b, m)
        outputs = [tensor.name for tensor in self._runtime.graphs[name].outputs]
        written["step"][...] = self._steps[:b]
        if "guidance" in written:  # distilled guidance is no input
            written["guidance"][...] = self._guidance[:b]
        written["image_slot"][...] = self._slot[:b, :m]
        written["image_position"][...] = self._position[:b, :m]
        plan.run()
        for new in outputs:
            state = self._state[_NEXT[new]]
            self._runtime.memory.copy(self._next[new].rows(0, count), state.rows(0, count))

    def swap(self, row: int, other: int) -> None:
        """Exchange two rows."""
        if row == other:
            return
        memory = self._runtime.memory
        copy = memory.copy
        for name, rows in self._state.items():
            if name not in self._scratch:
                self._scratch[name] = memory.allocate((1, *rows.shape[1:]), rows.dtype)
            first, second = rows.rows(row, row + 1), rows.rows(other, other + 1)
            copy(first, self._scratch[name])
            copy(second, first)
            copy(self._scratch[name], second)
        for array in (self._guidance, self._slot, self._position, self._images, self._noisy):
            array[[row, other]] = array[[other, row]]

    def _plan(self, name: str, b: int, m: int) -> tuple[BoundPlan, dict[str, Array]]:
        """Bound plan of a run, and the arrays to write before it."""
        if (name, b, m) not in self._plans:
            engine = self._runtime.engine(name)
            given: dict[str, Buffer] = {
                **{key: rows.rows(0, b) for key, rows in self._state.items()},
                **self._runtime.tables(),
                **self._values,
            }
            written = {}
            for key in _WRITTEN & {tensor.name for tensor in engine.graph.inputs}:
                tensor = engine.graph[key]
                written[key] = HOST.allocate(tensor.resolve(b=b, m=m), tensor.dtype)
            given |= written
            outputs = {key: rows.rows(0, b) for key, rows in self._next.items()}
            plan = engine.bind(
                {tensor.name: given[tensor.name] for tensor in engine.graph.inputs},
                {tensor.name: outputs[tensor.name] for tensor in engine.graph.outputs},
            )
            arrays = {key: buffer.read() for key, buffer in written.items()}
            self._plans[name, b, m] = plan, arrays
        return self._plans[name, b, m]
