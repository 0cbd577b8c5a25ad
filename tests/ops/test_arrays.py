"""Memory of large tensors is used again, and never while anything still reads it."""

import gc
import threading

import torch

from hf_rnn_kernels import arrays

LARGE = (2**23 + 5,)  # floats: a little over 32 MiB


def test_memory_comes_back_when_the_last_tensor_is_gone():
    first = arrays.empty(*LARGE)
    address = first.data_ptr()
    view = first[10:20].view(2, 5)
    del first
    second = arrays.empty(*LARGE)
    assert second.data_ptr() != address  # a view is still there
    del view
    third = arrays.empty(2**23 + 9)  # another length, in as many pages
    assert third.data_ptr() == address
    assert third.shape == (2**23 + 9,) and third.dtype == torch.float32


def test_a_graph_keeps_what_it_needs():
    x = arrays.empty(*LARGE).fill_(3.0).requires_grad_()
    y = x * x
    address = x.data_ptr()
    leaf, x = x, None
    y.sum().backward()
    assert leaf.data_ptr() == address and (leaf.grad == 6).all()


def kept() -> int:
    gc.collect()
    return sum(buffer.nbytes for buffer in arrays._spare)


def test_little_is_kept_and_what_is_in_use_now_comes_first():
    """Also when lengths vary: old sizes make room."""
    tensors = [arrays.empty(2**26) for _ in range(3)]  # 256 MiB each, never touched
    assert len({t.data_ptr() for t in tensors}) == 3
    del tensors
    assert kept() <= arrays._KEPT
    for n in range(12):
        arrays.empty(2**23 + n * 2**21)
        assert kept() <= arrays._KEPT
    address = arrays.empty(2**24 + 7).data_ptr()
    assert arrays.empty(2**24 + 7).data_ptr() == address
    arrays._spare.clear()


def test_many_threads():
    wrong = []

    def work(value):
        for _ in range(20):
            x = arrays.empty(*LARGE)
            x[:1000] = value
            if not (x[:1000] == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
