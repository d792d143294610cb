"""DLDR: train networks in the low-dimensional subspace of their own trajectory. See `dldr.subspace`."""
from dldr.subspace import Basis, ProjectedBFGS, ProjectedSGD, flat_parameters, pca_basis

__version__ = "1.0.0"
__all__ = ["Basis", "ProjectedBFGS", "ProjectedSGD", "flat_parameters", "pca_basis"]
