"""Model that the small paper starts from: the shipped tiny one, with words for published prompts.

The tiny model has a token for each word of its own world, and none for those of the paper's prompts
or for numbers of three digits. Its words keep their rows; the new ones begin at random.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from mmi_deploy.system.files import write_file
from mmi_deploy.system.output_folder import new_folder
from mmi_train.data.readers.templates import PROMPTS
from mmi_train.data.synthetic.vocabulary import SPECIAL_TOKENS, UNKNOWN, words
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.model_folder import FOLDER_KIND, TOKENIZER, load_model, save_model

# A number of the world's boxes, a digit, a word, or one other character.
_TOKEN = r"<\d+>|\d|[^\W\d_]+|[^\w\s]"

_MARKS = "()/<>-'\"!;"


def vocabulary() -> tuple[str, ...]:
    """Words of the world in the order of their ids, then those of the prompts and of boxes."""
    texts = [re.sub(r"\{\w+\}", " ", prompt.text.lower()) for prompt in PROMPTS.values()]
    found = [word for text in texts for word in re.findall(_TOKEN, text)]
    return tuple(dict.fromkeys((*words(), *map(str, range(10)), *_MARKS, "box", *found)))


def build_tokenizer() -> Tokenizer:
    """Tokenizer of `vocabulary`: as the world's own, but numbers are single digits. Digits and
    brackets have no space before them in a decoded text, so that boxes are read again."""
    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=SPECIAL_TOKENS[UNKNOWN]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(_TOKEN), "isolated")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Replace(" :", ":"),
            decoders.Replace(Regex(r"^ (?=[\d()]$)"), ""),
        ]
    )
    return tokenizer


def write_base_model(start: Path, out: Path, seed: int) -> None:
    """Write the model folder `out`: the model `start` with the words of `vocabulary`."""
    model = load_model(start)
    config, state = model.config, model.state_dict()
    count = len(vocabulary())
    wider = replace(config, llama=replace(config.llama, vocab=count))
    made = MMInterleaved(wider)
    draw = torch.Generator().manual_seed(seed)
    for name, value in made.state_dict().items():
        old = state[name]
        if old.shape == value.shape:
            continue
        new = old.mean(0, keepdim=True).expand(count - len(old), *old.shape[1:]).clone()
        if new.dim() > 1:
            new += 0.02 * torch.randn(new.shape, generator=draw)
        state[name] = torch.cat([old, new])
    made.load_state_dict(state)
    with new_folder(out, None, kind=FOLDER_KIND) as work:
        save_model(made, work, torch.float16)
        write_file(work / TOKENIZER, build_tokenizer().to_str(pretty=True))
