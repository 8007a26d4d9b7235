"""Compares losses and gradients with TRL 1.16 on the same batch, within 1e-5.

It needs the extra `bench`; run it with `make test-trl`. TRL no longer has PPO, which is compared with the written
reference only (tests/numerics/test_rl_losses.py).
"""

from __future__ import annotations

import copy
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "tests" / "numerics"))
sys.path.append(str(ROOT / "benchmarks"))

from rl_helpers import END, VOCAB, Given, Scripted, pairs, tiny
from test_preference_losses import made_up_rows
from test_rl_losses import LONGEST, cut, loss_of, made_up, shaken

from myllm_ray.trainers.dpo import DPOTrainer, pair_losses
from myllm_ray.trainers.grpo import GRPOTrainer
from myllm_ray.trainers.reward import RewardTrainer

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _peer() -> None:
    pytest.importorskip("trl", reason="pip install -e '.[bench]'")


def words() -> Any:
    from peers import word_tokenizer

    return word_tokenizer(VOCAB)


def text(ids: list[int]) -> str:
    return "".join(f" w{i}" for i in ids)


def arguments(cls: Any, folder: Path, **options: Any) -> Any:
    return cls(
        output_dir=str(folder),
        per_device_train_batch_size=5,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        learning_rate=1e-4,
        remove_unused_columns=False,
        **options,
    )


def single(seed: int, kind: str = "causal_lm") -> Any:
    model = tiny(seed, kind).float()
    model.model.config.pad_token_id = 2
    return model


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, model: Any, other: Any) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-5)
    model.zero_grad()
    other.zero_grad()
    ours.backward()
    theirs.backward()
    mine = {n.removeprefix("model."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in other.named_parameters():
        if parameter.grad is not None and name in mine:
            torch.testing.assert_close(
                mine[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


PAIR_CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sigmoid", {}, {}),
    ("hinge", {}, {}),
    ("ipo", {}, {}),
    ("apo_zero", {}, {}),
    ("apo_down", {}, {}),
    ("robust", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    ("sigmoid_norm", {"loss": "sigmoid", "length_normalization": True}, {}),
]


@pytest.mark.parametrize(("theirs", "settings", "options"), PAIR_CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_dpo(tmp_path: Path, theirs: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl import DPOConfig
    from trl import DPOTrainer as Peer

    rows, policy, reference = made_up_rows(1), single(1), single(2)
    rows = [(p, [*c, END], [*r, END]) for p, c, r in rows]
    data = Dataset.from_list(
        [{"prompt": text(p), "chosen": text(c[:-1]), "rejected": text(r[:-1])} for p, c, r in rows]
    )
    other = copy.deepcopy(policy.model)
    peer = Peer(
        other,
        copy.deepcopy(reference.model),
        args=arguments(DPOConfig, tmp_path, loss_type=[theirs], beta=0.3, max_length=None, **options),
        train_dataset=data,
        processing_class=words(),
    )
    batch = peer.data_collator(list(peer.train_dataset))
    # our loss is computed on the tokens that TRL made from the texts
    found = [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in peer.train_dataset]
    assert sorted(map(str, found)) == sorted(map(str, [(list(p), list(c), list(r)) for p, c, r in rows]))
    peer_loss = peer._compute_loss(peer.model, batch, False)
    trainer = DPOTrainer(policy, reference=reference, shared_prompt=True, **{"loss": theirs, "beta": 0.3, **settings})
    micro = pairs(found)
    assert_same(trainer.train_step(micro).loss_sum / len(found), peer_loss, policy, peer.model)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(smoothing: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOTrainer

    scores = -torch.rand(7, 2) * 3
    settings = types.SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.7,
        beta=2.0,
        label_smoothing=smoothing,
        accelerator=types.SimpleNamespace(device="cpu"),
    )
    theirs = CPOTrainer.cpo_loss(settings, scores[:, 0], scores[:, 1])[0]
    ours = pair_losses(
        scores,
        torch.zeros_like(scores),
        DPOTrainer.Config(loss="simpo", beta=2.0, gamma=0.7, label_smoothing=smoothing),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_orpo() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOTrainer

    scores = -torch.rand(7, 2) * 3 - 0.01
    settings = types.SimpleNamespace(beta=0.4, accelerator=types.SimpleNamespace(device="cpu"))
    theirs = -scores[:, 0] - ORPOTrainer.odds_ratio_loss(settings, scores[:, 0], scores[:, 1])[0]
    torch.testing.assert_close(
        pair_losses(scores, torch.zeros_like(scores), DPOTrainer.Config(loss="orpo", beta=0.4)),
        theirs,
        rtol=1e-5,
        atol=1e-5,
    )


def test_kto(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig
    from trl import KTOTrainer as Peer

    rows, policy, reference = made_up_rows(3), single(3), single(4)
    labels = [True, False, True, True, False]
    data = Dataset.from_list(
        [
            {"prompt": text(p), "completion": text(c), "label": label}
            for (p, c, _), label in zip(rows, labels, strict=True)
        ]
    )
    peer = Peer(
        copy.deepcopy(policy.model),
        copy.deepcopy(reference.model),
        args=arguments(KTOConfig, tmp_path, beta=0.3, max_length=None, desirable_weight=1.2, undesirable_weight=0.8),
        train_dataset=data,
        processing_class=words(),
    )
    batch = peer.data_collator(list(peer.train_dataset))
    peer_loss = peer._compute_loss(peer.model, batch, False)
    made = []
    for row in range(len(rows)):  # the answers to other prompts, in the pairing of TRL
        own, other = batch["completion_mask"][row].bool(), batch["KL_completion_mask"][row].bool()
        length = int(own.nonzero()[0])
        made.append(
            (
                batch["input_ids"][row][:length].tolist(),
                batch["input_ids"][row][own].tolist(),
                batch["KL_input_ids"][row][other].tolist(),
            )
        )
    trainer = DPOTrainer(
        policy,
        reference=reference,
        shared_prompt=True,
        loss="kto",
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.8,
    )
    from myllm_ray.common.types import Batch, Position

    micro = pairs(made, {"desirable": [float(v) for v in batch["label"]]})
    ((expanded,),) = trainer.optimizer_steps(Batch([micro], Position(), Position(), 0))
    # TRL's batch loss is a mean over answers, computed from sums over chosen and rejected answers
    ours = trainer.train_step(expanded).loss_sum / len(made)
    assert ours.item() == pytest.approx(peer_loss.item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("centering", [0.0, 0.05])
def test_reward(tmp_path: Path, centering: float) -> None:
    from datasets import Dataset
    from trl import RewardConfig
    from trl import RewardTrainer as Peer

    rows, model = [(p, [*c, END], [*r, END]) for p, c, r in made_up_rows(5)], single(5, "reward_model")
    margins = [0.0, 0.5, 1.0, 0.0, 0.25]
    data = Dataset.from_list(
        [
            {"prompt": text(p), "chosen": text(c[:-1]), "rejected": text(r[:-1]), "margin": m}
            for (p, c, r), m in zip(rows, margins, strict=True)
        ]
    )
    peer = Peer(
        copy.deepcopy(model.model),
        args=arguments(RewardConfig, tmp_path, max_length=None, center_rewards_coefficient=centering or None),
        train_dataset=data,
        processing_class=words(),
    )
    listed = list(peer.train_dataset)
    batch = peer.data_collator(listed)
    peer_loss = peer.compute_loss(peer.model, dict(batch))
    trainer = RewardTrainer(model, shared_prompt=True, centering=centering)
    ours = trainer.train_step(pairs(rows, {"margins": margins})).loss_sum / len(rows)
    assert_same(ours, peer_loss, model, peer.model)


GRPO_CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"loss_type": "grpo"}),
    ({"loss": "dr_grpo", "scale_rewards": "none"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    ({"loss": "dapo", "clip_high": 0.1}, {"loss_type": "dapo", "epsilon_high": 0.1}),
    ({"importance": "sequence"}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ({"kl_weight": 0.2}, {"loss_type": "grpo", "beta": 0.2}),
]


@pytest.mark.parametrize(("settings", "options"), GRPO_CASES, ids=lambda v: "-".join(map(str, v.values())) or "default")
def test_grpo(tmp_path: Path, settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Our trainer computes the advantages; both compute the loss of a policy that changed since sampling."""
    from datasets import Dataset
    from trl import GRPOConfig
    from trl import GRPOTrainer as Peer

    _, answers, rewards = made_up(11, 2, 3)
    questions = [
        [3, 4, 5],
        [6, 7, 8],
    ]  # equal lengths: TRL pads on the left, and GPT-2 counts positions from the padding on
    policy, reference = single(7), single(8)
    trainer = GRPOTrainer(
        policy,
        sampler=Scripted(answers, LONGEST),
        rewards=[Given(rewards)],
        group_size=3,
        epochs=2,
        reference=reference if settings.get("kl_weight") else None,
        **settings,
    )
    steps = trainer.optimizer_steps(cut(questions, 2))
    next(steps)
    shaken(policy, 1)
    (micro,) = next(steps)
    ours = loss_of(trainer, [micro])
    policy.model.save_pretrained(tmp_path / "model")  # TRL loads a reference by the name of the model
    peer = Peer(
        str(tmp_path / "model"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments(
            GRPOConfig,
            tmp_path,
            num_generations=5,
            max_completion_length=LONGEST,
            temperature=Scripted.temperature,
            use_bias_correction_kl=False,
            **{"beta": 0.0, **options},
        ),
        train_dataset=Dataset.from_list([{"prompt": text(q)} for q in questions] * 5),
        processing_class=words(),
    )
    width = max(map(len, questions))
    longest = max(map(len, answers))

    def padded(rows: list[list[int]], size: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [[2] * (size - len(r)) + r if left else r + [2] * (size - len(r)) for r in rows]
        mask = [[0] * (size - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (size - len(r)) for r in rows]
        return torch.tensor(ids), torch.tensor(mask)

    prompt_ids, prompt_mask = padded([questions[i // 3] for i in range(6)], width, True)
    completion_ids, completion_mask = padded(answers, longest, False)
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": micro["advantages"][:, 0].float(),
        "old_per_token_logps": micro["old_log_probs"],
        "num_items_in_batch": completion_mask.sum(),
    }
    if "reference_log_probs" in micro:
        inputs["ref_per_token_logps"] = micro["reference_log_probs"]
    peer.current_gradient_accumulation_steps = 1
    peer.args.steps_per_generation = 1
    peer.model.train()
    assert_same(ours, peer._compute_loss(peer.model, inputs), policy, peer.model)
