"""The planner with the real TPU compiler, on a toy model."""

import dataclasses
import html
import pathlib
import re
import subprocess
import sys

import pytest

from configs import glm45
from glm_jax.infer.config import EngineConfig
from glm_jax.optim.optimizer import OptimizerConfig
from glm_jax.plan import program
from glm_jax.plan.estimate import Collectives, Work, collective_seconds
from glm_jax.plan.page import page
from glm_jax.plan.plan import plan_engine, plan_swap, plan_train, worst
from glm_jax.plan.programs import ENGINE_MODES, trace_train
from glm_jax.sharding import MeshConfig, make_mesh
from glm_jax.torus import Torus
from pallas_kernels.compiler import tpu_devices
from tests.model.oracle import tiny_config

ENGINE = EngineConfig(
    context=64, num_rows=8, page_size=16, num_pages=32, prefill_chunk=16, min_rows=1, min_chunk=1,
    decode_steps=4, draft_tokens=0, weights="fp8",
    cache_dtype="float8_e4m3fn", keep_experts=False,
)  # fmt: skip
MESH = MeshConfig(data=1, fsdp=2, expert=2, context=1, tensor=1)
TOPOLOGY = "v5e:2x2"
OPTIMIZER = OptimizerConfig(**glm45.get_config().optimizer.to_dict())


def test_a_toy_verify_pass_fits_and_its_bytes_are_counted():
    model = dataclasses.replace(
        tiny_config(), compute_dtype="bfloat16", grouped_matmul="ragged_dot"
    )
    drafting = dataclasses.replace(ENGINE, draft_tokens=2)
    plan, read, more = plan_engine(model, drafting, MESH, TOPOLOGY, "verify")
    assert plan.mode == "verify" and plan.fits and plan.num_devices == 4 and not plan.message
    layers, pages = model.num_layers + 1, ENGINE.num_pages // 4
    # a byte each
    assert (
        plan.cache_bytes
        == layers * pages * ENGINE.page_size * 2 * model.num_kv_heads * model.head_size
    )
    assert more["cache_bytes_per_token"] == plan.cache_bytes / (pages * ENGINE.page_size)
    assert plan.weight_bytes + plan.cache_bytes < plan.hbm_bytes_per_chip < plan.hbm_capacity_bytes
    free = plan.hbm_capacity_bytes - plan.hbm_bytes_per_chip + plan.cache_bytes
    assert more["cached_tokens_that_fit"] == int(4 * free / more["cache_bytes_per_token"])

    loops = {loop.trips for found in read.loops.values() for loop in found}
    assert {None, model.num_moe_layers} <= loops  # passes, layers
    # logits of both drafts of a device's two rows and of the token after them are made at once
    passes = [o for o, _ in read.executed(1) if o.shape.startswith(f"f32[2,3,{model.vocab_size}]")]
    assert passes
    assert plan.estimated_step_seconds >= plan.xla_seconds > 0 and plan.needed_hbm_seconds > 0
    assert sum(plan.parts.values()) == pytest.approx(plan.estimated_step_seconds)
    listed = worst(read, 1)
    shown = page(plan, listed)
    assert all(
        name in shown
        for name, seconds in plan.parts.items()
        if seconds > 0.01 * plan.estimated_step_seconds
    )
    assert (
        len(listed) == 10
        and all(html.escape(o.source or o.op_name[-60:]) in shown for o, _ in listed)
        and "http" not in shown
    )
    assert any(operation.source.startswith("glm_jax/model/") for operation, _ in read.executed(1))


PROGRAM = """HloModule step

FileNames
1 "/somewhere/glm_jax/model/moe.py"
2 "/elsewhere/jax/lax.py"

FunctionNames
1 "observe"
2 "add"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%cond (p: (s32[])) -> pred[] {
  %five = s32[] constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %five), direction=LT
}

%rounds (p: (s32[])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%further (p: (s32[])) -> (s32[]) {
  %copy.1 = bf16[4,8]{1,0} copy(%x), backend_config={"estimated_cycles":"1000000"}
}

%all-reduce-scatter.1 (x: bf16[64,8]) -> bf16[4,8] {
  %sum = bf16[64,8]{1,0} all-reduce(%x), replica_groups=[4,16]<=[64]
  ROOT %own = bf16[4,8]{1,0} dynamic-slice(%sum), backend_config={"estimated_cycles":"5"}
}

%layer (p: (s32[])) -> (s32[]) {
  %fusion.1 = bf16[4,8]{1,0} fusion(%x), metadata={op_name="dot_general" stack_frame_id=2}, \
    backend_config={"estimated_cycles":"30"}
  %copy.2 = (f32[2]{0}, bf16[4,8]{1,0}) copy(%x), backend_config={"estimated_cycles":"7"}
  %rows-start = ((u32[8,1,2]{2,1,0}), u32[8,1,2]{2,1,0}) \
    ragged-all-to-all-start(%x), replica_groups=[4,16]<=[64]
  %gather.1 = bf16[64,8]{1,0} all-gather(%x), \
    replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp'}, dimensions={0}
  %reduce.1 = bf16[64,8]{1,0} all-reduce(%x), replica_groups=[4,16]<=[64]
  %scattered.1 = bf16[4,8]{1,0} fusion(%x), calls=%all-reduce-scatter.1, \
    {"strategy":"UniDirection1D","debug":"UniDirection1D{colors:6"}
  %kernel.1 = bf16[4,8] custom-call(%x), custom_call_target="tpu_custom_call", \
    {"cost_estimate":{"flops":"64","bytes_accessed":"256"}}
  %rows-done = u32[8,1,2]{2,1,0} ragged-all-to-all-done(%rows-start)
  %copy.4 = bf16[4,8]{1,0} copy(%x), backend_config={"estimated_cycles":"2"}
  %w = (s32[]) while(%x), condition=%rounds, body=%further
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %w = (s32[]) while(%x), condition=%cond, body=%layer
  %copy.3 = f32[2]{0} copy(%x), backend_config={"estimated_cycles":"9223372036854775807"}
}
"""


def test_a_program_is_read():
    read = program.read(PROGRAM)
    assert read.entry == "main" and read.times(1) == {"main": 1, "layer": 5, "further": 0}
    found = {operation.name: (operation, times) for operation, times in read.executed(1)}
    assert {name: operation.kind for name, (operation, _) in found.items()} == {
        "fusion.1": "product", "copy.2": "copy", "gather.1": "collective", "reduce.1": "collective",
        "kernel.1": "kernel", "copy.1": "copy",
        "copy.4": "copy", "rows-start": "collective", "scattered.1": "collective",
    }  # fmt: skip
    assert sum(operation.cycles * times for operation, times in found.values()) == 5 * 39
    assert (found["kernel.1"][0].flops, found["kernel.1"][0].moved_bytes) == (64, 256)
    assert [operation.name for operation in read.meanwhile["rows-start"]] == [
        "gather.1",
        "reduce.1",
        "scattered.1",
        "kernel.1",
    ]
    assert (
        found["fusion.1"][0].source == "glm_jax/model/moe.py:7 observe"
        and found["copy.2"][0].bytes == 64
    )
    gather, reduce = found["gather.1"][0], found["reduce.1"][0]
    assert gather.group == tuple(range(8)) and reduce.group == found["rows-start"][
        0
    ].group == tuple(range(16))
    # 64 chips: 8 in a row along an axis that is a ring, groups of 16 are two such rows.
    torus = Torus((8, 8, 1, 1), (True, True, False, False))
    places = [(i % 8, i // 8, 0, 0) for i in range(64)]
    slow = 512
    assert collective_seconds(gather, torus, places, slow) == pytest.approx(7 / 8)
    assert collective_seconds(reduce, torus, places, slow) == pytest.approx(2 * 15 / 16)
    # 8 * 8 / 8 pairs cross a link
    assert collective_seconds(found["rows-start"][0], torus, places, slow) == pytest.approx(
        64 / 512
    )
    scattered = found["scattered.1"][0]  # three rings, each with a third of the 1,024 bytes
    assert (scattered.opcode, scattered.bytes, scattered.group) == (
        "reduce-scatter",
        1024,
        reduce.group,
    )
    assert collective_seconds(scattered, torus, places, slow) == pytest.approx(15 / 16 / 3)
    # four links to the other side of the ring
    assert collective_seconds(gather, torus, places, 1e30) == pytest.approx(4e-6)


def test_a_collective_that_is_hidden_is_listed_with_nothing_exposed():
    gather = next(
        o for o, _ in program.read(PROGRAM).executed(1) if o.opcode.startswith("all-gather")
    )
    mesh = make_mesh(MeshConfig(1, 4, 2, 1, 1), tpu_devices("v5e:2x4"))
    collectives = Collectives(mesh, Work(0.0, 0))
    for _ in range(2):
        collectives.add(gather, 5, 0.25, 0.0)
    assert collectives.listed() == [
        {
            "kind": "all-gather", "axes": "fsdp x expert", "count": 10,
            "bytes": 10 * 1024 * 7 / 8, "seconds": 2.5, "exposed_seconds": 0,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("mesh['data'=2,'fsdp'=8] {'fsdp'}", range(8)),
        ("mesh['data'=2,'fsdp'=8] {'data'}", (0, 8)),
        ("[4,16]<=[64]", range(16)),
        ("[8,8]<=[8,8]T(1,0)", range(0, 64, 8)),
        ("{{0,3,5},{1,2,4}}", (0, 3, 5)),
    ],
)
def test_groups_are_read_as_xla_writes_them(groups, expected):
    text = (
        "ENTRY %main (x: f32[2]) -> f32[2] {\n  %g = f32[8] all-gather(%x),"
        f" replica_groups={groups}, dimensions={{0}}\n}}\n"
    )
    assert program.read(text).operations["main"][0].group == tuple(expected)


def test_a_toy_training_step_fits_and_its_work_is_counted():
    """5 MoE layers on 4 devices."""
    model = dataclasses.replace(
        tiny_config(),
        num_layers=6,
        num_dense_layers=1,
        compute_dtype="bfloat16",
        grouped_matmul="ragged_dot",
    )
    plan, read = plan_train(model, OPTIMIZER, 1e-4, MESH, TOPOLOGY, rows=8, length=64)
    assert (
        plan.fits
        and plan.num_devices == 4
        and plan.weight_bytes < plan.hbm_bytes_per_chip < plan.hbm_capacity_bytes
    )
    assert 0 < plan.xla_seconds < plan.estimated_step_seconds and 0 < plan.estimated_mfu < 1
    assert 5 in {loop.trips for found in read.loops.values() for loop in found}


def test_a_training_step_lowers_a_kernel_for_few_of_its_calls():
    """Before kernels were traced once, such a step lowered some 100 calls of them, and took over a
    minute for it.
    """
    changes = {
        "hidden_size": 256,
        "head_size": 128,
        "expert_ffn_size": 128,
        "num_experts": 8,
        "num_experts_per_token": 4,
        "num_layers": 6,
    }
    more = {
        "compute_dtype": "bfloat16",
        "attention": "pallas",
        "grouped_matmul": "pallas",
        "expert_exchange": "ragged_all_to_all",
    }
    mesh = make_mesh(
        MeshConfig(data=1, fsdp=2, expert=4, context=1, tensor=1), tpu_devices("v5e:2x4")
    )
    traced, _ = trace_train(
        tiny_config(**changes, num_dense_layers=1, remat="full", **more),
        OPTIMIZER,
        1e-4,
        mesh,
        16,
        512,
    )
    kernels = re.findall(
        r'@tpu_custom_call.*?backend_config = "((?:[^"\\]|\\.)*)"',
        traced.lower(lowering_platforms=("tpu",)).as_text(),
    )
    assert len(set(kernels)) <= 24 and len(kernels) <= 75


def test_what_does_not_fit_says_so():
    model = dataclasses.replace(
        tiny_config(), compute_dtype="bfloat16", grouped_matmul="ragged_dot"
    )
    plan, read, more = plan_engine(
        model, dataclasses.replace(ENGINE, num_pages=40_000_000), MESH, TOPOLOGY, "decode"
    )
    assert not plan.fits and "exceeds available HBM" in plan.message
    assert more["cached_tokens_that_fit"] == 0 and read is None
    assert "Does not fit 15.8 GiB" in page(plan, [])


@pytest.mark.parametrize(
    ("mode", "engine", "model", "message"),
    [
        ("decode", {"num_rows": 6}, {}, r"engine.num_rows=6 cannot be split over 4 shards"),
        ("verify", {}, {}, r"mode=verify: engine.draft_tokens=0 leaves nothing to verify"),
        ("decode", {"draft_tokens": 2}, {}, r"draft_tokens=2 the engine runs .* mode=verify"),
        ("verify", {"draft_tokens": 2}, {"num_mtp_layers": 0}, "this model has no MTP block"),
        ("verfy", {}, {}, r"mode='verfy' is not one of decode, verify, .* mean 'verify'"),
    ],
)
def test_what_the_engine_does_not_run_is_named(mode, engine, model, message):
    with pytest.raises(ValueError, match=message):
        plan_engine(
            tiny_config(**model), dataclasses.replace(ENGINE, **engine), MESH, TOPOLOGY, mode
        )


SWAPPED = tiny_config(
    num_layers=6, num_dense_layers=1, num_experts=12, hidden_size=320, expert_ffn_size=136,
    dense_ffn_size=200, compute_dtype="bfloat16",
)  # fmt: skip
TRAINER, EIGHT = MeshConfig(data=1, fsdp=2, expert=4, context=1, tensor=1), "v5e:2x4"


def test_a_toy_swap_moves_fp8_that_a_chip_lacks_and_nothing_else():
    """5 MoE layers, 3 experts a device, a width of 2.5 blocks. A chip has half of what it keeps of
    each matrix, in float32, and receives the other half in FP8.
    """
    mesh = dataclasses.replace(TRAINER, data=2, fsdp=1)
    plan, read, more = plan_swap(SWAPPED, OPTIMIZER, ENGINE, TRAINER, mesh, EIGHT)
    assert plan.mode == "swap" and plan.fits and more["beside_them"] and plan.num_devices == 8
    layers, width, ffn = SWAPPED.num_moe_layers + 1, SWAPPED.hidden_size, SWAPPED.expert_ffn_size
    experts = layers * 12 // 4 * 3 * width * ffn
    assert experts < plan.weight_bytes < more["trainer_weight_bytes"] < 4 * plan.weight_bytes
    assert more["trainer_weight_bytes"] + plan.weight_bytes < plan.hbm_bytes_per_chip
    # Muon's momentum is another float32 of each weight
    assert more["resident_bytes"] > 0.9 * more["trainer_weight_bytes"] + plan.cache_bytes
    received = sum(row["bytes"] for row in plan.collectives)
    assert experts / 2 < received < 0.55 * plan.weight_bytes
    assert max(o.bytes for o, _ in read.executed(0) if o.kind == "collective") <= experts
    assert plan.estimated_step_seconds >= plan.exposed_collective_seconds > 0
    assert {row["axes"] for row in plan.collectives} == {"fsdp"}
    assert all(row["kind"] in page(plan, worst(read, 0)) for row in plan.collectives)


def test_a_swap_on_one_mesh_moves_only_the_largest_values_of_blocks():
    plan, _, more = plan_swap(SWAPPED, OPTIMIZER, ENGINE, TRAINER, TRAINER, EIGHT)
    assert plan.fits and sum(row["bytes"] for row in plan.collectives) < 0.02 * plan.weight_bytes
    assert plan.weight_bytes < more["trainer_weight_bytes"] / 2


def test_weights_that_the_engines_mesh_does_not_divide_are_named():
    mesh = dataclasses.replace(TRAINER, fsdp=1, expert=8)
    with pytest.raises(ValueError, match="moe_layers.*'experts' of size 12 cannot be split over"):
        plan_swap(SWAPPED, OPTIMIZER, ENGINE, TRAINER, mesh, EIGHT)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable, "-m", "experiments.plan", "--config=configs/tiny.py",
            f"--topology={TOPOLOGY}", *arguments,
        ],
        cwd=pathlib.Path(__file__).parent.parent,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("flag", ["json", "html"])
def test_a_file_that_cannot_be_written_is_named_before_anything_is_compiled(flag, tmp_path):
    """The model cannot be planned either: its rows do not divide."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "plan", tmp_path):
        done = command(f"--{flag}={path}", "--num_rows=3")
        assert done.returncode == 1 and str(path.parent) in done.stderr, done.stderr
        assert "num_rows" not in done.stderr
    done = command(f"--{flag}={tmp_path / 'new' / 'plan'}", "--num_rows=3")
    assert "num_rows=3 cannot be split" in done.stderr and (tmp_path / "new").is_dir()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--mode=sample"], ["train", *ENGINE_MODES, "swap"]),
        (["--mode=swap", "--engine_mesh=experts=4"], ["'experts'", "data, fsdp, expert"]),
        (["--mode=swap", "--engine_mesh=expert"], ["'expert' is not AXIS=SIZE"]),
    ],
)
def test_a_wrong_flag_is_answered_with_what_is_valid(arguments, named):
    done = command(*arguments)
    assert done.returncode == 1 and all(name in done.stderr for name in named), done.stderr


# --- what may stand in a layer's loop ---

KERNELS = {
    "hidden_size": 256, "head_size": 128, "expert_ffn_size": 128, "dense_ffn_size": 200,
    "vocab_size": 1000, "max_length": 4096, "num_experts": 8,
    "num_experts_per_token": 4, "num_layers": 6, "num_dense_layers": 1, "compute_dtype": "bfloat16",
    "attention": "pallas",
    "grouped_matmul": "pallas", "expert_exchange": "ragged_all_to_all", "remat": "full",
}  # fmt: skip


def in_loops(read: program.Program, trips: int):
    """Operations of the loops with so many trips."""
    bodies = [loop.body for found in read.loops.values() for loop in found if loop.trips == trips]
    assert bodies
    return [operation for body in bodies for operation in read.operations[body]]


@pytest.mark.parametrize("mode", ENGINE_MODES)
def test_no_operation_of_a_layer_touches_more_than_its_weights_and_rows(mode):
    """5 MoE layers, FP8, 3 rows a device. The cache of a layer is larger than all else: copied in
    any layout it would show.
    """
    model = tiny_config(**KERNELS)
    engine = dataclasses.replace(
        ENGINE,
        context=4096,
        num_rows=12,
        page_size=128,
        num_pages=12 * 33,
        prefill_chunk=64,
        cache_dtype="bfloat16",
        draft_tokens=3 if mode == "verify" else 0,
    )
    plan, read, _ = plan_engine(model, engine, MESH, TOPOLOGY, mode)
    layer_cache = plan.cache_bytes // (model.num_layers + (mode == "verify")) // 2
    tokens = 3 * {"decode": 1, "verify": 4, "prefill": engine.prefill_chunk}[mode]
    weights = (
        model.hidden_size
        * max(model.num_heads * model.head_size, model.num_experts // 2 * model.expert_ffn_size)
        * 2
    )
    rows = 2 * tokens * model.num_experts_per_token * 2 * model.hidden_size * 4
    most = max(weights, rows)
    assert most < layer_cache / 2
    for operation in in_loops(read, model.num_moe_layers):
        if not operation.name.startswith("store_pages"):  # which changes the cache where it lies
            assert operation.bytes <= most, operation
    # of the rounds
    assert (
        sum(operation.opcode == "all-reduce" for operation in in_loops(read, model.num_moe_layers))
        <= 1
    )


def test_a_training_step_moves_and_makes_nothing_whole():
    """7 MoE layers on 8 devices, 16 rows: what a layer makes is its device's part of the batch, and
    the head's gradient moves once.
    """
    sizes = {"hidden_size": 128, "num_experts": 160, "num_experts_per_token": 2, "num_layers": 8}
    model, length = tiny_config(**KERNELS | sizes), 512
    plan, read = plan_train(
        model, OPTIMIZER, 1e-4, MeshConfig(1, 2, 4, 1, 1), "v5e:2x4", rows=16, length=length
    )
    assert plan.fits
    experts = model.num_experts // 4 * model.hidden_size * model.expert_ffn_size
    # with an exchange's spare room
    pairs = 2 * (16 // 8 * length * model.num_experts_per_token) * model.hidden_size
    most = 4 * max(experts, pairs)
    # what the balance loss once counted, of the whole batch
    assert 4 * 16 * (length + 1) * model.num_experts > 1.5 * most
    for operation in in_loops(read, model.num_moe_layers):
        # gradients and states of all layers, in place
        stacked = operation.shape.partition("[")[2].startswith(f"{model.num_moe_layers},")
        assert stacked or operation.bytes <= most, operation
    for found in read.loops.values():
        for loop in found:
            if loop.trips not in (None, model.num_moe_layers, OPTIMIZER.ns_steps):
                assert not [o for o in read.operations[loop.body] if o.kind == "collective"], loop
