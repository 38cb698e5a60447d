"""The comparison of several results: figures, labels, and errors of one line."""
import json
import re

import pytest
from test_report import evaluated

from glmc.errors import InputError
from glmc.report.compare import comparison_table, read_results, write_comparison
from glmc.run_folder import write_tables


def test_comparison_draws_both(tmp_path):
    for name, seed in (('first', 0), ('second', 1)):
        (tmp_path / name / 'export').mkdir(parents=True)
        (tmp_path / name / 'export' / 'metrics.json').write_text(json.dumps(evaluated(6, 200, seed)[0]))
    path = write_comparison(tmp_path / 'both', read_results([tmp_path / 'first', tmp_path / 'second' / 'export']))
    text = path.read_text(encoding='utf-8')
    assert text.count('<svg') == 2
    for name in ('first', 'second'):
        assert f'<th>{name}</th>' in text
    assert {path.name for path in (tmp_path / 'both' / 'plots').iterdir()} == {'accuracy.png', 'reliability.png'}


def two_results(tmp_path, names=()) -> list:
    """Folders of two results: class 0 wins 50 points, class 1 loses 25, class 2 is equal, class 3 is not measured."""
    metrics, _ = evaluated(4, 50)
    for label, accuracy in (('first', [25, 75, 50, None]), ('second', [75, 50, 50, None])):
        (tmp_path / label).mkdir()
        (tmp_path / label / 'metrics.json').write_text(json.dumps({**metrics, 'per_class_accuracy': accuracy}))
        if names:
            write_tables(tmp_path / label, metrics, names)
    return [tmp_path / 'first', tmp_path / 'second']


def test_gains_and_losses_are_marked_by_class(tmp_path):
    names = ['<ant>', 'bee', 'cat', '=dog']
    results = read_results(two_results(tmp_path, names))
    text = write_comparison(tmp_path / 'both', results).read_text(encoding='utf-8')
    table = text[text.index('<summary>All 4 classes'):]
    rows = re.findall(r'<tr><td>(.*?)</td>.*?<td>([^/]*?(?:</span>)?)</td></tr>', table)
    assert [name for name, _ in rows[:4]] == ['&lt;ant&gt;', 'cat', 'bee', '&#x27;=dog']
    assert [cell for _, cell in rows[:4]] == [
        '<span class="gain">+50.0</span>', '0.0', '<span class="loss">\u221225.0</span>', '–']
    assert 'Classes better in second: 1 class, worse: 1 class, equal: 1 class, against first.' in text
    assert '&lt;ant&gt;: 75.0 %' in text  # under the pointer


def test_the_printed_table_has_one_row_for_each_result(tmp_path):
    lines = comparison_table(read_results(two_results(tmp_path))).splitlines()
    assert lines[0].split()[:2] == ['result', 'top-1'] and 'class mean' in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ['first', 'second'] and len({*map(len, lines)}) == 1


@pytest.mark.parametrize('content, expected', [
    (None, 'expected a folder with a metrics.json, found none in it'), ('{', 'metrics.json: expected a metrics.json: '),
    ('{}', 'contains no evaluation'), ('[]', 'contains no evaluation'), ('"per_class_accuracy"', 'contains no evaluation'),
    ('{"per_class_accuracy": [1]}', 'contains no evaluation')])
def test_a_missing_or_invalid_metrics_file_is_one_line(tmp_path, content, expected):
    if content is not None:
        (tmp_path / 'metrics.json').write_text(content)
    with pytest.raises(InputError, match=expected):
        write_comparison(tmp_path / 'both', read_results([tmp_path]))


@pytest.mark.parametrize('name, value', [
    ('train_counts', None), ('train_counts', [1, 2]), ('train_counts', ['a'] * 4), ('train_counts', [float('nan')] * 4),
    ('per_class_accuracy', {}), ('per_class_accuracy', [1, 2, 3, 'x']), ('bin_hits', [None] * 15), ('bin_images', []),
    ('shot_thresholds', [20]), ('shot_thresholds', '20')])
def test_a_metrics_file_with_invalid_lists_is_one_line(tmp_path, name, value):
    (tmp_path / 'metrics.json').write_text(json.dumps({**evaluated(4, 50)[0], name: value}))
    with pytest.raises(InputError, match='metrics.json: contains no evaluation'):
        write_comparison(tmp_path / 'both', read_results([tmp_path]))


def test_missing_numbers_are_a_dash(tmp_path):
    (tmp_path / 'metrics.json').write_text(json.dumps({**evaluated(4, 50)[0], 'top1': None, 'ece': 'low', 'model': '<i>'}))
    text = write_comparison(tmp_path / 'both', read_results([tmp_path])).read_text(encoding='utf-8')
    assert '<td>top-1</td><td>–</td>' in text and '<td>calibration error (ECE)</td><td>–</td>' in text
    assert '&lt;i&gt;' in text


def test_each_of_many_results_is_drawn_and_labelled(tmp_path):
    folders = [tmp_path / f'{k}' / 'run' for k in range(10)]
    for k, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / 'metrics.json').write_text(json.dumps(evaluated(6, 100, seed=k)[0]))
    text = write_comparison(tmp_path / 'all', read_results([*folders, folders[0]])).read_text(encoding='utf-8')
    heads = re.findall(r'<th>([^<]*)</th>', text.split('</table>')[0])
    assert len(set(heads)) == 12 and heads[0] == 'metric'
    assert heads[1] == '0/run (1)' and heads[10] == '9/run' and heads[11] == '0/run (11)'
    assert text.count(', ECE ') == 11, 'one line each in the reliability diagram'


def test_a_comparison_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / 'metrics.json').write_text(json.dumps(evaluated(4, 50)[0]))
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='--output: cannot write to '):
        write_comparison(tmp_path / 'file' / 'both', read_results([tmp_path]))


def test_results_of_other_classes_are_not_compared(tmp_path):
    for name, num_classes in (('a', 4), ('b', 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.json').write_text(json.dumps(evaluated(num_classes, 50)[0]))
    with pytest.raises(InputError, match='b: has other training counts than .*a, expected the same classes'):
        read_results([tmp_path / 'a', tmp_path / 'b'])


def test_results_of_other_class_names_are_not_compared(tmp_path):
    folders = two_results(tmp_path, list('abcd'))
    write_tables(folders[1], read_results(folders[:1])['first'], list('acbd'))
    with pytest.raises(InputError, match='second: has other class names than .*first, expected the same classes'):
        read_results(folders)
