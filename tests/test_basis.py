"""The basis against two independent solvers: numpy's float64 SVD and scikit-learn's full PCA."""
import numpy as np
import pytest
import torch
from oracle import angle
from runs import same, state
from sklearn.decomposition import PCA
from small_networks import small

import models
from dldr.errors import UserError
from dldr.snapshots import load_window, make_basis, read_snapshot, snapshot_paths
from dldr.subspace import flat_parameters, pca_basis


def trajectory(n=31, D=20_000, seed=0):
    """Snapshots like those of training: a big common part, a decaying drift and small steps, float32 (n, D)."""
    rng = np.random.default_rng(seed)
    drift = rng.standard_normal((6, D)) * 0.05
    path = np.stack([[(1 - np.exp(-t / tau)) for tau in (2, 4, 8, 16, 32, 64)] for t in range(n)])
    noise = np.cumsum(rng.standard_normal((n, D)), axis=0) * 1e-3
    return (rng.standard_normal(D) + path @ drift + noise).astype(np.float32)


def steep():
    """Singular values over four decades, as after a drop of the learning rate."""
    rng = np.random.default_rng(3)
    U, V = np.linalg.qr(rng.standard_normal((21, 21)))[0], np.linalg.qr(rng.standard_normal((5_000, 21)))[0]
    return ((U * np.logspace(1, -3, 21)) @ V.T).astype(np.float32)


@pytest.mark.parametrize("chunk_bytes", [2**27, 40_000])  # one chunk, and many with a short last one
@pytest.mark.parametrize(("kind", "k", "bound"), [
    ("drift", 1, 1e-5), ("drift", 10, 1e-5), ("drift", 30, 1e-5),  # 30 = n - 1: every direction there is
    ("steep", 15, 1e-4), ("a real run", 5, 1e-5)])
def test_basis_equals_float64_svd(sampled, kind, k, bound, chunk_bytes):
    window = (load_window(snapshot_paths(sampled, range(6)), small(10)) if kind == "a real run"
              else torch.tensor({"drift": trajectory, "steep": steep}[kind]()))
    X = window.numpy().copy()
    P, explained = pca_basis(window, k, chunk_bytes=chunk_bytes)
    assert np.array_equal(window.numpy(), X)  # left as it is
    centred = X.astype(np.float64) - X.astype(np.float64).mean(0)
    _, S, Vt = np.linalg.svd(centred, full_matrices=False)
    assert P.shape == (k, X.shape[1]) and P.dtype == torch.float32
    assert angle(P, Vt[:k]) < bound
    np.testing.assert_allclose(explained, S[:k] ** 2 / (S**2).sum(), rtol=1e-6)
    Q = P.double()
    assert (Q @ Q.T - torch.eye(k, dtype=torch.float64)).abs().max() <= 1e-6
    scores = torch.tensor(centred) @ Q.T  # (n, k): coefficients times singular values; the largest fixes the sign
    assert (scores.gather(0, scores.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("k", [20, 0.5, 0.99, 0.9999])
def test_basis_equals_sklearn_full(k, spherical):
    """A share of the variance as the number of components, too; spherical: of the snapshots divided by their norms."""
    X = trajectory(n=41) * np.linspace(1, 2, 41, dtype=np.float32)[:, None]
    reference = X.astype(np.float64)
    pca = PCA(n_components=k, svd_solver="full").fit(
        reference / np.linalg.norm(reference, axis=1, keepdims=True) if spherical else reference)
    P, explained = pca_basis(torch.tensor(X), k, spherical=spherical)
    assert len(P) == pca.n_components_ and angle(P, pca.components_) < 1e-5
    np.testing.assert_allclose(explained, pca.explained_variance_ratio_, rtol=1e-5)


@pytest.mark.parametrize(("window", "k", "message"), [
    *((torch.randn(5, 100), k, f"5 snapshots have 1 to 4 principal components, not {k}") for k in (0, 5, 40, -0.5)),
    (torch.randn(100).expand(6, 100), 2, "0 directions"), (torch.randn(3, 100)[[0, 1, 2, 0, 1, 2]], 3, "2 directions"),
])
def test_more_components_than_there_are_directions_are_refused(window, k, message):
    with pytest.raises(ValueError, match=message):
        pca_basis(window.clone(), k)


@pytest.mark.parametrize(("window", "k", "message"), [
    (torch.ones(5, 8).cumsum(0).long(), 2, "the window is of torch.int64"), (torch.randn(5, 8), 2.5, "not 2.5"),
    (torch.randn(5, 8).index_fill(0, torch.tensor([2]), torch.nan), 2, "hold NaN or infinite values"),
])
def test_windows_of_other_numbers_are_refused(window, k, message):
    with pytest.raises(ValueError, match=message):
        pca_basis(window, k)


def test_a_window_with_gradients_gives_a_basis_without():
    """And whatever torch's default device is."""
    window = torch.randn(5, 8, requires_grad=True)
    torch.set_default_device("meta")
    try:
        P, _ = pca_basis(window, 3.0)
    finally:
        torch.set_default_device(None)
    assert P.shape == (3, 8) and P.device.type == "cpu" and not P.requires_grad


@pytest.mark.parametrize("ratio", [1e-4, 1e-5, 1e-6, 1e-7])
def test_directions_of_rounding_alone_are_refused(ratio):
    """The rows of P are orthonormal, or there is none: the least direction has this share of the largest's length."""
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(2000, 3, dtype=torch.float64)).Q.T
    window = (torch.randn(8, 3, dtype=torch.float64) * torch.tensor([1, 0.5, ratio]) @ Q).float()
    try:
        P, _ = pca_basis(window, 3)
    except ValueError as error:
        assert ratio < 1e-5 and "2 directions" in str(error)
    else:
        assert ratio > 1e-6 and (P @ P.T - torch.eye(3)).abs().max() < 1e-3


def test_the_directions_of_a_snapshot_of_zeros_are_refused():
    with pytest.raises(ValueError, match="a snapshot is zero everywhere: spherical PCA divides by its norm"):
        pca_basis(torch.cat([torch.zeros(1, 50), torch.randn(4, 50)]), 2, spherical=True)


def test_window_rows_are_parameters_in_order_and_model_starts_at_the_first(sampled):
    model, other = small(10), small(10)
    paths = snapshot_paths(sampled, range(1, 6, 2))
    window = load_window(paths, model)
    assert window.shape == (3, 6_282)
    for row, path in zip(window, paths, strict=True):
        other.load_state_dict(state(path))
        assert torch.equal(row, flat_parameters(other))
    assert same(model.state_dict(), paths[0])  # buffers included


def test_official_snapshots_load(sampled, tmp_path, capsys):
    """DataParallel's `module.` prefix, double precision and other names (by position) are understood."""
    values, model = state(sampled / "2.pt"), small(10)
    torch.save({f"module.{name}": value for name, value in values.items()}, tmp_path / "0.pt")
    torch.save({n: v.double() if v.is_floating_point() else v for n, v in values.items()}, tmp_path / "1.pt")
    torch.save(dict(enumerate(values.values())), tmp_path / "2.pt")
    window = load_window([sampled / "2.pt", *snapshot_paths(tmp_path, range(3))], model)
    assert all(torch.equal(row, window[0]) for row in window)
    names, converted = sorted(capsys.readouterr().err.splitlines(), key=lambda line: "converted" in line)
    assert "/2.pt holds other names" in names and names.endswith("matched by position")
    assert converted.endswith("/1.pt holds torch.float64; converted to torch.float32")


def test_flat_parameters_are_the_model():
    """A step on w is a step of the model, and the other way round; order as torch's own flattening."""
    model = models.get_model("resnet8", 10)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    w = flat_parameters(model)
    assert torch.equal(w, before)
    w.add_(1)
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), before + 1)
    names = dict(model.named_parameters())
    assert torch.equal(torch.cat([v.reshape(-1) for n, v in model.state_dict().items() if n in names]), before + 1)
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), w)
    again = flat_parameters(model)
    assert again.data_ptr() == w.data_ptr() and again.shape == w.shape


@pytest.mark.parametrize(("change", "message"), [
    ({"bn1.weight": torch.full((16,), torch.nan)}, "bn1.weight holds NaN"),
    ({"linear.bias": None}, r"linear.bias is missing, in the network \(10,\)"),
    ({"linear.weight": torch.zeros(9, 32)},
     r"linear.weight is \(9, 32\), in the network \(10, 32\) .*--arch, or number of classes"),
    ({5: torch.zeros(1)}, r"another network: 5 is \(1,\), in the network missing"),
    ({"epoch": 3}, "is not a state dict"),
])
def test_read_snapshot_names_what_is_wrong(sampled, tmp_path, change, message):
    bad = {name: value for name, value in {**state(sampled / "1.pt"), **change}.items() if value is not None}
    torch.save(bad, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=f"bad.pt.*{message}"):
        read_snapshot(tmp_path / "bad.pt", small(10))


@pytest.mark.parametrize("kind", ["pca", "random", "snapshots"])
def test_every_basis_is_orthonormal_and_explains_what_it_says(kind):
    """Shares against float64; the window here has 12 snapshots of a random walk."""
    window = torch.randn(12, 5000, generator=torch.Generator().manual_seed(3)).cumsum(0)
    X = window.double().numpy()
    P, shares = make_basis(window.clone(), 5, kind, seed=4)
    assert P.shape == (5, 5000) and P.is_contiguous()
    Q = P.double().numpy()
    assert np.abs(Q @ Q.T - np.eye(5)).max() < 1e-5
    centred = X - X.mean(0)
    np.testing.assert_allclose(shares, ((centred @ Q.T) ** 2).sum(0) / (centred**2).sum(), rtol=1e-4, atol=1e-9)
    again, _ = make_basis(window.clone(), 5, kind, seed=4)
    assert torch.equal(P, again)
    if kind == "snapshots":  # 5 of the 11 after the first, the first of those and the last among them
        seen = (X[[1, 4, 6, 8, 11]] - X[0]).T
        assert np.abs(seen - Q.T @ (Q @ seen)).max() < 1e-3
    if kind == "random":
        other, _ = make_basis(window.clone(), 5, kind, seed=5)
        assert np.linalg.norm(Q @ other.double().numpy().T) < 0.5 and sum(shares) < 0.05


def test_repeated_snapshots_span_nothing():
    window = torch.randn(1, 100).repeat(6, 1) + torch.tensor([0.0, 1, 1, 1, 2, 3])[:, None] * torch.randn(6, 100)[:1]
    with pytest.raises(ValueError, match="do not span 3 dimensions"):
        make_basis(window, 3, "snapshots")
