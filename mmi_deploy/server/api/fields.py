"""Fields of request bodies: strict types, nothing ignored silently, errors that name the field.

A body is described by a `Fields` class, which is also its JSON schema. A field that the server
cannot honour is there as `only(...)` with the values that ask for nothing; an unknown field is an
error. `null` is the same as leaving a field out.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.options import DEFAULTS, MOST_BEAMS, GenerationOptions
from mmi_deploy.server.api.api_request import OutputFormat, Transport
from mmi_deploy.server.api.errors import ApiError, api_error_of, public
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import RequestLimits

# Whole numbers above this are not exact as a JSON number of JavaScript.
_EXACT = 2**53

# Largest seed that is drawn when none is given: every client can send it back.
_SEEDS = _EXACT


def _fail_fast(schema: Any) -> None:
    """Let all lists of a schema of pydantic end at their first error."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for one in schema.values():
            _fail_fast(one)
    elif isinstance(schema, list | tuple):
        for one in schema:
            _fail_fast(one)


class Fields(BaseModel):
    """Base of bodies and of objects in them: no unknown fields, no conversion of types.

    A body is wrong as soon as one thing in it is: lists are read up to their first error, and of
    unknown fields the first is told. So millions of errors in a body cost no more than one.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: object) -> object:
        if not isinstance(value, dict) or len(value) <= 1:
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = [name for name in value if name not in known]
        if len(unknown) <= 1:
            return value
        return {name: value[name] for name in value if name in known or name == unknown[0]}


def at_most(keys: int) -> BeforeValidator:
    """Check of the number of keys of an object before they are read."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > keys:
            raise PydanticCustomError(
                "too_many_keys", "should have at most {keys} keys", {"keys": keys}
            )
        return value

    return BeforeValidator(check)


def _whole(value: object) -> object:
    """1.0 is a whole number to JSON Schema, and to clients without a type for whole numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "half_character", "holds half a character (a lone surrogate)"
        ) from None
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=0, le=_EXACT)]
Positive = Annotated[Whole, Field(ge=1, le=_EXACT)]
Seed = Annotated[Whole, Field(ge=0, lt=2**64)]
String = Annotated[str, AfterValidator(_encodable)]


def only(*values: Any) -> Any:
    """Type of a field that the server cannot honour but for `values`, which ask for nothing."""

    def check(value: object) -> object:
        if value is None or any(_same(value, one) for one in values):
            return value
        listed = " or ".join(json.dumps(one) for one in values) or "null"
        raise PydanticCustomError(
            "unsupported_value",
            "is not supported: leave it out, or send {listed}",
            {"listed": listed},
        )

    schema = {"enum": [*values, None], "description": "Accepted, without an effect."}
    return Annotated[Any, BeforeValidator(check), WithJsonSchema(schema)]


def _same(left: object, right: object) -> bool:
    """Equality of JSON values: 1 is 1.0 but not true."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    return (numbers or type(left) is type(right)) and left == right


Label = Annotated[
    str | None, Field(max_length=4096, description="A name of the client's own; without an effect.")
]
Metadata = Annotated[
    Annotated[dict[str, str], at_most(64), Field(json_schema_extra={"maxProperties": 64})] | None,
    Field(description="Accepted, without an effect."),
]

Kind = TypeVar("Kind", bound=Fields)


def read_fields(kind: type[Kind], body: object) -> Kind:
    """Read a body as `kind`; raises `ApiError` 400 for the field that is at fault."""
    if not isinstance(body, Mapping):
        raise ApiError(400, "invalid_type", "the body must be a JSON object")
    try:
        return kind.model_validate(dict(body))
    except ValidationError as error:
        raise _refusal(error, body, kind) from None


def _refusal(error: ValidationError, body: Mapping[str, Any], kind: type[Fields]) -> ApiError:
    """The error of the field that lies deepest: of a union's choices, the one that was meant."""
    found = error.errors(include_url=False, include_input=False)
    places = [_place(one, body) for one in found]
    deepest = max(places, key=len)
    same = [one for one, place in zip(found, places, strict=True) if place == deepest]
    first, param = same[0], _name_of(deepest)
    match first["type"]:
        case "extra_forbidden":
            near = get_close_matches(str(deepest[-1]), kind.model_fields, n=1)
            fix = f"; did you mean `{near[0]}`?" if near and len(deepest) == 1 else ""
            return ApiError(
                400, "unknown_parameter", f"unknown parameter: `{param}`{fix}", param=param
            )
        case "missing":
            return ApiError(400, "missing_required_parameter", f"`{param}` is missing", param=param)
        case "unsupported_value":
            return ApiError(400, "unsupported_value", f"`{param}` {first['msg']}", param=param)
    # Of choices of different types, the one of the value's own type says what is wrong with it.
    fitting = [one for one in same if not one["type"].endswith("_type")]
    tails = dict.fromkeys(_tail(one) for one in fitting or same)
    code = "invalid_value" if fitting else "invalid_type"
    name = f"`{param}`" if param else "the body"
    return ApiError(400, code, public(f"{name} {' or '.join(tails)}"), param=param)


def _place(error: ErrorDetails, body: object) -> tuple[str | int, ...]:
    """Location of an error in the body, without pydantic's names of the choices of a union."""
    place: list[str | int] = []
    names = error["loc"]
    for at, name in enumerate(names):
        last = at == len(names) - 1 and error["type"] in ("missing", "extra_forbidden")
        if isinstance(body, Mapping) and (name in body or last):
            place.append(name)
            body = body.get(name)
        elif isinstance(body, Sequence) and isinstance(name, int) and name < len(body):
            place.append(name)
            body = body[name]
    return tuple(place)


def _tail(error: ErrorDetails) -> str:
    """Message of an error without its subject, and without anything of the request."""
    match error["type"]:
        case "union_tag_invalid":
            return f"should have a `type` of {error['ctx']['expected_tags']}"
        case "union_tag_not_found":
            return "should have a `type`"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "should be an object"
    _, should, rest = error["msg"].partition("should ")  # after Input, List or String
    return should + rest.replace(" after validation", "") if should else error["msg"]


def _name_of(place: tuple[str | int, ...]) -> str | None:
    """A location as OpenAI writes it, `messages[0].content`; None for the whole body."""
    if not place:
        return None
    text = ""
    for name in place:
        if isinstance(name, int):
            text += f"[{name}]"
        else:  # a name of the client's own may be of any length, and not even text
            short = name if len(name) <= 64 else name[:63] + "…"
            text += ("." if text else "") + short.encode("unicode_escape").decode()
    return text


class BeamFields(Fields):
    """Beam search, an extension of the API."""

    beams: Annotated[Whole, Field(ge=1, le=MOST_BEAMS)] | None = Field(
        None,
        description="Keep the best of so many texts that grow side by side (beam search). Takes a "
        "slot of the service for each, and a `temperature` of 0, which it stands for.",
    )
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = Field(
        None, description="Of `beams`: above 0 favours long texts; 1.0 unless given."
    )
    early_stopping: bool | None = Field(
        None, description="Of `beams`: end once so many texts have finished."
    )


class MmiFields(BeamFields):
    """Extensions of the API, all in one object."""

    seed: Seed | None = Field(None, description="Of all random draws; drawn and returned if none.")
    max_images: Count | None = Field(
        None,
        description="Pictures that the model may draw beyond those the request asks for. "
        f"{DEFAULTS.max_images} unless given; 0 where `modalities` is text alone.",
    )
    draw_first: bool | None = Field(None, description="Begin the reply with a picture.")
    turn_tokens: Count | None = Field(
        None, description="Write exactly so many tokens, then draw, until `max_images`."
    )
    min_tokens: Count | None = Field(
        None, description="Tokens before the model may end the text or begin a picture."
    )
    max_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Time after which the request is ended with the error `deadline`."
    )
    guidance: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None,
        description="Scale of classifier-free guidance, 1 for none; a distilled model has its own "
        "alone.",
    )
    schedule: String | None = Field(
        None, description="Sampler, one of `mmi.samplers` of the model, as `ddim:20`."
    )
    full_every: Positive | None = Field(
        None, description="Run the whole U-Net at every n-th step: faster, an approximation."
    )
    image_transport: Transport | None = Field(
        None,
        description="`inline`: a picture is one data URL. `chunked`: in pieces, for clients with "
        "short lines. `url`: a path of this server, which keeps the picture for a while.",
    )
    output_format: OutputFormat | None = Field(
        None, description="Of drawn pictures: `png`, which is exact, `webp` or `jpeg`."
    )
    output_compression: Annotated[Whole, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of `webp` and `jpeg`."
    )
    partial_images: Annotated[Whole, Field(ge=0, le=3)] | None = Field(
        None, description="Previews of each picture while it is drawn."
    )
    progress: bool | None = Field(None, description="Send an event for each step of a picture.")


def agreed(name: str, *values: Any) -> Any:
    """The value of an option that may be given in several places; None if it is in none.

    Raises `ApiError` if they differ.
    """
    given = [value for value in values if value is not None]
    if any(value != given[0] for value in given):
        raise ApiError(
            400, "conflicting_values", f"`{name}` is given twice, with different values", param=name
        )
    return given[0] if given else None


def check_model(name: str, model: ServedModel) -> None:
    """Raise `ApiError` 404 unless `name` is the model that is served."""
    if name != model.name:
        raise ApiError(
            404,
            "model_not_found",
            f"this server has one model, `{model.name}`; see /v1/models",
            param="model",
        )


def check_limit(what: str, code: str, value: float, most: float | None, param: str | None) -> None:
    """Raise `ApiError` 400 with `code` for more than `most` of `what`."""
    if most is not None and value > most:
        message = f"too many {what}: at most {most}, got {value}"
        raise ApiError(400, code, public(message), param=param)


def options_of(
    model: ServedModel,
    limits: RequestLimits,
    mmi: MmiFields,
    values: Mapping[str, Any],
    fields: Mapping[str, str] = MappingProxyType({}),
) -> GenerationOptions:
    """Options of a generation: `values` by the names of `GenerationOptions`, the rest from `mmi`.

    None stands for the default. fields: names in the body of options that are called otherwise
    there. Raises `ApiError` for values beyond the model or the limits.
    """
    given: dict[str, Any] = {
        name: getattr(mmi, name)
        for name in (
            "draw_first",
            "turn_tokens",
            "beams",
            "length_penalty",
            "early_stopping",
            "guidance",
            "schedule",
            "full_every",
        )
    }
    given |= {"seed": mmi.seed, "max_images": mmi.max_images, "min_tokens": mmi.min_tokens}
    given["previews"] = mmi.partial_images
    given |= values
    given = {name: value for name, value in given.items() if value is not None}
    given.setdefault("seed", secrets.randbelow(_SEEDS))
    if given.get("beams", 1) > 1:
        check_limit("beams", "too_many_beams", given["beams"], model.limits.batch, "mmi.beams")
        given.setdefault("temperature", 0.0)
    if (schedule := given.get("schedule")) is not None and schedule not in model.steps:
        raise ApiError(
            400,
            "unknown_sampler",
            f"the model has the samplers {', '.join(model.steps)}",
            param="mmi.schedule",
        )
    try:
        model.config.image_decoder.guidance_of(given.get("guidance"))
    except ConfigError as error:
        raise ApiError(400, "distilled_guidance", str(error), param="mmi.guidance") from None
    most_tokens = limits.tokens if limits.tokens is not None else model.limits.context
    if "max_tokens" in given:
        name = fields.get("max_tokens", "max_tokens")
        check_limit("tokens to write", "too_many_tokens", given["max_tokens"], most_tokens, name)
    else:
        given["max_tokens"] = min(DEFAULTS.max_tokens, most_tokens)
    if "max_images" in given:
        most = most_images(model, limits)
        check_limit("pictures", "too_many_images", given["max_images"], most, "mmi.max_images")
    try:
        options = GenerationOptions(**given)
        options.sampling.check_ids(model.config.llama.vocab)
    except ConfigError as error:
        param = _option_in(error, given)
        if param in BeamFields.model_fields:
            param = f"mmi.{param}"
        raise api_error_of(error, param=fields.get(param, param) if param else None) from None
    return options


def most_images(model: ServedModel, limits: RequestLimits) -> int:
    """Limit of pictures of a document, given and drawn."""
    most = model.limits.images
    return most if limits.images is None else min(limits.images, most)


def with_room(
    options: GenerationOptions,
    images: int,
    asked: int | None,
    model: ServedModel,
    limits: RequestLimits,
) -> GenerationOptions:
    """Options that draw no more pictures than a document of `images` pictures has room for.

    asked: `max_images` of the request, if it has one. Raises `ApiError` if that is too many.
    """
    most = most_images(model, limits)
    if asked:
        check_limit("pictures", "too_many_images", images + asked, most, "mmi.max_images")
    return replace(options, max_images=max(min(options.max_images, most - images), 0))


def _option_in(error: ConfigError, given: Mapping[str, Any]) -> str | None:
    """The option that an error of the options names."""
    words = str(error).split(";")[0].replace("'", " ").split()
    return next((word for word in words if word in given), None)


def max_seconds_of(mmi: MmiFields, limits: RequestLimits) -> float:
    """Seconds until the request is ended; raises `ApiError` above the limit."""
    if mmi.max_seconds is None:
        return limits.seconds
    check_limit("seconds", "too_many_seconds", mmi.max_seconds, limits.seconds, "mmi.max_seconds")
    return mmi.max_seconds


def check_compression(output_format: str | None, quality: int | None, param: str) -> None:
    """Raise `ApiError` for a quality of PNG, which has none; 100 asks for nothing."""
    if output_format in (None, "png") and quality not in (None, 100):
        raise ApiError(
            400,
            "conflicting_values",
            f"`{param}` is the quality of `webp` and `jpeg`; PNG is exact",
            param=param,
        )


def reply_fields(mmi: MmiFields) -> dict[str, Any]:
    """Fields of `ApiRequest` that say how pictures are sent. Raises `ApiError`."""
    check_compression(mmi.output_format, mmi.output_compression, "mmi.output_compression")
    given = {
        name: getattr(mmi, name) for name in ("output_format", "output_compression", "progress")
    }
    given["transport"] = mmi.image_transport
    return {name: value for name, value in given.items() if value is not None}


ModelName = Annotated[str, Field(description="Name of the model, as in `/v1/models`.")]
Stream = Annotated[bool | None, Field(description="Send the reply as events, as it is made.")]
StopText = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_encodable)]
Stop = Annotated[
    StopText | Annotated[list[StopText], Field(max_length=64)] | None,
    Field(description="Texts that end the reply; not part of it."),
]

# Of a body without `mmi`.
NO_EXTENSIONS = MmiFields()
