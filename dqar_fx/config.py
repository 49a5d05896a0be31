"""How a stored value looks: what is kept, in which dtype, with which scales."""

from __future__ import annotations

from dataclasses import dataclass

from dqar_fx.balance import Balance
from dqar_fx.errors import CacheError

TARGETS = ("output", "kv")
#: ``CacheConfig.balance`` without calibration.
DYNAMIC = "dynamic"
#: From the least to the most exact.
DTYPES = ("int4", "int8", "native")
GRANULARITIES = ("token", "tensor", "channel", "head")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What a compute step stores for the reuse steps after it.

    Args:
        target: ``"output"``, what leaves the attention module (everything that only feeds it can be skipped), or
            ``"kv"``, the keys and values as the attention operator is given them (after norms and rotary embedding);
            queries stay fresh, so only what leads to the keys and values can be skipped. Each operator is a site then.
        dtype: ``"int8"`` (symmetric, float32 scales), ``"int4"`` (the same with 15 levels, two values a byte; 18 times
            the error: measure before you use it) or ``"native"`` (the model's own dtype, exact). With
            ``target="kv"`` also a pair, of the keys and of the values, e.g. ``("native", "int8")``. (One tensor that is
            both is stored once, in the more exact of the two.)
        granularity: which values share one scale when ``dtype="int8"``, for an exit ``[B, N, D]``, and for keys and
            values ``[B, H, N, D]``:

            ========= ============== ================= ==========================================
            token     ``[B, N, 1]``  ``[B, H, N, 1]``  the default; any layout
            tensor    ``[B, 1, 1]``  ``[B, 1, 1, 1]``  one per sample, never across the batch
            channel   ``[B, 1, D]``  ``[B, H, 1, D]``  over the tokens of a sample
            head      ``[B, 1, H]``  ``[B, H, 1, 1]``  over the tokens and channels of one head
            ========= ============== ================= ==========================================

            INT4 has scales per token, or per ``group``.
        group: with ``"int4"``, how many adjacent channels of a token share a scale (32 or 64, say; the last group may
            be smaller); None: all.
        balance: channel-wise salience balancing (see ``dqar_fx.balance``) of what is stored in INT8 or INT4: of
            outputs, or with ``target="kv"`` of the keys. It is undone when they are read, so all that it moves is the
            rounding: towards the salient channels. ``"dynamic"`` takes the factors from the very values that are
            stored (one float32 more a channel), a ``Balance`` has calibrated ones. None (default): none.
        device: ``None``: beside the model. ``"cpu"``: in host memory (pinned where the model runs on CUDA), for video
            models whose cache does not fit on the device: values are copied out and back asynchronously, one piece of
            the model ahead.
        lossless: compute once, whatever the schedule says, what is exact at every step: values that follow from
            parameters and from what the generation is conditioned on alone, such as projections of the prompt, the
            keys and values of a cross-attention on it, tables of rotary embeddings (``graph.hoist``). Kept in the
            model's own dtype beside the model; computed again when one of those inputs is other memory or was written
            into. And compute for all steps of a run at once what depends on the timestep besides, but on no latent,
            where the scheduler tells the timesteps (``graph.timestep_values``; not with ``backend="eager"``). A
            schedule that reuses nothing leaves these alone too.
        keep_buffers: keep the stored values' memory from one generation for the next, at the same addresses, instead
            of freeing it when a generation ends.

    Raises:
        CacheError: for a value that is not listed above.
    """

    target: str = "output"
    dtype: str | tuple[str, str] = "int8"
    granularity: str = "token"
    device: str | None = None
    keep_buffers: bool = False
    lossless: bool = True
    group: int | None = None
    balance: str | Balance | None = None

    def __post_init__(self) -> None:
        self._check("target", self.target, TARGETS)
        if isinstance(self.dtype, tuple):
            if len(self.dtype) != 2:
                raise CacheError(f"CacheConfig.dtype is {self.dtype!r}. Give one dtype, or a pair (key, value).")
            if self.target != "kv":
                raise CacheError(
                    f"CacheConfig.dtype is {self.dtype!r}, a pair (key, value), and target is {self.target!r}, which "
                    f"stores neither. Use target='kv', or one dtype."
                )
        for dtype in self.dtypes:
            self._check("dtype", dtype, DTYPES)
        self._check("granularity", self.granularity, GRANULARITIES)
        if self.group is not None:
            if type(self.group) is not int or self.group < 1:  # True is no number of channels
                raise CacheError(f"CacheConfig.group is {self.group!r}. Give a number of channels, 32 or 64, or None.")
            if "int4" not in self.dtypes:
                raise CacheError(f"CacheConfig.group is {self.group}, which only dtype='int4' reads. Leave it out.")
        if "int4" in self.dtypes and self.granularity != "token":
            raise CacheError(
                f"CacheConfig.granularity is {self.granularity!r}, but INT4 has scales per token or (group=32) per "
                f"group of channels. Use granularity='token'."
            )
        if self.balance is not None:
            self._check_balance(self.balance)
        if self.device not in (None, "cpu"):
            raise CacheError(
                f"CacheConfig.device is {self.device!r}. Use None (beside the model) or 'cpu' (in host memory)."
            )
        if isinstance(self.dtype, tuple) and self.dtype[0] == self.dtype[1]:
            object.__setattr__(self, "dtype", self.dtype[0])  # equal configs are equal, however they were said

    def _check_balance(self, balance: str | Balance) -> None:
        if balance != DYNAMIC and not isinstance(balance, Balance):
            raise CacheError(
                f"CacheConfig.balance is {balance!r}. Use None, {DYNAMIC!r}, or a Balance (Balance.load(file), "
                f"dqar_fx.calibrate_balance)."
            )
        if self.dtypes[0] == "native":
            raise CacheError(
                f"CacheConfig.balance is set, and {'keys' if self.target == 'kv' else 'outputs'} are stored in the "
                f"model's own dtype: there is no rounding to balance. Use dtype='int8' or 'int4', or leave it out."
            )
        if self.granularity == "channel":
            raise CacheError(
                "CacheConfig.balance is set, and granularity is 'channel': where each channel has a scale of its own, "
                "none can spoil another's. Use granularity='token', or leave the balance out."
            )
        if isinstance(balance, Balance) and balance.target != self.target:
            raise CacheError(
                f"CacheConfig.balance was calibrated for target={balance.target!r}, and target is {self.target!r}. "
                f"Calibrate it for this target."
            )

    @staticmethod
    def _check(name: str, value: object, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise CacheError(f"CacheConfig.{name} is {value!r}. Use {' or '.join(repr(a) for a in allowed)}.")

    @property
    def dtypes(self) -> tuple[str, str]:
        """The dtype of the keys and that of the values; twice the same where ``dtype`` is one."""
        return self.dtype if isinstance(self.dtype, tuple) else (self.dtype, self.dtype)

    def dtype_of(self, role: str) -> str:
        """How to store what takes part in the attention as ``role``: ``"key"``, ``"value"``, ``"both"``, ``""``."""
        key, value = self.dtypes
        if role == "both":
            return max(key, value, key=DTYPES.index)
        return value if role == "value" else key

    @classmethod
    def parse(cls, text: str) -> CacheConfig:
        """``[kv:]DTYPE[/DTYPE][:GRANULARITY][+balance[=FILE]][@cpu]``, as on a command line.

        ``"int8"``, ``"native"`` or ``"int8:channel"`` store outputs; ``"kv:int8"``, ``"kv:native/int8:token"`` (keys
        / values) or ``"kv"`` (INT8 per token) store keys and values; ``"int4:group32"`` has a scale for 32 channels;
        ``"int8+balance"`` is balanced dynamically, ``"int8+balance=FILE"`` with the calibrated factors in that file;
        with ``"@cpu"`` in host memory.
        """
        layout, balanced, rest = text.partition("+balance")
        balance: str | Balance | None = None
        if balanced:
            file, _, device = rest.rpartition("@") if rest.endswith("@cpu") else (rest, "", "")
            if file and (file[0] != "=" or file == "="):
                raise CacheError(f"{text!r} says {rest!r} behind +balance. Use +balance or +balance=FILE, then @cpu.")
            balance = Balance.load(file[1:]) if file else DYNAMIC
        else:
            layout, _, device = text.partition("@")
        target, _, rest = layout.partition(":")
        if target == "kv":
            layout = rest or "int8"
        else:
            target = "output"
        name, _, granularity = layout.partition(":")
        key, pair, value = name.partition("/")
        dtype = (key, value) if pair else key
        group = None
        if granularity.startswith("group") and granularity[5:].isdecimal():
            granularity, group = "token", int(granularity[5:])
        return cls(target, dtype, granularity or "token", device or None, group=group, balance=balance)

    def __str__(self) -> str:
        layout = "/".join(self.dtype) if isinstance(self.dtype, tuple) else self.dtype
        if self.dtypes != ("native", "native"):
            layout += f":{self.granularity}" if self.group is None else f":group{self.group}"
        if self.target != "output":
            layout = f"{self.target}:{layout}"
        if self.balance is not None:
            file = self.balance.file or "(calibrated)" if isinstance(self.balance, Balance) else ""
            layout += f"+balance={file}" if file else "+balance"
        return f"{layout}@{self.device}" if self.device else layout
