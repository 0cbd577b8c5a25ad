"""Architectures at equal parameters and equal steps: held-out bits per byte of a byte-level language model.

    python benchmarks/language_model.py

Text: the documentation inside CPython (`pydoc_data.topics`), or a file (--data). The network of `make demo`: 3 layers
of width 256, a convolution before each recurrence, no feed-forward; each architecture is given as many channels as come
closest to the parameters of minGRU at expansion 2. Same data, order, batches, learning rate and schedule for all.
"""

import argparse
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from driver import save
from transformers import set_seed

import hf_rnn
from hf_rnn.cli.train import DataArguments, TrainArguments, train
from hf_rnn.skeleton.configuration_block import RecurrentBlockConfig

ARCHITECTURES = [s for s in hf_rnn.ARCHITECTURES if issubclass(getattr(hf_rnn, f"{s}Config"), RecurrentBlockConfig)]
SIZES = dict(hidden_size=256, num_hidden_layers=3, feed_forward_factor=0)
SETTINGS = SIZES | dict(block_layout="paper", initializer_range=0.02)
LEARNING_RATE, BATCH, BLOCK = 4e-3, 8, 256


def parameters(name: str, channels: int) -> int:
    config = getattr(hf_rnn, f"{name}Config")(**SETTINGS, expansion_factor=channels / SETTINGS["hidden_size"])
    with torch.device("meta"):
        return getattr(hf_rnn, f"{name}ForCausalLM")(config).num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a text file; default: CPython's documentation")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    options = parser.parse_args()
    text = Path(options.data).read_text(encoding="utf-8") if options.data else "\n\n".join(topics.values())
    target, results = parameters("MinGRU", 512), {}
    for name in ARCHITECTURES:
        channels = min(range(64, 769, 2), key=lambda n: abs(parameters(name, n) - target))
        set_seed(0)
        config = getattr(hf_rnn, f"{name}Config")(**SETTINGS, expansion_factor=channels / SETTINGS["hidden_size"])
        model = getattr(hf_rnn, f"{name}ForCausalLM")(config)
        with tempfile.TemporaryDirectory() as folder:
            data = DataArguments(data=options.data or "pydoc_data.topics", block_size=BLOCK)
            arguments = TrainArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                learning_rate=options.learning_rate,
                max_steps=options.steps,
                logging_steps=100,
                save_strategy="no",
                dataloader_pin_memory=torch.cuda.is_available(),
            )
            start = time.perf_counter()
            metrics = train(model, hf_rnn.byte_tokenizer(), [text], data, arguments)
        row = {
            "channels": channels,
            "parameters": model.num_parameters(),
            "steps": options.steps,
            "bits_per_byte": metrics["bits_per_byte"],
            "training_seconds": metrics["train_runtime"],
            "seconds": time.perf_counter() - start,
        }
        results[name] = row
        print(name, {key: round(value, 3) for key, value in row.items()}, flush=True)
    print("\n| architecture | channels | parameters | bits per byte | seconds of training |")
    print("| --- | --- | --- | --- | --- |")
    for name, row in results.items():
        print(
            f"| {name} | {row['channels']} | {row['parameters']:,} | {row['bits_per_byte']:.3f} |"
            f" {row['training_seconds']:.0f} |"
        )
    save("language_model", results)


if __name__ == "__main__":
    main()
