"""What can be wrong with a recipe beside its form: names that do not exist, and orders that make no sense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slivo import losses
from slivo.errors import RecipeError, SlivoError
from slivo.prune import criteria
from slivo.prune.sparse.choice import check_criterion
from slivo.prune.sparse.masks import check_sparsity
from slivo.quantize import SCHEMES, WEIGHTS
from slivo.recipe import searches
from slivo.recipe.cuts import PLANNED
from slivo.recipe.lesson import on_sizes
from slivo.recipe.plan import cut_of
from slivo.recipe.schema import (
    Distill,
    Drop,
    Factorize,
    Joint,
    Keep,
    Layers,
    Part,
    Pressure,
    Prune,
    Quantize,
    Recipe,
    Repeat,
    Share,
    Sparsify,
    Stage,
)
from slivo.recipe.text import Path, unknown

Problem = tuple[Path, str]
"""A place, and what is wrong there."""


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with a recipe whose keys and types are right.

    Args:
        recipe: The recipe.

    Yields:
        The place, and a text that goes on after the place's name.
    """
    if recipe.student.from_ is not None and recipe.student.model is not None:
        yield ("student",), "has from and model; give one: the teacher itself is made smaller, or another model"
    if recipe.student.inherit is not None and recipe.student.model is None:
        yield ("student", "inherit"), "is for another model than the teacher, which has its weights; leave it out"
    yield from _committee(recipe)
    if recipe.target.runtime is not None and recipe.target.latency is None and recipe.target.latency_ms is None:
        yield ("target", "runtime"), "says what latency is measured on; give latency or latency_ms, too"
    kinds = [(path, stage) for path, stage in _walk(recipe.stages, ("stages",))]
    for path, stage in kinds:
        if len(stage.given) != 1:
            names = ", ".join(Stage.model_fields)
            held = " and ".join(stage.given) or "nothing"
            yield path, f"has {held}; a stage is a mapping with one key, one of: {names}"
            return  # what follows takes each stage for one
        kind, part = next(iter(stage.given.items()))
        yield from _part(recipe, (*path, kind), part)
    yield from _order(kinds)
    yield from _teach(recipe)
    if recipe.search is not None:
        yield from searches.problems(recipe, recipe.search, problems)


def _teach(recipe: Recipe) -> Iterator[Problem]:
    places = [index for index, stage in enumerate(recipe.stages) if stage.teach is not None]
    if not places:
        return
    if recipe.student.model is None:
        yield ("stages", places[0], "teach"), "needs a student of its own; give student.model"
    if recipe.committee is not None:
        yield ("stages", places[0], "teach"), "and committee do not go together; leave one out"
    if len(places) > 1:
        yield ("stages", places[1], "teach"), "is there twice; one student becomes the teacher"
    for path, stage in _walk(recipe.stages[: places[0]], ("stages",)):
        kind, part = next(iter(stage.given.items()))
        cut = cut_of(part)
        if cut is not None and cut.keep is None:
            yield (*path, kind), "comes before teach and has no keep; the target is for what comes after: give keep"


def _committee(recipe: Recipe) -> Iterator[Problem]:
    if recipe.committee is None:
        return
    voices, count = recipe.committee.voices, len(recipe.committee.others) + 1
    if not isinstance(voices, str) and (len(voices) != count or not any(voices)):
        yield ("committee", "voices"), f"is {voices}; {count} numbers, the teacher's first, and not all of them 0"


def _walk(stages: Sequence[Stage], path: Path) -> Iterator[tuple[Path, Stage]]:
    """Yield all stages with their places, those that others hold included."""
    for index, stage in enumerate(stages):
        yield (*path, index), stage
        for kind in ("repeat", "layers"):
            holder: Repeat | Layers | None = getattr(stage, kind)
            if holder is not None:
                yield from _walk(holder.stages, (*path, index, kind, "stages"))


def _part(recipe: Recipe, path: Path, part: Part) -> Iterator[Problem]:
    """Yield what is wrong with one stage by itself."""
    if isinstance(part, Distill):
        yield from _losses(path, part)
        if isinstance(part, Joint):
            yield from _joint(recipe, path, part)
    elif isinstance(part, Prune):
        yield from _prune(recipe, path, part)
    elif isinstance(part, Quantize) and part.scheme not in SCHEMES:
        yield (*path, "scheme"), unknown(part.scheme, list(SCHEMES), "one of")
    elif isinstance(part, Quantize):
        yield from _quantize(path, part)
    elif isinstance(part, Repeat) and part.until is not None:
        yield from _until((*path, "until"), part)
    elif isinstance(part, Drop):
        yield from _keep((*path, "keep"), part.keep)
        if part.keep.latency is not None or part.keep.latency_ms is not None:
            yield (*path, "keep"), "has a latency, to which blocks are not dropped; keep macs, params or bytes"
    elif isinstance(part, Sparsify):
        yield from _sparsify(path, part)
    elif isinstance(part, Share) and part.codebook == "powers-of-two":
        given = part.clusters.values() if isinstance(part.clusters, dict) else [part.clusters]
        if any(count % 2 for count in given):
            yield (*path, "clusters"), "is odd; half of the powers of two are negative: give an even number"
    elif isinstance(part, Factorize):
        yield from _factorize(path, part)
    elif isinstance(part, Layers):
        if (part.groups is None) == (part.modules is None):
            yield path, "needs groups, a number of parts, or modules, a list of globs for each part; one of them"
        prunes = [stage.prune for stage in part.stages if stage.prune is not None]
        if len(prunes) != 1:
            yield (*path, "stages"), f"has {len(prunes)} prune stages; exactly one, which cuts each part"
        elif prunes[0].schedule.steps != 1:
            yield (*path, "stages"), "prunes in several steps; each part is cut once: leave schedule out"
        elif prunes[0].pressure is not None or prunes[0].controlled is not None:
            yield (*path, "stages"), "prunes with pressure or controlled, which are for whole networks: leave them out"
        elif prunes[0].only:
            yield (*path, "stages"), "has a prune stage with only; layers says which part is cut: leave only out"
        if any(stage.layers is not None or stage.repeat is not None for stage in part.stages):
            yield (*path, "stages"), "holds layers or repeat; a part has plain stages only"


def _prune(recipe: Recipe, path: Path, part: Prune) -> Iterator[Problem]:
    if part.criterion not in criteria.names():
        yield (*path, "criterion"), unknown(part.criterion, criteria.names(), "one of")
    keep = part.keep
    yield from _keep((*path, "keep"), keep)
    if keep is not None and keep.latency_ms is not None and part.schedule.steps != 1:
        yield (*path, "keep"), "has latency_ms and several steps to it; give latency, a share, or leave schedule out"
    target = recipe.target
    if keep is None and target.macs is None and target.params is None and target.latency is None:
        yield path, "has no keep, and target asks for neither macs nor params nor latency; give one of them"
    if keep is None and target.latency is not None and recipe.student.model is not None:
        yield path, "has no keep, and target a latency, a share of another network's; give keep"
    if part.recover is not None:
        yield from _losses((*path, "recover"), part.recover)
    if part.pressure is not None:
        yield from _pressure((*path, "pressure"), part.pressure)
    if part.controlled is not None:
        yield from _controlled(recipe, (*path, "controlled"), part)


def _pressure(path: Path, part: Pressure) -> Iterator[Problem]:
    planned = part.kind in PLANNED
    if part.kind == "hspg" and part.strength is not None:
        yield (*path, "strength"), "is nothing that hspg has; leave it out"
    elif not planned and part.strength is None:
        yield path, f"is {part.kind} and needs strength: a number above 0, such as 0.0001"
    if not planned and part.steps is not None:
        yield (*path, "steps"), f"is for {' and '.join(PLANNED)}; {part.kind} acts throughout: leave it out"


def _controlled(recipe: Recipe, path: Path, part: Prune) -> Iterator[Problem]:
    keep = part.keep
    if part.recover is None:
        yield path, "needs recover, the training after each cut"
    if part.pressure is not None:
        yield path, "and pressure do not go together; leave one out"
    if (keep or recipe.target).latency is not None or (keep is not None and keep.latency_ms is not None):
        yield path, "has no steps to a latency; keep macs, params or bytes"


def _keep(path: Path, keep: Keep | None) -> Iterator[Problem]:
    if keep is not None and not keep.model_dump(exclude_none=True):
        yield path, "is empty; give macs, params, bytes or latency, a share between 0 and 1"
    if keep is not None and keep.latency_ms is not None and keep.latency is not None:
        yield path, "has latency, a share, and latency_ms, milliseconds; give one of them"


def _factorize(path: Path, part: Factorize) -> Iterator[Problem]:
    yield from _keep((*path, "keep"), part.keep)
    if (part.keep is None) == (part.energy is None):
        yield path, "needs keep, what may stay of the whole, or energy, a share for each layer; one of them"
    if part.by == "sensitivity" and (part.keep is None or not part.samples):
        yield (*path, "by"), "is sensitivity, which measures on samples how to part a budget; give keep and samples"


def _quantize(path: Path, part: Quantize) -> Iterator[Problem]:
    for name in ("group_size", "symmetric", "method") if part.scheme not in WEIGHTS else ():
        if getattr(part, name) is not None:
            yield (*path, name), f"goes with {' or '.join(WEIGHTS)}; {part.scheme} has it not: leave it out"
    if part.aware is None:
        return
    yield from _losses((*path, "aware"), part.aware)
    if part.aware.lora is not None:
        yield (*path, "aware", "lora"), "trains beside the weights that aware rounds; leave it out"
    if part.scheme != "int8-static":
        yield (*path, "aware"), "is for int8-static, whose rounding it trains with; leave it out"
    if part.equalize or part.smooth is not None:
        yield (*path, "aware"), "learns ranges that equalize and smooth would change; leave these out"


def _until(path: Path, part: Repeat) -> Iterator[Problem]:
    assert part.until is not None
    if not part.until.model_dump(exclude_none=True, exclude={"halvings"}):
        yield path, "is empty; give max_drop, macs, params or bytes"
    for inner, stage in _walk(part.stages, (*path[:-1], "stages")):
        if stage.repeat is not None and stage.repeat.until is not None:
            yield path, "is in a repeat inside, too; one of them decides: leave one out"
        kind, held = next(iter(stage.given.items()), ("", part))
        cut = cut_of(held)
        if cut is not None and cut.keep is None:
            yield (*inner, kind), "has no keep; rounds that may be taken back each need their own share: give keep"


def _joint(recipe: Recipe, path: Path, part: Joint) -> Iterator[Problem]:
    if (part.prune is None) == (part.sparsify is None) and not (part.prune is None and part.quantize is not None):
        yield path, "needs prune, what is to vanish, or sparsify; one of them, or quantize alone"
    if part.lora is not None:
        yield (*path, "lora"), "trains beside the weights that vanish or are rounded; leave it out"
    if part.prune is not None:
        yield from _prune(recipe, (*path, "prune"), part.prune)
        for name in ("recover", "pressure", "controlled"):
            if getattr(part.prune, name) is not None:
                yield (*path, "prune", name), "is a training of its own; a joint stage has one: leave it out"
        if part.prune.schedule.steps != 1 or part.prune.refit:
            yield (*path, "prune"), "has a schedule or refit; channels vanish in the training: leave these out"
    if part.sparsify is not None:
        yield from _sparsify((*path, "sparsify"), part.sparsify)
        if part.sparsify.sparsity is None or part.sparsify.permute:
            yield (*path, "sparsify"), "needs sparsity, a share of zeros to grow to, and no permute"
        elif criteria.resolve(part.sparsify.criterion).needs_batches:
            yield (
                (*path, "sparsify", "criterion"),
                "needs batches; within a training weights alone are scored, as by l1",
            )
    if part.quantize is not None:
        yield from _quantize((*path, "quantize"), part.quantize)
        if part.quantize.scheme != "int8-static":
            yield (*path, "quantize", "scheme"), "is not int8-static, whose rounding can be rehearsed"
        if part.quantize.aware is not None:
            yield (*path, "quantize", "aware"), "is what a joint stage does; leave it out"


def _sparsify(path: Path, part: Sparsify) -> Iterator[Problem]:
    if part.criterion not in criteria.names():
        yield (*path, "criterion"), unknown(part.criterion, criteria.names(), "one of")
        return
    try:
        check_criterion(criteria.resolve(part.criterion))
        check_sparsity(part.sparsity, part.pattern)
    except SlivoError as error:
        yield path, f"is not valid: {error}"
        return
    if part.permute and ":" not in part.pattern:
        yield (*path, "permute"), "is for N:M patterns, such as 2:4; leave it out"


def _losses(path: Path, part: Distill) -> Iterator[Problem]:
    for index, loss in enumerate(part.losses):
        try:
            term = losses.build(loss)
        except RecipeError as error:
            yield (*path, "losses", index), f"is not valid: {error}"
            continue
        if part.cache is not None and part.cache.top_k is not None and on_sizes(term):
            yield (
                (*path, "losses", index),
                f"is {term.name}, which compares the size of logits, and top_k keeps probabilities; leave top_k out",
            )


def _order(kinds: Sequence[tuple[Path, Stage]]) -> Iterator[Problem]:
    """Yield stages that come too late: integers are not trained or cut, and an export is of what is final."""
    closed, shares = "", False
    for path, stage in kinds:
        kind = next(iter(stage.given))
        held = len(path) > 2
        part = stage.given[kind]
        integers = kind == "quantize" or (isinstance(part, Joint) and part.quantize is not None)
        if (integers or kind in ("export", "teach")) and held:
            yield path, f"is a {kind} stage inside {path[-3]}; it belongs after it, once"
        elif closed == "export" and kind != "export":
            yield path, f"comes after export; what is exported must be final: put {kind} before it"
        elif closed == "quantize" and kind != "export":
            yield path, f"comes after quantize; integers are neither trained nor cut: put {kind} before it"
        elif shares and kind in ("prune", "drop", "sparsify", "joint"):
            yield path, f"comes after share; what shares values must be final: put {kind} before it"
        elif shares and isinstance(part, Distill) and part.lora is not None:
            yield (*path, kind, "lora"), "comes after share, and adapters would undo it; leave lora out"
        shares = (shares or kind == "share") and kind != "teach"
        if integers or kind == "export":
            closed = "quantize" if integers else kind
