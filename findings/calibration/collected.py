"""What a run of pytest says that it collected."""

import pytest


def named(result: pytest.RunResult) -> list[str]:
    """The ids that --collect-only -q printed, without the module."""
    return [line.partition("::")[2] for line in result.outlines if "::" in line]
