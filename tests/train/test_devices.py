"""No step of training mixes devices, or waits for what a device has computed.

The meta device stands for the GPU: an operator gets tensors of one device alone, apart from copies
and single numbers, and whatever reads values from it raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.presets import tiny
from mmi_train.data.batches import batch_of, packed_batch
from mmi_train.data.packing import PackedRow
from mmi_train.data.rows import TokenDocument, make_rows
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.data.synthetic.world import easy
from mmi_train.model.layout import moved
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.training.devices import device_called
from mmi_train.training.optimiser import FROM_SCRATCH, OptimiserConfig, make_optimiser, trainable
from mmi_train.training.stages.interleaved import InterleavedStage

CONFIG = tiny()
TOKENS = CONFIG.tokens
META = torch.device("meta")

_COPIES = {"aten::_to_copy", "aten::copy_"}


class OneDevice(TorchDispatchMode):
    """Raises where an operator gets tensors of two devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in found if tensor.dim()}
        if len(devices) > 1 and func.name().split(".")[0] not in _COPIES:
            raise AssertionError(f"{func} gets tensors of {sorted(devices)}")
        return func(*args, **kwargs)


@contextmanager
def strict() -> Iterator[None]:
    # Backward passes run in the thread that called them, so that the mode sees them too.
    with torch.autograd.set_multithreading_enabled(False), OneDevice():
        yield


def document(*kinds: str) -> TokenDocument:
    """Words and pictures."""
    ids, images = [TOKENS.bos], []
    for kind in kinds:
        if kind == "word":
            ids.append(9)
        else:
            ids += [TOKENS.boi] + [TOKENS.image] * CONFIG.visual_tokens
            images.append(np.zeros((64, 64, 3), np.uint8))
    ids.append(TOKENS.eos)
    count = len(images)
    return TokenDocument(
        np.array(ids),
        np.ones(len(ids), np.float32),
        tuple(images),
        (True,) * count,
        (True,) * count,
    )


def batches() -> dict[str, Batch]:
    """Packed and isolated rows, with pictures that see none, one and two others; text alone."""
    one, two = document("word", "picture"), document("picture", "word", "picture", "picture")
    text = document("word", "word")
    rows = [PackedRow(made.token_ids, made.images, (0,) * len(made.images)) for made in (one, two)]
    return {
        "isolated": batch_of(make_rows([one, two, text], TOKENS, 200), CONFIG),
        "alone": batch_of(make_rows([one], TOKENS), CONFIG),
        "packed": packed_batch(rows, CONFIG),
        "text": batch_of(make_rows([text], TOKENS), CONFIG),
    }


@pytest.fixture(scope="module")
def model() -> MMInterleaved:
    with META:
        made = MMInterleaved(CONFIG).train()
    return made.to_empty(device=META)  # its tables too, which are computed on the host


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["isolated", "alone", "packed", "text"])
def test_a_step_stays_on_its_device(model: MMInterleaved, name: str, checkpointed: bool) -> None:
    model.checkpoint_gradients(checkpointed)
    config = OptimiserConfig(
        rate=1e-3,
        steps=10,
        warmup=1,
        weight_decay=0.1,
        betas=(0.9, 0.99),
        eps=1e-8,
        rules=FROM_SCRATCH,
    )
    optimiser = make_optimiser(model, config)
    for group in optimiser.param_groups:
        group["fused"], group["foreach"] = False, True  # the fused kernel has no meta form
    batch = moved(batches()[name], META)
    with strict():
        losses = model(batch)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    assert losses.total.device == META


def test_a_step_of_the_main_stage_stays_on_its_device(model: MMInterleaved) -> None:
    model.checkpoint_gradients(False)
    stage = InterleavedStage(
        model, build_tokenizer(), DrawnWorld(easy()), {"drawing": 1, "story": 1}
    )
    stage.module.to_empty(device=META)
    batch = moved(stage.batch(0, np.random.default_rng(0)), META)
    with strict():
        stage.losses(batch)["total"].backward()


def test_the_mode_sees_what_it_is_for() -> None:
    on_gpu, on_host = torch.ones(3, device=META), torch.ones(3)
    with strict():
        with pytest.raises(AssertionError, match="tensors of"):
            on_gpu[torch.tensor([0, 1])]
        with pytest.raises(RuntimeError, match="cannot be called on meta|item"):
            bool(on_gpu.sum() > 0)
        with pytest.raises(Exception, match="meta"):
            on_gpu.cpu().numpy()
        assert (on_gpu + on_host.to(META)).device == META


def test_a_gpu_is_asked_for_and_missed() -> None:
    assert device_called("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert device_called("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="PyTorch sees no GPU.*--device cpu"):
        device_called("cuda")
