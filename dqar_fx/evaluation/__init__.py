"""How far images drawn with reuse are from those drawn without it, and from real ones; ``dqar-fx evaluate`` uses it."""

from dqar_fx.evaluation.frechet import frechet_distance
from dqar_fx.evaluation.images import psnr, relative_l2, squared_error, ssim
from dqar_fx.evaluation.intervals import Interval, jackknife, mean_interval

__all__ = ["Interval", "frechet_distance", "jackknife", "mean_interval", "psnr", "relative_l2", "squared_error", "ssim"]
