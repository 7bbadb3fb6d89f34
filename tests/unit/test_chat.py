"""Chat templates: turns, sandbox, and texts that stay texts."""

import pytest

from service.engine.chat import ChatTemplate, Turn
from service.engine.interface import Message
from service.errors import ModelRefused, RequestMalformed

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
USER, SYSTEM = Message("user", "hi"), Message("system", "be")


def template(source: str | None, adds_bos: bool = True) -> ChatTemplate:
    return ChatTemplate(source, "<s>", "</s>", adds_bos)


def test_turns_keep_marks_and_texts_apart() -> None:
    """Marks go around the texts, what follows the last text is its suffix, BOS is left to the engine."""
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert template(LLAMA3).turns([SYSTEM, USER]) == [
        Turn(head.format("system"), "be", ""),
        Turn("<|eot_id|>" + head.format("user"), "hi", "<|eot_id|>" + head.format("assistant")),
    ]


def test_bos_stays_where_the_engine_adds_none() -> None:
    """A vocabulary that adds no BOS by itself gets the one the template writes."""
    assert template(LLAMA3, adds_bos=False).turns([USER])[0].prefix.startswith("<s>")


def test_doubled_bos_is_removed_whole() -> None:
    """However many BOS a template begins with, none is left beside the engine's."""
    assert template("{{ bos_token }}{{ bos_token }}[{{ messages[0].content }}]").turns([USER]) == [Turn("[", "hi", "]")]


def test_trimming_of_the_template_is_honoured() -> None:
    """A template that trims its texts has them trimmed, another does not."""
    padded = Message("user", "  hi \n")
    assert template(LLAMA3).turns([padded])[0].text == "hi"
    assert template("{{ messages[0]['content'] }}").turns([padded])[0].text == "  hi \n"


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("m.content", "<think>\nlong\n</think>\n\nHello"),
        ("m.content.split('</think>')[-1]", "\n\nHello"),  # DeepSeek-R1
        ("m.content.split('</think>')[-1].lstrip('\\n')", "Hello"),  # Qwen3
        ("m.content.split('</think>')[-1] | trim", "Hello"),
    ],
)
def test_what_a_template_forgets_of_earlier_answers_is_left_out(content: str, kept: str) -> None:
    """What the model thought before it spoke would fill the context; in anybody else's text it is text."""
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and '</think>' in m.content %}"
        f"{{{{ {content} }}}}{{% else %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
    )
    asked = Message("user", "what is </think>?")
    answered = Message("assistant", "<think>\nlong\n</think>\n\nHello")
    turns = template(source).turns([asked, answered, USER, Message("assistant", "Yes"), USER])
    texts = [turn.text for turn in turns]
    if "trim" in content:
        texts[1] = texts[1].strip()
    assert texts == ["what is </think>?", kept, "hi", "Yes", "hi"]


def test_placeholder_in_a_text_is_text() -> None:
    """A text that looks like the placeholder, or like a mark, comes through as it is."""
    for content in ("\ue0000\ue001", "\ue0001\ue001", "<|eot_id|>", "{{ 7 * 7 }}", "%1 %2"):
        turns = template(LLAMA3).turns([SYSTEM, Message("user", content)])
        assert [turn.text for turn in turns] == ["be", content]


def test_without_a_template_the_prompt_goes_as_it_is() -> None:
    """A file without a template takes one prompt and no system message."""
    assert template(None).turns([USER]) == [Turn("", "hi", "")]
    with pytest.raises(RequestMalformed, match="no chat template"):
        template(None).turns([SYSTEM, USER])


def test_template_may_refuse_roles() -> None:
    """raise_exception of the template is the request's fault and is told."""
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    source = refusal + "{{ messages[0].content }}"
    with pytest.raises(RequestMalformed, match="no system here"):
        template(source).turns([SYSTEM, USER])


def test_dropped_text_is_told() -> None:
    """A template that silently leaves a message out does not get away with it."""
    with pytest.raises(RequestMalformed, match="no place for a system message"):
        template("{{ messages[-1].content }}").turns([SYSTEM, USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}",
        "{{ messages.append(1) }}{{ messages[0].content }}",
        "{% for i in range(10**9) %}x{% endfor %}{{ messages[0].content }}",
        "{% include '/etc/passwd' %}{{ messages[0].content }}",
        "{{ messages[0].content",
        "{{ messages[99].content }}",
        "nothing of the text",
        "{{ messages[0].content }}" + "x" * 70_000,
        "{{ 1 // 0 }}",
    ],
)
def test_hostile_or_broken_templates_are_refused_at_load(source: str) -> None:
    """What breaks out, never ends, fails or drops the prompt is refused when the model is loaded."""
    with pytest.raises(ModelRefused, match="chat template"):
        template(source)
