"""Networks of many architectures against their own forward pass; their cost in passes, tokens and memory."""

import pytest
import torch
from support.models import ARCHITECTURES, PADDED_PROMPTS, llama_network, random_network, table_lm, tiny_llama
from support.oracles import all_by_hand
from support.statistics import assert_random_state_kept
from transformers import masking_utils

from bayeslm.models import LanguageModel
from bayeslm.models.lm import scoring
from bayeslm.models.lm.masks import causal_mask
from bayeslm.models.lm.network import CausalNetwork
from bayeslm.models.lm.prefix import prefill
from bayeslm.models.lm.usage import count_usage


@pytest.fixture
def prompts_once(monkeypatch):
    """Scoring runs prompts in a pass of their own, as it does if they are long or have many completions."""
    monkeypatch.setattr(scoring, "PROMPTS_AGAIN", -1)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_agrees_with_the_networks_own_forward_pass(model_type, monkeypatch):
    """Sampled and scored, padded and not, with prompts in one pass with their completions or in one of their own, and
    with the head separated where that is possible.
    """
    extra, linear_head = ARCHITECTURES[model_type]
    lm = LanguageModel(random_network(model_type, **extra), eos_token_ids=(2, 7))
    dist = lm(PADDED_PROMPTS, max_new_tokens=12, temperature=1.2)
    x = dist.sample((3,))
    expected = all_by_hand(lm, PADDED_PROMPTS, x, 1.2)
    assert expected.std() > 0.3
    torch.testing.assert_close(dist.token_log_prob(x), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(lm(PADDED_PROMPTS, 12, 1.2).token_log_prob(x), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        lm(PADDED_PROMPTS[:1], 12, 1.2).token_log_prob(x[:, 0]), expected[:, 0], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(lm.packed()(PADDED_PROMPTS, 12, 1.2).token_log_prob(x), expected, atol=1e-4, rtol=0)
    monkeypatch.setattr(scoring, "PROMPTS_AGAIN", -1)
    torch.testing.assert_close(lm(PADDED_PROMPTS, 12, 1.2).token_log_prob(x), expected, atol=1e-4, rtol=0)
    assert lm.causal.body is not None
    assert (lm.causal.head is not None) == linear_head
    assert dist.token_log_prob_and_hidden(x)[1].shape == (*x.shape, lm.causal.width)


def test_a_head_that_changes_logits_is_detected_at_any_size():
    """Soft-capping at 30 moves logits of 0.01 by less than float32 resolves; they may grow in training."""
    softcapped = random_network("gemma2", query_pre_attn_scalar=8)
    with torch.no_grad():
        softcapped.lm_head.weight.mul_(1e-3)
    assert CausalNetwork(softcapped.eval()).head is None


def test_a_body_with_a_forward_of_its_own_keeps_it():
    """As libraries leave there that move weights between devices."""
    network = random_network("granite", logits_scaling=2.0)
    calls, forward = [], network.model.forward
    network.model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    own = network.model.forward
    dist = LanguageModel(network)(PADDED_PROMPTS, 3)
    dist.log_prob(dist.sample().clone())
    assert network.model.forward is own
    assert calls


def assert_scored_as_by_hand(lm):
    prompts = [[1, 2], [3]]
    x = lm(prompts, 5).sample((2,))
    torch.testing.assert_close(lm(prompts, 5).token_log_prob(x), all_by_hand(lm, prompts, x), atol=1e-5, rtol=0)


def test_a_body_that_is_scaled_before_the_head_is_detected():
    class Scaled(type(llama_network())):
        def forward(self, input_ids=None, **kwargs):
            out = self.model(input_ids=input_ids, **kwargs)
            out.logits = self.lm_head(out.last_hidden_state / 2)
            return out

    lm = LanguageModel(Scaled(llama_network().config).eval())
    assert lm.causal.head is None
    assert_scored_as_by_hand(lm)


def test_logits_of_more_than_the_body_says_are_left_to_the_network():
    """Logits that depend on the last token in addition to its hidden state are no function of hidden states."""

    class Skips(type(llama_network())):
        def forward(self, input_ids=None, **kwargs):
            out = self.model(input_ids=input_ids, **kwargs)
            out.logits = self.lm_head(out.last_hidden_state + self.model.embed_tokens(input_ids))
            return out

    lm = LanguageModel(Skips(llama_network().config).eval())
    assert lm.causal.body is None
    assert_scored_as_by_hand(lm)


def test_finding_the_head_leaves_the_random_state_alone():
    lm = tiny_llama()
    with assert_random_state_kept():
        assert lm.causal.head is not None


def test_half_precision_scores_in_float32():
    lm = LanguageModel(llama_network().bfloat16())
    dist = lm([[1, 2, 3], [4]], 5)
    x = dist.sample((20,))
    assert dist.token_log_prob(x).dtype == torch.float32
    assert lm.causal.mask_dtype == lm.policy(2).causal.mask_dtype == torch.bool
    # bfloat16 keeps 8 bits: logits of a few units are off by some 0.02 each
    torch.testing.assert_close(lm([[1, 2, 3], [4]], 5).log_prob(x), dist.log_prob(x), atol=0.5, rtol=0)


# -- cost ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1, 7])
@pytest.mark.usefixtures("prompts_once")
def test_prompts_are_prefilled_once(particles):
    dist = tiny_llama(eos_token_ids=())([[1, 2, 3, 4], [5]], max_new_tokens=6)
    with count_usage() as sampling:
        x = dist.sample((particles,))
    rows = 2 * particles
    assert (sampling.model_calls, sampling.tokens) == (1 + 5, 2 * 4 + rows * 5)
    with count_usage() as kept:
        dist.log_prob(x)
        dist.token_log_prob(x)
    assert (kept.model_calls, kept.tokens) == (0, 0)
    with count_usage() as scoring:
        dist.log_prob(x.clone())
    assert (scoring.model_calls, scoring.tokens) == (2, 2 * 4 + rows * 5)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("length", "passes"), [(4, 1), (44, 2)])
def test_short_prompts_go_through_with_their_completions(trained, length, passes):
    """Where that costs less than a pass of their own: 2**14 numbers, here 12 times 4 or 44 more tokens of width 32."""
    lm = tiny_llama(eos_token_ids=())
    lm = lm.policy() if trained else lm
    dist = lm([[1, 2] * (length // 2), [5]], max_new_tokens=6)
    x = dist.arbitrary().expand(7, -1, -1)
    with count_usage() as usage:
        dist.log_prob(x)
    rows = 2 * 7
    expected = rows * (length + 5) if passes == 1 else 2 * length + rows * 5
    assert (usage.model_calls, usage.tokens) == (passes, expected)


@pytest.mark.usefixtures("prompts_once")
def test_prompts_are_prefilled_once_in_micro_batches():
    dist = tiny_llama(eos_token_ids=(), batch_size=2)([[1, 2, 3, 4], [5], [6]], max_new_tokens=6)
    with count_usage() as usage:
        x = dist.sample((5,))
    # blocks of 2 and 1 prompts, whose 10 and 5 rows go 2 at a time: 5 + 3 micro-batches of 5 more passes each
    assert (usage.model_calls, usage.tokens) == (2 + 8 * 5, 3 * 4 + 15 * 5)
    with count_usage() as usage:
        dist.log_prob(x.clone())
    assert (usage.model_calls, usage.tokens) == (2 + 8, 3 * 4 + 15 * 5)


@pytest.mark.usefixtures("prompts_once")
def test_one_token_needs_the_prefill_only():
    dist = tiny_llama()([[1, 2, 3, 4], [5]], max_new_tokens=1)
    with count_usage() as usage:
        dist.log_prob(dist.sample((9,)).clone())
    assert (usage.model_calls, usage.tokens) == (2, 2 * 2 * 4)


@pytest.mark.usefixtures("prompts_once")
def test_sampling_stops_when_all_have_ended():
    """A table that ends every text after its second token; scoring processes no more than these."""
    table = torch.full((4, 3), -torch.inf)
    table[1:] = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    table[0] = torch.tensor([-torch.inf, 0.0, 0.0])
    lm = LanguageModel.tabular(["<eos>", "a", "b"], order=2, table=table)
    dist = lm([[0], [0]], max_new_tokens=50)
    with count_usage() as usage:
        x = dist.sample((10,))
    assert dist.lengths(x).eq(2).all()
    assert (usage.model_calls, usage.tokens) == (2, 2 + 20)
    with count_usage() as usage:
        torch.testing.assert_close(dist.log_prob(x.clone()), torch.full((10, 2), 0.5).log())
    assert (usage.model_calls, usage.tokens) == (2, 2 + 20)


@pytest.mark.usefixtures("prompts_once")
def test_an_observation_shared_by_particles_is_scored_once():
    dist = tiny_llama(eos_token_ids=())([[1, 2], [5]], max_new_tokens=3).expand([100, 2])
    with count_usage() as usage:
        assert dist.log_prob(torch.tensor([[1, 2, 3], [4, 5, 6]])).shape == (100, 2)
    assert usage.tokens == 2 * 2 + 2 * 2


def test_usage_counts_nest():
    dist = table_lm()([[1]], max_new_tokens=1)
    with count_usage() as outer:
        dist.sample()
        with count_usage() as inner:
            dist.sample()
    assert (outer.model_calls, inner.model_calls) == (2, 1)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma", "gpt2", "bloom"])
def test_keys_and_values_are_counted(model_type):
    extra, _ = ARCHITECTURES[model_type]
    lm = LanguageModel(random_network(model_type, **extra))
    prefix = prefill(lm.causal, torch.tensor([[1, 2, 3, 4, 5]]), None)
    held = sum(x.numel() for layer in prefix.cache.layers for x in (layer.keys, layer.values))
    assert held == 5 * lm.causal.cached_numbers > 0


def test_micro_batches_have_a_size_of_their_own():
    def sizes(**settings):
        dist = tiny_llama(**settings).policy()([[1]], 4)
        return dist.max_rows, dist.max_rows_with_gradient

    most, fit = sizes()
    assert most > fit > 100
    assert sizes(batch_size=7) == (7, 7)
    assert sizes(batch_size=10 * fit) == (10 * fit, fit)  # sampling keeps no activations
    assert sizes(batch_size=7, micro_batch_size=3) == (7, 3)
    assert sizes(micro_batch_size=3) == (most, 3)


# -- masks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def inspections(monkeypatch):
    """Count how often transformers has inspected a mask on the device, for which the host waits."""
    counted = []
    fast_all = masking_utils.fast_all
    monkeypatch.setattr(masking_utils, "fast_all", lambda mask: counted.append(1) or fast_all(mask))
    return counted


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma", "gpt2", "opt", "granite"])
def test_masks_of_padded_prompts_are_not_inspected_at_every_token(model_type, attention, inspections):
    """Once, when the network is tried: not while 12 tokens are written after prompts of unequal length, nor scored."""
    extra, _ = ARCHITECTURES[model_type]
    network = random_network(model_type, **extra)
    network.set_attn_implementation(attention)
    lm = LanguageModel(network, eos_token_ids=(2, 7))
    assert lm.causal.mask_dtype == (torch.bool if attention == "sdpa" else torch.float32)
    lm(PADDED_PROMPTS, max_new_tokens=1).sample()  # tries padding
    inspections.clear()
    dist = lm(PADDED_PROMPTS, max_new_tokens=12)
    x = dist.sample((3,))
    assert not inspections
    expected = all_by_hand(lm, PADDED_PROMPTS, x)
    inspections.clear()
    torch.testing.assert_close(dist.token_log_prob(x), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(lm(PADDED_PROMPTS, 12).token_log_prob(x.clone()), expected, atol=1e-4, rtol=0)
    assert not inspections


def test_a_causal_mask_by_hand():
    """Of two tokens after two, the first of them padding: the past and itself; padding itself alone."""
    mask = causal_mask(torch.tensor([[0, 1, 1, 1]]), 2, torch.bool)
    assert mask.tolist() == [[[[False, True, True, False], [False, True, True, True]]]]
    whole = causal_mask(torch.tensor([[0, 1, 1]]), 3, torch.float32)
    low = torch.finfo(torch.float32).min
    assert whole.tolist() == [[[[0.0, low, low], [low, 0.0, low], [low, 0.0, 0.0]]]]


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text", "bloom"])
def test_networks_with_windows_make_their_masks_themselves(model_type):
    """So do those that derive positions from them. (Their numbers are tested above.)"""
    extra, _ = ARCHITECTURES[model_type]
    assert CausalNetwork(random_network(model_type, **extra).eval()).mask_dtype is None


def test_a_network_that_ignores_causal_masks_is_detected():
    class Misreads(type(llama_network())):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            kwargs["position_ids"] = position_ids
            if attention_mask is not None and attention_mask.dim() == 4:
                attention_mask = None
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

        base_model = None  # so that all goes through `forward`

    causal = CausalNetwork(Misreads(llama_network().config).eval())
    assert causal.body is None
    assert causal.mask_dtype is None


# -- the logits in blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere", "granite"])
def test_scoring_never_holds_all_logits(monkeypatch, model_type, trained):
    """The head sees a block of tokens at a time, without gradients and with them (forward and backward); also where
    its logits are capped or scaled.
    """
    extra, _ = ARCHITECTURES[model_type]
    lm = LanguageModel(random_network(model_type, **extra), eos_token_ids=())
    vocab = lm.vocab_size
    monkeypatch.setattr(scoring, "LOGITS_BLOCK", 16 * vocab)
    lm = lm.policy() if trained else lm
    dist = lm([[1, 2, 3], [5]], max_new_tokens=6)
    x = dist.sample((20,))
    assert lm.causal.body is not None
    heads = []
    head = lm.network.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: heads.append(output.numel()))
    dist.log_prob(x[:1].clone())  # a network that has another hook is tried again
    heads.clear()
    score = dist.log_prob(x.clone()).sum()
    assert sum(heads) == x.numel() * vocab
    assert max(heads) == 16 * vocab
    if trained:
        heads.clear()
        score.backward()
        assert sum(heads) == x.numel() * vocab  # computed again
        assert max(heads) == 16 * vocab
