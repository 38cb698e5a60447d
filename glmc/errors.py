"""Errors that end a run with one line instead of a traceback."""
import logging


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """Replace control characters, changes of direction and bytes that are no UTF-8 by escapes such as \\x1b."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


class PrintableFormatter(logging.Formatter):
    """Messages of the log with `printable` lines: names of others must not command the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def printable_lines(text: str) -> str:
    """Apply `printable` to each line of a text."""
    return '\n'.join(map(printable, text.split('\n')))


class InputError(ValueError):
    """Wrong input: one line that names the flag or file, the value found and the value expected."""


class ImageError(InputError):
    """An image that cannot be decoded."""


class RunError(Exception):
    """An error after the run has started: one line, exit code 1."""
