"""Heads under transformers' names: what each gives, on every architecture, and what it refuses."""

import copy

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, make_head
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import hf_rnn
from hf_rnn.skeleton.configuration_recurrent import HEADS

OTHERS = [head for head in HEADS if head != "ForCausalLM"]
PER_TOKEN = ["ForCTC", "ForMaskedLM", "ForTokenClassification"]
every_head = pytest.mark.parametrize("head", OTHERS)


def scores(output, real=None):
    """What a head says, (B, T, C) or (B, C), of real tokens alone where those are told."""
    logits = torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output.logits
    return logits if real is None or logits.dim() == 2 else logits[real]


def labels_of(head, ids):
    """Labels that fit."""
    rows = torch.arange(len(ids))
    return {
        "ForCTC": {"labels": ids[:, :4] % 50},
        "ForMaskedLM": {"labels": ids.masked_fill(ids > 30, -100)},
        "ForQuestionAnswering": {"start_positions": rows, "end_positions": rows + 3},
        "ForSequenceClassification": {"labels": rows},
        "ForTokenClassification": {"labels": (ids % 5).masked_fill(ids > 50, -100)},
    }[head]


@every_head
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_head_of_every_architecture(architecture, both_ways, head, ids, tmp_path):
    """Saved and loaded by the Auto class the same; padding on either side changes nothing; every weight learns."""
    model = make_head(architecture, head, bidirectional=both_ways)
    expected = scores(model(ids))
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, f"AutoModel{head}").from_pretrained(tmp_path)
    assert type(loaded) is type(model) and torch.equal(scores(loaded(ids)), expected)
    padding, ones = torch.full((3, 5), 58), torch.ones_like(ids)
    for order in (1, -1):
        mask = torch.cat([ones, torch.zeros_like(padding)][::order], 1)
        found = scores(model(torch.cat([ids, padding][::order], 1), attention_mask=mask), mask.bool())
        torch.testing.assert_close(found, scores(model(ids), ones.bool()), rtol=1e-4, atol=1e-4)
    model.train()(ids, **labels_of(head, ids)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("head", [*PER_TOKEN, "ForQuestionAnswering"])
def test_packed_sequences(architecture, both_ways, head, ids):
    model = make_head(architecture, head, bidirectional=both_ways)
    alone = torch.cat([scores(model(row[None])) for row in ids[0].split([5, 3, 9])], 1)
    for packed in (
        dict(position_ids=torch.cat([torch.arange(n) for n in (5, 3, 9)])[None]),
        dict(cu_seq_lens_q=torch.tensor([0, 5, 8, 17])),
    ):
        torch.testing.assert_close(scores(model(ids[:1], **packed)), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification"])
def test_labels_may_be_a_part_of_a_tensor(head, ids):
    model, labels = make_head("gru", head), torch.stack([ids % 5, ids], 1)
    assert torch.equal(model(ids, labels=labels[:, 0]).loss, model(ids, labels=labels[:, 0].contiguous()).loss)


@pytest.mark.parametrize("head", PER_TOKEN)
def test_state_carried_on(head, ids):
    """Labels of a stream, as it comes."""
    model = make_head("lstm", head)
    whole, state, parts = model(ids).logits, None, []
    for piece in ids.split([7, 1, 9], 1):
        output = model(piece, cache=state)
        state = output.cache
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_masked_lm_is_the_language_models_head(architecture, ids, tmp_path):
    """One checkpoint, soft caps of logits included; tied weights stay tied; the vocabulary grows."""
    causal = make_head(architecture, "ForCausalLM", tie_word_embeddings=True)
    causal.save_pretrained(tmp_path)
    masked = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(masked(ids).logits, causal(ids).logits)
    assert masked.lm_head.weight is masked.model.embed_tokens.weight
    masked.resize_token_embeddings(64)
    assert masked(ids).logits.shape == (3, 17, 64)


@every_head
def test_a_new_head_on_a_language_model(head, ids, tmp_path):
    causal = make_head("minlstm", "ForCausalLM")
    causal.save_pretrained(tmp_path)
    model = getattr(transformers, f"AutoModel{head}").from_pretrained(tmp_path, num_labels=7)
    assert torch.equal(model.model(ids).last_hidden_state, causal.model(ids).last_hidden_state)
    with pytest.raises(ValueError, match="num_input_features: |weights are missing, 'model.embed_features"):
        type(model).from_pretrained(tmp_path, num_input_features=5)


def test_losses(ids):
    """By hand: labels are not shifted, -100 and positions outside are ignored, sums are divided by what is told."""
    for head in ("ForMaskedLM", "ForTokenClassification"):
        model, labels = make_head("gru", head), labels_of(head, ids)["labels"]
        output = model(ids, labels=labels)
        total = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        torch.testing.assert_close(output.loss, total / (labels != -100).sum())
        torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=7).loss, total / 7)
        torch.testing.assert_close(model(ids, labels=labels.int()).loss, output.loss)
    model = make_head("gru", "ForQuestionAnswering")
    start, end = torch.tensor([0, 16, 40]), torch.tensor([5, 5, 5])
    output = model(ids, start_positions=start, end_positions=end[:, None])
    first = F.cross_entropy(output.start_logits[:2], start[:2])
    torch.testing.assert_close(output.loss, (first + F.cross_entropy(output.end_logits, end)) / 2)
    with pytest.raises(ValueError, match="start_positions, end_positions: expected both"):
        model(ids, start_positions=start)


def test_answers_among_padding(ids):
    """The loss is what the rows' real tokens alone give; positions of no real token are ignored, as -100 is."""
    model, mask = make_head("gru", "ForQuestionAnswering", bidirectional=True), torch.ones_like(ids)
    mask[0, -5:], mask[1, :4], mask[2] = 0, 0, 0
    start, end = torch.tensor([3, 5, 0]), torch.tensor([4, 9, 0])
    model.train()
    loss = model(ids, attention_mask=mask, start_positions=start, end_positions=end).loss
    alone = [
        model(ids[:1, :-5], start_positions=start[:1], end_positions=end[:1]).loss,
        model(ids[1:2, 4:], start_positions=start[1:2] - 4, end_positions=end[1:2] - 4).loss,
    ]
    torch.testing.assert_close(loss, sum(alone) / 2)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for ignored in (-100, -1, 2, 17):  # 2 is padding in the second row
        found = model(
            ids[:2], attention_mask=mask[:2], start_positions=torch.tensor([3, ignored]), end_positions=end[:2]
        )
        both = model(ids[:2], attention_mask=mask[:2], start_positions=torch.tensor([3, 50]), end_positions=end[:2])
        assert torch.equal(found.loss, both.loss)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected one sequence a row"):
        offsets = torch.tensor([0, 5, 17])
        model(ids[:1], cu_seq_lens_q=offsets, start_positions=start[:1], end_positions=end[:1])


@pytest.mark.parametrize("pooling", [None, "last", "mean", "ends"])
def test_pooling(pooling, ids):
    """Against rows alone, without their padding: on either side, in between."""
    model = make_head("minlstm", "ForSequenceClassification", classifier_pooling=pooling)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, -3:], mask[2, 5:9] = 0, 0, 0
    logits = model(ids, attention_mask=mask).logits
    for row, real, found in zip(ids, mask.bool(), logits, strict=True):
        x = model.model(row[real][None]).last_hidden_state[0]
        vector = {"mean": x.mean(0), "ends": torch.cat([x[0], x[-1]])}.get(pooling, x[-1])
        torch.testing.assert_close(found, model.score.weight @ vector, rtol=1e-5, atol=1e-5)
    padded = ids.masked_fill(mask == 0, 58)
    assert torch.equal(model(padded).logits, model(padded, attention_mask=mask).logits), "pad_token_id is padding"
    with pytest.raises(ValueError, match="attention_mask: expected a real token in every row"):
        model(ids, attention_mask=mask * 0)


@pytest.mark.parametrize("pooling", ["mean", "ends"])
def test_pooling_of_whole_sequences_takes_no_state(pooling, ids):
    model = make_head("minlstm", "ForSequenceClassification", classifier_pooling=pooling)
    state = model(ids[:, :9], use_cache=True).cache
    with pytest.raises(ValueError, match=f"cache: classifier_pooling '{pooling}' is of a whole sequence"):
        model(ids[:, 9:], cache=state)


def test_mean_pooling():
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    x[0, 0] = float("nan")  # padding may hold anything
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    pooled = hf_rnn.mean_pooling(x, mask)
    torch.testing.assert_close(pooled, torch.stack([x[0, 1:3].mean(0), x[1].mean(0)]), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(hf_rnn.mean_pooling(x[1:]), x[1:].mean(1))
    many = torch.full((1, 5000, 1), 1.0, dtype=torch.bfloat16)  # a sum that bfloat16 cannot count to
    assert hf_rnn.mean_pooling(many) == 1
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(B, T\) = \(2, 4\), got \(2, 3\)"):
        hf_rnn.mean_pooling(x, mask[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regression_and_several_labels(ids, dtype):
    """As `config.problem_type` says, or as transformers guesses from the labels; they train."""
    for num_labels, problem, labels, loss in [
        (1, None, torch.randn(3), F.mse_loss),
        (1, "regression", torch.randn(3, 1), F.mse_loss),
        (4, "regression", torch.randn(3, 4), F.mse_loss),
        (4, None, torch.rand(3, 4).round(), F.binary_cross_entropy_with_logits),
        (4, "multi_label_classification", torch.rand(3, 4).round(), F.binary_cross_entropy_with_logits),
        (4, "single_label_classification", torch.tensor([0, 3, 1]), F.cross_entropy),
        (4, None, torch.tensor([0, 3, 1]), F.cross_entropy),
    ]:
        model = make_head("mingru", "ForSequenceClassification", num_labels=num_labels, problem_type=problem).to(dtype)
        output = model(ids, labels=labels)
        logits = output.logits.float().view(labels.shape) if num_labels == 1 else output.logits.float()
        torch.testing.assert_close(output.loss.float(), loss(logits, labels), rtol=1e-2, atol=1e-2)
        output.loss.backward()


@pytest.mark.parametrize(
    "head, settings, wrong, error, message",
    [
        ("ForTokenClassification", {}, dict(labels=torch.zeros(3, 16).long()), ValueError, r"labels: .*\(3, 17\)"),
        ("ForTokenClassification", {}, dict(labels=torch.zeros(17, 3).long()), ValueError, r"labels: .*\(3, 17\)"),
        ("ForTokenClassification", {}, dict(labels=torch.full((3, 17), 5)), IndexError, "labels: .*num_labels.*got 5"),
        ("ForTokenClassification", {}, dict(labels=torch.zeros(3, 17)), TypeError, "labels: expected integer"),
        ("ForMaskedLM", {}, dict(labels=torch.zeros(3).long()), ValueError, r"labels: .*\(3, 17\), got \(3,\)"),
        ("ForMaskedLM", {}, dict(labels=torch.full((3, 17), 61)), IndexError, "labels: .*vocab_size.*got 61"),
        ("ForMaskedLM", {}, dict(labels=torch.full((3, 17), -1)), IndexError, "labels: .*got -1"),
        ("ForSequenceClassification", {}, dict(labels=torch.zeros(4).long()), ValueError, r"labels: .*\(3,\).*\(4,\)"),
        ("ForSequenceClassification", {}, dict(labels=torch.tensor([0, 1, 5])), IndexError, "labels: .*num_labels"),
        ("ForSequenceClassification", {}, dict(labels=torch.zeros(3)), ValueError, r"labels: .*\(3, 5\).*multi_label"),
        (
            "ForSequenceClassification",
            dict(problem_type="multi_label_classification"),
            dict(labels=torch.zeros(3, 5).long()),
            TypeError,
            "labels: expected floating numbers, config.problem_type is 'multi_label_classification'",
        ),
        (
            "ForSequenceClassification",
            {},
            dict(labels=torch.zeros(3, 5).index_fill(0, torch.tensor(1), -100)),
            ValueError,
            "labels: expected zeros and ones, .*multi_label_classification'; got -100",
        ),
        (
            "ForSequenceClassification",
            dict(num_labels=1, problem_type="multi_label_classification"),
            dict(labels=torch.zeros(3)),
            ValueError,
            r"labels: expected shape \(3, 1\)",
        ),
        (
            "ForSequenceClassification",
            dict(num_labels=1),
            dict(labels=torch.tensor([0.5, float("nan"), 1])),
            ValueError,
            "labels: expected finite numbers, config.problem_type is 'regression'; got nan",
        ),
        ("ForSequenceClassification", dict(num_labels=1), dict(labels=torch.zeros(3, 3)), ValueError, "labels: .*regr"),
        ("ForSequenceClassification", dict(num_labels=1), dict(labels=torch.zeros(1)), ValueError, "labels: .*regr"),
        (
            "ForQuestionAnswering",
            {},
            dict(start_positions=torch.zeros(2).long(), end_positions=torch.zeros(3).long()),
            ValueError,
            r"start_positions: expected shape \(B,\)",
        ),
        (
            "ForQuestionAnswering",
            {},
            dict(start_positions=torch.zeros(3).long(), end_positions=torch.zeros(3)),
            TypeError,
            "end_positions: expected integers",
        ),
    ],
)
def test_wrong_labels(ids, head, settings, wrong, error, message):
    with pytest.raises(error, match=message):
        make_head("gru", head, **settings)(ids, **wrong)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("head", HEADS)
def test_batches_of_no_tokens(head, shape):
    """No tokens, no logits; a loss of none is that of torch, or an error that says so."""
    model, ids = make_head("mingru", head, num_labels=2), torch.zeros(shape, dtype=torch.long)
    ones, message = torch.zeros(shape[0], dtype=torch.long), "expected none for a batch of no tokens"
    if head == "ForSequenceClassification":
        if not shape[1]:
            with pytest.raises(ValueError, match=r"expected a token at least in every row, got \(B, T\)"):
                model(ids)
            return
        labels, message = {"labels": ones}, None
    elif head == "ForQuestionAnswering":
        labels = {"start_positions": ones, "end_positions": ones}
    elif head == "ForCTC":
        labels = {"labels": ones[:, None]}
    else:
        labels, message = {"labels": ids}, None
    output = model(ids)
    assert all(x.shape[:1] == shape[:1] for x in output.values() if isinstance(x, torch.Tensor))
    if message:
        with pytest.raises(ValueError, match=message):
            model(ids, **labels)
    else:
        loss = model(ids, **labels).loss
        assert loss.isnan()  # a mean of none
        loss.backward()


@every_head
def test_unknown_arguments_and_packing_where_it_means_nothing(head, ids):
    model = make_head("gru", head)
    with pytest.raises(TypeError, match="^atention_mask: no argument of forward"):
        model(ids, atention_mask=ids)
    if head == "ForSequenceClassification":
        with pytest.raises(ValueError, match="position_ids: expected one sequence a row"):
            model(ids, position_ids=torch.arange(17)[None])
    else:
        model(ids, token_type_ids=ids, output_attentions=False)


def test_configs_that_cannot_be():
    for settings, message in [
        (dict(classifier_pooling="max"), "classifier_pooling: expected 'last', 'mean' or 'ends', got 'max'"),
        (dict(ctc_loss_reduction="none"), "ctc_loss_reduction: expected 'sum' or 'mean', got 'none'"),
        (dict(patch_size=4), "patch_size: tokens make no patches"),
        (dict(num_input_features=4, patch_size=0), "patch_size: expected at least 1"),
        (dict(num_input_features=0), "num_input_features: expected 1 to"),
        (dict(problem_type="multi_label"), "problem_type.*expected one of .*, got '?multi_label"),
        (
            dict(residual=False, conv_kernel=0, embedding_size=7, tie_word_embeddings=True),
            "tie_word_embeddings: expected False where embeddings are 7 wide",
        ),
    ]:
        with pytest.raises(Exception, match=message):
            hf_rnn.GRUConfig(**settings)


def test_heads_without_labels_are_refused():
    for config in (hf_rnn.GRUConfig(num_labels=0), hf_rnn.TiRex2Config(num_labels=0)):
        stem = type(config).__name__.removesuffix("Config")
        for head in ("ForTokenClassification", "ForSequenceClassification"):
            if make := getattr(hf_rnn, f"{stem}{head}", None):
                with torch.device("meta"), pytest.raises(ValueError, match="num_labels: expected at least 1"):
                    make(config)


def arguments(folder, **settings):
    defaults = dict(max_steps=2, per_device_train_batch_size=3, report_to="none", use_cpu=True, save_strategy="no")
    return TrainingArguments(output_dir=str(folder), disable_tqdm=True, **defaults | settings)


def rows(head, ids):
    """A dataset of what a head takes."""
    return Dataset.from_dict({"input_ids": ids.tolist(), **{k: x.tolist() for k, x in labels_of(head, ids).items()}})


@every_head
def test_trainer(head, ids, tmp_path):
    """Two steps and an evaluation in its default settings."""
    model, dataset = make_head("mingru", head, num_hidden_layers=1), rows(head, ids)
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, arguments(tmp_path, learning_rate=0.1), train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    assert all(not torch.equal(before[name], x) for name, x in model.state_dict().items() if "initial" not in name)
    assert trainer.evaluate()["eval_loss"] > 0
    predicted = trainer.predict(dataset)
    assert len(predicted.label_ids) == (2 if head == "ForQuestionAnswering" else 3)


@pytest.mark.parametrize(
    "head, settings", [*((head, {}) for head in OTHERS), ("ForCTC", {"ctc_loss_reduction": "mean"})]
)
def test_accumulated_batches_make_the_step_of_a_whole_one(head, settings, ids, tmp_path):
    weights = []
    for size in (3, 1):
        model = make_head("mingru", head, num_hidden_layers=1, **settings)
        options = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0, max_steps=1)
        batches = dict(per_device_train_batch_size=size, gradient_accumulation_steps=3 // size)
        Trainer(model, arguments(tmp_path, **options | batches), train_dataset=rows(head, ids)).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights)


LORA = {
    "ForCTC": dict(modules_to_save=["lm_head"]),
    "ForMaskedLM": {},
    "ForQuestionAnswering": dict(task_type="QUESTION_ANS", exclude_modules=["qa_outputs"]),
    "ForSequenceClassification": dict(task_type="SEQ_CLS"),
    "ForTokenClassification": dict(task_type="TOKEN_CLS", exclude_modules=["score"]),
}


@every_head
def test_lora(head, ids, tmp_path):
    """Without target modules, a new head trained whole beside the adapter and saved with it."""
    model = make_head("gru", head, num_hidden_layers=1, bidirectional=True)
    base, before = copy.deepcopy(model), scores(model(ids))
    adapted = get_peft_model(model, LoraConfig(r=2, **LORA[head]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(input_ids=ids, **labels_of(head, ids)).loss.backward()
        optimizer.step()
    found = scores(adapted.eval()(input_ids=ids))
    assert not torch.allclose(found, before, atol=1e-4)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(scores(PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=ids)), found)


@pytest.mark.parametrize(
    "head",
    [head if head == "ForTokenClassification" else pytest.param(head, marks=pytest.mark.slow) for head in OTHERS],
)
@pytest.mark.parametrize("both_ways", [False, True])
def test_compiled_and_exported(both_ways, head, ids):
    """One graph, padding and loss included (but CTC's, which torch does not trace); a program for any length."""
    torch._dynamo.reset()
    model = make_head("mingru", head, num_hidden_layers=1, use_cache=False, bidirectional=both_ways)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = dict(attention_mask=mask, **{} if head == "ForCTC" else labels_of(head, ids))
    found, expected = compiled(ids, **inputs), model(ids, **inputs)
    if head != "ForCTC":
        torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(scores(found, mask.bool()), scores(expected, mask.bool()))
    dims = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("time", min=2)}
    program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes={"input_ids": dims})
    x = torch.randint(0, 58, (5, 40))
    torch.testing.assert_close(scores(program.module()(input_ids=x)), scores(model(x)))
