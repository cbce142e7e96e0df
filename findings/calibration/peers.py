"""The logit lens and the knockout sweep of implementations that are not ours, in a process of their own.

`python findings/calibration/peers.py PEER REQUEST ANSWER`, PEER one of `transformer_lens`, `nnsight` and
`transformers` (the plain loop over a hooked model). REQUEST is a JSON file:

    {"model": FOLDER, "texts": [{"ids": [...], "targets": [...]}, ...], "layers": [0, ...], "compare": true,
     "rounds": 1}

A target is an index into `ids`, predicted from the position before it. ANSWER becomes a NumPy archive of n targets,
texts one after the other, L + 1 depths, and programs (intact, then without each of the layers asked for):

    states                     [depth, N, d]    residual stream of all N tokens
    rank, near                 [depth, n]       logits above the target's, ties half; logits within NEAR of it
    target_log_probability, entropy, top_probability, kl     [depth, n]    nat; kl from the last depth's distribution
    loss, knockout_kl          [program, text]  means over a text's targets, nat; kl from the intact model
    seconds                    [round, 2]       of each sweep over programs and texts: CPU and wall

Without `compare` only losses are read, as a sweep that is timed should.

Nothing of this project is imported here: a peer sees weights, token ids and targets. And nothing of the peers is
imported by the tests: TransformerLens silences the log of Transformers, nnsight gives every object a method.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before Transformers is imported

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

NEAR = 2e-4  #: five times what two float32 attention kernels move logits by


class Text(NamedTuple):
    """Token ids [1, T] and the indices of the targets among them [n]."""

    ids: Tensor
    targets: Tensor


class Depth(NamedTuple):
    """Residual stream [T, d] at one depth, and the logits [n, V] that the lens reads from it before n targets."""

    state: Tensor
    logits: Tensor


class TransformerLens:
    """TransformerLens 4, by the ways that its documentation shows: a cache for the lens, hooks for the knockout."""

    def __init__(self, folder: str):
        from transformer_lens.model_bridge import TransformerBridge

        self.bridge = TransformerBridge.boot_transformers(folder, dtype=torch.float32, device="cpu")
        self.layers = self.bridge.cfg.n_layers

    def lens(self, ids: Tensor, at: Tensor) -> Iterator[Depth]:
        _, cache = self.bridge.run_with_cache(ids)
        states, normed = cache.accumulated_resid(), cache.accumulated_resid(apply_ln=True)
        for state, hidden in zip(states, normed, strict=True):
            yield Depth(state[0], self.bridge.unembed(hidden[:, at])[0])

    def logits(self, ids: Tensor, without: int | None = None) -> Tensor:
        return self.bridge.run_with_hooks(ids, fwd_hooks=[] if without is None else self._skipping(without))[0]

    @staticmethod
    def _skipping(layer: int) -> list[tuple[str, Callable[..., object]]]:
        kept = {}

        def keep(stream, hook):
            kept["stream"] = stream

        def restore(stream, hook):
            return kept["stream"]

        return [(f"blocks.{layer}.hook_resid_pre", keep), (f"blocks.{layer}.hook_resid_post", restore)]


class NNsight:
    """nnsight: traced forward passes; `skip` leaves the layer's computation out."""

    def __init__(self, folder: str):
        from nnsight import TransformersModel

        self.model = TransformersModel(
            folder, task="text-generation", dtype=torch.float32, device_map="cpu", dispatch=True
        )
        self.layers = len(self.model.model.layers)

    def lens(self, ids: Tensor, at: Tensor) -> Iterator[Depth]:
        model, read = self.model, []
        with model.trace(ids):
            stream = model.model.layers[0].input
            read.append((stream, model.lm_head(model.model.norm(stream[:, at]))))
            for layer in model.model.layers:
                stream = layer.output
                read.append((stream, model.lm_head(model.model.norm(stream[:, at]))))
            read.save()
        for state, logits in read:
            yield Depth(state[0], logits[0])

    def logits(self, ids: Tensor, without: int | None = None) -> Tensor:
        model = self.model
        with model.trace(ids):
            if without is not None:
                layer = model.model.layers[without]
                layer.skip(layer.input)
            logits = model.lm_head.output.save()
        return logits[0]


class Transformers:
    """What one would write first: the model of Transformers, a hook that hands a layer's input on."""

    def __init__(self, folder: str):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.layers = len(self.model.model.layers)

    def lens(self, ids: Tensor, at: Tensor) -> Iterator[Depth]:
        seen: list[Tensor] = []
        layers = self.model.model.layers
        hooks = [layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))]
        hooks += [layer.register_forward_hook(lambda _, given, output: seen.append(output)) for layer in layers]
        self.model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        for state in seen:
            yield Depth(state[0], self.model.lm_head(self.model.model.norm(state[0, at])))

    def logits(self, ids: Tensor, without: int | None = None) -> Tensor:
        if without is None:
            return self.model(ids, use_cache=False).logits[0]
        hook = self.model.model.layers[without].register_forward_hook(lambda _, given, output: given[0])
        try:
            return self.model(ids, use_cache=False).logits[0]
        finally:
            hook.remove()


PEERS = {"transformer_lens": TransformerLens, "nnsight": NNsight, "transformers": Transformers}
Peer = TransformerLens | NNsight | Transformers


def read_lens(peer: Peer, texts: list[Text]) -> dict[str, np.ndarray]:
    """States and readings of every depth at every target, by the textbook in float64."""
    parts = [readings(peer, text) for text in texts]
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def readings(peer: Peer, text: Text) -> dict[str, np.ndarray]:
    """As `read_lens`, of one text."""
    depths = list(peer.lens(text.ids, text.targets - 1))
    final = depths[-1].logits.double().log_softmax(-1)
    read = [reading(depth, text.ids[0, text.targets], final) for depth in depths]
    return {name: torch.stack([of[name] for of in read]).numpy() for name in read[0]}


def reading(depth: Depth, tokens: Tensor, final: Tensor) -> dict[str, Tensor]:
    """What one depth says about the tokens that follow [n]; ln p [n, V] of the last depth is the reference of kl."""
    logits = depth.logits.double()
    own = logits.gather(-1, tokens[:, None])
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    return {
        "states": depth.state,
        "rank": (logits > own).sum(-1) + ((logits == own).sum(-1) - 1) / 2,
        "near": ((logits - own).abs() < NEAR).sum(-1) - 1,
        "target_log_probability": log_p.gather(-1, tokens[:, None])[:, 0],
        "entropy": -(p * log_p).sum(-1),
        "top_probability": p.amax(-1),
        "kl": (final.exp() * (final - log_p)).sum(-1),
    }


def sweep(peer: Peer, texts: list[Text], layers: list[int], compare: bool) -> dict[str, np.ndarray]:
    """Mean losses [program, text] over the targets of each text and, to `compare`, divergences."""
    read = [[scores(logits, text) for logits in programs(peer, text, layers, compare)] for text in texts]
    return {name: np.array([[of[name] for of in text] for text in read]).T for name in read[0][0]}


def programs(peer: Peer, text: Text, layers: list[int], compare: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Logits [n, V] that predict the targets, program by program, with those of the intact model to `compare`."""
    intact = peer.logits(text.ids)[text.targets - 1]
    yield intact, intact if compare else None
    for layer in layers:
        yield peer.logits(text.ids, layer)[text.targets - 1], intact if compare else None


def scores(logits: tuple[Tensor, Tensor | None], text: Text) -> dict[str, float]:
    """Loss of one program, and its divergence from the intact model."""
    of_program, intact = logits
    found = {"loss": float(functional.cross_entropy(of_program, text.ids[0, text.targets]))}
    if intact is not None:
        log_p, log_q = (z.double().log_softmax(-1) for z in (of_program, intact))
        found["knockout_kl"] = float((log_q.exp() * (log_q - log_p)).sum(-1).mean())
    return found


def timed(function: Callable[[], dict]) -> tuple[dict, tuple[float, float]]:
    """Result, and the CPU and wall seconds that it took."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    return result, (time.process_time() - cpu, time.perf_counter() - wall)


@torch.inference_mode()
def answer(peer: Peer, request: dict) -> dict[str, np.ndarray]:
    """The archive's arrays."""
    texts = [Text(torch.tensor([text["ids"]]), torch.tensor(text["targets"])) for text in request["texts"]]
    peer.logits(texts[0].ids)  # the first call allocates
    asked = request["layers"], request["compare"]
    sweeps = [timed(lambda: sweep(peer, texts, *asked)) for _ in range(request["rounds"])]
    arrays = sweeps[-1][0] | {"seconds": np.array([seconds for _, seconds in sweeps])}
    return arrays | read_lens(peer, texts) if request["compare"] else arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__).splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("request", type=Path)
    parser.add_argument("answer", type=Path)
    given = parser.parse_args()
    request = json.loads(given.request.read_text())
    np.savez(given.answer, **answer(PEERS[given.peer](request["model"]), request))


if __name__ == "__main__":
    main()
