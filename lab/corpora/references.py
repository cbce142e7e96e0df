"""The last resort for a subject whose own text is of no use: our reference answers, teacher-forced.

Such text costs a small model 2 to 3 nat per token instead of 0.1 to 0.6, and few of its tokens are
the model's argmax. Claims about the model's own text do not apply; ratios and geometry do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import files
from lab.corpora import degeneration, prompts
from lab.corpora.corpus import Corpus, Text, balanced
from lab.corpora.prompts import Prompt
from lab.corpora.rendering import render, template_digest

if TYPE_CHECKING:
    from lab.subjects.catalog import Facts


def reference_corpus(facts: Facts, tokenizer: Any) -> Corpus:
    """The committed prompts with their reference answers, as ids of this subject; needs no generation."""
    prompt_set = prompts.load_prompts()
    texts = [_text(prompt, facts.frame, prompt_set.system_message, tokenizer) for prompt in prompt_set.prompts]
    settings = {
        "subject": facts.name,
        "frame": facts.frame,
        "completion_source": "reference",
        "prompts_version": prompt_set.version,
        "sha256": {
            "prompts": files.sha256(prompts.default_path()),
            "template": template_digest(tokenizer, facts.frame, prompt_set.system_message),
        },
    }
    categories = tuple(dict.fromkeys(prompt.category for prompt in prompt_set.prompts))
    return Corpus(facts.name, balanced(texts), prompt_set.system_message, settings, {}, categories)


def _text(prompt: Prompt, frame: str, system_message: str, tokenizer: Any) -> Text:
    rendering = render(tokenizer, frame, system_message, prompt.text)
    # the plain frame ends in a colon, so the answer brings its own blank
    answer = prompt.reference if frame == "chat" else f" {prompt.reference}"
    ids = tuple(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return Text(prompt.id, prompt.category, rendering.ids, ids, rendering.user_span, degeneration.novel(ids))
