"""How a stored value looks: what is kept, in which dtype, with which scales."""

from __future__ import annotations

from dataclasses import dataclass

from dqar_fx.errors import CacheError

TARGETS = ("output",)
DTYPES = ("int8", "native")
GRANULARITIES = ("token", "tensor", "channel", "head")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What a compute step stores for the reuse steps after it.

    Args:
        target: ``"output"``, what leaves the attention module (everything that only feeds it can be skipped).
        dtype: ``"int8"`` (symmetric, float32 scales) or ``"native"`` (the model's own dtype, exact).
        granularity: which values share one scale when ``dtype="int8"``, for an exit ``[B, N, D]``:

            ========= ============== ==========================================
            token     ``[B, N, 1]``  the default; any layout
            tensor    ``[B, 1, 1]``  one per sample, never across the batch
            channel   ``[B, 1, D]``  over the tokens of a sample
            head      ``[B, 1, H]``  over the tokens and channels of one head
            ========= ============== ==========================================

        device: ``None``: beside the model. ``"cpu"``: in host memory (pinned where the model runs on CUDA), for video
            models whose cache does not fit on the device: values are copied out and back asynchronously, one piece of
            the model ahead.
        keep_buffers: keep the stored values' memory from one generation for the next, at the same addresses, instead
            of freeing it when a generation ends.

    Raises:
        CacheError: for a value that is not listed above.
    """

    target: str = "output"
    dtype: str = "int8"
    granularity: str = "token"
    device: str | None = None
    keep_buffers: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("target", TARGETS), ("dtype", DTYPES), ("granularity", GRANULARITIES)):
            value = getattr(self, name)
            if value not in allowed:
                raise CacheError(f"CacheConfig.{name} is {value!r}. Use {' or '.join(repr(a) for a in allowed)}.")
        if self.device not in (None, "cpu"):
            raise CacheError(
                f"CacheConfig.device is {self.device!r}. Use None (beside the model) or 'cpu' (in host memory)."
            )

    @classmethod
    def parse(cls, text: str) -> CacheConfig:
        """``"int8"``, ``"native"`` or ``"int8:channel"``, as on a command line; with ``"@cpu"`` for host memory."""
        layout, _, device = text.partition("@")
        dtype, _, granularity = layout.partition(":")
        return cls(dtype=dtype, granularity=granularity or "token", device=device or None)

    def __str__(self) -> str:
        layout = self.dtype if self.dtype == "native" else f"{self.dtype}:{self.granularity}"
        return f"{layout}@{self.device}" if self.device else layout
