"""Completions as a Gymnasium environment: it obeys Gymnasium's rules, and its optimal policy is the posterior."""

from __future__ import annotations

import copy
import math
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from support.models import table_lm, tiny_llama
from support.statistics import assert_drawn_from, count_completions

import bayeslm.models.control  # noqa: F401  registers the environment
from bayeslm.inference import Exact
from bayeslm.models import TiltedLM
from bayeslm.models.control.token_env import TokenEnv
from bayeslm.models.lm import Decoder

PROMPTS = ["a b", "c"]
TOKENS = 3
VOCAB = 4
LETTERS = np.array([0.0, 1.0, -0.5, 0.25])


def letters(prompts, completions, **columns):
    """Return rewards that depend on the words, their order and the prompt."""
    return [
        sum(LETTERS["_abc".index(word)] / (1 + t) for t, word in enumerate(text.split())) + 0.3 * (prompt == "c")
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def make(**settings):
    lm = table_lm(vocab=VOCAB)
    return gymnasium.make(
        "bayeslm/Token-v0", **({"prior": lambda: lm, "reward": letters, "prompts": PROMPTS} | settings)
    )


def episode(env, actions, **options):
    """Return the rewards and infos of an episode with these actions, and its last observation."""
    _, info = env.reset(options=options)
    rewards, infos = [], [info]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        infos.append(info)
        assert not truncated
        if terminated:
            return rewards, infos, observation
    raise AssertionError("the completion did not end")


# -- Gymnasium's rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [None, 0.5])
@pytest.mark.parametrize("settings", [{}, {"prior": table_lm(vocab=VOCAB)}, {"prior": tiny_llama()}])
def test_it_passes_the_checker(beta, settings):
    env = make(max_new_tokens=TOKENS, beta=beta, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        check_env(make(max_new_tokens=TOKENS, beta=beta, render_mode="ansi", **settings).unwrapped)


def test_it_passes_the_checker_of_stable_baselines3():
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checker.check_env(make(max_new_tokens=TOKENS, beta=0.5).unwrapped)


def test_many_at_once():
    lm = table_lm(vocab=VOCAB)
    settings = {"prior": lambda: lm, "reward": letters, "prompts": PROMPTS, "max_new_tokens": 1}
    envs = gymnasium.make_vec("bayeslm/Token-v0", num_envs=3, vectorization_mode="sync", **settings)
    observations, _ = envs.reset(seed=0)
    _, rewards, terminated, _, infos = envs.step(np.array([0, 1, 2]))
    prompts = ["c" if observation[0] == VOCAB else "a b" for observation in observations]  # the shorter is padded
    assert terminated.all()
    np.testing.assert_allclose(rewards, letters(prompts, ["", "a", "b"]), rtol=1e-6)
    np.testing.assert_allclose(infos["score"], rewards)
    assert all(env.unwrapped.prior is lm for env in envs.envs)


# -- episodes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [None, 0.5])
@pytest.mark.parametrize("lm", [table_lm(vocab=VOCAB), tiny_llama()], ids=["table", "llama"])
def test_returns_are_the_rewards_of_the_texts(lm, beta):
    """This holds for every completion of a table and some of a network; log-probabilities are the model's."""
    env = TokenEnv(lm, letters, PROMPTS, TOKENS, beta=beta, temperature=0.8)
    distribution = lm(PROMPTS, TOKENS, 0.8)
    values = distribution.enumerate_support()[:: 1 if lm.vocab_size == VOCAB else 37]
    log_p = distribution.log_prob(values)
    texts = lm.decode(values)
    with torch.no_grad():
        for value, score, text in zip(values[:, 0], log_p, texts, strict=True):
            if set(text[0].split()) - {"a", "b", "c"}:
                continue
            for i, prompt in enumerate(PROMPTS):
                rewards, infos, observation = episode(env, value.tolist(), prompt=i)
                length = int(distribution.lengths(value[None].expand(2, -1))[0])
                assert len(rewards) == length
                assert infos[0] == {"prompt": i}
                assert infos[-1]["completion"] == text[i]
                assert infos[-1]["score"] == pytest.approx(letters([prompt], [text[i]])[0], abs=1e-6)
                log_prior = [info["log_prior"] for info in infos[1:]]
                assert math.fsum(log_prior) == pytest.approx(float(score[i]), abs=1e-4)
                expected = [(beta or 0.0) * x for x in log_prior]
                expected[-1] += infos[-1]["score"]
                assert rewards == pytest.approx(expected, abs=1e-6)
                ids = [lm.vocab_size] * 3
                ids[:length] = value[:length].tolist()
                own = lm.tokenizer(prompt).input_ids
                assert observation.tolist() == [lm.vocab_size] * (2 - len(own)) + own + ids


def test_an_eos_ends_the_episode_on_an_accelerator_too(monkeypatch):
    """There `Decoder` checks only every eight tokens whether all rows have ended."""
    begin = Decoder.__init__

    def seldom_asked(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self._ask_every = 8

    monkeypatch.setattr(Decoder, "__init__", seldom_asked)
    env = TokenEnv(table_lm(vocab=VOCAB), letters, PROMPTS, TOKENS)
    rewards, infos, _ = episode(env, [1, 0, 2], prompt=0)
    assert len(rewards) == 2
    assert rewards[-1] == infos[-1]["score"] == pytest.approx(letters(PROMPTS[:1], ["a"])[0])
    with pytest.raises(ResetNeeded, match="after the last"):
        env.step(2)


def test_columns_go_to_the_reward():
    def matches(completions, answer, **columns):
        return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]

    env = make(reward=matches, columns={"answer": ["a", "b"]}, max_new_tokens=2)
    for prompt, token in ((0, 1), (1, 2)):
        assert sum(episode(env, [token, 0], prompt=prompt)[0]) == 1.0
        assert sum(episode(env, [token, 1], prompt=prompt)[0]) == 0.0


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_random_policy_draws_uniform_tokens(seed):
    """Completions sampled from the action space have probability VOCAB^-length, and prompts are uniform."""
    env = make(max_new_tokens=TOKENS)
    env.reset(seed=seed)
    env.action_space.seed(seed)
    support = table_lm(vocab=VOCAB)(PROMPTS[:1], TOKENS).enumerate_support()[:, 0]
    draws, prompts = [], []
    for _ in range(500):
        _, info = env.reset()
        prompts.append(info["prompt"])
        value, terminated = [], False
        while not terminated:
            value.append(int(env.action_space.sample()))
            terminated = env.step(value[-1])[2]
        draws.append(value + [0] * (TOKENS - len(value)))
    lengths = table_lm(vocab=VOCAB)(PROMPTS[:1], TOKENS).lengths(support)
    assert_drawn_from(count_completions(torch.tensor(draws), support, VOCAB), -lengths * math.log(VOCAB))
    assert abs(np.mean(prompts) - 0.5) < 4.5 * 0.5 / 500**0.5


def test_a_seed_reproduces_the_prompts():
    env = make(max_new_tokens=1)

    def prompts(seed):
        return [env.reset(seed=seed)[1]["prompt"], *(env.reset()[1]["prompt"] for _ in range(30))]

    assert prompts(0) == prompts(0) != prompts(1)


def test_a_copy_is_independent():
    """Planning needs copies; they share the language model."""
    lm = tiny_llama()

    def refuse(memo):
        raise AssertionError("the network is copied")

    lm.network.__deepcopy__ = refuse
    env = make(prior=lambda: lm, max_new_tokens=TOKENS)
    env.reset(seed=0, options={"prompt": 0})
    env.step(1)
    twin = copy.deepcopy(env)
    assert twin.unwrapped.prior is env.unwrapped.prior
    there = [twin.step(token) for token in (2, 3)]
    assert env.unwrapped.step(3)[4]["log_prior"] != pytest.approx(there[0][4]["log_prior"])
    _, infos, _ = episode(env, [1, 2, 3], prompt=0)
    assert [info["log_prior"] for info in infos[2:]] == pytest.approx([x[4]["log_prior"] for x in there], abs=1e-6)


def test_it_shows_the_text():
    env = make(max_new_tokens=TOKENS, render_mode="ansi")
    env.reset(options={"prompt": 0})
    assert env.render() == "a b|"
    env.step(3)
    assert env.render() == "a b|c"


# -- its optimum ----------------------------------------------------------------------------------------------------


def plan(env, beta: float, prompt: int) -> tuple[float, dict[str, float]]:
    """Run soft value iteration over prefixes by playing the environment.

    :returns: the root's value, and each text's probability under the optimal policy.
    """
    probabilities: dict[str, float] = {}

    def value(prefix: tuple[int, ...]) -> tuple[float, dict[str, float]]:
        soft, below = [], []
        for token in range(env.action_space.n):
            env.reset(options={"prompt": prompt})
            for earlier in prefix:
                env.step(earlier)
            _, reward, terminated, _, info = env.step(token)
            future, texts = (0.0, {info["completion"]: 1.0}) if terminated else value((*prefix, token))
            soft.append((reward + future) / beta)
            below.append(texts)
        root = float(np.logaddexp.reduce(soft))
        texts = {}
        for log_pi, part in zip(np.array(soft) - root, below, strict=True):
            for text, p in part.items():
                texts[text] = texts.get(text, 0.0) + math.exp(log_pi) * p
        return beta * root, texts

    root, probabilities = value(())
    return root, probabilities


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_soft_optimal_policy_is_the_posterior(beta):
    lm = table_lm(vocab=VOCAB)
    env = TokenEnv(lm, letters, PROMPTS, TOKENS, beta=beta)
    exact = Exact().run(TiltedLM(lm, letters, beta, max_new_tokens=TOKENS), PROMPTS)
    weights = exact.weights()
    for prompt in range(len(PROMPTS)):
        root, texts = plan(env, beta, prompt)
        assert root == pytest.approx(beta * exact.log_evidence[prompt], abs=1e-5)
        expected: dict[str, float] = {}
        for text, weight in zip(exact.texts["completion"][0, :, prompt], weights[0, :, prompt], strict=True):
            expected[text] = expected.get(text, 0.0) + weight
        assert texts == pytest.approx(expected, abs=1e-6)


def test_without_beta_the_best_return_is_the_best_reward():
    env = make(max_new_tokens=TOKENS)
    root, texts = plan(env, 1e-3, 1)
    rewards = {text: letters(["c"], [text])[0] for text in texts}
    assert max(texts, key=texts.__getitem__) == max(rewards, key=rewards.__getitem__) == "a a a"
    assert root == pytest.approx(max(rewards.values()), abs=1e-2)


@pytest.mark.long
def test_stable_baselines3_learns_to_write():
    """Its PPO finds the best text of each prompt."""
    ppo = pytest.importorskip("stable_baselines3").PPO
    env = make(max_new_tokens=TOKENS)
    agent = ppo("MlpPolicy", env, n_steps=256, learning_rate=3e-3, gamma=1.0, seed=0, device="cpu").learn(10_000)
    scores = []
    for prompt in range(len(PROMPTS)):
        observation, _ = env.reset(options={"prompt": prompt})
        terminated = False
        while not terminated:
            action, _ = agent.predict(observation, deterministic=True)
            observation, _, terminated, _, info = env.step(int(action))
        scores.append(info["score"])
    best = 1 + 1 / 2 + 1 / 3
    np.testing.assert_allclose(scores, [best, best + 0.3], atol=0.02)


# -- errors ------------------------------------------------------------------------------------------------


def test_bad_settings():
    for settings, message in (
        ({"beta": 0.0}, "beta must be positive"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive whole number"),
        ({"columns": {"answer": ["a"]}}, "'answer' has 1 values for 2 prompts"),
        ({"prompts": []}, "prompts is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**settings)
    with pytest.raises(ValueError, match="render_mode"):
        TokenEnv(table_lm(), letters, PROMPTS, render_mode="human")


def test_bad_steps():
    env = TokenEnv(table_lm(vocab=VOCAB), letters, PROMPTS, TOKENS)
    with pytest.raises(ResetNeeded, match="before writing"):
        env.step(1)
    with pytest.raises(IndexError, match="no prompt 2 among 2"):
        env.reset(options={"prompt": 2})
    env.reset(seed=0)
    for action in (-1, VOCAB, 0.5):
        with pytest.raises(InvalidAction, match="no token id"):
            env.step(action)
    env.step(0)
    with pytest.raises(ResetNeeded, match="after the last"):
        env.step(1)


def test_a_reward_of_minus_infinity_is_refused():
    env = make(reward=lambda completions, **_: [-math.inf for _ in completions])
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"reward of '' is -inf.*finite penalty"):
        env.step(0)
