"""One frozen type for a rank configuration: text at the edges, equality and hash by what it says."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.configuration import Configuration, KernelRanks, MatrixRanks, parse_config_str

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=":,()"), min_size=1)
RANKS = st.one_of(
    st.builds(MatrixRanks, st.integers(1, 9999)),
    st.builds(KernelRanks, st.integers(1, 999), st.integers(1, 999), st.integers(1, 999)),
)
CONFIGURATIONS = st.dictionaries(NAMES, RANKS, max_size=5).map(Configuration)


@given(CONFIGURATIONS)
def test_text_and_back(config):
    again = Configuration.parse(str(config))
    assert again == config
    assert list(again) == list(config)
    assert hash(again) == hash(config)
    assert parse_config_str(str(config)) == config.as_tuples()


@given(CONFIGURATIONS)
def test_equality_and_hash_do_not_depend_on_the_order(config):
    turned = Configuration(dict(reversed(list(config.items()))))
    assert turned == config == dict(config)
    assert len({turned, config}) == 1
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_it_is_frozen():
    given_ranks = {"fc": MatrixRanks(4)}
    config = Configuration(given_ranks)
    given_ranks["fc"] = MatrixRanks(5)
    assert config["fc"] == MatrixRanks(4)
    with pytest.raises(TypeError):
        config["fc"] = MatrixRanks(5)
    assert config != Configuration({"fc": MatrixRanks(5)})
    assert (config == 3) is False
    assert repr(config) == "Configuration(fc:(4))"


@pytest.mark.parametrize("text", ["conv1:(2, 3)", "fc:()", "a:(1), a:(2)", "a", "a:b"])
def test_what_is_no_configuration_is_refused(text):
    with pytest.raises(ValueError, match=r"a\b|conv1|fc"):
        Configuration.parse(text)
