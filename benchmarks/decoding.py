"""What does a token cost after 128 to 65,536 tokens, in time and in memory, alone and for 64 sequences at once?

    python benchmarks/decoding.py

Models of a million parameters (ten million on a GPU), one step from the state or the keys and values that are there.
The states of ours are those after the prefix, read once; keys and values are random, since only their number matters,
and so is Mamba's state, which does not grow. Then `generate()` with its defaults, a prompt of 128 and 64 new tokens,
and ours with `compile_config=CompileConfig()`, which compiles the step at the first call; and 256 new tokens, ours
with its ordinary path, by a hook that does nothing, and around a model that returns ready logits: transformers' own
loop. Then each architecture beside the same by others with the same weights (benchmarks/peers.py).
"""

import copy
import inspect
from collections.abc import Callable

import torch
from driver import DEVICE, DRY, compare, measure, milliseconds, ratios, relative_error, sized, table
from models import MODELS, make
from peers import PEERS, pair
from resumable import Parts
from torch import Tensor, nn
from transformers import CompileConfig, DynamicCache

import hf_rnn
from hf_rnn.skeleton.versions import STATE, CausalLMOutput

PARAMETERS, VOCABULARY = sized(cpu=1_000_000, gpu=10_000_000, dry=40_000), 256
PREFIXES, BATCHES = sized(*2 * [((128, 1024, 8192, 65536), (1, 64))], dry=((5,), (2,)))
LARGEST_CACHE = sized(cpu=4, gpu=40, dry=1) * 2**30  # bytes of keys and values
PROMPT, NEW_TOKENS, LONG = sized(*2 * [(128, 64, 256)], dry=(4, 2, 2))
OTHERS = [name for name in MODELS if "transformers" in name]
ACCEPTED = {
    "Transformer (transformers)": "another architecture, which grows: it is left behind with longer prefixes",
    "transformers' loop alone": "no model in it",
}


class Decoder:
    """One model with what it knows of a prefix; a call is a step."""

    def __init__(self, model: nn.Module, ids: Tensor):
        with torch.no_grad():
            output = model(ids, use_cache=True, logits_to_keep=1)
        self.model, self.token = model, ids[:, :1]
        self.key = next(key for key in ("past_key_values", "cache_params") if output.get(key) is not None)
        self.cache = output[self.key]
        self.prefix = ids.shape[1]

    def __call__(self) -> list[Tensor]:
        with torch.no_grad():
            logits = self.model(self.token, use_cache=True, **{self.key: self.cache}).logits
        grows = isinstance(self.cache, DynamicCache) and self.key == "past_key_values"
        if grows and self.cache.get_seq_length() > self.prefix + NEW_TOKENS:
            self.cache.crop(self.prefix)
        return [logits]

    def state_bytes(self) -> int:
        """Of the state, or of keys and values."""
        if isinstance(self.cache, hf_rnn.RecurrentCache):
            return sum(x.nbytes for layer in self.cache.states for x in layer)
        parts = [part for layer in self.cache.layers for part in vars(layer).values()]
        tensors = [x for part in parts for x in (part.values() if isinstance(part, dict) else [part])]
        return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


def decoder(name: str, model: nn.Module, prefix: int, batch: int) -> Decoder:
    """With the state after `prefix` random tokens; Mamba's after 128, keys and values random."""
    if "Transformer" in name:
        made, config = Decoder(model, torch.zeros(batch, 1, dtype=torch.long, device=DEVICE)), model.config
        made.cache, made.prefix = DynamicCache(config=config), prefix
        for layer in range(config.num_hidden_layers):
            shape = (batch, config.num_key_value_heads, prefix, config.head_dim)
            keys, values = (torch.randn(shape, device=DEVICE, dtype=model.dtype) for _ in range(2))
            made.cache.update(keys, values, layer)
        return made
    if "Mamba" in name:
        return Decoder(model, torch.zeros(batch, PROMPT, dtype=torch.long, device=DEVICE))
    made = Decoder(model, torch.randint(0, VOCABULARY, (1, prefix), device=DEVICE))
    made.cache.batch_repeat_interleave(batch)
    made.token = made.token.expand(batch, 1)
    return made


def key_value_bytes(model: nn.Module, prefix: int, batch: int) -> int:
    config = model.config
    return 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * prefix * batch


def check(model: nn.Module) -> float:
    """Relative error of a step after 128 zeros against all of them at once in float64."""
    zeros = torch.zeros(1, PROMPT + 1, dtype=torch.long, device=DEVICE)
    return relative_error(Decoder(model, zeros[:, :-1])()[0], last_logits(model, zeros))


@torch.no_grad()
def last_logits(model: nn.Module, ids: Tensor) -> Tensor:
    return copy.deepcopy(model).double()(ids, use_cache=False).logits[:, -1:]


def generation(model: nn.Module, tokens: int = NEW_TOKENS, batch: int = 1, **settings) -> Callable[[], list[Tensor]]:
    """New tokens by generate()."""
    prompt = torch.ones(batch, PROMPT, dtype=torch.long, device=DEVICE)

    def run():
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, pad_token_id=0, **settings,
        )  # fmt: skip
        return [made]

    return run


def ready(model: nn.Module, batch: int) -> nn.Module:
    """The model with a forward that returns logits that it has."""
    other, logits = copy.deepcopy(model), torch.randn(batch, 1, VOCABULARY, device=DEVICE)
    signature = inspect.signature(model.forward)

    def forward(**arguments):
        state = arguments.get(STATE) or hf_rnn.RecurrentCache(1)
        state.seen_tokens += arguments["input_ids"].shape[1]
        return CausalLMOutput(logits=logits, **{STATE: state})

    forward.__signature__ = signature  # type: ignore[attr-defined]  # what generate() passes on
    other.forward = forward
    return other


def ordinary(model: nn.Module) -> nn.Module:
    """A copy whose tokens are computed part by part."""
    other = copy.deepcopy(model)
    other.model.register_forward_hook(lambda *_: None)
    return other


def against_others(rows: dict[str, dict]) -> dict[str, dict]:
    """A table for each of ours."""
    others = {name: rows[name] for name in OTHERS if name in rows}
    return {
        name: ratios({"hf_rnn": row, **others}, "hf_rnn", ACCEPTED) for name, row in rows.items() if name not in OTHERS
    }


def after(models: dict[str, nn.Module], errors: dict[str, float], batch: int, prefix: int) -> dict[str, dict]:
    """A step of every model with what it knows of so many tokens."""
    decoders, left_out = {}, {}
    for name, model in models.items():
        if not errors[name] <= 1e-3:
            left_out[name] = {"error": errors[name], "refused": f"wrong: relative error {errors[name]:.2e}"}
            continue
        if "Transformer" in name and (size := key_value_bytes(model, prefix, batch)) > LARGEST_CACHE:
            left_out[name] = {"error": None, "state_bytes": size, "refused": "more memory than there is"}
            continue
        decoders[name] = decoder(name, model, prefix, batch)
    sizes = {name: step.state_bytes() for name, step in decoders.items()}
    rows = measure(decoders, repeats=40, seconds=5) | left_out
    for name, size in sizes.items():
        rows[name] |= {"state_bytes": size, "error": errors[name]}
    results = {}
    for name, trio in against_others(rows).items():
        title = f"{name}, a token after {prefix}, batch {batch}"
        results[title] = trio
        table(title, trio)
    return results


def generate(models: dict[str, nn.Module], name: str) -> dict[str, dict]:
    """generate() of one of ours, plain and with its step compiled, beside the others."""
    contestants = {"hf_rnn": generation(models[name])} | {other: generation(models[other]) for other in OTHERS}
    references, seconds = {}, None
    if not DRY:  # the interpreter's kernels do not compile
        references["hf_rnn, compiled"] = contestants["hf_rnn"]()  # the same tokens
        run = generation(models[name], compile_config=CompileConfig())
        seconds = milliseconds(run) / 1e3
        print(f"{name}: first call with its step to compile {seconds:.0f} s", flush=True)
        contestants = {"hf_rnn": contestants.pop("hf_rnn"), "hf_rnn, compiled": run} | contestants
    title = f"{name}, generate() of {NEW_TOKENS} after {PROMPT}"
    results = {title: ratios(measure(contestants, references, repeats=10, seconds=8), "hf_rnn", ACCEPTED)}
    if seconds is not None:
        results[title]["hf_rnn, compiled"]["first_call_seconds"] = seconds
    for row in results[title].values():
        if "ms" in row:
            row["ms_per_token"] = row["ms"] / NEW_TOKENS
    table(title, results[title])
    for batch in (1, 64):
        title = f"{name}, generate() of {LONG} after {PROMPT}, batch {batch}"
        contestants = {
            "hf_rnn": generation(models[name], LONG, batch),
            "hf_rnn, part by part": generation(ordinary(models[name]), LONG, batch),
            "transformers' loop alone": generation(ready(models[name], batch), LONG, batch),
        }
        results[title] = ratios(measure(contestants, repeats=8, seconds=8), "hf_rnn", ACCEPTED)
        table(title, results[title])
    return results


def same_architecture(name: str) -> dict[str, dict]:
    """A step of one of ours beside the same by others."""
    peer = PEERS[name]
    ours, theirs = (model.to(DEVICE).eval() for model in pair(name, PARAMETERS, VOCABULARY))
    zeros = torch.zeros(1, PROMPT + 1, dtype=torch.long, device=DEVICE)
    steps = {"hf_rnn": Decoder(ours, zeros[:, :-1]), peer: Decoder(theirs, zeros[:, :-1])}
    title = f"{name} and the same of {peer}, a token"
    rows = compare(steps, [last_logits(ours, zeros)], 1e-3, repeats=100, accepted=ACCEPTED)
    table(title, rows)
    return {title: rows}


def main() -> None:
    models, parts = {}, Parts("decoding")
    for name in MODELS:
        torch.manual_seed(0)
        models[name] = make(name, PARAMETERS, VOCABULARY).to(DEVICE).eval()
    errors = parts.run("errors", lambda: {name: check(model) for name, model in models.items()}) or {}
    results: dict[str, dict] = {"parameters": {name: model.num_parameters() for name, model in models.items()}}
    for batch in BATCHES:
        for prefix in PREFIXES:
            results |= parts.run(f"after {prefix}, batch {batch}", after, models, errors, batch, prefix) or {}
    for name in [name for name in models if name not in OTHERS]:
        results |= parts.run(f"{name}, generate()", generate, models, name) or {}
    for name in PEERS:
        results |= parts.run(f"{name} by others", same_architecture, name) or {}
    parts.finish(results)


if __name__ == "__main__":
    main()
