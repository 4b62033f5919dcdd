import http.server
import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.checkpoints import made, refused, saved
from properties.models import bits, examples
from safetensors.numpy import load_file, save_file

from minitf.pretrained import load, save


def shard(folder, **index_changes):
    """Divide the weights into two files, as large checkpoints are."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(tensors) // 2
    weight_map = {}
    for number, names in enumerate((list(tensors)[:half], list(tensors)[half:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map | index_changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_sharded_checkpoint_is_the_same_model(tmp_path):
    folder = saved(tmp_path, "llama")
    before = bits(load(folder).parameters)
    shard(folder)
    assert bits(load(folder).parameters) == before
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused("model-00002-of-00002.safetensors cannot be read: No such file or directory$", folder)


def test_an_index_that_is_not_true_is_refused(tmp_path):
    one = saved(tmp_path / "one", "llama")
    shard(one, missing="model-00001-of-00002.safetensors")
    refused("model.safetensors.index.json differ in which tensors the file holds: missing$", one)
    two = saved(tmp_path / "two", "llama")
    shard(two, missing="../../secret.safetensors")
    refused("the tensor missing is said to be in '../../secret.safetensors', which is no file beside it$", two)
    (two / "model.safetensors.index.json").write_text("{}")
    refused("has no 'weight_map'", two)


def test_a_file_cut_off_or_too_long_is_refused_with_both_lengths(tmp_path):
    folder = saved(tmp_path)
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-3])
    refused(f"should have {len(raw)} bytes by its header, but it has {len(raw) - 3}: the file is cut off$", folder)
    file.write_bytes(raw + b"x")
    refused(
        f"should have {len(raw)} bytes .* it has {len(raw) + 1}: the file is longer than it should be$", folder
    )


def header(entries):
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text)) + text


GOOD_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", r"model.safetensors \(0 bytes\) is no safetensors file"),
        (b"PK\x03\x04" + bytes(100), "is a pickle of PyTorch with another name"),
        (b"\x80\x02\x8a\x0a" + bytes(100), "is a pickle of PyTorch with another name"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer and not the file itself"),
        (b"hello, world, this is some text", "is no safetensors file, or only the beginning of one"),
        (header(b"not json"), "is no safetensors file: its header is not JSON"),
        (header(b"[" * 200_000), "is no safetensors file: its header is not JSON"),
        (header([1, 2]), "is no safetensors file: its header is not a table of tensors"),
        (header({"a": GOOD_ENTRY | {"shape": [-2]}}), "the header's entry of the tensor a is damaged"),
        (header({"a": 3}), "the header's entry of the tensor a is damaged"),
        (header({"a": GOOD_ENTRY | {"dtype": "F8_E4M3"}}), "the tensor a is of type 'F8_E4M3'; minitf reads F64"),
        (header({"a": GOOD_ENTRY | {"shape": [3]}}) + bytes(8), r"the tensor a of shape \(3,\) .* needs 12 bytes"),
        (
            header({"a": GOOD_ENTRY, "b": GOOD_ENTRY | {"data_offsets": [4, 12]}}) + bytes(12),
            "the tensor b does not begin where the one before it ends",
        ),
    ],
    ids=range(13),
)
def test_what_is_no_safetensors_file_is_refused(raw, match, tmp_path):
    folder = saved(tmp_path)
    (folder / "model.safetensors").write_bytes(raw)
    refused(match, folder)


@examples(60)
@given(place=st.integers(0, 4000), value=st.integers(0, 255))
def test_a_damaged_header_is_an_error_for_people_or_the_same_model(place, value, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    save(folder, made("gpt2", layers=1, vocabulary=3))
    raw = bytearray((folder / "model.safetensors").read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    raw[place % length] = value
    (folder / "model.safetensors").write_bytes(raw)
    try:
        load(folder)
    except ValueError as error:
        assert str(folder) in str(error)


def test_pickled_weights_are_refused(tmp_path):
    folder = saved(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(r"has weights only as a pickle \(pytorch_model.bin\), which can run any code", folder)
    (folder / "pytorch_model.bin").unlink()
    refused("has no weights: neither model.safetensors nor model.safetensors.index.json$", folder)


def test_a_source_that_is_not_there_is_refused_and_never_fetched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(
        "^there is no file or folder 'openai/gpt2'; a model on the hub is named hub:openai/gpt2$", "openai/gpt2"
    )
    refused("^there is no file or folder '.*nowhere'$", tmp_path / "nowhere")
    refused("^revision is 'step1', which only a model on the hub has", tmp_path, revision="step1")


# The hub.


class Hub(types.ModuleType):
    """A stand-in for huggingface_hub that hands out a folder's files and keeps a list of what was asked for."""

    class EntryNotFoundError(Exception):
        pass

    def __init__(self, folder):
        super().__init__("huggingface_hub")
        self.folder, self.asked, self.errors = folder, [], self

    def hf_hub_download(self, name, file, revision=None):
        self.asked.append((name, file, revision))
        if name != "somebody/model":
            raise OSError("404 Client Error")
        if not (self.folder / file).exists():
            raise self.EntryNotFoundError(file)
        return str(self.folder / file)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    found = Hub(saved(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", found)
    return found


def test_a_model_of_the_hub_is_fetched_by_name_and_revision(hub):
    found = load("hub:somebody/model", revision="step1000")
    assert bits(found.parameters) == bits(made("gpt2").parameters)
    assert {revision for _, _, revision in hub.asked} == {"step1000"}
    optional = {"merges.txt", "tokenizer.json"}
    assert {file for _, file, _ in hub.asked} == {"config.json", "model.safetensors"} | optional


def test_shards_on_the_hub_are_fetched_as_the_index_says(hub):
    shard(hub.folder)
    assert bits(load("hub:somebody/model").parameters) == bits(made("gpt2").parameters)
    assert [file for _, file, _ in hub.asked][-2:] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def test_a_model_that_the_hub_does_not_have_is_refused(hub):
    refused("^hub:nobody/model could not be fetched: 404 Client Error$", "hub:nobody/model")
    refused("^hub:nobody/model at revision x could not be fetched", "hub:nobody/model", revision="x")
    refused("^'hub:gpt2' names no model on the hub; write hub:owner/name$", "hub:gpt2")
    (hub.folder / "model.safetensors").unlink()
    refused("could not be fetched: it has no weights as safetensors", "hub:somebody/model")
    (hub.folder / "config.json").unlink()
    refused("could not be fetched: config.json", "hub:somebody/model")


def test_without_the_hubs_package_the_way_to_get_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("^fetching hub:a/b needs the package huggingface_hub: pip install huggingface_hub", "hub:a/b")


class Site(http.server.BaseHTTPRequestHandler):
    """A hub of one model at one revision, on this machine; it keeps a list of the addresses asked for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        begin = "/somebody/model/resolve/step1000/"
        file = self.server.folder / self.path.removeprefix(begin)
        there = self.path.startswith(begin) and file.is_file()
        body = file.read_bytes() if there else b"Entry not found"
        self.send_response(200 if there else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header(*(("ETag", f'"{len(body)}"') if there else ("X-Error-Code", "EntryNotFound")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("huggingface_hub", "tokenizers"))),
    reason="not installed: pip install 'minitf[hub]'",
)
def test_the_hubs_package_fetches_the_files_of_the_revision(tmp_path):
    import tokenizers

    folder = saved(tmp_path / "hub")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a")).save(str(folder / "tokenizer.json"))
    program = """
import jax, numpy
from minitf.pretrained import load

found = load("hub:somebody/model", revision="step1000")
print(found.tokenizer.encode("b"), b"".join(map(numpy.asarray, jax.tree.leaves(found.parameters))).hex())
for name, revision in (("somebody/model", None), ("nobody/model", "step1000")):
    try:
        load(f"hub:{name}", revision=revision)
    except ValueError as error:
        print(str(error).split(":")[1])
"""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.folder, server.asked = folder, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    found, *refusals = done.stdout.splitlines()
    assert found == f"[1] {b''.join(bits(made('gpt2').parameters)[1]).hex()}"
    assert refusals == [
        "somebody/model could not be fetched",
        "nobody/model at revision step1000 could not be fetched",
    ]
    asked = {path.rsplit("/", 1)[1] for path in server.asked if "/somebody/model/resolve/step1000/" in path}
    assert asked == {"config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
