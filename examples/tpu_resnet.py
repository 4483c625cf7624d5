"""Train ResNet-50 on all the devices there are: TPU, GPU or CPU.

On a TPU VM, and again to resume:
    python examples/tpu_resnet.py --data imagenet/train --checkpoints checkpoints
Anywhere:
    python examples/tpu_resnet.py --fake-devices 8 --image-size 32 --steps 4
Without a TPU, by its compiler (jbn[aot]):
    python examples/tpu_resnet.py --compile-only v5e:4x4
"""

import argparse
import hashlib
import pathlib

import image_data
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from resnet import setup
from tqdm import tqdm

from jbn.bench import hlo, targets, traffic


def main():
    args = arguments()
    if args.fake_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.fake_devices)
    if args.distributed:
        jax.distributed.initialize()
    if args.compile_only:
        compile_only(args)
        return
    data, test_data = image_data.load(args.data, args.image_size)
    batch_size = args.batch_size * jax.device_count()
    per_epoch = len(data.labels) // batch_size
    if per_epoch == 0:
        raise SystemExit(
            f"{len(data.labels)} images do not fill a batch of {batch_size}: "
            "give a smaller --batch-size"
        )
    total = args.steps or args.epochs * per_epoch
    init, step, correct = setup(args, int(data.labels.max()) + 1, batch_size, total)
    replicated, split = shardings(jax.devices())
    state = jax.jit(init, out_shardings=replicated)(jax.random.key(args.seed))
    step, correct = jax.jit(step, donate_argnums=0), jax.jit(correct)
    put = lambda batch: {
        name: jax.make_array_from_process_local_data(split, array) for name, array in batch.items()
    }

    manager = args.checkpoints and ocp.CheckpointManager(pathlib.Path(args.checkpoints).absolute())
    if manager and manager.latest_step() is not None:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
    first = int(state["step"])
    print(
        f"{jax.device_count()} devices, {batch_size} images per step, from step {first} to {total}"
    )
    bar = tqdm(
        total=total * batch_size, initial=first * batch_size, unit=" images", unit_scale=True
    )
    for epoch in range(first // per_epoch, -(-total // per_epoch)):
        start = max(first, epoch * per_epoch)
        batches = image_data.batches(
            data, batch_size, seed=args.seed, epoch=epoch, skip=start - epoch * per_epoch
        )
        for done, batch in zip(range(start + 1, total + 1), batches, strict=False):
            state, loss = step(state, put(batch))
            bar.update(batch_size)
            if done % args.log_every == 0 or done == total:
                bar.write(f"step {done}: loss {loss:.4f}")
            if manager and (done % args.save_every == 0 or done == total):
                manager.save(done, args=ocp.args.StandardSave(state))
        tests = image_data.batches(test_data, batch_size, seed=None)
        right = sum(int(correct(state, put(batch))) for batch in tests)
        bar.write(f"epoch {epoch + 1}: test accuracy {right / len(test_data.labels):.4f}")
    if manager:
        manager.close()
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)))
    bar.write(f"state after step {int(state['step'])}: sha256 {digest.hexdigest()}")


def shardings(devices):
    """On each of the devices the whole of an array, and a part of its first axis."""
    mesh = Mesh(np.array(devices), ("batch",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))


def compile_only(args):
    """Compile the training step for a TPU topology and print what its compiler says."""
    devices = targets.devices(args.compile_only)
    replicated, split = shardings(devices)
    batch_size = args.batch_size * len(devices)
    init, step, _ = setup(args, 1000, batch_size, 100_000)
    place = lambda sharding: lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    state = jax.tree.map(place(replicated), jax.eval_shape(init, jax.random.key(0)))
    image = jax.ShapeDtypeStruct(
        (batch_size, args.image_size, args.image_size, 3), np.float32, sharding=split
    )
    label = jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=split)
    compiled = targets.compile_for(
        args.compile_only, step, state, {"image": image, "label": label}, donate_argnums=0
    )
    found, memory = traffic.summary(compiled), compiled.memory_analysis()
    used = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    print(
        f"{args.compile_only}, {len(devices)} chips, {args.norm}: "
        f"per chip {used / 1e9:.2f} GB of memory used, per step"
    )
    print(
        f"{found['moved'] / 1e9:.2f} GB moved, "
        f"{found['estimated_cycles'] / 1e6:.2f} M estimated cycles, collectives:"
    )
    for (kind, result), times in sorted(hlo.collectives(compiled.as_text()).items()):
        shown = result if len(result) < 80 else result[:77] + "..."
        print(f"  {times:4} {kind} of {hlo.nbytes(result)} bytes: {shown}")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        help="folder of one folder of images per class, or .npz (see image_data.py); "
        "made-up images if absent",
    )
    add("--checkpoints", help="folder to save to, and to resume from")
    add("--save-every", type=int, default=1000, help="steps")
    add("--log-every", type=int, default=100, help="steps")
    add("--steps", type=int, help="instead of --epochs")
    add("--epochs", type=int, default=90)
    add("--batch-size", type=int, help="per device; 128, or 8 with --fake-devices")
    add("--image-size", type=int, default=224)
    add("--learning-rate", type=float, default=0.1, help="per 256 images of a batch")
    add("--blocks", type=int, nargs="+", default=[3, 4, 6, 3])
    add("--width", type=int, default=64)
    add("--norm", choices=("jbn", "flax"), default="jbn")
    add("--seed", type=int, default=0)
    add("--distributed", action="store_true", help="on a TPU of several hosts: start this on each")
    add("--fake-devices", type=int, help="pretend to have so many, on CPU")
    add(
        "--compile-only",
        metavar="TOPOLOGY",
        help="such as v5e:4x4: compile the step for it and print what it costs",
    )
    args = parser.parse_args()
    args.batch_size = args.batch_size or (8 if args.fake_devices else 128)
    return args


if __name__ == "__main__":
    main()
