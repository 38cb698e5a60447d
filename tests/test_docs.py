"""Documentation: every command runs, or says what it needs; every flag and file it names exists."""
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import ROOT

from glmc.config import finetune_parser, train_parser
from glmc.methods import METHODS

PAGES = sorted((ROOT / 'docs').glob('*.md'))
BLOCK = re.compile(r'^```(bash|python)\n(.*?)^```', re.M | re.S)
LAUNCHERS = {'--multi_gpu', '--num_processes', '--num_machines', '--machine_rank', '--main_process_ip', '--cpu',
             '--main_process_port', '--mixed_precision', '--nodes', '--ntasks-per-node', '--gpus-per-node', '--signal',
             '--requeue'}
HUBS = {'--private', '--revision'}
SWEEPS = {'--recipes', '--vary', '--each', '--seeds', '--jobs', '--csv', '--logs'}


def blocks(page: Path, language: str, runnable: bool) -> list[str]:
    found = [text for kind, text in BLOCK.findall(page.read_text(encoding='utf-8')) if kind == language]
    return [text for text in found if text.startswith('# needs: ') != runnable]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder that knows the scripts."""
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
            monkeypatch.delitem(sys.modules, words[1], raising=False)  # and put back: its classes are those others hold
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
    parsers = (train_parser(METHODS), validate_glmc.validate_parser(), finetune_parser())
    return {flag for parser in parsers for flag in parser._option_string_actions} | LAUNCHERS | HUBS | SWEEPS


@pytest.mark.parametrize('page', [page for page in PAGES if page.stem != 'bad-input'], ids=lambda page: page.stem)
def test_flags_exist(page):
    text = page.read_text(encoding='utf-8')
    unknown = set(re.findall(r'(?<![\w-])--[a-z][\w-]*', text)) - known_flags()
    assert not unknown


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_files_exist(page):
    text = page.read_text(encoding='utf-8')
    named = re.findall(r'`((?:tests|glmc|hparams)/[\w./]*)`|\]\(([^)#:]+)\)|-c (hparams/\S+)', text)
    for place in filter(None, (name for names in named for name in names)):
        assert (ROOT / place).exists() or (page.parent / place).exists(), place


@pytest.mark.parametrize('text', [text for page in PAGES for text in blocks(page, 'bash', False)])
def test_what_a_block_needs_is_said(text):
    assert re.match(r'# needs: \w', text)


def test_every_method_has_its_row():
    rows = re.findall(r'^\| `(\w+)` \|', (ROOT / 'docs' / 'methods.md').read_text(encoding='utf-8'), re.M)
    assert set(rows) == set(METHODS)
