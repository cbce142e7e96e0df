"""LoRA adapters on a decoder, through peft: attached for a while, saved as peft saves them, and read as arrays."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lab import files, leftovers
from lab.adapters.adapted_weights import ALPHA
from lab.adapters.allocations import MATRICES, Shape
from lab.adapters.merging import bfloat16
from lab.adapters.names import CONFIG, WEIGHTS
from lab.errors import NotApplicable, UserError
from lab.statistics.spectra import effective_rank_of_gram, gram
from lab.subjects.anatomy import Decoder

STORED = torch.float16  #: 11 digits of mantissa; bfloat16 has 8. An update's largest elements are far below 65,504
NEED = 'adapters need peft: pip install -c constraints.txt -e ".[adapters]"'
Place = tuple[int, str]


@dataclass(frozen=True)
class Factors:
    """A trained update of one matrix: scale * up @ down, with down [r, in] and up [out, r]."""

    down: np.ndarray
    up: np.ndarray
    scale: float = ALPHA

    @property
    def update(self) -> np.ndarray:
        """The dense update [out, in], float32."""
        product: np.ndarray = np.float32(self.scale) * (self.up @ self.down)
        return product


def adapted_maps(decoder: Decoder) -> dict[Place, nn.Linear]:
    """The seven matrices of every layer: (layer, name) -> linear map.

    Raises:
        NotApplicable: a layer is built otherwise.
    """
    found: dict[Place, nn.Linear] = {}
    for number, layer in enumerate(decoder.layers):
        for path, module in layer.named_modules():
            name = path.rpartition(".")[2]
            if isinstance(module, nn.Linear) and name in MATRICES:
                found[number, name] = module
    if len(found) != len(MATRICES) * decoder.n_layers:
        raise NotApplicable("only layers with the seven matrices of a Llama layer are adapted here")
    return found


def module_paths(decoder: Decoder) -> dict[Place, str]:
    """Full path in the model of every matrix that can be adapted."""
    names = {id(module): name for name, module in decoder.model.named_modules()}
    return {place: names[id(module)] for place, module in adapted_maps(decoder).items()}


def shape_of(decoder: Decoder, scale: float, *, spectra: bool = False) -> Shape:
    """What an allocation needs to know of a decoder; with `spectra`, effective ranks too, a second per layer or so."""
    maps = adapted_maps(decoder)
    cost = np.array([[sum(maps[layer, name].weight.shape) for name in MATRICES] for layer in range(decoder.n_layers)])
    ratios = None
    if spectra:
        ratios = np.array(
            [[_effective_rank_ratio(maps[layer, name]) for name in MATRICES] for layer in range(decoder.n_layers)]
        )
    return Shape(cost, ratios, scale)


def _effective_rank_ratio(linear: nn.Linear) -> float:
    weight = linear.weight.detach().float().cpu().numpy()
    return effective_rank_of_gram(gram(weight)) / float(min(weight.shape))


def lora_config(decoder: Decoder, ranks: np.ndarray, name: str = "") -> Any:
    """peft's configuration of an allocation: no bias, no dropout, alpha twice the rank in every matrix.

    peft matches names by their ends unless told otherwise: targets and ranks are given as full paths, anchored.

    Args:
        decoder: the decoder to adapt.
        ranks: ranks [layer, matrix]; 0 leaves a matrix alone.
        name: of the base model, for the reader of the file.

    Raises:
        UserError: peft is not installed.
    """
    peft = _peft()
    by_rank: dict[int, list[str]] = {}
    for (layer, matrix), path in module_paths(decoder).items():
        by_rank.setdefault(int(ranks[layer, MATRICES.index(matrix)]), []).append(re.escape(path))
    by_rank.pop(0, None)
    patterns = {f"^({'|'.join(paths)})": rank for rank, paths in by_rank.items()}
    return peft.LoraConfig(
        r=max(by_rank),
        lora_alpha=ALPHA * max(by_rank),
        target_modules="|".join(path for paths in by_rank.values() for path in paths),
        rank_pattern=patterns,
        alpha_pattern={pattern: ALPHA * rank for pattern, rank in patterns.items()},
        lora_dropout=0.0,
        bias="none",
        base_model_name_or_path=name or None,
    )


@contextmanager
def fresh_adapter(decoder: Decoder, ranks: np.ndarray, seed: int) -> Iterator[Any]:
    """A new adapter on the decoder, its factors in float32: down uniform in +-1/sqrt(in), up zero. Yields peft's model.

    The seed alone decides how it begins; the global generator is left as it was.

    Raises:
        UserError: peft gave a matrix another rank than it was asked for.
    """
    config = lora_config(decoder, ranks)
    with _unwarned(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _peft().get_peft_model(decoder.model, config)
    try:
        given = ranks_of(decoder)
        if not np.array_equal(given, ranks):
            raise UserError("peft did not give every matrix the rank that it was asked for; use the pinned version")
        yield model
    finally:
        model.unload()


@contextmanager
def attached(decoder: Decoder, folder: Path) -> Iterator[None]:
    """A saved adapter on the decoder, beside the weights and not merged into them."""
    with _unwarned():
        model = _peft().PeftModel.from_pretrained(decoder.model, str(folder), is_trainable=False)
    try:
        yield
    finally:
        model.unload()


@contextmanager
def merged(decoder: Decoder, factors: Mapping[Place, Factors]) -> Iterator[None]:
    """The decoder with an update added to its weights, which are then rounded to bfloat16; afterwards as before."""
    maps = adapted_maps(decoder)
    before = {place: maps[place].weight.detach().clone() for place in factors}
    try:
        merge(decoder, factors)
        yield
    finally:
        for place, weight in before.items():
            maps[place].weight.data.copy_(weight)


def merge(decoder: Decoder, factors: Mapping[Place, Factors]) -> None:
    """Add an update to the weights for good, rounded to bfloat16 whatever their dtype."""
    maps = adapted_maps(decoder)
    for place, one in factors.items():
        weight = maps[place].weight
        total = bfloat16(weight.detach().float().cpu().numpy() + one.update)
        weight.data.copy_(torch.from_numpy(total))


def ranks_of(decoder: Decoder) -> np.ndarray:
    """Ranks [layer, matrix] of the adapter that is attached to the decoder."""
    ranks = np.zeros((decoder.n_layers, len(MATRICES)), dtype=int)
    for number, layer in enumerate(decoder.layers):
        for path, module in layer.named_modules():
            name = path.rpartition(".")[2]
            if name in MATRICES and hasattr(module, "lora_A"):
                (down,) = module.lora_A.values()
                ranks[number, MATRICES.index(name)] = len(down.weight)
    return ranks


def trainable_parameters(model: Any) -> list[Tensor]:
    """The adapter's parameters, in the order of the model."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write an attached adapter as `PeftModel.from_pretrained` reads it, in float16."""
    from safetensors.torch import save_file

    state = _peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().to(STORED).contiguous().cpu() for name, tensor in state.items()}, folder / WEIGHTS)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))


def read_factors(decoder: Decoder, folder: Path) -> dict[Place, Factors]:
    """A saved adapter as arrays in float32: (layer, name) -> factors.

    Raises:
        UserError: it is not of this decoder, or not of one scale.
    """
    from safetensors.numpy import load_file

    state = load_file(folder / WEIGHTS)
    config = files.read_json(folder / CONFIG, "adapter configuration")
    scales = {config["alpha_pattern"][pattern] / rank for pattern, rank in config["rank_pattern"].items()}
    if len(scales) != 1:
        raise UserError(f"the adapter {folder} scales its updates by {sorted(scales)}; one scale is expected")
    found = {}
    for place, path in module_paths(decoder).items():
        down, up = (state.pop(f"base_model.model.{path}.lora_{letter}.weight", None) for letter in "AB")
        if down is not None and up is not None:
            found[place] = Factors(down.astype(np.float32), up.astype(np.float32), scales.copy().pop())
    if state:
        raise UserError(f"the adapter {folder} changes {next(iter(state))}, which this model does not have")
    return found


def is_available() -> bool:
    """Whether peft is installed."""
    return find_spec("peft") is not None


def _peft() -> Any:
    try:
        with warnings.catch_warnings():
            # Its import meets what PyTorch has deprecated in itself.
            warnings.simplefilter("ignore", DeprecationWarning)
            import peft
    except ImportError as error:
        raise UserError(NEED) from error
    return peft


@contextmanager
def _unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft looks for the base model's configuration on the hub, and says so where there is none.
        warnings.filterwarnings("ignore", module="peft")
        # peft asks Transformers under a name that Transformers has given up.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        yield
    leftovers.remove_workspace()
