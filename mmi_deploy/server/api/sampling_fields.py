"""Fields of chat and completions: text sampling, and what other servers' clients send along."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from mmi_deploy.runtime.options import DEFAULTS, GenerationOptions
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.fields import (
    Count,
    Fields,
    Label,
    MmiFields,
    Seed,
    Stop,
    Stream,
    Whole,
    agreed,
    at_most,
    only,
    options_of,
)
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import RequestLimits

# Tokens that may get a bias.
MOST_BIASES = 1024

TokenKey = Annotated[str, StringConstraints(pattern="^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[
    dict[TokenKey, Bias],
    at_most(MOST_BIASES),
    Field(json_schema_extra={"additionalProperties": False, "maxProperties": MOST_BIASES}),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="End with an event that has the usage.")
    continuous_usage_stats: bool | None = Field(
        None, description="Put the usage so far into every event; needs `include_usage`."
    )
    include_obfuscation: only(False) = None  # type: ignore[valid-type]


class SamplingFields(Fields):
    """Text sampling as OpenAI names it, and the options of vLLM's clients."""

    stream: Stream = None
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    seed: Seed | None = Field(None, description="Of all random draws; drawn and returned if none.")
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = Field(
        None, description=f"0 for greedy, else 0.001 or more; {DEFAULTS.temperature} unless given."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description=f"Mass of the most probable tokens; {DEFAULTS.top_p} unless given."
    )
    top_k: Annotated[Whole, Field(ge=-1, le=2**53)] | None = Field(
        None, description="Most probable tokens that are kept; 0 or, as in vLLM, -1: all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Keep tokens at least so many times as probable as the most probable."
    )
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Count | None = Field(
        None, description="Tokens before the model may end the text or begin a picture."
    )
    ignore_eos: bool | None = Field(
        None,
        description="Write as many tokens as were asked for: the model may neither end the text "
        "nor begin a picture of its own before.",
    )
    stop: Stop = None
    logit_bias: LogitBias | None = Field(
        None, description="Numbers to add to the logits of tokens, by their ids."
    )
    user: Label = None
    n: only(1) = None  # type: ignore[valid-type]
    best_of: only(1) = None  # type: ignore[valid-type]
    echo: only(False) = None  # type: ignore[valid-type]
    priority: only(0) = None  # type: ignore[valid-type]
    length_penalty: only(1) = None  # type: ignore[valid-type]
    use_beam_search: only(False) = None  # type: ignore[valid-type]
    stop_token_ids: only([]) = None  # type: ignore[valid-type]
    include_stop_str_in_output: only(False) = None  # type: ignore[valid-type]
    skip_special_tokens: only(True) = None  # type: ignore[valid-type]
    spaces_between_special_tokens: only(True) = None  # type: ignore[valid-type]
    truncate_prompt_tokens: only() = None  # type: ignore[valid-type]

    def stream_fields(self) -> dict[str, Any]:
        """Fields of `ApiRequest` about the stream. Raises `ApiError` for options without one."""
        options = self.stream_options or StreamOptions()
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400,
                "conflicting_values",
                "`stream_options` needs `stream` to be true",
                param="stream_options",
            )
        continuous = bool(options.continuous_usage_stats)
        if continuous and not options.include_usage:
            raise ApiError(
                400,
                "conflicting_values",
                "`continuous_usage_stats` needs `include_usage` to be true",
                param="stream_options.continuous_usage_stats",
            )
        return {
            "stream": bool(self.stream),
            "include_usage": bool(options.include_usage),
            "continuous_usage": continuous,
        }


# Fields that are options of the same name.
_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def sampling_options(
    fields: SamplingFields,
    mmi: MmiFields,
    model: ServedModel,
    limits: RequestLimits,
    values: dict[str, Any],
    names: dict[str, str],
) -> GenerationOptions:
    """Options of chat and completions; `values` and `names` as in `options_of`."""
    stop = fields.stop or ()
    given: dict[str, Any] = {name: getattr(fields, name) for name in _SAME}
    if fields.top_k == -1:
        given["top_k"] = 0
    given |= {
        "seed": agreed("seed", fields.seed, mmi.seed),
        "min_tokens": agreed("min_tokens", fields.min_tokens, mmi.min_tokens),
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "logit_bias": {int(key): bias for key, bias in (fields.logit_bias or {}).items()},
    }
    options = options_of(model, limits, mmi, given | values, names)
    if options.min_tokens > options.max_tokens:
        raise ApiError(
            400,
            "invalid_value",
            f"`min_tokens` is above the tokens to write, which are {options.max_tokens}",
            param="min_tokens",
        )
    if fields.ignore_eos:
        options = replace(options, min_tokens=options.max_tokens)
    return options
