"""Start models: their tokenizer stays, or is refused; averages take their place for a block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from mmi_deploy.errors import ConfigError
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.data.synthetic.world import easy
from mmi_train.training.from_scratch import averaged, own_tokenizer
from mmi_train.weights.model_folder import TOKENIZER


def test_a_start_models_tokenizer_stays(tmp_path: Path) -> None:
    """Ids of the model's own, which are not those of a new vocabulary."""
    words = list(build_tokenizer().get_vocab())
    own = Tokenizer(models.WordLevel({word: 7 * id for id, word in enumerate(words)}, "<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own.save(str(tmp_path / TOKENIZER))
    assert own_tokenizer(tmp_path, DrawnWorld(easy())).get_vocab() == own.get_vocab()
    assert (
        own_tokenizer(tmp_path, DrawnWorld(easy())).encode("red circle").ids
        == own.encode("red circle").ids
    )


def test_a_tokenizer_that_lacks_words_of_the_world_is_refused(tmp_path: Path) -> None:
    words = [word for word in build_tokenizer().get_vocab() if word not in ("red", "circle")]
    own = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, "<unk>"))
    own.save(str(tmp_path / TOKENIZER))
    with pytest.raises(ConfigError, match=r"does not know 2 words.*(red, circle|circle, red)"):
        own_tokenizer(tmp_path, DrawnWorld(easy()))


def test_averages_stand_in_for_weights_until_the_block_ends() -> None:
    module = nn.Linear(2, 2)
    weight = module.weight.detach().clone()
    with pytest.raises(OSError), averaged(module, {"weight": torch.zeros(2, 2)}):
        assert not module.weight.any()
        raise OSError
    assert torch.equal(module.weight, weight)
