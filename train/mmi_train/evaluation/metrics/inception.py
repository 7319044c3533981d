"""The Inception network of FID: 2048 features of a picture, with the weights of TensorFlow's FID.

Source: Szegedy et al., "Rethinking the Inception Architecture" (2016), in the form whose weights
Heusel et al. used; the names are those of the PyTorch weights (pytorch-fid, torch-fidelity).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmi_deploy.errors import WeightsError
from mmi_deploy.system.files import sha256_of

# The weights file under the names of both projects, its address, size in bytes and hash.
FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILES[0]}"
BYTES = 95_628_359
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# Side of the pictures that the network sees, and number of its features.
SIDE, FEATURES = 299, 2048


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. padding: (vertical, horizontal)."""

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, height, width] -> the same with other channels."""
        return functional.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    """Average pooling whose borders divide by the pixels that are there, as TensorFlow's."""
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """Branches of 1x1, 5x5 and twice 3x3 convolutions, and a pool (Mixed_5b to 5d)."""

    def __init__(self, inside: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(inside, 64, 1)
        self.branch5x5_1 = Conv(inside, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(inside, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inside, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches."""
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(double),
            self.branch_pool(_average(x)),
        ]
        return torch.cat(parts, 1)


class BlockB(nn.Module):
    """Branches that halve the sides (Mixed_6a)."""

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(inside, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(inside, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """Branches of 7x7 convolutions, split into 1x7 and 7x1 (Mixed_6b to 6e)."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        wide, high = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, inner, 1)
        self.branch7x7_2 = Conv(inner, inner, wide, padding=(0, 3))
        self.branch7x7_3 = Conv(inner, 192, high, padding=(3, 0))
        self.branch7x7dbl_1 = Conv(768, inner, 1)
        self.branch7x7dbl_2 = Conv(inner, inner, high, padding=(3, 0))
        self.branch7x7dbl_3 = Conv(inner, inner, wide, padding=(0, 3))
        self.branch7x7dbl_4 = Conv(inner, inner, high, padding=(3, 0))
        self.branch7x7dbl_5 = Conv(inner, 192, wide, padding=(0, 3))
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches."""
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        parts = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average(x)),
        ]
        return torch.cat(parts, 1)


class BlockD(nn.Module):
    """Branches that halve the sides (Mixed_7a)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        parts = [
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(seven),
            functional.max_pool2d(x, 3, 2),
        ]
        return torch.cat(parts, 1)


class BlockE(nn.Module):
    """Branches of 3x3 convolutions, split into 1x3 beside 3x1 (Mixed_7b, 7c). largest: the pool
    takes the maximum, as in the network's last block, not the average."""

    def __init__(self, inside: int, *, largest: bool) -> None:
        super().__init__()
        self.largest = largest
        self.branch1x1 = Conv(inside, 320, 1)
        self.branch3x3_1 = Conv(inside, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(inside, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(inside, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = functional.max_pool2d(x, 3, 1, 1) if self.largest else _average(x)
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """Pictures of `SIDE` pixels, values -1 to 1, to `FEATURES` features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, largest=False)
        self.Mixed_7c = BlockE(2048, largest=True)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, 299, 299] -> [b, 2048]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = functional.max_pool2d(x, 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


def load_inception(folder: Path | None) -> Inception:
    """The network with the weights in `folder`. Raises `WeightsError`, which says what to get."""
    fix = f"get it from {ADDRESS} ({BYTES} bytes, SHA-256 {SHA256})"
    if folder is None:
        raise WeightsError(
            f"FID needs {FILES[0]}", fix=f"give its folder with --weights DIR; {fix}"
        )
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise WeightsError(f"{folder} holds no {FILES[0]}", fix=fix)
    if path.stat().st_size != BYTES or (got := sha256_of(path)) != SHA256:
        got = f"{path.stat().st_size} bytes" if path.stat().st_size != BYTES else got
        raise WeightsError(f"{path} is another file or damaged", got=got, fix=fix)
    network = Inception()
    state = torch.load(path, map_location="cpu", weights_only=True)
    # The file holds a classifier and counters, too, which features do not need.
    network.load_state_dict({name: state[name] for name in network.state_dict() if name in state})
    return network.eval().requires_grad_(False)


def as_tensorflow(rgb: np.ndarray) -> Tensor:
    """Network's input [1, 3, 299, 299] of a picture uint8 [height, width, 3], as TensorFlow's FID
    prepares it: bilinear, with the first pixels of both sizes in one place, and (x - 128) / 128."""
    x = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None].float()
    for axis in (2, 3):
        length = x.shape[axis]
        place = torch.arange(SIDE) * (length / SIDE)
        below = place.floor().long()
        above = (below + 1).clamp(max=length - 1)
        shape = [1, 1, 1, 1]
        shape[axis] = SIDE
        share = (place - below).view(shape)
        first = x.index_select(axis, below)
        x = first + (x.index_select(axis, above) - first) * share
    return (x - 128) / 128


def as_published(pixels: np.ndarray) -> Tensor:
    """Network's input [1, 3, 299, 299] of the published code's 64-pixel picture, float32 [3, 64,
    64] in 0..1."""
    x = torch.from_numpy(pixels)[None]
    size = (SIDE, SIDE)
    return 2 * functional.interpolate(x, size=size, mode="bilinear", align_corners=False) - 1
