"""Model card: valid by the Hub's own classes, equal to the metrics, without paths of this machine."""
import json
import re
from copy import deepcopy

import pytest
from conftest import coloured
from huggingface_hub import ModelCard
from timm.data import resolve_input_data_config

from glmc.export.card import METRICS, PLACEHOLDER, dataset_id, dataset_name, model_card, public_command
from glmc.export.export import export_model
from glmc.export.load import load_trained
from glmc.models.backbone import create_backbone
from glmc.predict import predict

SOURCE = dict(method='glmc', profile=dict(class_counts=[300, 60, 5]), recipe=dict(lr=0.1, mix_beta=1.0, img_size=None))
CONFIG = dict(architecture='resnet18', num_classes=3, label_names=['owl', 'crow', 'tit'],
              glmc=SOURCE, pretrained_cfg=dict(input_size=[3, 32, 32], license=None))
RESULT = dict(
    model='resnet18', method='glmc', data='/home/someone/private/birds', evaluated_on='validation', num_classes=3,
    num_images=30, train_images=365, fingerprint='f' * 64, seed=1, processes=1, precision='no', seconds=12.3, device='cpu',
    command='train_glmc.py --data-dir birds', shot_thresholds=[20, 100], shot_classes=dict(many=1, medium=1, few=1),
    train_counts=[300, 60, 5], per_class_accuracy=[90.0, 60.0, 30.0], per_class_images=[10, 10, 10],
    top1=60.0, top5=100.0, many=90.0, medium=60.0, few=30.0, class_mean=60.0, worst_class=30.0, macro_f1=58.123, ece=4.5,
    ece_many=1.0, ece_medium=2.0, ece_few=None)


def card(config: dict | None = None, **result) -> ModelCard:
    return ModelCard(model_card({**RESULT, **result}, config or CONFIG))


def with_source(**source) -> dict:
    return {**deepcopy(CONFIG), 'glmc': {**SOURCE, **source}}


def test_the_hub_reads_the_metrics():
    data = card().data
    assert (data.library_name, data.pipeline_tag) == ('timm', 'image-classification')
    assert 'license' not in data.to_dict(), 'the Hub shows an unknown licence as one'
    assert {'timm', 'long-tail', 'glmc'} <= set(data.tags)
    found = {result.metric_name: result for result in data.eval_results}
    assert {name: found[title].metric_value for name, (_, title) in METRICS.items()} == {
        name: round(RESULT[name], 2) for name in METRICS}
    assert {(r.task_type, r.dataset_name, r.dataset_split) for r in found.values()} == {
        ('image-classification', 'birds', 'validation')}


def test_the_table_shows_shot_groups():
    text = card().text
    assert '| many-shot | more than 100 | 1 | 90.00 | 1.00 |' in text
    assert '| medium-shot | 21 to 100 | 1 | 60.00 | 2.00 |' in text
    assert '| few-shot | at most 20 | 1 | 30.00 | – |' in text


def test_an_empty_group_is_a_dash_and_no_metric():
    found = card(few=None)
    assert '| few-shot | at most 20 | 1 | – | – |' in found.text
    assert 'few-shot accuracy' not in [result.metric_name for result in found.data.eval_results]


def test_no_folder_of_this_machine_is_shown():
    assert 'someone' not in str(card(evaluated_on='/home/someone/lists/test.txt'))


@pytest.mark.parametrize('data, known, name', [
    ('hfds/org/birds', 'org/birds', 'birds'), ('hfds/cifar100', 'cifar100', 'cifar100'), ('hfds//data/birds', None, 'birds'),
    ('torch/cifar100', None, 'cifar100'), ('photos', None, 'photos'), (None, None, 'unknown')])
def test_only_data_sets_of_the_hub_are_linked(data, known, name):
    assert (dataset_id(data), dataset_name(data)) == (known, name)
    assert card(data=data).data.datasets == (known and [known])


@pytest.mark.parametrize('chosen, name, datasets', [
    ('My birds', 'My birds', None), ('org/birds', 'org/birds', ['org/birds']), ('a/b/c <x>', 'a/b/c x', None)])
def test_the_data_set_has_the_name_that_the_user_gives(chosen, name, datasets):
    found = card(with_source(dataset_name=chosen))
    assert f'365 images of the data set `{name}`, 300 to 5 per class (imbalance 60).' in found.text
    assert found.data.datasets == datasets and 'long-tailed' not in found.text
    assert {(r.dataset_name, r.dataset_type) for r in found.data.eval_results} == {
        (name, datasets[0] if datasets else re.sub('[^a-z]+', '-', name.lower()))}


def test_the_worst_classes_are_named():
    assert ('Worst classes: `tit` 30.0 % (5 training images, 10 test images), `crow` 60.0 % (60 training images, '
            '10 test images), `owl`') in card().text
    text = card({**CONFIG, 'label_names': ['a`|<b>', 'crow', 'tit']}, per_class_accuracy=[0.0, 100.0, None],
                per_class_images=[1, 1, 0]).text
    assert 'Worst classes: `a b` 0.0 % (300 training images, 1 test image).' in text
    assert '1 class without images, not evaluated: `tit`.' in text


@pytest.mark.parametrize('command, shown', [
    ('/opt/glmc/train_glmc.py --data-dir /home/someone/birds -b 8', 'train_glmc.py --data-dir birds -b 8'),
    ('train_glmc.py --data-dir ../someone/birds --resume auto --epochs 5', 'train_glmc.py --data-dir birds --epochs 5'),
    ('train_glmc.py --data-dir=someone/birds --resume=someone/a.safetensors', 'train_glmc.py --data-dir=birds'),
    ('train_glmc.py --resume', 'train_glmc.py'),
    ('train_glmc.py -c hparams/pretrained.yaml --dataset hfds/org/birds', None),
    ('train_glmc.py -c /home/someone/my.yaml --dataset hfds//home/someone/birds',
     'train_glmc.py -c my.yaml --dataset hfds/birds'),
    ('train_glmc.py --model local-dir:/home/someone/net --head-init ~/someone/x',
     'train_glmc.py --model local-dir:net --head-init x'),
    ("train_glmc.py --data-dir 'C:\\someone\\my birds'", "train_glmc.py --data-dir 'my birds'"),
    ('train_glmc.py --model hf-hub:org/name --weight-decay 5e-4 --scale 0.08 1.0', None),
    ('finetune_glmc.py --model output/run /home/someone/run2', 'finetune_glmc.py --model output/run run2'),
    ("train_glmc.py 'unclosed", "train_glmc.py ''\"'\"'unclosed'")])
def test_the_command_shows_no_folder_of_this_machine(command, shown):
    assert public_command(command) == (shown or command)
    assert f'bash\n{shown or command}\n' in card(command=command).text


def test_the_licence_is_the_users_and_the_origin_is_named():
    config = with_source(base_model='timm/resnet18.a1_in1k')
    config['pretrained_cfg']['license'] = 'mit'
    found = card(config)
    assert (found.data.license, found.data.base_model) == ('mit', 'timm/resnet18.a1_in1k')
    assert found.data.to_dict()['base_model_relation'] == 'finetune'
    assert 'Fine-tuned from `timm/resnet18.a1_in1k`, whose licence and data apply' in found.text
    assert not {'base_model', 'base_model_relation'} & set(card().data.to_dict())
    assert 'Fine-tuned from other weights' in card(with_source(other_weights=True)).text


def test_the_training_section_lists_data_recipe_and_command():
    text = card().text
    for item in ('365 images, 300 to 5 per class (imbalance 60), fingerprint',
                 '`' + 'f' * 64 + '`', '`lr`: 0.1', '`mix_beta`: 1.0',
                 'seed 1, 1 process, mixed precision: no, 12 s on cpu', 'train_glmc.py --data-dir birds', PLACEHOLDER,
                 '## Limitations'):
        assert item in text
    assert 'img_size' not in text


def test_a_source_without_names_has_no_fingerprint():
    text = card(fingerprint=None).text
    assert '365 images, 300 to 5 per class (imbalance 60)\n' in text and 'None' not in text


@pytest.mark.parametrize('data', ['a|b`c', '<script>x', 'new\nline: - y', '"quoted": {', '---', "it's", '日本', '#', '  '])
def test_a_data_set_of_any_name_makes_a_card(data):
    found = card(data=data, evaluated_on=data, command=f'train_glmc.py --data-dir {data!r} ```')
    assert '<' not in found.text.split('## Training')[0] and len(found.data.eval_results) == len(METRICS)
    assert {result.dataset_name for result in found.data.eval_results} == {dataset_name(data)}
    assert '~~~bash\ntrain_glmc.py' in found.text


@pytest.mark.parametrize('value', [None, float('nan'), float('inf')])
def test_a_missing_metric_is_not_listed(value):
    assert 'macro F1' not in [result.metric_name for result in card(macro_f1=value).data.eval_results]


@pytest.mark.parametrize('architecture, own', [('resnet32_cifar', True), ('resnet32ts', False), ('resnet18', False)])
def test_only_a_net_of_ours_needs_an_import(architecture, own):
    usage = card({**deepcopy(CONFIG), 'architecture': architecture}).text.split('## Usage')[1]
    assert usage.lstrip().startswith('```python\nimport glmc' if own else '```python\nimport timm')


@pytest.mark.parametrize('model, options', [
    ('test_resnet', {}), ('test_resnet', dict(in_chans=1)), ('resnet32_cifar', {}), ('test_vit', dict(num_classes=8))])
def test_the_usage_runs_as_printed_and_predicts_like_the_command(model, options, tmp_path, monkeypatch, capsys):
    labels = [f'class {c}' for c in range(options.pop('num_classes', 3))]
    net = create_backbone(model, num_classes=len(labels), **options)
    export = export_model(tmp_path / 'PATH', net, metrics=RESULT, source=SOURCE, class_names=labels,
                          data_config=resolve_input_data_config(net, {}))
    coloured(1, 2, (70, 50)).save(tmp_path / 'photo.jpg')
    code = re.search(r'## Usage.*?```python\n(.*?)```', (export / 'README.md').read_text(), re.S)[1]
    assert len(code.splitlines()) <= 13
    monkeypatch.chdir(tmp_path)
    exec(compile(code, 'README.md', 'exec'), {})
    printed = [line.split('  ') for line in capsys.readouterr().out.splitlines()]
    expected = predict(load_trained(str(export)), ['photo.jpg'], workers=0)[0].sort(descending=True)
    top = min(5, len(labels))
    assert [name for _, name in printed] == [labels[c] for c in expected.indices[:top]]
    assert [float(p) for p, _ in printed] == pytest.approx(expected.values[:top].tolist(), abs=6e-4)


def test_a_card_without_evaluation():
    result = {name: value for name, value in RESULT.items() if name not in METRICS and not name.startswith('shot')}
    found = ModelCard(model_card(result, CONFIG))
    assert 'Not evaluated.' in found.text
    assert found.data.eval_results is None


@pytest.mark.parametrize('report, plots, expected', [
    (False, False, 0), (True, False, 1), (True, True, 2)])
def test_plots_are_shown_where_there_are_some(report, plots, expected):
    text = model_card(RESULT, CONFIG, report, plots)
    assert ('report.html' in text) + ('plots/accuracy.png' in text) == expected


def test_the_card_of_a_run(finished_run):
    export = finished_run / 'export'
    found, metrics = ModelCard.load(export / 'README.md'), json.loads((export / 'metrics.json').read_text())
    accuracy = {result.metric_name: result.metric_value for result in found.data.eval_results}
    assert accuracy['top-1 accuracy'] == round(metrics['top1'], 2)
    assert metrics['fingerprint'] in found.text
    assert '`reweight_power`: 1.0' in found.text
