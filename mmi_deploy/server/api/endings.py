"""The end of a generation in words of the API: why it ended, what it used, how long it took."""

from __future__ import annotations

from typing import Any, Literal

from mmi_deploy.batching.job import JobStats
from mmi_deploy.runtime.events import Finished, Reason
from mmi_deploy.server.api.api_request import ApiRequest
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.usage import Usage, picture_tokens
from mmi_deploy.spec.config import ModelConfig

FinishReason = Literal["stop", "length"]

# The limit of pictures is where most documents end, and the official client raises on `length`.
FINISH_REASONS: dict[Reason, FinishReason] = {
    "end": "stop",
    "stop": "stop",
    "max_images": "stop",
    "max_tokens": "length",
    "context": "length",
}


def finish_reason(reason: Reason, request: ApiRequest) -> FinishReason:
    """`finish_reason` of chat and completions; the reason itself is in `mmi.reason`.

    Raises `ApiError` for a document that was ended early: 504 at its deadline, 503 if the server
    cancelled it.
    """
    if reason == "deadline":
        raise ApiError(
            504,
            "deadline",
            f"the request was ended after {request.max_seconds:g} seconds; ask for fewer tokens or "
            "pictures, or stream the reply to keep what came before the end",
        )
    if reason not in FINISH_REASONS:
        raise ApiError(503, "cancelled", "the server cancelled the request")
    return FINISH_REASONS[reason]


def ended_early() -> ApiError:
    """The error of events that end without `Finished`."""
    return ApiError(503, "engine_died", "the engine ended before the reply was complete")


def usage_of(
    request: ApiRequest, finished: Finished, stats: JobStats | None, config: ModelConfig
) -> Usage:
    """Usage of a request at its end."""
    prompt = request.prompt_usage
    return Usage(
        prompt,
        finished.tokens,
        finished.images * picture_tokens(config),
        min(stats.cached, prompt.total) if stats else 0,
    )


def details(request: ApiRequest, finished: Finished, stats: JobStats | None) -> dict[str, Any]:
    """The field `mmi` of a reply: reason, seed, seconds of the stages, of the queue, to the
    first token or picture and in all, tokens found in a cache."""
    totals = finished.timings.totals()
    found: dict[str, Any] = {
        "reason": finished.reason,
        "seed": request.options.seed,
        "stage_seconds": {stage: round(seconds, 6) for stage, (seconds, _) in totals.items()},
    }
    if stats is not None:
        found |= {
            "queue_seconds": round(stats.queued, 6),
            "first_seconds": None if stats.first is None else round(stats.first, 6),
            "total_seconds": round(stats.total, 6),
            "cached_tokens": stats.cached,
        }
    return found
