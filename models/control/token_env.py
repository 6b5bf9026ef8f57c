r"""Text completion as a Gymnasium environment: an action is the next token, and the reward comes at the end.

    s_t = (c, x_1 .. x_t),    a_t = x_{t+1},    r_t = 1[x_{1..t+1} is complete] r(c, x) + \beta \log p(a_t | s_t)

With the optional second term, the optimal policy of maximum-entropy reinforcement learning at temperature \beta (soft
Q-learning, Haarnoja et al. 2017, arXiv 1702.08165) is the posterior, and its soft value is \beta log Z:

    E_q[ \sum_t r_t ] + \beta H(q)  =  E_q[ r ] - \beta KL(q || p)

so that any library of reinforcement learning can solve the problems of this one. Returns are not discounted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bayeslm.models.lm import Autoregressive, Decoder, LanguageModel, Prompt
from bayeslm.models.rewards import Reward, RewardFunction, with_trainer_arguments
from bayeslm.validation import Count, Positive, Unchecked, validated

try:
    import gymnasium
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('TokenEnv needs Gymnasium: pip install "bayeslm[gym]"', name="gymnasium") from error
from gymnasium import spaces
from gymnasium.error import InvalidAction, ResetNeeded

Observation = NDArray[np.int64]


@validated
class TokenEnv(gymnasium.Env[Observation, np.int64]):
    """One completion per episode: ``gymnasium.make("bayeslm/Token-v0", prior=..., reward=..., prompts=...)``.

    The action space is ``Discrete(vocab_size)``. An observation holds the token ids of the prompt and of the completion
    so far, int64 (longest prompt + max_new_tokens,). Prompts are padded on the left and completions on the right, with
    the id ``vocab_size``. The observation space is ``MultiDiscrete``, whose entries libraries treat as categories. An
    episode terminates at an EOS token, or at token ``max_new_tokens``; it is never truncated.

    ``info`` of a step has ``log_prior``, log p(token | prompt, tokens before) in nats. ``info`` of an episode's last
    step also has ``completion``, its text, and ``score``, its reward r. ``info`` of a reset has ``prompt``, the index
    of the prompt, which is drawn uniformly, or chosen by ``reset(options={"prompt": index})``.

    :param prior: the language model, or a function without arguments that returns it. ``gymnasium.make`` copies its
        arguments; ``prior=lambda: lm`` shares one model among environments.
    :param reward: any function of (prompts, completions, **columns), see `bayeslm.models.rewards`.
    :param prompts: prompts of the episodes.
    :param max_new_tokens: length of the longest completion, in tokens.
    :param beta: the KL coefficient, which adds beta * log_prior to the reward of every step; None adds nothing.
    :param temperature: divides the prior's logits.
    :param columns: further arguments of the reward, by name, with one value per prompt.
    :param render_mode: "ansi" makes `render` return the text so far; None makes it return None.
    :raises ValueError: if ``beta`` is not positive and finite, ``max_new_tokens`` < 1, a column does not have one value
        per prompt, or ``render_mode`` is unknown.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}

    def __init__(
        self,
        prior: LanguageModel | Callable[[], LanguageModel],
        reward: Reward | RewardFunction,
        prompts: Annotated[Sequence[Prompt], Unchecked],
        max_new_tokens: Count = 24,
        *,
        beta: Positive | None = None,
        temperature: Positive = 1.0,
        columns: Mapping[str, Sequence[Any]] | None = None,
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        self.prior = prior if isinstance(prior, LanguageModel) else prior()
        self.reward = reward if isinstance(reward, Reward) else Reward(reward)
        self.prompts = list(prompts)
        self.beta = beta
        self.columns = dict(columns or {})
        self.render_mode = render_mode
        for name, column in self.columns.items():
            if len(column) != len(self.prompts):
                raise ValueError(f"TokenEnv: column {name!r} has {len(column)} values for {len(self.prompts)} prompts")
        ids, mask = self.prior(self.prompts, max_new_tokens, temperature).flat_prompts
        padding = self.prior.vocab_size
        ids = ids if mask is None else ids.masked_fill(mask == 0, padding)
        empty = ids.new_full((len(ids), max_new_tokens), padding)
        self._first_observations: Observation = torch.cat([ids, empty], -1).cpu().numpy()  # (prompt, observation)
        self._prompt_length = ids.shape[-1]
        self._distributions = [self.prior([prompt], max_new_tokens, temperature) for prompt in self.prompts]
        self.action_space = spaces.Discrete(padding)
        self.observation_space = spaces.MultiDiscrete(np.full(self._first_observations.shape[-1], padding + 1))
        self._prompt = 0
        self._decoder: Decoder | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a completion.

        :raises IndexError: if ``options`` has the index of no prompt.
        """
        super().reset(seed=seed)
        chosen = (options or {}).get("prompt")
        self._prompt = int(self.np_random.integers(len(self.prompts)) if chosen is None else chosen)
        if not 0 <= self._prompt < len(self.prompts):
            raise IndexError(f"TokenEnv: there is no prompt {self._prompt} among {len(self.prompts)}")
        self._decoder = self._distribution.decoder()
        return self._first_observations[self._prompt].copy(), {"prompt": self._prompt}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append a token to the completion.

        :raises InvalidAction: if ``action`` is no token id.
        :raises ResetNeeded: before the first `reset`, and after the end of a completion.
        :raises ValueError: if the completion's reward is -inf, which would make the mean return of any policy that may
            write this completion -inf.
        """
        decoder = self._decoder
        if decoder is None or self._over:
            raise ResetNeeded(
                "TokenEnv: call reset() before writing the first token of a completion, and after the last"
            )
        if not self.action_space.contains(action):
            raise InvalidAction(
                f"TokenEnv: action {action!r} is no token id, which is an integer from 0 to {self.prior.vocab_size - 1}"
            )
        with torch.no_grad():
            token = torch.tensor([int(action)], device=decoder.values.device)
            score = decoder.logits.log_softmax(-1)[:, int(action)]
            decoder.append(token, score)
        info: dict[str, Any] = {"log_prior": float(score)}
        gain = 0.0 if self.beta is None else self.beta * info["log_prior"]
        over = self._over
        if over:
            info["completion"] = self._text
            info["score"] = self._score(info["completion"])
            gain += info["score"]
        return self._observation(), gain, over, False, info

    def render(self) -> str | None:
        """Return the prompt, a bar, and the completion so far; None without a ``render_mode``."""
        if self.render_mode is None:
            return None
        return f"{self._distribution.prompt_texts()[0]}|{'' if self._decoder is None else self._text}"

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenEnv:
        """Return a copy with its own completion and random state, which shares the language model and the reward."""
        new = copy.copy(self)
        memo[id(self)] = new
        if self._decoder is not None:
            for prompted in (self._decoder.prompted, self._decoder.prompted.truncating):
                memo[id(prompted)] = prompted  # holds a network
        new._decoder = copy.deepcopy(self._decoder, memo)
        new._np_random = copy.deepcopy(self._np_random, memo)
        new.action_space = copy.deepcopy(self.action_space, memo)
        return new

    @property
    def _distribution(self) -> Autoregressive:
        return self._distributions[self._prompt]

    @property
    def _over(self) -> bool:
        """Whether the completion has ended. `Decoder.done` may notice it some tokens later on an accelerator."""
        decoder = self._decoder
        return decoder is not None and (decoder.t == self._distribution.max_new_tokens or bool(decoder.finished.all()))

    @property
    def _text(self) -> str:
        assert self._decoder is not None
        return str(self._distribution.decode(self._decoder.values[:, : self._decoder.t])[0]) if self._decoder.t else ""

    def _observation(self) -> Observation:
        assert self._decoder is not None
        observation, t = self._first_observations[self._prompt].copy(), self._decoder.t
        observation[self._prompt_length : self._prompt_length + t] = self._decoder.values[0, :t].cpu().numpy()
        return observation

    def _score(self, text: str) -> float:
        assert self._decoder is not None
        columns = {name: [column[self._prompt]] for name, column in self.columns.items()}
        values = self._decoder.values
        cut = self._distribution.truncated(values).cpu().numpy()
        arguments = with_trainer_arguments(columns, self.prior.token_ids(values), cut)
        score = float(self.reward([self.prompts[self._prompt]], [text], **arguments))
        if math.isinf(score):
            raise ValueError(
                f"TokenEnv: the reward of {text!r} is -inf, which makes mean returns -inf; replace constraints by a "
                "finite penalty"
            )
        return score
