"""A sample of tests/sweep_backbones.py: twenty models of modules that have, or once had, something odd."""
import csv
import sys

from conftest import ROOT, run_command

SAMPLE = ('beit_base_patch16_224', 'coat_tiny', 'convnext_atto', 'crossvit_tiny_240', 'dla46_c', 'edgenext_xx_small',
          'efficientformer_l1', 'efficientvit_m0', 'ghostnet_050', 'levit_128s', 'mambaout_femto', 'mobilenetv3_small_050',
          'pit_ti_distilled_224', 'qwen3_vit_88m_enc', 'resnet18', 'resnetv2_50', 'shvit_s1', 'swin_tiny_patch4_window7_224',
          'vit_tiny_patch16_224', 'volo_d1_224')
TRAINED = {'convnext', 'crossvit', 'dla', 'edgenext', 'efficientvit_msra', 'ghostnet', 'levit', 'mambaout', 'mobilenetv3',
           'pit', 'resnet', 'shvit', 'vision_transformer', 'coat'}


def test_sample(tmp_path):
    path, small = tmp_path / 'all.csv', tmp_path / 'small.csv'
    script = ROOT / 'tests' / 'sweep_backbones.py'
    outcome = run_command(sys.executable, script, path, '--filter', *SAMPLE, '--only', 'shapes')
    with open(path, newline='') as file:
        rows = list(csv.DictReader(file))
    assert {row['model']: row['outcome'] for row in rows} == {
        name: 'rejected' if name == 'qwen3_vit_88m_enc' else 'ok' for name in SAMPLE}, outcome
    assert 'qwen3_vit_88m_enc: --model qwen3_vit_88m_enc: expected a model with a classifier, found' in outcome.out
    with open(small, 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row for row in rows if row['module'] in TRAINED)
    outcome = run_command(sys.executable, script, small, '--only', 'train')
    with open(small, newline='') as file:
        trained = {row['module']: row['outcome'] for row in csv.DictReader(file) if row['check'] == 'train'}
    assert trained == dict.fromkeys(TRAINED, 'ok'), outcome
