"""`Posterior`, the result of every engine: its draws, and the ways out of them: decisions, ArviZ, files, a report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bayeslm import display
from bayeslm.files import reading
from bayeslm.posterior_draws import DiagnosticsWarning, PosteriorDraws
from bayeslm.processes import is_first

from .validation import Count, Seed, validated

if TYPE_CHECKING:
    from bayeslm.decisions import Decision  # what judges posteriors is imported when it is asked for: pandas is slow

__all__ = ["DiagnosticsWarning", "Posterior"]


class Posterior(PosteriorDraws):
    """What every engine returns: draws of a posterior with their weights, and what can be made of them."""

    def __repr__(self) -> str:
        return display.text(self)

    def _repr_html_(self) -> str:
        return display.html(self)

    def decide(
        self,
        utility: Callable[[str, str], float] | Literal["reward"],
        *,
        num_candidates: int = 32,
        also: Sequence[str] = (),
        site: str | None = None,
    ) -> Decision:
        """Return the text of highest expected utility for each prompt; see `bayeslm.decisions.decide`.

        :param utility: of a pair of texts, (candidate, draw), such as those in `bayeslm.decisions`; or "reward".
        :param num_candidates: the most candidates of a prompt.
        :param also: further candidates, that need not have been drawn.
        :param site: the completion site, where the model has several.
        :returns: a `bayeslm.decisions.Decision`.
        :raises ValueError: if ``site`` is needed and missing, or unknown, or has several texts a prompt; if every
            weight of a prompt is zero, or a utility is not a finite number.
        """
        from bayeslm.decisions import decide

        return decide(self, utility, num_candidates=num_candidates, also=also, site=site)

    @validated
    def to_arviz(self, num_draws: Count | None = None, seed: Seed = 0) -> Any:
        """Return ArviZ's container of the installed version: `InferenceData` (0.x) or `xarray.DataTree` (1.x).

        ArviZ's functions are right on it without arguments. Groups, with dims (chain, draw, ...) and prompts' labels as
        coordinates:

          posterior       rewards, "<site>_length", and the latents other than texts; equally weighted, resampled
          texts           the completions of the same draws as strings, and "<site>_ids", their token ids
          sample_stats    log_weight, lp (the log joint) and `sample_stats` of the same draws
          log_prior       log p of the latents of the same draws, for the sensitivity to the prior
          log_likelihood  of observed data alone, of each observation (inside the plate of prompts, of each prompt's): a
                          reward is no data that `loo` could leave out
          posterior_predictive   replicated observed sites, if `bayeslm.inference.predict` has been run
          proposal        the raw draws with log_weight and lp, if weights differ
          prior, observed_data   if the posterior has them

        Independent draws of one run are divided into four chains, so that R̂ compares them.

        A slash in a site's name becomes a dot.

        :param num_draws: per chain, as in `resample`.
        :param seed: of the resampling.
        :raises ValueError: if every weight of a prompt is zero, or num_draws < 1.
        """
        from bayeslm.arviz import make_attrs, make_datasets, make_groups
        from bayeslm.arviz_versions import container

        groups = make_groups(self._resampled(num_draws, seed), self)
        return container(make_datasets(groups, self.prompt_labels), make_attrs(self.engine, self.kind))

    @validated
    def save(self, directory: str | Path) -> Path:
        """Write everything into a new or empty directory, which `load` reads; its "posterior.nc" opens in ArviZ too.

        Of several processes that run together the first one writes alone; the others return the path at once.
        See `bayeslm.storage` for the files. If no draw has positive weight, a warning says that ArviZ's groups are
        left out of "posterior.nc".

        :returns: the absolute path of the directory.
        :raises FileExistsError: if the directory is a file or not empty.
        :raises TypeError: if `stats` holds anything but numbers, strings, lists, dictionaries and arrays, or the policy
            has no method ``save_pretrained``.
        :raises OSError: if the disk refuses. After any error nothing is left on the disk.
        """
        from bayeslm.arviz import make_attrs, make_groups
        from bayeslm.storage import save

        if not is_first():
            return Path(directory).absolute()
        try:
            groups = make_groups(self._resampled(None, 0), self)
        except ValueError as error:
            warnings.warn(f"saved without groups for ArviZ: {error}", stacklevel=2)
            groups = {}
        fields = {name: value for name, value in vars(self).items() if name not in ("policy", "policy_path")}
        attrs = make_attrs(self.engine, self.kind)
        return save(fields, self.policy, groups, self.prompt_labels, attrs, Path(directory))

    @validated
    def report(self, path: str | Path, *, title: str | None = None) -> Path:
        """Write a report, one HTML file that needs no network; see `bayeslm.report.write_report`.

        :param path: of the file, which is replaced if there is one.
        :param title: of the report. Default: what was inferred, as far as it is known.
        :returns: the absolute path.
        :raises ImportError: without matplotlib.
        :raises OSError: if the disk refuses; the file is then as it was before.
        """
        from bayeslm.report import write_report

        return write_report({self.engine: self}, path, title=title)

    @staticmethod
    @validated
    def concatenate(posteriors: Sequence[Posterior]) -> Posterior:
        """Return several runs of one engine on one program, with seeds of their own, as one: the chains of all.

        Four runs on four machines become one posterior, whose weights, log Z, bounds and errors are those of all draws.
        Runs with chains of other lengths become one chain, if their draws are independent. Counts in `stats` are added
        up, figures of chains joined, ``seconds`` is the longest run's; what differs and has no sum is left out. The
        policy is kept if it is one and the same.

        :raises ValueError: if there is no run; if their engines, prompts or sites differ; if they are enumerations, of
            which one is complete; if dependent draws are in chains of different lengths; or if two are copies.
        """
        from bayeslm.concatenation import concatenate

        return Posterior(**concatenate(posteriors))

    @staticmethod
    @validated
    def load(directory: str | Path) -> Posterior:
        """Read a posterior that `save` wrote. The policy is not loaded: `policy_path` is its folder.

        :raises FileNotFoundError: if the directory holds no posterior.
        :raises ValueError: if a version of bayeslm with another format wrote it, or a file is damaged.
        """
        from bayeslm.storage import load

        fields = load(Path(directory))
        with reading(Path(directory) / "posterior.json"):  # arrays of other shapes or types than it says
            return Posterior(**fields | {"dims": {name: tuple(dims) for name, dims in fields["dims"].items()}})
