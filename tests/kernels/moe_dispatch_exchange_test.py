"""Experts over a mesh axis: eight simulated devices equal one under any routing, in memory that the
factor bounds.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import interpret
from pallas_kernels.compiler import tpu_devices
from pallas_kernels.moe_dispatch import api, exchange, few_exchange, routed
from pallas_kernels.moe_dispatch.exchange import Exchange, ragged_layout, routed_exchange
from tests.kernels.routed_oracle import draw, errors, oracle

TOKENS, PER_TOKEN, EXPERTS, WIDTH, FFN = 8 * 24, 3, 16, 12, 10
FACTORS = (0.4, 1.25, 4.0)
ROWS, LOCAL = PartitionSpec(("data", "expert")), PartitionSpec("expert")


def mesh_of(data: int, devices=None) -> Mesh:
    devices = jax.devices()[:8] if devices is None else devices
    return Mesh(
        np.asarray(devices).reshape(data, 8 // data),
        ("data", "expert"),
        axis_types=(AxisType.Auto,) * 2,
    )


def split(exchange: Exchange):
    """(x, weights, gate, up, down, expert_TK, dy) -> y and gradients, over the current mesh."""
    local = lambda x, weights, gate, up, down, e: routed_exchange(
        x, e, weights, gate, up, down, exchange
    )
    over = jax.shard_map(
        local, in_specs=(ROWS, ROWS, LOCAL, LOCAL, LOCAL, ROWS), out_specs=ROWS, check_vma=False
    )

    def run(*args):
        *arguments, expert_TK, dy_TD = args
        y, pullback = jax.vjp(lambda *arguments: over(*arguments, expert_TK), *arguments)
        return y, *pullback(dy_TD)

    return run


@functools.cache
def compiled(data: int, factor: float, parts: int):
    return jax.jit(split(Exchange("expert", "all_to_all", factor, "batched")))


def routing(name: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    return {
        "uniform": rng.integers(0, EXPERTS, (TOKENS, PER_TOKEN)),
        "zipf, some of no expert": np.minimum(rng.zipf(1.3, (TOKENS, PER_TOKEN)) - 1, EXPERTS),
        "all to one": np.full((TOKENS, PER_TOKEN), EXPERTS - 1),
        "each device to the next": (
            (np.arange(TOKENS) // 24 * 2 + 2)[:, None] % EXPERTS + np.zeros((1, PER_TOKEN), int)
        ),
        "none": np.full((TOKENS, PER_TOKEN), -1),
    }[name]


@pytest.mark.parametrize(
    "name", ["uniform", "zipf, some of no expert", "all to one", "each device to the next", "none"]
)
@pytest.mark.parametrize(
    ("data", "factor", "parts"), [(1, 0.4, 1), (1, 1.25, 1), (1, 4.0, 1), (2, 0.4, 1), (1, 0.4, 3)]
)
def test_eight_devices_equal_one(name, data, factor, parts, monkeypatch):
    """parts: that a device's tokens are exchanged in, each with further rounds of its own."""
    monkeypatch.setattr(exchange, "num_parts", lambda *_: parts)
    sizes = {
        "tokens": TOKENS,
        "per_token": PER_TOKEN,
        "experts": EXPERTS,
        "width": WIDTH,
        "ffn": FFN,
    }
    case = draw(np.random.default_rng(1), **sizes, expert_TK=routing(name))
    one = lambda *a: api.routed_ffn(a[0], case.expert_TK, *a[1:], implementation="reference")
    y, pullback = jax.vjp(one, *case.arguments)
    expected = y, *pullback(case.dy_TD)
    with jax.set_mesh(mesh_of(data)):
        ours = compiled(data, factor, parts)(*case.arguments, case.expert_TK, case.dy_TD)
    for what, error in errors(ours, [np.asarray(e) for e in expected]).items():
        assert error <= 1e-5, (what, error)


def test_rows_that_travel_as_words_equal_one_device(monkeypatch):
    """The TPU kernels, simulated on two devices with unwritten memory NaN, in two rounds; both
    choices of many tokens are on one device.
    """
    monkeypatch.setattr(exchange, "FEW_PAIRS", 0)
    monkeypatch.setattr(routed, "FEW_PAIRS", 0)
    rng, tokens = np.random.default_rng(1), 2 * 13
    experts = rng.integers(-1, 5, (tokens, 2))  # the first and the last are none
    case = draw(
        rng,
        tokens=tokens,
        per_token=2,
        experts=4,
        width=256,
        ffn=128,
        dtype=jnp.bfloat16,
        expert_TK=experts,
    )
    mesh = Mesh(
        np.asarray(jax.devices()[:2]).reshape(1, 2),
        ("data", "expert"),
        axis_types=(AxisType.Auto,) * 2,
    )
    with jax.set_mesh(mesh), interpret.on(uninitialized_memory="nan"):
        run = jax.jit(split(Exchange("expert", "all_to_all", 0.6, "pallas")))
        ours = run(*case.arguments, case.expert_TK, case.dy_TD)
    for what, error in errors(ours, oracle(case)).items():
        assert error <= 1e-2, (what, error)


def ragged(operand, output, offsets, sizes, offsets_there, sizes_come, *, axis_name):
    """XLA's ragged_all_to_all, which it has none of for CPUs."""
    del sizes_come
    device, rows = jax.lax.axis_index(axis_name), jnp.arange(len(operand))
    gathered = [jax.lax.all_gather(x, axis_name) for x in (operand, offsets, sizes, offsets_there)]
    for sent, *chunks in zip(*gathered, strict=True):
        for offset, size, there in zip(
            *(x.reshape(len(gathered[0]), -1)[device] for x in chunks), strict=True
        ):
            output = output.at[jnp.where(rows < size, there + rows, len(output))].set(
                sent[(offset + rows) % len(rows)], mode="drop"
            )
    return output


FEW = {
    "at random, some of no expert": lambda rng: rng.permuted(
        np.tile(np.arange(-1, 7), (44, 1)), axis=1
    )[:, :3],
    "all to the last expert": lambda rng: np.full((44, 3), 5),
    "none": lambda rng: np.full((44, 3), 6),
}


@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("factor", [2, 0.1])
def test_few_tokens_equal_one_device(name, factor, data, monkeypatch):
    """By the simulated TPU kernels, unwritten memory NaN. Three experts a device. Where 132 rows
    for one expert find room for 128, the pairs go one by one.
    """
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged)
    monkeypatch.setattr(exchange, "target_platform", lambda: "tpu")
    monkeypatch.setattr(few_exchange, "FEW_FACTOR", factor)
    monkeypatch.setattr(few_exchange, "takes", lambda *args: True)
    rooms, room = [], few_exchange.room
    monkeypatch.setattr(few_exchange, "room", lambda *args: rooms.append(room(*args)) or rooms[-1])
    rng = np.random.default_rng(1)
    case = draw(
        rng, tokens=44, per_token=3, experts=6, width=256, ffn=128, dtype=jnp.bfloat16,
        expert_TK=FEW[name](rng),
    )  # fmt: skip
    mesh = Mesh(
        np.asarray(jax.devices()[: 2 * data]).reshape(data, 2),
        ("data", "expert"),
        axis_types=(AxisType.Auto,) * 2,
    )
    few = Exchange("expert", "ragged_all_to_all", 1.25, "pallas")
    local = lambda x, weights, gate, up, down, e: routed_exchange(
        x, e, weights, gate, up, down, few
    )
    over = jax.shard_map(
        local, in_specs=(ROWS, ROWS, LOCAL, LOCAL, LOCAL, ROWS), out_specs=ROWS, check_vma=False
    )
    with jax.set_mesh(mesh), interpret.on(uninitialized_memory="nan"):
        y = jax.jit(over)(*case.arguments, case.expert_TK)
    if (name, factor, data) == ("all to the last expert", 0.1, 1):
        assert rooms[0] == (128, 32)
    expected = oracle(case)[0]
    error = np.max(np.abs(np.asarray(y, np.float64) - expected))
    assert error <= 1e-2 * max(np.max(np.abs(expected)), 1)


def shapes_in(jaxpr):
    """Shapes of everything that a program holds, its loops' and calls' bodies included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for part in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"),
        ):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def test_no_buffer_is_longer_than_the_factor_says_and_memory_follows_it():
    width = 40  # of nothing else
    case = draw(
        np.random.default_rng(1),
        tokens=TOKENS,
        per_token=PER_TOKEN,
        experts=EXPERTS,
        width=width,
        ffn=FFN,
    )
    pairs = TOKENS // 8 * PER_TOKEN
    memory = []
    with jax.set_mesh(mesh_of(1)):
        for factor in FACTORS:
            run = split(Exchange("expert", "all_to_all", factor, "ragged_dot"))
            arguments = (*case.arguments, case.expert_TK, case.dy_TD)
            rows = {
                s[0]
                for s in shapes_in(jax.make_jaxpr(run)(*arguments).jaxpr)
                if len(s) == 2 and s[1] == width
            }
            quota = min(math.ceil(factor * pairs / 8), pairs)
            # A device's tokens and the slots of a round; outside of shard_map those of all eight,
            # as they wait for the backward pass.
            assert rows == {TOKENS // 8, 8 * quota} | {TOKENS, 8 * 8 * quota}, (factor, rows)
            memory.append(
                jax.jit(run).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
            )
    assert memory[0] < memory[1] < memory[2] / 1.5, memory


def test_parts_divide_the_tokens_and_have_enough_rows():
    ragged, slots = (
        Exchange("expert", collective, 1.25, "pallas")
        for collective in ("ragged_all_to_all", "all_to_all")
    )
    assert [
        exchange.num_parts(ragged, (tokens, 8), 20)
        for tokens in (32768, 3 * 5120, 10240, 10239, 17, 1)
    ] == [4, 3, 2, 1, 1, 1]
    # prefill
    assert exchange.num_parts(ragged, (4096, 8), 5) == exchange.num_parts(ragged, (4096, 8), 8) == 2
    assert exchange.num_parts(slots, (32768, 8), 20) == 1  # XLA does not start it early


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), devices=st.integers(1, 5), quota=st.integers(1, 6))
def test_ragged_layout_moves_the_rows_that_all_to_all_moves(seed, devices, quota):
    """By XLA's definition of ragged_all_to_all, in numpy: the CPU has none to run."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, quota + 1, (devices, devices))  # from, to
    slots = rng.normal(size=(devices, devices, quota))
    filled = np.where(np.arange(quota) < sizes[..., None], slots, 0)
    garbage = np.where(filled == 0, 99.0, filled).reshape(devices, -1)
    layouts = [
        [np.asarray(a) for a in ragged_layout(devices, quota, d, sizes[d], sizes[:, d])]
        for d in range(devices)
    ]
    received = np.zeros((devices, devices * quota))
    for source, (starts, lengths, places, _) in enumerate(layouts):
        for target in range(devices):
            assert lengths[target] == layouts[target][3][source], (
                "both sides must agree on the size"
            )
            rows = garbage[source, starts[target] : starts[target] + lengths[target]]
            received[target, places[target] : places[target] + lengths[target]] = rows
    np.testing.assert_array_equal(received, filled.swapaxes(0, 1).reshape(devices, -1))


@pytest.mark.parametrize("topology", ["v5p:2x2x2", "v6e:2x4"])
def test_the_tpu_compiler_takes_forward_and_backward_with_ragged_rows_and_kernels(topology):
    mesh = mesh_of(1, tpu_devices(topology))
    place = lambda shape, dtype, spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    tokens, experts, width, ffn, dtype = 8 * 640, 16, 512, 128, jnp.bfloat16
    arguments = (
        place((tokens, width), dtype, ROWS), place((tokens, 4), jnp.float32, ROWS),
        place((experts, width, ffn), dtype, LOCAL),
        place((experts, width, ffn), dtype, LOCAL), place((experts, ffn, width), dtype, LOCAL),
        place((tokens, 4), jnp.int32, ROWS),
        place((tokens, width), dtype, ROWS),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        lowered = (
            jax.jit(split(Exchange("expert", "ragged_all_to_all", 1.25, "pallas")))
            .trace(*arguments)
            .lower(lowering_platforms=("tpu",))
        )
        text = lowered.as_text()
        # Rows there and back, forward and in the further rounds; and all of it once more in the
        # backward pass.
        assert text.count("ragged_all_to_all") >= 8 and text.count("tpu_custom_call") >= 10
        assert lowered.compile().memory_analysis().temp_size_in_bytes > 0


def test_bad_input_is_named():
    with pytest.raises(
        ValueError, match="collective='all_gather' is not one of all_to_all, ragged_all_to_all"
    ):
        Exchange("expert", "all_gather", 1.25, "batched")
    with pytest.raises(ValueError, match="factor=0.0: must be a positive number"):
        Exchange("expert", "all_to_all", 0.0, "batched")
    with pytest.raises(
        ValueError,
        match=(
            "collective='ragged_all_to_all': XLA has none for CPUs; 'all_to_all' works everywhere"
        ),
    ):
        routed_exchange(
            *[jnp.zeros((1, 1))] * 6, Exchange("expert", "ragged_all_to_all", 1.25, "batched")
        )
