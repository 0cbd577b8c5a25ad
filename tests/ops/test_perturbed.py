"""Many perturbed copies of a weight in one pass, against each copy written out."""

import pytest
import torch
from conftest import ARCHITECTURES, relative_error

import hf_rnn_kernels
from hf_rnn.layers import CausalConv
from hf_rnn_kernels import Perturbed, SequenceLayout, lstm_scan, perturbed_embedding, perturbed_linear
from hf_rnn_kernels.perturbed.op import _linear
from hf_rnn_kernels.recurrent_scan.reference import CELLS

SCANS = {cell: (getattr(hf_rnn_kernels, f"{cell}_scan"), known.gates, known.states) for cell, known in CELLS.items()}


def factors(members, *shape, rank=1, dtype=torch.float64):
    return (
        0.3 * torch.randn(members, *shape[:-1], rank, dtype=dtype),
        torch.randn(members, *shape[:-2], shape[-1], rank, dtype=dtype),
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    "members, rows, inputs, outputs, rank",
    [(1, (3,), 5, 7, 1), (4, (2, 9), 33, 65, 2), (3, (1, 1), 8, 8, 3), (6, (2, 70), 130, 51, 1)],
)
def test_linear(members, rows, inputs, outputs, rank, dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(members * rows[0], *rows[1:], inputs, dtype=dtype)
    weight, bias = torch.randn(outputs, inputs, dtype=dtype), torch.randn(members, outputs, dtype=dtype)
    left, right = factors(members, outputs, inputs, rank=rank)
    y = perturbed_linear(x, weight, left, right, bias)
    copies = weight.double() + left @ right.transpose(1, 2)
    expected = [
        torch.nn.functional.linear(part.double(), copy, b)
        for part, copy, b in zip(x.chunk(members), copies, bias.double(), strict=True)
    ]
    assert y.dtype == dtype
    assert relative_error(y, torch.cat(expected)) < tolerance


def test_embedding_and_its_head():
    torch.manual_seed(0)
    weight, (left, right) = torch.randn(11, 6, dtype=torch.float64), factors(3, 11, 6, rank=2)
    ids = torch.randint(0, 11, (6, 5))
    copies = weight + left @ right.transpose(1, 2)
    expected = torch.cat([copy[part] for copy, part in zip(copies, ids.chunk(3), strict=True)])
    y = perturbed_embedding(ids, weight, left, right)
    torch.testing.assert_close(y, expected)
    head = torch.cat([part @ copy.T for copy, part in zip(copies, y.chunk(3), strict=True)])
    torch.testing.assert_close(perturbed_linear(y, weight, left, right), head)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "members, rows, time, heads, size, rank, reverse",
    [(3, 2, 9, 2, 5, 2, False), (5, 1, 1, 1, 8, 1, False), (1, 3, 4, 1, 7, 1, False), (2, 2, 9, 2, 5, 2, True)],
)
@pytest.mark.parametrize("cell", SCANS)
def test_scans(cell, members, rows, time, heads, size, rank, reverse, dtype, tolerance):
    torch.manual_seed(0)
    scan, gates, states = SCANS[cell]
    n = members * rows
    x = torch.randn(n, time, heads * gates * size, dtype=dtype)
    weight = torch.randn(heads, gates * size, size, dtype=dtype)
    bias = torch.randn(heads * gates * size, dtype=dtype)
    initial = [torch.randn(n, heads * size, dtype=dtype).abs() for _ in range(states)]
    mask = torch.rand(n, time) > 0.2
    left, right = factors(members, heads, gates * size, size, rank=rank)
    offset = torch.randn(members, *bias.shape, dtype=dtype)
    h, last = scan(
        x,
        Perturbed.of_low_rank(weight, left, right, rows),
        Perturbed.of_offset(bias, lambda: offset, members, rows),
        *initial,
        layout=SequenceLayout(mask, reverse=reverse),
    )
    for m in range(members):
        part = slice(m * rows, (m + 1) * rows)
        copy = weight.double() + left[m] @ right[m].transpose(1, 2)
        exact, exact_last = scan(
            x[part].double(),
            copy,
            (bias + offset[m]).double(),
            *(s[part].double() for s in initial),
            layout=SequenceLayout(mask[part], reverse=reverse),
        )
        assert relative_error(h[part], exact) < tolerance
        for a, b in zip(*((s if isinstance(s, tuple) else (s,)) for s in (last, exact_last)), strict=True):
            assert relative_error(a[part], b) < tolerance


@pytest.mark.parametrize("settings", [{}, dict(tie_word_embeddings=True), dict(num_heads=2)])
def test_models(make_model, architecture, settings):
    """Every parameter perturbed, in one forward pass: each member's outputs are those of the model it stands for."""
    if architecture in ("mingru", "minlstm"):
        settings = {name: value for name, value in settings.items() if name != "num_heads"}
    model, members, rows = make_model(**settings), 3, 2
    ids = torch.randint(0, 58, (rows, 12))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    new, copies = {}, [{} for _ in range(members)]
    for name, p in model.named_parameters():
        if p.dim() > 1:
            left, right = factors(members, *p.shape, dtype=torch.float32)
            new[name] = Perturbed.of_low_rank(p, left / 10, right, rows)
        else:
            offset = 0.1 * torch.randn(members, *p.shape)
            new[name] = Perturbed.of_offset(p, lambda offset=offset: offset, members, rows)
        for copy, value in zip(copies, new[name].copies(), strict=True):
            copy[name] = value
    with torch.no_grad():
        inputs = dict(attention_mask=mask.repeat(members, 1))
        actual = torch.func.functional_call(model, new, (ids.repeat(members, 1),), inputs)
        one_by_one = [torch.func.functional_call(model, copy, (ids,), dict(attention_mask=mask)) for copy in copies]
    assert relative_error(actual.logits, torch.cat([o.logits for o in one_by_one])) < 1e-5
    assert relative_error(one_by_one[0].logits, one_by_one[1].logits) > 0.1


def test_some_parameters_frozen(architecture, make_model):
    """Whichever are perturbed alone, none is passed over: adapters and partly frozen models."""
    model = make_model()
    ids = torch.randint(0, 58, (2, 7))
    for name, p in model.named_parameters():
        offset = 0.3 * torch.randn(3, *p.shape)
        new = Perturbed.of_offset(p, lambda offset=offset: offset, 3, 2)
        if p.dim() > 1:
            new = Perturbed.of_low_rank(p, *(0.6 * f for f in factors(3, *p.shape, dtype=torch.float32)), 2)
        with torch.no_grad():
            actual = torch.func.functional_call(model, {name: new}, (ids.repeat(3, 1),)).logits
            expected = [torch.func.functional_call(model, {name: copy}, (ids,)).logits for copy in new.copies()]
        assert relative_error(actual, torch.cat(expected)) < 1e-5, name


def test_unknown_functions_of_several_members_are_refused():
    weight = Perturbed.of_offset(torch.zeros(4, 3, 2), lambda: torch.ones(2, 4, 3, 2), 2, 1)
    with pytest.raises(TypeError, match="several members"):
        torch.nn.functional.conv1d(torch.zeros(2, 3, 5), weight)


def test_neurips_blocks():
    config, model_class, _ = ARCHITECTURES["xlstm"]
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_heads=2, block_layout="neurips", slstm_at=[1])
    tokens = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = model_class(config(**sizes, **tokens, use_bias=True)).double().eval()
    ids, new = torch.randint(0, 31, (2, 9)), {}
    for name, p in model.named_parameters():
        if p.dim() > 1:
            new[name] = Perturbed.of_low_rank(p, *(0.3 * f for f in factors(3, *p.shape)), 2)
        else:
            new[name] = Perturbed.of_offset(p, lambda p=p: torch.full((3, *p.shape), 0.1, dtype=p.dtype), 3, 2)
    with torch.no_grad():
        actual = torch.func.functional_call(model, new, (ids.repeat(3, 1),)).logits
        for m in range(3):
            copy = {name: p.copies()[m] for name, p in new.items()}
            expected = torch.func.functional_call(model, copy, (ids,)).logits
            assert relative_error(actual[2 * m : 2 * m + 2], expected) < 1e-12


def test_one_member_works_in_any_module():
    """What has no handling of its own gets the weight written out."""
    torch.manual_seed(0)
    modules = [torch.nn.Conv1d(3, 4, 2), torch.nn.GRU(4, 5), torch.nn.Bilinear(5, 5, 2), torch.nn.GroupNorm(2, 4)]
    inputs = [(torch.randn(2, 3, 6),), (torch.randn(6, 2, 4),), (torch.randn(7, 5),) * 2, (torch.randn(3, 4, 5),)]
    for module, arguments in zip(modules, inputs, strict=True):
        offsets = {name: torch.randn(1, *p.shape) for name, p in module.named_parameters()}
        new = {name: Perturbed.of_offset(p, lambda o=offsets[name]: o) for name, p in module.named_parameters()}
        plain = {name: p + offsets[name][0] for name, p in module.named_parameters()}
        with torch.no_grad():
            actual, expected = (torch.func.functional_call(module, p, arguments) for p in (new, plain))
        for a, b in zip(*((o if isinstance(o, tuple) else (o,)) for o in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast():
    torch.manual_seed(0)
    x, layer = torch.randn(4, 300, 64), torch.nn.Linear(64, 96)
    left, right = factors(2, 96, 64, dtype=torch.float32)
    new = {
        "weight": Perturbed.of_low_rank(layer.weight, left, right, 2),
        "bias": Perturbed.of_offset(layer.bias, lambda: torch.ones(2, 96), 2, 2),
    }
    with torch.no_grad():
        exact = torch.func.functional_call(layer, new, (x,))
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.func.functional_call(layer, new, (x,))
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact) < 1e-2


def test_refusals():
    x, weight, (left, right) = torch.randn(4, 5), torch.randn(3, 5), factors(2, 3, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x: expected a multiple of M = 2 rows, got 3"):
        perturbed_linear(x[:3], weight, left, right)
    with pytest.raises(ValueError, match=r"left: expected shape \(M, 3, K\)"):
        perturbed_linear(x, weight, right, right)
    with pytest.raises(ValueError, match=r"right: expected shape \(2, 5, 1\)"):
        perturbed_linear(x, weight, left, left)
    with pytest.raises(ValueError, match=r"bias: expected shape"):
        perturbed_linear(x, weight, left, right, torch.zeros(2))
    with pytest.raises(RuntimeError, match="no_grad"):
        perturbed_linear(x, weight.requires_grad_(), left, right)
    R = Perturbed.of_offset(torch.randn(1, 8, 2), lambda: torch.zeros(2, 1, 8, 2), members=2)
    with pytest.raises(ValueError, match="low rank"):
        lstm_scan(torch.randn(2, 3, 8), R)
    R = Perturbed.of_low_rank(torch.randn(1, 8, 2), *factors(2, 1, 8, 2, dtype=torch.float32))
    with pytest.raises(ValueError, match="multiple of M = 2 sequences, got 3"):
        lstm_scan(torch.randn(3, 3, 8), R)


def test_operator():
    left, right = factors(2, 7, 5, dtype=torch.float32)
    arguments = (torch.randn(2, 3, 5), torch.randn(7, 5), left, right)
    torch.library.opcheck(_linear.operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_convolution_of_one_token():
    """A step of decoding takes another way than a sequence, and each member's own weight as well."""
    torch.manual_seed(0)
    conv = CausalConv(5, 4)
    weights = torch.randn(2, 5, 4)
    x, state = torch.randn(6, 1, 5), torch.randn(6, 3, 5)
    with torch.no_grad():
        conv.bias.copy_(torch.randn(5))
        base = conv.weight.copy_(torch.randn(5, 4)).clone()
        expected = []
        for member, weight in enumerate(weights):
            conv.weight.copy_(base + weight)
            rows = slice(3 * member, 3 * member + 3)
            expected.append(conv(x[rows], state[rows], SequenceLayout())[0])
        perturbed = Perturbed.of_offset(base, lambda: weights, members=2, rows=3)
        y = torch.func.functional_call(conv, {"weight": perturbed, "bias": conv.bias}, (x, state, SequenceLayout()))[0]
    torch.testing.assert_close(y, torch.cat(expected))


def test_convolution_whose_bias_alone_is_perturbed():
    """Also where the compiled loops would be taken."""
    torch.manual_seed(0)
    conv = CausalConv(64, 4)
    torch.nn.init.normal_(conv.weight)
    bias, offsets, x = torch.zeros(64), torch.randn(2, 64), torch.randn(4, 300, 64)
    with torch.no_grad():
        perturbed = Perturbed.of_offset(bias, lambda: offsets, members=2, rows=2)
        y = torch.func.functional_call(conv, {"weight": conv.weight, "bias": perturbed}, (x, None, SequenceLayout()))[0]
        conv.bias.zero_()
        expected = conv(x, None, SequenceLayout())[0] + offsets.repeat_interleave(2, 0)[:, None]
    torch.testing.assert_close(y, expected)
