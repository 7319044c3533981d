"""Choices that commands of training share."""

from __future__ import annotations

from typing import Literal

World = Literal["easy", "medium", "hard"]
Precision = Literal["bf16", "fp32"]
Device = Literal["auto", "cpu", "cuda"]
