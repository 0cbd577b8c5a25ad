"""What a process of test_placement.py does: models loaded in parts beside whole ones."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import hf_rnn

SIZES = dict(vocab_size=17, hidden_size=16, num_hidden_layers=2)
TOKENS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
CASES = {  # class and settings; sizes that two processes cannot share evenly among them
    "lstm": ("LSTM", dict(num_heads=2)),
    "lstm-paper": ("LSTM", dict(block_layout="paper", num_heads=2)),
    "gru-attention": ("GRU", dict(layer_types=["linear_attention", "sliding_attention"], num_key_value_heads=2)),
    "gru-bare": ("GRU", dict(residual=False, conv_kernel=0, feed_forward_factor=0, output_projection=False)),
    "mingru": ("MinGRU", dict(expansion_factor=1.3125)),
    "minlstm-tied": ("MinLSTM", dict(tie_word_embeddings=True)),
    "xlstm": ("XLSTM", dict(num_heads=2, intermediate_size=22)),
    "xlstm-bias": ("XLSTM", dict(num_heads=2, use_bias=True)),
    "xlstm-gated": ("XLSTM", dict(num_heads=2, block_layout="gated", slstm_at=[0])),
    "xlstm-neurips": ("XLSTM", dict(num_heads=2, block_layout="neurips", slstm_at=[0])),
    "memory": ("MemoryRNN", dict(num_memory_tokens=2, num_heads=2)),
}


def make(name: str) -> PreTrainedModel:
    stem, settings = CASES[name]
    torch.manual_seed(0)
    model = getattr(hf_rnn, f"{stem}ForCausalLM")(getattr(hf_rnn, f"{stem}Config")(**SIZES | TOKENS | settings))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval()


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def compare(name: str, folder: Path) -> None:
    """Logits, tokens and gradients of the model in parts are those of the whole one; each process holds a part."""
    model = make(name)
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder / name)
    torch.distributed.barrier()
    config = DistributedConfig(tp_plan="auto")
    parts = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config).eval()
    ids = torch.randint(0, SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(parts(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5, msg=name)
    options = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(parts.generate(ids, **options), model.generate(ids, **options)), name
    for network in (parts, model):
        network(ids, labels=ids, use_cache=False).loss.backward()
    for (key, p), q in zip(parts.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
    cut = (
        ("in_proj", "up_proj", "down_proj", "lm_head")
        if name != "memory"
        else ("mixer.ff.", "mixer.out_proj", "lm_head")
    )
    for key, p in parts.named_parameters():
        if key.endswith("weight") and any(part in key for part in cut):
            assert p.to_local().numel() <= 0.6 * p.numel(), f"{name}: {key} is whole"


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for case in sys.argv[2:]:
        compare(case, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
