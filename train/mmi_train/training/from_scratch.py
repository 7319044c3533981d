"""Train a preset from scratch in up to four stages.

First the autoencoder; then the language model and the U-Net's condition, without the U-Net; then
all parts together; and last, where it is asked for, the image decoder alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from mmi_deploy.documents.tokenizer import read_tokenizer_file
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import ModelConfig, VaeConfig
from mmi_deploy.system.files import write_file
from mmi_deploy.system.output_folder import check_replaceable, new_folder, run_folder
from mmi_deploy.system.progress import Progress, silent
from mmi_train.data.corpus import Corpus
from mmi_train.data.rows import TokenDocument, each_alone, tokens_of
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.data.synthetic.world import easy
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.model.vae import Vae
from mmi_train.training.checkpoints import latest_checkpoint
from mmi_train.training.loop import RunConfig, checksum_of, train
from mmi_train.training.optimiser import FROM_SCRATCH, IMAGE_DECODER, OptimiserConfig
from mmi_train.training.stages.autoencoder import AutoencoderStage
from mmi_train.training.stages.interleaved import InterleavedStage
from mmi_train.training.stages.packed import PackedStage
from mmi_train.training.stages.pictures import PicturesStage
from mmi_train.weights.lazy_tensor import StoredTensor
from mmi_train.weights.model_folder import FOLDER_KIND, TOKENIZER, load_model, save_model

# Initial tanh gates of MMFS without pre-trained parts: a closed gate protects a pre-trained LLM,
# but only hides the images from a new one.
OPEN_GATE = 0.5

AUTOENCODER = OptimiserConfig(
    rate=3e-3,
    steps=8000,
    warmup=50,
    weight_decay=1e-4,
    betas=(0.9, 0.99),
    eps=1e-8,
    floor=0.01,
    rules=(),
)
INTERLEAVED = OptimiserConfig(
    rate=1e-3,
    steps=5600,
    warmup=100,
    weight_decay=0.02,
    betas=(0.9, 0.98),
    eps=1e-8,
    schedule="flat_then_cool",
    floor=0.02,
    rules=FROM_SCRATCH,
)
# Less than the paper's 10, which assumes a pre-trained language model: a new one learns to read
# from the text loss, to which the image loss adds mostly noise.
IMAGE_WEIGHT = 3.0
CONDITIONING = replace(INTERLEAVED, steps=1500, cool_from=1.0)
PICTURES = replace(INTERLEAVED, rules=IMAGE_DECODER)


def with_latent_scale(config: ModelConfig, scale: float) -> ModelConfig:
    """`config` with the scaling factor of its trained autoencoder."""
    decoder = config.image_decoder
    vae: VaeConfig = replace(decoder.vae, scaling_factor=round(scale, 4))
    return replace(config, image_decoder=replace(decoder, vae=vae))


@contextmanager
def averaged(module: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """Put averages in the place of weights for the time of a block."""
    state = module.state_dict()
    current = {name: state[name].detach().clone() for name in average}
    _load(module, average)
    try:
        yield
    finally:
        _load(module, current)


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the weights that learned; the frozen ones stay."""
    own = module.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def _channels_last(module: nn.Module) -> None:
    """Store convolutions channels-last, in which they are faster on a CPU."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def own_tokenizer(folder: Path, corpus: Corpus) -> Tokenizer:
    """Tokenizer of a model folder. Raises `ConfigError` if a word of the corpus is unknown."""
    own = read_tokenizer_file(folder / TOKENIZER)
    unknown = getattr(own.model, "unk_token", None)
    made = corpus.tokenizer()
    special = {token.content for token in made.get_added_tokens_decoder().values()}
    words = [word for word in made.get_vocab() if word not in special]
    missing = [
        word
        for word in words
        if unknown and unknown in own.encode(word, add_special_tokens=False).tokens
    ]
    if missing:
        raise ConfigError(
            f"the tokenizer of {folder} does not know {len(missing)} words of the documents",
            got=", ".join(missing[:5]),
            fix="start from a model that was trained on such documents",
        )
    return own


def train_autoencoder(
    config: ModelConfig,
    corpus: Corpus,
    out: Path,
    run: RunConfig,
    steps: int | None = None,
    progress: Progress = silent,
) -> tuple[Vae, float]:
    """Train the autoencoder for `steps`, or the recipe's; returns its averaged weights and the
    scaling factor that gives its latents unit variance."""
    optimiser = AUTOENCODER if steps is None else replace(AUTOENCODER, steps=steps)
    config = with_latent_scale(config, 1.0)
    torch.manual_seed(run.seed)
    vae = Vae(config.image_decoder.vae)
    _channels_last(vae)
    stage = AutoencoderStage(vae, corpus, pictures=8)
    run = replace(run, average=0.995)
    _load(vae, train(stage, optimiser, run, out / "autoencoder", progress=progress))
    return vae, stage.latent_scale()


def open_gates(model: MMInterleaved, value: float = OPEN_GATE) -> None:
    """Open the MMFS gate of every LLM layer."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("look_back.gate"):
                parameter.fill_(value)


def endless_documents(
    config: ModelConfig, tokenizer: Tokenizer, corpus: Corpus, rng: np.random.Generator
) -> Iterator[TokenDocument]:
    """Documents of the main stage's mixture in random order, endless, all images encoded."""
    kinds = [kind for kind, count in corpus.mixture.items() for _ in range(count)]
    while True:
        document = corpus.document(kinds[int(rng.integers(len(kinds)))], rng)
        yield tokens_of(
            document.parts,
            each_alone(tokenizer),
            config.tokens,
            config.visual_tokens,
            read_all=True,
        )


@dataclass(frozen=True)
class StageSteps:
    """Optimiser steps of each stage; None: the recipe's. `conditioning` and `main` may be 0. The
    stage of `pictures`, which trains the image decoder alone, is left out unless it is asked for.
    """

    autoencoder: int | None = None
    conditioning: int | None = None
    main: int | None = None
    pictures: int = 0


def train_from_scratch(
    config: ModelConfig,
    out: Path,
    *,
    corpus: Corpus | None = None,
    steps: StageSteps | None = None,
    seed: int = 0,
    run: RunConfig | None = None,
    start: Path | None = None,
    new_autoencoder: bool = False,
    packed: bool = False,
    checkpoint_gradients: bool = False,
    progress: Progress = silent,
) -> Path:
    """Train `config` on a corpus, by default the easy drawn world, and write a model folder,
    `out/model`; returns its path.

    `start`: a model folder to start from in place of new weights. Its autoencoder is kept, or with
    `new_autoencoder` replaced by one that is trained from nothing. `packed`: the paper's rows of
    the whole context length, in which documents see each other, in place of isolated documents.
    `checkpoint_gradients`: less memory, more time. Every stage resumes from its last checkpoint if
    the same call runs again. Raises `MmiError` where another process trains there, or `out/model`
    holds files that mmi did not write.
    """
    folder = out / "model"
    with run_folder(out, "training"):
        check_replaceable(folder, None, kind=FOLDER_KIND, inputs=[] if start is None else [start])
        corpus, steps = corpus or DrawnWorld(easy()), steps or StageSteps()
        run = replace(run or RunConfig(), seed=seed)
        model, begun = _begin(config, corpus, out, run, steps.autoencoder, start,
                              new_autoencoder, progress)  # fmt: skip
        model.checkpoint_gradients(checkpoint_gradients)
        tokenizer = corpus.tokenizer() if start is None else own_tokenizer(start, corpus)
        stages = _Stages(model, tokenizer, corpus, out, folder, run, progress)
        if steps.main != 0:
            begun = stages.train_all(begun, steps.conditioning, steps.main, packed)
        if steps.pictures:
            stages.train_pictures(begun, steps.pictures)
    return folder


def _begin(
    config: ModelConfig,
    corpus: Corpus,
    out: Path,
    run: RunConfig,
    autoencoder_steps: int | None,
    start: Path | None,
    new_autoencoder: bool,
    progress: Progress,
) -> tuple[MMInterleaved, str]:
    """The model before the first stage of all parts, and what it begins from, in words."""
    if start is not None and not new_autoencoder:
        model = load_model(start)
        begun = _weights_of(model)
    elif start is not None:
        began = load_model(start)
        begun = f"{_weights_of(began)}, a new autoencoder"
        vae, scale = train_autoencoder(began.config, corpus, out, run, autoencoder_steps, progress)
        model = MMInterleaved(with_latent_scale(began.config, scale))
        model.load_state_dict(began.state_dict())
        model.image_decoder.vae.load_state_dict(vae.state_dict())
    else:
        begun = "new weights"
        vae, scale = train_autoencoder(config, corpus, out, run, autoencoder_steps, progress)
        torch.manual_seed(run.seed)
        model = MMInterleaved(with_latent_scale(config, scale))
        open_gates(model)
        model.image_decoder.vae.load_state_dict(vae.state_dict())
    _channels_last(model.image_decoder)
    return model, begun


def _weights_of(model: MMInterleaved) -> str:
    return f"weights {checksum_of(model.state_dict().items())}"


@dataclass(frozen=True, eq=False)
class _Stages:
    """Stages of one model after its autoencoder, each from the averaged weights of the one before.
    `folder`: where every checkpoint leaves a usable model."""

    model: MMInterleaved
    tokenizer: Tokenizer
    corpus: Corpus
    out: Path
    folder: Path
    run: RunConfig
    progress: Progress

    def train_all(
        self, begun: str, conditioning_steps: int | None, steps: int | None, packed: bool
    ) -> str:
        """Conditioning and main stage. `begun`: what the weights are, in words; returns that for
        the weights afterwards."""
        stage: InterleavedStage | PackedStage
        if packed:
            source = partial(endless_documents, self.model.config, self.tokenizer, self.corpus)
            described = str(self.corpus.describe())
            length = self.model.config.llama.context
            stage = PackedStage(self.model, source, described, length=length)
        else:
            stage = InterleavedStage(
                self.model, self.tokenizer, self.corpus, image_weight=IMAGE_WEIGHT
            )
            if conditioning_steps != 0:
                _load(stage.module, self._train_conditioning(conditioning_steps))
                begun += f", conditioned for {conditioning_steps or CONDITIONING.steps} steps"
        optimiser = INTERLEAVED if steps is None else replace(INTERLEAVED, steps=steps)

        def save(step: int, average: Mapping[str, StoredTensor]) -> None:
            self._save(stage.model_state({name: value.read() for name, value in average.items()}))

        # A later stage that has begun has written a better model.
        later = latest_checkpoint(self.out / PicturesStage.name) is not None
        average = train(
            stage,
            optimiser,
            self.run,
            self.out / stage.name,
            None if later else save,
            self.progress,
            begun,
        )
        _load(self.model, stage.model_state(average))
        return f"{begun}, trained for {optimiser.steps} steps"

    def _train_conditioning(self, steps: int | None) -> dict[str, Tensor]:
        """Conditioning stage: train all but the U-Net; returns the averaged weights of the model
        and its auxiliary heads."""
        optimiser = CONDITIONING if steps is None else replace(CONDITIONING, steps=steps)
        stage = InterleavedStage(
            self.model,
            self.tokenizer,
            self.corpus,
            self.corpus.conditioning_mixture,
            name="conditioning",
            image_weight=0.0,
        )
        run = replace(self.run, average=0.99)
        return train(stage, optimiser, run, self.out / stage.name, progress=self.progress)

    def train_pictures(self, begun: str, steps: int) -> None:
        """Pictures stage: train the image decoder alone."""
        source = InterleavedStage(
            self.model, self.tokenizer, self.corpus, self.corpus.picture_mixture
        )
        stage, optimiser = PicturesStage(source), replace(PICTURES, steps=steps)

        def save(step: int, average: Mapping[str, StoredTensor]) -> None:
            self._save({name: value.read() for name, value in average.items()})

        train(stage, optimiser, self.run, self.out / stage.name, save, self.progress, begun)

    def _save(self, means: Mapping[str, Tensor]) -> None:
        """Write the model with averages of its weights."""
        with (
            averaged(self.model, means),
            new_folder(self.folder, None, kind=FOLDER_KIND) as work,
        ):
            save_model(self.model, work, torch.float16)
            write_file(work / TOKENIZER, self.tokenizer.to_str(pretty=True))
