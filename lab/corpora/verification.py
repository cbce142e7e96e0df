"""Are the completions the model's own? A teacher-forced pass of our own over what a generator returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.corpora.completions_file import Completion
from lab.errors import UserError


@dataclass(frozen=True)
class Fit:
    """How well one completion fits its model.

    Attributes:
        agreement: share of the completion's tokens that are the model's argmax; a tie agrees.
        loss: mean loss of the completion's tokens [nat/token].
    """

    agreement: float
    loss: float


def verify(
    folder: Path, completions: Sequence[Completion], dtype: str = "bfloat16", device: str = "cpu"
) -> list[Fit | None]:
    """Teacher-forced agreement and loss of every completion; None for an empty one.

    Args:
        folder: the model's safetensors.
        completions: answers; their end tokens are left out.
        dtype: the weights' type; logits are compared in it, losses are taken in float32.
        device: where the model runs.

    Raises:
        UserError: a loss is not finite.
    """
    import torch

    from lab.corpora.generation_transformers import model_class
    from lab.subjects.gguf import quiet_transformers

    with quiet_transformers():
        loaded = model_class(folder).from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
        )
    model = loaded.to(device).eval()
    with torch.inference_mode():
        return [_fit(model, completion) for completion in completions]


def _fit(model: Any, completion: Completion) -> Fit | None:
    import torch

    body = completion.body_ids
    if not body:
        return None
    ids = torch.tensor([completion.prompt_token_ids + body], device=model.device)
    # the logits at position t speak of token t + 1, so those of the last token are not needed
    logits = model(input_ids=ids, logits_to_keep=len(body) + 1).logits[0, :-1]
    targets = ids[0, -len(body) :]
    agree = logits.gather(1, targets[:, None])[:, 0] >= logits.max(dim=1).values
    loss = torch.nn.functional.cross_entropy(logits.float(), targets).item()
    if loss != loss or loss == float("inf"):
        raise UserError(f"the loss of completion {completion.id!r} is {loss}; check the weights, or use another dtype")
    return Fit(round(agree.double().mean().item(), 4), round(loss, 4))
