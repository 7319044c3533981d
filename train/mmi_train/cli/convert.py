"""`mmi convert`: convert the published checkpoint to a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmi_deploy.cli.console import print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import existing_folder, local_folder
from mmi_deploy.hub.kinds import CHECKPOINT, TOKENIZER
from mmi_deploy.spec.config import read_config
from mmi_deploy.spec.presets import preset as preset_called
from mmi_deploy.system.files import size
from mmi_deploy.system.output_folder import check_replaceable
from mmi_deploy.system.progress import shown

Dtype = Literal["keep", "float16", "bfloat16", "float32"]


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="The published checkpoint: a folder of .bin files, one of them, or hf://org/name."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the model.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the language model's tokenizer: tokenizer.json or tokenizer.model.",
            show_default="the checkpoint's folder",
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Configuration of the checkpoint; `mmi inspect` lists them.")
    ] = "released_13b",
    config: Annotated[
        Path | None,
        typer.Option(help="A config.json, instead of --preset.", show_default=False),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Type of the written weights; keep: the checkpoint's.")
    ] = "keep",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that mmi wrote, of another kind too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert the published MM-Interleaved checkpoint to a model folder.

    Code in a pickle is never run. Every missing, unknown or misshapen tensor is named before
    anything is written. Weights are streamed: memory does not grow with the checkpoint.
    """
    check_replaceable(out, force, kind="model")  # before a download
    checkpoint = existing_folder(checkpoint, CHECKPOINT)
    tokenizer = None if tokenizer is None else local_folder(tokenizer, TOKENIZER)
    tokenizer = tokenizer or (checkpoint if checkpoint.is_dir() else checkpoint.parent)
    inputs = [] if config is None else [config]
    check_replaceable(out, force, kind="model", inputs=[checkpoint, tokenizer, *inputs])
    chosen = preset_called(preset) if config is None else read_config(config)
    with extras("convert"):
        import torch

        from mmi_train.checkpoint_import.convert import convert_checkpoint
    with shown(remarks(), "reading names and shapes") as progress:
        done = convert_checkpoint(
            checkpoint,
            out,
            chosen,
            tokenizer,
            dtype=None if dtype == "keep" else getattr(torch, dtype),
            force=force,
            inputs=inputs,
            progress=progress,
        )
    if as_json:
        print_json({"model": str(out), "tensors": done.tensors, "bytes": done.size})
        return
    results().print(
        f"{out}: {done.tensors} tensors, {size(done.size)}. Export it with `mmi export {out}`"
    )
