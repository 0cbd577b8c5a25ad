"""Small runs of every trainer, with dropout and epochs of six batches, for tests of what runs survive."""

import torch
from datasets import Dataset
from transformers import TrainerCallback

import hf_rnn
from hf_rnn import GRUConfig, GRUForCausalLM, RecurrentTrainer, RecurrentTrainingArguments

TRAINERS = {
    "backpropagation": (RecurrentTrainer, RecurrentTrainingArguments, dict(gradient_accumulation_steps=2)),
    "zo": (hf_rnn.ZOTrainer, hf_rnn.ZOConfig, dict(num_directions=4, optim="adamw_torch")),
    "smt": (hf_rnn.SMTTrainer, hf_rnn.SMTConfig, dict(context_size=8, positions_per_sequence=4)),
    "dmt": (hf_rnn.DMTTrainer, hf_rnn.DMTConfig, dict(context_size=8, label_every=4)),
    "rate": (
        hf_rnn.RateConstrainedTrainer,
        hf_rnn.RateConstrainedConfig,
        dict(rate_shrink=0.03, rate_every=2, target_bits=2.0, rate_finetune=0.3, quantization_aware=True),
    ),
    "stream": (
        RecurrentTrainer,
        RecurrentTrainingArguments,
        dict(gradient_accumulation_steps=2, stream=True, stream_length=6, backprop="chunked", chunk_size=4),
    ),
}


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


class Rows(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def stop(control):
    control.should_save = control.should_training_stop = True


def make_trainer(folder, name="backpropagation", base=None, callbacks=None, unknown_length=False, **settings):
    trainer_class, args_class, own = TRAINERS[name]
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=1, hidden_dropout=0.2, conv_kernel=0)
    model = GRUForCausalLM(GRUConfig(**sizes, pad_token_id=None, bos_token_id=None, eos_token_id=None))
    rows = torch.randint(0, 60, (11, 12))
    defaults = dict(max_steps=7, save_steps=2, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2)
    defaults |= dict(report_to="none", use_cpu=True, disable_tqdm=True, output_dir=str(folder))
    data = [{"input_ids": row, "labels": row} for row in rows]
    held_out = data[:3]
    options = {}
    if name == "stream":  # documents of 12 and 24 tokens
        documents = [*rows[:5].tolist(), *rows[5:].reshape(-1, 24).tolist()]
        data, held_out = (Dataset.from_dict({"input_ids": some}) for some in (documents, documents[:2]))
    data = Rows(data) if unknown_length else data
    if name == "dmt":
        options["teacher"] = hf_rnn.SMTTeacher.for_student(model, hidden_size=16, encoder_layers=1, decoder_layers=1)
    args = args_class(**defaults | own | settings)
    return (base or trainer_class)(
        model, args, train_dataset=data, eval_dataset=held_out, callbacks=callbacks, **options
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
