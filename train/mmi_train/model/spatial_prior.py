"""The ViT-Adapter's spatial prior module: a small convolutional pyramid of the image itself.

Letters: n encoded images, c channels, g patches per side.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [n, c, height, width]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)  # [n, height, width, c]; free when x is channels_last
        return super().forward(rows).permute(0, 3, 1, 2)


def _conv_norm(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        ChannelNorm(outputs),
        nn.ReLU(inplace=True),
    ]


class SpatialPrior(nn.Module):
    """Image [n, 3, 16g, 16g] -> four maps [n, c, side, side] of sides 4g, 2g, g, g/2."""

    def __init__(self, prior_width: int, width: int) -> None:
        super().__init__()
        p = prior_width
        self.stem = nn.Sequential(
            *_conv_norm(3, p, 2),
            *_conv_norm(p, p, 1),
            *_conv_norm(p, p, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv_norm(p, 2 * p, 2))
        self.conv3 = nn.Sequential(*_conv_norm(2 * p, 4 * p, 2))
        self.conv4 = nn.Sequential(*_conv_norm(4 * p, 4 * p, 2))
        self.out1 = nn.Conv2d(p, width, 1)
        self.out2 = nn.Conv2d(2 * p, width, 1)
        self.out3 = nn.Conv2d(4 * p, width, 1)
        self.out4 = nn.Conv2d(4 * p, width, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c1 = self.stem(image)  # side 4g
        c2 = self.conv2(c1)  # 2g
        c3 = self.conv3(c2)  # g
        c4 = self.conv4(c3)  # g/2
        return self.out1(c1), self.out2(c2), self.out3(c3), self.out4(c4)


def map_to_tokens(x: Tensor) -> Tensor:
    """Flatten a map [n, c, height, width] -> tokens [n, height * width, c], row-major."""
    return x.flatten(2).transpose(1, 2)


def tokens_to_map(x: Tensor, side: int) -> Tensor:
    """View tokens [n, side * side, c] as a map [n, c, side, side], channels_last in memory."""
    return x.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def resize_map(x: Tensor, side: int) -> Tensor:
    """Resize a map to [n, c, side, side], bilinear, pixel centres at halves
    (align_corners=False)."""
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
