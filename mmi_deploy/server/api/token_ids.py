"""Token ids in bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.fields import Count, check_limit
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import RequestLimits

TokenIds = Annotated[list[Count], Field(description="Ids of the model's vocabulary.")]


def check_token_ids(
    ids: Sequence[int], model: ServedModel, limits: RequestLimits, param: str
) -> None:
    """Raise `ApiError` 400 for more ids than a text has bytes, or one beyond the vocabulary."""
    check_limit("tokens", "text_too_long", len(ids), limits.text_bytes, param)
    largest, vocabulary = max(ids, default=0), model.config.llama.vocab
    if largest >= vocabulary:
        raise ApiError(
            400,
            "invalid_value",
            f"`{param}` has an id beyond the vocabulary: expected 0 to {vocabulary - 1}, got "
            f"{largest}",
            param=param,
        )
