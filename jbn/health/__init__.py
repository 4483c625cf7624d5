"""What a batch-norm layer is doing: numbers per channel, and warnings that name the layer, the
channels and a remedy.

    print(jbn.health.report(params, state, jbn.moments(x)))    one layer; x is its input
    print(jbn.health.model_report(variables))                  a model, or the tree of a checkpoint
    jbn.health.metrics(variables)                              scalars, in a jitted training step
    jbn.health.Monitor().update(step, metrics)                 what crossed a limit at this step
    python -m jbn.health CHECKPOINT [--html out.html]          orbax folders, flax msgpack files

The variables alone tell: values that are not finite, statistics never updated, variances near eps,
large means, scales near zero, outputs on one side of zero, replicas that disagree, and a channel
that has been dead for long (a running variance takes 1150 updates at momentum 0.99 to fall from 1
to 1e-5). Drift between training and running statistics, and a channel that died lately, take the
moments of a batch; without them they are not guessed.
"""

from jbn.health.findings import Finding, Limits, Numbers
from jbn.health.inputs import input_moments
from jbn.health.monitor import Changes, Event, Monitor
from jbn.health.reports import LayerReport, ModelReport, model_report, report
from jbn.health.scalars import metrics

__all__ = [
    "Changes",
    "Event",
    "Finding",
    "LayerReport",
    "Limits",
    "ModelReport",
    "Monitor",
    "Numbers",
    "input_moments",
    "metrics",
    "model_report",
    "report",
]
