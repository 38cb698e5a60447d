"""What can end a run with one line instead of a traceback."""


def first_line(error: Exception) -> str:
    """First line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class InputError(ValueError):
    """Wrong input: one line that names the flag or file, what was found and what is expected."""


class ImageError(InputError):
    """An image that cannot be decoded."""


class RunError(Exception):
    """What ends a run that began well: one line, exit code 1."""
