"""Numbers as people read them: sensible digits, SI prefixes, powers of ten; "–" for a missing one."""

import math
import re
from collections.abc import Iterable, Sequence

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
BUDGETS = MATCHED | {
    "parameters": "seen tokens"
}  # what budgets count: equal tokens beside equal parameters


def plain(text: str) -> str:
    """Returns a text whose powers of ten read 3.02e14, for what knows no superscripts."""
    return text.replace(f" {TIMES} 10", "e").translate(PLAIN_DIGITS)


def fixed(number: float | None, digits: int = 3, missing: str = MISSING) -> str:
    return missing if number is None else f"{number:.{digits}f}"


def whole(number: float | None, missing: str = MISSING) -> str:
    return missing if number is None else f"{number:,.0f}"


def percent(share: float | None, missing: str = MISSING) -> str:
    return missing if share is None else f"{100 * share:.{0 if abs(share) >= 0.1 else 1}f}%"


def three_digits(number: float) -> str:
    """Three significant digits, without an exponent below a million."""
    if number == 0 or abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.{max(0, 2 - math.floor(math.log10(abs(number))))}f}"


def count(number: float | None, missing: str = MISSING) -> str:
    """A count of parameters or tokens: 6.82 M."""
    if number is None:
        return missing
    # 999,999 is 1.00 M: pick the unit after rounding to three digits.
    number = float(f"{number:.3g}")
    for size, unit in COUNTS:
        if abs(number) >= size:
            return three_digits(number / size) + unit
    return f"{number:,.0f}"


def spelled(name: str) -> str:
    """An architecture or objective as prose has it: "encoder-decoder", "prefix lm"."""
    return name.replace("encoder_decoder", "encoder-decoder").replace("_", " ")


def power(number: float | None, missing: str = MISSING) -> str:
    """A power of ten: 3.02 × 10¹⁴ (`plain` makes it ASCII)."""
    if number is None:
        return missing
    mantissa, exponent = f"{number:.2e}".split("e")
    return mantissa if int(exponent) == 0 else f"{mantissa} {TIMES} {ten(int(exponent))}"


def ten(exponent: int) -> str:
    return "10" + str(exponent).translate(SUPERSCRIPTS)


def prefixed(values: Iterable[float]) -> tuple[float, str]:
    """(divisor, SI prefix) that suits the largest of `values`."""
    largest = max(values, default=0)
    return next(((size, name) for size, name in PREFIXES if largest >= size), (1.0, ""))


def duration(seconds: float | None, missing: str = MISSING) -> str:
    if seconds is None:
        return missing
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def are(names: Sequence[str]) -> str:
    """The names as the subject of a sentence: a is; a, b and c are."""
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"


def extent(degrees: Sequence[str]) -> str:
    """The least and the greatest of several degrees, which begin with a number; of words all."""
    numbers = [re.match(r"(about )?(\d[\d,]*(\.\d+)?)", degree) for degree in degrees]
    order = [
        (float(found[2].replace(",", "")), degree)
        for found, degree in zip(numbers, degrees, strict=True)
        if found
    ]
    if len(degrees) < 2 or len(order) < len(degrees):
        return "; ".join(degrees)
    return f"{min(order)[1]} to {max(order)[1].removeprefix('about ')}"


def budget(
    match: str, amount: float, adaptation: float | None = None, size: str | None = None
) -> str:
    """The budget as a phrase: 3.00 × 10¹⁴ training FLOPs. adaptation: what study.adapt added to it. size: of the
    cells, where a study has several that do not compare."""
    words = power if match == "flops" else count
    phrase = f"{words(amount)} {BUDGETS.get(match, match)}"
    if adaptation is not None:
        phrase = f"{phrase} and {words(adaptation)} of adaptation"
    return phrase if size is None else f"size {size} and {phrase}"


def shortened(name: str, width: int, tail: int, gap: str) -> str:
    """The name in `width` letters: both ends of a long one, the last `tail` letters among them, for
    they tell cells apart."""
    if len(name) <= width:
        return name
    return name[: width - tail - len(gap)] + gap + name[-tail:]
