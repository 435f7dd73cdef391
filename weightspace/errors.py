"""Errors that a user can fix: each names the thing, its value and the fix.

The command line prints them as one line and exits with code 2; a traceback appears only with ``--debug``.
"""

from __future__ import annotations

DISTRIBUTION = "weightspace-hub"
"""What pip installs. On PyPI, ``weightspace`` is another project."""

REPOSITORY = "https://github.com/weightspace-hub/weightspace"


def install_command(extra: str = "") -> str:
    """Returns the command that installs this library from its repository, or an extra of the installed one."""
    requirement = f"{DISTRIBUTION}[{extra}]" if extra else f"{DISTRIBUTION} @ git+{REPOSITORY}"
    return f"pip install '{requirement}'"


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error of another library says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class WeightspaceError(Exception):
    """Base of every error that weightspace raises on purpose."""


UNFORESEEN = (ArithmeticError, LookupError, RecursionError, RuntimeError, TypeError, ValueError)
"""What other people's files may raise somewhere below; where many are handled, one must not end the rest."""


class CheckpointError(WeightspaceError):
    """A checkpoint file is missing, truncated, malformed or hostile."""


class HubError(WeightspaceError):
    """The Hugging Face Hub refuses, lacks or cannot deliver what was requested."""


class ArchitectureError(WeightspaceError):
    """Tensors do not fit the architecture that they are said to belong to."""


class TokenError(WeightspaceError):
    """Tensors cannot become tokens, or tokens cannot become tensors."""


class ZooError(WeightspaceError):
    """A zoo, an import folder or its metadata cannot be used as it is."""


class SettingsError(WeightspaceError):
    """A setting is unknown, has the wrong type or an impossible value."""
