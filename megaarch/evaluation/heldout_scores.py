"""What a trained model scored on held-out text and tasks, as records hold it.

Files of other versions load: what an earlier one did not write has a default.
"""

from collections.abc import Iterable, Mapping

from pydantic import Field

from megaarch.evaluation.record_schema import Amount, Count, Interval, Number, Record


class Paired(Record):
    """The cost of each held-out item in bits (`amounts`), its document and its bytes (`sizes`)."""

    documents: list[Amount]
    sizes: list[Amount]
    amounts: list[Amount]


INTERVALS = {
    "continuation_bits_per_byte": "continuation_interval",
    "choice_accuracy": "choice_interval",
    "middle_bits_per_byte": "middle_interval",
    "prefix_gain": "prefix_gain_interval",
}


class Continuation(Record):
    """Continuations of one length in tokens.

    prefix_gain: what the same continuations cost more after the prefix of another document, in bits
    per byte; a model that ignores its prefix has a gain of 0. paired_gain: of each item.
    """

    bits_per_byte: Number
    interval: Interval = None
    prefix_gain: Number = None
    prefix_gain_interval: Interval = None
    items: Count = 0
    paired: Paired | None = None
    paired_gain: Paired | None = None


class TaskScore(Record):
    """Held-out items of one task. right: of each item the share of wordings in which the right choice
    wins. normalized_accuracy: by log-likelihoods over the bytes of a choice. exact_match: of the wordings
    without choices, and the accuracy too where there are no others. prior: the accuracy of always giving the
    answer that is commonest among the items to train on. by_shots: the same behind each number of
    answered examples, where a study asks for several; the rest is of the first of them. trained_on: whether the
    cell, or one whose weights it starts from, was trained on other items of the task. shortened: the share of
    prompts that lost an example, or the left end of a question, for lack of room; None: not counted."""

    accuracy: Number
    interval: Interval = None
    items: Count = 0
    chance: Number = None
    prior: Number = None
    right: list[Amount] | None = None
    normalized_accuracy: Number = None
    exact_match: Number = None
    exact_match_interval: Interval = None
    trained_on: bool = False
    shortened: Number = None
    by_wording: dict[str, Amount] = Field(default_factory=dict)
    by_shots: dict[str, "TaskScore"] = Field(default_factory=dict)


class Heldout(Record):
    """A cell's values on held-out text.

    *_interval: 95%, [low, high]. items: how many each value rests on. comparable: False where the
    continuation's value is a pseudo-likelihood. choice_right: 1 for each item chosen rightly.
    continuation: values by the continuation's length in tokens. prefix_gain: that of the longest.
    reads_prefix: whether the interval of this gain lies above 0; None where it was not measured.
    """

    continuation_bits_per_byte: Number
    continuation_bits_per_byte_raw: Number = None
    continuation_interval: Interval = None
    paired: Paired | None = None
    middle_bits_per_byte: Number = None
    middle_interval: Interval = None
    interval_kind: str | None = None
    comparable: bool = True
    items: dict[str, Count] = Field(default_factory=dict)
    choice_accuracy: Number = None
    choice_interval: Interval = None
    choice_right: list[int] | None = None
    continuation: dict[str, Continuation] = Field(default_factory=dict)
    prefix_gain: Number = None
    prefix_gain_interval: Interval = None
    reads_prefix: bool | None = None
    paired_middle: Paired | None = None
    paired_choice: Paired | None = None
    tasks: dict[str, TaskScore] = Field(default_factory=dict)

    def interval(self, measure: str = "continuation_bits_per_byte") -> list[float] | None:
        """[low, high] of one of INTERVALS' measures."""
        return getattr(self, INTERVALS[measure])


def shortened_prompts(scored: Iterable[Mapping[str, TaskScore]]) -> str | None:
    """Returns a sentence on the share of prompts that was shortened, of the model with the most, for each number
    of answered examples; None where none was."""
    most: dict[str, float] = {}
    for tasks in scored:
        shares: dict[str, list[float]] = {}
        for task in tasks.values():
            for number, score in (task.by_shots or {"": task}).items():
                if score.shortened is not None:
                    shares.setdefault(number, []).append(score.shortened)
        for number, each in shares.items():
            most[number] = max(most.get(number, 0.0), sum(each) / len(each))
    said = [
        f"{share:.1%}" + (f" with {number} examples" if number else "")
        for number, share in most.items()
        if share
    ]
    if not said:
        return None
    return (
        f"Prompts of tasks shortened to what training rows hold: {', '.join(said)}. They lack their first "
        "answered examples, or the left end of a question."
    )
