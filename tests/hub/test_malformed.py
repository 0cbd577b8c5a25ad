# ruff: noqa: PT017  both outcomes are looked at
"""Checkpoints that are damaged or made to do harm: an error that names the file or the field, no crash, little memory.

Files of `save_pretrained`, changed: each known way by hand, others by hypothesis with a fixed number of examples.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, logging

from hf_rnn import CorruptPayloadError, GRUConfig, GRUForCausalLM, byte_tokenizer, save_compressed
from hf_rnn.tokenization.reading import read_tokenizer
from hf_rnn_kernels.coding import decode_tensor, encode_tensor, store_tensor

SIZES = dict(hidden_size=8, num_hidden_layers=1)
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint in one file, one in shards, and one compressed."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = GRUForCausalLM(GRUConfig(**SIZES))
    model.save_pretrained(folder / "whole")
    byte_tokenizer().save_pretrained(folder / "whole")
    model.save_pretrained(folder / "shards", max_shard_size="2KB")
    save_compressed(model, folder / "coded")
    logging.disable_progress_bar()
    yield folder
    logging.enable_progress_bar()


@pytest.fixture
def copy(saved, tmp_path):
    """A function that gives a fresh copy of a checkpoint."""

    def make(name="whole"):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return shutil.copytree(saved / name, tmp_path / "copy")

    return make


def edit_json(path, change) -> None:
    content = json.loads(path.read_text())
    content = change(content) or content
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def edit_header(path, change) -> None:
    """Change the header of a safetensors file, a dictionary; what the function returns takes its place."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


HEADS = "lm_head.weight"
HEADERS = {
    "no JSON": (lambda h: b"{" * 50, OSError, "model.safetensors: the weights cannot be read"),
    "unknown dtype": (lambda h: h[HEADS].update(dtype="F17"), OSError, "model.safetensors.*F17"),
    "another size": (lambda h: h[HEADS].update(dtype="F16"), OSError, "model.safetensors.*offset"),
    "integers": (lambda h: h[HEADS].update(dtype="I32"), ValueError, "lm_head.weight: expected floating-point.*I32"),
    "shape": (lambda h: h[HEADS].update(shape=[8, 259]), RuntimeError, r"lm_head.weight: expected shape \[259, 8\]"),
    "huge shape": (lambda h: h[HEADS].update(shape=[2**40, 2**40]), OSError, "model.safetensors.*overflow"),
    "negative shape": (lambda h: h[HEADS].update(shape=[-259, -8]), OSError, "model.safetensors"),
    "offsets": (lambda h: h[HEADS].update(data_offsets=[0, 2**62]), OSError, "model.safetensors"),
    "renamed head": (lambda h: h.update(other=h.pop(HEADS)), ValueError, "1 of the weights are missing, 'lm_head"),
    "renamed": (lambda h: h.update(other=h.pop("model.norm.weight")), ValueError, "missing, 'model.norm.weight'"),
}


@pytest.mark.parametrize("change, error, match", HEADERS.values(), ids=HEADERS)
def test_headers_of_weights(copy, change, error, match):
    folder = copy()
    edit_header(folder / "model.safetensors", change)
    with pytest.raises(error, match=match):
        AutoModelForCausalLM.from_pretrained(folder)


def test_weights_too_many(copy):
    """A tensor that nobody asked for is left out, as transformers has it."""
    folder = copy()
    path = folder / "model.safetensors"
    end = len(path.read_bytes()) - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    edit_header(path, lambda h: h.update(extra=dict(dtype="F32", shape=[1], data_offsets=[end, end + 4])))
    path.write_bytes(path.read_bytes() + bytes(4))
    assert "extra" not in dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def rename(to):
    return lambda index: index["weight_map"].update({HEADS: to})


INDICES = {
    "missing": (rename("other.safetensors"), "names 'other.safetensors', which is missing"),
    "above": (rename("../whole/model.safetensors"), "files beside it, got '../whole"),
    "absolute": (rename("/etc/passwd"), "files beside it, got '/etc/passwd'"),
    "backslash": (rename("..\\model.safetensors"), "files beside it"),
    "drive": (rename("C:model.safetensors"), "files beside it"),
    "number": (rename(5), "weight_map: expected names"),
    "no map": (lambda index: index.pop("weight_map") and None, "weight_map: expected names"),
    "no metadata": (lambda index: index.pop("metadata") and None, "expected an object with metadata"),
    "list": (lambda index: [index], "expected an object"),
    "empty map": (lambda index: index["weight_map"].clear(), "weight_map: expected names"),
    "cut": (lambda index: json.dumps(index)[:99], "expected an object"),
}


@pytest.mark.parametrize("change, match", INDICES.values(), ids=INDICES)
def test_index_of_shards(copy, saved, change, match):
    folder = copy("shards")
    shutil.copytree(saved / "whole", folder.parent / "whole", dirs_exist_ok=True)  # what "above" points at
    edit_json(folder / "model.safetensors.index.json", change)
    with pytest.raises(ValueError, match=f"model.safetensors.index.json: .*{match}"):
        AutoModelForCausalLM.from_pretrained(folder)


CONFIGS = {
    "hidden_size": [None, "8", -1, 2**40, [8], 8.5, True, 2**70],
    "vocab_size": [0, 2**45],
    "num_hidden_layers": [10**9, -2],
    "num_heads": [0, 3, 10**30, "x"],
    "expansion_factor": [1e300, -1, 0, "x"],
    "feed_forward_factor": [1e12, -1],
    "conv_kernel": [1, 10**9, -4],
    "hidden_dropout": [1, -0.1, float("nan")],
    "norm_eps": [0, float("inf")],
    "dtype": ["float7", "nn", 5, {"a": 1}],
    "id2label": [5, [1]],
    "num_labels": ["x", -3],
    "quantization_config": [5, {"quant_method": "hf_rnn_coded", "tensors": 5}],
    "layer_types": [["linear_attention"] * 7, ["x"], 5],
    "block_layout": ["x", 5],
    "sliding_window": ["x"],
    "num_key_value_heads": [0.5],
    "eos_token_id": ["a", [[1]]],
    "tie_word_embeddings": ["x"],
    "max_position_embeddings": [0, "x"],
}


@pytest.mark.parametrize("name, value", [(name, value) for name in CONFIGS for value in CONFIGS[name]])
def test_settings(copy, name, value):
    folder = copy()
    edit_json(folder / "config.json", lambda config: config.update({name: value}))
    with pytest.raises(Exception, match=name) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(caught.value, ValueError) or "Strict" in type(caught.value).__name__


def test_settings_that_do_not_fit_the_weights(copy):
    """Said before memory is asked for: matrices of terabytes."""
    folder = copy()
    edit_json(folder / "config.json", lambda config: config.update(hidden_size=2**20))
    with pytest.raises(RuntimeError, match=r"expected shape \[259, 1048576\], got \[259, 8\]"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_generation_settings(copy):
    folder = copy()
    (folder / "generation_config.json").write_text("[1]")
    with pytest.raises(OSError, match="generation_config.json: expected a JSON object"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"{}", b"\xff" * 99, b"", b'{"a":' * 10**5], ids=range(6))
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(copy, name, content):
    if (name, content) == ("tokenizer_config.json", b"{}"):
        pytest.skip("says nothing, which is not wrong")
    folder = copy()
    (folder / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=name):
        read_tokenizer(folder)


# What transformers and torch raise of their own accord where a name or value means nothing to them
EXPECTED = (ValueError, OSError, RuntimeError)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
@FUZZ
@given(data=st.data())
def test_any_bytes(copy, name, data):
    """Cut or overwritten anywhere: refused, or whole enough to be a model."""
    folder = copy("shards" if "index" in name else "whole")
    content = bytearray((folder / name).read_bytes())
    reach = min(len(content), 2500)  # the header, mostly
    at = data.draw(st.integers(0, reach - 1))
    if data.draw(st.booleans()):
        content[at : at + 8] = data.draw(st.binary(min_size=1, max_size=8))
    else:
        del content[at : at + data.draw(st.integers(1, 2**20))]
    (folder / name).write_bytes(content)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except EXPECTED as error:
        assert "safetensors" in str(error) or "weights are missing" in str(error), error
    else:
        assert sum(p.numel() for p in model.parameters()) == sum(
            p.numel() for p in GRUForCausalLM(GRUConfig(**SIZES)).parameters()
        )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=5), x, max_size=2),
    max_leaves=4,
)


@FUZZ
@given(name=st.sampled_from([*GRUConfig().to_dict()]), value=JSON)
def test_any_setting(copy, name, value):
    """Loaded, or refused; of transformers' own fields it is transformers that says how."""
    if name in ("architectures", "auto_map", "model_type", "transformers_version"):
        return
    folder = copy()
    edit_json(folder / "config.json", lambda config: config.update({name: value}))
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except EXPECTED as error:
        assert name in str(error) or "shape" in str(error) or "missing" in str(error), error
    except Exception as error:
        assert "Strict" in type(error).__name__ and (name in str(error) or "factor" in str(error)), error


@FUZZ
@given(data=st.data())
def test_any_tokenizer(copy, data):
    folder = copy()
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    place, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)[:9]))
    place[key] = data.draw(JSON)
    path.write_text(json.dumps(content))
    try:
        read_tokenizer(folder)("some text")
    except (ValueError, OSError) as error:
        assert "tokenizer" in str(error), error


class TestPayloads:
    """Coded tensors, their checksums made to fit where hypothesis asks for it."""

    @pytest.mark.parametrize("coder", ["ans", "exp_golomb", "raw"])
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_any_bytes(self, coder, data):
        q = torch.randint(-4, 5, (7, 9), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        payload = store_tensor(q) if coder == "raw" else encode_tensor(q, -5, coder=coder)
        content = bytearray(payload.numpy().tobytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(min_size=1, max_size=8))
        if data.draw(st.booleans()):
            content = seal(content)
        try:
            decoded = decode_tensor(torch.frombuffer(content, dtype=torch.uint8), "layer.weight")
        except CorruptPayloadError as error:
            assert "layer.weight" in str(error)
        else:
            assert decoded.numel() < 2**24

    def test_a_name_elsewhere(self, copy):
        """Names in a coded checkpoint are names of parameters, not of files."""
        folder = copy("coded")
        edit_header(folder / "model.safetensors", lambda h: h.update({"../x.coded": h.pop("lm_head.weight.coded")}))
        with pytest.raises(CorruptPayloadError, match=r"lm_head.weight: missing"):
            AutoModelForCausalLM.from_pretrained(folder)
        assert not (folder.parent / "x").exists()

    def test_a_shape_that_the_model_has_not(self, copy):
        from safetensors.torch import load_file, save_file

        folder = copy("coded")
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight.coded"] = encode_tensor(torch.zeros(4000, 4000, dtype=torch.int32), 0)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CorruptPayloadError, match=r"lm_head.weight: expected shape \(259, 8\), got \(4000, 4000\)"):
            AutoModelForCausalLM.from_pretrained(folder)


def seal(content: bytearray) -> bytearray:
    """Give a payload the checksum of its header, where one can be found."""
    import struct
    import zlib

    head = 20
    if len(content) < head:
        return content
    dims, chunk, table = content[7], *struct.unpack("<II", content[12:20])
    if len(content) < head + 8 * dims or not chunk:
        return content
    numel = 1
    for size in struct.unpack(f"<{dims}Q", content[head : head + 8 * dims]):
        numel *= size
    end = head + 8 * dims + 8 * -(-numel // chunk) + table
    if end + 4 <= len(content):
        content[end : end + 4] = struct.pack("<I", zlib.crc32(content[:end]))
    return content


BOUNDED = """
import json, resource, sys
from pathlib import Path
import torch, hf_rnn
from transformers import AutoModelForCausalLM
from hf_rnn_kernels.coding import decode_tensor
from hf_rnn_kernels.coding.payload import Header, CHUNK
import zlib
folder = Path(sys.argv[1])
AutoModelForCausalLM.from_pretrained(folder)  # all is imported and compiled
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
weights, config = folder / "model.safetensors", folder / "config.json"
whole, settings = weights.read_bytes(), json.loads(config.read_text())
def attempt(what, call):
    try:
        call()
    except MemoryError:
        sys.exit(f"{what}: asked for memory")
    except Exception as error:
        assert "allocate" not in str(error), f"{what}: {error}"
        print(what, type(error).__name__)
    else:
        sys.exit(f"{what}: loaded")
load = lambda: AutoModelForCausalLM.from_pretrained(folder)
for size in (2**40, 2**63, 10**8, 2**64 - 1):
    weights.write_bytes(size.to_bytes(8, "little") + whole[8:])
    attempt(f"header of {size}", load)
weights.write_bytes(whole)
for name, value in dict(hidden_size=2**20, vocab_size=2**24, num_hidden_layers=2**40, expansion_factor=2**20).items():
    config.write_text(json.dumps(settings | {name: value}))
    attempt(f"{name} of {value}", load)
config.write_text(json.dumps(settings))
def bomb(coder, count, table, chunk):
    sizes = (0,) * -(-count // chunk)
    head = Header(torch.float32, (count,), 0, coder, 0, chunk, sizes, sizes, table).to_bytes()
    return lambda: decode_tensor(torch.frombuffer(bytearray(head), dtype=torch.uint8))
attempt("one symbol", bomb("ans", 2**40, b"", 2**32 - 1))
attempt("no symbols", bomb("exp_golomb", 2**40, b"", 2**32 - 1))
attempt("raw", bomb("raw", 2**40, b"", 2**32 - 1))
attempt("a table of 2^32", bomb("ans", 5, (2**32 - 1).to_bytes(4, "little") + bytes(6), CHUNK))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_bounded_memory(copy):
    """What asks for terabytes gets an error within 256 MiB beyond the process at rest."""
    command = [sys.executable, "-c", BOUNDED, str(copy())]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr[-3000:]
    assert len(found.stdout.splitlines()) == 12, found.stdout
