"""Render the pictures of the examples: scenes of the drawn world that training never saw.

python examples/make_pictures.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmi_deploy.documents.images import to_png
from mmi_deploy.system.files import write_file
from mmi_train.data.synthetic.world import Object, Scene, ordered_scene, render

PICTURES = Path(__file__).parent / "pictures"

SCENE: Scene = ordered_scene(
    "white",
    [Object(0, 1, "square", "red", width=19), Object(2, 2, "cross", "blue", width=19)],
    grid_side=3,
)


def pictures() -> dict[str, np.ndarray]:
    """Render every picture; uint8 [height, width, 3] by file name."""
    return {"scene.png": render(SCENE), "classes.png": render(SCENE, segmentation=True)}


if __name__ == "__main__":
    for name, rgb in pictures().items():
        write_file(PICTURES / name, to_png(rgb))
