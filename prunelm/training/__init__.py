"""Training, distillation and checkpoints."""
