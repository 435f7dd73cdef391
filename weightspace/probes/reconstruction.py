"""How much of the models' function survives an autoencoder, beside PCA codes of the same size."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from weightspace.encoder import Encoder
from weightspace.evaluation.accuracy import compare_functions
from weightspace.probes.representations import fit_codes
from weightspace.probes.zoo import ENCODER
from weightspace.stats.resampling import RunBootstrap, pooled_interval
from weightspace.zoo.dataset import Zoo

ALL_ARCHITECTURES = "all"
_METHODS = (ENCODER, "PCA", "IncrementalPCA")


@dataclass(frozen=True)
class ReconstructionRow:
    """How well one method's decoded models do the originals' work.

    Attributes:
        method: ``"autoencoder"``, ``"PCA"``, ``"IncrementalPCA"``, ...
        architecture: name of the architecture, or ``ALL_ARCHITECTURES``.
        models: test models that were decoded.
        weights: numbers one model has (mean where they differ).
        latent_size: numbers that one model is decoded from (mean where they differ).
        original_accuracy: mean accuracy of the originals, as a fraction.
        decoded_accuracy: mean accuracy of the decoded models.
        kept: share of the originals' accuracy that is kept, over models better than chance.
        kept_low: lower end of its 95 % interval.
        kept_high: upper end.
        agreement: share of inputs that get the same class from both.
        relative_mse: squared error of the weights over their variance.
    """

    method: str
    architecture: str
    models: int
    weights: int | float
    latent_size: int | float
    original_accuracy: float
    decoded_accuracy: float
    kept: float
    kept_low: float
    kept_high: float
    agreement: float
    relative_mse: float


def reconstruction_table(zoo: Zoo, encoder: Encoder, test_runs: Collection[str]) -> list[ReconstructionRow]:
    """Compares the test models that the encoder decodes with the originals, and PCA's at the same size with both.

    PCA and IncrementalPCA are fitted for each architecture on all runs that are no test runs. Only models that are
    better than chance count.

    Args:
        zoo: the zoo that the encoder was trained on.
        encoder: the encoder.
        test_runs: ids of the runs that it was not trained on.
    """
    tested = zoo.index["run_id"].isin(test_runs).to_numpy()
    run_ids, names = zoo.index["run_id"].to_numpy(), family_names(zoo)
    frames: list[pd.DataFrame] = []
    for header, architecture in tqdm(zoo.architectures.items(), desc="reconstruct", leave=False):
        rows = np.flatnonzero((zoo.index["header"] == header).to_numpy())
        test, rest = rows[tested[rows]], rows[~tested[rows]]
        if not len(test) or len(rest) < 2:
            continue
        flat, size = zoo.flat(test), encoder.latent_size(architecture)
        for method in _METHODS:
            if method == ENCODER:
                decoded = encoder.reconstruct(flat, architecture)
            else:
                decoded = _decoded_by_pca(zoo, rest, flat, size, incremental=method == "IncrementalPCA")
            compared = compare_functions(zoo, test, flat, decoded, architecture)
            models = pd.DataFrame(
                {
                    "method": method,
                    "architecture": names[header],
                    "run": run_ids[compared.rows],
                    "original": compared.original,
                    "decoded": compared.decoded,
                    "agreement": compared.agreement,
                    "weights": architecture.numel,
                    "latent_size": size,
                    "relative_mse": float((decoded - flat).square().mean() / (flat - flat.mean(0)).square().mean()),
                    "header": header,
                }
            )
            frames.append(models[compared.learned])
    if not frames:
        return []
    table: list[ReconstructionRow] = []
    for _, models in pd.concat(frames).groupby("method", sort=False):
        parts = [part for _, part in models.groupby("header", sort=False)]
        table += [_summary(models, ALL_ARCHITECTURES)] if len(parts) > 1 else []
        table += [_summary(part, part["architecture"].iloc[0]) for part in parts]
    return table


def family_names(zoo: Zoo) -> dict[str, str]:
    """Names each header of a zoo by the family in its config, or by the digest of its architecture."""
    headers = zoo.index["header"].to_numpy()
    return {
        header: str((zoo.entry(int((headers == header).argmax())).config or {}).get("family", architecture.digest))
        for header, architecture in zoo.architectures.items()
    }


def _decoded_by_pca(
    zoo: Zoo, train: Int[np.ndarray, "train"], flat: Float[Tensor, "models params"], size: int, *, incremental: bool
) -> Float[Tensor, "models params"]:
    codes = fit_codes((batch.flat.numpy() for batch in zoo.batches(train)), size, incremental=incremental)
    return torch.from_numpy(codes.inverse_transform(codes.transform(flat.numpy()))).float()


def _summary(models: pd.DataFrame, architecture: str) -> ReconstructionRow:
    """Averages over models; the interval of the share kept is of a bootstrap over runs."""
    original, decoded, agreement = (models[name].to_numpy() for name in ("original", "decoded", "agreement"))
    bootstrap = RunBootstrap(models["run"].to_numpy(), np.random.default_rng(0))
    drawn = bootstrap.sums(np.stack([original, decoded], axis=1))
    low, high = pooled_interval([drawn[:, 1] / drawn[:, 0]])
    parts = models.groupby("header", sort=False)[["weights", "latent_size", "relative_mse"]]
    weights, latent_size, relative_mse = (
        float(np.average(values, weights=parts.size())) for _, values in parts.first().items()
    )
    return ReconstructionRow(
        method=models["method"].iloc[0],
        architecture=architecture,
        models=len(models),
        weights=weights,
        latent_size=latent_size,
        original_accuracy=float(original.mean()),
        decoded_accuracy=float(decoded.mean()),
        kept=float(decoded.mean() / original.mean()),
        kept_low=low,
        kept_high=high,
        agreement=float(agreement.mean()),
        relative_mse=relative_mse,
    )
