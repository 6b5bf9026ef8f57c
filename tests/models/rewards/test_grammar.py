"""Grammars as rewards of texts, and as masks of tokens."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from support.languages import LANGUAGES, spelling_lm
from support.models import llama_network
from support.tokenizers import TOKENIZERS

from bayeslm.models import LanguageModel, rewards
from bayeslm.models.lm import Encoded

pytest.importorskip("llguidance")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_text_scores_0_in_the_language_and_minus_infinity_outside():
    grammar = rewards.Grammar(json_schema=PERSON)
    texts = ['{"name": "Ж", "age": 3}', '{"name": "a"', '{"age": 3, "name": "a"}', '{"name": "\ufffd", "age": 3}', ""]
    assert grammar.score([], texts) == [0.0] + [-math.inf] * 4
    assert grammar.prefix([], texts) == [0.0, 0.0, -math.inf, -math.inf, 0.0]
    assert rewards.Grammar(json_schema=json.dumps(PERSON)).score([], texts) == grammar.score([], texts)
    assert grammar.upper_bound == 0.0
    assert rewards.get("grammar", regex="a+").score([], ["aa", "b"]) == [0.0, -math.inf]


def test_it_can_be_copied_and_stored():
    grammar = rewards.Grammar(regex="a+")
    grammar.score([], ["a"])
    for other in (copy.deepcopy(grammar), pickle.loads(pickle.dumps(grammar)), grammar.with_timeout(3.0)):
        assert other.score([], ["aa", "b"]) == [0.0, -math.inf]
        assert other.identity() == grammar.identity()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs one of regex, lark and json_schema, got none"),
        ({"regex": "a", "lark": "start: /a/"}, "got regex and lark"),
        ({"regex": "a("}, "regex is malformed.*unclosed group"),
        ({"lark": "start: body"}, "lark is malformed.*body"),
        ({"json_schema": {"type": "objekt"}}, "json_schema is malformed.*objekt"),
        ({"json_schema": "{"}, "json_schema is no JSON"),
    ],
)
def test_malformed_grammars_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        rewards.Grammar(**settings)


@pytest.mark.parametrize("tokenizer", ["characters", "pieces"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_masks_are_those_of_every_spelling(language, tokenizer):
    """After random tokens the mask has each token with which the text can still be completed, however it is spelled."""
    lm, grammar = spelling_lm(language, tokenizer), LANGUAGES[language].grammar
    tokens = lm.token_bytes(Encoded(*lm([[2, 3]], 1).flat_prompts))
    generator, checked = np.random.default_rng(0), 0
    for _ in range(20):
        state, text = grammar.over(tokens).root, b""
        while state is not None and len(text) < 12:
            viable = [not word or grammar.prefix([], [(text + word).decode()])[0] == 0.0 for word in tokens]
            assert state.mask.tolist() == viable
            assert state.accepts == LANGUAGES[language].contains(text.decode())
            if not any(viable[v] and tokens[v] for v in range(len(tokens))):
                break
            token = int(generator.choice([v for v in range(len(tokens)) if viable[v] and tokens[v]]))
            state, text, checked = state.after(token), text + tokens[token], checked + 1
    assert checked >= 20


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_bytes_of_tokens_are_those_of_their_texts(tokenizer):
    """Joined, they are the text that tokens add to a prompt; or it is known that they cannot be joined."""
    made = TOKENIZERS[tokenizer]()
    for prompt in ("My food", ""):
        ids = made(prompt, add_special_tokens=True)["input_ids"] or [0]
        lm = LanguageModel(llama_network(vocab_size=len(made), bos_token_id=None, eos_token_id=None), made)
        encoded = Encoded(*lm([ids], 1).flat_prompts)
        known = lm.token_bytes(encoded)
        cannot = tokenizer in ("word_piece", "word_ends", "words") or (tokenizer, prompt) == ("metaspace", "")
        assert (known is None) == cannot
        if known is None:
            continue
        generator = np.random.default_rng(1)
        whole = [v for v, word in enumerate(known) if "\ufffd" not in word.decode("utf-8", "replace")]
        rows = generator.choice([v for v in whole if v not in lm.eos_token_ids], size=(40, 5))
        texts = lm.decode(torch.tensor(rows), Encoded(encoded.ids.expand(40, -1), None))
        assert texts.tolist() == [b"".join(known[v] for v in row).decode() for row in rows]
