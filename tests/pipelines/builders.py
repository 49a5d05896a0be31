"""Diffusers pipelines with small random components: the real pipeline class and scheduler, nothing downloaded.

Each function returns ``(pipe, kwargs)`` where ``pipe(**kwargs)`` makes one sample. Weights depend on nothing but the
function, so that two pipelines of one function are equal; what a call is asked for depends on a ``Request``. Text
encoders are left out where a pipeline takes embeddings, and decoders where it returns latents.
"""

from __future__ import annotations

from tests.pipelines import images, videos  # noqa: F401  # importing them registers their builders
from tests.pipelines.kit import BUILDERS, STEPS, Request

__all__ = ["BUILDERS", "STEPS", "Request"]
