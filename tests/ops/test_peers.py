"""Same weights as other people's implementations, same outputs. A missing peer fails: `make test` installs it."""

import pytest
import torch
from minGRU_pytorch.minGRU import minGRU
from minGRU_pytorch.minLSTM import minLSTM

from hf_rnn import MinGRUConfig, MinLSTMConfig
from hf_rnn.models.mingru.modeling_mingru import MinGRU
from hf_rnn.models.minlstm.modeling_minlstm import MinLSTM
from hf_rnn_kernels.layout import SequenceLayout


def mixer(config_class, mixer_class, expansion, **settings):
    config = config_class(
        hidden_size=24,
        block_layout="paper",
        expansion_factor=expansion,
        use_bias=False,
        learned_initial_state=False,
        output_projection=expansion != 1,
        **settings,
    )
    return mixer_class(config).double()


@pytest.mark.parametrize("expansion", [1.0, 2.0])
def test_mingru(expansion):
    peer = minGRU(24, expansion_factor=expansion).double()
    ours = mixer(MinGRUConfig, MinGRU, expansion)
    with torch.no_grad():
        hidden, gate = peer.to_hidden_and_gate.weight.chunk(2)
        ours.in_proj.weight.copy_(torch.cat([gate, hidden]))
        if expansion != 1:
            ours.out_proj.weight.copy_(peer.to_out.weight)
    x = torch.randn(3, 50, 24, dtype=torch.float64)
    expected, state = peer(x, return_next_prev_hidden=True)
    y, (last,) = ours(x, None, SequenceLayout())
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(last, state[:, 0], rtol=0, atol=1e-10)
    more = torch.randn(3, 20, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(more, (last,), SequenceLayout())[0], peer(more, state), rtol=0, atol=1e-10)
    step = more[:, :1]
    torch.testing.assert_close(ours(step, (last,), SequenceLayout())[0], peer(step, state), rtol=0, atol=1e-10)


def test_minlstm():
    """From the empty state; from a carried one the peer adds 0.5 to it (its parallel and sequential modes differ)."""
    peer = minLSTM(24).double()
    ours = mixer(MinLSTMConfig, MinLSTM, 1.0)
    with torch.no_grad():
        hidden, forget, input_ = peer.to_hidden_and_f_i_gate.weight.chunk(3)
        ours.in_proj.weight.copy_(torch.cat([forget, input_, hidden]))
    x = torch.randn(3, 50, 24, dtype=torch.float64)
    y, (last,) = ours(x, None, SequenceLayout())
    torch.testing.assert_close(y, peer(x), rtol=0, atol=1e-10)
    step = torch.randn(3, 1, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(step, (last,), SequenceLayout())[0], peer(step, last[:, None]), rtol=0, atol=1e-10)
