"""The trained models that come with the package, `hf_rnn.pretrained()`: trained to few bits, coded, measured.

python benchmarks/checkpoints.py                                   # those of CPython's texts; `make checkpoints`
python benchmarks/checkpoints.py --data tinyshakespeare.txt        # that of the plays as well
python benchmarks/checkpoints.py --names mingru-python-docs --output_dir hf_rnn/checkpoints

Each is written to a folder of its own in `--output_dir`, and its bits per byte stand beside those of the one that comes
with the package. One thread. The texts are those of the CPython that runs it; another version's are others.
"""

import argparse
import hashlib
import json
import math
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from driver import results_path, save
from transformers import AutoConfig, AutoModelForCausalLM, default_data_collator, set_seed

import hf_rnn
from hf_rnn.cli.data import blocks, tokenize
from hf_rnn.cli.train import RateTrainArguments, default_learning_rate
from hf_rnn.tasks import python_documentation, python_texts
from hf_rnn.tasks.dynamic_evaluation import dynamic_loss
from hf_rnn.tasks.evaluation import bits_per_byte
from hf_rnn_trainers.model_card.card import Evaluation, Training, make_card

PYTHON = f"CPython {platform.python_version()}"
PSF = (
    "The text is under the PSF License Agreement, version 2, parts of the library under the licences listed at "
    "https://docs.python.org/3/license.html."
)
REPEATED = 10  # times that the documentation is read for once of the sources, which are twenty times as long
BLOCK, BATCH = 512, 4
TRAINING = Path("runs/training")  # the float32 weights, before they are coded
MAX_ERROR = 0.12  # of each matrix, relative: 0.015 bits per byte (docs/log.md, 2026-12-01)


@dataclass
class Text:
    """What a model learns from, and what it is measured on: `held_out` texts by name."""

    about: str
    licence: str
    training: list[str] = field(repr=False)
    held_out: dict[str, list[str]] = field(repr=False)

    def digest(self) -> str:
        return hashlib.sha256("\0".join(self.training).encode()).hexdigest()[:16]


@dataclass
class Recipe:
    architecture: str
    steps: int
    text: str
    settings: dict[str, Any]
    prompt: str


RECIPES = {
    "mingru-python-docs": Recipe("mingru", 3500, "python", dict(hidden_size=256, num_hidden_layers=3), "def "),
    "lstm-python-docs": Recipe("lstm", 3000, "python", dict(hidden_size=256, num_hidden_layers=2), "def "),
    "mingru-shakespeare": Recipe("mingru", 3000, "plays", dict(hidden_size=192, num_hidden_layers=4), "ROMEO:"),
}


def python_text() -> Text:
    learned, held_out = python_documentation()
    texts = python_texts() + REPEATED * [learned]
    order = np.random.default_rng(0).permutation(len(texts))
    return Text(
        f"The sources of the standard library of {PYTHON} (`hf_rnn.tasks.python_texts()`: a tenth of the files and all "
        "tests left out; measured on a fifth of those files) and, ten times, the language reference inside it "
        "(`hf_rnn.tasks.python_documentation()`: the last 5% left out)",
        PSF,
        [texts[i] for i in order],
        {"documentation": [held_out], "sources": python_texts("test")[::5]},
    )


def plays(path: str) -> Text:
    """The corpus known as tinyshakespeare: the last tenth is held out, half for validation and half for the test."""
    text = Path(path).read_text(encoding="utf-8")
    cut, end = int(0.9 * len(text)), int(0.95 * len(text))
    return Text(
        "The first nine tenths of tinyshakespeare (Shakespeare's plays, 1.1 MB)",
        "The text is in the public domain.",
        [text[:cut]],
        {"test": [text[end:]]},
    )


def train(name: str, recipe: Recipe, text: Text, steps: int, folder: Path) -> tuple[Any, Any, dict[str, float]]:
    """The model with the weights that are coded, its tokenizer and what was measured."""
    set_seed(0)
    tokenizer = hf_rnn.byte_tokenizer()
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(f"hf_rnn_{recipe.architecture}", vocab_size=len(tokenizer), **ids, **recipe.settings)
    model: Any = AutoModelForCausalLM.from_config(config)
    arguments = RateTrainArguments(
        output_dir=str(TRAINING / name),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        rate_shrink=0.03,
        rate_every=200,
        learning_rate=default_learning_rate(config),
        lr_scheduler_type="linear",
        save_strategy="no",
        logging_steps=100,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    stream, _ = tokenize(text.training, tokenizer)
    trainer = hf_rnn.RateConstrainedTrainer(
        model,
        arguments,
        train_dataset=blocks(stream, BLOCK),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    start = time.process_time()
    trainer.train()
    found = {"seconds": time.process_time() - start}
    trainer.save_model()
    found |= {f"{kind}, before coding": bits for kind, bits in measure(model, tokenizer, text).items()}
    for file in ("model.safetensors", "config.json"):
        (folder / file).unlink(missing_ok=True)
    result = hf_rnn.save_compressed(model, folder, max_error=MAX_ERROR)
    tokenizer.save_pretrained(folder)
    leave_out_code(folder)
    found |= measure(model, tokenizer, text) | {"bits a weight": result.bits}
    kind = next(iter(text.held_out))
    ids = torch.from_numpy(tokenize(text.held_out[kind], tokenizer)[0])
    found[f"{kind}, learning on the way"] = dynamic_loss(model, ids) / math.log(2) / (len(ids) - 1)
    return model, trainer, found


def leave_out_code(folder: Path) -> None:
    """Inside the package no code travels with the weights."""
    (folder / "modeling_hf_rnn.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def measure(model: Any, tokenizer: Any, text: Text) -> dict[str, float]:
    """Bits per byte of held-out texts, each kind one stream."""
    found = {}
    for name, documents in text.held_out.items():
        stream, ends = tokenize(documents, tokenizer)
        found[name] = bits_per_byte(model, torch.from_numpy(stream), int(ends[-1] - ends[0]))
    return found


def command(name: str, recipe: Recipe) -> str:
    data = " --data tinyshakespeare.txt" * (recipe.text == "plays")
    return f"python benchmarks/checkpoints.py --names {name}{data}"


def write_card(name: str, recipe: Recipe, text: Text, trainer: Any, found: dict[str, float], folder: Path) -> None:
    arguments = {
        key: str(getattr(trainer.args, key))
        for key in ("max_steps", "per_device_train_batch_size", "learning_rate", "rate_shrink")
    }
    tokens = trainer.args.max_steps * BATCH * BLOCK
    training = Training(
        f"{text.about}, {tokens:,} bytes in sequences of {BLOCK}, by backpropagation with a rate term (weights pulled "
        f"towards what costs few bits). {text.licence} {found['seconds']:.0f} seconds of one core. "
        f"Again: `{command(name, recipe)}`",
        arguments | {"lr_scheduler_type": "linear", "sequence length": BLOCK},
        trainer.card_papers,
    )
    rows = [(f"held-out {kind}", found[f"{kind}, before coding"], found[kind]) for kind in text.held_out]
    table = Evaluation(
        "Measured",
        f"Bits per byte, each text read as one stream. Coded, at {found['bits a weight']:.2f} bits a weight, the "
        f"weights take {(folder / 'model.safetensors').stat().st_size:,} bytes.",
        ("text", "in float32", "as it is here"),
        rows,
    )
    card = make_card(name, trainer.model, training, [table], "apache-2.0", "en", coded=True)
    card.text = card.text.replace(f'from_pretrained("{name}")', f'from_pretrained(hf_rnn.pretrained("{name}"))')
    card.text = card.text.replace('tokenizer("The "', f'tokenizer("{recipe.prompt}"')
    card.save(folder / "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=list(RECIPES), help="default: all that there is text for")
    parser.add_argument("--data", help="the file tinyshakespeare.txt")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/checkpoints"))
    parser.add_argument("--steps", type=int, help="instead of the recipe's, to try")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")  # products from bfloat16 where the processor has such
    names = options.names or [name for name, recipe in RECIPES.items() if recipe.text == "python" or options.data]
    path = results_path("checkpoints")
    results: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in names:
        recipe, folder = RECIPES[name], options.output_dir / name
        if recipe.text == "plays" and not options.data:
            parser.error(f"{name}: expected --data with the plays")
        text = plays(options.data) if recipe.text == "plays" else python_text()
        folder.mkdir(parents=True, exist_ok=True)
        _, trainer, found = train(name, recipe, text, options.steps or recipe.steps, folder)
        write_card(name, recipe, text, trainer, found, folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
        results[name] = found | {"parameters": trainer.model.num_parameters(), "bytes": size, "text": text.digest()}
        results[name] |= {"steps": trainer.args.max_steps, "about": text.about}
        results[name] |= {"command": command(name, recipe)}
        print(name, results[name], flush=True)
        if name in hf_rnn.pretrained():
            model = AutoModelForCausalLM.from_pretrained(hf_rnn.pretrained(name))
            for kind, bits in measure(model, hf_rnn.byte_tokenizer(), text).items():
                beside = f"{found[kind] / bits - 1:+.1%} beside the one that comes with the package, {bits:.4f}"
                print(f"  held-out {kind}: {found[kind]:.4f} bits per byte, {beside}")
        save("checkpoints", results)


if __name__ == "__main__":
    main()
