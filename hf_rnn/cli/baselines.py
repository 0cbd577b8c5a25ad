"""What a model's bits per byte are held against: interpolated byte n-grams and lzma, on the same bytes."""

import lzma

import numpy as np


def ngram_bits_per_byte(train: bytes, held_out: bytes, max_order: int = 5) -> list[float]:
    """Bits per byte of Witten-Bell interpolated models of order 0 to `max_order`, counted on `train`.

    p_k(c | context) = (n(context, c) + d(context) p_{k-1}(c)) / (n(context) + d(context)), with d(context) the number
    of different bytes seen after it and p_{-1} = 1/256. The context of the first bytes reaches back into `train`.

    Args:
        max_order: at most 6, so that a context and its byte fit 64 bits.
    """
    text = np.frombuffer(train + held_out, np.uint8).astype(np.int64)
    start = len(train)
    probability = np.full(len(held_out), 1 / 256)
    bits = []
    for order in range(max_order + 1):
        context = np.zeros(len(text) - order, np.int64)
        for i in range(order):
            context = context * 256 + text[i : len(text) - order + i]
        gram = context * 256 + text[order:]
        grams, gram_counts = np.unique(gram[: start - order], return_counts=True)
        contexts, first, distinct = np.unique(grams >> 8, return_index=True, return_counts=True)
        context_counts = np.add.reduceat(gram_counts, first)
        n_gram = _lookup(grams, gram_counts, gram[start - order :])
        n_context = _lookup(contexts, context_counts, context[start - order :])
        d = _lookup(contexts, distinct, context[start - order :])
        seen = n_context > 0
        probability[seen] = ((n_gram + d * probability) / np.maximum(n_context + d, 1))[seen]
        bits.append(float(-np.log2(probability).mean()))
    return bits


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Value of each wanted key, 0 where there is none; `keys` are sorted."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)


def lzma_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """What `held_out` adds to the lzma archive of `train`, in bits per byte of it."""
    return 8 * (_lzma_size(train + held_out) - _lzma_size(train)) / len(held_out)


def _lzma_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def repeated_share(train: bytes, held_out: bytes, length: int = 32) -> float:
    """Share of the bytes of `held_out` in passages of at least `length` bytes that stand in `train` word for word: what
    a compressor that copies, as lzma does, gets for nearly nothing."""
    known = {train[i : i + length] for i in range(len(train) - length + 1)}
    repeated = np.zeros(len(held_out), bool)
    for i in range(len(held_out) - length + 1):
        if held_out[i : i + length] in known:
            repeated[i : i + length] = True
    return float(repeated.mean())
