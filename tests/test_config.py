"""Options: command line over YAML over default; mistakes, help, options without effect and options that exclude others."""
import os
import re
import time
from argparse import ArgumentTypeError, Namespace

import pytest
import yaml
from conftest import ROOT

from glmc.cli import number, parse_args, pick, run_script
from glmc.config import (
    COMMON,
    CONFLICTS,
    DEMONSTRATION,
    NOT_TRAINING,
    SCRATCH,
    TRAIN_NEEDS,
    finetune_parser,
    flag,
    refuse_conflicts,
    train_parser,
    unused_options,
)
from glmc.errors import ImageError, InputError
from glmc.methods import METHODS, unused_method_options
from glmc.run_folder import create_run_folder


def parse(*argv: str):
    return parse_args(train_parser(METHODS), list(argv))


@pytest.fixture
def config(tmp_path):
    """Text of a YAML file -> the flags that name it."""
    def write(text: str) -> list[str]:
        path = tmp_path / 'options.yaml'
        path.write_text(text, encoding='utf-8')
        return ['--config', str(path)]
    return write


def message(*argv: str) -> str:
    with pytest.raises(InputError) as error:
        parse(*argv)
    text = str(error.value)
    assert '\n' not in text
    return text


def test_defaults():
    options, given = parse('--data-dir', 'images')
    assert given == {'data_dir'}
    assert (options.model, options.method, options.opt, options.lr, options.shot_thresholds) == (
        'resnet18', 'glmc_one_view', 'nmuon', None, [20, 100])


def test_command_line_wins_over_file_and_file_over_default(config):
    options, given = parse(*config('epochs: 7\nlr: 0.3\nseed: 1\n'), '--lr', '0.5', '--batch-size', '16')
    assert (options.epochs, options.lr, options.seed, options.batch_size, options.grad_accum_steps) == (7, 0.5, 1, 16, 1)
    assert given == {'epochs', 'lr', 'seed', 'batch_size'}


def test_command_line_wins_with_a_default_value(config):
    options, given = parse(*config('epochs: 7\namp: true\n'), '--epochs', '60')
    assert (options.epochs, options.amp) == (60, True)
    assert given == {'epochs', 'amp'}


def test_keys_may_have_dashes_or_underscores(config):
    options, _ = parse(*config('batch-size: 8\nweight_decay: 0.1\n'))
    assert (options.batch_size, options.weight_decay) == (8, 0.1)


@pytest.mark.parametrize('text, name, value', [
    ('lr: 1e-4', 'lr', 1e-4), ('lr: 1', 'lr', 1.0), ('opt_betas: [0.9, 1e-1]', 'opt_betas', [0.9, 0.1]),
    ('shot-thresholds: [5, 50]', 'shot_thresholds', [5, 50]), ('lr: null', 'lr', None), ('amp: false', 'amp', False),
    ('model-kwargs: {depth: 2, channels: [4, 8]}', 'model_kwargs', {'depth': 2, 'channels': [4, 8]}),
    ('lt-split: first', 'lt_split', 'first')])
def test_yaml_values_have_the_options_type(config, text, name, value):
    found = getattr(parse(*config(text))[0], name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize('text', ['', '# only a comment\n'])
def test_an_empty_file_sets_nothing(config, text):
    assert parse(*config(text))[1] == set()


@pytest.mark.parametrize('text, expected', [
    ('learning-rat: 0.1', "unknown key 'learning-rat'"), ('epoch: 5', "unknown key 'epoch'; did you mean epochs?"),
    ('help: true', "unknown key 'help'"), ('config: other.yaml', "unknown key 'config'"), ('1: 2', 'unknown key 1'),
    ('lr: true', 'lr: expected float, found True'), ('epochs: true', 'epochs: expected int, found True'),
    ('lr: high', "lr: expected float, found 'high'"), ('epochs: 7.5', 'epochs: expected int, found 7.5'),
    ('epochs: [7]', r'epochs: expected int, found [7]'), ('epochs: null', 'epochs: expected int, found None'),
    ('model: 18', 'model: expected str, found 18'), ('model: [resnet18]', 'model: expected str, found'),
    ('amp: 1', 'amp: expected true or false, found 1'), ('amp: "yes"', "amp: expected true or false, found 'yes'"),
    ('shot-thresholds: [20]', 'shot-thresholds: expected a list of 2 values, found [20]'),
    ('shot-thresholds: [1, 2, 3]', 'expected a list of 2 values'), ('shot-thresholds: 20', 'expected a list of 2 values'),
    ('shot-thresholds: [1, x]', "expected int, found 'x'"), ('shot-thresholds: [1, true]', 'expected int, found True'),
    ('opt-betas: 0.9', 'opt-betas: expected a list of values, found 0.9'),
    ('model-kwargs: depth=2', "model-kwargs: expected a mapping, found 'depth=2'"),
    ('method: glcm', 'method: expected one of ce, '), ('lt-split: last', 'expected one of cao, first, random; found'),
    ('epochs: 0', 'epochs: expected a number >= 1, found 0'), ('lr: 0', 'lr: expected a number > 0, found 0'),
    ('hflip: 1.5', 'hflip: expected a number >= 0 and <= 1, found 1.5'),
    ('lr: .nan', 'lr: expected a number > 0, found nan'),
    ('- epochs', 'expected `option: value` lines, found a list'), ('epochs: [', 'cannot be read as YAML'),
    ('a: !!python/object/apply:os.getcwd []', 'cannot be read as YAML')])
def test_a_wrong_file_is_one_line_that_names_it(config, text, expected):
    flags = config(text)
    found = message(*flags)
    assert found.startswith(f'--config {flags[1]}: ')
    assert expected in found


def test_a_missing_file_is_one_line(tmp_path):
    assert 'no.yaml: cannot be read' in message('--config', str(tmp_path / 'no.yaml'))
    assert 'cannot be read' in message('--config', str(tmp_path))


@pytest.mark.parametrize('argv, expected', [
    (['--learnin-rate', '1'], '--learnin-rate: unknown option'), (['--epoch', '5'], 'did you mean --epochs?'),
    (['--epoch=5'], '--epoch: unknown option; did you mean --epochs?'), (['images'], 'images: unexpected argument'),
    (['--epochs', '0'], '--epochs: expected a number >= 1, found 0'),
    (['--epochs', 'ten'], "--epochs: invalid int value: 'ten'"),
    (['--epochs', '1.5'], '--epochs: invalid int value'), (['--epochs'], '--epochs: expected one argument'),
    (['--lr', '-0.1'], '--lr: expected a number > 0, found -0.1'), (['--lr', 'nan'], '--lr: expected a number > 0'),
    (['--imbalance-factor', '0.5'], '--imbalance-factor: expected a number >= 1, found 0.5'),
    (['--drop', '2'], '--drop: expected a number >= 0 and <= 1, found 2'), (['--holdout', '0'], '--holdout'),
    (['--shot-thresholds', '20'], '--shot-thresholds: expected 2 arguments'), (['--amp', 'yes'], 'yes: unexpected argument'),
    (['--method', 'glcm'], '--method: invalid choice'), (['--lt-split', 'last'], '--lt-split: invalid choice'),
    (['--model-kwargs', 'depth'], '--model-kwargs')])
def test_a_wrong_flag_is_one_line_that_names_it(argv, expected):
    assert expected in message(*argv)


def test_flags_are_not_abbreviated():
    assert '--weight-dec: unknown option; did you mean --weight-decay?' in message('--weight-dec', '0.1')


@pytest.mark.parametrize('argv', [
    [], ['--lr', '1e-4', '--amp', '--opt-betas', '0.9', '0.99', '--model-kwargs', 'channels=(4, 8, 8)', 'name=x'],
    ['--shot-thresholds', '5', '50', '--mean', '0.5', '0.5', '0.5', '--holdout', '0.1', '--data-dir', 'ä b']])
def test_what_a_run_writes_is_read_back(tmp_path, argv):
    options = vars(parse(*argv)[0])
    del options['config'], options['resume'], options['debug']
    create_run_folder(tmp_path / 'run', options)
    again, given = parse('--config', str(tmp_path / 'run' / 'args.yaml'))
    as_lists = {**options, 'model_kwargs': {
        key: list(value) if isinstance(value, tuple) else value for key, value in options['model_kwargs'].items()}}
    assert pick(again, options) == as_lists
    assert given == set(options)


def test_every_default_is_a_valid_value_of_its_option(config):
    defaults = vars(parse()[0])
    del defaults['config']
    flags = config(yaml.safe_dump(defaults))
    assert parse(*flags)[0] == Namespace(**defaults, config=flags[1])


def test_the_demonstration_is_for_runs_without_data(config):
    assert pick(parse()[0], DEMONSTRATION) == DEMONSTRATION
    assert pick(parse('--epochs', '2', '--model', 'resnet18')[0], DEMONSTRATION) == {
        **DEMONSTRATION, 'epochs': 2, 'model': 'resnet18'}
    options, _ = parse('--dataset', 'hfds/images')
    assert not any(getattr(options, name) == value for name, value in DEMONSTRATION.items())
    options, _ = parse(*config(yaml.safe_dump(DEMONSTRATION)), '--data-dir', 'images')
    assert pick(options, DEMONSTRATION) == DEMONSTRATION


BY_MUON = {name: value for name, value in SCRATCH.items() if name != 'method'}
BY_SGD = dict(opt='momentum', lr_base=0.2, lr_base_scale=None, momentum=0.9, weight_decay=5e-4, sched_on_updates=False)


@pytest.mark.parametrize('line, method, expected', [
    ('', 'glmc_one_view', BY_MUON), ('--method glmc', 'glmc', BY_SGD), ('--method ce --opt nmuon', 'ce', BY_MUON),
    ('--opt momentum', 'glmc_one_view', BY_SGD), ('--weight-decay 0.1', 'glmc_one_view', {**BY_MUON, 'weight_decay': 0.1}),
    ('--no-sched-on-updates', 'glmc_one_view', {**BY_MUON, 'sched_on_updates': False}),
    ('--method weight_balancing', 'weight_balancing', {**BY_SGD, 'weight_decay': 5e-3}),
    ('--pretrained --method glmc_one_view', 'glmc_one_view', {**BY_SGD, 'lr_base': 0.02, 'sched_on_updates': True}),
    ('--pretrained', 'balanced_softmax', {**BY_SGD, 'lr_base': 0.02, 'sched_on_updates': True})])
def test_the_optimizer_follows_from_method_and_weights(line, method, expected):
    options, _ = parse('--data-dir', 'images', *line.split())
    assert (options.method, pick(options, expected)) == (method, expected)


def test_pick_gives_keyword_arguments():
    options, _ = parse('--lr', '0.5')
    assert pick(options, ('lr', 'seed')) == {'lr': 0.5, 'seed': 42}
    with pytest.raises(AttributeError, match='no_such_option'):
        pick(options, ('no_such_option',))


@pytest.mark.parametrize('low, high, open_low, accepted, refused', [
    (0, 1, False, ['0', '1', '0.5'], ['-0.1', '1.1', 'nan', 'inf']),
    (0, float('inf'), True, ['0.1', '5'], ['0', '-1', 'nan'])])
def test_number_accepts_its_range_only(low, high, open_low, accepted, refused):
    convert = number(float, low, high, open_low)
    assert [convert(text) for text in accepted] == [float(text) for text in accepted]
    for text in refused:
        with pytest.raises(ArgumentTypeError, match=f'expected a number .*, found {text}'):
            convert(text)


def test_every_option_has_a_help_text():
    assert [action.dest for action in train_parser(METHODS)._actions if not action.help] == []
    assert 'GLMC' in train_parser(METHODS).format_help()


def flags_of(text: str) -> set[str]:
    """Options that a help text has a line for."""
    return set(re.findall(r'^  (?:-\w(?: \w+)?, )?(--[\w-]+)', text, re.M))


def test_help_shows_the_common_options_and_counts_the_others():
    parser = train_parser(METHODS)
    text = parser.format_help()
    options = {action.dest for action in parser._actions if action.dest in {*vars(parse()[0]), 'input_size'}}
    assert flags_of(text) == {flag(name) for name in COMMON} | {'--help', '--help-all'} and len(COMMON) <= 27
    assert text.endswith(f'… {len(options - COMMON)} more options: --help-all\n')
    assert 'ce, mixup' in text and METHODS['ldam_drw'].summary.split()[0] not in text and 'default: 5e-4' in text
    assert parser.format_help() == text


@pytest.mark.parametrize('make', [lambda: train_parser(METHODS), finetune_parser], ids=['train', 'finetune'])
def test_help_all_shows_every_option(make, capsys):
    parser = make()
    with pytest.raises(SystemExit) as end:
        parse_args(parser, ['--help-all'])
    text = capsys.readouterr().out
    flags = {re.sub('--no-(report|channels|model-ema|freeze|sched)', r'--\1', action.option_strings[-1])
             for action in make()._actions}
    assert end.value.code == 0 and flags == flags_of(text)
    assert 'more options' not in text
    if make is not finetune_parser:
        assert all(re.sub(r'\s+', '', f'{name}: {row.summary}') in re.sub(r'\s+', '', text) for name, row in METHODS.items())


def test_help_has_each_default_once():
    text = re.sub(r'\s+', ' ', train_parser(METHODS).format_help())
    assert '(default: 20 100)' not in text and '(default: 64)' in text and 'None' not in text and 'False' not in text
    entries = re.split(r' --\w', text)
    assert [entry for entry in entries if entry.count('default:') > 1] == []


def test_not_training_are_the_options_that_do_not_change_the_training():
    assert set(vars(parse()[0])) >= NOT_TRAINING
    assert set(NOT_TRAINING) == {
        'config', 'data_dir', 'dataset', 'dataset_download', 'val_split', 'val_list', 'train_list', 'class_map',
        'class_from', 'class_counts',
        'input_key', 'target_key', 'num_classes', 'workers', 'resident', 'channels_last', 'torchcompile',
        'grad_checkpointing', 'seed', 'output', 'experiment', 'resume', 'debug', 'val_interval', 'log_interval',
        'checkpoint_interval', 'checkpoint_hist', 'report', 'report_to', 'push_to_hub', 'hub_private', 'hub_revision',
        'hub_license', 'dataset_name', 'stage2', 'feature_views', 'stage2_holdout', 'stage2_kwargs', 'feature_cache'}


# --- options without effect ---


UNUSED = {  # command line -> its only warning; one line or more for each row of TRAIN_NEEDS
    '--val-list val.txt --val-split test': '--val-split has no effect with --val-list',
    '--train-list train.txt --train-split all': '--train-split has no effect with --train-list',
    '--train-list a.txt --val-list b.txt --data-dir images --dataset hfds/x':
        '--dataset has no effect if all images are those of lists or of the embedded digits',
    '--train-list a.txt --val-list b.txt --data-dir images --class-map c.txt':
        '--class-map has no effect if all images are those of lists or of the embedded digits',
    '--input-key png': '--input-key has no effect with the embedded digits',
    '--dataset hfds/x --data-dir images --class-from top': '--class-from has no effect without image folders',
    '--dataset torch/cifar10 --data-dir data --class-map c.txt': '--class-map has no effect with a torch/ data set',
    '--data-dir images --dataset-download':
        '--dataset-download has no effect without a torch/, tfds/ or hfids/ data set',
    '--lt-type step': '--lt-type has no effect without --imbalance-factor',
    '--lt-split random --lt-seed 1':
        '--lt-seed has no effect without --imbalance-factor|--lt-split has no effect without --imbalance-factor',
    '--imbalance-factor 10 --lt-seed 1': '--lt-seed has no effect without --lt-split random',
    '--augmentation cifar --no-aug': '--augmentation has no effect with --no-aug',
    '--hflip 0.1 --aa v0 --no-aug': '--aa has no effect with --no-aug|--hflip has no effect with --no-aug',
    '--augmentation cifar --vflip 0.5': '--vflip has no effect with --augmentation cifar',
    '--augmentation cifar --train-crop-mode rkrc': '--train-crop-mode has no effect with --augmentation cifar',
    '--augmentation imagenet_lt --scale 0.5 1': '--scale has no effect without --augmentation timm',
    '--augmentation cifar --gaussian-blur-prob 0.5': '--gaussian-blur-prob has no effect without --augmentation timm',
    '--aa rand-m9 --color-jitter 0.1':
        '--color-jitter has no effect with --aa, unless the policy has 3a in its name',
    '--color-jitter 0 --color-jitter-prob 0.5': '--color-jitter-prob has no effect with --color-jitter 0',
    '--augmentation imagenet_lt --train-interpolation bicubic':
        '--train-interpolation has no effect with --augmentation imagenet_lt',
    '--augmentation cifar --train-interpolation bicubic':
        '--train-interpolation has no effect with --augmentation cifar without --aa',
    '--remode const': '--remode has no effect without --reprob',
    '--balanced --method ce': '--balanced has no effect without --method glmc',
    '--lr 0.1 --lr-base 0.2': '--lr-base has no effect with --lr',
    '--weight-decay 0 --filter-bias-and-bn': '--filter-bias-and-bn has no effect with --weight-decay 0',
    '--opt adamw --momentum 0.8': '--momentum has no effect with an optimizer without momentum',
    '--opt sgd --opt-eps 1e-6': '--opt-eps has no effect with an optimizer without epsilon',
    '--opt lookahead_sgd --opt-betas 0.9 0.99': '--opt-betas has no effect with an optimizer without betas',
    '--clip-mode agc': '--clip-mode has no effect without --clip-grad',
    '--warmup-lr 0.1': '--warmup-lr has no effect without --warmup-epochs',
    '--warmup-prefix': '--warmup-prefix has no effect without --warmup-epochs',
    '--sched none --warmup-epochs 2': '--warmup-epochs has no effect with --sched none',
    '--sched none --sched-on-updates': '--sched-on-updates has no effect with --sched none',
    '--sched step --min-lr 0.01': '--min-lr has no effect without --sched cosine, tanh, poly, wsd or rsqrt',
    '--decay-epochs 3': '--decay-epochs has no effect without --sched step, wsd or rsqrt',
    '--lr-cycle-decay 0.4': '--lr-cycle-decay has no effect without --lr-cycle-limit',
    '--sched step --lr-cycle-limit 2': '--lr-cycle-limit has no effect without --sched cosine, tanh or poly',
    '--sched step --decay-milestones 3': '--decay-milestones has no effect without --sched multistep',
    '--decay-rate 0.5': '--decay-rate has no effect without --sched step, multistep or poly',
    '--amp --amp-dtype bfloat16': '--amp has no effect with --amp-dtype',
    '--pretrained --initial-checkpoint x.pth': '--pretrained has no effect with --initial-checkpoint',
    '--epochs 4 --holdout 2 --patience 4': '--patience has no effect in a run of no more evaluations',
    '--model-ema-decay 0.9': '--model-ema-decay has no effect without --model-ema',
    '--lora-targets qkv': '--lora-targets has no effect without --lora-rank',
    '--pretrained --lora-rank 4 --no-freeze-bn': '--freeze-bn has no effect with --lora-rank, which freezes BatchNorm',
    '--sync-bn': '--sync-bn has no effect with one process',
    '--dist-bn broadcast': '--dist-bn has no effect with one process',
    '--hub-private': '--hub-private has no effect without --push-to-hub',
    '--feature-views 3': '--feature-views has no effect without --stage2',
    '--feature-cache x': '--feature-cache has no effect without --stage2 and with --head-init random',
    '--data-dir images --class-counts c.txt': '--class-counts has no effect with a data set that has an index',
    '--dataset wds/x --data-dir images --on-bad-image skip':
        '--on-bad-image has no effect with a data set without an index',
}
USED = [  # command lines of which each option has an effect
    '--dataset hfds/x --data-dir images --class-map c.txt --input-key image --target-key label',
    '--train-list a.txt --dataset hfds/x --val-split test', '--dataset torch/cifar10 --data-dir data --dataset-download',
    '--imbalance-factor 10 --lt-type step --lt-split random --lt-seed 1',
    '--scale 0.5 1 --ratio 1 1 --color-jitter 0.1 --color-jitter-prob 0.5 --vflip 0.1 --train-interpolation bicubic',
    '--aa 3a --color-jitter 0.1', '--augmentation cifar --hflip 0 --aa v0 --train-interpolation bicubic',
    '--augmentation imagenet_lt --vflip 0.5 --train-crop-mode rkrc --aa v0', '--no-aug --train-interpolation nearest',
    '--reprob 0.5 --remode const --recount 2 --rearea 0.1 0.2 --reaspect 1', '--balanced',
    '--balanced --method glmc_no_rebalance',
    '--lr-base 0.1 --lr-base-size 128 --lr-base-scale sqrt', '--opt adamw --opt-betas 0.9 0.99 --opt-eps 1e-6',
    '--opt lookahead_momentum --momentum 0.8', '--opt nonsense --momentum 0.8', '--clip-grad 1 --clip-mode agc',
    '--warmup-epochs 2 --warmup-lr 0 --warmup-prefix', '--sched none --warmup-epochs 2 --warmup-prefix', '--min-lr 0.01',
    '--sched step --decay-epochs 3 --decay-rate 0.5', '--sched multistep --decay-milestones 3 --decay-rate 0.5',
    '--model-ema --model-ema-decay 0.9 --model-ema-warmup', '--push-to-hub a/b --hub-private --hub-revision x',
    '--stage2 ncm --feature-views 3 --feature-cache x', '--dataset wds/x --data-dir images --class-counts c.txt',
    '--train-list a.txt --on-bad-image skip', '--partner batch --resample-power 1', '--alpha-power 3 --weight-decay 0',
    '--hub-license mit', '--feature-cache x --head-init probe', '--feature-cache x --pretrained',
    '--pretrained --lora-rank 4 --lora-targets qkv --freeze-bn', '--pretrained --no-freeze-bn']


def warnings(*argv: str, processes: int = 1) -> list[str]:
    has_data = {'--data-dir', '--dataset', '--train-list', '--input-key'} & set(argv)  # the last for the digits
    options, explicit = parse(*argv, *([] if has_data else ['--data-dir', 'images']))
    return unused_options(options, explicit, TRAIN_NEEDS, processes=processes)


@pytest.mark.parametrize('line, expected', UNUSED.items(), ids=list(UNUSED))
def test_an_option_without_effect_is_warned_about(line, expected):
    assert warnings(*line.split()) == expected.split('|')


@pytest.mark.parametrize('need', TRAIN_NEEDS, ids=lambda need: need.otherwise)
def test_every_row_of_the_table_has_a_command_line(need):
    assert set(need.options) <= set(vars(parse()[0]))
    expected = {f'{flag(name)} has no effect {need.otherwise}' for name in need.options}
    assert expected & {warning for text in UNUSED.values() for warning in text.split('|')}


@pytest.mark.parametrize('line', ['', *USED])
def test_an_option_with_an_effect_is_not_warned_about(line):
    assert warnings(*line.split()) == []


def test_batchnorm_of_several_processes_has_an_effect():
    assert warnings('--sync-bn', '--dist-bn', 'broadcast', processes=2) == []


@pytest.mark.parametrize('path', sorted((ROOT / 'hparams').glob('*.yaml')), ids=lambda path: path.stem)
def test_no_recipe_has_an_option_without_effect(path):
    options, explicit = parse('--config', str(path))
    assert warnings('--config', str(path)) == []
    assert unused_method_options(options.method, explicit) == set()


def test_a_run_repeated_from_its_args_is_not_warned_about(tmp_path):
    options = vars(parse('--data-dir', 'images', '--lr', '0.1', '--method', 'ce')[0])
    del options['config'], options['resume'], options['debug']
    create_run_folder(tmp_path / 'run', options)
    path = str(tmp_path / 'run' / 'args.yaml')
    assert warnings('--config', path) == []
    assert warnings('--config', path, '--hub-private') == ['--hub-private has no effect without --push-to-hub']


REFUSED = {  # command line -> start of the error
    '--sam-rho 0.05 --grad-accum-steps 2': '--sam-rho 0.05: an update is one batch, expected --grad-accum-steps 1, found 2',
    '--sam-rho 0.05': '--sam-rho 0.05: not with the loss scaling of float16',
    '--swa-start 0 --model-ema': '--swa-start 0: one average of the weights at a time, expected no --model-ema',
    '--torchcompile max-autotune --grad-accum-steps 2': '--torchcompile max-autotune: its CUDA graphs overwrite the losses',
    '--lora-rank 4': '--lora-rank 4: adapts pretrained weights, expected --pretrained or --initial-checkpoint',
    '--lora-rank 4 --pretrained --freeze stem.*': '--lora-rank 4: freezes all but the adapters and the classifier',
    '--lora-rank 4 --pretrained --sync-bn': '--sync-bn: not with --lora-rank, which freezes BatchNorm',
    '--expert-width 0.5 --pretrained': '--expert-width 0.5: pretrained weights have the full width, expected',
    '--patience 3': '--patience 3: no images choose the epoch, expected --holdout or --select-split',
    '--warmup-epochs 5 --epochs 5': '--warmup-epochs 5: as long as the run of 5 epochs, expected fewer, or --warmup-prefix',
    '--warmup-epochs 2 --warmup-lr 0.5': '--warmup-lr 0.5: above the learning rate 0.1 that the warm-up leads to',
    '--min-lr 0.2': '--min-lr 0.2: above the learning rate 0.1 of the start, expected a lower one',
    '--sched wsd --epochs 5 --warmup-epochs 3 --decay-epochs 3': '--decay-epochs 3: longer than the 5 epochs less a warm-up',
    '--scale 1 0.1': '--scale 1 0.1: the smallest value is above the largest, expected MIN MAX',
    '--ratio 2 1': '--ratio 2 1: the smallest value', '--rearea 0.5 0.2': '--rearea 0.5 0.2: the smallest value',
    '--drop 1': '--drop 1: leaves nothing to learn from, expected less than 1',
    '--drop-path 1': '--drop-path 1: leaves nothing', '--smoothing 1': '--smoothing 1: leaves nothing',
    '--model-ema --model-ema-decay 1 --no-model-ema-warmup': '--model-ema-decay 1: the average would remain the first',
    '--sync-bn --freeze-bn': '--sync-bn: the statistics of BatchNorm are frozen, expected --no-freeze-bn',
    '--sync-bn': '--sync-bn: needs GPUs, found 2 processes on the CPU',
}


@pytest.mark.parametrize('line, expected', REFUSED.items(), ids=list(REFUSED))
def test_options_that_exclude_each_other_are_refused(line, expected):
    with pytest.raises(InputError, match=f'^{re.escape(expected)}'):
        refuse_conflicts(parse(*line.split())[0], processes=2, device='cpu', precision='fp16', peak_lr=0.1)


DOUBTFUL = {  # command line -> start of the warning
    '--val-interval 9 --epochs 5': '--val-interval 9: longer than the run of 5 epochs: only its last epoch is evaluated',
    '--val-interval 5 --epochs 5 --holdout 2': '--val-interval 5: one evaluation in 5 epochs leaves nothing to choose',
    '--sched step': '--sched step: the learning rate never drops in 30 epochs, expected a smaller --decay-epochs',
    '--sched multistep --epochs 90': '--sched multistep: the learning rate never drops in 90 epochs',
    '--swa-start 0.1 --epochs 20 --warmup-epochs 5': '--swa-start 0.1: the mean includes weights of the warm-up of 5 epochs',
    '--method ldam_drw --epochs 3': '--drw-start 0.8: the re-weighting never starts in 3 epochs',
    '--method mixup --mixup-prob 0': '--mixup-prob 0: no batch is mixed',
    '--val-split train': '--val-split train: is the training set: its accuracy says nothing about other images',
}


def doubts(*words) -> list[str]:
    options = parse(*words)[0]
    return refuse_conflicts(options, processes=1, device='cpu', precision='no', peak_lr=0.1,
                            method_options=METHODS[options.method].options)


@pytest.mark.parametrize('line', DOUBTFUL)
def test_options_that_defeat_each_other_are_warned_about(line):
    (warning,) = doubts(*line.split())
    assert warning.startswith(DOUBTFUL[line])


@pytest.mark.parametrize('line', [
    '', '--val-interval 5 --epochs 5', '--holdout 2 --epochs 5 --val-interval 2', '--sched step --decay-epochs 20',
    '--sched multistep --decay-milestones 20 90', '--swa-start 0.6 --epochs 20 --warmup-epochs 5',
    '--method glmc --epochs 1',
    '--warmup-epochs 4 --epochs 5', '--warmup-epochs 5 --epochs 5 --warmup-prefix', '--method ldam_drw', '--min-lr 0.1',
    '--holdout 2 --patience 3', '--sched wsd --epochs 5', '--scale 0.5 0.5', '--model-ema --model-ema-decay 1',
    '--method ce --mixup-prob 0', '--sched step --min-lr 1 --decay-epochs 3'])
def test_options_that_do_not_are_not(line):
    assert doubts(*line.split()) == []


def test_every_conflict_has_a_command_line():
    assert len(REFUSED) + len(DOUBTFUL) == len(CONFLICTS)


@pytest.mark.parametrize('line', [
    '', '--sam-rho 0.05', '--swa-start 0', '--model-ema', '--torchcompile --grad-accum-steps 2', '--sync-bn',
    '--torchcompile reduce-overhead', '--grad-accum-steps 2'])
def test_options_that_go_together_are_accepted(line):
    refuse_conflicts(parse(*line.split())[0], processes=2, device='cuda', precision='bf16')


def failing(error: Exception):
    def main():
        raise error
    return main


def test_wrong_input_is_exit_code_2_and_one_line(capsys):
    assert run_script(lambda: None) == 0
    assert run_script(failing(InputError('--lr: wrong'))) == 2
    assert capsys.readouterr().err == 'error: --lr: wrong\n'


def test_only_the_main_process_prints_a_wrong_flag_but_any_a_broken_image(capsys):
    assert run_script(failing(InputError('--lr: wrong')), main_process=False) == 2
    assert capsys.readouterr().err == ''
    assert run_script(failing(ImageError('images: cannot decode a.png')), main_process=False) == 2
    assert capsys.readouterr().err == 'error: images: cannot decode a.png\n'


def test_debug_and_real_bugs_show_their_traceback():
    with pytest.raises(InputError):
        run_script(failing(InputError('--lr: wrong')), debug=True)
    with pytest.raises(ZeroDivisionError):
        run_script(failing(ZeroDivisionError()))


BOMB = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{name}: &{name} [{", ".join([f"*{before}"] * 9)}]\n' for before, name in zip('abcdefgh', 'bcdefghi', strict=True))


@pytest.mark.parametrize('content, expected', [
    (BOMB + 'lr: *i\n', "unknown key 'a'"), (f'lr: {BOMB.splitlines()[0][3:]}\n', 'lr: expected float, found ['),
    ('lr: [&a [x, x, x, x, x, x, x, x, x], ' + ', '.join(f'&{n} [{", ".join([f"*{b}"] * 9)}]' for b, n in zip(
        'abcdefgh', 'bcdefghi', strict=True)) + ']\n', 'lr: expected float, found ['),
    ('lr: ' + '[' * 5000 + ']' * 5000, 'cannot be read as YAML'), ('epochs: ' + '9' * 100_000, 'cannot be read as YAML'),
    ('? ' + 'x' * 100_000 + '\n: 1', "unknown key 'xxx"), ('#' * 2 ** 21, 'expected a file of at most 1,024 KiB')])
def test_files_that_cost_without_bound_are_refused_in_a_moment(content, expected, tmp_path):
    (tmp_path / 'options.yaml').write_text(content)
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        parse('-c', str(tmp_path / 'options.yaml'))
    assert expected in str(caught.value) and len(str(caught.value)) < 500 and time.perf_counter() - start < 5


def test_a_pipe_of_options_is_refused(tmp_path):
    os.mkfifo(tmp_path / 'options.yaml')
    with pytest.raises(InputError, match='expected a file of at most'):
        parse('-c', str(tmp_path / 'options.yaml'))
