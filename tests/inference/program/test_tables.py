"""What a run takes for prompts and columns: tables of every kind, and lists; what is neither is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.models import table_lm

from bayeslm.inference import SVI, Exact, ImportanceSampling
from bayeslm.inference.program import inspect
from bayeslm.models import TiltedLM
from bayeslm.models.lm import read_table
from bayeslm.models.rewards import Reward

LM = table_lm(order=2, seed=1, vocab=4)
PROMPTS, WEIGHTS = ["a", "b b", "c"], [0.5, -1.0, 2.0]
COLUMNS = {"prompt": PROMPTS, "weight": WEIGHTS}
ROWS = [{"prompt": p, "weight": w} for p, w in zip(PROMPTS, WEIGHTS, strict=True)]


class Dataset:
    """As much of ``datasets.Dataset`` as is read: columns by name, rows by number, slices as mappings."""

    column_names = ("prompt", "weight")

    def __len__(self):
        return len(PROMPTS)

    def __iter__(self):
        return iter(ROWS)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return {name: column[key] for name, column in COLUMNS.items()}
        return COLUMNS[key] if isinstance(key, str) else ROWS[key]

    def with_format(self, _):
        return self


TABLES = {
    "mapping": COLUMNS,
    "arrays": {"prompt": np.array(PROMPTS), "weight": np.array(WEIGHTS)},
    "rows": ROWS,
    "data set": Dataset(),
    "slice of a data set": Dataset()[:],
    "DataFrame": pd.DataFrame(COLUMNS, index=[7, 3, 5]),
}


def weighted(completions, weight):
    return [w * text.count("a") for text, w in zip(completions, weight, strict=True)]


def model(**settings):
    return TiltedLM(LM, weighted, 0.5, max_new_tokens=2, **settings)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_prompts_and_columns(name):
    expected = Exact().run(model(), PROMPTS, weight=WEIGHTS)
    found = Exact().run(model(), TABLES[name])
    assert found.prompts == expected.prompts
    np.testing.assert_array_equal(found.log_joint, expected.log_joint)
    assert found.log_evidence.std() > 0.1  # so that columns in another order would be seen


@pytest.mark.parametrize("name", ["data set", "DataFrame"])
def test_minibatches_of_a_table(name):
    runs = [
        SVI(num_steps=2, num_samples=8, seed=0, progress=False).run(model(subsample_size=2), *args, **columns)
        for args, columns in (((TABLES[name],), {}), ((PROMPTS,), {"weight": WEIGHTS}))
    ]
    np.testing.assert_array_equal(runs[0].log_weights, runs[1].log_weights)


CELLS = [["x"], None, ["y", "z"], []]


def test_cells_that_are_lists_or_none_reach_the_reward_as_such():
    """Pandas reads lists of Parquet as arrays."""
    arrays = [None if cell is None else np.array(cell, dtype=object) for cell in CELLS]
    frame = pd.DataFrame({"prompt": list("abcd"), "answer": pd.Series(arrays, dtype=object)})
    assert read_table(frame) == (list("abcd"), {"answer": CELLS})


@pytest.mark.parametrize("change", ["whole", "slice", "select", "shuffle", "filter", "sort", "numpy", "concatenate"])
def test_a_data_set_however_it_was_changed(change):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"prompt": list("abcd"), "answer": CELLS, "n": [1, None, 3, 4]})
    made = {
        "whole": lambda: whole,
        "slice": lambda: whole[1:3],
        "select": lambda: whole.select([3, 0]),
        "shuffle": lambda: whole.shuffle(seed=0),
        "filter": lambda: whole.filter(lambda row: row["n"] != 3),
        "sort": lambda: whole.sort("prompt", reverse=True),
        "numpy": lambda: whole.with_format("numpy"),
        "concatenate": lambda: datasets.concatenate_datasets([whole, whole]),
    }[change]()
    prompts, columns = read_table(made)
    places = ["abcd".index(prompt) for prompt in prompts]
    assert columns == {"answer": [CELLS[i] for i in places], "n": [[1, None, 3, 4][i] for i in places]}
    assert len(prompts) == len(made["prompt"])


@pytest.mark.parametrize("table", [{"prompt": []}, {"prompt": [], "n": []}, pd.DataFrame({"prompt": []})])
def test_a_table_without_rows_is_refused(table):
    with pytest.raises(ValueError, match="the table has no rows: give at least one prompt"):
        read_table(table)


def test_columns_of_pandas_are_read_by_position():
    frame = TABLES["DataFrame"]
    expected = Exact().run(model(), PROMPTS, weight=WEIGHTS)
    found = Exact().run(model(), frame["prompt"], weight=frame["weight"])
    np.testing.assert_array_equal(found.log_joint, expected.log_joint)


def test_other_sequences_are_prompts():
    for prompts in (PROMPTS, [[1, 2], [3]], torch.tensor([[1], [2]]), [[{"role": "user", "content": "a"}]]):
        assert read_table(prompts) == (prompts, {})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"question": PROMPTS}, r"columns \['question'\], and none of them is 'prompt'"),
        ({"prompt": PROMPTS, "weight": [1.0]}, "'weight' has 1 values for 3 prompts"),
        ({"prompt": "a", "weight": 1.0}, "'prompt' must hold one value a prompt"),
        ([*ROWS, {"prompt": "d"}], r"row 3 has the columns \['prompt'\]"),
        ({"prompt": Dataset()}, "is no table: give one of them"),
    ],
)
def test_what_is_no_table_of_prompts_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        Exact().run(model(), table)


def test_a_column_is_given_once():
    with pytest.raises(ValueError, match="'weight' is in the table and an argument too"):
        Exact().run(model(), COLUMNS, weight=WEIGHTS)


@pytest.mark.parametrize("size", [None, 2])
def test_one_value_beside_several_prompts_is_refused(size):
    engine = ImportanceSampling(seed=0, progress=False)
    with pytest.raises(ValueError, match=r"column 'weight' has 1 value.* for [23] prompts"):
        engine.run(model(subsample_size=size), PROMPTS, weight=[0.5])
    with pytest.raises(ValueError, match="column 'weight' has 1 value for 2 prompts"):
        Reward(weighted)(["a", "b"], [["a", "b"], ["b", "a"]], weight=np.array([1.0]))
    assert Reward(weighted)(["a"], [["a"], ["b"]], weight=[2.0]).tolist() == [[2.0], [0.0]]


@pytest.mark.parametrize("name", TABLES)
def test_a_program_that_hands_a_table_to_a_language_model_is_refused(name):
    def written_out(prompts):
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("completion", LM(prompts, max_new_tokens=2))

    with pytest.raises(TypeError, match=r"got a table.*'prompt', 'weight'.*table\['prompt'\]"):
        Exact().run(written_out, TABLES[name])


def in_plate(name: str, prompts, *, shared: bool = False):
    def program():
        if shared:
            pyro.sample("mood", dist.Normal(0.0, 1.0))
        with pyro.plate(name, len(prompts)):
            x = pyro.sample("completion", LM(prompts, max_new_tokens=2))
            pyro.factor("r", (x == 1).float().sum(-1))

    return program


def test_a_plate_of_prompts_by_another_name_is_warned_of():
    with pytest.warns(UserWarning, match=r"named 'data', so its 2 prompts are one posterior.*name it 'prompts'"):
        inspect(in_plate("data", ["a", "b"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inspect(in_plate("prompts", ["a", "b"]))
        inspect(in_plate("candidates", ["a", "a"]))  # of one prompt
        inspect(in_plate("data", ["a", "b"], shared=True))  # one posterior by any name
