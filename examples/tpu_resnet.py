"""Train ResNet-50 on all the devices there are: TPU, GPU or CPU.

python examples/tpu_resnet.py --data imagenet/train --checkpoints checkpoints      on a TPU VM
python examples/tpu_resnet.py --fake-devices 8 --image-size 32 --steps 4           anywhere
python examples/tpu_resnet.py --compile-only v5e:4x4    no TPU, but its compiler (extra aot)

The first line, given again, resumes. Ctrl-C finishes the step, saves it and stops.
"""

import argparse
import hashlib
import itertools
import pathlib
import signal
import threading

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
        few = f"{len(data.labels)} images do not fill a batch of {batch_size}"
        raise SystemExit(f"{few}: give a smaller --batch-size")
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
    size = f"{jax.device_count()} devices, {batch_size} images per step"
    print(f"{size}, from step {first} to {total}")
    images = {"total": total * batch_size, "initial": first * batch_size, "unit": " images"}
    bar = tqdm(desc="compiling", unit_scale=True, **images)
    interrupted = stop_on_interrupt()
    for epoch in range(first // per_epoch, -(-total // per_epoch)):
        start = max(first, epoch * per_epoch)
        batches = image_data.batches(
            data, batch_size, seed=args.seed, epoch=epoch, skip=start - epoch * per_epoch
        )
        for done, batch in zip(range(start + 1, total + 1), batches, strict=False):
            state, loss = step(state, put(batch))
            if done == first + 1:
                loss.block_until_ready()  # or the bar would say "training" while XLA compiles
                bar.set_description("training")
            bar.update(batch_size)
            if interrupted.is_set():
                break
            if done % args.log_every == 0 or done == total:
                bar.write(f"step {done}: loss {loss:.4f}")
            if manager and (done % args.save_every == 0 or done == total):
                manager.save(done, args=ocp.args.StandardSave(state))
        if interrupted.is_set():
            bar.close()
            stop(manager, state)
        # After a part of an epoch, as in a short trial, no more batches than were trained on.
        tests = image_data.batches(test_data, batch_size, seed=None)
        right, tested = 0, 0
        for batch in itertools.islice(tests, done - epoch * per_epoch):
            right += int(correct(state, put(batch)))
            tested += int((batch["label"] >= 0).sum())
        tested = min(tested * jax.process_count(), len(test_data.labels))
        bar.write(f"epoch {epoch + 1}: test accuracy {right / tested:.4f} of {tested} images")
    if manager:
        manager.close()
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)))
    bar.write(f"state after step {int(state['step'])}: sha256 {digest.hexdigest()}")


def stop_on_interrupt():
    """An event that the first Ctrl-C sets. A second one ends the program at once."""
    interrupted = threading.Event()

    def handle(*_):
        interrupted.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, handle)
    return interrupted


def stop(manager, state):
    """Save the state, if there is a place for it, and end with one line."""
    step = int(state["step"])
    if manager:
        if manager.latest_step() != step:
            manager.save(step, args=ocp.args.StandardSave(state))
        manager.close()
    end = "saved; the same command goes on from here" if manager else "not saved: no --checkpoints"
    print(f"stopped after step {step}: {end}")
    raise SystemExit(130)


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
