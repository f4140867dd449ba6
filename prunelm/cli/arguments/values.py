"""Text becomes numbers, paths and words, as a typed parameter wants them."""

import ast
import itertools
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from prunelm.cli import UsageError
from prunelm.cli.arguments.given import Given, did_you_mean, either, plain

Commas = Annotated[str, "values with commas"]
"""Text of several values with commas between them; a YAML list or several words are joined."""

Sizes = Annotated[str, "size"]
"""As `Commas`, of sizes such as 5M; 5,000,000 is one number, 5 M is 5M."""

_YES, _NO = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
BOOLEANS = (*_YES, *_NO)
_WHOLE = re.compile(r"[+-]?\d{1,3}(,\d{3})+")
_LARGEST = 2**63


def convert(given: Given, hint: Any, name: str) -> Any:
    """The value that `hint` asks for.

    Raises:
        UsageError: text that is no such value, in one line.
    """
    origin: Any = typing.get_origin(hint)
    parts: tuple[Any, ...] = typing.get_args(hint)
    if origin is Annotated:
        return _joined(given, name, parts[1] == "size")
    if origin in (Union, types.UnionType):
        return _one_of(given, hint, name)
    if origin is Literal:
        return _literal(given, hint, name)
    if origin in (list, tuple):
        return _sequence(given, hint, name)
    if origin is dict:
        if not isinstance(given.value, dict):
            raise given.refuse(name, kind_of(hint))
        return {key: convert(each, parts[1], f"{name}.{key}") for key, each in given.value.items()}
    if hint in _SCALARS:
        return _scalar(given, hint, name)
    return _guess(given)


def kind_of(hint: Any, article: bool = True) -> str:
    """What a hint takes, in words: "a whole number", or "whole number" without the article."""
    origin = typing.get_origin(hint)
    parts: tuple[Any, ...] = typing.get_args(hint)
    if origin is Annotated:
        return kind_of(parts[0], article)
    if origin in (Union, types.UnionType):
        return either([kind_of(each, article) for each in parts if each is not type(None)])
    if origin is Literal:
        return either([str(each) for each in parts])
    if origin is dict:
        return "names with values"
    if origin in (list, tuple):
        inner = [kind_of(each, False) for each in parts if each != ...]
        if origin is tuple and len(inner) == len(parts):
            return f"{'a pair' if len(inner) == 2 else len(inner)} of {either([*set(inner)])}"
        return f"a list of {inner[0]}" if article else f"{inner[0]} ..."
    word = _SCALARS.get(hint, "value")
    return word if not article or hint in (bool, str) else f"a {word}"


def _joined(given: Given, name: str, sizes: bool) -> str:
    values = given.value if isinstance(given.value, list) else [given]
    texts = [_scalar(each, str, name).strip() for each in values]
    if not sizes:
        return ",".join(texts)
    if len(texts) == 2 and re.fullmatch(r"[a-zA-Z%]+", texts[1]):
        texts = ["".join(texts)]  # 5 M on the line is two words
    return ",".join(_without_thousands(text) for text in texts)


def _without_thousands(text: str) -> str:
    """5,000,000 as 5000000; 500,400,300 falls as sizes must, and so is three of them."""
    number = re.fullmatch(r"(\d{1,3}(?:,\d{3})+)(\s*[a-zA-Z%]?)", text)
    if not number:
        return text
    parts = [int(part) for part in number.group(1).split(",")]
    falling = all(a > b > 0 for a, b in itertools.pairwise(parts))
    return text if falling else text.replace(",", "")


def _one_of(given: Given, hint: Any, name: str) -> Any:
    options = list(typing.get_args(hint))
    optional = type(None) in options
    rest = [each for each in options if each is not type(None)]
    textual = any(each in (str, Path) for each in rest)
    word = given.value if isinstance(given.value, str) else "?"
    if optional and (given.value is None or word == ""):
        return None
    if optional and not textual and word.lower() in ("none", "null"):
        return None
    words = [each for each in rest if _is_word(each)]
    for each in [*words, *(each for each in rest if each not in words)]:
        try:
            return convert(given, each, name)
        except UsageError:
            if len(rest) == 1:
                raise
    raise given.refuse(name, kind_of(hint))


def _is_word(hint: Any) -> bool:
    return bool(typing.get_origin(hint) is Literal)


def _literal(given: Given, hint: Any, name: str) -> Any:
    values = typing.get_args(hint)
    if isinstance(given.value, str):
        for same in (lambda a: a, plain):
            found = [each for each in values if same(str(each)) == same(given.value)]
            if len(found) == 1:
                return found[0]
        hint_text = did_you_mean(given.value, map(str, values))
        raise given.refuse(name, kind_of(hint), repr(str(given)), hint_text)
    raise given.refuse(name, kind_of(hint))


def _sequence(given: Given, hint: Any, name: str) -> Any:
    origin: Any = typing.get_origin(hint)
    parts: tuple[Any, ...] = typing.get_args(hint)
    ends = Ellipsis in parts or origin is list
    values = given.value
    if isinstance(values, str):
        text = values.strip()
        if text.startswith("["):
            from prunelm.cli.arguments.yaml_file import read_text

            values = read_text(text, name).value
        elif parts[0] is not Path:
            inner = text[1:-1] if text[:1] + text[-1:] == "()" else text
            values = [Given(part, given.where) for part in inner.split(",") if part.strip()]
        else:
            values = [given]
    if not isinstance(values, list) or (not ends and len(values) != len(parts)):
        raise given.refuse(name, kind_of(hint))
    hints = [parts[0]] * len(values) if ends else parts
    found = [convert(each, kind, name) for each, kind in zip(values, hints, strict=True)]
    return found if origin is list else tuple(found)


def _scalar(given: Given, kind: type, name: str) -> Any:
    if kind is bool and given.value == ():
        return True
    text = given.value
    if not isinstance(text, str):
        got = f"{given}, {len(text)} values" if isinstance(text, list) else ""
        raise given.refuse(name, kind_of(kind), got)
    if kind is str:
        return text
    word = text.strip()
    if kind is bool and word.lower() in BOOLEANS:
        return word.lower() in _YES
    if kind is Path and word and "\0" not in text:
        try:
            return Path(text).expanduser()
        except RuntimeError:
            raise given.refuse(name, "a folder of a user that exists") from None
    number = _number(word, kind) if kind in (int, float) else None
    if number is None:
        comma = re.fullmatch(r"[+-]?\d+,\d+", word) and kind is float
        raise given.refuse(
            name, kind_of(kind), hint=f"did you mean {word.replace(',', '.')}?" if comma else ""
        )
    return number


def _number(word: str, kind: type) -> int | float | None:
    if _WHOLE.fullmatch(word):
        word = word.replace(",", "")
    share = kind is float and word.endswith("%")
    try:
        if kind is int and re.fullmatch(r"[+-]?[\d_]{1,30}", word):
            whole = int(word)
        else:
            number = float(word.removesuffix("%").rstrip()) / (100 if share else 1)
            if kind is float:
                return None if number != number else number
            if not number.is_integer():
                return None
            whole = int(number)
    except (ValueError, OverflowError):
        return None
    return whole if abs(whole) < _LARGEST else None


def _guess(given: Given) -> Any:
    """For a class of the user's own whose parameter has no type."""
    value = given.value
    if isinstance(value, list):
        return [_guess(each) for each in value]
    if isinstance(value, dict):
        return {key: _guess(each) for key, each in value.items()}
    if value == ():
        return True
    if isinstance(value, str):
        if value.strip()[:1] in ("[", "{"):
            from prunelm.cli.arguments.yaml_file import read_text

            return _guess(read_text(value, "value"))
        words = {"true": True, "false": False, "null": None, "none": None}
        if value.lower() in words:
            return words[value.lower()]
        number = _number(value, int)
        if number is None:
            number = _number(value, float)
        return value if number is None else number
    return value


def unquoted(text: str) -> str:
    """Text without the quotes that Python would have around it."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            return str(ast.literal_eval(text))
        except (ValueError, SyntaxError):
            return text[1:-1]
    return text


_SCALARS = {
    bool: "yes or no", int: "whole number", float: "number", str: "text", Path: "file or folder"
}  # fmt: skip
