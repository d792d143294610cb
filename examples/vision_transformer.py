"""A small vision transformer in one's own loop: SGD, then P-SGD and P-BFGS in the subspace of its trajectory.

On 2,000 images of data/cifar10.npz (docs/install.md), or on scikit-learn's digits where that is not there:
  pip install . scikit-learn && python examples/vision_transformer.py
"""
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from dldr import ProjectedBFGS, ProjectedSGD, flat_parameters, pca_basis


class Transformer(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.embed, self.position = nn.Linear(features, 48), nn.Parameter(torch.randn(16, 48) / 10)
        block = nn.TransformerEncoderLayer(48, 4, 96, dropout=0, batch_first=True, norm_first=True)
        self.blocks, self.head = nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Linear(48, 10)

    def forward(self, x):  # (N, 16 patches, features)
        return self.head(self.blocks(self.embed(x) + self.position).mean(1))


def main(file="data/cifar10.npz", epochs=20, k=20):
    x, y = load_digits().images[..., None], load_digits().target
    if Path(file).is_file():
        x, y = (np.load(file)[key][:2500] for key in ("x_train", "y_train"))
    x, y, size, n = torch.tensor(x).float(), torch.tensor(y), x.shape[1] // 4, 4 * len(x) // 5  # a fifth is for testing
    x = nn.functional.unfold(((x - x.mean()) / x.std()).permute(0, 3, 1, 2), size, stride=size).transpose(1, 2)
    torch.manual_seed(0)
    model = Transformer(features=x.shape[2])
    w, start = flat_parameters(model), {key: value.clone() for key, value in model.state_dict().items()}

    def train(name, optimizer, epochs, batch_size):
        snapshots = [w.clone()]
        for _ in range(epochs):
            for i in torch.randperm(n).split(batch_size):
                if isinstance(optimizer, ProjectedBFGS):
                    optimizer.step(lambda i=i: nn.functional.cross_entropy(model(x[i]), y[i]))
                else:
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x[i]), y[i]).backward()
                    optimizer.step()
            snapshots.append(w.clone())
        accuracy = 100 * (model(x[n:]).argmax(1) == y[n:]).double().mean()
        print(f"{name:8} {k if hasattr(optimizer, 'theta') else len(w):10,} {epochs:7} {accuracy:18.1f}")
        model.load_state_dict(start)  # the next one starts where this one did
        return torch.stack(snapshots)

    print(f"{len(x):,} images\nmethod    variables  epochs  test accuracy (%)")
    P, _ = pca_basis(train("SGD", torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), epochs, 64), k)
    train("P-SGD", ProjectedSGD(model, P, lr=0.1), epochs // 2, 64)
    train("P-BFGS", ProjectedBFGS(model, P), epochs // 3, 256)


if __name__ == "__main__":
    main()
