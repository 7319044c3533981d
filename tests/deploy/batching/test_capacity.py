"""Slots of a service on a device: as many as its engines' rows allow, and a line for more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deploy.runtime.fake_model import LIMITS, fake_config
from mmi_deploy.batching.capacity import Capacity, capacity
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.memory_plan import MemoryPlan
from mmi_deploy.spec.graphs import graphs

PLAN = MemoryPlan({}, {}, {}, None, free=10**12, build="mmi build b --target tensorrt")


def slots(rows: int, asked: int | None = None, plan: MemoryPlan | None = PLAN) -> int:
    limits = replace(LIMITS, batch=rows)
    found: Capacity = capacity(graphs(fake_config(), limits), limits, plan, asked)
    return found.slots


def test_engines_of_one_row_serve_one_document() -> None:
    assert [slots(rows) for rows in (1, 2, 8)] == [1, 8, 32]
    assert slots(1, 1) == 1 and slots(2, 8) == 8


@pytest.mark.parametrize(
    ("rows", "asked", "line"),
    [
        (1, 2, r"compute 1 row in a run; expected at most 1\. .*`{build} --rows 2`.*--slots 1$"),
        (1, 64, r"64 slots .*`{build} --rows 16`"),
        (2, 9, r"compute 2 rows in a run; expected at most 8\. .*`{build} --rows 8`"),
    ],
)
def test_more_slots_name_the_command_that_rebuilds(rows: int, asked: int, line: str) -> None:
    with pytest.raises(ConfigError, match=line.format(build=PLAN.build)) as error:
        slots(rows, asked)
    assert "\n" not in str(error.value)


def test_on_the_host_slots_are_the_callers() -> None:
    assert slots(1, 5, None) == 5
