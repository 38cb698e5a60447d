"""Documentation: commands run or say what they need; options, files, links, methods and imports exist."""
import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import ROOT

from glmc.config import finetune_parser, train_parser
from glmc.data.check import check_parser
from glmc.methods import METHODS
from glmc.predict import predict_parser
from glmc.sweep.__main__ import parse_sweep, plan

PAGES = sorted((ROOT / 'docs').glob('*.md'))
README, CONTRIBUTING, CHANGELOG = (ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'))
LINKING = [README, CONTRIBUTING, CHANGELOG, ROOT / 'results' / 'README.md', *PAGES]
BLOCK = re.compile(r'^```(bash|python)\n(.*?)^```', re.M | re.S)
TEST_SCRIPTS = {'--kills', '--one', '--only'}  # kill.py, ways_out.py
LAUNCHERS = {'--multi_gpu', '--num_processes', '--num_machines', '--machine_rank', '--main_process_ip', '--cpu',
             '--main_process_port', '--mixed_precision', '--nodes', '--ntasks-per-node', '--gpus-per-node', '--signal',
             '--requeue', '--gradient_accumulation_steps', '--num_cpu_threads_per_process'}
HUBS = {'--private', '--revision'}
SWEEPS = {'--recipes', '--vary', '--each', '--seeds', '--jobs', '--csv', '--logs'}
SWEEP_COMMAND = re.compile(r'^\| [^|]+ \| `python -m glmc\.sweep ([^`]+)` \| (\d+) \|$', re.M)


def blocks(page: Path, language: str, runnable: bool) -> list[str]:
    found = [text for kind, text in BLOCK.findall(page.read_text(encoding='utf-8')) if kind == language]
    return [text for text in found if text.startswith('# needs: ') != runnable]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working folder from which the scripts can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    yield tmp_path
    AcceleratorState._reset_state(True)


def run(command: str, monkeypatch) -> None:
    """`python script.py …` or `python -m module …` in this process."""
    program, *words = shlex.split(command)
    assert program == 'python', command
    AcceleratorState._reset_state(True)
    module = words[0] == '-m'
    monkeypatch.setattr(sys, 'argv', words[module:])
    with pytest.raises(SystemExit) as end:
        if module:
            if not hasattr(sys.modules.get(words[1]), '__path__'):  # a module, which runpy warns about if it is there
                monkeypatch.delitem(sys.modules, words[1], raising=False)  # restored: other tests hold its classes
            runpy.run_module(words[1], run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name='__main__')
    assert end.value.code == 0, command


@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'bash', True)], ids=lambda page: page.stem)
def test_commands_run(page, workplace, monkeypatch):
    commands = [line for text in blocks(page, 'bash', True) for line in text.splitlines()]
    for command in commands:
        if not command.startswith('pip install'):  # the tests themselves
            run(command, monkeypatch)
    scope = {}
    for text in blocks(page, 'python', True):
        exec(compile(text, str(page), 'exec'), scope)


def known_flags() -> set[str]:
    import validate_glmc
    parsers = (train_parser(METHODS), validate_glmc.validate_parser(), finetune_parser(), predict_parser(),
               check_parser())
    return {flag for parser in parsers for flag in parser._option_string_actions} | LAUNCHERS | HUBS | SWEEPS | TEST_SCRIPTS


@pytest.mark.parametrize('page', [README, CONTRIBUTING, CHANGELOG, *PAGES], ids=lambda page: page.stem)
def test_flags_exist(page):
    if page.stem == 'bad-input':  # names wrong options
        return
    text = page.read_text(encoding='utf-8')
    unknown = set(re.findall(r'(?<![\w-])--[a-z][\w-]*', text)) - known_flags()
    assert not unknown


@pytest.mark.parametrize('page', LINKING, ids=lambda page: f'{page.parent.name}-{page.stem}')
def test_files_and_links_exist(page):
    text = page.read_text(encoding='utf-8')
    named = re.findall(r'`((?:tests|glmc|hparams)/[\w./-]*)`|-c (hparams/\S+)', text)
    for place in filter(None, (name for names in named for name in names)):
        assert (ROOT / place).exists(), place
    for target, anchor in re.findall(r'\]\(([^)#:]*)(?:#([^)]+))?\)', text):
        place = page.parent / target if target else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), f'{target}#{anchor}'


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    heads = re.findall(r'^#+ (.+)$', re.sub(r'^```.*?^```', '', page.read_text(encoding='utf-8'), flags=re.M | re.S), re.M)
    return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads}


@pytest.mark.parametrize('text', [text for page in PAGES for text in blocks(page, 'bash', False)])
def test_what_a_block_needs_is_said(text):
    assert re.match(r'# needs: \w', text)


def test_every_method_has_its_row():
    lines = (ROOT / 'docs' / 'methods.md').read_text(encoding='utf-8').split('\n## ')[0].splitlines()
    first_cells = [line.split(' | ')[0] for line in lines if line.startswith('| `')]
    assert all(re.match(r'\| `(\w+)`', cell)[1] in METHODS for cell in first_cells)
    assert set(METHODS) <= {name for cell in first_cells for name in re.findall(r'`(\w+)`', cell)}


def test_sweeps_plan_the_runs_they_state(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = SWEEP_COMMAND.findall((ROOT / 'docs' / 'recipes-and-results.md').read_text(encoding='utf-8'))
    assert commands
    for command, number in commands:
        assert len(plan(*parse_sweep(shlex.split(command)))) == int(number), command


def test_readme_is_short_and_has_the_two_commands():
    text = README.read_text(encoding='utf-8')
    assert len(text.splitlines()) <= 140
    lines = [line for _, block in BLOCK.findall(text) for line in block.splitlines()]
    for command in ('-r requirements.txt && accelerate launch train_glmc.py', '-r requirements-dev.txt && pytest'):
        assert f'pip install {command}' in lines, command


@pytest.mark.parametrize('page', [README, CONTRIBUTING], ids=lambda page: page.stem)
def test_python_blocks_parse_and_import(page):
    for kind, text in BLOCK.findall(page.read_text(encoding='utf-8')):
        if kind == 'python' and not text.startswith(('def ', '    ')):
            imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), str(page), 'exec'), {})


def test_the_example_of_contributing_is_in_the_source():
    source = ''.join(path.read_text(encoding='utf-8') for path in (
        ROOT / 'glmc' / 'methods.py', ROOT / 'glmc' / 'losses' / 'classification.py'))
    section = CONTRIBUTING.read_text(encoding='utf-8').split('## Add a method')[1]
    lines = [line for _, text in BLOCK.findall(section) for line in text.splitlines() if line]
    assert lines and not [line for line in lines if line not in source]
