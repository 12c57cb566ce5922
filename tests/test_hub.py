"""Heads over the Hub's own client: against a stand-in server on loopback, its cache, offline, and folders."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
from dsrl_vla import SteeredPolicy, SteeringHead, load_recipe
from dsrl_vla.artefact import LARGEST
from dsrl_vla.cli import main
from dsrl_vla.errors import DsrlError, MismatchError
from dsrl_vla.evaluation import RUN_FACTS
from dsrl_vla.head import HeadConfig
from dsrl_vla.hub import fetch, inspect, pull, push, shipped_heads, write_artefact
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout
from dsrl_vla.policy import pinned
from huggingface_hub import ModelCard

REPO = "lab/drawer-head"
RESULT = {
    "task": "point:fork", "base_uri": "flow-mlp:there", "episodes": 50, "seeds": [300000, 300049],
    "base": {"success": 0.5, "ci95": [0.37, 0.63], "mean_steps": 30.0},
    "steered": {"success": 0.98, "ci95": [0.9, 1.0], "mean_steps": 25.0},
    "steered_stochastic": {"success": 0.96, "ci95": [0.87, 0.99], "mean_steps": 25.0},
    "difference": {"mean": 0.48, "ci95": [0.34, 0.62]},
    "controls": {"zero": {"success": 0.0, "ci95": [0.0, 0.07], "mean_steps": 40.0}},
    "recipe": "fork", "train_seed": 3, "env_steps": 1200, "updates": 400, "train_seconds": 12.0,
}  # fmt: skip


class StandInHub(ThreadingHTTPServer):
    """The few endpoints of the Hub that pushing and loading a head need; commits in memory."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.refs, self.commits, self.requests, self.down = {}, {}, [], False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo, files, branch="main", gone=()):
        parent = self.commits.get(self.refs.get((repo, branch)), {})
        merged = {name: content for name, content in parent.items() if name not in gone} | files
        sha = hashlib.sha1(repr((len(self.commits), sorted(merged))).encode()).hexdigest()
        self.commits[sha], self.refs[repo, branch] = merged, sha
        return sha

    def files(self, repo, revision):
        sha = self.refs.get((repo, revision), revision)
        return sha, self.commits.get(sha)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.answer({"error": code}, 404, X_Error_Code=code)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if self.server.down:
            return self.answer({"error": "Service Unavailable"}, 503)
        if path.startswith("/api/models/"):
            return self.describe(path.removeprefix("/api/models/"))
        repo, _, rest = path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        sha, files = self.server.files(repo, revision)
        if files is None:
            return self.missing("RevisionNotFound" if (repo, "main") in self.server.refs else "RepoNotFound")
        if name not in files:
            return self.missing("EntryNotFound")
        etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        return self.answer(files[name], X_Repo_Commit=sha, ETag=etag, Content_Type="application/octet-stream")

    def describe(self, path):
        repo, mark, revision = path.partition("/revision/")
        if "/tree/" in path:
            repo, _, revision = path.partition("/tree/")
        sha, files = self.server.files(repo, revision or "main")
        if files is None:
            return self.missing("RepoNotFound" if (repo, "main") not in self.server.refs else "RevisionNotFound")
        if "/tree/" in path:
            entry = lambda n: {"type": "file", "path": n, "size": len(files[n]), "oid": "0" * 40}
            return self.answer([entry(name) for name in files])
        entries = [{"rfilename": name, "size": len(content), "blobId": "0"} for name, content in files.items()]
        return self.answer({"id": repo, "sha": sha, "siblings": entries, "tags": [], "private": False})

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"POST {path}")
        if path == "/api/repos/create":
            made = json.loads(body)
            repo = f"{made['organization']}/{made['name']}" if made.get("organization") else made["name"]
            self.server.refs.setdefault((repo, "main"), self.server.commit(repo, {}))
            return self.answer({"url": f"{self.server.url}/{repo}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo, _, rest = path.removeprefix("/api/models/").rpartition("/")
        repo, _, kind = repo.rpartition("/")
        if kind == "branch":
            self.server.refs[repo, rest] = self.server.refs[repo, "main"]
            return self.answer({})
        if kind == "preupload":
            files = json.loads(body)["files"]
            return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False,
                                           "oid": None} for f in files]})  # fmt: skip
        assert kind == "commit"
        lines = [json.loads(line) for line in body.splitlines()]
        added = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        gone = [x["value"]["path"] for x in lines if x["key"] == "deletedFile"]
        sha = self.server.commit(repo, added, rest, gone)
        return self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})


@pytest.fixture
def hub(monkeypatch):
    """A stand-in Hub on the loopback interface; the other tests are kept from the real one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = StandInHub()
    yield server
    server.shutdown()


@pytest.fixture
def head(fork_base):
    torch.manual_seed(1)
    layout = NoiseLayout(fork_base.spec.noise, "chunk", 1.2)
    network = NetworkConfig(width=16, layers=1)
    config = HeadConfig.for_base(fork_base.spec, layout, network, fingerprint=fork_base.fingerprint())
    return SteeringHead(config).eval()


@pytest.fixture
def run(head, tmp_path):
    """What a finished run leaves."""
    folder = tmp_path / "run"
    head.save_pretrained(folder / "best")
    (folder / "eval.json").write_text(json.dumps(RESULT))
    (folder / "recipe.yaml").write_text("name: fork\n")
    (folder / "curves.png").write_bytes(b"\x89PNG picture")
    (folder / "rollouts.mp4").write_bytes(b"film")
    return folder


def same(a, b):
    return a.config == b.config and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def options(hub, tmp_path):
    return {"endpoint": hub.url, "cache_dir": tmp_path / "cache", "token": False}


def test_a_round_trip_over_the_hub(hub, head, run, fork_base, observation, tmp_path):
    url = head.push_to_hub(REPO, run=run, private=True, token="t", endpoint=hub.url)
    assert url.startswith(hub.url) and set(hub.files(REPO, "main")[1]) == set(LARGEST)
    loaded = SteeringHead.from_pretrained(REPO, **options(hub, tmp_path))
    assert same(loaded, head) and not loaded.training
    seen = observation(fork_base)
    assert torch.equal(SteeredPolicy(fork_base, loaded).act(seen), SteeredPolicy(fork_base, head).act(seen))
    fetched = {r.rpartition("/")[2] for r in hub.requests if r.startswith("GET") and "/resolve/" in r}
    assert fetched == {"head.safetensors", "head_config.json", "manifest.json"}  # no picture, no film


def test_a_revision_is_a_branch_a_commit_and_stays_what_it_was(hub, head, tmp_path):
    push(head, REPO, token="t", endpoint=hub.url)
    first = hub.refs[REPO, "main"]
    with torch.no_grad():
        next(head.parameters()).add_(1.0)
    push(head, REPO, token="t", endpoint=hub.url, branch="better")
    at = lambda revision: SteeringHead.from_pretrained(REPO, revision, **options(hub, tmp_path))
    assert same(at("better"), head) and not same(at("main"), head) and same(at(first), at("main"))
    with pytest.raises(DsrlError, match="head 'lab/drawer-head': expected a folder or a Hub repository, got .*404"):
        at("no-such-branch")
    with pytest.raises(DsrlError, match="head 'lab/nothing': expected a folder or a Hub repository"):
        SteeringHead.from_pretrained("lab/nothing", **options(hub, tmp_path))


def test_without_a_network_the_cache_answers(hub, head, tmp_path):
    push(head, REPO, token="t", endpoint=hub.url)
    SteeringHead.from_pretrained(REPO, **options(hub, tmp_path))
    asked = len(hub.requests)
    assert same(SteeringHead.from_pretrained(REPO, local_files_only=True, **options(hub, tmp_path)), head)
    assert len(hub.requests) == asked
    hub.shutdown(), hub.server_close()
    assert same(SteeringHead.from_pretrained(REPO, **options(hub, tmp_path)), head)
    with pytest.raises(DsrlError, match="expected a folder or a Hub repository"):
        SteeringHead.from_pretrained("lab/never-seen", **options(hub, tmp_path))


def test_a_hub_that_is_down_is_no_hub_at_all(hub, head, tmp_path):
    push(head, REPO, token="t", endpoint=hub.url)
    SteeringHead.from_pretrained(REPO, **options(hub, tmp_path))
    hub.down = True
    assert same(SteeringHead.from_pretrained(REPO, **options(hub, tmp_path)), head)


def test_a_base_of_the_hub_is_named_at_its_commit_and_one_served_elsewhere_as_it_was():
    assert pinned("transformers:lab/pi0", "transformers", "lab/pi0", "c0ffee") == "transformers:lab/pi0@c0ffee"
    assert pinned("remote:ws://gpu:8000", "transformers", "lab/pi0", "c0ffee") == "remote:ws://gpu:8000"
    assert pinned("nano:", "transformers", "nano:", "") == "nano:"


def test_a_cached_head_can_be_looked_into_though_the_rest_was_never_fetched(hub, head, run, tmp_path):
    push(head, REPO, run=run, token="t", endpoint=hub.url)
    SteeringHead.from_pretrained(REPO, **options(hub, tmp_path))
    found = inspect(REPO, local_files_only=True, **options(hub, tmp_path))
    assert found["layout"] == "chunk" and "evaluation" not in found
    with pytest.raises(DsrlError, match="its cache has only a part"):
        pull(REPO, tmp_path / "copy", local_files_only=True, **options(hub, tmp_path))
    assert not (tmp_path / "copy").exists()


def test_offline_mode_reads_the_caches_own_layout(hub, head, tmp_path):
    push(head, REPO, token="t", endpoint=hub.url)
    SteeringHead.from_pretrained(REPO, **options(hub, tmp_path))
    assert (tmp_path / "cache" / "models--lab--drawer-head" / "snapshots" / hub.refs[REPO, "main"]).is_dir()
    asked = len(hub.requests)
    code = f"from dsrl_vla import SteeringHead; print(SteeringHead.from_pretrained({REPO!r}).config.layout.bound)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "1.2", done.stderr
    assert len(hub.requests) == asked


def test_the_card_says_what_was_measured(head, run, tmp_path):
    write_artefact(head, tmp_path / "out", run)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "dsrl-vla" and {"robotics", "dsrl"} <= set(card.data.tags)
    steered, base = card.data.eval_results
    assert (steered.metric_value, base.metric_value) == (0.98, 0.5)
    assert steered.dataset_args == {"episodes": 50, "first_seed": 300000, "last_seed": 300049}
    assert (steered.metric_args["low"], steered.metric_args["high"]) == (0.9, 1.0)
    said = ["| **steered** | 0.98 | [0.90, 1.00] |", "| zero noise | 0.00 |", "seed 3", "paired: +0.48"]
    said += ["](curves.png)", "](rollouts.mp4)", 'load_base("flow-mlp:there")', "no safety certificate"]
    assert all(words in card.text for words in said)
    assert card.data.base_model is None  # this base is not on the Hub


def test_the_card_says_which_options_the_base_needs(head, run, tmp_path):
    recipe = load_recipe("demo", {"base": {"options": {"cameras": {"front": "corner"}}}})
    (run / "recipe.yaml").write_text(recipe.to_yaml() + "of_another_version: 1\n")
    write_artefact(head, tmp_path / "out", run)
    card = (tmp_path / "out" / "README.md").read_text()
    assert """load_base("flow-mlp:there", cameras={'front': 'corner'})""" in card


def test_a_base_on_the_hub_is_linked_as_peft_does(head, tmp_path):
    from dataclasses import replace

    head.config = replace(
        head.config, base_model_name_or_path="lerobot/pi0", revision="abc123", adapter="transformers"
    )
    write_artefact(head, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "lerobot/pi0" and card.data.base_model_relation == "adapter"
    assert "base_model:adapter:lerobot/pi0" in card.data.tags
    assert 'load_base("transformers:lerobot/pi0@abc123")' in card.text and "without an evaluation" in card.text


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_a_strangers_evaluation_is_read_with_suspicion(head, tmp_path, text):
    head.save_pretrained(tmp_path)
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(DsrlError, match="eval.json: expected"):
        inspect(str(tmp_path))


def test_push_inspect_and_pull_on_the_command_line(hub, head, run, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    common = ["--endpoint", hub.url, "--token", "t"]
    assert main(["push", str(run), REPO, *common]) == 0
    assert "/commit/" in capsys.readouterr().out
    assert main(["inspect", REPO, "--json", *common]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["evaluation"]["steered"]["success"] == 0.98 and seen["layout"] == "chunk"
    assert seen["fingerprint"]["weights"] == head.config.fingerprint.weights[:12]
    assert main(["inspect", str(run / "best")]) == 0
    assert "fingerprint" in capsys.readouterr().out
    assert main(["pull", REPO, "--out", str(tmp_path / "mine"), *common]) == 0
    assert {p.name for p in (tmp_path / "mine").iterdir()} == set(LARGEST)
    assert same(SteeringHead.from_pretrained(tmp_path / "mine"), head)
    assert main(["pull", REPO, "--out", str(tmp_path / "mine"), *common]) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert main(["push", str(run), "--folder", str(tmp_path / "folder")]) == 0
    assert same(SteeringHead.from_pretrained(tmp_path / "folder"), head)


def test_another_heads_evaluation_does_not_stay_beside_a_head(hub, head, run, tmp_path):
    push(head, REPO, run=run, token="t", endpoint=hub.url)
    push(head, REPO, token="t", endpoint=hub.url)
    assert set(hub.files(REPO, "main")[1]) == {"head.safetensors", "head_config.json", "manifest.json", "README.md"}
    write_artefact(head, tmp_path / "bare")
    (tmp_path / "bare" / "eval.json").write_text((run / "eval.json").read_text())  # as an older version left it
    assert "evaluation" not in inspect(str(tmp_path / "bare"))
    assert not (pull(str(tmp_path / "bare"), tmp_path / "mine") / "eval.json").exists()


def test_a_card_that_was_edited_on_the_hub_is_no_damage(head, run, tmp_path):
    folder = tmp_path / "head"
    write_artefact(head, folder, run)
    tree = json.loads((folder / "manifest.json").read_text())
    assert "README.md" not in tree["files"]
    tree["files"]["README.md"] = {"bytes": 1, "sha256": "0"}  # as older versions wrote it
    (folder / "manifest.json").write_text(json.dumps(tree))
    with (folder / "README.md").open("a") as card:
        card.write("\nA licence.\n")
    assert same(SteeringHead.from_pretrained(folder), head)
    assert "A licence." in (pull(str(folder), tmp_path / "mine") / "README.md").read_text()


def test_an_unfinished_run_is_not_pushed(head, run, tmp_path):
    (run / "eval.json").unlink()
    with pytest.raises(DsrlError, match="expected a finished run, with an eval.json"):
        write_artefact(head, tmp_path / "out", run)


def test_a_run_that_was_evaluated_on_its_way_is_not_pushed_as_a_finished_one(head, run, tmp_path):
    found = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps({k: v for k, v in found.items() if k not in RUN_FACTS}))
    with pytest.raises(
        DsrlError, match="expected what a finished run says of itself, got the evaluation of one under"
    ):
        write_artefact(head, tmp_path / "out", run)


def test_shipped_heads_are_sound_and_small():
    assert shipped_heads()
    for name, folder in shipped_heads().items():
        SteeringHead.from_pretrained(f"shipped:{name}")
        assert sum(p.stat().st_size for p in folder.iterdir()) < 1_000_000
        assert inspect(f"shipped:{name}")["evaluation"]["episodes"] >= 100
    with pytest.raises(DsrlError, match="unknown shipped head 'drawer-opn'. Did you mean 'drawer-open'"):
        fetch("shipped:drawer-opn")


def test_what_is_no_repository_has_no_revision(folder):
    for name in ("shipped:drawer-open", str(folder)):
        with pytest.raises(DsrlError, match=r"expected none, for '.*' is no repository of the Hub's, got 'v1'"):
            SteeringHead.from_pretrained(name, revision="v1")


def test_a_heads_files_can_be_read_by_whoever_may_read_its_folder(head, tmp_path):
    head.save_pretrained(tmp_path / "head")
    assert len({path.stat().st_mode for path in (tmp_path / "head").iterdir()}) == 1


def test_what_is_neither_folder_nor_repository_is_refused():
    for name in ("nothing-here", "./nothing", "a/b/c"):
        with pytest.raises(DsrlError, match="expected a folder, a Hub repository 'owner/name', or 'shipped:<recipe>'"):
            SteeringHead.from_pretrained(name)


# Hostile files


@pytest.fixture
def folder(head, tmp_path):
    write_artefact(head, tmp_path / "artefact")
    return tmp_path / "artefact"


def tampered(folder, *, manifest=True):
    """Let the manifest agree with the files again, so that the next check has to notice."""
    from dsrl_vla.manifest import write_manifest

    (folder / "manifest.json").unlink()
    if manifest:
        write_manifest(folder, [p.name for p in folder.iterdir()])


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {Bomb.place}",)


def pickle_in_disguise(folder):
    import pickle

    (folder / "head.safetensors").write_bytes(pickle.dumps(Bomb()))


def zip_of_torch_in_disguise(folder):
    torch.save({"x": torch.zeros(2), "bomb": Bomb()}, folder / "head.safetensors")


def bin_instead(folder):
    torch.save({"bomb": Bomb()}, folder / "pytorch_model.bin")
    (folder / "head.safetensors").unlink()


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "head.safetensors")
    save_file(change(tensors), folder / "head.safetensors")


def configure(folder, **changed):
    config = json.loads((folder / "head_config.json").read_text())
    for key, value in changed.items():
        place = config
        *parents, last = key.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    (folder / "head_config.json").write_text(json.dumps(config))


def huge_header(folder):
    (folder / "head.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


HOSTILE = {
    "a pickle as safetensors": (pickle_in_disguise, "expected a safetensors file"),
    "a torch zip as safetensors": (zip_of_torch_in_disguise, "expected a safetensors file"),
    "a .bin in its place": (bin_instead, "expected a file head.safetensors"),
    "half a file": (lambda f: (f / "head.safetensors").write_bytes((f / "head.safetensors").read_bytes()[:-9]),
                    "expected a safetensors file"),
    "an empty file": (lambda f: (f / "head.safetensors").write_bytes(b""), "expected a safetensors file"),
    "a header that lies about its length": (huge_header, "expected a safetensors file"),
    "float16": (lambda f: rewrite(f, lambda t: {k: v.half() for k, v in t.items()}), r"float32 \(F32\), got F16"),
    "float64": (lambda f: rewrite(f, lambda t: {k: v.double() for k, v in t.items()}), "got F64"),
    "NaN": (lambda f: rewrite(f, lambda t: {k: v * float("nan") for k, v in t.items()}), "expected finite weights"),
    "one weight more": (lambda f: rewrite(f, lambda t: t | {"zz": torch.zeros(1)}), "one called zz besides"),
    "one weight less": (lambda f: rewrite(f, lambda t: dict(list(t.items())[1:])), "got none called"),
    "another shape": (lambda f: rewrite(f, lambda t: {k: v.flatten() for k, v in t.items()}), r"of shape \["),
    "a config of another size": (lambda f: configure(f, state_dim=5), "the weights that head_config.json describes"),
    "a config of absurd width": (lambda f: configure(f, network__width=2**40), "network.width: expected from 0"),
    "a config of absurd depth": (lambda f: configure(f, network__layers=10**9), "network.layers: expected from 0"),
    "a config of absurd noise": (lambda f: configure(f, layout__space__horizon=10**12), "horizon: expected from 0 to"),
    "an absurd noise mask": (lambda f: configure(f, layout__space__dim=10**12, layout__space__live=[]), "dim: "),
    "a bound beyond reason": (lambda f: configure(f, layout__bound=1e9), "noise.bound: expected above 0 and at most"),
    "a bound that is no number": (lambda f: configure(f, layout__bound=float("nan")), "bound: expected a number"),
    "code as a layout": (lambda f: configure(f, layout__name="__import__('os')"), "unknown noise layout"),
    "a path as a camera": (lambda f: configure(f, cameras=["../../x"]), "camera: expected a name of letters"),
    "a number as text": (lambda f: configure(f, state_dim="4"), "state_dim: expected int, got '4'"),
    "an unknown key": (lambda f: configure(f, auto_map={"x": "y.py"}), "unknown key of head_config.json 'auto_map'"),
    "a missing key": (lambda f: (f / "head_config.json").write_text("{}"), "head_config.json: expected the keys"),
    "a list for a config": (lambda f: (f / "head_config.json").write_text("[]"), "HeadConfig, got list"),
    "bytes for a config": (lambda f: (f / "head_config.json").write_bytes(b"\xff\xfe"), "expected JSON"),
    "a deep config": (lambda f: (f / "head_config.json").write_text("[" * 100_000), "head_config.json: expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("manifest", [True, False])
def test_hostile_files_are_refused_and_nothing_runs(folder, tmp_path, case, manifest):
    Bomb.place = tmp_path / "exploded"
    change, message = HOSTILE[case]
    change(folder)
    tampered(folder, manifest=manifest)
    with pytest.raises(DsrlError, match=message):
        SteeringHead.from_pretrained(folder)
    assert not Bomb.place.exists()


def manifest_with(folder, **changed):
    listed = json.loads((folder / "manifest.json").read_text())
    listed["files"] |= changed
    (folder / "manifest.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    "name", ["../../outside.txt", "/etc/passwd", "sub/head.safetensors", "pytorch_model.bin", "."]
)
def test_a_manifest_leads_nowhere_else(folder, name, tmp_path):
    manifest_with(folder, **{name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(DsrlError, match="manifest.json: expected only curves.png, "):
        SteeringHead.from_pretrained(folder)
    with pytest.raises(DsrlError, match=r"manifest.json: expected only curves.png, "):
        pull(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_manifest_notices_what_changed(folder):
    path = folder / "head_config.json"
    text = path.read_text()
    path.write_text(text + " ")
    with pytest.raises(DsrlError, match=r"head_config.json: expected \d+ bytes, as manifest.json says, got"):
        SteeringHead.from_pretrained(folder)
    path.write_text(text.replace('"bound": 1.2', '"bound": 2.2'))
    with pytest.raises(DsrlError, match="head_config.json: expected the content that manifest.json describes"):
        SteeringHead.from_pretrained(folder)
    path.write_text(text)
    for broken in ("{", "[]", '{"files": [1]}', '{"files": {"head.safetensors": {}}}'):
        (folder / "manifest.json").write_text(broken)
        with pytest.raises(DsrlError, match="manifest.json: expected a mapping of files"):
            SteeringHead.from_pretrained(folder)
    (folder / "manifest.json").write_text('{"files": {}}')  # or the weights could be exchanged unseen
    with pytest.raises(DsrlError, match=r"manifest.json: expected an entry for head\.\w+, got none"):
        SteeringHead.from_pretrained(folder)


def test_too_large_a_file_is_refused_before_it_is_read_or_downloaded(hub, folder, monkeypatch, tmp_path):
    monkeypatch.setitem(LARGEST, "head.safetensors", 1000)
    with pytest.raises(DsrlError, match="head.safetensors: expected at most 0 KiB"):
        SteeringHead.from_pretrained(folder)
    hub.commit(REPO, {p.name: p.read_bytes() for p in folder.iterdir()})
    with pytest.raises(DsrlError, match="head 'lab/drawer-head', head.safetensors: expected at most"):
        SteeringHead.from_pretrained(REPO, **options(hub, tmp_path))
    assert not any("/resolve/" in request for request in hub.requests)


def test_a_hostile_repository_gives_nothing_but_the_files_of_a_head(hub, folder, tmp_path):
    Bomb.place = tmp_path / "exploded"
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    files |= {"../../escaped": b"x", "pytorch_model.bin": b"\x80\x04", "modeling.py": b"raise SystemExit"}
    hub.commit(REPO, files)
    SteeringHead.from_pretrained(REPO, **options(hub, tmp_path))
    pull(REPO, tmp_path / "pulled", **options(hub, tmp_path))
    assert {p.name for p in (tmp_path / "pulled").iterdir()} <= set(LARGEST)
    assert not list(tmp_path.rglob("escaped")) and not list(tmp_path.rglob("*.bin"))
    assert not list(tmp_path.rglob("modeling.py"))


def test_a_downloaded_head_refuses_another_base(hub, head, fork_base, tmp_path):
    import copy

    push(head, REPO, token="t", endpoint=hub.url)
    base = copy.copy(fork_base)
    base._fingerprint, base.model = None, copy.deepcopy(fork_base.model)
    with torch.no_grad():
        base.model.leave.weight.mul_(1.5)
    loaded = SteeringHead.from_pretrained(REPO, **options(hub, tmp_path))
    with pytest.raises(MismatchError, match="weights: .*behaviour: "):
        SteeredPolicy(base, loaded)
    shutil.rmtree(tmp_path / "cache")
