"""What two processes must have in common for their numbers to be the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from lab.code_digest import code_digest

if TYPE_CHECKING:
    from lab.subjects.loading import LoadedSubject

LIBRARIES = ("torch", "transformers", "numpy")


def library_version(library: str) -> str:
    """Version of an installed library, or `not installed`."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def processor(device: str) -> str:
    """What decides which kernels run: the CPU's vector instructions, or the name of the CUDA device."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()


def conditions(subject: LoadedSubject, module: str, libraries: Iterable[str]) -> dict[str, str]:
    """What the numbers of an experiment depend on in this process.

    Args:
        subject: as loaded here.
        module: dotted name of the experiment's module.
        libraries: whose versions its numbers depend on, besides those of all experiments.
    """
    from lab.cluster.states import bits
    from lab.subjects.weights import required_location

    return {
        "the instruments' code": code_digest(module)[:12],
        **{library: library_version(library) for library in (*LIBRARIES, *libraries)},
        "processor": processor(subject.device.type),
        "weights": subject.digest[:12],
        "weights in memory": f"{sum(map(bits, subject.model.parameters())) % 2**48:012x}",
        "folder of the weights": str(required_location(subject.facts)),
    }


def disagreement(here: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    """The first condition that differs, in words; None if all agree."""
    differing = (name for name in here if here[name] != there.get(name))
    name = next(differing, None)
    return None if name is None else f"{name}: {there.get(name, 'none')} there, {here[name]} here"
