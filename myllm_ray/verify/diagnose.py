"""What kind of mistake a difference is: by experiment, not by guess.

A batch that differs is `data order`, a learning rate that differs is the schedule. For anything else the run is done again
in ways that would make each kind of mistake disappear, or appear in the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from myllm_ray.verify.compare import Difference, distance, first_difference
from myllm_ray.verify.end_tokens import EndTokensCheck
from myllm_ray.verify.packing import PackingCheck
from myllm_ray.verify.runs import Runner, Trace, Variant

KINDS = {
    "data order": "the batch of this step holds other rows, or the same ones in other places",
    "schedule stepped twice": "the learning rate is that of step {twice}: the schedule goes on twice a step",
    "schedule": "the learning rate is not the schedule's",
    "normalisation": "the loss or the gradient depends on how the batch is cut: something is averaged per micro-batch or per "
                     "worker, and not once over the global batch",
    "clipping": "the weights move as if gradients were not clipped",
    "packing": "documents in one row see each other, or the trainer does not say where one ends: alone in a row they have another loss",
    "end tokens": "no document trains on a token at which sampling stops ({tokens}): answers of this model do not end",
    "dropout": "without dropout the runs agree: other random numbers are drawn, or dropout is on in one and off in the other",
    "precision": "everything is off by a little from the first step: something computes in a lower precision",
    "sharding": "a rank holds more of the model than the backend's share of it: it was not sharded, or in a larger dtype",
    "unknown": "no experiment explains it",
}


@dataclass(frozen=True)
class Finding:
    """A variant that trains another run than the reference."""

    variant: Variant
    difference: Difference
    kind: str
    reason: str

    def __str__(self) -> str:
        d = self.difference
        numbers = (f"off by {d.found:.1e} of its largest value" if d.quantity == "weights"
                   else f"{_shown(d.found)} instead of {_shown(d.expected)}")
        when = f"step {d.step}" if d.step else "at the start"
        return f"{self.variant}: {when}, {d.quantity} {numbers}: {self.kind}: {self.reason}"


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def leak_finding(reference: Variant, packing: PackingCheck) -> Finding:
    """Packing that changes the loss, or else the gradient, of the first batch."""
    assert packing.packed is not None
    assert packing.alone is not None
    name = max(packing.alone, key=lambda n: distance(packing.packed[n], packing.alone[n]))  # type: ignore[index]
    return Finding(reference, Difference(1, name, packing.alone[name], packing.packed[name]), "packing", KINDS["packing"])


def end_tokens_finding(reference: Variant, ends: EndTokensCheck) -> Finding:
    """Documents that never train on a token at which sampling stops."""
    difference = Difference(0, "documents that train on an end token", float(ends.documents), float(ends.ended))
    return Finding(reference, difference, "end tokens", KINDS["end tokens"].format(tokens=" or ".join(ends.tokens)))


def diagnose(runner: Runner, reference: Variant, variant: Variant, tolerance: float, no_dropout: tuple[str, ...]) -> Finding | None:
    """Compare a variant with the reference; None if they train the same run.

    Args:
        no_dropout: overrides that switch the model's dropout off; none if it has none.
    """
    expected, found = runner.run([reference, variant])
    difference = first_difference(found, expected, tolerance)
    if difference is None:
        return None
    kind = _kind(runner, reference, variant, tolerance, no_dropout, difference, found, expected)
    return Finding(variant, difference, kind, KINDS[kind].format(twice=2 * difference.step - 1))


def _kind(runner: Runner, reference: Variant, variant: Variant, tolerance: float, no_dropout: tuple[str, ...],
          difference: Difference, found: Trace, expected: Trace) -> str:
    if difference.quantity == "tokens_hash":
        return "data order"
    if difference.quantity == "learning_rate":
        return "schedule stepped twice" if _stepped_twice(found, expected) else "schedule"

    def agree(change: Callable[[Variant], Variant], of_reference: Callable[[Variant], Variant] | None = None) -> bool:
        a, b = runner.run([change(variant), (of_reference or change)(reference)])
        return a.error is None and b.error is None and first_difference(a, b, tolerance) is None

    def same(v: Variant) -> Variant:
        return v

    if no_dropout and agree(lambda v: replace(v, changes=(*v.changes, *no_dropout))):
        return "dropout"
    if agree(same, lambda v: replace(v, changes=(*v.changes, "gradient_clip=null"))):
        return "clipping"
    uncut = replace(variant, workers=1, micro_size=reference.micro_size)
    if uncut != variant and agree(lambda v: uncut if v == variant else v):
        return "normalisation"
    ratio = float(found.rows[0].get("grad_norm", 0.0)) / float(expected.rows[0]["grad_norm"])
    if difference.step == 1 and difference.quantity in ("loss", "grad_norm"):
        small = all(distance(float(found.rows[0].get(n, 0.0)), float(expected.rows[0][n])) < 3e-2 for n in ("loss", "grad_norm"))
        return "precision" if small else "normalisation" if abs(ratio - 1) > 3e-2 else "unknown"
    return "unknown"


def _stepped_twice(found: Trace, expected: Trace) -> bool:
    """Whether step k has the rate that the schedule gives step 2k - 1, as far as the reference goes."""
    rates = [float(row["learning_rate"]) for row in expected.rows]
    pairs = [(float(row["learning_rate"]), rates[2 * i]) for i, row in enumerate(found.rows) if 2 * i < len(rates)]
    return len(pairs) > 1 and all(distance(a, b) < 1e-6 for a, b in pairs)
