"""Numbers as people read them: sensible digits, SI prefixes, powers of ten."""

import math
from collections.abc import Sequence

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
PLAIN_DIGITS = {high: low for low, high in SUPERSCRIPTS.items()}
MISSING = "\u2013"  # en dash
TIMES = "\u00d7"
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
COUNTS = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))  # parameters, tokens

MATCHED = {
    "flops": "training FLOPs",
    "seen_tokens": "seen tokens",
    "target_tokens": "target tokens",
    "parameters": "parameters",
}


def finite(value: object) -> float | None:
    """`value` as a float, or None where it is missing, NaN or infinite."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def fixed(value: object, digits: int = 3, missing: str = MISSING) -> str:
    number = finite(value)
    return missing if number is None else f"{number:.{digits}f}"


def percent(share: object, missing: str = MISSING) -> str:
    number = finite(share)
    return missing if number is None else f"{100 * number:.{0 if abs(number) >= 0.1 else 1}f}%"


def three_digits(number: float) -> str:
    """Three significant digits, without an exponent below a million."""
    if number == 0 or abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.{max(0, 2 - math.floor(math.log10(abs(number))))}f}"


def count(value: object, missing: str = MISSING) -> str:
    """A count of parameters or tokens: 6.82 M."""
    number = finite(value)
    if number is None:
        return missing
    # 999,999 is 1.00 M: pick the unit after rounding to three digits.
    number = float(f"{number:.3g}")
    for size, unit in COUNTS:
        if abs(number) >= size:
            return three_digits(number / size) + unit
    return f"{number:,.0f}"


def power(value: object, missing: str = MISSING, plain: bool = False) -> str:
    """A power of ten: 3.02 × 10¹⁴, or 3.02e14 where `plain` (ASCII)."""
    number = finite(value)
    if number is None:
        return missing
    mantissa, exponent = f"{number:.2e}".split("e")
    if plain:
        return f"{mantissa}e{int(exponent)}"
    return mantissa if int(exponent) == 0 else f"{mantissa} {TIMES} {ten(int(exponent))}"


def ten(exponent: int) -> str:
    return "10" + str(exponent).translate(SUPERSCRIPTS)


def prefixed(values: Sequence[float]) -> tuple[float, str]:
    """(divisor, SI prefix) that suits the largest of `values`."""
    largest = max(values, default=0)
    return next(((size, name) for size, name in PREFIXES if largest >= size), (1.0, ""))


def duration(seconds: object, missing: str = MISSING) -> str:
    number = finite(seconds)
    if number is None:
        return missing
    if number < 60:
        return f"{number:.0f} s" if number >= 10 else f"{number:.1f} s"
    if number < 3600:
        return f"{number / 60:.1f} min"
    return f"{number / 3600:.1f} h"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def budget(match: str, amount: float, plain: bool = False) -> str:
    """The budget as a phrase: 3.00 × 10¹⁴ training FLOPs."""
    amount_text = power(amount, plain=plain) if match == "flops" else count(amount)
    return f"{amount_text} {MATCHED.get(match, match)}"
