"""Small zero-order runs, for the tests of ZOTrainer."""

import torch
from datasets import Dataset

from hf_rnn import MinGRUConfig, MinGRUForCausalLM, ZOConfig, ZOTrainer


def make_model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, hidden_size=16, num_hidden_layers=1, feed_forward_factor=0)
    sizes |= dict(block_layout="paper", initializer_range=0.02)
    return MinGRUForCausalLM(MinGRUConfig(**sizes, pad_token_id=None, bos_token_id=None, eos_token_id=None))


def make_data(rows=24):
    ids = torch.randint(0, 16, (rows, 9), generator=torch.Generator().manual_seed(1)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")


DEFAULTS = dict(
    per_device_train_batch_size=4,
    max_steps=10,
    num_directions=16,
    epsilon=0.03,
    learning_rate=0.1,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)


def make_trainer(folder, model=None, cls=ZOTrainer, data=None, callbacks=None, **settings):
    args = ZOConfig(**DEFAULTS | dict(output_dir=str(folder)) | settings)
    return cls(model or make_model(), args, train_dataset=data or make_data(), callbacks=callbacks)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
