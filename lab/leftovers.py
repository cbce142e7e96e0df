"""What libraries leave in the working folder without being asked."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path


def remove_workspace() -> None:
    """Take away the empty folder `nc_workspace/<time>` that neural-compressor makes where it is imported.

    peft imports it, too. A folder that holds anything stays.
    """
    constants = sys.modules.get("neural_compressor.common.utils.constants")
    if constants is not None:
        made = Path(constants.DEFAULT_WORKSPACE)
        with suppress(OSError):
            made.rmdir()
            made.parent.rmdir()
