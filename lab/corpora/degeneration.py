"""Is a completion fit to be measured on? Flags per completion, and the mask of novel tokens.

A loop is predicted by copying: its loss is tiny, and every ratio of losses over it is inflated by
the circuits that copy. Thresholds were set so that no answer of a strong model (Qwen3-4B, 250
answers) is rejected, and every answer that people call broken is.

All functions take the ids of a completion without its end token.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

GRAM = 8  #: length of the n-grams by which repetition is counted
LONGEST_PERIOD = 64
FEWEST_REPEATS = 3
SHORTEST_LOOP = 12  #: tokens
LOOP_SHARE = 0.30  #: of the completion
REPEATED_SHARE = 0.25  #: of the 8-grams; good answers reach 0.20
SHORTEST_REPETITIVE = 24  #: tokens; below, a share of 8-grams says little
COMPRESSION = 3.5  #: raw over compressed size; good answers reach 2.74
SHORTEST_COMPRESSED = 200  #: bytes; below, the compressor's overhead rules
ECHO_WORDS, ECHO_SHARE = 8, 0.60
MISSED_SHARE = 0.05  #: of the tokens may differ from the model's argmax: generator and forward use other kernels

#: flags that make a completion unfit; `echo` and `truncated` are only told
REJECTING = ("empty", "loop", "repetitive", "compressible", "leak", "not_greedy")
FLAGS = (*REJECTING, "echo", "truncated")

_TURN = re.compile(r"<\|?/?(im_start|im_end|start_of_turn|end_of_turn|endoftext|eot_id|start_header_id|eos|bos)\|?>")
_ROLE = re.compile(r"^\s*(user|human|assistant|system)\s*:", re.IGNORECASE | re.MULTILINE)


def novel(ids: Sequence[int], gram: int = GRAM) -> tuple[bool, ...]:
    """Per token: the n-gram that ends here has not occurred before in the completion.

    The first `gram - 1` tokens end no n-gram and are novel.
    """
    seen: set[tuple[int, ...]] = set()
    mask = []
    for stop in range(1, len(ids) + 1):
        window = tuple(ids[stop - gram : stop]) if stop >= gram else ()
        mask.append(not window or window not in seen)
        seen.add(window)
    return tuple(mask)


def repeated_share(ids: Sequence[int], gram: int = GRAM) -> float:
    """Share of the n-grams that occurred before: 1 - distinct / all; 0 where there are none."""
    grams = len(ids) - gram + 1
    return novel(ids, gram).count(False) / grams if grams > 0 else 0.0


def terminal_loop(ids: Sequence[int]) -> tuple[int, int] | None:
    """Period and length in tokens of the periodic tail, or None.

    A tail counts from 3 repeats of a period of at most 64 tokens, 12 tokens, and 30 % of the completion.
    Of several periods, the one with the longest tail is given, and of those the shortest.
    """
    best: tuple[int, int] | None = None
    for period in range(1, min(LONGEST_PERIOD, len(ids) // FEWEST_REPEATS) + 1):
        matches = 0
        while matches < len(ids) - period and ids[-1 - matches] == ids[-1 - matches - period]:
            matches += 1
        length = matches + period
        enough = max(FEWEST_REPEATS * period, SHORTEST_LOOP, LOOP_SHARE * len(ids))
        if length >= enough and (best is None or length > best[1]):
            best = (period, length)
    return best


def compression(text: str) -> float:
    """Size of the text in UTF-8 over its zlib-9 size; 0 for texts below 200 bytes."""
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw, 9)) if len(raw) >= SHORTEST_COMPRESSED else 0.0


def echoes(completion: str, prompt: str) -> bool:
    """Whether a run of at least 8 words and 60 % of the prompt's words comes back in the completion."""
    asked, said = _words(prompt), _words(completion)
    needed = max(ECHO_WORDS, -(-len(asked) * 6 // 10))
    runs = {tuple(said[start : start + needed]) for start in range(len(said) - needed + 1)}
    return any(tuple(asked[start : start + needed]) in runs for start in range(len(asked) - needed + 1))


def leaks(text: str) -> bool:
    """Whether the text holds a marker of a turn, or opens one for a role.

    Further questions of a base model are none: it has no turns, and goes on as documents do.
    """
    return bool(_TURN.search(text) or _ROLE.search(text))


def misses_greedy(agreement: float, tokens: int) -> bool:
    """Whether the model's argmax differs from the completion at more than max(1, 5 %) of its tokens."""
    return round((1 - agreement) * tokens) > max(1, MISSED_SHARE * tokens)


def text_flags(ids: Sequence[int], text: str, prompt: str) -> set[str]:
    """The flags that ids and text alone decide: all but `truncated`, `not_greedy`, and special ids that leak.

    Args:
        ids: the completion's ids, without end token.
        text: the completion.
        prompt: the user's words.
    """
    tests = {
        "empty": not ids or not text.strip(),
        "loop": terminal_loop(ids) is not None,
        "repetitive": len(ids) >= SHORTEST_REPETITIVE and repeated_share(ids) > REPEATED_SHARE,
        "compressible": compression(text) > COMPRESSION,
        "echo": echoes(text, prompt),
        "leak": leaks(text),
    }
    return {flag for flag, raised in tests.items() if raised}


def rejected(flags: Sequence[str]) -> bool:
    """Whether these flags make a completion unfit."""
    return any(flag in REJECTING for flag in flags)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
