"""Files of a folder that each use of it reads: what is downloaded, and nothing else.

Weights are safetensors. Pickles are chosen for `CHECKPOINT` alone, which is the published model's
own format and is read by an unpickler that runs no code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

# Reads a JSON file of the folder by its path in it: the file is downloaded first.
ReadJson = Callable[[str], Mapping[str, object]]

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

# Pickles beside a checkpoint that hold no weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclass(frozen=True)
class Kind:
    """A use of a folder.

    called: the folder in errors. marks: files of which it holds one at least. choose: names of the
    files in the folder, and a reader of its JSON files -> names of those to download. takes: ending
    of a single file that may stand in place of the folder.
    """

    called: str
    marks: tuple[str, ...]
    choose: Callable[[Collection[str], ReadJson], Iterable[str]]
    takes: str | None = None


def weights_of(files: Collection[str], stems: Sequence[str], read: ReadJson) -> list[str]:
    """Safetensors files of the first stem that is there: the shards that its index names, with the
    index, or the single file. Copies of the weights under other names are left out."""
    for stem in stems:
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if index in files:
            folder = PurePosixPath(stem).parent
            shards = {(folder / name).as_posix() for name in _shards(read(index))}
            return [index, *sorted(shards)]
        if single in files:
            return [single]
    return []


def _shards(index: Mapping[str, object]) -> list[str]:
    """File of each tensor of an index; none for another file, which its reader refuses."""
    named = index.get("weight_map")
    return [str(name) for name in named.values()] if isinstance(named, dict) else []


def only_pickles(files: Collection[str]) -> bool:
    """True for weights that are there as pickles alone."""
    kinds = {PurePosixPath(name).suffix for name in files}
    return ".safetensors" not in kinds and bool(kinds & {".bin", ".pt", ".pth", ".ckpt"})


def _matching(files: Iterable[str], *patterns: str) -> list[str]:
    """Files directly in the folder of a pattern; `*` does not match a slash."""
    depth = {pattern: pattern.count("/") for pattern in patterns}
    return [
        name
        for name in files
        if any(name.count("/") == depth[p] and fnmatchcase(name, p) for p in patterns)
    ]


def _model(files: Collection[str], read: ReadJson) -> list[str]:
    return _matching(files, "*.json", "*.safetensors")


def _language_model(files: Collection[str], read: ReadJson) -> list[str]:
    about = _matching(files, "config.json", "generation_config.json", *_TOKENIZER)
    return [*about, *weights_of(files, ("model",), read)]


def _vision(files: Collection[str], read: ReadJson) -> list[str]:
    about = _matching(files, "config.json", "preprocessor_config.json")
    return [*about, *weights_of(files, ("model",), read)]


def _diffusion(files: Collection[str], read: ReadJson) -> list[str]:
    about = _matching(
        files,
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/*.json",
        "tokenizer/*.json",
        "tokenizer/*.txt",
    )
    stem = "diffusion_pytorch_model"
    weights = [
        name
        for part in ("unet", "vae")
        for name in weights_of(files, (f"{part}/{stem}", f"{part}/{stem}.fp16"), read)
    ]
    return [*about, *weights, *weights_of(files, ("text_encoder/model",), read)]


def _tokenizer(files: Collection[str], read: ReadJson) -> list[str]:
    return _matching(files, *_TOKENIZER)


def _checkpoint(files: Collection[str], read: ReadJson) -> list[str]:
    indices = _matching(files, "*.bin.index.json")
    shards = {str(name) for index in indices for name in _shards(read(index))}
    pickles = sorted(shards) or [n for n in _matching(files, "*.bin") if n not in _NO_WEIGHTS]
    return [*pickles, *indices, *_matching(files, *_TOKENIZER)]


def _graphs(files: Collection[str], read: ReadJson) -> list[str]:
    graphs = read(BUNDLE_FILE).get("graphs")
    return [BUNDLE_FILE, *(map(str, graphs.values()) if isinstance(graphs, dict) else ())]


def _no_files(files: Collection[str], read: ReadJson) -> list[str]:
    return []


# The files of a bundle are those that its manifest lists: `download.py` reads it.
BUNDLE_FILE = "bundle.json"
BUNDLE = Kind("a bundle", (BUNDLE_FILE,), _no_files)
MODEL = Kind("a model folder", ("model.safetensors",), _model)
BUNDLE_OR_MODEL = Kind(
    "a bundle or a model folder", (BUNDLE_FILE, "model.safetensors"), MODEL.choose
)
# `config.json` is there too, and every JSON file and weights file is chosen, as of a model.
DELTA = Kind("a delta or adapters", ("delta.json", "adapters.json"), _model)
# Of a bundle, the manifest and the graphs without their weights.
GRAPHS = Kind("a bundle", (BUNDLE_FILE,), _graphs)
LANGUAGE_MODEL = Kind("a language model", ("config.json",), _language_model, takes=".gguf")
VISION = Kind("a CLIP", ("config.json",), _vision)
DIFFUSION = Kind("a Stable Diffusion", ("unet/config.json",), _diffusion)
TOKENIZER = Kind("a tokenizer", ("tokenizer.json", "tokenizer.model"), _tokenizer)
CHECKPOINT = Kind("a published checkpoint", ("*.bin",), _checkpoint, takes=".bin")

# Kinds of which a bundle is downloaded whole.
WHOLE_BUNDLES = (BUNDLE, BUNDLE_OR_MODEL)

# Kinds whose weights are refused where they are there as pickles alone.
WITHOUT_PICKLES = (LANGUAGE_MODEL, VISION, DIFFUSION)


def is_a(kind: Kind, files: Iterable[str]) -> bool:
    """True if `files` hold a file by which `kind` is known."""
    return bool(_matching(files, *kind.marks))
