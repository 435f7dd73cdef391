"""Labels as targets of probes: categories, of which a model has one, and memberships, of which it has any number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of models, each predicted like a number from a column of zeros and ones.

    Attributes:
        names: of the labels.
        values: 1 where a model has the label, 0 where it has not, NaN in the whole row of a model that is not known.
        exclusive: whether a model has exactly one of them.
        note: what a reader has to know of them, or empty.
    """

    names: tuple[str, ...]
    values: Float[np.ndarray, "_models _labels"]
    exclusive: bool
    note: str = ""

    def members(self, truth: Float[np.ndarray, "test labels"]) -> Bool[np.ndarray, "test groups"]:
        """Tells the groups that balanced accuracy weighs alike: who has each category; who has and lacks each label."""
        has = truth == 1
        return has if self.exclusive else np.hstack([has, ~has])

    def answers(
        self, predicted: Float[np.ndarray, "test labels"], shares: Float[np.ndarray, " labels"]
    ) -> Bool[np.ndarray, "test groups"]:
        """Decides in which groups a probe places each model.

        A prediction estimates the probability of a label. The answer is the category whose probability is the largest
        multiple of its share among the training models, and "yes" to a label that is more probable than its share: by
        Bayes' rule the decisions with the greatest balanced accuracy.

        Args:
            predicted: one column a label.
            shares: how many of the training models have each label.
        """
        if not self.exclusive:
            yes = predicted > shares
            return np.hstack([yes, ~yes])
        multiple = np.divide(predicted, shares, out=np.full_like(predicted, -np.inf), where=shares > 0)
        answers: np.ndarray = multiple.argmax(axis=1)[:, None] == np.arange(len(self.names))
        return answers

    def chance(self, truth: Float[np.ndarray, "test labels"]) -> float:
        """Computes the balanced accuracy of one answer to every question, which is that of the commonest, too."""
        return 1 / int((truth == 1).any(axis=0).sum()) if self.exclusive else 0.5
