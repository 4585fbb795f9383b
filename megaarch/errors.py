"""What a user can mend, told apart from what is a bug."""


class UserError(ValueError):
    """A mistake in what a user gave: one sentence that says what, where and what to do.

    Commands print it and end with code 2. Any other error is a bug and shows its traceback.
    """


class StorageError(UserError, OSError):
    """A disk or a file system that did not keep what was written, or does not give it back."""


def in_brief(error: BaseException) -> str:
    """Returns an error's type and the first line of what it says."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}"
