"""The report: its figures and texts, one file without others, and no failure of a run."""
import base64
import hashlib
import re
import shutil
import subprocess
import sys
from html import unescape

import numpy as np
import pytest
import torch
from PIL import Image

from glmc.data.datasets import ImageSet
from glmc.evaluation.metrics import LongTailEvaluator, Predictions, confused_pairs
from glmc.mixing import GLMCMixer, ViewMixer
from glmc.report.html import SORT, html_document, table
from glmc.report.pictures import Picture, describe_target, display_name, mixed_views, worst_mistakes
from glmc.report.plots import MAX_CELLS, accuracy_over_count, as_svg, confusion, confusion_matrix, curves, make_figure
from glmc.report.report import ReportInputs, classifier_norms, try_report, write_report
from glmc.training.engine import step_generator

HISTORY = [dict(epoch=e, train_loss=3 - e, loss_c=2.0, loss_cb=1.0, loss_sim=-1.0, lr=0.1, alpha=1.0, eval_top1=50.0 + e,
                eval_many=60.0, eval_medium=50.0, eval_few=None) for e in range(3)]


def evaluated(num_classes: int, size: int, seed: int = 0) -> tuple[dict, Predictions]:
    """Return metrics and predictions of a synthetic model; training counts fall from 1000 to 2."""
    rng = np.random.default_rng(seed)
    counts = (1000 * 500.0 ** (-np.arange(num_classes) / (num_classes - 1))).astype(int).tolist()
    evaluator = LongTailEvaluator(counts)
    labels = torch.from_numpy(rng.integers(num_classes, size=size))
    for part in labels.split(512):
        logits = torch.from_numpy(rng.normal(size=(len(part), num_classes))).float()
        logits[torch.arange(len(part)), part] += 3 - 2 * part / num_classes
        evaluator.update(logits, part)
    metadata = {'model': 'net', 'method': 'glmc', 'evaluated_on': 'validation', 'num_classes': num_classes,
             'command': 'train_glmc.py --data-dir a<b', 'versions': {'timm': '1'}}
    return {**metadata, **evaluator.compute()}, evaluator.predictions()


def pictures(labels, class_names) -> ImageSet:
    images = [Image.new('RGB', (40, 30), (20 * int(label), 90, 0)) for label in labels]
    names = [f'folder/{k}.png' for k in range(len(labels))]
    return ImageSet(lambda k: images[k].copy(), np.asarray(labels), names, class_names, 'made up')


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A report with all optional inputs: (folder, export, text, metrics)."""
    folder = tmp_path_factory.mktemp('report')
    metrics, predictions = evaluated(12, 300)
    names = [f'<{c}> & co' for c in range(12)]
    norms = {'c': np.arange(12.0), 'cb': np.ones(12)}
    inputs = ReportInputs(names, predictions, pictures(predictions.labels, names), norms, HISTORY, views=[])
    write_report(folder, metrics, inputs, export=folder / 'export')
    return folder, folder / 'export', (folder / 'report.html').read_text(encoding='utf-8'), metrics


def test_every_plot_is_a_png_and_in_the_html(written):
    folder, _, text, _ = written
    names = {path.stem for path in (folder / 'plots').glob('*.png')}
    assert names == {'accuracy', 'reliability', 'confusion', 'norms', 'shots', 'losses', 'schedule', 'mistakes'}
    assert text.count('<svg') == 7
    for path in (folder / 'plots').glob('*.png'):
        assert min(Image.open(path).size) > 300


def test_the_html_is_self_contained_and_escaped(written):
    _, _, text, metrics = written
    assert not re.search(r'<link|@import|(src|href)="(?!data:|#)', text)
    (script,) = re.findall('<script>(.*?)</script>', text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert '<0>' not in text and '&lt;0&gt; &amp; co' in text
    assert 'a&lt;b' in text
    assert f"<b>{metrics['top1']:.1f}</b>" in text


def test_pictures_of_the_data_stay_out_of_the_export(written):
    folder, export, text, _ = written
    public = (export / 'report.html').read_text(encoding='utf-8')
    assert text.count('<figure><img src="data:image/') == 16
    assert '<img' not in public and 'folder/' not in public and public.count('<svg') == 7
    assert not (export / 'plots' / 'mistakes.png').exists()
    assert (export / 'plots' / 'accuracy.png').read_bytes() == (folder / 'plots' / 'accuracy.png').read_bytes()


def test_pictures_of_the_data_stay_out_of_the_export_of_a_repeated_report(written, tmp_path):
    folder, _, _, metrics = written
    assert (folder / 'plots' / 'mistakes.png').exists()
    write_report(folder, metrics, ReportInputs(), export=tmp_path)
    assert {path.stem for path in (tmp_path / 'plots').iterdir()} >= {'accuracy', 'reliability'}
    assert not (tmp_path / 'plots' / 'mistakes.png').exists()


def test_plots_follow_the_colours_of_the_html(written):
    text = written[2]
    assert 'prefers-color-scheme: dark' in text
    assert 'currentColor' in text and 'var(--grid)' in text
    assert '#1a1c20' not in re.sub(r'<style>:?.*?</style>', '', text, flags=re.S).lower()


def test_8142_classes(tmp_path):
    metrics, predictions = evaluated(8142, 3000)
    write_report(tmp_path, metrics, ReportInputs(predictions=predictions, norms={'cb': np.ones(8142)}))
    assert (tmp_path / 'report.html').stat().st_size < 1_500_000
    text = (tmp_path / 'report.html').read_text(encoding='utf-8')
    assert text.count('<tr>') - 100 < 8142 < text.count('<tr>') and '<details><summary>All 8,142 classes</summary>' in text


def test_questions_come_in_the_order_of_a_reader(written):
    folder, export, text, _ = written
    heads = [unescape(head) for head in re.findall(r'<(?:h2|summary)>(.*?)</', text)]
    assert heads[:4] == ['Which classes fail, and why', 'Most frequent confusions', 'Next steps', 'Most confident mistakes']
    assert heads.index('All 12 classes') > heads.index('Confusion matrix')
    assert f'python -m glmc.predict {folder} my_photos' in text
    assert str(folder) not in (export / 'report.html').read_text(encoding='utf-8')


def test_the_export_shows_no_folder_of_this_machine(tmp_path):
    metrics = {**evaluated(4, 50)[0], 'command': 'train_glmc.py --data-dir /home/someone/birds --resume auto',
               'evaluated_on': '/home/someone/test.txt'}
    write_report(tmp_path, metrics, ReportInputs(), export=tmp_path / 'export')
    text = (tmp_path / 'export' / 'report.html').read_text(encoding='utf-8')
    assert 'someone' not in text and 'train_glmc.py --data-dir birds<' in text


def test_dots_and_cells_have_names(written):
    metrics, predictions = evaluated(12, 300)
    titles = list(map(unescape, re.findall(r'<title>(.*?)</title>', written[2])))[1:]
    for c, (count, accuracy) in enumerate(zip(metrics['train_counts'], metrics['per_class_accuracy'], strict=True)):
        assert f'<{c}> & co: {accuracy:.1f} %, {count:,} training images' in titles
    pairs = confused_pairs(predictions, 1000)
    for label, predicted, number in pairs:
        images = metrics['per_class_images'][label]
        assert f'<{label}> & co predicted as <{predicted}> & co: {number} of {images} images' in titles
    assert len(titles) == 12 + len(pairs)


@pytest.mark.parametrize('num_classes', [3, MAX_CELLS, 250])
def test_marks_lie_on_their_dots_and_cells(num_classes):
    """Coordinates of the marks in the SVG against those of the drawn artists."""
    metrics, predictions = evaluated(num_classes, 2000)
    figure = make_figure(accuracy_over_count, {'net': metrics})
    text = as_svg(figure)
    first = re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4"><title>([^:]+):', text)
    c = int(first[3])
    if num_classes < 250:  # else the dots are one bitmap
        drawn = re.findall(r'<use xlink:href="#m\w+" x="([\d.]+)" y="([\d.]+)" style="fill: #2f7fc1', text)
        assert any(abs(float(x) - float(first[1])) < 0.2 and abs(float(y) - float(first[2])) < 0.2 for x, y in drawn)
    assert metrics['per_class_accuracy'][c] == min(metrics['per_class_accuracy'])
    counts = metrics['train_counts']
    axes = make_figure(confusion, predictions, counts).axes[0]
    matrix, (_, marks, size) = axes.images[0].get_array(), axes.figure.marks[0]
    assert size[0] == num_classes / min(num_classes, MAX_CELLS) and len(marks) <= 1000
    for x, y, _ in marks[:50]:
        assert matrix[int((y - 0.5) / size[1]), int((x - 0.5) / size[0])] > 0


def test_an_empty_group_has_no_tile(tmp_path):
    metrics, _ = evaluated(12, 300)
    write_report(tmp_path, {**metrics, 'few': None, 'shot_classes': {**metrics['shot_classes'], 'few': 0}}, ReportInputs())
    tiles = re.search(r'<div class="tiles">.*</div>', (tmp_path / 'report.html').read_text(encoding='utf-8'))[0]
    assert 'many-shot (' in tiles and 'few-shot' not in tiles and '–' not in tiles


SORTED = """
const rows = [['b', '10'], ['a', '9'], ['c', '\u2212'], ['d', '1,000'], ['e', '\u22122.5'], ['f', '+3']];
const cell = text => ({textContent: text});
const body = {rows: rows.map(row => ({cells: row.map(cell)})), append(...found) { this.rows = found; }};
const heads = [0, 1].map(index => ({cellIndex: index, attributes: {}, setAttribute(k, v) { this.attributes[k] = v; },
  getAttribute(k) { return this.attributes[k]; }, addEventListener(kind, run) { this[kind] = run; },
  closest: () => ({tBodies: [body], querySelectorAll: () => heads})}));
const document = {querySelectorAll: () => heads};
SCRIPT
const order = () => body.rows.map(row => row.cells[0].textContent).join('');
heads[0].click(); const names = order();
heads[1].click(); const up = order();
heads[1].keydown({key: 'Enter'});
console.log(names, up, order(), heads[0].attributes['aria-sort'], heads[1].attributes['aria-sort']);
"""


@pytest.mark.skipif(not shutil.which('node'), reason='needs node')
def test_the_script_sorts_names_and_numbers():
    words = ['node', '-e', SORTED.replace('SCRIPT', SORT)]
    assert subprocess.run(words, capture_output=True, text=True).stdout.split() == [
        'abcdef', 'efabdc', 'cdbafe', 'none', 'descending']


@pytest.mark.parametrize('num_classes', [3, MAX_CELLS, 250])
def test_confusion_matrix_is_the_loop(num_classes):
    rng = np.random.default_rng(0)
    counts = rng.permutation(num_classes) + 1
    labels, predicted = rng.integers(num_classes, size=(2, 500))
    matrix, per_cell = confusion_matrix(Predictions(labels, predicted, np.ones(500)), counts)
    size = min(num_classes, MAX_CELLS)
    expected = np.zeros((size, size))
    place = {c: rank * size // num_classes for rank, c in enumerate(sorted(range(num_classes), key=lambda c: -counts[c]))}
    for label, prediction in zip(labels, predicted, strict=True):
        expected[place[label], place[prediction]] += 1
    for row in expected:
        row *= 100 / max(row.sum(), 1)
    np.testing.assert_allclose(matrix, expected)
    assert per_cell == num_classes / size


def test_mistakes_are_the_wrong_images_of_highest_confidence():
    predictions = Predictions(np.array([0, 1, 2, 0]), np.array([1, 1, 0, 2]), np.array([0.5, 0.99, 0.9, 0.7]))
    found = worst_mistakes(pictures([0, 1, 2, 0], 'abc'), predictions, 'abc', limit=2)
    assert [(p.caption, p.detail) for p in found] == [('c predicted as a (90 %)', 'folder/2.png'),
                                                      ('a predicted as c (70 %)', 'folder/3.png')]
    assert found[0].images[0].getpixel((0, 0)) == (40, 90, 0)


def test_a_pair_of_classes_has_at_most_two_mistakes():
    labels, predicted = np.array([0] * 5 + [1]), np.array([1] * 5 + [0])
    predictions = Predictions(labels, predicted, np.array([0.9, 0.8, 0.95, 0.7, 0.6, 0.1]))
    found = worst_mistakes(pictures(labels, 'ab'), predictions, 'ab')
    assert [picture.detail for picture in found] == ['folder/2.png', 'folder/0.png', 'folder/5.png']


class Batch:
    """A loader of one batch of noise."""

    def __init__(self, partner: str):
        generator = torch.Generator().manual_seed(0)
        images = 2 if partner == 'sampler' else 1
        self.views = torch.randint(0, 256, (6, images, 2, 3, 20, 20), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(0, 3, (6, images), generator=generator)

    def epoch(self, epoch: int):
        self.last_epoch = epoch
        yield self.views, self.labels, 1.0


@pytest.mark.parametrize('partner', ['sampler', 'batch'])
def test_views_are_what_the_mixer_makes_of_the_batch(partner):
    loader, mixer = Batch(partner), GLMCMixer([30, 20, 10], partner=partner)
    found = mixed_views(loader, mixer, 'abc', seed=7, epoch=2, limit=4)
    assert len(found) == 4 and loader.last_epoch == 2
    for k, picture in enumerate(found):
        mixture = mixer.sample_params(4, (20, 20), step_generator(7, 2, k))
        views, targets = mixer(loader.views[:4], loader.labels[:4], mixture)
        for image, view in zip(picture.images, views, strict=True):
            np.testing.assert_array_equal(np.asarray(image), view[k].float().round().byte().permute(1, 2, 0))
        assert picture.caption == describe_target(targets[0][k], 'abc')


def test_a_view_as_it_is_shows_its_label():
    batch = Batch('batch')
    found = mixed_views(batch, ViewMixer([1, 1, 1]), 'abc', seed=0, epoch=0)
    np.testing.assert_array_equal(np.asarray(found[0].images[0]), batch.views[0, 0, 0].permute(1, 2, 0))
    assert len(found[0].images) == 2 and found[0].caption == 'abc'[batch.labels[0, 0]]


@pytest.mark.parametrize('target, expected', [
    (torch.tensor(1), 'b'), (torch.tensor([0.25, 0.0, 0.75]), '0.75 × c + 0.25 × a'),
    (torch.tensor([0.0, 1.0, 0.0]), '1.00 × b')])
def test_labels_in_words(target, expected):
    assert describe_target(target, 'abc') == expected


@pytest.mark.parametrize('name, expected', [
    ('new\nline\ttab', 'new line tab'), ('', '(no name)'), ('\u202eevil\u2066', '\ufffdevil\ufffd'), ('a\x00b', 'a\ufffdb'),
    ('\ud800', '\ufffd'), ('x' * 61, 'x' * 59 + '…'),
    ('日本 \U0001f468\u200d\U0001f467', '日本 \U0001f468\u200d\U0001f467'), (5, '5')])
def test_names_are_on_one_line_without_control_characters(name, expected):
    assert display_name(name) == expected


def test_a_path_is_shortened_at_its_start():
    assert display_name('a/' * 40 + 'image.jpg', 12, keep_end=True) == '…a/image.jpg'


def test_names_of_any_kind_make_a_report(tmp_path, recwarn):
    names = ['<b>"', 'new\nline', '', '$x^2$', '日本語', 'x' * 300, '\u202eevil', '<script>alert(1)</script>', '\ud800',
             '`|`']
    metrics, predictions = evaluated(10, 60)
    write_report(tmp_path, metrics, ReportInputs(names, predictions, pictures(predictions.labels, names)))
    text = (tmp_path / 'report.html').read_text(encoding='utf-8')
    assert text.count('<script') == 1 and 'alert(1)</script>' not in text and '\u202e' not in text and 'x' * 61 not in text
    assert not [warning for warning in recwarn if 'Glyph' in str(warning.message)]


@pytest.mark.parametrize('counts, expected', [
    ([57, 43], ['40', '45', '50', '55', '60']), ([50, 50], ['45', '48', '51', '54']), ([1000, 5], ['10', '100', '1,000'])])
def test_training_images_are_numbers_on_the_axis(counts, expected):
    metrics = evaluated(2, 40)[0]
    figure = make_figure(accuracy_over_count, {'net': {**metrics, 'train_counts': counts}})
    axes, (low, high) = figure.axes[0], figure.axes[0].get_xlim()
    figure.draw_without_rendering()
    places = axes.xaxis.get_ticklocs()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert [text for place, text in zip(places, labels, strict=True) if low <= place <= high] == expected
    assert not [label.get_text() for label in axes.get_xticklabels(minor=True) if label.get_text()]


@pytest.mark.parametrize('epochs', [1, 2, 3])
def test_epochs_are_whole_numbers_on_the_axis(epochs):
    axes = make_figure(curves, HISTORY[:epochs], {'train_loss': 'loss'}, 'training loss').axes[0]
    low, high = axes.get_xlim()
    assert [place for place in axes.xaxis.get_ticklocs() if low <= place <= high] == list(range(1, epochs + 1))


def test_one_classifier_needs_no_name():
    assert list(classifier_norms(c=None, cb=torch.nn.Linear(4, 3))) == ['classifier']


def test_views_of_one_image_are_not_called_mixed(tmp_path):
    metrics, _ = evaluated(4, 50)
    for images, said in (([Image.new('L', (8, 8))], False), ([Image.new('L', (8, 8))] * 2, True)):
        write_report(tmp_path, metrics, ReportInputs(views=[Picture(images, 'a')]))
        assert ('above the local view' in (tmp_path / 'report.html').read_text(encoding='utf-8')) == said


def test_norms_are_those_of_the_rows():
    linear, conv = torch.nn.Linear(4, 3), torch.nn.Conv2d(4, 3, 1)
    found = classifier_norms(c=None, cb=linear, conv=conv, several=torch.nn.ModuleList([linear]))
    assert set(found) == {'cb', 'conv'}
    assert found['cb'] == pytest.approx([sum(w ** 2 for w in row) ** 0.5 for row in linear.weight.tolist()])


def test_without_matplotlib_the_html_is_written_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'glmc.report.plots', None)
    monkeypatch.delattr('glmc.report.plots', raising=False)
    metrics, predictions = evaluated(4, 50)
    path = try_report(tmp_path, metrics, lambda: ReportInputs(predictions=predictions))
    assert [record.getMessage() for record in caplog.records] == ['The report has no plots: pip install matplotlib']
    assert '<svg' not in path.read_text(encoding='utf-8')


def test_a_failed_report_fails_no_run(tmp_path, caplog):
    def create_inputs():
        raise OSError('no space left')
    assert try_report(tmp_path, evaluated(4, 50)[0], create_inputs) is None
    assert [record.getMessage() for record in caplog.records] == ['No report: OSError: no space left']


def test_html_of_a_table():
    assert '<td>1,234</td><td>&lt;b&gt;</td>' in table(('n', 'name'), [(1234, '<b>')])
    assert '<title>a &amp; b</title>' in html_document('a & b', '', [])
