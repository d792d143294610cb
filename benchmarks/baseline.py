"""The stages in plain PyTorch, as people write them: what benchmarks/run.py times the scripts against.

Data, batch sizes and mathematics are those of train_sgd.py, train_psgd.py and train_pbfgs.py; nothing is slowed down.
As in the paper's official release (github.com/nblt/DLDR):

- PIL images through torchvision's transforms in a DataLoader of 4 workers, pinned on CUDA; test batches of 128; NCHW
- one optimiser over model.parameters(); loss and accuracy by .item() in every iteration
- P-SGD and P-BFGS concatenate the gradient and hand their step to an SGD optimiser as gradients of the parameters;
  the k-dimensional algebra is on the device, in float32
- P-BFGS saves the network to a file in every iteration, and loads it after every trial; trials build autograd graphs

Not the release's: it also has DataParallel, moving averages and log lines, which cost time on top; a failed search ends
on its last trial's step, as in subspace.py; and scikit-learn's PCA is the exact one (the release's call means a
randomised one for these sizes).
"""
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

NORMALIZE = transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Images(Dataset):
    """images (N, 32, 32, 3) uint8 and labels (N,) as torchvision.datasets.CIFAR10 holds and serves them."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def loader(images, labels, batch_size, device, augment):
    """augment: shuffle, too."""
    steps = [transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, 4)] * augment
    dataset = Images(images, labels, transforms.Compose([*steps, transforms.ToTensor(), NORMALIZE]))
    return DataLoader(dataset, batch_size, shuffle=augment, num_workers=4, pin_memory=device.type == "cuda")


def epoch(model, loader, device, optimizer, step):
    """Forward, backward and step(loss, x, y) for every mini-batch; mean loss and accuracy (%)."""
    model.train()
    loss_sum = hits = seen = 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        step(loss, x, y)
        loss_sum += loss.item() * len(y)
        hits += (logits.argmax(1) == y).sum().item()
        seen += len(y)
    return {"loss": loss_sum / seen, "accuracy": 100 * hits / seen}


def sgd_epoch(model, loader, device, optimizer):
    return epoch(model, loader, device, optimizer, lambda *_: optimizer.step())


def psgd_epoch(model, loader, device, optimizer, P):
    """P (k, D); `optimizer` is SGD with momentum over model.parameters()."""

    def step(*_):
        g = P @ gradient_vector(model)
        set_gradient(model, P.T @ g)
        optimizer.step()

    return epoch(model, loader, device, optimizer, step)


def pbfgs_epoch(model, loader, device, optimizer, P, memory, path):
    """P (k, D); `optimizer` is SGD with lr 1 over model.parameters().

    `memory` is a dict, empty at first, for B (k, k), the gradient g (k,) and step s (k,) of the iteration before, and
    the number of trials. `path` is the file that the search restores the network from.
    """
    memory.setdefault("B", torch.eye(len(P), device=device))
    memory["trials"] = 0

    def step(loss, x, y):
        pbfgs_step(model, optimizer, P, memory, path, loss.item(), x, y)

    facts = epoch(model, loader, device, optimizer, step)
    return {**facts, "trials_per_step": memory["trials"] / len(loader)}


def pbfgs_step(model, optimizer, P, memory, path, f, x, y, rho=0.4, sigma=0.4, max_trials=20):
    """BFGS update and Armijo search on the mini-batch (x, y), whose loss is f and whose gradient the model holds."""
    g = P @ gradient_vector(model)
    if "s" in memory:
        s, change = memory["s"], g - memory["g"]
        ys = change @ s
        if ys > 1e-20:
            V = torch.eye(len(P), device=P.device) - torch.outer(s, change) / ys
            memory["B"] = V @ memory["B"] @ V.T + torch.outer(s, s) / ys
    d = -memory["B"] @ g
    slope = g @ d
    torch.save(model.state_dict(), path)
    for m in range(max_trials):
        s = rho**m * d
        set_gradient(model, -(P.T @ s))
        optimizer.step()
        loss = F.cross_entropy(model(x), y).item()
        model.load_state_dict(torch.load(path, weights_only=True))  # batch-norm statistics too
        memory["trials"] += 1
        if loss < f + sigma * rho**m * slope:
            break
    set_gradient(model, -(P.T @ s))
    optimizer.step()
    memory["g"], memory["s"] = g, s


def gradient_vector(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def set_gradient(model, vector):
    """Make the slices of `vector` (D,) the gradients of the parameters."""
    start = 0
    for p in model.parameters():
        p.grad = vector[start:start + p.numel()].view_as(p)
        start += p.numel()


def evaluation(model, loader, device):
    """Mean loss and accuracy (%) in eval mode."""
    model.eval()
    loss_sum = hits = seen = 0
    with torch.no_grad():
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            logits = model(x)
            loss_sum += F.cross_entropy(logits, y).item() * len(y)
            hits += (logits.argmax(1) == y).sum().item()
            seen += len(y)
    return {"loss": loss_sum / seen, "accuracy": 100 * hits / seen}


def basis(window, k):
    """The first k principal directions of the rows of `window` (n, D), an array: (k, D)."""
    from sklearn.decomposition import PCA

    return PCA(n_components=k, svd_solver="full").fit(window).components_
