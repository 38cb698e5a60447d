"""Data flows one way: a module imports only from modules above it in LAYERS (DESIGN section 5)."""
import ast
from pathlib import Path

import pytest

import glmc

ROOT = Path(glmc.__file__).parent
LAYERS = [
    'parsing', 'config',
    'data.profiles', 'data.datasets', 'data.sources', 'data.check', 'data.sampling', 'data.transforms',
    'data.loaders', 'data.resident',
    'mixing', 'cifar_resnet', 'models', 'folded', 'losses', 'tasks', 'methods', 'optim',
    'evaluation', 'priors', 'engine', 'sam', 'checkpoint', 'state', 'preemption', 'card', 'export', 'trained', 'results',
    'stage2.features', 'stage2.classifiers', 'stage2.select', 'stage2.tables', 'stage2.finetune',
    'pictures', 'plots', 'page', 'report', 'trackers', 'hub', 'launch', 'build', 'runs', 'parallel', 'sweep',
    'paper', 'groups', 'sweep_plots', 'tables',
    'benchmark.plain', 'benchmark.measure', 'benchmark.agreement',
]


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file, of all modules but the packages' `__init__.py`."""
    files = [path for path in ROOT.rglob('*.py') if path.name != '__init__.py']
    return {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path for path in files}


def imported(source: str) -> set[str]:
    """Modules of glmc that a source imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'relative imports hide where a module stands'
            found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return {name.removeprefix('glmc.') for name in found} & {*LAYERS, *modules()}


def test_every_module_has_a_layer():
    missing = modules().keys() - set(LAYERS)
    assert not missing, f'add to LAYERS in tests/test_layers.py, where it belongs: {sorted(missing)}'
    assert set(LAYERS) <= modules().keys()


@pytest.mark.parametrize('name', LAYERS)
def test_imports_only_from_above(name):
    above = LAYERS[:LAYERS.index(name)]
    below = imported(modules()[name].read_text(encoding='utf-8')) - set(above)
    assert not below, f'glmc.{name} imports {sorted(below)}, which stands below it in LAYERS'


@pytest.mark.parametrize('init', sorted(ROOT.rglob('__init__.py')))
def test_packages_only_register_models(init):
    assert imported(init.read_text(encoding='utf-8')) <= {'cifar_resnet'}


@pytest.mark.parametrize('source', [
    'import glmc.losses', 'from glmc.losses import f', 'from glmc import losses', 'def g():\n    import glmc.losses as f'])
def test_every_form_of_import_is_seen(source):
    assert imported(source) == {'losses'}
