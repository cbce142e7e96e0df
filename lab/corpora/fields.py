"""Strict reading of JSON objects: every field by name and type, every mismatch one line that says where."""

from __future__ import annotations

import sys
from typing import Any

from lab.errors import UserError


class Fields:
    """The fields of one JSON object.

    Args:
        value: the parsed object.
        where: what and where it is, for the error, e.g. "completions file x.json, entry 3".

    Raises:
        UserError: from the constructor if `value` is no object, from a reader if its field is
            missing or of another type.
    """

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise UserError(f"{where} must be an object, not {_kind(value)}")
        self._value: dict[str, Any] = value
        self.where = where

    def __contains__(self, name: str) -> bool:
        return name in self._value

    def known(self, *names: str) -> None:
        """Refuse fields of other names: a misspelt optional field would be lost without notice."""
        strange = sorted(set(self._value) - set(names))
        if strange:
            raise self.wrong(strange[0], f"is unknown; known are {', '.join(names)}")

    def text(self, name: str) -> str:
        """A string, of whole characters."""
        text = self._typed(name, str, "a string")
        if not _is_whole(text):
            raise self.wrong(name, "holds half a character (a lone surrogate)")
        return text  # type: ignore[no-any-return]

    def filled(self, name: str) -> str:
        """A string that is not blank."""
        text = self.text(name)
        if not text.strip():
            raise self.wrong(name, "is blank")
        return text

    def integer(self, name: str) -> int:
        """A whole number that is not negative."""
        number = self._typed(name, int, "a whole number")
        if isinstance(number, bool) or number < 0:
            raise self.wrong(name, "must be a whole number, 0 or more")
        return number  # type: ignore[no-any-return]

    def number(self, name: str) -> float:
        """A finite number."""
        number = self._typed(name, (int, float), "a number")
        # a whole number of any length can be read from JSON, but not each is near a float
        if isinstance(number, bool) or not abs(number) <= sys.float_info.max:
            raise self.wrong(name, "must be a finite number")
        return float(number)

    def share(self, name: str) -> float:
        """A number from 0 to 1."""
        share = self.number(name)
        if not 0 <= share <= 1:
            raise self.wrong(name, f"is {share:g}; it must lie between 0 and 1")
        return share

    def truth(self, name: str) -> bool:
        """True or false."""
        return self._typed(name, bool, "true or false")  # type: ignore[no-any-return]

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids: a list of whole numbers that are not negative."""
        values = self._typed(name, list, "a list of token ids")
        for value in values:
            if type(value) is not int or value < 0:
                raise self.wrong(name, f"must be a list of token ids, but holds {value!r}")
        return tuple(values)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self._typed(name, list, "a list of strings")
        for value in values:
            if not isinstance(value, str) or not _is_whole(value):
                raise self.wrong(name, f"must be a list of strings, but holds {value!r}")
        return tuple(values)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object, as it is."""
        return self._typed(name, dict, "an object")  # type: ignore[no-any-return]

    def object(self, name: str) -> Fields:
        """An object, to be read field by field."""
        return Fields(self.mapping(name), f"{self.where}, {name}")

    def objects(self, name: str, what: str) -> list[Fields]:
        """A list of objects; `what` names one of them in errors, with its number."""
        values = self._typed(name, list, "a list of objects")
        return [Fields(value, f"{self.where}, {what} {index}") for index, value in enumerate(values)]

    def wrong(self, name: str, message: str) -> UserError:
        """The error that says what is the matter with a field."""
        return UserError(f"{self.where}: {name!r} {message}")

    def _typed(self, name: str, kind: type | tuple[type, ...], words: str) -> Any:
        if name not in self._value:
            raise UserError(f"{self.where}: {name!r} is missing")
        value = self._value[name]
        if not isinstance(value, kind):
            raise self.wrong(name, f"must be {words}, not {_kind(value)}")
        return value


def _is_whole(text: str) -> bool:
    """Whether a string can be written: JSON may hold halves of characters beyond the 16-bit plane."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
