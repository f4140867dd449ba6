"""YAML as text, lists and mappings with their lines: no tag constructs anything, nothing expands.

Scalars stay text, so that a value in a file means what the same text means on the line.
"""

from collections.abc import Iterator
from typing import Any

from prunelm.cli import UsageError
from prunelm.cli.arguments.given import Given

MOST_BYTES = 1_000_000
MOST_VALUES = 10_000  # what aliases may unfold to
_NULL = ("", "~", "null", "Null", "NULL")
_CORE = tuple(f"tag:yaml.org,2002:{kind}" for kind in "str int float bool null seq map".split())


def read_file(path: str) -> dict[str, Given]:
    """The options in a file.

    Raises:
        UsageError: a file that cannot be read, is too large, is no text or no mapping, a tag, a
            key twice, or aliases that unfold to more than `MOST_VALUES`; file and line are named.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"config: expected a YAML file, got {path}: {reason}") from None
    if len(data) > MOST_BYTES:
        raise UsageError(f"{path}: expected YAML of at most {MOST_BYTES:,} bytes, got more")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{path}, line {line}: expected YAML in UTF-8, got byte 0x{data[error.start]:02x}"
        ) from None
    read = read_text(text, path, f"{path}, line {{}}: ")
    if read.value is None:
        return {}
    if not isinstance(read.value, dict):
        raise UsageError(f"{path}: expected options, such as target: 50%, got {read}")
    return read.value


def read_text(text: str, name: str, where: str = "") -> Given:
    """YAML in a string; `where` with {} for the line starts messages.

    Raises:
        UsageError: as `read_file`.
    """
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        return Given(None) if node is None else _value(node, where, iter(range(MOST_VALUES)), ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark and where else ""
        raise UsageError(f"{name}{place}: expected YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: expected YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UsageError(f"{name}: expected YAML of fewer levels") from None


def _value(node: Any, where: str, budget: Iterator[int], above: tuple[Any, ...]) -> Given:
    import yaml

    line = node.start_mark.line + 1
    here = where.format(line)
    if next(budget, None) is None:
        raise UsageError(f"{here}expected at most {MOST_VALUES:,} values, got more")
    if any(node is each for each in above):
        raise UsageError(f"{here}expected values that end, got one that holds itself")
    if node.tag not in _CORE and node.tag != "!":
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise UsageError(f"{here}expected YAML without tags, got {tag}")
    above = (*above, node)
    if isinstance(node, yaml.ScalarNode):
        null = node.style is None and node.value in _NULL
        return Given(None if null else node.value, here)
    if isinstance(node, yaml.SequenceNode):
        return Given([_value(each, where, budget, above) for each in node.value], here)
    found: dict[str, Given] = {}
    for key, each in node.value:
        at = where.format(key.start_mark.line + 1)
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{at}expected a name, got a {key.id}")
        if key.value in found:
            raise UsageError(f"{at}{key.value}: expected once, got it again")
        found[key.value] = Given(_value(each, where, budget, above).value, at)
    return Given(found, here)
