"""A method of one object replaced on that object alone, so that copies of it are not affected."""

from __future__ import annotations

import types
from typing import Any


class StandIn:
    """Stands in for ``owner.name``; subclasses define ``__call__``.

    A plain function would be copied along with its owner and go on acting for the original: a deep copy of a watched
    scheduler would then step the original scheduler. A copy (or pickle) of the owner gets its class's own method
    instead.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner = owner
        self._name = name
        self.__wrapped__ = getattr(owner, name)  # what `inspect.signature` follows
        vars(owner)[name] = self

    @classmethod
    def remove(cls, owner: Any, name: str) -> None:
        """Take the stand-in away, if there is one of this class."""
        if isinstance(vars(owner).get(name), cls):
            del vars(owner)[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = memo.get(id(self._owner), self._owner)
        return types.MethodType(getattr(type(owner), self._name), owner)

    def __reduce__(self) -> Any:
        return getattr, (self._owner, self._name)  # of the unpickled owner, which has no stand-in
