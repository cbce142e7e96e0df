"""From the user's words to the token ids that a subject reads.

Instruct models read their chat template, always with our system message (templates would put one of
their own in its place). Base models read a plain frame. Generator and model are given ids, never
text: tokenising text is not the inverse of decoding ids.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from lab.errors import UserError

_STAND_IN = "{prompt}"
_OPEN_REASONING = re.compile(r"<think>\s*$")


@dataclass(frozen=True)
class Rendering:
    """One rendered prompt.

    Attributes:
        text: the rendered string, special tokens included as the template writes them.
        ids: its token ids.
        user_span: start and stop of the tokens that hold the user's words. A token that also holds
            a blank or line break beside them is counted in.
    """

    text: str
    ids: tuple[int, ...]
    user_span: tuple[int, int]

    @property
    def opens_reasoning(self) -> bool:
        """Whether the answer will begin inside a reasoning block."""
        return bool(_OPEN_REASONING.search(self.text))


def render(tokenizer: Any, frame: str, system_message: str, user_text: str) -> Rendering:
    """Render one user turn.

    Args:
        tokenizer: a fast Transformers tokenizer.
        frame: `chat` (the tokenizer's template) or `plain` (system text, empty line, `Question:`, `Answer:`).
        system_message: goes in front of the user's words if the template takes no system role.
        user_text: the user's words.

    Raises:
        UserError: the tokenizer has no template, or renders what no model should read.
    """
    if frame == "plain":
        head = f"{system_message}\n\nQuestion: "
        text, begin = f"{head}{user_text}\nAnswer:", len(head)
    else:
        text = _chat(tokenizer, system_message, user_text)
        # found by a stand-in: the words themselves may occur elsewhere, in the system message or a marker
        begin = _chat(tokenizer, system_message, _STAND_IN).rfind(_STAND_IN)
    encoding = tokenizer(text, add_special_tokens=frame == "plain", return_offsets_mapping=True)
    ids = tuple(encoding["input_ids"])
    if tokenizer.bos_token_id is not None and ids[:2] == (tokenizer.bos_token_id,) * 2:
        raise UserError(f"the chat template of {_name(tokenizer)} puts the start token twice; mend its chat template")
    return Rendering(text, ids, text_span(text, begin, user_text, encoding["offset_mapping"]))


def text_span(text: str, begin: int, words: str, offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """Start and stop of the tokens that hold `words` in `text`, without blanks around them.

    Args:
        text: the rendered prompt.
        begin: where the words begin in it; negative if they were not found.
        words: the user's words; a template may have stripped them.
        offsets: start and stop in characters of each token; empty for tokens that the tokenizer added.

    Raises:
        UserError: the words are not there.
    """
    core = words.strip()
    start = text.find(core, begin) if begin >= 0 else -1
    stop = start + len(core)
    inside = [index for index, (left, right) in enumerate(offsets) if left < stop and right > start and right > left]
    if start < 0 or text[begin:start].strip() or not inside:
        raise UserError(f"the chat template changes the user's words {words[:40]!r}; they cannot be found again")
    return inside[0], inside[-1] + 1


def template_digest(tokenizer: Any, frame: str, system_message: str) -> str:
    """SHA-256 of the rendered string with a placeholder for the user's words."""
    return hashlib.sha256(render(tokenizer, frame, system_message, _STAND_IN).text.encode()).hexdigest()


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that decoding drops: start, end, turn markers, padding."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _chat(tokenizer: Any, system_message: str, user_text: str) -> str:
    """The rendered chat, with the system message in front of the user's words if the template takes no system role."""
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer {_name(tokenizer)} has no chat template; add chat_template.jinja to its folder")
    turns = [{"role": "system", "content": system_message}, {"role": "user", "content": user_text}]
    if not _takes_system_role(tokenizer):
        turns = [{"role": "user", "content": f"{system_message}\n\n{user_text}"}]
    return _templated(tokenizer, turns)


def _takes_system_role(tokenizer: Any) -> bool:
    """Whether the template renders a system turn; Gemma's refuses it, others leave it out without a word."""
    from jinja2 import TemplateError

    probe = [{"role": "system", "content": _STAND_IN}, {"role": "user", "content": "u"}]
    try:
        return _STAND_IN in _templated(tokenizer, probe)
    except TemplateError:
        return False


def _templated(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    # enable_thinking is ignored by templates that do not know it
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return text


def _name(tokenizer: Any) -> str:
    return str(tokenizer.name_or_path).rstrip("/").rsplit("/", 1)[-1] or type(tokenizer).__name__
