"""Evaluation of trained models: the loss on documents, metrics of answers to prompts, win rates, and lm-eval tasks."""
