"""The completions of any model, registered or not: the committed ones, else those in the user's cache, else new ones.

What is generated here is kept under a digest of everything that it depends on, so that a second run, or a
second worker, finds it; a model that was trained on, or given another chat template, answers anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lab import files, paths
from lab.corpora import completions_file, generator, prompts, reading
from lab.corpora.completions import complete, require_tokenizer, summary
from lab.subjects import catalog, weights

if TYPE_CHECKING:
    from lab.subjects.catalog import Facts

Tell = Callable[[str], None]

#: besides the weights, what decides how a prompt is put to the model and where its answer ends
_DECIDING = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def completions_path(facts: Facts, folder: Path) -> Path:
    """Where the completions of this very model lie, or would lie.

    The committed file of a catalogued subject counts as it is. For any other model a committed file
    counts only if these weights wrote it: folders of checkpoints often share a name.
    """
    committed = reading.committed_path(facts.name)
    known = facts.name in catalog.catalog()
    own = committed.exists() and (known or _writer(committed) == weights.weights_digest(folder))
    return committed if own else _cached_path(facts, folder)


def new_path(facts: Facts, folder: Path) -> Path:
    """Where `python -m lab complete` writes: the file to commit for a catalogued subject, else the cache."""
    return reading.committed_path(facts.name) if facts.name in catalog.catalog() else _cached_path(facts, folder)


def ensure(facts: Facts, folder: Path, tell: Tell, device: str = "cpu") -> Path:
    """The completions file of a subject, generated first if there is none.

    Args:
        facts: the subject.
        folder: its safetensors and tokenizer.
        tell: is told, in a line, what is generated through what, and what came of it.
        device: where Transformers generates, if vLLM is not here.

    Raises:
        UserError: the model is damaged or lacks its tokenizer, or cannot answer.
    """
    target = completions_path(facts, folder)
    if not target.exists():
        with files.locked(target):
            if not target.exists():  # another worker may have held the lock until it was
                _generate(facts, folder, target, tell, device)
    return target


def _generate(facts: Facts, folder: Path, target: Path, tell: Tell, device: str) -> None:
    require_tokenizer(folder)
    _require_sound(facts)
    count = len(prompts.load_prompts().prompts)
    task = f"{facts.name} has no completions yet: it answers {count} prompts through"
    if generator.vllm_is_here():
        tell(f"{task} vLLM ...")
        try:
            complete(facts, folder, target, "vllm", device=device)
        except generator.GeneratorFailed as error:
            tell(f"vLLM does not run {facts.architecture} here: {error}")
    if not target.exists():
        tell(f"{task} Transformers ...")
        complete(facts, folder, target, "transformers", device=device)
    tell(f"{summary(completions_file.read(target).completions)[-1]}; kept in {target}")


def _require_sound(facts: Facts) -> None:
    """Load the model and let it go: what is wrong with it is told in one line, before anything is generated."""
    from lab.subjects.loading import load

    load(facts, generator.DTYPE, "cpu")


def _cached_path(facts: Facts, folder: Path) -> Path:
    digest = hashlib.sha256(f"{completions_file.FORMAT}\0{facts.frame}\0{weights.weights_digest(folder)}".encode())
    deciding = [prompts.default_path(), *(folder / name for name in _DECIDING)]
    for file in deciding:
        digest.update(f"\0{file.name} {files.sha256(file) if file.exists() else None}".encode())
    return paths.cache() / "completions" / f"{facts.name}-{digest.hexdigest()[:16]}" / "completions.json"


def _writer(path: Path) -> str | None:
    """Digest of the weights that wrote a completions file of our format."""
    digests = completions_file.read(path).settings.get("sha256", {})
    return digests.get("weights") if isinstance(digests, dict) else None
