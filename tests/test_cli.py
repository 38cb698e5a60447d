"""Help without slow imports, KEY=VALUE options, and progress: a moving line on a terminal, rare lines in a log."""
import io
import logging
import re
import sys

import pytest
from conftest import ROOT, run_command

from glmc import cli
from glmc.cli import ParseKwargs, Parser, Progress, duration
from glmc.config import benchmark_parser, method_rows, train_parser
from glmc.errors import InputError
from glmc.methods import METHODS

COMMANDS = {
    'train_glmc.py': ['train_glmc.py'], 'finetune_glmc.py': ['finetune_glmc.py'], 'validate_glmc.py': ['validate_glmc.py'],
    'benchmark_glmc.py': ['benchmark_glmc.py'], 'python -m glmc.predict': ['-m', 'glmc.predict'],
    'python -m glmc.data.check': ['-m', 'glmc.data.check']}


@pytest.mark.parametrize('name', COMMANDS)
def test_help_names_its_command_and_imports_nothing_slow(name):
    outcome = run_command(sys.executable, '-X', 'importtime', *COMMANDS[name], '--help', cwd=ROOT)
    assert outcome.code == 0 and outcome.out.startswith(f'usage: {name} ')
    imported = set(re.findall(r'\| +(\w+)$', outcome.err, re.M))
    assert 'argparse' in imported and not imported & {'torch', 'timm', 'torchvision', 'accelerate', 'matplotlib'}


def test_help_after_a_wrong_option_is_its_error():
    outcome = run_command(sys.executable, 'train_glmc.py', '--epochs', 'x', '--help')
    assert outcome.code == 2 and re.fullmatch('error: --epochs: .*\n', outcome.err)


@pytest.mark.parametrize('parser', [train_parser, lambda rows: benchmark_parser(rows, 'speed')])
def test_the_help_is_that_of_the_table_of_methods(parser, capsys):
    shown = []
    for rows in (METHODS, method_rows()):
        for word in ('--help', '--help-all'):
            with pytest.raises(SystemExit):
                parser(rows).parse_args([word])
            shown.append(capsys.readouterr().out)
    assert shown[:2] == shown[2:] and METHODS['glmc'].summary in ' '.join(shown[3].split())
    assert {name: (row.summary, row.aliases) for name, row in method_rows().items()} == {
        name: (row.summary, row.aliases) for name, row in METHODS.items()}


def test_key_value_options_are_literals_or_text():
    parser = Parser()
    parser.add_argument('--kwargs', nargs='*', default={}, action=ParseKwargs)
    words = ['a=1', 'b=1e-3', 'c=(1, 2)', 'd=True', 'e=x.y', 'f=u=v', 'g=', 'h=3a', '']
    assert parser.parse_args(['--kwargs', *words]).kwargs == dict(
        a=1, b=1e-3, c=(1, 2), d=True, e='x.y', f='u=v', g='', h='3a')
    with pytest.raises(InputError, match="--kwargs: expected KEY=VALUE, found 'x'"):
        parser.parse_args(['--kwargs', 'x'])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_30_seconds(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(cli.time, 'perf_counter', lambda: next(clock))
    with Progress(9000, 'images', 'data check', done=1000) as progress:
        for _ in range(8):
            progress.update(1000)
    assert caplog.messages == ['data check: 4,000 of 9,000 images, 100 images/s, 50 s left',
                               'data check: 7,000 of 9,000 images, 100 images/s, 20 s left']


@pytest.mark.parametrize('rank, shown', [('0', True), ('1', False)])
def test_a_terminal_of_the_main_process_gets_one_moving_line(monkeypatch, rank, shown):
    terminal = Terminal()
    monkeypatch.setattr('sys.stderr', terminal)
    monkeypatch.setenv('RANK', rank)
    with Progress(4, 'batches', 'evaluation') as progress:
        for _ in range(4):
            progress.update()
    text = terminal.getvalue()
    assert ('evaluation: ' in text) == shown and '\n' not in text.rstrip('\n')


@pytest.mark.parametrize('seconds, expected', [
    (0, '0.0 s'), (8.24, '8.2 s'), (9.96, '10 s'), (99, '99 s'), (100, '2 min'), (5999, '100 min'), (6000, '1.7 h')])
def test_durations_in_words(seconds, expected):
    assert duration(seconds) == expected
