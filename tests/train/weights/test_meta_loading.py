"""Models are loaded without a second copy of their weights, and equal those built with numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.small_models import paper_reading, random_model, released_reading
from mmi_deploy.errors import WeightsError
from mmi_deploy.spec.config import ModelConfig, to_json
from mmi_deploy.spec.presets import tiny
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.training.lora import lora_rules
from mmi_train.training.optimiser import frozen_matrices
from mmi_train.weights.lazy_tensor import InMemory
from mmi_train.weights.model_folder import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    load_model,
    load_strictly,
    save_model,
    write_changed,
)

CONFIGS = {"paper": paper_reading, "released": released_reading, "tiny": tiny}


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory) -> tuple[MMInterleaved, Path]:
    """A model of each form with random weights, and its folder, in half precision."""
    model = random_model(CONFIGS[request.param]()).eval()
    folder = tmp_path_factory.mktemp("saved")
    save_model(model, folder, torch.float16)
    return model, folder


def as_before(folder: Path, config: ModelConfig) -> MMInterleaved:
    """The model with random weights first, and a copy of those in the file then."""
    model = MMInterleaved(config)
    load_strictly(model, load_file(folder / WEIGHTS), "the file")
    return model.eval()


def test_weights_and_constants_are_those_of_a_model_with_numbers(saved):
    model, folder = saved
    wanted, found = as_before(folder, model.config), load_model(folder)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(wanted, kind)())
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
    state = set(found.state_dict())
    assert len([name for name, _ in found.named_buffers() if name not in state]) > 20
    assert not found.training and all(p.requires_grad for p in found.parameters())


def test_weights_may_keep_the_type_of_the_file(saved):
    model, folder = saved
    found = load_model(folder, None)
    assert {value.dtype for value in found.parameters()} == {torch.float16}
    assert found.llm.cos.dtype == torch.float32
    own = load_model(folder).state_dict()
    assert all(torch.equal(value.float(), own[name]) for name, value in found.state_dict().items())


def test_frozen_matrices_in_bfloat16_give_the_same_loss_in_mixed_precision(tmp_path):
    """It rounds them at every use; without it, the rounding shows."""
    model = random_model(tiny())
    save_model(model, tmp_path, torch.float16)

    found = load_model(tmp_path, matrices=frozen_matrices(lora_rules()))
    types = {name: value.dtype for name, value in found.named_parameters()}
    assert types["llm.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert types["vision.encoder.layers.0.mlp.fc1.weight"] == torch.bfloat16
    assert types["llm.embed_tokens.weight"] == types["head.head.weight"] == torch.float16
    assert types["llm.norm.weight"] == types["image_decoder.unet.conv_in.weight"] == torch.float32
    assert {types[name] for name in types if name.startswith("image_decoder.vae.")} == {
        torch.float32
    }
    tokens = model.config.tokens
    ids = torch.tensor(
        [[tokens.bos, 8, tokens.boi, *[tokens.image] * model.config.visual_tokens, 9]]
    )
    side = model.config.vision.image_size
    size = model.config.image_decoder.image_size
    batch = Batch(
        ids,
        torch.zeros(1, 1).int(),
        torch.rand(1, 3, side, side),
        pictures=torch.tensor([[0, 0]]),
        target_pixels=torch.rand(1, 3, size, size),
    )
    plain = load_model(tmp_path)
    for one in (found, plain):
        one.train()
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        ours = found(batch)
        torch.manual_seed(0)
        wanted = plain(batch)
    assert torch.equal(ours.text, wanted.text)
    assert ours.image > 0 and torch.equal(ours.image, wanted.image)


@pytest.mark.timing
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (None, 2)])
def test_the_weights_are_in_memory_once(tmp_path: Path, dtype: torch.dtype | None, size: int):
    """A language model of 100 million parameters: nothing of its size beside them."""
    small = tiny()
    sizes = {"vocab": 30000, "width": 1024, "mlp_width": 2800, "layers": 4}
    config = replace(
        small,
        llama=replace(small.llama, **sizes, heads=16, kv_heads=16),
        image_decoder=replace(
            small.image_decoder,
            resampler=replace(small.image_decoder.resampler, context_width=1024),
        ),
    )
    with torch.device("meta"):
        state = MMInterleaved(config).state_dict()
    parameters = sum(value.numel() for value in state.values())
    assert parameters > 1e8
    save_file(
        {name: torch.zeros(value.shape, dtype=torch.float16) for name, value in state.items()},
        tmp_path / WEIGHTS,
    )
    (tmp_path / CONFIG).write_text(to_json(config))
    save_model(MMInterleaved(small), tmp_path / "small")
    # In a process of its own, which has all code that a load imports, and no freed pages to use
    # again.
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from mmi_deploy.system.process_memory import trim\n"
        "from mmi_train.weights.model_folder import load_model\n"
        "from train.weights.test_lazy_tensor import peak_growth\n"
        "found = []\n"
        f"dtype = {dtype}\n"
        "load_model(Path(sys.argv[1]) / 'small', dtype)\n"
        "trim()\n"
        "load = lambda: found.append(load_model(Path(sys.argv[1]), dtype))\n"
        "print(peak_growth(load))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout)
    assert 0.9 < growth / (parameters * size) < 1.2


def test_a_changed_model_keeps_everything_else_byte_for_byte(saved, tmp_path):
    model, folder = saved
    (folder / TOKENIZER).write_text("{}")
    name = "llm.layers.0.mlp.up_proj.weight"
    new = torch.randn_like(model.state_dict()[name])
    write_changed(tmp_path / "out", folder, {name: InMemory(new)})
    before, after = (load_file(path / WEIGHTS) for path in (folder, tmp_path / "out"))
    assert torch.equal(after.pop(name), new.half())
    before.pop(name)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    for other in (CONFIG, TOKENIZER):
        assert (tmp_path / "out" / other).read_bytes() == (folder / other).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, value: {f"{name}s": value}, "has no tensor"),
        (lambda name, value: {name: value[:1]}, "of the shape"),
        (lambda name, value: {name: value * torch.nan}, "holds NaN"),
        (lambda name, value: {name: value + 1e6}, "has grown beyond float16"),
    ],
)
def test_a_change_that_does_not_fit_is_told(
    saved, tmp_path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], message: str
):
    model, folder = saved
    name = "llm.layers.0.mlp.up_proj.weight"
    changed = change(name, model.state_dict()[name])
    with pytest.raises(WeightsError, match=message):
        write_changed(
            tmp_path / "out", folder, {key: InMemory(value) for key, value in changed.items()}
        )
    assert not (tmp_path / "out" / WEIGHTS).exists()
