"""The code of docs/ as it stands there."""

from pathlib import Path

import numpy as np
import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [part.split("```")[0] for part in page.read_text(encoding="utf-8").split("```python\n")[1:]]
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)  # one after another, as a reader does
    if page.stem == "training":
        for name in ("trained", "kept", "learned", "own", "further"):
            kl = kl_to_posterior(names, names[name].policy or names["policy"])
            assert (kl < 0.05).all(), (name, kl)
        assert np.isfinite(names["amortised"].stats["unseen_elbo"]).all()


def kl_to_posterior(names, policy):
    """KL(q || pi*) of the page's problem by enumeration, (prompt,)."""
    lm, prompts = names["lm"], names["prompts"]
    prior, q = lm(prompts, 3), policy(prompts, 3)
    x = prior.enumerate_support()
    with torch.no_grad():
        reward = torch.tensor(names["letters"](lm.decode(x).ravel())).reshape(x.shape[:-1])
        log_target = prior.log_prob(x) + reward / 0.5
        log_q = q.log_prob(x)
        return (log_q.exp() * (log_q - log_target)).sum(0) + log_target.logsumexp(0)
