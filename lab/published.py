"""Published figures: `data/published/<experiment>.json` as a dataset like the one that `measure` returns.

{"subject": "qwen3-4b-instruct-2507", "source": {...}, "settings": {...},
 "quantities": {"knockout_loss": {"unit": "nat/token", "description": "...",
                                  "dims": ["layer"], "coords": {"layer": [0, 1]}, "value": [8.9, 0.7]}}}
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from lab import files, paths
from lab.errors import UserError

WHAT = "published figures"


def path(experiment: str) -> Path:
    """Where the published figures of an experiment lie, or would lie."""
    return paths.DATA / "published" / f"{experiment}.json"


def subject(experiment: str) -> str | None:
    """Catalog name of the subject whose figures were published; None if no figures are here."""
    return str(_document(path(experiment))["subject"]) if path(experiment).exists() else None


def dataset(experiment: str) -> xr.Dataset:
    """The published figures of an experiment.

    Raises:
        UserError: the file is not whole, or a quantity's labels and values do not fit; the message
            names the quantity.
    """
    return read(path(experiment))


def read(file: Path) -> xr.Dataset:
    """The published figures in a file; see `dataset`."""
    document = _document(file)
    labels: dict[str, list[Any]] = {}
    arrays = {name: _array(file, name, entry, labels) for name, entry in document["quantities"].items()}
    provenance = {key: document.get(key) for key in ("title", "model", "source", "settings")}
    attributes = {"subject": document["subject"], "source": "published", "condition": "published"}
    return xr.Dataset(arrays, attrs=attributes | {"provenance": json.dumps(provenance)})


@cache
def _document(file: Path) -> dict[str, Any]:
    document = files.read_json(file, WHAT)
    if not isinstance(document, dict):
        raise UserError(f"the {WHAT} {file} are no JSON object; restore the file")
    kinds = {"subject": str, "source": dict, "settings": dict, "quantities": dict}
    for key, kind in kinds.items():
        if not isinstance(document.get(key), kind):
            raise UserError(f"the {WHAT} {file} have no {key!r} that is a {kind.__name__}; restore the file")
    return document


def _array(file: Path, name: str, entry: Any, labels: dict[str, list[Any]]) -> xr.DataArray:
    try:
        dims, coords = tuple(entry["dims"]), {dim: list(entry["coords"][dim]) for dim in entry["dims"]}
        values = np.array(entry["value"])
        if values.dtype == object:  # null stands for a figure that the source does not give
            values = values.astype(float)
        attributes = {"unit": str(entry["unit"]), "description": str(entry["description"])}
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"the {WHAT} {file} hold a {name!r} without proper {_part(error)}; restore the file") from error
    expected = tuple(len(coords[dim]) for dim in dims)
    if values.shape != expected:
        raise UserError(f"the {WHAT} {file} hold a {name!r} of shape {values.shape}, its labels say {expected}")
    for dim, here in coords.items():
        if labels.setdefault(dim, here) != here:
            # xarray would fill the gaps with NaN, and integers would turn into floats
            raise UserError(f"the {WHAT} {file} label {dim!r} of {name!r} otherwise; give it a dimension of its own")
    try:
        return xr.DataArray(values, dims=dims, coords=coords, attrs=attributes)
    except ValueError as error:
        raise UserError(f"the {WHAT} {file} hold a {name!r} without proper coords; restore the file") from error


def _part(error: Exception) -> str:
    return repr(error.args[0]) if isinstance(error, KeyError) else "dims, coords and value"
