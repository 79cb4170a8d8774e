"""Losses between transformers. One function each; the name in recipes is the function's.

Hidden states are (batch, tokens, features) or (batch, features); maps (batch, channels, *space) are taken for tokens.
``mask`` says which tokens count, True or 1, shape (batch, tokens); it comes out of the batch by itself
(``attention_mask``) and is of no account for activations without tokens. All losses are pure, scalar, computed in
float32 at least, let no gradient flow into the teacher, and are means over the tokens that count: no padding changes
them. Where none counts they are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slivo.distill._maps import Adapter, fitted
from slivo.distill._probabilities import kl, log_probabilities
from slivo.distill._tensors import gram, same_batch, shape, unit, widen
from slivo.errors import RecipeError, ShapeError


def hidden(student: Tensor, teacher: Tensor, mask: Tensor | None = None, adapter: Adapter | None = None) -> Tensor:
    """One minus the cosine between the hidden states of a token, from 0 (same direction) to 2.

    Args:
        student: Hidden states, shape (batch, tokens, features).
        teacher: Hidden states of as many tokens.
        mask: Which tokens count, shape (batch, tokens); None for all.
        adapter: Maps the student's features to the teacher's. `distillation` makes it by itself, where they differ in
            number.

    Returns:
        Scalar, the mean over tokens that count. States that are all 0 have no direction: their cosine is 0.

    Raises:
        ShapeError: If tokens differ, or features still do.

    Source: Sanh, Debut, Chaumond, Wolf 2019, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and
    lighter", arXiv:1910.01108, section 2.

    Example:
        >>> states = torch.ones(1, 2, 3)
        >>> hidden(states, -states, torch.tensor([[1, 0]])).item()
        2.0
    """
    student, teacher, counted = _states(student, teacher, mask, adapter)
    return _mean(1 - (unit(student) * unit(teacher)).sum(-1), counted)


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None, adapter: Adapter | None = None) -> Tensor:
    """Mean squared difference of hidden states or embeddings, over tokens and features.

    Args:
        student: Hidden states, shape (batch, tokens, features).
        teacher: Hidden states of as many tokens.
        mask: Which tokens count, shape (batch, tokens); None for all.
        adapter: Maps the student's features to the teacher's. `distillation` makes it by itself, where they differ in
            number.

    Returns:
        Scalar, the mean over tokens that count, and over features.

    Raises:
        ShapeError: If tokens differ, or features still do.

    Source: Jiao, Yin, Shang, Jiang, Chen, Li, Wang, Liu 2019, "TinyBERT: Distilling BERT for Natural Language
    Understanding", arXiv:1909.10351, eq. 8-9.

    Example:
        >>> states = torch.ones(1, 2, 3)
        >>> hidden_mse(states, torch.zeros(1, 2, 3), torch.tensor([[1, 0]])).item()
        1.0
    """
    student, teacher, counted = _states(student, teacher, mask, adapter)
    return _mean((student - teacher).square().mean(-1), counted)


def attention_maps(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of attention scores or probabilities, over heads and pairs of tokens.

    Needs a module that puts them out; fused attention keeps them to itself, and then `relation` and
    `attention_relation` do as well.

    Args:
        student: Scores before the softmax, or probabilities, shape (batch, heads, tokens, tokens).
        teacher: The same of the teacher. If it has another number of heads, the means over heads are compared.
        mask: Which tokens count, shape (batch, tokens); None for all. A pair counts if both do and neither model has
            masked it by minus infinity, or a score next to the least of its type.

    Returns:
        Scalar, the mean over pairs that count, and over heads.

    Raises:
        ShapeError: If these are no attention maps, or tokens differ.

    Source: Jiao, Yin, Shang, Jiang, Chen, Li, Wang, Liu 2019, "TinyBERT: Distilling BERT for Natural Language
    Understanding", arXiv:1909.10351, eq. 7.

    Example:
        >>> attention_maps(torch.ones(1, 2, 3, 3), torch.zeros(1, 4, 3, 3)).item()
        1.0
    """
    same_batch(student, teacher, least=4)
    tokens = student.shape[-1]
    if any(each.dim() != 4 or each.shape[2:] != (tokens, tokens) for each in (student, teacher)):
        raise ShapeError(
            f"student attention {shape(student)} and teacher attention {shape(teacher)} must both be (batch, heads, "
            "tokens, tokens), of the same tokens"
        )
    left_out = torch.zeros_like(teacher[:, :1], dtype=torch.bool)
    for each in (student, teacher):
        left_out = left_out | (each <= torch.finfo(each.dtype).min / 2).any(1, keepdim=True)
    if mask is not None:
        counted = _counted(mask, len(teacher), tokens)
        left_out = left_out | ~counted[:, None, None, :] | ~counted[:, None, :, None]
    student, teacher = (each.masked_fill(left_out, 0.0) for each in widen(student, teacher))
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (each.mean(1, keepdim=True) for each in (student, teacher))
    return _mean((student - teacher).square().mean(1), ~left_out[:, 0])


def relation(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, heads: int = 8) -> Tensor:
    """Kullback-Leibler divergence of how much the tokens of a sample attend to one another, by one of q, k and v.

    Tap the linear layer that makes the queries, the keys or the values, one term each, of the last block or a chosen
    one. Widths and numbers of heads may differ, because both are split into heads anew.

    Args:
        student: Queries, keys or values, shape (batch, tokens, features), or (batch, heads, tokens, features).
        teacher: The same of the teacher.
        mask: Which tokens count, shape (batch, tokens); None for all.
        heads: How many heads both are split into; must divide both widths. More tell more: the paper has 48 for 768.

    Returns:
        Scalar, KL(R_t ‖ R_s), the mean over heads and tokens that count, with R = softmax(X Xᵀ / √d) of a head, over
        the tokens that count, and d the width of a head.

    Raises:
        ShapeError: If tokens differ, or ``heads`` does not divide the widths.

    Source: Wang, Bao, Huang, Dong, Wei 2020, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing
    Pretrained Transformers", arXiv:2012.15828, section 3; of values alone as in MiniLM, arXiv:2002.10957, section 3.

    Example:
        >>> values = torch.eye(4).view(1, 2, 8)
        >>> relation(values, values.flip(-1), heads=1).item()
        0.0
    """
    return attention_relation([student, student], [teacher, teacher], mask, heads=heads)


def attention_relation(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None, *, heads: int = 8
) -> Tensor:
    """Kullback-Leibler divergence of the attention that queries and keys make, whose heads may differ in number.

    Args:
        student: Queries and keys, each (batch, tokens, features), or (batch, heads, tokens, features).
        teacher: The same of the teacher.
        mask: Which tokens count, shape (batch, tokens); None for all.
        heads: How many heads both are split into; must divide both widths. With the model's own number it is the
            attention itself, where positions are not rotated into it.

    Returns:
        Scalar, KL(A_t ‖ A_s), the mean over heads and tokens that count, with A = softmax(Q Kᵀ / √d) of a head, over
        the tokens that count, and d the width of a head.

    Raises:
        ShapeError: If there are not two places, tokens differ, or ``heads`` does not divide the widths.

    Source: Wang, Wei, Dong, Bao, Yang, Zhou 2020, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic
    Compression of Pre-Trained Transformers", arXiv:2002.10957, section 3.

    Example:
        >>> queries, keys = torch.eye(4).view(1, 2, 8), torch.ones(1, 2, 8)
        >>> attention_relation([queries, keys], [queries, 2 * keys], heads=4).item()
        0.0
    """
    if heads < 1:
        raise RecipeError(f"heads is {heads}; it must be 1 or more")
    if len(student) != 2 or len(teacher) != 2:
        raise ShapeError(
            f"there are {len(student)} places of the student and {len(teacher)} of the teacher; give the queries and "
            "the keys, as at={'…query': '…query', '…key': '…key'}"
        )
    pairs = [widen(*pair) for pair in zip(student, teacher, strict=True)]
    ours, theirs = ([_split(each, heads) for each in side] for side in zip(*pairs, strict=True))
    batch, _, tokens, _ = theirs[0].shape
    if any(each.shape[0] != batch or each.shape[2] != tokens for each in (*ours, *theirs)):
        raise ShapeError(
            f"student activations {shape(student[0])} and teacher activations {shape(teacher[0])} must be of the same "
            "batch and tokens"
        )
    counted = torch.ones(batch, tokens, dtype=torch.bool, device=theirs[0].device)
    if mask is not None:
        counted = _counted(mask, batch, tokens)
    left_out = ~counted[:, None, None, :]
    # What does not count may be anything, and must not reach the products.
    ours, theirs = ([each.masked_fill(left_out.mT, 0.0) for each in side] for side in (ours, theirs))
    scores = [gram(queries, keys) / math.sqrt(keys.shape[-1]) for queries, keys in (theirs, ours)]
    log_t, log_s = (log_probabilities(each, left_out.expand_as(each)) for each in scores)
    return _mean(kl(log_t, log_s).mean(1), counted)


def _states(
    student: Tensor, teacher: Tensor, mask: Tensor | None, adapter: Adapter | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, shape (..., features), and which of them count; those that do not are 0."""
    same_batch(student, teacher, least=2)
    kept = [each.shape[1:-1] if each.dim() == 3 else each.shape[2:] for each in (student, teacher)]
    if student.dim() != teacher.dim() or kept[0] != kept[1]:
        raise ShapeError(
            f"student states {shape(student)} and teacher states {shape(teacher)} are not of the same tokens"
        )
    student, teacher = widen(student, teacher)
    if mask is not None and student.dim() == 3:
        counted = _counted(mask, *student.shape[:2])
        # What does not count may be anything, and must not reach the adapter.
        student, teacher = (each.masked_fill(~counted[..., None], 0.0) for each in (student, teacher))
        return fitted(student, teacher, adapter), teacher, counted
    ours, theirs = (
        each.movedim(1, -1) if each.dim() > 3 else each for each in (fitted(student, teacher, adapter), teacher)
    )
    return ours, theirs, torch.ones_like(theirs[..., 0], dtype=torch.bool)


def _split(rows: Tensor, heads: int) -> Tensor:
    """Return (batch, heads, tokens, features of a head) of the features of all heads."""
    if rows.dim() == 4:
        rows = rows.transpose(1, 2).flatten(2)
    if rows.dim() != 3:
        raise ShapeError(f"activations {shape(rows)} must be (batch, tokens, features)")
    if rows.shape[-1] % heads:
        raise ShapeError(f"{heads} heads do not divide the {rows.shape[-1]} features of activations {shape(rows)}")
    return rows.reshape(*rows.shape[:2], heads, rows.shape[-1] // heads).transpose(1, 2)


def _counted(mask: Tensor, batch: int, tokens: int) -> Tensor:
    if mask.shape != (batch, tokens):
        raise ShapeError(f"mask has shape {shape(mask)}; there must be one for each token, shape {(batch, tokens)}")
    return mask.bool()


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean over what counts."""
    return values.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
