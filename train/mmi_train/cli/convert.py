"""`mmi convert`: the published checkpoint becomes a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmi_deploy.cli.console import print_json, remarks, results
from mmi_deploy.cli.extras import extras
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
            help="The published checkpoint: a folder of .bin files, or one.", exists=True
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
        str, typer.Option(help="What the checkpoint is of; see `mmi inspect`.")
    ] = "released_13b",
    config: Annotated[
        Path | None,
        typer.Option(help="Instead of --preset: a config.json.", show_default=False),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Type of the written weights; keep: as they are.")
    ] = "keep",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder of mmi's that is something else.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Turn the published MM-Interleaved checkpoint into a model folder.

    Nothing that a pickle may hold is run. Every tensor that is missing, unknown or misshapen is
    named before anything is written. Memory stays small however large the checkpoint is.
    """
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
