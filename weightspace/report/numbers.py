"""Numbers and names as a reader sees them, and the templates that show them."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

# From here on three decimals say nothing; a probe of raw weights can be off by powers of ten.
_MANY = 100
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def environment(*, escape: bool) -> Environment:
    """Returns the environment of the report's templates; ``escape`` makes texts inert in HTML."""
    made = Environment(
        loader=PackageLoader("weightspace.report"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "readable": readable, "difference": difference}
    return made


def decimals(value: int | float) -> str:
    """Formats with three decimals, with a power of ten from 100 on."""
    if abs(value) < _MANY:
        return signed(f"{value:z.3f}")
    mantissa, exponent = f"{value:.1e}".split("e")
    return signed(f"{mantissa}\N{MULTIPLICATION SIGN}10{str(int(exponent)).translate(_RAISED)}")


def percent(value: int | float) -> str:
    """Formats a share in percent with one decimal."""
    return signed(f"{100 * value:z.1f} %")


def signed(text: str) -> str:
    """Sets true minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def readable(name: str) -> str:
    """Turns ``test_accuracy`` into ``test accuracy``."""
    return name.replace("_", " ")


def difference(subject: str) -> str:
    """Sets a true minus sign between the models whose difference a record is about."""
    return subject.replace(" - ", " \N{MINUS SIGN} ")
