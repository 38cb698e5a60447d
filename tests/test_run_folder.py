"""Tables of a result: names are exact on disk, and no cell is a formula."""
import csv

import numpy as np

from glmc.data.datasets import ImageSet
from glmc.evaluation.metrics import Predictions
from glmc.run_folder import write_tables


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
