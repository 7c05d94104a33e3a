"""The rest of the package asks mechanisms for what they declare, and knows none of them by name."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from rave_jax import attention as at
from rave_jax.attention.base import Owned
from rave_jax.attention.checks import DOES
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.layout import ContextTokens, VisualLayout
from rave_jax.models.config import ModelOptions
from tests.attention.built_in import BUILT_IN
from tests.attention.packed import DIMS, KEY, attend, features, info_of

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "rave_jax"
NAMES = {kind.__name__ for kind in BUILT_IN}
BY_NAME: dict[str, set[str]] = {
    # The sliding window of a checkpoint's own config.
    "models/config.py": {"SlidingWindow"},
    # What a search of ZeroTuning's gammas starts from and returns.
    "tools/calibrate.py": {"ZeroTuning"},
    # Which heads are dropped, multiplied, or get a gate, and which dimensions say that a token is a sink.
    "tools/calibrate_heads.py": {"Rave", "Sads", "Var", "Vhr"},
    # What takes out the bias for places, and what the routers are of.
    "tools/calibrate_tokens.py": {"Dyvte", "Pruning"},
}
"""Files outside of attention/ that are about one mechanism."""


def named(path: Path) -> set[str]:
    """Classes of mechanisms that the code of a file names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return NAMES & names


def test_no_file_outside_of_attention_knows_a_mechanism_by_name() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "attention" not in path.parents]
    found = {path.relative_to(PACKAGE).as_posix(): named(path) for path in files}
    assert {path: names for path, names in found.items() if names} == BY_NAME


def test_gaze_is_known_to_its_folder_alone() -> None:
    """`attention/__init__.py` imports every mechanism once, which makes it known to configs."""
    files = [path for path in PACKAGE.rglob("*.py") if "Gaze" in named(path)]
    outside = [path for path in files if PACKAGE / "attention" / "gaze" not in path.parents]
    assert outside == [PACKAGE / "attention" / "__init__.py"]


def test_a_mechanism_that_declares_nothing_asks_for_nothing() -> None:
    class Quiet(at.MechanismConfig):
        def build(self, dims: at.AttentionDims, key: object) -> at.Mechanism:
            return at.Mechanism()

    quiet = Quiet()
    assert quiet.layers == "all" and quiet.layout == VisualLayout() and quiet.against_kernels is None
    assert not (quiet.looks_ahead or quiet.needs_order or quiet.skips_keys or quiet.of_prompt or quiet.drops)


@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.__name__)
def test_declarations_agree_with_the_hooks(kind: type[at.MechanismConfig]) -> None:
    """Who routes over regions of the layout wants them and says what a query then reads; who may see later
    tokens looks ahead."""
    config = kind(dims=(1,)) if kind is at.Var else kind()
    mechanism = config.build(at.AttentionDims(4, 2, 8), jax.random.key(0))
    routes = "route" in mechanism.OWNS and not mechanism.OWN_REGIONS
    assert (config.layout.regions is not None) == routes == (kind.reading is not at.MechanismConfig.reading)
    # Pine ranks pictures by all of their keys, in one array.
    assert config.needs_order == (kind is at.Pine)
    assert config.needs_all == mechanism.OWN_REGIONS
    # The mean query of a region has queries of later tokens; an arrow opens earlier ones.
    ahead = bool({"hi", "opening", "tokens"} & set(mechanism.OWNS)) and kind is not at.Arrow
    assert config.looks_ahead == (ahead or kind is at.BiFormer)


@dataclass(frozen=True)
class Odd(at.MechanismConfig):
    """What the user of a hook may get wrong."""

    built: Any = None
    laid_out: VisualLayout = field(default_factory=VisualLayout)

    @property
    def layout(self) -> VisualLayout:
        return self.laid_out

    def build(self, dims: at.AttentionDims, key: jax.Array) -> at.Mechanism:
        return self.built(dims)


class WithParameter(at.Mechanism):
    def __init__(self, axes: Any):
        self.slope = nnx.Param(jnp.zeros((4,)), **axes)


@pytest.mark.parametrize(
    ("built", "said"),
    [
        (lambda dims: dims, "build of Odd returned an object of class AttentionDims, expected a Mechanism"),
        (
            lambda dims: WithParameter({}),
            r"Odd: the parameter \.slope.* of shape \(4,\) has axes None, expected",
        ),
        (lambda dims: WithParameter({"axes": ("sides",)}), r"has axes \('sides',\), expected .* None or batch, length"),
        (lambda dims: WithParameter({"axes": ("heads", None)}), r"has axes \('heads', None\), expected"),
    ],
)
def test_a_module_that_cannot_be_used_is_refused_by_its_config(built: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        at.build_mechanisms((Odd(built),), at.AttentionDims(4, 2, 8), jax.random.key(0))


class Silent(at.Mechanism):
    """Overrides what only one mechanism may, and does not say so."""

    def factor(self, x: Any, info_q: Any, info_k: Any) -> None:
        return None


class Asking(at.Mechanism):
    """Gives another query, and does not say so."""

    def score(self, x: at.Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> at.Score:
        return at.Score(query=at.OtherQuery(x.q0, info_k.kind == Kind.VISUAL))


def test_who_overrides_what_one_may_has_to_own_it() -> None:
    with pytest.raises(ConfigError, match=r"Odd: Silent overrides the hook 'factor', .* OWNS = \('factor',\)"):
        at.build_mechanisms((Odd(lambda dims: Silent()),), DIMS, KEY)
    x, info, mechanisms = features(), info_of(("qva",), ("qva",)), [Asking(), Asking()]
    with pytest.raises(ConfigError, match="Asking lets other queries meet some of the keys, and so does another"):
        attend(x, info, mechanisms)


def test_context_tokens_are_an_option_of_the_model_alone() -> None:
    with pytest.raises(ConfigError, match=r"mechanisms\.0: the layout of Odd has context tokens"):
        ModelOptions((Odd(laid_out=VisualLayout(context=ContextTokens())),))


def test_one_mechanism_of_a_layer_says_what_it_reads() -> None:
    class Fewer(Odd):
        def reading(self, pictures: Any, dims: Any, number_bytes: int) -> Any:
            return None

    ModelOptions((at.Gaze(layers=(0,)), at.Rave()))
    with pytest.raises(ConfigError, match="Fewer and Gaze share a layer, and each chooses what queries read"):
        ModelOptions((Fewer(), at.Gaze(layers=(0,))))


def test_the_page_lists_what_can_be_owned_in_the_words_of_errors() -> None:
    page = (REPO / "docs" / "mechanisms.md").read_text()
    owned = get_args(Owned)
    assert [thing for thing in owned if f"| `{thing}` | {DOES[thing]} |" not in page] == []
    assert set(DOES) == {*owned}
