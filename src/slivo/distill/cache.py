"""A teacher whose answers are kept on disk, so that a distillation need not run it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slivo.distill.heads import of_path
from slivo.distill.objective import answers
from slivo.distill.records import DTYPES, Form, Rows, Store, create, identify, publish
from slivo.distill.taps import match
from slivo.distill.teacher import checksum, verify
from slivo.distill.views import Batch, Views, keys_of, ordered
from slivo.errors import ArtifactError, RecipeError, SlivoError
from slivo.graph.copies import duplicate

FORMAT = 1
"""Version of the format; a reader refuses any other."""

_MANIFEST = "cache.json"

# What may differ, the cause before its consequences, and how to say it.
_MADE_WITH = {
    "format": "format",
    "teacher": "the answers of a teacher with checksum",
    "samples": "a number of samples of",
    "views": "a number of views of",
    "seed": "views of seed",
    "data": "other data, or another transform in them: checksum",
    "augment": "another augmentation: checksum",
    "taps": "taps",
    "top_k": "top_k",
    "dtype": "dtype",
    "feature_dtype": "feature_dtype",
}

# How far an answer that is computed again may be from the kept one, as a share of the largest value. Other kernels,
# TF32 and half precision are within a hundredth; another input or another model is not.
_TOLERANCE = 0.02

Forward = Callable[[nn.Module, Batch], Any]


def cached(
    teacher: nn.Module,
    data: Views,
    folder: str | Path,
    *,
    taps: Iterable[str] = ("",),
    top_k: int | None = None,
    dtype: torch.dtype = torch.float32,
    feature_dtype: torch.dtype = torch.float16,
) -> Cached:
    """Return a teacher that is run once for each view of a sample, and remembers what it said in a folder.

    It takes the teacher's place in `slivo.distill` and `distillation`, for data that carry keys (`Views`). What is not
    in the folder yet is computed when it is asked for, or before by `fill`. Several processes may use one folder, and
    any of them may be killed at any time. An answer that was not kept whole is computed anew.

    Args:
        teacher: The model; run in evaluation mode, without gradients and without autocast; left as it was.
        data: The views that the student trains on.
        folder: Where the answers are; made when there is the first.
        taps: Modules whose outputs are kept: paths or patterns as in `slivo.distill.tap`; ``""`` is the model's output,
            and ``"[boxes]"`` one of several. A distillation may compare at these places and no others.
        top_k: How many of the output's classes are kept, the most probable ones; all if None. The others share what
            probability is left in equal parts. The output comes back as log-probabilities, so that losses on
            distributions (``kd``, ``dkd``, ``reverse_kl``) can use it and those on the logits' size (``mse``) cannot.
        dtype: What the output is kept in. float32 gives back to the bit what the teacher said, and takes little
            beside images.
        feature_dtype: What all other taps are kept in. float16 halves a large file, and its error of 1/2048 is far
            below what a student's features are off; values beyond its range are refused.

    Returns:
        The teacher with its memory.

    Raises:
        RecipeError: If an option is out of range.
        SlivoError: If a tap matches no module.
        ArtifactError: If the folder holds answers of another teacher, to other data, or kept otherwise; says what
            differs.

    Example:
        >>> import tempfile
        >>> from slivo import losses
        >>> from slivo.distill import distillation
        >>> from slivo.distill.views import loader
        >>> views = Views(torch.utils.data.TensorDataset(torch.eye(4), torch.arange(4) % 2))
        >>> teacher = cached(nn.Linear(4, 2), views, tempfile.mkdtemp())
        >>> objective = distillation(teacher, lambda model, batch: model(batch[0]), None, [losses.kd()], label_weight=0)
        >>> list(objective(nn.Linear(4, 2), next(iter(loader(views, batch_size=2, seed=0)))))
        ['kd']
        >>> len(teacher.missing())
        2
    """
    paths = tuple(
        dict.fromkeys(
            found
            for tap in taps
            for found in ([tap] if not tap or of_path(tap) else match(teacher, tap, role="teacher"))
        )
    )
    if not paths:
        raise RecipeError('there are no taps; give paths of modules, or "" for the output')
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1 or "" not in paths):
        raise RecipeError(f'top_k is {top_k}; a number of classes from 1 up, with the output ("") among the taps')
    for name, given in (("dtype", dtype), ("feature_dtype", feature_dtype)):
        if given not in DTYPES:
            raise RecipeError(f"{name} is {given}; it must be one of {', '.join(map(str, DTYPES))}")
    return Cached(teacher, data, Path(folder), paths, Form({}, dtype, feature_dtype, top_k), checksum(teacher))


def fill(
    cache: Cached,
    task_forward: Forward,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run a teacher on all views that its cache lacks, so that a training need not.

    Args:
        cache: The teacher with its memory; where its model is, it runs.
        task_forward: ``(model, batch)`` to the teacher's output, as the distillation gets it.
        batch_size: Samples that the teacher gets at once.
        workers: Processes that read the data.
        progress: Gets ``(views that are there, views in all)`` after each batch.

    Raises:
        ArtifactError: If the disk is full or the folder cannot be written to; what it holds stays good.

    Example:
        >>> import tempfile
        >>> views = Views(torch.utils.data.TensorDataset(torch.eye(4)), count=2)
        >>> cache = cached(nn.Linear(4, 2), views, tempfile.mkdtemp())
        >>> fill(cache, lambda model, batch: model(batch[0]), batch_size=5, progress=lambda *done: print(done))
        (5, 8)
        (8, 8)
    """
    missing = cache.missing()
    total = len(cache.data) * cache.data.count
    done = total - len(missing)
    device = next((tensor.device for tensor in cache.model.parameters()), torch.device("cpu"))
    for batch in ordered(cache.data, missing.tolist(), batch_size=batch_size, workers=workers):
        batch = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
        cache.outputs(task_forward, batch, ())
        done = min(total, done + batch_size)
        if progress is not None:
            progress(done, total)
    cache.sync()


class Cached:
    """A teacher with a memory, made by `cached`.

    Attributes:
        model: The teacher itself.
        data: The views that it has been asked for.
        folder: Where its answers are.
    """

    def __init__(
        self, model: nn.Module, data: Views, folder: Path, taps: tuple[str, ...], form: Form, digest: str
    ) -> None:
        self.model = model
        self.data = data
        self.folder = folder
        self._taps = taps
        self._form = form
        self._digest = digest
        self._version = _version(model)
        self._identity = {
            "format": FORMAT,
            "teacher": digest,
            **data.identity,
            "taps": list(taps),
            "top_k": form.top_k,
            "dtype": str(form.dtype).removeprefix("torch."),
            "feature_dtype": str(form.feature_dtype).removeprefix("torch."),
        }
        self._asked = 0
        self._store = self._open()

    @property
    def lesson(self) -> str:
        """What the answers depend on, in short: two are the same if the answers are."""
        return identify(self._identity, {})

    def outputs(self, forward: Forward, batch: Batch, paths: Sequence[str]) -> dict[str, Tensor]:
        """Return what modules of the teacher put out for a batch; what is not kept yet is computed and kept.

        Answers to the missing samples alone are computed, if a batch is tensors with a row for each sample, and to all
        if it is anything else. Now and then (at the first, second, fourth, eighth... time) one that is kept is computed
        again and compared, because inputs may have been mixed behind the data set, or the code of the model changed.

        Args:
            forward: ``(model, batch)`` to the model's output.
            batch: A batch of the views, with keys.
            paths: Modules that were tapped; ``""`` is the output.

        Returns:
            By path, on the batch's device, in float32 at least.

        Raises:
            SlivoError: If the batch has no keys of these views, a path was not tapped, the teacher changed, or the
                samples are not those that the answers were given for.
            ArtifactError: If the answers cannot be written.
        """
        untapped = [path for path in paths if path not in self._taps]
        if untapped:
            raise SlivoError(
                f"cache {self.folder} does not keep {untapped[0]!r} but {', '.join(map(repr, self._taps))}; "
                "fill another folder with taps=[...] that name it"
            )
        keys, device = self._keys(batch)
        positions = keys[:, 1] * len(self.data) + keys[:, 0]
        if self._store is None:
            rows, there = None, np.zeros(len(keys), bool)
        else:
            rows, there = self._store.read(positions)
            self._refuse_other_samples(keys, self._store.samples(rows), there)
            if there.any():
                self._compare_now_and_then(forward, batch, rows, int(np.flatnonzero(there)[0]))
        lacking = np.flatnonzero(~there)
        if len(lacking):
            fresh = self._learn(forward, batch, keys, lacking)
            rows = fresh if rows is None else rows
            rows[lacking] = fresh
        assert rows is not None
        return {path: self._form.decode(rows, path, device) for path in dict.fromkeys(paths)}

    def missing(self) -> NDArray[np.int64]:
        """Return the places, ``view * samples + sample``, whose answers are not there; reads the whole file."""
        places = np.arange(len(self.data) * self.data.count)
        if self._store is None:
            return places
        return np.concatenate(
            [part[~self._store.read(part)[1]] for part in np.split(places, range(256, len(places), 256))]
        )

    def to(self, device: torch.device) -> Cached:
        """Return one whose model is on a device; itself if it is."""
        if all(tensor.device == device for tensor in _tensors(self.model)):
            return self
        model = duplicate(self.model).to(device)
        return Cached(model, self.data, self.folder, self._taps, self._form, self._digest)

    def sync(self) -> None:
        """Wait until all answers are on the disk, where a power cut does not reach them."""
        if self._store is not None:
            self._store.sync()

    def _keys(self, batch: Batch) -> tuple[NDArray[np.int64], torch.device]:
        """Return a batch's keys, and where its answers are wanted."""
        found = keys_of(batch)
        keys = None if found is None else found.cpu()
        if found is None or keys is None or not self.data.holds(keys):
            raise SlivoError(
                "the batch has no keys of the views that the teacher's cache is for; train on them: distill with a "
                "task whose training data they are, or take batches of slivo.distill.views.loader(views, ...)"
            )
        return keys.numpy(), found.device

    def _open(self) -> Store | None:
        """Open the folder if there is something in it, and of this teacher."""
        path = self.folder / _MANIFEST
        try:
            stored = json.loads(path.read_text())
            shapes = {name: tuple(shape) for name, shape in stored["shapes"].items()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ArtifactError(f"cache {self.folder} cannot be read ({error}); remove it to fill it anew") from error
        for name, text in _MADE_WITH.items():
            there, here = stored.get(name), self._identity[name]
            if there != here:
                raise ArtifactError(
                    f"cache {self.folder} was made with {text} {_short(there)}, now {_short(here)}; "
                    "give another folder, or remove this one to fill it anew"
                )
        self._form = Form(shapes, self._form.dtype, self._form.feature_dtype, self._form.top_k)
        return Store(self.folder, identify(self._identity, shapes), self._form)

    def _make(self, shapes: Mapping[str, tuple[int, ...]]) -> Store:
        """Make the folder, now that the answers' shapes are known; another process may just have done so."""
        store = self._open()
        if store is not None:
            return store
        form = Form(shapes, self._form.dtype, self._form.feature_dtype, self._form.top_k)
        if form.top_k is not None and not form.top_k < (shapes[""] or (0,))[-1]:
            raise RecipeError(
                f"top_k is {form.top_k} and the teacher's output has shape {shapes['']} for a sample; it must be below "
                "the number of classes (leave it out to keep all)"
            )
        name = identify(self._identity, shapes)
        create(self.folder, name, form, len(self.data) * self.data.count)
        publish(self.folder / _MANIFEST, json.dumps({**self._identity, "shapes": shapes}, indent=1))
        self._form = form
        return Store(self.folder, name, form)

    def _learn(self, forward: Forward, batch: Batch, keys: NDArray[np.int64], lacking: NDArray[np.int64]) -> Rows:
        """Run the teacher on some samples of a batch, keep its answers, and return them as records."""
        version = _version(self.model)
        if version != self._version:
            verify(self.model, self._digest)
            self._version = version
        found = self._ask(forward, batch, len(keys), lacking)
        if self._store is None:
            self._store = self._make({path: tuple(value.shape[1:]) for path, value in found.items()})
        rows = self._form.encode(found, keys[lacking, 2])
        self._store.write(keys[lacking, 1] * len(self.data) + keys[lacking, 0], rows)
        return rows

    def _ask(self, forward: Forward, batch: Batch, size: int, wanted: NDArray[np.int64]) -> dict[str, Tensor]:
        """Run the teacher, on some samples of a batch if they can be taken out."""
        leaves = pytree.tree_leaves(batch)
        apart = all(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size for leaf in leaves)
        rows = torch.from_numpy(wanted)
        if apart and len(wanted) < size:
            batch = pytree.tree_map_only(Tensor, lambda tensor: tensor[rows.to(tensor.device)], batch)
        kinds = {tensor.device.type for tensor in leaves if isinstance(tensor, Tensor)}
        # What is kept must not hang on the precision of the training that happens to ask first.
        with torch.autocast(kinds.pop() if len(kinds) == 1 else "cpu", enabled=False):
            found = answers(self.model, forward, batch, self._taps)
        if apart or len(wanted) == size:
            return found
        return {path: value[rows.to(value.device)] for path, value in found.items()}

    def _refuse_other_samples(self, keys: NDArray[np.int64], kept: NDArray[np.int64], there: NDArray[np.bool_]) -> None:
        changed = np.flatnonzero(there & (kept != keys[:, 2]))
        if len(changed):
            sample, view = keys[changed[0], :2]
            raise SlivoError(
                f"sample {sample} in view {view} is not what the teacher saw when cache {self.folder} was filled: if "
                "the data changed, fill another folder; if not, something in them has a random generator of its own"
            )

    def _compare_now_and_then(self, forward: Forward, batch: Batch, rows: Rows, which: int) -> None:
        """Ask the teacher again for an answer that is kept, at times ever further apart."""
        self._asked += 1
        if self._asked & (self._asked - 1):
            return
        found = self._ask(forward, batch, len(rows), np.array([which]))
        again = self._form.encode(found, np.zeros(1, np.int64))
        for path in self._taps:
            new, old = (self._form.decode(each, path, torch.device("cpu")) for each in (again, rows))
            if not path and self._form.top_k is not None:
                new, old = new.exp(), old.exp()
            both = new[0].isfinite() & old[which].isfinite()
            far = float((new[0] - old[which])[both].abs().max()) if both.any() else 0.0
            if far > _TOLERANCE * float(old[old.isfinite()].abs().max()) + 1e-6:
                raise SlivoError(
                    f"the teacher now says otherwise at {path!r} than cache {self.folder} holds, by the same weights: "
                    "are inputs changed or mixed behind the views, or is the model's code or task_forward another? "
                    "Mix and change inputs in Views, or fill another folder"
                )


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _version(model: nn.Module) -> int:
    """Return a number that grows whenever a parameter or buffer is changed in place."""
    return sum(0 if tensor.is_inference() else tensor._version for tensor in _tensors(model))


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) else value
