"""`python -m lab complete NAME`: a subject's own greedy answers to the prompt set, checked and saved.

The generator is a process of its own: vLLM needs an environment of its own, and its worker processes
must not start from a test. We render the prompts to ids, it returns ids, we judge what came back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import files, paths
from lab.corpora import completions_file, degeneration, prompts
from lab.corpora.checks import answer_start, flags_of
from lab.corpora.completions_file import Completion, CompletionsFile
from lab.corpora.cutting import CUT, cut
from lab.corpora.generator import DTYPE, Answer, generate
from lab.corpora.prompts import Prompt, PromptSet
from lab.corpora.reading import committed_path
from lab.corpora.rendering import Rendering, render, special_ids, template_digest
from lab.errors import UserError, first_line

if TYPE_CHECKING:
    from lab.subjects.catalog import Facts


def complete(
    facts: Facts,
    folder: Path,
    output: Path | None = None,
    generator: str = "vllm",
    max_tokens: int = 128,
    report: Callable[[str], None] | None = None,
    device: str = "cpu",
) -> Path:
    """Generate, check and save the completions of a subject; the path of the file.

    Args:
        facts: the subject.
        folder: its safetensors and tokenizer files.
        output: the file to write; default: the committed one of this subject.
        generator: `vllm` or `transformers`.
        max_tokens: longest completion, end token included.
        report: is told what happens, and which completions are degenerate, line by line.
        device: where Transformers generates and the answers are checked.

    Raises:
        UserError: no environment for the generator, a generator that fails, an impossible setting.
    """
    tell = report or (lambda line: None)
    tokenizer = _tokenizer(folder)
    prompt_set = prompts.load_prompts()
    rendered = [render(tokenizer, facts.frame, prompt_set.system_message, prompt.text) for prompt in prompt_set.prompts]
    ends = end_ids(folder, tokenizer)
    _require_room(folder, facts.name, max(len(rendering.ids) for rendering in rendered), max_tokens)
    identity = _identity(facts, folder, tokenizer, prompt_set)  # now: files may change while the generator runs
    log = paths.cache() / "logs" / f"complete-{facts.name}.log"
    tell(f"{facts.name}: {len(rendered)} prompts, at most {max_tokens} tokens each, through {generator} ...")
    generation = generate(generator, folder, [rendering.ids for rendering in rendered], ends, max_tokens, log, device)
    answers = zip(prompt_set.prompts, rendered, generation.answers, strict=True)
    completions = [_completion(*answer, tokenizer, facts.frame) for answer in answers]
    tell("comparing with the model's own argmax ...")
    judged = _judged(folder, completions, special_ids(tokenizer), device)
    settings = {
        **identity,
        "completion_source": "greedy",
        "generator": generator,
        "dtype": DTYPE,
        "temperature": 0,
        "max_tokens": max_tokens,
        "end_ids": ends,
        "cut": CUT if facts.frame == "plain" else None,
        "versions": dict(generation.versions),
        "verified_with": {name: version(name) for name in ("torch", "transformers")},
    }
    output = output or committed_path(facts.name)
    completions_file.write(output, CompletionsFile(settings, prompt_set.system_message, tuple(judged)))
    for line in summary(judged):
        tell(line)
    return output


def end_ids(folder: Path, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the tokenizer's and those of the model's configuration.

    Raises:
        UserError: there are none.
    """
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            declared = files.read_json(folder / name, "configuration").get("eos_token_id")
            found |= set(declared) if isinstance(declared, list) else {declared}
    found.discard(None)
    if not found:
        raise UserError(f"{folder} names no end token; add eos_token_id to its generation_config.json")
    return sorted(found)


def _require_room(folder: Path, name: str, longest: int, max_tokens: int) -> None:
    """Refuse a model whose context is too short, which learned positions would turn into an index error."""
    config = files.read_json(folder / "config.json", "model configuration")
    text = config.get("text_config") or config
    room = text.get("max_position_embeddings") or text.get("n_positions")
    if isinstance(room, int) and longest + max_tokens > room:
        taken = f"its prompts take up to {longest} of them and the answers {max_tokens}"
        raise UserError(f"{name} reads at most {room} tokens, but {taken}; choose a model with a longer context")


def require_tokenizer(folder: Path) -> None:
    """Refuse a folder without a fast tokenizer, which alone tells where in a prompt the user's words stand."""
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"there is no tokenizer.json in {folder}; save the model's fast tokenizer beside it")


def summary(completions: Sequence[Completion]) -> list[str]:
    """What came of it: a line per completion that is flagged, and the tokens that can be scored."""
    tokens = sum(len(entry.body_ids) for entry in completions)
    fit = [entry for entry in completions if not degeneration.rejected(entry.flags)]
    novel = sum(sum(degeneration.novel(entry.body_ids)) for entry in fit)
    flagged = [entry for entry in completions if entry.flags]
    lines = [f"  {entry.id}: {', '.join(entry.flags)} | {' '.join(entry.completion.split())[:60]}" for entry in flagged]
    return [*lines, f"{len(fit)} of {len(completions)} completions are fit: {novel} novel tokens of {tokens}"]


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    require_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer in {folder}: {first_line(error)}") from error


def _completion(prompt: Prompt, rendering: Rendering, answer: Answer, tokenizer: Any, frame: str) -> Completion:
    ids, reason = answer.ids, answer.finish_reason
    if frame == "plain":
        ids, reason = cut(ids, reason)
    body = ids[:-1] if reason == "stop" else ids
    return Completion(
        id=prompt.id,
        category=prompt.category,
        prompt=prompt.text,
        templated_prompt=rendering.text,
        completion=tokenizer.decode(body, skip_special_tokens=True),
        finish_reason=reason,
        flags=(),
        user_span=rendering.user_span,
        answer_start=answer_start(body, rendering.text, tokenizer),
        greedy_agreement=None,
        loss=None,
        prompt_token_ids=rendering.ids,
        completion_token_ids=ids,
    )


def _judged(folder: Path, completions: list[Completion], special: frozenset[int], device: str) -> list[Completion]:
    """The same completions with agreement, loss and flags."""
    from lab.corpora.verification import verify

    judged = []
    for entry, fit in zip(completions, verify(folder, completions, DTYPE, device), strict=True):
        known = replace(entry, greedy_agreement=fit.agreement, loss=fit.loss) if fit else entry
        judged.append(replace(known, flags=flags_of(known, special)))
    return judged


def _identity(facts: Facts, folder: Path, tokenizer: Any, prompt_set: PromptSet) -> dict[str, Any]:
    """Which subject answered which prompts; no path of this machine."""
    from lab.subjects.weights import weights_digest

    return {
        "subject": facts.name,
        "frame": facts.frame,
        "prompts_version": prompt_set.version,
        "sha256": {
            "prompts": files.sha256(prompts.default_path()),
            "template": template_digest(tokenizer, facts.frame, prompt_set.system_message),
            "tokenizer": files.sha256(folder / "tokenizer.json"),
            "weights": weights_digest(folder),
        },
    }
