"""Train a minGRU with transformers' own tools on sequences of different lengths, packed; go on from a carried state.

python examples/train_with_trainer.py
"""

import itertools

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, TrainingArguments

import hf_rnn

# Sums, one a line: "12+7=19". Packed end to end they need no padding; each starts from the initial state.
lines = [f"{a}+{b}={a + b}\n" for a, b in itertools.product(range(20), repeat=2)]
tokenizer = hf_rnn.byte_tokenizer()
dataset = Dataset.from_dict({"input_ids": tokenizer(lines)["input_ids"]})

model = AutoModelForCausalLM.from_config(hf_rnn.MinGRUConfig(hidden_size=64, num_hidden_layers=2))
arguments = TrainingArguments(
    output_dir="sums",
    max_steps=100,
    per_device_train_batch_size=64,
    learning_rate=1e-2,
    report_to="none",
    use_cpu=True,
    use_cache=True,  # what the saved config says; in training the state is not returned in any case
)
trainer = hf_rnn.RecurrentTrainer(  # Trainer, but a loss that is not finite stops the run
    model, arguments, train_dataset=dataset, data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True)
)
trainer.train()
trainer.save_model("sums")
tokenizer.save_pretrained("sums")

model = AutoModelForCausalLM.from_pretrained("sums")
with torch.no_grad():  # the state after "12+7" is all that is needed to go on
    state = model(**tokenizer("12+7", return_tensors="pt")).past_key_values
print(state)
prompt = tokenizer("12+7=", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, past_key_values=state, max_new_tokens=3)[0]))
