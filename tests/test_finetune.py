"""finetune_glmc.py: one table, an export for each classifier that plain timm loads, and wrong input."""
import csv
import json
import logging
import re
import shutil
import sys

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import COUNTS, TINY, Outcome, free_port, launch_train, run_command, write_folders
from PIL import Image
from safetensors.torch import load_file
from timm.models._hub import save_for_hf

from glmc.cli import run_script
from glmc.export.load import load_trained
from glmc.models.backbone import create_backbone
from glmc.stage2 import select
from glmc.stage2.classifiers import CLASSIFIERS, PROBE_CLASSIFIERS, NearestNeighbours
from glmc.training.checkpoint import load_checkpoint
from glmc.training.checkpoints import BEST

ALONE = '''
import sys, timm, torch
model = timm.create_model(sys.argv[1], pretrained=True).eval()
assert 'glmc' not in sys.modules
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
'''


@pytest.fixture
def finetune(capsys, monkeypatch, tmp_path):
    """Run finetune_glmc.py in this process: options -> outcome; results are in tmp_path/out/result."""
    import finetune_glmc

    def run(*options) -> Outcome:
        AcceleratorState._reset_state(True)
        words = ['finetune_glmc.py', '--workers', '0', '--no-report', '--output', tmp_path / 'out', '--experiment', 'result',
                 *options]
        monkeypatch.setattr(sys, 'argv', list(map(str, words)))
        capsys.readouterr()
        code = run_script(finetune_glmc.main)
        return Outcome(code, *capsys.readouterr())
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    yield run
    AcceleratorState._reset_state(True)
    logging.getLogger().handlers = handlers
    logging.getLogger().setLevel(level)


def metrics_of(folder) -> dict:
    export = folder / 'export' / 'metrics.json'
    return json.loads((export if export.exists() else folder / 'metrics.json').read_text())


def without_counts(run, folder):
    """An export that says nothing of its training."""
    shutil.copytree(run / 'export', folder)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'glmc': {}}))
    return folder


@pytest.mark.parametrize('place', ['export', '.', 'checkpoints/epoch-0001.safetensors'])
def test_all_classifiers_in_one_table(finetune, finished_run, folders, tmp_path, place):
    possible = [name for name in CLASSIFIERS if place.startswith('checkpoints') or name != 'average']
    outcome = finetune('--model', finished_run / place, '--data-dir', folders, '--report')
    assert outcome.code == 0, outcome.err
    result, first = tmp_path / 'out' / 'result', json.loads((finished_run / 'export' / 'metrics.json').read_text())
    with open(result / 'stage2.csv', newline='') as file:
        rows = {row['classifier']: row for row in csv.DictReader(file)}
    assert list(rows) == ['stage 1', *possible]
    exported = metrics_of(result / possible[0])
    assert {(row['commit'], row['command']) for row in rows.values()} == {(exported['commit'] or '', exported['command'])}
    assert float(rows['stage 1']['top1']) == pytest.approx(first['top1'])  # the same as the run itself measured
    assert float(rows['stage 1']['ece']) == pytest.approx(first['ece'], rel=1e-3)
    report = (result / 'report.html').read_text()
    assert all(name in report for name in possible) and (result / 'plots' / 'accuracy.png').exists()
    printed = [line.split()[0] for line in outcome.out.splitlines() if re.match(r'\w.* +\d+\.\d+ ', line)]
    assert printed[1:] == ['stage', *possible]
    assert not (result / 'knn' / 'export').exists() and (result / 'knn' / 'per_class.csv').exists()
    for name in possible:
        metrics = metrics_of(result / name)
        assert metrics['method'] == f'glmc+{name}' and metrics['stage2']['name'] == name
        assert metrics['stage1']['method'] == 'glmc' and metrics['stage1']['top1'] == pytest.approx(first['top1'])
        assert metrics['top1'] == float(rows[name]['top1']) and metrics['train_counts'] == list(COUNTS.values())
        assert metrics['fingerprint'] == first['fingerprint'] and metrics['evaluated_on'] == 'validation'
        assert (result / name / 'per_class.csv').read_text().startswith('class,name,train_images')
        if name == 'knn':
            continue
        card = (result / name / 'export' / 'README.md').read_text()
        assert f'trained with glmc+{name}' in card and f'`stage2_name`: {name}' in card


def logits_without_the_package(export, images, folder) -> torch.Tensor:
    torch.save(images, folder / 'images.pt')
    outcome = run_command(sys.executable, '-c', ALONE, f'local-dir:{export}', folder / 'images.pt', folder / 'logits.pt',
                          cwd=folder, PYTHONPATH='')
    assert outcome.code == 0, outcome.err
    return torch.load(folder / 'logits.pt')


def test_exports_are_plain_timm_models_that_measure_what_the_table_says(finetune, finished_run, folders, tmp_path):
    assert finetune('--model', finished_run, '--data-dir', folders, '--stage2', 'ncm,maxnorm').code == 0
    for name in ('ncm', 'maxnorm'):
        export = tmp_path / 'out' / 'result' / name / 'export'
        model = timm.create_model(f'local-dir:{export}', pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        files = sorted((folders / 'validation').rglob('*.png'))
        images = torch.stack([transform(Image.open(path).convert('RGB')) for path in files])
        logits = model(images)
        if name == 'ncm':
            assert torch.equal(logits, logits_without_the_package(export, images, tmp_path))
        hits = [list(COUNTS)[label] == path.parent.name for label, path in zip(logits.argmax(1), files, strict=True)]
        assert metrics_of(export.parent)['top1'] == pytest.approx(100 * sum(hits) / len(hits))
        assert json.loads((export / 'config.json').read_text())['glmc']['prior'] == 'uniform'


def test_the_encoder_is_that_of_stage_1(finetune, finished_run, folders, tmp_path):
    assert finetune('--model', finished_run, '--data-dir', folders, '--stage2', 'crt').code == 0
    one, two = (timm.create_model(f'local-dir:{place}', pretrained=True).state_dict()
                for place in (finished_run / 'export', tmp_path / 'out' / 'result' / 'crt' / 'export'))
    assert {name for name in one if not torch.equal(one[name], two[name])} == {'fc.weight', 'fc.bias'}


def test_several_models_in_one_table(finetune, finished_run, folders, tmp_path):
    epochs = [finished_run / 'checkpoints' / f'epoch-000{k}.safetensors' for k in range(2)]
    outcome = finetune('--model', *epochs, '--data-dir', folders, '--stage2', 'ncm,tau_norm')
    assert outcome.code == 0, outcome.err
    result = tmp_path / 'out' / 'result'
    with open(result / 'stage2.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['model'], row['classifier']) for row in rows] == [
        (str(path), name) for path in epochs for name in ('stage 1', 'ncm', 'tau_norm')]
    means = outcome.out.partition('Mean of 2 models:')[2].splitlines()
    values = [float(row['top1']) for row in rows if row['classifier'] == 'ncm']
    assert re.match(rf'ncm +{sum(values) / 2:.2f} ± {abs(values[0] - values[1]) / 2 ** 0.5:.2f} ', means[3])
    assert metrics_of(result / '2-epoch-0001.safetensors' / 'ncm')['top1'] == values[1]


def test_features_are_found_again(finetune, finished_run, folders):
    options = ('--model', finished_run, '--data-dir', folders, '--stage2', 'ncm')
    first, second = finetune(*options), finetune(*options, '--experiment', 'second')
    assert first.err.count('Extracting features') == 2 and 'read from' not in first.err
    assert second.err.count('read from') == 2 and 'Extracting' not in second.err
    assert [line for line in first.out.splitlines() if line.startswith('ncm')][0].split()[:7] == \
        [line for line in second.out.splitlines() if line.startswith('ncm')][0].split()[:7]


@pytest.mark.parametrize('options', ['--stage2-holdout 0.3', '--holdout 1'])
def test_hyper_parameters_are_chosen_on_held_out_training_images(finetune, finished_run, folders, tmp_path, options):
    outcome = finetune('--model', finished_run, '--data-dir', folders, '--stage2', 'tau_norm,ncm,logit_adjust',
                       *options.split())
    assert outcome.code == 0 and outcome.err.count('on held-out images') == 3
    assert len(re.findall(r' \*$', outcome.out, re.M)) == 1
    results = [metrics_of(tmp_path / 'out' / 'result' / name) for name in ('tau_norm', 'ncm', 'logit_adjust')]
    assert all(result['stage2']['heldout_class_mean'] is not None for result in results)
    assert ('fingerprints' in outcome.err) == options.startswith('--holdout')


def test_the_choice_never_sees_the_validation_images(finetune, finished_run, folders, tmp_path):
    """Other validation images, same choices."""
    shutil.copytree(folders / 'train', tmp_path / 'other' / 'train')
    write_folders(tmp_path / 'other' / 'validation', dict.fromkeys(COUNTS, 2), start=900)
    chosen = []
    for place in (folders, tmp_path / 'other'):
        assert finetune('--model', finished_run, '--data-dir', place, '--stage2', 'maxnorm,tau_norm',
                        '--experiment', place.name, '--stage2-holdout', '1').code == 0
        chosen.append([metrics_of(tmp_path / 'out' / place.name / name)['stage2'] for name in ('maxnorm', 'tau_norm')])
    timing = ('seconds', 'feature_seconds')
    assert [{k: v for k, v in each.items() if k not in timing} for each in chosen[0]] == \
        [{k: v for k, v in each.items() if k not in timing} for each in chosen[1]]


def test_settings_and_stage_1_are_followed(finetune, script, tmp_path):
    """The demonstration: long tail, augmentation and thresholds of stage 1 without options."""
    assert script(*TINY, '--output', tmp_path, '--experiment', 'demo', '--shot-thresholds', '10', '50').code == 0
    outcome = finetune('--model', tmp_path / 'demo', '--stage2', 'los', '--stage2-kwargs', 'los.epochs=1', 'los.lr=0.5')
    assert outcome.code == 0, outcome.err
    metrics, first = metrics_of(tmp_path / 'out' / 'result' / 'los'), metrics_of(tmp_path / 'demo')
    assert metrics['fingerprint'] == first['fingerprint'] and metrics['shot_thresholds'] == [10, 50]
    assert metrics['stage1']['top1'] == pytest.approx(first['top1'])
    assert (metrics['stage2']['epochs'], metrics['stage2']['lr']) == (1, 0.5)
    assert '--imbalance-factor 20.0, as in stage 1' in outcome.err and 'fingerprints' not in outcome.err


def test_counts_from_a_file(finetune, finished_run, folders, tmp_path):
    bare = without_counts(finished_run, tmp_path / 'bare')
    (tmp_path / 'counts.json').write_text(json.dumps(list(COUNTS.values())))
    outcome = finetune('--model', bare, '--data-dir', folders, '--stage2', 'logit_adjust', '--class-counts',
                       tmp_path / 'counts.json')
    assert outcome.code == 0, outcome.err
    assert metrics_of(tmp_path / 'out' / 'result' / 'logit_adjust')['method'] == 'unknown+logit_adjust'


def test_an_option_without_effect_is_warned_about(finetune, finished_run, folders):
    outcome = finetune('--model', finished_run, '--data-dir', folders, '--stage2', 'ncm', '--feature-views', '0', '--hflip',
                       '0', '--lt-type', 'step', '--hub-private')
    assert outcome.code == 0, outcome.err
    assert [line for line in outcome.err.splitlines() if 'no effect' in line] == [
        '--hflip has no effect with --feature-views 0', '--hub-private has no effect without --push-to-hub',
        '--lt-type has no effect without --imbalance-factor']


def check_encoder_only(outcome, result, names=('cat', 'bee', 'ant')) -> dict:
    """The best of all classifiers is exported as a timm model that validate_glmc.py and others load from the folder."""
    assert outcome.code == 0, outcome.err
    with open(result / 'stage2.csv', newline='') as file:
        rows = {row['classifier']: row for row in csv.DictReader(file)}
    assert list(rows) == list(PROBE_CLASSIFIERS)
    metrics, config = metrics_of(result), json.loads((result / 'export' / 'config.json').read_text())
    name = metrics['stage2']['name']
    linear = [each for each in rows if each != 'knn']
    assert name == max(linear, key=lambda each: float(rows[each]['heldout_class_mean']))
    assert metrics['method'] == config['glmc']['method'] == f'frozen+{name}'
    assert config['glmc']['prior'] == ('train' if name == 'linear_probe' else 'uniform')
    assert config['glmc']['other_weights'] and config['label_names'] == sorted(names)
    assert config['glmc']['profile']['class_counts'] == metrics['train_counts']
    assert all((result / each / 'per_class.csv').exists() and not (result / each / 'export').exists() for each in rows)
    assert (result / 'per_class.csv').exists() and (result / 'confused_pairs.csv').exists()
    assert outcome.out.rstrip().endswith(f'Next: python -m glmc.predict {result} IMAGES')
    trained = load_trained(str(result))
    assert trained.num_classes == len(names) and trained.class_names == sorted(names)
    return metrics


def test_a_model_without_training_counts_is_an_encoder(finetune, finished_run, folders, tmp_path):
    bare = without_counts(finished_run, tmp_path / 'bare')
    outcome = finetune('--model', bare, '--data-dir', folders, '--report')
    metrics = check_encoder_only(outcome, tmp_path / 'out' / 'result')
    assert outcome.err.count('only its encoder is used: it records no training images') == 1 and 'x 1 view ' in outcome.err
    assert 'linear_probe' in (tmp_path / 'out' / 'result' / 'report.html').read_text()
    assert metrics['stage2']['feature_views'] == 0 and metrics['stage2']['feature_precision'] == 'float32'
    assert metrics['train_counts'] == list(COUNTS.values())


def test_an_export_with_other_classes_is_an_encoder(finetune, finished_run, places, tmp_path):
    for place, names, reason in (('four', [*COUNTS, 'dog'], 'it has 3 classes, the training data has 4'),
                                 ('others', ['ant', 'dog', 'emu'], 'its classes are others')):
        outcome = finetune('--model', finished_run, '--data-dir', places[place], '--experiment', place)
        check_encoder_only(outcome, tmp_path / 'out' / place, names)
        assert outcome.err.count(f'only its encoder is used: {reason}') == 1


def test_an_architecture_is_an_encoder(finetune, folders, tmp_path, monkeypatch):
    """With options of the input; the pretrained weights come from a file, without the Hub."""
    import finetune_glmc
    monkeypatch.setattr(finetune_glmc, 'load_trained', lambda name, num_classes, **options: load_trained(
        name, num_classes=3, checkpoint=weights_of(name, tmp_path, in_chans=1), **options))
    outcome = finetune('--model', 'test_resnet', '--data-dir', folders, '--img-size', '48', '--in-chans', '1',
                       '--mean', '0.4', '--std', '0.2', '--crop-pct', '1', '--interpolation', 'bilinear', '--stage2', 'ncm')
    assert outcome.code == 0, outcome.err
    result = tmp_path / 'out' / 'result'
    config = json.loads((result / 'export' / 'config.json').read_text())['pretrained_cfg']
    assert (config['input_size'], config['mean'], config['crop_pct']) == ([1, 48, 48], [0.4], 1.0)
    assert not (result / 'ncm' / 'export').exists()


def test_a_best_classifier_that_is_not_linear_is_named(finetune, finished_run, folders, tmp_path, monkeypatch):
    search = select.search
    monkeypatch.setattr('glmc.stage2.finetune.search', lambda classifier, *words, **options: (
        classifier, 101.0) if isinstance(classifier, NearestNeighbours) else search(classifier, *words, **options))
    outcome = finetune('--model', without_counts(finished_run, tmp_path / 'bare'), '--data-dir', folders, '--stage2', 'knn')
    assert outcome.code == 0, outcome.err
    assert 'knn is the best on held-out images, but not linear: linear_probe is exported' in outcome.out
    metrics = metrics_of(tmp_path / 'out' / 'result')
    assert metrics['method'] == 'frozen+linear_probe' and 'stage1' not in metrics
    assert json.loads((tmp_path / 'out' / 'result' / 'export' / 'config.json').read_text())['glmc']['prior'] == 'train'


def test_classes_of_one_image_need_no_choice(finetune, finished_run, folders, tmp_path):
    write_folders(tmp_path / 'few' / 'train', dict.fromkeys(COUNTS, 1))
    shutil.copytree(folders / 'validation', tmp_path / 'few' / 'validation')
    bare = without_counts(finished_run, tmp_path / 'bare')
    outcome = finetune('--model', bare, '--data-dir', tmp_path / 'few', '--stage2', 'ncm,lda')
    assert outcome.code == 0, outcome.err
    assert all((tmp_path / 'out' / 'result' / name / 'export').exists() for name in ('linear_probe', 'ncm', 'lda'))


ERRORS = {  # options, with {name} of a place -> what the line says
    '': '--model: expected an architecture of timm',
    '--model {run} --stage2 maxnrm': "--stage2: expected all, or some of maxnorm.*found 'maxnrm'; did you mean maxnorm",
    '--model {run} --stage2 average': '--stage2 average: needs both classifiers of GLMC.*one of its checkpoints',
    '--model {run} --stage2-kwargs crt.rate=3': '--stage2-kwargs crt.rate: expected one of lr, epochs, weight_decay',
    '--model {run} --stage2-holdout 4': "--stage2-holdout 4: class 'cat' has 4 training images, setting 4 aside leaves none",
    '--model {run} --holdout 14': '--holdout 14: no class has enough images, the largest has 14',
    '--model {run} --stage2-holdout -1': '--stage2-holdout: expected a number > 0, found -1',
    '--model {run} --feature-views -1': '--feature-views: expected a number >= 0, found -1',
    '--model {run} --class-counts {two}': '--class-counts .*: found 2 classes, --model .* has 3',
    '--model {reversed}': "--model .*: was trained on the classes in another order.*has 'ant' where the model has 'cat'",
    '--model {run} --stage2 linear_probe': '--stage2: expected all.*linear_probe is for models without a trained classifier',
    '--model {bare} --stage2 average': '--stage2 average: needs both classifiers of GLMC',
    '--model {bare} --stage2-kwargs ncm.scale=x': '--stage2-kwargs ncm.scale: expected float',
    '--model levit_128s': '--model levit_128s: .* one linear layer.*, found 2 heads',
    '--model {run} {bare}': '--model .*bare: has no trained classifier for these classes, unlike .*first; expected one kind',
    '--model {run} --in-chans 1': '--in-chans 1: is for a bare architecture',
    '--model {run} --push-to-hub ORG/NAME': '--push-to-hub ORG/NAME: expected one --model, and one classifier',
    '--model levit_128s --class-counts {three}': '--model levit_128s: .* one linear layer.*, found 2 heads',
    '--model dla46_c --class-counts {three}': '--model dla46_c: .* one linear layer.*, found Conv2d',
    '--model {convnext} --img-size 7': '--model .*, --img-size: cannot take an image of 7x7: ',
    '--model nowhere/run': '--model nowhere/run: no such file or folder',
    '--model {run} --stage3 crt': '--stage3: unknown option; did you mean --stage2',
}


@pytest.fixture(scope='module')
def places(finished_run, folders, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp('places')
    for name, counts in (('four', {**COUNTS, 'dog': 3}), ('others', {'ant': 5, 'dog': 3, 'emu': 3})):
        for split in ('train', 'validation'):
            write_folders(root / name / split, counts)
    (root / 'two.txt').write_text('3\n4\n')
    (root / 'three.txt').write_text('3\n4\n5\n')
    reverse = shutil.copytree(finished_run / 'export', root / 'reversed')
    config = json.loads((reverse / 'config.json').read_text())
    (reverse / 'config.json').write_text(json.dumps({**config, 'label_names': config['label_names'][::-1]}))
    model = timm.create_model('test_convnext', num_classes=3)
    save_for_hf(model, root / 'convnext', model_config=dict(label_names=list(COUNTS)), safe_serialization=True)
    return dict(convnext=root / 'convnext', reversed=reverse,
                run=finished_run, bare=without_counts(finished_run, root / 'bare'), four=root / 'four',
                others=root / 'others', two=root / 'two.txt', three=root / 'three.txt')


@pytest.mark.parametrize('options, message', ERRORS.items(), ids=list(ERRORS))
def test_wrong_input_is_one_line(finetune, folders, places, tmp_path, monkeypatch, options, message):
    if 'levit' in options or 'dla' in options:
        import finetune_glmc
        monkeypatch.setattr(finetune_glmc, 'load_trained', lambda name, **_: load_trained(  # without the weights of the Hub
            name, num_classes=3, img_size=64, checkpoint=weights_of(name, tmp_path)))
    words = options.format(**places).split()
    outcome = finetune(*([] if '--data-dir' in words else ['--data-dir', folders]), *words)
    assert outcome.code == 2 and not (tmp_path / 'out' / 'result').exists()
    *_, line = outcome.err.splitlines()
    assert re.search(f'^error: {message}', line), line
    assert 'Traceback' not in outcome.err


def weights_of(name: str, folder, **options) -> str:
    torch.save(create_backbone(name, num_classes=3, img_size=64, **options).state_dict(), folder / f'{name}.pth')
    return str(folder / f'{name}.pth')


def test_the_chosen_one_is_pushed(finetune, finished_run, folders, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr('finetune_glmc.try_push', lambda *words: pushed.append(words))
    options = ('--model', finished_run, '--data-dir', folders, '--push-to-hub', 'ORG/NAME', '--hub-private')
    assert finetune(*options, '--stage2', 'ncm,tau_norm,crt', '--stage2-holdout', '1').code == 0
    result = tmp_path / 'out' / 'result'
    best = max(('ncm', 'tau_norm', 'crt'), key=lambda name: metrics_of(result / name)['stage2']['heldout_class_mean'])
    assert metrics_of(result)['stage2']['name'] == best
    assert pushed == [(result / 'export', 'ORG/NAME', True, None)]


def test_the_default_choice_of_an_encoder_is_pushed(finetune, finished_run, folders, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr('finetune_glmc.try_push', lambda *words: pushed.append(words))
    outcome = finetune('--model', without_counts(finished_run, tmp_path / 'bare'), '--data-dir', folders, '--stage2',
                       'ncm,logit_adjust', '--push-to-hub', 'ORG/NAME')
    assert outcome.code == 0, outcome.err
    assert pushed == [(tmp_path / 'out' / 'result' / 'export', 'ORG/NAME', False, None)]


def check_run(run) -> None:
    """A run of train_glmc.py with --stage2 ncm,lws."""
    first = metrics_of(run)
    with open(run / 'stage2' / 'stage2.csv', newline='') as file:
        rows = {row['classifier']: row for row in csv.DictReader(file)}
    assert list(rows) == ['stage 1', 'ncm', 'lws'] and float(rows['stage 1']['top1']) == pytest.approx(first['top1'])
    for name in ('ncm', 'lws'):
        metrics = metrics_of(run / 'stage2' / name)
        assert metrics['method'] == f'glmc+{name}' and metrics['stage1']['seconds'] == first['seconds']
        assert metrics['seconds'] >= first['seconds'] and metrics['num_images'] == 13


def test_both_heads_are_averaged(script, finetune, folders, tmp_path):
    """At the end of a run and from its checkpoint: of the best epoch, and of its moving average."""
    average = ('--holdout', '1', '--stage2', 'average', '--stage2-kwargs', 'average.weight=0.25')
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, '--experiment', 'run', '--epochs', '2',
                     '--model-ema', '--model-ema-decay', '0.5', *average)
    assert outcome.code == 0, outcome.err
    checkpoint = tmp_path / 'run' / 'checkpoints' / BEST
    assert finetune('--model', checkpoint, '--data-dir', folders, *average).code == 0
    saved = load_checkpoint(checkpoint)['ema']
    heads = saved['state_dict_ema']['fc.weight'], saved['task_state_ema']['classifier.weight']
    for result in (tmp_path / 'run' / 'stage2', tmp_path / 'out' / 'result'):
        metrics = metrics_of(result / 'average')
        assert metrics['stage2']['weight'] == 0.25  # as given, while τ is chosen on the held-out images
        found = load_file(result / 'export' / 'model.safetensors')
        torch.testing.assert_close(found['fc.weight'], 0.25 * heads[0] + 0.75 * heads[1])
        assert metrics['method'] == 'glmc+average'


def test_a_run_ends_with_stage_2(script, folders, tmp_path):
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, '--experiment', 'run', '--stage2', 'ncm,lws')
    assert outcome.code == 0, outcome.err
    check_run(tmp_path / 'run')


@pytest.mark.slow
def test_a_run_of_two_processes_ends_with_stage_2(folders, tmp_path):
    launcher = ('--multi_gpu', '--num_processes', '2', '--mixed_precision', 'no', '--main_process_port', str(free_port()))
    outcome = launch_train(*TINY, '--batch-size', '4', '--data-dir', folders, '--output', tmp_path, '--experiment', 'run',
                           '--stage2', 'ncm,lws', launcher=launcher)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count('Stage 2 on 13 images') == 1
    check_run(tmp_path / 'run')


@pytest.mark.parametrize('options, message', [
    ('--stage2 maxnrm', 'did you mean maxnorm'), ('--stage2 los --stage2-kwargs los.epochs=x', "los.epochs: expected int"),
    ('--stage2 los --stage2-holdout 4', "class 'cat' has 4 training images"),
    ('--stage2 los --model levit_128s --img-size 64', 'found 2 heads')])
def test_a_run_refuses_a_wrong_stage_2_before_it_trains(script, folders, tmp_path, options, message):
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, '--experiment', 'run', *options.split())
    assert outcome.code == 2 and message in outcome.err.splitlines()[-1] and 'Epoch 1' not in outcome.err


def test_a_run_is_continued_on_its_own_images(finetune, finished_run, folders, tmp_path):
    outcome = finetune('--model', finished_run, '--stage2', 'ncm')
    assert outcome.code == 0, outcome.err
    assert f'Data of the run: --data-dir {folders}' in outcome.err and 'differs from that of stage 1' not in outcome.err
    assert json.loads((tmp_path / 'out' / 'result' / 'ncm' / 'metrics.json').read_text())['num_images'] == 13
