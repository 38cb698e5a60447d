"""Tables of a result: names are exact on disk, and no cell is a formula."""
import csv
import logging

import numpy as np
import pytest
from accelerate import Accelerator

from finetune_glmc import create_folder
from glmc.cli import Options
from glmc.data.datasets import ImageSet
from glmc.errors import InputError, PrintableFormatter
from glmc.evaluation.metrics import Predictions
from glmc.run_folder import RunFolder, open_run_folder, write_tables


def read(path) -> list[list[str]]:
    with open(path, newline='', encoding='utf-8', errors='surrogateescape') as file:
        return list(csv.reader(file))


def test_hostile_names_are_exact_and_no_formula(tmp_path):
    names = ['=1+1', 'b,"c', '\udcff']
    files = ['@x.png', 'b/\udcfe\n.png', 'c/3.png']
    predictions = Predictions(np.array([0, 1, 2]), np.array([0, 2, 1]), np.array([0.5, 0.25, 1.0]))
    metrics = dict(train_counts=[9, 8, 7], per_class_images=[1, 1, 1], per_class_accuracy=[100.0, 0.0, 0.0],
                   per_class_predictions=[1, 1, 1])
    images = ImageSet(None, predictions.labels, files, names, 'made up')
    write_tables(tmp_path, metrics, names, predictions, images)
    assert read(tmp_path / 'predictions.csv') == [
        ['file', 'label', 'prediction', 'probability'], ['./@x.png', "'=1+1", "'=1+1", '0.500000'],
        ['b/\udcfe\n.png', 'b,"c', '\udcff', '0.250000'], ['c/3.png', '\udcff', 'b,"c', '1.000000']]
    assert [row[1] for row in read(tmp_path / 'per_class.csv')[1:]] == ["'=1+1", 'b,"c', '\udcff']
    assert read(tmp_path / 'confused_pairs.csv')[1:] == [['b,"c', '\udcff', '1'], ['\udcff', 'b,"c', '1']]


def test_a_set_without_an_index_has_positions_for_files(tmp_path):
    predictions = Predictions(np.array([1, 0]), np.array([1, 1]), np.array([0.5, 0.25]))
    metrics = dict(train_counts=[9, 8], per_class_images=[1, 1], per_class_accuracy=[0.0, 100.0],
                   per_class_predictions=[0, 2])
    write_tables(tmp_path, metrics, None, predictions)
    assert read(tmp_path / 'predictions.csv')[1:] == [['0', '1', '1', '0.500000'], ['1', '0', '1', '0.250000']]


def test_runs_that_start_at_once_take_the_next_number(tmp_path):
    start = [RunFolder.choose(Accelerator(cpu=True), 'name', str(tmp_path), None, None) for _ in range(3)]
    for folder in start:
        folder.create({})
    assert [folder.path.name for folder in start] == ['name', 'name-2', 'name-3']
    assert all((folder.path / 'args.yaml').is_file() for folder in start)


def test_stage_2_takes_the_next_number(tmp_path):
    args = Options(output=str(tmp_path), experiment=None)
    folders = [create_folder(args, 'name', Accelerator(cpu=True)) for _ in range(2)]
    assert [folder.name for folder in folders] == ['name', 'name-2'] and all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize('name', ['../x', '/x', 'a/../../x', '.', '..', 'a/..', 'a\0b'])
def test_an_experiment_stays_in_the_output(name, tmp_path):
    with pytest.raises(InputError, match='--experiment .*: expected the name of a folder in --output '):
        open_run_folder(str(tmp_path), name, 'name', resume=False)


def test_an_experiment_may_be_a_folder_of_a_folder(tmp_path):
    assert open_run_folder(str(tmp_path), 'a/b', 'name', resume=False) == tmp_path / 'a' / 'b'


def test_an_output_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / 'out').write_text('')
    folder = RunFolder.choose(Accelerator(cpu=True), 'name', str(tmp_path / 'out'), None, None)
    with pytest.raises(InputError, match='--output: cannot write to '):
        folder.create({})


def test_a_log_line_cannot_command_the_terminal():
    record = logging.LogRecord('glmc', logging.INFO, '', 0, 'No file %s', ('\x1b[31m\udce9\x9b2J',), None)
    assert PrintableFormatter('%(message)s').format(record) == 'No file \\x1b[31m\\udce9\\x9b2J'
