"""A model folder that answers benchmarks through PyTorch, before it is exported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmi_deploy.cli.documents_at_once import Board
from mmi_deploy.cli.machine import Machine
from mmi_deploy.documents.document import Document, encode_document
from mmi_deploy.documents.images import to_pixels
from mmi_deploy.documents.story import Story
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.events import ImageDone, TextDelta
from mmi_deploy.runtime.options import MOST_BEAMS, GenerationOptions
from mmi_deploy.spec.backends import AUTO, CPU
from mmi_deploy.spec.graphs import Limits
from mmi_deploy.system.files import sha256_of
from mmi_train.baseline.generation import generate
from mmi_train.model.diffusion import ddim
from mmi_train.model.generation import score_options, search_texts
from mmi_train.weights.model_folder import CONFIG, TOKENIZER, WEIGHTS, load_model

# Denoising steps of a picture.
STEPS = 20


class ModelFolder:
    """The model in `machine.bundle`, in float32 on the GPU if there is one, one question after
    another; pictures by DDIM in `steps` steps. Raises `ConfigError` for options of bundles."""

    def __init__(self, machine: Machine, steps: int) -> None:
        for option, given in {
            "--target": machine.target != CPU,
            "--kernels": machine.kernels != AUTO,
            "--slots": machine.slots is not None,
            "--unproved": machine.unproved,
        }.items():
            if given:
                raise ConfigError(
                    f"{option} is of bundles, and PyTorch runs the model folder {machine.bundle}",
                    fix="leave it out, or make a bundle with `mmi export`",
                )
        self._machine, self._steps, self.most_beams = machine, steps, MOST_BEAMS

    def record(self, options: GenerationOptions) -> dict[str, Any]:
        folder, settings = self._machine.bundle, asdict(options)
        del settings["previews"]  # not in the results
        files = {name: sha256_of(folder / name) for name in (CONFIG, TOKENIZER, WEIGHTS)}
        return {"model": files, "target": "pytorch-fp32", **settings, "steps": self._steps}

    @contextmanager
    def opened(self, board: Board) -> Iterator[_Pytorch]:
        board.say("loading the model")
        yield _Pytorch(self._machine, self._steps)


class _Pytorch:
    most, most_beams = 1, MOST_BEAMS

    def __init__(self, machine: Machine, steps: int) -> None:
        if machine.threads:
            torch.set_num_threads(machine.threads)
        there = torch.cuda.is_available()
        device = torch.device("cuda", machine.device) if there else torch.device("cpu")
        self._model = load_model(machine.bundle).to(device)
        config = self._model.config
        self._tokenizer = Tokenizer.open(machine.bundle / TOKENIZER, config.tokens)
        self._scheduler = ddim(config.image_decoder.diffusion)
        self._scheduler.set_timesteps(steps)
        self._limits = Limits(config.llama.context, images=config.llm_mmfs.images - 1)
        self.side = config.vision.image_size

    def check(self, document: Document, options: GenerationOptions) -> None:
        config, limits = self._model.config, self._limits
        encode_document(document, self._tokenizer, config, limits.context, limits.images)
        options.sampling.check_ids(config.llama.vocab)

    async def story(
        self, name: str, document: Document, options: GenerationOptions, board: Board
    ) -> Story:
        story = Story(document)
        if options.beams > 1:
            story.add_text(self._found(document, options))
            return story
        own = replace(options, schedule=None)
        for event in generate(self._model, self._tokenizer, document, own, self._scheduler):
            board.show(name, event)
            match event:
                case TextDelta(text):
                    story.add_text(text)
                case ImageDone(_, rgb):
                    story.add_picture(rgb)
        return story

    async def scores(self, document: Document, options: Sequence[str]) -> list[float]:
        ids, pixels, slot = self._inputs(document)
        texts = [self._tokenizer.encode(text) for text in options]
        longest = max(map(len, texts))
        pad = self._model.config.tokens.pad
        padded = ids.new_tensor([[*text, *[pad] * (longest - len(text))] for text in texts])
        lengths = ids.new_tensor([len(text) for text in texts])
        real = torch.arange(longest, device=ids.device) < lengths[:, None]
        scores: list[float] = score_options(self._model, ids, pixels, slot, padded, real).tolist()
        return scores

    def _found(self, document: Document, options: GenerationOptions) -> str:
        """The text that a beam search finds."""
        ids, pixels, slot = self._inputs(document)
        (found,), _ = search_texts(
            self._model,
            ids[None],
            pixels,
            slot[None],
            torch.ones_like(ids[None], dtype=torch.bool),
            max_new_tokens=options.max_tokens,
            beams=options.beams,
            min_length=1 + options.min_tokens,
            repetition_penalty=options.repetition_penalty,
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
        )
        tokens = self._model.config.tokens
        ends = (*tokens.ends, tokens.boi, tokens.pad)
        return self._tokenizer.decode(
            [*takewhile(lambda token: token not in ends, found[1:].tolist())]
        )

    def _inputs(self, document: Document) -> tuple[Tensor, Tensor | None, Tensor]:
        """Token ids [t], pixels of the pictures [m, 3, side, side], None without any, and their
        slots [m]."""
        config, limits = self._model.config, self._limits
        encoded = encode_document(document, self._tokenizer, config, limits.context, limits.images)
        device = self._model.llm.embed_tokens.weight.device
        given = [image.rgb for image in encoded.images if image is not None]
        pixels = None
        if given:
            pixels = torch.from_numpy(np.stack([to_pixels(rgb) for rgb in given])).to(device)
        slot = (
            torch.arange(len(given), device=device) if given else torch.tensor([-1], device=device)
        )
        return torch.from_numpy(encoded.token_ids).to(device), pixels, slot
