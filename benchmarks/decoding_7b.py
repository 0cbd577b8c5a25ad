"""How many tokens a second at 7 billion parameters, and how near is that to reading the weights once for each?

    python benchmarks/decoding_7b.py              # on a GPU with 40 GiB and more

xLSTM-7B's sizes (arXiv 2503.13427: 157.4 tokens a second at batch 1, in bfloat16 on an H100) with random weights beside
a Transformer of Llama 2's; a step after 128 to 16,384 tokens, as in decoding.py, a prompt, and `generate()` with its
step compiled. The limit is reading the weights at the speed of a copy. Checked against the same model reading all
tokens at once, in bfloat16.
"""

import time

import torch
from decoding import ACCEPTED, NEW_TOKENS, PROMPT, Decoder, decoder, generation
from driver import DEVICE, DRY, GPU, compare, limits, milliseconds, relative_error, share_of_limit, sized, table
from resumable import Parts
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig

import hf_rnn

TOLERANCE = 5e-2 if GPU else 1e-4
PREFIXES, BATCHES = sized(*2 * [((128, 2048, 16384), (1, 16))], dry=((5,), (1,)))
XLSTM = sized(
    *2 * [dict(hidden_size=4096, num_hidden_layers=32, num_heads=8, vocab_size=50304)],
    dry=dict(hidden_size=64, num_hidden_layers=2, num_heads=2, vocab_size=256),
)
LLAMA = sized(
    *2 * [dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008)],
    dry=dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128),
)
OTHER = "Transformer (transformers)"


def make() -> dict[str, nn.Module]:
    """Ours and the Transformer, on the device from the first weight on."""
    tokens = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    ours = hf_rnn.XLSTMConfig(**XLSTM, **tokens)
    other = LlamaConfig(**LLAMA, **tokens, vocab_size=XLSTM["vocab_size"], max_position_embeddings=2**15)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        dtype = torch.bfloat16 if GPU else torch.float32
        return {
            name: AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            for name, config in (("hf_rnn", ours), (OTHER, other))
        }


def weight_bytes(model: nn.Module) -> int:
    """Of what a token reads: all but the embeddings of other tokens."""
    return sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes


def after(models: dict[str, nn.Module], prefix: int, batch: int) -> dict[str, dict]:
    steps = {name: decoder(name, model, prefix, batch) for name, model in models.items()}
    rows = compare(steps, repeats=30, seconds=5, accepted=ACCEPTED)
    for name, row in rows.items():
        row["state_bytes"] = steps[name].state_bytes()
        operations = 2 * batch * weight_bytes(models[name]) / models[name].get_output_embeddings().weight.itemsize
        share_of_limit(row, weight_bytes(models[name]) + row["state_bytes"], operations)
        if "ms" in row:
            row["tokens_per_second"] = 1e3 * batch / row["ms"]
    title = f"a token after {prefix}, batch {batch}"
    table(title, rows)
    return {title: rows}


@torch.no_grad()
def error(model: nn.Module) -> dict[str, float]:
    """Of a step after a prompt."""
    ids = torch.randint(0, XLSTM["vocab_size"], (1, PROMPT + 1), device=DEVICE)
    step = Decoder(model, ids[:, :-1])
    step.token = ids[:, -1:]
    return {"error": relative_error(step()[0], model(ids, use_cache=False).logits[:, -1:])}


@torch.no_grad()
def prompt(models: dict[str, nn.Module], length: int) -> dict[str, dict]:
    ids = torch.randint(0, XLSTM["vocab_size"], (1, length), device=DEVICE)
    runs = {name: lambda m=model: m(ids, use_cache=True, logits_to_keep=1) and None for name, model in models.items()}
    title = f"a prompt of {length}"
    rows = compare(runs, repeats=10, seconds=5, accepted=ACCEPTED)
    table(title, rows)
    return {title: rows}


def generate(model: nn.Module) -> dict[str, dict]:
    """Compiled against plain: the same tokens."""
    runs, seconds = {"hf_rnn": generation(model)}, None
    if not DRY:  # the interpreter's kernels do not compile
        runs["hf_rnn, compiled"] = run = generation(model, compile_config=CompileConfig())
        seconds = milliseconds(run) / 1e3
        print(f"first call with its step to compile {seconds:.0f} s", flush=True)
    title = f"generate() of {NEW_TOKENS} after {PROMPT}"
    rows = compare(runs, repeats=5, seconds=10)
    for row in rows.values():
        row |= {"tokens_per_second": 1e3 * NEW_TOKENS / row["ms"]} if "ms" in row else {}
    table(title, rows)
    return {title: rows, "first call, seconds": {"compiled": seconds}}


def main() -> None:
    begun, models, parts = time.perf_counter(), make(), Parts("decoding_7b")
    sizes = {name: model.num_parameters() for name, model in models.items()}
    print(f"{sizes} made in {time.perf_counter() - begun:.0f} s", flush=True)
    results = {"limits": parts.run("limits", limits), "parameters": sizes}
    results["checked"] = parts.run("checked", error, models["hf_rnn"])
    print(f"relative error of a step: {results['checked']}")
    if not results["checked"] or not results["checked"]["error"] <= TOLERANCE:
        parts.failed["checked"] = f"wrong, or not computed: {results['checked']}"
        models.pop("hf_rnn")
    for batch in BATCHES:
        for prefix in PREFIXES:
            results |= parts.run(f"after {prefix}, batch {batch}", after, models, prefix, batch) or {}
    results |= parts.run("prompt", prompt, models, PREFIXES[-1]) or {}
    if "hf_rnn" in models:
        results |= parts.run("generate()", generate, models["hf_rnn"]) or {}
    parts.finish(results)


if __name__ == "__main__":
    main()
