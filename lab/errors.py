"""The two ways a request can end without a number, and what a library said of it."""

from __future__ import annotations


class UserError(Exception):
    """A failure the user can mend: one line that names the thing and the remedy."""


class NotApplicable(Exception):
    """A claim asks for something that its record does not hold, or an experiment for something that its subject lacks.

    The message says what and why.
    """


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something; its class if none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
