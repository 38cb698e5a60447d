"""Text that cannot be shown ends no run: replaced on output, exact on disk."""
import csv
import json
import os
import sys

import pytest
import torch
from conftest import COUNTS, ROOT, TINY, run_command, run_train, write_folders

from glmc.export.load import load_trained
from glmc.training.checkpoints import load_checkpoint

LATIN1 = os.fsdecode(b'\xe9t\xe9')  # a name that is no UTF-8
NAMES = [LATIN1, 'Käfer', '蜂\u2028']
NARROW = dict(PYTHONIOENCODING='ascii:strict')


@pytest.fixture(scope='module')
def named_run(tmp_path_factory):
    """A run whose folders have such names, with a report, in a terminal of ASCII alone; its data and its folder."""
    root = tmp_path_factory.mktemp('names') / LATIN1
    for split, start in (('train', 0), ('validation', 100)):
        write_folders(root / split, dict(zip(NAMES, COUNTS.values(), strict=True)), start=start)
        for folder in (root / split).iterdir():
            os.rename(folder / f'{start}.png', folder / f'{LATIN1}{start}.png')
    options = [option for option in TINY if option != '--no-report']
    outcome = run_train(*options, '--data-dir', root, '--output', root.parent / 'out', **NARROW)
    assert outcome.code == 0 and 'Traceback' not in outcome.err, outcome.err
    assert 'cannot' not in outcome.err.lower() and 'not written' not in outcome.err, outcome.err
    (run,) = (root.parent / 'out').iterdir()
    return root, run


def test_tables_have_the_exact_names(named_run):
    _, run = named_run
    with open(run / 'per_class.csv', newline='', encoding='utf-8', errors='surrogateescape') as file:
        assert sorted(row['name'] for row in csv.DictReader(file)) == sorted(NAMES)
    assert b'\xe9t\xe9' in (run / 'per_class.csv').read_bytes()


def test_the_export_the_checkpoint_and_the_report_can_be_read(named_run):
    root, run = named_run
    assert sorted(load_trained(str(run)).class_names) == sorted(NAMES)
    assert json.loads((run / 'export' / 'metrics.json').read_text(encoding='utf-8'))['data'] == str(root)
    assert load_checkpoint(run / 'checkpoints' / 'epoch-0000.safetensors')['metrics']['data'] == str(root)
    assert '\\udce9t\\udce9' in (run / 'report.html').read_text(encoding='utf-8')
    assert '\\udce9t\\udce9' in (run / 'export' / 'README.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('words', [
    ('train_glmc.py', *TINY, '--resume', 'auto', '--epochs', '2'),
    ('validate_glmc.py', '--model', 'RUN', '-j', '0'),
    ('finetune_glmc.py', '--model', 'RUN', '--stage2', 'ncm,crt', '-j', '0'),
    ('-m', 'glmc.predict', 'RUN', 'IMAGES', '--output', '-'), ('-m', 'glmc.data.check', 'DATA')])
def test_the_other_commands_end_well(words, named_run):
    root, run = named_run
    places = dict(RUN=run, DATA=root, IMAGES=root / 'validation')
    words = [places.get(word, ROOT / word if word.endswith('.py') else word) for word in words]
    where = [] if '-m' in words else ['--data-dir', root, '--output', root.parent / 'out']
    outcome = run_command(sys.executable, *words, *where, **NARROW)
    assert outcome.code == 0 and 'Traceback' not in outcome.err, outcome.err


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'latin-1', 'cp437'])
def test_help_in_any_encoding(encoding):
    outcome = run_command(sys.executable, '-c', 'import sys; sys.argv[1:] = ["--help-all"]; import glmc.cli, train_glmc; '
                          'sys.exit(glmc.cli.run_script(train_glmc.main))', PYTHONIOENCODING=encoding)
    assert outcome.code == 0 and '--img-size' in outcome.out, outcome.err


def test_a_yaml_file_repeats_the_run(named_run, tmp_path):
    _, run = named_run
    outcome = run_train('-c', run / 'args.yaml', '--output', tmp_path, '--experiment', 'again', **NARROW)
    assert outcome.code == 0, outcome.err
    weights = [load_checkpoint(folder / 'checkpoints' / 'epoch-0000.safetensors')['model'] for folder in (
        run, tmp_path / 'again')]
    one, other = (state['state_dict'] for state in weights)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize('options', [('--output', LATIN1), ('--output', 'out', '--experiment', LATIN1)])
def test_an_output_folder_that_safetensors_cannot_open_is_refused(options, script, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = script(*TINY, '--data-dir', folders, *options)
    assert outcome.code == 2
    assert outcome.err.endswith('is not UTF-8, expected another --output or --experiment\n'), outcome.err
