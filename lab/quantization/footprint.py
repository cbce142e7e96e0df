"""Memory of a quantized model, measured with nothing else resident: every method in a process of its own.

The published memory column was read while the bfloat16 model still lay on the device. Here a process loads the model,
quantizes it, drops what it no longer needs, and reports two figures: the bytes of all tensors that the model holds,
and by how much the process itself has grown.

    python -m lab.quantization.footprint FOLDER GROUP METHOD...

These processes are forks of one that has imported what they need and holds no model: imports take seconds, and their
own memory is part of no growth.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.memory import release_freed_memory

METHODS = (
    "bfloat16",
    "bitsandbytes_nf4",
    "bitsandbytes_int8",
    "torchao_int8_weight_only",
    "torchao_intx4_weight_only",
)
GIGABYTE = 1e9


def footprints(folder: Path, methods: Sequence[str], group: int) -> dict[str, dict[str, float]]:
    """What the model of each method takes, from fresh processes, one after the other.

    Args:
        folder: the model's safetensors folder.
        methods: some of `METHODS`.
        group: group size of torchao's 4 bits.

    Returns:
        For each method `stored` and `resident` [GB], `seconds` to load and quantize.

    Raises:
        UserError: a process failed; its last line is in the message.
    """
    command = [sys.executable, "-m", "lab.quantization.footprint", str(folder), str(group), *methods]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"cannot measure the memory of {', '.join(methods)} on {folder} ({last}); see `{' '.join(command)}`"
        )
    found: dict[str, dict[str, float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def stored_bytes(model: Any) -> int:
    """Bytes of all tensors that a model holds, quantization state included; a shared tensor counts once."""
    seen: dict[int, int] = {}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        for tensor in held:
            if tensor is not None:
                _count(tensor, seen)
        _count_int8_state(module, seen)
    return sum(seen.values())


def _count(tensor: Any, seen: dict[int, int]) -> None:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao: a tensor made of tensors
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if part is not None:
                _count(part, seen)
        return
    seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
    state = getattr(tensor, "quant_state", None)
    while state is not None:  # bitsandbytes: scales of blocks, and the scales of those
        for part in (state.absmax, state.code, state.offset):
            if part is not None:
                seen[part.data_ptr()] = part.untyped_storage().nbytes()
        state = state.state2


def _count_int8_state(module: Any, seen: dict[int, int]) -> None:
    for owner in (getattr(module, "weight", None), getattr(module, "state", None)):
        for name in ("CB", "SCB"):
            part = getattr(owner, name, None)
            if part is not None and hasattr(part, "data_ptr"):
                seen[part.data_ptr()] = part.untyped_storage().nbytes()


def quantize_model(model: Any, method: str, group: int) -> Any:
    """The model with its linear maps quantized in place: the head only by torchao, whose default takes all of them."""
    from lab.quantization.libraries import TorchAO, to_int8_, to_nf4_
    from lab.subjects.anatomy import Decoder

    if method.startswith("torchao"):
        from torchao.quantization import quantize_

        quantize_(model, TorchAO(8 if "int8" in method else 4, group).configuration())
    elif method.startswith("bitsandbytes"):
        for layer in Decoder(model).layers:
            (to_int8_ if "int8" in method else to_nf4_)(layer)
    return model


def _main(folder: Path, group: int, methods: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)  # a fork has no threads but the one that forked
    _import(methods)
    print(json.dumps({method: _in_a_fork(folder, method, group) for method in methods}))


def _import(methods: Sequence[str]) -> None:
    from transformers import AutoModelForCausalLM, modeling_utils  # noqa: F401

    from lab.quantization import libraries  # noqa: F401

    names = {method.partition("_")[0] for method in methods}
    if "bitsandbytes" in names:
        import bitsandbytes  # noqa: F401
    if "torchao" in names:
        import torchao.quantization  # noqa: F401


def _in_a_fork(folder: Path, method: str, group: int) -> dict[str, float]:
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(theirs, folder, method, group))
    process.start()
    process.join()
    if process.exitcode:  # it has said why, unless it was killed
        raise SystemExit(f"{method} was ended by signal {-process.exitcode}" if process.exitcode < 0 else 1)
    found: dict[str, float] = ours.recv()
    return found


def _tell(connection: Connection, folder: Path, method: str, group: int) -> None:
    connection.send(_measured(folder, method, group))


def _measured(folder: Path, method: str, group: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    before, started = _private_bytes(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_safetensors=True)
    model = quantize_model(model.eval().requires_grad_(False), method, group)
    seconds = time.perf_counter() - started
    gc.collect()
    release_freed_memory()
    return {
        "stored": stored_bytes(model) / GIGABYTE,
        "resident": (_private_bytes() - before) / GIGABYTE,
        "seconds": seconds,
    }


def _private_bytes() -> int:
    """Memory of this process that no file backs; mapped weight files do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
