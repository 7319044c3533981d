"""Measure the memory of fine-tuning adapters on a language model of one billion parameters.

    python -m mmi_bench.training.adapter_memory [--four-bit]

Random weights; two steps on one short document, gradients checkpointed, the model written at the
end. Growth of the process, beside the bytes of the weights in bfloat16.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from mmi_deploy.cli import program
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.presets import tiny
from mmi_deploy.system.process_memory import memory_bytes, peak_bytes
from mmi_export.placeholder_model import write_placeholder_model
from mmi_train.data.document_file import DocumentFile
from mmi_train.training.fine_tuning import FineTuning, fine_tune
from mmi_train.training.loop import RunConfig
from mmi_train.training.lora import LoraConfig
from mmi_train.weights.model_folder import WEIGHTS

# A language model of LLaMA's form with this many layers has a billion parameters.
LAYERS = 18


def wide(layers: int = LAYERS) -> ModelConfig:
    """The tiny preset around a language model of 2048 channels."""
    small = tiny()
    llama = replace(
        small.llama, width=2048, heads=16, kv_heads=16, mlp_width=5632, vocab=32000, layers=layers
    )
    return replace(
        small,
        llama=llama,
        image_decoder=replace(
            small.image_decoder,
            resampler=replace(small.image_decoder.resampler, context_width=2048),
        ),
    )


def adapter_memory(
    four_bit: Annotated[bool, typer.Option("--four-bit", help="QLoRA.")] = False,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the language model.")] = LAYERS,
) -> int:
    """Measure the memory of two steps of adapters of rank 16, and of writing the model."""
    with TemporaryDirectory() as place:
        start, data = Path(place) / "model", Path(place) / "documents.jsonl"
        write_placeholder_model(wide(layers), start, "random", torch.bfloat16)
        data.write_text(json.dumps([{"text": "w20 w21 w22 w23 w24"}]))
        weights = (start / WEIGHTS).stat().st_size
        forget_peak()
        before, begun = memory_bytes(), time.perf_counter()
        lora = LoraConfig(layers=("llm",), rank=16, four_bit=four_bit)
        tuning = FineTuning(batch=1, lora=lora, checkpoint_gradients=True)
        run = RunConfig(average=0.0)
        fine_tune(
            start, DocumentFile(data), Path(place) / "run", 2, tuning, run, torch.device("cpu")
        )
        grown, took = peak_bytes() - before, time.perf_counter() - begun
    typer.echo(
        f"{weights / 2e9:.2f} B parameters: {grown / 1e9:.2f} GB at most, "
        f"{grown / weights:.2f} times the weights in bfloat16; {took:.0f} s"
    )
    return 0


def forget_peak() -> None:
    """Let the peak memory of this process begin now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        raise ConfigError("the peak memory of a part of a process needs Linux") from None


run = program.program("adapter-memory", adapter_memory)

if __name__ == "__main__":
    program.main(run)
