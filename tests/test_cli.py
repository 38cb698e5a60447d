"""Progress of a loop: a moving line on a terminal, rare lines in a log."""
import io
import logging

import pytest

from glmc import cli
from glmc.cli import Progress, duration


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
