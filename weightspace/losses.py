"""Losses of weight space learning as pure functions of tensors."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
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
