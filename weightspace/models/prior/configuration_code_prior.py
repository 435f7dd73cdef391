"""Configuration of the prior of codes."""

from huggingface_hub.dataclasses import strict

from weightspace.models.prior.configuration_prior import ConditionedPriorConfig


@strict
class WeightCodePriorConfig(ConditionedPriorConfig):
    r"""Configures a [`WeightCodePriorModel`], besides what [`ConditionedPriorConfig`] does.

    Its autoencoder has `code_levels`.

    Args:
        number_size: width of what each number of a token's latent is predicted from.
    """

    model_type = "weight_code_prior"

    number_size: int = 32

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses sizes that do not fit each other."""
        super().validate_architecture()
        if self.number_size < 1:
            raise ValueError(f"number_size {self.number_size} must be at least 1")


__all__ = ["WeightCodePriorConfig"]
