"""Token ids in bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.fields import Count
from mmi_deploy.server.served_model import ServedModel

# More than any context: checking each id takes time.
MOST_IDS = 2**17

TokenIds = Annotated[
    list[Count], Field(max_length=MOST_IDS, description="Ids of the model's vocabulary.")
]


def check_token_ids(ids: Sequence[int], model: ServedModel, param: str) -> None:
    """Raise `ApiError` 400 for an id beyond the vocabulary."""
    largest, vocabulary = max(ids, default=0), model.config.llama.vocab
    if largest >= vocabulary:
        raise ApiError(
            400,
            "invalid_value",
            f"`{param}` has an id beyond the vocabulary: expected 0 to {vocabulary - 1}, got "
            f"{largest}",
            param=param,
        )
