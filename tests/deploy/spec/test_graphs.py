"""The contract of the graphs holds for every model and every limit."""

from __future__ import annotations

import pytest

from mmi_deploy.spec.graphs import Limits, graphs
from mmi_deploy.spec.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("limits", [Limits(context=512), Limits(context=20, batch=1, images=1)])
def test_the_optimal_sizes_lie_within_the_limits(name: str, limits: Limits) -> None:
    """Engine builders refuse a profile whose optimum is beyond its maximum."""
    for graph in graphs(PRESETS[name](), limits).values():
        for letter, sizes in graph.ranges.items():
            assert sizes.min <= sizes.opt <= sizes.max, (graph.name, letter)
