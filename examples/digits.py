"""A plain torch loop on scikit-learn's digits that joins Interlock in three lines: guarded, rolled back, promoted like a built-in recipe.

    python examples/digits.py                      # supervised by a trainer on this machine if one answers, else in this process
    python examples/digits.py --fault-at 400       # a drill: the weights are spoilt at step 400; watch it roll back

The three lines are marked with 1, 2, 3. Everything else is an ordinary training loop.
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits

import interlock
from interlock.training import Batches, ServeSpec


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and test images, flat, in 0..1, with their labels."""
    bunch = load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32) / 16.0
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1500], order[1500:]
    return images[train], labels[train], images[test], labels[test]


def main() -> None:
    """Trains a small classifier."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="digits")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--fault-at", type=int, default=0)
    parser.add_argument("--model", default="digits", help="name the classifier is served under")
    parser.add_argument("--pace-ms", type=float, default=0.0, help="least time of a step")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = data()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    serve = ServeSpec(options.model, {"image": torch.zeros(1, 64)}, ("logits",), metric="accuracy")
    batches = Batches(images, labels, batch_size=64, seed=1)
    with interlock.attach(
        options.name, model=model, optimizer=optimizer, data=batches, serve=serve, save_every=100
    ) as run:  # 1
        for x, y in run.steps(until=options.steps):  # 2
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                accuracy = (model(test_images).argmax(-1) == test_labels).float().mean()
            run.log(loss=loss, accuracy=accuracy)  # 3
            if run.step + 1 == options.fault_at and run.attempt == 1:
                run.drill("weights", 10.0)
            time.sleep(options.pace_ms / 1e3)
            if (run.step + 1) % 100 == 0:
                print(f"step {run.step + 1:5d}  attempt {run.attempt}  loss {loss:.4f}  accuracy {accuracy:.4f}")
    print(f"done: step {run.step}, attempt {run.attempt}, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
