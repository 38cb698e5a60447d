"""Imports go one way: a folder of glmc imports only from the folders above it (CONTRIBUTING.md)."""
import ast
from pathlib import Path

import pytest

import glmc

ROOT = Path(glmc.__file__).parent
LAYERS = [
    'errors', 'files', 'cli', 'config', 'data', 'mixing', 'models', 'losses', 'tasks', 'methods', 'evaluation',
    'training', 'run_folder', 'setup', 'export', 'report', 'stage2', 'predict', 'sweep', 'benchmark', 'hub']
SEES_OPTIONS = {'cli', 'config'}  # where argparse may be imported; else in the scripts and in what `python -m` runs


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob('*.py') if path != ROOT / '__init__.py')


def layer(path: Path) -> str:
    """The folder or top-level file of glmc that a module belongs to."""
    return path.relative_to(ROOT).with_suffix('').parts[0]


def imported(source: str) -> set[str]:
    """Folders and top-level files of glmc that a source imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'relative imports hide where a module stands'
            found |= {f'{node.module}.{alias.name}' for alias in node.names}
    return {name.split('.')[1] for name in found if name.startswith('glmc.')}


def test_every_folder_has_a_layer():
    assert {layer(path) for path in modules()} == set(LAYERS)
    assert len(list(ROOT.glob('*.py'))) <= 10


@pytest.mark.parametrize('path', modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_above(path):
    own = LAYERS.index(layer(path))
    below = imported(path.read_text(encoding='utf-8')) - set(LAYERS[:own + 1])
    assert not below, f'{path.relative_to(ROOT)} imports {sorted(below)}, below it in LAYERS'


def test_argparse_stays_in_cli_and_config():
    users = {layer(path) for path in modules() if 'import argparse' in path.read_text(encoding='utf-8')}
    assert users <= SEES_OPTIONS


@pytest.mark.parametrize('source', [
    'import glmc.losses', 'from glmc.losses import f', 'from glmc import losses',
    'def g():\n    import glmc.losses.glmc as f'])
def test_every_form_of_import_is_seen(source):
    assert imported(source) == {'losses'}
