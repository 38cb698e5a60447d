"""GLMC: one-stage long-tailed image classification on timm (CVPR 2023, arXiv 2305.08661)."""
import os
import sys


def _end_on_interrupt(kind, error, trace) -> None:
    """Print one line for Ctrl-C while a script is starting; `cli.run_script` does it afterwards."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print('interrupted', file=sys.stderr, flush=True)
    os._exit(130)  # Python would end itself by the signal


if ''.join(sys.argv[:1]).endswith('_glmc.py') or any(word.startswith('glmc.') for word in sys.orig_argv[1:4]):
    sys.excepthook = _end_on_interrupt  # in the scripts and `python -m glmc.…` only

if {'-h', '--help', '--help-all'}.isdisjoint(sys.argv[1:]):  # a help needs no torch, whose import takes seconds
    from glmc import models as _models  # noqa: F401  registers its nets in timm

__version__ = '0.1.0'


def __getattr__(name: str):
    """Import `wrap` when it is used: a command does not need it."""
    if name == 'wrap':
        from glmc.library import wrap
        return wrap
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
