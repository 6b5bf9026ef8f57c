"""Encoder-decoder networks as distributions: what starts a completion, what is computed once. (Zoo: test_zoo.py.)"""

import pytest
import torch
from support.models import llama_network, tiny_seq2seq
from support.oracles import all_by_hand
from support.tokenizers import metaspace
from support.zoo import seq2seq_network
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from bayeslm.models import LanguageModel
from bayeslm.models.lm import Twist, count_usage, redraw, scoring

KINDS = ("t5", "bart")
SOURCES = [[1, 2, 3, 4], [5], [6, 7]]
TOKENS = 5


def close(found, wanted, atol=1e-4):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


def trained(lm):
    return [p for p in lm.parameters() if p.requires_grad]


def started(model_type, **settings):
    """A model whose completions start with given tokens, and end with 0 or 3."""
    lm = tiny_seq2seq(model_type)
    return LanguageModel(lm.network, lm.tokenizer, eos_token_ids=(0, 3), **settings)


# -- the beginning and the end of a completion -----------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "start"), [("t5", None), ("t5", 6), ("bart", (0, 5))])
def test_completions_follow_the_tokens_that_the_decoder_starts_with(model_type, start):
    """These are given: all completions after them have probability 1 together, with several ends and padding."""
    lm = started(model_type, decoder_start_ids=start)
    assert lm.decoder_start_ids == ((0,) if start is None else (6,) if start == 6 else start)
    dist = lm(SOURCES[:2], 2)
    x = dist.enumerate_support()
    with torch.no_grad():
        close(dist.log_prob(x).exp().sum(0), torch.ones(2), 1e-5)
        close(dist.token_log_prob(x)[::7], all_by_hand(lm, SOURCES[:2], x[::7]))
        malformed = torch.tensor([[[3, 4], [8, 0]]])  # a token after the end, and one that there is not
        assert (dist.log_prob(malformed) == -torch.inf).all()
        frequencies = dist.sample((4000,))
    for i in range(2):
        counts = (frequencies[:, i] == x[:, i][:, None]).all(-1).float().mean(1)
        p = dist.log_prob(x)[:, i].exp().detach()
        assert ((counts - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


def test_the_forced_token_of_a_config_is_given_and_not_drawn(tmp_path):
    """As of mBART and BART; that of the generation config comes first, and both are saved."""
    lm = tiny_seq2seq("bart")
    lm.network.generation_config = GenerationConfig(decoder_start_token_id=2, forced_bos_token_id=5, eos_token_id=0)
    many = LanguageModel(lm.network, lm.tokenizer)
    assert many.decoder_start_ids == (2, 5)
    many.save_pretrained(tmp_path / "own")
    assert LanguageModel.from_pretrained(tmp_path / "own").decoder_start_ids == (2, 5)
    other = LanguageModel(lm.network, lm.tokenizer, decoder_start_ids=(2, 6))  # another language
    x = torch.tensor([[1, 4, 2, 0, 0]])
    assert (other([[1, 2]], 5).log_prob(x) - many([[1, 2]], 5).log_prob(x)).abs() > 1e-3
    policy = other.policy(lora_rank=2)
    for name, model in {"model": other, "policy": policy}.items():
        model.save_pretrained(tmp_path / name)
        base = None if name == "model" else LanguageModel.from_pretrained(tmp_path / "model")
        loaded = LanguageModel.from_pretrained(tmp_path / name, base=base)
        assert loaded.decoder_start_ids == (2, 6)
        close(loaded([[1, 2]], 5).log_prob(x), other([[1, 2]], 5).log_prob(x), 1e-5)
    with pytest.raises(AttributeError):
        other.decoder_start_ids = (2, 5)  # scores that are known would be another's


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ((0, 8), ValueError, r"decoder_start_ids \[0, 8\] are not all in 0..7"),
        ("a", TypeError, "decoder_start_ids must be a token id or several, got 'a'"),
        ((), TypeError, "does not name the token that its decoder starts with"),
    ],
)
def test_starts_that_are_none_are_refused(start, error, message):
    with pytest.raises(error, match=message):
        _ = started("t5", decoder_start_ids=start).vocab_size


def test_a_causal_network_has_no_start():
    with pytest.raises(TypeError, match="LlamaForCausalLM is none"):
        LanguageModel(llama_network(), decoder_start_ids=0)


# -- what is computed once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", KINDS)
def test_sources_are_read_once_for_all_particles(model_type):
    lm = started(model_type)
    dist = lm(SOURCES, TOKENS).expand([16, 3])
    _ = lm.causal  # tried
    with count_usage() as usage:
        x = dist.sample()
    written = TOKENS - 1
    assert usage.tokens <= 3 * 4 + 3 + written * 48  # the encoder's, the start of each decoder, and what they write
    assert usage.model_calls <= 2 + written
    with count_usage() as usage:
        lm(SOURCES, TOKENS).log_prob(x)
        assert usage.tokens == 48 * 4 + 48 * TOKENS  # small sources are read with each completion: that is cheaper
    for again in (scoring.PROMPTS_AGAIN, -1):
        with pytest.MonkeyPatch.context() as patch, count_usage() as usage:
            patch.setattr(scoring, "PROMPTS_AGAIN", again)
            close(lm(SOURCES, TOKENS).token_log_prob(x).detach(), all_by_hand(lm, SOURCES, x).detach())
    assert usage.tokens == 3 * 4 + 3 + written * 48


@pytest.mark.parametrize(
    ("model_type", "lora_rank", "settings", "again"),
    [
        ("bart", None, {}, scoring.PROMPTS_AGAIN),
        ("t5", 2, {"micro_batch_size": 5}, -1),
        pytest.param("bart", None, {"micro_batch_size": 2}, -1, marks=pytest.mark.long),
        pytest.param("bart", 2, {"micro_batch_size": 5}, scoring.PROMPTS_AGAIN, marks=pytest.mark.long),
        pytest.param("t5", 2, {"gradient_checkpointing": True, "micro_batch_size": 4}, -1, marks=pytest.mark.long),
    ],
)
def test_gradients_are_those_of_the_networks_own_forward_pass(model_type, lora_rank, settings, again, monkeypatch):
    """Of encoder and decoder, of padded sources, in micro-batches or at once."""
    monkeypatch.setattr(scoring, "PROMPTS_AGAIN", again)
    torch.manual_seed(0)
    policy = started(model_type, **settings).policy(lora_rank)
    with torch.no_grad():
        for p in trained(policy):
            p.add_(0.05 * torch.randn_like(p))
    dist = policy(SOURCES, TOKENS)
    x = dist.sample((4,))
    weights = torch.randn(x.shape)
    wanted = torch.autograd.grad((all_by_hand(policy, SOURCES, x) * weights).sum(), trained(policy), allow_unused=True)
    for value in (x, x.clone()):  # its own draws, whose scores are known, and those of others
        scores = dist.token_log_prob(value)
        found = torch.autograd.grad((scores * weights).sum(), trained(policy), allow_unused=True)
        for a, b, p in zip(found, wanted, trained(policy), strict=True):
            a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    reached = [
        float(g.abs().sum()) for name, g in zip(names, found, strict=True) if ".encoder." in name and g is not None
    ]
    assert sum(reached) > 0.1


@pytest.mark.parametrize("model_type", KINDS)
def test_ragged_cuts_are_redrawn_as_mcmc_does(model_type):
    lm = started(model_type)
    dist = lm(SOURCES, TOKENS)
    torch.manual_seed(0)
    x = dist.sample((6,))
    cut = torch.arange(18).reshape(6, 3) % TOKENS
    for copies in (None, 3):
        new, scores = redraw(dist, x, cut, copies)
        after = torch.arange(TOKENS) >= cut[..., None]
        assert (torch.where(after, new, x) == new).all()
        many = new.reshape(-1, 3, TOKENS)
        with torch.no_grad():
            wanted = all_by_hand(lm, SOURCES, many).reshape(new.shape)
        close(scores, wanted * (after & (cut < dist.lengths(x))[..., None]))


def test_sources_may_have_other_tokens_than_completions():
    """As of Marian's models of two vocabularies: more tokens are drawn than sources have, and a twist reads them."""
    network = seq2seq_network("marian", share_encoder_decoder_embeddings=False, decoder_vocab_size=30)
    lm = LanguageModel(network, eos_token_ids=2)
    sources = [[23, 5], [7]]
    dist = lm(sources, TOKENS).expand([6, 2])
    torch.manual_seed(0)
    x = dist.sample()
    assert x.max() >= 24
    with torch.no_grad():
        close(dist.token_log_prob(x), all_by_hand(lm, sources, x))
    with pytest.raises(ValueError, match=r"prompts\[0\] holds token ids outside 0..23"):
        lm([[24]], TOKENS)
    twist, decoder = Twist(lm, TOKENS), dist.decoder()
    assert twist.lookahead(twist.start(decoder), x.reshape(12, -1)).shape == (12, TOKENS)


# -- other forms of the same weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["t5", pytest.param("bart", marks=pytest.mark.long)])
def test_merged_packed_and_half_precision_networks(model_type, monkeypatch):
    lm = started(model_type)
    policy = lm.policy(lora_rank=2)
    with torch.no_grad():
        for p in trained(policy):
            p.add_(0.05 * torch.randn_like(p))
    x = policy(SOURCES, TOKENS).sample((3,))
    with torch.no_grad():
        wanted = policy(SOURCES, TOKENS).token_log_prob(x)
        for same in (policy.merged(), policy.packed(), policy.continued()):
            close(same(SOURCES, TOKENS).token_log_prob(x), wanted)
        monkeypatch.setattr("bayeslm.models.lm.packing.MIN_WEIGHTS", 0)
        monkeypatch.setattr("bayeslm.models.lm.packing.MIN_PASSES", 0)
        dist = policy(SOURCES, TOKENS)
        drawn = dist.sample((3,))  # from packed weights
        close(dist.token_log_prob(drawn), all_by_hand(policy, SOURCES, drawn))
        half = LanguageModel(lm.network.to(torch.bfloat16), lm.tokenizer, eos_token_ids=(0, 3))
        trainable = half.policy()
        assert trainable.compute_dtype == torch.bfloat16
        close(half(SOURCES, TOKENS).token_log_prob(x), trainable(SOURCES, TOKENS).token_log_prob(x), 1e-6)


# -- texts -----------------------------------------------------------------------------------------------------


def translator():
    """A T5 with a tokenizer that ends its texts, as T5's does, and writes a space before a word."""
    tokenizer = metaspace(before=False, after=True)
    tokenizer.pad_token = "<unk>"
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LanguageModel(T5ForConditionalGeneration(config), tokenizer)


def test_sources_and_completions_are_texts_of_their_own(tmp_path):
    """A source has the end that the tokenizer appends; a completion's text does not begin with a space."""
    translator().save_pretrained(tmp_path)
    lm = LanguageModel.from_pretrained(tmp_path)
    sources = ["My food is good", "the food"]
    rows = lm.encode_prompts(sources).rows()
    assert rows == [lm.tokenizer(text)["input_ids"] for text in sources]
    assert all(row[-1] == 2 for row in rows)
    words = [lm.tokenizer.convert_tokens_to_ids(f"▁{word}") for word in ("the", "food", "is")]
    x = torch.tensor([[*words, 2, 0], [words[1], 2, 0, 0, 0]])
    decoded = lm.decode(x, sources)
    assert decoded.tolist() == lm.decode(x).tolist() == ["the food is", "food"]
    assert lm.encode(decoded, 5).equal(x)  # to be observed
    with pytest.raises(TypeError, match="the source of an encoder-decoder network is a complete text"):
        lm.join(sources, x)
    assert lm.token_ends(x, decoded).tolist() == [[3, 8, 11, 11, 11], [4, 4, 4, 4, 4]]
    reference = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)(
        input_ids=torch.tensor([rows[0]]), decoder_input_ids=torch.tensor([[0, *words]])
    )
    scores = reference.logits.log_softmax(-1)[0].gather(-1, x[0, :4, None]).sum()
    close(lm(sources, 5).log_prob(x)[0], scores)
    assert lm.generate_texts(sources, 2, max_new_tokens=3, seed=0)


def test_fit_learns_pairs():
    """The likeliest completion of each source becomes its target, the end included."""
    lm = translator()
    pairs = {"My food": "good", "the food": "not good", "I do": "I do not", "is a": "a"}
    losses = lm.fit(list(pairs.values()), list(pairs), num_steps=60, learning_rate=3e-2, seed=0, progress=False)
    assert losses[-1] < 0.05 < 1.0 < losses[0]
    assert lm.decode(lm(list(pairs), 6, temperature=0.05).sample()).tolist() == list(pairs.values())
    assert not trained(lm)
    with pytest.raises(TypeError, match="needs the sources"):
        lm.fit(["good"], progress=False)
    with pytest.raises(ValueError, match="got 1 texts and 2 prompts"):
        lm.fit(["good"], ["a", "the"], progress=False)


def test_the_tokens_that_are_given_are_not_learned():
    """Targets as mBART's tokenizer writes them: the language, the text, and the end."""
    from bayeslm.models.lm.encoding import Vocabulary
    from bayeslm.models.lm.fit_texts import completions_of

    tokenizer = metaspace(before=True, after=True)  # <s> text </s>
    inner = tokenizer("My food", add_special_tokens=False)["input_ids"]
    vocabulary = Vocabulary(len(tokenizer), (2,), 0)
    for start, given in {(2, 1): [], (1,): [], (2,): [1]}.items():
        assert completions_of(["My food"], tokenizer, start, vocabulary, 99) == [[*given, *inner, 2]]


# -- refused ---------------------------------------------------------------------------------------------------


def test_completions_longer_than_the_decoders_positions_are_refused():
    config = BartConfig(
        vocab_size=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        max_position_embeddings=12,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        decoder_start_token_id=2,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    lm = LanguageModel(BartForConditionalGeneration(config))
    with torch.no_grad():
        assert lm([[3] * 12, [4]], 11).log_prob(lm([[3] * 12, [4]], 11).sample()).isfinite().all()
    with pytest.raises(ValueError, match="max_new_tokens is 12, and BartForConditionalGeneration's decoder has positi"):
        lm([[3]], 12)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 13 tokens"):
        lm([[3] * 13], 4)


def test_networks_of_sounds_are_refused_with_what_they_read():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60, "num_mel_bins": 8}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    network = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **special))
    with pytest.raises(TypeError, match="WhisperForConditionalGeneration reads input_features"):
        LanguageModel(network)


def test_an_encoder_that_changes_the_number_of_tokens_is_refused():
    lm = tiny_seq2seq("t5")

    class Halved(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.inner = encoder

        def forward(self, **kwargs):
            out = self.inner(**kwargs)
            out.last_hidden_state = out.last_hidden_state[:, ::2]
            return out

    lm.network.encoder = Halved(lm.network.encoder)
    with pytest.raises(TypeError, match="computes 3 states of 6 tokens"):
        _ = LanguageModel(lm.network).vocab_size
