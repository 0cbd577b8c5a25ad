"""How fast is a whole training step, against minGRU-pytorch's layer in the same frame and against its matrix products?

    python benchmarks/training_step.py

3 layers, width 384, batch 8, 512 tokens, vocabulary 256, expansion 1, no convolution, no feed-forward, AdamW included.
Both models are ours but for the layer: embedding, norms, head, loss and optimizer are the same, weights too.
"""

import copy

import torch
from driver import compare, save, table
from minGRU_pytorch.minGRU import minGRU
from torch import nn

from hf_rnn import MinGRUConfig, MinGRUForCausalLM

BATCH, TIME, WIDTH, LAYERS, VOCABULARY = 8, 512, 384, 3, 256


class PeerMixer(nn.Module):
    """minGRU-pytorch's layer with the weights of ours."""

    def __init__(self, ours: nn.Module):
        super().__init__()
        self.layer = minGRU(WIDTH)
        gate, candidate = ours.in_proj.weight.detach().chunk(2)
        self.layer.to_hidden_and_gate.weight.data = torch.cat([candidate, gate])

    def forward(self, x, state, mask, cu_seqlens):
        return self.layer(x), ()


def make_models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    config = MinGRUConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        conv_kernel=0,
        feed_forward_factor=0,
        output_projection=False,
        use_bias=False,
        learned_initial_state=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    ours = MinGRUForCausalLM(config).train()
    peer = copy.deepcopy(ours)
    for layer in peer.model.layers:
        layer.mixer = PeerMixer(layer.mixer)
    return ours, peer


def training_step(model: nn.Module, ids: torch.Tensor):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step():
        loss = model(ids, labels=ids).loss
        loss.backward()
        grad = model.model.embed_tokens.weight.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach(), grad]

    return step


def matrix_products(device: str):
    """The step's matrix products and nothing else: forward, and both gradients, of each projection and of the head."""
    x = torch.randn(BATCH * TIME, WIDTH, device=device)
    weights = [torch.randn(2 * WIDTH, WIDTH, device=device) for _ in range(LAYERS)]
    weights.append(torch.randn(VOCABULARY, WIDTH, device=device))
    grads = [torch.randn(BATCH * TIME, w.shape[0], device=device) for w in weights]

    def run():
        for w, g in zip(weights, grads, strict=True):
            x @ w.T
            g @ w
            g.T @ x

    return run


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours, peer = make_models()
    ours, peer = ours.to(device), peer.to(device)
    ids = torch.randint(0, VOCABULARY, (BATCH, TIME), device=device)
    double = copy.deepcopy(ours).double()
    loss = double(ids, labels=ids).loss
    loss.backward()
    expected = [loss.detach(), double.model.embed_tokens.weight.grad]
    contestants = {
        "hf_rnn": training_step(ours, ids),
        "minGRU-pytorch's layer": training_step(peer, ids),
        "matrix products alone": matrix_products(device),
    }
    rows = compare(contestants, expected, tolerance=1e-2, repeats=15)
    title = f"training step, {ours.num_parameters():,} parameters, batch {BATCH}, {TIME} tokens"
    table(title, rows)
    save("training_step", {title: rows})


if __name__ == "__main__":
    main()
