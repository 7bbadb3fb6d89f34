"""Owns the way from a conversation to turns: the file's own chat template, run in a sandbox, with the texts kept apart.

The template is rendered with a placeholder in the place of each text. What it puts around the placeholders are its
marks, in which control tokens are meant; a text is put in later and is never parsed for them, so no prompt can forge
a mark. A file without a template gets the prompt as it is.

What a template does with texts themselves is found out at the load, and then done here: whether it trims them, and
whether it leaves out of an earlier answer what the model thought before it spoke.
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from service.engine.interface import Message, Role
from service.errors import ModelRefused, RequestMalformed

# Private-use characters: no template mentions them, and a text never meets this pattern (it is put in afterwards).
_OPEN, _CLOSE = "\ue000", "\ue001"
_PLACEHOLDER = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_MAX_RENDERED_CHARACTERS = 65_536
_END_OF_THOUGHT = "</think>"  # of all models whose templates forget thoughts


@dataclass(frozen=True)
class Turn:
    """``prefix`` (marks) + ``text`` (a person's) + ``suffix`` (marks, only at the conversation's end)."""

    prefix: str
    text: str
    suffix: str


class _TemplateRefusal(TemplateError):
    """The template itself said no by ``raise_exception``."""


def _raise_exception(message: str) -> None:
    raise _TemplateRefusal(message)


class ChatTemplate:
    """A model's chat template, ready to render; ``source`` None stands for a model without one."""

    def __init__(self, source: str | None, bos_token: str, eos_token: str, adds_bos: bool):
        """Raises ModelRefused if the template cannot render a single user message."""
        self._bos_token, self._eos_token, self._adds_bos = bos_token, eos_token, adds_bos
        self._template: Template | None = None
        self._forgets: str | None = None
        if source is None:
            return
        # trim_blocks, lstrip_blocks and loop controls are what templates are written for: Hugging Face's
        # transformers, utils/chat_template_utils.py.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
            self.turns([Message("user", "probe")])
            # A system message may lead through other parts of the template: if they do not end, nor does the load.
            with contextlib.suppress(RequestMalformed):
                self.turns([Message("system", "probe"), Message("user", "probe")])
            with contextlib.suppress(RequestMalformed):
                self._forgets = self._find_forgotten(self._template)
        except (TemplateError, RequestMalformed) as error:
            raise ModelRefused(f"the model's chat template cannot be used: {error}") from error

    def turns(self, messages: Sequence[Message], told_time: datetime | None = None) -> list[Turn]:
        """The conversation as turns, in the order of the template, which may write ``told_time`` (None: now) into it.

        Raises RequestMalformed if the template refuses the roles, drops a text, or there is none and the messages are
        more than one user's prompt.
        """
        if len(messages) == 1 and messages[0].role == "text":
            return [Turn("", messages[0].content, "")]
        if self._template is None:
            if len(messages) != 1 or messages[0].role != "user":
                raise RequestMalformed(
                    "this model's file has no chat template: it takes one prompt, and no system message"
                )
            return [Turn("", messages[0].content, "")]
        told_time = told_time or datetime.now()
        roles = [message.role for message in messages]
        rendered = self._render(self._template, roles, "", told_time)
        # A template that trims its texts drops the padding too; then the texts are trimmed here.
        trims = self._render(self._template, roles, " ", told_time) == rendered
        parts = _PLACEHOLDER.split(rendered)
        marks, places = parts[0::2], [int(index) for index in parts[1::2]]
        missing = set(range(len(messages))) - set(places)
        if missing:
            role = messages[min(missing)].role
            raise RequestMalformed(f"this model's chat template has no place for a {role} message")
        texts = [self._recall(each.content) if each.role == "assistant" else each.content for each in messages]
        texts = [text.strip() if trims else text for text in texts]
        turns = [Turn(mark, texts[place], "") for mark, place in zip(marks, places, strict=False)]
        turns[-1] = Turn(turns[-1].prefix, turns[-1].text, marks[-1])
        return turns

    def _recall(self, answer: str) -> str:
        """An earlier answer, as the template would have taken it."""
        if self._forgets is None or _END_OF_THOUGHT not in answer:
            return answer
        return answer.rpartition(_END_OF_THOUGHT)[2].lstrip(self._forgets)

    def _find_forgotten(self, template: Template) -> str | None:
        """What is left out behind a thought, beside the thought; None if that is kept. Raises RequestMalformed."""
        told_time = datetime.now()

        def render(answer: str) -> str:
            texts: list[tuple[Role, str]] = [("user", "probe"), ("assistant", answer), ("user", "probe")]
            return self._render_texts(template, texts, told_time)

        rendered = render(f"<think>\nthought\n{_END_OF_THOUGHT}\n\nsaid")
        return "\n" if rendered == render("said") else "" if rendered == render("\n\nsaid") else None

    def _render(self, template: Template, roles: list[Role], padding: str, told_time: datetime) -> str:
        texts = [(role, f"{padding}{_OPEN}{index}{_CLOSE}{padding}") for index, role in enumerate(roles)]
        return self._render_texts(template, texts, told_time)

    def _render_texts(self, template: Template, texts: list[tuple[Role, str]], told_time: datetime) -> str:
        try:
            rendered = template.render(
                messages=[{"role": role, "content": text} for role, text in texts],
                add_generation_prompt=True,
                bos_token=self._bos_token,
                eos_token=self._eos_token,
                tools=None,
                strftime_now=told_time.strftime,
            )
        except _TemplateRefusal as error:
            raise RequestMalformed(f"this model's chat template refuses the conversation: {error}") from error
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, OverflowError) as error:
            raise RequestMalformed(f"this model's chat template failed: {error}") from error
        if len(rendered) > _MAX_RENDERED_CHARACTERS:
            raise RequestMalformed("this model's chat template writes too much")
        if self._adds_bos and self._bos_token:
            # The engine adds the beginning-of-sequence token itself; a second one harms the answer.
            while rendered.startswith(self._bos_token):
                rendered = rendered[len(self._bos_token) :]
        return rendered
