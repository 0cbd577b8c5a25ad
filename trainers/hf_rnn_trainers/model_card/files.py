"""What a shared checkpoint is made of, by name: whatever else lies in its folder is its owner's."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

CHECKPOINT = [
    *("config.json", "generation_config.json", "modeling_hf_rnn.py"),
    *("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"),
    *("adapter_config.json", "adapter_model.safetensors", "teacher/config.json", "teacher/model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("additional_chat_templates/*.jinja", "preprocessor_config.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", ".eval_results/hf_rnn.yaml"),
    *("loss.png", "rate.png", "forecast.png", "calibration.png", "zo_replay.jsonl"),
]
# What Trainer and its callbacks leave beside it: arguments, measurements, TensorBoard's logs; or do not push
_TRAINERS = ["training_args.bin", "trainer_state.json", "*_results.json", "emissions.csv", "events.out.tfevents.*"]
_TRAINERS += ["runs/events.out.tfevents.*", "runs/*/events.out.tfevents.*", "runs/*/*/events.out.tfevents.*"]
# In folders that a push passes by
_PASSED_BY = ("_", "checkpoint-", ".cache/huggingface/")


def matching(folder: str | Path, patterns: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files in a folder and below, sorted: those whose names match, and the others. A * ends at a /."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    some = [name for name in names if any(_fits(name.split("/"), pattern.split("/")) for pattern in patterns)]
    return some, [name for name in names if name not in some]


def _fits(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatch, name, pattern))


def others(folder: str | Path) -> list[str]:
    """The files that are neither a checkpoint's nor Trainer's, and that Trainer's push would upload."""
    return [name for name in matching(folder, [*CHECKPOINT, *_TRAINERS])[1] if not name.startswith(_PASSED_BY)]
