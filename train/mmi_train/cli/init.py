"""`mmi init`: build a new model around a trained language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmi_deploy.cli.console import print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import existing_folder
from mmi_deploy.hub.kinds import DIFFUSION, LANGUAGE_MODEL, TOKENIZER, VISION
from mmi_deploy.spec.presets import preset as preset_called
from mmi_deploy.system.files import size
from mmi_deploy.system.output_folder import check_replaceable
from mmi_deploy.system.progress import shown

Dtype = Literal["keep", "float16", "bfloat16", "float32"]


def init(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the model.")],
    llm: Annotated[
        Path,
        typer.Option(
            help="A LLaMA, Mistral, Qwen or SmolLM: a Hugging Face folder, or a GGUF file.",
            metavar="DIR|GGUF|hf://",
            rich_help_panel="Trained parts",
        ),
    ],
    vision: Annotated[
        Path | None,
        typer.Option(
            help="A CLIP vision transformer: a Hugging Face folder.",
            file_okay=False,
            metavar="DIR|hf://",
            show_default="new and small",
            rich_help_panel="Trained parts",
        ),
    ] = None,
    diffusion: Annotated[
        Path | None,
        typer.Option(
            help="A Stable Diffusion: a diffusers folder.",
            file_okay=False,
            metavar="DIR|hf://",
            show_default="new and small",
            rich_help_panel="Trained parts",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder of another tokenizer.json or tokenizer.model.",
            metavar="DIR|hf://",
            show_default="the language model's",
            rich_help_panel="Trained parts",
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="Architecture of the new parts; sizes follow from the given ones.",
            rich_help_panel="New parts",
        ),
    ] = "released_13b",
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the longest document.",
            show_default="the language model's",
            metavar="N",
            rich_help_panel="New parts",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Side of the images that it reads, in pixels.",
            show_default="CLIP's",
            metavar="N",
            rich_help_panel="New parts",
        ),
    ] = None,
    bos: Annotated[
        str | None,
        typer.Option(
            help="The token that begins a document.",
            show_default="the language model's",
            rich_help_panel="New parts",
        ),
    ] = None,
    eos: Annotated[
        str | None,
        typer.Option(
            help="The only token that ends a document.",
            show_default="the language model's",
            rich_help_panel="New parts",
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Type of the written weights; keep: the parts'.", rich_help_panel="New parts"
        ),
    ] = "keep",
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of new weights.", metavar="N", rich_help_panel="New parts"),
    ] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that mmi wrote, of another kind too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Build a new model around a trained language model.

    The language model writes as before; the layers that connect images to it are new and have to be
    trained. Parts that are not given are new, with the sizes of the preset tiny.
    """
    check_replaceable(out, force, kind="model")  # before a download
    llm = existing_folder(llm, LANGUAGE_MODEL)
    vision = None if vision is None else existing_folder(vision, VISION)
    diffusion = None if diffusion is None else existing_folder(diffusion, DIFFUSION)
    tokenizer = None if tokenizer is None else existing_folder(tokenizer, TOKENIZER)
    inputs = [path for path in (llm, vision, diffusion, tokenizer) if path is not None]
    check_replaceable(out, force, kind="model", inputs=inputs)
    form = preset_called(preset)
    with extras("init"):
        import torch

        from mmi_train.checkpoint_import.from_clip import read_clip
        from mmi_train.checkpoint_import.from_diffusion import read_diffusion
        from mmi_train.checkpoint_import.from_llama import read_llama
        from mmi_train.checkpoint_import.new_model import build_model
        from mmi_train.checkpoint_import.parts import Parts

        if llm.is_file():
            from mmi_train.checkpoint_import.from_gguf import read_gguf
    with shown(remarks(), "reading the parts") as progress:
        decoder = form.image_decoder
        parts = Parts(
            read_gguf(llm, tokenizer) if llm.is_file() else read_llama(llm, tokenizer),
            None if vision is None else read_clip(vision, image_size),
            None
            if diffusion is None
            else read_diffusion(diffusion, decoder.unet, decoder.diffusion),
            bos,
            eos,
            context,
        )
        done = build_model(
            parts,
            form,
            out,
            dtype=None if dtype == "keep" else getattr(torch, dtype),
            seed=seed,
            force=force,
            inputs=inputs,
            progress=progress,
        )
    for line in parts.llm.remarks:
        remarks().print(line)
    for given, names in ((vision, "vision encoder is"), (diffusion, "U-Net and autoencoder are")):
        if given is None:
            remarks().print(f"the {names} new and small: give trained parts for real use")
    if as_json:
        numbers = {"taken": done.taken, "new": done.new, "bytes": done.size}
        print_json({"model": str(out), **numbers})
        return
    results().print(
        f"{out}: {done.taken} tensors taken, {done.new} new, {size(done.size)}. "
        f"Look at it with `mmi inspect {out}`"
    )
