"""Upload to a real HTTP server on loopback with the real client, and loading from it with timm."""
import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY, Outcome, run_command
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard, close_session, constants

import glmc.export.hub
from glmc.errors import InputError
from glmc.export.hub import push_command
from glmc.export.load import load_trained

LOGITS = """
import sys, timm, torch
model = timm.create_model(sys.argv[1], pretrained=True).eval()
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
torch.save(model(images).detach(), sys.argv[2])
"""


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()


@pytest.fixture
def client(hub, monkeypatch):
    """Connect the client of this process to the server."""
    hub.connect_client(monkeypatch)
    monkeypatch.setattr('glmc.export.hub.RETRY_DELAYS', (0.01, 0.01))
    yield
    close_session()


@pytest.fixture
def environment(hub, tmp_path):
    """Environment variables of the client for a subprocess, which reads them on import."""
    return dict(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1', HF_TOKEN=TOKEN,
                HF_HOME=str(tmp_path / 'hf'), HF_HUB_DISABLE_PROGRESS_BARS='1', HF_HUB_DISABLE_TELEMETRY='1')


@pytest.fixture
def export(finished_run, tmp_path):
    """An export with a report, plots and private files that must not be uploaded."""
    folder = tmp_path / 'run' / 'export'
    shutil.copytree(finished_run / 'export', folder)
    (folder / 'plots').mkdir(exist_ok=True)
    (folder / 'plots' / 'accuracy.png').write_bytes(b'PNG')
    (folder / 'report.html').write_text('<html>')
    for stray in ('optimizer.pkl', 'pytorch_model.bin', 'notes.txt', '.env'):
        (folder / stray).write_text('private')
    return folder


@pytest.fixture
def push(client, export, monkeypatch, capsys):
    """Run `python -m glmc.hub` in this process."""
    def run(*options, token: str = TOKEN, timeout: float = 20) -> Outcome:
        monkeypatch.setenv('HF_TOKEN', token)
        monkeypatch.setattr('glmc.export.hub.TIMEOUT', timeout)
        monkeypatch.setattr(sys, 'argv', ['glmc.hub', str(export), 'us/net', *options])
        code = glmc.export.hub.main()
        return Outcome(code, *capsys.readouterr())
    return run


def test_timm_loads_the_pushed_export(hub, environment, export, tmp_path):
    command = [sys.executable, '-m', 'glmc.hub', export, 'us/net']
    first, again = run_command(*command, '--private', **environment), run_command(*command, **environment)
    assert (first.code, first.out, again.code) == (0, f'{hub.url}/us/net\n', 0), first.err + again.err
    assert hub.repos['us/net']['private'] and hub.commits == 2
    files = hub.files('us/net')
    assert set(files) == {'config.json', 'model.safetensors', 'metrics.json', 'README.md', 'report.html',
                          'plots/accuracy.png'}
    assert any(request.startswith('PUT /lfs/') for request in hub.seen)
    loaded = run_command(sys.executable, '-c', LOGITS, 'hf-hub:us/net', tmp_path / 'logits.pt', **environment)
    assert loaded.code == 0, loaded.err
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = timm.create_model(f'local-dir:{export}', pretrained=True).eval()(images)
    assert torch.equal(torch.load(tmp_path / 'logits.pt', weights_only=True), ours)
    card = ModelCard(files['README.md'].decode())
    assert "timm.create_model('hf-hub:us/net', pretrained=True)" in card.text
    assert 'local-dir:PATH' in (export / 'README.md').read_text(), 'the local folder does not change'
    config = json.loads(files['config.json'])['pretrained_cfg']
    assert (config['tag'], config.get('license'), config.get('paper_ids'), config.get('origin_url')) == (
        'glmc', None, None, None)


def test_a_revision_is_a_branch(hub, push):
    outcome = push('--revision', 'trial')
    assert outcome.code == 0, outcome.err
    assert 'model.safetensors' in hub.files('us/net', 'trial')
    assert not hub.files('us/net')


def test_a_revision_is_loaded_by_its_name(hub, environment, export, tmp_path):
    command = [sys.executable, '-m', 'glmc.hub', export, 'us/net', '--revision', 'trial']
    assert run_command(*command, **environment).code == 0
    loaded = run_command(sys.executable, '-c', LOGITS, 'hf-hub:us/net@trial', tmp_path / 'logits.pt', **environment)
    assert loaded.code == 0, loaded.err
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = timm.create_model(f'local-dir:{export}', pretrained=True).eval()(images)
    assert torch.equal(torch.load(tmp_path / 'logits.pt', weights_only=True), ours)
    assert "'hf-hub:us/net@trial'" in hub.files('us/net', 'trial')['README.md'].decode()


def test_a_pushed_export_is_evaluated_from_the_hub(hub, environment, export, folders, tmp_path):
    assert run_command(sys.executable, '-m', 'glmc.hub', export, 'us/net', **environment).code == 0
    outcome = run_command(
        sys.executable, 'validate_glmc.py', '--model', 'hf-hub:us/net', '--data-dir', folders, '--workers', '0',
        '--no-report', '--output', tmp_path, '--experiment', 'result', **environment)
    assert outcome.code == 0, outcome.err
    found, trained = (json.loads((place / 'metrics.json').read_text()) for place in (tmp_path / 'result', export))
    for name in ('top1', 'class_mean', 'ece', 'per_class_accuracy', 'train_counts'):
        assert found[name] == pytest.approx(trained[name]), name


@pytest.mark.parametrize('token, expected', [
    ('hf_wrong_and_secret', 'the token was refused (HTTP 401)'), ('', 'no token: set HF_TOKEN or run `hf auth login`')])
def test_a_wrong_token_is_one_line_without_it(hub, push, token, expected):
    outcome = push(token=token)
    assert outcome.code == 2
    assert expected in outcome.err.splitlines()[-1]
    assert 'secret' not in outcome.err + outcome.out
    assert not hub.repos
    assert hub.seen.count('POST /api/repos/create') == 1, 'a wrong token is not tried again'


def test_a_token_that_no_request_can_carry_is_one_line(hub, push):
    outcome = push(token='hf_sécret')
    assert (outcome.code, outcome.err) == (2, 'error: UnicodeEncodeError: the token has characters that no token has\n')


@pytest.mark.parametrize('status, expected', [
    (403, 'error: the token has no right to write there (HTTP 403)\n'), (404, "'404 Not Found' for url")])
def test_a_repository_without_write_access_is_one_line(hub, push, status, expected):
    hub.fail = [status]
    outcome = push()
    assert outcome.code == 2 and expected in outcome.err and len(outcome.err.splitlines()) == 1


def test_an_error_that_quotes_the_token_does_not_show_it(push, monkeypatch, caplog):
    def upload(*args):
        raise RuntimeError(f'header Authorization: Bearer {TOKEN} refused')
    caplog.set_level('INFO', 'glmc')
    monkeypatch.setattr('glmc.export.hub._upload', upload)
    outcome = push()
    assert outcome.code == 2 and 'Bearer *** refused' in outcome.err
    assert TOKEN not in outcome.out + outcome.err + caplog.text


@pytest.mark.parametrize('failures, code', [([503, 502], 0), ([503, 503, 503, 503], 2), ([403], 2)])
def test_a_temporary_error_is_tried_three_times(hub, push, caplog, failures, code):
    caplog.set_level('INFO', 'glmc')
    hub.fail = list(failures)
    outcome = push()
    assert outcome.code == code, outcome.err
    assert caplog.text.count('trying again') == (0 if failures == [403] else 2)
    assert bool(hub.commits) == (code == 0)


def test_a_slow_server_is_waited_for_and_a_silent_one_times_out(hub, push):
    hub.delay = 0.2
    assert push().code == 0
    hub.delay = 30
    outcome = push(timeout=0.3)
    assert outcome.code == 2
    assert 'imeout' in outcome.err.splitlines()[-1]


def test_a_server_that_is_down_is_one_line(hub, push):
    hub.close()
    outcome = push()
    assert outcome.code == 2
    assert outcome.err.startswith('error: ConnectError: ')
    assert len(outcome.err.splitlines()) == 1


def test_a_repository_that_is_not_there_is_one_line(client):
    with pytest.raises(InputError, match='--model hf-hub:us/nothing: cannot be loaded: HTTP 404, ') as error:
        load_trained('hf-hub:us/nothing')
    assert len(str(error.value).splitlines()) == 1


def test_only_an_export_is_pushed(push, export):
    (export / 'config.json').unlink()
    assert push().err == f'error: {export}: no config.json and model.safetensors, expected an export\n'


def test_the_hub_accepts_the_card(client, export):
    ModelCard.load(export / 'README.md').validate()


def test_a_run_pushes_at_its_end(hub, client, script, folders, tmp_path):
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, '--hub-license', 'apache-2.0',
                     '--push-to-hub', 'us/net')
    assert outcome.code == 0, outcome.err
    assert f'Pushed to {hub.url}/us/net' in outcome.err
    assert ModelCard(hub.files('us/net')['README.md'].decode()).data.license == 'apache-2.0'


def test_a_failed_push_fails_no_run_and_prints_the_command(hub, client, script, folders, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', '')
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'none'))
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, '--experiment', 'run',
                     '--push-to-hub', 'us/net', '--hub-private')
    assert outcome.code == 0, outcome.err
    *early, why, how = outcome.err.splitlines()
    trained = next(k for k, line in enumerate(early) if line.startswith('Epoch 1/'))
    assert [line for line in early[:trained] if line.startswith('--push-to-hub: no token yet')]
    assert why == 'Not pushed to us/net: no token: set HF_TOKEN or run `hf auth login` (HTTP 401)'
    export = tmp_path / 'run' / 'export'
    assert (export / 'model.safetensors').is_file()
    assert how == f"Push again with: {push_command(export, 'us/net', private=True)}"


def test_the_command_that_pushes_again_is_quoted():
    assert push_command(Path('a b/export'), 'us/net', revision='v1') == (
        "python -m glmc.hub 'a b/export' us/net --revision v1")


@pytest.mark.parametrize('place', ['.', 'export/model.safetensors', 'checkpoints/epoch-0001.safetensors', 'unfinished'])
def test_runs_and_checkpoints_are_pushed_alike(place, hub, client, finished_run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(finished_run, tmp_path / 'run')
    if place == 'unfinished':
        shutil.rmtree(run / 'export')
        place = '.'
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.setattr(sys, 'argv', ['glmc.hub', str(run / place), 'us/net'])
    code = glmc.export.hub.main()
    assert code == 0, capsys.readouterr().err
    assert {'config.json', 'model.safetensors', 'metrics.json', 'README.md'} <= set(hub.files('us/net'))
