"""Connectionist temporal classification: every alignment by hand, transformers' conventions, streams, bad labels."""

import itertools

import pytest
import torch
from conftest import make_head

import hf_rnn


def collapsed(path, blank):
    """Repeated labels once, then without blanks."""
    return [label for label, _ in itertools.groupby(path) if label != blank]


def by_hand(logits, labels, blank):
    """-log of the sum over all paths (V^T of them) that collapse to the labels; logits (T, V)."""
    log_probabilities = logits.double().log_softmax(-1)
    paths = itertools.product(range(logits.shape[1]), repeat=len(logits))
    fitting = [path for path in paths if collapsed(path, blank) == labels]
    sums = [sum(log_probabilities[t, label] for t, label in enumerate(path)) for path in fitting]
    return -torch.stack(sums).logsumexp(0)


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("inputs", ["tokens", "features"])
def test_loss_over_all_alignments(inputs, blank):
    """In float64, of unequal lengths, padded on either side and in between; so are labels, with -100 or the blank."""
    settings = dict(vocab_size=4, pad_token_id=blank, bos_token_id=None, eos_token_id=None)
    if inputs == "features":
        settings |= dict(num_input_features=2, patch_size=2)
    model = make_head("gru", "ForCTC", num_hidden_layers=1, **settings).double()
    steps = 5 if inputs == "tokens" else 9  # 5 patches
    x = torch.randn(3, steps, 2).double() if inputs == "features" else torch.randint(0, 4, (3, steps))
    mask = torch.ones(3, steps).long()
    mask[1, : steps // 2], mask[2, -(steps // 2) :] = 0, 0
    if inputs == "tokens":
        mask[2, 1] = 0
    others = [label for label in range(4) if label != blank]
    rows = [[others[0], others[0], others[1]], [others[2]], []]
    labels = torch.tensor([rows[0] + [-100], [-100, *rows[1], blank, -100], [-100] * 4])
    name = {"tokens": "input_ids", "features": "input_features"}[inputs]
    output = model(**{name: x}, attention_mask=mask, labels=labels)
    alone = [
        by_hand(model(**{name: x[row, None][:, mask[row].bool()]}).logits[0], rows[row], blank) for row in range(3)
    ]
    torch.testing.assert_close(output.loss, torch.stack(alone).sum(), rtol=1e-9, atol=1e-9)
    model.config.ctc_loss_reduction = "mean"
    lengths = torch.tensor([3, 1, 1])  # of labels, at least 1
    mean = (torch.stack(alone) / lengths).mean()
    torch.testing.assert_close(model(**{name: x}, attention_mask=mask, labels=labels).loss, mean, rtol=1e-9, atol=1e-9)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_transformers_own_loss():
    """The one that its CTC models call, where this version has it apart."""
    loss_ctc = pytest.importorskip("transformers.loss.loss_ctc")
    model = make_head("lstm", "ForCTC")
    ids, labels = torch.randint(0, 58, (3, 17)), torch.randint(0, 50, (3, 6))
    labels[1, 3:] = -100
    lengths = torch.tensor([17, 12, 9])
    mask = (torch.arange(17) < lengths[:, None]).long()
    output = model(ids, attention_mask=mask, labels=labels)
    expected = loss_ctc.ForCTCLoss(output.logits, labels, lengths, blank_token_id=58, reduction="sum")
    torch.testing.assert_close(output.loss, expected)


def test_too_short_for_its_labels():
    """An infinite loss, or none, as `ctc_zero_infinity` says."""
    ids, labels = torch.randint(0, 58, (2, 3)), torch.randint(0, 50, (2, 5))
    labels[1, 1:] = -100
    assert make_head("gru", "ForCTC")(ids, labels=labels).loss.isinf()
    model = make_head("gru", "ForCTC", ctc_zero_infinity=True)
    torch.testing.assert_close(model(ids, labels=labels).loss, model(ids[1:], labels=labels[1:]).loss)


def test_streamed(ids):
    """Logits of a stream as it comes, its state carried."""
    settings = dict(num_input_features=4, patch_size=2)
    model, x = make_head("minlstm", "ForCTC", **settings), torch.randn(2, 24, 4)
    whole, state, parts = model(input_features=x).logits, None, []
    for piece in x.split([2, 10, 12], 1):
        output = model(input_features=piece, cache=state, use_cache=True)
        state = output.cache
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_learns_to_transcribe():
    """Bumps of three kinds in noise, at any place: their order is said, the places are not."""
    torch.manual_seed(0)
    settings = dict(vocab_size=4, pad_token_id=0, bos_token_id=None, eos_token_id=None, num_input_features=3)
    model = hf_rnn.MinGRUForCTC(hf_rnn.MinGRUConfig(hidden_size=32, num_hidden_layers=1, **settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        x, labels = 0.1 * torch.randn(16, 20, 3), torch.randint(1, 4, (16, 3))
        places = torch.rand(16, 20).argsort(1)[:, :3].sort(1).values
        x[torch.arange(16)[:, None], places, labels - 1] += 1
        output = model(input_features=x, labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    found = [collapsed(row, 0) for row in output.logits.argmax(-1).tolist()]
    right = sum(a == b for a, b in zip(found, labels.tolist(), strict=True))
    assert right >= 12, f"{right} of 16"


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(labels=torch.full((3, 4), 61)), IndexError, r"labels: expected ids in \[0, 61\).*got 61"),
        (dict(labels=torch.full((3, 4), -1)), IndexError, "labels: expected ids .*got -1"),
        (dict(labels=torch.zeros(3, 4)), TypeError, "labels: expected integer"),
        (dict(labels=torch.zeros(3).long()), ValueError, r"labels: expected shape \(B, L\) with B = 3, got \(3,\)"),
        (dict(labels=torch.zeros(2, 4).long()), ValueError, r"labels: expected shape \(B, L\) with B = 3, got \(2, 4"),
        (
            dict(labels=torch.zeros(3, 4).long(), position_ids=torch.arange(17)[None]),
            ValueError,
            "position_ids: .* one sequence a row",
        ),
    ],
)
def test_wrong_labels(ids, arguments, error, message):
    with pytest.raises(error, match=message):
        make_head("gru", "ForCTC")(ids, **arguments)


@pytest.mark.parametrize("blank", [None, 61, -1])
def test_a_blank_is_needed(blank):
    with pytest.raises(ValueError, match="pad_token_id: expected the blank of CTC"):
        make_head("gru", "ForCTC", pad_token_id=blank)
