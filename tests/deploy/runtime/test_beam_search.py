"""Beam search: its rules, and the exported graphs beside transformers and the published code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import RepetitionPenaltyLogitsProcessor

from deploy.runtime.fake_model import fake_runtime, fake_schedule, picture
from export.small_models import paper_reading, random_model
from mmi_deploy.documents.document import Image, Text, document_of, encode_document
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.backend import HostBackend
from mmi_deploy.runtime.beam_search import BeamRules, BeamSearch, beam_scores, place_beams
from mmi_deploy.runtime.buffers import Array, Buffer
from mmi_deploy.runtime.events import Finished, TextDelta
from mmi_deploy.runtime.generation import drive, generate
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, OnnxRuntimeEngine
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.sampling import TextSampling, never_sampled
from mmi_deploy.runtime.scoring import Scoring, score
from mmi_deploy.runtime.session import Session
from mmi_deploy.runtime.work import DOCUMENT, BeamStep
from mmi_deploy.spec.graphs import Graph, Limits, graphs
from mmi_export.export import MODULES
from mmi_export.tracing.onnx_from_module import onnx_from_module
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.golden import full
from mmi_train.golden.units import read_unit
from mmi_train.model.generation import score_options
from mmi_train.model.mm_interleaved import MMInterleaved

if TYPE_CHECKING:
    from exports import Exported

END, VOCAB = 0, 5
GREEDY = TextSampling(temperature=0.0)


def table(text: tuple[int, ...]) -> Array:
    """Log probabilities of the token after `text`, the same at every call."""
    draw = np.random.default_rng([7, *text])
    return np.log(draw.dirichlet(np.ones(VOCAB)))


def searched(rules: BeamRules, most: int) -> BeamSearch:
    search, certain = BeamSearch(rules), [()]
    while not search.done and search.length < most:
        search.advance([table(beam.tokens) for beam in search.beams])
        certain.append(search.agreed())
    assert all(search.best().tokens[: len(one)] == one for one in certain)
    return search


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_with_room_for_all_texts_the_best_of_all_is_found(penalty: float) -> None:
    """All texts of up to three tokens, ended or cut off, judged one by one."""
    scores = {}
    for length in range(4):
        for text in itertools.product(range(1, VOCAB), repeat=length):
            total = sum(table(text[:place])[token] for place, token in enumerate(text))
            if length == 3:
                scores[text, None] = total / 4.0**penalty
            else:
                scores[text, END] = (total + table(text)[END]) / (length + 1.0) ** penalty
    best = max(scores, key=lambda key: scores[key])
    found = searched(BeamRules(200, frozenset([END]), penalty), 3).best()
    assert (found.tokens, found.end) == best
    assert math.isclose(found.score, scores[best])


def test_a_search_ends_early_only_if_it_is_asked_to() -> None:
    early = searched(BeamRules(2, frozenset([END]), -1.0, early_stopping=True), 12)
    late = searched(BeamRules(2, frozenset([END]), 1.0), 12)
    assert early.done and len(early.finished) == 2 and early.length < late.length


def test_penalties_change_log_probabilities_as_in_transformers() -> None:
    logits = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    how = TextSampling(temperature=0.0, repetition_penalty=1.3)
    ours = beam_scores(logits, how, [2, 5, 2], frozenset([7]))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor([[2, 5, 2]]), torch.from_numpy(logits).log_softmax(0)[None]
    )[0].numpy()
    theirs[7] = -np.inf
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_rows_are_copied_only_where_a_beam_has_another_parent() -> None:
    for seed in range(300):
        draw = np.random.default_rng(seed)
        of = int(draw.integers(1, 7))
        rows = draw.permutation(of)[: draw.integers(1, of + 1)].tolist()
        parents = draw.integers(0, len(rows), draw.integers(1, of + 1)).tolist()
        placed, copies = place_beams(parents, rows, of)
        texts = [f"text of row {row}" for row in range(of)]
        wanted = [texts[rows[parent]] for parent in parents]
        for source, target in copies:
            texts[target] = texts[source]
        assert [texts[row] for row in placed] == wanted
        assert len(set(placed)) == len(parents)
        assert len(copies) == len(parents) - len(set(parents))


def test_a_beam_may_begin_at_the_document_in_a_row_that_was_given_up() -> None:
    """A text that is through makes room for the next; every row that held one begins with the
    document, which is copied once."""
    for seed in range(300):
        draw = np.random.default_rng(seed)
        of = int(draw.integers(1, 7))
        width = int(draw.integers(1, of + 1))
        rows, texts = [0], ["document"] + ["empty"] * (of - 1)
        parents = [0] * width
        for step in range(6):
            own = [rows[parent] if parent != DOCUMENT else None for parent in parents]
            before = [texts[row] if row is not None else "document" for row in own]
            rows, copies = place_beams(parents, rows, of)
            for source, target in copies:
                texts[target] = texts[source]
            assert len(copies) == (width - 1 if step == 0 else 0)
            assert len(set(rows)) == len(rows) and max(rows) < width
            for row, text in zip(rows, before, strict=True):
                assert texts[row].startswith("document")
                texts[row] = f"{text} {step}"
            kept = [place for place in range(len(rows)) if draw.random() < 0.6]
            fresh = [DOCUMENT] * int(draw.integers(0, width - len(kept) + 1))
            parents = (kept + fresh) or [DOCUMENT]


def test_options_that_do_not_go_together_are_refused_in_one_line() -> None:
    for wrong, said in (
        ({"beams": 0}, "beams is out of range"),
        ({"beams": 3, "temperature": 1.0}, "a beam search draws nothing"),
        ({"beams": 2, "temperature": 0.0, "logprobs": 1}, "logprobs does not go together"),
        ({"beams": 2, "temperature": 0.0, "turn_tokens": 4}, "turn_tokens does not go together"),
        ({"length_penalty": 0.5}, "length_penalty is an option of beam search"),
        ({"beams": 2, "temperature": 0.0, "length_penalty": 99.0}, "-10 to 10"),
    ):
        with pytest.raises(ConfigError, match=said):
            GenerationOptions(**wrong)  # type: ignore[arg-type]
    runtime, _ = fake_runtime()
    many = GenerationOptions(beams=9, temperature=0.0)
    with pytest.raises(ConfigError, match="at most 8"):
        generate(runtime, document_of(Text("w5")), many)


def test_prompts_and_pictures_are_computed_once() -> None:
    """One run of the encoder, one prefill, and a run of the decoder for each further token."""
    runtime, log = fake_runtime()
    bans = {2: -100.0, 3: -100.0}  # no end: six tokens
    options = GenerationOptions(beams=3, temperature=0.0, max_tokens=6, logit_bias=bans)
    *_, end = generate(runtime, document_of(Text("w5"), Image(picture(1)), Text("w6")), options)
    assert isinstance(end, Finished) and (end.reason, end.tokens) == ("max_tokens", 6)
    runs = log.of("llm")
    assert log.counts()["vision_encoder"] == log.counts()["llm_values"] == 1
    assert [len(run["token_ids"]) for run in runs] == [1, 3, 3, 3, 3, 3]
    assert all(run["token_ids"].shape[1] == 1 for run in runs[1:])


def test_a_picture_is_drawn_after_the_best_text() -> None:
    """After a search the text is read as a whole, so that a picture sees what it sees otherwise."""
    runtime, _ = fake_runtime()
    favour = {3: 2.0}  # begin-of-image
    options = GenerationOptions(
        beams=3, temperature=0.0, max_tokens=9, max_images=1, min_tokens=2, logit_bias=favour
    )
    events = list(generate(runtime, document_of(Text("w5 w6")), options))
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    first = events[: [type(event).__name__ for event in events].index("ImageStarted")]
    before = "".join(event.text for event in first if isinstance(event, TextDelta))
    assert before and text.startswith(before)
    forced = GenerationOptions(max_tokens=0, max_images=1, draw_first=True)
    given = generate(runtime, document_of(Text("w5 w6" + before)), forced)
    (drawn,) = (event.rgb for event in events if type(event).__name__ == "ImageDone")
    (again,) = (event.rgb for event in given if type(event).__name__ == "ImageDone")
    np.testing.assert_array_equal(drawn, again)


def test_text_comes_as_soon_as_all_beams_agree_and_stop_texts_end_it() -> None:
    runtime, _ = fake_runtime()
    options: dict[str, Any] = {"beams": 2, "temperature": 0.0, "logit_bias": {2: -100.0, 3: -100.0}}
    document = document_of(Text("w5 w6"))
    deltas = [
        event.text
        for event in generate(runtime, document, GenerationOptions(max_tokens=12, **options))
        if isinstance(event, TextDelta)
    ]
    words = "".join(deltas).split()
    assert len(words) == 12 and len(deltas) > 1
    stopped = GenerationOptions(max_tokens=12, stop=(words[3],), **options)
    *rest, end = generate(runtime, document, stopped)
    assert isinstance(end, Finished) and end.reason == "stop"
    kept = "".join(event.text for event in rest if isinstance(event, TextDelta))
    assert kept.split() == words[: words.index(words[3])]


@pytest.fixture(scope="module")
def paper(exported_once: Callable[[str], Exported]) -> Exported:
    """A model with random weights, and its bundle."""
    return exported_once("paper")


@pytest.fixture(scope="module")
def runtime(paper: Exported) -> Runtime:
    return Runtime.open(paper.bundle, kernels="none", threads=1)


@pytest.fixture(scope="module")
def text_model() -> MMInterleaved:
    """A model whose language model is LLaMA: nothing passes the gates of what looks at images."""
    model = random_model(paper_reading())
    for layer in model.llm.mmfs_layers:
        torch.nn.init.zeros_(layer.gate)
    return model


@pytest.fixture(scope="module")
def text_runtime(text_model: MMInterleaved, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """Its language model in ONNX Runtime. No other graph runs for a text."""
    config, limits = text_model.config, Limits(context=64)
    path = tmp_path_factory.mktemp("llm") / "llm.onnx"
    llm = graphs(config, limits)["llm"]
    onnx_from_module(MODULES["llm"](text_model, llm), llm, path)

    def load(graph: Graph) -> OnnxRuntimeEngine:
        return OnnxRuntimeEngine(path, graph, OnnxOptions(threads=1))

    words = Tokenizer(build_tokenizer(), config.tokens)
    backend = HostBackend(graphs(config, limits), limits, load)
    return Runtime(config, words, backend, fake_schedule)


@pytest.fixture(scope="module")
def peer(text_model: MMInterleaved) -> LlamaForCausalLM:
    """The language model of transformers with the same weights."""
    llama, head = text_model.config.llama, text_model.head
    found = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=llama.vocab,
            hidden_size=llama.width,
            intermediate_size=llama.mlp_width,
            num_hidden_layers=llama.layers,
            num_attention_heads=llama.heads,
            num_key_value_heads=llama.kv_heads,
            rms_norm_eps=llama.eps,
            rope_theta=llama.rope_theta,
            max_position_embeddings=llama.context,
            tie_word_embeddings=False,
        )
    ).eval()
    state = text_model.llm.state_dict()
    shared = {name: value for name, value in state.items() if "look_back" not in name}
    found.model.load_state_dict(shared, strict=True)
    found.lm_head = torch.nn.Linear(llama.width, llama.vocab)  # our heads have biases
    with torch.no_grad():
        bias = head(torch.zeros(llama.width))
        found.lm_head.bias.copy_(bias)
        found.lm_head.weight.copy_((head(torch.eye(llama.width)) - bias).T)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("penalty, early", [(0.0, False), (1.0, True), (-0.5, True)])
def test_texts_are_those_of_transformers(
    peer: LlamaForCausalLM, text_runtime: Runtime, penalty: float, early: bool
) -> None:
    """The exported graphs in ONNX Runtime. Where a search may go on although enough texts have
    finished, transformers' present version counts lengths otherwise than the published one."""
    runtime, config, tokens = text_runtime, text_runtime.config, text_runtime.config.tokens
    ends = [*tokens.ends, tokens.boi]
    reasons = set()
    for seed, words in enumerate(("the red square", "a blue circle moves", "the green ring", "a")):
        beams = 2 + seed % 3
        bias = 1.0 if penalty or seed % 2 else -3.0  # of the ends
        document = document_of(Text(words))
        ids = encode_document(document, runtime.tokenizer, config, 64, 4).token_ids
        theirs = peer.generate(
            torch.tensor([ids.tolist()]),
            max_new_tokens=10,
            min_new_tokens=2,
            num_beams=beams,
            do_sample=False,
            length_penalty=penalty,
            early_stopping=early,
            eos_token_id=ends,
            pad_token_id=tokens.pad,
            suppress_tokens=sorted(never_sampled(tokens)),
            sequence_bias=[[[end], bias] for end in ends],
        )[0, len(ids) :].tolist()
        options = GenerationOptions(
            max_tokens=10,
            min_tokens=2,
            max_images=0,
            temperature=0.0,
            beams=beams,
            length_penalty=penalty,
            early_stopping=early,
            logit_bias=dict.fromkeys(ends, bias),
        )
        *events, end = generate(runtime, document, options)
        assert isinstance(end, Finished)
        text = "".join(event.text for event in events if isinstance(event, TextDelta))
        written = [token for token in theirs if token not in {*ends, tokens.pad}]
        whole = runtime.tokenizer.decode([*ids.tolist(), *written])
        assert text == whole.removeprefix(runtime.tokenizer.decode(ids.tolist()))
        assert end.tokens == len(written)
        reasons.add(end.reason)
    assert penalty or len(reasons) > 1, "texts that end by themselves, and others"


def test_scores_of_continuations_are_those_of_whole_texts(
    runtime: Runtime, paper: Exported
) -> None:
    """Ten continuations in three rows, with a picture before them. 1e-5 of 10: fp32, sums of
    another order."""
    model, tokenizer = paper.model, runtime.tokenizer
    side = model.config.vision.image_size
    draw = np.random.default_rng(0)
    texts = [
        tokenizer.decode(draw.integers(6, 40, count).tolist())
        for count in (1, 4, 2, 7, 1, 3, 3, 5, 6, 2)
    ]
    options = [tokenizer.encode(text) for text in texts]
    session = Session(runtime, 3)
    before, after = tokenizer.decode([20]), tokenizer.decode([21, 22])
    document = document_of(Text(before), Image(picture(3, side)), Text(after))
    scoring = Scoring(session.sequence, tokenizer, document, texts, 3, session.timings)
    assert scoring.rows == 3
    assert all(isinstance(event, Finished) for event in drive(scoring.run(), session.do))
    found = scoring.scores
    pixels = torch.from_numpy(picture(3, side)).permute(2, 0, 1)[None] / 255
    padded = torch.zeros(10, 7, dtype=torch.int64)
    real = torch.zeros(10, 7)
    for row, option in enumerate(options):
        padded[row, : len(option)], real[row, : len(option)] = torch.tensor(option), 1
    whole = score_options(
        model, torch.tensor(session.token_ids), pixels, torch.tensor([0]), padded, real
    )
    assert [one.tokens for one in found] == [len(option) for option in options]
    np.testing.assert_allclose([one.logprob for one in found], whole.numpy(), atol=1e-4)
    assert score(runtime, document, texts) == found


class _GoldenEncoder(OnnxRuntimeEngine):
    """The vision encoder on the stored pixels: a picture's first value is their number."""

    pixels: Array

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        given = inputs["pixels"].read()
        numbers = np.rint(given[:, 0, 0, 0] * 255).astype(int)
        given[...] = self.pixels[numbers]
        super()._execute(inputs, outputs)


@pytest.mark.exhaustive
def test_the_published_texts_come_from_the_exported_graphs(
    golden: Callable[[str], Any], golden_file: Callable[[str], Path], tmp_path: Path
) -> None:
    """golden_beam: three beams, with the pictures and weights of the published run, in ONNX
    Runtime. The published search bans nothing but ends before the least length."""
    beside = golden_file("full_forward.safetensors").parent
    folder = beside.parent / "golden_beam"
    if not folder.is_dir():
        pytest.skip("golden_beam is not here: it lies beside the folder MMI_GOLDEN_DIR")
    weights = full.load(read_unit(beside / "full_forward"))
    unit = read_unit(folder / "full_generate_texts_beam3")
    model, tokens = weights.model, weights.model.config.tokens
    limits = Limits(context=64, batch=3, images=4)

    def load(graph: Graph) -> OnnxRuntimeEngine:
        path = tmp_path / f"{graph.name}.onnx"
        onnx_from_module(MODULES[graph.name](model, graph), graph, path)
        if graph.name != "vision_encoder":
            return OnnxRuntimeEngine(path, graph)
        engine = _GoldenEncoder(path, graph)
        engine.pixels = unit.input("image_tensors").numpy()
        return engine

    backend = HostBackend(graphs(model.config, limits), limits, load)
    runtime = Runtime(model.config, None, backend, lambda key: None)  # type: ignore[arg-type, return-value]
    ends = frozenset([*tokens.ends, tokens.boi])
    given, number = unit.input("text_ids"), 0
    for row, wanted in zip(given.tolist(), unit.outputs["text_ids"].tolist(), strict=True):
        session = Session(runtime, 3)
        for token in row:
            if token == tokens.boi:
                session.append_image(np.full((224, 224, 3), number, np.uint8))
                number += 1
            elif token not in (tokens.image, tokens.pad):
                session.append_text([token])
        search, step = BeamSearch(BeamRules(3, ends)), BeamStep()
        while not search.done and search.length < 10:
            banned = ends if search.length < 3 else frozenset()
            pairs = zip(session.beam_logits(step), search.beams, strict=True)
            seen = tokens.bos
            search.advance(
                [beam_scores(x, GREEDY, (seen, *beam.tokens), banned) for x, beam in pairs]
            )
            step = BeamStep(search.parents, tuple(beam.tokens[-1] for beam in search.beams))
        best = search.best()
        assert [tokens.bos, *best.tokens, *([] if best.end is None else [best.end])] == wanted
