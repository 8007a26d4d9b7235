"""Classification of a difference between two runs by experiments.

A different batch is `data order`; a different learning rate is the schedule. For any other difference, the runs are
repeated with changes that would remove one kind of error from the variant, or reproduce it in the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from myllm_ray.verify.compare import Difference, distance, first_difference
from myllm_ray.verify.end_tokens import EndTokensCheck
from myllm_ray.verify.packing import PackingCheck
from myllm_ray.verify.runs import Runner, Trace, Variant

KINDS = {
    "data order": "the batch of this step contains other rows, or the same rows in another order",
    "schedule stepped twice": "the learning rate is that of step {twice}: the schedule advances twice per step",
    "schedule": "the learning rate is not the schedule's",
    "normalisation": "the loss or the gradient depends on how the batch is split: something is averaged per "
    "micro-batch or per worker, and not once over the global batch",
    "clipping": "the weights change as if gradients were not clipped",
    "packing": "documents in one row attend to each other, or the trainer does not mark where one ends: in separate "
    "rows their loss differs",
    "end tokens": "no document trains on a token at which sampling stops ({tokens}): answers of this model do not end",
    "dropout": "without dropout the runs agree: the random numbers differ, or dropout is enabled in only one run",
    "precision": "all quantities differ slightly from the first step: a computation runs in a lower precision",
    "sharding": "a rank holds more of the model than the backend's share: it is not sharded, or has a larger dtype",
    "unknown": "no experiment explains the difference",
}
"""The kinds of differences, and the reason that is reported for each."""


@dataclass(frozen=True)
class Finding:
    """A difference between a variant and the reference, with its kind and the reported reason."""

    variant: Variant
    difference: Difference
    kind: str
    reason: str

    def __str__(self) -> str:
        d = self.difference
        numbers = (
            f"off by {d.found:.1e} of its largest value"
            if d.quantity == "weights"
            else f"{_shown(d.found)} instead of {_shown(d.expected)}"
        )
        when = f"step {d.step}" if d.step else "at the start"
        return f"{self.variant}: {when}, {d.quantity} {numbers}: {self.kind}: {self.reason}"


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def leak_finding(reference: Variant, packing: PackingCheck) -> Finding:
    """Returns the finding that packing changes the loss or the gradient norm of the first batch."""
    assert packing.packed is not None
    assert packing.alone is not None
    name = max(packing.alone, key=lambda n: distance(packing.packed[n], packing.alone[n]))  # type: ignore[index]
    return Finding(
        reference, Difference(1, name, packing.alone[name], packing.packed[name]), "packing", KINDS["packing"]
    )


def end_tokens_finding(reference: Variant, ends: EndTokensCheck) -> Finding:
    """Returns the finding that no document trains on a token at which sampling stops."""
    difference = Difference(0, "documents that train on an end token", float(ends.documents), float(ends.ended))
    return Finding(reference, difference, "end tokens", KINDS["end tokens"].format(tokens=" or ".join(ends.tokens)))


def diagnose(
    runner: Runner, reference: Variant, variant: Variant, tolerance: float, no_dropout: tuple[str, ...]
) -> Finding | None:
    """Compares a variant with the reference and classifies the first difference.

    Args:
        runner: Runs the variants.
        reference: The reference.
        variant: The variant to compare with it.
        tolerance: The largest accepted relative difference of loss and gradient norm.
        no_dropout: Overrides that turn the model's dropout off; empty if the model has no dropout.

    Returns:
        The finding, or None if both train the same run.
    """
    expected, found = runner.run([reference, variant])
    difference = first_difference(found, expected, tolerance)
    if difference is None:
        return None
    kind = _kind(runner, reference, variant, tolerance, no_dropout, difference, found, expected)
    return Finding(variant, difference, kind, KINDS[kind].format(twice=2 * difference.step - 1))


def _kind(
    runner: Runner,
    reference: Variant,
    variant: Variant,
    tolerance: float,
    no_dropout: tuple[str, ...],
    difference: Difference,
    found: Trace,
    expected: Trace,
) -> str:
    """Returns the kind of a difference, a key of `KINDS`."""
    if difference.quantity == "tokens_hash":
        return "data order"
    if difference.quantity == "learning_rate":
        return "schedule stepped twice" if _stepped_twice(found, expected) else "schedule"

    def agree(change: Callable[[Variant], Variant], of_reference: Callable[[Variant], Variant] | None = None) -> bool:
        """Whether the changed variant and the changed reference train the same run."""
        a, b = runner.run([change(variant), (of_reference or change)(reference)])
        return a.error is None and b.error is None and first_difference(a, b, tolerance) is None

    def same(v: Variant) -> Variant:
        return v

    if no_dropout and agree(lambda v: replace(v, changes=(*v.changes, *no_dropout))):
        return "dropout"
    # Reproduces the error in the reference: it agrees with the variant if the variant does not clip.
    if agree(same, lambda v: replace(v, changes=(*v.changes, "gradient_clip=null"))):
        return "clipping"
    # The variant with the batch of the reference, in one process and one micro-batch.
    uncut = replace(variant, workers=1, micro_size=reference.micro_size)
    if uncut != variant and agree(lambda v: uncut if v == variant else v):
        return "normalisation"
    ratio = float(found.rows[0].get("grad_norm", 0.0)) / float(expected.rows[0]["grad_norm"])
    # A lower precision changes both values by less than 3 %. A wrong divisor changes them by more.
    if difference.step == 1 and difference.quantity in ("loss", "grad_norm"):
        small = all(
            distance(float(found.rows[0].get(n, 0.0)), float(expected.rows[0][n])) < 3e-2 for n in ("loss", "grad_norm")
        )
        return "precision" if small else "normalisation" if abs(ratio - 1) > 3e-2 else "unknown"
    return "unknown"


def _stepped_twice(found: Trace, expected: Trace) -> bool:
    """Whether step k has the learning rate of step 2k - 1 of the reference, as far as the reference has that step."""
    rates = [float(row["learning_rate"]) for row in expected.rows]
    pairs = [(float(row["learning_rate"]), rates[2 * i]) for i, row in enumerate(found.rows) if 2 * i < len(rates)]
    return len(pairs) > 1 and all(distance(a, b) < 1e-6 for a, b in pairs)
