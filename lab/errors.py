"""The two ways a request can end without a number."""

from __future__ import annotations


class UserError(Exception):
    """A failure the user can mend: one line that names the thing and the remedy."""


class NotApplicable(Exception):
    """A claim asks for something that its record does not hold, or an experiment for something that its subject lacks.

    The message says what and why.
    """
