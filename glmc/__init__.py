"""GLMC: one-stage long-tailed image classification on timm (CVPR 2023, arXiv 2305.08661)."""
import sys

if {'-h', '--help', '--help-all'}.isdisjoint(sys.argv[1:]):  # a help needs no torch, whose import takes seconds
    from glmc import models as _models  # noqa: F401  registers its nets in timm

__version__ = '0.1.0'
