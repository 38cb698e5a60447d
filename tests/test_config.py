"""Options: command line over YAML over default, each checked, each mistake one line that says what to do."""
from argparse import ArgumentTypeError, Namespace

import pytest
import yaml

from glmc.cli import number, parse_args, pick, run_script
from glmc.config import DEMONSTRATION, train_parser
from glmc.errors import ImageError, InputError
from glmc.methods import METHODS
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
    options, given = parse()
    assert given == set()
    assert (options.model, options.method, options.opt, options.lr, options.shot_thresholds) == (
        'resnet18', 'glmc', 'momentum', None, [20, 100])


def test_command_line_wins_over_file_and_file_over_default(config):
    options, given = parse(*config('epochs: 7\nlr: 0.3\nseed: 1\n'), '--lr', '0.5', '--batch-size', '16')
    assert (options.epochs, options.lr, options.seed, options.batch_size, options.momentum) == (7, 0.5, 1, 16, 0.9)
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


def test_the_demonstration_sets_options_that_exist(config):
    options, _ = parse(*config(yaml.safe_dump(DEMONSTRATION)))
    assert pick(options, DEMONSTRATION) == DEMONSTRATION


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


def failing(error: Exception):
    def main():
        raise error
    return main


def test_wrong_input_is_exit_code_2_and_one_line(capsys):
    assert run_script(lambda: None) == 0
    assert run_script(failing(InputError('--lr: wrong'))) == 2
    assert capsys.readouterr().err == 'error: --lr: wrong\n'


def test_only_the_main_process_tells_a_wrong_flag_but_any_a_broken_image(capsys):
    assert run_script(failing(InputError('--lr: wrong')), main_process=False) == 2
    assert capsys.readouterr().err == ''
    assert run_script(failing(ImageError('images: cannot decode a.png')), main_process=False) == 2
    assert capsys.readouterr().err == 'error: images: cannot decode a.png\n'


def test_debug_and_real_bugs_show_their_traceback():
    with pytest.raises(InputError):
        run_script(failing(InputError('--lr: wrong')), debug=True)
    with pytest.raises(ZeroDivisionError):
        run_script(failing(ZeroDivisionError()))
