"""A network without gates learns to remember: SMT, then DMT, and a look into its memory.

A needle is shown once, early, among distractors; 24 steps later the network is asked for it. Backpropagation through
time has to carry the one error back over all steps, and this network is not made for that. Supervised Memory Training
never unrolls it: a transformer says what to remember, the network learns single steps.

python examples/memory_training.py             # writes memory_training.png
python examples/memory_training.py --steps 20  # to see that it runs
"""

import argparse
import dataclasses

import torch
from matplotlib.figure import Figure

import hf_rnn
from hf_rnn.tasks import Retrieval, accuracy
from hf_rnn_trainers.memory import drift, rollout

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
steps = parser.parse_args().steps

# The data: row i of a task is a function of (seed, i), so there is no end of it, and other seeds are unseen rows.
task = Retrieval(length=24, symbols=8, seed=0)
unseen = dataclasses.replace(task, seed=1)
rows = [unseen[i] for i in range(512)]
ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
x = ids[:, :-1]  # the last place holds the answer, which nothing reads
needle = labels[:, -1]

# The student: a memory of 2 tokens of 64 channels, rewritten at every step by a small MLP.
torch.manual_seed(0)
tokens = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
config = hf_rnn.MemoryRNNConfig(
    vocab_size=task.vocab_size, hidden_size=64, num_memory_tokens=2, updater="mlp", **tokens
)
model = hf_rnn.MemoryRNNForCausalLM(config)
common = dict(per_device_train_batch_size=64, report_to="none", use_cpu=True, save_strategy="no", logging_steps=50)


def show(name: str) -> None:
    """What the student does alone, from the empty memory."""
    with torch.no_grad():
        found = accuracy(model.eval()(ids).logits, labels)["accuracy"]
    print(f"{name}: accuracy {found:.3f} (chance {task.chance:.3f})")


# SMT. The teacher is made to fit the student; `all_positions` has it give the memories of a whole row at once. Half of
# the memories that have to predict, two a row, are those right before the one label.
arguments = hf_rnn.SMTConfig(
    "memory_smt",
    max_steps=steps,
    learning_rate=2e-3,
    lr_scheduler_type="cosine",
    warmup_steps=min(50, steps // 2),
    all_positions=True,
    labelled_share=0.5,
    positions_per_sequence=2,
    **common,
)
smt = hf_rnn.SMTTrainer(model, arguments, train_dataset=task)
smt.train()
smt.save_model()  # the student in memory_smt, the teacher in memory_smt/teacher
show("after SMT")

# What the student remembers, and how far its own memories drift from the teacher's.
steps_of_rollout = torch.arange(task.length)
with torch.no_grad():
    memories = rollout(model, x)[:, -2].flatten(1)  # before it is asked
curves = {"SMT": drift(model, smt.teacher, x, steps_of_rollout, task.length)}

# DMT. The same student runs on its own; the frozen teacher says at each step what it should have remembered.
arguments = hf_rnn.DMTConfig("memory_dmt", max_steps=max(steps // 5, 2), learning_rate=1e-3, label_every=1, **common)
dmt = hf_rnn.DMTTrainer(model, arguments, teacher="memory_smt", train_dataset=dataclasses.replace(task, seed=2))
dmt.train()
dmt.save_model()
show("after DMT")
curves["SMT, then DMT"] = drift(model, dmt.teacher, x, steps_of_rollout, task.length)
with torch.no_grad():
    after = rollout(model, x)[:, -2].flatten(1)

# The picture: memories of 512 rows in their two main directions, coloured by the needle; drift over the rollout.
figure = Figure(figsize=(13, 4), layout="constrained")
left, middle, right = figure.subplots(1, 3)
for axes, points, title in ((left, memories, "after SMT"), (middle, after, "after DMT")):
    centred = points - points.mean(0)
    plane = centred @ torch.pca_lowrank(centred, q=4)[2][:, :2]
    image = axes.scatter(*plane.T, c=needle, cmap="Dark2", vmin=0.5, vmax=8.5, s=8)
    axes.set(title=f"memories {title}, by the needle", xlabel="first component", ylabel="second")
figure.colorbar(image, ax=middle, label="needle")
for name, curve in curves.items():
    right.plot(curve, label=name)
right.set(title="drift of the student's own memories", xlabel="step of the rollout", ylabel="MSE to the teacher's")
right.legend()
figure.savefig("memory_training.png", dpi=110)
print("drift at the end:", {name: round(float(curve[-1]), 4) for name, curve in curves.items()})

# The student is a model like any other: it loads and generates without the teacher.
again = hf_rnn.MemoryRNNForCausalLM.from_pretrained("memory_dmt")
asked = again.generate(x[:8], max_new_tokens=1, do_sample=False)[:, -1]
print("asked for", needle[:8].tolist(), "it says", asked.tolist())
