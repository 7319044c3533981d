"""A distilled model from its folder to the comparison with its teacher, through real graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export.small_models import paper_reading, random_model
from exports import Exported
from mmi_bench.compare.backends import PYTORCH, RUNTIME, undistilled
from mmi_bench.compare.cases import DOCUMENT
from mmi_bench.compare.compare import run
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.documents.document import Draw, Text, document_of
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.runtime.events import ImageDone
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.config import DistillationConfig, ModelConfig
from mmi_export.export import export_bundle
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.weights.model_folder import TOKENIZER, save_model

pytestmark = pytest.mark.slow


def student_config() -> ModelConfig:
    config = paper_reading()
    own = DistillationConfig("lcm", 2.5, 20)
    return replace(
        config,
        llama=replace(config.llama, context=160),
        image_decoder=replace(config.image_decoder, distillation=own),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A student with random weights, its teacher with the same, and the bundle of the student."""
    work = tmp_path_factory.mktemp("distilled")
    config = student_config()
    folders = {name: work / name for name in ("student", "teacher", "bundle")}
    for name, own in (("student", config), ("teacher", undistilled(config))):
        torch.manual_seed(0)
        save_model(random_model(own), folders[name])
        (folders[name] / TOKENIZER).write_text(build_tokenizer().to_str())
    export_bundle(folders["student"], folders["bundle"], scope="none")
    yield folders


def test_pictures_of_four_steps_are_the_same_alone_and_at_once(folders: dict[str, Path]) -> None:
    """`lcm:4` adds keyed noise between its steps: no row may take that of another."""
    runtime = Runtime.open(folders["bundle"], threads=1, unproved=True)
    assert runtime.schedules[0] == "lcm:4"
    documents = [document_of(Text(f"draw: a {word} ring"), Draw()) for word in ("red", "blue")]
    options = [GenerationOptions(seed=seed, max_tokens=1, max_images=0) for seed in (1, 2)]
    alone = [
        _picture(list(generate(runtime, document, option)))
        for document, option in zip(documents, options, strict=True)
    ]
    with BatchEngine(runtime) as engine:
        streams = [engine.submit(*one) for one in zip(documents, options, strict=True)]
        together = [_picture(list(stream)) for stream in streams]
    assert together == alone and alone[0] != alone[1]


def _picture(events: list[object]) -> bytes:
    return next(event.rgb.tobytes() for event in events if isinstance(event, ImageDone))


def test_a_student_is_measured_beside_its_teacher(folders: dict[str, Path]) -> None:
    """Four steps of one branch against twenty of two: as much text and as many pictures."""
    result = run(
        folders["bundle"],
        folders["student"],
        quick=True,
        threads=1,
        unproved=True,
        teacher=folders["teacher"],
    )
    assert result.about["schedule"] == "lcm:4" and result.about["teacher_schedule"] == "unipc:20"
    gaps = {name: len(cases[DOCUMENT][0].step_gaps) for name, cases in result.samples.items()}
    assert gaps == {RUNTIME: 3, PYTORCH: 19}
    whole = result.metrics()[0]
    assert whole.of(RUNTIME).median < whole.of(PYTORCH).median


def test_another_teacher_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(MmiError, match="was not distilled from"):
        run(
            folders["bundle"],
            folders["student"],
            quick=True,
            threads=1,
            unproved=True,
            teacher=folders["student"],
        )


def test_a_model_that_is_not_distilled_has_no_teacher(
    folders: dict[str, Path], exported_once: Callable[[str], Exported]
) -> None:
    paper = exported_once("paper")
    with pytest.raises(ConfigError, match="is not distilled, and has no teacher"):
        run(paper.bundle.folder, paper.folder, quick=True, teacher=folders["teacher"])
