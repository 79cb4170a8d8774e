"""Sequences: a teacher's own training, what a model says when it goes on by itself, and learning from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slivo.distill._tensors import class_indices, first_tensor, shape
from slivo.distill.objective import attended
from slivo.errors import RecipeError, ShapeError, SlivoError
from slivo.graph.capture import evaluating

Batch = Any
Objective = Callable[[nn.Module, Batch], dict[str, Tensor]]


def _named(model: nn.Module, tokens: Tensor) -> Any:
    return model(tokens)


def _called(model: nn.Module, batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch if isinstance(batch, Tensor) else batch[0])


def causal_language_model(
    *,
    forward: Callable[[nn.Module, Batch], Any] = _called,
    mask: Callable[[Batch], Tensor | None] = attended,
) -> Objective:
    """Return the objective by which a model learns to say the next token, such as a teacher before it teaches.

    Args:
        forward: ``(model, batch)`` to logits, shape (batch, tokens, vocabulary), or something with ``logits``; by
            default a mapping is the model's keyword arguments, and of a tuple or list the first item its argument.
        mask: Which tokens of a batch count, shape (batch, tokens); None for all. A token counts if it and the one
            before are no padding; one below 0 never does.

    Returns:
        A callable ``(model, batch)`` to ``{"next_token": loss}`` for `slivo.train.fit` or any loop. The tokens of a
        batch are the batch itself, its ``input_ids``, or its first item: integers of shape (batch, tokens). The loss is
        −log p(x_t | x_1 … x_{t−1}) in nats, the mean over tokens that count, computed in float32 at least; its
        exponential is the perplexity.

    Source: Radford, Narasimhan, Salimans, Sutskever 2018, "Improving Language Understanding by Generative
    Pre-Training" (no arXiv id), eq. 1.

    Example:
        >>> class Next(nn.Module):
        ...     def forward(self, tokens):
        ...         return 99.0 * nn.functional.one_hot((tokens + 1) % 5, 5)
        >>> causal_language_model()(Next(), torch.tensor([[2, 3, 4, 0]]))["next_token"].item()
        0.0
    """

    def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        tokens, counted = _tokens(batch), mask(batch)
        known = _counts(counted, tokens)
        logits = _logits(forward(model, batch), tokens)
        return {"next_token": _surprise(logits[:, :-1], tokens[:, 1:], known[:, 1:] & known[:, :-1])}

    return objective


def masked_language_model(
    mask_id: int,
    vocabulary: int,
    *,
    share: float = 0.15,
    special: Sequence[int] = (),
    forward: Callable[[nn.Module, Batch], Any] = _called,
    mask: Callable[[Batch], Tensor | None] = attended,
) -> Objective:
    """Return the objective by which a model learns to fill in hidden tokens, such as a teacher before it teaches.

    Each batch is hidden anew, by `mask_tokens`; `slivo.train.fit` seeds what is drawn. Whoever has a tokenizer of
    transformers may as well train on what its ``DataCollatorForLanguageModeling`` gives, by the model's own loss
    (``lambda model, batch: {"labels": model(**batch).loss}``): the same rule, for which a tokenizer's class is needed.

    Args:
        mask_id: The token that stands for hidden ones.
        vocabulary: How many tokens there are.
        share: How likely a token is hidden.
        special: Tokens that never are, such as those of the beginning, the end and the padding.
        forward: As in `causal_language_model`.
        mask: Which tokens of a batch count, shape (batch, tokens), and may be hidden; None for all.

    Returns:
        A callable ``(model, batch)`` to ``{"masked_token": loss}`` for `slivo.train.fit` or any loop, of batches as in
        `causal_language_model`. The loss is −log p(x_t | the text with tokens hidden) in nats, the mean over the tokens
        that were chosen; 0 where none was.

    Raises:
        RecipeError: If an option is out of range.

    Source: Devlin, Chang, Lee, Toutanova 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language
    Understanding", arXiv:1810.04805, section 3.1.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        >>> list(masked_language_model(9, 10)(model, torch.randint(9, (2, 6))))
        ['masked_token']
    """
    _check_hiding(mask_id, vocabulary, share, special)

    def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        tokens, counted = _tokens(batch), mask(batch)
        hidden, chosen = mask_tokens(tokens, mask_id, vocabulary, share=share, special=special, counted=counted)
        logits = _logits(forward(model, _with_tokens(batch, hidden)), tokens)
        return {"masked_token": _surprise(logits, tokens, chosen)}

    return objective


def mask_tokens(
    tokens: Tensor,
    mask_id: int,
    vocabulary: int,
    *,
    share: float = 0.15,
    special: Sequence[int] = (),
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide tokens at random, to have a model fill them in.

    Of the tokens that are chosen 80 % become ``mask_id``, 10 % any token of the vocabulary, and 10 % stay, so that a
    model must know what every token is, and not only where there is a hole.

    Args:
        tokens: Integers of shape (batch, tokens); not changed.
        mask_id: As in `masked_language_model`.
        vocabulary: As there.
        share: How likely each is chosen.
        special: Tokens that are never chosen.
        counted: Which may be chosen, shape (batch, tokens); None for all.

    Returns:
        The tokens with some hidden, and which were chosen, booleans. Drawn from PyTorch's generator.

    Raises:
        RecipeError: If an option is out of range.
        ShapeError: If these are no tokens, or ``counted`` is not of them.

    Source: Devlin, Chang, Lee, Toutanova 2018, arXiv:1810.04805, section 3.1.

    Example:
        >>> hidden, chosen = mask_tokens(torch.tensor([[0, 5, 6, 1]]), 9, 10, share=1.0, special=[0, 1])
        >>> chosen.tolist()
        [[False, True, True, False]]
    """
    _check_hiding(mask_id, vocabulary, share, special)
    known = _counts(counted, _tokens(tokens))
    known &= ~torch.isin(tokens, torch.tensor(list(special), dtype=tokens.dtype, device=tokens.device))
    chosen = known & (torch.rand(tokens.shape, device=tokens.device) < share)
    fate = torch.rand(tokens.shape, device=tokens.device)
    others = torch.randint(vocabulary, tokens.shape, dtype=tokens.dtype, device=tokens.device)
    hidden = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, others, tokens))
    return torch.where(chosen, hidden, tokens), chosen


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
            last = _logits(forward(model, tokens), tokens)[:, -1].float()
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


def _logits(output: Any, tokens: Tensor) -> Tensor:
    """Return the logits of an output, one row for each token."""
    logits = first_tensor(output)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        said = "no tensor" if logits is None else shape(logits)
        wanted = "logits are (batch, tokens, vocabulary)"
        raise ShapeError(f"the model gives out {said} for tokens {shape(tokens)}; {wanted}")
    return logits


def _tokens(batch: Batch) -> Tensor:
    """Return the tokens of a batch: itself, its ``input_ids``, or its first item."""
    found = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if isinstance(batch, list | tuple):
        found = batch[0] if batch else None
    if not isinstance(found, Tensor) or found.dim() != 2 or found.is_floating_point() or found.dtype == torch.bool:
        said = f"{found.dtype} of shape {shape(found)}" if isinstance(found, Tensor) else type(found).__name__
        raise ShapeError(
            f"the tokens of a batch are {said}; they must be integers (batch, tokens): the batch itself, its input_ids "
            "or its first item"
        )
    return found


def _with_tokens(batch: Batch, tokens: Tensor) -> Batch:
    """Return a batch with other tokens."""
    if isinstance(batch, Tensor):
        return tokens
    return {**batch, "input_ids": tokens} if isinstance(batch, Mapping) else [tokens, *batch[1:]]


def _counts(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Return which tokens count."""
    if mask is not None and mask.shape != tokens.shape:
        raise ShapeError(f"mask has shape {shape(mask)}; there must be one for each token, shape {shape(tokens)}")
    return tokens >= 0 if mask is None else mask.bool() & (tokens >= 0)


def _surprise(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of −log p over the targets that count; 0, with a gradient, if none does."""
    rows = logits[counted].to(torch.promote_types(logits.dtype, torch.float32))
    right = class_indices(targets[counted], logits.shape[-1])
    return F.cross_entropy(rows, right, reduction="sum") / max(len(right), 1)


def _check_hiding(mask_id: int, vocabulary: int, share: float, special: Sequence[int]) -> None:
    if not 0 < share <= 1:
        raise RecipeError(f"share is {share}; it must be above 0, and 1 at most")
    wrong = [token for token in (mask_id, *special) if not 0 <= token < vocabulary]
    if wrong:
        raise RecipeError(f"token {wrong[0]} is none of a vocabulary of {vocabulary}; allowed: 0 to {vocabulary - 1}")
