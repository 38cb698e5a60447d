"""Wrong input: exit code 2 and one line that names the flag or file, the value found and the value expected.

docs/bad-input.md lists the lines. `GLMC_WRITE_DOCS=1 pytest -n0 tests/test_bad_input.py` writes it; otherwise each test
compares its row with the page.
"""
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
from conftest import COUNTS, ROOT, TINY, Outcome, coloured, run_train, write_folders, write_shards

import glmc.export.export
import validate_glmc
from glmc.cli import run_script

OPTIONS = {  # command line -> pattern of the error line
    '--imbalance-factor 0.5': '--imbalance-factor: expected a number >= 1.*0.5',
    '--imbalance-factor 1000': '--imbalance-factor 1000: .*leaves a class of 4 images with none',
    '--batch-size 26': '--batch-size 26, 1 processes: a batch of 26 is larger than the set of 25 images',
    '--batch-size 0': '(-b/)?--batch-size: expected a number >= 1.*0',
    '--epochs 1.5': "--epochs: .*'?1.5",
    '--epoch 3': '--epoch: unknown option; did you mean --epochs',
    'stray': 'stray: unexpected argument',
    '--method glmx': "--method: invalid choice: 'glmx', expected one of ce, .*; did you mean glmc",
    '--model resnet_18': '--model resnet_18: not a model of timm .*resnet18',
    '--model qwen3_vit_88m_enc': '--model qwen3_vit_88m_enc: expected a model with a classifier, found an encoder',
    '--model local-dir:nowhere': '--model local-dir:nowhere: .*nowhere',
    '--model resnet32_cifar --drop-path 0.1': '--model resnet32_cifar: .*drop_path_rate',
    '--model resnet18 --drop-path 1.5': '--drop-path: expected a number >= 0 and <= 1, found 1.5',
    '--gp nonsense': '--(gp|model) .*nonsense',
    '--in-chans 2': '--in-chans.* 2',
    '--in-chans 5': '--in-chans.* 5',
    '--model-kwargs layerz=3': '--model test_resnet: .*layerz',
    '--num-classes 4': '--num-classes 4: .* has 3 classes',
    '--mean 0.5 0.5': '--mean.* 2',
    '--opt sgdd': '--opt sgdd: .*sgdd',
    '--opt adamw --opt-kwargs nonsense=1': '--opt adamw: .*nonsense',
    '--sched triangle': "--sched: invalid choice: 'triangle', expected one of cosine, ",
    '--lr 0': '--lr: expected a number > 0, found 0',
    '--holdout 14': '--holdout 14: no class has enough images, the largest has 14',
    '--shot-thresholds 100 20': '--shot-thresholds.*100',
    '--aa nonsense': '--aa.*nonsense',
    '--val-split test': '--data-dir .*: no folder for --val-split test',
    '--val-split none': '--val-split none: expected --holdout',
    '--train-split training2': "--data-dir .*: no folder for split 'training2', found train, validation",
    '--class-map nowhere.txt': '--data-dir .*nowhere.txt',
    '--initial-checkpoint nowhere.pth': '--initial-checkpoint nowhere.pth: no such file',
    '--initial-checkpoint README.md': '--initial-checkpoint README.md: expected weights of test_resnet, found: content',
    '--pretrained': '--model test_resnet: cannot download timm/test_resnet.*: HF_HUB_OFFLINE is set; expected a network, ',
    '--model resnet32_cifar --pretrained': '--pretrained: timm has no weights of resnet32_cifar; it has ',
    '--resume nowhere/checkpoints/epoch-0001.safetensors': '(--resume )?nowhere/.*: .*No such file',
    '--resume README.md': '(--resume )?README.md: expected a checkpoint of train_glmc.py',
    '--resume tests': '--resume tests: no checkpoint in this folder',
    '--dataset hfds/nowhere/nothing': '--dataset hfds/nowhere/nothing, split train: cannot be opened: ',
    '--dataset cifar100': '--dataset cifar100: expected torch/NAME, hfds/NAME',
    '--dataset torch/nothing': '--dataset torch/nothing, split train: cannot be opened: ',
    '--dataset wds/nothing': '--dataset wds/nothing, split train: cannot be opened: ',
    '--config nowhere.yaml': '--config nowhere.yaml: cannot be read',
    '--output README.md': '--output: cannot write to README.md',
    '--push-to-hub a/b/c': '--push-to-hub: expected ORG/NAME or NAME, found',
    '--report-to nonsense': '--report-to: expected names of tensorboard, wandb, trackio; found',
    '--checkpoint-interval 10s': '--checkpoint-interval: expected steps as 500 or minutes as 10m, found 10s',
    '--model hf-hub:nowhere/nothing': '--model hf-hub:nowhere/nothing: cannot download nowhere/nothing: ',
    '--lora-rank 4': '--lora-rank 4: adapts pretrained weights, expected --pretrained or --initial-checkpoint',
    '--sam-rho -1': '--sam-rho: expected a number >= 0, found -1',
    '--sam-rho 0.05 --grad-accum-steps 2': '--sam-rho 0.05: an update is one batch, expected --grad-accum-steps 1, found 2',
    '--amp': '--amp: float16 needs a GPU, found a CPU; expected bfloat16 or no mixed precision',
    '--swa-start 1.5': '--swa-start: expected a number >= 0 and <= 1, found 1.5',
    '--swa-start 0.6': '--swa-start 0.6: leaves none of 1 epochs, expected 0 or less',
    '--swa-start 0 --model-ema': '--swa-start 0: one average of the weights at a time, expected no --model-ema',
    '--resident on': '--resident on: needs an indexable source and --augmentation cifar',
    '--resident on --augmentation cifar --aa v0': '--resident on: .* and no --aa',
    '--augmentation cifar --aa nonsense': '--aa.*nonsense',
    '--torchcompile max-autotune --grad-accum-steps 2': '--torchcompile max-autotune: its CUDA graphs overwrite',
    '--stage2 nonsense': "--stage2: expected all, or some of maxnorm, .*; found 'nonsense'",
    '--stage2 average --method ce': '--stage2 average: needs both classifiers of GLMC',
    '--stage2 maxnorm --stage2-kwargs maxnorm.radios=1': '--stage2-kwargs maxnorm.radios: expected one of lr, .*radius',
    '--rearea 0.5 2': '--rearea: expected a number >= 0 and <= 1, found 2',
}


PAGE = ROOT / 'docs' / 'bad-input.md'
ROWS: dict[str, dict[str, str]] = {}  # section -> input -> error line
HEAD = """# Error lines for wrong input

Wrong input ends a script with exit code 2 and one line on standard error: `error: ` and the text in the right column.
Saved files are neither lost nor overwritten. `--debug` shows the traceback. `tests/test_bad_input.py` writes this page and
compares each row with the output of the program. `DIR` is a folder, `VERSION` the version of timm.
"""


@pytest.fixture
def document(tmp_path):
    """Check an error line against its pattern and against its row of the page."""
    def check(section: str, command: str, pattern: str, line: str, note: str = '') -> None:
        """
        Args:
            section: Title on the page.
            command: Options of the script.
            pattern: Regular expression that the line matches.
            line: Error line.
            note: Markdown text after the command, if the options alone do not show the mistake.
        """
        assert re.search(pattern, line), line
        given, said = code(command, tmp_path.parent) + note, code(line, tmp_path.parent)
        if os.environ.get('GLMC_WRITE_DOCS'):
            assert ROWS.setdefault(section, {}).setdefault(given, said) == said
        else:
            row = page_rows().get(section, {}).get(given)
            assert row == said, 'GLMC_WRITE_DOCS=1 pytest -n0 tests/test_bad_input.py writes the page'
    return check


def code(text: str, temporary: Path) -> str:
    """Markdown code of a text, with a name for each temporary folder and for the version of timm."""
    text = re.sub(re.escape(str(temporary)) + r'/[\w-]+', 'DIR', text).replace(f'timm {timm.__version__}', 'timm VERSION')
    text = text.replace('|', '\\|').strip()
    return f'`` {text} ``' if '`' in text else f'`{text}`'


def lines(text: str) -> str:
    """Markdown note on the content of a file."""
    shown = [f'`{line}`' if line else 'an empty line' for line in text.rstrip('\n').split('\n')]
    return f" with {', '.join(shown)}" if text else ', empty'


def page_rows() -> dict[str, dict[str, str]]:
    """Rows of the page: section -> input -> error line."""
    sections = {}
    for section in PAGE.read_text(encoding='utf-8').split('\n## ')[1:]:
        title, _, table = section.partition('\n')
        rows = [line.removeprefix('| ').removesuffix(' |').split(' | ') for line in table.splitlines() if '`' in line]
        sections[title] = dict(rows)
    return sections


@pytest.fixture(scope='module', autouse=True)
def page():
    yield
    if ROWS:
        text = HEAD
        for section, rows in ROWS.items():
            text += f'\n## {section}\n\n| input | error line |\n|---|---|\n'
            text += ''.join(f'| {given} | {said} |\n' for given, said in rows.items())
        PAGE.write_text(text, encoding='utf-8')


def error_line(outcome) -> str:
    """Return the error line, which comes last, after messages of the run."""
    *messages, line = outcome.err.splitlines()
    assert outcome.code == 2 and line.startswith('error: '), outcome.err
    assert 'Traceback' not in outcome.err and not any(message.startswith('error') for message in messages)
    assert 'Exported' not in outcome.out
    return line.removeprefix('error: ')


@pytest.fixture
def refused(script, tmp_path, folders, monkeypatch):
    """Options -> the error line of a tiny run on `folders`, which must not save anything."""
    def run(*options, data_dir=folders, output=tmp_path / 'output') -> str:
        where = ['--data-dir', data_dir] if data_dir else []
        line = error_line(script(*TINY, *where, '--output', output, *options))
        assert not (tmp_path / 'output').exists() or not list((tmp_path / 'output').rglob('*.safetensors'))
        return line
    monkeypatch.chdir(tmp_path)  # so that nothing in the repository can be overwritten
    (tmp_path / 'README.md').write_text('no checkpoint')
    (tmp_path / 'tests').mkdir()
    return run


@pytest.mark.parametrize('options', OPTIONS)
def test_option(options, refused, document, tmp_path):
    outside = [tmp_path.parent / 'args.yaml', tmp_path.parent.parent / 'args.yaml']
    before = [path.exists() for path in outside]
    document('Options', options, f'^{OPTIONS[options]}', refused(*options.split()))
    left = {path.name for path in tmp_path.iterdir()} - {'README.md', 'tests', 'output'}
    assert not left and not list((tmp_path / 'tests').iterdir())
    assert before == [path.exists() for path in outside]


# --- folders ---


def empty_class(root):
    (root / 'train' / 'dog').mkdir()
    (root / 'train' / 'dog' / 'notes.txt').write_text('no image')


FOLDERS = {
    'missing': (shutil.rmtree, '--data-dir .*: no such folder'),
    'empty': (lambda root: [shutil.rmtree(root), root.mkdir()], '--data-dir .*: found no image, expected .jpg, .png'),
    'with an empty train folder': (
        lambda root: [shutil.rmtree(root / 'train'), (root / 'train').mkdir()], '--data-dir .*: found no image'),
    'without a validation folder': (
        lambda root: shutil.rmtree(root / 'val'), '--data-dir .*: no folder for --val-split validation'),
    'with a class folder without images': (empty_class, r'--data-dir.*class folder .*train/dog has no images, found 1 o'),
    'with a class that is only in validation': (
        lambda root: write_folders(root / 'val', {'dog': 2}), "--data-dir .*: class 'dog' is not in the training data"),
    'with an image outside the class folders': (
        lambda root: coloured(0, 0).save(root / 'train' / 'stray.png'), 'image stray.png lies in no class folder'),
}


@pytest.mark.parametrize('name', FOLDERS)
def test_folder(name, refused, document, tmp_path):
    spoil, expected = FOLDERS[name]
    root = tmp_path / 'images'
    write_folders(root / 'train', COUNTS)
    write_folders(root / 'val', {'bee': 2})
    spoil(root)
    document('Folders', f'--data-dir {root}', expected, refused(data_dir=root), f', {name}')


def test_data_dir_that_is_a_file(refused, tmp_path):
    assert re.match('--data-dir .*README.md.*: ', refused(data_dir=tmp_path / 'README.md'))


def test_tar_for_both_splits(refused, folders, tmp_path):
    shutil.make_archive(tmp_path / 'images', 'tar', folders / 'train')
    assert 'no folder for --val-split validation' in refused(data_dir=tmp_path / 'images.tar')


# --- lists ---


LISTS = [  # option, content of the file, pattern of the error line
    ('--train-list', 'train/ant/0.png -1\n', 'line 1: expected a label 0 or more, found -1'),
    ('--train-list', 'train/ant/0.png 0\ntrain/bee/0.png 2\ntrain/cat/0.png 2\n', "class '1' has no training image"),
    ('--train-list', 'train/ant/0.png 0\ntrain/bee/0.png 1000000000\n', 'line 2: expected a label 0…C-1, each with an'),
    ('--train-list', 'train/ant/0.png 0\n\ntrain/ant/1.png\n',
     "line 3: expected `path label`, or columns separated by commas, found 'train/ant/1.png'"),
    ('--train-list', 'train/ant/0.png 0\ntrain/bee/0.png zero\n',
     "expected numbers or names as labels, found 0 in line 1 and 'zero' in line 2"),
    ('--train-list', 'image,label\ntrain/ant/0.png\n', 'line 2: found 1 column, expected 2 as in the first line'),
    ('--train-list', 'image,kind\ntrain/ant/0.png,ant\n', 'which column has the labels\\? expected --target-key'),
    ('--train-list', 'train/ant/0.png 1.5\n', 'line 1: expected a whole number or a class name as label, found 1.5'),
    ('--train-list', 'train/ant/0.png 0\ntrain/ant/gone.png 0\n', 'image .*train/ant/gone.png does not exist'),
    ('--train-list', '', 'the list is empty'),
    ('--val-list', 'validation/ant/100.png 3\n', 'line 1: expected a label 0…2, found 3'),
    ('--val-list', 'validation/ant/100.png -2\n', 'line 1: expected a label 0…2, found -2'),
    ('--val-list', 'validation/ant/100.png\n', 'line 1: expected `path label`'),
]


@pytest.mark.parametrize('flag, text, expected', LISTS)
def test_list(flag, text, expected, refused, document, tmp_path):
    path = tmp_path / 'list.txt'
    path.write_text(text)
    line = refused(flag, path)
    document('Lists', f'{flag} {path}', f'^{re.escape(str(path))}.*{expected}', line, lines(text))


UNREADABLE = {  # name of a list -> content, note
    'binary.txt': (b'\x89PNG\x00', ', not a text'), 'plain.txt.gz': (b'not gzipped', ', not gzipped'),
    'gone.txt': (None, ', missing')}


@pytest.mark.parametrize('name', UNREADABLE)
def test_list_that_cannot_be_read(name, refused, document, tmp_path):
    content, note = UNREADABLE[name]
    if content:
        (tmp_path / name).write_bytes(content)
    line = refused('--train-list', tmp_path / name)
    document('Lists', f'--train-list {tmp_path / name}', f'{name}: cannot read this list', line, note)


# --- images ---


def spoiled(folders, tmp_path, split):
    """A copy of the image folder, one image of the split a truncated JPEG; and an epoch uses all of them."""
    root = tmp_path / 'images'
    shutil.copytree(folders, root)
    coloured(0, 7, size=(64, 64)).save(root / split / 'ant' / 'cut.jpg')
    os.truncate(root / split / 'ant' / 'cut.jpg', 700)
    return root


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('split', ['train', 'validation'])
@pytest.mark.parametrize('augmentation', ['timm', 'cifar'])
def test_truncated_jpeg(split, workers, augmentation, script, document, folders, tmp_path):
    root = spoiled(folders, tmp_path, split)
    outcome = script(*TINY, '--data-dir', root, '--output', tmp_path / 'output',
                     '--workers', workers, '--augmentation', augmentation)
    line = error_line(outcome)
    document('Folders', f'--data-dir {root}', '^--data-dir .*: cannot decode image ant/cut.jpg: .*truncated', line,
             ', with a truncated JPEG')


# --- YAML ---


YAML = [  # content of the file, pattern of the error line
    ('epoch: 3', "unknown key 'epoch'; did you mean epochs"), ('epochs: three', "epochs: expected int, found 'three'"),
    ('epochs: 1.5', 'epochs: expected int, found 1.5'), ('epochs: 0', 'epochs: expected a number >= 1, found 0'),
    ('lr: high', "lr: expected float, found 'high'"), ('pretrained: 1', 'pretrained: expected true or false, found 1'),
    ('method: glmx', 'method: expected one of ce, .*glmc.*glmx'), ('model: [a]', r"model: expected str, found \['a'\]"),
    ('scale: 0.5', 'scale: expected a list of 2 values, found 0.5'), ('model_kwargs: 3', 'model_kwargs: expected a mapping'),
    ('epochs: [', 'cannot be read as YAML'), ('- epochs', 'expected `option: value` lines, found a list'),
    ('imbalance_factor: 0.5', 'imbalance_factor: expected a number >= 1.*0.5'), ('model: null', 'model: expected str'),
]


@pytest.mark.parametrize('text, expected', YAML)
def test_yaml(text, expected, refused, document, tmp_path):
    path = tmp_path / 'options.yaml'
    path.write_text(text)
    document('YAML', f'--config {path}', f'^--config .*/options.yaml: {expected}', refused('--config', path), lines(text))


# --- sources without an index ---


SHARDS = {  # command line -> pattern of the error line
    '--dataset wds/x': '--dataset wds/x: .*--partner batch',
    '--dataset wds/x --partner batch --imbalance-factor 2': '--dataset wds/x: --imbalance-factor and --holdout need',
    '--dataset wds/x --partner batch --num-classes 4': '--num-classes 4: found counts of 3 classes',
    '--dataset wds/x --partner batch --class-counts gone.json': '--class-counts gone.json: expected a list of images per',
}


@pytest.mark.parametrize('options', SHARDS)
def test_shards(options, refused, document, tmp_path):
    (tmp_path / 'shards').mkdir()
    write_shards(tmp_path / 'shards', shard_size=8)
    line = refused(*options.split(), data_dir=tmp_path / 'shards')
    document('Sources without an index', options, f'^{SHARDS[options]}', line)


# --- checkpoints and output ---


@pytest.fixture
def checkpoint(finished_run):
    return finished_run / 'checkpoints' / 'epoch-0001.safetensors'


RESUMED = {  # options beside --resume -> pattern of the error line
    '--model test_vit': 'holds test_resnet .*this run trains test_vit',
    '--method ce': 'holds test_resnet with 3 classes by glmc, .* by ce',
    '--projection-dim 8': '.*projection_dim',
    '--opt adamw': '.*opt',
    '--gp max': '.*(gp|global_pool)',
    '--swa-start 0.5': 'was trained with swa_first_epoch None, this run has 2',
}


@pytest.mark.parametrize('options', RESUMED)
def test_resume_from_another_run(options, script, document, checkpoint, folders):
    files = {path: path.stat().st_mtime_ns for path in checkpoint.parent.parent.rglob('*') if path.is_file()}
    outcome = script(*TINY, '--data-dir', folders, '--resume', checkpoint, '--epochs', '3', *options.split())
    document('Checkpoints', f'--resume {checkpoint} {options}', f'^--resume {checkpoint}: {RESUMED[options]}',
             error_line(outcome))
    assert files == {path: path.stat().st_mtime_ns for path in checkpoint.parent.parent.rglob('*') if path.is_file()}


def test_truncated_checkpoint(script, document, checkpoint, folders, tmp_path):
    broken = tmp_path / 'run' / 'checkpoints' / 'epoch-0001.safetensors'
    broken.parent.mkdir(parents=True)
    broken.write_bytes(checkpoint.read_bytes()[:-1000])
    line = error_line(script(*TINY, '--data-dir', folders, '--resume', broken))
    document('Checkpoints', f'--resume {broken}', f'^(--resume )?{broken}: expected a checkpoint of train_glmc.py', line,
             ', truncated')


def test_experiment_that_exists(script, document, finished_run, folders):
    line = error_line(script(*TINY, '--data-dir', folders, '--output', finished_run.parent, '--experiment', 'first'))
    document('Checkpoints', f'--output {finished_run.parent} --experiment first',
             '^--experiment first: .*first exists; --resume auto continues it', line, ', an existing run')


@pytest.mark.skipif(os.geteuid() == 0, reason='the superuser can write everywhere')
def test_folder_without_permission(refused, tmp_path):
    (tmp_path / 'locked').mkdir(mode=0o500)
    assert '--output: cannot write to' in refused(output=tmp_path / 'locked')


def test_export_names_the_wrong_file(checkpoint, tmp_path, monkeypatch, capsys):
    def export(*words):
        monkeypatch.setattr('sys.argv', ['glmc.export', *map(str, words)])
        return error_line(Outcome(glmc.export.export.main(), *capsys.readouterr()))
    assert re.match('(--checkpoint )?.*gone.safetensors: expected a checkpoint', export(tmp_path / 'gone.safetensors'))
    assert re.match(f'{tmp_path}: exists, expected a new folder', export(checkpoint, tmp_path))


MODELS = {  # options of validate_glmc.py -> pattern of the error line
    '--model nowhere/export': '--model nowhere/export: no such file or folder; a Hub model is hf-hub:ORG/NAME',
    '--model no_such_net --no-report': '--model no_such_net: not a model of timm',
    '--model tests': '--model tests: no config.json in this folder, expected an export or a run',
    '--model hf-hub:nowhere/nothing': '--model hf-hub:nowhere/nothing: cannot download nowhere/nothing: ',
    '--model half': '--model half: model.safetensors is damaged or not from this run: its sha256',
    '--model pickle': '--model (local-dir:)?pickle: cannot be loaded: ',
    '--model README.md': 'README.md: expected a checkpoint of train_glmc.py',
}


@pytest.mark.parametrize('options', MODELS)
def test_model_to_validate(options, script, document, finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'tests').mkdir()
    (tmp_path / 'README.md').write_text('no checkpoint')
    for name in ('half', 'pickle'):
        shutil.copytree(finished_run / 'export', tmp_path / name)
    (tmp_path / 'pickle' / 'metrics.json').unlink()  # which has the checksum
    os.truncate(tmp_path / 'half' / 'model.safetensors', 1000)
    (tmp_path / 'pickle' / 'model.safetensors').write_bytes(b'\x80\x04.')
    monkeypatch.setattr('sys.argv', ['validate_glmc.py', *options.split()])
    code = run_script(validate_glmc.main)
    line = error_line(Outcome(code, *capsys.readouterr()))
    document('Models (validate_glmc.py)', options, f'^{MODELS[options]}', line)


def test_one_line_and_exit_code_of_the_process(tmp_path):
    outcome = run_train('--data-dir', 'nowhere', '--output', tmp_path)
    assert outcome == (2, '', 'error: --data-dir nowhere: no such folder\n')


@pytest.mark.skipif('GLMC_WRITE_DOCS' in os.environ, reason='the page is written after the tests')
def test_the_page_has_no_other_rows():
    """Each test above has one row; both columns are compared there."""
    singles = 3  # truncated JPEG, truncated checkpoint, existing run
    cases = (OPTIONS, FOLDERS, LISTS, UNREADABLE, YAML, SHARDS, RESUMED, MODELS)
    assert sum(map(len, page_rows().values())) == sum(map(len, cases)) + singles
    text = PAGE.read_text(encoding='utf-8')
    assert text.startswith(HEAD) and '…/' not in text
