"""The stages in plain PyTorch, as people write them: what benchmarks/run.py times the scripts against.

Data, batch sizes and mathematics are those of the scripts, from which nothing is imported; nothing is slowed down. As
in the paper's official release (github.com/nblt/DLDR): PIL images through torchvision's transforms in a DataLoader of 4
workers, pinned on CUDA; test batches of 128; loss and accuracy by .item() in every iteration; P-SGD and P-BFGS
concatenate the gradient and hand their step to an SGD optimiser as gradients; the k-dimensional algebra is on the
device, in float32; P-BFGS saves the network to a file in every iteration and loads it after every trial, and trials
build graphs. Left out: its DataParallel, moving averages, log lines and randomised PCA; a failed search ends as ours.
"""
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


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
    steps = [*[transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, 4)] * augment, transforms.ToTensor(),
             transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))]
    dataset = Images(images, labels, transforms.Compose(steps))
    return DataLoader(dataset, batch_size, shuffle=augment, num_workers=4, pin_memory=device.type == "cuda")


def epoch(model, loader, device, step=None):
    """Mean loss and accuracy (%). With step(loss, x, y) a training epoch, which calls it after each backward pass."""
    model.train(step is not None)
    loss_sum = hits = seen = 0
    with torch.set_grad_enabled(step is not None):
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            if step:
                model.zero_grad()
                loss.backward()
                step(loss, x, y)
            loss_sum += loss.item() * len(y)
            hits += (logits.argmax(1) == y).sum().item()
            seen += len(y)
    return {"loss": loss_sum / seen, "accuracy": 100 * hits / seen}


def step_along(model, optimizer, vector):
    """optimizer.step() with the slices of `vector` (D,) as gradients of the parameters."""
    for p, values in zip(model.parameters(), vector.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad = values.view_as(p)
    optimizer.step()


def psgd_step(model, optimizer, P):
    """P (k, D); `optimizer` is SGD with momentum over model.parameters()."""
    step_along(model, optimizer, P.T @ (P @ torch.cat([p.grad.reshape(-1) for p in model.parameters()])))


def pbfgs_step(model, optimizer, P, memory, path, loss, x, y, rho=0.4, sigma=0.4, max_trials=20):
    """BFGS update and Armijo search on the mini-batch (x, y), whose loss and gradient are given.

    P (k, D); `optimizer` is SGD with lr 1 over model.parameters(). `memory` is a dict, empty at first, for B (k, k), g
    and s (k,) of the iteration before, and the trials so far. The search restores the network from the file `path`.
    """
    g, eye = P @ torch.cat([p.grad.reshape(-1) for p in model.parameters()]), torch.eye(len(P), device=P.device)
    B = memory.setdefault("B", eye)
    if "s" in memory:
        s, change = memory["s"], g - memory["g"]
        ys = change @ s
        if ys > 1e-20:
            V = eye - torch.outer(s, change) / ys
            B = memory["B"] = V @ B @ V.T + torch.outer(s, s) / ys
    d, f = -B @ g, loss.item()
    slope = g @ d
    torch.save(model.state_dict(), path)
    for m in range(max_trials):
        s = rho**m * d
        step_along(model, optimizer, -(P.T @ s))
        trial = F.cross_entropy(model(x), y).item()
        model.load_state_dict(torch.load(path, weights_only=True))  # batch-norm statistics too
        memory["trials"] = memory.get("trials", 0) + 1
        if trial < f + sigma * rho**m * slope:
            break
    step_along(model, optimizer, -(P.T @ s))
    memory["g"], memory["s"] = g, s


def basis(window, k, solver):
    """The first k principal directions of the rows of `window` (n, D): P (k, D).

    "full" and "covariance_eigh" (new in 1.5) are scikit-learn's, on the CPU. The latter's covariance of D columns
    would take 291 GB at D = 270,000: it gets the centred window's transpose, and centres it once more. "gram" is on the
    window's device.
    """
    from sklearn.decomposition import PCA

    if solver == "full":
        return torch.from_numpy(PCA(n_components=k, svd_solver="full").fit(window.cpu().numpy()).components_)
    X = window - window.mean(0)
    if solver == "gram":
        U = torch.linalg.eigh(X @ X.T)[1].flip(1)[:, :k].T
    else:
        U = PCA(n_components=k, svd_solver="covariance_eigh").fit(X.T.cpu().numpy()).components_
    return F.normalize(torch.as_tensor(U, device=X.device) @ X)
