"""What a thinking specimen says by itself: greedy answers to items that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from lab.corpora import thinking
from lab.corpora.exercises import thinking_exercises
from lab.subjects.loading import LoadedSubject

BATCH = 16
ROOM = 1.5  #: tokens that an answer may take, over what the longest item's own completion has


def scores_of(subject: LoadedSubject, system_message: str) -> dict[str, float]:
    """Shares of the test items whose span is closed, and whose answer is right."""
    items = thinking.items("test")
    exercises = thinking_exercises(subject.tokenizer, system_message, items)
    prompts = [exercise.ids[: exercise.solution[0]] for exercise in exercises]
    longest = round(ROOM * max(len(exercise.solution) for exercise in exercises))
    said = greedy(subject.model, subject.tokenizer, prompts, longest)
    closed, right = zip(*map(thinking.judged, items, said), strict=True)
    return {"items": len(items), "closed": sum(closed) / len(items), "right": sum(right) / len(items)}


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[str]:
    """Greedy continuations as text, end token left out; prompts are padded on the left and masked."""
    end = tokenizer.eos_token_id
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, eos_token_id=end, pad_token_id=end)
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([(end,) * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        made = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings)
        texts += tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
    return texts
