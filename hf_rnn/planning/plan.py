"""From counts and data-sheet figures to memory, bytes exchanged and time. Bytes and seconds are of one GPU and step."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_rnn.planning import counting
from hf_rnn.planning.counting import Count, on_meta
from hf_rnn_trainers import SMTConfig, SMTTeacher
from hf_rnn_trainers.zo.evaluation import LOGITS
from hf_rnn_trainers.zo.perturbed_losses import LONGEST, SHORTEST, TOKENS

LARGE = 2**15  # tokens of a batch that is counted
TRAINERS = ("backpropagation", "rate", "zo", "smt")
FLOAT, HALF = 4, 2  # bytes of what is kept and of what is computed in
# Activations under autocast, which keeps residual stream and norms in float32, over those in bfloat16 alone, as FSDP
# computes: measured by `python benchmarks/planning.py`, the second for xLSTM's "neurips" blocks.
AUTOCAST, AUTOCAST_NEURIPS = 1.03, 1.26


@dataclass(frozen=True)
class GPU:
    """An H100 SXM by its data sheet, in units and units a second, and what is assumed beside it.

    Attributes:
        flops: bfloat16, dense.
        share: of these that a whole step attains. An assumption, with nothing measured behind it here.
        bandwidth, memory: of its own memory.
        nvlink: to the GPUs of its node, each way. network: to other nodes, each way, 400 Gb/s for each GPU.
        per_node: GPUs that NVLink joins.
        step, step_back: seconds that a step of an LSTM layer takes, forward, and forward and backward. Published for
            FlashRNN's fused kernels on an H100 (heads of 128, 768 channels, batch 16): 3.22 and 9.02 ms for 1,024.
        launch: seconds from one kernel to the next where each step is many kernels. An assumption.
    """

    flops: float = 989e12
    share: float = 0.4
    bandwidth: float = 3.35e12
    memory: float = 80e9
    nvlink: float = 450e9
    network: float = 50e9
    per_node: int = 8
    step: float = 3.22e-3 / 1024
    step_back: float = 9.02e-3 / 1024
    launch: float = 5e-6

    def link(self, gpus: int) -> float:
        """Bytes a second into and out of each of so many GPUs, the slowest way."""
        return self.nvlink if gpus <= self.per_node else self.network


@dataclass(frozen=True)
class Work:
    """What a trainer does with a model, whatever the number of GPUs.

    Attributes:
        parameters: of all networks that train. embedding: those of one vocabulary matrix. block: of the largest block.
        factors: signs of a low-rank direction. state: bytes of a row's recurrent state.
        autocast: see `AUTOCAST`.
        counts: of the step, for each token (SMT: each memory). recurrence: flops of a token inside ops, forward.
        recurrent: layers whose steps wait for one another in one kernel.
        waits: operations that each token waits for, where a step is many kernels.
        recomputed: whether gradient checkpointing makes every forward pass of a block twice.
    """

    trainer: str
    parameters: int
    embedding: int
    block: int
    factors: int
    state: int
    autocast: float
    counts: Count
    recurrence: float
    recurrent: int
    waits: float
    recomputed: bool


@dataclass
class Plan:
    """Bytes in memory, bytes sent, and seconds, by what they are for; items: tokens, or memories, of all GPUs."""

    memory: dict[str, float] = field(default_factory=dict)
    exchanged: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    items: float = 0.0

    @property
    def step(self) -> float:
        """Seconds: the exchange is hidden behind the rest as far as it goes."""
        exchange = self.seconds["exchange"]
        return max(exchange, sum(self.seconds.values()) - exchange)


def measure(config: Any, trainer: str, gradient_checkpointing: bool = False) -> Work:
    """Count what a step of `trainer` takes with a language model of this config, of masked tokens where it reads both
    ways, on the meta device.

    Raises:
        ValueError: a trainer that is none, or one that cannot train this model.
    """
    if trainer not in TRAINERS:
        raise ValueError(f"trainer: expected one of {TRAINERS}, got {trainer!r}")
    if config.bidirectional and trainer != "backpropagation":
        raise ValueError(f"trainer: a model that reads both ways trains by backpropagation, got {trainer!r}")
    head = AutoModelForMaskedLM if config.bidirectional else AutoModelForCausalLM
    model = on_meta(lambda: head.from_config(config), torch.bfloat16)
    loops = config.model_type == "hf_rnn_memory"  # over time, in Python
    networks, waits = [model], 0.0
    if trainer == "smt":
        options = SMTConfig(output_dir="unused", report_to="none")
        paper = dict(hidden_size=config.hidden_size, encoder_layers=8, decoder_layers=4)
        teacher = on_meta(lambda: SMTTeacher.for_student(model, **paper), torch.bfloat16)
        networks.append(teacher)
        run = counting.memory_training(model, teacher, options.context_size, options.future_size)
        counts = counting.count(run, (64, 128))
    elif trainer == "zo":
        run = counting.evaluation(model.eval())
        counts = counting.count(run, (4, 8) if loops else (LARGE, 2 * LARGE))
    else:
        if gradient_checkpointing:
            # Reentrant: Trainer's own kind takes as much, but while counted its frames keep tensors too long
            model.activation_checkpointing_enable({"use_reentrant": True})
        run, time = counting.backpropagation(model.train()), 2 if loops else 128
        wide = (counting.backpropagation(model, n * LARGE // time) for n in (1, 2))  # many rows, where time is a loop
        counts = counting.count(lambda n: next(wide)(time), (LARGE, 2 * LARGE))
    if loops and trainer != "smt":
        waits = counting.operations(run)
    shapes = [tuple(p.shape) for p in model.parameters()]
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    return Work(
        trainer=trainer,
        parameters=sum(p.numel() for network in networks for p in network.parameters()),
        embedding=config.vocab_size * config.hidden_size,
        block=max(blocks),
        factors=sum(math.prod(s) if len(s) < 2 else math.prod(s[:-2]) * (s[-2] + s[-1]) for s in shapes),
        state=sum(FLOAT * math.prod(shape) for layer in model.model.layers for shape in layer.state_shapes),
        autocast=AUTOCAST_NEURIPS if getattr(config, "block_layout", None) == "neurips" else AUTOCAST,
        counts=counts,
        recurrence=counting.recurrence_flops(model),
        recurrent=counting.recurrent_layers(model),
        waits=waits,
        recomputed=gradient_checkpointing,
    )


def make_plan(
    work: Work, gpus: int, rows: int, tokens: int, sharding: str = "ddp", directions: int = 96, gpu: GPU | None = None
) -> Plan:
    """A step on so many GPUs.

    Args:
        work: from `measure`.
        rows: of each GPU; with ZO of all, which share directions.
        tokens: of each row. SMT takes one memory of each row.
        sharding: "ddp", whole copies, or "fsdp", FSDP 2, for backpropagation and rate.
        directions: of ZO, over all GPUs.

    Raises:
        ValueError: an argument out of its range, or FSDP with a trainer that refuses it.
    """
    for name, value in (("gpus", gpus), ("rows", rows), ("tokens", tokens), ("directions", directions)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if sharding not in ("ddp", "fsdp"):
        raise ValueError(f"sharding: expected 'ddp' or 'fsdp', got {sharding!r}")
    if sharding == "fsdp" and work.trainer in ("zo", "smt"):
        raise ValueError(f"sharding: {work.trainer} needs whole weights; expected 'ddp'")
    gpu = gpu or GPU()
    if work.trainer == "zo":
        return _zero_order(work, gpus, rows, tokens, directions, gpu)
    return _with_gradients(work, gpus, rows, tokens, sharding, gpu)


def _with_gradients(work: Work, gpus: int, rows: int, tokens: int, sharding: str, gpu: GPU) -> Plan:
    p, shards = work.parameters, gpus if sharding == "fsdp" else 1
    items = rows if work.trainer == "smt" else rows * tokens
    autocast = 1.0 if sharding == "fsdp" else work.autocast
    memory = {
        "weights, float32": FLOAT * p / shards,
        "gradients": FLOAT * p / shards,
        "AdamW's two moments": 2 * FLOAT * p / shards,
        "activations": work.counts.bytes * items * autocast,
    }
    others = (gpus - 1) / gpus
    if sharding == "fsdp":  # a block in use, the next one, and the gradients of one; the head stays
        memory["blocks gathered"] = 3 * HALF * work.block + 2 * HALF * work.embedding
        exchanged = {"all-gather, twice": 2 * HALF * p * others, "reduce-scatter": HALF * p * others}
    else:
        memory["weights in bfloat16"] = HALF * p
        memory["DDP's buckets"] = FLOAT * p if gpus > 1 else 0.0
        exchanged = {"all-reduce": 2 * FLOAT * p * others}
    if work.trainer == "rate":
        memory["rate step"] = 2 * FLOAT * p / shards
    inside, step = (3 + work.recomputed) * work.recurrence, gpu.step_back + work.recomputed * gpu.step
    if work.trainer == "smt":  # single steps, all at once
        inside = step = 0.0
    seconds = {
        "matrix products": items * (work.counts.flops + inside) / (gpu.flops * gpu.share),
        "reading and writing weights": (3 * HALF * p + 7 * FLOAT * p / shards) / gpu.bandwidth,
        "steps that wait": tokens * _wait(work, step, gpu),
        "exchange": sum(exchanged.values()) / gpu.link(gpus),
    }
    return Plan(memory, exchanged, seconds, items * gpus)


def _wait(work: Work, step: float, gpu: GPU) -> float:
    """Seconds for each token, however many rows there are."""
    return work.recurrent * step + work.waits * gpu.launch


def _zero_order(work: Work, gpus: int, rows: int, tokens: int, directions: int, gpu: GPU) -> Plan:
    p = work.parameters
    chunk = min(LONGEST, max(SHORTEST, TOKENS["cuda"] // rows))
    together = max(1, TOKENS["cuda"] // (rows * min(tokens, chunk)))  # members of a forward pass
    mine = 2 * -(-directions // gpus)  # evaluations of the batch
    together = min(together, mine)
    alive = together * rows * min(tokens, chunk)
    memory = {
        "weights, float32": FLOAT * p,
        "activations of a chunk": work.counts.bytes * alive,
        "logits": float((HALF + 2 * FLOAT) * LOGITS),
        "recurrent states": together * rows * work.state,
        "directions": work.factors * max((1 + FLOAT) * together, 1.25 * directions),
    }
    exchanged = {"losses": 32.0 * directions * (gpus - 1)}
    head = 2 * work.embedding
    passes = -(-mine // together)
    flops = mine * rows * tokens * (work.counts.flops + work.recurrence + head) + 2 * directions * p
    reads = passes * -(-tokens // chunk)
    seconds = {
        "matrix products": flops / (gpu.flops * gpu.share),
        "reading and writing weights": (reads + 2) * FLOAT * p / gpu.bandwidth,
        "steps that wait": passes * tokens * _wait(work, gpu.step, gpu),
        "exchange": sum(exchanged.values()) / gpu.link(gpus),
    }
    return Plan(memory, exchanged, seconds, rows * tokens)
