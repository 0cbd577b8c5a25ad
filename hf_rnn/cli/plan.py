"""`hf-rnn plan`: estimate memory, traffic and time of a training step on GPUs, without one."""

import argparse

from transformers import AutoConfig, PreTrainedConfig

from hf_rnn import ARCHITECTURES
from hf_rnn.cli.settings import read_settings
from hf_rnn.planning import GPU, Plan, make_plan, measure
from hf_rnn.planning.plan import TRAINERS

GIB, GB = 2**30, 1e9


def build_config(model: str, settings: str) -> PreTrainedConfig:
    """The config of a new model, without special tokens, or of a checkpoint.

    Raises:
        ValueError: an architecture or a setting that there is none of, a checkpoint with another head.
    """
    if model not in ARCHITECTURES.values():
        if settings:
            raise ValueError(f"config: the checkpoint {model} has its own settings; drop --config")
        config = AutoConfig.from_pretrained(model)
        head = (config.architectures or ["ForCausalLM"])[0]
        if not head.endswith(("ForCausalLM", "ForMaskedLM")):
            raise ValueError(f"model: expected a language model, ForCausalLM or ForMaskedLM, got {head}")
        return config
    without = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return AutoConfig.for_model(f"hf_rnn_{model}", **without | read_settings(model, settings))


def section(title: str, parts: list[dict[str, float]], unit: float, digits: int) -> list[str]:
    """Lines of a part of the table, a column for each plan, with the sum where there are several rows."""
    rows = {name: [part[name] / unit for part in parts] for name in parts[0]}
    if len(rows) > 1:
        rows["total"] = [sum(part.values()) / unit for part in parts]
    return [title] + [line(f"  {name}", [f"{x:,.{digits}f}" for x in values]) for name, values in rows.items()]


def line(name: str, values: list[str]) -> str:
    return f"{name:<34}" + "".join(f"{value:>14}" for value in values)


def table(plans: dict[int, Plan], item: str, memory: float) -> str:
    """The plans, by number of GPUs, side by side."""
    every = list(plans.values())
    fits = ["yes" if sum(plan.memory.values()) < memory else "no" for plan in every]
    lines = [line("", [f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in plans])]
    lines += section("memory of a GPU, GiB", [plan.memory for plan in every], GIB, 2)
    lines += [line(f"  fits in {memory / GB:.0f} GB", fits)]
    lines += section("sent by a GPU in a step, GB", [plan.exchanged for plan in every], GB, 6)
    lines += section("seconds of a step", [plan.seconds for plan in every], 1, 4)[:-1]
    lines += [line("  step", [f"{plan.step:,.4f}" for plan in every])]
    lines += [line(f"{item} a second, all GPUs", [f"{plan.items / plan.step:,.0f}" for plan in every])]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn plan", description=__doc__)
    parser.add_argument("--model", default="xlstm", help=f"{', '.join(ARCHITECTURES.values())}, or a checkpoint")
    parser.add_argument("--config", default="", help="settings, such as hidden_size=4096,num_hidden_layers=32")
    parser.add_argument("--trainer", default="backpropagation", help=", ".join(TRAINERS))
    parser.add_argument("--gpus", type=int, nargs="+", default=[8], help="numbers of GPUs, one or several")
    parser.add_argument("--rows", type=int, default=1, help="sequences on each GPU; with zo: of all GPUs together")
    parser.add_argument("--tokens", type=int, default=2048, help="sequence length")
    parser.add_argument("--sharding", default="ddp", help="ddp: whole copies on each GPU; fsdp: FSDP 2")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--directions", type=int, default=96, help="with zo: directions of a step, over all GPUs")
    for name, value in (("share", GPU.share), ("flops", GPU.flops), ("bandwidth", GPU.bandwidth)):
        parser.add_argument(f"--{name}", type=float, default=value, help="of a GPU: see hf_rnn.planning.GPU")
    for name, value in (("memory", GPU.memory), ("nvlink", GPU.nvlink), ("network", GPU.network)):
        parser.add_argument(f"--{name}", type=float, default=value, help="of a GPU: see hf_rnn.planning.GPU")
    arguments = parser.parse_args(argv)
    names = ("share", "flops", "bandwidth", "memory", "nvlink", "network")
    gpu = GPU(**{name: getattr(arguments, name) for name in names})
    for name in names:
        if not 0 < getattr(gpu, name) < float("inf") or gpu.share > 1:
            raise ValueError(f"{name}: expected a number above 0 (share: at most 1), got {getattr(gpu, name)}")
    config = build_config(arguments.model, arguments.config)
    work = measure(config, arguments.trainer, arguments.gradient_checkpointing)
    options = dict(sharding=arguments.sharding, directions=arguments.directions, gpu=gpu)
    plans = {n: make_plan(work, n, arguments.rows, arguments.tokens, **options) for n in arguments.gpus}
    item = "memories" if arguments.trainer == "smt" else "tokens"
    print(f"{config.model_type}, {work.parameters:,} parameters{' with the teacher' * (item == 'memories')}")
    print(table(plans, item, gpu.memory))
