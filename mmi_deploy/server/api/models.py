"""`/v1/models`: the model that is served, with its limits, samplers and sizes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mmi_deploy.runtime.options import DEFAULTS
from mmi_deploy.server.api.fields import check_model, most_images
from mmi_deploy.server.api.pictures import FORMATS
from mmi_deploy.server.api.usage import picture_tokens
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import DEFAULT_RULES, RequestLimits, StreamRules

# Whether an answer depends on what else runs at the same time. bit-equal: never. receipt: it may
# differ within the error that the receipts of the engines state.
EXACT, WITHIN_RECEIPTS = "bit-equal", "receipt"


def list_models(
    model: ServedModel,
    limits: RequestLimits,
    rules: StreamRules = DEFAULT_RULES,
    *,
    exactness: str | None = None,
) -> dict[str, Any]:
    """Body of `/v1/models`. exactness: as `EXACT`; by the target unless given."""
    return {"object": "list", "data": [_model(model, limits, rules, exactness)]}


def get_model(
    name: str,
    model: ServedModel,
    limits: RequestLimits,
    rules: StreamRules = DEFAULT_RULES,
    *,
    exactness: str | None = None,
) -> dict[str, Any]:
    """Body of `/v1/models/NAME`; raises `ApiError` 404 for another name."""
    check_model(name, model)
    return _model(model, limits, rules, exactness)


def _model(
    model: ServedModel, limits: RequestLimits, rules: StreamRules, exactness: str | None
) -> dict[str, Any]:
    exact = EXACT if model.target == "cpu" else WITHIN_RECEIPTS
    most_tokens = model.limits.context
    drawn = model.drawn_side
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "mmi",
        "root": model.name,
        "parent": None,
        "max_model_len": model.limits.context,
        "mmi": {
            "limits": {
                **asdict(limits),
                "images": most_images(model, limits),
                "tokens": min(limits.tokens or most_tokens, most_tokens),
            },
            "samplers": dict(model.steps),
            "branches": model.config.image_decoder.branches,
            "sizes": [f"{drawn}x{drawn}"],
            "given_side": model.given_side,
            "picture_tokens": picture_tokens(model.config),
            "input_formats": [name.lower() for name in FORMATS],
            "output_formats": ["png", "jpeg", "webp"],
            "image_transports": ["inline", "chunked", "url"],
            "previews": model.previews,
            "event_bytes": rules.event_bytes,
            "keep_alive": rules.keep_alive,
            "defaults": {
                "schedule": next(iter(model.steps)),
                "guidance": model.config.image_decoder.guidance_of(None),
                "max_images": DEFAULTS.max_images,
                "max_tokens": DEFAULTS.max_tokens,
                "temperature": DEFAULTS.temperature,
                "top_p": DEFAULTS.top_p,
            },
            "exactness": exactness or exact,
            "target": model.target,
            "fingerprint": model.fingerprint,
        },
    }
