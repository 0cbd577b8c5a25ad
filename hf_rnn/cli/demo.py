"""`make demo`: train a byte-level minGRU on the documentation inside CPython, and show what it learned.

Needs no download: `pydoc_data.topics` ships with every CPython. The number of training steps is chosen so that they fit
`--seconds`, by timing a few on this machine first.
"""

import argparse
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, set_seed

from hf_rnn import MinGRUConfig, MinGRUForCausalLM, byte_tokenizer
from hf_rnn.cli.baselines import lzma_bits_per_byte, ngram_bits_per_byte, repeated_share
from hf_rnn.cli.generate import stream
from hf_rnn.cli.train import DataArguments, TrainArguments, train
from hf_rnn.tasks.dynamic_evaluation import dynamic_loss
from hf_rnn.tokenization.reading import read_tokenizer

HELD_OUT = 0.05
MOST_STEPS = 600  # fewer than three passes over the text: later ones learn it by heart (docs/log.md)
CONFIG = MinGRUConfig(hidden_size=256, num_hidden_layers=3)


class TimeLimit(TrainerCallback):
    """Stop training after so many seconds, should the machine have become slower than it was when steps were timed."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.deadline = time.monotonic() + self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.monotonic() > self.deadline


def seconds_per_step(model: PreTrainedModel, batch_size: int, block_size: int, steps: int = 4) -> float:
    """Time of a training step after the first, which compiles the kernels; leaves the model as it was."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    ids = torch.randint(0, 256, (batch_size, block_size))
    for step in range(steps + 2):
        if step == 2:
            start = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start) / steps


def show_baselines(text: bytes, cut: int, bits: float, learning: float) -> None:
    print("\nHeld-out bits per byte, on the same bytes:")
    for order, value in enumerate(ngram_bits_per_byte(text[:cut], text[cut:])):
        print(f"  byte n-gram, order {order}      {value:6.3f}")
    print(f"  this minGRU               {bits:6.3f}")
    print(f"  and learning on the way   {learning:6.3f}")
    print(f"  lzma                      {lzma_bits_per_byte(text[:cut], text[cut:]):6.3f}")
    print(
        f"lzma has the training text in its window. {repeated_share(text[:cut], text[cut:]):.0%} of these bytes lie in "
        "passages of 32 or more\nthat stand there word for word, and it copies them; counts and weights keep no text."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hf_rnn.cli.demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=270, help="most time for training")
    parser.add_argument("--steps", type=int, help="of training, however long they take; default: what fits --seconds")
    parser.add_argument("--output_dir", default="runs/demo", help="folder for the checkpoint")
    options = parser.parse_args()

    torch.set_float32_matmul_precision("medium")  # products from bfloat16 where the processor has such
    set_seed(0)
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(topics.values())
    corpus = output / "python_topics.txt"
    corpus.write_text(text, encoding="utf-8")
    data = DataArguments(data=str(corpus), block_size=256, held_out=HELD_OUT)
    arguments = TrainArguments(
        output_dir=str(output),
        per_device_train_batch_size=8,
        save_strategy="no",
        eval_strategy="epoch",
        lr_scheduler_type="linear",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    tokenizer = byte_tokenizer()
    model = MinGRUForCausalLM(CONFIG)
    print(f"minGRU with {model.num_parameters():,} parameters, {torch.get_num_threads()} threads")
    callbacks = []
    if options.steps is None:
        print("compiling the kernels and timing a step ...")
        step_time = seconds_per_step(model, arguments.per_device_train_batch_size, data.block_size)
        arguments.max_steps = min(MOST_STEPS, max(10, int(options.seconds / step_time)))
        print(f"{step_time:.3f} s a step: {arguments.max_steps} steps in about {arguments.max_steps * step_time:.0f} s")
        callbacks.append(TimeLimit(1.1 * options.seconds))
    else:
        arguments.max_steps = options.steps
    metrics = train(model, tokenizer, [text], data, arguments, callbacks=callbacks)

    reloaded = AutoModelForCausalLM.from_pretrained(output).eval()
    ids = tokenizer(text[-256:], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if not torch.equal(reloaded(ids).logits, model.eval()(ids).logits):
            raise RuntimeError(f"the checkpoint in {output} does not reload to the same model")
    encoded = text.encode()
    first = len(encoded) - int(len(encoded) * HELD_OUT)
    print("learning on the way through the held-out text ...")
    nats = dynamic_loss(reloaded, torch.tensor(list(encoded[first:])))
    learning = nats / math.log(2) / (len(encoded) - first - 1)
    # The network predicts what follows the first byte
    show_baselines(encoded, first + 1, metrics["bits_per_byte"], learning)
    print("\nA sample, generated by the reloaded checkpoint:\n")
    prompt = 'The "if" statement is used for'
    stream(reloaded, read_tokenizer(output), prompt, max_new_tokens=300, do_sample=True, temperature=0.7)
    print(f"\nCheckpoint, model card and loss curve are in {output} ({output / 'loss.png'}).")
    print(f"Go on: hf-rnn generate {output} --prompt 'A class definition'")


if __name__ == "__main__":
    main()
