"""What every JSON record is made of: numbers that are finite or None, keys that this version may not know, and
the machine that measured.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator

from megaarch.files import Schema

LARGEST = 1e300  # sums and ratios of such numbers are floats still


def _number(value: Any, as_float: ValidatorFunctionWrapHandler) -> int | float | None:
    """A number as it stands (integers stay integers), None for one that is not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    value = None if is_number and not abs(value) < LARGEST else value
    as_float(value)
    return value


def _ends(interval: Any) -> Any:
    """None in place of an interval one of whose ends is NaN or infinite."""
    if not isinstance(interval, list):
        return interval
    numbers = [end for end in interval if isinstance(end, int | float)]
    return interval if all(abs(end) < LARGEST for end in numbers) else None


Amount = Annotated[float, WrapValidator(_number)]
Number = Annotated[float | None, WrapValidator(_number)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Interval = Annotated[list[float] | None, Field(min_length=2, max_length=2), BeforeValidator(_ends)]


class Record(Schema):
    """A JSON object of which some keys are known."""

    model_config = ConfigDict(extra="allow")

    def as_json(self) -> dict[str, Any]:
        """The content of its file: the keys that were read or given."""
        return self.model_dump(exclude_unset=True)


class Hardware(Record):
    cpu: str | None = None
    cores: int | None = None
    gpu: str | None = None
    memory_gib: Number = None


class Machine(Record):
    """Where a process ran. commit: of the package's checkout."""

    hardware: Hardware | None = None
    versions: dict[str, str] | None = None
    commit: str | None = None
