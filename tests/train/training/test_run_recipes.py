"""Recipes: the paper's numbers, the order of precedence, and what is refused."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from mmi_deploy.cli.app import run
from mmi_deploy.errors import ConfigError
from mmi_train.training.fine_tuning import FineTuning
from mmi_train.training.lora import LoraConfig
from mmi_train.training.recipes import Layer, assignments, defaults, recipe, shipped, written
from mmi_train.training.settings import KEYS, Settings, settings_of

# Of each recipe with the paper's numbers: groups, rate, steps, warm-up, betas, epsilon, and the
# documents of a step (None: each GPU's own number).
PAPER = {
    "pretrain": ("published", 1e-4, 15_000, 1000, (0.9, 0.995), 1e-6, None),
    "vqa_captions": ("table_12", 1e-5, 10_000, 500, (0.9, 0.999), 1e-8, 256),
    "grounding": ("table_13", 2e-5, 10_000, 500, (0.9, 0.999), 1e-8, 256),
    "segmentation": ("table_14", 1e-4, 4000, 100, (0.9, 0.98), 1e-5, 512),
    "stories": ("table_15", 1e-5, 4000, 200, (0.9, 0.98), 1e-8, 128),
}


def settings(*layers: Layer) -> Settings:
    return settings_of(*layers)[0]


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_holds_the_numbers_of_its_table(name: str) -> None:
    groups, rate, steps, warmup, betas, eps, batch = PAPER[name]
    found = settings(recipe(name))
    optimiser = found.tuning().optimiser(found.steps_for(7))
    assert (found.groups, found.lora) == (groups, None)
    assert (optimiser.rate, optimiser.steps, optimiser.warmup) == (rate, steps, warmup)
    assert (optimiser.betas, optimiser.eps) == (betas, eps)
    assert (optimiser.weight_decay, optimiser.clip, optimiser.schedule) == (0.05, 1.0, "cosine")
    assert found.average == 0.0 and found.checkpoint_gradients
    if batch is not None:
        assert found.batch * found.accumulate == batch
    pictures = 0.0 if name in ("vqa_captions", "grounding") else 10.0
    assert (found.text_weight, found.image_weight) == (1.0, pictures)


def test_every_shipped_recipe_says_where_its_values_come_from() -> None:
    assert set(shipped()) == {*PAPER, "lora", "distill_guidance", "distill_lcm", "distill_dmd"}
    folder = Path(__file__).parents[3] / "train" / "mmi_train" / "recipes"
    for name in PAPER:
        for line in (folder / f"{name}.toml").read_text().splitlines():
            if " = " in line and not line.startswith(("#", "groups", "batch")):
                assert "  # " in line, (name, line)


def test_the_defaults_are_whole_and_those_of_the_code() -> None:
    found = settings()
    assert found == Settings() and found.tuning() == FineTuning()
    optional = {"steps", "warmup", "lora.alpha", "given_pixels", "drawn_pixels"}
    # Of runs that change the diffusion, and of those that distil.
    optional |= {key for key in KEYS if key.startswith(("diffusion.", "distill."))}
    assert defaults().values.keys() == {*KEYS} - optional
    assert {field.name for field in fields(found.run())} <= {*KEYS}


def test_options_overrule_the_recipe_and_set_overrules_both(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("rate = 3e-4\nbatch = 7\nseed = 5\n[lora]\nrank = 8\n")
    options = Layer("options", {"rate": 2e-4, "batch": 6})
    found, values = settings_of(recipe(str(path)), options, assignments(["rate=1e-4"]))
    assert (found.rate, found.batch, found.seed, found.clip) == (1e-4, 6, 5, 1.0)
    sources = {key: values[key].source for key in ("rate", "batch", "seed", "clip")}
    assert sources == {
        "rate": "--set",
        "batch": "options",
        "seed": f"recipe {path}",
        "clip": "recipe lora",
    }
    assert found.lora == LoraConfig(rank=8, alpha=16)
    printed = tmp_path / "printed.toml"
    printed.write_text(written(values))
    assert settings(recipe(str(printed))) == found


def test_a_length_replaces_the_other() -> None:
    long = recipe("stories")
    assert settings(long).steps_for(10) == 4000
    found = settings(long, Layer("options", {"epochs": 2.0}))
    assert found.steps is None and found.steps_for(1280) == 20 and found.steps_for(1280, 4) == 5
    found = settings(long, Layer("options", {"epochs": 2.0}), assignments(["steps=3"]))
    assert found.steps_for(1280) == 3
    with pytest.raises(ConfigError, match="--set has both steps and epochs"):
        settings(assignments(["steps=3", "epochs=1"]))


def test_values_of_set_are_toml_or_texts() -> None:
    found = assignments(["groups = all", 'lora.layers=["llm"]', "betas=[0.9,0.95]", "average=0.5"])
    assert found.values == {
        "groups": "all",
        "lora.layers": ["llm"],
        "betas": [0.9, 0.95],
        "average": 0.5,
    }
    made = settings(Layer("options", {"rate": 1e-5}), found)
    assert made.groups == "all" and made.lora is not None and made.lora.layers == ("llm",)
    assert settings(assignments(["lora.rank=0", "groups=all", "rate=1"])).lora is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wieght_decay = 0.1", "unknown setting 'wieght_decay'. the nearest one is weight_decay"),
        ("[lora]\nrnak = 3", "unknown setting 'lora.rnak'. the nearest one is lora.rank"),
        ("alpha = 3", "unknown setting 'alpha'. the nearest one is lora.alpha"),
        ("xyzzy = 3", "unknown setting 'xyzzy'. choose among seed, "),
        ("batch = 0", "mine.toml are not valid: batch: .*greater than or equal to 1; got 0"),
        ("batch = 'four'", "batch: .*integer.*; got 'four'"),
        ("rate = inf", "rate: .*finite"),
        ("betas = [0.9, 1.0]", "betas.1: .*less than 1"),
        ("[lora]\nrank = -1", "lora.rank: .*greater than or equal to 1; got -1"),
        ("schedule = 'linear'", "schedule: .*'cosine' or 'flat_then_cool'; got 'linear'"),
        ("steps = 3\nepochs = 3", "both steps and epochs"),
        ("groups = 'all'", "the groups all need a learning rate"),
        ("rate = ", "is not TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_in_a_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        settings(recipe(str(path)))
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe 'story'.*the nearest one is stories"):
        recipe("story")
    with pytest.raises(ConfigError, match="cannot read the recipe .*: No such file"):
        recipe(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="expected key=value; got rate"):
        assignments(["rate"])
    with pytest.raises(ConfigError, match="unknown; expected published, .*; got bodies"):
        settings(assignments(["groups=bodies", "rate=1"])).tuning().optimiser(3)
    with pytest.raises(ConfigError, match="nothing would learn"):
        settings(assignments(["lora.rank=0"])).tuning().optimiser(3)


def test_the_command_prints_the_recipe(capsys: pytest.CaptureFixture) -> None:
    command = ["train", "--recipe", "grounding", "--batch", "2", "--set", "lora.rank=4"]
    assert run([*command, "--print-recipe"]) == 0
    text = capsys.readouterr().out
    found = tomllib.loads(text)
    assert (found["groups"], found["batch"], found["lora"]["rank"]) == ("table_13", 2, 4)
    assert "batch = 2  # options\n" in text and "rank = 4  # --set\n" in text
    assert run(command) == 2
    assert "expected mmi train MODEL --data FILE --out FOLDER" in capsys.readouterr().err
