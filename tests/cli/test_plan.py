"""`hf-rnn plan`: what it counts is what a step takes, what it prints is in the documentation."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import hf_rnn
from hf_rnn.cli.main import main
from hf_rnn.planning import GPU, make_plan, measure
from hf_rnn.planning.plan import AUTOCAST, AUTOCAST_NEURIPS

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```console\n\$ hf-rnn (plan [^\n]*)\n(.*?)```", (ROOT / "docs/scaling.md").read_text(), re.DOTALL)
TOKENS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)


@pytest.fixture(scope="module")
def benchmark():
    """benchmarks/planning.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec = importlib.util.spec_from_file_location("planning_benchmark", ROOT / "benchmarks" / "planning.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


@pytest.mark.parametrize("name", ["minGRU", *[pytest.param(n, marks=pytest.mark.slow) for n in ("LSTM", "xLSTM")]])
def test_counted_is_what_a_step_takes(name, benchmark):
    """Bytes of activations for each token, within 2%: on paper and by a CPU's allocator, elementwise by torch."""
    config = benchmark.CONFIGS[name]
    assert benchmark.counted(config) == pytest.approx(benchmark.measured(config), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GRU", "minLSTM", "minGRU, gated", "xLSTM, neurips", "memory RNN"])
def test_others_counted(name, benchmark):
    config = benchmark.CONFIGS[name]
    assert benchmark.counted(config) == pytest.approx(benchmark.measured(config), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, factor", [("xLSTM", AUTOCAST), ("LSTM", AUTOCAST), ("xLSTM, neurips", AUTOCAST_NEURIPS)]
)
def test_autocast(name, factor, benchmark):
    config = benchmark.CONFIGS[name]
    found = benchmark.measured(config, autocast=True) / benchmark.counted(config, torch.bfloat16)
    assert found == pytest.approx(factor, rel=0.03)


@pytest.fixture(scope="module")
def work():
    config = hf_rnn.LSTMConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=3, num_heads=2, block_layout="paper", **TOKENS
    )
    return {trainer: measure(config, trainer) for trainer in ("backpropagation", "zo")}


def test_attention_is_counted_once():
    """2 operations a parameter of a matrix, and a key and a value of each token in the window of 64."""
    settings = dict(hidden_size=64, num_hidden_layers=2, layer_types=["sliding_attention"] * 2, sliding_window=64)
    found = measure(hf_rnn.MinGRUConfig(vocab_size=300, **settings, **TOKENS), "zo")
    assert found.recurrence == 0
    products = 2 * (8 * 64 * 64 + 300 * 64)
    assert products < found.counts.flops + 2 * 300 * 64 <= products + 2 * 2 * 2 * 64 * 2 * 64


def test_against_hand_counts(work):
    """An LSTM's weights, its products, and what is sent, by hand."""
    model = hf_rnn.LSTMForCausalLM(
        hf_rnn.LSTMConfig(
            vocab_size=300, hidden_size=64, num_hidden_layers=3, num_heads=2, block_layout="paper", **TOKENS
        )
    )
    parameters = model.num_parameters()
    counted = work["backpropagation"]
    assert counted.parameters == parameters
    matrices = [p for name, p in model.named_parameters() if name.endswith(("_proj.weight", "head.weight"))]
    assert counted.counts.flops == 6 * sum(p.numel() for p in matrices)
    assert counted.recurrence == 2 * 3 * 2 * 4 * 32 * 32 and counted.recurrent == 3
    plan = make_plan(counted, 8, 2, 100)
    assert plan.memory["weights, float32"] == 4 * parameters
    assert plan.exchanged == {"all-reduce": pytest.approx(2 * 7 / 8 * 4 * parameters)}
    assert plan.seconds["steps that wait"] == pytest.approx(100 * 3 * 9.02e-3 / 1024)
    sharded = make_plan(counted, 8, 2, 100, sharding="fsdp")
    assert sharded.memory["AdamW's two moments"] == parameters
    assert sum(sharded.exchanged.values()) == pytest.approx(7 / 8 * 6 * parameters)
    assert make_plan(work["zo"], 8, 2, 100, directions=24).exchanged == {"losses": 24 * 2 * 2 * 8 * 7}


@pytest.mark.parametrize("shared", [False, True])
def test_both_directions(shared, work):
    """Of masked tokens. Each direction has its products and its steps; weights that are shared count once, and so does
    the output projection of a layer that shares them."""
    config = hf_rnn.LSTMConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=3, num_heads=2, block_layout="paper", bidirectional=True,
        share_directions=shared, **TOKENS,
    )  # fmt: skip
    model, found = hf_rnn.LSTMForMaskedLM(config), measure(config, "backpropagation")
    assert found.parameters == model.num_parameters()
    assert found.recurrent == 2 * 3 and found.recurrence == 2 * work["backpropagation"].recurrence
    in_proj, out_proj, feed_forward, head = 3 * 4 * 64 * 64, 3 * 64 * 64, 3 * 2 * 4 * 64 * 64, 300 * 64
    assert found.counts.flops == 6 * (2 * in_proj + (1 if shared else 2) * out_proj + feed_forward + head)


def test_zero_order_memory_does_not_grow_with_length(work):
    short, long = (sum(make_plan(work["zo"], 8, 2, tokens).memory.values()) for tokens in (1024, 65536))
    assert short == long
    short, long = (sum(make_plan(work["backpropagation"], 8, 2, t).memory.values()) for t in (1024, 65536))
    assert long > 30 * short


def test_more_gpus(work):
    """ZO's directions are shared out; a network between nodes is slower than NVLink."""
    zo = [make_plan(work["zo"], gpus, 2, 1024).seconds["matrix products"] for gpus in (1, 8, 96)]
    assert zo[0] / zo[1] == pytest.approx(8, rel=0.1) and zo[1] > 4 * zo[2]
    near, far = (make_plan(work["backpropagation"], gpus, 2, 1024).seconds["exchange"] for gpus in (8, 16))
    assert far > 8 * near
    assert make_plan(work["backpropagation"], 1, 2, 1024).seconds["exchange"] == 0
    half = make_plan(work["backpropagation"], 1, 2, 1024, gpu=GPU(share=0.2)).seconds["matrix products"]
    assert half == 2 * make_plan(work["backpropagation"], 1, 2, 1024).seconds["matrix products"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--trainer", "x"], "trainer: expected one of"),
        (["--model", "memory", "--sharding", "fsdp", "--trainer", "smt"], "sharding: smt needs whole weights"),
        (["--model", "xlstm", "--trainer", "smt"], "nothing to gain from training by memories"),
        (["--config", "hidden=4"], "config: expected name=value with a setting of a mingru, got 'hidden=4'"),
        (["--gpus", "0"], "gpus: expected at least 1, got 0"),
        (["--config", "bidirectional=True", "--trainer", "zo"], "trainer: a model that reads both ways trains by back"),
        (["--model", "checkpoint"], "expected a language model, ForCausalLM or ForMaskedLM, got MinGRUForCTC"),
        (["--share", "1.5"], "share: expected a number above 0"),
    ],
)
def test_refuses(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_rnn.MinGRUForCTC(hf_rnn.MinGRUConfig(hidden_size=8)).save_pretrained("checkpoint")
    common = ["plan", "--model", "mingru", "--tokens", "64"]
    own = "--config" in arguments or "checkpoint" in arguments
    small = [] if own else ["--config", "hidden_size=16,num_hidden_layers=1"]
    assert main([*common, *small, *arguments]) == 1
    assert message in capsys.readouterr().err


def printed(command: str, capsys) -> str:
    assert main(command.split()) == 0
    return capsys.readouterr().out


def test_documentation_shows_what_is_printed(capsys):
    command, text = min(BLOCKS, key=lambda block: ("zo" not in block[0], "7168" in block[0] or "4096" in block[0]))
    assert printed(command, capsys) == text


@pytest.mark.slow
@pytest.mark.parametrize("command, text", BLOCKS, ids=range(len(BLOCKS)))
def test_the_whole_documentation(command, text, capsys):
    assert printed(command, capsys) == text
