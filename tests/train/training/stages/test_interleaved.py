"""From drawn documents to batches: what is packed, what is learned, what is drawn."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from mmi_deploy.spec.presets import tiny
from mmi_train.data.batches import batch_of
from mmi_train.data.rows import each_alone, make_rows, tokens_of
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.data.synthetic.tasks import MAKERS, TaskImage
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.data.synthetic.world import easy, hard
from mmi_train.model.losses import IGNORE
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training.from_scratch import endless_documents
from mmi_train.training.stages.interleaved import InterleavedStage
from mmi_train.training.stages.packed import PackedStage

CONFIG = tiny()
TOKENS = CONFIG.tokens


@pytest.fixture(scope="module")
def model() -> MMInterleaved:
    torch.manual_seed(0)
    model = MMInterleaved(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("look_back.gate") or (".look_back." in name and ".conv." in name):
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(3)
    tokenizer = build_tokenizer()
    kinds = ("reading", "drawing", "story", "segmentation", "drawing", "story")
    made = [MAKERS[kind](rng, easy(), "train") for kind in kinds]
    return [
        tokens_of(document.parts, each_alone(tokenizer), TOKENS, CONFIG.visual_tokens)
        for document in made
    ]


def test_every_document_starts_and_ends_as_it_should(documents):
    for document in documents:
        assert document.token_ids[0] == TOKENS.bos
        assert document.token_ids[-1] == (TOKENS.boi if document.drawn[-1] else TOKENS.eos)
        read = int((document.token_ids == TOKENS.image).sum())
        assert read == CONFIG.visual_tokens * sum(document.encoded)


def test_learned_tokens_are_answers_stories_and_announcements_of_pictures():
    rng = np.random.default_rng(0)
    tokenizer = build_tokenizer()
    document = MAKERS["reading"](rng, easy(), "train")
    made = tokens_of(document.parts, each_alone(tokenizer), TOKENS, CONFIG.visual_tokens)
    learned = tokenizer.decode(made.token_ids[made.weight > 0].tolist())
    texts = [part.text for part in document.parts if not isinstance(part, TaskImage) and part.learn]
    assert learned.replace(" ", "") == "".join(texts).replace(" ", "")
    drawing = MAKERS["drawing"](rng, easy(), "train")
    made = tokens_of(drawing.parts, each_alone(tokenizer), TOKENS, CONFIG.visual_tokens)
    assert made.token_ids[made.weight > 0].tolist() == [TOKENS.boi]


def test_a_packed_document_is_read_and_drawn_as_if_alone(model, documents):
    """Hidden states, look-back images and conditions of packed rows equal those of single ones."""
    together = batch_of(make_rows(documents, TOKENS, 180), CONFIG)
    alone = batch_of(make_rows(documents, TOKENS), CONFIG)
    assert len(together.token_ids) < len(alone.token_ids)
    found = {}
    for name, batch in (("together", together), ("alone", alone)):
        images = model.encode_images(batch.pixels)
        assert (batch.layout.rows.mask is None) == (name == "alone")
        with torch.inference_mode():
            hidden = model.read_rows(batch.token_ids, images, batch.layout.rows)
            condition = model.condition(hidden, batch.layout.pictures)
            looked = model.previous_images(images, batch.layout.pictures)
            values = model.image_decoder.unet.image_values(looked.features)
            seen = model.image_decoder.unet.step(
                torch.ones(len(condition), *model.image_decoder.latent_shape),
                model.image_decoder.unet.time_rows(torch.tensor([500])),
                model.image_decoder.unet.condition_keys_values(condition),
                values,
                looked.slot,
                looked.position,
            )
            text = model.text_loss(hidden, batch)
        order = np.lexsort(batch.target_pixels.flatten(1)[:, ::97].numpy().T)
        found[name] = (seen[torch.from_numpy(order)], text)
    torch.testing.assert_close(found["together"][0], found["alone"][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["together"][1], found["alone"][1], rtol=1e-5, atol=1e-5)


def test_only_weighted_tokens_are_targets(documents):
    rows = make_rows(documents, TOKENS, 180)
    batch = batch_of(rows, CONFIG)
    weighted = torch.from_numpy(rows.weight[:, 1:]) > 0
    assert torch.equal(batch.text_target != IGNORE, weighted)


@pytest.mark.slow
def test_a_few_steps_lower_both_losses():
    """The whole model learns: the same small part, seen over and over."""
    torch.manual_seed(0)
    model = MMInterleaved(CONFIG)
    mixture = {"reading": 2, "drawing": 2, "story": 1}
    stage = InterleavedStage(model, build_tokenizer(), DrawnWorld(easy()), mixture)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    history = []
    for _ in range(12):
        torch.manual_seed(1)
        losses = stage.losses(stage.batch(0, np.random.default_rng(1)))
        losses["total"].backward()
        optimiser.step()
        optimiser.zero_grad()
        history.append({name: float(value.detach()) for name, value in losses.items()})
    assert history[-1]["text"] < 0.75 * history[0]["text"]
    assert history[-1]["image"] < 0.97 * history[0]["image"]


def test_the_paper_s_stage_packs_rows_of_the_context_length_and_leaves_first_images_out(model):
    """Sec. 4.1: an image right after `<s>` has nothing to be drawn from and no loss."""
    source = partial(endless_documents, CONFIG, build_tokenizer(), DrawnWorld(easy()))
    stage = PackedStage(model, source, str(easy()), length=150, rows=3)
    losses = stage.losses(stage.batch(0, np.random.default_rng(0)))
    assert torch.isfinite(losses["total"])
    total = losses["text"] + 10 * losses["image"]
    torch.testing.assert_close(losses["total"], total)


def test_a_stage_of_another_world_is_another_stage(model):
    """Or a run would go on with other data than it was begun with."""
    source = partial(endless_documents, CONFIG, build_tokenizer())
    packed = {
        str(PackedStage(model, source, str(w), length=150).describe()) for w in (easy(), hard())
    }
    kept_apart = {
        str(InterleavedStage(model, build_tokenizer(), DrawnWorld(w)).describe())
        for w in (easy(), hard())
    }
    assert len(packed) == len(kept_apart) == 2


def test_checkpointing_gradients_changes_no_gradient(model):
    gradients = []
    for on in (False, True):
        model.checkpoint_gradients(on)
        model.train().zero_grad()
        stage = InterleavedStage(
            model, build_tokenizer(), DrawnWorld(easy()), {"reading": 1, "story": 2}
        )
        torch.manual_seed(0)
        stage.losses(stage.batch(0, np.random.default_rng(4)))["image"].backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    model.checkpoint_gradients(False)
    model.eval().zero_grad(set_to_none=True)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpointing_gradients_keeps_nothing_of_mmfs_in_the_unet(model):
    """Its blocks keep their inputs alone; without, about 1.5 GB a picture at the paper's size."""

    def kept() -> int:
        """Bytes that the U-Net keeps for its backward pass."""
        unet, config = model.image_decoder.unet, CONFIG
        cells = sum(side * side for side in config.vision.level_sides)
        features = torch.randn(2, cells, config.vision.width, requires_grad=True)
        latents = torch.randn(2, *model.image_decoder.latent_shape)
        condition = torch.randn(2, 8, config.image_decoder.unet.condition_width)
        slot = torch.arange(2)[:, None]
        total = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            unet(latents, torch.tensor([1, 2]), condition, features, slot, torch.ones_like(slot))
        return total

    model.train()
    whole = kept()
    model.checkpoint_gradients(True)
    less = kept()
    model.checkpoint_gradients(False)
    model.eval()
    assert less < whole / 5, (less, whole)
