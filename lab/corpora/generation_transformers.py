"""Greedy completions through Transformers, for machines without vLLM; request and response as in `generation_vllm`.

Prompts are padded on the left and masked. It runs as a program of its own, too, so that the memory of
the model is given back: `python generation_transformers.py REQUEST RESPONSE`.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

BATCH = 16


def generate(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The greedy continuation of every prompt, the end token included where the model set one."""
    import torch
    from transformers import GenerationConfig

    model = model_class(request["model"]).from_pretrained(
        request["model"], dtype=getattr(torch, request["dtype"]), use_safetensors=True, local_files_only=True
    )
    model = model.to(request.get("device", "cpu")).eval()
    # the model's own configuration goes: its penalties would make the text something else than the argmax
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=request["max_tokens"],
        eos_token_id=request["end_ids"],
        pad_token_id=request["end_ids"][0],
    )
    prompts = request["prompts"]
    batches = (prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH))
    return [answer for batch in batches for answer in _continuations(model, batch, set(request["end_ids"]))]


def model_class(folder: str | Path) -> Any:
    """The Transformers class that reads this folder as a language model; one with towers counts by its decoder."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText


def _continuations(model: Any, prompts: list[list[int]], end_ids: set[int]) -> list[dict[str, Any]]:
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        answers = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    continued = answers[:, width:].tolist()
    return [_answer(row, end_ids) for row in continued]


def _answer(ids: list[int], end_ids: set[int]) -> dict[str, Any]:
    """The ids up to the first end token; what follows it is padding."""
    end = next((place for place, token in enumerate(ids) if token in end_ids), None)
    if end is None:
        return {"ids": ids, "finish_reason": "length"}
    return {"ids": ids[: end + 1], "finish_reason": "stop"}


def main(request_file: str, response_file: str) -> None:
    """Read the request, write the response."""
    completions = generate(json.loads(Path(request_file).read_text(encoding="utf-8")))
    versions = {name: version(name) for name in ("torch", "transformers")}
    Path(response_file).write_text(json.dumps({"versions": versions, "completions": completions}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
