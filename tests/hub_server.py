"""Loopback server with the part of the Hub's API for creating, committing (LFS included) and loading."""
import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

TOKEN = 'hf_right'


class Hub:
    """Repositories in memory.

    Attributes:
        repos: Name -> {'private', 'branches': name -> {path -> bytes}}.
        commits: Number of commits.
        fail: Status codes of the next answers, which replace the real ones.
        delay: Seconds before each answer.
        seen: `METHOD path` of every request.
    """

    def __init__(self):
        self.repos, self.lfs, self.commits = {}, {}, 0
        self.fail, self.delay, self.seen = [], 0.0, []
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), dict(hub=self)))
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def connect_client(self, monkeypatch) -> None:
        """Connect the client of this process to the server, past HF_HUB_OFFLINE."""
        for name, value in dict(
                ENDPOINT=self.url, HUGGINGFACE_CO_URL_TEMPLATE=self.url + '/{repo_id}/resolve/{revision}/{filename}',
                HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv('HF_TOKEN', TOKEN)

    def files(self, repo: str, branch: str = 'main') -> dict[str, bytes]:
        return self.repos[repo]['branches'][branch]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args) -> None:
        pass

    def answer(self) -> None:
        hub, path = self.hub, self.path.split('?')[0]
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        hub.seen.append(f'{self.command} {path}')
        time.sleep(hub.delay)
        if hub.fail and path != '/api/agent-harnesses':  # the first request of a process
            self.reply({'error': 'a simulated failure'}, hub.fail.pop(0))
        elif self.command in ('POST', 'PUT') and not path.startswith('/lfs/') and (
                self.headers.get('Authorization') != f'Bearer {TOKEN}' and path != '/api/validate-yaml'):
            self.reply({'error': 'Invalid credentials'}, 401)
        else:
            self.route(path)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def route(self, path: str) -> None:
        routes = {
            r'POST /api/repos/create': self.create, r'POST /api/validate-yaml': self.validate,
            r'POST /api/models/(.+)/preupload/(.+)': self.preupload, r'POST /api/models/(.+)/branch/(.+)': self.branch,
            r'POST /(.+)\.git/info/lfs/objects/batch': self.batch, r'PUT /lfs/(\w+)': self.put,
            r'POST /verify/(\w+)': self.verify, r'POST /api/models/(.+)/commit/(.+)': self.commit,
            r'(?:GET|HEAD) /(.+)/resolve/([^/]+)/(.+)': self.resolve, r'GET /api/models/([^/]+/[^/]+)(?:/.*)?': self.info}
        for pattern, handler in routes.items():
            found = re.fullmatch(pattern, f'{self.command} {path}')
            if found:
                return handler(*found.groups())
        return self.reply({'error': f'no route for {self.command} {path}'}, 404)

    def reply(self, content, status: int = 200, **headers) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {'Content-Length': len(body), 'Content-Type': 'application/json', **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        exists = name in self.hub.repos
        private = bool(asked.get('private')) or asked.get('visibility') == 'private'
        self.hub.repos.setdefault(name, dict(private=private, branches={'main': {}}))
        self.reply({'url': f'{self.hub.url}/{name}', 'name': name, 'id': name}, 409 if exists else 200)

    def validate(self) -> None:
        valid = json.loads(self.body)['content'].startswith('---\n')
        self.reply({'errors': [] if valid else [{'message': 'no metadata'}], 'warnings': []})

    def branch(self, repo: str, name: str) -> None:
        branches = self.hub.repos[repo]['branches']
        self.reply({}, 409 if name in branches else 200)
        branches.setdefault(name, dict(branches['main']))

    def preupload(self, repo: str, branch: str) -> None:
        if repo not in self.hub.repos:
            return self.reply({'error': 'Repository not found'}, 404, X_Error_Code='RepoNotFound')
        modes = {True: 'lfs', False: 'regular'}
        return self.reply({'files': [
            dict(path=file['path'], uploadMode=modes[file['path'].endswith('.safetensors')], shouldIgnore=False)
            for file in json.loads(self.body)['files']]})

    def batch(self, repo: str) -> None:
        url = self.hub.url
        self.reply({'transfer': 'basic', 'objects': [
            {**wanted, 'actions': {'upload': {'href': f"{url}/lfs/{wanted['oid']}"},
                                   'verify': {'href': f"{url}/verify/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)['objects']]})

    def put(self, oid: str) -> None:
        good = hashlib.sha256(self.body).hexdigest() == oid
        self.hub.lfs[oid] = self.body
        self.reply({}, 200 if good else 400)

    def verify(self, oid: str) -> None:
        self.reply({}, 200 if oid in self.hub.lfs else 404)

    def commit(self, repo: str, branch: str) -> None:
        files = self.hub.files(repo, branch)
        for line in map(json.loads, self.body.decode().splitlines()):
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.hub.lfs[value['oid']]
        self.hub.commits += 1
        oid = f'{self.hub.commits:040x}'
        self.reply({'success': True, 'commitOid': oid, 'commitUrl': f'{self.hub.url}/{repo}/commit/{oid}'})

    def resolve(self, repo: str, branch: str, path: str) -> None:
        branches = self.hub.repos.get(repo, {}).get('branches')
        files = branches and (branches.get(branch) or branches['main'])  # a commit id resolves to main
        if files is None or path not in files:
            code = 'EntryNotFound' if branches else 'RepoNotFound'
            return self.reply({'error': code}, 404, X_Error_Code=code, X_Repo_Commit=f'{self.hub.commits:040x}')
        content = files[path]
        return self.reply(content, X_Repo_Commit=f'{self.hub.commits:040x}', ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    def info(self, repo: str) -> None:
        if repo not in self.hub.repos:
            return self.reply({'error': 'Repository not found'}, 404, X_Error_Code='RepoNotFound')
        siblings = [{'rfilename': path} for path in self.hub.files(repo)]
        return self.reply({'id': repo, 'modelId': repo, 'sha': f'{self.hub.commits:040x}', 'siblings': siblings})
