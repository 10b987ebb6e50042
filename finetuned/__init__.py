"""Trains the dense baselines; checkpoints land in finetuned/saved_models/."""
