"""The empirical risk: a model, a loss, and the data, as curvature matrices need them."""

from curvlinops.risk.data import Batch
from curvlinops.risk.empirical_risk import EmpiricalRisk
from curvlinops.risk.losses import Loss, loss_entry

__all__ = ["Batch", "EmpiricalRisk", "Loss", "loss_entry"]
