"""Fine-tune a checkpoint on what has no gradient: a reward on the text that it writes. Then share it as a log.

python examples/fine_tune_on_a_reward.py
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments

import hf_rnn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=30, help="of fine-tuning")
steps = parser.parse_args().steps

# A checkpoint to begin with: it has learned to write digits, all of them equally often.
torch.manual_seed(0)
tokenizer = hf_rnn.byte_tokenizer()
lines = ["".join(str(int(digit)) for digit in torch.randint(10, (16,))) for _ in range(256)]
ids = tokenizer(lines)["input_ids"]
model = AutoModelForCausalLM.from_config(hf_rnn.MinGRUConfig(hidden_size=32, num_hidden_layers=1))
arguments = TrainingArguments(
    "digits", max_steps=60, per_device_train_batch_size=32, learning_rate=2e-2, report_to="none", use_cpu=True
)
data = Dataset.from_dict({"input_ids": ids, "labels": ids})
hf_rnn.RecurrentTrainer(model, arguments, train_dataset=data).train()
model.save_pretrained("digits")


class RewardTrainer(hf_rnn.ZOTrainer):
    """Whatever a program can compute may be the loss: here the share of what was written that is no even digit."""

    def compute_loss(self, model, inputs, **kwargs):
        prompt = inputs["input_ids"][:, :1]
        written = model.generate(prompt, do_sample=True, min_new_tokens=8, max_new_tokens=8)[:, 1:]
        even = torch.isin(written, torch.tensor(tokenizer("02468")["input_ids"]))
        return 1 - even.float().mean().item()


model = AutoModelForCausalLM.from_pretrained("digits")
arguments = hf_rnn.ZOConfig(
    "even",
    estimator="es_sign",  # steps do not depend on the scale of a reward
    num_directions=16,
    epsilon=0.03,
    learning_rate=0.02,
    max_steps=steps,
    logging_steps=5,
    per_device_train_batch_size=32,
    report_to="none",
    use_cpu=True,
)
trainer = RewardTrainer(model, arguments, train_dataset=data)
trainer.train()
model.generation_config.update(do_sample=True, max_new_tokens=16, min_new_tokens=16)
print(tokenizer.batch_decode(model.generate(torch.tensor(ids[:4])[:, :1])))

# even/zo_replay.jsonl is all that anyone needs who has the first checkpoint.
again = hf_rnn.ZOTrainer.replay("digits", "even")
print(all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)))
