"""Trains with a manually constructed engine, without YAML and without Ray."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from myllm_ray import (
    CheckpointManager,
    ConsoleCallback,
    OptimizerManager,
    SchedulerManager,
    SFTTrainer,
    SingleGPUAccelerator,
    TrainerEngine,
)

my_model = LlamaForCausalLM(
    LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
)
# Each row counts up from a random number. The first four tokens are not targets of the loss.
my_dataset = []
for start in torch.randint(0, 16, (64,)):
    ids = (start + torch.arange(12)) % 32
    my_dataset.append({"input_ids": ids, "labels": torch.where(torch.arange(12) < 4, -100, ids)})

trainer = SFTTrainer(model=my_model, dataset=my_dataset)
config = {"num_epochs": 3, "gradient_clip": 1.0, "optimizer": {"name": "adamw", "lr": 1e-4}}
accelerator = SingleGPUAccelerator(config)
optimizers = OptimizerManager(trainer.model, config)
schedulers = SchedulerManager(optimizers.optimizer, config)
checkpoints = CheckpointManager(trainer.model)  # with folder="...", the run saves a checkpoint there at its end
engine = TrainerEngine(
    trainer,
    accelerator,
    optimizers,
    scheduler_manager=schedulers,
    checkpoint_manager=checkpoints,
    callbacks=[ConsoleCallback()],
    config=config,
)
engine.setup()
engine.train()
