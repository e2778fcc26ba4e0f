"""Requests and responses of OpenAI's chat completions, as far as they are honoured here.

Everything else is an error: a field that is not declared, a value of another type, two fields that contradict.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MOST_TOP_LOGPROBS = 20
MOST_STOPS = 16
MOST_CHOICES = 1024  # each is spelled in tokens before the answer begins
MOST_FORM_CHARACTERS = 1 << 16  # of a regular expression, or of a schema as JSON
LEAST_LOGPROB = -9999.0  # stands for zero probability, which JSON cannot hold

# Tags of alternatives stand in the places of errors; brackets tell them from names of fields.
TAGS = {"text", "parts", "image_url", "system", "developer", "user", "assistant", "json_object", "json_schema"}
TAGGED = "<{}>"


class Strict(BaseModel):
    """Nothing is converted, nothing is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _by(key: str, known: tuple[str, ...]) -> Discriminator:
    def tag(value: Any) -> str | None:
        found = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        return TAGGED.format(found) if isinstance(found, str) else None

    names = ", ".join(known)
    return Discriminator(tag, custom_error_type="unknown_kind", custom_error_message=f"{key!r} must be one of {names}")


def _text_or_parts(value: Any) -> str | None:
    return TAGGED.format("text" if isinstance(value, str) else "parts")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str = Field(
        min_length=1,
        description="data: URL, http(s): URL, image:// URL of an upload, or file:// URL where the server allows it.",
    )
    detail: Literal["auto"] | None = Field(None, description="Use visual_tokens instead.")


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Texts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(min_length=1), Tag("<parts>")],
    Discriminator(_text_or_parts),
]
Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")], _by("type", ("text", "image_url"))
]
Parts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Field(min_length=1), Tag("<parts>")],
    Discriminator(_text_or_parts),
]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Texts


class UserMessage(Strict):
    role: Literal["user"]
    content: Parts


class AssistantMessage(Strict):
    """An earlier answer; clients send it back with the empty fields that it came with."""

    role: Literal["assistant"]
    content: Texts
    refusal: None = None
    audio: None = None
    annotations: None = None
    function_call: None = None
    tool_calls: None = None


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[SystemMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")],
    _by("role", ("system", "developer", "user", "assistant")),
]


class StreamOptions(Strict):
    include_usage: bool | None = None


class JsonSchema(Strict):
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(None, description="Answers follow the schema whatever this says.")


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    _by("type", ("text", "json_object", "json_schema")),
]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MOST_CHOICES)]


class StructuredOutputs(Strict):
    """vLLM's field; one of these."""

    choice: Choices | None = None
    regex: str | None = None
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        if sum(value is not None for value in (self.choice, self.regex, self.json_, self.json_object)) != 1:
            raise ValueError("give one of choice, regex, json and json_object")
        return self


def _no_penalty(value: float | None) -> float | None:
    if value:
        raise ValueError("only 0 is supported")
    return value


NoPenalty = Annotated[float | None, AfterValidator(_no_penalty)]
Stop = Annotated[str, Field(min_length=1)]


class ChatRequest(Strict):
    """What `/v1/chat/completions` takes. null is the same as nothing."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": False})

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="Longest answer; max_completion_tokens is the same.")
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Equal seeds give equal answers.")
    n: int | None = Field(None, ge=1, description="Answers; with a seed the next one has the next seed.")
    stop: (
        Annotated[
            Annotated[Stop, Tag("<text>")] | Annotated[list[Stop], Field(max_length=MOST_STOPS), Tag("<parts>")],
            Discriminator(_text_or_parts),
        ]
        | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS, description="Needs logprobs.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_choice: Choices | None = None
    guided_regex: str | None = None
    guided_json: dict[str, Any] | str | None = None
    structured_outputs: StructuredOutputs | None = None
    confidence: bool | None = Field(None, description="Say how probable the answer is; of choices, among them.")
    visual_tokens: int | None = Field(None, ge=1, description="Of every image; fewer are quicker, more show more.")
    frequency_penalty: NoPenalty = Field(None, description="Only 0.")
    presence_penalty: NoPenalty = Field(None, description="Only 0.")


class TokenDetail(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TokenDetail):
    top_logprobs: list[TokenDetail]


class Logprobs(BaseModel):
    content: list[ChosenToken]


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str


Reason = Literal["stop", "length"]


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Reason
    confidence: float | None = Field(None, description="Probability of the answer, where it is asked for.")


class PromptDetails(BaseModel):
    cached_tokens: int = Field(description="Whose keys and values were found again.")
    image_tokens: int = Field(description="Visual tokens of all images.")


class UsageCount(BaseModel):
    prompt_tokens: int = Field(description="Visual tokens included.")
    completion_tokens: int = Field(description="Of all answers, ends of sequence included.")
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageCount
    timings: dict[str, float] = Field(
        description="Seconds by stage: images (fetched and decoded), queue, preprocess, encode, compress, prefill, "
        "decode; of several answers the longest."
    )


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Reason | None
    confidence: float | None = Field(None, description="With the end of the answer, where it is asked for.")


class ChatChunk(BaseModel):
    """One event of a streamed answer; the usage and the timings come with the last, which has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageCount | None = None
    timings: dict[str, float] | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class UploadedImage(BaseModel):
    id: str
    object: Literal["image"]
    url: str = Field(description="For image_url parts.")
    width: int
    height: int


class Status(BaseModel):
    status: Literal["ok", "ready"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


def field_path(place: Sequence[int | str], ends_with_name: bool) -> str | None:
    """`messages.0.content` of where pydantic found an error, without the tags of alternatives.

    Args:
        place: pydantic's, from the body.
        ends_with_name: its end is the name of a field, whatever it looks like.
    """
    tags = {TAGGED.format(tag) for tag in TAGS}
    last = len(place) - 1
    names = [str(name) for index, name in enumerate(place) if name not in tags or (index == last and ends_with_name)]
    return ".".join(names[1:]) or None
