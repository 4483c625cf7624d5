"""Compile for a GPU or TPU that is not there, from the wheels of the extra `aot` alone."""

import functools
import glob
import importlib.util
import os
from collections.abc import Callable
from importlib import resources
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding, use_abstract_mesh

# Each has a description of the device in targets/, as XLA's autotuner prints it.
_GPUS = ("h200", "a100")
# The smallest topology that the TPU compiler knows of each.
_TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TARGETS = ("cpu", *_GPUS, *_TPUS)


def stay_on_host() -> None:
    """Have JAX use the CPU alone where this machine has neither a GPU nor a TPU.

    The compilers of the extra aot are JAX plugins, and each would print a traceback while it looks
    for its device. Call it before JAX is used. A platform that the user chose stays.
    """
    nodes = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
    has_compiler = _installed("libtpu") or _installed("jax_plugins.xla_cuda13")
    if has_compiler and not _chosen_platforms() and not any(map(glob.glob, nodes)):
        jax.config.update("jax_platforms", "cpu")


def _chosen_platforms() -> str | None:
    config: Any = jax.config
    return config.jax_platforms


def compile_for(target: str, fn: Callable, *args: Any, **jit_options: Any) -> jax.stages.Compiled:
    """Compile `fn(*args)` for one device of a target.

    Args:
        target: "cpu", "h200", "a100", "v4", "v5e", "v5p", "v6e", or a TPU topology such as
            "v5e:16x16".
        fn: the function.
        args: pytrees of arrays or `jax.ShapeDtypeStruct`; one that carries a sharding keeps it.
        jit_options: as `jax.jit` takes them.

    Raises:
        ValueError: an unknown target.
        ImportError: the wheels that hold the target's compiler are not installed.
        RuntimeError: the CUDA plugin did not start, as it does not without a GPU unless
            JAX_PLATFORMS is cpu.
    """
    device = devices(target)[0]
    args = jax.tree.map(lambda leaf: _placed(leaf, device), args)
    meshes = [
        leaf.sharding.mesh
        for leaf in jax.tree.leaves(args)
        if isinstance(leaf.sharding, NamedSharding)
    ]
    mesh = meshes[0] if meshes else Mesh(np.array([device]), ("device",))
    # Pallas asks the mesh for the kind of device while it lowers.
    with use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(fn, **jit_options).lower(*args).compile()


@functools.cache
def devices(target: str) -> tuple[Any, ...]:
    """The devices of a target, described and not opened: they make shardings, and no arrays.

    Raises:
        As `compile_for`.
    """
    if target == "cpu":
        return tuple(jax.devices("cpu"))
    if target in _GPUS:
        _need("jax_plugins.xla_cuda13", target, "the CUDA plugin of JAX")
        config = resources.files("jbn.bench").joinpath("targets", f"{target}.txtpb").read_text()
        options = {"topology_name": target, "target_config": config, "topology": "1x1x1"}
        try:
            return tuple(topologies.get_topology_desc(platform="cuda", **options).devices)
        except NotImplementedError as error:
            # Without a GPU the plugin looks for CUDA libraries and gives up, unless JAX is told not
            # to want one.
            mend = (
                "set JAX_PLATFORMS=cpu, or jax.config.update('jax_platforms', 'cpu') "
                "before anything runs"
            )
            raise RuntimeError(
                f"target {target!r}: the CUDA plugin did not start; {mend}"
            ) from error
    if target.partition(":")[0] not in _TPUS:
        raise ValueError(
            f"target is {target!r}, expected one of {', '.join(TARGETS)}, "
            "or a TPU topology such as 'v5e:16x16'"
        )
    _need("libtpu", target, "the TPU compiler")
    # Without the first libtpu waits for the metadata server of a Google Cloud machine; without the
    # second it refuses to load while another process holds it, which matters for a TPU alone.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return tuple(topologies.get_topology_desc(_TPUS.get(target, target), platform="tpu").devices)


def available(target: str) -> bool:
    """Whether this installation can compile for the target."""
    module = "jax_plugins.xla_cuda13" if target in _GPUS else "libtpu"
    return target == "cpu" or _installed(module)


def _need(module, target, what):
    if not _installed(module):
        raise ImportError(
            f"target {target!r} needs {what}, which is not installed: pip install 'jbn[aot]'"
        )


def _installed(module):
    parent = module.partition(".")[0]
    return (
        importlib.util.find_spec(parent) is not None
        and importlib.util.find_spec(module) is not None
    )


def _placed(leaf, device):
    sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
    leaf = leaf if hasattr(leaf, "shape") else jax.numpy.asarray(leaf)
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding or SingleDeviceSharding(device)
    )
