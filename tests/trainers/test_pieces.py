"""Backpropagation over pieces: chunked is the whole gradient, truncated that of a loop written by hand."""

import pytest
import torch
from conftest import LAYOUTS
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithFlattening, TrainingArguments

import hf_rnn
from hf_rnn import RecurrentCache, RecurrentTrainer, RecurrentTrainingArguments
from hf_rnn_trainers.base.pieces import backward_through

T = 23
SETTINGS = [  # pieces that divide nothing, of one token, all of them in one, states of states
    dict(chunk_size=5),
    dict(chunk_size=1, chunk_states=4),
    dict(chunk_size=T),
    dict(chunk_size=2, chunk_states=2),
]


def make_batch(kind, rows=3):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 58, (rows, T), generator=generator)
    batch = dict(input_ids=ids, labels=ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100))
    if kind == "padded":
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, :9] = batch["attention_mask"][1, 14:] = batch["attention_mask"][2, 4:7] = 0
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    elif kind == "targets behind padding":  # the first token of a row, predicted from what is none; and padding itself
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, :9] = batch["attention_mask"][1, 3:12] = batch["attention_mask"][2, :2] = 0
        batch["labels"] = ids
    elif kind == "positions":
        batch["position_ids"] = torch.arange(T)[None].repeat(rows, 1)
        batch["position_ids"][1] = torch.arange(T) % 7
        batch["position_ids"][2, 5:] = torch.arange(T - 5)
    elif kind == "numbers":
        batch["seq_idx"] = torch.arange(T)[None] // 6
    elif kind == "flattened":  # as transformers' collator packs
        documents = [dict(input_ids=row.tolist()) for row in torch.cat([ids[0], ids[1]]).split([4, 9, 1, 20, 12])]
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents)
    return batch


def make_trainer(model, folder, trainer=RecurrentTrainer, arguments=RecurrentTrainingArguments, **settings):
    options = {name: settings.pop(name) for name in ("train_dataset", "compute_loss_func") if name in settings}
    common = dict(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    return trainer(model, arguments(**common | settings), **dict(train_dataset=[{}]) | options)


def step(model, batch, folder, seed=5, **settings):
    """The loss of a training step and its gradients."""
    trainer = make_trainer(model, folder, **settings)
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(seed)
    loss = trainer.training_step(model, dict(batch), (batch["labels"] != -100).sum())
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(found, expected):
    assert found.keys() == expected.keys()
    norm = sum(g.double().pow(2).sum() for g in expected.values()).sqrt()
    return float(sum((found[n].double() - g.double()).pow(2).sum() for n, g in expected.items()).sqrt() / norm)


class TestChunked:
    @pytest.mark.parametrize("kind", ["plain", "padded", "targets behind padding", "positions", "numbers", "flattened"])
    def test_is_the_whole_gradient(self, make_model, kind, tmp_path):
        model, batch = make_model().double(), make_batch(kind, 1 if kind == "numbers" else 3)
        loss, expected = step(model, batch, tmp_path)
        for settings in SETTINGS if kind in ("targets behind padding", "positions") else SETTINGS[:1]:
            found, gradients = step(model, batch, tmp_path, backprop="chunked", **settings)
            assert found == pytest.approx(loss, rel=1e-5) and distance(gradients, expected) < 1e-10, settings

    @pytest.mark.parametrize("name", ["mingru", "minlstm", "lstm", "gru", "xlstm", "memoryrnn"])
    def test_in_float32(self, name, tmp_path):
        """Over more tokens than a piece of any loop holds at once."""
        torch.manual_seed(0)
        config, model, _ = LAYOUTS[name]
        model = model(config(vocab_size=61, hidden_size=32, num_hidden_layers=2))
        ids = torch.randint(0, 61, (2, 64 if name == "memoryrnn" else 400))
        batch = dict(input_ids=ids, labels=ids)
        expected = step(model, batch, tmp_path)[1]
        assert distance(step(model, batch, tmp_path, backprop="chunked", chunk_size=53)[1], expected) < 1e-5

    @pytest.mark.parametrize("architecture", ["lstm", "mingru", "xlstm"], indirect=True)
    def test_tied_and_adapted(self, make_model, tmp_path):
        tied = make_model(tie_word_embeddings=True).double()
        adapted = get_peft_model(make_model(), LoraConfig(target_modules="all-linear", r=2)).double()
        for model in (tied, adapted):
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(p)
            expected = step(model, make_batch("padded"), tmp_path)[1]
            found = step(model, make_batch("padded"), tmp_path, backprop="chunked", chunk_size=4)[1]
            assert expected and distance(found, expected) < 1e-10

    @pytest.mark.parametrize("architecture", ["gru", "minlstm-attention"], indirect=True)
    def test_dropout(self, make_model, tmp_path):
        """The masks of both passes are the same: the gradient is that of pieces in one graph with these masks."""
        model, batch = make_model(hidden_dropout=0.4).double(), make_batch("padded")
        found = step(model, batch, tmp_path, backprop="chunked", chunk_size=5, chunk_states=2)[1]
        drawn = torch.rand(1)
        torch.manual_seed(5)
        seed = int(torch.randint(2**62, ()))
        assert torch.equal(drawn, torch.rand(1)), "nothing else is drawn from what training goes on with"
        model.zero_grad()
        state, targets = RecurrentCache(2), torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        loss = 0
        for i in range(0, T, 5):
            torch.manual_seed(seed + i // 5)
            piece = slice(i, i + 5)
            mask = batch["attention_mask"][:, piece]
            logits = model.train()(batch["input_ids"][:, piece], attention_mask=mask, past_key_values=state).logits
            part = targets[:, piece].flatten()
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), part, reduction="sum")
        (loss / (batch["labels"] != -100).sum()).backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert distance(found, expected) < 1e-10
        other = step(model, batch, tmp_path, seed=6, backprop="chunked", chunk_size=5)[1]
        assert distance(other, expected) > 0.1

    @pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
    @pytest.mark.parametrize("name", ["backpropagation", "rate"])
    def test_a_run(self, make_model, name, tmp_path):
        """Accumulation, clipping, schedule: the weights at the end."""
        trainer, arguments, own = {
            "backpropagation": (RecurrentTrainer, RecurrentTrainingArguments, {}),
            "rate": (hf_rnn.RateConstrainedTrainer, hf_rnn.RateConstrainedConfig, dict(rate_shrink=0.1)),
        }[name]
        rows = torch.randint(0, 58, (12, T))
        settings = dict(max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_grad_norm=0.5)
        settings |= dict(trainer=trainer, arguments=arguments, learning_rate=1e-2, **own)
        settings |= dict(train_dataset=[dict(input_ids=row, labels=row) for row in rows])
        models = [make_model().double() for _ in range(2)]
        whole = make_trainer(models[0], tmp_path / "whole", **settings)
        chunked = make_trainer(models[1], tmp_path / "chunked", backprop="chunked", chunk_size=7, **settings)
        losses = [
            [entry["train_loss"] for entry in t.state.log_history if "train_loss" in entry]
            for t in (whole, chunked)
            if t.train()
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("architecture", ["mingru", "xlstm"], indirect=True)
    def test_autocast(self, make_model, tmp_path):
        """The states between pieces are float32 as ever: no further from the whole than rounding to bfloat16 moves."""
        model, batch = make_model(), make_batch("plain")
        exact, whole = step(model, batch, tmp_path)[1], step(model, batch, tmp_path, bf16=True)[1]
        found = step(model, batch, tmp_path, bf16=True, backprop="chunked", chunk_size=6)[1]
        assert distance(found, whole) < max(distance(whole, exact), 1e-2)

    @pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
    @pytest.mark.slow
    def test_compiled(self, make_model, tmp_path):
        rows = torch.randint(0, 58, (4, T))
        settings = dict(
            max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, backprop="chunked", chunk_size=8
        )
        settings |= dict(train_dataset=[dict(input_ids=row, labels=row) for row in rows])
        models = [make_model() for _ in range(2)]
        make_trainer(models[0], tmp_path / "a", **settings).train()
        compiled = dict(torch_compile=True, torch_compile_backend="aot_eager")
        make_trainer(models[1], tmp_path / "b", **settings, **compiled).train()
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("count", [1, 2, 7, 16, 17])
    @pytest.mark.parametrize("kept", [None, 2, 3, 4, 16])
    def test_order_and_states_kept(self, count, kept):
        """Each piece once, last to first, from the state before it; no more states at once than asked for, a level of
        groups each."""
        seen, runs = [], []

        def advance(i, state):
            assert state == i
            runs.append(i)
            return i + 1

        def backward(i, state, gradient):
            assert state == i and gradient == ([] if i == count - 1 else [i + 1])
            seen.append(i)
            return [i]

        assert backward_through(count, 0, kept, advance, backward) == [0]
        assert seen == list(reversed(range(count)))
        if kept is None or kept >= count:
            assert runs == list(range(count - 1))
        elif kept**2 >= count:
            assert len(runs) <= 2 * count

    @pytest.mark.parametrize("architecture", ["gru"], indirect=True)
    def test_what_is_kept_for_backward_does_not_grow(self, make_model, tmp_path):
        """Bytes that graphs hold at once, for 8 and for 32 pieces; of the whole row four times as many."""
        model, most = make_model(), {}
        for pieces in (8, 32):
            for settings in (dict(backprop="chunked", chunk_size=16), {}):
                live = [0, 0]  # now, and at most

                class Held:
                    def __init__(self, x, live=live):
                        self.x, self.live = x, live
                        live[0] += x.nbytes
                        live[1] = max(live)

                    def __del__(self):
                        self.live[0] -= self.x.nbytes

                ids = torch.randint(0, 58, (1, 16 * pieces))
                with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.x):
                    step(model, dict(input_ids=ids, labels=ids), tmp_path, **settings)
                most[pieces, "backprop" in settings] = live[1]
        assert most[32, True] <= 1.05 * most[8, True] < 0.5 * most[8, False] < 0.2 * most[32, False]

    @pytest.mark.parametrize(
        "offsets, padding", [([0, 3, 7, 23, 23, 23], []), ([0, 0, 5, 5, 23], []), ([0, 3, 7, 23], [3, 4, 7, 22])]
    )
    def test_offsets(self, offsets, padding, tmp_path):
        """Sequences of no tokens; sequences that begin with padding; targets across sequences."""
        torch.manual_seed(0)
        model = hf_rnn.MinGRUForCausalLM(hf_rnn.MinGRUConfig(vocab_size=58, hidden_size=16, num_hidden_layers=2))
        batch = make_batch("plain", 1) | dict(cu_seq_lens_q=torch.tensor(offsets))
        if padding:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, padding] = 0
            behind = batch["attention_mask"].roll(1, 1) == 0  # padding is of the sequence before or after it
            batch["labels"] = batch["labels"].masked_fill(behind, -100)
        expected = step(model.double(), batch, tmp_path)[1]
        for size in (1, 4, 7):
            assert distance(step(model, batch, tmp_path, backprop="chunked", chunk_size=size)[1], expected) < 1e-10

    @pytest.mark.parametrize("architecture", ["mingru"], indirect=True)
    def test_evaluation(self, make_model, tmp_path):
        """In pieces as well, and the loss that whole rows have."""
        rows = torch.randint(0, 58, (5, T))
        data, lengths = [dict(input_ids=row, labels=row) for row in rows], []
        model = make_model()
        model.model.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append((args[0] if args else kwargs["input_ids"]).shape[1]),
            with_kwargs=True,
        )
        settings = dict(train_dataset=data, per_device_eval_batch_size=2)
        whole = make_trainer(model, tmp_path, **settings).evaluate(data)["eval_loss"]
        lengths.clear()
        chunked = make_trainer(model, tmp_path, backprop="chunked", chunk_size=6, **settings)
        assert chunked.evaluate(data)["eval_loss"] == pytest.approx(whole, rel=1e-5) and max(lengths) == 6
        assert chunked.predict(data).predictions.shape == (5, T, 61)


class TestTruncated:
    @pytest.mark.parametrize("reach", [1, 2, 3])
    def test_against_a_loop(self, make_model, reach, tmp_path):
        """Of the published kind: each piece's loss goes back `reach` pieces, from a state that is a constant."""
        model, batch, size = make_model().double(), make_batch("plain"), 5
        settings = dict(backprop="truncated", chunk_size=size, gradient_chunks=reach)
        found, gradients = step(model, batch, tmp_path, **settings)
        model.zero_grad()
        ids, total = batch["input_ids"], 0.0
        targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        for start in range(0, T, size):
            first = max(0, start - (reach - 1) * size)
            state = RecurrentCache(2)
            with torch.no_grad():
                if first:
                    model(ids[:, :first], past_key_values=state)
            logits = model(ids[:, first : start + size], past_key_values=state).logits[:, start - first :]
            part = targets[:, start : start + size].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), part, reduction="sum")
            loss = loss / (batch["labels"] != -100).sum()
            loss.backward()
            total += float(loss)
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert found == pytest.approx(total, rel=1e-5) and distance(gradients, expected) < 1e-10

    @pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
    def test_differs_from_the_whole(self, make_model, tmp_path):
        model, batch = make_model(), make_batch("plain")
        expected = step(model, batch, tmp_path)[1]
        far = [
            distance(step(model, batch, tmp_path, backprop="truncated", chunk_size=2, gradient_chunks=n)[1], expected)
            for n in (1, 3, 12)
        ]
        assert far[0] > far[1] > 1e-3 and far[2] < 1e-5


class TestErrors:
    @pytest.mark.parametrize(
        "settings, message",
        [
            (dict(backprop="tbptt"), "backprop: expected one of full, chunked, truncated, got 'tbptt'"),
            (dict(backprop="chunked"), "chunk_size: backprop='chunked' expects at least 1 token, got None"),
            (dict(backprop="truncated", chunk_size=0), "chunk_size: .* got 0"),
            (dict(chunk_size=8), "chunk_size: backprop='full' has no pieces"),
            (dict(backprop="truncated", chunk_size=8, chunk_states=4), "chunk_states: .*backprop='chunked'"),
            (dict(backprop="chunked", chunk_size=8, chunk_states=1), "chunk_states: expected at least 2"),
            (dict(backprop="chunked", chunk_size=8, gradient_chunks=2), "gradient_chunks: .*backprop='truncated'"),
            (dict(backprop="chunked", chunk_size=8, gradient_checkpointing=True), "gradient_checkpointing: "),
            (dict(backprop="chunked", chunk_size=8, label_smoothing_factor=0.1), "label_smoothing_factor: "),
            (dict(backprop="chunked", chunk_size=8, compute_loss_func=len), "compute_loss_func: "),
        ],
    )
    def test_arguments(self, settings, message, tmp_path):
        model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
        with pytest.raises(ValueError, match=message):
            make_trainer(model, tmp_path, **settings)

    @pytest.mark.parametrize(
        "trainer, arguments, message",
        [
            (hf_rnn.ZOTrainer, hf_rnn.ZOConfig, "backprop: zero-order training has no backward pass"),
            (hf_rnn.SMTTrainer, hf_rnn.SMTConfig, "backprop: each step is trained by itself"),
        ],
    )
    def test_trainers(self, trainer, arguments, message, tmp_path):
        model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, conv_kernel=0))
        with pytest.raises(ValueError, match=message):
            make_trainer(model, tmp_path, trainer, arguments, backprop="chunked", chunk_size=4)

    def test_models(self, tmp_path):
        classifier = hf_rnn.GRUForSequenceClassification(hf_rnn.GRUConfig(vocab_size=9, hidden_size=8))
        with pytest.raises(ValueError, match="backprop: expected a causal language model of hf_rnn"):
            make_trainer(classifier, tmp_path, backprop="chunked", chunk_size=4)

    @pytest.mark.parametrize("architecture", ["gru"], indirect=True)
    def test_batches(self, model, tmp_path):
        batch = make_batch("plain")
        with pytest.raises(ValueError, match=f"chunk_size: expected at most the {T} tokens of the first .*, got 24"):
            step(model, batch, tmp_path, backprop="chunked", chunk_size=24)
        trainer = make_trainer(model, tmp_path, backprop="chunked", chunk_size=4)
        with pytest.raises(ValueError, match=r"labels: expected \(B, T\)"):
            trainer.training_step(model, dict(input_ids=batch["input_ids"]), 1)
        for more, message in [
            (dict(labels=batch["labels"][:, :-1]), "labels: expected the shape"),
            (dict(cu_seq_lens_q=torch.tensor([0, 3, T])), "cu_seq_lens_q: packed sequences lie in a batch of one"),
            (dict(seq_idx=torch.zeros(T)), r"seq_idx: expected shape \(B, T\)"),
        ]:
            with pytest.raises(ValueError, match=message):
                step(model, batch | more, tmp_path, backprop="chunked", chunk_size=4)
        one = make_batch("plain", 1)
        for offsets in ([0, 3, 7], [0, 7, 3, T]):
            with pytest.raises(ValueError, match="cu_seq_lens_q: expected offsets that rise from 0 to 23"):
                step(model, one | dict(cu_seq_lens_q=torch.tensor(offsets)), tmp_path, backprop="chunked", chunk_size=4)

    @pytest.mark.parametrize("architecture", ["gru"], indirect=True)
    def test_losses_of_ones_own(self, model, tmp_path):
        """One that leaves the state out is refused, one that divides by batches told of."""

        class Without(RecurrentTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return model(inputs["input_ids"], labels=inputs["labels"]).loss

        class Scaled(RecurrentTrainer):
            loss_is_scaled_for_ga = False

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.loss_is_scaled_for_ga = False
                self.check_pieces()

        settings = dict(backprop="chunked", chunk_size=4)
        with pytest.raises(ValueError, match="compute_loss: the state did not move on"):
            step(model, make_batch("plain"), tmp_path, trainer=Without, **settings)
        with pytest.raises(ValueError, match="loss_is_scaled_for_ga: "):
            step(model, make_batch("plain"), tmp_path, trainer=Scaled, **settings)

    @pytest.mark.parametrize("architecture", ["gru"], indirect=True)
    def test_int32(self, model, tmp_path):
        batch = {name: x.int() for name, x in make_batch("plain").items()}
        expected = step(model, batch, tmp_path)[1]
        assert distance(step(model, batch, tmp_path, backprop="chunked", chunk_size=4)[1], expected) < 1e-5

    def test_transformers_own_arguments_have_none(self, tmp_path):
        model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
        trainer = make_trainer(model, tmp_path, arguments=TrainingArguments)
        assert not trainer.in_pieces and not trainer.streams
