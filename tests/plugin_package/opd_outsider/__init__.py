"""Components for stable-opd by somebody else."""

from opd_outsider.losses import OutsiderKL

__all__ = ["OutsiderKL"]
