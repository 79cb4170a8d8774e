"""Losses between activation maps of student and teacher. One function each; the name in recipes is the function's.

Where `slivo.distill.features` compares maps as they are, these look at their parts: at the sign of each unit, at each
channel or pair of channels, at what is predictable, at several places of the network at once. Activations are
(batch, features), (batch, tokens, features) or (batch, channels, *space). All losses are scalar, computed in float32 at
least, let no gradient flow into the teacher, and are means over the samples; without samples they are 0. Where maps
must be of one size, each is average-pooled to the smaller of both sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slivo.distill._maps import Adapter, Norm, aligned, exact, fitted, places, pointwise, pooled
from slivo.distill._probabilities import kl
from slivo.distill._tensors import gram, nothing, positive, same_batch, shape, unit, widen
from slivo.distill.adapt import adapted, channels
from slivo.distill.adapt import adapter as usual
from slivo.errors import ShapeError

_LEAST_VARIANCE = 1e-5
_FIRST_VARIANCE = 5.0


def ofd(student: Tensor, teacher: Tensor, adapter: Adapter | None = None) -> Tensor:
    """Squared difference to the teacher's activation before its ReLU, whose negative side counts little or not.

    Tap what goes into the ReLU: a batch norm as a rule.

    Args:
        student: Activations before a ReLU, shape (batch, features), (batch, tokens, features) or
            (batch, channels, *space).
        teacher: Activations of as many dimensions, before a ReLU.
        adapter: Maps the student's features to the teacher's. `distillation` makes it by itself, where they differ in
            number.

    Returns:
        Scalar, the mean over all entries of (s − t′)², and 0 where s ≤ t′ ≤ 0, with t′ = max(t, m) and m the margin of
        the channel: the mean of its negative entries in the batch. The paper has E[x | x < 0] of a normal distribution
        by the parameters of the batch norm before; it is the same quantity, and asks for no such layer. (The authors
        sum over a sample's entries and multiply by 0.001.)

    Raises:
        ShapeError: If the features still differ in number.

    Source: Heo, Kim, Yun, Park, Kwak, Choi 2019, "A Comprehensive Overhaul of Feature Distillation", arXiv:1904.01866,
    section 3.

    Example:
        >>> ofd(torch.tensor([[-5.0, 2.0]]), torch.tensor([[-1.0, 2.0]])).item()
        0.0
    """
    student, teacher = aligned(student, teacher)
    if not len(student):
        return nothing(student)
    student = fitted(student, teacher, adapter)
    target = torch.maximum(teacher, _margins(teacher))
    settled = (student <= target) & (target <= 0)
    return (student - target).masked_fill(settled, 0.0).square().mean()


def ab(student: Tensor, teacher: Tensor, adapter: Adapter | None = None, *, margin: float = 1.0) -> Tensor:
    """Squared hinge that asks the student's units to be on where the teacher's are, and off where they are off.

    Tap what goes into the ReLU. Asks for signs alone, and so suits the begin of a training (a `slivo.distill.Ramp` of
    the weight down to 0), not all of it.

    Args:
        student: Activations before a ReLU, shape (batch, features), (batch, tokens, features) or
            (batch, channels, *space).
        teacher: Activations of as many dimensions, before a ReLU.
        adapter: Maps the student's features to the teacher's. `distillation` makes it by itself, where they differ in
            number.
        margin: How far beyond 0, above 0, a student's activation must be to count as on or off.

    Returns:
        Scalar, the mean over all entries of max(0, m − s)² where t > 0 and of max(0, m + s)² elsewhere.

    Raises:
        ShapeError: If the features still differ in number.

    Source: Heo, Lee, Yun, Choi 2018, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
    Neurons", arXiv:1811.03233 (there the sum over entries).

    Example:
        >>> ab(torch.tensor([[2.0, -2.0]]), torch.tensor([[0.1, -0.1]])).item()
        0.0
    """
    positive("margin", margin)
    student, teacher = aligned(student, teacher)
    if not len(student):
        return nothing(student)
    student = fitted(student, teacher, adapter)
    return (margin - torch.where(teacher > 0, student, -student)).relu().square().mean()


def cwd(student: Tensor, teacher: Tensor, adapter: Adapter | None = None, *, temperature: float = 4.0) -> Tensor:
    """Kullback-Leibler divergence of where each channel is active, teacher to student, times T²: for dense prediction.

    Args:
        student: Activations or logits of a segmentation, shape (batch, channels, *space) or (batch, tokens, features).
        teacher: Activations of as many dimensions.
        adapter: Maps the student's channels to the teacher's. `distillation` makes it by itself, where they differ in
            number.
        temperature: T > 0 of the softmax over places.

    Returns:
        Scalar, T² KL(softmax(t / T) ‖ softmax(s / T)) over the places of a channel, the mean over samples and channels.

    Raises:
        ShapeError: If the activations have no places, or the channels still differ in number.

    Source: Shu, Liu, Gao, Yan, Shen 2020, "Channel-wise Knowledge Distillation for Dense Prediction",
    arXiv:2011.13256, section 3.

    Example:
        >>> maps = torch.eye(4).view(1, 1, 4, 4)
        >>> cwd(maps + 3, maps).item()
        0.0
    """
    positive("temperature", temperature)
    student, teacher = aligned(student, teacher)
    places(teacher)
    if not len(student):
        return nothing(student)
    pair = (teacher, fitted(student, teacher, adapter))
    log_t, log_s = ((places(each) / temperature).log_softmax(-1) for each in pair)
    return temperature**2 * kl(log_t, log_s).mean()


def ickd(student: Tensor, teacher: Tensor, adapter: Adapter | None = None) -> Tensor:
    """Squared difference of the similarities between the channels of a sample, each channel's of length 1.

    Args:
        student: Activations, shape (batch, channels, *space) or (batch, tokens, features).
        teacher: Activations of as many dimensions.
        adapter: Maps the student's channels to the teacher's. `distillation` makes it by itself, where they differ in
            number.

    Returns:
        Scalar, ‖G_s − G_t‖² / channels, the mean over samples, with G the products of all pairs of a sample's channel
        maps, its rows of Euclidean length 1: from 0 to 4.

    Raises:
        ShapeError: If the activations have no places, or the channels still differ in number.

    Source: Liu, Huang, Lin, Xie, Wang, Chang, Liang 2021, "Exploring Inter-Channel Correlation for
    Diversity-preserved Knowledge Distillation", arXiv:2202.03680, section 3.

    Example:
        >>> maps = torch.eye(4).view(1, 4, 2, 2)
        >>> ickd(3 * maps, maps).item()
        0.0
    """
    student, teacher = aligned(student, teacher)
    places(teacher)
    if not len(student):
        return nothing(student)
    maps = [places(each) for each in (fitted(student, teacher, adapter), teacher)]
    similarities = [unit(gram(rows, rows)) for rows in maps]
    return (similarities[0] - similarities[1]).square().sum(-1).mean()


class _Variational(nn.Module):
    """Three layers that predict the teacher's activation, and how far off each of its channels is."""

    def __init__(self, like: Tensor, ins: int, outs: int) -> None:
        super().__init__()
        layers = [pointwise(like, ins, outs), nn.ReLU(), pointwise(like, outs, outs), nn.ReLU()]
        self.mean = nn.Sequential(*layers, pointwise(like, outs, outs))
        first = math.log(math.expm1(_FIRST_VARIANCE - _LEAST_VARIANCE))
        self.scale = nn.Parameter(torch.full((outs,), first))

    def forward(self, activation: Tensor) -> Tensor:
        mean: Tensor = self.mean(activation)
        return mean


def _variational(student: Tensor, teacher: Tensor) -> nn.Module:
    made = _Variational(student, channels(student), channels(teacher))
    return made.to(widen(student, teacher)[0].dtype)


@adapted(_variational)
def vid(student: Tensor, teacher: Tensor, adapter: _Variational) -> Tensor:
    """Negative log-likelihood of the teacher's activation under a normal distribution that the student predicts.

    A lower bound of the mutual information: channels that cannot be predicted get a large variance and count little.

    Args:
        student: Activations, shape (batch, features), (batch, tokens, features) or (batch, channels, *space).
        teacher: Activations of as many dimensions; features may differ in number.
        adapter: Predicts the mean, by three layers with ReLU between, and has a variance for each of the teacher's
            channels, 5 at the begin. `distillation` makes it.

    Returns:
        Scalar, the mean over all entries of ((t − μ(s))² / σ² + log σ²) / 2, with σ² = softplus(α) + 10⁻⁵ for the
        channel. It goes below 0 where the prediction is good.

    Raises:
        ShapeError: If the activations do not fit.

    Source: Ahn, Hu, Damianou, Lawrence, Dai 2019, "Variational Information Distillation for Knowledge Transfer",
    arXiv:1904.05835, section 2.

    Example:
        >>> from slivo import losses
        >>> losses.vid(at="layer3").weight
        'auto'
    """
    student, teacher = aligned(student, teacher)
    if not len(student):
        return nothing(student)
    mean = fitted(student, teacher, adapter)
    variance = (F.softplus(adapter.scale) + _LEAST_VARIANCE).to(mean.dtype)
    if teacher.dim() > 3:
        variance = variance.view(-1, *(1,) * (teacher.dim() - 2))
    return (((teacher - mean).square() / variance + variance.log()) / 2).mean()


def _each(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.Module:
    """Make the usual adapter for each place."""
    _paired(student, teacher, least=2)
    made = (usual(*pair, seed=int(torch.randint(2**31, ()))) for pair in zip(student, teacher, strict=True))
    return nn.ModuleList([each or nn.Identity() for each in made])


@adapted(_each)
def fsp(student: Sequence[Tensor], teacher: Sequence[Tensor], adapter: Sequence[Adapter]) -> Tensor:
    """Squared difference of the flow from one place to the next: the products of the channels of both.

    Args:
        student: Activations at two or more places, in order, each (batch, channels, *space) or
            (batch, tokens, features).
        teacher: Activations at as many places. Sizes of space may differ.
        adapter: For each place what maps the student's channels to the teacher's, as it is where they are as many.
            `distillation` makes it.

    Returns:
        Scalar, the sum over neighboring places of ‖G_s − G_t‖² (squared Frobenius norm), the mean over samples, with
        G = F₁ F₂ᵀ / places, of shape (channels, channels), both pooled to the smaller of their sizes.

    Raises:
        ShapeError: If there are fewer than two places, or their activations do not fit.

    Source: Yim, Joo, Bae, Kim 2017, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
    Transfer Learning", CVPR (no arXiv id), eq. 1-2.

    Example:
        >>> from slivo import losses
        >>> losses.fsp(at={"layer1": "layer1", "layer2": "layer2"}).joint
        True
    """
    _paired(student, teacher, least=2)
    if not len(student[0]):
        return torch.stack([nothing(each) for each in student]).sum()
    maps = []
    for ours, theirs, fit in zip(student, teacher, adapter, strict=True):
        same_batch(ours, theirs, least=3)
        ours, theirs = widen(ours, theirs)
        with exact(ours):
            maps.append((fit(ours), theirs))
    flows = [[_flow(*pair) for pair in pairwise(side)] for side in zip(*maps, strict=True)]
    return torch.stack([(s - t).square().sum((-1, -2)).mean() for s, t in zip(*flows, strict=True)]).sum()


class _Review(nn.Module):
    """Fuses a student's maps from the last to the first, each with what comes from above."""

    def __init__(self, ins: Sequence[int], outs: Sequence[int]) -> None:
        super().__init__()
        inner = min(512, ins[-1])
        self.enter = nn.ModuleList(_convolution(count, inner, 1) for count in ins)
        self.choose = nn.ModuleList(nn.Conv2d(2 * inner, 2, 1) for _ in ins[:-1])
        self.leave = nn.ModuleList(_convolution(inner, count, 3) for count in outs)

    def forward(self, maps: Sequence[Tensor], sizes: Sequence[list[int]]) -> list[Tensor]:
        """Return maps like the teacher's, in the order given, of given heights and widths."""
        found: list[Tensor] = []
        above: Tensor | None = None
        for index in reversed(range(len(maps))):
            here: Tensor = self.enter[index](maps[index])
            if above is not None:
                above = F.interpolate(above, here.shape[2:])
                shares = self.choose[index](torch.cat([here, above], 1)).sigmoid()
                here = here * shares[:, :1] + above * shares[:, 1:]
            above = here
            size = sizes[index]
            found.append(self.leave[index](here if list(here.shape[2:]) == size else F.interpolate(here, size)))
        return found[::-1]


def _review(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.Module:
    _only_maps(student, teacher)
    made = _Review([each.shape[1] for each in student], [each.shape[1] for each in teacher])
    return made.to(widen(student[0], teacher[0])[0].dtype)


@adapted(_review)
def review(student: Sequence[Tensor], teacher: Sequence[Tensor], adapter: Callable[..., list[Tensor]]) -> Tensor:
    """Squared difference of maps and of their averages on coarser grids, the student's fused from the top down.

    Each of the teacher's maps is compared with what the student knows there and at all later places. The authors raise
    the weight from 0 over the first 20 epochs: ``weight=Ramp(0, 1, until=0.1)``.

    Args:
        student: Maps at one or more places, from first to last, each (batch, channels, height, width).
        teacher: Maps at as many places.
        adapter: Fuses the student's maps: a 1x1 convolution each, two attention maps that choose between it and what
            comes from above, and a 3x3 convolution to the teacher's channels. `distillation` makes it.

    Returns:
        Scalar, the sum over places of Σ_l w_l MSE_l / Σ_l w_l, where l runs over the full size (w = 1) and the
        averages on grids of 4x4, 2x2 and 1x1 that are smaller than it, w being halved at each.

    Raises:
        ShapeError: If the activations are no maps, or as many places are not given for both.

    Source: Chen, Liu, Zhao, Jia 2021, "Distilling Knowledge via Knowledge Review", arXiv:2104.09044, section 3.

    Example:
        >>> from slivo import losses
        >>> losses.review(at={"layer2": "layer2", "layer3": "layer3"}, weight=5).weight
        5.0
    """
    _only_maps(student, teacher)
    if not len(student[0]):
        return torch.stack([nothing(each) for each in student]).sum()
    pairs = [widen(*pair) for pair in zip(student, teacher, strict=True)]
    with exact(student[0]):
        fused = adapter([ours for ours, _ in pairs], [list(theirs.shape[2:]) for _, theirs in pairs])
    return torch.stack([_hierarchical(ours, theirs) for ours, (_, theirs) in zip(fused, pairs, strict=True)]).sum()


def _margins(teacher: Tensor) -> Tensor:
    """Return the mean of the negative entries of each channel, 0 if it has none."""
    over = [axis for axis in range(teacher.dim()) if axis != (teacher.dim() - 1 if teacher.dim() <= 3 else 1)]
    negative = teacher < 0
    return teacher.clamp(max=0).sum(over, keepdim=True) / negative.sum(over, keepdim=True).clamp(min=1)


def _flow(first: Tensor, second: Tensor) -> Tensor:
    """Return the products of the channels of two places, the mean over the coarser grid of both."""
    if first.dim() != second.dim():
        raise ShapeError(f"activations {shape(first)} and {shape(second)} must have one number of dimensions")
    space = slice(1, -1) if first.dim() == 3 else slice(2, None)
    size = [min(pair) for pair in zip(first.shape[space], second.shape[space], strict=True)]
    return gram(places(pooled(first, size)), places(pooled(second, size))) / math.prod(size)


def _hierarchical(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of maps and of their averages on grids of 4, 2 and 1."""
    if student.shape != teacher.shape:
        raise ShapeError(f"fused maps {shape(student)} and the teacher's {shape(teacher)} differ in shape")
    share, total, value = 1.0, 1.0, F.mse_loss(student, teacher)
    for side in (4, 2, 1):
        if side < min(teacher.shape[2:]):
            share /= 2
            total += share
            coarse = [F.adaptive_avg_pool2d(each, side) for each in (student, teacher)]
            value = value + share * F.mse_loss(coarse[0], coarse[1])
    return value / total


def _convolution(ins: int, outs: int, side: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(ins, outs, side, padding=side // 2, bias=False), Norm(outs))


def _paired(student: Sequence[Tensor], teacher: Sequence[Tensor], *, least: int) -> None:
    if len(student) != len(teacher) or len(student) < least:
        raise ShapeError(
            f"there are {len(student)} places of the student and {len(teacher)} of the teacher; there must be {least} "
            "or more, as many of both, such as at={'layer1': 'layer1', 'layer2': 'layer2'}"
        )


def _only_maps(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    _paired(student, teacher, least=1)
    for ours, theirs in zip(student, teacher, strict=True):
        same_batch(ours, theirs, least=2)
        if ours.dim() != 4 or theirs.dim() != 4:
            raise ShapeError(
                f"student activations {shape(ours)} and teacher activations {shape(theirs)} must be maps (batch, "
                "channels, height, width)"
            )
