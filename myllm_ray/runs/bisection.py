"""The search for the change that makes two runs differ: their steps are made again under each change."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from myllm_ray.engine.checkpointing.manager import find_damage
from myllm_ray.runs.candidates import (
    Candidate,
    with_keys,
)
from myllm_ray.runs.explanation import ONLY_ROUNDING, Explanation, tolerance_of
from myllm_ray.runs.folder import RunFolder
from myllm_ray.runs.places import Place, Places, is_here
from myllm_ray.runs.records import (
    INPUTS,
    Effect,
    Steps,
    distance,
    first_effect,
    last_equal_before,
)
from myllm_ray.runs.reruns import Outcome, Reruns, Spec, for_rerun

_MOST_WORKERS = 4
_SHAPES = (
    ("tokenizer",),
    ("model", "lora"),
    ("optimizer", "name"),
    ("optimizer", "groups"),
    ("optimizer", "momentum"),
    ("optimizer", "options"),
    ("checkpoint", "resume"),
)
"""Keys that change the tensors of a checkpoint, or where a run starts."""


class Bisection:
    """The search for the cause: the base run A, each change alone, all changes, and what is necessary of all."""

    def __init__(
        self,
        a: RunFolder,
        b: RunFolder,
        first: Steps,
        second: Steps,
        result: Explanation,
        rerun: bool,
        most_steps: int,
        tell: Callable[[str], None],
    ):
        self.a, self.b, self.first, self.second, self.result = a, b, first, second, result
        self.rerun, self.most_steps, self.tell = rerun, most_steps, tell
        # Where runs may differ by rounding, the step that is explained is the first one with more than that.
        rounding = any(c.kind in ONLY_ROUNDING for c in result.candidates)
        self.tolerance = tolerance_of(a) if rounding else 0.0
        found = first_effect(first, second, self.tolerance) or first_effect(first, second)
        assert found is not None
        self.found = found
        self.alone: Outcome | None = None
        """The steps with the last change that has an effect alone."""

    def run(self) -> None:
        """Fills in the candidates, the notes and the conclusion of the result."""
        problem = self._why_not()
        if problem:
            for candidate in self.result.candidates:
                candidate.why_not = candidate.why_not or problem
            self._conclude_without(problem)
            return
        start = self._start()
        first = int(start.name.removeprefix("step-")) + 1 if start else 1
        if self.found.step - first + 1 > self.most_steps:
            steps = self.found.step - first + 1
            self._conclude_without(
                f"the nearest checkpoint of {self.a.name} is {steps} steps before the end of the difference: "
                f"--steps {steps} makes them again"
            )
            return
        with tempfile.TemporaryDirectory(prefix="myllm-ray-explain-") as folder:
            self.places = Places(Path(folder) / "code")
            interventions = self.a.path / "interventions.jsonl"
            self.reruns = Reruns(
                Path(folder), start, self.found.step, interventions if interventions.is_file() else None, self.tell
            )
            self._bisect()
            self.result.reruns = self.reruns.count

    def _why_not(self) -> str | None:
        if not self.rerun:
            return "not made again (--no-rerun)"
        if not self.result.candidates:
            return "nothing differs in what the runs were given"
        return None

    def _start(self) -> Path | None:
        """Returns the newest checkpoint of A from which the cause is still ahead, or None for step 0.

        A change that acts in the update of step n is seen in step n + 1. Hence the start is before the last step in
        which the runs were equal.
        """
        for candidate in self.result.candidates:
            if any(key[: len(start)] == start for key, _ in candidate.keys for start in _SHAPES):
                return None  # the tensors of a checkpoint may not fit the changed model or optimizer
        equal = last_equal_before(self.first, self.second, self.found.step, self.tolerance)
        for checkpoint in reversed(self.a.checkpoints()):
            if 0 < checkpoint.step < equal:
                damage = find_damage(checkpoint.path)
                if damage is None:
                    return checkpoint.path
                self.result.notes.append(f"checkpoint skipped: {damage}")
        return None

    def _bisect(self) -> None:
        place, problems = self.places.of(self.a)
        self.result.notes += [f"{self.a.name}: {problem}" for problem in problems]
        base_place = None if is_here(self.a, place) else place
        base = Spec(for_rerun(self.a.config), base_place)
        specs = [self._applied(base, place, [candidate]) for candidate in self.result.candidates]
        runnable = [(c, s) for c, s in zip(self.result.candidates, specs, strict=True) if s is not None]
        everything = self._applied(base, place, [c for c, _ in runnable if c.kind != "layout"])
        outcomes = self.reruns.make([base, *(s for _, s in runnable), *([everything] if everything else [])])
        self.base = outcomes[0]
        if self.base.error:
            self._conclude_without(f"{self.a.name} can't be made again: {self.base.error}")
            return
        self._note_reproduction(self.base, self.first, self.a.name)
        for (candidate, _), outcome in zip(runnable, outcomes[1:], strict=False):
            self._judge(candidate, outcome)
            if candidate.status == "cause":
                self.alone = outcome
        active = [c for c, _ in runnable if c.status == "cause"]
        total = outcomes[-1] if everything else None
        if total is not None and not total.error:
            self._note_reproduction(total, self.second, f"{self.a.name} with the changes")
            if not active and self._effect(total) is not None:
                active = self._necessary(base, place, [c for c, _ in runnable if c.status == "no effect"])
                for candidate in active:
                    candidate.status, candidate.effect = "part", f"changes {self._effect(total)}, with the others"
        self._conclude(active, total)

    def _applied(self, base: Spec, place: Place, candidates: Sequence[Candidate]) -> Spec | None:
        """Returns the spec of A with some changes to B, or None if one can't be made again; it then states why."""
        raw, target, workers = base.config, base.place, base.workers
        for candidate in candidates:
            change = candidate.changes[0]
            if candidate.kind == "config":
                raw = for_rerun(with_keys(raw, candidate.keys))
                continue
            if candidate.kind == "layout":
                count = self.b.get("scaling.workers", 0)
                workers = max(1, count[-1] if isinstance(count, list) else int(count))
                if workers > _MOST_WORKERS or self.b.get("scaling.gpus_per_worker", 0):
                    candidate.status, candidate.why_not = "impossible", f"needs {workers} workers or their GPUs"
                    return None
                raw = for_rerun(with_keys(self.a.config, candidate.keys), alone=workers == 1)
                continue
            target = target or place
            found: Place | None = None
            why = {
                "hardware": "other hardware",
                "data": "the hash follows from the files, the tokenizer and the order of the data",
            }.get(candidate.kind, "")
            if candidate.kind == "package":
                found, why = self.places.with_package(target, change.name, self.b)
            elif candidate.kind == "code":
                found, why = self.places.with_code(target, change.name, self.b)
            elif candidate.kind == "variable":
                variables = {**dict(target.variables), change.name: change.b}
                kept = tuple(sorted((k, v) for k, v in variables.items() if v is not None))
                found = Place(target.executable, target.path, kept, target.folder)
            if found is None:
                candidate.status, candidate.why_not = "impossible", why
                return None
            target = found
        return Spec(raw, target, workers)

    def _judge(self, candidate: Candidate, outcome: Outcome) -> None:
        """Sets the status of a change that was made alone."""
        if outcome.error:
            candidate.status, candidate.why_not = "impossible", outcome.error
            return
        effect = self._effect(outcome)
        if effect is None:
            candidate.status = "no effect"
            given = first_effect(self.base.steps, outcome.steps)
            if given is not None:  # for example the learning rate of the last step, which acts in the next one
                candidate.effect = f"only {given}"
        elif candidate.kind in ONLY_ROUNDING and effect.distance <= tolerance_of(self.a):
            candidate.status, candidate.effect = "rounding", f"changes {effect}"
        else:
            candidate.status, candidate.effect = "cause", f"changes {effect}"

    def _effect(self, outcome: Outcome) -> Effect | None:
        """Returns the first difference between the base and an outcome, exact.

        If the runs differ in a loss, a change of the learning rate alone, which acts later, is not the cause.
        """
        return first_effect(self.base.steps, outcome.steps, inputs=self.found.name in INPUTS)

    def _necessary(self, base: Spec, place: Place, candidates: list[Candidate]) -> list[Candidate]:
        """Returns a smallest set of changes that has an effect together, though none has one alone."""
        left = list(candidates)
        for candidate in candidates:
            without = [c for c in left if c is not candidate]
            spec = self._applied(base, place, without) if without else None
            if spec is None:
                continue
            outcome = self.reruns.make([spec])[0]
            if not outcome.error and self._effect(outcome) is not None:
                left = without
        return left

    def _note_reproduction(self, outcome: Outcome, recorded: Steps, name: str) -> None:
        """Notes whether the steps that were made again are those of the record."""
        common = {s: recorded[s] for s in outcome.steps if s in recorded}
        if not common:
            return
        apart = first_effect(outcome.steps, common, until=self.found.step)
        if apart is None:
            text = "is made again here bit for bit"
        elif apart.distance <= tolerance_of(self.a):
            text = f"is made again here within rounding ({apart.distance:.1e})"
        else:
            text = f"is not made again here: {apart} differs from its record"
        self.result.notes.append(f"{name} {text} (steps {min(common)} to {max(common)})")

    def _explains(self, outcome: Outcome | None) -> bool:
        """Whether an outcome has B's record in the step of the difference, within rounding."""
        if outcome is None or outcome.error:
            return False
        made, wanted = outcome.steps.get(self.found.step), self.second.get(self.found.step)
        if made is None or wanted is None:
            return False
        if made.batch is not None and wanted.batch is not None and made.batch != wanted.batch:
            return False
        # A learning rate that acts in the next step only is not part of the difference of a loss.
        names = [n for n in made.metrics if n in wanted.metrics and (n not in INPUTS or self.found.name in INPUTS)]
        pairs = [(made.metrics[n], wanted.metrics[n]) for n in names]
        return all(distance(x, y) <= max(tolerance_of(self.a), self.tolerance) for x, y in pairs)

    def _conclude(self, active: list[Candidate], total: Outcome | None) -> None:
        result = self.result
        left = [c for c in result.candidates if c.status == "impossible" and c.kind != "data"]
        result.causes = [c.text for c in active]
        data = next((c for c in result.candidates if c.kind == "data" and c.changes[0].name == "tokens"), None)
        if not active:
            effect = f"the runs differ in {self.found}"
            if data is not None and self.found.name == "batch":
                data.status, data.effect = "cause", f"changes {self.found}"
                result.causes = [f"the data ({data.text})"]
                result.conclusion = (
                    f"the data changes {self.found}: its hash differs ({data.text}), and no change of the config or "
                    "the code that was made again has an effect; the files of A are not kept, so it can't be made again"
                )
            elif len(left) == 1:
                result.conclusion = (
                    f"{effect}; {left[0].text} is what remains: no other change has an effect, and it can't be made "
                    f"again here ({left[0].why_not})"
                )
            elif left:
                names = "; ".join(c.text for c in left)
                result.conclusion = f"{effect}; what remains, because it can't be made again here: {names}"
            else:
                result.conclusion = f"{effect}, but none of the changes has an effect here, alone or together"
            return
        if active[0].status == "part":
            together = " together with ".join(c.text for c in active)
            result.conclusion = f"{together} {active[0].effect.removesuffix(', with the others')}; none does alone"
            return
        parts = "; ".join(f"{c.text} {c.effect}" for c in active)
        if len(active) == 1 and self._explains(self.alone):
            rest = "nothing else does"
        elif self._explains(total):
            rest = "all changes together give the record of B, and no other change has an effect alone"
        elif left:
            rest = "this is not all: what remains can't be made again here: " + "; ".join(c.text for c in left)
        else:
            rest = "no other change has an effect"
        result.conclusion = f"{parts}; {rest}"

    def _conclude_without(self, problem: str) -> None:
        """Concludes from the records alone."""
        names = "; ".join(c.text for c in self.result.candidates)
        self.result.conclusion = f"the runs differ in {self.found}; {problem}" + (
            f"; what may be the cause: {names}" if names else ""
        )
