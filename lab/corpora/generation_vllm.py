"""Greedy completions through vLLM, as a program of its own: `python generation_vllm.py REQUEST RESPONSE`.

It runs in another environment than the rest (vLLM pins its own torch), so it imports nothing of this
repository. The engine starts worker processes, which import this file again: hence the main guard.

REQUEST:  {model: folder, prompts: [[id]], end_ids: [id], max_tokens: int, dtype: str}
RESPONSE: {versions: {library: version}, completions: [{ids: [id], finish_reason: "stop" | "length"}]}
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

MAX_MODEL_LEN = 1024
MAX_NUM_SEQS = 16

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB


def generate(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The greedy continuation of every prompt, the end token included where the model set one."""
    from vllm import LLM, SamplingParams

    # generation_config="vllm": a model's own penalties would make the text something else than its argmax
    engine = LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        enforce_eager=True,
        generation_config="vllm",
        seed=0,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], stop_token_ids=request["end_ids"])
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], sampling)
    answers = [output.outputs[0] for output in outputs]
    return [{"ids": list(answer.token_ids), "finish_reason": answer.finish_reason} for answer in answers]


def main(request_file: str, response_file: str) -> None:
    """Read the request, write the response."""
    os.environ.update(OFFLINE | CACHE)
    completions = generate(json.loads(Path(request_file).read_text(encoding="utf-8")))
    distributions = {"vllm": "vllm-cpu", "torch": "torch", "transformers": "transformers"}
    response = {"versions": {name: _version(name, other) for name, other in distributions.items()}}
    Path(response_file).write_text(json.dumps(response | {"completions": completions}), encoding="utf-8")


def _version(name: str, other: str) -> str:
    """The installed version; vLLM for the CPU is a distribution of another name."""
    try:
        return version(other)
    except ModuleNotFoundError:
        return version(name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
