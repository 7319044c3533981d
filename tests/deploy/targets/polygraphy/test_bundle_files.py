"""The folder `polygraphy` of a bundle: its inputs are valid, small and the same everywhere, and
Polygraphy's own command line runs every graph with them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.errors import BundleError
from mmi_deploy.runtime.buffers import HOST
from mmi_deploy.runtime.engine import check_indices, dynamic_sizes
from mmi_deploy.spec.graphs import GRAPHS, Limits, graphs
from mmi_deploy.spec.presets import PRESETS
from mmi_deploy.targets.polygraphy.bundle_files import (
    FOLDER,
    MAX_STORED,
    loaders,
    shape_options,
    stored_samples,
    write_polygraphy,
)
from mmi_deploy.targets.polygraphy.load_data import DRAWN, read_inputs
from mmi_deploy.targets.profiles import profiles

if TYPE_CHECKING:
    from exports import Exported

NAMES = [make.__name__ for make in GRAPHS]


@pytest.fixture
def bundle(exported_once: Callable[[str], Exported]) -> Bundle:
    return exported_once("paper").bundle


def polygraphy(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Polygraphy's command line, without this project on the path."""
    program = "import sys; sys.path.pop(0); from polygraphy.tools import main; sys.exit(main())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**environment, "POLYGRAPHY_AUTOINSTALL_DEPS": "0"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_documented_command_runs_every_graph(bundle: Bundle, name: str, tmp_path: Path) -> None:
    """As docs/polygraphy.md prints it, without `--trt`: twice ONNX Runtime, equal to the bit."""
    pytest.importorskip("polygraphy")
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    before = sorted(path for path in folder.rglob("*"))
    for loader in loaders(bundle.graphs[name]):
        words = ["run", f"graphs/{name}.onnx", "--onnxrt", "--onnxrt"]
        words += ["--data-loader-script", f"polygraphy/load_data.py:{loader}"]
        words += shlex.split((folder / FOLDER / f"{name}.shapes").read_text())
        done = polygraphy(folder, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "PASSED" in done.stdout
    assert sorted(path for path in folder.rglob("*")) == before  # no compiled Python either
    Bundle.open(folder).verify()


def test_inputs_fit_the_contract_and_their_profile(bundle: Bundle) -> None:
    for name, graph in bundle.graphs.items():
        for loader, profile in zip(loaders(graph), profiles(graph), strict=True):
            inputs = read_inputs(bundle.folder / FOLDER / f"{loader}.npz")
            held = {key: HOST.from_array(array) for key, array in inputs.items()}
            sizes = dynamic_sizes(graph, held)
            check_indices(graph, inputs, sizes)
            assert profile.holds(sizes), (name, sizes)
            if loader == "llm_prefill":
                assert sizes["t"] > 1
    caches = read_inputs(bundle.folder / FOLDER / "llm_decode.npz")
    written = int(caches["write_index"][0])
    assert written > 8
    assert caches["past_key.00"][:, :, written - 1].any()
    assert not caches["past_key.00"][:, :, written:].any()


def test_the_manifest_lists_the_folder(bundle: Bundle) -> None:
    listed = {name for name in bundle.manifest.files if name.startswith(f"{FOLDER}/")}
    graphs_of = bundle.graphs.values()
    expected = {f"{FOLDER}/{loader}.npz" for graph in graphs_of for loader in loaders(graph)}
    expected |= {f"{FOLDER}/{name}.shapes" for name in bundle.graphs} | {f"{FOLDER}/load_data.py"}
    assert listed == expected


def test_the_loader_needs_numpy_alone(bundle: Bundle) -> None:
    code = (
        "import sys; sys.dont_write_bytecode = True; sys.path[0] = 'polygraphy'\n"
        "import load_data; (inputs,) = load_data.llm_decode()\n"
        "assert inputs['token_ids'].shape == (1, 1)\n"
        "print([m for m in sys.modules if m.startswith(('mmi', 'onnx', 'torch', 'polygraphy'))])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.append({_site()!r})\n{code}"],
        cwd=bundle.folder,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.strip() == "[]", done.stderr


def _site() -> str:
    return str(Path(np.__file__).parent.parent)


def test_a_name_without_inputs_is_refused_with_those_there_are(tmp_path: Path) -> None:
    from mmi_deploy.targets.polygraphy import load_data

    with pytest.raises(AttributeError, match="no inputs 'other'"):
        load_data.other  # noqa: B018


def test_pickles_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", token_ids=np.array([object()], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        read_inputs(tmp_path / "x.npz")


def test_shape_options_name_every_profile_once_per_end(bundle: Bundle) -> None:
    lines = shape_options(profiles(bundle.graphs["llm"])).splitlines()
    assert [line.split()[0] for line in lines] == [
        f"--trt-{end}-shapes" for _ in range(2) for end in ("min", "opt", "max")
    ]
    context = bundle.limits.context
    assert f"token_ids:[{bundle.limits.batch},{context}]" in lines[2].split()
    assert "token_ids:[1,1]" in lines[4].split()
    dynamic = {t.name for t in bundle.graphs["llm"].inputs if not all(map(_fixed, t.shape))}
    for line in lines:
        assert {word.partition(":")[0] for word in line.split()[1:]} == dynamic


def _fixed(side: int | str) -> bool:
    return isinstance(side, int)


def test_inputs_of_the_largest_model_stay_small_and_within_their_ranges(tmp_path: Path) -> None:
    """Not recorded, as the export of a model that this machine cannot run: indices alone are in
    the files, and nothing as large as a KV cache is made."""
    config = PRESETS["released_13b"]()
    made = graphs(config, Limits(context=2048))
    write_polygraphy(tmp_path / "p", made, {})
    files = list((tmp_path / "p").iterdir())
    assert sum(path.stat().st_size for path in files) < 200_000
    with np.load(tmp_path / "p" / "llm_decode.npz", allow_pickle=False) as stored:
        assert f"{DRAWN}past_key.39" in stored.files and "token_ids" in stored.files
        shape = tuple(stored[f"{DRAWN}past_key.39"][1:].astype(int))
        assert shape == made["llm"]["past_key.39"].resolve(b=1)
        assert int(stored["write_index"][0]) < 2048


def test_a_large_tensor_is_drawn_like_the_recorded_one_always_the_same(tmp_path: Path) -> None:
    config, draw = PRESETS["tiny"](), np.random.default_rng(0)
    graph = graphs(config, Limits(context=64))["vae_decoder"]
    side = 1 + int((MAX_STORED / 4) ** 0.5)
    wide = replace(
        graph,
        inputs=(replace(graph.inputs[0], shape=("b", 4, side, side)),),
    )
    latents = (3 * draw.standard_normal((1, 4, side, side))).astype(np.float32)
    write_polygraphy(tmp_path / "p", {"vae_decoder": wide}, {"vae_decoder": [{"latents": latents}]})
    path = tmp_path / "p" / "vae_decoder.npz"
    assert path.stat().st_size < 1000
    first, second = read_inputs(path)["latents"], read_inputs(path)["latents"]
    assert np.array_equal(first, second) and first.shape == latents.shape
    assert first.dtype == np.float32 and first.std() == pytest.approx(3, rel=0.02)


def test_samples_are_the_stored_inputs_and_random_ones_at_other_sizes(bundle: Bundle) -> None:
    graph = bundle.graphs["denoise_step"]
    samples = list(stored_samples(bundle, graph))
    assert [sample.recorded for sample in samples[:2]] == [True, False]
    assert {sample.inputs["latents"].shape[0] for sample in samples} == {1, 2}
    narrow = graphs(bundle.config, replace(bundle.limits, batch=1))["denoise_step"]
    assert {s.inputs["latents"].shape[0] for s in stored_samples(bundle, narrow)} == {1}


def test_a_bundle_of_an_earlier_version_is_refused(bundle: Bundle) -> None:
    files = {k: v for k, v in bundle.manifest.files.items() if not k.startswith(FOLDER)}
    old = replace(bundle, manifest=bundle.manifest.model_copy(update={"files": files}))
    with pytest.raises(BundleError, match="export it again"):
        list(stored_samples(old, bundle.graphs["vae_decoder"]))
