"""A model folder that answers benchmarks through PyTorch, before it is exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from mmi_deploy.cli.documents_at_once import Board
from mmi_deploy.cli.machine import Machine
from mmi_deploy.documents.document import Document, encode_document
from mmi_deploy.documents.story import Story
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.events import ImageDone, TextDelta
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.spec.backends import AUTO, CPU
from mmi_deploy.spec.graphs import Limits
from mmi_deploy.system.files import sha256_of
from mmi_train.baseline.generation import generate
from mmi_train.model.diffusion import ddim
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
        self._machine, self._steps = machine, steps

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
    most = 1

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
        own = replace(options, schedule=None)
        for event in generate(self._model, self._tokenizer, document, own, self._scheduler):
            board.show(name, event)
            match event:
                case TextDelta(text):
                    story.add_text(text)
                case ImageDone(_, rgb):
                    story.add_picture(rgb)
        return story
