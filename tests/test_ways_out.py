"""Whatever ends a run, all its processes end in a few seconds with the promised exit code (docs/trust.md)."""
import sys

import pytest
from conftest import ROOT, run_command
from ways_out import WAYS

FAST = ['bad image', 'disk full', 'exception', 'SIGKILL of a process', 'worker stuck, two SIGINT']


def check(*options) -> None:
    outcome = run_command(sys.executable, ROOT / 'tests' / 'ways_out.py', '--limit', '10', *options)
    assert outcome.code == 0, outcome.out + outcome.err[-3000:]


def test_a_run_with_loader_processes_ends():
    check('--only', *FAST, '--workers', '1', '--processes', '1')


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('way', WAYS)
def test_every_way_out(way, processes):
    check('--only', way, '--processes', str(processes))


@pytest.mark.slow
@pytest.mark.parametrize('way', ['bad image', 'SIGTERM to one process', 'SIGKILL of a worker', 'non-finite loss'])
def test_every_process_of_a_launcher_ends(way):
    check('--only', way, '--processes', '2', '--workers', '1', '--launcher')
