"""The whole model: against every number of the published forward pass and generation, and the rules
of its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.presets import tiny
from mmi_train.checkpoint_import.published import rename
from mmi_train.checkpoint_import.state_dict import published_module
from mmi_train.golden.configs import Section
from mmi_train.golden.configs import model as published_config
from mmi_train.model.diffusion import ddim
from mmi_train.model.generation import draw_pictures, generate_texts, score_options
from mmi_train.model.image_decoder import DenoisingStep, RandomDraws
from mmi_train.model.layout import row_layout
from mmi_train.model.losses import text_targets
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.model.vae import Posterior

Run = tuple[dict[str, Tensor], dict[str, Tensor]]

# Tolerances relative to the greatest entry: fp32 sums in another order through tens of layers;
# small terms that cancel; a mean over thousands of entries.
FORWARD, GRADIENT, LOSS = 1e-4, 1e-3, 1e-5


def close(got: Tensor, expected: Tensor, tolerance: float = FORWARD) -> None:
    assert got.shape == expected.shape
    worst = (got - expected).abs().max().item() / expected.abs().max().item()
    assert worst < tolerance, f"relative error {worst:.2g}"


def slots(counts: list[int]) -> Tensor:
    """[b, m]: images numbered through the rows."""
    made, following = torch.full((len(counts), max(counts)), -1), 0
    for row, count in enumerate(counts):
        made[row, :count] = torch.arange(following, following + count)
        following += count
    return made


@pytest.fixture(scope="module")
def tensors(golden: Callable) -> Callable[[str], Run]:
    def read(name: str) -> Run:
        run = golden(name)
        inputs, outputs = (
            {key: torch.from_numpy(value) for key, value in run.part(part).items()}
            for part in ("in", "out")
        )
        return inputs, outputs

    return read


@pytest.fixture(scope="module")
def published(golden: Callable) -> MMInterleaved:
    """The published model at the golden files' size, with their weights."""
    run = golden("full_forward")
    state = {name: torch.from_numpy(value) for name, value in run.part("state").items()}
    config = published_config(Section(run.about["config"]), state, image_side=224)
    return published_module(lambda: MMInterleaved(config), state)


@pytest.mark.slow
@pytest.mark.parametrize("caption_only, name", [(False, "mmc4"), (True, "laion_en")])
def test_published_losses_and_gradients(
    published: MMInterleaved, tensors: Callable[[str], Run], caption_only: bool, name: str
) -> None:
    given, out = tensors("full_forward")
    counts = given["num_image_per_seq"].tolist()
    batch = Batch(
        token_ids=given["text_ids"],
        image_slot=slots(counts),
        pixels=given["image_tensors"],
        pictures=torch.tensor([(row, j) for row, count in enumerate(counts) for j in range(count)]),
        target_pixels=given["image_tensors_dec"],
        text_target=text_targets(
            given["text_ids"],
            published.config.tokens,
            real=given["attention_mask"],
            only_after_image=caption_only,
        ),
    )
    draws = RandomDraws(
        given["rng.000_rand_like"].flatten(),
        given["rng.001_randn"],
        given["rng.002_randn_like"],
        given["rng.003_randint"],
    )
    published.zero_grad()
    losses = published(batch, draws=draws)
    for part, loss in (("", losses.total), ("txt_", losses.text), ("img_", losses.image)):
        close(loss, out[f"loss_{part}{name}"], LOSS)
    assert losses.pictures.isnan().tolist() == [True, False, False, False, False]
    gradients = [key for key in out if key.startswith("grad.")]
    if name == "mmc4":
        losses.total.backward()
        for key in gradients:
            parameter = published.get_parameter(rename(key.removeprefix("grad.")))
            close(parameter.grad, out[key], GRADIENT)
        assert len(gradients) == 13


@pytest.mark.slow
def test_published_forward_step_by_step(
    published: MMInterleaved, tensors: Callable[[str], Run]
) -> None:
    given, out = tensors("full_forward")
    ids, real = given["text_ids"], given["attention_mask"].bool()
    counts = given["num_image_per_seq"].tolist()
    slot = slots(counts)
    pictures = torch.tensor([(row, j) for row, count in enumerate(counts) for j in range(count)])
    with torch.no_grad():
        images = published.encode_images(given["image_tensors"])
        close(published.embed_rows(ids, images, slot), out["mm_embeds"])
        hidden = published.read(ids, images, slot)
        close(hidden[real], out["last_hidden_state"][real])
        close(published.head(hidden)[real], out["text_logits"][real])
        layout = published.picture_layout(ids, slot, pictures)
        context, length = published.context(hidden, layout)
        assert length.tolist() == out["context_attention_mask"].sum(1).tolist()
        decoder = published.image_decoder
        marked = decoder.context_proj(context) + decoder.context_positions[: context.shape[1]]
        used = out["context_attention_mask"].bool()
        close(marked[used], out["context_features"][used])
        close(published.condition(hidden, layout), out["resampled_context"])
        before = published.previous_images(images, layout)
    finest = [side**2 for side in published.config.vision.level_sides]
    coarsest = before.features.split(finest, 1)[3]
    assert before.position.tolist() == out["imgdec_mmfs_mask"].tolist()
    for row in range(len(pictures)):
        if before.position[row, 0]:
            theirs = out["imgdec_mmfs_level3"][row, 0].flatten(1).T
            close(coarsest[before.slot[row, 0]], theirs)


@pytest.mark.slow
def test_published_text_generation(published: MMInterleaved, tensors: Callable[[str], Run]) -> None:
    given, out = tensors("full_generate_texts_beam1")
    text = generate_texts(
        published,
        given["text_ids"],
        given["image_tensors"],
        slots(given["num_image_per_seq"].tolist()),
        given["attention_mask"],
        max_new_tokens=10,
        min_length=4,
    )
    assert text.tolist() == out["text_ids"].tolist()


@pytest.mark.slow
def test_published_scores_of_options(
    published: MMInterleaved, tensors: Callable[[str], Run]
) -> None:
    given, out = tensors("full_generate_scores")
    scores = score_options(
        published,
        given["text_ids"],
        given["image_tensors"],
        torch.zeros(1, dtype=torch.long),
        given["options_ids"],
        given["options_attn_mask"],
    )
    close(scores, out["scores"].flatten())


@pytest.mark.slow
def test_published_image_generation(
    published: MMInterleaved, tensors: Callable[[str], Run], golden: Callable
) -> None:
    """The published pipeline decodes with an autoencoder of its own, read from disk."""
    given, out = tensors("full_generate_images")
    autoencoder = published.image_decoder.vae.autoencoder
    own = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    disk = golden("full_generate_images").part("state")
    autoencoder.load_state_dict(
        {name.removeprefix("disk_vae."): torch.from_numpy(value) for name, value in disk.items()}
    )
    scheduler = ddim(published.config.image_decoder.diffusion)
    scheduler.set_timesteps(5)
    steps: list[DenoisingStep] = []
    pixels = draw_pictures(
        published,
        given["text_ids"],
        given["image_tensors"],
        slots([len(given["image_tensors"])]),
        torch.tensor([[0, int(given["target_image_idxs"])]]),
        given["initial_latents"],
        scheduler,
        guidance=3.5,
        step_noise=[given[f"step_noise.{step}"] for step in range(5)],
        on_step=steps.append,
    )
    autoencoder.load_state_dict(own)
    assert [step.timestep for step in steps] == out["timesteps"].tolist()
    for index, step in enumerate(steps):
        close(step.prediction, out[f"guided_eps.{index}"])
        close(step.latents, out[f"latents.{index}"])
    close(pixels, out["image"])


# ---- The tiny preset, untrained: how batches are read.

CONFIG = tiny()
S, E, P, B, V = (getattr(CONFIG.tokens, name) for name in ("bos", "eos", "pad", "boi", "image"))
IMAGE = [B] + [V] * CONFIG.visual_tokens
FIRST = [S, 10, 11, *IMAGE, 12, E]
SECOND = [S, 20, *IMAGE, 21, 22, *IMAGE, 23, E]


@pytest.fixture(scope="module")
def model() -> MMInterleaved:
    """With gates and last convolutions of MMFS open, so that images matter everywhere."""
    torch.manual_seed(0)
    made = MMInterleaved(CONFIG).eval()
    for look_back in made.llm.mmfs_layers:
        torch.nn.init.constant_(look_back.gate, 0.7)
    for block in made.image_decoder.unet.look_back:
        torch.nn.init.normal_(block.conv.weight, std=0.1)
    torch.nn.init.normal_(made.boi_embedding)
    return made


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    side = CONFIG.vision.image_size
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))


def rows(*documents: list[int]) -> Tensor:
    longest = max(map(len, documents))
    return torch.tensor([[*ids, *[P] * (longest - len(ids))] for ids in documents])


def test_embedding_puts_visual_tokens_in_place_and_marks_the_begin_of_an_image(
    model: MMInterleaved, pixels: Tensor
) -> None:
    images = model.encode_images(pixels)
    ids = rows(FIRST, SECOND)
    embeddings = model.embed_rows(ids, images, torch.tensor([[2, -1], [0, 1]]))
    words, count = model.llm.embed_tokens.weight, CONFIG.visual_tokens
    torch.testing.assert_close(embeddings[0, 4 : 4 + count], images.tokens[2])
    torch.testing.assert_close(embeddings[1, 3 : 3 + count], images.tokens[0])
    torch.testing.assert_close(embeddings[0, 3], words[B] + model.boi_embedding[0])
    torch.testing.assert_close(embeddings[0, 1], words[10])


def test_packed_documents_kept_apart_equal_rows_of_their_own(
    model: MMInterleaved, pixels: Tensor
) -> None:
    """Images are hidden across `<s>` by layout; text is by mask and positions, if asked."""
    images = model.encode_images(pixels)
    packed = rows(FIRST + SECOND)
    length = len(FIRST)
    position = torch.cat([torch.arange(length), torch.arange(len(SECOND))])[None]
    column = torch.arange(packed.shape[1])
    document = (column >= length).int()
    mask = (column[:, None] >= column) & (document[:, None] == document)
    slot = np.array([[2, 0, 1]])
    isolated = row_layout(packed.numpy(), slot, CONFIG, isolated=True)
    assert isolated.mask is not None and torch.equal(isolated.mask, mask[None, None])
    assert torch.equal(isolated.position, position)
    together = model.read_rows(packed, images, isolated)
    first = model.read(rows(FIRST), images, torch.tensor([[2]]))
    second = model.read(rows(SECOND), images, torch.tensor([[0, 1]]))
    expected = torch.cat([first, second], dim=1)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)


def test_rows_without_images_equal_those_whose_images_come_later(
    model: MMInterleaved, pixels: Tensor
) -> None:
    """MMFS of a query that sees nothing is the same with and without encoded images."""
    plain = model.read(rows(FIRST[:3]), model.encode_images(None), torch.full((1, 1), -1))
    later = model.read(rows(FIRST), model.encode_images(pixels), torch.tensor([[1]]))
    torch.testing.assert_close(plain, later[:, :3], rtol=1e-4, atol=1e-5)


def test_a_picture_that_is_only_drawn_needs_no_image(model: MMInterleaved, pixels: Tensor) -> None:
    """A document that ends at its begin-of-image token trains the same picture."""
    posterior = Posterior(*(torch.randn(1, *model.image_decoder.latent_shape) for _ in range(2)))
    draws = replace(model.image_decoder.random_draws(1), drop=torch.ones(1))
    shared = {"pictures": torch.tensor([[0, 1]]), "target_posterior": posterior}
    end = len(SECOND) - 2 - CONFIG.visual_tokens
    assert SECOND[end - 1] == B
    drawn = Batch(rows(SECOND[:end]), torch.tensor([[0, -1]]), pixels[:1], **shared)
    read = Batch(rows(SECOND), torch.tensor([[0, 1]]), pixels[:2], **shared)
    with torch.no_grad():
        expected = model(read, draws=draws)
        torch.testing.assert_close(model(drawn, draws=draws).image, expected.image)


def test_pictures_draw_from_their_own_document_backwards(model: MMInterleaved) -> None:
    ids = rows(FIRST + SECOND[:3])
    hidden = torch.arange(ids.shape[1]).float()[None, :, None].expand(-1, -1, 2)
    slot = torch.full((1, 3), -1)
    layout = model.picture_layout(ids, slot, torch.tensor([[0, 1], [0, 0]]))
    context, length = model.context(hidden, layout)
    start = len(FIRST)
    assert length.tolist() == [3, 4]
    assert context[:, :, 0].tolist() == [[start + 2, start + 1, start, 0], [3, 2, 1, 0]]


def test_image_loss_is_the_mean_over_all_pictures_even_those_left_out(
    model: MMInterleaved, pixels: Tensor
) -> None:
    """Sec. 3.3 and the published code: an image right after `<s>` counts as zero."""
    bare = [S, *IMAGE, 30, E]
    shape = model.image_decoder.latent_shape
    posterior = Posterior(torch.randn(3, *shape), torch.randn(3, *shape))
    weight = torch.tensor([1.0, 2.0, 0.5])
    batch = Batch(
        rows(bare, SECOND),
        torch.tensor([[0, -1], [1, 2]]),
        pixels,
        pictures=torch.tensor([[0, 0], [1, 0], [1, 1]]),
        target_posterior=posterior,
        picture_weight=weight,
    )
    with torch.no_grad():
        losses = model(batch, draws=model.image_decoder.random_draws(3))
    own = losses.pictures
    assert own[0].isnan()
    torch.testing.assert_close(losses.image, (2.0 * own[1] + 0.5 * own[2]) / 3)
    torch.testing.assert_close(losses.total, losses.text + 10 * losses.image)


def test_a_masked_picture_counts_in_the_mean_and_is_not_computed(
    model: MMInterleaved, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published `image_loss_mask`: loss and gradients are those of the mask after the U-Net."""
    shape = model.image_decoder.latent_shape
    base = Batch(
        rows(SECOND),
        torch.tensor([[1, 2]]),
        pixels,
        pictures=torch.tensor([[0, 0], [0, 1]]),
        target_posterior=Posterior(torch.randn(2, *shape), torch.randn(2, *shape)),
    )
    draws = replace(model.image_decoder.random_draws(2), drop=torch.ones(2))
    weights = [model.boi_embedding, model.image_decoder.context_proj.weight]
    images = model.encode_images(pixels)
    hidden = model.read(base.token_ids, images, base.image_slot)
    decoder = model.image_decoder
    layout = model.picture_layout(base.token_ids, base.image_slot, base.pictures)
    each = decoder.losses(
        base.target_posterior,
        model.condition(hidden, layout),
        model.previous_images(images, layout),
        draws,
    )
    expected = (each * torch.tensor([0.0, 1.0])).mean()
    wanted = torch.autograd.grad(expected, weights)
    masked = replace(base, picture_weight=torch.tensor([0.0, 1.0]))
    found = model(masked, draws=draws)
    torch.testing.assert_close(found.image, expected)
    assert found.pictures.isnan().tolist() == [True, False]
    got = torch.autograd.grad(found.image, weights)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)

    monkeypatch.setattr(decoder, "losses", pytest.fail)
    nothing = replace(base, picture_weight=torch.zeros(2))
    assert model(nothing, draws=draws).image == 0
    text_alone = model(base, draws=draws, image_weight=0.0, text_weight=2.0)
    assert text_alone.total == 2 * text_alone.text and text_alone.image == 0


def test_targets_given_as_pixels_or_as_posterior_train_the_same(
    model: MMInterleaved, pixels: Tensor
) -> None:
    size = CONFIG.image_decoder.image_size
    target = torch.rand(1, 3, size, size)
    shared = {"pictures": torch.tensor([[0, 0]]), "pixels": pixels[:1]}
    base = rows(FIRST), torch.tensor([[0]])
    draws = model.image_decoder.random_draws(1)
    posterior = model.image_decoder.encode(target)
    with torch.no_grad():
        expected = model(Batch(*base, target_pixels=target, **shared), draws=draws)
        got = model(Batch(*base, target_posterior=posterior, **shared), draws=draws)
    torch.testing.assert_close(got.image, expected.image)


def test_text_loss_counts_tokens_by_weight(model: MMInterleaved) -> None:
    """A row whose tokens weigh nothing does not change the loss."""
    text = [S, 10, 11, 12, E]
    slot = torch.full((2, 1), -1)
    weight = torch.tensor([[1.0] * 5, [0.0] * 5])
    alone = model(Batch(rows(text), slot[:1]))
    both = model(Batch(rows(text, [S, 40, 41, 42, E]), slot, token_weight=weight))
    torch.testing.assert_close(both.text, alone.text)
    assert alone.image == 0 and alone.total == alone.text


def test_every_trained_parameter_gets_a_gradient(model: MMInterleaved, pixels: Tensor) -> None:
    """All but the autoencoder's, which is frozen, from one batch with a dropped condition."""
    shape = (2, *model.image_decoder.latent_shape)
    batch = Batch(
        rows(SECOND),
        torch.tensor([[0, 1]]),
        pixels[:2],
        pictures=torch.tensor([[0, 0], [0, 1]]),
        target_posterior=Posterior(torch.randn(shape), torch.randn(shape)),
    )
    draws = replace(model.image_decoder.random_draws(2), drop=torch.tensor([0.0, 1.0]))
    model.zero_grad()
    model(batch, draws=draws).total.backward()
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None and not name.startswith("image_decoder.vae.")
    ]
    assert missing == []
    model.zero_grad()


def test_cached_decoding_equals_reading_the_whole_row(model: MMInterleaved, pixels: Tensor) -> None:
    """Greedy text, left padded and not, against a fresh reading of all tokens at every step."""
    prompts = [[S, 10, *IMAGE, 11], [S, *IMAGE, 20, 21, 22, *IMAGE, 23]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[P] * (longest - len(row)) + row for row in prompts])
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    slot = torch.tensor([[2, -1], [0, 1]])
    text = generate_texts(model, ids, pixels, slot, real, max_new_tokens=6, min_length=9)
    assert text.shape == (2, 7)
    images = model.encode_images(pixels)
    for row, prompt in enumerate(prompts):
        written = list(prompt)
        for token in text[row, 1:].tolist():
            hidden = model.read(torch.tensor([written]), images, slot[row : row + 1, : 1 + row])
            logits = model.head(hidden[0, -1])
            logits[[E, B]] = -torch.inf
            assert token == logits.argmax().item()
            written.append(token)
        assert V not in written[len(prompt) :]  # or no whole row could say the same


def test_generation_ends_at_the_end_and_pads(model: MMInterleaved) -> None:
    """min_length counts the `<s>` that the text begins with; a row that has ended is padded."""
    head = model.head.head
    bias = head.bias.detach().clone()
    ids, real = torch.tensor([[S, 10], [S, 11]]), torch.ones(2, 2)
    slot = torch.full((2, 1), -1)
    with torch.no_grad():
        head.bias[E] += 1e4
        head.bias[15] += 5e3
    try:
        text = generate_texts(model, ids, None, slot, real, max_new_tokens=5, min_length=3)
    finally:
        with torch.no_grad():
            head.bias.copy_(bias)
    assert text.tolist() == [[S, 15, 15, E]] * 2


def test_image_tokens_without_an_image_are_refused(model: MMInterleaved) -> None:
    with pytest.raises(DocumentError, match="image tokens"):
        model(Batch(rows(FIRST), torch.tensor([[-1]])))
