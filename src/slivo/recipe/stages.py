"""The stages: what each kind of step does to the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slivo import artifact, edits
from slivo.export import onnx
from slivo.export.bench import Running
from slivo.factorize import factorize
from slivo.graph.copies import duplicate
from slivo.measure import quality
from slivo.prune import Budget, drop, permute, sparsify, sparsity
from slivo.recipe.cuts import run_prune, timer_of
from slivo.recipe.joint import run_joint
from slivo.recipe.models import made
from slivo.recipe.plan import Step
from slivo.recipe.result import PACKED
from slivo.recipe.rounding import run_quantize
from slivo.recipe.schema import Distill, Drop, Export, Factorize, Fit, Keep, Share, Sparsify, Teacher
from slivo.recipe.work import Details, Outcome, Work, data, distilled, fitted, sample_inputs, weighing
from slivo.share import share


def run_teacher(work: Work, step: Step) -> Outcome:
    """Train the teacher, unless it is trained already."""
    details, history = _taught(work, step, work.teacher)
    return Outcome(work.teacher, details, history)


def run_member(work: Work, step: Step) -> Outcome:
    """Train one that teaches beside the teacher, unless it is trained already, and keep it."""
    index = step.path[-1]
    assert isinstance(index, int)
    model = made(work.others[index], work.seed)
    details, history = _taught(work, step, model)
    details[work.task.primary] = round(quality(model, work.task, "val")[work.task.primary], 6)
    work.others[index].save(model, work.member(index), {"role": step.label})
    return Outcome(work.student, details, history)


def _taught(work: Work, step: Step, model: nn.Module) -> tuple[Details, list[dict[str, Any]]]:
    """Train a teacher in place if its part of the recipe says so."""
    part = step.part
    assert isinstance(part, Teacher)
    if part.fit is None:
        model.eval()
        return {"model": part.model}, []
    return {"model": part.model, "epochs": part.fit.epochs}, fitted(work, step, model, part.fit, scratch=True)


def run_distill(work: Work, step: Step) -> Outcome:
    """Train the student by its teacher."""
    assert isinstance(step.part, Distill)
    return distilled(work, step.label, step.part)


def run_finetune(work: Work, step: Step) -> Outcome:
    """Train the student by labels alone."""
    part = step.part
    assert isinstance(part, Fit)
    student = duplicate(work.student)
    return Outcome(student, {"epochs": part.epochs}, fitted(work, step, student, part, scratch=False))


def run_drop(work: Work, step: Step) -> Outcome:
    """Take blocks out of the student."""
    part = step.part
    assert isinstance(part, Drop)
    keep = _budget(part.keep, work.pace)
    student = drop(
        work.student,
        work.task.example_inputs,
        keep=keep,
        only=part.only,
        exclude=part.exclude,
        batches=sample_inputs(work, part.samples),
    )
    made = edits.record(student)[-1]
    assert isinstance(made, edits.Drop)
    return Outcome(student, {"blocks": [block.module for block in made.blocks]}, [])


def _budget(keep: Keep, pace: float) -> Budget:
    """Return what may stay, its shares raised to the pace."""
    given = keep.model_dump(exclude_none=True)
    return Budget(**{name: value if name == "latency_ms" else value**pace for name, value in given.items()})


def run_teach(work: Work, step: Step) -> Outcome:
    """Hand on the student as it is: the run makes it the teacher."""
    del step
    return Outcome(work.student, {}, [])


def run_sparsify(work: Work, step: Step) -> Outcome:
    """Set weights of the student to zero."""
    part, task, student = step.part, work.task, work.student
    assert isinstance(part, Sparsify)
    options: Details = {
        "pattern": part.pattern,
        "criterion": part.criterion,
        "only": part.only,
        "exclude": part.exclude,
        **data(work, part),
    }
    if part.permute:
        student = permute(student, task.example_inputs, **options)
    with torch.random.fork_rng():
        torch.manual_seed(work.seed)  # of random choices
        student = sparsify(student, task.example_inputs, sparsity=part.sparsity, scope=part.scope, **options)
    details: Details = {"pattern": part.pattern, "criterion": part.criterion, "sparsity": round(sparsity(student), 6)}
    return Outcome(student, details, [])


def run_share(work: Work, step: Step) -> Outcome:
    """Let the student's weights take few different values."""
    part = step.part
    assert isinstance(part, Share)
    said: Details = part.model_dump(exclude={"weighed", "samples"})
    weighed = weighing(work, part.samples) if part.weighed else {}
    details: Details = {"clusters": part.clusters, "codebook": part.codebook}
    return Outcome(share(work.student, **said, **weighed), details, [])


def run_factorize(work: Work, step: Step) -> Outcome:
    """Put products of thin layers in the place of the student's wide ones."""
    part, task = step.part, work.task
    assert isinstance(part, Factorize)
    keep = None if part.keep is None else _budget(part.keep, work.pace)
    student = factorize(
        work.student,
        task.example_inputs,
        keep=keep,
        energy=part.energy,
        by=part.by,
        method=part.method,
        only=part.only,
        exclude=part.exclude,
        round_to=part.round_to,
        batches=sample_inputs(work, part.samples) if part.samples else None,
        timer=timer_of(task) if keep is not None and keep.timed else None,
    )
    made = edits.record(student)[-1]
    assert isinstance(made, edits.Factorize)
    return Outcome(student, {"layers": len(made.modules), "left": len(made.left), "method": part.method}, [])


def run_export(work: Work, step: Step) -> Outcome:
    """Write teacher and student as ONNX files, or the student as one that is packed; the student goes on unchanged."""
    assert isinstance(step.part, Export)
    if step.part.to == "packed":
        file = work.folder / PACKED
        packed = artifact.pack(work.student, file, factory=work.origin.factory, args=work.origin.args)
        return Outcome(work.student, {"to": "packed", "files": [file.name], "bytes": packed.bytes}, [])
    files = {name: work.folder / f"{name}.onnx" for name in ("teacher", "student")}
    for file, model in zip(files.values(), (work.teacher, work.student), strict=True):
        onnx.export(model, file, work.task.example_inputs)
    details: Details = {"to": "onnx", "files": [file.name for file in files.values()]}
    if work.task.kind.endswith("classification"):
        # Runtimes round otherwise than PyTorch; what they make of it must be seen, not assumed.
        found = quality(in_runtime(files["student"]), work.task, "val")[work.task.primary]
        details[f"{work.task.primary} in ONNX Runtime"] = round(found, 6)
    return Outcome(work.student, details, [])


STAGES: Mapping[str, Callable[[Work, Step], Outcome]] = {
    "teacher": run_teacher,
    "member": run_member,
    "prune": run_prune,
    "recover": run_distill,
    "distill": run_distill,
    "finetune": run_finetune,
    "drop": run_drop,
    "sparsify": run_sparsify,
    "share": run_share,
    "factorize": run_factorize,
    "quantize": run_quantize,
    "joint": run_joint,
    "teach": run_teach,
    "export": run_export,
}
"""What each kind of step does."""


def in_runtime(file: Path) -> nn.Module:
    """Return an exported network, run by ONNX Runtime."""
    run = onnx.runner(file)
    return Running(lambda *inputs: run(*(value.numpy() for value in inputs)))
