"""Losses of weight space learning as pure functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F


def masked_mse(
    prediction: Float[Tensor, "batch n d"], target: Float[Tensor, "batch n d"], mask: Bool[Tensor, "batch n d"]
) -> Float[Tensor, ""]:
    """Mean squared error over valid entries, in units of the variance of the batch's valid target entries.

    With mean and standard deviation of the valid targets, ``tau = (t - mean) / std`` and
    ``tau_hat = (t_hat - mean) / std``; the error of the mean prediction is then 1 for every zoo, and padding weighs
    nothing, so that the balance with other losses means the same for each architecture (masked loss normalisation,
    Falk et al., arXiv 2510.02096).

    Args:
        prediction: decoded tokens.
        target: original tokens.
        mask: true where an entry is a weight and not padding.

    Returns:
        The loss; 0 for a batch without valid entries.
    """
    count = mask.sum().clamp(min=1)
    weight = mask.to(target.dtype)
    mean = (target * weight).sum() / count
    variance = ((target - mean).square() * weight).sum() / count
    error = ((prediction - target).square() * weight).sum() / count
    return error / variance.clamp(min=torch.finfo(target.dtype).eps)


def nt_xent(
    first: Float[Tensor, "batch d"], second: Float[Tensor, "batch d"], temperature: float = 0.1
) -> Float[Tensor, ""]:
    r"""Normalised temperature-scaled cross-entropy between two views of the same models (Chen et al., 2020, eq. 1).

    .. math:: l_{ij} = -\log \frac{\exp(s_{ij} / T)}{\sum_{k \ne i} \exp(s_{ik} / T)}

    with cosine similarities s, averaged over all 2N positive pairs of the 2N views.

    Args:
        first: row i is one view of model i.
        second: row i is the other view of model i.
        temperature: T; smaller values weigh the nearest negatives more.
    """
    views = F.normalize(torch.cat([first, second]), dim=-1)
    similarity = views @ views.T / temperature
    itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
    positives = torch.arange(len(views), device=views.device).roll(len(first))
    return F.cross_entropy(similarity.masked_fill(itself, float("-inf")), positives)


def pairwise_nt_xent(
    logits: Float[Tensor, "rows columns"], positives: Float[Tensor, "rows columns"]
) -> Float[Tensor, ""]:
    r"""NT-Xent between two towers where a row has any number of positives, averaged over both directions.

    .. math:: l_i = -\frac{1}{\sum_j p_{ij}} \sum_j p_{ij} \log \frac{\exp(z_{ij})}{\sum_k \exp(z_{ik})}

    With the identity as positives this is CLIP's loss (Radford et al., 2021); with sets of equal weights it is the
    supervised contrastive loss whose sum stands outside of the logarithm (Khosla et al., 2020, eq. 2), here across two
    towers. In a zoo many models share a dataset or a result, and the diagonal alone would push true pairs apart. Its
    lowest value is the entropy of the positives, not 0: log n for a row with n equal ones.

    Args:
        logits: similarities over the temperature.
        positives: weights, 0 or more, of what each row and each column belongs to. Rows and columns without positives
            are left out as anchors and stay as negatives of the others.

    Returns:
        The loss. 0 without any positive; 0, too, where a direction has but one candidate, which says nothing.
    """
    return (_towards_positives(logits, positives) + _towards_positives(logits.T, positives.T)) / 2


def _towards_positives(logits: Tensor, positives: Tensor) -> Tensor:
    total = positives.sum(1)
    shares = positives / torch.where(total > 0, total, 1.0).unsqueeze(1)
    anchors = (total > 0).sum().clamp(min=1)
    return -(shares * logits.log_softmax(1)).sum() / anchors


def gather_rows(values: Shaped[Tensor, "rows *d"]) -> Shaped[Tensor, "all_rows *d"]:
    """Stacks the rows of all processes in the order of their ranks, so that each sees the negatives of all.

    Gradients flow back to the process that a row comes from. Every process has to compute the whole loss from what it
    gathered; the mean that DistributedDataParallel takes of their gradients is then the gradient of one process with
    the whole batch. In a single process this returns ``values``.

    Args:
        values: equally many rows on each process.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    gathered: Tensor = _GatherRows.apply(values)
    return gathered


class _GatherRows(torch.autograd.Function):
    """``all_gather`` has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Each process has differentiated its own copy of the loss with respect to everybody's rows.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def behaviour_loss(
    logits: Float[Tensor, "models batch classes"], target_logits: Float[Tensor, "models batch classes"]
) -> Float[Tensor, ""]:
    """Distillation distance between reconstructed and original models on query inputs (Meynent et al., 2503.17138).

    The Kullback-Leibler divergence from the original's class distribution to the reconstruction's, in nats, averaged
    over inputs and models.
    """
    divergence = F.kl_div(
        F.log_softmax(logits, dim=-1), F.log_softmax(target_logits, dim=-1), log_target=True, reduction="none"
    )
    return divergence.sum(-1).mean()
