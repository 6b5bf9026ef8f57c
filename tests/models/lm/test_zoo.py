"""Every architecture of transformers against its own forward pass: sampled, scored, trained and saved."""

import pytest
import torch
from support.oracles import all_by_hand, by_hand
from support.zoo import ALL, SEQ2SEQ, embed_padding, seq2seq_network, zoo_network

from bayeslm.models import LanguageModel
from bayeslm.models.lm import redraw, scoring
from bayeslm.models.lm.decoding import categorical

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [3, 4, 12]]
TOKENS = 5
ENDS = (2, 7)
# One of each kind: absolute positions, rotary ones, linear biases, a window and capped logits, experts, a state space,
# positions that skip the padding token, a decoder whose positions count padding.
QUICK = ("gpt2", "llama", "bloom", "gemma2", "mixtral", "mamba", "roberta", "trocr")
REFUSED = {
    "cpmant": "is not causal",  # prompts attend to one another in both directions
    "xlm": "is not causal",  # its positions follow the length of the text
}
OPEN = {  # what does not work yet, or not with these tiny settings
    "kimi_linear": "its reference implementation takes minutes",
    "laguna": "PEFT does not load the adapters of its shared experts",
    "minicpm3": "these settings make its logits constant",
    "reformer": "its own forward pass gives no gradient outside training",
    "rwkv": "its own forward pass changes in place what its gradient needs",
    "xlnet": "its own forward pass fails on short texts",
    "biogpt": "transformers asks for a package to look for its tokenizer",
    "blenderbot-small": "transformers fails where its tokenizer is missing",
    "ctrl": "transformers fails where its tokenizer is missing",
    "gpt_neox_japanese": "transformers fails where its tokenizer is missing",
    "plbart": "transformers asks for a package to look for its tokenizer",
    "roformer": "transformers asks for a package to look for its tokenizer",
}


def expected(lm, value):
    """Scores of completions (row, prompt, token), and their sum's gradient, by the network's own forward pass."""
    rows = [[by_hand(lm, p, c) for p, c in zip(PROMPTS, row, strict=True)] for row in value]
    return torch.stack([torch.stack(row) for row in rows])


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def check(model_type, folder):
    if model_type in OPEN:
        pytest.skip(OPEN[model_type])
    network = zoo_network(model_type)
    if network is None:
        pytest.skip("no tiny network of it is built here")
    check_network(model_type, network, folder)


def check_network(model_type, network, folder):
    lm = LanguageModel(network, eos_token_ids=ENDS)
    if model_type in REFUSED:
        with pytest.raises(TypeError, match=REFUSED[model_type]):
            lm(PROMPTS, TOKENS).sample()
        return
    dist = lm(PROMPTS, TOKENS)
    torch.manual_seed(0)
    x = dist.sample((2,))
    with torch.no_grad():
        wanted = expected(lm, x)
    assert wanted.std() > 0.05
    close(dist.token_log_prob(x), wanted)
    close(lm(PROMPTS, TOKENS).token_log_prob(x), wanted)
    for i, prompt in enumerate(PROMPTS):
        close(lm([prompt], TOKENS).token_log_prob(x[:, i : i + 1]), wanted[:, i : i + 1])
    policy = lm.policy(lora_rank=2)
    close(policy(PROMPTS, TOKENS).token_log_prob(x).detach(), wanted)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p)) if p.requires_grad else None
    adapters = [p for p in policy.parameters() if p.requires_grad]
    own, scores = expected(policy, x), policy(PROMPTS, TOKENS).token_log_prob(x)
    close(scores.detach(), own.detach())
    assert (own - wanted).abs().max() > 1e-3
    gradients = [torch.autograd.grad(s.sum(), adapters, allow_unused=True) for s in (scores, own)]
    for found, want, p in zip(*gradients, adapters, strict=True):  # None or 0 for experts that are not chosen
        found, want = (torch.zeros_like(p) if g is None else g for g in (found, want))
        torch.testing.assert_close(found, want, atol=1e-3, rtol=1e-3)
    lm.save_pretrained(folder / "model")
    policy.save_pretrained(folder / "policy")
    loaded = LanguageModel.from_pretrained(folder / "model")
    close(LanguageModel(loaded.network, eos_token_ids=ENDS)(PROMPTS, TOKENS).token_log_prob(x), wanted)
    loaded = LanguageModel.from_pretrained(folder / "policy", base=lm)
    close(LanguageModel(loaded.network, eos_token_ids=ENDS)(PROMPTS, TOKENS).token_log_prob(x), own.detach())


@pytest.mark.parametrize("model_type", QUICK)
def test_one_architecture_of_each_kind(model_type, tmp_path):
    check(model_type, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("model_type", sorted(set(ALL) - set(QUICK)))
def test_every_architecture(model_type, tmp_path):
    check(model_type, tmp_path)


# -- encoder-decoder networks ----------------------------------------------------------------------------------

QUICK_SEQ2SEQ = ("bart", "t5")  # absolute positions, and relative ones
SEQ2SEQ_REFUSED = {
    "fsmt": "cannot be scored as its own forward pass scores",  # without the source its decoder looks ahead
    "prophetnet": "is not causal",  # the scores of its first tokens depend on how many follow
}
NOT_SEQ2SEQ = (  # causal networks that read sounds, though transformers lists them
    *("audioflamingo3", "glmasr", "granite_speech", "granite_speech_plus", "moss_transcribe_diarize", "musicflamingo"),
    *("nemo_speechlm", "qwen2_audio", "qwen3_asr", "vibevoice_asr", "voxtral", "voxtral_realtime"),
)


def check_seq2seq(model_type, folder, monkeypatch):
    network = seq2seq_network(model_type)
    assert network is not None  # all of them are built
    embed_padding(network)
    if model_type in SEQ2SEQ_REFUSED:
        with pytest.raises(TypeError, match=SEQ2SEQ_REFUSED[model_type]):
            LanguageModel(network)(PROMPTS, TOKENS).sample()
        return
    check_network(model_type, network, folder)
    check_given(network, 8, monkeypatch)


@pytest.mark.parametrize("model_type", QUICK_SEQ2SEQ)
def test_encoder_decoder_networks(model_type, tmp_path, monkeypatch):
    check_seq2seq(model_type, tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("model_type", sorted(set(SEQ2SEQ) - set(QUICK_SEQ2SEQ) - set(NOT_SEQ2SEQ)))
def test_every_encoder_decoder_network(model_type, tmp_path, monkeypatch):
    check_seq2seq(model_type, tmp_path, monkeypatch)


# -- windows ---------------------------------------------------------------------------------------------------

WINDOW = {"sliding_window": 4, "attention_chunk_size": 4}
WINDOWS = {
    "llama": WINDOW,  # ignored
    "bloom": WINDOW,  # ignored; positions by linear biases
    "moshi": WINDOW,  # ignored, though its config has it
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},  # of some layers
    "mistral": WINDOW,  # of all
    "llama4_text": WINDOW,  # chunks
}
SWITCHED_OFF = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3")


def check_window(model_type, extra, monkeypatch):
    """Drawn, scored, redrawn from ragged cuts as MCMC does, and resampled as SMC does; texts of 13 to 19 tokens."""
    network = None if model_type in {*OPEN, *REFUSED} else zoo_network(model_type, **extra)
    if network is None:
        pytest.skip("see the test of every architecture")
    embed_padding(network)
    check_given(network, 12, monkeypatch)


def check_given(network, tokens, monkeypatch):
    lm = LanguageModel(network, eos_token_ids=())
    torch.manual_seed(0)
    with torch.no_grad():
        dist = lm(PROMPTS, tokens)
        x = dist.sample((2,))
        wanted = all_by_hand(lm, PROMPTS, x)
        close(dist.token_log_prob(x), wanted)
        for again in (scoring.PROMPTS_AGAIN, -1):  # prompts in the passes of their completions, and in one of their own
            monkeypatch.setattr(scoring, "PROMPTS_AGAIN", again)
            close(lm(PROMPTS, tokens).token_log_prob(x), wanted)
            close(lm(PROMPTS[:1], tokens).token_log_prob(x[:, :1]), wanted[:, :1])
        cut = torch.tensor([[2, 9, 5], [7, 1, 0]])
        for prompts in (PROMPTS, PROMPTS[:1]):
            some = slice(len(prompts))
            new, scores = redraw(lm(prompts, tokens), x[:, some], cut[:, some])
            drawn = torch.arange(tokens) >= cut[:, some, None]
            close(scores, all_by_hand(lm, prompts, new) * drawn)
        decoder = lm(PROMPTS, tokens).expand([2, 3]).decoder()
        while not decoder.done:
            decoder.append(*categorical(decoder.logits))
            if decoder.t % 3 == 0:
                decoder.select(torch.tensor([3, 1, 2, 3, 4, 2]))
        value, scores = (x.reshape(2, 3, tokens) for x in (decoder.values, decoder.scores))
        close(scores, all_by_hand(lm, PROMPTS, value))


@pytest.mark.parametrize("model_type", WINDOWS)
def test_windows_are_what_layers_do(model_type, monkeypatch):
    """Beyond the window; not what the config says, which a network may ignore, or follow in some of its layers."""
    check_window(model_type, WINDOWS[model_type], monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("model_type", sorted(set(ALL) - set(WINDOWS)))
def test_windows_of_every_architecture(model_type, monkeypatch):
    check_window(model_type, WINDOW, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("model_type", SWITCHED_OFF)
@pytest.mark.parametrize("on", [False, True])
def test_windows_that_are_switched_on_and_off(model_type, on, monkeypatch):
    check_window(model_type, WINDOW | {"use_sliding_window": on}, monkeypatch)


# -- attention to the keys that an indexer selects -------------------------------------------------------------

# Fewer keys than the texts have, alone or in blocks, whose borders padding on the left would move. Sixteen heads: a key
# scores 0 where no head's product is positive, which is rare with many heads. Which of several keys of equal scores a
# network selects depends on the length of its input.
INDEXER = {"index_n_heads": 16, "index_topk": 4}
COMPRESSED = ["compressed_sparse_attention", "heavily_compressed_attention"]
SELECTED = {
    "deepseek_v32": INDEXER,
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse"] * 2,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "deepseek_v4": INDEXER
    | {"layer_types": COMPRESSED, "compress_rates": dict(zip(COMPRESSED, (2, 4), strict=True)), "index_head_dim": 16},
    "axk2": INDEXER,
    "dots3_note_text": INDEXER,
    "glm_moe_dsa": INDEXER,
    "hy_v4": INDEXER,
    "qwen4_exp_text": {
        "layer_types": ["indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
}


@pytest.mark.parametrize(
    "model_type", [*list(SELECTED)[:2], *(pytest.param(m, marks=pytest.mark.long) for m in list(SELECTED)[2:])]
)
def test_selected_keys_are_what_layers_select(model_type, monkeypatch):
    assert zoo_network(model_type, **SELECTED[model_type]) is not None
    check_window(model_type, SELECTED[model_type], monkeypatch)


@pytest.mark.long
def test_the_zoo_is_large():
    built = [name for name in ALL if name not in {*REFUSED, *OPEN} and zoo_network(name) is not None]
    print(len(built), "architectures are scored as they score themselves")
    assert len(built) >= 55
