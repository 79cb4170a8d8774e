"""Search for recipes: many trials of one recipe's variations, by one worker or many, and what nothing beats."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from filelock import FileLock, Timeout
from torch import nn

from slivo.errors import OutputError, RecipeError, SlivoError
from slivo.files import write
from slivo.options import is_count, is_number, said
from slivo.recipe import Loaded, Watch
from slivo.recipe import folder as files
from slivo.recipe.load import load
from slivo.recipe.schema import Cost, Search
from slivo.recipe.text import near
from slivo.search import store
from slivo.search.derive import Choice, Parameter
from slivo.search.front import best, front
from slivo.search.ground import Ground, lay
from slivo.search.record import BEST, FILE, FORMAT, Row, text
from slivo.search.sensitivity import seal
from slivo.search.trial import asked
from slivo.search.work import Limits, begin, labor, waiting
from slivo.search.workers import many
from slivo.tasks import Task

if TYPE_CHECKING:
    import optuna

_STRATEGIES = "strategies"


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Args:
        rows: All trials, in their order.
        front: Those that are done and that no other beats in all respects, the cheapest first.
        best: The one to take; see `slivo.search.best`. None if no trial is done.
        objectives: The task's metric, and the costs.
        teacher: What was measured of the teacher.
        target: What the recipe asks for.
        waiting: Trials that were broken off, and are taken up when the search goes on.
        folder: Of the search.
        recipe: ``best.yaml``, or None.
    """

    rows: tuple[Row, ...]
    front: tuple[Row, ...]
    best: Row | None
    objectives: tuple[str, ...]
    teacher: Mapping[str, Any]
    target: Mapping[str, Any]
    waiting: int
    folder: Path
    recipe: Path | None


def _unheard(_: object) -> None:
    """Hear, and do nothing."""


def search(
    recipe: Loaded | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    trials: int,
    task: Task | None = None,
    model: nn.Module | None = None,
    costs: Sequence[str] = (),
    storage: str | None = None,
    jobs: int = 1,
    seed: int = 0,
    timeout: float | None = None,
    watch: Watch | None = None,
    tell: Callable[[Row], None] = _unheard,
    note: Callable[[str], None] = _unheard,
    heartbeat: int = store.HEARTBEAT,
) -> Found:
    """Try variations of a recipe, and keep those that nothing beats.

    The same call goes on with a search, and in another process or on another machine joins it.

    Args:
        recipe: Of `slivo.recipe.load`, or what that reads; its ``search`` says what is varied, and what it leaves out
            is derived from its stages.
        out: The folder of the search, with all that it writes.
        trials: How many there are to be, over all workers and starts.
        task: In place of what the recipe says.
        model: A trained teacher, in place of what the recipe says; left untouched.
        costs: ``macs``, ``params``, ``bytes`` or ``latency``, in place of the recipe's objectives; the task's metric
            on the validation data is always one.
        storage: URL of a database that workers share; SQLite in the folder by default.
        jobs: How many processes work here. The cores are shared among them, and latency that is measured by several
            at once is not worth much.
        seed: Of everything random, in each run too.
        timeout: Seconds; a run that is going on then is broken off and taken up when the search goes on.
        watch: Hears of each run, if there is one job.
        tell: Hears of each trial that is over.
        note: Hears in a line what is being prepared.
        heartbeat: Seconds between a worker's signs of life; trials of one that gave none for three times as long are
            taken over by others.

    Returns:
        All trials, the front and the best.

    Raises:
        RecipeError: If the recipe is not valid.
        OutputError: If the folder holds something else.
        SlivoError: If an option is wrong, the storage cannot be opened, or many trials fail one after another.

    Example:
        >>> import tempfile
        >>> from torch.utils.data import TensorDataset
        >>> from slivo.tasks import classification
        >>> data = TensorDataset(torch.randn(64, 8), torch.arange(64) % 2)
        >>> task = classification("noise", data, data, data, classes="ab", example_inputs=(torch.randn(2, 8),))
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> vary = {"stages.0.prune.criterion": ["l1", "l2"]}
        >>> recipe = {"stages": [{"prune": {"keep": {"macs": 0.5}}}], "search": {"vary": vary}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = search(recipe, folder, trials=1, task=task, model=net)
        >>> [row.state for row in found.rows], found.best.values[1] <= 0.5
        (['done'], True)
    """
    loaded = recipe if isinstance(recipe, Loaded) else load(recipe)
    given = {} if model is None else {"teacher": None}
    given |= {} if task is None else {"task": None}
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update=given))
    _check(trials, jobs, timeout, heartbeat, costs)
    chosen = tuple(costs) or tuple((loaded.recipe.search or Search()).objectives)
    options = Options(chosen, storage, seed, heartbeat, task, model)
    deadline = None if timeout is None else time.monotonic() + timeout
    going = _going(loaded, Path(out).absolute(), options, watch or Watch(), note)

    def heard(row: Row) -> None:
        going.write()
        tell(row)

    with store.saying(options.url(going.ground.out)):
        try:
            if jobs == 1:
                labor(going.study, going.ground, Limits(trials, deadline), watch=watch or Watch(), tell=heard)
            else:
                told = (loaded, going.ground.out, trials, options)
                many(jobs, told, deadline, lambda: store.rows(going.study), heard)
        finally:
            found = going.write()
    return found


@dataclass(frozen=True)
class Options:
    """What all workers of a search are told.

    Args:
        costs: The objectives beside the task's metric.
        storage: URL of the database; None for the default.
        seed: Of everything random.
        heartbeat: Seconds between signs of life.
        task: In place of what the recipe says.
        model: Likewise.
    """

    costs: tuple[str, ...]
    storage: str | None
    seed: int
    heartbeat: int
    task: Task | None
    model: nn.Module | None

    def url(self, out: Path) -> str:
        """Return where the study is."""
        return self.storage or store.default_url(out)


def join(
    loaded: Loaded, out: Path, trials: int, options: Options, *, timeout: float | None, stopped: Callable[[], bool]
) -> None:
    """Work on a search that has begun, until there are enough trials or somebody else wants it to end."""
    deadline = None if timeout is None else time.monotonic() + timeout
    going = _going(loaded, out, options, Watch(), _unheard)
    with store.saying(options.url(out)):
        labor(going.study, going.ground, Limits(trials, deadline, stopped), watch=Watch(), tell=_unheard)


@dataclass(frozen=True)
class _Going:
    """A search that goes on."""

    study: optuna.Study
    ground: Ground
    lock: FileLock

    def write(self) -> Found:
        """Write down what is known."""
        with self.lock:
            return write_down(self.ground, self.study)


def _going(loaded: Loaded, out: Path, options: Options, watch: Watch, note: Callable[[str], None]) -> _Going:
    """Open or join the study, and prepare what trials share."""
    weights = None if options.model is None else seal(options.model)
    digest = store.digest(loaded.recipe.plain(), options.seed, list(options.costs), weights)
    _claim(out, digest)
    name = f"{loaded.recipe.name or 'search'}-{digest[:12]}"
    with store.quiet():
        study = store.open_study(options.url(out), name, options.costs, seed=options.seed, heartbeat=options.heartbeat)
    lock = FileLock(out / ".lock")
    if not _free(lock):
        note("waiting for another worker, which prepares what all trials share")
    with lock, torch.random.fork_rng(devices=[]):
        ground = lay(
            loaded, out, seed=options.seed, costs=options.costs, task=options.task, model=options.model,
            strategies=study.user_attrs.get(_STRATEGIES), watch=watch, tell=note,
        )  # fmt: skip
        study.set_user_attr(_STRATEGIES, [arm.name for arm in ground.arms])
        begin(study, ground)
    return _Going(study, ground, lock)


def _check(trials: int, jobs: int, timeout: float | None, heartbeat: int, costs: Sequence[str]) -> None:
    for name, value in (("trials", trials), ("jobs", jobs), ("heartbeat", heartbeat)):
        if not is_count(value, least=1):
            raise SlivoError(f"{name} is {said(value)}; a whole number, 1 or more")
    if timeout is not None and not (is_number(timeout) and timeout > 0):
        raise SlivoError(f"timeout is {said(timeout)}; seconds, a number above 0")
    for name in costs:
        if name not in get_args(Cost) or list(costs).count(name) > 1:
            names = get_args(Cost)
            raise RecipeError(
                f"the cost {name} is none, or there twice; one of: {', '.join(names)}.{near(name, names)}"
            )


def _free(lock: FileLock) -> bool:
    try:
        with lock.acquire(timeout=0):
            return True
    except Timeout:
        return False


def _claim(folder: Path, digest: str) -> None:
    """Make the folder one of this search.

    Raises:
        OutputError: If it holds something else, or cannot be written to.
    """
    file = folder / FILE
    if not file.is_file():
        with files.making(folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            files.open_new(folder)
        except OutputError:
            if not file.is_file():  # else another worker was faster
                raise
        else:
            files.write_json(file, {"format": FORMAT, "digest": digest, "trials": []})
    if files.read_json(file).get("digest") != digest:
        raise OutputError(
            f"{folder} holds a search of another recipe, seed or objectives; give another folder (--out), or the same "
            "command as before"
        )


def write_down(ground: Ground, study: optuna.Study) -> Found:
    """Write ``search.json`` and ``best.yaml`` from what the study knows; returns that."""
    rows = store.rows(study)
    target = asked(ground)
    ahead, top = front(rows), best(rows, target)
    recipe = ground.out / BEST if top is not None else None
    if recipe is not None and top is not None:
        write(recipe, text(top.recipe, comment=_comment(ground, top)))
    digest = files.read_json(ground.out / FILE).get("digest")
    book = {
        "format": FORMAT,
        "digest": digest,
        "name": ground.loaded.recipe.name,
        "seed": ground.seed,
        "objectives": [ground.metric, *ground.costs],
        "target": target,
        "teacher": dict(ground.teacher),
        "recipe": ground.loaded.recipe.plain(),
        "space": {arm.name: [_told(each) for each in arm.parameters] for arm in ground.arms},
        "damages": dict(ground.damages or {}),
        "trials": [row.plain() for row in rows],
        "front": [row.number for row in ahead],
        "best": None if top is None else top.number,
    }
    files.write_json(ground.out / FILE, book)
    return Found(
        tuple(rows), tuple(ahead), top, (ground.metric, *ground.costs), ground.teacher, target, waiting(study),
        ground.out, recipe,
    )  # fmt: skip


def _told(parameter: Parameter) -> dict[str, Any]:
    if isinstance(parameter, Choice):
        return {"name": parameter.name, "values": list(parameter.values)}
    return {"name": parameter.name, "low": parameter.low, "high": parameter.high, "log": parameter.log}


def _comment(ground: Ground, row: Row) -> str:
    threads = torch.get_num_threads()
    seed = f" --seed {ground.seed}" if ground.seed else ""
    return (
        f"Trial {row.number} of a search. To have its student again, bit for bit, on the same machine with {threads} "
        f"thread{'s' * (threads > 1)}:\nslivo run {BEST}{seed}"
    )
