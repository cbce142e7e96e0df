"""Where things live: the repository's folders and the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / "data"
SNAPSHOTS = REPOSITORY / "snapshots"


def cache() -> Path:
    """The user's cache folder; the environment variable DL_FINDINGS_CACHE moves it."""
    chosen = os.environ.get("DL_FINDINGS_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("dl-findings"))
