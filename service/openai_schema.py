"""Owns OpenAI's words: bodies of ``/v1/completions`` and ``/v1/chat/completions`` as requests, and their answers.

Source of names, shapes and defaults: OpenAI's API reference (openai/openai-openapi). Where its default depends on the
model (temperature, top_p) the service's own holds, as in other servers of this kind.
"""

from dataclasses import dataclass
from typing import Any

from service.engine.interface import Message, Role
from service.errors import FieldOutOfBounds, FieldUnsupported, ModelUnknown, RequestMalformed
from service.schema import (
    SAMPLING,
    UNSUPPORTED,
    GenerateRequest,
    TokenBounds,
    Unsupported,
    check_text,
    make_request,
    parse_switch,
    parse_text,
    refuse_unknown,
)

MOST_MESSAGES = 512
LONGEST_LABEL = 256
COMPLETION_MAX_TOKENS = 16  # OpenAI's default of /v1/completions
# developer is OpenAI's newer word for system.
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
CHAT_MAX_TOKENS = ("max_completion_tokens", "max_tokens")

_NO_TOOLS = "the engine does not call tools"
# Labels by which OpenAI tells users and caches apart: they change no answer.
LABELS = ("user", "safety_identifier", "prompt_cache_key")
_COMMON = {"model", "stop", "stream", "stream_options", *LABELS, *SAMPLING}
_COMPLETION_FIELDS = {"prompt", "max_tokens", *_COMMON}
_CHAT_FIELDS = {"messages", *CHAT_MAX_TOKENS, *_COMMON}
UNSUPPORTED_BY_CHAT = {
    **UNSUPPORTED,
    "tool_choice": Unsupported(_NO_TOOLS, ("none", "auto")),
    "parallel_tool_calls": Unsupported(_NO_TOOLS, (True, False)),
    "functions": Unsupported(_NO_TOOLS, ([],)),
    "function_call": Unsupported(_NO_TOOLS, ("none", "auto")),
    "modalities": Unsupported("the engine writes text only", (["text"],)),
    "audio": Unsupported("the engine writes text only"),
    "prediction": Unsupported("the engine takes no predicted text"),
    "reasoning_effort": Unsupported("the engine has no such control"),
    "verbosity": Unsupported("the engine has no such control"),
    "store": Unsupported("nothing is ever stored", (False,)),
    "metadata": Unsupported("nothing is ever stored", ({},)),
    "service_tier": Unsupported("there is one tier", ("auto", "default")),
    "web_search_options": Unsupported("the engine looks nothing up"),
}
_MESSAGE_FIELDS = {"role", "content"}
UNSUPPORTED_IN_MESSAGE = {
    "name": Unsupported("chat templates have no place for a name"),
    "tool_calls": Unsupported(_NO_TOOLS, ([],)),
    "tool_call_id": Unsupported(_NO_TOOLS),
    "function_call": Unsupported(_NO_TOOLS),
    "refusal": Unsupported("put the text into content"),
    "audio": Unsupported("the engine reads text only"),
    "annotations": Unsupported("the engine reads text only", ([],)),
}
# Obfuscation pads the pieces so that their lengths tell nothing; behind TLS of one's own nobody asked for it.
UNSUPPORTED_IN_STREAM_OPTIONS = {"include_obfuscation": Unsupported("pieces are not padded", (False,))}


@dataclass(frozen=True)
class OpenAIRequest:
    """A valid body: what to generate, whether the stream ends with usage, and the client's own label of its user."""

    generate: GenerateRequest
    include_usage: bool
    user: str | None


def parse_chat(document: dict[str, Any], model: str, largest_max_tokens: int) -> OpenAIRequest:
    """A body of ``POST /v1/chat/completions``; without ``max_tokens`` the answer may fill the context.

    Raises what ``schema.parse_generate`` raises, and ModelUnknown.
    """
    refuse_unknown(document, _CHAT_FIELDS, UNSUPPORTED_BY_CHAT)
    _check_model(document, model)
    entries = document.get("messages")
    if not isinstance(entries, list):
        raise RequestMalformed("messages: must be a list of messages")
    if not 1 <= len(entries) <= MOST_MESSAGES:
        raise FieldOutOfBounds("messages", f"must hold 1 to {MOST_MESSAGES} messages")
    parsed = [_parse_message(f"messages[{place}]", entry) for place, entry in enumerate(entries)]
    for place, message in enumerate(parsed):
        # An assistant's may be: an answer can end before its first word, and programs send it back with the rest.
        if not message.content and message.role == "user":
            raise FieldOutOfBounds(f"messages[{place}].content", "must not be empty")
    if not any(message.content for message in parsed):
        raise FieldOutOfBounds("messages", "must hold a message that says something")
    # A system text that says nothing is as none, which is what programs with an empty field for it mean.
    messages = tuple(message for message in parsed if message.content or message.role != "system")
    bounds = TokenBounds(largest_max_tokens, largest_max_tokens)
    return _make(document, messages, CHAT_MAX_TOKENS, bounds)


def parse_completion(document: dict[str, Any], model: str, largest_max_tokens: int) -> OpenAIRequest:
    """A body of ``POST /v1/completions``: the model goes on from the prompt, outside its chat template.

    Raises what ``schema.parse_generate`` raises, and ModelUnknown.
    """
    refuse_unknown(document, _COMPLETION_FIELDS, UNSUPPORTED)
    _check_model(document, model)
    if isinstance(document.get("prompt"), list):
        if len(document["prompt"]) != 1 or not isinstance(document["prompt"][0], str):
            raise FieldUnsupported("prompt", "one text a request; neither several texts nor tokens are taken")
        document = {**document, "prompt": document["prompt"][0]}
    prompt = parse_text(document, "prompt")
    if prompt is None:
        raise RequestMalformed("prompt: is missing")
    if not prompt:
        raise FieldOutOfBounds("prompt", "must not be empty")
    bounds = TokenBounds(min(COMPLETION_MAX_TOKENS, largest_max_tokens), largest_max_tokens)
    return _make(document, (Message("text", prompt),), ("max_tokens",), bounds)


def _make(
    document: dict[str, Any], messages: tuple[Message, ...], names: tuple[str, ...], bounds: TokenBounds
) -> OpenAIRequest:
    stream = parse_switch(document, "stream")
    labels = {name: parse_text(document, name) for name in LABELS}
    for name, label in labels.items():
        if label is not None and len(label) > LONGEST_LABEL:
            raise FieldOutOfBounds(name, f"must have at most {LONGEST_LABEL} characters")
    request = make_request(document, messages, names, bounds, stream)
    return OpenAIRequest(request, _parse_stream_options(document, stream), labels["user"])


def _check_model(document: dict[str, Any], model: str) -> None:
    asked = parse_text(document, "model")
    if asked is None:
        raise RequestMalformed("model: is missing; GET /v1/models names the one that is served")
    check_model(asked, model)


def check_model(asked: str, model: str) -> None:
    """Raises ModelUnknown unless it is the one that is served."""
    if asked != model:
        raise ModelUnknown(f"the model {asked[:64]!r} is not served here; the one that is: {model!r}")


def _parse_message(place: str, entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise RequestMalformed(f"{place}: must be an object with role and content")
    # Programs send an answer back with all that their own records have; nulls among it say nothing.
    entry = {name: value for name, value in entry.items() if value is not None}
    refuse_unknown(entry, _MESSAGE_FIELDS, UNSUPPORTED_IN_MESSAGE, f"{place}.")
    role, content = entry.get("role"), entry.get("content")
    if not isinstance(role, str):
        raise RequestMalformed(f"{place}.role: must be a string")
    if role in ("tool", "function"):
        raise FieldUnsupported(f"{place}.role", _NO_TOOLS)
    if role not in ROLES:
        raise FieldOutOfBounds(f"{place}.role", f"must be one of {', '.join(ROLES)}")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "".join(_parse_part(f"{place}.content[{number}]", part) for number, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestMalformed(f"{place}.content: must be a string or a list of text parts")
    check_text(f"{place}.content", content)
    return Message(ROLES[role], content)


def _parse_part(place: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise RequestMalformed(f"{place}: must be an object")
    if part.get("type") != "text":
        raise FieldUnsupported(f"{place}.type", "the engine reads text only")
    part = {name: value for name, value in part.items() if value is not None}
    if set(part) != {"type", "text"} or not isinstance(part["text"], str):
        raise RequestMalformed(f"{place}: must have type and text, and nothing else")
    return part["text"]


def _parse_stream_options(document: dict[str, Any], stream: bool) -> bool:
    options = document.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise RequestMalformed("stream_options: is only for streams")
    if not isinstance(options, dict):
        raise RequestMalformed("stream_options: must be an object")
    refuse_unknown(options, {"include_usage"}, UNSUPPORTED_IN_STREAM_OPTIONS, "stream_options.")
    return parse_switch(options, "include_usage")
