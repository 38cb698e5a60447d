"""Strict options: defaults < YAML file < command line. Each mistake is one line that says what to do."""
import argparse
import ast
import atexit
import difflib
import logging
import math
import multiprocessing
import os
import reprlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import yaml
from tqdm import tqdm

from glmc.errors import ImageError, InputError, RunError, printable

_logger = logging.getLogger(__name__)
EXIT_SECONDS = 3  # in which a process ends once its script has
Options = argparse.Namespace  # parsed options, by name
HELP = frozenset(('-h', '--help', '--help-all'))
MAX_YAML, MAX_BRACKETS = 2 ** 20, 1000  # bytes of a file of options; brackets, which nest
LOG_SECONDS = 30  # between two lines of a progress in a log file


class HelpFormatter(argparse.HelpFormatter):
    """argparse's help, with the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default, text = action.default, action.help or ''
        if default is None or default is False or default in ('', [], {}, argparse.SUPPRESS) or 'default' in text:
            return text
        values = default if isinstance(default, list) else [default]
        shown = ' '.join(f'{value:g}' if isinstance(value, float) else str(value) for value in values)
        return f'{text} (default: {shown})'


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviated flags, and defaults in the help.

    Args:
        verbatim: Print the description as it is, with its line breaks.
        **kwargs: Arguments of `argparse.ArgumentParser`.

    Attributes:
        resolve: Replaces aliases in the options, in place.
        presets: Options -> defaults that follow from them.
        hidden: Names of the options that only `--help-all` shows.
        obsolete: Removed options -> their default, which a YAML file may still contain.
    """

    def __init__(self, verbatim: bool = False, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter if verbatim else HelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)
        self.resolve: Callable[[Options], None] = lambda options: None
        self.obsolete: dict = {}
        self.presets: Callable[[argparse.Namespace], dict] = lambda options: {}
        self.hidden: frozenset[str] = frozenset()

    def hide(self, names: Iterable[str]) -> None:
        """Hide options from `--help` and add `--help-all`, which shows them."""
        self.hidden, self.usage = frozenset(names), '%(prog)s [options]'
        self.add_argument('--help-all', action=HelpAll, help='show all options and exit')

    def format_help(self) -> str:
        hidden = [(action, action.help) for action in self._actions if action.dest in self.hidden]
        if hidden:
            self.epilog = f'… {len(hidden)} more options: --help-all'
        for action, _ in hidden:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in hidden:
                action.help = text

    def error(self, message: str):
        raise InputError(message.removeprefix('argument '))

    def _check_value(self, action: argparse.Action, value) -> None:
        """Same check as argparse's, with a message that does not depend on the Python version."""
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}, expected one of {', '.join(choices)}{nearest(str(value), choices)}")


class HelpAll(argparse.Action):
    """`--help-all`: print the help of every option; an action's `full_help` replaces its `help`."""

    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Parser, namespace, values, option_string=None):
        parser.hidden = frozenset()
        for action in parser._actions:
            action.help = getattr(action, 'full_help', action.help)
        parser.print_help()
        parser.exit()


class ParseKwargs(argparse.Action):
    """KEY=VALUE options as in timm: a value is a Python literal, or else text."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for value in filter(None, values):
            key, equals, text = value.partition('=')
            if not equals:
                parser.error(f'{option_string}: expected KEY=VALUE, found {value!r}')
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pairs[key] = text
        setattr(namespace, self.dest, pairs)


def show_help(create_parser: Callable[[], Parser]) -> None:
    """Print the help and exit if the command line asks for it.

    The scripts call this before the imports of torch, timm and accelerate, which take seconds.

    Args:
        create_parser: Function that creates the parser.
    """
    if HELP.isdisjoint(sys.argv[1:]):
        return
    with suppress(InputError):  # of an earlier option; the script reports it
        create_parser().parse_args()


class ImageSize(argparse.Action):
    """`--img-size N` or `--img-size H W`, in pixels: an int, or a list of two different sides."""

    def options(self, values: list[int]) -> dict:
        """Return the options that the values set, by name."""
        if len(values) > 2:
            raise argparse.ArgumentError(self, f'expected N or H W, found {len(values)} values')
        return {'img_size': values[0] if len({*values}) == 1 else values}

    def __call__(self, parser: Parser, namespace, values, option_string=None):
        for name, value in self.options(values).items():
            setattr(namespace, name, value)


class InputSize(ImageSize):
    """`--input-size C H W`, as timm has it: same as --in-chans C --img-size H W; the last of these flags counts."""

    def options(self, values: list[int]) -> dict:
        if len(values) != 3 or values[0] not in (1, 3):
            raise argparse.ArgumentError(self, f"expected C H W with 1 or 3 channels, found {' '.join(map(str, values))}")
        return {'in_chans': values[0], **super().options(values[1:])}


def parse_args(parser: Parser, argv: list[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """Read the options from the YAML file of `--config` and the command line.

    Returns:
        The options, and the names of those that the user set.

    Raises:
        InputError: For an unknown, ill-typed or impossible option.
    """
    _reject_unknown_flags(parser, argv)
    options = parser.parse_args(argv)
    from_file = read_yaml(parser, options.config) if options.config else {}
    parser.set_defaults(**from_file)
    options = parser.parse_args(argv)
    parser.resolve(options)
    parser.set_defaults(**{**parser.presets(options), **from_file})
    options = parser.parse_args(argv)
    parser.resolve(options)
    explicit = set(vars(_parse_given(parser, argv))) | set(from_file)
    return options, explicit - {'config'}


def _reject_unknown_flags(parser: Parser, argv: list[str] | None) -> None:
    _, unknown = parser.parse_known_args(argv)
    for flag in (word.split('=')[0] for word in unknown if word.startswith('-')):
        raise InputError(f'{flag}: unknown option{nearest(flag, parser._option_string_actions)}')
    if unknown:
        raise InputError(f'{unknown[0]}: unexpected argument, expected options only')


def _parse_given(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line, without defaults."""
    defaults = [(action, action.default) for action in parser._actions]
    file_defaults, parser._defaults = parser._defaults, {}
    for action, _ in defaults:
        action.default = argparse.SUPPRESS
    try:
        return parser.parse_args(argv)
    finally:
        parser._defaults = file_defaults
        for action, default in defaults:
            action.default = default


def read_yaml(parser: Parser, path: str) -> dict:
    """Read options from a YAML file; each key and value is checked as on the command line.

    Raises:
        InputError: If the file cannot be read, or a key or value is not one of the parser's.
    """
    try:
        if os.path.exists(path) and not (os.path.isfile(path) and os.path.getsize(path) <= MAX_YAML):
            raise ValueError(f'expected a file of at most {MAX_YAML >> 10:,} KiB')
        text = Path(path).read_text(encoding='utf-8')
        if text.count('[') + text.count('{') > MAX_BRACKETS:
            raise ValueError(f'expected at most {MAX_BRACKETS:,} brackets')
        content = yaml.safe_load(text) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: numbers of thousands of digits
        raise InputError(f"--config {path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f'--config {path}: expected `option: value` lines, found a {type(content).__name__}')
    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'config', argparse.SUPPRESS)}
    options = {}
    for key, value in content.items():
        name = str(key).replace('-', '_')
        if name in parser.obsolete and value == parser.obsolete[name]:
            continue
        if name not in actions:
            raise InputError(f'--config {path}: unknown key {shortened(key)}{nearest(name[:80], actions)}')
        action, where = actions[name], f'--config {path}: {key}'
        if isinstance(action, ImageSize) and value is not None:
            sides = value if isinstance(value, list) and value else [value]
            try:
                options.update(action.options([_check_scalar(action, side, where) for side in sides]))
            except argparse.ArgumentError as error:
                raise InputError(f'{where}: {error.message}') from error
        else:
            options[name] = check_value(action, value, where)
    return options


def shortened(value) -> str:
    """The value as Python writes it, cut: a small file can describe a value of any size."""
    writer = reprlib.Repr()
    writer.maxlevel, writer.maxstring, writer.maxother, writer.maxlong = 2, 80, 80, 80
    return writer.repr(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean X?' for a misspelt name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f'; did you mean {close[0]}?' if close else ''


def check_value(action: argparse.Action, value, where: str):
    """Convert a value of YAML or Python to the option's type, or raise an InputError."""
    if value is None and action.default is None:
        return None
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f'{where}: expected true or false, found {shortened(value)}')
        return value
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise InputError(f'{where}: expected a mapping, found {shortened(value)}')
        return value
    if action.nargs is None:
        return _check_scalar(action, value, where)
    if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
        count = action.nargs if isinstance(action.nargs, int) else ''
        raise InputError(f'{where}: expected a list of {count} values, found {shortened(value)}'.replace('  ', ' '))
    return [_check_scalar(action, item, where) for item in value]


def _check_scalar(action: argparse.Action, value, where: str):
    convert = action.type or str
    expected = getattr(convert, '__name__', 'value')
    if isinstance(value, (bool, dict, list)) or value is None or (convert is str and not isinstance(value, str)):
        raise InputError(f'{where}: expected {expected}, found {shortened(value)}')
    try:
        converted = convert(str(value))
    except argparse.ArgumentTypeError as error:
        raise InputError(f'{where}: {error}') from error
    except ValueError as error:
        raise InputError(f'{where}: expected {expected}, found {shortened(value)}') from error
    if action.choices is not None and converted not in action.choices:
        raise InputError(f"{where}: expected one of {', '.join(map(str, action.choices))}; found {shortened(value)}")
    return converted


def pick(args: argparse.Namespace, names: Iterable[str]) -> dict:
    """Return the named options as keyword arguments."""
    return {name: getattr(args, name) for name in names}


def number(convert: type, low: float, high: float = float('inf'), open_low: bool = False) -> Callable[[str], float]:
    """argparse type: an int or float in [low, high], or in (low, high] with `open_low`."""
    def in_range(text: str):
        value = convert(text)
        if not (low <= value <= high and math.isfinite(value)) or (open_low and value == low):
            bounds = [f"{'>' if open_low else '>='} {low}"] if math.isfinite(low) else []
            bounds += [f'<= {high}'] if math.isfinite(high) else []
            expected = ' and '.join(bounds) or 'that is finite'
            raise argparse.ArgumentTypeError(f'expected a number {expected}, found {text}')
        return value
    in_range.__name__ = convert.__name__
    return in_range


def run_script(
        main: Callable[[], None], main_process: bool = True, debug: bool = False, exits: bool = False) -> int:
    """Run a script and print an expected error as one line on standard error.

    Args:
        main: The script.
        main_process: Whether to print errors that every process finds. An ImageError is always printed, because only
            one process finds it.
        debug: Show the traceback instead.
        exits: End this process a few seconds later, even if loader processes, a process group or a tracker hang.

    Returns:
        Exit code: 0, 1 for a run that failed, 2 for wrong input, 130 for an interrupt.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # a terminal may lack a character of a name
    try:
        main()
    except BaseException as error:
        code = _exit_code(error)
        if exits:
            _end_process(code)
        if debug or not isinstance(error, (InputError, RunError, KeyboardInterrupt, OSError)):
            raise
        if main_process or isinstance(error, ImageError):
            print('interrupted' if isinstance(error, KeyboardInterrupt) else f'error: {_one_line(error)}', file=sys.stderr)
        return code
    if exits:
        _end_process(0)
    return 0


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 2 if isinstance(error, InputError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _end_process(code: int) -> None:
    """Let the exit of this process run its handlers, but for some seconds only, and leave its objects to the system."""
    def exit_now() -> None:
        for child in multiprocessing.active_children():
            child.kill()
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def run_handlers() -> None:
        atexit.unregister(run_handlers)
        atexit._run_exitfuncs()
        exit_now()

    def wait() -> None:
        time.sleep(EXIT_SECONDS)
        exit_now()
    atexit.register(run_handlers)
    threading.Thread(target=wait, daemon=True).start()


def _one_line(error: Exception) -> str:
    """Return the message of an error without control characters; torch's loader workers wrap it in a traceback."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.filename is not None:  # a full disk, a file without permission
        text = f'{error.filename}: {error.strerror}'
    return printable(text.splitlines()[-1].split('Error: ', 1)[-1] if 'Original Traceback' in text else text)


class Progress:
    """Progress of a loop, shown by the main process: a moving line on a terminal, else a log line every LOG_SECONDS.

    Args:
        total: Number of items.
        unit: Plural of an item.
        name: Name of the loop, at the start of each line.
        done: Items that were finished before.
    """

    def __init__(self, total: int, unit: str = 'images', name: str = '', done: int = 0):
        self.total, self.unit, self.name, self.first, self.count = total, unit, name, done, done
        self.start = self.logged = time.perf_counter()
        shown = sys.stderr.isatty() and os.environ.get('RANK', '0') == '0'
        self.bar = tqdm(total=total, initial=done, desc=name or None, unit=f' {unit}', leave=False, disable=not shown)

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def update(self, items: int = 1) -> None:
        """Count more items."""
        self.show(self.count + items)

    def show(self, count: int) -> None:
        """Show that `count` of all items are done."""
        self.bar.update(count - self.count)
        self.count, now = count, time.perf_counter()
        if self.bar.disable and now - self.logged >= LOG_SECONDS:
            self.logged = now
            rate = (count - self.first) / (now - self.start)
            left = f', {duration((self.total - count) / rate)} left' if rate else ''
            start = f'{self.name}: ' if self.name else ''
            speed = f'{rate:,.0f}' if rate >= 10 else f'{rate:.2g}'
            _logger.info(f'{start}{count:,} of {self.total:,} {self.unit}, {speed} {self.unit}/s{left}')


def duration(seconds: float) -> str:
    """Format seconds as `8.2 s`, `42 s`, `12 min` or `3.4 h`."""
    if seconds < 100:
        return f'{seconds:.1f} s' if seconds < 9.95 else f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 6000 else f'{seconds / 3600:.1f} h'
