"""Rooms: what each module imports, also inside functions, lies in its own or a lower one, and nothing in a circle.

What only type checkers read (`if TYPE_CHECKING:`) is no import. The names of a package's root that are imported when
first used are.
"""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import hf_rnn

PACKAGES = ("hf_rnn_kernels", "hf_rnn_trainers", "hf_rnn")

# From low to high: a module may import from its own room and from lines above its own. Rooms of one line do not know
# each other. A module belongs to the longest of these names that it begins with; hf_rnn_trainers and hf_rnn stand for
# the roots alone.
ROOMS = [
    ["hf_rnn_kernels"],
    ["hf_rnn_trainers.reliability", "hf_rnn_trainers.model_card"],
    ["hf_rnn_trainers.base"],
    ["hf_rnn_trainers.zo", "hf_rnn_trainers.rate", "hf_rnn_trainers.memory"],
    ["hf_rnn_trainers.smt", "hf_rnn_trainers.dmt"],
    ["hf_rnn_trainers"],
    ["hf_rnn._version"],
    ["hf_rnn.remote_code", "hf_rnn.tokenization", "hf_rnn.tasks", "hf_rnn.forecasting", "hf_rnn.checkpoints"],
    ["hf_rnn.skeleton"],
    ["hf_rnn.layers", "hf_rnn.compression", "hf_rnn.generation"],
    ["hf_rnn.skeleton.block"],  # blocks made of layers, which know the config and the state
    ["hf_rnn.skeleton.pretrained"],
    ["hf_rnn.skeleton.modeling_recurrent"],
    ["hf_rnn.skeleton.heads"],
    ["hf_rnn.exchange"],
    ["hf_rnn.models"],
    ["hf_rnn"],  # the public names
    ["hf_rnn.hub", "hf_rnn.planning", "hf_rnn.serving"],
    ["hf_rnn.cli"],
]
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def room_of(module: str) -> str:
    """The room of a module.

    Raises:
        ValueError: the table has none.
    """
    roots = ("hf_rnn_trainers", "hf_rnn")
    rooms = [room for room in LEVELS if module == room or (module.startswith(f"{room}.") and room not in roots)]
    if not rooms:
        raise ValueError(f"{module}: in no room; add its room to ROOMS")
    return max(rooms, key=len)


@cache
def modules() -> dict[str, Path]:
    """Every module of the three packages, by name; a folder's `__init__.py` by the folder's."""
    found = {}
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(source: str, known: set[str]) -> set[str]:
    """Which of the known modules a source imports."""
    found, nodes = set(), [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"from {'.' * node.level}{node.module or ''}: imports are absolute here"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module, name` is of both
            found |= inside & known
            found |= {node.module} if inside - known else set()
        nodes += ast.iter_child_nodes(node)
    return found & known


@cache
def graph() -> dict[str, set[str]]:
    """What each module imports."""
    known = modules()
    arrows = {module: imports(path.read_text(), set(known)) for module, path in known.items()}
    arrows["hf_rnn"] |= set(hf_rnn._MODULES.values())
    return arrows


def check_levels(arrows: dict[str, set[str]]) -> None:
    wrong = []
    for module, targets in arrows.items():
        here = room_of(module)
        for target in targets:
            there = room_of(target)
            if here != there and LEVELS[there] >= LEVELS[here]:
                wrong.append(f"{module} ({here}) imports {target} ({there})")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circles():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_arrow_goes_up():
    check_levels(graph())


def test_rooms_are_there():
    assert {room_of(module) for module in modules()} == set(LEVELS)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import hf_rnn_kernels.threads", {"hf_rnn_kernels.threads"}),
        ("from hf_rnn.layers import RMSNorm, norm", {"hf_rnn.layers", "hf_rnn.layers.norm"}),
        ("def f():\n    from hf_rnn.hub.loading import load", {"hf_rnn.hub.loading"}),
        ("if TYPE_CHECKING:\n    import hf_rnn.hub\nelse:\n    import hf_rnn.cli", {"hf_rnn.cli"}),
        ("import torch", set()),
    ],
)
def test_what_counts_as_an_import(source, expected):
    assert imports(source, set(modules())) == expected


@pytest.mark.parametrize(
    "module, target",
    [
        ("hf_rnn_kernels.threads", "hf_rnn_trainers.base"),
        ("hf_rnn_trainers.reliability.manifest", "hf_rnn_trainers.model_card.card"),
        ("hf_rnn_trainers.smt.smt_config", "hf_rnn_trainers.dmt.dmt_config"),
        ("hf_rnn.skeleton.cache", "hf_rnn.layers.norm"),
        ("hf_rnn.models.gru.modeling_gru", "hf_rnn"),
    ],
)
def test_an_arrow_up_is_found(module, target):
    with pytest.raises(AssertionError, match=f"{module} .* imports {target}"):
        check_levels(graph() | {module: {target}})
    with pytest.raises(ValueError, match="attic: in no room"):
        room_of("hf_rnn.attic")
