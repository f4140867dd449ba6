"""Where the parts of a Transformer block are in any model, checked against its weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from prunelm.models.lm import LayerSizes
from prunelm.nn import LowRankLinear
from prunelm.pruning.groups import Rows, inputs, outputs

# Where the sizes of a list of blocks stand in the config of this project's models.
CONFIG_SIZES = {"blocks": "layers", "predictor.blocks": "predictor_layers"}


@dataclass(frozen=True)
class Found:
    """What one block's groups are made of: `count` groups, each a slice of every part.

    Attributes:
        place: a module name.
        linears: names of the linears, from the block.
        counters: (module, attribute) that hold a multiple of `count` and shrink with it.
    """

    place: str
    count: int
    parts: tuple[Rows, ...]
    linears: tuple[str, ...]
    counters: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Architecture:
    """Names by which the parts of a Transformer block are found in any model.

    A block is any module with these linears below it; names may have dots. The number of heads is
    read off the weights and the block's own attributes, which must agree. Forwards must take their
    sizes from these attributes or from shapes: the attributes follow when a block shrinks.

    Args:
        qkv: one linear with rows ordered [query heads | key heads | value heads], or the names of
            three. There may be fewer key and value heads than query heads.
        out: the linear that reads the heads.
        feed_forwards: names of the linears of each feed-forward: one or more (a gate) that write
            neurons, then the one that reads them. In this project's models those of one block
            shrink together, elsewhere each for itself.
        head_dim, heads, kv_heads: attributes of the block; `head_dim` or `heads` must be there.
        widths: further attributes of the block that hold a multiple of the number of heads.
        ff: attributes of the block that hold the number of neurons.
        attention_norms, ff_norms: children that go when their half goes as a whole.
    """

    qkv: str | tuple[str, str, str] = "qkv"
    out: str = "out"
    feed_forwards: tuple[tuple[str, ...], ...] = (("ff_in", "ff_out"), ("front_in", "front_out"))
    head_dim: str = "head_dim"
    heads: str = "heads"
    kv_heads: str = "kv_heads"
    widths: tuple[str, ...] = ()
    ff: tuple[str, ...] = ("ff",)
    attention_norms: tuple[str, ...] = ("attention_norm",)
    ff_norms: tuple[str, ...] = ("ff_norm", "front_norm")

    def __post_init__(self) -> None:
        if not isinstance(self.qkv, str) and len(self.qkv) != 3:
            raise ValueError(f"qkv: expected one name or three, got {self.qkv!r}")
        for names in self.feed_forwards:
            if isinstance(names, str) or len(names) < 2:
                raise ValueError(f"feed_forwards: expected at least two names each, got {names!r}")

    @property
    def projections(self) -> tuple[str, ...]:
        """The names in `qkv`."""
        return (self.qkv,) if isinstance(self.qkv, str) else tuple(self.qkv)

    def blocks(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of every block.

        Raises:
            ValueError: there is none, or one has some linears of a kind but not all.
        """
        found = False
        firsts = (self.projections[0], *(names[0] for names in self.feed_forwards))
        for name, module in model.named_modules():
            if any(is_linear(child(module, first)) for first in firsts):
                found = True
                yield name, module
        if found or (is_sized_by_config(model) and _is_empty(model)):
            return
        kinds = {type(module) for module in model.modules()}
        why = ""
        if nn.MultiheadAttention in kinds:
            why = "; torch's MultiheadAttention cannot lose heads, as it ties them to its width"
        raise ValueError(
            f"model: expected blocks with {', '.join(self.projections)}, {self.out} or "
            f"{' or '.join(names[0] for names in self.feed_forwards)}, "
            f"got {type(model).__name__} without any{why}"
        )

    def linears(self, model: nn.Module) -> Iterator[str]:
        """Names of the linears in the blocks, each once.

        Raises:
            ValueError: as for `blocks`, or one that is no plain nn.Linear with a weight of its own.
        """
        shared, seen = tied(model), set()
        for block, module in self.blocks(model):
            for names in ((*self.projections, self.out), *self.feed_forwards):
                for name in _present(block, module, names):
                    linear, found = joined(block, name), child(module, name)
                    if linear in seen:
                        continue
                    seen.add(linear)
                    plain = (nn.Linear, LowRankLinear, NonDynamicallyQuantizableLinear)
                    if type(found) not in plain or getattr(found, "activation", None):
                        kind = type(found).__name__
                        raise ValueError(f"{linear}: expected a plain nn.Linear, got {kind}")
                    for leaf in ("weight", "up", "down"):
                        _refuse_tied(shared, f"{linear}.{leaf}")
                    yield linear

    def attentions(self, model: nn.Module) -> Iterator[Found]:
        """The heads of every block, or its groups of query heads that share a key head.

        With a single key head, query heads are groups by themselves, and it stays.

        Raises:
            ValueError: as for `blocks`, or sizes that do not fit together.
        """
        parameters, shared = dict(model.named_parameters()), tied(model)
        for block, module in self.blocks(model):
            linears = _present(block, module, (*self.projections, self.out))
            if not linears:
                continue
            heads, kv_heads, head_dim = self._heads(block, module)
            count = heads if kv_heads == 1 else kv_heads
            names = [joined(block, name) for name in linears]
            parts: list[Rows] = []
            if len(self.projections) == 3:
                for name in names[: 1 if kv_heads == 1 < heads else 3]:
                    parts += outputs(parameters, name, count)
            elif heads == kv_heads:
                parts += outputs(parameters, names[0], count, 3)
            elif kv_heads == 1:
                parts += outputs(parameters, names[0], count, (head_dim,), 2 * head_dim)
            else:
                segments = (heads // kv_heads * head_dim, head_dim, head_dim)
                parts += outputs(parameters, names[0], count, segments)
            parts += inputs(parameters, names[-1], count)
            attributes = [self.heads, *self.widths]
            attributes += [self.kv_heads] * (kv_heads == count)
            counters = _counters(block, module, attributes, count)
            yield _checked(Found(block, count, tuple(parts), linears, counters), parameters, shared)

    def neurons(self, model: nn.Module) -> Iterator[Found]:
        """The feed-forward neurons of every block.

        Raises:
            ValueError: as for `blocks`, or sizes that do not fit together.
        """
        parameters, shared = dict(model.named_parameters()), tied(model)
        together = is_sized_by_config(model)
        for block, module in self.blocks(model):
            halves = [_present(block, module, names) for names in self.feed_forwards]
            halves = [names for names in halves if names]
            found = []
            for names in halves:
                count = sizes(child(module, names[0]))[0]
                parts: list[Rows] = []
                for name in names:
                    rows, columns = sizes(child(module, name))
                    last = name == names[-1]
                    if (columns if last else rows) != count:
                        raise ValueError(
                            f"{joined(block, name)}: expected {count} "
                            f"{'columns' if last else 'rows'}, the rows of {names[0]}, "
                            f"got {columns if last else rows}"
                        )
                    linear = joined(block, name)
                    parts += (inputs if last else outputs)(parameters, linear, count)
                place = block if together or len(halves) == 1 else joined(block, names[0])
                same = [name for name in self.ff if getattr(module, name, None) == count]
                counters = _counters(block, module, same, count)
                found.append(Found(place, count, tuple(parts), names, counters))
            if together and found:
                if len({each.count for each in found}) > 1:
                    counts = ", ".join(str(each.count) for each in found)
                    raise ValueError(f"{block}: expected feed-forwards of one size, got {counts}")
                parts = [part for each in found for part in each.parts]
                linears = tuple(name for each in found for name in each.linears)
                found = [Found(block, found[0].count, tuple(parts), linears, found[0].counters)]
            for each in found:
                yield _checked(each, parameters, shared)

    def _heads(self, block: str, module: nn.Module) -> tuple[int, int, int]:
        """(query heads, key heads, query rows of a head)."""
        rows = [sizes(child(module, name))[0] for name in self.projections]
        inner = sizes(child(module, self.out))[1]
        here = block or "model"
        asked = {name: getattr(module, name, None) for name in (self.head_dim, self.heads)}
        head_dim, heads = (_whole(here, name, value) for name, value in asked.items())
        if head_dim is None and heads is None:
            raise ValueError(
                f"{here}: expected an attribute {self.head_dim} or {self.heads}, got none; "
                "Architecture names them"
            )
        query_rows = rows[0] if len(rows) == 3 else inner
        query = joined(block, self.projections[0] if len(rows) == 3 else self.out)
        axis = "rows" if len(rows) == 3 else "columns"
        head_dim = head_dim or max(query_rows // (heads or 1), 1)
        heads = heads or query_rows // head_dim
        if heads * head_dim != query_rows:
            raise ValueError(
                f"{query}: expected {heads * head_dim} {axis}, {heads} heads of {head_dim}, "
                f"got {query_rows}"
            )
        if len(rows) == 1:
            kv_heads, odd = divmod(rows[0] - inner, 2 * head_dim)
            fits = not odd and kv_heads > 0 and heads % kv_heads == 0
            if not fits:
                raise ValueError(
                    f"{joined(block, self.projections[0])}: expected {3 * inner} rows, query, key "
                    f"and value of {heads} heads of {head_dim}, or key and value of fewer heads "
                    f"that divide {heads}, got {rows[0]}"
                )
        else:
            kv_heads, odd = divmod(rows[1], head_dim)
            if odd or not kv_heads or heads % kv_heads:
                raise ValueError(
                    f"{joined(block, self.projections[1])}: expected rows of key heads of "
                    f"{head_dim} that divide {heads} heads, got {rows[1]}"
                )
            value_rows = inner // heads * kv_heads
            if inner % heads or rows[2] != value_rows:
                raise ValueError(
                    f"{joined(block, self.projections[2])}: expected {value_rows} rows, as "
                    f"{self.out} has {inner} columns for {heads} heads, got {rows[2]}"
                )
        named = _whole(here, self.kv_heads, getattr(module, self.kv_heads, None))
        if named not in (None, kv_heads):
            raise ValueError(f"{here}: expected {self.kv_heads} = {kv_heads}, got {named}")
        return heads, kv_heads, head_dim


def is_sized_by_config(model: nn.Module) -> bool:
    """Whether a model is one of this project's, rebuilt from a config that sizes each block."""
    config = getattr(model, "config", None)
    found = [getattr(config, name, None) for name in CONFIG_SIZES.values()]
    return hasattr(config, "ranks") and any(
        isinstance(layers, tuple) and all(isinstance(size, LayerSizes) for size in layers)
        for layers in found
    )


def _is_empty(model: nn.Module) -> bool:
    layers = [getattr(model.config, name, ()) for name in CONFIG_SIZES.values()]
    return not any(size.heads or size.ff for sizes in layers for size in sizes)


def joined(block: str, name: str) -> str:
    """A name below a block, which may be the model itself."""
    return f"{block}.{name}" if block else name


def child(module: nn.Module, name: str) -> nn.Module | None:
    """What stands under a dotted name, or None."""
    found: nn.Module | None = module
    for part in name.split("."):
        found = found._modules.get(part) if found is not None else None
    return found


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module has an output per row of its weight and an input per column."""
    if isinstance(module, (nn.Linear, LowRankLinear)):
        return True
    if isinstance(module, nn.Conv1d):
        return module.groups == 1
    weight = getattr(module, "weight", None)
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return isinstance(weight, Tensor) and tuple(weight.shape) == shape


def sizes(linear: nn.Module | None) -> tuple[int, int]:
    """(outputs, inputs)."""
    if isinstance(linear, LowRankLinear):
        return linear.up.shape[0], linear.down.shape[1]
    assert linear is not None and isinstance(linear.weight, Tensor)
    return linear.weight.shape[0], linear.weight.shape[1]


def tied(model: nn.Module) -> dict[str, str]:
    """Names of parameters that several modules hold, each with another of its names."""
    first: dict[int, str] = {}
    found = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = joined(prefix, leaf)
            earlier = first.setdefault(id(parameter), name)
            if earlier != name:
                found[name], found[earlier] = earlier, name
    return found


def _refuse_tied(shared: dict[str, str], name: str) -> None:
    if name in shared:
        raise ValueError(
            f"{name}: expected a weight that one module holds, got one tied to {shared[name]}"
        )


def _checked(found: Found, parameters: Mapping[str, Tensor], shared: dict[str, str]) -> Found:
    for part in found.parts:
        _refuse_tied(shared, part.name)
        if part.name not in parameters:
            raise ValueError(f"{part.name}: expected a parameter, got a weight that is computed")
    return found


def _present(block: str, module: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """All names where the first is a linear, else none; ValueError where one is missing."""
    if not is_linear(child(module, names[0])):
        return ()
    for name in names:
        found = child(module, name)
        if not is_linear(found):
            kind = "none" if found is None else type(found).__name__
            raise ValueError(
                f"{joined(block, name)}: expected a linear beside {names[0]}, got {kind}"
            )
    return names


def _whole(place: str, name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{place}: expected {name} to be a number of at least 1, got {value!r}")
    return value


def _counters(
    block: str, module: nn.Module, names: list[str], count: int
) -> tuple[tuple[str, str], ...]:
    found = []
    for name in names:
        value = vars(module).get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if value % count:
            raise ValueError(f"{block}: expected {name} to be a multiple of {count}, got {value}")
        found.append((block, name))
    return tuple(found)
