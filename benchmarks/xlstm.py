"""xLSTM beside transformers' own, with the same weights: a training step, a prompt, and how they grow.

    python benchmarks/xlstm.py

Vocabulary 256, width 256, 4 layers, 4 heads, batch 4, 512 tokens; growth at batch 1. "Matrix products alone" are all
of ours, the cell's included, by torch. The `xlstm` package is hidden, since transformers' class changes when it is
there.
"""

import importlib.util

_find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "xlstm" else _find_spec(name, *rest)

import torch  # noqa: E402
from driver import compare, save, table  # noqa: E402
from torch import nn  # noqa: E402
from transformers import xLSTMForCausalLM  # noqa: E402

from hf_rnn import XLSTMConfig, XLSTMForCausalLM  # noqa: E402
from hf_rnn.models.xlstm.conversion_xlstm import to_transformers_config  # noqa: E402

VOCABULARY, WIDTH, LAYERS, HEADS, BATCH, TIME = 256, 256, 4, 4, 4, 512
KEYS, VALUES, INNER, CHUNK = WIDTH // 2 // HEADS, WIDTH // HEADS, 704, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_models() -> tuple[nn.Module, nn.Module]:
    """Ours and transformers', the same weights."""
    torch.manual_seed(0)
    config = XLSTMConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_heads=HEADS)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    ours, peer = XLSTMForCausalLM(config), xLSTMForCausalLM(to_transformers_config(config))
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            prefix, _, last = name.rpartition(".")
            layer = ours.model.layers[int(name.split(".")[2])] if "blocks" in name else None
            rows = {"q": 0, "k": 128, "v": 256, "ogate_preact": 512, "igate_preact": 0, "fgate_preact": HEADS}
            rows |= {"proj_up_gate": 0, "proj_up": INNER}
            part = prefix.rpartition(".")[2]
            if layer is None:
                source = {"embeddings": ours.model.embed_tokens, "out_norm": ours.model.norm, "lm_head": ours.lm_head}
                source = source[part].weight
            elif part in ("norm_mlstm", "norm_ffn"):
                source = (layer.mixer_norm if part == "norm_mlstm" else layer.ff_norm).weight
            elif part in ("multihead_norm", "out_proj"):
                source = (layer.mixer.norm if part == "multihead_norm" else layer.mixer.out_proj).weight
            elif part == "proj_down":
                source = layer.ff.down_proj.weight
            else:
                module = layer.mixer.gate_proj if "gate_preact" in part and part[0] in "if" else layer.mixer.in_proj
                module = layer.ff.up_proj if part.startswith("proj_up") else module
                source = getattr(module, last)[rows[part] : rows[part] + parameter.shape[0]]
            parameter.copy_(source)
    return ours.to(DEVICE), peer.to(DEVICE)


def training_step(model: nn.Module, ids: torch.Tensor):
    model.train()

    def run():
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach(), model.get_input_embeddings().weight.grad.clone()]

    return run


def prompt(model: nn.Module, ids: torch.Tensor):
    def run():
        with torch.no_grad():
            return [model.eval()(ids, use_cache=True).logits]

    return run


def matrix_products(batch: int, time_: int, backward: bool):
    """Every matrix product of a pass, by torch: projections, and the cell's, within chunks and with its states."""
    tokens, chunks = batch * time_, batch * HEADS * -(-time_ // CHUNK)
    shapes = [(2 * (WIDTH // 2 + WIDTH), WIDTH), (2 * HEADS, WIDTH), (WIDTH, WIDTH), (2 * INNER, WIDTH), (WIDTH, INNER)]
    weights = [torch.randn(*shape, device=DEVICE) for shape in shapes * LAYERS] + [torch.randn(VOCABULARY, WIDTH)]
    inputs = {width: torch.randn(tokens, width, device=DEVICE) for width in {w.shape[1] for w in weights}}
    grads = {width: torch.randn(tokens, width, device=DEVICE) for width in {w.shape[0] for w in weights}}
    q, k = (torch.randn(chunks, CHUNK, KEYS, device=DEVICE) for _ in range(2))
    v, w = torch.randn(chunks, CHUNK, VALUES, device=DEVICE), torch.randn(chunks, CHUNK, CHUNK, device=DEVICE)
    C = torch.randn(chunks, KEYS, VALUES, device=DEVICE)

    def run():
        for weight in weights:
            x = inputs[weight.shape[1]] @ weight.T
            if backward:
                grad = grads[x.shape[1]]
                grad @ weight
                grad.T @ inputs[weight.shape[1]]
        for _ in range(LAYERS):
            q @ k.mT, q @ C, w @ v, k.mT @ v
            if backward:  # once more for scores and states, then each product's two gradients
                q @ k.mT, k.mT @ v
                v @ v.mT, w.mT @ v, w @ k, w.mT @ q, v @ C.mT, q.mT @ v, v @ C.mT, k @ C

    return run


def main() -> None:
    ours, peer = make_models()
    results = {}
    ids = torch.randint(0, VOCABULARY, (BATCH, TIME), device=DEVICE)
    rows = compare(
        {
            "hf_rnn": training_step(ours, ids),
            "transformers": training_step(peer, ids),
            "matrix products alone": matrix_products(BATCH, TIME, backward=True),
        },
        training_step(peer, ids)(),
        tolerance=1e-3,
        repeats=15,
    )
    results["training step"] = rows
    table(f"training step, batch {BATCH}, {TIME} tokens", rows)
    for length in (TIME, TIME + 63):
        ids = torch.randint(0, VOCABULARY, (BATCH, length), device=DEVICE)
        rows = compare(
            {
                "hf_rnn": prompt(ours, ids),
                "transformers": prompt(peer, ids),
                "matrix products alone": matrix_products(BATCH, length, backward=False),
            },
            prompt(peer, ids)(),
            tolerance=1e-3,
            repeats=15,
        )
        results[f"prompt of {length}"] = rows
        table(f"prompt, batch {BATCH}, {length} tokens", rows)
    both = {"hf_rnn": ours, "transformers": peer}
    for what, make in (("prompt", prompt), ("training step", training_step)):
        results[f"{what} by length"] = {}
        print(f"\n{what} at batch 1, microseconds a token")
        for length in (512, 1024, 4096, 16384):
            ids = torch.randint(0, VOCABULARY, (1, length), device=DEVICE)
            rows = compare({name: make(model, ids) for name, model in both.items()}, make(peer, ids)(), 1e-3, repeats=3)
            results[f"{what} by length"][length] = rows
            print(
                f"  {length:6} "
                + "  ".join(f"{n} {1e3 * r['ms'] / length:.1f} ({r['peak_mib']:.0f} MiB)" for n, r in rows.items())
            )
    save("xlstm", results)


if __name__ == "__main__":
    main()
