"""A network for tabular data in one's own loop: SGD, then P-SGD and P-BFGS in the subspace of its trajectory.

On scikit-learn's breast cancer data, 569 samples of 30 features, the last fifth for testing:
  pip install . scikit-learn && python examples/tabular.py
"""
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import nn

from dldr import ProjectedBFGS, ProjectedSGD, flat_parameters, pca_basis


def main(epochs=40, k=5):
    features, labels = load_breast_cancer(return_X_y=True)
    n = 4 * len(labels) // 5
    x, y = torch.tensor(StandardScaler().fit(features[:n]).transform(features)).float(), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    w, start = flat_parameters(model), copy.deepcopy(model.state_dict())

    def train(name, optimizer, epochs, batch_size):
        snapshots = [w.clone()]
        for _ in range(epochs):
            for i in torch.randperm(n).split(batch_size):
                if isinstance(optimizer, ProjectedBFGS):
                    optimizer.step(lambda i=i: F.cross_entropy(model(x[i]), y[i]))
                else:
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[i]), y[i]).backward()
                    optimizer.step()
            snapshots.append(w.clone())
        accuracy = 100 * (model(x[n:]).argmax(1) == y[n:]).double().mean()
        print(f"{name:8} {k if hasattr(optimizer, 'theta') else len(w):10,} {epochs:7} {accuracy:18.1f}")
        model.load_state_dict(start)  # the next one starts where this one did
        return torch.stack(snapshots)

    print("method    variables  epochs  test accuracy (%)")
    P, _ = pca_basis(train("SGD", torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), epochs, 64), k)
    train("P-SGD", ProjectedSGD(model, P, lr=0.1), epochs // 2, 64)
    train("P-BFGS", ProjectedBFGS(model, P), epochs // 3, 128)


if __name__ == "__main__":
    main()
