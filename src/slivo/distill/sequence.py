"""Sequences: what a model says when it goes on by itself, the teacher as a target, the student to be taught on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slivo.distill._tensors import first_tensor, shape
from slivo.errors import RecipeError, ShapeError, SlivoError
from slivo.graph.capture import evaluating

Batch = Any
Objective = Callable[[nn.Module, Batch], dict[str, Tensor]]


def _named(model: nn.Module, tokens: Tensor) -> Any:
    return model(tokens)


def continued(
    model: nn.Module,
    tokens: Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    end: int | None = None,
    forward: Callable[[nn.Module, Tensor], Any] = _named,
) -> Tensor:
    """Let a causal language model go on with token sequences, without gradients and in evaluation mode.

    Args:
        model: Gives logits of the next token at each place, shape (batch, tokens, vocabulary); any library's.
        tokens: Prompts, int64 of shape (batch, tokens), of one length.
        count: How many tokens to add.
        temperature: Of the drawing; 0 takes the likeliest. Drawn from PyTorch's generator.
        end: The token after which a sequence is over; what follows it is ``end`` again.
        forward: ``(model, tokens)`` to the output, logits or something with ``logits``.

    Returns:
        Prompts and what was added, shape (batch, tokens + count). The model runs on the whole sequence for every token,
        which any model can; for long texts use its library's own generation.

    Raises:
        RecipeError: If an option is out of range.
        ShapeError: If the model gives out no such logits.

    Example:
        >>> class Next(nn.Module):
        ...     def forward(self, tokens):
        ...         return 9.0 * nn.functional.one_hot((tokens + 1) % 5, 5)
        >>> continued(Next(), torch.tensor([[0, 1]]), 3, temperature=0)
        tensor([[0, 1, 2, 3, 4]])
    """
    if count < 1 or not (math.isfinite(temperature) and temperature >= 0):
        raise RecipeError(f"count is {count} and temperature {temperature}; allowed: 1 or more, 0 or more")
    over = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with evaluating(model), torch.no_grad():
        for _ in range(count):
            logits = first_tensor(forward(model, tokens))
            if logits is None or logits.dim() != 3 or logits.shape[:2] != tokens.shape:
                said = "no tensor" if logits is None else shape(logits)
                wanted = "logits are (batch, tokens, vocabulary)"
                raise ShapeError(f"the model gives out {said} for tokens {shape(tokens)}; {wanted}")
            last = logits[:, -1].float()
            if temperature == 0:
                chosen = last.argmax(-1)
            else:
                chosen = torch.multinomial((last / temperature).softmax(-1), 1).squeeze(1)
            if end is not None:
                chosen = torch.where(over, end, chosen)
                over = over | (chosen == end)
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    return tokens


def teacher_texts(
    teacher: nn.Module,
    prompts: Iterable[Tensor],
    count: int,
    *,
    temperature: float = 0.0,
    end: int | None = None,
    forward: Callable[[nn.Module, Tensor], Any] = _named,
) -> Iterator[Tensor]:
    """Return what a teacher says on prompts, to train a student on as if people had written it (sequence-level).

    Args:
        teacher: As for `continued`.
        prompts: Batches of prompts, as for `continued`.
        count: How many tokens to add.
        temperature: 0, the default, takes the likeliest token, near to the teacher's mode as in the paper (there by
            beam search); above 0 the targets are samples.
        end: As for `continued`.
        forward: As for `continued`.

    Yields:
        For each batch prompts and answers, shape (batch, tokens + count).

    Source: Kim, Rush 2016, "Sequence-Level Knowledge Distillation", arXiv:1606.07947, section 3.2.
    """
    for each in prompts:
        yield continued(teacher, each, count, temperature=temperature, end=end, forward=forward)


def on_policy(objective: Objective, sample: Callable[[nn.Module, Batch], Batch], *, share: float = 0.5) -> Objective:
    """Return an objective that teaches a part of the time on what the student itself says.

    A student that only ever sees what people or the teacher wrote does not learn what to say after its own mistakes.

    Args:
        objective: Of a distillation by losses on tokens, such as ``jsd`` or ``reverse_kl``; what its labels' loss does
            with batches that have none is its own affair (`slivo.distill.labelled`, or ``label_weight=0``).
        sample: ``(student, batch)`` to a batch of the same kind with what the student says, such as one made by
            `continued`; no gradient flows through it.
        share: Of the batches that are replaced, 0 to 1; drawn from PyTorch's generator, so that a training that is
            resumed draws the same.

    Returns:
        A callable ``(student, batch)`` to terms by name.

    Raises:
        RecipeError: If ``share`` is none.

    Source: Agarwal et al. 2023, "On-Policy Distillation of Language Models", arXiv:2306.13649, algorithm 1 (there λ).

    Example:
        >>> seen = []
        >>> def objective(model, batch):
        ...     seen.append(batch)
        ...     return {}
        >>> _ = on_policy(objective, lambda model, batch: batch + 1, share=1.0)(nn.Identity(), torch.zeros(()))
        >>> seen
        [tensor(1.)]
    """
    if not 0 <= share <= 1:
        raise RecipeError(f"share is {share}; it must be from 0 to 1")

    def mixed(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        # Drawn whatever the share is, so that it does not change what comes after.
        if float(torch.rand(())) < share:
            with torch.no_grad():
                batch = sample(model, batch)
        return objective(model, batch)

    return mixed


def check_vocabularies(student: Mapping[str, int] | Any, teacher: Mapping[str, int] | Any) -> None:
    """Look whether two models number the same tokens alike, without which their logits cannot be compared.

    Args:
        student: The numbers of tokens by text, or a tokenizer with ``get_vocab()``.
        teacher: The same of the teacher. It may know more tokens, of higher numbers.

    Raises:
        SlivoError: If tokens differ; says which, and what to do.

    Example:
        >>> check_vocabularies({"a": 0, "b": 1}, {"a": 0, "b": 1, "<pad>": 2})
    """
    ours, theirs = (each if isinstance(each, Mapping) else each.get_vocab() for each in (student, teacher))
    wrong = [text for text, number in ours.items() if theirs.get(text) != number]
    if wrong:
        shown = ", ".join([repr(text) for text in sorted(wrong)[:3]] + ["…"] * (len(wrong) > 3))
        raise SlivoError(
            f"student and teacher number {len(wrong)} of {len(ours)} tokens differently ({shown}): their logits say "
            "different things. Give the student the teacher's tokenizer, train it on what the teacher says as text "
            "(teacher_texts), or compare hidden states where both end a token (shared_places)"
        )


def shared_places(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places at which tokens of two tokenizers end at the same character, to compare hidden states there.

    Args:
        student: Where each token of a text ends, in characters, ascending, shape (tokens,); the second column of a
            tokenizer's ``offset_mapping``. Tokens of no text (special, padding) end at 0 and are left out.
        teacher: The same of the teacher's tokens.

    Returns:
        Places in the student's and in the teacher's sequence, int64, of one length: the last token of each stretch that
        both have read. Vocabularies differ, so that logits still cannot be compared.

    Example:
        >>> shared_places(torch.tensor([0, 3, 5, 9]), torch.tensor([0, 2, 5, 7, 9]))
        (tensor([2, 3]), tensor([2, 4]))
    """
    both = student[:, None] == teacher[None, :]
    both &= (student > 0)[:, None]
    # Of several tokens that end at one character the last has read as much as there is.
    for ends, dim in ((student, 1), (teacher, 0)):
        last = torch.cat([ends[1:] != ends[:-1], torch.ones(1, dtype=torch.bool, device=ends.device)])
        both &= last.unsqueeze(dim)
    ours, theirs = both.nonzero(as_tuple=True)
    return ours, theirs
