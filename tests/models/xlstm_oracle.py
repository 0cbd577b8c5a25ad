"""transformers' own xlstm, run in a process where the `xlstm` package is hidden: the class changes when it is there.

    python xlstm_oracle.py FOLDER SETTINGS LENGTHS [logits] [generate]

Writes a checkpoint with these settings into FOLDER, and what it says of prompts of these lengths.
"""

import importlib.util
import json
import sys
from pathlib import Path

real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "xlstm" else real(name, *rest)

import torch  # noqa: E402
from transformers import xLSTMConfig, xLSTMForCausalLM  # noqa: E402
from transformers.models.xlstm import modeling_xlstm  # noqa: E402

assert not modeling_xlstm.external_xlstm


def prompts(lengths, vocab_size):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab_size, (1, length), generator=generator) for length in lengths]


def make(folder, settings):
    """A checkpoint whose every weight matters."""
    torch.manual_seed(0)
    model = xLSTMForCausalLM(xLSTMConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("igate_preact.bias"):
                parameter.normal_(-1.0, 2.0)
            elif parameter.dim() == 2:
                parameter.normal_(std=1.2 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder, max_shard_size="200KB")


def main(folder, settings, lengths, *wanted):
    make(folder, json.loads(settings))
    model = xLSTMForCausalLM.from_pretrained(folder).eval()
    ids = prompts(json.loads(lengths), model.config.vocab_size)
    with torch.no_grad():
        if "logits" in wanted:
            torch.save([model(x).logits for x in ids], Path(folder) / "logits.pt")
        if "generate" in wanted:
            tokens = [model.generate(x, do_sample=False, min_new_tokens=100, max_new_tokens=100) for x in ids]
            torch.save(tokens, Path(folder) / "generate.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
