"""Which single weights, or tiles of them, stay: the weights that are meant, their scores, and the exact choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, inf, prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slivo.edits.mask import Pattern
from slivo.errors import ShapeError, SlivoError
from slivo.graph import ExampleInputs, trace
from slivo.graph.capture import canonical_names
from slivo.measure import readers
from slivo.options import listed, matches
from slivo.prune import criteria
from slivo.prune.criterion import Criterion
from slivo.prune.importance import runs_of
from slivo.prune.runs import Found, Loss

Scope = Literal["global", "layer", "row"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Site:
    """A weight that is to hold zeros.

    Args:
        shape: Of the weight.
        written: Its pattern, as `slivo.edits.Mask` has it.
        reads: The dimension along which its inputs lie, 0 or 1.
    """

    shape: tuple[int, ...]
    written: str
    reads: int

    @property
    def pattern(self) -> Pattern:
        """The pattern itself."""
        return Pattern.parse(self.written)

    @property
    def scored(self) -> int:
        """How many scores the weight has: one for each entry, or for each tile that goes as a whole."""
        pattern = self.pattern
        return prod(self.shape) // (prod(pattern.tile) if pattern.most is None else 1)

    def rows(self, scores: Tensor) -> Tensor:
        """Lay scores out by the outputs that they belong to, shape (outputs, scores of each)."""
        return scores.reshape(self._grid).movedim(1 - self.reads, 0).flatten(1)

    def flat(self, rows: Tensor) -> Tensor:
        """Return what `rows` laid out as it was."""
        grid = self._grid
        first = grid.pop(1 - self.reads)
        return rows.reshape(first, *grid).movedim(0, 1 - self.reads).flatten()

    @property
    def _grid(self) -> list[int]:
        tile = self.pattern.tile
        return [size // (tile[dim] if dim < len(tile) else 1) for dim, size in enumerate(self.shape)]


def sites(
    model: nn.Module,
    written: str,
    *,
    example_inputs: ExampleInputs | None = None,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, Site]:
    """Return the weights that are meant, by name, each once if it is tied.

    Args:
        model: Any model.
        written: The pattern.
        example_inputs: If given, the traced graph says along which dimension each weight reads its inputs; otherwise
            it is dimension 1, and of transposed convolutions 0.
        only: Globs over names of parameters and paths of modules. None means all parameters of two dimensions or more
            that are called a weight, or a kernel.
        exclude: Likewise; these stay dense.

    Raises:
        SlivoError: If a glob matches nothing, or nothing is left.
        ShapeError: If the pattern does not fit a weight; says what to exclude.
    """
    only, exclude = listed(only, "only"), listed(exclude, "exclude")
    wide = {name: each for name, each in model.named_parameters() if each.dim() > 1 and each.is_floating_point()}
    names: dict[str, list[str]] = {}
    for name, first in canonical_names(model).items():
        names.setdefault(first, []).append(name)
    for glob in (*only, *exclude):
        if not any(matches(glob, every) for every in names.values()):
            raise SlivoError(f"{glob!r} matches no parameter; there are {', '.join(list(wide)[:8])} …")
    chosen = {
        name: each
        for name, each in wide.items()
        if (any(matches(glob, names[name]) for glob in only) if only else _is_weight(name, each))
        and not any(matches(glob, names[name]) for glob in exclude)
    }
    if not chosen:
        there = (
            f"only={list(only)} and exclude={list(exclude)} leave nothing of {', '.join(list(wide)[:8]) or 'nothing'}"
        )
        raise SlivoError(f"no weight of two dimensions or more is meant: {there}")
    reads = _reads(model, example_inputs)
    # Which way a weight lies says the caller's own @ before all.
    turned = Pattern.parse(written).most is not None and "@" not in written
    found = {
        name: Site(
            tuple(each.shape), f"{written}@0" if turned and name in reads else written, 0 if name in reads else 1
        )
        for name, each in chosen.items()
    }
    _check(found)
    return found


def _check(found: Mapping[str, Site]) -> None:
    bad: dict[str, ShapeError] = {}
    for name, site in found.items():
        try:
            site.pattern.check(name, site.shape)
        except ShapeError as error:
            bad[name] = error
    if bad:
        raise ShapeError(f"{next(iter(bad.values()))}: exclude={list(bad)}")


def _is_weight(name: str, parameter: Tensor) -> bool:
    """Tell a weight from biases, positions and the magnitudes of weight norm, by its name and shape."""
    last = name.rpartition(".")[2]
    return any(word in last for word in ("weight", "kernel", "embeddings")) and parameter[0].numel() > 1


def _reads(model: nn.Module, example_inputs: ExampleInputs | None) -> frozenset[str]:
    """Return the weights whose inputs lie along dimension 0."""
    if example_inputs is None:
        names = (f"{path}.weight" if path else "weight" for path, each in model.named_modules()
                 if isinstance(each, _TRANSPOSED))  # fmt: skip
        return frozenset(names)
    found: dict[str, set[int]] = {}
    for axis in trace(model, example_inputs).axes:
        for member in axis.members:
            if member.reads:
                found.setdefault(member.tensor, set()).add(member.dim)
    return frozenset(name for name, dims in found.items() if dims == {0})


def score(
    model: nn.Module,
    found: Mapping[str, Site],
    criterion: Criterion,
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Score every entry of weights, or every tile that goes as a whole.

    An entry is to a criterion a position of one entry, and a tile one of several: its scores are those of the papers.

    Args:
        model: Left as it was.
        found: The weights.
        criterion: One that scores positions by their own entries.
        batches: As for `slivo.prune.importance.importance`.
        loss: Likewise.

    Returns:
        For each weight scores of shape (`Site.scored`,), on the weight's device, in the order of the pattern's tiles;
        −∞ where there are zeros alone.

    Raises:
        SlivoError: If the criterion cannot do it, needs what is not given, or gives no finite numbers.
    """
    check_criterion(criterion)
    sums: dict[str, Tensor] = {}
    passes = 0
    for given in runs_of(model, list(found), criterion, batches, loss):
        passes += 1
        for name, site in found.items():
            laid = [_laid(_tensor(name, site, kind, given, criterion), site) for kind in criterion.given]
            value = criterion.score(*laid)
            if not isinstance(value, Tensor) or value.shape != (site.scored,) or not bool(value.isfinite().all()):
                raise SlivoError(
                    f"criterion {criterion.name!r} gives {name} scores that are not {site.scored} finite numbers; look "
                    "for NaN in the weight and in what the model is given, or exclude it"
                )
            sums[name] = sums[name] + value if name in sums else value
    if not passes:
        raise SlivoError(f"criterion {criterion.name!r} was given no batches; give at least one")
    weights = dict(model.named_parameters())
    dead = {name: (_laid(weights[name].detach(), site) == 0).all(1) for name, site in found.items()}
    return {name: value.detach().masked_fill(dead[name].to(value.device), -inf) for name, value in sums.items()}


def check_criterion(criterion: Criterion) -> None:
    """Look whether a criterion can score single weights.

    Raises:
        SlivoError: If it scores channels as a whole; lists those that can.
    """
    if not _is_own(criterion):
        able = ", ".join(name for name in criteria.names() if _is_own(criteria.resolve(name)))
        raise SlivoError(f"criterion {criterion.name!r} scores whole channels, not single weights; there are {able}")


def _is_own(criterion: Criterion) -> bool:
    """Tell whether a criterion scores each position by its own entries, of any weight."""
    own = {"weights", "grads", "drawn", "inputs"}
    return own >= {*criterion.given} and criterion.on != "scale" and criterion is not criteria.fpgm


def _tensor(name: str, site: Site, kind: str, given: Found, criterion: Criterion) -> Tensor:
    tensors = given[kind]
    if kind != "inputs":
        return tensors[name]
    for dim in (site.reads, 1 - site.reads):
        if readers.key(name, dim) in tensors:
            return tensors[readers.key(name, dim)]
    raise SlivoError(
        f"criterion {criterion.name!r} saw no activation that {name} multiplies (only those of linear layers and "
        "convolutions are); exclude it, or choose another criterion"
    )


def _laid(tensor: Tensor, site: Site) -> Tensor:
    """Lay a tensor out as a criterion sees it, in float32 at least: a row for each score."""
    tiles = site.pattern.tiles(tensor.float() if tensor.dtype.itemsize < 4 else tensor)
    return tiles if site.pattern.most is None else tiles.reshape(-1, 1)


def choose(
    found: Mapping[str, Site],
    scores: Mapping[str, Tensor],
    *,
    sparsity: float,
    scope: Scope,
    min_keep: float,
) -> dict[str, Tensor]:
    """Choose what stays: exactly as many as are asked for, those of the greatest scores; of equal ones the first.

    Args:
        found: The weights.
        scores: Of each, from `score`.
        sparsity: Share that goes; of N:M patterns it is theirs.
        scope: What competes: ``global`` all, ``layer`` each weight, ``row`` each output of each weight.
        min_keep: Least share of a weight that stays if all compete.

    Returns:
        For each weight a bool tensor of its shape: what stays.
    """
    kept: dict[str, Tensor] = {}
    if any(site.pattern.most is not None for site in found.values()):
        for name, site in found.items():
            most, tile = site.pattern.most, prod(site.pattern.tile)
            assert most is not None
            kept[name] = best(scores[name].reshape(-1, tile), most).flatten()
    elif scope == "global":
        kept = _globally(scores, sparsity, min_keep)
    else:
        for name, site in found.items():
            rows = site.rows(scores[name]) if scope == "row" else scores[name][None]
            stays = best(rows, rows.shape[1] - portion(sparsity, rows.shape[1]))
            kept[name] = site.flat(stays) if scope == "row" else stays.flatten()
    return {name: _as_mask(kept[name], site) for name, site in found.items()}


def _globally(scores: Mapping[str, Tensor], sparsity: float, min_keep: float) -> dict[str, Tensor]:
    home = next(iter(scores.values())).device
    ready = []
    for value in scores.values():
        least = best(value[None], max(1, floor(min(min_keep, 1 - sparsity) * len(value))))[0]
        ready.append(value.masked_fill(least, inf).to(home))
    every = torch.cat(ready)[None]
    stays = best(every, every.shape[1] - portion(sparsity, every.shape[1]))[0]
    parts = torch.split(stays, [len(value) for value in scores.values()])
    return {name: part.to(value.device) for (name, value), part in zip(scores.items(), parts, strict=True)}


def _as_mask(kept: Tensor, site: Site) -> Tensor:
    pattern, tile = site.pattern, prod(site.pattern.tile)
    tiles = kept[:, None].expand(-1, tile) if pattern.most is None else kept.reshape(-1, tile)
    return pattern.untiled(tiles, site.shape)


def portion(sparsity: float, count: int) -> int:
    """Return how many of some go: the nearest to the share, halves upward."""
    return floor(sparsity * count + 0.5)


def best(scores: Tensor, count: int) -> Tensor:
    """Mark the greatest of each row, exactly so many; of equal ones those that come first.

    Args:
        scores: Shape (rows, entries); −∞ and ∞ are allowed.
        count: How many are marked in each row, 0 to entries.

    Returns:
        Bool tensor of the same shape.

    Example:
        >>> best(torch.tensor([[1.0, 3.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]]), 2).int().tolist()
        [[1, 1, 0, 0], [1, 0, 0, 1]]
    """
    if count <= 0 or count >= scores.shape[1]:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    level = scores.kthvalue(scores.shape[1] - count + 1, dim=1, keepdim=True).values
    above, ties = scores > level, scores == level
    return above | (ties & (ties.cumsum(1) <= count - above.sum(1, keepdim=True)))
