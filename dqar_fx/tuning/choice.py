"""Which sites may reuse at all, where that was decided by measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dqar_fx.errors import TuningError
from dqar_fx.graph.sites import Site


@dataclass(frozen=True, slots=True)
class SiteChoice:
    """The sites that compute at every step, whatever the schedule says. Made by ``tune``; given as ``sites``.

    These keep their number: a schedule decides for as many sites as before, a ``Plan`` still fits, and what the rule
    says of every other site stays as it was. They store nothing and are compiled as if they were no sites.

    Attributes:
        num_sites: of the model that was measured.
        left: why, by the number of the site.
    """

    num_sites: int
    left: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [site for site in self.left if not 0 <= site < self.num_sites]
        if wrong:
            raise TuningError(
                f"SiteChoice.left has sites {wrong}, but the model has {self.num_sites}: they are counted from 0."
            )

    def __call__(self, site: Site) -> bool:
        """True if ``site``, numbered among all sites of the model, may reuse."""
        return site.index not in self.left

    @property
    def kept(self) -> tuple[int, ...]:
        """The numbers of the sites that may reuse."""
        return tuple(site for site in range(self.num_sites) if site not in self.left)

    def check(self, num_sites: int) -> None:
        """Refuse a model with another number of sites.

        Raises:
            TuningError: it was another model, another size of it, or another ``CacheConfig.target``, that was measured.
        """
        if num_sites != self.num_sites:
            raise TuningError(
                f"`sites` was chosen by measuring a model with {self.num_sites} sites, and this one has {num_sites}. "
                f"Tune this model, with inputs and a cache like those it runs with."
            )
