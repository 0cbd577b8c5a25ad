"""Streams: what rows read, what they learn from, and that state and place are part of a checkpoint."""

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from runs import At, make_trainer, same, stop
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import hf_rnn
from hf_rnn import RecurrentCache, RecurrentTrainer, RecurrentTrainingArguments
from hf_rnn.tasks.evaluation import stream_loss
from hf_rnn_trainers.base.streams import OpenStreams, Streams

DOCUMENTS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


def make_documents(lengths):
    """Every token another, so that nothing can be mistaken."""
    bounds = np.append(0, np.cumsum(lengths)).tolist()
    return Dataset.from_dict({"input_ids": [list(range(a, b)) for a, b in pairwise(bounds)]})


def rows_of(streams, rows, length):
    """Per row: its tokens, targets and positions, padding left out."""
    items = list(streams) if isinstance(streams, OpenStreams) else [streams[i] for i in range(len(streams))]
    assert len(items) % rows == 0
    found = [dict(input_ids=[], labels=[], position_ids=[]) for _ in range(rows)]
    for number, item in enumerate(items):
        assert all(len(x) == length for x in item.values()) and torch.equal(item["labels"], item["shift_labels"])
        step = items[number // rows * rows : (number // rows + 1) * rows]
        assert len({tuple(other) for other in step}) == 1, "what batches are collated of"
        real = item.get("attention_mask", torch.ones(length)).bool()
        assert real.long().diff().le(0).all() and (item["labels"][~real] == -100).all()
        for name, row in found[number % rows].items():
            row += item[name][real].tolist() if name in item else []
    return found


class TestLayout:
    @settings(max_examples=60, deadline=None)
    @given(lengths=DOCUMENTS, rows=st.integers(1, 4), length=st.integers(1, 7), reset=st.booleans())
    def test_of_known_length(self, lengths, rows, length, reset):
        total = sum(lengths)
        documents = make_documents(lengths)
        if total < 2 * rows:
            with pytest.raises(ValueError, match=f"stream: {total} tokens are too few for {rows} rows"):
                Streams(documents, rows, length, reset)
            return
        starts = set(np.append(0, np.cumsum(lengths)).tolist())
        found = rows_of(Streams(documents, rows, length, reset), rows, length)
        assert [token for row in found for token in row["input_ids"]] == list(range(total))
        for number, row in enumerate(found):
            first, last = number * total // rows, (number + 1) * total // rows
            assert row["input_ids"] == list(range(first, last))
            skipped = starts if reset else {total}
            assert row["labels"] == [-100 if t in skipped else t for t in range(first + 1, last + 1)]
            begun = [max(s for s in starts | {first} if first <= s <= t) for t in range(first, last)]
            positions = [t - s for t, s in zip(range(first, last), begun, strict=True)]
            assert row["position_ids"] == (positions if reset else [])

    @settings(max_examples=60, deadline=None)
    @given(lengths=DOCUMENTS, rows=st.integers(1, 4), length=st.integers(1, 7), reset=st.booleans())
    def test_one_after_another(self, lengths, rows, length, reset):
        """Each document once, whole, in one row; a row takes the next one there is when it needs more."""
        documents = make_documents(lengths)
        streams = OpenStreams(documents.to_iterable_dataset(), rows, length, reset)
        left = iter(lengths)
        if not all(self.has_two(left) for _ in range(rows)):
            with pytest.raises(ValueError, match="the documents end before"):
                list(streams)
            return
        found = rows_of(streams, rows, length)
        read = [row["input_ids"] for row in found]
        assert sorted(token for row in read for token in row) == list(range(sum(lengths)))
        starts = set(np.append(0, np.cumsum(lengths)).tolist())
        for row in found:
            ids = row["input_ids"]
            assert all(b == a + 1 or b in starts for a, b in pairwise(ids))
            assert row["labels"] == [-100 if reset and t in starts else t for t in ids[1:]] + [-100] * bool(ids)
            if reset:
                assert all((p == 0) == (t in starts) for t, p in zip(ids, row["position_ids"], strict=True))

    def has_two(self, lengths):
        """Whether a row finds so many tokens among the lengths that are left."""
        size = 0
        while size < 2 and (more := next(lengths, None)) is not None:
            size += more
        return size >= 2

    def test_of_files(self, tmp_path):
        """Saved, concatenated, in another order: read from where they lie, not copied."""
        a, b = make_documents([3, 4]), make_documents([5])
        concatenate_datasets([a, b]).save_to_disk(str(tmp_path / "saved"))
        documents = load_from_disk(str(tmp_path / "saved"))
        assert rows_of(Streams(documents, 1, 4), 1, 4)[0]["input_ids"] == [*range(7), *range(5)]
        turned = rows_of(Streams(documents.select([2, 0]), 1, 4), 1, 4)[0]["input_ids"]
        assert turned == [*range(5), *range(3)]

    @pytest.mark.parametrize("known", [True, False])
    def test_labels_of_ones_own(self, known):
        """As models take them, each that of the token before; two documents that windows cut."""
        ids, labels = [[1, 2, 3], [4, 5, 6, 7]], [[-100, -100, 8], [-100, 9, -100, 8]]
        documents = Dataset.from_dict(dict(input_ids=ids, labels=labels))
        streams = Streams(documents, 1, 2) if known else OpenStreams(documents.to_iterable_dataset(), 1, 2)
        found = rows_of(streams, 1, 2)[0]
        assert found["input_ids"] == [*range(1, 8)] and found["labels"] == [-100, 8, -100, 9, -100, 8, -100]
        documents = Dataset.from_dict(dict(input_ids=ids, labels=[[0], [0]]))
        with pytest.raises(ValueError, match="stream: expected as many labels as input_ids"):
            list(Streams(documents, 1, 2) if known else OpenStreams(documents.to_iterable_dataset(), 1, 2))

    @pytest.mark.parametrize("documents, message", [
        (Dataset.from_dict({"text": ["a"]}), r"stream: expected a column input_ids .* got \['text'\]"),
        (Dataset.from_dict({"input_ids": [[1, 2, 3], None]}), "stream: expected token ids in each row"),
        (Dataset.from_dict({"input_ids": [[1, None, 3]]}), "stream: expected token ids in each row"),
        (Dataset.from_dict({"input_ids": [[1.0, 2.0]]}), "stream: expected lists of token ids in input_ids"),
        (Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [1]}), "stream: expected lists of token ids in labels"),
        (Dataset.from_dict({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 0]]}), "attention_mask: expected doc"),
        (Dataset.from_dict({"input_ids": [[1, 2, 3]]}).with_transform(dict), "stream: a transform of its rows"),
    ])  # fmt: skip
    def test_refusals(self, documents, message):
        with pytest.raises(ValueError, match=message):
            Streams(documents, 1, 4)

    def test_other_kinds(self):
        with pytest.raises(TypeError, match=r"stream: expected a datasets\.Dataset .* got a list"):
            Streams([{"input_ids": [1, 2]}], 1, 4)
        padded = Dataset.from_dict({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 0]]}).to_iterable_dataset()
        with pytest.raises(ValueError, match="attention_mask: expected documents without padding"):
            list(OpenStreams(padded, 1, 4))
        reading = OpenStreams(make_documents([9]).to_iterable_dataset(), 1, 4)
        with pytest.raises(ValueError, match="dataloader_num_workers: .* one reader"):
            list(DataLoader(reading, num_workers=2, multiprocessing_context="fork"))


class TestTraining:
    @pytest.mark.parametrize("reset", [True, False])
    @pytest.mark.parametrize(
        "pieces", [{}, dict(backprop="chunked", chunk_size=4), dict(backprop="truncated", chunk_size=3)]
    )
    def test_against_a_loop(self, reset, pieces, tmp_path):
        """Three steps of two accumulated batches: state and loss of each row as one reads documents by hand."""
        options = pieces or dict(backprop="full", chunk_size=None)
        trainer = make_trainer(
            tmp_path, "stream", max_steps=3, save_strategy="no", reset_at_documents=reset, optim="sgd",
            learning_rate=0.5, max_grad_norm=0.0, lr_scheduler_type="constant", **options,
        )  # fmt: skip
        trainer.model.model.layers[0].dropout.p = trainer.model.model.dropout.p = 0.0
        model, documents = hf_rnn.GRUForCausalLM(trainer.model.config), trainer.train_dataset["input_ids"]
        model.eval().load_state_dict(trainer.model.state_dict())
        trainer.train()

        rows, length, size = 2, 6, pieces.get("chunk_size", 6)
        stream = torch.tensor([token for document in documents for token in document])
        starts = np.append(0, np.cumsum([len(document) for document in documents]))
        per_row = -(-len(stream) // rows)
        states = [RecurrentCache(1) for _ in range(rows)]
        for first in range(0, 36, 12):
            model.zero_grad()
            losses = []
            for window in (first, first + length):
                for row in range(rows):
                    states[row].detach()
                    for at in range(window, window + length):
                        place = row * per_row + at
                        if pieces.get("backprop") == "truncated" and (at - window) % size == 0:
                            states[row].detach()
                        if reset and place in starts:
                            states[row] = RecurrentCache(1)
                        logits = model(stream[None, place : place + 1], past_key_values=states[row]).logits[:, 0]
                        if not (reset and place + 1 in starts):
                            target = stream[place + 1 : place + 2]
                            losses.append(torch.nn.functional.cross_entropy(logits, target))
            torch.stack(losses).mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.5 * (0.0 if p.grad is None else p.grad)
        for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_evaluation_does_not_disturb(self, tmp_path):
        """It has a state of its own, and the mean over all tokens."""
        quiet = make_trainer(tmp_path / "a", "stream", save_strategy="no")
        quiet.train()
        settings = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=1, save_strategy="no")
        evaluated = make_trainer(tmp_path / "b", "stream", **settings)
        evaluated.train()
        assert same(quiet, evaluated)

    @pytest.mark.parametrize("unknown_length", [True, False])
    def test_evaluation_is_of_one_stream(self, unknown_length, tmp_path):
        settings = dict(per_device_eval_batch_size=1, reset_at_documents=False, stream_length=5)
        trainer = make_trainer(tmp_path, "stream", unknown_length=unknown_length, **settings)
        documents = trainer.eval_dataset["input_ids"]
        stream = torch.tensor([token for document in documents for token in document])
        expected = stream_loss(trainer.model, stream) / (len(stream) - 1)
        data = trainer.eval_dataset.to_iterable_dataset() if unknown_length else None
        assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)

    def test_an_epoch_starts_from_the_initial_state(self, tmp_path):
        """Where documents do not: with nothing learned, its loss is that of the first."""
        settings = dict(reset_at_documents=False, learning_rate=0.0, gradient_accumulation_steps=1, stream_length=66)
        trainer = make_trainer(tmp_path, "stream", save_strategy="no", max_steps=2, **settings)
        trainer.model.model.layers[0].dropout.p = trainer.model.model.dropout.p = 0.0
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 2 and losses[0] == losses[1]

    def test_a_bad_step_leaves_the_state(self, tmp_path):
        """A skipped one, whose state is not finite."""
        found = []

        class Bad(RecurrentTrainer):
            def training_step(self, model, *args):
                weight, before = model.model.embed_tokens.weight.data, self.carried
                bad = self.state.global_step == 1
                kept = weight.clone()
                if bad:
                    weight.fill_(float("nan"))
                loss = super().training_step(model, *args)
                weight.copy_(kept)
                found.append((bad, self.carried is before))
                return loss

        make_trainer(tmp_path, "stream", Bad, max_skipped_steps=1, max_steps=3, save_strategy="no").train()
        assert found == [(False, False)] * 2 + [(True, True)] * 2 + [(False, False)] * 2

    def test_windows_without_targets_are_read(self, tmp_path):
        """A long prompt that is no target: the state is what it is after all of it."""
        ids = list(range(40))
        documents = Dataset.from_dict(dict(input_ids=[ids], labels=[[-100] * 30 + ids[30:]]))
        settings = dict(stream_length=8, chunk_size=8, gradient_accumulation_steps=1, per_device_train_batch_size=1)
        settings |= dict(max_steps=5, learning_rate=0.0, save_strategy="no")
        trainer = make_trainer(tmp_path, "stream", **settings)
        trainer.model.model.layers[0].dropout.p = trainer.model.model.dropout.p = 0.0
        trainer.train_dataset = documents
        trainer.train()
        expected = trainer.model.eval()(torch.tensor([ids]), use_cache=True).past_key_values
        for a, b in zip(trainer.carried.states[0], expected.states[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestResume:
    def test_the_state_is_needed_and_kept(self, tmp_path):
        straight = make_trainer(tmp_path / "a", "stream", save_steps=4)
        straight.train()
        file = tmp_path / "a/checkpoint-4/stream_state_0.safetensors"
        assert {len(x) for x in load_file(file).values()} == {2}
        resumed = make_trainer(tmp_path / "b", "stream", save_strategy="no")
        resumed._restore = lambda checkpoint: None
        resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))
        assert not same(straight, resumed), "without it the run is another"

    @pytest.mark.parametrize(
        "changed, message",
        [
            (dict(per_device_train_batch_size=3), "rows would not go on"),
            (dict(stream_length=5, chunk_size=5), "stream_length would not go on"),
            (dict(gradient_accumulation_steps=1), "batches would not go on"),
            (dict(reset_at_documents=False), "reset_at_documents would not go on"),
            (dict(stream=False, stream_length=None, chunk_size=2), "is of streams; expected stream=True"),
        ],
    )
    def test_other_rows_are_refused(self, changed, message, tmp_path):
        make_trainer(tmp_path, "stream", callbacks=[At(4, stop)], save_strategy="no").train()
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, "stream", save_strategy="no", **changed).train(resume_from_checkpoint=True)

    def test_a_run_without_streams_has_no_state(self, tmp_path):
        make_trainer(tmp_path, callbacks=[At(2, stop)], save_strategy="no").train()
        with pytest.raises(ValueError, match="has no state of a stream"):
            make_trainer(tmp_path, "stream", save_strategy="no").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(stream_length=0), "stream_length: expected at least 1 token, got 0"),
        (dict(backprop="chunked", chunk_size=600), "chunk_size: expected at most stream_length=512 tokens, got 600"),
        (dict(auto_find_batch_size=True), "auto_find_batch_size: "),
        (dict(ignore_data_skip=True), "ignore_data_skip: "),
        (dict(dataloader_drop_last=True), "dataloader_drop_last: "),
        (dict(gradient_checkpointing=True), "gradient_checkpointing: "),
        (dict(train_sampling_strategy="group_by_length"), "train_sampling_strategy: a stream has one order"),
        (dict(accelerator_config={"split_batches": True}), "accelerator_config: split_batches"),
        (dict(compute_metrics=len), "compute_metrics: "),
        (dict(stream=False, stream_length=9), "stream_length: only with stream=True"),
        (dict(stream=False, reset_at_documents=False), "reset_at_documents: only with stream=True"),
    ],
)
def test_arguments(settings, message, tmp_path):
    model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    compute_metrics = settings.pop("compute_metrics", None)
    common = dict(output_dir=str(tmp_path), stream=True, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=message):
        args = RecurrentTrainingArguments(**common | settings)
        RecurrentTrainer(model, args, train_dataset=make_documents([100]), compute_metrics=compute_metrics)


def test_predictions_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, "stream")
    with pytest.raises(ValueError, match="predict: a stream's logits are as many as its tokens"):
        trainer.predict(trainer.train_dataset)


def test_a_collator_is_refused(tmp_path):
    model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    args = RecurrentTrainingArguments(str(tmp_path), stream=True, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="data_collator: a stream's windows are all of one length"):
        RecurrentTrainer(model, args, data_collator=list, train_dataset=make_documents([100]))
