"""Tokenizer of a bundle: tokenizer.json, and what transformers needs to load it."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import processors

from mmi_deploy.documents.tokenizer import read_tokenizer_file
from mmi_deploy.spec.config import TokenConfig
from mmi_deploy.system.files import write_file

# Read by `transformers.AutoTokenizer.from_pretrained`, beside tokenizer.json.
TOKENIZER_CONFIG = "tokenizer_config.json"


def write_tokenizer(source: Path, target: Path, tokens: TokenConfig, context: int) -> None:
    """Write the tokenizer.json `source` to `target`, with a tokenizer_config.json beside it, so
    that `AutoTokenizer` gives the ids of `mmi_deploy`'s `Tokenizer`. `context`: tokens of a
    document. Raises `BundleError`."""
    inner = read_tokenizer_file(source)
    _begin_with(inner, tokens.bos)
    inner.save(str(target))
    unknown = getattr(inner.model, "unk_token", None)
    special = {
        "bos_token": inner.id_to_token(tokens.bos),
        "eos_token": inner.id_to_token(tokens.eos),
        "pad_token": inner.id_to_token(tokens.pad),
        "unk_token": unknown,
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "split_special_tokens": True,  # `<s>` in a text is three characters
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in special.items() if token is not None},
    }
    write_file(target.with_name(TOKENIZER_CONFIG), json.dumps(about, indent=2) + "\n")


def _begin_with(inner: tokenizers.Tokenizer, bos: int) -> None:
    """Let encoding with special tokens begin with `bos`, unless the tokenizer adds some already.
    transformers ignores an `add_bos_token` in tokenizer_config.json."""
    if inner.num_special_tokens_to_add(False):
        return
    word = inner.id_to_token(bos)
    begin = processors.TemplateProcessing(
        single=[word, "$A"], pair=[word, "$A", "$B"], special_tokens=[(word, bos)]
    )
    before = inner.post_processor
    inner.post_processor = begin if before is None else processors.Sequence([before, begin])
