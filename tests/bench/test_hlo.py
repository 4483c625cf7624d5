"""What the benchmark reads from compiled programs, and for which devices it compiles them."""

import jax
import jax.numpy as jnp
import pytest

from jbn.bench import hlo, targets

SHAPE = (64, 128)
TENSOR = 64 * 128 * 4


def _moved(text, **options):
    return hlo.moved(hlo.operations(text, **options))


def _entry(body, *, before=""):
    head = f"HloModule m, is_scheduled=true\n\n{before}\n"
    return f"{head}ENTRY %main (x: f32[64,128]) -> f32[64,128] {{\n{body}\n}}\n"


def _compiled(fn, *args):
    return targets.compile_for("cpu", fn, *args).as_text()


# --- hlo: compiled programs ---


def test_elementwise_program_reads_and_writes_once():
    text = _compiled(lambda x: jnp.sin(x) * 2 + 1, jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    assert _moved(text) == 2 * TENSOR


def test_two_operands_are_both_read_and_the_same_one_once():
    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    assert _moved(_compiled(lambda x, y: x * y, x, x)) == 3 * TENSOR
    assert _moved(_compiled(lambda x: x * x, x)) == 2 * TENSOR


def test_loop_counts_its_trips_and_slices_are_charged_their_size():
    def rows(x):
        return jax.lax.scan(lambda carry, row: (carry, jnp.sin(row) + carry), jnp.float32(1), x)[1]

    text = _compiled(rows, jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    # One row read and one written a trip; the rest is copies of the whole at entry and exit, and
    # counters.
    body = [op for op in hlo.operations(text) if op.times == SHAPE[0]]
    assert body
    assert 2 * TENSOR <= hlo.moved(body) < 4 * TENSOR


def test_conditional_counts_a_branch():
    def either(flag, x):
        return jax.lax.cond(flag, lambda x: jnp.sort(jnp.sin(x), axis=0), jnp.negative, x)

    text = _compiled(
        either, jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    )
    dear, cheap, both = (
        _moved(text, branch=choice) for choice in (hlo.costliest, hlo.cheapest, hlo.every)
    )
    assert 2 * TENSOR <= cheap < dear
    assert both > dear


def test_collectives_are_counted_with_their_shapes():
    devices = targets.devices("cpu")
    mesh = jax.sharding.Mesh(devices, ("data",))
    summed = jax.shard_map(
        lambda x: jax.lax.psum(x.sum(0), "data"),
        mesh=mesh,
        in_specs=jax.P("data"),
        out_specs=jax.P(),
        check_vma=False,
    )
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    text = _compiled(
        summed, jax.ShapeDtypeStruct((len(devices) * 4, 128), jnp.float32, sharding=sharding)
    )
    expected = {} if len(devices) == 1 else {("all-reduce", "f32[128]"): 1}
    assert dict(hlo.collectives(text)) == expected


def test_matrix_product_is_told_apart():
    x = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    found = hlo.operations(_compiled(lambda x: jnp.sin(x) @ x, x))
    assert any(op.is_product for op in found)
    assert not any(op.is_product for op in hlo.operations(_compiled(jnp.sin, x)))


# --- hlo: what only other platforms print ---


def test_custom_call_is_charged_operands_and_results():
    text = _entry(
        """  %x = f32[64,128]{1,0} parameter(0)
  ROOT %call = (f32[64,128]{1,0}, f32[128]{0}) custom-call(%x),
  custom_call_target="tpu_custom_call", config={"body":"(("}"""
    )
    (call,) = hlo.operations(text)
    assert (call.read, call.written, call.is_product) == (TENSOR, TENSOR + 512, False)


def test_async_pair_counts_once():
    text = _entry(
        """  %x = f32[64,128]{1,0} parameter(0)
  %s = (f32[64,128]{1,0}, f32[64,128]{1,0}) all-reduce-start(%x), to_apply=%sum
  ROOT %d = f32[64,128]{1,0} all-reduce-done(%s)"""
    )
    assert _moved(text) == 2 * TENSOR
    assert hlo.collectives(text) == {("all-reduce", "f32[64,128]"): 1}


def test_on_chip_memory_of_a_tpu_is_free():
    text = _entry(
        """  %x = f32[64,128]{1,0:T(8,128)} parameter(0)
  %s = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %d = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%s)
  ROOT %y = f32[64,128]{1,0:T(8,128)} fusion(%d), calls=%f, """
        """backend_config={"window_config":{"estimated_cycles":"123"}}"""
    )
    assert _moved(text) == 2 * TENSOR  # prefetched once, written once
    assert hlo.estimated_cycles(hlo.operations(text)) == 123


def test_both_spellings_of_a_conditional_and_a_bare_loop():
    before = """%cheap (a: f32[64,128]) -> f32[64,128] {
  ROOT %a = f32[64,128]{1,0} parameter(0)
}

%dear (b: f32[64,128]) -> f32[64,128] {
  %b = f32[64,128]{1,0} parameter(0)
  ROOT %n = f32[64,128]{1,0} negate(%b)
}

%test (c: (s32[], f32[64,128])) -> pred[] {
  %c = (s32[], f32[64,128]{1,0}) parameter(0)
  %seven = s32[] constant(7)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %seven), direction=LT
}
"""
    lines = {
        "pred": "%p = pred[] constant(true)\n  ROOT %y = f32[64,128]{1,0} conditional(%p, %x, %x), "
        "true_computation=%dear, false_computation=%cheap",
        "index": "%p = s32[] constant(1)\n  ROOT %y = f32[64,128]{1,0} conditional(%p, %x, %x), "
        "branch_computations={%cheap, %dear}",
        "loop": "ROOT %y = f32[64,128]{1,0} while(%x), condition=%test, body=%dear",
    }
    texts = {
        key: _entry("  %x = f32[64,128]{1,0} parameter(0)\n  " + line, before=before)
        for key, line in lines.items()
    }
    assert {key: _moved(text) for key, text in texts.items()} == {
        "pred": 2 * TENSOR,
        "index": 2 * TENSOR,
        "loop": 14 * TENSOR,
    }
    with pytest.raises(ValueError, match="no trip count"):
        hlo.operations(texts["loop"].replace("direction=LT", "direction=NE"))


def test_branches_that_work_on_chip_are_told_apart_by_cycles():
    """A look at what is kept on chip moves no bytes, but it is not the cheap branch."""
    kept = "f32[64,128]{1,0:T(8,128)S(1)}"
    cycles = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
    before = f"""%far (a: f32[64,128]) -> f32[8] {{
  %a = {kept} parameter(0)
  ROOT %r = f32[8]{{0:T(128)S(1)}} fusion(%a), calls=%f, {cycles % 123}
}}

%near (b: f32[64,128]) -> f32[8] {{
  %b = {kept} parameter(0)
  ROOT %r = f32[8]{{0:T(128)}} fusion(%b), calls=%f, {cycles % 5}
}}
"""
    line = f"""  %x = {kept} parameter(0)
  %i = s32[] parameter(1)
  ROOT %y = f32[8]{{0:T(128)}} conditional(%i, %x, %x), branch_computations={{%far, %near}}"""
    text = _entry(line, before=before)
    assert hlo.estimated_cycles(hlo.operations(text, branch=hlo.cheapest)) == 5
    assert hlo.estimated_cycles(hlo.operations(text, branch=hlo.costliest)) == 123


def test_bytes_of_types():
    assert hlo.nbytes("(bf16[3,5]{1,0}, pred[7]{0}, s4[3]{0}, f8e4m3fn[9])") == 30 + 7 + 2 + 9
    assert hlo.nbytes("f32[]") == 4
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.operations("")


# --- targets ---


def test_unknown_target_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'h100'.*h200"):
        targets.compile_for("h100", jnp.sin, jnp.ones(3))


def test_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr(targets, "_installed", lambda module: False)
    targets.devices.cache_clear()
    for target in ("a100", "v4"):
        with pytest.raises(ImportError, match=rf"'{target}'.*jbn\[aot\]"):
            targets.compile_for(target, jnp.sin, jnp.ones(3))
    assert targets.available("cpu")
    assert not targets.available("v5e")


def _needs(target):
    return pytest.param(
        target, marks=pytest.mark.aot("libtpu" if target.startswith("v") else "jax_cuda13_plugin")
    )


@pytest.mark.parametrize("target", [_needs(t) for t in ("h200", "a100", "v5e", "v5p", "v6e")])
def test_deviceless_compile(target):
    # Larger than any TPU's VMEM: otherwise the compiler keeps the tensor on chip.
    x = jax.ShapeDtypeStruct((64, 1024, 2048), jnp.float32)
    found = hlo.operations(targets.compile_for(target, lambda x: jnp.sin(x) + 1, x).as_text())
    assert hlo.moved(found) == 2 * 64 * 1024 * 2048 * 4
    assert (hlo.estimated_cycles(found) > 0) == target.startswith("v")


@pytest.mark.parametrize("topology", [_needs("v5e:16x16")])
def test_deviceless_mesh(topology):
    devices = targets.devices(topology)
    assert len(devices) == 256
    mesh = jax.sharding.Mesh(devices, ("data",))
    x = jax.ShapeDtypeStruct(
        (256 * 8, 512), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("data"))
    )
    found = hlo.collectives(targets.compile_for(topology, lambda x: x.sum(0), x).as_text())
    assert found == {("all-reduce", "f32[512]"): 1}
