"""Slow, plain float64 numpy versions of the two subspace algorithms, written from the method's description alone.

They share no code with `subspace.py` and hold everything in the clear (B as a matrix, theta as a vector, formulas as
printed), so that agreement with the implementation over many iterations means something.

An objective is a callable `w -> (loss, grad)` standing for one mini-batch in train mode.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Iteration:
    """What one P-BFGS iteration did."""

    w: np.ndarray  # the parameters after it
    loss: float  # of the (last) mini-batch, before the step
    trials: int  # losses evaluated by the line search
    accepted: bool  # False: every trial failed and the last, tiny step was taken
    skipped: bool | None  # the BFGS update was skipped (y^T s <= 1e-20); None in the first iteration, which has none


def groups(items, size):
    """Consecutive groups of `size`; the last one holds what is left over."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def pbfgs(
    w0, P, objectives, *, lr=1.0, rho=0.4, sigma=0.4, max_trials=20, alpha=0.0, gamma=0.9, accumulate=1
) -> list[Iteration]:
    """P-BFGS (P+-BFGS where alpha > 0) from w0 in w0 + rowspan(P), one iteration per group of `accumulate` objectives.

    The method has lr = 1. Another lr is the length of the first trial step: the search tries lr rho^m d.
    """
    w = np.array(w0, dtype=np.float64)
    P = np.array(P, dtype=np.float64)
    identity = np.eye(len(P))
    B = identity.copy()
    v = np.zeros_like(w)
    g_previous = s_previous = None
    history = []
    for group in groups(list(objectives), accumulate):
        evaluated = [objective(w) for objective in group]
        gradient = sum(np.asarray(grad, dtype=np.float64) for _, grad in evaluated) / len(group)
        loss = float(evaluated[-1][0])  # the line search is on the last mini-batch of the group
        g = P @ gradient

        skipped = None
        if g_previous is not None:
            y, s = g - g_previous, s_previous
            ys = float(y @ s)
            skipped = not ys > 1e-20
            if not skipped:
                left = identity - np.outer(s, y) / ys
                B = left @ B @ left.T + np.outer(s, s) / ys

        d = -B @ g
        slope = float(g @ d)
        accepted = False
        for m in range(max_trials):
            step = lr * rho**m
            trial = float(group[-1](w + step * (P.T @ d))[0])
            if np.isfinite(trial) and trial < loss + sigma * step * slope:
                accepted = True
                break
        s = step * d  # accepted or not: of the last trial, lr rho^(max_trials - 1) if none was
        v = gamma * v + (gradient - P.T @ g)
        w = w + P.T @ s - alpha * v
        g_previous, s_previous = g, s
        history.append(Iteration(w.copy(), loss, m + 1, accepted, skipped))
    return history


def psgd(w0, P, objectives, *, lr=1.0, momentum=0.9) -> list[np.ndarray]:
    """Momentum SGD on theta, where w = w0 + P^T theta: w after each objective. `lr`: a number, or one per objective."""
    w0 = np.array(w0, dtype=np.float64)
    P = np.array(P, dtype=np.float64)
    theta = np.zeros(len(P))
    velocity = np.zeros(len(P))
    rates = [lr] * len(objectives) if np.isscalar(lr) else list(lr)
    history = []
    for objective, rate in zip(objectives, rates, strict=True):
        gradient = np.asarray(objective(w0 + P.T @ theta)[1], dtype=np.float64)
        velocity = momentum * velocity + P @ gradient
        theta = theta - rate * velocity
        history.append(w0 + P.T @ theta)
    return history


# ---------------------------------------------------------------------------------- a small problem to run them on

FEATURES, HIDDEN, CLASSES = 6, 8, 4
SHAPES = ((HIDDEN, FEATURES), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,))  # W1, b1, W2, b2: torch's order
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)


def mlp(x, y):
    """Cross-entropy of a two-layer tanh network on the mini-batch x (N, 6), y (N,), as an objective of w (92,)."""

    def objective(w):
        W1, b1, W2, b2 = (
            part.reshape(shape)
            for part, shape in zip(np.split(w, np.cumsum([np.prod(s) for s in SHAPES])[:-1]), SHAPES, strict=True)
        )
        h = np.tanh(x @ W1.T + b1)
        logits = h @ W2.T + b2
        logits = logits - logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        rows = np.arange(len(y))
        dz = np.exp(log_p)
        dz[rows, y] -= 1
        dz /= len(y)
        da = (dz @ W2) * (1 - h**2)
        grad = np.concatenate([(da.T @ x).ravel(), da.sum(0), (dz.T @ h).ravel(), dz.sum(0)])
        return -log_p[rows, y].mean(), grad

    return objective


def problem(batches, *, size=12, k=10, seed=0):
    """w0 (92,), P (k, 92) with orthonormal rows, and mini-batches (x, y) of noisily labelled points."""
    rng = np.random.default_rng(seed)
    w0 = rng.normal(size=SIZE) / 2
    P = np.linalg.qr(rng.normal(size=(SIZE, k)))[0].T
    teacher = rng.normal(size=(FEATURES, CLASSES))
    xs = rng.normal(size=(batches, size, FEATURES))
    ys = (xs @ teacher + rng.normal(size=(batches, size, CLASSES))).argmax(-1)
    return w0, P, list(zip(xs, ys, strict=True))


def rotation(k, seed=0):
    """A random orthogonal matrix (k, k)."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(k, k)))[0]


def angle(P, Q):
    """Largest principal angle (radians) between the row spans of P and Q (k, D), through its sine: exact when small."""
    P, Q = (np.linalg.qr(np.asarray(M, dtype=np.float64).T)[0] for M in (P, Q))
    return float(np.arcsin(min(1.0, np.linalg.norm(Q - P @ (P.T @ Q), 2))))
