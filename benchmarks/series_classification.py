"""Does what a forecaster makes of series tell their classes apart?

    python benchmarks/series_classification.py        # make bench-forecasting, behind forecasting.py

Three sets that aeon brings along, with the split they come with: GunPoint, ItalyPowerDemand and BasicMotions of six
variates. Features by `embed` of the TiRex-2 that forecasting.py trained on other series, each of its 3 seeds, variates
side by side, and of one with random weights, under scikit-learn's ridge classifier; a minGRU in both directions on the
values, `ForSequenceClassification`, trained from scratch; and aeon's MiniRocket, whose classifier is a ridge, too.
Nothing is chosen on test rows, nothing tuned. Accuracy and seconds of fitting and of predicting, one thread a run.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from driver import save
from forecasting import CHECKPOINTS, SEEDS, make
from resumable import finish, run_all
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tagging import fit
from transformers import set_seed

import hf_rnn

SETS = {
    "GunPoint": "load_gunpoint",
    "ItalyPowerDemand": "load_italy_power_demand",
    "BasicMotions": "load_basic_motions",
}
METHODS = ("MiniRocket (aeon)", "TiRex-2's features", "features of random weights", "minGRU from scratch")
STEPS, BATCH, WIDTH, RATE = 300, 16, 64, 5e-3
Rows = tuple[np.ndarray, np.ndarray]  # (N, V, T) and (N,) classes from 0


def read(name: str) -> tuple[Rows, Rows]:
    import aeon.datasets

    load = getattr(aeon.datasets, SETS[name])
    (x, y), (tested, expected) = load(split="train"), load(split="test")
    classes = sorted(set(y))
    return (x, np.array([classes.index(c) for c in y])), (tested, np.array([classes.index(c) for c in expected]))


class Features:
    """A forecaster's features of each variate and a ridge classifier."""

    def __init__(self, model: Any):
        self.model = model.eval()
        self.ridge = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-3, 3, 10)))

    def features(self, x: np.ndarray) -> np.ndarray:
        return self.model.embed(x.reshape(-1, x.shape[2])).reshape(len(x), -1)

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        self.ridge.fit(self.features(x), y)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.ridge.predict(self.features(x))


class MinGRU:
    """Two blocks in both directions on values scaled as a whole, trained from scratch."""

    def __init__(self, seed: int):
        self.seed = seed

    def inputs(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(((x - self.mean) / self.deviation).swapaxes(1, 2).astype(np.float32))

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        self.mean, self.deviation = x.mean((0, 2), keepdims=True), x.std((0, 2), keepdims=True)
        config = hf_rnn.MinGRUConfig(
            num_input_features=x.shape[1],
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_labels=int(y.max()) + 1,
            bidirectional=True,
            classifier_pooling="mean",
        )
        self.model = hf_rnn.MinGRUForSequenceClassification(config)
        features, labels, random = self.inputs(x), torch.from_numpy(y), np.random.default_rng(self.seed)

        def batches():
            while True:
                chosen = torch.from_numpy(random.integers(len(y), size=BATCH))
                yield {"input_features": features[chosen], "labels": labels[chosen]}

        fit(self.model.train(), batches(), STEPS, RATE)
        self.model.eval()

    @torch.no_grad()
    def predict(self, x: np.ndarray) -> np.ndarray:
        rows = self.inputs(x).split(256)
        return torch.cat([self.model(input_features=part).logits.argmax(-1) for part in rows]).numpy()


def make_classifier(method: str, seed: int) -> Any:
    if method == "MiniRocket (aeon)":
        from aeon.classification.convolution_based import MiniRocketClassifier

        return MiniRocketClassifier(random_state=seed)
    if method == "minGRU from scratch":
        return MinGRU(seed)
    if method == "features of random weights":
        return Features(make("TiRex-2"))
    return Features(hf_rnn.TiRex2ForPrediction.from_pretrained(CHECKPOINTS / f"TiRex-2, seed {seed}"))


def run(name: str, method: str, seed: int) -> dict:
    (x, y), (tested, expected) = read(name)
    for _ in range(2):  # first to compile
        set_seed(seed)
        classifier = make_classifier(method, seed)
        start = time.perf_counter()
        classifier.fit(x, y)
        fitted = time.perf_counter()
        found = classifier.predict(tested)
        ended = time.perf_counter()
    return {
        "seed": seed,
        "accuracy": float((found == expected).mean()),
        "fit_seconds": fitted - start,
        "predict_seconds": ended - fitted,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    jobs = {f"{name}, {m}, seed {seed}": (name, m, seed) for name in SETS for m in METHODS for seed in SEEDS}
    runs = run_all("series_classification", run, jobs)
    results: dict[str, dict] = {}
    for name in SETS:
        results[name] = {m: [runs[f"{name}, {m}, seed {seed}"] for seed in SEEDS] for m in METHODS}
        for method, rows in results[name].items():
            print(f"{name:18} {method:28}" + "  ".join(f"{row['accuracy']:.3f}" for row in rows))
    save("series_classification", results)
    finish("series_classification")


if __name__ == "__main__":
    main()
