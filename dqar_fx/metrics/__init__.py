"""What a gate looks at: the entropy of an attention (R1), signal and noise of a step (R3, R4), the latents (R7)."""

from __future__ import annotations

from dqar_fx.errors import MetricError
from dqar_fx.metrics.entropy import attention_entropy, entropy_in_graph
from dqar_fx.metrics.latents import latent_norm, prediction_snr
from dqar_fx.metrics.snr import snr

__all__ = ["MetricError", "attention_entropy", "entropy_in_graph", "latent_norm", "prediction_snr", "snr"]
