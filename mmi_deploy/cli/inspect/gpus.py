"""`mmi inspect gpus`: the recipe that fits each GPU, and lower bounds of its times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from mmi_deploy.cli.console import duration, print_json, print_table, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.inspect.source import (
    AsJson,
    Batch,
    Context,
    Folder,
    Gpus,
    Images,
    Preset,
    graphs_of,
    memory_model,
)
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.schedule import default_schedule
from mmi_deploy.system.files import size

if TYPE_CHECKING:
    from mmi_deploy.analysis.cost import GraphCost
    from mmi_deploy.analysis.gpu_specs import Gpu
    from mmi_deploy.analysis.memory_estimate import Model

BASIS = (
    "Computed from the graphs and the vendors' figures, not measured: lower bounds for "
    "any implementation. A token at a full context; a picture: its condition, the U-Net's values "
    "of one image, the steps of the default sampler with guidance and the VAE"
)


def gpus(
    folder: Folder = None,
    preset: Preset = None,
    gpu: Gpus = None,
    context: Context = None,
    batch: Batch = 1,
    images: Images = None,
    as_json: AsJson = False,
) -> None:
    """Show for every GPU the precision that fits it, and lower bounds of its times."""
    with extras("inspect gpus"):
        import mmi_deploy.analysis.memory_estimate  # noqa: F401
    model = memory_model(graphs_of(folder, preset), context, batch, images, on_cpu=False)
    show_gpus(model, gpu or (), as_json)


def show_gpus(model: Model, names: Sequence[str], as_json: bool) -> None:
    """Print one row per GPU in `names` (default: all)."""
    from mmi_deploy.analysis.gpu_specs import GPUS, gpu

    costs = cache(partial(run_costs, model))
    rows = [gpu_row(model, gpu(name), costs) for name in names or GPUS]
    if as_json:
        print_json({"model": model.config.name, "steps": default_steps(model), "gpus": rows})
        return
    limits = model.limits
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{model.config.name}, a document of {limits.context} tokens and {limits.images} "
        "images: at least",
        title_justify="left",
    )
    for heading in ("GPU", "precision", "resident"):
        table.add_column(heading, no_wrap=True)
    for heading in ("total", "a token", "tokens/s", "an image read", "a picture"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row["recipe"] is None:
            table.add_row(row["title"], "none fits", "", f"> {size(row['room'])}")
            continue
        stay = "all" if row["resident"] is None else ", ".join(row["resident"]) or "none"
        token = row["seconds"]["token"]
        table.add_row(
            row["title"],
            row["recipe"],
            stay,
            size(row["bytes"]),
            duration(token),
            f"{1 / token:.1f}",
            duration(row["seconds"]["image"]),
            duration(row["seconds"]["picture"]),
        )
    out = results()
    print_table(out, table)
    out.print(BASIS)


def run_costs(model: Model, precision: str) -> dict[str, GraphCost]:
    """Cost of one run of each graph, for one document at the model's limits."""
    from mmi_deploy.analysis.cost import cost_of_file
    from mmi_deploy.targets.precision.recipes import recipe

    images = model.limits.images
    looked_at = {"n": images, "m": images}
    wanted: dict[str, dict[str, int]] = {
        "vision_encoder": {"n": 1},
        "llm_values": {"n": 1},
        "unet_values": {"n": 1},
        "llm": {"b": 1, "t": 1, "w": 1, **looked_at},
        "image_condition": {"b": 1},
        "denoise_step": {"b": 1, **looked_at},
        "vae_decoder": {"b": 1},
    }
    found = {}
    for name, sizes in wanted.items():
        contract = model.exported_contract[name]
        given = {letter: min(count, contract.ranges[letter].max) for letter, count in sizes.items()}
        chosen = recipe(precision)
        found[name] = cost_of_file(model.files[name], contract, given, chosen, model.runtime)
    return found


def default_steps(model: Model) -> int:
    """Denoising steps of a picture by the default sampler of the model."""
    decoder = model.config.image_decoder
    return int(default_schedule(decoder.diffusion, decoder.distillation).rpartition(":")[2])


def gpu_row(
    model: Model, gpu: Gpu, costs: Callable[[str], Mapping[str, GraphCost]]
) -> dict[str, Any]:
    """Recipe that fits `gpu`, and roofline times of a token, an image that is read and a picture.
    costs: precision -> cost of each graph."""
    about: dict[str, Any] = {"gpu": gpu.name, "title": gpu.title, "room": gpu.room}
    try:
        choice = model.recipe_for(gpu.room)
    except ConfigError:
        return {**about, "recipe": None}
    seconds = {name: cost.seconds(gpu) for name, cost in costs(choice.recipe).items()}
    # A picture sees at least one image: the one before it, whose values are computed for it.
    once = sum(seconds[name] for name in ("unet_values", "image_condition", "vae_decoder"))
    step = seconds["denoise_step"]
    return {
        **about,
        "recipe": choice.recipe,
        "resident": choice.resident,
        "bytes": choice.memory.total,
        "seconds": {
            "token": seconds["llm"],
            "image": seconds["vision_encoder"] + seconds["llm_values"],
            "step": step,
            "picture": default_steps(model) * step + once,
        },
    }
